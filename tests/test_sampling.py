"""The lossy test samples a table that an application goes on using."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from moving import REVISION, blocked, customers, moving, notes, same_table, second_table

from shardmig import derivation, rehearsal, sampling
from shardmig.config import SessionSettings
from shardmig.errors import LockNotObtained, PreflightFailed, StepFailed
from shardmig.events import Waiting
from shardmig.patience import Interrupted
from shardmig.sampling import refuse_lossy

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.config import Shard

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"


async def test_a_row_that_an_application_inserts_while_the_sample_is_tried_is_not_lost(
    shard: Shard, connect: Connect
) -> None:
    """The sample waits for a locked row, in `forward`; the row inserted meanwhile was never moved."""
    async with moving(shard, same_table(), T, customers(3), dual=False) as here:
        holder, application = connect(shard), connect(shard)
        holder.execute("BEGIN")
        holder.execute("SELECT FROM t WHERE id = 3 FOR UPDATE")
        trying = asyncio.create_task(refuse_lossy(here.turn, REVISION, here.number, here.move))
        await blocked(application, here.session.backend_pid)
        application.execute("INSERT INTO t VALUES (99, 'new')")
        holder.execute("COMMIT")

        await trying


async def test_what_an_earlier_move_left_behind_is_no_loss(shard: Shard) -> None:
    """A row that is not to be moved any more has its counterpart still, which the move's check removes."""
    shape = derivation.Shape("t", ("id",), "u", ("t_id",), where="a IS NOT NULL")
    move = second_table(
        forward=derivation.forward(shape, {"a": "a"}),
        back=derivation.back(shape, {"a": "a"}),
        back_check=derivation.back_check(shape, {"a": "a"}, {"a": "text"}),
        orphans=derivation.orphans(shape),
        purge=derivation.purge(shape),
    )
    made = (
        "CREATE TABLE u (t_id bigint PRIMARY KEY, a text)",
        "INSERT INTO u SELECT id, a FROM t",
        "UPDATE t SET a = NULL WHERE id = 3",
    )
    async with moving(shard, move, T, customers(5), *made, dual=False) as here:
        await refuse_lossy(here.turn, REVISION, here.number, here.move)

        assert [(5,)] == await here.rows("SELECT count(*) FROM u"), "all of it is rolled back"


async def test_a_sampled_row_that_fails_is_named(shard: Shard) -> None:
    """Nothing was moved yet; without a bad row among the first and the last, a batch would say the same."""
    bad = ("ALTER TABLE t ADD CONSTRAINT short CHECK (length(b) < 6)", "UPDATE t SET a = 'far too long' WHERE id = 29")
    async with moving(shard, same_table(), T, customers(30), *bad, dual=False) as here:
        with pytest.raises(StepFailed) as failed:
            await refuse_lossy(here.turn, REVISION, here.number, here.move)

        said = "rolled back while sampling t, 10 rows, keys after (20); the first row that fails is (29). Correct it"
        assert said in str(failed.value)
        assert [(0,)] == await here.rows("SELECT count(b) FROM t")


# As a trigger that sees how many rows a statement changes: others are in the way of more than a few.
BUSY = (
    "CREATE FUNCTION busy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "IF (SELECT count(*) FROM changed) > TG_ARGV[0]::int THEN RAISE serialization_failure; END IF; RETURN NULL; END $$"
)
FEW = (
    "CREATE TRIGGER busy AFTER UPDATE ON t REFERENCING NEW TABLE AS changed "
    "FOR EACH STATEMENT EXECUTE FUNCTION busy({})"
)


async def test_a_slow_move_is_tried_on_few_rows_at_a_time(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten milliseconds a row: all at once would be locked for half a second."""
    slow = same_table(forward="UPDATE t SET b = upper(a) || left(pg_sleep(0.01)::text, 0) WHERE {batch}")
    held_ms = held(monkeypatch)
    async with moving(shard, slow, T, customers(50), dual=False) as here:
        await refuse_lossy(here.turn, REVISION, here.number, here.move)

        assert len(held_ms) > 10
        assert 100 > sorted(held_ms)[-2]  # the first piece alone shows what a row takes


async def test_a_fast_move_is_tried_on_all_rows_of_an_end_nearly_at_once(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = held(monkeypatch)
    async with moving(shard, same_table(), T, customers(2000), dual=False) as here:
        await refuse_lossy(here.turn, REVISION, here.number, here.move)

        assert len(tried) < 20  # two pieces an end, more where the machine is busy


async def test_the_first_and_the_last_rows_are_tried_and_no_others(shard: Shard) -> None:
    async with moving(shard, same_table(), T, customers(2000), dual=False) as here:
        for spoiled, key in (("500, 501", 500), ("1500, 1501", 1501), ("1, 501", 1), ("1500, 2000", 2000)):
            await here.session.execute(f"UPDATE t SET a = CASE WHEN id IN ({spoiled}) THEN 'Ada' ELSE 'ada' END")
            with pytest.raises(PreflightFailed, match=rf"for 1 sampled rows of t, keys \({key}\)"):
                await refuse_lossy(here.turn, REVISION, here.number, here.move)


async def test_where_others_change_rows_all_the_time_fewer_are_tried(shard: Shard) -> None:
    heard, listen = notes()
    async with moving(shard, same_table(), T, customers(30), BUSY, FEW.format(4), dual=False) as here:
        await refuse_lossy(here.turn, REVISION, here.number, here.move, listener=listen)

        assert isinstance(heard[0], Waiting)


async def test_rows_that_are_always_busy_park_the_shard_and_blame_no_move(shard: Shard) -> None:
    settings = SessionSettings(lock_wait_s=0.2)
    heard, listen = notes()
    async with moving(shard, same_table(), T, customers(3), BUSY, FEW.format(0), settings=settings, dual=False) as here:
        with pytest.raises(LockNotObtained, match=r"rows of t are changed all the time.*nothing is wrong with it"):
            await refuse_lossy(here.turn, REVISION, here.number, here.move, listener=listen)

        assert isinstance(heard[0], Waiting)


async def test_a_sample_that_waits_for_a_locked_row_is_told_and_can_be_stopped(shard: Shard, connect: Connect) -> None:
    heard: list[object] = []
    stop = asyncio.Event()

    def listen(event: object) -> None:
        heard.append(event)
        stop.set()

    async with moving(shard, same_table(), T, customers(3), dual=False) as here:
        connect(shard).execute("BEGIN; SELECT FROM t WHERE id = 3 FOR UPDATE")
        with pytest.raises(Interrupted):
            await refuse_lossy(here.turn, REVISION, here.number, here.move, stop=stop, listener=listen)

        assert [Waiting("eu1", "rows of t are locked")] == heard


def held(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets for how many milliseconds each try held its locks."""
    found: list[float] = []

    async def noted(*arguments: Any) -> Any:
        results = await rehearsal.tried(*arguments)
        found.append(results[-1].value)
        return results

    monkeypatch.setattr(sampling, "tried", noted)
    return found
