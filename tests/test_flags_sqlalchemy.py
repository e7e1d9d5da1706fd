"""Flags in SQLAlchemy's transactions: engines, connections, sessions, sync and async, on real servers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from flag_doors import Ledger, install
from psycopg.conninfo import conninfo_to_dict
from servers import FaultProxy, await_caught_up, standby_of
from sqlalchemy import URL, Engine, create_engine, exc, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from shardmig import (
    Flag,
    Flags,
    LedgerMissing,
    ShardInMaintenance,
    State,
    UnknownFlag,
    ViewExpired,
    WriteRefused,
    WrongShard,
    WrongTransaction,
)
from shardmig.integrations import sqlalchemy as integration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from conftest import Connect

    from shardmig import local
    from shardmig.config import Shard

SPLIT_NAME = Flag("split_name")
LEVEL = text("SELECT current_setting('transaction_isolation')")
READ_ONLY = text("SELECT current_setting('transaction_read_only')")


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    full_name: Mapped[str | None]
    first_name: Mapped[str | None]
    last_name: Mapped[str | None]

    def rename(self, state: State, first: str, last: str) -> None:
        """Write what the state asks for, in one UPDATE."""
        if state.writes_old:
            self.full_name = f"{first} {last}"
        if state.writes_new:
            self.first_name, self.last_name = first, last


@pytest.fixture
def flags() -> Flags:
    return Flags(SPLIT_NAME)


@pytest.fixture
def ledger(shard: Shard, connect: Connect) -> Ledger:
    asyncio.run(install(shard))
    made = Ledger(connect(shard), "eu1")
    made.connection.execute(
        "CREATE TABLE customer (id int PRIMARY KEY, full_name text, first_name text, last_name text);"
        "INSERT INTO customer VALUES (1, 'Ada Lovelace')"
    )
    made.add("split_name", State.DUAL)
    return made


def url_of(conninfo: str) -> URL:
    """Return libpq's URL as SQLAlchemy wants it."""
    parts = {name: str(value) for name, value in conninfo_to_dict(conninfo).items() if value is not None}
    query = {name: value for name, value in parts.items() if name not in {"dbname", "user", "password"}}
    return make_url("postgresql+psycopg://").set(
        username=parts.get("user"), password=parts.get("password"), database=parts.get("dbname"), query=query
    )


@pytest.fixture
def make_engine(shard: Shard, flags: Flags) -> Iterator[Callable[..., Engine]]:
    """Make an engine with flags; keywords are create_engine's."""
    made: list[Engine] = []

    def make(conninfo: str = "", *, named: str = "eu1", **keywords: Any) -> Engine:
        made.append(create_engine(url_of(conninfo or shard.url.get_secret_value()), **keywords))
        return integration.install(made[-1], flags, shard=named)

    yield make
    for engine in made:
        engine.dispose()


@pytest.fixture
def engine(make_engine: Callable[..., Engine], ledger: Ledger) -> Engine:
    return make_engine()


@pytest.fixture
async def aengine(shard: Shard, ledger: Ledger, flags: Flags) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(url_of(shard.url.get_secret_value()))
    yield integration.install(made, flags, shard="eu1")
    await made.dispose()


def names(ledger: Ledger) -> Any:
    return ledger.connection.execute("SELECT full_name, first_name, last_name FROM customer").fetchone()


# --------------------------------------------------------------------------------------------------------------------
# What a transaction sees


def test_a_session_writes_what_the_state_asks_for(engine: Engine, ledger: Ledger, flags: Flags) -> None:
    expected = {
        State.DUAL: ("Grace DUAL", "Grace", "DUAL"),
        State.LIVE: ("Grace LIVE", "Grace", "LIVE"),
        State.DONE: ("Grace LIVE", "Grace", "DONE"),
    }
    for state, row in expected.items():
        ledger.walk("split_name", state)
        with Session(engine) as session, session.begin():
            customer = session.get_one(Customer, 1)
            customer.rename(flags.of(session)[SPLIT_NAME], "Grace", state.name)

        assert row == names(ledger)


async def test_an_async_session_does_the_same(aengine: AsyncEngine, ledger: Ledger, flags: Flags) -> None:
    async with AsyncSession(aengine) as session, session.begin():
        customer = await session.get_one(Customer, 1)
        customer.rename((await flags.aof(session))[SPLIT_NAME], "Grace", "Hopper")
    ledger.walk("split_name", State.DONE)
    async with async_sessionmaker(aengine)() as session, session.begin():
        view = await flags.aof(session)  # before the session did anything
        (await session.get_one(Customer, 1)).rename(view[SPLIT_NAME], "Ada", "Byron")

    assert ("Grace Hopper", "Ada", "Byron") == names(ledger)


async def test_an_async_session_says_what_to_await(aengine: AsyncEngine, flags: Flags) -> None:
    async with AsyncSession(aengine) as session:
        with pytest.raises(WrongTransaction, match=r"await flags\.aof"):
            flags.of(session)
        view = await flags.aof(session)
        assert view is await session.run_sync(flags.of)


def test_commit_and_rollback_end_the_view(engine: Engine, ledger: Ledger, flags: Flags) -> None:
    with Session(engine) as session:
        first = flags.of(session)
        session.commit()
        ledger.walk("split_name", State.LIVE)
        second = flags.of(session)
        assert (True, State.LIVE) == (first.expired, second[SPLIT_NAME])
        session.rollback()
        assert second.expired
        third = flags.of(session)
    assert third.expired
    with pytest.raises(ViewExpired):
        third[SPLIT_NAME]


async def test_commit_and_rollback_end_the_view_of_an_async_connection(aengine: AsyncEngine, flags: Flags) -> None:
    async with aengine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        first = flags.of(connection)
        await connection.commit()
        with pytest.raises(ViewExpired):
            flags.of(connection)
        await connection.begin()
        second = flags.of(connection)
        await connection.rollback()
        assert (True, True) == (first.expired, second.expired)


def test_savepoints_keep_the_view(engine: Engine, ledger: Ledger, flags: Flags) -> None:
    with Session(engine) as session, session.begin():
        view = flags.of(session)
        with pytest.raises(exc.DBAPIError), session.begin_nested():
            session.execute(text("SELECT 1 / 0"))
        with session.begin_nested():
            session.get_one(Customer, 1).rename(view[SPLIT_NAME], "Grace", "Hopper")
        assert view is flags.of(session)

    assert ("Grace Hopper", "Grace", "Hopper") == names(ledger)


def test_a_rolled_back_session_left_nothing(engine: Engine, ledger: Ledger, flags: Flags) -> None:
    with pytest.raises(ZeroDivisionError), Session(engine) as session, session.begin():  # noqa: PT012
        session.get_one(Customer, 1).rename(flags.of(session)[SPLIT_NAME], "Grace", "Hopper")
        session.flush()
        raise ZeroDivisionError

    assert ("Ada Lovelace", None, None) == names(ledger)


def test_every_kind_of_holder_gives_the_same_view(engine: Engine, flags: Flags) -> None:
    scoped = scoped_session(sessionmaker(engine))
    with scoped() as session:
        connection = session.connection()
        driver = connection.connection.driver_connection
        views = {id(flags.of(holder)) for holder in (session, scoped, connection, driver)}

        assert 1 == len(views)
    scoped.remove()


def test_several_engines_are_several_shards(
    shards: dict[str, Shard], connect: Connect, flags: Flags, make_engine: Callable[..., Engine]
) -> None:
    engines = {}
    for (name, shard), state in zip(shards.items(), State, strict=True):
        asyncio.run(install(shard))
        Ledger(connect(shard), name).add("split_name", state)
        engines[name] = make_engine(shard.url.get_secret_value(), named=name)

    for _ in range(2):
        seen = []
        for engine in engines.values():
            with engine.begin() as connection:
                seen.append(flags.of(connection)[SPLIT_NAME])
        assert list(State) == seen


def test_one_database_with_several_schema_shards(engine: Engine, ledger: Ledger, flags: Flags) -> None:
    ledger.connection.execute("INSERT INTO shardmig.shard (shard, epoch, schema_name) VALUES ('eu1b', 7, 'b')")
    Ledger(ledger.connection, "eu1b").add("split_name", State.OLD)

    with engine.execution_options(shardmig_shard="eu1b").connect() as connection, connection.begin():
        assert ("eu1b", State.OLD) == (flags.of(connection).shard, flags.of(connection)[SPLIT_NAME])
    with engine.connect() as connection, connection.begin():
        assert ("eu1", State.DUAL) == (flags.of(connection).shard, flags.of(connection)[SPLIT_NAME])


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_isolation_levels_are_kept(
    make_engine: Callable[..., Engine], ledger: Ledger, flags: Flags, *, isolation: str
) -> None:
    plain, made_so = make_engine(), make_engine(isolation_level=isolation)
    options = plain.execution_options(isolation_level=isolation)

    for engine in (options, made_so, plain, options):
        with engine.connect() as connection:
            level = isolation if engine is not plain else "READ COMMITTED"
            assert level.lower() == connection.scalar(LEVEL)
            assert State.DUAL is flags.of(connection)[SPLIT_NAME]


@pytest.mark.parametrize("option", [{"shardmig_write": False}, {"postgresql_readonly": True}])
def test_read_only_is_an_execution_option(
    engine: Engine, ledger: Ledger, flags: Flags, *, option: dict[str, bool]
) -> None:
    ledger.maintenance(1)
    with pytest.raises(ShardInMaintenance), Session(engine) as session:
        session.execute(text("SELECT 1"))

    with Session(engine.execution_options(**option)) as session:
        assert ("on", False) == (session.scalar(READ_ONLY), flags.of(session).write)
    with Session(engine) as session:
        session.connection(execution_options=option)
        assert ("on", False) == (session.scalar(READ_ONLY), flags.of(session).write)
    ledger.maintenance(0)
    with Session(engine) as session:
        assert ("off", True) == (session.scalar(READ_ONLY), flags.of(session).write)


def test_autocommit_has_no_view(make_engine: Callable[..., Engine], ledger: Ledger, flags: Flags) -> None:
    for engine in (make_engine(isolation_level="AUTOCOMMIT"), make_engine()):
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        with autocommit.connect() as connection:
            connection.execute(text("VACUUM customer"))
            with pytest.raises(ViewExpired):
                flags.of(connection)
    with engine.connect() as connection:
        assert State.DUAL is flags_of_begun(flags, connection)


def flags_of_begun(flags: Flags, connection: Any) -> State:
    connection.execute(text("SELECT 1"))
    return flags.of(connection)[SPLIT_NAME]


def test_a_server_side_cursor_works_inside(engine: Engine, ledger: Ledger) -> None:
    with engine.connect() as connection:
        rows = connection.execution_options(yield_per=10).execute(text("SELECT generate_series(1, 100)"))

        assert 100 == len(rows.all())


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def test_errors_of_flags_come_as_they_are(
    make_engine: Callable[..., Engine], shards: dict[str, Shard], engine: Engine, flags: Flags
) -> None:
    with pytest.raises(WrongShard, match="us7"), make_engine(named="us7").connect() as connection:
        connection.execute(text("SELECT 1"))
    elsewhere = make_engine(shards["us1"].url.get_secret_value(), named="us1")
    with pytest.raises(LedgerMissing), Session(elsewhere) as session:
        session.execute(text("SELECT 1"))
    with engine.begin() as connection, pytest.raises(UnknownFlag):
        flags.of(connection)[Flag("split_nam")]


async def test_errors_of_flags_come_as_they_are_in_async_code(
    aengine: AsyncEngine, ledger: Ledger, flags: Flags
) -> None:
    ledger.maintenance(2, retry_after_s=5)
    with pytest.raises(ShardInMaintenance) as told:
        async with AsyncSession(aengine) as session:
            await session.execute(text("SELECT 1"))
    ledger.maintenance(0)

    assert 5 == told.value.retry_after
    async with AsyncSession(aengine) as session:
        assert State.DUAL is (await flags.aof(session))[SPLIT_NAME]


def test_a_refused_begin_leaves_a_usable_connection(engine: Engine, ledger: Ledger, flags: Flags) -> None:
    with engine.connect() as connection:
        ledger.maintenance(2)
        for _ in range(2):
            with pytest.raises(ShardInMaintenance):
                connection.execute(text("SELECT 1"))
        ledger.maintenance(0)
        connection.execute(text("SELECT 1"))

        assert State.DUAL is flags.of(connection)[SPLIT_NAME]


def test_a_swallowed_error_is_told_at_commit(engine: Engine, ledger: Ledger) -> None:
    with pytest.raises(WrongTransaction, match="begin_nested"), engine.begin() as connection:  # noqa: PT012
        connection.execute(text("INSERT INTO customer VALUES (2)"))
        with pytest.raises(exc.DBAPIError):
            connection.execute(text("SELECT 1 / 0"))

    assert [(1,)] == ledger.connection.execute("SELECT count(*) FROM customer").fetchall()


def test_a_commit_by_hand_is_told(engine: Engine, ledger: Ledger) -> None:
    with pytest.raises(WrongTransaction, match="ended by a statement"), engine.begin() as connection:
        connection.execute(text("COMMIT"))


@pytest.mark.parametrize("reported", [True, False], ids=["reported", "asked"])
@pytest.mark.parametrize("ends", ["COMMIT AND CHAIN", "ROLLBACK AND CHAIN", "COMMIT; BEGIN"])
def test_a_chained_transaction_is_never_committed(
    engine: Engine, ledger: Ledger, flags: Flags, ends: str, *, reported: bool
) -> None:
    def block(statement: str) -> None:
        with Session(engine) as session, session.begin():
            flags.of(session)
            connection = session.connection().connection.driver_connection
            flags.known(connection).reported &= reported
            session.execute(text(statement))
            session.execute(text("UPDATE customer SET full_name = 'by an old view'"))

    with pytest.raises(WrongTransaction, match="began another one"):
        block(ends)

    assert ledger.connection.execute("SELECT full_name FROM customer").fetchone() == ("Ada Lovelace",)
    block("SELECT 1")
    assert ledger.connection.execute("SELECT full_name FROM customer").fetchone() == ("by an old view",)


def _swallows(session: Session) -> None:
    with suppress(exc.DBAPIError):
        session.execute(text("SELECT 1 / 0"))


def _chains(session: Session) -> None:
    session.execute(text("COMMIT AND CHAIN"))
    session.execute(text("UPDATE customer SET full_name = 'by an old view'"))


@pytest.mark.parametrize("work", [_swallows, _chains])
def test_a_refused_commit_leaves_no_transaction_open(
    engine: Engine, ledger: Ledger, work: Callable[[Session], None]
) -> None:
    """SQLAlchemy takes a commit that failed for an end: without one, the next request would have met the last one's."""

    def commits_by_itself() -> None:
        with Session(engine) as session:
            work(session)
            session.commit()

    with pytest.raises(WrongTransaction):
        commits_by_itself()

    open_ones = "SELECT state FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
    assert [] == ledger.connection.execute(open_ones).fetchall()
    with Session(engine) as session:
        assert "Ada Lovelace" == session.execute(text("SELECT full_name FROM customer")).scalar_one()


async def test_a_refused_commit_of_an_async_session_leaves_no_transaction_open(
    aengine: AsyncEngine, ledger: Ledger
) -> None:
    async def commits_by_itself() -> None:
        async with AsyncSession(aengine) as session:
            await session.run_sync(_swallows)
            await session.commit()

    with pytest.raises(WrongTransaction):
        await commits_by_itself()

    async with AsyncSession(aengine) as session:
        assert "Ada Lovelace" == (await session.execute(text("SELECT full_name FROM customer"))).scalar_one()


async def test_a_chained_transaction_of_an_async_session_is_never_committed(
    aengine: AsyncEngine, ledger: Ledger, flags: Flags
) -> None:
    async def block() -> None:
        async with AsyncSession(aengine) as session, session.begin():
            await flags.aof(session)
            await session.execute(text("COMMIT AND CHAIN"))
            await session.execute(text("UPDATE customer SET full_name = 'by an old view'"))

    with pytest.raises(WrongTransaction, match="began another one"):
        await block()

    assert ledger.connection.execute("SELECT full_name FROM customer").fetchone() == ("Ada Lovelace",)


def test_two_phase_transactions_are_refused(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(WrongTransaction, match="two-phase"):
        connection.begin_twophase()


def test_flags_are_installed_once_and_only_on_psycopg(engine: Engine, flags: Flags) -> None:
    with pytest.raises(WrongTransaction, match="already"):
        integration.install(engine.execution_options(), flags, shard="us1")
    with pytest.raises(WrongTransaction, match=r"postgresql\+psycopg"):
        integration.install(create_engine("sqlite://"), flags, shard="eu1")


def test_a_lost_connection_is_sqlalchemys_error_and_leaves_the_pool(
    make_engine: Callable[..., Engine], servers: list[local.Server], ledger: Ledger, flags: Flags
) -> None:
    with FaultProxy(servers[0]) as proxy:
        engine = make_engine(proxy.url(ledger.connection.info.dbname))
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            view = flags.of(connection)
        proxy.reset()
        with pytest.raises(exc.OperationalError) as told, engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        assert (True, True) == (told.value.connection_invalidated, view.expired)

        with engine.connect() as connection:
            assert State.DUAL is flags_of_begun(flags, connection)
            proxy.reset()
            lost = flags.of(connection)
            with pytest.raises(exc.OperationalError):
                connection.execute(text("SELECT 1"))
            assert lost.expired
        engine.dispose()


def test_a_known_epoch_costs_no_round_trip(
    make_engine: Callable[..., Engine], servers: list[local.Server], ledger: Ledger
) -> None:
    with FaultProxy(servers[0]) as proxy:
        engine = make_engine(proxy.url(ledger.connection.info.dbname))

        def round_trips() -> int:
            before = proxy.round_trips
            with engine.begin() as connection:
                connection.execute(text("SELECT 1"))
            return proxy.round_trips - before

        round_trips()
        assert 3 == round_trips()
        ledger.walk("split_name", State.LIVE)
        assert [4, 3] == [round_trips(), round_trips()]
        engine.dispose()


def test_a_standby_is_read_in_one_snapshot(
    make_engine: Callable[..., Engine], servers: list[local.Server], ledger: Ledger, flags: Flags
) -> None:
    with standby_of(servers[0]) as standby:
        await_caught_up(servers[0], standby)
        engine = make_engine(standby.url(ledger.connection.info.dbname))
        reading = engine.execution_options(shardmig_write=False)
        with pytest.raises(WriteRefused), engine.begin():
            pass
        for _ in range(2):
            with reading.begin() as connection:
                assert "repeatable read" == connection.scalar(LEVEL)
                assert State.DUAL is flags.of(connection)[SPLIT_NAME]
        engine.dispose()
