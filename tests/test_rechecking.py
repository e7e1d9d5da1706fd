"""Rows are compared while they move and whole before LIVE, and again whenever somebody asks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fleets import fleet_of
from moving import FLAG, customers, moving, notes, plan_of, same_table, second_table

from shardmig import checks
from shardmig.checks import Samples
from shardmig.config import Pace, Shard
from shardmig.errors import CheckFailed
from shardmig.events import BatchDone
from shardmig.outcomes import Outcome
from shardmig.plan import Plan, Statement
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


@pytest.mark.parametrize("rechecks", [True, False])
async def test_going_live_again_compares_all_rows_on_request(
    live: Fleet, shard: Shard, connect: Connect, *, rechecks: bool
) -> None:
    psql = connect(shard)
    psql.execute("UPDATE v SET b = 'spoiled' WHERE id = 7")
    live.rechecks = rechecks
    (await live.switch(FLAG, State.LIVE)).raise_for_failures()

    assert (2, True) == state(psql)
    assert [("X7" if rechecks else "spoiled",)] == psql.execute("SELECT b FROM v WHERE id = 7").fetchall()


async def test_what_a_recheck_finds_wrong_keeps_the_flag_also_from_those_who_do_not_ask(
    live: Fleet, shard: Shard, connect: Connect
) -> None:
    psql = connect(shard)
    # Whoever writes here knows nothing of the flag: no repair lasts.
    psql.execute(
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.b := 'spoiled'; RETURN NEW; END$$;"
        "CREATE TRIGGER spoil BEFORE UPDATE ON v FOR EACH ROW WHEN (NEW.id = 7) EXECUTE FUNCTION spoil();"
        "UPDATE v SET b = 'spoiled' WHERE id = 7"
    )
    live.rechecks = True
    [first] = await live.switch(FLAG, State.LIVE)
    live.rechecks = False
    [second] = await live.switch(FLAG, State.LIVE)

    assert [Outcome.FAILED, Outcome.FAILED] == [first.outcome, second.outcome]
    assert "v disagrees after move and repair: 1 rows, keys (7)" in second.reason
    assert (1, False) == state(psql)
    psql.execute("DROP TRIGGER spoil ON v")
    (await live.switch(FLAG, State.LIVE)).raise_for_failures()
    assert [("X7",)] == psql.execute("SELECT b FROM v WHERE id = 7").fetchall()


async def test_a_recheck_goes_on_where_a_lost_connection_ended_it(live: Fleet, shard: Shard, connect: Connect) -> None:
    psql = connect(shard)
    heard, listen = notes()

    def kill(event: Event) -> None:
        listen(event)
        if len(heard) == 1:
            psql.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name LIKE 'shardmig%' AND pid <> pg_backend_pid() AND datname = current_database()"
            )

    live.rechecks, live.listener = True, kill
    (await live.switch(FLAG, State.LIVE)).raise_for_failures()

    assert (2, True) == state(psql)
