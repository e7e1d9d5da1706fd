"""
Who is in the way of a session that waits for a row.

The server tells only while the session waits, and the session itself cannot ask then: a second connection does, opened
when rows have stayed locked for a while and closed with the wait.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from psycopg import Error

from shardmig.errors import ShardError
from shardmig.events import Blocker
from shardmig.session import open_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shardmig.session import Session

__all__ = ["BLOCKERS", "Witness"]

T = TypeVar("T")

_LOOK_S = 0.004  # between two looks while the session may be waiting: its shortest wait is 10 ms
_LAST_LOOK_S = 1.0  # for an answer that is under way when the session has got, or given up, what it waited for


@dataclass(slots=True)
class Witness:
    """
    Watches one session through its tries.

    Attributes:
        blockers: who was in the way when it was seen last; empty before that, and where no connection is to be had.
    """

    blockers: tuple[Blocker, ...] = ()
    _open: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)
    _session: Session | None = field(init=False, default=None)

    async def watch(self, session: Session, work: Callable[[], Awaitable[T]]) -> T:
        """Do a piece of work that may wait for a lock, and see who holds it."""
        if self._session is None:
            with suppress(Error, ShardError):  # what waits is told without a name then
                opening = open_session(session.shard, session.settings, pg_versions=session.pg_versions, purpose="read")
                self._session = await self._open.enter_async_context(opening)
        done = asyncio.Event()
        looking = asyncio.create_task(self._look(session.backend_pid, done))
        try:
            return await work()
        finally:
            done.set()
            with suppress(TimeoutError):  # a look that is cancelled costs its connection, and the next try is not seen
                await asyncio.wait_for(looking, _LAST_LOOK_S)

    async def close(self) -> None:
        """Close the connection."""
        self._session = None
        with suppress(Error, ShardError):
            await self._open.aclose()

    async def _look(self, pid: int, done: asyncio.Event) -> None:
        """Look until somebody is seen; the next try is watched anew."""
        while self._session is not None and not done.is_set():
            try:
                found = await self._session.observe(Blocker, BLOCKERS, [pid])
            except (Error, ShardError):
                return
            if found:
                self.blockers = tuple(found)
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), _LOOK_S)


# A prepared transaction has no process: pg_blocking_pids() says 0 for it.
BLOCKERS = r"""
SELECT nullif(blocking.pid, 0) AS pid,
       coalesce(a.usename, p.owner)::text AS role,
       nullif(a.application_name, '') AS application,
       extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8 AS age_s,
       CASE WHEN p.gid IS NOT NULL THEN format('PREPARE TRANSACTION %L', p.gid)
            ELSE nullif(left(regexp_replace(a.query, '\s+', ' ', 'g'), 120), '') END AS query,
       CASE WHEN blocking.pid = 0 THEN 'prepared' WHEN a.backend_type = 'autovacuum worker' THEN 'autovacuum'
            ELSE 'client' END AS what
FROM (SELECT DISTINCT pid FROM unnest(pg_blocking_pids($1)) AS holder (pid)) AS blocking
LEFT JOIN pg_stat_activity AS a ON a.pid = blocking.pid
LEFT JOIN pg_locks AS w ON blocking.pid = 0 AND w.pid = $1 AND NOT w.granted
LEFT JOIN pg_prepared_xacts AS p ON p.transaction = w.transactionid
ORDER BY a.xact_start
"""
