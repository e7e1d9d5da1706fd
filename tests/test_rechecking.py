"""Rows are compared while they move and whole before LIVE, and again whenever somebody asks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fleets import fleet_of
from moving import FLAG, customers, moving, plan_of, same_table, second_table

from shardmig import checks
from shardmig.checks import Samples
from shardmig.config import Pace, Shard
from shardmig.errors import CheckFailed
from shardmig.events import BatchDone
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Plan, Statement
from shardmig.states import State

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.events import Event
    from shardmig.fleet import Fleet

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
SMALL = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)


def test_samples_take_their_share_of_the_time_and_no_more() -> None:
    samples = Samples(100.0)
    assert samples.due(100.0)  # the very first batch is one
    samples.took(0.02, 100)

    assert [False, True] == [samples.due(100.9), samples.due(101.0)]
    samples.took(10.0, 100)
    assert [False, True] == [samples.due(600.9), samples.due(601.1)]


async def test_a_wrong_move_ends_after_its_first_batch(shard: Shard) -> None:
    wrong = same_table(forward="UPDATE t SET b = CASE WHEN id <> 7 THEN upper(a) END WHERE {batch}")
    async with moving(shard, wrong, T, customers(5000)) as here:
        found: list[checks.Disagreement] = []
        said = r"the move of t is wrong: of rows just moved, 1 disagree with its check, keys \(7\); it stopped after 10"
        with pytest.raises(CheckFailed, match=said):
            await here.run(pace=SMALL, export=found.append).run()

        assert [(9,)] == await here.rows("SELECT count(b) FROM t")
        assert [(["7"],)] == [part.differing for part in found]


async def test_a_row_that_a_stale_writer_spoiled_is_mended_by_the_sample_and_stops_nothing(
    shard: Shard, connect: Connect
) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        app = connect(shard)

        def spoil(event: Event) -> None:
            if isinstance(event, BatchDone) and event.rows_done == 10:
                app.execute("UPDATE t SET b = 'stale' WHERE id = 3")

        assert await here.run(pace=SMALL, listener=spoil).run()
        assert [(100, 2)] == await here.rows("SELECT count(*) FILTER (WHERE b = upper(a)), max(n) FROM t")


async def test_sampling_leaves_dead_target_rows_to_the_check(shard: Shard) -> None:
    """Any number of them may lie in a gap of the source."""
    async with moving(shard, second_table(), T, U, "INSERT INTO t (id, a) VALUES (1, 'x'), (1000, 'y')") as here:
        await here.session.execute("INSERT INTO u (t_id, a) SELECT g, 'dead' FROM generate_series(2, 999) g")
        assert await here.run().run()

        assert [(2,)] == await here.rows("SELECT count(*) FROM u")


async def test_comparing_takes_a_small_part_of_the_time(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check far slower than its batch is asked once, not after each."""
    really, asked = checks.differing, []

    async def slowly(*arguments: Any) -> checks.Disagreement:
        asked.append(arguments)
        await asyncio.sleep(0.1)
        return await really(*arguments)

    monkeypatch.setattr(checks, "differing", slowly)
    async with moving(shard, same_table(), T, customers(400)) as here:
        assert await here.run(pace=SMALL).run()

    assert 1 == len(asked)


# --------------------------------------------------------------------------------------------------------------------
# --recheck


def upper(check: str = "SELECT id FROM v WHERE {batch} AND b IS DISTINCT FROM upper(a)") -> Plan:
    move = same_table(
        table="v",
        forward="UPDATE v SET b = upper(a) WHERE {batch}",
        check=check,
        back="UPDATE v SET a = lower(b) WHERE {batch}",
        back_check="SELECT id FROM v WHERE {batch} AND a IS DISTINCT FROM lower(b)",
    )
    table = Statement(sql="CREATE TABLE v (id bigint PRIMARY KEY, a text, b text)")
    return plan_of(move).model_copy(update={"steps": (table, *plan_of(move).steps)})


@pytest.fixture
async def live(shard: Shard, connect: Connect) -> Fleet:
    fleet = fleet_of([shard], upper())
    (await fleet.apply(aware="1")).raise_for_failures()
    connect(shard).execute("INSERT INTO v SELECT g, 'x' || g, 'X' || g FROM generate_series(1, 50) g")
    (await fleet.switch(FLAG, State.DUAL)).raise_for_failures()
    return fleet


def state(psql: Any) -> tuple[Any, ...]:
    row = psql.execute("SELECT state, new_valid FROM shardmig.flag").fetchone()
    assert row is not None
    return tuple(row)


async def test_going_live_again_compares_all_rows_on_request_and_changes_none(
    live: Fleet, shard: Shard, connect: Connect
) -> None:
    """What is wrong since LIVE may be newer than what a repair would write over it."""
    psql = connect(shard)
    psql.execute("UPDATE v SET b = 'spoiled' WHERE id = 7")
    live.rechecks = True
    [first] = await live.switch(FLAG, State.LIVE)

    said = "x stays DUAL, and no row of v was changed: new is not forward(old), nor old back(new); first keys: 1 rows"
    assert Outcome.FAILED is first.outcome
    assert f"{said}, keys (7). Correct those rows" in first.reason
    assert [("spoiled",)] == psql.execute("SELECT b FROM v WHERE id = 7").fetchall()
    assert (1, True) == state(psql)
    psql.execute("UPDATE v SET b = 'X7' WHERE id = 7")
    (await live.switch(FLAG, State.LIVE)).raise_for_failures()
    assert (2, True) == state(psql)


async def test_going_live_again_compares_nothing_where_nobody_asks(live: Fleet, shard: Shard, connect: Connect) -> None:
    psql = connect(shard)
    psql.execute("UPDATE v SET b = 'spoiled' WHERE id = 7")
    (await live.switch(FLAG, State.LIVE)).raise_for_failures()

    assert [(2, True, "spoiled")] == [(*state(psql), *row) for row in psql.execute("SELECT b FROM v WHERE id = 7")]


async def test_what_live_wrote_richer_than_old_could_say_agrees_and_stays(shard: Shard, connect: Connect) -> None:
    """A name that forward() would split elsewhere: old follows from new, and that is all that LIVE asks for."""
    psql = connect(shard)
    psql.execute("CREATE TABLE person (id bigint PRIMARY KEY, a text); INSERT INTO person VALUES (1, 'Ada Lovelace')")
    first, last = "split_part(a, ' ', 1)", "substr(a, strpos(a, ' ') + 1)"
    split = Move(
        table="person",
        key=("id",),
        writes=("b", "c"),
        restores=("a",),
        forward=f"UPDATE person SET b = {first}, c = {last} WHERE {{batch}}",
        check=f"SELECT id FROM person WHERE {{batch}} AND (b, c) IS DISTINCT FROM ({first}, {last})",
        back="UPDATE person SET a = b || ' ' || c WHERE {batch}",
        back_check="SELECT id FROM person WHERE {batch} AND a IS DISTINCT FROM b || ' ' || c",
    )
    columns = Statement(sql="ALTER TABLE person ADD COLUMN b text, ADD COLUMN c text")
    fleet = fleet_of([shard], plan_of(split).model_copy(update={"steps": (columns, *plan_of(split).steps)}))
    (await fleet.apply(aware="1")).raise_for_failures()
    psql.execute("UPDATE person SET (a, b, c) = ('Mary Ann Lee', 'Mary Ann', 'Lee')")
    (await fleet.switch(FLAG, State.DUAL)).raise_for_failures()
    fleet.rechecks = True
    (await fleet.switch(FLAG, State.LIVE)).raise_for_failures()

    assert [("Mary Ann Lee", "Mary Ann", "Lee")] == psql.execute("SELECT a, b, c FROM person").fetchall()


async def test_where_nothing_says_what_old_would_be_a_recheck_names_what_live_wrote(
    shard: Shard, connect: Connect
) -> None:
    """A second table without a way back: rows that differ, that are missing, and that have no source."""
    psql = connect(shard)
    psql.execute(f"{T}; {customers(3)}")
    copy = second_table(
        forward="WITH source AS MATERIALIZED (SELECT id, a FROM t WHERE {batch} FOR SHARE) INSERT INTO u (t_id, a) "
        "SELECT id, a FROM source ON CONFLICT (t_id) DO UPDATE SET a = excluded.a"
    )
    table = Statement(sql="CREATE TABLE u (t_id bigint PRIMARY KEY, a text)")
    fleet = fleet_of([shard], plan_of(copy).model_copy(update={"steps": (table, *plan_of(copy).steps)}))
    (await fleet.apply(aware="1")).raise_for_failures()
    psql.execute("UPDATE u SET a = 'new' WHERE t_id = 1; DELETE FROM u WHERE t_id = 2; DELETE FROM t WHERE id = 3")
    (await fleet.switch(FLAG, State.DUAL)).raise_for_failures()
    fleet.rechecks = True
    [report] = await fleet.switch(FLAG, State.LIVE)

    assert "new is not forward(old); first keys: 3 rows, keys (1), (2), (3)" in report.reason
    assert [(1, "new"), (3, "x3")] == psql.execute("SELECT t_id, a FROM u ORDER BY 1").fetchall()


async def test_a_recheck_begins_again_where_a_lost_connection_ended_it(
    live: Fleet, shard: Shard, connect: Connect
) -> None:
    psql, holder = connect(shard), connect(shard)
    live.rechecks = True
    runner = (
        "FROM pg_stat_activity WHERE application_name LIKE 'shardmig%' AND wait_event_type = 'Lock' "
        "AND datname = current_database()"
    )
    holder.execute("BEGIN; LOCK TABLE v")
    switching = asyncio.create_task(live.switch(FLAG, State.LIVE))
    while not psql.execute(f"SELECT pg_terminate_backend(pid, 5000) {runner}").fetchall():
        await asyncio.sleep(0.01)
    holder.execute("COMMIT")
    (await switching).raise_for_failures()

    assert (2, True) == state(psql)
