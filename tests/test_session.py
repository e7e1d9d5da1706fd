"""A session is prepared, alone and honest, or it is refused with a cure and without a password."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from servers import FaultProxy, PgBouncer, database_of, standby_of

from shardmig import handshake, pulse
from shardmig.config import SessionSettings, Shard
from shardmig.errors import (
    InDoubt,
    NotPrimary,
    PreflightFailed,
    ShardBusy,
    ShardUnreachable,
    StepFailed,
    ThroughPooler,
)
from shardmig.session import LOCK_CLASS, Query, Session, is_connection_lost, is_transient, open_session, pointer

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from conftest import Connect

    from shardmig.local import Server

VERSIONS = (12, 18)


@dataclass(frozen=True)
class Setting:
    value: str


def at(shard: Shard, **settings: Any) -> AbstractAsyncContextManager[Session]:
    how = {name: settings.pop(name) for name in ("purpose", "take_over") if name in settings}
    versions = settings.pop("pg_versions", VERSIONS)
    return open_session(shard, SessionSettings(**settings), pg_versions=versions, **how)


def elsewhere(shard: Shard, url: str) -> Shard:
    return Shard.model_validate({"name": shard.name, "url": url})


def url_of(shard: Shard, **keywords: Any) -> str:
    return make_conninfo(shard.url.get_secret_value(), **keywords)


# --------------------------------------------------------------------------------------------------------------------
# Prepared


async def test_a_session_has_every_setting_that_migrating_relies_on(shard: Shard) -> None:
    async with at(shard, owner="shop_owner") as session:
        names = ("role", "search_path", "row_security", "synchronous_commit", "standard_conforming_strings", "TimeZone",
                 "client_encoding", "DateStyle", "lock_timeout", "idle_in_transaction_session_timeout")  # fmt: skip
        shown = {name: (await session.execute(f"SHOW {name}")).value for name in names}

    assert {
        "role": "shop_owner",
        "search_path": "public, pg_temp",
        "row_security": "off",
        "synchronous_commit": "on",
        "standard_conforming_strings": "on",
        "TimeZone": "UTC",
        "client_encoding": "UTF8",
        "DateStyle": "ISO, YMD",
        "lock_timeout": "100ms",
        "idle_in_transaction_session_timeout": "10s",
    } == shown


async def test_settings_of_a_role_do_not_leak_into_a_session(shard: Shard, connect: Connect) -> None:
    settings = {
        "row_security": "on",
        "search_path": "pg_catalog",
        "transform_null_equals": "on",
        "TimeZone": "Asia/Tokyo",
    }
    admin, database = connect(shard), database_of(shard)
    for name, setting in settings.items():
        admin.execute(f'ALTER ROLE shop_migrator IN DATABASE "{database}" SET {name} = "{setting}"'.encode())

    async with at(elsewhere(shard, url_of(shard, user="shop_migrator")), owner="shop_owner") as session:
        shown = {name: (await session.execute(f"SHOW {name}")).value for name in settings}

    assert {
        "row_security": "off",
        "search_path": "public, pg_temp",
        "transform_null_equals": "off",
        "TimeZone": "UTC",
    } == shown


async def test_lock_waits_end_before_the_server_looks_for_deadlocks(shard: Shard, connect: Connect) -> None:
    connect(shard).execute(f'ALTER DATABASE "{database_of(shard)}" SET deadlock_timeout = 60'.encode())

    async with at(shard) as session:
        assert "30ms" == (await session.execute("SHOW lock_timeout")).value


async def test_opening_costs_one_round_trip_beyond_the_connection(shard: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        proxy.delay(0.02)
        through = proxy.way_to(shard)
        async with at(through, owner="shop_owner"):
            opening = proxy.round_trips
        await (await handshake.connect(through, SessionSettings())).close()
        bare = proxy.round_trips - opening

    assert 1 == opening - bare


async def test_a_transaction_is_one_round_trip_whatever_it_holds(shard: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        proxy.delay(0.02)
        async with at(proxy.way_to(shard)) as session:
            before = proxy.round_trips
            await session.transact(
                [Query("CREATE TABLE a (id int)"), *(Query("INSERT INTO a VALUES ($1)", (n,)) for n in range(200))],
                local={"lock_timeout": "10ms"},
            )

            assert 1 == proxy.round_trips - before


async def test_every_session_of_ours_can_be_told_by_its_advisory_lock(shard: Shard) -> None:
    async with at(shard) as runner, at(shard, purpose="read") as reader:
        holders = await runner.execute(
            "SELECT array_agg(pid ORDER BY pid) FROM pg_locks "
            "WHERE locktype = 'advisory' AND classid = $1 AND objsubid = 2 AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            [LOCK_CLASS],
        )

        assert sorted([runner.backend_pid, reader.backend_pid]) == holders.value


# --------------------------------------------------------------------------------------------------------------------
# Statements


@pytest.mark.parametrize("sql", ["SELECT 1; SELECT 2", "SELECT 1; DROP TABLE kept", "SELECT 1 /*;*/; COMMIT"])
async def test_a_second_statement_in_one_text_is_refused(shard: Shard, sql: str) -> None:
    async with at(shard) as session:
        await session.execute("CREATE TABLE kept (id int)")
        for run in (session.execute, session.execute_alone, lambda text: session.transact([Query(text)])):
            with pytest.raises(psycopg.errors.SyntaxError):
                await run(sql)

        assert "kept" == (await session.execute("SELECT to_regclass('kept')::text")).value


@pytest.mark.parametrize("hidden", ["\0", "\r"])
async def test_characters_that_hide_text_are_refused_before_anything_is_sent(shard: Shard, hidden: str) -> None:
    async with at(shard) as session:
        await session.execute("CREATE TABLE kept (id int)")
        with pytest.raises(StepFailed, match="take it out"):
            await session.execute(f"SELECT 1 -- harmless{hidden}DROP TABLE kept")

        assert "kept" == (await session.execute("SELECT to_regclass('kept')::text")).value


async def test_percent_signs_stay_percent_signs(shard: Shard) -> None:
    async with at(shard) as session:
        assert "100 %s" == (await session.execute("SELECT '100 %s' WHERE 7 % 2 = 1")).value
        assert 1 == (await session.execute("SELECT $1::int % 2", [3])).value


async def test_values_look_alike_with_and_without_parameters(shard: Shard) -> None:
    async with at(shard) as session:
        await session.execute("CREATE TYPE mood AS ENUM ('good')")
        bare = await session.execute("SELECT 'good'::mood, 1.50::numeric, '[1]'::jsonb")
        bound = await session.execute("SELECT 'good'::mood, 1.50::numeric, '[1]'::jsonb WHERE $1 = 1", [1])

        assert bare.rows == bound.rows
        assert "good" == bare.value


async def test_a_failed_statement_leaves_nothing_behind_and_is_named(shard: Shard) -> None:
    async with at(shard) as session:
        with pytest.raises(psycopg.errors.UndefinedColumn) as caught:
            await session.transact(
                [Query("CREATE TABLE a (id int)"), Query("SELECT\n  nothing FROM a"), Query("SELECT 1")]
            )

        assert session.failed is not None
        assert "  nothing FROM a\n  ^" == pointer(caught.value, session.failed.sql)
        assert (await session.execute("SELECT to_regclass('a')")).value is None


async def test_concurrent_indexes_can_be_built_and_the_timeouts_come_back(shard: Shard) -> None:
    async with at(shard) as session:
        await session.execute("CREATE TABLE a (id int)")
        await session.execute_alone("CREATE INDEX CONCURRENTLY a_id ON a (id)")
        with pytest.raises(psycopg.errors.DuplicateTable):
            await session.execute_alone("CREATE INDEX CONCURRENTLY a_id ON a (id)")

        assert "100ms" == (await session.execute("SHOW lock_timeout")).value
        assert "30s" == (await session.execute("SHOW statement_timeout")).value


async def test_local_settings_end_with_their_transaction(shard: Shard) -> None:
    async with at(shard) as session:
        [during] = await session.transact([Query("SHOW lock_timeout")], local={"lock_timeout": "7ms"})

        assert ("7ms", "100ms") == (during.value, (await session.execute("SHOW lock_timeout")).value)


async def test_observing_happens_as_the_login_role_and_work_as_the_owner(shard: Shard) -> None:
    who = "SELECT current_user::text AS value"
    async with at(elsewhere(shard, url_of(shard, user="shop_migrator")), owner="shop_owner") as session:
        assert [Setting("shop_migrator")] == await session.observe(Setting, who)
        assert [Setting("shop_owner")] == await session.fetch(Setting, who)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await session.observe(Setting, "SELECT (1 / 0)::text AS value")
        assert Setting("shop_owner") == await session.fetch_one(Setting, who)


# --------------------------------------------------------------------------------------------------------------------
# Lost connections


async def test_a_commit_whose_answer_is_lost_is_in_doubt(shard: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        async with at(proxy.way_to(shard)) as session:
            cut = proxy.cut_after("COMMIT$")
            with pytest.raises(InDoubt) as caught:
                await session.transact([Query("CREATE TABLE a (id int)")])

            assert cut.struck.is_set()
            assert is_transient(caught.value.__cause__ or caught.value)
            await session.reconnect()
            assert "a" == (await session.execute("SELECT to_regclass('a')::text")).value


async def test_a_broken_connection_prints_nothing_of_itself(shard: Shard) -> None:
    """Python prints warnings of loggers that nobody configured; psycopg logs one for each broken pipeline."""
    script = (
        "import asyncio, psycopg, sys\n"
        "from shardmig.config import SessionSettings, Shard\n"
        "from shardmig.session import open_session\n"
        "async def main():\n"
        "    shard = Shard(name='eu1', url=sys.argv[1])\n"
        "    async with open_session(shard, SessionSettings(), pg_versions=(12, 18)) as session:\n"
        "        with psycopg.connect(sys.argv[1]) as other:\n"
        "            other.execute('SELECT pg_terminate_backend(%s, 5000)', [session.backend_pid])\n"
        "        try:\n"
        "            await session.execute('SELECT 1')\n"
        "        except Exception as error:\n"
        "            print(type(error).__name__)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, shard.url.get_secret_value(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip

    assert (b"AdminShutdown\n", b"") == await process.communicate()


@pytest.fixture(params=["libpq", "libpq before 17"])
def libpq(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take libpq as it is, and as one that knows no other way to cancel than a call that blocks."""
    if request.param != "libpq":
        monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", lambda: False)


@pytest.mark.usefixtures("libpq")
async def test_a_cancelled_flight_ends_on_the_server_too_and_closes_the_connection(
    shard: Shard, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A statement that nobody waits for any more must not go on holding locks."""
    psql = connect(shard)
    async with at(shard) as session:
        pid = session.backend_pid
        flight = asyncio.create_task(session.transact([Query("CREATE TABLE a (id int)"), Query("SELECT pg_sleep(60)")]))
        while psql.execute(AT_WORK, [pid]).fetchone() != ("SELECT pg_sleep(60)",):
            await asyncio.sleep(0.01)
        flight.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flight

        assert (True, []) == (session.connection.closed, caplog.messages)
        async with asyncio.timeout(5):
            while psql.execute(AT_WORK, [pid]).fetchone():
                await asyncio.sleep(0.01)
        assert (None,) == psql.execute("SELECT to_regclass('a')").fetchone()
        await session.reconnect()
        assert 1 == (await session.execute("SELECT 1")).value


AT_WORK = "SELECT query FROM pg_stat_activity WHERE pid = %s"


async def test_reconnecting_applies_everything_again(shard: Shard, connect: Connect) -> None:
    async with at(shard, owner="shop_owner") as session:
        before = session.backend_pid
        connect(shard).execute("SELECT pg_terminate_backend(%s, 5000)", [before])
        with pytest.raises(psycopg.OperationalError) as caught:
            await session.execute("SELECT 1")
        assert is_connection_lost(caught.value)

        await session.reconnect()

        assert before != session.backend_pid
        assert "shop_owner" == (await session.execute("SHOW role")).value
        with pytest.raises(ShardBusy, match=f"backend {session.backend_pid} "):
            async with at(shard):
                pass


async def test_an_ordinary_error_is_neither_lost_nor_transient(shard: Shard) -> None:
    async with at(shard) as session:
        with pytest.raises(psycopg.Error) as caught:
            await session.flight([Query("SELECT 1"), Query("SELEC"), Query("SELECT 2")])

        assert not is_connection_lost(caught.value)
        assert not is_transient(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# One runner a shard


async def test_a_second_runner_is_told_who_the_first_is(shard: Shard) -> None:
    async with at(shard) as first:
        with pytest.raises(ShardBusy, match=rf"backend {first.backend_pid} of role postgres, application shardmig eu1"):
            async with at(shard):
                pass
        async with at(shard, purpose="read") as reader:
            assert 1 == (await reader.execute("SELECT 1")).value


async def test_a_short_limit_of_statements_is_none_of_the_wait_for_another_runner(shard: Shard) -> None:
    async with at(shard):
        with pytest.raises(ShardBusy, match="another runner works on this shard"):
            async with at(shard, statement_timeout_s=0.1):
                pass


async def test_shards_that_share_a_database_do_not_share_a_lock(shard: Shard) -> None:
    async with at(shard), at(Shard.model_validate({**shard.model_dump(), "name": "eu1b"})) as other:
        assert 1 == (await other.execute("SELECT 1")).value


HOLDER = """
import asyncio, sys
from shardmig.config import SessionSettings, Shard
from shardmig.session import Query, open_session

async def main():
    shard = Shard(name="eu1", url=sys.argv[1])
    async with open_session(shard, SessionSettings(), pg_versions=(12, 18)) as session:
        print(session.backend_pid, flush=True)
        while True:
            await session.transact([Query("UPDATE counted SET n = n + 1")])

asyncio.run(main())
"""


async def test_a_stopped_runner_is_taken_over_and_its_zombie_writes_nothing(shard: Shard, connect: Connect) -> None:
    connect(shard).execute("CREATE TABLE counted AS SELECT 0 AS n")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, shard.url.get_secret_value(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        holder = int(await process.stdout.readline())
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ShardBusy, match=f"backend {holder} "):
            async with at(shard):
                pass

        async with at(shard, take_over=True) as successor:
            assert successor.took_over is not None
            assert (holder, "shardmig eu1") == (successor.took_over.pid, successor.took_over.application)
            before = (await successor.execute("SELECT n FROM counted")).value
            os.kill(process.pid, signal.SIGCONT)
            assert 0 != await process.wait()

            assert before == (await successor.execute("SELECT n FROM counted")).value
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_taking_over_a_free_shard_takes_nobody(shard: Shard) -> None:
    async with at(shard, take_over=True) as session:
        assert session.took_over is None


async def test_taking_over_needs_the_right_to_end_the_holder(shard: Shard) -> None:
    async with at(shard):
        migrator = elsewhere(shard, url_of(shard, user="shop_migrator"))
        with pytest.raises(ShardBusy, match="GRANT pg_signal_backend TO shop_migrator"):
            async with at(migrator, take_over=True):
                pass


# --------------------------------------------------------------------------------------------------------------------
# Refused


async def refusal(error: type[Exception], shard: Shard, **settings: Any) -> str:
    with pytest.raises(error) as caught:
        async with at(shard, **settings):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_a_transaction_pooler_is_refused_and_no_setting_sticks_to_it(shard: Shard, servers: list[Server]) -> None:
    database = database_of(shard)
    with PgBouncer(servers[0], default_pool_size=1) as pooler:
        message = await refusal(ThroughPooler, elsewhere(shard, pooler.url(database)), owner="shop_owner")
        with psycopg.connect(pooler.url(database), autocommit=True, prepare_threshold=None) as next_client:
            row = next_client.execute(
                "SELECT current_setting('role'), current_setting('row_security'), "
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"
            ).fetchone()

    assert "the server's own address" in message
    assert ("none", "on", 0) == row


async def test_a_pooler_that_knows_no_options_is_told_for_what_it_is(shard: Shard, servers: list[Server]) -> None:
    with PgBouncer(servers[0]) as pooler:
        url = pooler.url(database_of(shard)) + "&options=-c%20geqo%3Doff"

        assert "the server's own address" in await refusal(ThroughPooler, elsewhere(shard, url))


async def test_a_standby_is_refused(servers: list[Server]) -> None:
    with standby_of(servers[3]) as standby:
        shard = Shard.model_validate({"name": "us2", "url": standby.url()})

        assert "is a standby; give the primary's address" in await refusal(NotPrimary, shard)


@pytest.mark.parametrize("whose", ["DATABASE {base}", "ROLE shop_migrator IN DATABASE {base}", "client"])
async def test_a_read_only_database_is_refused_to_runners_with_the_cure(
    shard: Shard, connect: Connect, whose: str
) -> None:
    """Nobody overrules it: a hosting service, say, sets it where the disk is full. Reading goes on."""
    base = f'"{database_of(shard)}"'
    target = elsewhere(shard, url_of(shard, user="shop_migrator"))
    cure = f"ALTER {whose.format(base=base)} RESET default_transaction_read_only".replace('"', "")
    if whose == "client":
        options = {"options": "-c default_transaction_read_only=on"}
        target, cure = elsewhere(target, url_of(target, **options)), "take it out of this shard's url"
    else:
        connect(shard).execute(f"ALTER {whose.format(base=base)} SET default_transaction_read_only = on".encode())

    assert f"then {cure}" in (await refusal(PreflightFailed, target)).replace('"', "")
    async with at(target, purpose="read") as session:
        assert (1, True) == ((await session.execute("SELECT 1")).value, session.read_only)


async def test_a_server_outside_pg_versions_is_refused(shard: Shard) -> None:
    assert "pg_versions = [12, 13]" in await refusal(PreflightFailed, shard, pg_versions=(12, 13))


async def test_an_owner_that_does_not_exist_is_named(shard: Shard) -> None:
    message = await refusal(PreflightFailed, shard, owner="nobody_here")

    assert 'role "nobody_here" does not exist' in message


async def test_a_role_that_may_not_become_the_owner_is_told_so(shard: Shard) -> None:
    message = await refusal(PreflightFailed, elsewhere(shard, url_of(shard, user="shop_app")), owner="shop_owner")

    assert "GRANT shop_owner TO shop_app" in message


async def test_a_schema_that_does_not_exist_is_named(shard: Shard) -> None:
    lost = Shard.model_validate({**shard.model_dump(), "schema_name": "Lost"})

    assert "schema Lost does not exist" in await refusal(PreflightFailed, lost)


async def test_a_schema_that_the_owner_may_not_use_is_refused(shard: Shard, connect: Connect) -> None:
    connect(shard).execute('CREATE SCHEMA "Closed"')
    closed = Shard.model_validate({**shard.model_dump(), "schema_name": "Closed"})

    assert "GRANT USAGE" in await refusal(PreflightFailed, closed, owner="shop_owner")


async def test_an_unknown_encoding_is_refused(servers: list[Server], connect: Connect) -> None:
    admin = connect(servers[3])
    admin.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    try:
        message = await refusal(PreflightFailed, Shard.model_validate({"name": "us2", "url": servers[3].url("latin")}))
    finally:
        admin.execute("DROP DATABASE latin WITH (FORCE)")

    assert "LATIN1" in message


# --------------------------------------------------------------------------------------------------------------------
# Unreachable, and never a password

SECRET = "p@ss/w:rd'%x"  # noqa: S105 - what must never be seen
QUOTED = "p%40ss%2Fw%3Ard%27%25x"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://shop:{QUOTED}@127.0.0.1:1/shop",
        f"postgresql://shop:{SECRET}@127.0.0.1:1/shop",  # not quoted as it must be
        "postgresql://shop:xxxx/w:rd@127.0.0.1:1/shop",  # reads as host "shop", port "xxxx"
        "postgresql://shop:xxxx@w:rd@127.0.0.1:1/shop",
        "postgresql://shop:xxxx?w:rd@127.0.0.1:1/shop",
        "postgresql://shop:xxxx#w:rd@127.0.0.1:1/shop",
        f"postgresql://shop@127.0.0.1:1/shop?password={QUOTED}",
        "host=127.0.0.1 port=1 password='p@ss/w:rd\\'%x'",
        f"host=127.0.0.1 port=1 password {SECRET}",
        f"host=127.0.0.1 port=1 passwd={SECRET}",
        f"postgresql://shop:{QUOTED}@127.0.0.1:port/shop",
        "postgresql://shop:a@xxxx%20%20yyyy@no.such.host.invalid/shop",  # a message is folded, a secret is not
        f"postgresql://shop:{QUOTED}@no.such.host.invalid/shop",
        "postgresql://shop:p@xxxx/yyyy@no.such.host.invalid:5432/shop",  # whose host seems to be the password's middle
    ],
)
async def test_an_unreachable_shard_never_shows_its_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    shard = Shard.model_validate({"name": "eu9", "url": url})
    with pytest.raises(ShardUnreachable) as caught:
        async with at(shard):
            pass

    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(caught.value) + repr(shard)
    assert str(caught.value).startswith("eu9: ")
    for secret in (SECRET, QUOTED, "p@ss", "w:rd", "p%40ss", "xxxx", "yyyy"):
        assert secret not in told


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://shop:s3cr%zzet@127.0.0.1:1/shop", "in user or password"),
        ("postgresql://shop:s3cret%@127.0.0.1:1/shop", "in user or password"),
        ("postgresql://shop:s3cret%00@127.0.0.1:1/shop", "in user or password"),
        ("postgresql://shop:s3cret@127.0.0.1:1/100%shop", "in host, database or parameters"),
        ("postgresql://127.0.0.1:1/shop?password=s3cret%zz", "in host, database or parameters"),
    ],
)
async def test_a_percent_sign_that_encodes_nothing_is_told_with_its_spelling(url: str, where: str) -> None:
    message = await refusal(ShardUnreachable, Shard.model_validate({"name": "eu9", "url": url}))

    assert message == (
        f"eu9: its url cannot be parsed: a % {where} is not followed by the two hexadecimal digits of a character; "
        "write a % itself as %25, and @ : / ? # in user or password as %40 %3A %2F %3F %23"
    )


async def test_what_libpq_says_in_several_lines_is_folded_into_one() -> None:
    message = await refusal(ShardUnreachable, Shard.model_validate({"name": "eu1", "url": "postgresql://127.0.0.1:1/"}))

    assert "refused; Is the server running" in message
    assert message == " ".join(message.split())


async def test_a_wrong_password_is_not_repeated(servers: list[Server]) -> None:
    url = make_conninfo(servers[0].url(), password=SECRET)
    shard = Shard.model_validate({"name": "eu1", "url": url})
    with FaultProxy(servers[0]) as proxy:
        proxy.refuse()
        through = elsewhere(shard, f"postgresql://shop:{QUOTED}@127.0.0.1:{proxy.port}/shop")

        message = await refusal(ShardUnreachable, through)

    assert "127.0.0.1" in message
    assert "p@ss" not in message


async def test_a_blackholed_shard_is_given_up_in_time(shard: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        proxy.blackhole()
        async with asyncio.timeout(20):  # nobody else would give it up
            await refusal(ShardUnreachable, proxy.way_to(shard), connect_timeout_s=2)


@pytest.mark.usefixtures("libpq")
async def test_a_server_that_hangs_after_connecting_is_given_up_in_time(shard: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        hung = proxy.cut_after("SELECT", how="silence")
        async with asyncio.timeout(20):
            message = await refusal(ShardUnreachable, proxy.way_to(shard), connect_timeout_s=1)

    assert hung.struck.is_set()
    assert "did not answer within 1 s" in message
    assert f"127.0.0.1:{proxy.port}" in message


async def test_whoever_only_reads_does_not_wait_for_ever(shard: Shard, servers: list[Server]) -> None:
    limits = {"connect_timeout_s": 1, "statement_timeout_s": 0.5}
    with FaultProxy(servers[0]) as proxy:
        async with (
            asyncio.timeout(20),
            at(proxy.way_to(shard), purpose="read", **limits) as session,
        ):
            proxy.cut_before("SELECT 42", how="silence")
            with pytest.raises(ShardUnreachable, match=r"did not answer within 1\.5 s"):
                await session.execute("SELECT 42")


async def test_a_runner_gives_up_on_an_answer_that_got_lost(shard: Shard, servers: list[Server]) -> None:
    """A proxy may forget one connection, with the server well and waiting for what comes next."""
    with FaultProxy(servers[0]) as proxy:
        through = proxy.way_to(shard)
        async with asyncio.timeout(20), at(through, connect_timeout_s=1) as session:
            proxy.cut_before("SELECT 42", how="silence")
            with pytest.raises(psycopg.OperationalError, match=f"process {session.backend_pid} waits for us"):
                await session.execute("SELECT 42")
            await session.reconnect()

            assert 42 == (await session.execute("SELECT 42")).value


async def test_a_commit_may_take_longer_than_any_statement(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has no limit for it; given up, it would be rolled back, repeated and given up again."""
    monkeypatch.setattr(pulse, "_LONGEST_S", 0.2)
    async with at(shard, connect_timeout_s=1, statement_timeout_s=0.5) as session:
        await session.execute("CREATE TABLE slow (id int)")
        await session.execute(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3); RETURN NULL; END'"
        )
        await session.execute(
            "CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION wait()"
        )
        await session.transact([Query("INSERT INTO slow VALUES (1)")])

        assert 1 == (await session.execute("SELECT count(*) FROM slow")).value


@pytest.mark.long
async def test_a_file_of_statements_that_nobody_answers_is_given_up_too(shard: Shard, servers: list[Server]) -> None:
    with FaultProxy(servers[0]) as proxy:
        through = elsewhere(shard, proxy.url(database_of(shard)))
        async with asyncio.timeout(20), at(through, connect_timeout_s=1) as session:
            proxy.cut_before("CREATE TABLE a", how="silence")
            with pytest.raises(psycopg.OperationalError) as caught:
                await session.run_file(b"CREATE TABLE a (id int); CREATE TABLE b (id int)")

            assert is_connection_lost(caught.value)
            assert session.connection.closed


async def test_a_rollback_that_nobody_answers_is_given_up_too(shard: Shard, servers: list[Server]) -> None:
    """Where not the server but the way there hangs; the server itself ends an idle transaction after 10 s."""
    with FaultProxy(servers[0]) as proxy:
        through = elsewhere(shard, proxy.url(database_of(shard)))
        async with asyncio.timeout(8), at(through, connect_timeout_s=1) as session:
            silent = proxy.cut_before("ROLLBACK", how="silence")
            with pytest.raises(psycopg.errors.DivisionByZero):
                await session.transact([Query("SELECT 1 / 0")])

            assert silent.struck.is_set()
            assert session.connection.closed


@pytest.mark.long
async def test_a_runner_gives_up_on_a_server_process_that_was_stopped(shard: Shard, connect: Connect) -> None:
    psql = connect(shard)
    async with asyncio.timeout(20), at(shard, connect_timeout_s=1) as session:
        pid = session.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(psycopg.OperationalError, match="or never got it"):
                await session.execute("SELECT pg_sleep(60)")
            with pytest.raises(ShardBusy, match=f"own lost connection does not end, though it was told to: .* {pid} "):
                await session.reconnect()
        finally:
            os.kill(pid, signal.SIGCONT)
        while psql.execute(AT_WORK, [pid]).fetchone():
            await asyncio.sleep(0.01)
        await session.reconnect()

        assert 1 == (await session.execute("SELECT 1")).value


async def test_a_statement_that_is_stopped_in_its_middle_is_given_up_when_its_time_is_over(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "_LONGEST_S", 0.5)
    psql = connect(shard)
    async with asyncio.timeout(20), at(shard, connect_timeout_s=1, statement_timeout_s=1.5) as session:
        pid = session.backend_pid
        work = asyncio.create_task(session.execute("SELECT pg_sleep(60)"))
        while psql.execute(AT_WORK, [pid]).fetchone() != ("SELECT pg_sleep(60)",):
            await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(psycopg.OperationalError, match=f"whose time is over: server process {pid} hangs"):
                await work
        finally:
            os.kill(pid, signal.SIGCONT)


async def test_whoever_is_at_work_may_take_its_time(shard: Shard) -> None:
    """An index may be built for hours; the server has been asked twice here, and says that it is."""
    async with at(shard, connect_timeout_s=1, statement_timeout_s=0.5) as session:
        await session.execute_alone("SELECT pg_sleep(2.5)")

        assert 1 == (await session.execute("SELECT 1")).value
