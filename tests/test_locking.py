"""A busy table is locked without the application noticing, or somebody is named."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from servers import FaultProxy

from shardmig import local
from shardmig.config import SessionSettings, Shard
from shardmig.errors import InDoubt, LockNotObtained, ProofFailed, StepFailed
from shardmig.locking import Mode, holders, mode_of, under_lock
from shardmig.session import Query, Session, open_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from conftest import Connect

    from shardmig.events import Waiting
    from shardmig.local import Server

ADD = Query("ALTER TABLE customer ADD COLUMN first_name text")


@asynccontextmanager
async def at(shard: Shard, *, user: str | None = None, **settings: Any) -> AsyncIterator[Session]:
    url = shard.url.get_secret_value()
    chosen = Shard.model_validate({"name": shard.name, "url": make_conninfo(url, user=user) if user else url})
    async with open_session(chosen, SessionSettings(**settings), pg_versions=(12, 18)) as session:
        yield session


@pytest.fixture
def shop(shard: Shard, connect: Connect) -> Shard:
    admin = connect(shard)
    admin.execute("CREATE TABLE customer AS SELECT n AS id, 'x' AS name FROM generate_series(1, 100) AS n")
    admin.execute("ALTER TABLE customer ADD PRIMARY KEY (id)")
    admin.execute("ALTER TABLE customer OWNER TO shop_owner")
    return shard


@asynccontextmanager
async def reading(shard: Shard, table: str = "customer") -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Keep a transaction open that has read a table, and give it back once it is an old one."""
    async with await psycopg.AsyncConnection.connect(shard.url.get_secret_value()) as reader:
        await reader.execute(f"SELECT count(*) FROM {table}".encode())
        await asyncio.sleep(0.25)
        yield reader


async def columns(session: Session, table: str = "customer") -> list[str]:
    found = await session.execute(
        "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 ORDER BY attnum", [table]
    )
    return [name for (name,) in found.rows]


@contextmanager
def writers(shard: Shard, count: int = 10) -> Iterator[list[int]]:
    """Write from some connections without pause; yields how many statements each has got through."""
    done = [0] * count
    stop = threading.Event()
    ready = threading.Barrier(count + 1)

    def write(number: int) -> None:
        with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as connection:
            ready.wait()
            while not stop.is_set():
                connection.execute("UPDATE customer SET name = name WHERE id = %s", [number + 1])
                done[number] += 1
                stop.wait(0.005)  # ten clients that think, not a benchmark

    threads = [threading.Thread(target=write, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    try:
        yield done
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# --------------------------------------------------------------------------------------------------------------------
# One flight


async def test_everything_under_the_lock_happens_in_one_round_trip(shop: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        proxy.delay(0.02)
        async with at(proxy.way_to(shop), owner="shop_owner") as session:
            before = proxy.round_trips
            results = await under_lock(session, "customer", [Query("SELECT 1"), ADD, Query("SELECT $1::int", (2,))])

            assert 1 == proxy.round_trips - before
    assert [1, None, 2] == [result.value for result in results]


async def test_a_lost_answer_is_in_doubt_and_not_repeated(shop: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        async with at(proxy.way_to(shop)) as session:
            proxy.cut_after("COMMIT$")
            with pytest.raises(InDoubt):
                await under_lock(session, "customer", [ADD])


async def test_what_the_proof_refuses_is_rolled_back(shop: Shard) -> None:
    async with at(shop) as session:
        with pytest.raises(ProofFailed, match=r"column public\.customer\.name is gone"):
            await under_lock(session, "customer", [ADD, Query("ALTER TABLE customer DROP COLUMN name")])

        assert ["id", "name"] == await columns(session)


async def test_the_proof_is_of_every_table_that_is_locked(shop: Shard, connect: Connect) -> None:
    connect(shop).execute("CREATE TABLE region (id int PRIMARY KEY, name text)")
    async with at(shop) as session:
        with pytest.raises(ProofFailed, match=r"column public\.region\.name is gone"):
            await under_lock(
                session, "customer", [ADD, Query("ALTER TABLE region DROP COLUMN name")], further=["region"]
            )

        assert ["id", "name"] == await columns(session)


async def test_a_statement_that_keeps_everybody_waiting_is_rolled_back_and_the_cure_told(
    shop: Shard, connect: Connect
) -> None:
    """A domain that got a CHECK on this shard: a new column of it is written into each row."""
    connect(shop).execute("CREATE DOMAIN mood AS text CHECK (pg_sleep(0.05)::text IS NOT NULL)")
    add = Query("ALTER TABLE customer ADD COLUMN mood mood")
    async with at(shop, lock_hold_s=0.2) as session:
        with pytest.raises(
            StepFailed, match=r"everybody waited for customer.*take the CHECK from the domain"
        ) as caught:
            await under_lock(session, "customer", [add])

        assert "raise session.lock_hold_s" in str(caught.value)
        assert ["id", "name"] == await columns(session)


async def test_a_table_that_was_written_anew_in_no_time_is_refused_with_the_cure(shop: Shard, connect: Connect) -> None:
    connect(shop).execute("CREATE DOMAIN mood AS text CHECK (value <> '')")
    async with at(shop) as session:
        with pytest.raises(ProofFailed, match=r"storage public\.customer changed.*take the CHECK from the domain"):
            await under_lock(session, "customer", [Query("ALTER TABLE customer ADD COLUMN mood mood")])

        assert ["id", "name"] == await columns(session)


@pytest.mark.parametrize("relations", [("misread",), ("customer", "misread")])
async def test_what_cannot_be_proved_is_rolled_back(shop: Shard, relations: tuple[str, ...]) -> None:
    async with at(shop) as session:
        with pytest.raises(ProofFailed, match="was not found"):
            await under_lock(
                session, relations[0], [Query("ALTER TABLE customer DROP COLUMN name")], further=relations[1:]
            )

        assert ["id", "name"] == await columns(session)


async def test_a_change_by_somebody_else_while_we_queued_is_not_blamed_on_us(shop: Shard, connect: Connect) -> None:
    watch = connect(shop)
    async with at(shop, lock_timeout_ms=[5000], old_holder_ms=60_000) as session:
        async with await psycopg.AsyncConnection.connect(shop.url.get_secret_value()) as other:
            await other.execute("ALTER TABLE customer ADD CHECK (id > -1)")
            applying = asyncio.create_task(under_lock(session, "customer", [ADD]))
            while watch.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is None:
                await asyncio.sleep(0.005)
            await other.commit()
        await applying

        assert "first_name" in await columns(session)


async def test_a_failing_statement_is_not_tried_again(shop: Shard) -> None:
    async with at(shop) as session:
        with pytest.raises(psycopg.errors.UndefinedTable):
            await under_lock(session, "customer", [Query("ALTER TABLE custommer ADD COLUMN x int")])
        with pytest.raises(psycopg.errors.UndefinedTable):
            await under_lock(session, "custommer", [Query("ALTER TABLE custommer ADD COLUMN x int")])

        assert ["id", "name"] == await columns(session)


@pytest.mark.parametrize("name", ['"Odd.Name"', "Odd", "other.plain"])
async def test_names_are_found_as_plans_write_them(shop: Shard, connect: Connect, name: str) -> None:
    quoted = {"Odd": '"Odd"'}.get(name, name)
    admin = connect(shop)
    admin.execute("CREATE SCHEMA other")
    admin.execute(f"CREATE TABLE {quoted} (id int)".encode())
    async with at(shop, lock_wait_s=0.3) as session:
        reader = await psycopg.AsyncConnection.connect(shop.url.get_secret_value())
        await reader.execute(f"SELECT FROM {quoted}".encode())
        assert [reader.info.backend_pid] == [holder.pid for holder in await holders(session, name)]
        await reader.close()
        await under_lock(session, name, [Query(f"ALTER TABLE {quoted} ADD COLUMN added int")])

        assert ["id", "added"] == await columns(session, quoted)


# --------------------------------------------------------------------------------------------------------------------
# Busy tables


async def test_whoever_holds_any_of_several_tables_is_waited_for(shop: Shard) -> None:
    """A new table with two foreign keys must not hold the first table while it queues for the second."""
    said: list[Waiting] = []
    pair = Query(
        "CREATE TABLE pair (a int REFERENCES other ON DELETE CASCADE, b int REFERENCES customer ON DELETE CASCADE)"
    )
    async with at(shop) as session, await psycopg.AsyncConnection.connect(shop.url.get_secret_value()) as writer:
        pid = writer.info.backend_pid
        await session.transact([Query("CREATE TABLE other (id int PRIMARY KEY)")])
        await writer.execute("UPDATE customer SET name = 'x' WHERE id = 1")
        await asyncio.sleep(0.25)  # now it is an old transaction
        applying = asyncio.create_task(
            under_lock(session, "other", [pair], mode="SHARE ROW EXCLUSIVE", further=["customer"], on_wait=said.append)
        )
        await something(said)
        assert not applying.done()
        await writer.rollback()
        await asyncio.wait_for(applying, 10)

    assert [pid] == [blocker.pid for blocker in said[0].blockers]


async def test_all_tables_together_are_queued_for_no_longer_than_one(shop: Shard, connect: Connect) -> None:
    """Each of several tables comes free a while after it is queued for, and a writer of the first one waits for all."""
    names, watch = [f"t{number}" for number in range(6)], connect(shop)
    keys = ", ".join(f"{name}_id int REFERENCES {name} ON DELETE CASCADE" for name in ("customer", *names))
    link = Query(f"CREATE TABLE link ({keys})")
    watch.execute("; ".join(f"CREATE TABLE {name} (id int PRIMARY KEY)" for name in names).encode())
    ended = threading.Event()
    with ExitStack() as stack:
        keepers = [connect(shop) for _ in names]
        for name, keeper in zip(names, keepers, strict=True):
            keeper.execute(f"BEGIN; INSERT INTO {name} VALUES (1)".encode())

        def let_go() -> None:
            for name, keeper in zip(names, keepers, strict=True):
                sql = f"SELECT FROM pg_locks WHERE relation = '{name}'::regclass AND NOT granted"
                while not ended.is_set() and watch.execute(sql.encode()).fetchone() is None:
                    ended.wait(0.005)
                ended.wait(0.3)
                keeper.execute("COMMIT")

        def write() -> None:
            writer = connect(shop)
            writer.execute("SET lock_timeout = '1200ms'")
            while not ended.wait(0.02):
                writer.execute("UPDATE customer SET name = 'x' WHERE id = 1")

        pool = stack.enter_context(ThreadPoolExecutor(2))
        stack.callback(ended.set)
        letting, writing = pool.submit(let_go), pool.submit(write)
        async with at(shop, lock_timeout_ms=[500], old_holder_ms=60_000) as session:
            mode: Mode = "SHARE ROW EXCLUSIVE"
            await asyncio.wait_for(under_lock(session, "customer", [link], mode=mode, further=names), 20)
        ended.set()
        letting.result()
        writing.result()  # no LockNotAvailable: it has waited for half a second, not for two


async def test_writers_go_on_while_a_reader_keeps_the_table(shop: Shard) -> None:
    """The reader would stop them for as long as it runs, if anybody queued for ACCESS EXCLUSIVE behind it."""
    said: list[Waiting] = []
    with writers(shop) as done:
        async with at(shop) as session, reading(shop) as reader:
            pid, began = reader.info.backend_pid, time.monotonic()
            applying = asyncio.create_task(under_lock(session, "customer", [ADD], on_wait=said.append))
            await something(said)
            before = list(done)
            async with asyncio.timeout(20):
                while min(now - then for now, then in zip(done, before, strict=True)) < 50:
                    await asyncio.sleep(0.01)
            assert not applying.done()
            waited_s = time.monotonic() - began
            await reader.rollback()
            await asyncio.wait_for(applying, 20)

    assert [pid] == [blocker.pid for blocker in said[0].blockers]
    assert 0.2 <= (said[0].blockers[0].age_s or 0)
    assert 2 + waited_s >= len(said), "at once, and each second"


async def something(said: list[Waiting]) -> None:
    async with asyncio.timeout(20):
        while not said:
            await asyncio.sleep(0.01)


async def test_nobody_queues_behind_an_old_transaction(shop: Shard, connect: Connect) -> None:
    watch = connect(shop)
    async with at(shop, lock_wait_s=0.7) as session, reading(shop) as reader:
        pid = reader.info.backend_pid
        applying = asyncio.create_task(under_lock(session, "customer", [ADD]))
        queued = 0
        while not applying.done():
            row = watch.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
            assert row is not None
            queued += row[0]
            await asyncio.sleep(0.002)
        with pytest.raises(LockNotObtained) as caught:
            await applying

    assert 0 == queued
    assert f"held by pid {pid}, role postgres, open for " in str(caught.value)
    assert "query: SELECT count(*) FROM customer; nothing was changed" in str(caught.value)


async def test_steady_short_traffic_does_not_starve_it(shop: Shard) -> None:
    async with at(shop) as session:
        with writers(shop, 20):
            await asyncio.wait_for(under_lock(session, "customer", [ADD]), 10)

        assert ["id", "name", "first_name"] == await columns(session)


async def test_a_foreign_key_does_not_wait_for_readers(shop: Shard) -> None:
    sql = "CREATE TABLE address (id int REFERENCES customer ON DELETE CASCADE)"
    async with at(shop, lock_wait_s=1) as session, reading(shop) as reader:
        await under_lock(session, "customer", [Query(sql)], mode=mode_of(sql))
        await reader.execute("UPDATE customer SET name = 'y' WHERE id = 1")
        with pytest.raises(LockNotObtained):
            await under_lock(session, "customer", [Query(sql.replace("address", "again"))], mode=mode_of(sql))


async def test_a_transaction_on_a_child_counts_too(shop: Shard, connect: Connect) -> None:
    connect(shop).execute("CREATE TABLE vip () INHERITS (customer)")
    async with at(shop, lock_wait_s=0.5) as session, reading(shop, "vip"):
        with pytest.raises(LockNotObtained, match=r"\(0 tries\)"):
            await under_lock(session, "customer", [ADD])


async def test_a_prepared_transaction_is_named_by_its_identifier(connect: Connect) -> None:
    with local.Server.start(settings={"max_prepared_transactions": 2}) as server:
        other = connect(server)
        other.execute("CREATE TABLE customer (id int)")
        other.execute("BEGIN")
        other.execute("INSERT INTO customer VALUES (1)")
        other.execute("PREPARE TRANSACTION 'left over'")
        async with at(Shard.model_validate({"name": "eu1", "url": server.url()}), lock_wait_s=0.4) as session:
            with pytest.raises(LockNotObtained, match="PREPARE TRANSACTION 'left over'"):
                await under_lock(session, "customer", [ADD])


async def test_ages_that_the_role_may_not_see_are_counted_from_the_first_look(shop: Shard) -> None:
    """Without pg_read_all_stats: some short tries at first, then no more queueing."""
    said: list[Waiting] = []
    async with at(shop, user="shop_migrator", owner="shop_owner", lock_wait_s=1.5) as session:
        assert not (await session.execute("SELECT pg_has_role(session_user, 'pg_read_all_stats', 'USAGE')")).value
        async with reading(shop) as reader:
            pid = reader.info.backend_pid
            with pytest.raises(LockNotObtained, match=r"\([1-4] tries\).*GRANT pg_read_all_stats TO shop_migrator"):
                await under_lock(session, "customer", [ADD], on_wait=said.append)

    assert [pid] == [blocker.pid for blocker in said[0].blockers]


async def test_a_login_role_without_rights_on_the_schema_sees_holders_and_proves(shop: Shard, connect: Connect) -> None:
    admin = connect(shop)
    admin.execute("GRANT ALL ON SCHEMA public TO shop_owner")  # who owns it only since 15
    admin.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    admin.execute("CREATE ROLE shop_outsider LOGIN NOINHERIT IN ROLE shop_owner")
    try:
        async with at(shop, user="shop_outsider", owner="shop_owner") as session:
            async with reading(shop) as reader:
                for name in ("customer", "public.customer"):
                    assert [reader.info.backend_pid] == [holder.pid for holder in await holders(session, name)]
            with pytest.raises(ProofFailed, match="name"):
                await under_lock(session, "customer", [Query("ALTER TABLE customer DROP COLUMN name")])
    finally:
        admin.execute("DROP ROLE shop_outsider")


async def test_a_member_of_read_all_stats_sees_ages_though_the_owner_does_not(shop: Shard, connect: Connect) -> None:
    admin = connect(shop)
    admin.execute("GRANT pg_read_all_stats TO shop_migrator")
    try:
        async with at(shop, user="shop_migrator", owner="shop_owner", lock_wait_s=0.4) as session:
            async with reading(shop):
                with pytest.raises(LockNotObtained, match=r"\(0 tries\)"):
                    await under_lock(session, "customer", [ADD])
            await under_lock(session, "customer", [ADD])

            owner = await session.execute("SELECT current_user::text")
            assert "shop_owner" == owner.value
    finally:
        admin.execute("REVOKE pg_read_all_stats FROM shop_migrator")


# --------------------------------------------------------------------------------------------------------------------
# Autovacuum


@pytest.fixture(scope="module")
def vacuuming() -> Iterator[Server]:
    """Run a server whose autovacuum looks every second, and takes its time over one table."""
    settings: dict[str, str | int] = {
        "autovacuum": "on",
        "autovacuum_naptime": "1s",
        "autovacuum_max_workers": 1,
        "track_counts": "on",
        "max_worker_processes": 4,
    }
    with local.Server.start(settings=settings) as server:
        yield server


async def vacuumed(admin: psycopg.Connection[Any], owner: str = "postgres") -> int:
    """Make autovacuum work on `customer` and return its process once it is there."""
    eagerly = "autovacuum_vacuum_threshold = 0, autovacuum_vacuum_scale_factor = 0"
    slowly = "autovacuum_vacuum_cost_limit = 1, autovacuum_vacuum_cost_delay = 100"
    admin.execute("DROP TABLE IF EXISTS customer")
    admin.execute(f"CREATE TABLE customer (id int, name text) WITH ({eagerly}, {slowly})".encode())
    admin.execute(f"ALTER TABLE customer OWNER TO {owner}".encode())
    admin.execute("INSERT INTO customer SELECT n, repeat('x', 500) FROM generate_series(1, 5000) AS n")
    admin.execute("UPDATE customer SET name = name")
    for _ in range(600):
        row = admin.execute(
            "SELECT l.pid FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) "
            "WHERE l.relation = 'customer'::regclass AND a.backend_type = 'autovacuum worker' "
            "AND now() - a.xact_start > '300 ms'"
        ).fetchone()
        if row is not None:
            return int(row[0])
        await asyncio.sleep(0.05)
    raise AssertionError("autovacuum did not come")


async def test_an_autovacuum_yields_at_once_to_a_role_that_may_hurry_it(vacuuming: Server, connect: Connect) -> None:
    worker = await vacuumed(connect(vacuuming))
    said: list[Waiting] = []
    async with at(Shard.model_validate({"name": "eu1", "url": vacuuming.url()})) as session:
        await under_lock(session, "customer", [ADD], on_wait=said.append)

    assert {"autovacuum works on the table and is asked to yield"} == {one.reason for one in said}, "no long try"
    assert [(worker, "autovacuum")] == [(blocker.pid, blocker.what) for blocker in said[0].blockers]


async def test_an_autovacuum_gets_one_announced_long_try_otherwise(vacuuming: Server, connect: Connect) -> None:
    admin = connect(vacuuming)
    admin.execute("DROP ROLE IF EXISTS plain")
    admin.execute("CREATE ROLE plain LOGIN IN ROLE pg_read_all_stats")
    await vacuumed(admin, owner="plain")
    said: list[Waiting] = []
    shard = Shard.model_validate({"name": "eu1", "url": vacuuming.url()})
    async with at(shard, user="plain", lock_wait_s=4) as session:
        await under_lock(session, "customer", [ADD], on_wait=said.append)

        assert "first_name" in await columns(session)
    assert "autovacuum works on the table" == said[0].reason, "at first nobody queues"
    assert "readers and writers wait 1200 ms" in said[-1].reason
    assert "GRANT SET ON PARAMETER deadlock_timeout" in said[-1].reason


@pytest.mark.parametrize(
    ("sql", "mode"),
    [
        ("ALTER TABLE a ADD COLUMN b int", "ACCESS EXCLUSIVE"),
        ("  create table a (b int references c)", "SHARE ROW EXCLUSIVE"),
        ("COMMENT ON TABLE a IS 'x'", "SHARE UPDATE EXCLUSIVE"),
        ("/* odd */ CREATE TABLE a ()", "ACCESS EXCLUSIVE"),
    ],
)
def test_a_statement_says_which_lock_it_takes(sql: str, mode: str) -> None:
    assert mode == mode_of(sql)
