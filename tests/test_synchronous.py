"""A synchronous standby that does not answer stops the runner, and nobody who reads or writes the tables it changed."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import COLUMN, SHOP, fleet_of, plan

from shardmig import local, pulse
from shardmig.config import SessionSettings, Shard
from shardmig.events import FlagSwitched, StepDone
from shardmig.locking import under_lock
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Statement, Switch
from shardmig.session import Query, open_session
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.fleet import Fleet
    from shardmig.local import Server

MOVED = plan(
    "0002_note",
    Statement(sql="ALTER TABLE customer ADD COLUMN note text"),
    Switch(to=State.DUAL),
    Move(
        table="customer",
        key=("id",),
        writes=("note",),
        forward="UPDATE customer SET note = upper(name) WHERE {batch}",
        check="SELECT id FROM customer WHERE {batch} AND note IS DISTINCT FROM upper(name)",
    ),
    Switch(to=State.LIVE),
    parent="0001_shop",
)
_numbers = count(1)
LOCAL = {"session": {"synchronous_commit": "local"}}


@pytest.fixture(scope="module")
def waiting() -> Iterator[Server]:
    """Run a server whose commits wait for a standby that is not there; ours of the tests do not."""
    settings: dict[str, str | int] = {"synchronous_standby_names": "gone", "synchronous_commit": "local"}
    with local.Server.start(settings=settings) as server:
        yield server


@pytest.fixture
def shop(waiting: Server) -> Shard:
    name = f"shop{next(_numbers)}"
    shard = Shard.model_validate({"name": name, "url": waiting.create_database(name)})
    asyncio.run(_begin(shard))
    return shard


async def _begin(shard: Shard) -> None:
    assert (await fleet_of([shard], SHOP, **LOCAL).apply()).done


async def halted(admin: psycopg.AsyncConnection[Any], *, since: object = None) -> tuple[int, object]:
    """Wait until a commit of ours waits for the standby, another one than the one told of; return process and start."""
    async with asyncio.timeout(20):
        while True:
            found = await admin.execute(
                "SELECT pid, xact_start FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = "
                "current_database() AND application_name LIKE 'shardmig%%' AND xact_start IS DISTINCT FROM %s",
                [since],
            )
            if (row := await found.fetchone()) is not None:
                return int(row[0]), row[1]
            await asyncio.sleep(0.01)


async def admin_of(shard: Shard) -> psycopg.AsyncConnection[Any]:
    admin = await psycopg.AsyncConnection.connect(shard.url.get_secret_value(), autocommit=True)
    await admin.execute("SET lock_timeout = '2s'")
    return admin


async def let_go(admin: psycopg.AsyncConnection[Any], task: asyncio.Task[Any]) -> None:
    """Answer for the standby until a piece of work is done."""
    while not task.done():
        await admin.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        await asyncio.wait([task], timeout=0.02)


async def test_a_lock_is_not_held_while_a_standby_is_waited_for(shop: Shard) -> None:
    add = Query("ALTER TABLE customer ADD COLUMN note text")
    write = Query("INSERT INTO customer (id) VALUES (1)")
    async with await admin_of(shop) as admin, open_session(shop, SessionSettings(), pg_versions=(14, 18)) as session:
        task = asyncio.create_task(under_lock(session, "customer", [add], behind=write))
        await halted(admin)

        await admin.execute("SELECT note FROM customer")
        assert not task.done(), "the standby, if it takes over now, knows nothing of the column"
        await let_go(admin, task)
        await task
        assert (await (await admin.execute("SHOW synchronous_commit")).fetchone()) == ("local",)


async def test_the_careful_way_holds_no_lock_and_tells_of_no_step_before_the_standby_answered(shop: Shard) -> None:
    fleet = fleet_of([shop], SHOP, COLUMN)
    await until_the_column_is_there(fleet, shop, Until.LIVE)


@pytest.mark.parametrize("until", [Until.LIVE, Until.MOVED], ids=["flag and all", "rows left to the careful way"])
async def test_the_express_way_holds_no_lock_and_takes_no_flag_before_the_standby_answered(
    shard: Shard, shop: Shard, until: Until
) -> None:
    assert (await fleet_of([shard], SHOP).apply()).done
    await until_the_column_is_there(
        fleet_of([shard, shop], SHOP, COLUMN if until is Until.LIVE else MOVED), shop, until
    )


async def until_the_column_is_there(fleet: Fleet, shard: Shard, until: Until) -> None:
    """Apply, answer for the standby until the column is committed, and read it while the next commit waits."""
    told: list[StepDone | FlagSwitched] = []
    fleet.listener = lambda event: told.append(event) if isinstance(event, StepDone | FlagSwitched) else None
    async with await admin_of(shard) as admin:
        task = asyncio.create_task(fleet.apply(until=until))
        since: object = None
        async with asyncio.timeout(30):
            while True:
                pid, since = await halted(admin, since=since)
                columns = await admin.execute(
                    "SELECT FROM pg_attribute WHERE attrelid = (SELECT oid FROM pg_class WHERE relname = 'customer') "
                    "AND attname = 'note'"
                )
                if await columns.fetchone() is not None:
                    break
                await admin.execute("SELECT id FROM customer")  # nobody waits here, whatever the commit is of
                await admin.execute("SELECT pg_cancel_backend(%s)", [pid])
        await admin.execute("SELECT note FROM customer")
        live = await admin.execute("SELECT state FROM shardmig.flag WHERE flag = 'note'")
        assert await live.fetchone() == (int(State.OLD),)
        assert not [event for event in told if event.shard == shard.name]
        await let_go(admin, task)
        assert [Outcome.DONE] == [one.outcome for one in await task if one.shard == shard.name]


@pytest.mark.long
async def test_a_commit_that_waits_for_a_standby_is_not_taken_for_a_server_that_hangs(
    shop: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No limit of a statement holds there: it has been asked three times what it does, and says what it waits for."""
    monkeypatch.setattr(pulse, "_LONGEST_S", 0.2)
    settings = SessionSettings(connect_timeout_s=1, statement_timeout_s=0.2)
    async with (
        await psycopg.AsyncConnection.connect(shop.url.get_secret_value(), autocommit=True) as admin,
        open_session(shop, settings, pg_versions=(14, 18)) as session,
    ):
        told: list[str] = []
        session.tell = told.append
        work = asyncio.create_task(session.transact([Query("CREATE TABLE waited (id int)")]))
        pid, _ = await halted(admin)
        await asyncio.wait([work], timeout=3.5)

        assert not work.done()
        assert {"its COMMIT waits for a synchronous standby"} == set(told)
        await admin.execute("SELECT pg_cancel_backend(%s)", [pid])
        await work
