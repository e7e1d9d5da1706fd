"""What counts as quiet, and as a handful: the express way relies on both."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from shardmig import quiet
from shardmig.findings import Table

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.config import Shard

ORDINARY = Table(
    name="t",
    kind="r",
    owner="me",
    owned=True,
    referable=True,
    row_security=False,
    reacts=False,
    parent=False,
    fires=False,
    oid=1,
    columns=2,
    file=1,
    known_pages=0,
    known_rows=-1.0,
)


@pytest.mark.parametrize(
    ("kind", "parent", "ordinary"), [("r", False, True), ("p", False, False), ("v", False, False), ("r", True, False)]
)
def test_an_ordinary_table_has_its_rows_itself(kind: str, *, parent: bool, ordinary: bool) -> None:
    table = replace(ORDINARY, kind=kind, parent=parent)

    assert ordinary is quiet._is_ordinary(table)
    assert ordinary is quiet._is_small(table, 1, rows_max=100)


@pytest.mark.parametrize(
    ("known_pages", "known_rows", "pages", "small"),
    [
        (0, -1.0, 64, True),
        (0, -1.0, 65, False),
        (0, 0.0, 1, True),
        (1, 100.0, 1, True),
        (1, 101.0, 1, False),
        (1, 60.0, 2, False),  # it has grown since
        (4, 400.0, 1, True),
    ],
)
def test_a_handful_is_told_by_statistics_and_by_the_file(
    known_pages: int, known_rows: float, pages: int, *, small: bool
) -> None:
    table = replace(ORDINARY, known_pages=known_pages, known_rows=known_rows)

    assert small is quiet._is_small(table, pages, rows_max=100)


def test_a_table_to_be_made_is_as_the_flight_makes_it_and_one_that_went_is_none() -> None:
    assert quiet._is_small(None, None, rows_max=100)
    assert not quiet._is_small(ORDINARY, None, rows_max=100)


@pytest.mark.parametrize("old_ms", [0, 100_000])
def test_whoever_holds_a_table_is_old_unless_he_is_seen_to_be_young(
    shard: Shard, connect: Connect, old_ms: int
) -> None:
    """A prepared transaction has no process, so nothing says how old it is; nor do the young ones beside it."""
    psql, young, prepared = connect(shard), connect(shard, autocommit=False), connect(shard, autocommit=False)
    for name in ("held", "prepared", "free"):
        psql.execute(f"CREATE TABLE {name} ()".encode())
    young.execute("SELECT FROM held")
    prepared.execute("SELECT FROM prepared")
    prepared.execute("PREPARE TRANSACTION 'quiet'")
    asked = quiet._HELD.format(names="to_regclass('held'), to_regclass('prepared'), to_regclass('free')")
    asked = asked.replace("$1", f"'{old_ms} ms'")
    try:
        found = psql.execute(f"SELECT relation::regclass::text FROM ({asked}) AS held ORDER BY 1".encode()).fetchall()
    finally:
        connect(shard).execute("ROLLBACK PREPARED 'quiet'")

    assert ([] if old_ms else [("held",)]) + [("prepared",)] == found
