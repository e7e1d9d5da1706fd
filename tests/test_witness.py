"""Who holds what a session waits for is seen at each try, not only at the first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psycopg
import pytest
from servers import FaultProxy

from shardmig.config import SessionSettings, Shard
from shardmig.session import open_session
from shardmig.witness import Witness

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.local import Server


async def test_a_try_that_ends_while_somebody_looks_does_not_blind_the_next_one(
    shard: Shard, servers: list[Server], connect: Connect
) -> None:
    """Far from its server, a look is always under way."""
    psql, holder = connect(shard), connect(shard, autocommit=False)
    psql.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)")
    holder.execute("SELECT FROM t FOR UPDATE")
    with FaultProxy(servers[0]) as proxy:
        through = proxy.way_to(shard)
        async with open_session(through, SessionSettings(), pg_versions=(12, 18)) as session:
            witness = Witness()

            async def wait_for_the_row() -> None:
                await session.execute("SELECT FROM t FOR UPDATE")

            await witness.watch(session, lambda: asyncio.sleep(0))
            proxy.delay(0.03)
            for _ in range(3):
                await witness.watch(session, lambda: asyncio.sleep(0.01))
            with pytest.raises(psycopg.errors.LockNotAvailable):
                await witness.watch(session, wait_for_the_row)
            await witness.close()

    assert [holder.info.backend_pid] == [blocker.pid for blocker in witness.blockers]
