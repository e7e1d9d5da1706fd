"""A move rests outside its window and beyond its share of a server, says so, and goes on by itself."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import fleet_of, many
from moving import customers, moving, notes, plan_of, same_table
from pydantic import ValidationError

from shardmig import config as configuration
from shardmig.config import Config, Pace, Shard
from shardmig.errors import ConfigError, Overloaded
from shardmig.events import BatchDone, Parked, Waiting
from shardmig.hosts import Host, Hosts
from shardmig.places import leave_place, take_place
from shardmig.plan import Statement
from shardmig.todo import Until
from shardmig.window import Window

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from conftest import Connect

    from shardmig import local
    from shardmig.events import Event

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
SMALL = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)


def at(zone_time: str) -> float:
    return datetime.fromisoformat(zone_time).timestamp()


# --------------------------------------------------------------------------------------------------------------------
# The window


@pytest.mark.parametrize(
    ("window", "moment", "expected"),
    [
        ("09:00-17:00 UTC", "2026-01-05T08:59:59Z", False),
        ("09:00-17:00 UTC", "2026-01-05T09:00:00Z", True),
        ("09:00-17:00 UTC", "2026-01-05T17:00:00Z", False),
        ("22:00-06:00 UTC", "2026-01-05T23:30:00Z", True),
        ("22:00-06:00 UTC", "2026-01-06T05:59:59Z", True),
        ("22:00-06:00 UTC", "2026-01-06T06:00:00Z", False),
        ("22:00-06:00 UTC", "2026-01-06T12:00:00Z", False),
        ("20:00-24:00 UTC", "2026-01-06T23:59:59Z", True),
        ("20:00-24:00 UTC", "2026-01-06T00:00:00Z", False),
        ("22:00-06:00 Europe/Berlin", "2026-01-05T21:30:00Z", True),  # winter: one hour ahead
        ("22:00-06:00 Europe/Berlin", "2026-07-05T20:30:00Z", True),  # summer: two
        ("22:00-06:00 Europe/Berlin", "2026-07-05T04:30:00Z", False),
        ("22:00-06:00 America/New_York", "2026-07-05T03:00:00Z", True),
    ],
)
def test_a_window_is_open_by_the_clocks_of_its_zone(window: str, moment: str, *, expected: bool) -> None:
    assert expected is Window.parse(window).is_open(at(moment))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("22:00-06:00", 'write begin, end and time zone, as in "22:00-06:00 Europe/Berlin"'),
        ("nightly", "is no window"),
        ("", "is no window"),
        ("22-6 UTC", "is no window"),
        ("25:00-06:00 UTC", "'25:00' in '25:00-06:00 UTC' is no time of day"),
        ("22:00-06:61 UTC", "'06:61'"),
        ("22:00-22:00 UTC", "ends when it begins; leave it out"),
        ("22:00-06:00 Europe/Berlln", "no time zone 'Europe/Berlln' here"),
        ("22:00-06:00 ../../etc/passwd", "no time zone"),
        ("22:00-06:00 CET or so", "is no window"),
    ],
)
def test_nonsense_is_refused_with_what_to_write(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "shardmig.toml"
    path.write_text(f'[pace]\nwindow = "{written}"\n')
    with pytest.raises(ConfigError) as refused:
        configuration.load(path)

    assert "pace.window: " in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("key", ["host_moves", "host_rows_per_s"])
def test_a_share_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(ValidationError):
        Pace.model_validate({key: 0})


def window(begins_s: float, ends_s: float) -> str:
    """Write a window that begins and ends so many seconds from now."""
    now = datetime.now(UTC)
    return "{:%H:%M:%S}-{:%H:%M:%S} UTC".format(*(now + timedelta(seconds=s) for s in (begins_s, ends_s)))


async def test_outside_its_window_a_move_waits_and_says_why_until_it_opens(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        written = window(3, 3600)
        heard, listen = notes()
        pace = SMALL.model_copy(update={"window": written, "max_rest_s": 0.1})
        run = asyncio.create_task(here.run(pace=pace, listener=listen).run())
        psql = connect(shard)
        async with asyncio.timeout(10):
            while not (seen := psql.execute("SELECT waiting FROM shardmig.step WHERE waiting IS NOT NULL").fetchall()):
                await asyncio.sleep(0.01)
        assert [(0,)] == psql.execute("SELECT count(b) FROM t").fetchall()

        assert await run
        reason = f"rows move only {written} (window)"
        assert [(reason,)] == seen
        assert {reason} == {event.reason for event in heard if isinstance(event, Waiting)}
        assert (None, 100) == ((await here.step()).waiting, (await here.step()).rows)


async def test_a_move_stops_when_its_window_closes(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(3000)) as here:
        stop = asyncio.Event()
        closes = time.monotonic() + 2

        def listen(event: Event) -> None:
            if isinstance(event, Waiting):
                stop.set()

        pace = SMALL.model_copy(update={"window": window(-3600, 2), "max_rows_per_s": 500})
        assert not await here.run(pace=pace, stop=stop, listener=listen).run()

        assert time.monotonic() - closes > -0.1
        step = await here.step()
        assert 0 < step.rows < 3000, "all of them would take six seconds"


async def test_a_move_that_waits_for_its_window_can_be_paused_stopped_and_given_up(
    shard: Shard, connect: Connect
) -> None:
    async with moving(shard, same_table(), T, customers(10)) as here:
        psql, stop = connect(shard), asyncio.Event()
        heard, listen = notes()
        pace = Pace(window=window(1800, 3600))
        run = asyncio.create_task(here.run(pace=pace, stop=stop, listener=listen).run())
        await until(heard, "rows move only")
        psql.execute("SELECT shardmig.pause('x', 'sale')")
        await until(heard, "an operator paused it: sale")
        psql.execute("SELECT shardmig.resume('x')")
        heard.clear()
        await until(heard, "rows move only")
        stop.set()

        assert not await run
        assert [(0,)] == psql.execute("SELECT count(b) FROM t").fetchall()


async def until(heard: Sequence[Event], reason: str) -> None:
    async with asyncio.timeout(10):
        while not any(isinstance(event, Waiting) and event.reason.startswith(reason) for event in heard):
            await asyncio.sleep(0.01)


async def test_who_rather_parks_does_not_wait_for_the_window(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(10)) as here:
        with pytest.raises(Overloaded, match="the move of t rests: rows move only"):
            await here.run(pace=Pace(window=window(1800, 3600), parks_waiting=True)).run()


async def test_the_check_waits_for_the_window_too_and_for_operators(shard: Shard, connect: Connect) -> None:
    """It reads the whole table; the last batch may end in the last second."""
    async with moving(shard, same_table(), T, customers(200)) as here:
        assert await here.run().run()
        await here.session.execute("UPDATE shardmig.step SET checked_at = NULL, check_cursor = NULL")
        connect(shard).execute("SELECT shardmig.pause('x', 'sale')")
        heard, listen = notes()
        run = asyncio.create_task(here.run(listener=listen).run())
        await until(heard, "an operator paused it: sale")
        connect(shard).execute("SELECT shardmig.resume('x')")

        assert await run


# --------------------------------------------------------------------------------------------------------------------
# Servers


def test_shards_of_one_server_share_a_host_and_others_do_not() -> None:
    hosts = Hosts(Pace())
    urls = ["postgresql://a@one/x", "postgresql://b@one/y", "postgresql://a@two/x", "postgresql://a@one:5433/x"]
    one, same, two, other_port = (
        hosts.of(Shard.model_validate({"name": f"s{n}", "url": url})) for n, url in enumerate(urls)
    )

    assert one is same
    assert len({id(one), id(two), id(other_port)}) == 3


def test_a_host_admits_as_many_moves_as_it_may() -> None:
    host = Host(Pace(host_moves=2))

    assert [None, None, None] == [host.admit(name) for name in ("a", "b", "a")]
    assert "rows of a, b are moved on the same server (host_moves = 2)" == host.admit("c")
    host.leave("a")
    host.leave("a")
    assert (None, None) == (host.admit("c"), host.admit("b"))
    assert host.admit("a") is not None


def test_batches_of_all_moves_spend_one_budget() -> None:
    """Whoever comes at the same time rests behind the others; time that nobody used is not saved up."""
    host = Host(Pace(host_rows_per_s=100))

    assert [0.5, 1.0, 1.2] == [host.pause_s(50, 10.0), host.pause_s(50, 10.0), pytest.approx(host.pause_s(20, 10.0))]
    assert 0.5 == host.pause_s(50, 99.0)


@pytest.fixture
def neighbours(servers: list[local.Server], fresh_database: Any) -> list[Shard]:
    """Return two shards that are databases of one server."""
    fresh_database(servers[0])
    server = servers[0]
    names = ["neighbour1", "neighbour2"]
    for name in names:
        server.create_database(name, owner="shop_owner")
    yield [Shard.model_validate({"name": name, "url": server.url(name)}) for name in names]
    for name in names:
        server.drop_database(name)


async def test_what_was_waited_for_by_arrangement_shortens_no_other_patience(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmig.rest._LOOK_S", 0.02)
    host = Host(Pace(host_moves=1))
    host.admit("other")
    async with moving(shard, same_table(), T, customers(400)) as here:
        psql = connect(shard)
        heard, listen = notes()
        pace = SMALL.model_copy(update={"max_rest_s": 0.4, "max_rows_per_s": 200})  # the pause comes before its end
        run = asyncio.create_task(here.run(pace=pace, host=host, listener=listen).run())
        await until(heard, "rows of other are moved on the same server")
        await asyncio.sleep(0.6)  # longer than a move may rest
        psql.execute("SELECT shardmig.pause('x', 'sale')")
        host.leave("other")
        await until(heard, "an operator paused it")
        psql.execute("SELECT shardmig.resume('x')")

        assert await run


async def test_two_databases_of_one_server_share_its_rows_a_second(neighbours: list[Shard]) -> None:
    async with AsyncExitStack() as stack:
        moved = [await stack.enter_async_context(moving(one, same_table(), T, customers(200))) for one in neighbours]
        pace = SMALL.model_copy(update={"host_rows_per_s": 200})
        hosts, began = Hosts(pace), time.monotonic()
        done = await asyncio.gather(*(m.run(pace=pace, host=hosts.of(m.session.shard)).run() for m in moved))
        took = time.monotonic() - began

        assert [True, True] == done
        assert took >= 400 / 200 * 0.95
        assert [[(200,)]] * 2 == [await m.rows("SELECT count(b) FROM t") for m in moved]


async def test_of_two_databases_of_one_server_one_moves_at_a_time(neighbours: list[Shard]) -> None:
    """The other waits with its reason, which names who moves, and begins when that one has ended."""
    async with AsyncExitStack() as stack:
        moved = [await stack.enter_async_context(moving(one, same_table(), T, customers(300))) for one in neighbours]
        pace = SMALL.model_copy(update={"host_moves": 1, "max_rows_per_s": 200})
        hosts = Hosts(pace)
        heard, listen = notes()
        runs = [m.run(pace=pace, host=hosts.of(m.session.shard), listener=listen).run() for m in moved]
        assert [True, True] == await asyncio.gather(*runs)

        order = [event.shard for event in heard if isinstance(event, BatchDone)]
        assert sorted(order) in (order, order[::-1])
        waited = {(event.shard, event.reason) for event in heard if isinstance(event, Waiting)}
        first, second = order[0], order[-1]
        assert {(second, f"rows of {first} are moved on the same server (host_moves = 1)")} == waited


async def test_two_runners_that_do_not_know_of_each_other_keep_one_move_at_a_time(neighbours: list[Shard]) -> None:
    """Each has its own idea of the server; the other waits for its first batch until the first has compared all."""
    pace = SMALL.model_copy(update={"host_moves": 1, "max_rows_per_s": 200})
    async with AsyncExitStack() as stack:
        moved = [await stack.enter_async_context(moving(one, same_table(), T, customers(200))) for one in neighbours]
        heard, listen = notes()
        runs = [m.run(pace=pace, host=Hosts(pace).of(m.session.shard), listener=listen).run() for m in moved]
        assert [True, True] == await asyncio.gather(*runs)

        order = [event.shard for event in heard if isinstance(event, BatchDone)]
        assert (40, 2) == (len(order), len(list(groupby(order))))
        reason = "other runners move rows on the same server (host_moves = 1)"
        waited = [event for event in heard if isinstance(event, Waiting)]
        assert {reason} == {event.reason for event in waited}
        assert order[-1] in {event.shard for event in waited}


async def test_a_runner_that_died_keeps_no_place(neighbours: list[Shard], connect: Connect) -> None:
    pace = Pace(host_moves=1)
    async with (
        moving(neighbours[0], same_table(), T, customers(10)) as died,
        moving(neighbours[1], same_table(), T, customers(10)) as here,
    ):
        theirs, ours = (Hosts(pace).of(m.session.shard) for m in (died, here))
        assert theirs.admit(died.session.shard.name) is None
        assert await take_place(died.session, theirs) is None
        assert ours.admit(here.session.shard.name) is None
        assert "other runners move rows" in (await take_place(here.session, ours) or "")
        assert await take_place(died.session, theirs) is None  # who has a place keeps it
        await leave_place(here.session, ours)
        connect(neighbours[0]).execute("SELECT pg_terminate_backend(%s, 5000)", [died.session.backend_pid])

        assert await here.run(pace=pace, host=ours).run()
        left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND objsubid = 2"
        assert [(0,)] == await here.rows(left)


async def test_two_runners_share_a_server_s_rows_a_second(neighbours: list[Shard]) -> None:
    """Alone each would need a second and a half; both see each other at their second look at the latest."""
    pace = SMALL.model_copy(update={"host_rows_per_s": 200})
    async with AsyncExitStack() as stack:
        moved = [await stack.enter_async_context(moving(one, same_table(), T, customers(300))) for one in neighbours]
        began = time.monotonic()
        await asyncio.gather(*(m.run(pace=pace, host=Hosts(pace).of(m.session.shard)).run() for m in moved))

        assert time.monotonic() - began >= 2.2


async def test_a_fleet_moves_on_every_server_by_turns(servers: list[local.Server]) -> None:
    """Shards that had to wait are parked, none of them is forgotten, and never do two move at once."""
    move = same_table(forward="UPDATE t SET b = upper(a) WHERE {batch}")
    plan = plan_of(move).model_copy(update={"steps": (Statement(sql=T), *plan_of(move).steps)})
    pace = {**SMALL.model_dump(exclude_none=True), "host_moves": 1, "max_rows_per_s": 200}
    with many(servers[:1], 3, "turn") as shards:
        fleet = fleet_of(shards, plan, pace=pace, rollout={"waves": "all"})
        (await fleet.apply(until=Until.STRUCTURE)).raise_for_failures()
        for shard in shards:
            with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as psql:
                psql.execute(customers(100))
        heard, fleet.listener = notes()
        (await fleet.apply(aware="1")).raise_for_failures()

    order = [event.shard for event in heard if isinstance(event, BatchDone)]
    assert (30, 3) == (len(order), len(list(groupby(order))))
    assert {event.reason for event in heard if isinstance(event, Parked)} != set()


def test_a_config_without_limits_admits_everybody() -> None:
    host = Host(Config().pace)

    assert [None] * 5 == [host.admit(str(n)) for n in range(5)]
    assert 0.0 == host.pause_s(10**9, 0.0)
