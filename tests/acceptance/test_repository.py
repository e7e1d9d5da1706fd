"""Verbs that ask no shard: `check`, `lint`, `plan`, `show`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import Project

ROOT = Path(__file__).parents[2]


def test_check_refuses_a_script_that_describes_nothing_as_apply_will(repository: Project) -> None:
    repository.run("revision", "-m", "nothing yet")
    repository.run("plan")

    assert "nothing is described yet; fill upgrade() or move()" in repository.run("check", code=1).out


def test_plan_tells_what_it_wrote_before_one_was_refused_and_writes_nothing_that_is(repository: Project) -> None:
    (repository.migrations / "0003_order_address.sql").unlink()
    repository.run("revision", "-m", "drop it")
    script = repository.migrations / "0004_drop_it.py"
    script.write_text(script.read_text().replace("    pass\n", '    op.execute("DROP TABLE orders")\n'))

    said = repository.run("plan", "0003", "0004", code=2)

    assert said.out.startswith("0003_order_address  (written)\n  1. ")
    assert "0004_drop_it" in said.err
    assert (repository.migrations / "0003_order_address.sql").exists()
    assert not script.with_suffix(".sql").exists()


def test_a_word_that_move_rows_does_not_know_is_answered_with_those_it_knows(repository: Project) -> None:
    script = repository.migrations / "0003_order_address.py"
    script.write_text(script.read_text().replace("into=", "target="))

    said = repository.run("plan", code=2).err

    assert "unexpected keyword argument 'target'; it takes table, forward, back, check, " in said


@pytest.mark.parametrize(
    "verb",
    [("check",), ("lint",), ("lint", "--app", "."), ("plan",), ("show", "0002"), ("revision", "-m", "next")],
    ids=" ".join,
)
def test_what_asks_no_shard_runs_where_the_addresses_of_shards_are_not_known(
    repository: Project, verb: tuple[str, ...]
) -> None:
    repository.write_toml('[shards.eu1]\nurl = "${NOBODY_SET_THIS}"\n')
    repository.run(*verb)
    assert "NOBODY_SET_THIS is not set" in repository.run("status", code=2).err

    repository.write_toml('shards_from = "no_such_module:shards"\n')
    repository.run(*(verb if verb[0] != "revision" else ("lint",)))
    assert "no_such_module" in repository.run("status", code=2).err

    repository.write_toml('[shards.eu1]\nurl = "${NOBODY_SET_THIS}"\nwaev = "canary"\n')
    assert "shards.eu1.waev: unknown key" in repository.run(*verb, code=2).err


@pytest.mark.parametrize("edited", [True, False])
def test_the_configuration_of_throw_away_servers_goes_with_them_unless_somebody_wrote_into_it(
    repository: Project,
    edited: bool,  # noqa: FBT001 - two cases of one story
) -> None:
    running = repository.start("local", "up", "1", "--write", "local.toml")
    assert running.stdout is not None
    assert "wrote local.toml\n" == running.stdout.readline()
    written = repository.root / "local.toml"
    assert ["shards"] == list(tomllib.loads(written.read_text()))
    if edited:
        written.write_text(written.read_text() + "[lint]\n")
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)

    assert edited == written.exists()
    assert edited == ("kept local.toml, which was edited" in said)


@pytest.mark.parametrize("verb", [("show",), ("plan", "-n"), ("lint",)])
def test_a_revision_may_be_cut_short_as_long_as_it_is_one_alone(repository: Project, verb: tuple[str, ...]) -> None:
    assert repository.run(*verb, "0002").out == repository.run(*verb, "0002_split_name").out

    several = repository.run(*verb, "000", code=2)
    assert re.search(r"'000' begins \d+ revisions: 0001_shop, 0002_split_name, 0003_order_address", several.err)
    assert "no revision '9'; the newest is 0003_order_address" in repository.run(*verb, "9", code=2).err
    assert "begins" not in repository.run(*verb, "", code=2).err


def test_apply_says_when_nobody_can_have_read_what_runs(repository: Project) -> None:
    repository.write_toml('[shards.eu1]\nurl = "postgresql://nobody@127.0.0.1:1/nowhere"\n')
    assert "plan file" not in repository.run("apply", "--all", code=1).err

    (repository.migrations / "0002_split_name.sql").unlink()
    said = repository.run("apply", "--all", code=1)
    assert said.err.startswith("note: migrations/0002_split_name.py: no plan file, so what runs is rendered now")
    assert "`shardmig plan` writes it" in said.err


def test_check_judges_the_application_where_the_configuration_names_it(repository: Project) -> None:
    (repository.root / "shop").mkdir()
    code = repository.root / "shop" / "flags.py"
    code.write_text('from shardmig import Flag\n\nSPLIT_NAME = Flag("splt_name")\n')
    assert "application" not in repository.run("check").out

    repository.write_toml('[lint]\napp = ["shop"]\n')
    found = repository.run("check", code=1)
    assert "\nshop/flags.py:3:19: SA011 no plan has a flag splt_name" in found.out
    assert "did you mean split_name?" in found.out

    code.write_text(code.read_text().replace("splt", "split"))
    fine = repository.run("check")
    assert "application: clean, 1 file" in fine.out
    assert "note: no Flag(…) here names order_address" in fine.out


def test_a_plan_that_does_not_run_is_told_where_it_is_to_be_proved(repository: Project) -> None:
    assert "additive" in repository.run("lint", "--prove").out

    repository.run("revision", "-m", "typo")
    [script] = repository.migrations.glob("*_typo.py")
    text = script.read_text()
    end = text.index("def upgrade")
    script.write_text(text[:end] + 'def upgrade() -> None:\n    op.add_column("custmer", sa.Column("note", sa.Text))\n')
    said = repository.run("lint", "--prove", code=1)

    assert f'{script.stem} step 1: it does not run on an empty server: relation "custmer" does not exist' in said.out
    assert "Traceback" not in said.out + said.err


def test_lint_app_judges_flags_and_shows_the_cure(repository: Project) -> None:
    (repository.root / "app.py").write_text('import shardmig\n\nFLAG = shardmig.Flag("order_adress")\n')

    found = repository.run("lint", "--app", "app.py", code=1)

    assert "app.py:3:22 SA011" in found.out
    assert 'write:    Flag("order_address")' in found.out


@pytest.mark.parametrize("check", ["true", "false"])
def test_the_action_tells_all_that_it_finds_before_it_fails(repository: Project, tmp_path: Path, check: str) -> None:
    """A plan file is missing, and the application has a slip: lint alone finds neither."""
    (repository.migrations / "0003_order_address.sql").unlink()
    (repository.root / "shop").mkdir()
    (repository.root / "shop" / "flags.py").write_text('from shardmig import Flag\n\nSPLIT_NAME = Flag("splt_name")\n')
    program = tmp_path / "shardmig" / "bin" / "shardmig"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m shardmig "$@"\n')
    program.chmod(0o755)
    script = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"][-1]["run"]

    def run(app: str) -> subprocess.CompletedProcess[str]:
        inputs = {"RUNNER_TEMP": str(tmp_path), "DIFF": "", "APP": app, "CHECK": check}
        bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(
            bash, cwd=repository.root, env=os.environ | inputs, capture_output=True, text=True, check=False
        )

    both, alone = run("shop"), run("")

    assert (1, int(check == "true")) == (both.returncode, alone.returncode)
    assert "::error file=shop/flags.py,line=3" in both.stdout
    for ended in (both, alone):
        assert ("0003_order_address.py has no plan file" in ended.stdout) == (check == "true")
