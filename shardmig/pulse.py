"""
Whether a server still works on what a runner waits for, asked on a second connection when the answer is long in coming.

The limits of statements and locks are kept by the server, so one that hangs keeps none of them; and to TCP, a process
that was stopped, or a proxy that forgot whom it serves, is only slow. A limit by our own clock would have to be that of
the slowest flight, and an index may take hours. So somebody looks: whoever is at work may go on.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import psycopg

from shardmig.errors import ShardError, ShardUnreachable
from shardmig.handshake import connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from shardmig.config import SessionSettings, Shard

__all__ = ["in_time"]

_MISSED = 2  # looks without any answer: one may have met a server that is only busy
_AGAIN_S = 1.0  # after such a look
_LONGEST_S = 10.0  # the server's limit of a statement is never said to be shorter: batches have one of their own


@asynccontextmanager
async def in_time(
    shard: Shard,
    settings: SessionSettings,
    pid: int,
    *,
    limit_s: float | None,
    limited: bool,
    tell: Callable[[str], None] | None = None,
) -> AsyncIterator[None]:
    """
    Wait for an answer as long as our own clock, or whoever looks after it, allows.

    Args:
        shard: where.
        settings: how to connect, and how long a statement may take.
        pid: the server process that is to answer.
        limit_s: by our own clock; None: while the server works on it.
        limited: whether the server ends a statement that takes too long.
        tell: told what the server process waits for that no limit ends.

    Raises:
        ShardUnreachable: the limit is over.
        psycopg.OperationalError: nobody works on the answer any more; what was sent may have been done, as with any
            connection that breaks.
    """
    pulse, look = None, "look whether its server, or a proxy on the way, hangs"
    try:
        async with asyncio.timeout(limit_s) as limit:
            if limit_s is None:
                pulse = _Pulse(shard, settings, pid, limited=limited, limit=limit, tell=tell)
            yield
    except TimeoutError:
        if pulse is not None:
            raise psycopg.OperationalError(f"{shard.address} {pulse.lost}; {look}") from None
        raise ShardUnreachable(
            f"{shard.address} accepted the connection, but did not answer within {limit_s:g} s; {look}",
            shard=shard.name,
        ) from None
    finally:
        if pulse is not None:
            pulse.end()


class _Pulse:
    """
    Looks after one flight, from `session.connect_timeout_s` on and so often, until `end`.

    Args:
        shard: where.
        settings: how to connect, and how long a statement may take.
        pid: the server process that works on the flight.
        limited: whether the server ends a statement that takes too long.
        limit: of the wait for the flight; it is over at once when nobody works on it any more.
        tell: told what it waits for.

    Attributes:
        lost: why nothing more is to be waited for; empty while something is.
    """

    __slots__ = ("_limit", "_limited", "_pid", "_settings", "_shard", "_task", "_tell", "_timer", "lost")

    def __init__(
        self,
        shard: Shard,
        settings: SessionSettings,
        pid: int,
        *,
        limited: bool,
        limit: asyncio.Timeout,
        tell: Callable[[str], None] | None,
    ) -> None:
        self.lost = ""
        self._tell = tell
        self._shard, self._settings, self._pid = shard, settings, pid
        self._limited, self._limit = limited and settings.statement_timeout_s > 0, limit
        self._task: asyncio.Task[None] | None = None
        # A timer, which nearly every flight takes back, costs a microsecond; a task would cost twenty.
        self._timer = asyncio.get_running_loop().call_later(settings.connect_timeout_s, self._begin)

    def end(self) -> None:
        """Look no more: the flight is over."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        missed = 0
        while not self.lost:
            missed = 0 if await self._answered() else missed + 1
            if missed == _MISSED:
                self.lost = "answers nobody any more"
            elif not self.lost:
                await asyncio.sleep(_AGAIN_S if missed else self._settings.connect_timeout_s)
        self._limit.reschedule(asyncio.get_running_loop().time())

    async def _answered(self) -> bool:
        """Find out what is `lost`; False without any answer in time."""
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                self.lost = await self._felt()
        except TimeoutError:
            return False
        except (psycopg.Error, ShardError):
            pass  # an answer, if only that the server is full; whoever serves the flight may well be at work
        return True

    async def _felt(self) -> str:
        """Ask on a connection of its own what the server process does; say what is wrong with it."""
        margin_s = float(self._settings.connect_timeout_s)
        statement_s = max(self._settings.statement_timeout_s, _LONGEST_S) if self._limited else None
        connection = await connect(self._shard, self._settings)
        try:
            cursor = await connection.execute(_FELT, (margin_s, statement_s, margin_s, self._pid))
            found = await cursor.fetchone()
        finally:
            with suppress(psycopg.Error):
                await connection.close()
        if found is None:
            return f"has no server process {self._pid} any more"
        idle, late, for_standby = found
        if for_standby and self._tell is not None:
            self._tell("its COMMIT waits for a synchronous standby")
        if idle:
            return f"has done what was sent, or never got it: server process {self._pid} waits for us"
        return f"does not end a statement whose time is over: server process {self._pid} hangs" if late else ""


# A COMMIT has no limit: deferred triggers run in it, and it may wait for a disk or a synchronous standby; given up, it
# would only be repeated. What a server does not track (track_activities) it cannot tell: null, and waited for.
_FELT = """
SELECT coalesce(state LIKE 'idle%%' AND state_change < clock_timestamp() - make_interval(secs => %s), false),
       coalesce(state = 'active' AND query <> 'COMMIT' AND wait_event IS DISTINCT FROM 'SyncRep'
                AND query_start < clock_timestamp() - make_interval(secs => %s::float8 + %s), false),
       coalesce(wait_event = 'SyncRep', false)
FROM pg_stat_activity WHERE pid = %s
"""
