"""`import shardmig` is what every process of an application pays: it stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shardmig

HEAVY = ("alembic", "sqlalchemy", "pydantic", "psycopg", "typer", "rich", "postgast", "asyncio", "pytest")
OURS = {
    "shardmig",
    "shardmig.errors",
    "shardmig.flags",
    "shardmig.flags.connection",
    "shardmig.flags.core",
    "shardmig.flags.opening",
    "shardmig.flags.prepared",
    "shardmig.flags.transaction",
    "shardmig.states",
}


def loaded_by(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and return the modules it loaded."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(ended.stdout.split())


@pytest.mark.parametrize("statement", ["import shardmig", "import shardmig.flags", "import shardmig.states"])
def test_importing_shardmig_loads_nothing_heavy(statement: str) -> None:
    loaded = loaded_by(statement)

    assert set() == {name for name in loaded if name.partition(".")[0] in HEAVY}
    assert OURS == {name for name in loaded if name.startswith("shardmig")}


def test_the_test_above_can_fail() -> None:
    assert "psycopg" in loaded_by("import shardmig, psycopg")


def test_committed_plans_are_accepted_without_loading_what_renders_them() -> None:
    """A third of a second of each command."""
    configuration = Path(__file__).parent / "data" / "shop.toml"
    loaded = loaded_by(
        "import pathlib, shardmig.fleet; from shardmig import config, repository; "
        f"repository.accepted_plans(config.load(pathlib.Path({str(configuration)!r}), shards=False))"
    )

    assert {"shardmig.fleet", "postgast"} <= loaded
    assert set() == {"alembic", "sqlalchemy"} & loaded


def test_the_public_names_are_all_there_and_sorted() -> None:
    public = [name for name in vars(shardmig) if name.isidentifier() and not name.startswith("_")]
    modules = {path.stem for path in Path(shardmig.__file__).parent.iterdir()}

    assert sorted(shardmig.__all__) == shardmig.__all__
    assert set(shardmig.__all__) == set(public) - modules
