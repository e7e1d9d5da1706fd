"""Verbs that ask no shard: `check`, `lint`, `plan`, `show`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Project


def test_check_judges_the_application_where_the_configuration_names_it(repository: Project) -> None:
    (repository.root / "shop").mkdir()
    code = repository.root / "shop" / "flags.py"
    code.write_text('from shardmig import Flag\n\nSPLIT_NAME = Flag("splt_name")\n')
    assert "application" not in repository.run("check").out

    repository.write_toml('[lint]\napp = ["shop"]\n')
    found = repository.run("check", code=1)
    assert f"{code}:3:19: SA011 no plan has a flag splt_name" in found.out
    assert "did you mean split_name?" in found.out

    code.write_text(code.read_text().replace("splt", "split"))
    fine = repository.run("check")
    assert "application: clean, 1 file" in fine.out
    assert "note: no Flag(…) here names order_address" in fine.out


def test_lint_app_judges_flags_and_shows_the_cure(repository: Project) -> None:
    (repository.root / "app.py").write_text('import shardmig\n\nFLAG = shardmig.Flag("order_adress")\n')

    found = repository.run("lint", "--app", "app.py", code=1)

    assert "app.py:3:22 SA011" in found.out
    assert 'write:    Flag("order_address")' in found.out
