"""How far a move is: said while it runs, while it rests, after an interruption, and never better than it is known."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from fleets import fleet_of
from moving import FLAG, customers, moving, notes, plan_of, same_table

from shardmig import checks
from shardmig.cli.progress import _describe
from shardmig.cli.results import _status_body
from shardmig.config import Pace, Shard
from shardmig.events import BatchDone, RangeCompared, Waiting
from shardmig.plan import Statement
from shardmig.progress import Moved, duration, moved_of, state_of
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from conftest import Connect

    from shardmig.events import Event
    from shardmig.fleet import Fleet
    from shardmig.status import ShardStatus

SLOW = {"batch_rows": 10, "batch_rows_min": 10, "batch_rows_max": 10, "max_rows_per_s": 200}


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        (Moved(0, None), "0 rows moved"),
        (Moved(500, 2000, 100.0, 15.0), "500 of about 2,000 rows moved (25 %), 100 rows/s, 15 s left"),
        (Moved(1999, 2000, 0.0), "1,999 of about 2,000 rows moved (99 %)"),
        (Moved(500, None, 100.0), "500 rows moved, 100 rows/s"),
        (Moved(3000, 2000, 100.0), "3,000 rows moved, more than were estimated, 100 rows/s"),
        (Moved(0, 10**9, 1e5, 1e4), "0 of about 1,000,000,000 rows moved (0 %), 100,000 rows/s, 2 h 47 min left"),
        (Moved(2000, 1900, None, None, 0), "2,000 rows moved, 0 compared (0 %)"),
        (Moved(2000, 1900, 5e3, 0.1, 1500), "2,000 rows moved, 1,500 compared (75 %), 5,000 rows/s, 1 s left"),
        (Moved(2000, 1900, 5e3, None, 2001), "2,000 rows moved, 2,001 compared, 5,000 rows/s"),
        (Moved(0, None, None, None, 0), "0 rows moved, 0 compared"),
    ],
)
def test_what_is_not_known_is_not_said(moved: Moved, said: str) -> None:
    assert said == str(moved)


def test_durations_are_never_shorter_than_they_are() -> None:
    assert ["1 s", "60 s", "2 min", "60 min", "1 h 1 min", "1.5 days"] == [
        duration(seconds) for seconds in (0.2, 59.5, 61, 3599, 3601, 129_600)
    ]


def test_apply_shows_the_same_as_status() -> None:
    moving = BatchDone("eu1", "0002_x", 2, 10, 500, 2000, 100.0, 15.0)
    comparing = RangeCompared("eu1", "0002_x", 2, 1500, 2000, 5000.0, 0.1)

    assert "0002_x step 2: 500 of about 2,000 rows moved (25 %), 100 rows/s, 15 s left" == _describe(moving)
    assert "0002_x step 2: 2,000 rows moved, 1,500 compared (75 %), 5,000 rows/s, 1 s left" == _describe(comparing)


@pytest.fixture
async def fleet(shard: Shard, connect: Connect) -> Fleet:
    """Return a fleet of one shard with 400 analyzed rows to be moved, 200 a second."""
    move = same_table(
        table="v",
        forward="UPDATE v SET b = upper(a) WHERE {batch}",
        check="SELECT id FROM v WHERE {batch} AND b IS DISTINCT FROM upper(a)",
        back=None,
        back_check=None,
        restores=(),
    )
    table = Statement(sql="CREATE TABLE v (id bigint PRIMARY KEY, a text, b text)")
    plan = plan_of(move).model_copy(update={"steps": (table, *plan_of(move).steps)})
    fleet = fleet_of([shard], plan, pace=SLOW)
    (await fleet.apply(until=Until.STRUCTURE)).raise_for_failures()
    psql = connect(shard)
    psql.execute("INSERT INTO v SELECT g, 'x' || g FROM generate_series(1, 400) g")
    psql.execute("ANALYZE v")
    return fleet


async def seen(fleet: Fleet, there: Callable[[ShardStatus], bool]) -> ShardStatus:
    async with asyncio.timeout(10):
        while True:
            [status] = await fleet.status()
            if there(status):
                return status
            await asyncio.sleep(0.05)


async def test_status_tells_rows_percent_and_time_left_while_a_move_runs_and_no_time_after_it_stopped(
    fleet: Fleet,
) -> None:
    heard, fleet.listener = notes()
    run = asyncio.create_task(fleet.apply(aware="1"))
    running = await seen(fleet, lambda status: " left" in status.reason.partition("worked on")[2])
    [body] = _status_body(running)["moves"]
    fleet.stop.set()
    await run
    fleet.stop.clear()
    [stopped] = await fleet.status()

    assert 400 == body["of"]
    assert 0 < body["rows"] < 400
    assert body["rows"] * 100 // 400 == body["percent"]
    assert body["rows_per_s"] == pytest.approx(200, rel=0.35)
    moving_s = (400 - body["rows"]) / body["rows_per_s"]
    assert moving_s < body["eta_s"] < moving_s + 1  # the check of 400 rows comes on top
    assert body["compared"] is None
    assert f"of about 400 rows moved ({body['percent']} %)" in running.reason
    assert "worked on" not in stopped.reason
    assert "rows moved (" in stopped.reason
    assert any(isinstance(event, BatchDone) and event.eta_s for event in heard)


async def test_status_tells_why_a_move_rests_and_promises_no_time(fleet: Fleet, shard: Shard, connect: Connect) -> None:
    psql = connect(shard)
    heard, fleet.listener = notes()
    run = asyncio.create_task(fleet.apply(aware="1"))
    await seen(fleet, lambda status: " left" in status.reason.partition("worked on")[2])
    by_hand = replace(fleet, reason="sale")
    (await by_hand.pause(FLAG)).raise_for_failures()
    resting = await seen(fleet, lambda status: "rests: an operator paused it: sale" in status.reason)
    [body] = _status_body(resting)["moves"]
    (await by_hand.resume(FLAG)).raise_for_failures()
    (await run).raise_for_failures()
    [done] = await fleet.status()

    assert ("an operator paused it: sale", None, None) == (body["waiting"], body["eta_s"], body["rows_per_s"])
    assert any(isinstance(event, Waiting) and event.reason == body["waiting"] for event in heard)
    assert "rows moved" not in done.reason
    said = psql.execute("SELECT action, reason FROM shardmig.log WHERE action IN ('pause', 'resume') ORDER BY id")
    assert [("pause", "sale"), ("resume", None)] == said.fetchall()


async def test_a_speed_that_nobody_has_noted_lately_is_none(shard: Shard) -> None:
    """A killed runner says nothing any more; its ledger still does."""
    table = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
    async with moving(shard, same_table(), table, customers(20)) as here:
        assert await here.run(pace=Pace()).run()
        await here.session.execute("UPDATE shardmig.step SET rows_per_s = 5, noted_at = clock_timestamp()")
        fresh = (await here.step()).rows_per_s
        await here.session.execute("UPDATE shardmig.step SET noted_at = clock_timestamp() - interval '16 s'")

        assert (5.0, None) == (fresh, (await here.step()).rows_per_s)


async def test_behind_the_last_batch_status_tells_how_far_the_check_is(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty ranges of ten rows; each row's comparison takes ten milliseconds."""
    monkeypatch.setattr(checks, "RANGE_ROWS", 10)
    table = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
    asleep = "CASE WHEN pg_sleep(0.01)::text = '' THEN b <> upper(a) END"
    slow = same_table(check=f"SELECT id FROM t WHERE {{batch}} AND {asleep}")
    async with moving(shard, slow, table, customers(200), "ANALYZE t") as here:
        heard, listen = notes()
        stop = asyncio.Event()
        pace = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)
        run = asyncio.create_task(here.run(listener=listen, stop=stop, pace=pace).run())
        psql = connect(shard)
        async with asyncio.timeout(10):
            while not psql.execute("SELECT FROM shardmig.step WHERE checked_rows > 50").fetchall():
                await asyncio.sleep(0.05)
        stop.set()
        assert not await run

        part = await here.step()
        moved = moved_of(part, at_work=True)
        assert (200, False) == (part.rows, part.checked_at is not None)
        assert moved.compared is not None
        assert 50 < moved.compared < 200
        assert moved.rows_per_s == pytest.approx(100, rel=0.3)
        assert moved.eta_s == pytest.approx((200 - moved.compared) / moved.rows_per_s, rel=0.01)
        assert f"200 rows moved, {moved.compared} compared ({moved.compared // 2} %)" in str(
            state_of(part, at_work=True)
        )
        last = [event for event in heard if isinstance(event, BatchDone)][-1]
        assert (200, pytest.approx(2, rel=0.3)) == (last.rows_done, last.eta_s)  # by then it is all the check's
        assert [10] == sorted({b.rows_done - a.rows_done for a, b in pairwise(ranges(heard))})

        heard.clear()
        assert await here.run(listener=listen, move=same_table()).run()  # goes on from there
        assert moved.compared <= ranges(heard)[0].rows_done <= moved.compared + 120
        assert 200 <= ranges(heard)[-1].rows_done <= 320


def ranges(heard: Sequence[Event]) -> list[RangeCompared]:
    return [event for event in heard if isinstance(event, RangeCompared)]
