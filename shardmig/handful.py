"""
A handful of rows: a flag with a small move goes from OLD to LIVE within one flight.

First what the move would lose is tried and rolled back, then the flag goes to DUAL, and everything else is one
transaction: drain, move, check, record, flip. That is an order of the same steps in which nobody else comes between
them, and no guard is weaker for it:

* The drain's looks begin after DUAL is committed. The flag's row is locked before them and stays so, hence what they
  find is about this flip (the epoch need not be compared), and `drained` is written only if nobody was open (W1).
* Each statement has a snapshot of its own. The rows are counted and their last key is read behind the looks; the check
  sees what was moved and whatever dual writers have committed until then, each of them whole or not at all.
* `drained`, `new_valid` and the flip to LIVE are one UPDATE, which the trigger of the ledger judges by the guards of
  three (W1, W2), and `hold_turn` fences all of it: rows, record and flip are committed by the runner whose turn it is,
  or by nobody.
* Rows stay locked for a few milliseconds longer than in a batch, until the COMMIT that is in the same flight. Nobody
  waits in a circle: whoever writes rows locks nothing of the ledger, operators' functions lock the flag first, as this
  does, and here a lock is waited for no longer than in a batch, which is less than deadlock_timeout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardmig import switching
from shardmig.flight import refuse_nothing, refuse_rows
from shardmig.keyset import bound, extent
from shardmig.session import Query
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.plan import Move, Plan
    from shardmig.turn import Turn

__all__ = ["Moved", "flip", "moved", "tried"]

_LOCKED_MS = 100  # rows are locked meanwhile, until the last statement has ended; a batch aims at a few milliseconds


class Moved(NamedTuple):
    """
    The transaction that moves a plan's rows.

    Attributes:
        queries: of it, without BEGIN and COMMIT.
        records: the query that answers with the number of rows, for each step.
    """

    queries: list[Query]
    records: dict[int, Query]


def tried(turn: Turn, plan: Plan) -> list[Query]:
    """Refuse the flight if a move would lose something; for a transaction in one snapshot that is rolled back."""
    queries = []
    for _, move in plan.moves:
        if not move.lossy and move.back_check is not None:
            queries += [bound(move.forward, move, None, None), refuse_rows(bound(move.back_check, move, None, None))]
    return [_limits(turn, statements=len(queries)), *queries] if queries else []


def flip(turn: Turn, plan: Plan, source: State, target: State) -> Query:
    """Take an edge; behind `hold`. A flag that is elsewhere refuses it."""
    taken = Query(
        "UPDATE shardmig.flag SET state = $4 WHERE shard = $1 AND flag = $2 AND state = $3",
        (turn.shard, plan.flag, int(source), int(target)),
    )
    return refuse_nothing(taken)


def moved(turn: Turn, plan: Plan, *, rows_max: int) -> Moved:
    """Drain, move all rows, check them and go LIVE; behind `hold`. More rows than `rows_max` refuse it."""
    flag = (turn.shard, plan.flag, int(State.DUAL))
    records = {number: _record(turn, plan, number, move, rows_max) for number, move in plan.moves}
    queries = [
        _limits(turn, statements=sum(1 + len(list(_checks(move))) for _, move in plan.moves)),
        Query("SELECT FROM shardmig.flag WHERE shard = $1 AND flag = $2 AND state = $3 FOR UPDATE", flag),
        *switching.looks(turn.session, refuse=True),
    ]
    for number, move in plan.moves:
        queries += [records[number], bound(move.forward, move, None, None), *_checks(move)]
    live = Query(
        "UPDATE shardmig.flag SET drained = true, new_valid = true, state = $4 "
        "WHERE shard = $1 AND flag = $2 AND state = $3",
        (*flag, int(State.LIVE)),
    )
    return Moved([*queries, refuse_nothing(live)], records)


def _checks(move: Move) -> Iterator[Query]:
    yield refuse_rows(bound(move.check, move, None, None))
    if move.orphans is not None:
        yield refuse_rows(bound(move.orphans, move, None, None, target=True))


def _record(turn: Turn, plan: Plan, number: int, move: Move, rows_max: int) -> Query:
    found = extent(move, rows_max + 1)
    return Query(_MOVED.format(found=found), (turn.shard, plan.revision, number, turn.term, rows_max))


def _limits(turn: Turn, *, statements: int) -> Query:
    """Let so many statements share the time: the server's own limit is for each."""
    session = turn.session
    lock_ms = min(session.settings.lock_timeout_ms[0], max(session.deadlock_timeout_ms / 2, 1))
    return Query(
        "SELECT set_config('lock_timeout', $1, true), set_config('statement_timeout', $2, true)",
        (f"{lock_ms:.0f}ms", f"{max(_LOCKED_MS // max(statements, 1), 1)}ms"),
    )


# What claim_step, begin_move, record_batch, record_check and record_step write, each for another transaction. It comes
# before the rows and behind the drain, refuses more of them than a handful, and answers with how many they are.
_MOVED = """
WITH found AS MATERIALIZED ({found})
UPDATE shardmig.step AS s SET status = 'DONE', term = $4, attempts = s.attempts + 1, error = NULL,
    started_at = coalesce(s.started_at, clock_timestamp()), finished_at = clock_timestamp(),
    direction = 'forward', bounded_at = clock_timestamp(), upto = found.last, cursor = found.last,
    rows = found.rows, rows_estimated = found.rows, batches = (found.rows > 0)::int,
    check_cursor = NULL, checked_at = clock_timestamp()
FROM found WHERE s.shard = $1 AND s.revision = $2 AND s.number = $3 AND s.status <> 'DONE'
RETURNING found.rows / (found.rows <= $5::bigint)::int
"""
