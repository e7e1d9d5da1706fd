"""
What is built CONCURRENTLY waits for every older transaction, of any table: nobody queues behind it, and it queues long.

The server tells whom it waits for only while it does, and the session itself cannot ask: a second connection does, and
ends the build when it has waited for too long, or was asked to stop while it waits. It may wait for as long as it has
worked before, so that no hours of building are thrown away for a minute. What is left is an INVALID index, which the
next try drops.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg import Error
from psycopg import errors as pg

from shardmig.errors import LockNotObtained, ShardError
from shardmig.events import Blocker, Waiting
from shardmig.flight import Query
from shardmig.session import open_session
from shardmig.steps import Stopped
from shardmig.witness import BLOCKERS

if TYPE_CHECKING:
    from shardmig.session import Session
    from shardmig.steps import Steps

__all__ = ["execute_concurrently"]

_FIRST_LOOK_S = 0.5  # most indexes are there before anybody looks
_LOOK_S = 0.2
_TELL_S = 1.0  # between two events with the same blockers

# It may have got what it waited for a moment ago: then it goes on.
_CANCEL = "SELECT pg_cancel_backend($1) WHERE cardinality(pg_blocking_pids($1)) > 0"


async def execute_concurrently(steps: Steps, sql: str) -> None:
    """
    Run a statement that refuses transactions, and say for whom it waits.

    Raises:
        LockNotObtained: it waited for others without a pause, for `lock_wait_s` at least; they are named.
        Stopped: a stop was asked for while it waited.
        psycopg.Error: it failed.
    """
    watch = _Watch(steps, steps.turn.session.backend_pid)
    watching = asyncio.create_task(watch.look())
    try:
        await steps.turn.session.execute_alone(sql)
    except pg.QueryCanceled as error:
        await watch.judge(error)
        raise
    finally:
        watching.cancel()
        await asyncio.wait([watching])


@dataclass(slots=True)
class _Watch:
    """Looks after one statement; `blockers` are those for whom it was ended."""

    steps: Steps
    pid: int
    blockers: tuple[Blocker, ...] = ()
    stopped: bool = False

    async def judge(self, error: pg.QueryCanceled) -> None:
        """Say why the statement was ended, if it was this that ended it."""
        if self.stopped:
            raise Stopped from error
        if self.blockers:
            who = "; ".join(map(str, self.blockers))
            raise LockNotObtained(
                f"an index that is built CONCURRENTLY waited for older transactions for too long: {who}; what is left "
                "of it is INVALID, and is dropped and built anew: apply again when they are over",
                shard=self.steps.turn.shard,
            ) from error

    async def look(self) -> None:
        """Look until cancelled, on a connection of its own; without one, the statement waits unseen."""
        await asyncio.sleep(_FIRST_LOOK_S)
        session = self.steps.turn.session
        with suppress(Error, ShardError):
            async with open_session(
                session.shard, session.settings, pg_versions=session.pg_versions, purpose="read"
            ) as witness:
                await self._look(witness, session.settings.lock_wait_s)

    async def _look(self, witness: Session, limit_s: float) -> None:
        clock = asyncio.get_running_loop().time
        began_s, since_s, told_s = clock() - _FIRST_LOOK_S, None, -_TELL_S
        while True:
            found = tuple(await witness.observe(Blocker, BLOCKERS, [self.pid]))
            since_s = (since_s or clock()) if found else None
            if since_s is not None:
                if clock() - told_s >= _TELL_S:
                    told_s = clock()
                    self.steps.say(Waiting(self.steps.turn.shard, "an index waits for older transactions", found))
                self.stopped = self.steps.stop.is_set()
                if self.stopped or clock() - since_s > max(limit_s, since_s - began_s):
                    self.blockers = found
                    await witness.transact([Query(_CANCEL, [self.pid])], local={"role": "none"})
            await asyncio.sleep(_LOOK_S)
