"""Transactions with flags on real servers, sync and async: what they see, what they refuse, how they end."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg_pool
import pytest
from flag_doors import AsyncDoor, Ledger, SyncDoor, install
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from psycopg.types.string import TextLoader
from servers import FaultProxy, PgBouncer, await_caught_up, standby_of

from shardmig import (
    Flag,
    Flags,
    LedgerMissing,
    ShardBehind,
    ShardInMaintenance,
    State,
    UnknownState,
    ViewExpired,
    WriteRefused,
    WrongShard,
    WrongTransaction,
)
from shardmig.flags.connection import Known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Connect
    from flag_doors import Door

    from shardmig import local
    from shardmig.config import Shard

SPLIT_NAME = Flag("split_name")
ORDER_ADDRESS = Flag("order_address")
IDLE = pq.TransactionStatus.IDLE


@pytest.fixture
def flags() -> Flags:
    return Flags(SPLIT_NAME, ORDER_ADDRESS, release="2026-11-22.1")


@pytest.fixture
def ledger(shard: Shard, connect: Connect) -> Ledger:
    """Return the ledger of the shard eu1, with one flag and a table to write to."""
    asyncio.run(install(shard))
    made = Ledger(connect(shard), "eu1")
    made.connection.execute("CREATE TABLE public.note (id int PRIMARY KEY, text text)")
    made.connection.execute("GRANT ALL ON public.note TO PUBLIC")
    made.add("split_name")
    return made


# Half of the tests send the opening plain, half of them prepared from the first transaction on.
@pytest.fixture(params=[SyncDoor, partial(AsyncDoor, prepare_threshold=0)], ids=["sync", "async, prepared"])
def door(request: pytest.FixtureRequest, connect: Any, aconnect: Any) -> Door:
    made: Door = request.param(connect, aconnect)
    return made


def status(connection: Any) -> pq.TransactionStatus:
    return pq.TransactionStatus(connection.info.transaction_status)


async def assert_usable(door: Door, flags: Flags, connection: Any) -> None:
    """Assert that a connection is idle again and takes the next transaction."""
    assert IDLE == status(connection)
    async with door.transaction(flags, connection, shard="eu1") as view:
        assert not view.expired
    assert IDLE == status(connection)


# --------------------------------------------------------------------------------------------------------------------
# What a transaction sees


async def test_a_view_follows_the_flag_through_every_state(door: Door, shard: Shard, ledger: Ledger) -> None:
    flags = Flags(SPLIT_NAME, ORDER_ADDRESS)
    connection = await door.connect(shard)
    for state in State:
        ledger.walk("split_name", state)
        async with door.transaction(flags, connection, shard="eu1") as view:
            assert state is view[SPLIT_NAME]
            assert State.OLD is view[ORDER_ADDRESS], "a flag without a row is OLD"
            assert view is flags.of(connection)
        assert (state, True) == (flags.peek("eu1", SPLIT_NAME).state, view.expired)


async def test_a_view_does_not_change_while_its_transaction_is_open(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    first, second = await door.connect(shard), await door.connect(shard)
    async with door.transaction(flags, first, shard="eu1") as before:
        ledger.flip("split_name", State.DUAL)
        async with door.transaction(flags, second, shard="eu1") as after:
            assert (State.OLD, State.DUAL) == (before[SPLIT_NAME], after[SPLIT_NAME])
            assert before.epoch != after.epoch


async def test_success_commits_and_an_exception_rolls_back(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard)
    async with door.transaction(flags, connection, shard="eu1"):
        await door.run(connection, "INSERT INTO note VALUES (1, 'kept')")
    with suppress(ZeroDivisionError):
        async with door.transaction(flags, connection, shard="eu1") as view:
            await door.run(connection, "INSERT INTO note VALUES (2, 'lost')")
            raise ZeroDivisionError

    assert [(1,)] == ledger.connection.execute("SELECT id FROM note").fetchall()
    with pytest.raises(ViewExpired):
        view[SPLIT_NAME]
    with pytest.raises(ViewExpired):
        flags.of(connection)
    await assert_usable(door, flags, connection)


async def test_a_savepoint_inside_keeps_the_view(door: Door, shard: Shard, ledger: Ledger, flags: Flags) -> None:
    connection = await door.connect(shard)
    async with door.transaction(flags, connection, shard="eu1") as view:
        with pytest.raises(psycopg.errors.DivisionByZero):
            async with door.savepoint(connection):
                await door.run(connection, "SELECT 1 / 0")
        async with door.savepoint(connection):
            await door.run(connection, "INSERT INTO note VALUES (1)")
        assert State.OLD is view[SPLIT_NAME]

    assert [(1,)] == ledger.connection.execute("SELECT id FROM note").fetchall()


async def test_a_known_epoch_costs_no_round_trip_and_an_unknown_one_costs_one(
    door: Door, servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    with FaultProxy(servers[0]) as proxy:
        connection = await door.connect(proxy.url(database_of(shard)))
        connection.prepare_threshold = 5  # psycopg prepares what is ours here in a round trip of its own

        async def round_trips() -> int:
            before = proxy.round_trips
            async with door.transaction(flags, connection, shard="eu1"):
                await door.run(connection, "SELECT 1")
            return proxy.round_trips - before

        async def round_trips_of_a_plain_transaction() -> int:
            before = proxy.round_trips
            async with door.savepoint(connection):  # idle connection: BEGIN and COMMIT
                await door.run(connection, "SELECT 1")
            return proxy.round_trips - before

        assert 3 == await round_trips_of_a_plain_transaction()
        assert 4 == await round_trips()
        assert 3 == await round_trips()
        ledger.flip("split_name", State.DUAL)
        assert 4 == await round_trips()
        assert 3 == await round_trips()


def database_of(shard: Shard) -> str:
    return str(conninfo_to_dict(shard.url.get_secret_value())["dbname"])


async def test_a_read_only_transaction_writes_no_wal(door: Door, shard: Shard, ledger: Ledger, flags: Flags) -> None:
    if ledger.connection.info.server_version < 180000:
        pytest.skip("pg_stat_get_backend_wal() is there since PostgreSQL 18")
    connection = await door.connect(shard)

    async def records() -> int:
        await door.run(connection, "SELECT pg_stat_force_next_flush()")
        written = await door.run(connection, "SELECT wal_records FROM pg_stat_get_backend_wal(pg_backend_pid())")
        return int(written[0][0])

    before = await records()
    for _ in range(50):
        async with door.transaction(flags, connection, shard="eu1", write=False):
            await door.run(connection, "SELECT count(*) FROM note")
            assert [(None,)] == await door.run(connection, "SELECT pg_current_xact_id_if_assigned()")

    # Any reader may prune a page of the catalog on its way; a lock on the flag would be a record a transaction.
    assert await records() - before < 5


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("write", [True, False])
async def test_every_isolation_level_begins_as_asked(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags, *, isolation: str, write: bool
) -> None:
    connection = await door.connect(shard)
    got = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')"

    for how in (isolation, psycopg.IsolationLevel[isolation.replace(" ", "_")]):
        async with door.transaction(flags, connection, shard="eu1", write=write, isolation=how):
            assert [(isolation.lower(), "off" if write else "on")] == await door.run(connection, got)


async def test_the_connections_own_settings_hold_when_none_are_given(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect
) -> None:
    connection = connect(shard)
    connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
    connection.deferrable = True
    connection.read_only = True
    got = """SELECT current_setting('transaction_isolation'), current_setting('transaction_deferrable'),
        current_setting('transaction_read_only')"""

    with flags.transaction(connection, shard="eu1", write=False):
        assert ("serializable", "on", "on") == connection.execute(got).fetchone()
    with pytest.raises(WriteRefused, match="read_only"), flags.transaction(connection, shard="eu1"):
        pass


async def test_flags_survive_any_row_factory_adapter_and_cursor(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    ledger.walk("split_name", State.LIVE)
    connection = await door.connect(shard)
    is_async = isinstance(connection, psycopg.AsyncConnection)
    connection.row_factory = dict_row
    for type_name in ("int8", "int2", "bool", "text"):
        connection.adapters.register_loader(type_name, TextLoader)
    for factory in (
        psycopg.AsyncRawCursor if is_async else psycopg.RawCursor,
        psycopg.AsyncClientCursor if is_async else psycopg.ClientCursor,
    ):
        connection.cursor_factory = factory
        connection.prepare_threshold = 0
        async with door.transaction(flags, connection, shard="eu1") as view:
            assert State.LIVE is view[SPLIT_NAME]


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1", "SJIS"])
@pytest.mark.parametrize("conforming", ["on", "off"])
@pytest.mark.parametrize("name", ["it's", "back\\slash", "'; DROP TABLE note; --", "100% %s {x} $1", 'a"b', "\\'"])
async def test_a_shards_name_is_only_ever_a_name(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect, *, encoding: str, conforming: str, name: str
) -> None:
    ledger.connection.execute("INSERT INTO shardmig.shard (shard, epoch, schema_name) VALUES (%s, 1, 'other')", (name,))
    connection = connect(shard, client_encoding=encoding)
    connection.execute("SET escape_string_warning = off")
    connection.execute(f"SET standard_conforming_strings = {conforming}")

    with flags.transaction(connection, shard=name) as view:
        assert (name, State.OLD) == (view.shard, view[SPLIT_NAME])
    ledger.connection.execute("SELECT FROM note")


# --------------------------------------------------------------------------------------------------------------------
# What is refused, before anything was done


async def test_the_wrong_database_is_refused(door: Door, shard: Shard, ledger: Ledger, flags: Flags) -> None:
    connection = await door.connect(shard)

    with pytest.raises(WrongShard, match="us1") as told:
        async with door.transaction(flags, connection, shard="us1"):
            pass
    assert "us1" == told.value.shard
    await assert_usable(door, flags, connection)


async def test_a_database_without_ledger_is_refused(door: Door, shard: Shard, flags: Flags) -> None:
    connection = await door.connect(shard)

    with pytest.raises(LedgerMissing, match=r"eu1.*no ledger") as told:
        async with door.transaction(flags, connection, shard="eu1"):
            pass
    assert isinstance(told.value.__cause__, psycopg.errors.UndefinedTable)
    assert IDLE == status(connection)


async def test_an_ordinary_role_may_read_the_flags_and_one_that_may_not_is_told(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard, user="shop_app")
    await assert_usable(door, flags, connection)
    ledger.connection.execute("REVOKE USAGE ON SCHEMA shardmig FROM PUBLIC")

    with pytest.raises(LedgerMissing, match="GRANT USAGE"):
        async with door.transaction(flags, connection, shard="eu1"):
            pass
    assert IDLE == status(connection)


async def test_a_state_of_a_later_version_is_refused(door: Door, shard: Shard, ledger: Ledger) -> None:
    ledger.connection.execute("ALTER TABLE shardmig.flag DROP CONSTRAINT flag_state_check")
    ledger.force("UPDATE shardmig.flag SET state = 4")
    connection = await door.connect(shard)

    with pytest.raises(UnknownState, match="split_name in state 4"):
        async with door.transaction(Flags(SPLIT_NAME), connection, shard="eu1"):
            pass
    await assert_usable(door, Flags(ORDER_ADDRESS), connection)


async def test_maintenance_refuses_writers_first_and_then_everybody(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard)
    ledger.maintenance(1, reason="moving house", retry_after_s=90)
    with pytest.raises(ShardInMaintenance, match=r"read-only.*moving house") as told:
        async with door.transaction(flags, connection, shard="eu1"):
            pass
    async with door.transaction(flags, connection, shard="eu1", write=False) as view:
        assert State.OLD is view[SPLIT_NAME]
    ledger.maintenance(2)
    with pytest.raises(ShardInMaintenance, match="offline"):
        async with door.transaction(flags, connection, shard="eu1", write=False):
            pass
    ledger.maintenance(0)

    assert 90 == told.value.retry_after
    await assert_usable(door, flags, connection)


async def test_a_connection_that_cannot_carry_flags_is_refused_with_the_reason(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    async def refused(connection: Any, reason: str) -> None:
        with pytest.raises(WrongTransaction, match=reason):
            async with door.transaction(flags, connection, shard="eu1"):
                pass

    manual = await door.connect(shard, autocommit=False)
    await refused(manual, "autocommit=False")
    assert IDLE == status(manual)

    connection = await door.connect(shard)
    async with door.transaction(flags, connection, shard="eu1") as outer:
        await refused(connection, "savepoint")
        assert State.OLD is outer[SPLIT_NAME], "the outer transaction goes on"
    async with door.savepoint(connection):
        await refused(connection, "open on this connection already")
    await door.run(connection, "BEGIN")
    with pytest.raises(psycopg.errors.SyntaxError):
        await door.run(connection, "SELEKT")
    await refused(connection, "failed transaction")
    await door.call(connection.rollback)
    await assert_usable(door, flags, connection)


def test_a_connection_that_streams_is_refused_at_once(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect
) -> None:
    """Whoever streams holds the connection's lock between two rows: to wait for it would be to wait for oneself."""
    connection = connect(shard)

    def begin() -> None:
        with flags.transaction(connection, shard="eu1"):
            pass

    rows: Any = connection.cursor().stream("SELECT generate_series(1, 3)")
    next(rows)
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(begin)
        wait([begun], timeout=10)
        rows.close()
        with pytest.raises(WrongTransaction, match="another statement is running"):
            begun.result()


async def test_pipeline_mode_is_refused(shard: Shard, ledger: Ledger, flags: Flags, connect: Connect) -> None:
    connection = connect(shard)
    pipeline, refused = connection.pipeline(), pytest.raises(WrongTransaction, match="pipeline")
    with pipeline, refused, flags.transaction(connection, shard="eu1"):
        pass
    with flags.transaction(connection, shard="eu1"), connection.pipeline():
        connection.execute("INSERT INTO note VALUES (1)")

    assert [(1,)] == ledger.connection.execute("SELECT id FROM note").fetchall()


async def test_a_closed_connection_is_the_drivers_affair(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard)
    await door.call(connection.close)

    with pytest.raises(psycopg.OperationalError, match="closed"):
        async with door.transaction(flags, connection, shard="eu1"):
            pass


async def test_a_read_only_session_refuses_to_write(door: Door, shard: Shard, ledger: Ledger, flags: Flags) -> None:
    connection = await door.connect(shard)
    await door.run(connection, "SET default_transaction_read_only = on")

    with pytest.raises(WriteRefused, match="default_transaction_read_only"):
        async with door.transaction(flags, connection, shard="eu1"):
            pass
    async with door.transaction(flags, connection, shard="eu1", write=False):
        pass


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("by_default", [True, False])
async def test_one_snapshot_may_not_write_to_two_tables_while_rows_move(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags, *, isolation: str, by_default: bool
) -> None:
    ledger.add("order_address", State.DUAL, cross_table=True)
    connection = await door.connect(shard)
    how: dict[str, Any] = {} if by_default else {"isolation": isolation}
    if by_default:
        await door.run(connection, f"SET default_transaction_isolation = '{isolation.lower()}'")

    with pytest.raises(WriteRefused, match=f"order_address.*{isolation}"):
        async with door.transaction(flags, connection, shard="eu1", **how):
            pass
    async with door.transaction(flags, connection, shard="eu1", write=False, **how):
        pass
    async with door.transaction(flags, connection, shard="eu1", isolation="READ COMMITTED"):
        pass
    ledger.walk("order_address", State.LIVE)
    async with door.transaction(flags, connection, shard="eu1", **how):
        pass


async def test_what_that_refusal_prevents_is_a_row_that_comes_back(
    shard: Shard, ledger: Ledger, connect: Connect
) -> None:
    """The DELETE of the second table hits 0 rows and nothing fails; the moved row survives its source."""
    ledger.connection.execute("CREATE TABLE note_text AS SELECT * FROM note")
    ledger.connection.execute("INSERT INTO note VALUES (1, 'x')")
    writer = connect(shard)
    writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    writer.execute("SELECT FROM shardmig.shard")
    ledger.connection.execute("INSERT INTO note_text SELECT * FROM note FOR SHARE OF note")
    deleted = [writer.execute(f"DELETE FROM {table} WHERE id = 1").rowcount for table in ("note", "note_text")]
    writer.execute("COMMIT")

    assert [1, 0] == deleted
    assert [(1,)] == ledger.connection.execute("SELECT id FROM note_text").fetchall()


# --------------------------------------------------------------------------------------------------------------------
# The end that was not planned


async def test_a_commit_that_the_server_refuses_is_the_drivers_error(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    ledger.connection.execute("ALTER TABLE note ADD parent int REFERENCES note DEFERRABLE INITIALLY DEFERRED")
    connection = await door.connect(shard)

    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        async with door.transaction(flags, connection, shard="eu1") as view:
            await door.run(connection, "INSERT INTO note VALUES (1, 'orphan', 7)")
    assert view.expired
    assert [] == ledger.connection.execute("SELECT id FROM note").fetchall()
    await assert_usable(door, flags, connection)


async def test_an_error_swallowed_inside_is_told_instead_of_a_silent_rollback(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard)

    with pytest.raises(WrongTransaction, match=r"rolled back.*savepoint"):  # noqa: PT012 - where it ends is the point
        async with door.transaction(flags, connection, shard="eu1"):
            await door.run(connection, "INSERT INTO note VALUES (1)")
            with pytest.raises(psycopg.errors.DivisionByZero):
                await door.run(connection, "SELECT 1 / 0")
    assert [] == ledger.connection.execute("SELECT id FROM note").fetchall()
    await assert_usable(door, flags, connection)


def test_a_statement_of_another_thread_that_fails_while_the_block_is_left_is_told_as_such(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect
) -> None:
    """The end waits for it, and only then looks at what there is to commit."""
    connection = connect(shard)
    begun = threading.Event()

    def fail() -> None:
        begun.set()
        with suppress(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / (pg_sleep(0.5)::text = 'x')::int")

    def block(pool: ThreadPoolExecutor) -> None:
        with flags.transaction(connection, shard="eu1"):
            connection.execute("SELECT 1")
            failing = pool.submit(fail)
            begun.wait(10)
            while not connection.lock.locked():
                time.sleep(0.001)
            assert not failing.done()

    with ThreadPoolExecutor(1) as pool, pytest.raises(WrongTransaction, match="a statement failed inside"):
        block(pool)


async def test_a_savepoint_that_was_never_left_is_not_committed(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard)
    savepoint = door.savepoint(connection)

    with pytest.raises(psycopg.ProgrammingError, match="commit"):  # noqa: PT012 - where it ends is the point
        async with door.transaction(flags, connection, shard="eu1") as view:
            await savepoint.__aenter__()
            await door.run(connection, "INSERT INTO note VALUES (1)")
    assert view.expired
    assert [] == ledger.connection.execute("SELECT id FROM note").fetchall()
    await savepoint.__aexit__(None, None, None)
    await door.call(connection.rollback)
    await assert_usable(door, flags, connection)


async def test_a_pipeline_that_is_left_after_the_block_is_committed(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(shard)

    async with AsyncExitStack() as later, door.transaction(flags, connection, shard="eu1"):
        pipeline = connection.pipeline()
        if hasattr(pipeline, "__aenter__"):
            await later.enter_async_context(pipeline)
        else:
            later.enter_context(pipeline)
        await door.call(connection.execute, "INSERT INTO note VALUES (1)")
    assert [(1,)] == ledger.connection.execute("SELECT id FROM note").fetchall()
    await assert_usable(door, flags, connection)


@pytest.mark.parametrize("way", ["commit", "rollback"])
async def test_ending_the_transaction_inside_its_block_is_told(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags, *, way: str
) -> None:
    connection = await door.connect(shard)

    with pytest.raises(WrongTransaction, match="ended inside"):
        async with door.transaction(flags, connection, shard="eu1"):
            await door.call(getattr(connection, way))
    await assert_usable(door, flags, connection)


CHAINS = ["COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "COMMIT; BEGIN", "COMMIT; BEGIN READ WRITE; SELECT 1"]


@pytest.mark.parametrize("reported", [True, False], ids=["reported", "asked"])
@pytest.mark.parametrize("ends", CHAINS)
async def test_another_transaction_behind_the_one_of_the_view_is_never_committed(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags, *, ends: str, reported: bool
) -> None:
    connection = await door.connect(shard)

    async def block(statement: str) -> None:
        async with door.transaction(flags, connection, shard="eu1"):
            known = flags.known(connection)
            assert known.reported
            known.reported = reported  # False: as behind a pooler that keeps reports for itself
            connection.prepare_threshold = None  # several statements in one message
            await door.run(connection, statement)
            await door.run(connection, "INSERT INTO note VALUES (7, 'by an old view')")

    with pytest.raises(WrongTransaction, match="began another one"):
        await block(ends)

    assert status(connection) is IDLE
    assert ledger.connection.execute("SELECT count(*) FROM note").fetchone() == (0,)
    await block("SELECT 1")
    assert ledger.connection.execute("SELECT count(*) FROM note").fetchone() == (1,)
    assert await door.run(connection, "SHOW default_transaction_read_only") == [("off",)]


async def test_readers_are_spared_the_mark(door: Door, shard: Shard, ledger: Ledger, flags: Flags) -> None:
    connection = await door.connect(shard)
    for write, shown in ((True, "on"), (False, "off"), (True, "on")):
        async with door.transaction(flags, connection, shard="eu1", write=write):
            assert await door.run(connection, "SHOW default_transaction_read_only") == [(shown,)]
            assert flags.known(connection).marked is write


@pytest.mark.parametrize("committed", [True, False])
async def test_a_connection_lost_in_commit_is_in_doubt_and_said_so(
    door: Door, servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags, *, committed: bool
) -> None:
    with FaultProxy(servers[0]) as proxy:
        connection = await door.connect(proxy.url(database_of(shard)))
        cut = proxy.cut_after("COMMIT$") if committed else proxy.cut_before()
        with pytest.raises(psycopg.OperationalError):
            async with door.transaction(flags, connection, shard="eu1") as view:
                await door.run(connection, "INSERT INTO note VALUES (1)")

        assert cut.struck.is_set()
        assert (True, True) == (view.expired, connection.closed)
        assert [(int(committed),)] == ledger.connection.execute("SELECT count(*) FROM note").fetchall()
        with pytest.raises(ViewExpired):
            flags.of(connection)


async def test_a_connection_lost_in_begin_or_in_between_is_the_drivers_error(
    door: Door, servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    with FaultProxy(servers[0]) as proxy:
        connection = await door.connect(proxy.url(database_of(shard)))
        proxy.cut_before("BEGIN")
        with pytest.raises(psycopg.OperationalError):
            async with door.transaction(flags, connection, shard="eu1"):
                pass
    connection = await door.connect(shard)
    with pytest.raises(psycopg.OperationalError):  # noqa: PT012 - the statement after the kill is what fails
        async with door.transaction(flags, connection, shard="eu1") as view:
            ledger.connection.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
            await door.run(connection, "SELECT 1")
    assert view.expired


async def test_a_task_cancelled_in_begin_or_inside_leaves_an_idle_connection(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect, aconnect: Any
) -> None:
    connection, other = await aconnect(shard), connect(shard)
    inside = asyncio.Event()

    async def work() -> None:
        async with flags.atransaction(connection, shard="eu1"):
            await connection.execute("INSERT INTO note VALUES (1)")
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert IDLE == status(connection)

    with other.transaction():
        other.execute("LOCK TABLE shardmig.shard")
        task = asyncio.create_task(work())
        await asyncio.to_thread(await_waiting, ledger, connection.info.backend_pid)
        with pytest.raises(WrongTransaction, match="another statement is running"):
            async with flags.atransaction(connection, shard="eu1"):
                pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await assert_usable(AsyncDoor(None, aconnect), flags, connection)
    assert [] == ledger.connection.execute("SELECT id FROM note").fetchall()


async def test_a_rollback_that_fails_does_not_hide_why_it_was_tried(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    connection = connect(shard)
    savepoint = connection.transaction()

    with suppress(ZeroDivisionError), flags.transaction(connection, shard="eu1"):
        savepoint.__enter__()  # never left: psycopg then forbids rollback()
        raise ZeroDivisionError
    assert ["shard eu1: rollback failed"] == [message[:26] for message in caplog.messages]


async def test_two_tasks_cannot_begin_on_one_connection(
    shard: Shard, ledger: Ledger, flags: Flags, aconnect: Any
) -> None:
    """Both find it idle; the BEGIN of the second would be a warning, and its transaction the first one's."""
    connection = await aconnect(shard)
    leave = asyncio.Event()

    async def work() -> State:
        async with flags.atransaction(connection, shard="eu1") as view:
            await leave.wait()
            return view[SPLIT_NAME]

    async with connection.lock:
        tasks = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(0)  # both have looked, and wait for the lock
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    leave.set()
    await asyncio.wait(waiting)

    assert ["WrongTransaction"] == [type(task.exception()).__name__ for task in done]
    assert [State.OLD] == [task.result() for task in waiting], "the first one's view and transaction live on"
    await assert_usable(AsyncDoor(None, aconnect), flags, connection)


def await_waiting(ledger: Ledger, pid: int) -> None:
    """Wait until a backend waits for a lock."""
    waiting = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
    while ledger.connection.execute(waiting, (pid,)).fetchone() != (True,):
        pass


async def test_a_block_that_is_never_left_does_not_block_the_connection(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect
) -> None:
    connection = connect(shard)
    view = flags.transaction(connection, shard="eu1").__enter__()  # never left, as by a lost generator
    connection.rollback()  # what a pool does when it gets it back

    with flags.transaction(connection, shard="eu1") as next_view:
        assert view.expired
        assert next_view is flags.of(connection)


async def test_a_block_that_is_left_late_ends_nobody_elses_transaction(
    shard: Shard, ledger: Ledger, flags: Flags, connect: Connect
) -> None:
    connection = connect(shard)
    late = flags.transaction(connection, shard="eu1")
    late.__enter__()
    connection.rollback()

    with flags.transaction(connection, shard="eu1") as view:
        connection.execute("INSERT INTO note VALUES (1)")
        late.__exit__(GeneratorExit, GeneratorExit(), None)
        with pytest.raises(WrongTransaction, match="ended inside"):
            late.__exit__(None, None, None)
        assert view is flags.of(connection)
        assert not view.expired
    assert [(1,)] == ledger.connection.execute("SELECT id FROM note").fetchall()


# --------------------------------------------------------------------------------------------------------------------
# The cache


class _PoisonedBySecondStatement(Flags):
    """The mutation: flags kept under the epoch of the statement before."""

    def recall(self, opening: Any, *, shard: str) -> Any:
        self._seen_first = opening.epoch
        return super().recall(opening, shard=shard)

    def remember(self, rows: Any, *, shard: str) -> Any:
        return super().remember([row._replace(epoch=self._seen_first) for row in rows], shard=shard)


@pytest.mark.parametrize(("kind", "expected"), [(Flags, State.OLD), (_PoisonedBySecondStatement, State.DUAL)])
async def test_flags_are_kept_under_the_epoch_that_came_with_them(
    shard: Shard, ledger: Ledger, connect: Connect, *, kind: type[Flags], expected: State
) -> None:
    """A flip between epoch and flags, then a restore of the shard as it was before; the mutation is caught."""
    flags = kind(SPLIT_NAME)
    before = ledger.epoch()
    reader = connect(shard)
    began: list[State] = []

    def begin() -> None:
        with flags.transaction(reader, shard="eu1") as view:
            began.append(view[SPLIT_NAME])

    flipper = connect(shard)
    with flipper.transaction():
        flipper.execute("LOCK TABLE shardmig.flag")  # the reader sees the epoch and waits for the flags
        thread = threading.Thread(target=begin)
        thread.start()
        await_waiting(ledger, reader.info.backend_pid)
        Ledger(flipper, "eu1").flip("split_name", State.DUAL)
    thread.join()
    ledger.force(f"UPDATE shardmig.flag SET state = 0; UPDATE shardmig.shard SET epoch = {before}")

    with flags.transaction(reader, shard="eu1") as view:
        assert (State.DUAL, expected) == (began[0], view[SPLIT_NAME])


_COUNTER = """
    CREATE OR REPLACE FUNCTION shardmig.draw_epoch() RETURNS bigint LANGUAGE sql VOLATILE
        AS 'SELECT max(epoch) + 1 FROM shardmig.shard';
    DO $$
    BEGIN
        EXECUTE replace(pg_get_functiondef('shardmig.on_flag_write'::regproc),
            'uuid_hash_extended(gen_random_uuid(), 0)', 'shardmig.draw_epoch()');
    END
    $$
"""


@pytest.mark.parametrize(("counting", "expected"), [(False, State.OLD), (True, State.DUAL)])
async def test_a_restored_shard_is_known_for_what_it_is(
    servers: list[local.Server], shard: Shard, ledger: Ledger, connect: Connect, *, counting: bool, expected: State
) -> None:
    """After a restore other flags change; a counter would then repeat an epoch this process knows differently."""
    flags = Flags(SPLIT_NAME, ORDER_ADDRESS)
    if counting:
        ledger.connection.execute(_COUNTER)
    backup = f"{database_of(shard)}_backup"
    connection = connect(shard)
    with flags.transaction(connection, shard="eu1"):
        pass
    ledger.connection.close()
    connection.close()
    restored = servers[0].create_database(backup, template=database_of(shard))
    try:
        live = connect(shard)
        Ledger(live, "eu1").flip("split_name", State.DUAL)
        with flags.transaction(live, shard="eu1") as view:
            assert State.DUAL is view[SPLIT_NAME]
        live.close()
        again = connect(restored)
        Ledger(again, "eu1").add("order_address", State.DUAL)
        with flags.transaction(again, shard="eu1") as view:
            assert expected is view[SPLIT_NAME]
        again.close()
    finally:
        servers[0].drop_database(backup)


async def test_a_shard_restored_from_before_the_release_is_behind_it(door: Door, shard: Shard, ledger: Ledger) -> None:
    ledger.walk("split_name", State.DUAL)
    before = ledger.epoch()
    ledger.walk("split_name", State.LIVE)
    live = Flag("split_name", at_least=State.LIVE)
    flags = Flags(live, release="8")
    connection = await door.connect(shard)
    async with door.transaction(flags, connection, shard="eu1") as view:
        assert State.LIVE is view[live]
    ledger.force(f"UPDATE shardmig.flag SET state = 1; UPDATE shardmig.shard SET epoch = {before}")

    for _ in range(2):
        with pytest.raises(ShardBehind, match=r"release 8.*split_name DUAL"):
            async with door.transaction(flags, connection, shard="eu1"):
                pass
    assert IDLE == status(connection)
    ledger.mark("split_name", drained=True)
    ledger.mark("split_name", new_valid=True)
    ledger.flip("split_name", State.LIVE)
    await assert_usable(door, flags, connection)


async def test_threads_and_flips_never_disagree(shard: Shard, ledger: Ledger, flags: Flags, connect: Connect) -> None:
    """Under one snapshot, what the view says is what the rows say, while another session flips all the time."""
    ledger.walk("split_name", State.DUAL)
    ledger.mark("split_name", drained=True)
    ledger.mark("split_name", new_valid=True)
    connections = [connect(shard) for _ in range(4)]
    disagreements: list[object] = []
    seen: set[State] = set()
    done = threading.Event()

    def read(connection: psycopg.Connection[Any]) -> None:
        while not done.is_set():
            with flags.transaction(connection, shard="eu1", isolation="REPEATABLE READ") as view:
                state = view[SPLIT_NAME]
                row = connection.execute("SELECT state, (SELECT epoch FROM shardmig.shard) FROM shardmig.flag")
                if row.fetchone() != (state, view.epoch):
                    disagreements.append(view)
                seen.add(state)

    threads = [threading.Thread(target=read, args=[connection]) for connection in connections]
    for thread in threads:
        thread.start()
    for _ in range(100):
        ledger.flip("split_name", State.LIVE)
        ledger.flip("split_name", State.DUAL)
    done.set()
    for thread in threads:
        thread.join()

    assert ([], {State.DUAL, State.LIVE}) == (disagreements, seen)


# --------------------------------------------------------------------------------------------------------------------
# Standby, pools, poolers


@pytest.fixture
def standby(servers: list[local.Server], ledger: Ledger) -> Iterator[local.Server]:
    with standby_of(servers[0]) as made:
        await_caught_up(servers[0], made)
        yield made


async def test_a_standby_is_read_in_one_snapshot_and_never_written(
    door: Door, servers: list[local.Server], standby: local.Server, ledger: Ledger, flags: Flags
) -> None:
    connection = await door.connect(standby.url(ledger.connection.info.dbname))
    level = "SELECT current_setting('transaction_isolation')"
    with pytest.raises(WriteRefused, match="standby"):
        async with door.transaction(flags, connection, shard="eu1"):
            pass
    with pytest.raises(WrongTransaction, match="one snapshot"):
        async with door.transaction(flags, connection, shard="eu1", write=False, isolation="READ COMMITTED"):
            pass
    for _ in range(2):  # first it learns that this is a standby, then it knows
        async with door.transaction(flags, connection, shard="eu1", write=False) as view:
            assert [("repeatable read",)] == await door.run(connection, level)
            # The whole graph passes by on the primary; this transaction stays in its own world.
            ledger.connection.execute("INSERT INTO note VALUES (1, %s)", (str(view.epoch),))
            ledger.walk("split_name", State.DUAL)
            await_caught_up(servers[0], standby)
            assert [] == await door.run(connection, "SELECT id FROM note")
            assert State.OLD is view[SPLIT_NAME]
        async with door.transaction(flags, connection, shard="eu1", write=False) as view:
            assert [(1,)] == await door.run(connection, "SELECT id FROM note")
            assert State.DUAL is view[SPLIT_NAME]
        ledger.connection.execute("DELETE FROM note")
        ledger.walk("split_name", State.OLD)
        await_caught_up(servers[0], standby)


async def test_pooled_connections_are_ordinary_ones(shard: Shard, ledger: Ledger, flags: Flags) -> None:
    conninfo = shard.url.get_secret_value()
    with psycopg_pool.ConnectionPool(conninfo, min_size=1, kwargs={"autocommit": True}) as pool:
        for _ in range(3):
            with pool.connection() as connection, flags.transaction(connection, shard="eu1") as view:
                assert State.OLD is view[SPLIT_NAME]
    kwargs = {"autocommit": True}
    async with psycopg_pool.AsyncConnectionPool(conninfo, min_size=1, kwargs=kwargs, open=False) as apool:
        for _ in range(3):
            async with apool.connection() as aconnection, flags.atransaction(aconnection, shard="eu1") as view:
                assert view is flags.of(aconnection)


async def test_clients_of_a_transaction_pooler_see_every_flip(
    door: Door, servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    with PgBouncer(servers[0], default_pool_size=1) as pooler:
        url = pooler.url(database_of(shard))
        clients = [await door.connect(url) for _ in range(3)]
        for state in (State.DUAL, State.LIVE, State.DUAL, State.OLD):
            ledger.walk("split_name", state)
            for client in clients:
                client.prepare_threshold = None
                async with door.transaction(flags, client, shard="eu1") as view:
                    await door.run(client, "SELECT 1")
                    assert state is view[SPLIT_NAME]

        async def chained(client: Any) -> None:
            async with door.transaction(flags, client, shard="eu1"):
                assert flags.known(client).reported
                await door.run(client, "COMMIT AND CHAIN")

        for client in clients:
            with pytest.raises(WrongTransaction, match="began another one"):
                await chained(client)


@pytest.mark.parametrize(
    ("before", "now", "reported"),
    [
        (b"off", b"on", True),
        (b"on", b"off", False),
        (b"off", b"off", False),  # kept by a pooler
        (b"on", b"on", False),  # kept by one that gave us another server: what is reported says nothing
        (None, None, False),
    ],
)
def test_a_mark_is_believed_only_where_it_was_seen_to_change(
    before: bytes | None, now: bytes | None, *, reported: bool
) -> None:
    known = Known()

    known.mark(before=before, now=now)

    assert (True, reported) == (known.marked, known.reported)


def test_every_connection_is_told_its_own_shard(shards: dict[str, Shard], connect: Connect, flags: Flags) -> None:
    """One Flags object, four shards in four states: what is known of one never shows in another."""
    for (name, shard), state in zip(shards.items(), State, strict=True):
        asyncio.run(install(shard))
        Ledger(connect(shard), name).add("split_name", state)
    opened = {name: connect(shard) for name, shard in shards.items()}

    for _ in range(2):
        seen = []
        for name, connection in opened.items():
            with flags.transaction(connection, shard=name) as view:
                seen.append(view[SPLIT_NAME])
        assert list(State) == seen


async def test_the_order_of_writes_is_the_same_while_a_reverse_move_is_open(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    """Writers that began before DONE may still be open: in another order the two would deadlock on one row."""
    ledger.add("order_address", State.DONE, cross_table=True)
    ledger.flip("order_address", State.LIVE)
    connection = await door.connect(shard)

    for isolation in ("READ COMMITTED", "REPEATABLE READ"):
        called: list[str] = []
        async with door.transaction(flags, connection, shard="eu1", isolation=isolation) as view:
            view.run(ORDER_ADDRESS, old=partial(called.append, "old"), new=partial(called.append, "new"))
        assert ["old", "new"] == called
