"""Shards that plain Alembic brought somewhere are adopted there, and go on with shardmig."""

from __future__ import annotations

import re
import shutil
import tomllib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Project

OLD_SCRIPT = '''"""plain Alembic"""
from alembic import op

revision, down_revision = "{revision}", {parent!r}


def upgrade():
    op.drop_table("whatever_it_did")
    for row in op.get_bind().execute("SELECT 1"):
        pass
'''


@pytest.fixture
def legacy(project: Project) -> Project:
    """Make a history with a branch and a merge, and bring every shard to its head."""
    for path in project.migrations.iterdir():
        if path.is_file():
            path.unlink()
    for revision, parent in {"a1": None, "b1": "a1", "b2": "a1", "c1": ("b1", "b2")}.items():
        (project.migrations / f"{revision}_old.py").write_text(OLD_SCRIPT.format(revision=revision, parent=parent))
    for shard in project.shards:
        project.query(shard, "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        project.query(shard, "INSERT INTO alembic_version VALUES ('c1')")
        project.query(shard, "CREATE TABLE customer (id bigint PRIMARY KEY, full_name text)")
    project.write_toml('[lint]\nstart_after = "c1"\n')
    return project


def test_adopted_shards_go_on_after_the_history_of_alembic(legacy: Project) -> None:
    path = legacy.run("revision", "-m", "add a nickname").out.split()[-1]
    script = legacy.root / path
    assert 'down_revision = "0001_add_a_nickname", "c1"' in script.read_text()
    script.write_text(
        script.read_text().replace("    pass", '    op.add_column("customer", sa.Column("nickname", sa.Text))')
    )
    legacy.run("plan")
    legacy.run("check")
    assert "clean" in legacy.run("lint").out

    for asked in (["apply", "--all"], ["apply", "--all", "-n"], ["maintenance", "on", "--all"], ["status"]):
        name = "NAME" if "-n" in asked else "eu1"  # of several shards the same is said once
        assert f"`shardmig adopt --shard {name}` first" in legacy.run(*asked, code=None).out
    assert [(None,)] == legacy.query("eu1", "SELECT to_regnamespace('shardmig')")
    before = legacy.query("eu1", "SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
    legacy.run("adopt", "--all")
    assert before == legacy.query(
        "eu1", "SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    )
    legacy.run("adopt", "--all")

    legacy.run("apply", "--all")
    assert [("text",)] == legacy.query(
        "eu1", "SELECT data_type FROM information_schema.columns WHERE column_name = 'nickname'"
    )
    assert "adopt" in legacy.run("history", "--shard", "eu1").out


def test_a_shard_that_is_still_to_be_adopted_is_not_done_before_there_is_any_script(legacy: Project) -> None:
    shown = legacy.run("status").out

    assert "eu1  pending" in shown
    assert "0 of 4 shards are there (4 pending)" in shown
    assert "eu1: this shard was not adopted at c1" in legacy.run("apply", "--all", "-n", code=1).out
    legacy.run("adopt", "--all")
    assert "4 of 4 shards are there" in legacy.run("status").out


def test_shards_at_different_revisions_are_refused_with_the_list(legacy: Project) -> None:
    legacy.query("us1", "UPDATE alembic_version SET version_num = 'b1'")

    refused = legacy.run("adopt", "--all", code=2)

    assert re.search(r"eu1: c1\n.*us1: b1", refused.err, re.DOTALL)
    assert [(None,)] == legacy.query("eu1", "SELECT to_regnamespace('shardmig')")


def test_without_start_after_the_line_to_write_is_named(legacy: Project) -> None:
    legacy.write_toml()

    assert 'start_after = "c1"' in legacy.run("adopt", "--all", code=2).err


def test_a_shard_that_is_elsewhere_gets_the_cure_that_fits(legacy: Project) -> None:
    """The cure for a start_after that is too old is no downgrade."""
    legacy.write_toml('[lint]\nstart_after = "b1"\n')
    assert (
        'at c1, not at b1; if that is right, say [lint] start_after = "c1"' in legacy.run("adopt", "--all", code=1).out
    )
    for shard in legacy.shards:
        legacy.query(shard, "DROP TABLE alembic_version")
    assert "at no revision, not at b1; alembic upgrade b1 first" in legacy.run("adopt", "--all", code=1).out


def test_a_slip_in_start_after_is_refused_with_what_there_is(legacy: Project) -> None:
    legacy.write_toml('[lint]\nstart_after = "c2"\n')

    refused = legacy.run("adopt", "--all", code=2)

    assert "names c2, which no script in migrations/ is; the newest there is c1" in refused.err
    assert [(None,)] == legacy.query("eu1", "SELECT to_regnamespace('shardmig')")


@pytest.mark.parametrize("verb", [("plan",), ("check",), ("revision", "-m", "next"), ("apply", "--all"), ("lint",)])
def test_before_adopting_every_verb_says_to_adopt(legacy: Project, verb: tuple[str, ...]) -> None:
    legacy.write_toml()
    (legacy.root / "env.py").touch()

    said = legacy.run(*verb, code=None)

    assert 'say [lint] start_after = "c1" in shardmig.toml, then `shardmig adopt --all`' in said.out + said.err
    assert "HEAD" not in said.out + said.err


def test_alembics_own_directory_is_told_from_that_of_its_scripts(legacy: Project) -> None:
    legacy.write_toml()
    (legacy.migrations / "env.py").touch()

    assert 'say migrations = "migrations/versions"' in legacy.run("plan", code=2).err


def test_init_beside_an_alembic_ini_that_nobody_can_read_begins_anew(repository: Project) -> None:
    (repository.root / "shardmig.toml").unlink()
    (repository.root / "alembic.ini").write_bytes(
        "[alembic]\n# für alle\nscript_location = alembic\n".encode("latin-1")
    )

    repository.run("init")

    assert "migrations" == tomllib.loads((repository.root / "shardmig.toml").read_text())["migrations"]


@pytest.mark.parametrize("where", ["alembic", "%(here)s/db/migrations", "elsewhere"])
def test_init_beside_an_alembic_ini_takes_up_its_scripts(repository: Project, where: str) -> None:
    bare = repository
    shutil.rmtree(bare.migrations)
    (bare.root / "shardmig.toml").unlink()
    (bare.root / "alembic.ini").write_text(f"[alembic]\nscript_location = {where}\n[loggers]\nkeys = root\n")
    versions = bare.root / where.removeprefix("%(here)s/") / "versions"
    if where != "elsewhere":
        versions.mkdir(parents=True)
        (versions / "a1_old.py").write_text(OLD_SCRIPT.format(revision="a1", parent=None))

    said = bare.run("init").out

    written = tomllib.loads((bare.root / "shardmig.toml").read_text())
    if where == "elsewhere":
        assert "alembic.ini names no scripts that are here, so migrations is a history of its own" in said
        assert "migrations" == written["migrations"]
    else:
        assert (versions.relative_to(bare.root).as_posix(), "a1") == (
            written["migrations"],
            written["lint"]["start_after"],
        )
        assert "`shardmig adopt --all`" in said
        assert not (bare.root / "migrations").exists()


def test_a_start_after_that_no_script_has_is_an_error(legacy: Project) -> None:
    legacy.write_toml('[lint]\nstart_after = "zz"\n')

    assert "zz" in legacy.run("lint", code=2).err
