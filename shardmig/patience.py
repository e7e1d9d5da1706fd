"""
What passes while rows move, and what does not.

Locks, deadlocks, timeouts and lost connections pass: they are waited out, and no progress is discarded, because the
step row, read anew after every failure, is the only thing that says how far a move is. Everything else is a failure
with the server's own words, and so is work under which one connection after the other breaks.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from psycopg import errors as pg

from shardmig.errors import (
    InDoubt,
    LockNotObtained,
    NotPrimary,
    ShardBusy,
    ShardError,
    ShardUnreachable,
    StepFailed,
)
from shardmig.events import Waiting
from shardmig.pgerrors import first_line
from shardmig.session import is_connection_lost, is_transient, pointer
from shardmig.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shardmig.events import Blocker, Listener
    from shardmig.turn import Turn

__all__ = ["Interrupted", "Patience", "refusal"]

T = TypeVar("T")

_LOST_S = 60.0  # how long a lost server may stay away
_BREAKS = 6  # times that the connection may break, with the server there again and without progress in between
_BROKEN_S = 0.5  # wait after the second of them, then four times as long each time: three quarters of a minute in all
_PAUSE_S = (0.02, 0.5)  # first and longest pause between two tries
_TELL_S = 1.0  # between two events with the same reason
_WATCH_S = 0.5  # after which somebody else looks who holds the rows


class Interrupted(Exception):  # noqa: N818, RUF100 - a fact, not an error
    """A stop was asked for while waiting; everything done so far is recorded."""


@dataclass(slots=True)
class Patience:
    """
    Does pieces of work of one step until they succeed, or fail for good.

    Attributes:
        turn: whose turn it is; renewed after a lost connection.
        where: revision and step, for messages.
        table: whose rows are worked on, for messages.
        claim: reads the step row anew; called after each failure before the work is tried again.
        stands: how far the step is, by its row as last read or written.
        note: writes into the step row why nothing moves, for whoever looks at the shard; None takes it out.
        split: told that the work met a lock or a timeout; returns whether a smaller piece can be tried.
        stop: set by Ctrl-C.
        listener: told what is waited for.
    """

    turn: Turn
    where: str
    table: str
    claim: Callable[[], Awaitable[None]]
    stands: Callable[[], object]
    note: Callable[[str | None], Awaitable[None]]
    split: Callable[[], bool]
    stop: asyncio.Event
    listener: Listener | None
    _said: tuple[str, float] = ("", 0.0)
    _breaks: int = 0  # without progress in between
    _stood: object = None  # at the last one of them

    async def do(self, work: Callable[[], Awaitable[T]]) -> T:
        """
        Do one piece of work, again and again if need be.

        Raises:
            Interrupted: a stop was asked for while waiting.
            LockNotObtained: rows stayed locked for `lock_wait_s`.
            StepFailed: the server refuses the SQL, the smallest piece of work is still too slow, or it breaks the
                connection again and again.
            ShardUnreachable: the server stayed away.
        """
        witness = Witness()
        try:
            return await self._do(work, witness)
        finally:
            await witness.close()

    async def _do(self, work: Callable[[], Awaitable[T]], witness: Witness) -> T:
        began, limit_s = time.monotonic(), self.turn.session.settings.lock_wait_s
        again, noted = False, None
        for attempt in itertools.count():
            watched = time.monotonic() - began > min(_WATCH_S, limit_s / 2)
            try:
                if again:
                    await self.claim()
                done = await (witness.watch(self.turn.session, work) if watched else work())
            except (InDoubt, pg.Error) as error:
                if isinstance(error, InDoubt) or is_connection_lost(error):
                    await self._break(error)
                else:
                    failed = self.turn.session.failed
                    await self.turn.session.roll_back()
                    late = time.monotonic() - began > limit_s
                    # Before giving up on a lock, one try is watched: who holds it has to be named.
                    given_up = late and (watched or not isinstance(error, pg.LockNotAvailable))
                    if given_up or not self._passes(error, witness.blockers):
                        raise self._failure(error, failed.sql if failed else "", witness.blockers) from error
                    noted = await self._noted(witness.blockers, noted)
                    first_s, longest_s = _PAUSE_S
                    await self.rest(random.uniform(0.5, 1.0) * min(first_s * 2**attempt, longest_s))  # noqa: S311 - jitter
            except ShardError:
                await self.turn.session.roll_back()  # the ledger refused in the middle of a transaction
                raise
            else:
                await self._noted((), noted)
                return done
            again = True
        raise AssertionError  # pragma: no cover - count() never ends

    async def _noted(self, blockers: tuple[Blocker, ...], before: str | None) -> str | None:
        """Keep in the step row who holds the rows, where it is not there yet; a note is not worth an error."""
        who = f"pid {blockers[0].pid}" if blockers and blockers[0].pid else "a prepared transaction"
        reason = f"rows of {self.table} are locked by {who}" if blockers else None
        if reason != before:
            with suppress(pg.Error, InDoubt):
                await self.note(reason)
        return reason

    async def rest(self, seconds: float) -> None:
        """
        Wait, unless a stop is asked for.

        Raises:
            Interrupted: it is.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)
        if self.stop.is_set():
            raise Interrupted

    def say(self, reason: str, blockers: tuple[Blocker, ...] = ()) -> None:
        """Tell why nothing moves at the moment, and who is in the way; the same again at most once a second."""
        now_s = time.monotonic()
        if self.listener and (self._said[0] != reason or now_s - self._said[1] > _TELL_S):
            self._said = (reason, now_s)
            self.listener(Waiting(self.turn.shard, reason, blockers))

    def _passes(self, error: pg.Error, blockers: tuple[Blocker, ...]) -> bool:
        """Whether waiting helps; locks and timeouts also make the next piece smaller."""
        if isinstance(error, pg.LockNotAvailable):
            self.split()
            self.say(f"rows of {self.table} are locked", blockers)
            return True
        if isinstance(error, pg.QueryCanceled):
            self.say(f"a batch of {self.table} took too long")
            return self.split()
        if is_transient(error):
            self.say("a deadlock or a serialization failure ended a batch")
            return True
        return False

    async def _break(self, error: Exception) -> None:
        """
        Come back after the connection broke; with the same work under way again and again, later, and not for ever.

        What breaks it may be a row that crashes the server, under which everybody there suffers. A server that is away
        is no such thing, however long: only what breaks behind a new connection counts, until there is progress.
        """
        stands = self.stands()
        self._breaks = self._breaks + 1 if stands == self._stood else 1
        self._stood = stands
        if 1 < self._breaks < _BREAKS:
            self.say(f"the connection broke {self._breaks} times without progress")
            await self.rest(_BROKEN_S * 4 ** (self._breaks - 2))
        await self._come_back()
        if self._breaks >= _BREAKS:
            last = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error).partition(";")[0]
            raise StepFailed(
                f"the connection broke {self._breaks} times without progress in between, though the server was there "
                f"again each time ({last}). The server's log says whether a row or a function crashes it, or who ends "
                "its processes; else something on the way to it cuts connections",
                shard=self.turn.shard,
                step=self.where,
            ) from error

    async def _come_back(self) -> None:
        """Reconnect; what is in doubt is decided by the step row, which the next claim reads."""
        deadline = time.monotonic() + _LOST_S
        self.say("the connection was lost")
        while True:
            try:
                await self.turn.renew()
            except (ShardUnreachable, ShardBusy, NotPrimary, InDoubt, pg.OperationalError) as error:
                if time.monotonic() > deadline:
                    raise self._failure(error, "", ()) from error
                await self.rest(0.2)
            else:
                return

    def _failure(self, error: Exception, sql: str, blockers: tuple[Blocker, ...]) -> ShardError:
        return refusal(error, sql, self.table, self.turn.shard, self.where, blockers=blockers)


def refusal(
    error: Exception, sql: str, table: str, shard: str, where: str, *, blockers: tuple[Blocker, ...] = ()
) -> ShardError:
    """Say for good what the server said: who is named, and a caret stands under the SQL that it refused."""
    if isinstance(error, ShardError):
        return error
    if isinstance(error, pg.LockNotAvailable):
        who = f" by {'; '.join(map(str, blockers))}" if blockers else ""
        return LockNotObtained(
            f"rows of {table} stayed locked{who}; nothing is lost, apply again later", shard=shard, step=where
        )
    if isinstance(error, pg.Error):
        message = f"{error.diag.message_primary or error}\n{pointer(error, sql)}".rstrip()
        return StepFailed(message, shard=shard, step=where)
    return StepFailed(str(error), shard=shard, step=where)
