"""
Readers and writers of neighbouring states against a moving shard, as forced schedules.

Each test shows both: with the protocol nothing is lost, and without the one thing that it is about, something is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from moving import FLAG, REVISION, VERSIONS, blocked, customers, moving, same_table, second_table
from servers import FaultProxy

from shardmig import derivation, switching
from shardmig.checks import Samples, disagreeing
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.errors import CheckFailed, Fenced
from shardmig.events import BatchDone
from shardmig.moves import MoveRun
from shardmig.session import open_session
from shardmig.states import State
from shardmig.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import Connect
    from moving import Moving
    from servers import Cut

    from shardmig import local
    from shardmig.events import Event
    from shardmig.keyset import Key
    from shardmig.plan import Move
    from shardmig.rehearsal import Piece

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
PATIENT = SessionSettings(lock_timeout_ms=(5000,))  # as long as deadlock_timeout allows: schedules can be forced


# --------------------------------------------------------------------------------------------------------------------
# The drain (W1)


@pytest.fixture(autouse=True)
def _unsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a race has spoiled as it is: a sample of what was just moved would mend it where it looks."""
    monkeypatch.setattr(Samples, "due", lambda *_: False)


@pytest.mark.parametrize("drained", [True, False])
async def test_without_the_drain_a_writer_of_old_is_lost(shard: Shard, connect: Connect, *, drained: bool) -> None:
    """
    A writer reads OLD and rests, and writes old alone when everything is over.

    Meanwhile the flag goes to DUAL, rows are moved and checked, the flag goes LIVE, and readers of new never see it.
    """
    async with moving(shard, same_table(), T, customers(3), dual=False) as here:
        writer, reader = connect(shard), connect(shard)
        writer.execute("BEGIN")
        assert state(writer) is State.OLD
        row = await switching.flip(here.turn, await here.flag(), State.DUAL)
        if drained:
            drain = asyncio.create_task(switching.drain(here.turn, row))
            await asyncio.sleep(0)
            late(writer)
            await drain
        else:
            await here.session.execute("UPDATE shardmig.flag SET drained = true")

        assert await here.run().run()
        await here.finish()
        await here.to(State.LIVE, drain=False)
        if not drained:
            late(writer)

        assert state(reader) is State.LIVE
        assert [("LATE" if drained else "X1",)] == reader.execute("SELECT b FROM t WHERE id = 1").fetchall()


def late(writer: psycopg.Connection[Any]) -> None:
    writer.execute("UPDATE t SET a = 'late' WHERE id = 1")
    writer.execute("COMMIT")


def state(connection: psycopg.Connection[Any]) -> State:
    row = connection.execute("SELECT state FROM shardmig.flag WHERE flag = %s", [FLAG]).fetchone()
    assert row is not None
    return State(row[0])


# --------------------------------------------------------------------------------------------------------------------
# A batch against a writer: each kind of change, the batch beginning at each of the writer's statements


@dataclass(frozen=True)
class Writer:
    """What a writer in DUAL or LIVE does to row 2: both representations, old first."""

    statements: tuple[str, ...]


ONE_TABLE = {
    "update": Writer(("UPDATE t SET a = 'new', b = 'NEW' WHERE id = 2",)),
    "insert": Writer(("INSERT INTO t (id, a, b) VALUES (22, 'new', 'NEW')",)),
    "delete": Writer(("DELETE FROM t WHERE id = 2",)),
    "delete and insert": Writer(("DELETE FROM t WHERE id = 2", "INSERT INTO t (id, a, b) VALUES (2, 'new', 'NEW')")),
    "re-key": Writer(("UPDATE t SET id = 22, b = upper(a) WHERE id = 2",)),
}
_UPSERT = "INSERT INTO u (t_id, a) VALUES ({0}, 'new') ON CONFLICT (t_id) DO UPDATE SET a = excluded.a"
TWO_TABLES = {
    "update": Writer(("UPDATE t SET a = 'new' WHERE id = 2", _UPSERT.format(2))),
    "insert": Writer(("INSERT INTO t (id, a) VALUES (22, 'new')", _UPSERT.format(22))),
    "delete": Writer(("DELETE FROM t WHERE id = 2", "DELETE FROM u WHERE t_id = 2")),
    "delete and insert": Writer(
        (
            "DELETE FROM t WHERE id = 2",
            "DELETE FROM u WHERE t_id = 2",
            "INSERT INTO t (id, a) VALUES (2, 'new')",
            _UPSERT.format(2),
        )
    ),
    "re-key": Writer(
        ("UPDATE t SET id = 22, a = 'new' WHERE id = 2", "DELETE FROM u WHERE t_id = 2", _UPSERT.format(22))
    ),
}


async def disagreements(
    here: Moving, connect: Connect, shard: Shard, writers: dict[str, Writer], *, held: bool
) -> list[str]:
    """
    Let one batch meet each writer at each point, and list the schedules after which old and new disagree.

    With `held`, row 2 has its new representation already, as when a batch is repeated.
    """
    writer, look = connect(shard), connect(shard)
    wrong = []
    for name, each in writers.items():
        for point in range(len(each.statements) + 1):
            await begin_again(here, held=held)
            run = here.run()
            await run._claim()
            await run._begin()
            writer.execute("BEGIN")
            for statement in each.statements[:point]:
                writer.execute(statement)
            batch = asyncio.create_task(run._next_batch())
            await ended_or_blocked(batch, look, here.session.backend_pid)
            for statement in each.statements[point:]:
                writer.execute(statement)
            writer.execute("COMMIT")
            await batch
            if (await disagreeing(here.session, here.move, "forward")).keys:
                wrong.append(f"{name} at {point}")
    return wrong


async def begin_again(here: Moving, *, held: bool) -> None:
    await here.session.execute("TRUNCATE t")
    await here.session.execute("INSERT INTO t (id, a) VALUES (1, 'x1'), (2, 'x2'), (30, 'x30')")
    if here.move.cross_table:
        await here.session.execute("TRUNCATE u")
        if held:
            await here.session.execute("INSERT INTO u (t_id, a) VALUES (2, 'x2')")
    await here.session.execute("UPDATE shardmig.step SET bounded_at = NULL, cursor = NULL WHERE kind = 'move'")


async def ended_or_blocked(batch: asyncio.Task[Any], look: psycopg.Connection[Any], pid: int) -> None:
    waiting = asyncio.create_task(blocked(look, pid))
    await asyncio.wait({batch, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


SELECTS_FIRST = same_table(
    forward="UPDATE t SET b = upper(read.a) FROM (SELECT id, a FROM t WHERE {batch}) AS read WHERE t.id = read.id"
)


@pytest.mark.parametrize(
    ("move", "wrong"), [(same_table(), []), (SELECTS_FIRST, ["update at 1"])], ids=["one UPDATE", "selects first"]
)
async def test_a_batch_in_one_update_loses_no_write_and_one_that_selects_first_does(
    shard: Shard, connect: Connect, move: Move, wrong: list[str]
) -> None:
    async with moving(shard, move, T, settings=PATIENT) as here:
        assert wrong == await disagreements(here, connect, shard, ONE_TABLE, held=False)


SHAPE = derivation.Shape("t", ("id",), "u", ("t_id",))
DERIVED = second_table(
    forward=derivation.forward(SHAPE, {"a": "a"}),
    check=derivation.check(SHAPE, {"a": "a"}, {}),
    orphans=derivation.orphans(SHAPE),
    purge=derivation.purge(SHAPE),
)
UNLOCKED = DERIVED.model_copy(update={"forward": DERIVED.forward.replace("FOR SHARE", "")})
JOINED = DERIVED.model_copy(
    update={
        "forward": (
            "INSERT INTO u (t_id, a) SELECT id, a FROM t WHERE {batch} ON CONFLICT (t_id) DO UPDATE SET a = excluded.a"
        )
    }
)


@pytest.mark.parametrize("held", [True, False], ids=["row there", "row missing"])
@pytest.mark.parametrize("move", [DERIVED, UNLOCKED, JOINED], ids=["locked", "unlocked", "plain"])
async def test_a_batch_that_locks_its_source_loses_no_write_and_one_that_does_not_does(
    shard: Shard, connect: Connect, move: Move, *, held: bool
) -> None:
    async with moving(shard, move, T, U, settings=PATIENT) as here:
        wrong = await disagreements(here, connect, shard, TWO_TABLES, held=held)

        assert (move is DERIVED) == (wrong == [])
        assert move is DERIVED or "update at 2" in wrong


# --------------------------------------------------------------------------------------------------------------------
# Giving up


KEEPS = DERIVED.forward.partition("DO UPDATE")[0] + "DO NOTHING"


@pytest.mark.parametrize(
    ("move", "tables"),
    [
        (DERIVED, (T, U)),
        (DERIVED.model_copy(update={"forward": KEEPS}), (T, U)),
        (same_table(), (T,)),
        (same_table(forward="UPDATE t SET b = upper(a) WHERE {batch} AND b IS NULL"), (T,)),
    ],
    ids=["overwrites", "DO NOTHING", "overwrites in place", "where new IS NULL"],
)
async def test_what_was_moved_before_giving_up_is_overwritten_or_named(
    shard: Shard, connect: Connect, move: Move, tables: tuple[str, ...]
) -> None:
    async with moving(shard, move, *tables, customers(5)) as here:
        assert await here.run().run()
        await here.to(State.OLD)
        app = connect(shard)
        app.execute("UPDATE t SET a = 'new' WHERE id = 2")
        app.execute("DELETE FROM t WHERE id = 3")
        await here.to(State.DUAL)

        if "NOTHING" in move.forward or "IS NULL" in move.forward:
            with pytest.raises(CheckFailed, match=r"1 rows, keys \(2\)"):
                await here.run().run()
            return
        assert await here.run().run()
        assert [("1",), ("2",), ("4",), ("5",)] == await here.rows("SELECT id::text FROM t ORDER BY id")
        if move.cross_table:
            assert await here.rows("TABLE t ORDER BY id") == await here.rows(
                "SELECT t_id, a, NULL, NULL FROM u ORDER BY 1"
            )
        else:
            assert [("NEW",)] == await here.rows("SELECT b FROM t WHERE id = 2")


class PurgesAtOnce(MoveRun):
    """Removes an orphan by the delete alone."""

    def _purge(self, after: Key | None, upto: Key | None) -> Piece:
        both = super()._purge(after, upto)
        return replace(both, statements=both.statements[1:])


@pytest.mark.parametrize("kind", [MoveRun, PurgesAtOnce], ids=["lock, then delete", "delete alone"])
async def test_a_pair_created_again_while_its_orphan_is_purged_survives(
    shard: Shard, connect: Connect, kind: type[MoveRun]
) -> None:
    async with moving(shard, DERIVED, T, U, customers(1), settings=PATIENT) as here:
        await here.session.execute("INSERT INTO u (t_id, a) VALUES (7, 'dead')")
        base = here.run()
        run = kind(base.turn, base.revision, base.number, base.move, base.direction, base.pace)
        await run._claim()
        await run._begin()
        writer, look = connect(shard), connect(shard)
        writer.execute("BEGIN")
        writer.execute("INSERT INTO t (id, a) VALUES (7, 'new')")
        writer.execute(_UPSERT.format(7))
        check = asyncio.create_task(run._check_next())
        await blocked(look, here.session.backend_pid)
        writer.execute("COMMIT")
        if kind is PurgesAtOnce:
            with pytest.raises(CheckFailed, match=r"keys \(7\)"):
                await check
            return
        assert await check
        assert [("new",)] == await here.rows("SELECT a FROM u WHERE t_id = 7")


# --------------------------------------------------------------------------------------------------------------------
# REPEATABLE READ


@pytest.mark.parametrize("touch", [True, False])
async def test_a_repeatable_read_writer_retries_when_the_move_touches_its_source(
    shard: Shard, connect: Connect, *, touch: bool
) -> None:
    """Its snapshot is older than the row that the move inserted: an UPDATE there finds nothing to update."""
    forward = derivation.forward(derivation.Shape("t", ("id",), "u", ("t_id",), touch=touch), {"a": "a"})
    async with moving(shard, DERIVED.model_copy(update={"forward": forward}), T, U, customers(1)) as here:
        writer = connect(shard)
        writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT state FROM shardmig.flag")
        run = here.run()
        await run._claim()
        await run._begin()
        await run._next_batch()
        if touch:
            with pytest.raises(psycopg.errors.SerializationFailure):
                writer.execute("UPDATE t SET a = 'new' WHERE id = 1")
            return
        writer.execute("UPDATE t SET a = 'new' WHERE id = 1")
        assert writer.execute("UPDATE u SET a = 'new' WHERE t_id = 1").rowcount == 0
        writer.execute("COMMIT")
        assert [("new", "x1")] == await here.rows("SELECT t.a, u.a FROM t JOIN u ON id = t_id")


# --------------------------------------------------------------------------------------------------------------------
# The fence

# Both compare the term in another row than the one that a batch locks.
ELSEWHERE = (
    """
    CREATE OR REPLACE FUNCTION shardmig.record_batch(of_shard text, of_revision text, of_number int, my_term bigint,
            expected text[], reached text[], expected_lap text[], reached_lap text[], moved bigint)
        RETURNS timestamptz LANGUAGE plpgsql AS $$
    BEGIN
        IF NOT EXISTS (SELECT FROM shardmig.runner r WHERE r.shard = of_shard AND r.term = my_term) THEN
            RAISE EXCEPTION 'another runner took the shard over' USING ERRCODE = 'SM001';
        END IF;
        UPDATE shardmig.step s SET cursor = reached, lap = reached_lap, rows = s.rows + moved, batches = s.batches + 1
            WHERE s.shard = of_shard AND s.revision = of_revision AND s.number = of_number;
        RETURN clock_timestamp();
    END $$
    """,
    """
    CREATE OR REPLACE FUNCTION shardmig.claim_step(of_shard text, of_revision text, of_number int, my_term bigint)
        RETURNS void LANGUAGE sql AS ''
    """,
)


@pytest.mark.parametrize("mutations", [(), ELSEWHERE], ids=["in the step row", "elsewhere"])
async def test_a_batch_in_doubt_is_not_repeated_while_its_transaction_lives(
    shard: Shard, connect: Connect, mutations: Sequence[str]
) -> None:
    """
    A runner's transaction waits for a row when another takes over; it ends only afterwards.

    The successor holds no proof that the first one is dead (its lock was lost with a connection that the server has not
    missed yet), so only the step row can tell.
    """
    pace = Pace(batch_rows=5, batch_rows_min=5, batch_rows_max=5)
    async with (
        moving(shard, same_table(), T, customers(20), settings=PATIENT) as here,
        open_session(shard, PATIENT, pg_versions=VERSIONS, purpose="read") as second,
    ):
        first = here.run(pace=pace)
        await first._claim()
        await first._begin()
        for mutation in mutations:
            await here.session.execute(mutation)
        app, look = connect(shard), connect(shard)
        app.execute("BEGIN; SELECT FROM t WHERE id = 3 FOR UPDATE")
        zombie = asyncio.create_task(first._next_batch())
        await blocked(look, here.session.backend_pid)
        successor = MoveRun(await Turn.take(second), REVISION, here.number, here.move, "forward", pace)
        took_over = asyncio.create_task(batch_after_claim(successor))
        await blocked(look, second.backend_pid)
        app.execute("COMMIT")
        await zombie
        await took_over

        assert [(2 if mutations else 1,)] == await here.rows("SELECT max(n) FROM t")
        if not mutations:
            with pytest.raises(Fenced):
                await first._next_batch()


async def batch_after_claim(run: MoveRun) -> None:
    await run._patience.do(run._claim)
    await run._patience.do(run._next_batch)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_commit_whose_answer_is_lost_is_decided_by_the_step_row(
    shard: Shard, servers: list[local.Server], connect: Connect, *, when: str
) -> None:
    with FaultProxy(servers[0]) as proxy:
        through = proxy.way_to(shard)
        async with moving(through, same_table(), T, customers(1000)) as here:
            cuts: list[Cut] = []

            def cut_the_third(event: Event) -> None:
                if isinstance(event, BatchDone) and event.rows_done == 400:
                    cuts.append(proxy.cut_after() if when == "after" else proxy.cut_before())

            pace = Pace(batch_rows=200, batch_rows_min=200, batch_rows_max=200)
            assert await here.run(pace=pace, listener=cut_the_third).run()

            assert [True] == [cut.struck.is_set() for cut in cuts]
            assert [(1000, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t")
            step = await here.step()
            assert (1000, 5) == (step.rows, step.batches)
