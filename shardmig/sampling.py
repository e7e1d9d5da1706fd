"""
Trying a move on a few rows before it begins: everything is rolled back, in the flight that did it.

No lock outlives a round trip, and a row that is locked is waited for a few milliseconds only, often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig.checks import shown
from shardmig.errors import PreflightFailed, StepFailed
from shardmig.keyset import batch_end, bound, end_of, last_key
from shardmig.patience import refusal
from shardmig.rehearsal import Piece, located, rolled_back

if TYPE_CHECKING:
    from shardmig.keyset import Range
    from shardmig.plan import Move
    from shardmig.session import Session

__all__ = ["refuse_lossy", "sample_ranges"]

_SAMPLE_ROWS = 500  # at each end of the table, for the lossy test


async def refuse_lossy(session: Session, revision: str, number: int, move: Move) -> None:
    """
    Try a sample: forward, then see what back would change, and roll everything back.

    The first and last rows of the table are tried, in one flight each, so no lock outlives a round trip.

    Raises:
        PreflightFailed: some rows would not come back as they were, and the script does not say `lossy`.
        LockNotObtained, StepFailed: as a batch of the move itself.
    """
    if move.lossy or move.back_check is None:
        return
    where = f"{revision} step {number}"
    for after, upto in await sample_ranges(session, move, _SAMPLE_ROWS):
        piece = Piece("sampling", (move.forward, move.back_check), after, upto)
        # What a move that was given up left in another table would seem to come back; the check of the move removes it.
        stale = [] if move.purge is None else [bound(move.purge, move, after, upto, target=True)]
        try:
            lost = (await rolled_back(session, [*stale, *piece.queries(move)]))[-1].rows
        except pg.Error as error:
            failed = session.failed
            failure = refusal(error, failed.sql if failed else "", move.table, session.shard.name, where)
            if isinstance(failure, StepFailed):
                _, failure = await located(session, move, piece, failure, error)
            raise failure from error
        if lost:
            keys = [[str(value) for value in row] for row in lost]
            raise PreflightFailed(
                f"the move loses data: back(forward(x)) is not x for {len(lost)} sampled rows of {move.table}, "
                f"keys {shown(keys)}. Correct `forward` or `back`, or accept it with lossy=True",
                shard=session.shard.name,
                step=where,
            )


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
