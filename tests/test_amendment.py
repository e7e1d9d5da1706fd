"""A step that one shard's data breaks: that shard finishes by another plan, and its ledger keeps both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fleets import SHOP, UPPER, fleet_of, plan

from shardmig import amendment
from shardmig.events import Waiting
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.planfile import dumps, loads
from shardmig.records import read_records
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

    from shardmig.config import Shard
    from shardmig.session import Session

COLUMN = Statement(sql="ALTER TABLE customer ADD COLUMN ratio int")


def ratio(forward: str, *statements: Statement, **more: Any) -> Plan:
    """Fill a column by an expression that some shard's data may break."""
    move = Move(
        table="customer",
        key=("id",),
        writes=("ratio",),
        forward=f"UPDATE customer SET ratio = {forward} WHERE {{batch}}",
        check=f"SELECT id FROM customer WHERE {{batch}} AND ratio IS DISTINCT FROM ({forward})",
    )
    steps = (*(statements or (COLUMN,)), Switch(to=State.DUAL), move, Switch(to=State.LIVE))
    return plan("0002_ratio", *steps, parent="0001_shop", **more)


NAIVE = ratio("100 / (length(name) - 3)")
CAREFUL = ratio("100 / nullif(length(name) - 3, 0)", amends=(NAIVE.sha256,))


@pytest.fixture
async def broken(shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]) -> list[Shard]:
    """Return two shards with NAIVE applied: eu1 is LIVE, the data of eu2 broke the move."""
    two = [shards["eu1"], shards["eu2"]]
    await fleet_of(two, SHOP).apply()
    connect(two[0]).execute("INSERT INTO customer VALUES (1, 'Plato')")
    connect(two[1]).execute("INSERT INTO customer SELECT n, 'Plato' FROM generate_series(1, 300) n")
    connect(two[1]).execute("INSERT INTO customer VALUES (1000, 'Ada')")
    report = await fleet_of(two, SHOP, NAIVE).apply()
    assert [Outcome.DONE, Outcome.FAILED] == [one.outcome for one in report]
    assert "division by zero" in report.shards[1].reason
    return two


async def test_amending_finishes_the_broken_shard_and_its_ledger_shows_both_plans(
    broken: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    both = fleet_of(broken, SHOP, CAREFUL)
    assert [Outcome.DONE, Outcome.PLAN_CHANGED] == [one.outcome for one in await both.apply()]

    report = await fleet_of(broken[1:], SHOP, CAREFUL).amend("0002_ratio", reason="names of three letters")

    assert report.done, list(report)
    assert (await both.apply()).done
    connection = connect(broken[1])
    assert [(None,)] == connection.execute("SELECT ratio FROM customer WHERE id = 1000").fetchall()
    assert [(CAREFUL.sha256, dumps(CAREFUL))] == connection.execute(
        "SELECT sha256, plan FROM shardmig.migration WHERE revision = '0002_ratio'"
    ).fetchall()
    assert [(NAIVE.sha256, dumps(NAIVE), "names of three letters")] == connection.execute(
        "SELECT sha256, plan, reason FROM shardmig.amendment"
    ).fetchall()
    assert [(NAIVE.sha256, CAREFUL.sha256)] == connection.execute(
        "SELECT before, after FROM shardmig.log WHERE action = 'amend'"
    ).fetchall()
    assert [one.outcome for one in await both.status()] == [Outcome.DONE] * 2


async def test_amending_twice_or_where_the_amended_plan_is_finished_changes_nothing(
    broken: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    for _ in range(2):
        assert (await fleet_of(broken, SHOP, CAREFUL).amend("0002_ratio", reason="r")).done

    assert [(0,), (1,)] == [
        connect(shard).execute("SELECT count(*) FROM shardmig.amendment").fetchone() for shard in broken
    ]


async def test_a_plan_that_does_not_say_what_it_amends_is_refused_with_the_line_to_write(broken: list[Shard]) -> None:
    silent = fleet_of(broken[1:], SHOP, CAREFUL.model_copy(update={"amends": ()}))

    for report in (await silent.apply(), await silent.amend("0002_ratio", reason="r")):
        assert Outcome.PLAN_CHANGED is report.shards[0].outcome
        assert f'amends = ("{NAIVE.sha256}",)' in report.shards[0].reason


async def test_a_finished_step_is_immutable(
    broken: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    other_column = ratio("1", Statement(sql="ALTER TABLE customer ADD COLUMN ratio bigint"), amends=(NAIVE.sha256,))
    before = connect(broken[1]).execute("SELECT * FROM shardmig.step ORDER BY revision, number").fetchall()

    [report] = await fleet_of(broken[1:], SHOP, other_column).amend("0002_ratio", reason="r")

    assert Outcome.PLAN_CHANGED is report.outcome
    assert "step 1 is finished there" in report.reason
    assert before == connect(broken[1]).execute("SELECT * FROM shardmig.step ORDER BY revision, number").fetchall()


async def test_a_flag_cannot_change_its_name_or_its_way(broken: list[Shard]) -> None:
    without = plan("0002_ratio", COLUMN, Switch(to=State.LIVE), parent="0001_shop", amends=(NAIVE.sha256,))

    [report] = await fleet_of(broken[1:], SHOP, without).amend("0002_ratio", reason="r")

    assert Outcome.PLAN_CHANGED is report.outcome
    assert "a flag keeps its name" in report.reason


async def test_what_an_operator_paused_rests_under_the_amended_plan_too(
    broken: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    psql = connect(broken[1])
    psql.execute("SELECT shardmig.pause('ratio', 'month end')")
    fleet = fleet_of(broken[1:], SHOP, CAREFUL)

    assert (await fleet.amend("0002_ratio", reason="r")).done

    kinds = psql.execute("SELECT kind, paused FROM shardmig.step WHERE revision = '0002_ratio' ORDER BY number")
    assert [("statement", None), ("switch", None), ("move", "month end"), ("switch", None)] == kinds.fetchall()
    resting = Waiting(broken[1].name, "an operator paused it: month end")
    fleet.listener = lambda event: fleet.stop.set() if event == resting else None
    assert [Outcome.INTERRUPTED] == [one.outcome for one in await fleet.apply()]
    psql.execute("SELECT shardmig.resume('ratio')")
    fleet.stop.clear()
    assert (await fleet.apply()).done


async def test_a_flag_that_is_switched_while_its_plan_is_amended_refuses_that(
    broken: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Going back to OLD it forgets its moves: the row of one that was done would be gone, for good."""
    shard, psql = broken[1], connect(broken[1])
    assert (await fleet_of([shard], SHOP, CAREFUL).amend("0002_ratio", reason="names of three letters")).done
    assert (await fleet_of([shard], SHOP, CAREFUL).apply(until=Until.MOVED)).done
    later = CAREFUL.model_copy(update={"needs": ("shop",), "amends": (CAREFUL.sha256,)})
    fleet = fleet_of([shard], SHOP, later)

    async def amend_late(session: Session) -> None:
        records = await read_records(session)
        assert records is not None
        psql.execute("SELECT shardmig.switch('ratio', 'OLD', 'by hand')")
        await amendment.amend(session, fleet.plans[1], records, reason="r")

    [report] = await fleet.each(amend_late)

    assert Outcome.PARKED is report.outcome
    assert "was switched by somebody else meanwhile" in report.reason
    steps = psql.execute("SELECT number FROM shardmig.step WHERE revision = '0002_ratio' ORDER BY 1").fetchall()
    assert [(1,), (2,), (3,), (4,)] == steps


async def test_where_a_revision_is_not_begun_there_is_nothing_to_amend(
    broken: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    later = UPPER.model_copy(update={"revision": "0003_upper", "parent": "0002_ratio"})

    assert (await fleet_of(broken[1:], SHOP, NAIVE, later).amend("0003_upper", reason="r")).done
    assert [] == connect(broken[1]).execute("SELECT * FROM shardmig.amendment").fetchall()


async def test_what_a_changed_plan_says_is_the_whole_way_on(broken: list[Shard]) -> None:
    silent = fleet_of(broken[1:], SHOP, CAREFUL.model_copy(update={"amends": ("0" * 64,)}))
    [report] = await silent.apply()
    lines = report.reason.splitlines()

    assert lines[0].endswith(
        "not the plan that was begun there; restore script and plan file, or amend what is not finished"
    )
    assert [
        f'  1. write into the script, below its revision:  amends = ("{"0" * 64}", "{NAIVE.sha256}",)',
        "  2. shardmig plan 0002_ratio   # then have script and plan file reviewed, and commit them",
        '  3. shardmig amend 0002_ratio --shard eu2 --reason "…"   # or --all: wherever it is not finished',
        "  4. shardmig apply --shard eu2",
    ] == lines[2:6]

    [ready] = await fleet_of(broken[1:], SHOP, CAREFUL).apply()
    assert ready.reason.splitlines()[2].startswith("  1. shardmig amend 0002_ratio --shard eu2 ")


async def test_where_what_changed_is_finished_the_way_on_is_a_new_revision(broken: list[Shard]) -> None:
    other_column = ratio("1", Statement(sql="ALTER TABLE customer ADD COLUMN ratio bigint"))

    [report] = await fleet_of(broken[1:], SHOP, other_column).apply()

    assert "step 1 is finished there and must stay" in report.reason.splitlines()[0]
    assert "write a new revision" in report.reason.splitlines()[0]
    assert "amends" not in report.reason


async def test_status_names_the_step_that_failed_until_it_is_tried_again(broken: list[Shard]) -> None:
    [done, failed] = await fleet_of(broken, SHOP, NAIVE).status()

    assert "" == done.reason
    assert "failed: 0002_ratio step 3: division by zero" in failed.reason


async def test_status_keeps_the_flags_of_a_shard_whose_plan_changed(broken: list[Shard]) -> None:
    [found] = await fleet_of(broken[1:], SHOP, CAREFUL).status()

    assert Outcome.PLAN_CHANGED is found.outcome
    assert found.records is not None and "ratio" in found.records.flags  # noqa: PT018 - one thing


def test_what_a_plan_amends_stands_in_its_file_and_not_in_its_hash() -> None:
    assert CAREFUL == loads(dumps(CAREFUL))
    assert CAREFUL.sha256 == CAREFUL.model_copy(update={"amends": ()}).sha256
    assert f"--! amends: {NAIVE.sha256}\n" in dumps(CAREFUL)
