"""
Doing steps so that it is known what became of them.

A broken connection is repaired, and the step's own row decides what was in doubt; why a step failed is kept there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from psycopg import errors as pg

from shardmig.errors import Fenced, InDoubt, LockNotObtained, ShardError, ShardUnreachable, StepFailed
from shardmig.events import StepDone, StepStarted, Waiting, Warned
from shardmig.session import is_connection_lost, pointer

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from shardmig.events import Listener
    from shardmig.plan import Plan
    from shardmig.turn import Turn

__all__ = ["LookAgain", "Steps", "Stopped", "in_doubt", "looking_again"]

T = TypeVar("T")

_UNCHANGED = "; nothing was changed there"  # what a refused connection adds, which an earlier COMMIT may belie

_EXISTS = (pg.DuplicateTable, pg.DuplicateColumn, pg.DuplicateObject, pg.DuplicateFunction, pg.DuplicateSchema)
_MADE_BESIDE = (
    "; somebody made it on this shard beside shardmig, by hand or by `alembic upgrade`: drop it there if nobody uses "
    "it, then apply again"
)


class Stopped(Exception):
    """Ctrl-C was pressed; everything done so far is recorded."""


class LookAgain(Exception):
    """
    What there is to do must be read and decided anew: some of it is done, or others may have decided otherwise.

    It is raised from the error that came before the turn was surely taken; the connection is a new one, or whole.
    """


async def looking_again(work: Callable[[], Awaitable[T]]) -> T:
    """Do what reads first what there is to do, and begin it again where that is not known any more."""
    for attempts_left in (3, 2, 1, 0):
        try:
            return await work()
        except LookAgain as again:
            if not attempts_left and again.__cause__ is not None:
                raise again.__cause__ from None
    raise AssertionError  # pragma: no cover - the last attempt ends otherwise


@dataclass(slots=True)
class Steps:
    """
    One runner's way of doing steps on one shard.

    Attributes:
        turn: whose they are.
        stop: set by Ctrl-C; work ends at the next safe place.
        listener: told what happens.
    """

    turn: Turn
    stop: asyncio.Event
    listener: Listener | None = None

    async def do(self, plan: Plan, number: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do a step; a broken connection is repaired once, and what was in doubt is decided by the step row."""
        where = f"{plan.revision} step {number}"
        step = plan.steps[number - 1]
        self.say(StepStarted(self.turn.shard, plan.revision, number, step.kind))
        started = time.monotonic()

        async def under_closure() -> None:
            await self.turn.refuse_open()
            await work()

        try:
            await self.surely(under_closure)
        except (InDoubt, ShardUnreachable):
            raise
        except ShardError as error:
            error.step = error.step or where
            if not isinstance(error, Fenced):  # which is no failure of the step: it is somebody else's by now
                await self._note_failure(plan, number, str(error))
            raise
        except pg.Error as error:
            number = self._failed_step(plan, number)
            failed = self._failure(error, f"{plan.revision} step {number}", plan.steps[number - 1])
            await self._note_failure(plan, number, str(failed))
            raise failed from error
        self.say(StepDone(self.turn.shard, plan.revision, number, time.monotonic() - started))

    async def surely(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what looks first how far it is; when the connection breaks, reconnect and look again."""
        for attempts_left in (2, 1, 0):
            try:
                await work()
            except (InDoubt, pg.OperationalError) as error:
                lost = isinstance(error, InDoubt) or is_connection_lost(error)
                if not lost or not attempts_left:
                    raise
                self.say(Waiting(self.turn.shard, "the connection was lost"))
                await self._come_back(error)
            else:
                return

    def pass_on(self) -> None:
        """Go on, unless Ctrl-C asked to stop; everything done so far is recorded."""
        if self.stop.is_set():
            raise Stopped

    def say(self, event: StepStarted | StepDone | Waiting | Warned) -> None:
        """Tell the listener, if there is one."""
        if self.listener:
            self.listener(event)

    def _failed_step(self, plan: Plan, first: int) -> int:
        """Tell which of the statements that run together the server refused."""
        sql = self.turn.session.failed.sql if self.turn.session.failed else None
        return next((n for n, step in enumerate(plan.steps, 1) if getattr(step, "sql", None) == sql), first)

    def _failure(self, error: pg.Error, where: str, step: object) -> ShardError:
        shard = self.turn.shard
        if isinstance(error, pg.LockNotAvailable):
            return LockNotObtained(f"{error.diag.message_primary}; apply again", shard=shard, step=where)
        if is_connection_lost(error):
            return InDoubt(shard=shard, step=where)
        failed = self.turn.session.failed
        caret = pointer(error, failed.sql) if failed else ""
        line = getattr(step, "line", None)
        script = f" (line {line} of the script)" if line else ""
        cure = _MADE_BESIDE if isinstance(error, _EXISTS) else ""
        said = f"{error.diag.message_primary or error}{script}{cure}"
        return StepFailed(f"{said}\n{caret}".rstrip(), shard=shard, step=where)

    async def _note_failure(self, plan: Plan, number: int, error: str) -> None:
        """Keep the reason in the ledger, if the connection still can; the error itself is raised anyway."""
        try:
            await self.turn.session.flight([self.turn.record_failure(plan.revision, number, error)])
        except (pg.Error, ShardError):
            return

    async def _come_back(self, lost: Exception) -> None:
        """Reconnect; where that fails, say whether it is known what became of the last COMMIT."""
        try:
            await self.turn.renew()
        except ShardUnreachable as gone:
            if not isinstance(lost, InDoubt):
                raise
            raise in_doubt(gone, self.turn.shard) from lost


def in_doubt(gone: ShardUnreachable, shard: str) -> InDoubt:
    """Say that nobody here knows what became of the last COMMIT, for the server did not come back."""
    return InDoubt(
        f"the connection broke during COMMIT and did not come back ({gone.args[0].removesuffix(_UNCHANGED)}); "
        "apply again: the ledger there decides whether the step happened",
        shard=shard,
    )
