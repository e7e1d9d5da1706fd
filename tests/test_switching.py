"""A flip is one commit; a drain waits for every transaction that was open when the flag changed, and for no other."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from moving import FLAG, VERSIONS, moving, notes, same_table

from shardmig import switching
from shardmig.config import SessionSettings, Shard
from shardmig.errors import DrainTimeout, Fenced, LockNotObtained, SwitchedMeanwhile, SwitchRefused
from shardmig.events import FlagSwitched, TransactionEnded, Warned
from shardmig.outcomes import Outcome, outcome_of
from shardmig.records import read_log
from shardmig.session import open_session
from shardmig.states import State
from shardmig.turn import Turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import Connect
    from moving import Moving

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
QUICK = SessionSettings(drain_timeout_s=0.2)


@asynccontextmanager
async def draining(here: Moving) -> AsyncIterator[asyncio.Task[Any]]:
    """Flip to DUAL and drain, with whoever is open; the block begins when the drain has found somebody."""
    heard = asyncio.Event()
    row = await switching.flip(here.turn, await here.flag(), State.DUAL)
    drain = asyncio.create_task(switching.drain(here.turn, row, listener=lambda _: heard.set()))
    async with asyncio.timeout(10):
        await heard.wait()
    assert not drain.done()
    yield drain
    async with asyncio.timeout(10):
        assert (await drain).drained


async def idle_in_transaction(one: psycopg.Connection[Any]) -> Callable[[], object]:
    one.execute("BEGIN; SELECT 1")
    return one.rollback


async def repeatable_read(one: psycopg.Connection[Any]) -> Callable[[], object]:
    one.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT state FROM shardmig.flag")
    return one.rollback


async def has_written(one: psycopg.Connection[Any]) -> Callable[[], object]:
    one.execute("BEGIN; INSERT INTO t (id) VALUES (1)")
    return one.commit


async def prepared(one: psycopg.Connection[Any]) -> Callable[[], object]:
    one.execute("BEGIN; INSERT INTO t (id) VALUES (1); PREPARE TRANSACTION 'late'")
    return lambda: one.execute("COMMIT PREPARED 'late'")


OPEN = (idle_in_transaction, repeatable_read, has_written, prepared)


@pytest.mark.parametrize("kind", OPEN)
async def test_the_drain_waits_for_a_transaction_that_was_open(shard: Shard, connect: Connect, kind: Any) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        end = await kind(connect(shard))
        async with draining(here):
            end()


async def test_the_drain_waits_for_another_role_as_the_owner_who_may_not_see_it(shard: Shard, connect: Connect) -> None:
    connect(shard).execute("GRANT CREATE ON DATABASE " + connect(shard).info.dbname + " TO shop_owner")
    weak = Shard.model_validate({**shard.model_dump(), "url": as_role(shard, "shop_owner")})
    async with moving(weak, same_table(), T, dual=False) as here:
        sees_others = "SELECT pg_has_role(session_user, 'pg_read_all_stats', 'USAGE')"
        assert not (await here.session.execute(sees_others)).value
        app = connect(shard, user="shop_app")
        app.execute("BEGIN; SELECT 1")
        async with draining(here) as drain:
            await asyncio.sleep(0.05)
            assert not drain.done()
            app.rollback()


async def test_the_drain_waits_for_a_snapshot_that_outlived_its_exporter(shard: Shard, connect: Connect) -> None:
    """The importer began after the flip, so only the age of its snapshot tells that it cannot see it."""
    async with moving(shard, same_table(), T, dual=False) as here:
        exporter, importer = connect(shard), connect(shard)
        exporter.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        snapshot = exporter.execute("SELECT pg_export_snapshot()").fetchone()
        assert snapshot is not None
        async with draining(here) as drain:
            importer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            importer.execute(f"SET TRANSACTION SNAPSHOT '{snapshot[0]}'")
            assert importer.execute("SELECT state FROM shardmig.flag").fetchone() == (State.OLD,)
            exporter.rollback()
            await asyncio.sleep(0.3)  # three times the longest pause between two looks
            assert not drain.done()
            importer.rollback()


async def test_the_drain_waits_for_a_snapshot_that_is_handed_on_while_it_waits(shard: Shard, connect: Connect) -> None:
    """Who took over the snapshot may let it be taken over again: listing the holders once is not enough."""
    async with moving(shard, same_table(), T, dual=False) as here:
        holders = [connect(shard) for _ in range(3)]
        await repeatable_read(holders[0])
        async with draining(here) as drain:
            for holder, heir in pairwise(holders):
                snapshot = holder.execute("SELECT pg_export_snapshot()").fetchone()
                assert snapshot is not None
                heir.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                heir.execute(f"SET TRANSACTION SNAPSHOT '{snapshot[0]}'")
                holder.rollback()
                await asyncio.sleep(0.3)  # three times the longest pause between two looks
                assert not drain.done()
            assert holders[2].execute("SELECT state FROM shardmig.flag").fetchone() == (State.OLD,)
            holders[2].rollback()


async def test_the_drain_does_not_wait_for_who_began_after_its_look(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        one, two = connect(shard), connect(shard)
        one.execute("BEGIN; SELECT 1")
        async with draining(here):
            two.execute("BEGIN; SELECT 1")
            one.rollback()  # two stays open


async def test_exempt_roles_and_other_databases_and_our_own_sessions_are_not_waited_for(
    shard: Shard, connect: Connect, servers: Any
) -> None:
    settings = SessionSettings(drain_timeout_s=5, exempt_roles=("shop_app",))
    async with moving(shard, same_table(), T, dual=False, settings=settings) as here:
        connect(shard, user="shop_app").execute("BEGIN; SELECT 1")
        connect(servers[0]).execute("BEGIN; SELECT 1")
        async with open_session(shard, settings, pg_versions=VERSIONS, purpose="read") as reader, reader.transaction():
            await reader.execute("SELECT 1")
            heard, listen = notes()
            row = await switching.flip(here.turn, await here.flag(), State.DUAL)

            assert (await switching.drain(here.turn, row, listener=listen)).drained
            assert heard == []


async def test_a_drain_that_gives_up_names_who_is_open_and_records_nothing(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False, settings=QUICK) as here:
        blocker = connect(shard, user="shop_app", application_name="checkout")
        blocker.execute("BEGIN; SELECT 42")
        with pytest.raises(DrainTimeout, match=f"pid {blocker.info.backend_pid}, role shop_app, application checkout"):
            await here.to(State.DUAL)

        assert not (await here.flag()).drained
        blocker.rollback()
        assert (await switching.drain(here.turn, await here.flag())).drained


async def test_a_stop_ends_a_drain_at_once(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        connect(shard).execute("BEGIN; SELECT 1")
        row = await switching.flip(here.turn, await here.flag(), State.DUAL)
        stop = asyncio.Event()
        with pytest.raises(DrainTimeout, match="stopped"):
            await switching.drain(here.turn, row, stop=stop, listener=lambda _: stop.set())


async def test_a_late_drain_does_not_vouch_for_a_later_flip(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T) as here:
        row = await here.flag()
        await here.finish()
        live = await here.to(State.LIVE, drain=False)
        # The drain of the flip before ends only now.
        late = type(row)(**{**{f: getattr(row, f) for f in row.__slots__}, "drained": False})
        with pytest.raises(SwitchRefused, match="while it was drained"):
            await switching.drain(here.turn, late)

        assert (live.epoch, False) == ((await here.flag()).epoch, (await here.flag()).drained)


async def test_switching_back_is_one_commit_and_waits_for_nobody(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T) as here:
        await here.finish()
        await here.to(State.LIVE)
        connect(shard).execute("BEGIN; SELECT 1")
        heard, listen = notes()

        await switching.flip(here.turn, await here.flag(), State.DUAL, reason="slow", listener=listen)

        assert [FlagSwitched("eu1", FLAG, State.LIVE, State.DUAL)] == heard
        [*_, last] = await read_log(here.session)
        assert ("slow", "LIVE", "DUAL") == (last.reason, last.before, last.after)


async def test_a_flip_is_refused_with_the_guard_that_is_missing(shard: Shard) -> None:
    async with moving(shard, same_table(), T) as here:
        with pytest.raises(SwitchRefused, match="new was not moved and checked"):
            await here.to(State.LIVE)
        with pytest.raises(SwitchRefused, match="one edge at a time"):
            await here.to(State.DONE)
        with pytest.raises(SwitchRefused, match="no flag 'nix' here; known flags: x"):
            await switching.read_flag(here.session, "nix")


async def test_a_runner_that_lost_its_turn_flips_nothing(shard: Shard) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        row = await here.flag()
        await Turn.take(here.session)
        with pytest.raises(Fenced):
            await switching.flip(here.turn, row, State.DUAL)


async def test_an_operator_in_an_open_transaction_is_not_queued_behind(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        operator = connect(shard, autocommit=False)
        operator.execute("SELECT shardmig.switch('x', 'DUAL', '')")
        with pytest.raises(LockNotObtained, match="has not committed"):
            await here.to(State.DUAL)
        operator.rollback()
        assert (await here.to(State.DUAL)).drained


def as_role(shard: Shard, role: str) -> str:
    url = shard.url.get_secret_value()
    head, _, tail = url.partition("://")
    return f"{head}://{role}@{tail.rpartition('@')[2]}"


# --------------------------------------------------------------------------------------------------------------------
# Ending, on request, who is in the way


async def test_on_request_a_drain_ends_what_is_too_old_and_says_whom(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        here.session.terminate_older_than_s = 0.05
        old = connect(shard, user="shop_app", application_name="checkout")
        old.execute("BEGIN; SELECT 42")
        pid = old.info.backend_pid
        heard, listen = notes()
        row = await switching.flip(here.turn, await here.flag(), State.DUAL)

        assert (await switching.drain(here.turn, row, listener=listen)).drained

        with pytest.raises(psycopg.OperationalError, match="administrator command"):
            old.execute("SELECT 1")
        [ended] = [one for one in heard if isinstance(one, TransactionEnded)]
        assert (FLAG, pid, "checkout") == (ended.flag, ended.blocker.pid, ended.blocker.application)
        [line] = [line for line in await read_log(here.session) if line.action == "terminate"]
        assert (FLAG, str(ended.blocker)) == (line.flag, line.reason)


async def test_nobody_is_ended_who_is_young_or_began_after_the_look(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        here.session.terminate_older_than_s = 3600.0
        young, late = connect(shard), connect(shard)
        young.execute("BEGIN; SELECT 1")
        async with draining(here):
            here.session.terminate_older_than_s = 0.0
            late.execute("BEGIN; SELECT 1")
            with pytest.raises(psycopg.OperationalError, match="administrator command"):
                await asyncio.to_thread(young.execute, "SELECT pg_sleep(60)")

        assert (1,) == late.execute("SELECT 1").fetchone()


async def test_nobody_is_ended_whose_role_is_exempt_or_who_is_shardmig(shard: Shard, connect: Connect) -> None:
    settings = SessionSettings(drain_timeout_s=0.5, exempt_roles=("shop_app",))
    async with moving(shard, same_table(), T, dual=False, settings=settings) as here:
        here.session.terminate_older_than_s = 0.0
        backup, blocker = connect(shard, user="shop_app"), connect(shard)
        backup.execute("BEGIN; SELECT 1")
        async with open_session(shard, settings, pg_versions=VERSIONS, purpose="read") as reader, reader.transaction():
            await reader.execute("SELECT 1")
            blocker.execute("BEGIN; SELECT 1")

            assert (await here.to(State.DUAL)).drained

            assert 1 == (await reader.execute("SELECT 1")).value
        assert (1,) == backup.execute("SELECT 1").fetchone()


async def test_a_prepared_transaction_is_never_ended_but_named_with_the_cure(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, dual=False, settings=QUICK) as here:
        here.session.terminate_older_than_s = 0.0
        one = connect(shard)
        one.execute("BEGIN; INSERT INTO t (id) VALUES (1); PREPARE TRANSACTION 'it''s late'")
        heard, listen = notes()
        row = await switching.flip(here.turn, await here.flag(), State.DUAL)

        with pytest.raises(DrainTimeout, match="ROLLBACK PREPARED 'it''s late'"):
            await switching.drain(here.turn, row, listener=listen)
        [warned] = [event for event in heard if isinstance(event, Warned)]
        assert "ROLLBACK PREPARED 'it''s late'" in warned.message
        one.execute("COMMIT PREPARED 'it''s late'")
        assert (1,) == one.execute("SELECT count(*) FROM t").fetchone()


@pytest.mark.parametrize(
    ("granted", "cure"),
    [((), "GRANT pg_read_all_stats TO shop_owner"), (("pg_read_all_stats",), "GRANT pg_signal_backend TO shop_owner")],
)
async def test_who_may_not_see_or_end_others_is_told_what_to_grant(
    shard: Shard, connect: Connect, granted: tuple[str, ...], cure: str
) -> None:
    admin = connect(shard)
    admin.execute("GRANT CREATE ON DATABASE " + admin.info.dbname + " TO shop_owner")
    for role in granted:
        admin.execute(f"GRANT {role} TO shop_owner")
    weak = Shard.model_validate({**shard.model_dump(), "url": as_role(shard, "shop_owner")})
    try:
        async with moving(weak, same_table(), T, dual=False, settings=QUICK) as here:
            here.session.terminate_older_than_s = 0.0
            app = connect(shard, user="shop_app")
            app.execute("BEGIN; SELECT 1")
            heard, listen = notes()
            row = await switching.flip(here.turn, await here.flag(), State.DUAL)

            with pytest.raises(DrainTimeout):
                await switching.drain(here.turn, row, listener=listen)
            [warned] = [event for event in heard if isinstance(event, Warned)]
            assert cure in warned.message
            assert (1,) == app.execute("SELECT 1").fetchone()
    finally:
        for role in granted:
            admin.execute(f"REVOKE {role} FROM shop_owner")


async def test_a_flag_that_is_not_where_it_was_read_is_left_there_and_the_cure_is_named(shard: Shard) -> None:
    async with moving(shard, same_table(), T) as here:
        stale = replace(await here.flag(), epoch=0)

        with pytest.raises(SwitchedMeanwhile, match="apply goes on from where the flag is now"):
            await switching.flip(here.turn, stale, State.LIVE)

        assert Outcome.PARKED is outcome_of(SwitchedMeanwhile(shard="eu1"))
