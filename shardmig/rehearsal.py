"""
Rehearsing a move's statements on rows: tried, and rolled back in the flight that did it.

So a failure is narrowed down to the row that causes it: beginnings of the range are tried, shorter and longer ones by
halves, and nothing is moved out of order, for nothing is kept.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig.checks import shown
from shardmig.errors import ShardError, StepFailed
from shardmig.keyset import BY_INDEX, batch_end, bound, end_of
from shardmig.session import Query

if TYPE_CHECKING:
    from shardmig.keyset import Key
    from shardmig.plan import Move
    from shardmig.session import Result, Session

__all__ = ["Piece", "located", "rolled_back", "tried"]

_TRIES = 40
_HALVINGS = 24  # more than any batch can be halved, unless rows come and go meanwhile
_EVERY_ROW = 1 << 40  # more than any range holds
# What hangs on a row's values: beside class 22 and 23, two rows for one, a RAISE, a value too long for its index.
_ABOUT_ROWS = (pg.DataError, pg.IntegrityError, pg.CardinalityViolation, pg.RaiseException, pg.ProgramLimitExceeded)


@dataclass(frozen=True, slots=True)
class Piece:
    """
    Rows that statements work on at once.

    Attributes:
        doing: "moving", "purging", "comparing" or "sampling".
        statements: the move's texts, in order, with their `{batch}`.
        after: exclusive lower bound; None for the beginning.
        upto: inclusive upper bound; None for the end.
        of_target: whether they are rows of the move's target, by its key; else of the source.
        only: one condition more that the rows meet; None for all of the range.
        rows: how many there were when it failed; None before.
        culprit: key of the first row on which it fails; None where it is not known.
    """

    doing: str
    statements: tuple[str, ...]
    after: Key | None
    upto: Key | None
    of_target: bool = False
    only: str | None = None
    rows: int | None = None
    culprit: Key | None = None

    def queries(self, move: Move) -> list[Query]:
        """Bind the statements to the rows."""
        return [
            bound(sql, move, self.after, self.upto, target=self.of_target, only=self.only) for sql in self.statements
        ]

    def __str__(self) -> str:
        """Say which rows they are, so that an operator can look at them."""
        rows = "" if self.rows is None else "1 row, " if self.rows == 1 else f"{self.rows:,} rows, "
        after = "" if self.after is None else f" after {shown([self.after])}"
        upto = "" if self.upto is None else f" up to {shown([self.upto])}"
        return f"{rows}{'keys' if after or upto else 'all keys'}{after}{upto}"


async def located(
    session: Session, move: Move, piece: Piece, failure: StepFailed, cause: BaseException | None
) -> tuple[Piece, StepFailed]:
    """
    Find out on which row a piece failed, and say so in the failure.

    Returns:
        The piece with what was found, and the failure with the server's words, the rows and the cure.
    """
    if not move.seed:  # its rows are the plan's, and its table may hold none
        with suppress(pg.Error, ShardError):  # what cannot be looked at is not said: the failure is told in any case
            piece = replace(piece, rows=(await _end(session, move, piece, _EVERY_ROW))[0])
            if isinstance(cause, _ABOUT_ROWS):
                piece = replace(piece, culprit=await _culprit(session, move, piece))
    of = move.target if piece.of_target else move.table
    row = f"the first row that fails is {shown([piece.culprit])}. Correct it" if piece.culprit else "Correct the cause"
    said = (
        f"{failure.args[0]}\nrolled back while {piece.doing} {of}, {piece}; {row} (or the move: "
        "`shardmig amend` replaces a plan that is not finished) and apply again"
    )
    return piece, StepFailed(said, shard=failure.shard, step=failure.step)


async def _culprit(session: Session, move: Move, piece: Piece) -> Key | None:
    """
    Find the last row of the shortest beginning of a piece that fails, in at most `_HALVINGS` tries.

    Beginnings, not any part: so a row that fails only together with one before it is found as well. None when the piece
    fails no more, or for another reason.
    """
    if not await _fails(session, move, piece):
        return None
    sought, left = piece, piece.rows or 0  # the culprit is one of the `left` rows between the bounds of `sought`
    for _ in range(_HALVINGS):
        rows, middle = await _end(session, move, sought, max(left // 2, 1))
        if not rows or (middle and left == 1):
            return middle
        if middle is None:
            left = rows  # others were deleted meanwhile
        elif await _fails(session, move, replace(piece, upto=middle)):
            sought, left = replace(sought, upto=middle), left // 2
        else:
            sought, left = replace(sought, after=middle), left - left // 2
    return None


async def _end(session: Session, move: Move, piece: Piece, rows_max: int) -> tuple[int, Key | None]:
    [found] = await session.flight([batch_end(move, piece.after, piece.upto, rows_max, target=piece.of_target)])
    return end_of(found)


async def _fails(session: Session, move: Move, piece: Piece) -> bool:
    try:
        await rolled_back(session, [*piece.queries(move), Query("SET CONSTRAINTS ALL IMMEDIATE")])
    except _ABOUT_ROWS:
        return True
    return False


async def rolled_back(session: Session, queries: list[Query]) -> list[Result]:
    """Try queries; locked rows are not waited for long, but often."""
    for attempt in range(_TRIES):
        try:
            return await tried(session, queries)
        except (pg.LockNotAvailable, pg.DeadlockDetected, pg.SerializationFailure):
            if attempt + 1 == _TRIES:
                raise
            await asyncio.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - jitter
    raise AssertionError  # pragma: no cover - the last try returns or raises


async def tried(session: Session, queries: list[Query]) -> list[Result]:
    """Run queries once, in one flight whose transaction is rolled back."""
    lock_ms = session.settings.lock_timeout_ms[0]  # other rows are locked meanwhile
    limits = {**BY_INDEX, "lock_timeout": f"{lock_ms}ms", "statement_timeout": "10s"}
    local = Query("SELECT " + ", ".join(f"set_config('{name}', '{value}', true)" for name, value in limits.items()))
    # One snapshot for all: a row that an application inserts in between was never moved, and is not lost.
    begin = Query("BEGIN ISOLATION LEVEL REPEATABLE READ")
    try:
        return (await session.flight([begin, local, *queries, Query("ROLLBACK")]))[2:-1]
    except pg.Error:
        await session.roll_back()
        raise
