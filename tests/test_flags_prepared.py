"""The opening is prepared on its server, rides on BEGIN all the same, and whoever takes it away is never noticed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack, suppress
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from flag_doors import AsyncDoor, Ledger, SyncDoor, install
from psycopg.conninfo import conninfo_to_dict
from servers import FaultProxy, PgBouncer
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from shardmig import Flag, Flags, ShardBehind, ShardInMaintenance, State, UnknownState, WriteRefused, WrongShard
from shardmig.flags.opening import statements
from shardmig.flags.prepared import Form, Prepared
from shardmig.integrations.sqlalchemy import install as install_flags

if TYPE_CHECKING:
    from conftest import Connect
    from flag_doors import Door

    from shardmig import local
    from shardmig.config import Shard

SPLIT_NAME = Flag("split_name")
WRITING = statements("eu1", write=True, isolation=None, deferrable=None, encoding="ascii")
_numbers = count()  # makes statements that psycopg does not prepare, which would take a message of its own
SEVERAL = 8  # transactions; psycopg prepares what it has sent five times, and so do we


@pytest.fixture
def flags() -> Flags:
    return Flags(SPLIT_NAME)


@pytest.fixture
def ledger(shard: Shard, connect: Connect) -> Ledger:
    """Return the ledger of the shard eu1, with one flag in DUAL."""
    asyncio.run(install(shard))
    made = Ledger(connect(shard), "eu1")
    made.add("split_name", State.DUAL)
    return made


@pytest.fixture(params=[SyncDoor, AsyncDoor], ids=["sync", "async"])
def door(request: pytest.FixtureRequest, connect: Any, aconnect: Any) -> Door:
    made: Door = request.param(connect, aconnect)
    return made


class Wire:
    """A connection behind a proxy, and what was sent over it."""

    def __init__(self, door: Door, flags: Flags, proxy: FaultProxy, connection: Any) -> None:
        self.door = door
        self.flags = flags
        self.proxy = proxy
        self.connection = connection

    async def begin(self, *, doing: str = "", **how: Any) -> tuple[str, int]:
        """Run one transaction; return the form of its opening, and how many round trips it took."""
        sent, trips = len(self.proxy.statements), self.proxy.round_trips
        doing = doing or f"SELECT {next(_numbers)}"
        async with self.door.transaction(self.flags, self.connection, shard="eu1", **how) as view:
            await self.door.run(self.connection, doing)
            assert State.DUAL is view[SPLIT_NAME]
        return form_of(self.proxy.statements[sent]), self.proxy.round_trips - trips

    async def begin_several(self) -> list[tuple[str, int]]:
        return [await self.begin() for _ in range(SEVERAL)]

    async def fail(self) -> None:
        """Run a transaction that rolls back."""
        with suppress(ZeroDivisionError):
            async with self.door.transaction(self.flags, self.connection, shard="eu1"):
                raise ZeroDivisionError


def form_of(message: str) -> str:
    begin, opening, *rest = message.split("; ")
    assert begin.startswith("BEGIN")
    if opening.startswith("SELECT"):
        return "asking" if "pg_prepared_statements" in opening else "plain"
    return "executing" if opening.startswith("EXECUTE") and not rest else "preparing"


@pytest.fixture
async def wire(door: Door, servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags) -> Any:
    with FaultProxy(servers[0]) as proxy:
        connection = await door.connect(proxy.url(database_of(shard)))
        made = Wire(door, flags, proxy, connection)
        await made.begin()  # reads the flags of the epoch
        yield made
        await door.call(connection.close)


def database_of(shard: Shard) -> str:
    return str(conninfo_to_dict(shard.url.get_secret_value())["dbname"])


# --------------------------------------------------------------------------------------------------------------------
# One message, whatever its form


async def test_after_a_few_transactions_the_opening_is_prepared_and_never_costs_a_round_trip(wire: Wire) -> None:
    seen = await wire.begin_several()

    assert [("plain", 3)] * 4 + [("preparing", 3)] + [("executing", 3)] * 3 == seen


async def test_who_is_told_nothing_of_the_mark_asks_for_it_before_committing(wire: Wire) -> None:
    """As behind a pooler that keeps the server's reports for itself: what libpq remembers means nothing there."""
    before = len(wire.proxy.statements)
    async with wire.door.transaction(wire.flags, wire.connection, shard="eu1"):
        wire.flags.known(wire.connection).reported = False

    assert ["SELECT pg_catalog.current_setting('default_transaction_read_only')", "COMMIT"] == [
        statement.rstrip("\0") for statement in wire.proxy.statements[before + 1 :]
    ]


async def test_a_reader_and_a_writer_prepare_each_their_own(wire: Wire) -> None:
    await wire.begin_several()

    assert [("preparing", 3), ("executing", 3)] == [await wire.begin(write=False) for _ in range(2)]
    assert ("executing", 3) == await wire.begin()


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_what_is_prepared_takes_no_snapshot_before_its_transaction_begins(wire: Wire, isolation: str) -> None:
    """A PREPARE in front of BEGIN would: the server then refuses the isolation level."""
    wire.connection.prepare_threshold = 0
    got = f"SELECT 1 / (current_setting('transaction_isolation') = '{isolation.lower()}')::int"

    assert "preparing" == (await wire.begin(isolation=isolation, doing=got))[0]
    assert "executing" == (await wire.begin(isolation=isolation, doing=got))[0]


async def test_a_prepared_opening_follows_flags_maintenance_and_the_shards_name(wire: Wire, ledger: Ledger) -> None:
    await wire.begin_several()
    seen = []
    for state in (State.LIVE, State.DUAL, State.OLD):
        ledger.walk("split_name", state)
        async with wire.door.transaction(wire.flags, wire.connection, shard="eu1") as view:
            seen.append(view[SPLIT_NAME])
    ledger.connection.execute("UPDATE shardmig.shard SET shard = 'us1'")

    assert [State.LIVE, State.DUAL, State.OLD] == seen
    with pytest.raises(WrongShard):
        await wire.begin()


def restore(ledger: Ledger) -> None:
    ledger.walk("split_name", State.OLD)


def read_only(ledger: Ledger) -> None:
    ledger.maintenance(1, reason="index")


def offline(ledger: Ledger) -> None:
    ledger.maintenance(2, reason="index")


def move_across_tables(ledger: Ledger) -> None:
    ledger.add("order_address", State.DUAL, cross_table=True)


def a_later_version(ledger: Ledger) -> None:
    ledger.force("ALTER TABLE shardmig.flag DROP CONSTRAINT flag_state_check")
    ledger.force("UPDATE shardmig.flag SET state = 4; UPDATE shardmig.shard SET epoch = 7")


@pytest.mark.parametrize(
    "refused",
    [
        (restore, {}, ShardBehind),
        (read_only, {}, ShardInMaintenance),
        (offline, {"write": False}, ShardInMaintenance),
        (move_across_tables, {"isolation": "REPEATABLE READ"}, WriteRefused),
        (a_later_version, {}, UnknownState),
    ],
)
async def test_what_refuses_a_transaction_refuses_every_prepared_one(
    door: Door, shard: Shard, ledger: Ledger, refused: tuple[Any, dict[str, Any], type[Exception]]
) -> None:
    """The first connection finds a new epoch; the second, which rolled nothing back yet, one that is known."""
    happen, how, refusal = refused
    release = Flags(Flag("split_name", at_least=State.DUAL), Flag("order_address"))
    connections = [await door.connect(shard) for _ in range(2)]
    for connection in connections * 2:
        connection.prepare_threshold = 0
        async with door.transaction(release, connection, shard="eu1", **how):
            pass
    happen(ledger)

    for connection in connections:
        assert 1 == await count_prepared(door, connection)
        with pytest.raises(refusal):
            async with door.transaction(release, connection, shard="eu1", **how):
                pass


async def test_an_overridden_flag_is_what_a_prepared_transaction_has(wire: Wire, flags: Flags) -> None:
    await wire.begin_several()
    seen = []
    for everywhere in (False, True):
        with flags.override(SPLIT_NAME, State.DONE, everywhere=everywhere):
            async with wire.door.transaction(flags, wire.connection, shard="eu1") as view:
                seen.append(view[SPLIT_NAME])

    assert [State.DONE] * 2 == seen
    await wire.begin()


async def test_a_prepared_transaction_is_what_peek_tells_of(wire: Wire, flags: Flags) -> None:
    await wire.begin_several()
    begun_at = monotonic()
    await wire.begin()

    assert flags.peek("eu1", SPLIT_NAME).age_s <= monotonic() - begun_at


async def test_two_shards_of_a_database_are_never_taken_for_each_other(
    door: Door, shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    ledger.connection.execute("INSERT INTO shardmig.shard (shard, epoch, schema_name) VALUES ('eu2', 1, 'eu2')")
    other = Ledger(ledger.connection, "eu2")
    other.add("split_name", State.LIVE)
    connection = await door.connect(shard)
    seen = set()
    for _ in range(SEVERAL):
        for name in ("eu1", "eu2"):
            async with door.transaction(flags, connection, shard=name) as view:
                seen.add((name, view[SPLIT_NAME]))

    assert {("eu1", State.DUAL), ("eu2", State.LIVE)} == seen
    assert 2 == await count_prepared(door, connection)


async def count_prepared(door: Door, connection: Any) -> int:
    [(count,)] = await door.run(connection, "SELECT count(*) FROM pg_prepared_statements WHERE from_sql")
    return int(count)


async def test_a_connection_that_does_not_prepare_never_does(wire: Wire) -> None:
    wire.connection.prepare_threshold = None

    assert [("plain", 3)] * SEVERAL == await wire.begin_several()
    wire.connection.prepare_threshold = 0
    assert ["preparing", "executing"] == [(await wire.begin())[0] for _ in range(2)]
    wire.connection.prepare_threshold = None
    assert ("plain", 3) == await wire.begin()


async def test_a_ledger_that_grew_is_read_as_before(wire: Wire, ledger: Ledger) -> None:
    await wire.begin_several()
    ledger.connection.execute("ALTER TABLE shardmig.shard ADD COLUMN more text; ANALYZE shardmig.shard")

    assert ("executing", 3) == await wire.begin()


# --------------------------------------------------------------------------------------------------------------------
# Taken away


@pytest.mark.parametrize("how", ["DISCARD ALL", "DEALLOCATE ALL"])
async def test_who_deallocates_everything_is_not_noticed(wire: Wire, how: str) -> None:
    """One transaction begins in two messages; after that there is a rest, then it is prepared again."""
    await wire.begin_several()
    await wire.door.run(wire.connection, how)
    seen = [await wire.begin() for _ in range(23)]

    assert [("executing", 4)] + [("plain", 3)] * 20 + [("preparing", 3), ("executing", 3)] == seen


async def test_what_was_lost_is_lost_in_a_transaction_of_its_own(wire: Wire) -> None:
    """The failed message is rolled back: what follows is neither refused nor thrown away."""
    await wire.begin_several()
    await wire.door.run(wire.connection, "DISCARD ALL")

    await wire.begin(doing="CREATE TABLE kept ()")
    assert [] == await wire.door.run(wire.connection, "SELECT FROM kept")
    assert "ROLLBACK; BEGIN; SELECT" in " ".join(wire.proxy.statements)


async def test_what_another_client_of_a_pooler_prepared_is_taken_over(wire: Wire) -> None:
    opening = WRITING.openings[Form.PREPARING].decode().split("; ")[1]
    await wire.door.run(wire.connection, opening)

    seen = await wire.begin_several()

    assert [("preparing", 4)] + [("executing", 3)] * 3 == seen[-4:]


async def test_a_plan_that_cannot_be_used_any_more_is_left_alone(wire: Wire, ledger: Ledger) -> None:
    """Columns that applications read never change their type, but somebody may have superuser rights and an idea."""
    await wire.begin_several()
    ledger.connection.execute("ALTER TABLE shardmig.shard ALTER maintenance TYPE int")

    assert [("executing", 4)] + [("plain", 3)] * 30 == [await wire.begin() for _ in range(31)]


async def test_a_rollback_leaves_it_to_be_asked_whether_it_is_still_there(wire: Wire) -> None:
    """After a rollback psycopg deallocates everything, but only where it has prepared something itself."""
    await wire.begin_several()
    await wire.fail()
    kept = [await wire.begin() for _ in range(2)]
    assert [("asking", 3), ("executing", 3)] == kept, "psycopg had prepared nothing"

    for _ in range(6):
        await wire.door.run(wire.connection, "SELECT 1")
    await wire.fail()
    assert "DEALLOCATE ALL" in wire.proxy.statements
    lost = [await wire.begin() for _ in range(3)]
    assert [("asking", 3), ("preparing", 3), ("executing", 3)] == lost


async def test_an_error_that_is_no_fault_of_preparing_is_told_at_once(wire: Wire, ledger: Ledger) -> None:
    await wire.begin_several()
    sent = len(wire.proxy.statements)
    with ledger.connection.transaction():
        ledger.connection.execute("LOCK TABLE shardmig.shard")
        await wire.door.run(wire.connection, "SET lock_timeout = 1")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await wire.begin()

    assert ["SET lock_timeout = 1", WRITING.openings[Form.EXECUTING].decode(), "ROLLBACK"] == (
        wire.proxy.statements[sent:]
    )


# --------------------------------------------------------------------------------------------------------------------
# Pools, poolers, SQLAlchemy


async def test_clients_of_a_transaction_pooler_may_prepare_and_see_every_flip(
    door: Door, servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    """Two servers and six clients: each is now and then on a server that does not know what it asks for."""
    with PgBouncer(servers[0], default_pool_size=2) as pooler:
        url = pooler.url(database_of(shard))
        clients = [await door.connect(url) for _ in range(6)]
        for client in clients:
            client.prepare_threshold = 1
        for turn, state in enumerate((State.LIVE, State.DUAL) * 4):
            ledger.walk("split_name", state)
            for number, client in enumerate(clients):
                async with AsyncExitStack() as others:
                    if turn > 3:  # somebody else takes the server that all have prepared on
                        await others.enter_async_context(door.savepoint(clients[number - 1]))
                    async with door.transaction(flags, client, shard="eu1") as view:
                        await door.run(client, f"SELECT {next(_numbers)}")
                        assert state is view[SPLIT_NAME]
        async with door.savepoint(clients[0]), door.savepoint(clients[1]):
            held = [await count_prepared(door, client) for client in clients[:2]]
        rest = [flags.known(client).prepared.form(WRITING.name, 1) for client in clients]

    assert 1 == max(held), "one text, one name, whoever prepared it"
    assert Form.PLAIN in rest, "somebody met a server that did not know what it asked for"


def test_the_transactions_of_an_engine_prepare_too(
    servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    with FaultProxy(servers[0]) as proxy:
        engine = install_flags(create_engine(sqlalchemy_url(proxy, shard)), flags, shard="eu1")

        def begin() -> str:
            sent = len(proxy.statements)
            with engine.begin() as connection:
                connection.execute(text("SELECT 1"))
                assert State.DUAL is flags.of(connection)[SPLIT_NAME]
            return form_of(next(message for message in proxy.statements[sent:] if message.startswith("BEGIN; ")))

        seen = [begin() for _ in range(SEVERAL)]
        with suppress(ZeroDivisionError), engine.begin():
            raise ZeroDivisionError
        seen += [begin() for _ in range(3)]
        engine.dispose()

    assert ["plain"] * 5 + ["preparing"] + ["executing"] * 2 + ["asking", "preparing", "executing"] == seen


async def test_the_transactions_of_an_async_engine_prepare_too(
    servers: list[local.Server], shard: Shard, ledger: Ledger, flags: Flags
) -> None:
    with FaultProxy(servers[0]) as proxy:
        engine = install_flags(create_async_engine(sqlalchemy_url(proxy, shard)), flags, shard="eu1")
        for _ in range(SEVERAL):
            async with engine.begin() as connection:
                await connection.execute(text("SELECT 1"))
        await engine.dispose()

        assert WRITING.openings[Form.EXECUTING].decode() in proxy.statements


def sqlalchemy_url(proxy: FaultProxy, shard: Shard) -> str:
    return proxy.url(database_of(shard)).replace("postgresql://", "postgresql+psycopg://")


# --------------------------------------------------------------------------------------------------------------------
# What is kept, and for how long


def test_what_is_known_of_a_connection_goes_with_it(shard: Shard, ledger: Ledger, flags: Flags) -> None:
    with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as connection:
        for _ in range(SEVERAL):
            with flags.transaction(connection, shard="eu1"):
                pass
        gone = weakref.ref(flags.known(connection))
    del connection
    gc.collect()

    assert gone() is None


def test_a_connection_prepares_no_more_than_so_many() -> None:
    prepared = Prepared()
    forms = []
    for number in range(40):
        forms.append(prepared.form(str(number), 0))
        if forms[-1] is Form.PREPARING:
            prepared.learn(str(number), there=True)

    assert [Form.PREPARING] * 32 + [Form.PLAIN] * 8 == forms
    assert Form.EXECUTING is prepared.form("31", 0)


def test_where_it_is_always_lost_it_is_tried_less_and_less_often() -> None:
    """A pooler whose client did not say prepare_threshold=None: what it costs dies away."""
    prepared = Prepared()
    attempts = []
    for number in range(10_000):
        form = prepared.form("a", 5)
        if form is Form.PREPARING:
            prepared.learn("a", there=True)
        elif form is Form.EXECUTING:
            attempts.append(number)
            assert Form.PLAIN is prepared.blame("a", form, "26000")

    assert [6, 28, 110, 432, 1714, 6836] == attempts


@pytest.mark.parametrize(("first", "second"), [("eu1", "eu2"), ("é", "è"), ("it's", "its")])
def test_openings_of_two_shards_bear_two_names(first: str, second: str) -> None:
    names = {
        statements(shard, write=write, isolation=isolation, deferrable=None).name  # type: ignore[arg-type]
        for shard in (first, second)
        for write in (True, False)
        for isolation in (None, "SERIALIZABLE")
    }

    assert 6 == len(names), "readers ask the same at every level"
