"""
The turn: whose it is to write as runner, and what a runner records.

Recording is done by server-side functions (`ledger.sql`) whose first write is the step row itself, so that a record
commits with what it records and a runner that lost its turn writes nothing. Such a statement is a `Query`, ready to be
put into a flight.
"""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager, suppress
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import planfile
from shardmig.errors import Fenced, ShardError, SwitchedMeanwhile
from shardmig.ledger import os_user, translated
from shardmig.plan import step_sha256
from shardmig.records import STEP_COLUMNS, StepRow
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from shardmig.keyset import Position
    from shardmig.plan import Plan
    from shardmig.session import Result, Session

__all__ = ["Turn", "begin_anew", "begin_migration", "finish_migration", "holder_name", "in_turn"]

_CLAIM = "SELECT shardmig.claim_step($1, $2, $3, $4)"
_STEP = f"SELECT {STEP_COLUMNS} FROM shardmig.step WHERE shard = $1 AND revision = $2 AND number = $3"


@cache
def holder_name() -> str:
    """Name this runner for others: user, host and process."""
    return f"{os_user()}@{socket.gethostname()} pid {os.getpid()}"


class Turn:
    """
    A runner's turn on one shard: its session, which holds the shard's lock, and its term, which fences its writes.

    Attributes:
        session: the connection; the same object after a renewal.
        term: raised by every take and every renewal.
        closed: what is done in this turn relies on maintenance: 1 read-only, 2 offline; 0 does not.
    """

    __slots__ = ("_raised", "closed", "session", "term")

    def __init__(self, session: Session, term: int) -> None:
        self.session = session
        self.term = term
        self.closed = 0
        self._raised = 0

    @classmethod
    async def take(cls, session: Session) -> Turn:
        """Become the one who writes to this shard; the session holds its runner lock and the ledger is there."""
        return (await cls.take_and(session, []))[0]

    @classmethod
    async def take_and(cls, session: Session, queries: Sequence[Query]) -> tuple[Turn, list[Result]]:
        """Take the turn and write in the same transaction; return what the queries returned."""
        with translated(session.shard.name):
            taken, *results = await session.transact([_raise_term(session), *queries])
        return cls(session, int(taken.value)), results

    @property
    def shard(self) -> str:
        """The shard's name."""
        return self.session.shard.name

    async def renew(self) -> None:
        """
        Reconnect after a broken connection and raise the term, so that nothing of the old connection counts any more.

        Raises:
            Fenced: another runner worked here meanwhile.
            SwitchedMeanwhile: the shard serves, which was closed: a standby that took over may lack that it was.
        """
        await self.session.reconnect()
        # A raise of ours whose answer was lost may have happened; another's bears another name, or none any more.
        upto, self._raised = self.term + self._raised, self._raised + 1
        [taken] = await self.session.flight([_raise_term(self.session, since=self.term, upto=upto)])
        if not taken.rows:
            raise Fenced(None, shard=self.shard)
        self.term, self._raised = int(taken.value), 0
        await self.refuse_open()

    async def refuse_open(self) -> None:
        """
        Make sure that nobody is let in while this turn relies on it.

        Raises:
            SwitchedMeanwhile: people have opened the shard, or a failover has lost that it was closed.
        """
        if self.closed:
            found = await self.session.execute("SELECT maintenance FROM shardmig.shard WHERE shard = $1", [self.shard])
            if found.value < self.closed:
                raise SwitchedMeanwhile(
                    "the shard serves again, though what is done there wants nobody inside: its maintenance was lifted "
                    "or lost in a failover; apply again",
                    shard=self.shard,
                )

    async def claim(self, revision: str, number: int) -> StepRow:
        """
        Put this term into a step row, then read the row.

        Waits for the row's lock, so a transaction in doubt has ended one way or the other when the cursor is read.

        Raises:
            Fenced: another runner took the shard over.
        """
        with translated(self.shard, f"{revision} step {number}"):
            _, claimed = await self.session.flight(
                [self.claiming(revision, number), Query(_STEP, (self.shard, revision, number))]
            )
        return StepRow(*claimed.rows[0])

    def claiming(self, revision: str, number: int) -> Query:
        """Claim a step in the transaction that does it: for a step that nobody can have done."""
        return Query(_CLAIM, (self.shard, revision, number, self.term))

    def taking(self, *, ends: bool) -> Query:
        """
        Take the turn in a flight that does more, when the term before it was just read; refused if it is not that one.

        A turn that `ends` with its flight names no holder.
        """
        return Query(
            "UPDATE shardmig.runner SET term = $2 / (term = $2 - 1)::int, holder = $3, "  # by dividing by zero
            "since = CASE WHEN $3::text <> '' THEN clock_timestamp() END WHERE shard = $1",
            (self.shard, self.term, None if ends else holder_name()),
        )

    def hold(self) -> Query:
        """Refuse the transaction unless this is still our turn; a successor waits until it ends."""
        return Query("SELECT shardmig.hold_turn($1, $2)", (self.shard, self.term))

    def record_step(self, revision: str, number: int) -> Query:
        """Record a step as done: the first write of the transaction that does it."""
        return Query("SELECT shardmig.record_step($1, $2, $3, $4)", (self.shard, revision, number, self.term))

    def record_batch(self, revision: str, number: int, *, expected: Position, reached: Position, rows: int) -> Query:
        """Record a batch: the move goes from `expected` to `reached`, the first write of the batch's transaction."""
        return Query(
            "SELECT shardmig.record_batch($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            (self.shard, revision, number, self.term, expected[0], reached[0], expected[1], reached[1], rows),
        )

    def begin_move(
        self, revision: str, number: int, direction: str, *, upto: list[str] | None, rows_estimated: int | None
    ) -> Query:
        """Note where a move ends and start it from nothing; refused unless the flag's state is drained (W1, W5)."""
        return Query(
            "SELECT shardmig.begin_move($1, $2, $3, $4, $5, $6, $7)",
            (self.shard, revision, number, self.term, direction, upto, rows_estimated),
        )

    def record_check(
        self, revision: str, number: int, *, expected: list[str] | None, reached: list[str] | None, finished: bool
    ) -> Query:
        """Record how far rows were compared; the check's cursor goes from `expected` to `reached`."""
        return Query(
            "SELECT shardmig.record_check($1, $2, $3, $4, $5, $6, $7)",
            (self.shard, revision, number, self.term, expected, reached, finished),
        )

    def record_valid(self, flag: str, direction: str, epoch: int) -> Query:
        """Record that all rows of a flag were moved and agree; refused, steps and all, if it was switched meanwhile."""
        return Query(
            "SELECT shardmig.record_valid($1, $2, $3, $4, $5)", (self.shard, flag, self.term, direction, epoch)
        )

    def record_waiting(self, revision: str, number: int, reason: str | None) -> Query:
        """Say why a move rests, for whoever looks at the shard; None when it goes on."""
        return Query(
            "UPDATE shardmig.step SET waiting = $5 WHERE shard = $1 AND revision = $2 AND number = $3 AND term = $4",
            (self.shard, revision, number, self.term, reason),
        )

    def record_failure(self, revision: str, number: int, error: str) -> Query:
        """Keep the reason why a step failed, in this turn; what it did was rolled back."""
        return Query(
            "UPDATE shardmig.step SET status = 'FAILED', error = $5, term = $4 "
            "WHERE shard = $1 AND revision = $2 AND number = $3 AND term <= $4 AND status <> 'DONE'",
            (self.shard, revision, number, self.term, error[:2000]),
        )

    def record_proof(self, revision: str, number: int, error: str) -> Query:
        """Keep what the proof of whole schemas found on a step that is done; nobody goes on before people decide."""
        return Query(
            "UPDATE shardmig.step SET error = $5 "
            "WHERE shard = $1 AND revision = $2 AND number = $3 AND term <= $4 AND status = 'DONE'",
            (self.shard, revision, number, self.term, error[:2000]),
        )

    def reopen_steps(self, revision: str, numbers: Sequence[int]) -> Query:
        """
        Make steps that this revision has behind it lie ahead again.

        Together with a flip back this says that the runner took it, not people: apply goes forward again.
        """
        return Query(
            "WITH unfinished AS (UPDATE shardmig.migration SET finished_at = NULL, finished_by = NULL "
            "WHERE shard = $1 AND revision = $2) "
            "UPDATE shardmig.step SET status = 'PENDING', finished_at = NULL "
            "WHERE shard = $1 AND revision = $2 AND number = ANY ($3::int[]) AND term <= $4",
            (self.shard, revision, list(numbers), self.term),
        )

    def end(self) -> Query:
        """Say that nobody works on the shard any more; a successor's entry is left alone."""
        return Query(
            "UPDATE shardmig.runner SET holder = NULL, since = NULL WHERE shard = $1 AND term = $2",
            (self.shard, self.term),
        )


@asynccontextmanager
async def in_turn(session: Session) -> AsyncIterator[Turn]:
    """Hold the turn for a piece of work, and say afterwards that nobody works on the shard any more."""
    turn = await Turn.take(session)
    try:
        yield turn
    finally:
        with suppress(pg.Error, ShardError):
            await session.flight([turn.end()])


def _raise_term(session: Session, *, since: int | None = None, upto: int = 0) -> Query:
    """Take the turn; with `since`, from that term or an older one, or `upto` a newer one that bears our name."""
    among = "" if since is None else " AND (term <= $3 OR term <= $4 AND holder = $2)"
    return Query(
        "UPDATE shardmig.runner SET term = term + 1, holder = $2, since = clock_timestamp() "
        f"WHERE shard = $1{among} RETURNING term",
        (session.shard.name, holder_name(), *(() if since is None else (since, upto))),
    )


def begin_migration(shard: str, plan: Plan, *, position: int, text: str | None = None) -> list[Query]:
    """
    Enter a plan, its steps and its flag; everything is there already when it was begun before.

    The plan kept is the one first begun: `pending` compares it with the committed one.

    Args:
        shard: the shard's name.
        plan: the plan.
        position: its place in the history, from 1.
        text: what is kept of it; the plan as a file by default.
    """
    entered = _entered(shard, plan, position, text, term=0, done=())
    return [Query(f"{query.sql} ON CONFLICT DO NOTHING", query.params) for query in entered]


def begin_anew(turn: Turn, plan: Plan, *, position: int, done: Collection[int]) -> list[Query]:
    """
    Enter a plan that nobody has begun, its steps and its flag; refused if somebody has.

    Args:
        turn: who may record the steps without claiming them first.
        plan: the plan.
        position: its place in the history, from 1.
        done: steps that are executed behind this, in the same transaction.
    """
    return _entered(turn.shard, plan, position, None, term=turn.term, done=done)


def _entered(
    shard: str, plan: Plan, position: int, text: str | None, *, term: int, done: Collection[int]
) -> list[Query]:
    written, sha256, hashes = _written(plan)
    numbers, kinds = range(1, len(plan.steps) + 1), [step.kind for step in plan.steps]
    states = ["DONE" if number in done else "PENDING" for number in numbers]
    return [
        Query(
            "INSERT INTO shardmig.migration (shard, revision, position, flag, sha256, plan, started_by) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7)",
            (shard, plan.revision, position, plan.flag, sha256, text or written, holder_name()),
        ),
        Query(_ENTER_STEPS, (shard, plan.revision, list(numbers), kinds, hashes, states, term)),
        Query(
            "INSERT INTO shardmig.flag (shard, flag, revision, has_move, cross_table, touch_source, needs) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7)",
            (shard, plan.flag, plan.revision, plan.has_move, plan.cross_table, plan.touch_source, list(plan.needs)),
        ),
    ]


_ENTER_STEPS = """
INSERT INTO shardmig.step (shard, revision, number, kind, sha256, status, term, attempts, started_at, finished_at)
SELECT $1, $2, n, k, h, s, $7, (s = 'DONE')::int, CASE WHEN s = 'DONE' THEN clock_timestamp() END,
    CASE WHEN s = 'DONE' THEN clock_timestamp() END
FROM unnest($3::int[], $4::text[], $5::text[], $6::text[]) AS entered (n, k, h, s)"""


@lru_cache(maxsize=1024)
def _written(plan: Plan) -> tuple[str, str, list[str]]:
    """Write a plan, hash it and its steps: once, not once a shard."""
    return planfile.dumps(plan), plan.sha256, [step_sha256(step) for step in plan.steps]


def finish_migration(shard: str, revision: str) -> Query:
    """Note that no step of a plan is left, if that is so, and that this runner saw to it."""
    return Query(
        "UPDATE shardmig.migration SET finished_at = coalesce(finished_at, clock_timestamp()), "
        "finished_by = coalesce(finished_by, $3) WHERE shard = $1 AND revision = $2 AND NOT EXISTS "
        "(SELECT FROM shardmig.step s WHERE s.shard = $1 AND s.revision = $2 AND s.status <> 'DONE')",
        (shard, revision, holder_name()),
    )
