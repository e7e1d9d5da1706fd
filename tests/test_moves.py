"""Rows move batch by batch: any key, any table, any change meanwhile, any interruption."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psycopg
import pytest
from moving import REVISION, blocked, customers, moving, notes, same_table, second_table
from servers import await_caught_up, other_majors, standby_of

from shardmig import local, switching
from shardmig.checks import compare, disagreeing
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.errors import CheckFailed, Fenced, LockNotObtained, PreflightFailed, StepFailed, SwitchRefused
from shardmig.estimates import estimate
from shardmig.events import BatchDone, Waiting
from shardmig.sampling import refuse_lossy
from shardmig.states import State

if TYPE_CHECKING:
    from conftest import Connect
    from moving import Moving

    from shardmig.events import Event

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
SMALL = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)


async def test_every_row_is_moved_once(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(5000)) as here:
        assert await here.run().run()

        assert await here.rows("SELECT count(*), count(*) FILTER (WHERE b = upper(a)), max(n), min(n) FROM t") == [
            (5000, 5000, 1, 1)
        ]
        step = await here.step()
        assert (5000, step.upto, True) == (step.rows, step.cursor, step.checked_at is not None)


async def test_rows_move_to_a_second_table(shard: Shard) -> None:
    async with moving(shard, second_table(), T, U, customers(3000)) as here:
        assert await here.run().run()

        assert await here.rows("SELECT count(*), max(u.n), min(u.n) FROM t JOIN u ON t_id = id AND u.a = t.a") == [
            (3000, 1, 1)
        ]


@pytest.mark.parametrize("rows", [0, 1, 10, 11])
async def test_a_table_of_few_rows_is_moved(shard: Shard, rows: int) -> None:
    async with moving(shard, second_table(), T, U, customers(rows)) as here:
        await here.session.execute("INSERT INTO u (t_id, a) VALUES (-1, 'dead'), (5, 'dead'), (99, 'dead')")
        assert await here.run(pace=SMALL).run()

        assert await here.rows("SELECT id, a FROM t ORDER BY 1") == await here.rows("SELECT t_id, a FROM u ORDER BY 1")


# --------------------------------------------------------------------------------------------------------------------
# Keys

KEYS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "composite": ("id bigint, k text, PRIMARY KEY (id, k)", ("id", "k"), "g / 7, 'k' || g"),
    "composite, other order": ("id bigint, k text, PRIMARY KEY (k, id)", ("k", "id"), "'k' || g % 5, g"),
    "uuid": ("id uuid PRIMARY KEY", ("id",), "md5(g::text)::uuid"),
    "text": (
        'id text COLLATE "C" PRIMARY KEY',
        ("id",),
        "CASE g % 3 WHEN 0 THEN 'a' WHEN 1 THEN 'B' ELSE 'Ä' END || g",
    ),
    "timestamptz": (
        "id timestamptz PRIMARY KEY",
        ("id",),
        "'2026-03-29 00:59:59.123456Z'::timestamptz + g * interval '37 min 11 us'",
    ),
    "negative": ("id int PRIMARY KEY", ("id",), "250 - g"),
    "gappy": ("id bigint PRIMARY KEY", ("id",), "g % 5 * 1000000000000000 + g"),
    "numeric": ("id numeric PRIMARY KEY", ("id",), "g * 0.9"),
    "double": ("id float8 PRIMARY KEY", ("id",), "1 / g::float8"),
    "char": ("id char(9) PRIMARY KEY", ("id",), "'k' || g"),
    "quoted": ('"Id ""x" bigint PRIMARY KEY', ('Id "x',), "g"),
}


@pytest.mark.parametrize("name", KEYS)
async def test_any_unique_key_is_walked_in_its_own_order(shard: Shard, name: str) -> None:
    """Nine orders before ten, whatever its text says; every batch is full but the last."""
    await walk(shard, *KEYS[name])


async def walk(shard: Shard, columns: str, key: tuple[str, ...], values: str) -> None:
    quoted = tuple('"' + column.replace('"', '""') + '"' for column in key)
    create = f"CREATE TABLE t ({columns}, a text, b text, n int)"
    fill = f"INSERT INTO t ({', '.join(quoted)}, a) SELECT {values}, 'x' || g FROM generate_series(1, 500) g"
    move = same_table(key=key, check=same_table(key=quoted).check)
    async with moving(shard, move, create, fill) as here:
        heard, listen = notes()
        assert await here.run(pace=SMALL, listener=listen).run()

        assert [(500, 1, 1)] == await here.rows("SELECT count(*), max(n), min(n) FROM t WHERE b = upper(a)")
        assert [10] * 50 == [event.rows for event in heard if isinstance(event, BatchDone)]


async def test_a_language_s_collation_is_walked_in_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper case among lower case, umlauts beside their vowels; batches and the check's ranges alike."""
    monkeypatch.setattr("shardmig.checks.RANGE_ROWS", 50)
    for binaries in other_majors().values():
        with local.Server.start(binaries=binaries) as server:
            shard = Shard.model_validate({"name": "eu1", "url": server.create_database("icu")})
            with psycopg.connect(shard.url.get_secret_value()) as connection:
                icu = connection.execute("SELECT FROM pg_collation WHERE collname = 'de-x-icu'").fetchall()
            if icu:
                words = "(ARRAY['a', 'B', 'Ä', 'z', 'Z'])[1 + g % 5] || g"
                await walk(shard, 'id text COLLATE "de-x-icu" PRIMARY KEY', ("id",), words)
                return
    pytest.skip("no PostgreSQL with ICU here")


async def test_a_partitioned_table_is_moved(shard: Shard) -> None:
    async with moving(
        shard,
        same_table(),
        f"{T} PARTITION BY RANGE (id)",
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (300)",
        "CREATE TABLE t2 PARTITION OF t DEFAULT",
        customers(1000),
        "ANALYZE t",
    ) as here:
        assert await here.run(pace=SMALL).run()

        assert [(1000, 1, 1)] == await here.rows("SELECT count(*), max(n), min(n) FROM t WHERE b = upper(a)")
        assert (await here.step()).rows_estimated == 1000


async def test_far_apart_keys_make_no_empty_batches(shard: Shard) -> None:
    clusters = "generate_series(0, 9) c, generate_series(1, 50) g"
    fill = f"INSERT INTO t (id, a) SELECT c * 1000000000000 + g, 'x' || g FROM {clusters}"
    async with moving(shard, same_table(), T, fill) as here:
        assert await here.run(pace=SMALL).run()

        assert (500, 50) == ((await here.step()).rows, (await here.step()).batches)


# --------------------------------------------------------------------------------------------------------------------
# Hand-written


async def test_many_rows_become_one(shard: Shard) -> None:
    """Orders are added up per customer, whose row is walked and locked."""
    read = (
        "WITH customers AS MATERIALIZED (SELECT id FROM t WHERE {batch}%s), orders AS MATERIALIZED ("
        "SELECT customer, amount FROM bought WHERE customer IN (SELECT id FROM customers)%s), totals AS ("
        "SELECT id, coalesce(sum(amount), 0) AS total FROM customers LEFT JOIN orders ON customer = id GROUP BY id) "
    )
    move = second_table(
        forward=read % (" FOR SHARE", " FOR SHARE") + "INSERT INTO u (t_id, total) SELECT id, total FROM totals "
        "ON CONFLICT (t_id) DO UPDATE SET total = excluded.total",
        check=read % ("", "")
        + "SELECT totals.id FROM totals LEFT JOIN u ON t_id = totals.id WHERE u.total IS DISTINCT FROM totals.total",
    )
    async with moving(
        shard,
        move,
        T,
        "CREATE TABLE bought (id int PRIMARY KEY, customer bigint, amount numeric)",
        "CREATE INDEX ON bought (customer)",
        "CREATE TABLE u (t_id bigint PRIMARY KEY, total numeric)",
        customers(100),
        "INSERT INTO bought SELECT g, 1 + g % 90, g FROM generate_series(1, 1000) g",
    ) as here:
        assert await here.run(pace=SMALL).run()

        expected = (
            "SELECT t.id, coalesce(sum(amount), 0) FROM t LEFT JOIN bought ON customer = t.id GROUP BY 1 ORDER BY 1"
        )
        assert await here.rows(expected) == await here.rows("SELECT t_id, total FROM u ORDER BY 1")


async def test_one_row_becomes_many(shard: Shard) -> None:
    """A list becomes rows; the second table's key begins with the first one's."""
    wanted = "SELECT id, place, word FROM t, unnest(string_to_array(a, ' ')) WITH ORDINALITY AS w (word, place)"
    move = second_table(
        forward=(
            "WITH source AS MATERIALIZED (SELECT id, a FROM t WHERE {batch} FOR SHARE), words AS ("
            + wanted.replace("FROM t,", "FROM source,")
            + "), gone AS (DELETE FROM u USING source "
            "WHERE t_id = id AND place > cardinality(string_to_array(source.a, ' '))) "
            "INSERT INTO u (t_id, place, word) SELECT id, place, word FROM words "
            "ON CONFLICT (t_id, place) DO UPDATE SET word = excluded.word"
        ),
        check=(
            "WITH source AS MATERIALIZED (SELECT id, a FROM t WHERE {batch}) SELECT id FROM source "
            "WHERE string_to_array(a, ' ') IS DISTINCT FROM ARRAY(SELECT word FROM u WHERE t_id = id ORDER BY place)"
        ),
    )
    fill = "INSERT INTO t (id, a) SELECT g, repeat('w ', g % 4) || g FROM generate_series(1, 100) g"
    table = "CREATE TABLE u (t_id bigint, place int, word text, PRIMARY KEY (t_id, place))"
    dead = "INSERT INTO u SELECT g, p, 'dead' FROM generate_series(90, 110) g, generate_series(1, 9) p"
    async with moving(shard, move, T, table, fill, dead) as here:
        assert await here.run(pace=SMALL).run()

        assert await here.rows(f"{wanted} ORDER BY 1, 2") == await here.rows("SELECT * FROM u ORDER BY 1, 2")


# --------------------------------------------------------------------------------------------------------------------
# Changes meanwhile


async def test_rows_may_come_go_and_change_their_key_while_others_move(shard: Shard, connect: Connect) -> None:
    async with moving(shard, second_table(), T, U, customers(300)) as here:
        app = connect(shard)

        def work(event: Event) -> None:
            if not isinstance(event, BatchDone):
                return
            at = event.rows_done
            with app.transaction():
                app.execute("DELETE FROM t WHERE id = %s", [at + 10])  # the end of the batch that was found already
                app.execute("DELETE FROM u WHERE t_id = %s", [at + 10])
            with app.transaction():
                app.execute("INSERT INTO t (id, a) VALUES (%s, 'in')", [1000 + at])
                app.execute(
                    "INSERT INTO u (t_id, a) VALUES (%s, 'in') ON CONFLICT (t_id) DO UPDATE SET a = excluded.a",
                    [1000 + at],
                )
            with app.transaction():
                app.execute("UPDATE t SET id = -id WHERE id = %s", [at + 15])
                app.execute("DELETE FROM u WHERE t_id = %s", [at + 15])
                app.execute(
                    "INSERT INTO u (t_id, a) SELECT id, a FROM t WHERE id = %s "
                    "ON CONFLICT (t_id) DO UPDATE SET a = excluded.a",
                    [-at - 15],
                )

        assert await here.run(pace=SMALL, listener=work).run()

        assert await here.rows("SELECT id, a FROM t ORDER BY 1") == await here.rows("SELECT t_id, a FROM u ORDER BY 1")


async def test_the_last_row_may_vanish(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(35)) as here:
        app = connect(shard)
        assert await here.run(pace=SMALL, listener=lambda _: app.execute("DELETE FROM t WHERE id > 30")).run()

        step = await here.step()
        assert (["35"], ["35"]) == (step.upto, step.cursor)


async def test_the_check_mends_what_a_writer_spoiled(shard: Shard, connect: Connect) -> None:
    """As a full-row save of an old object does: it puts NULL over a moved value."""
    async with moving(shard, same_table(), T, customers(100)) as here:
        app = connect(shard)

        def spoil(event: Event) -> None:
            if isinstance(event, BatchDone) and event.rows_done == 100:
                app.execute("UPDATE t SET b = NULL WHERE id IN (3, 50)")

        assert await here.run(pace=SMALL, listener=spoil).run()
        assert [] == await here.rows("SELECT id FROM t WHERE b IS DISTINCT FROM upper(a)")


async def test_rows_that_no_repair_mends_are_named_and_the_flag_stays(shard: Shard) -> None:
    wrong = same_table(check="SELECT id FROM t WHERE {batch} AND id IN (7, 8)")
    async with moving(shard, wrong, T, customers(100)) as here:
        with pytest.raises(CheckFailed, match=r"2 disagree with its check, keys \(7\), \(8\); it stopped"):
            await here.run().run()

        assert (await here.step()).checked_at is None


async def test_dead_rows_of_an_emptied_source_are_purged_in_small_pieces(shard: Shard, connect: Connect) -> None:
    move = second_table()
    async with moving(shard, move, T, U, customers(3)) as here:
        await here.session.execute("INSERT INTO u (t_id, a) SELECT g, 'dead' FROM generate_series(-500, 2000) g")
        assert await here.run(pace=Pace(batch_rows=100, batch_rows_min=100, batch_rows_max=100)).run()

        assert [(1,), (2,), (3,)] == await here.rows("SELECT t_id FROM u ORDER BY 1")
        assert (await here.step()).batches > 25


async def test_comparing_finds_rows_on_both_sides(shard: Shard) -> None:
    async with moving(shard, second_table(), T, U, customers(25_000)) as here:
        assert await here.run().run()
        await here.session.execute("DELETE FROM u WHERE t_id = 20000")
        await here.session.execute("INSERT INTO u (t_id, a) VALUES (99999, 'x')")

        found = [each async for each in compare(here.session, here.move, "forward")]
        assert [["20000"]] == [key for each in found for key in each.differing]
        assert [["99999"]] == [key for each in found for key in each.orphaned]
        assert (["20000"], ["99999"]) == tuple((await disagreeing(here.session, here.move, "forward")).keys)


# --------------------------------------------------------------------------------------------------------------------
# Interruption and failure


async def test_a_stop_ends_after_a_batch_and_the_next_run_goes_on_from_there(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        stop = asyncio.Event()
        assert not await here.run(pace=SMALL, stop=stop, listener=lambda _: stop.set()).run()
        assert ["10"] == (await here.step()).cursor
        heard, listen = notes()
        assert await here.run(pace=SMALL, listener=listen).run()

        assert [(100, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")
        assert 9 == len([event for event in heard if isinstance(event, BatchDone)])
        assert await here.run().run()


async def test_a_batch_waits_for_a_locked_row_in_ever_smaller_pieces(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(500)) as here:
        app = connect(shard)
        app.execute("BEGIN; SELECT FROM t WHERE id = 250 FOR UPDATE")
        heard: list[Event] = []

        def listen(event: Event) -> None:
            heard.append(event)
            if isinstance(event, BatchDone) and event.rows_done == 249:
                app.execute("COMMIT")

        assert await here.run(listener=listen).run()

        assert "rows of t are locked" in [event.reason for event in heard if isinstance(event, Waiting)]
        assert [(500, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")


async def test_a_row_that_stays_locked_parks_the_move(shard: Shard, connect: Connect) -> None:
    settings = SessionSettings(lock_wait_s=0.3)
    async with moving(shard, same_table(), T, customers(50), settings=settings) as here:
        app = connect(shard, user="shop_app", application_name="shop 7")
        here_is = f"pid {app.info.backend_pid}, role shop_app, application shop 7, open for .* s, query: "
        with psycopg.connect(shard.url.get_secret_value()) as psql:
            psql.execute("GRANT ALL ON t TO shop_app")
        app.execute("BEGIN; SELECT FROM t WHERE id = 25 FOR UPDATE")
        heard, listen = notes()
        with pytest.raises(LockNotObtained, match=f"rows of t stayed locked by {here_is}BEGIN; SELECT FROM t WHERE"):
            await here.run(listener=listen).run()

        named = {blocker.pid for event in heard if isinstance(event, Waiting) for blocker in event.blockers}
        assert {app.info.backend_pid} >= named
        assert await others(here) == 0


async def test_who_looks_at_the_shard_sees_whose_rows_are_waited_for(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(50)) as here:
        app, psql = connect(shard), connect(shard)
        app.execute("BEGIN; SELECT FROM t WHERE id = 25 FOR UPDATE")
        run = asyncio.create_task(here.run().run())
        async with asyncio.timeout(10):
            while not (seen := psql.execute("SELECT waiting FROM shardmig.step WHERE waiting > ''").fetchall()):
                await asyncio.sleep(0.01)
        app.execute("COMMIT")

        assert await run
        assert [(f"rows of t are locked by pid {app.info.backend_pid}",)] == seen
        assert (None, 50) == ((await here.step()).waiting, (await here.step()).rows)


async def others(here: Moving) -> int:
    """Count sessions of shardmig on the shard beside the mover's own: a witness leaves with the wait."""
    async with asyncio.timeout(5):
        while found := await here.rows(
            "SELECT FROM pg_stat_activity WHERE application_name LIKE 'shardmig%' AND pid <> pg_backend_pid() "
            "AND datname = current_database()"
        ):
            await asyncio.sleep(0.01)
    return len(found)


async def test_what_a_killed_runner_waited_for_is_forgotten_by_the_next_one(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(20)) as here:
        await here.session.execute("UPDATE shardmig.step SET waiting = 'rows of t are locked' WHERE kind = 'move'")
        assert await here.run(pace=SMALL).run()

        assert (await here.step()).waiting is None


async def test_a_prepared_transaction_that_holds_a_row_is_named() -> None:
    settings = SessionSettings(lock_wait_s=0.3)
    with local.Server.start("primary", settings={"max_prepared_transactions": "5"}) as server:
        shard = Shard.model_validate({"name": "eu1", "url": server.create_database("shop")})
        async with moving(shard, same_table(), T, customers(50), settings=settings) as here:
            with psycopg.connect(server.url("shop"), autocommit=True) as psql:
                psql.execute("BEGIN; UPDATE t SET a = 'x' WHERE id = 25; PREPARE TRANSACTION 'forgotten'")
            with pytest.raises(LockNotObtained, match=r"a prepared transaction.*PREPARE TRANSACTION 'forgotten'"):
                await here.run().run()


async def test_a_locked_row_without_a_connection_left_for_the_witness_parks_all_the_same(
    shard: Shard, servers: list[local.Server], connect: Connect
) -> None:
    async with moving(shard, same_table(), T, customers(50), settings=SessionSettings(lock_wait_s=0.3)) as here:
        app, psql = connect(shard), connect(servers[0])
        app.execute("BEGIN; SELECT FROM t WHERE id = 25 FOR UPDATE")
        psql.execute(f"ALTER DATABASE {app.info.dbname} ALLOW_CONNECTIONS false")
        with pytest.raises(LockNotObtained, match="rows of t stayed locked; nothing is lost"):
            await here.run().run()
        psql.execute(f"ALTER DATABASE {app.info.dbname} ALLOW_CONNECTIONS true")


async def test_the_application_is_never_the_victim_of_a_deadlock(shard: Shard, connect: Connect) -> None:
    """It holds a row that the batch wants and wants one that the batch holds: the batch gives way, long before."""
    async with moving(shard, same_table(), T, customers(100)) as here:
        app, look = connect(shard), connect(shard)
        app.execute("BEGIN; UPDATE t SET a = 'app' WHERE id = 90")
        run = asyncio.create_task(here.run().run())
        await blocked(look, here.session.backend_pid)
        await asyncio.to_thread(app.execute, "UPDATE t SET a = 'app', b = 'APP' WHERE id = 10")
        app.execute("UPDATE t SET b = 'APP' WHERE id = 90; COMMIT")

        assert await run
        assert [("APP",), ("APP",)] == await here.rows("SELECT b FROM t WHERE id IN (10, 90)")


@pytest.mark.parametrize("how", ["terminate", "cancel"])
async def test_a_backend_that_is_ended_or_cancelled_costs_a_batch_at_most(
    shard: Shard, connect: Connect, how: str
) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        app, look = connect(shard), connect(shard)
        app.execute("BEGIN; SELECT FROM t WHERE id = 55 FOR UPDATE")
        run = asyncio.create_task(here.run(pace=SMALL).run())
        await blocked(look, here.session.backend_pid)
        look.execute(f"SELECT pg_{how}_backend({here.session.backend_pid})")
        app.execute("COMMIT")

        assert await run
        assert [(100, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")


async def test_sql_that_the_server_refuses_is_shown_with_a_caret(shard: Shard) -> None:
    async with moving(shard, same_table(forward="UPDATE t SET b = nix(a) WHERE {batch}"), T, customers(5)) as here:
        with pytest.raises(StepFailed, match=r"(?s)0002_x step 2: function nix\(text\) does not exist.*\^"):
            await here.run().run()


async def test_a_move_runs_only_in_the_state_that_it_is_for(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(5), dual=False) as here:
        with pytest.raises(SwitchRefused, match="move forward only in DUAL, after the drain"):
            await here.run().run()
        await here.to(State.DUAL, drain=False)
        with pytest.raises(SwitchRefused, match="after the drain"):
            await here.run().run()
        await switching.drain(here.turn, await here.flag())
        with pytest.raises(SwitchRefused, match="move back only in LIVE"):
            await here.run("back").run()
        assert await here.run().run()


async def test_a_switch_ends_a_running_move(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        psql = connect(shard)

        def switch(event: Event) -> None:
            if isinstance(event, BatchDone) and event.rows_done == 30:
                psql.execute("SELECT shardmig.switch('x', 'OLD', 'enough')")

        with pytest.raises(Fenced):
            await here.run(pace=SMALL, listener=switch).run()
        assert (None, 0) == ((await here.step()).cursor, (await here.step()).rows)


async def test_a_switch_that_hides_behind_a_lost_connection_ends_the_move_too(shard: Shard, connect: Connect) -> None:
    """The progress is forgotten: what is claimed anew is not the move that was under way."""
    async with moving(shard, same_table(), T, customers(100)) as here:
        psql = connect(shard)

        def switch(event: Event) -> None:
            if isinstance(event, BatchDone) and event.rows_done == 30:
                psql.execute("SELECT shardmig.switch('x', 'OLD', 'enough')")
                psql.execute("SELECT pg_terminate_backend(%s)", [here.session.backend_pid])

        with pytest.raises(Fenced, match="switched while rows moved"):
            await here.run(pace=SMALL, listener=switch).run()
        assert [(30,)] == await here.rows("SELECT count(b) FROM t")


async def test_a_move_goes_on_at_the_promoted_standby() -> None:
    """Whatever the standby had not heard of is missing there, rows and record alike."""
    with local.Server.start("primary") as primary, standby_of(primary) as standby:
        primary.create_database("shop")
        ports = f"{primary.port},{standby.port}"
        where = f"host={primary.socket_dir},{standby.socket_dir} port={ports} dbname=shop user=postgres"
        url = f"{where} target_session_attrs=read-write"
        shard = Shard.model_validate({"name": "eu1", "url": url})
        async with moving(shard, same_table(), T, customers(1000)) as here:
            await_caught_up(primary, standby)
            failing = asyncio.Event()

            def fail(event: Event) -> None:
                if isinstance(event, BatchDone) and event.rows_done >= 500:
                    failing.set()

            pace = SMALL.model_copy(update={"max_replica_lag_s": None})
            run = asyncio.create_task(here.run(pace=pace, listener=fail).run())
            await failing.wait()
            await asyncio.to_thread(primary.stop, "immediate")
            with psycopg.connect(standby.url("shop"), autocommit=True) as there:
                there.execute("SELECT pg_promote()")

            assert await run
            assert [(1000, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")
            assert here.session.connection.info.port == standby.port


async def test_vacuum_an_index_build_and_a_long_reader_do_not_stop_a_move(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(2000)) as here:
        reader = connect(shard)
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM t")
        run = asyncio.create_task(here.run(pace=SMALL).run())
        await asyncio.to_thread(connect(shard).execute, "VACUUM t")
        build = asyncio.to_thread(connect(shard).execute, "CREATE INDEX CONCURRENTLY ON t (b)")
        building = asyncio.create_task(build)

        assert await run
        reader.execute("COMMIT")
        await building
        assert [(2000, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")


async def test_rows_move_back_after_done(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(50)) as here:
        assert await here.run().run()
        await here.finish()
        await here.to(State.LIVE)
        await here.to(State.DONE)
        connect(shard).execute("UPDATE t SET b = 'NEW' WHERE id = 7")
        await here.to(State.LIVE)
        with pytest.raises(SwitchRefused, match="old is stale"):
            await here.to(State.DUAL)

        assert await here.run("back").run()
        await here.finish("old_valid")
        assert [("new", "NEW")] == await here.rows("SELECT a, b FROM t WHERE id = 7")
        assert State.DUAL == (await here.to(State.DUAL)).state


async def test_a_move_without_back_cannot_go_back(shard: Shard) -> None:
    async with moving(shard, same_table(back=None, back_check=None), T, customers(5)) as here:
        assert await here.run().run()
        await here.finish()
        for state in (State.LIVE, State.DONE, State.LIVE):
            await here.to(state)
        with pytest.raises(PreflightFailed, match="cannot be moved back"):
            await here.run("back").run()


# --------------------------------------------------------------------------------------------------------------------
# Before the first batch


async def test_a_lossy_pair_is_refused_by_a_sample_that_leaves_nothing_behind(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(2000), dual=False) as here:
        await refuse_lossy(here.turn, REVISION, 2, here.move)
        await here.session.execute("UPDATE t SET a = 'Ada' WHERE id = 1900")
        with pytest.raises(PreflightFailed, match=r"not x for 1 sampled rows of t, keys \(1900\)"):
            await refuse_lossy(here.turn, REVISION, 2, here.move)
        await refuse_lossy(here.turn, REVISION, 2, same_table(lossy=True))

        assert [(0,)] == await here.rows("SELECT count(n) FROM t")


async def test_a_sample_waits_for_no_lock_long_and_leaves_the_session_whole(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(20), dual=False) as here:
        app = connect(shard)
        app.execute("BEGIN; SELECT FROM t WHERE id = 5 FOR UPDATE")
        sample = asyncio.create_task(refuse_lossy(here.turn, REVISION, 2, here.move))
        await blocked(connect(shard), here.session.backend_pid)
        await asyncio.sleep(0.2)
        app.execute("COMMIT")
        await sample

        broken = same_table(forward="UPDATE t SET b = (1 / (id - 7))::text WHERE {batch}")
        with pytest.raises(StepFailed, match="division by zero"):
            await refuse_lossy(here.turn, REVISION, 2, broken)
        assert [(20,)] == await here.rows("SELECT count(*) FROM t")


async def test_an_estimate_tries_one_batch_and_rolls_it_back(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(5000), "ANALYZE t", dual=False) as here:
        guess = await estimate(here.session, here.move, Pace())
        assert guess.rows == 5000
        assert guess.batches is not None
        assert 1 <= guess.batches <= 100
        assert guess.seconds is not None
        assert 0 < guess.seconds < 60
        assert guess.wal_bytes is not None
        assert 5000 * 50 < guess.wal_bytes < 5000 * 2000
        assert [(0,)] == await here.rows("SELECT count(n) FROM t")

        early = await estimate(here.session, same_table(forward="UPDATE t SET not_yet = a WHERE {batch}"), Pace())
        assert (5000, "roughly, for what it fills is not there yet") == (early.rows, early.note)
        assert early.seconds is not None
        assert 0 < early.seconds < 60


# --------------------------------------------------------------------------------------------------------------------
# Waiting


async def test_an_operator_lets_a_move_rest_and_go_on(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        psql = connect(shard)
        psql.execute("SELECT shardmig.pause('x', 'sale tonight')")
        heard, listen = notes()
        run = asyncio.create_task(here.run(listener=listen).run())
        waiting = "SELECT waiting FROM shardmig.step WHERE waiting IS NOT NULL"
        while not (seen := psql.execute(waiting).fetchall()):
            await asyncio.sleep(0.01)
        psql.execute("SELECT shardmig.resume('x')")

        assert await run
        assert [("an operator paused it: sale tonight",)] == seen
        assert [Waiting("eu1", "an operator paused it: sale tonight")] == heard[:1]
        assert (await here.step()).waiting is None


async def test_max_rows_per_s_holds(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await here.run(pace=SMALL.model_copy(update={"max_rows_per_s": 200})).run()

        assert loop.time() - began >= 0.45


async def test_a_snapshot_older_than_allowed_stops_the_move_until_it_ends(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T, customers(100)) as here:
        reader = connect(shard, user="shop_app")
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        heard: list[Event] = []

        def listen(event: Event) -> None:
            heard.append(event)
            if isinstance(event, Waiting):
                reader.execute("COMMIT")

        await asyncio.sleep(0.05)
        assert await here.run(pace=Pace(max_snapshot_age_s=0.02), listener=listen).run()
        [waited] = [event for event in heard if isinstance(event, Waiting)]
        assert f"pid {reader.info.backend_pid} of role shop_app has kept vacuum" in waited.reason
