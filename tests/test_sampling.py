"""The lossy test samples a table that an application goes on using."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from moving import REVISION, blocked, customers, moving, same_table, second_table

from shardmig import derivation
from shardmig.errors import StepFailed
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
        trying = asyncio.create_task(refuse_lossy(here.session, REVISION, here.number, here.move))
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
        await refuse_lossy(here.session, REVISION, here.number, here.move)

        assert [(5,)] == await here.rows("SELECT count(*) FROM u"), "all of it is rolled back"


async def test_a_sampled_row_that_fails_is_named(shard: Shard) -> None:
    """Nothing was moved yet; without a bad row among the first and the last, a batch would say the same."""
    bad = ("ALTER TABLE t ADD CONSTRAINT short CHECK (length(b) < 6)", "UPDATE t SET a = 'far too long' WHERE id = 29")
    async with moving(shard, same_table(), T, customers(30), *bad, dual=False) as here:
        with pytest.raises(StepFailed) as failed:
            await refuse_lossy(here.session, REVISION, here.number, here.move)

        said = "rolled back while sampling t, 30 rows, all keys; the first row that fails is (29). Correct it"
        assert said in str(failed.value)
        assert [(0,)] == await here.rows("SELECT count(b) FROM t")
