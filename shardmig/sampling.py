"""
Trying a move on a few rows before it begins: everything is rolled back, in the flight that did it.

Few rows are tried at a time, as many as keep their locks for some milliseconds, and a row that is locked is waited for
a few milliseconds only, often. Whoever changes rows all the time gets fewer of them in his way, down to a single one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from psycopg import errors as pg

from shardmig.checks import shown
from shardmig.errors import LockNotObtained, PreflightFailed, StepFailed
from shardmig.keyset import batch_end, bound, end_of, last_key
from shardmig.patience import Patience
from shardmig.rehearsal import Piece, located, tried
from shardmig.session import Query

if TYPE_CHECKING:
    from shardmig.events import Listener
    from shardmig.keyset import Key, Range
    from shardmig.plan import Move
    from shardmig.session import Session
    from shardmig.turn import Turn

__all__ = ["refuse_lossy", "sample_ranges"]

_SAMPLE_ROWS = 500  # at each end of the table, for the lossy test
_FIRST_ROWS = 20  # at once; from then on what they took decides
_HELD_MS = 20.0  # that rows may be locked at a time
_HELD = Query("SELECT (extract(epoch FROM clock_timestamp() - transaction_timestamp()) * 1000)::float8")
_BUSY = (pg.SerializationFailure, pg.DeadlockDetected)


async def refuse_lossy(
    turn: Turn,
    revision: str,
    number: int,
    move: Move,
    *,
    stop: asyncio.Event | None = None,
    listener: Listener | None = None,
) -> None:
    """
    Try a sample: forward, then see what back would change, and roll everything back.

    The first and last rows of the table are tried, some at a time, so no lock outlives a round trip.

    Args:
        turn: whose turn it is; renewed after a lost connection.
        revision: of the plan.
        number: of the step.
        move: what is tried.
        stop: set by Ctrl-C.
        listener: told what is waited for.

    Raises:
        PreflightFailed: some rows would not come back as they were, and the script does not say `lossy`.
        LockNotObtained: rows stayed locked, or were changed all the time, for `lock_wait_s`.
        StepFailed, ShardUnreachable: as a batch of the move itself.
        Interrupted: a stop was asked for.
    """
    if move.lossy or move.back_check is None:
        return
    where = f"{revision} step {number}"
    for after, upto in await sample_ranges(turn.session, move, _SAMPLE_ROWS):
        lost = await _Sample(turn, where, move, after, upto, stop or asyncio.Event(), listener).lost()
        if lost:
            keys = [[str(value) for value in row] for row in lost]
            raise PreflightFailed(
                f"the move loses data: back(forward(x)) is not x for {len(lost)} sampled rows of {move.table}, "
                f"keys {shown(keys)}. Correct `forward` or `back`, or accept it with lossy=True",
                shard=turn.shard,
                step=where,
            )


@dataclass
class _Sample:
    """
    Rows of one end of the table, tried piece by piece.

    Attributes:
        after: exclusive lower bound; it moves up with each piece.
        upto: inclusive upper bound.
        left: rows that may still be tried.
        rows: how many are tried next.
        rows_max: that are tried at a time; halved where others are in the way, doubled where nobody is.
        piece: what is tried, or was tried last.
    """

    turn: Turn
    where: str
    move: Move
    after: Key | None
    upto: Key | None
    stop: asyncio.Event
    listener: Listener | None
    left: int = _SAMPLE_ROWS
    rows: int = _FIRST_ROWS
    rows_max: int = _SAMPLE_ROWS
    piece: Piece | None = None
    _patience: Patience = field(init=False)

    def __post_init__(self) -> None:
        """Be as patient as a batch of the move; the ledger knows nothing of what is only tried."""
        claim, stands, note = self._nothing, lambda: (self.after, self.rows), self._nothing
        self._patience = Patience(
            self.turn, self.where, self.move.table, claim, stands, note, self._split, self.stop, self.listener
        )

    async def lost(self) -> list[tuple[Any, ...]]:
        """Try all pieces; return the keys of the rows that would not come back."""
        found: list[tuple[Any, ...]] = []
        try:
            while self.left > 0:
                await self._patience.rest(0)
                found += await self._patience.do(self._try_next)
        except StepFailed as failure:
            raise await self._named(failure) from failure.__cause__
        return found

    async def _try_next(self) -> list[tuple[Any, ...]]:
        """Try one piece and go behind it."""
        session, move, self.piece = self.turn.session, self.move, None
        [found] = await session.flight([batch_end(move, self.after, self.upto, min(self.rows, self.left))])
        count, last = end_of(found)
        if not count:
            self.left = 0
            return []
        piece = self.piece = Piece("sampling", (move.forward, move.back_check or ""), self.after, last or self.upto)
        # What a move that was given up left in another table would seem to come back; the check of the move removes it.
        stale = [] if move.purge is None else [bound(move.purge, move, piece.after, piece.upto, target=True)]
        try:
            *_, lost, held = await tried(session, [*stale, *piece.queries(move), _HELD])
        except _BUSY:
            self._split()
            raise
        self.after, self.left = last, self.left - count if last else 0
        self.rows_max *= 2
        self.rows = max(min(int(count * _HELD_MS / max(held.value, 0.1)), self.rows_max), 1)
        return lost.rows

    def _split(self) -> bool:
        divisible = self.rows > 1
        self.rows = self.rows_max = max(min(self.rows, self.left) // 2, 1)
        return divisible

    async def _named(self, failure: StepFailed) -> LockNotObtained | StepFailed:
        """Name the row that a piece failed on; of rows that are never left alone long enough nothing is wrong."""
        cause = failure.__cause__
        if isinstance(cause, _BUSY):
            return LockNotObtained(
                f"rows of {self.move.table} are changed all the time, so that the move could not be tried on them; "
                "nothing is wrong with it, apply again later",
                shard=self.turn.shard,
                step=self.where,
            )
        if self.piece is None:
            return failure
        return (await located(self.turn.session, self.move, self.piece, failure, cause))[1]

    async def _nothing(self, _note: str | None = None) -> None:
        """Do nothing: no step row says how far a sample is."""


async def sample_ranges(session: Session, move: Move, rows: int) -> list[Range]:
    """Choose the first and the last rows of the table; all of them when there are few."""
    [first] = await session.flight([batch_end(move, None, None, rows)])
    count, upto = end_of(first)
    if count == 0:
        return []
    if count < rows:
        return [(None, None)]
    [last] = await session.flight([last_key(move, offset=rows)])
    return [(None, upto), ([str(part) for part in last.rows[0]], None)] if last.rows else [(None, upto)]
