"""What servers do to a move, each on a real one: it waits, goes on and counts no row twice, or says why not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import fleet_of
from moving import FLAG, blocked, customers, moving, notes, plan_of, same_table, second_table
from servers import FaultProxy

from shardmig import checks, laps, local, moves, patience, rehearsal
from shardmig.config import Pace, Shard
from shardmig.errors import StepFailed
from shardmig.events import BatchDone, BatchFailed, Waiting
from shardmig.outcomes import Outcome
from shardmig.plan import Statement
from shardmig.session import Query
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import Connect
    from moving import Moving

    from shardmig.events import Event

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
SMALL = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)
PASSES = "a deadlock or a serialization failure ended a batch"


def reasons(heard: Sequence[Event]) -> list[str]:
    return [event.reason for event in heard if isinstance(event, Waiting)]


async def test_a_connection_that_is_lost_while_a_failed_batch_is_rolled_back_comes_back(
    shard: Shard, connect: Connect
) -> None:
    """A lock timeout first, and the end of the server process before its ROLLBACK."""
    async with moving(shard, same_table(), T, customers(20)) as here:
        session = here.session
        await session.flight([Query("BEGIN")])
        with pytest.raises(psycopg.errors.DivisionByZero):
            await session.flight([Query("SELECT 1 / 0")])
        psql = connect(shard)
        psql.execute("SELECT pg_terminate_backend(%s, 5000)", [session.backend_pid])
        await session.roll_back()

        assert await here.run().run()
        assert [(20, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")


@pytest.mark.parametrize("state", ["40P01", "40001"])
async def test_a_deadlock_and_a_serialization_failure_are_tried_again(
    shard: Shard, connect: Connect, state: str
) -> None:
    """Raised twice by the server, in the middle of a batch; a sequence counts what no rollback takes back."""
    async with moving(shard, same_table(), T, customers(100)) as here:
        connect(shard).execute(
            "CREATE SEQUENCE fired; CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
            f"IF nextval('fired') <= 2 THEN RAISE EXCEPTION 'not now' USING ERRCODE = '{state}'; END IF; "
            "RETURN NEW; END$$; "
            "CREATE TRIGGER fail BEFORE UPDATE ON t FOR EACH ROW WHEN (NEW.id = 55) EXECUTE FUNCTION fail()"
        )
        heard, listen = notes()
        assert await here.run(pace=SMALL, listener=listen).run()

        assert PASSES in reasons(heard)
        assert [(100, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")
        assert (100, 10) == ((await here.step()).rows, (await here.step()).batches)


async def test_where_transactions_are_serializable_by_default_a_batch_that_lost_is_tried_again(
    shard: Shard, connect: Connect
) -> None:
    """The server's own refusal: what the batch waited for was changed after its snapshot."""
    look = connect(shard)
    look.execute(f"ALTER DATABASE {look.info.dbname} SET default_transaction_isolation = 'repeatable read'")
    async with moving(shard, same_table(), T, customers(30)) as here:
        app = connect(shard)
        app.execute("BEGIN ISOLATION LEVEL READ COMMITTED; UPDATE t SET a = 'app', b = 'APP' WHERE id = 5")
        heard, listen = notes()
        run = asyncio.create_task(here.run(pace=Pace(batch_rows=1, batch_rows_min=1), listener=listen).run())
        await blocked(look, here.session.backend_pid)
        app.execute("COMMIT")

        assert await run
        assert [("APP", 30)] == await here.rows("SELECT max(b) FILTER (WHERE id = 5), count(b) FROM t")
        assert set(reasons(heard)) <= {PASSES, "rows of t are locked"}


async def test_a_batch_that_runs_into_its_statement_timeout_is_split(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "_STATEMENT_MS", 150)
    slow = same_table(
        forward="UPDATE t SET b = upper(a), n = coalesce(n, 0) + 1 WHERE {batch} AND pg_sleep(0.002) IS NOT NULL"
    )
    async with moving(shard, slow, T, customers(240)) as here:
        heard, listen = notes()
        assert await here.run(pace=Pace(batch_rows=200, batch_target_ms=1000), listener=listen).run()

        assert "a batch of t took too long" in reasons(heard)
        assert 0 < max(event.rows for event in heard if isinstance(event, BatchDone)) <= 75
        assert [(240, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")


async def test_one_row_that_is_too_slow_ends_the_move(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_STATEMENT_MS", 50)
    stuck = same_table(forward="UPDATE t SET b = upper(a) WHERE {batch} AND (id <> 3 OR pg_sleep(1) IS NOT NULL)")
    async with moving(shard, stuck, T, customers(5)) as here:
        with pytest.raises(StepFailed, match="canceling statement due to statement timeout"):
            await here.run(pace=Pace(batch_rows=2, batch_rows_min=1)).run()

        assert [(2,)] == await here.rows("SELECT count(b) FROM t")


# --------------------------------------------------------------------------------------------------------------------
# Rows that a move cannot move


FORTY = Pace(batch_rows=40, batch_rows_min=40, batch_rows_max=40)


async def refused(here: Moving, **more: Any) -> tuple[str, BatchFailed]:
    """Run a move that fails for good; return what it says and its event."""
    heard, listen = notes()
    with pytest.raises(StepFailed) as failed:
        await here.run(pace=FORTY, listener=listen, **more).run()
    [event] = [event for event in heard if isinstance(event, BatchFailed)]
    return str(failed.value), event


async def test_a_row_that_a_constraint_refuses_is_named_with_its_batch_and_nothing_behind_it_is_moved(
    shard: Shard,
) -> None:
    bad = ("ALTER TABLE t ADD CONSTRAINT short CHECK (length(b) < 6)", "UPDATE t SET a = 'far too long' WHERE id = 55")
    async with moving(shard, same_table(), T, customers(100), *bad) as here:
        said, event = await refused(here)

        reason = 'new row for relation "t" violates check constraint "short"'
        assert said.startswith(f"eu1, 0002_x step 2: {reason}\n")
        assert said.endswith(
            "rolled back while moving t, 40 rows, keys after (40) up to (80); the first row that fails is (55). "
            "Correct it (or the move: `shardmig amend` replaces a plan that is not finished) and apply again"
        )
        assert (["40"], ["80"], 40, ["55"]) == (event.after, event.upto, event.rows, event.culprit)
        assert event.reason.startswith(reason)
        assert [(40, 1, 40)] == await here.rows("SELECT count(b), max(n), max(id) FILTER (WHERE n > 0) FROM t")
        assert ["40"] == (await here.step()).cursor


async def test_every_row_of_a_batch_can_be_the_one_that_is_named(shard: Shard) -> None:
    """First, last and in between, alone and before others; a key of two columns, one of them text."""
    table = "CREATE TABLE t (id text, part int, a text, b text, n int, PRIMARY KEY (part, id))"
    rows = "INSERT INTO t SELECT 'é' || g, g / 10, g, NULL, NULL FROM generate_series(10, 49) g"
    check = "SELECT part, id FROM t WHERE {batch} AND n IS DISTINCT FROM a::int"
    forward = "UPDATE t SET n = a::int WHERE {batch}"
    cast = same_table(key=("part", "id"), forward=forward, check=check, back=None, back_check=None)
    async with moving(shard, cast, table, rows) as here:
        for number in (10, 11, 29, 30, 48, 49):
            await here.session.execute(
                "UPDATE t SET a = id WHERE part * 10 <= $1 AND substr(id, 2)::int >= $1", [number]
            )
            said, event = await refused(here)
            await here.session.execute("UPDATE t SET a = substr(id, 2)")

            assert f"the first row that fails is ({number // 10}, é{number})" in said
            assert (None, ["4", "é49"], 40) == (event.after, event.upto, event.rows)


async def test_of_two_rows_that_fail_together_at_commit_the_second_is_named(shard: Shard) -> None:
    unique = ("ALTER TABLE t ADD UNIQUE (b) DEFERRABLE INITIALLY DEFERRED", "UPDATE t SET a = 'X3' WHERE id IN (3, 30)")
    async with moving(shard, same_table(), T, customers(40), *unique) as here:
        said, event = await refused(here)

        assert "the first row that fails is (30)" in said
        assert (None, ["40"], ["30"]) == (event.after, event.upto, event.culprit)


async def test_no_row_is_blamed_for_what_is_no_row_s_fault(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(40)) as here:
        said, event = await refused(here, move=same_table(forward="UPDATE t SET b = nix(a) WHERE {batch}"))

        assert "rolled back while moving t, 40 rows, keys up to (40); Correct the cause (or the move" in said
        assert (40, None) == (event.rows, event.culprit)


async def test_a_row_that_cannot_be_compared_is_named(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the whole table meets it: the first batch, which is compared at once, does not hold it."""
    monkeypatch.setattr(checks, "_SAMPLED", 0)
    check = "SELECT id FROM t WHERE {batch} AND (b IS DISTINCT FROM upper(a) OR 1 / (id - 77) IS NULL)"
    async with moving(shard, same_table(check=check), T, customers(100)) as here:
        said, event = await refused(here)

        assert "division by zero" in said
        assert "rolled back while comparing t, 100 rows, all keys; the first row that fails is (77)" in said
        assert ["77"] == event.culprit


async def test_an_orphan_that_cannot_be_removed_is_named_with_its_piece(shard: Shard) -> None:
    """Somebody's table refers to a dead row of the target; those before and behind it are nobody's."""
    dead = (
        "INSERT INTO u (t_id, a) SELECT g, 'dead' FROM generate_series(201, 300) g",
        "CREATE TABLE invoice (u_id bigint REFERENCES u (t_id))",
        "INSERT INTO invoice VALUES (255), (290)",
    )
    async with moving(shard, second_table(), T, U, customers(100), *dead) as here:
        said, event = await refused(here)

        assert 'violates foreign key constraint "invoice_u_id_fkey"' in said
        assert (
            "rolled back while purging u, 40 rows, keys after (220) up to (260); the first row that fails is (255). "
            in said
        )
        assert (["220"], ["260"], 40, ["255"]) == (event.after, event.upto, event.rows, event.culprit)
        assert [(100, 80)] == await here.rows("SELECT count(n), count(*) - count(n) FROM u")


async def test_what_is_narrowed_down_leaves_no_trace_and_gives_up_on_a_locked_row(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before the one that fails are locked by then: the batch is named, and no row."""
    monkeypatch.setattr(rehearsal, "_TRIES", 2)
    bad = ("ALTER TABLE t ADD CONSTRAINT short CHECK (length(b) < 6)", "UPDATE t SET a = 'far too long' WHERE id = 5")
    async with moving(shard, same_table(), T, customers(40), *bad) as here:
        app = connect(shard)
        rolled_back = rehearsal.rolled_back

        async def locked(*arguments: Any) -> Any:
            app.execute("BEGIN; SELECT FROM t WHERE id = 2 FOR UPDATE")
            return await rolled_back(*arguments)

        monkeypatch.setattr(rehearsal, "rolled_back", locked)
        said, event = await refused(here)

        assert "keys up to (40); Correct the cause" in said
        assert (40, None) == (event.rows, event.culprit)
        assert [(0,)] == await here.rows("SELECT count(b) FROM t")


async def test_a_slot_that_keeps_wal_back_stops_a_move_until_it_is_gone(connect: Connect) -> None:
    with local.Server.start("primary") as server:
        shard = Shard.model_validate({"name": "eu1", "url": server.create_database("shop")})
        async with moving(shard, same_table(), T, customers(20_000)) as here:
            psql = connect(shard)
            psql.execute("CHECKPOINT")
            psql.execute("SELECT pg_create_physical_replication_slot('forgotten', true)")
            heard, listen = notes()
            pace = Pace(max_slot_wal_mb=0.5, max_rows_per_s=8000)
            run = asyncio.create_task(here.run(pace=pace, listener=listen).run())
            async with asyncio.timeout(20):
                while not (
                    stopped := psql.execute("SELECT rows, waiting FROM shardmig.step WHERE waiting > ''").fetchall()
                ):
                    await asyncio.sleep(0.01)
            psql.execute("SELECT pg_drop_replication_slot('forgotten')")

            assert await run
            [(rows, why)] = stopped
            assert 0 < rows < 20_000
            assert "slot forgotten keeps back" in why
            assert why in reasons(heard)
            assert [(20_000, 1)] == await here.rows("SELECT count(*), max(n) FROM t WHERE b = upper(a)")


async def test_a_server_that_is_restarted_costs_a_batch_at_most() -> None:
    with local.Server.start("primary") as server:
        shard = Shard.model_validate({"name": "eu1", "url": server.create_database("shop")})
        async with moving(shard, same_table(), T, customers(2000)) as here:
            half = asyncio.Event()

            def listen(event: Event) -> None:
                if isinstance(event, BatchDone) and event.rows_done >= 500:
                    half.set()

            run = asyncio.create_task(here.run(pace=SMALL, listener=listen).run())
            await half.wait()
            await asyncio.to_thread(server.restart, "fast")

            assert await run
            assert [(2000, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")


# --------------------------------------------------------------------------------------------------------------------
# Rows that break the connection


ENDS = "pg_terminate_backend(pg_backend_pid())"  # as a crash, for whom the server process serves


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait long for a connection that broke again."""
    monkeypatch.setattr(patience, "_BROKEN_S", 0.002)


@pytest.mark.usefixtures("soon")
async def test_a_batch_that_breaks_its_connection_again_and_again_ends_the_move_and_is_named(
    shard: Shard, connect: Connect
) -> None:
    """A sequence counts the tries, which no rollback takes back."""
    async with moving(shard, same_table(), T, customers(100), "CREATE SEQUENCE tried") as here:
        deadly = f"UPDATE t SET b = upper(a) WHERE {{batch}} AND (id <> 55 OR nextval('tried') > 0 AND {ENDS})"
        async with asyncio.timeout(30):
            said, event = await refused(here, move=same_table(forward=deadly))

        assert (["40"], ["80"], 40, None) == (event.after, event.upto, event.rows, event.culprit)
        assert said.startswith("eu1, 0002_x step 2: the connection broke 6 times without progress in between")
        assert "terminating connection due to administrator command). The server's log says" in said
        assert "rolled back while moving t, 40 rows, keys after (40) up to (80); Correct the cause" in said
        assert [(6,)] == connect(shard).execute("SELECT last_value FROM tried").fetchall()
        assert [(40,)] == await here.rows("SELECT count(b) FROM t")


@pytest.mark.usefixtures("soon")
async def test_a_range_that_breaks_its_connection_while_it_is_compared_ends_the_move_too(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges before it succeed each time, but none of them is recorded by then."""
    monkeypatch.setattr(checks, "RANGE_ROWS", 20)
    monkeypatch.setattr(checks, "_SAMPLED", 0)
    check = f"SELECT id FROM t WHERE {{batch}} AND (b IS DISTINCT FROM upper(a) OR id = 77 AND {ENDS})"
    async with moving(shard, same_table(check=check), T, customers(100)) as here:
        async with asyncio.timeout(30):
            said, event = await refused(here)

        assert "the connection broke 6 times" in said
        assert "rolled back while comparing t" in said
        assert event.after is not None
        assert int(event.after[0]) < 77
        assert (100, None) == ((await here.step()).rows, (await here.step()).checked_at)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("in_laps", [False, True])
async def test_connections_may_break_as_often_as_they_will_while_there_is_progress(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, *, in_laps: bool
) -> None:
    """Twice in each of ten batches, and in each of ten ranges that are compared."""
    monkeypatch.setattr(checks, "RANGE_ROWS", 10)
    monkeypatch.setattr(checks, "_SAMPLED", 0)
    monkeypatch.setattr(moves, "_RECORD_S", 0.0)
    if in_laps:
        monkeypatch.setattr(laps, "FEW_ROWS", 10)
    some = f"(SELECT nextval('tried') % 3 = 0 OR {ENDS})"  # once a statement
    deadly = same_table(
        forward=f"UPDATE t SET b = upper(a), n = coalesce(n, 0) + 1 WHERE {{batch}} AND {some}",
        check=f"SELECT id FROM t WHERE {{batch}} AND {some} AND b IS DISTINCT FROM upper(a)",
    )
    prepared = ("CREATE SEQUENCE tried", "CREATE INDEX ON t (a)", "ANALYZE t")
    async with moving(shard, deadly, T, customers(100), *(prepared if in_laps else prepared[:1])) as here:
        heard, listen = notes()
        assert await here.run(pace=SMALL, listener=listen).run()

        assert [(100, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")
        assert in_laps == ((await here.step()).batches > 10)
        assert "the connection broke 2 times without progress" in reasons(heard)
        assert "the connection broke 3 times without progress" not in reasons(heard)


async def test_commits_that_nobody_answers_are_progress(shard: Shard, servers: list[local.Server]) -> None:
    """Each of them is in doubt, and has happened: nothing is waited for, and nothing ends."""
    with FaultProxy(servers[0]) as proxy:
        async with moving(proxy.way_to(shard), same_table(), T, customers(100)) as here:
            cuts = [proxy.cut_after() for _ in range(patience._BREAKS + 2)]
            heard, listen = notes()
            assert await here.run(pace=SMALL, listener=listen).run()

            assert all(cut.struck.is_set() for cut in cuts)
            assert [(100, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")
            assert {"the connection was lost"} == set(reasons(heard))


# --------------------------------------------------------------------------------------------------------------------
# Tables


async def test_generated_columns_are_read_and_follow(shard: Shard) -> None:
    """One is what the move reads, another follows what it writes."""
    table = (
        "CREATE TABLE t (id bigint PRIMARY KEY, a text, n int, loud text GENERATED ALWAYS AS (upper(a)) STORED, "
        "b text, length int GENERATED ALWAYS AS (length(b)) STORED)"
    )
    move = same_table(
        forward="UPDATE t SET b = loud, n = coalesce(n, 0) + 1 WHERE {batch}",
        check="SELECT id FROM t WHERE {batch} AND b IS DISTINCT FROM loud",
    )
    async with moving(shard, move, table, customers(100)) as here:
        assert await here.run(pace=SMALL).run()

        assert [(100, 1)] == await here.rows("SELECT count(*), max(n) FROM t WHERE b = upper(a) AND length = length(a)")


def upper(table: str, key: tuple[str, ...]) -> Any:
    keys = ", ".join(key)
    move = same_table(
        table=table,
        key=key,
        forward=f"UPDATE {table} SET b = upper(a) WHERE {{batch}}",
        check=f"SELECT {keys} FROM {table} WHERE {{batch}} AND b IS DISTINCT FROM upper(a)",
        back=f"UPDATE {table} SET a = lower(b) WHERE {{batch}}",
        back_check=f"SELECT {keys} FROM {table} WHERE {{batch}} AND a IS DISTINCT FROM lower(b)",
    )
    added = Statement(sql=f"ALTER TABLE {table} ADD COLUMN b text")
    return plan_of(move).model_copy(update={"steps": (added, *plan_of(move).steps)})


async def test_a_composite_key_with_a_nullable_column_is_refused_before_anything_changes(
    shard: Shard, connect: Connect
) -> None:
    psql = connect(shard)
    psql.execute("CREATE TABLE v (id bigint NOT NULL, region int, a text, UNIQUE (region, id))")
    [refused] = await fleet_of([shard], upper("v", ("region", "id"))).apply(aware="1")

    assert Outcome.FAILED is refused.outcome
    assert "key region of v may be NULL: such rows would be left behind; it has no other key" in refused.reason
    assert [(0,)] == psql.execute("SELECT count(*) FROM pg_attribute WHERE attname = 'b' AND attnum > 0 AND "
                                  "attrelid = 'v'::regclass").fetchall()  # fmt: skip


async def test_what_was_moved_before_giving_up_is_moved_again(shard: Shard, connect: Connect) -> None:
    """W7: in OLD nobody keeps new fresh, so nothing of it counts the next time."""
    psql = connect(shard)
    psql.execute("CREATE TABLE v (id bigint PRIMARY KEY, a text)")
    psql.execute("INSERT INTO v SELECT g, 'x' || g FROM generate_series(1, 500) g")
    fleet = fleet_of([shard], upper("v", ("id",)))
    (await fleet.apply(aware="1")).raise_for_failures()
    (await fleet.switch(FLAG, State.OLD)).raise_for_failures()
    psql.execute(
        "UPDATE v SET a = 'changed' WHERE id <= 10; DELETE FROM v WHERE id = 11; INSERT INTO v VALUES (0, 'n')"
    )
    heard, fleet.listener = notes()
    (await fleet.switch(FLAG, State.LIVE)).raise_for_failures()

    assert [(500, 0)] == psql.execute("SELECT count(*), count(*) FILTER (WHERE b <> upper(a)) FROM v").fetchall()
    assert 500 == sum(event.rows for event in heard if isinstance(event, BatchDone))
