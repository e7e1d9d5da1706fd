from __future__ import annotations

from typing import TYPE_CHECKING

from moving import customers, moving, same_table, second_table

if TYPE_CHECKING:
    from shardmig.config import Shard

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"


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
