"""
Moving rows: batch after batch, each committed together with its own progress.

A batch is one flight: the step row (fence and cursor) first, then the rows, then COMMIT. A crash anywhere repeats at
most one batch, and repeating one changes nothing, for a move overwrites what it writes. Bounds are found by walking the
key's index, never by arithmetic on ids, and are passed as parameters.

Directions: forward fills new from old (flag in DUAL), back fills old from new (flag in LIVE, after DONE). The check
compares in the same direction, over the whole table, and repairs a range before it gives up on it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from psycopg import errors as pg

from shardmig.errors import (
    CheckFailed,
    InDoubt,
    LockNotObtained,
    PreflightFailed,
    ShardBusy,
    ShardError,
    ShardUnreachable,
    StepFailed,
)
from shardmig.events import BatchDone, Waiting
from shardmig.ledger import translated
from shardmig.pace import Servo
from shardmig.plan import bind_batch, quote
from shardmig.session import Query, is_connection_lost, is_transient, pointer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from shardmig.config import Pace
    from shardmig.events import Listener
    from shardmig.ledger import StepRow, Turn
    from shardmig.plan import Move
    from shardmig.session import Result, Session

__all__ = ["Direction", "MoveRun", "disagreeing", "refuse_lossy"]

Direction = Literal["forward", "back"]
Key = list[str]
T = TypeVar("T")

_SAMPLE_ROWS = 500  # at each end of the table, for the lossy test
_CHECK_ROWS = 5_000  # a check reads only; one range is one short snapshot
_SHOWN = 20  # disagreeing keys in a message
_LOST_S = 60.0  # how long a lost server may stay away
_LOCK_MS = 100  # below deadlock_timeout: the mover gives way before the server picks a victim
_STATEMENT_MS = 10_000
# A batch is a few rows of an index range, but the planner guesses a third of the table for a row comparison and would
# hash whole tables for it, above all on a new table that nobody analyzed yet.
_BY_INDEX = {"enable_hashjoin": "off", "enable_mergejoin": "off", "enable_seqscan": "off", "jit": "off"}


@dataclass(slots=True)
class MoveRun:
    """
    One move on one shard, from where it stands to its end.

    Attributes:
        turn: whose turn it is.
        revision: of the plan.
        number: of the step.
        move: what is moved.
        direction: "forward" or "back".
        pace: how fast.
        stop: set by Ctrl-C; the batch under way is finished and recorded, then the run returns.
        listener: told of each batch and wait.
    """

    turn: Turn
    revision: str
    number: int
    move: Move
    direction: Direction
    pace: Pace
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    listener: Listener | None = None
    _servo: Servo = field(init=False)
    _row: StepRow = field(init=False)
    _began: float = field(init=False, default=0.0)
    _rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Start the servo."""
        self._servo = Servo(self.pace)

    async def run(self) -> bool:
        """
        Move what is left, then check all.

        Returns:
            True when every row was moved and agrees; False when `stop` was set before.

        Raises:
            Fenced: another runner took the shard over, or the flag was switched.
            CheckFailed: rows disagree that a repair did not mend; the message shows keys.
            StepFailed: the server refused the move's SQL.
        """
        self._began = time.monotonic()
        await self._persistently(self._claim)
        if self._row.checked_at is not None and self._row.direction == self.direction:
            return True
        await self._persistently(self._bound)
        while self._row.cursor != self._row.upto:
            if self.stop.is_set():
                return False
            await self._persistently(self._next_batch)
        if self.move.cross_table and self.direction == "forward":
            await self._persistently(self._purge_beyond)
        return await self._check_all()

    # ----------------------------------------------------------------------------------------------------------------
    # Batches

    @property
    def _sql(self) -> str:
        sql = self.move.forward if self.direction == "forward" else self.move.back
        if sql is None:
            raise PreflightFailed(
                f"{self.revision} cannot be moved back: its script gives no `back`", shard=self.turn.shard
            )
        return sql

    async def _claim(self) -> None:
        self._row = await self.turn.claim(self.revision, self.number)

    async def _bound(self) -> None:
        """Read the last key to move, after the drain: whoever writes later rows writes both representations."""
        if self._row.bounded_at is not None and self._row.direction == self.direction:
            return
        session = self.turn.session
        last = await session.execute(_last_key(self.move))
        upto = list(last.rows[0]) if last.rows else None
        estimate = await session.execute(
            "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = $1::regclass", [_table(self.move)]
        )
        with translated(self.turn.shard, self._where):
            await session.transact(
                [
                    # Nothing moved yet in this direction: the cursor starts from nothing.
                    self.turn.record_batch(self.revision, self.number, expected=self._row.cursor, reached=None, rows=0),
                    Query(
                        "UPDATE shardmig.step SET direction = $4, bounded_at = clock_timestamp(), upto = $5, "
                        "rows_estimated = $6, rows = 0, batches = 0, check_cursor = NULL, checked_at = NULL "
                        "WHERE shard = $1 AND revision = $2 AND number = $3",
                        (self.turn.shard, self.revision, self.number, self.direction, upto, estimate.value),
                    ),
                ]
            )
        await self._claim()

    async def _next_batch(self) -> None:
        """Move one range of keys: step row, rows and COMMIT in one flight."""
        after, upto = self._row.cursor, self._row.upto
        assert upto is not None  # noqa: S101 - an empty table has nothing left
        found = await self.turn.session.execute(
            _range_end(self.move, lower=after is not None), [*(after or ()), *upto, self._servo.rows]
        )
        rows, last = _end_of(found)
        # A short range is the last one; it ends at upto itself, which a row deleted meanwhile may have held.
        reached = last if last is not None and rows >= self._servo.rows else upto
        started = time.monotonic()
        await self._transact(
            [
                self.turn.record_batch(self.revision, self.number, expected=after, reached=reached, rows=rows),
                self._bind(self._sql, after, reached),
                *self._purge(after, reached),
            ]
        )
        elapsed_s = time.monotonic() - started
        self._row = replace(self._row, cursor=reached, rows=self._row.rows + rows, batches=self._row.batches + 1)
        self._servo.done(rows, elapsed_s * 1000)
        self._tell(rows)
        if (pause_s := self._servo.pause_s(rows, elapsed_s)) > 0:
            await asyncio.sleep(pause_s)

    async def _purge_beyond(self) -> None:
        """Remove target rows whose source is gone, beyond the last key of the source."""
        queries = self._purge(self._row.upto, None)
        if queries:
            await self._transact(
                [
                    self.turn.record_batch(
                        self.revision, self.number, expected=self._row.cursor, reached=self._row.cursor, rows=0
                    ),
                    *queries,
                ]
            )

    def _purge(self, after: Key | None, upto: Key | None) -> list[Query]:
        """
        Delete target rows of a range whose source row is gone (dead values of a move that was given up).

        First the candidates are locked, then a second statement, whose snapshot is newer than the locks, looks again:
        a writer that was re-creating the pair meanwhile is seen, so its row stays.
        """
        if self.direction != "forward" or self.move.orphans is None or self.move.purge is None:
            return []
        lock = self._bind(f"{self.move.orphans} FOR UPDATE", after, upto, key=self.move.target_key)
        return [lock, self._bind(self.move.purge, after, upto, key=self.move.target_key)]

    def _bind(self, sql: str, after: Key | None, upto: Key | None, *, key: tuple[str, ...] | None = None) -> Query:
        alias = self.move.alias if key is None else None
        text = bind_batch(sql, key or self.move.key, lower=after is not None, upper=upto is not None, alias=alias)
        return Query(text, [*(after or ()), *(upto or ())])

    async def _transact(self, queries: Sequence[Query]) -> None:
        local = {"lock_timeout": f"{_LOCK_MS}ms", "statement_timeout": f"{_STATEMENT_MS}ms", **_BY_INDEX}
        with translated(self.turn.shard, self._where):
            await self.turn.session.transact(queries, local=local)

    # ----------------------------------------------------------------------------------------------------------------
    # Check

    async def _check_all(self) -> bool:
        """Compare every row, range after range, in one snapshot each; rows written since are compared too."""
        while True:
            if self.stop.is_set():
                return False
            if await self._persistently(self._check_next):
                return True

    async def _check_next(self) -> bool:
        """Check one range, repair it if rows disagree, and record how far; True when it was the last."""
        after = self._row.check_cursor
        found = await self.turn.session.execute(
            _range_end(self.move, lower=after is not None, upper=False), [*(after or ()), _CHECK_ROWS]
        )
        rows, last = _end_of(found)
        upto = last if rows >= _CHECK_ROWS else None
        keys = await self._disagreeing(after, upto)
        if keys:
            await self._transact(
                [
                    self.turn.record_batch(
                        self.revision, self.number, expected=self._row.cursor, reached=self._row.cursor, rows=0
                    ),
                    self._bind(self._sql, after, upto),
                    *self._purge(after, upto),
                ]
            )
            keys = await self._disagreeing(after, upto)
        if keys:
            raise CheckFailed(
                f"{len(keys)} rows of {self.move.table} disagree after move and repair, first keys: "
                f"{', '.join('(' + ', '.join(key) + ')' for key in keys[:_SHOWN])}; the flag stays where it is. "
                "Correct those rows or the move",
                shard=self.turn.shard,
                step=self._where,
            )
        with translated(self.turn.shard, self._where):
            await self.turn.session.transact(
                [
                    self.turn.record_batch(
                        self.revision, self.number, expected=self._row.cursor, reached=self._row.cursor, rows=0
                    ),
                    Query(
                        "UPDATE shardmig.step SET check_cursor = $4, "
                        "checked_at = CASE WHEN $5::boolean THEN clock_timestamp() END "
                        "WHERE shard = $1 AND revision = $2 AND number = $3",
                        (self.turn.shard, self.revision, self.number, upto or after, upto is None),
                    ),
                ]
            )
        self._row = replace(self._row, check_cursor=upto or after)
        return upto is None

    async def _disagreeing(self, after: Key | None, upto: Key | None) -> list[Key]:
        return await disagreeing(self.turn.session, self.move, self.direction, after, upto)

    # ----------------------------------------------------------------------------------------------------------------
    # What passes, and what does not

    @property
    def _where(self) -> str:
        return f"{self.revision} step {self.number}"

    async def _persistently(self, work: Callable[[], Awaitable[T]]) -> T:
        """
        Do one piece of work; what passes is waited for, and progress is never discarded.

        Raises:
            LockNotObtained: rows stayed locked for `lock_wait_s`.
            StepFailed: the server refuses the SQL, or a batch of one row is still too slow.
            ShardUnreachable: the server stayed away.
        """
        deadline = time.monotonic() + self.turn.session.settings.lock_wait_s
        for attempt in itertools.count(1):
            try:
                return await work()
            except (InDoubt, pg.OperationalError) as error:
                if isinstance(error, InDoubt) or is_connection_lost(error):
                    await self._come_back()
                elif time.monotonic() > deadline or not self._passes(error):
                    raise self._failure(error) from error
            except pg.Error as error:
                raise self._failure(error) from error
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(0.02 * 2**attempt, 0.5))  # noqa: S311 - jitter
        raise AssertionError  # pragma: no cover - count() never ends

    def _passes(self, error: pg.OperationalError) -> bool:
        """Whether waiting helps; locks and timeouts also make the next batch smaller."""
        if isinstance(error, pg.LockNotAvailable | pg.QueryCanceled):
            smallest = self._servo.rows == 1
            self._servo.too_slow()
            self._say("rows are locked" if isinstance(error, pg.LockNotAvailable) else "a batch took too long")
            return isinstance(error, pg.LockNotAvailable) or not smallest
        return is_transient(error)

    async def _come_back(self) -> None:
        """Reconnect and claim the step anew: what is in doubt is decided by the step row alone."""
        deadline = time.monotonic() + _LOST_S
        self._say("the connection was lost")
        while True:
            try:
                await self.turn.renew()
                await self._claim()
            except (ShardUnreachable, ShardBusy, InDoubt, pg.OperationalError) as error:
                if self.stop.is_set() or time.monotonic() > deadline:
                    raise self._failure(error) from error
                await asyncio.sleep(0.2)
            else:
                return

    def _failure(self, error: Exception) -> ShardError:
        if isinstance(error, ShardError):
            return error
        shard, where = self.turn.shard, self._where
        if isinstance(error, pg.LockNotAvailable):
            return LockNotObtained(
                f"rows of {self.move.table} stayed locked; nothing is lost, apply again later", shard=shard, step=where
            )
        if isinstance(error, pg.Error):
            failed = self.turn.session.failed
            caret = pointer(error, failed.sql) if failed else ""
            return StepFailed(f"{error.diag.message_primary or error}\n{caret}".rstrip(), shard=shard, step=where)
        return StepFailed(str(error), shard=shard, step=where)

    def _say(self, reason: str) -> None:
        if self.listener:
            self.listener(Waiting(self.turn.shard, reason))

    def _tell(self, rows: int) -> None:
        if self.listener is None:
            return
        self._rows += rows
        elapsed_s = max(time.monotonic() - self._began, 1e-6)
        speed = self._rows / elapsed_s
        estimated = self._row.rows_estimated
        left = max(estimated - self._row.rows, 0) if estimated else None
        self.listener(
            BatchDone(
                self.turn.shard, self.revision, self.number, rows, self._row.rows, estimated, speed,
                left / speed if left is not None and speed > 0 else None,
            )
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Comparing


async def disagreeing(
    session: Session, move: Move, direction: Direction, after: Key | None = None, upto: Key | None = None
) -> list[Key]:
    """
    Find rows that disagree in a range of keys, in the direction of authority and both ways.

    Args:
        session: on the shard.
        move: whose check is asked.
        direction: "forward": new against forward(old), and target rows without a source; "back": old against back(new).
        after: exclusive lower bound; None for the beginning.
        upto: inclusive upper bound; None for the end.

    Returns:
        Their keys as text, in no particular order; empty when all is well.
    """
    params = [*(after or ()), *(upto or ())]
    lower, upper = after is not None, upto is not None
    queries = []
    check = move.check if direction == "forward" else move.back_check
    if check is not None:
        queries.append(Query(bind_batch(check, move.key, lower=lower, upper=upper, alias=move.alias), params))
    if direction == "forward" and move.orphans is not None:
        queries.append(Query(bind_batch(move.orphans, move.target_key, lower=lower, upper=upper), params))
    if not queries:
        return []
    results = await session.transact(queries, local=_BY_INDEX)
    return [[str(value) for value in row] for result in results for row in result.rows]


async def refuse_lossy(session: Session, revision: str, number: int, move: Move) -> None:
    """
    Try a sample: forward, then see what back would change, and roll everything back.

    The first and last rows of the table are tried, in one flight each, so no lock outlives a round trip.

    Raises:
        PreflightFailed: some rows would not come back as they were, and the script does not say `lossy`.
    """
    if move.lossy or move.back_check is None:
        return
    for after, upto in await _sample_ranges(session, move):
        params = [*(after or ()), *(upto or ())]
        forward, back_check = (
            bind_batch(sql, move.key, lower=after is not None, upper=upto is not None, alias=move.alias)
            for sql in (move.forward, move.back_check)
        )
        results = await session.flight(
            [
                Query("BEGIN"),
                Query("SELECT set_config('lock_timeout', '1s', true)"),
                Query(forward, params),
                Query(back_check, params),
                Query("ROLLBACK"),
            ]
        )
        if lost := results[3].rows:
            keys = ", ".join("(" + ", ".join(map(str, row)) + ")" for row in lost[:_SHOWN])
            raise PreflightFailed(
                f"the move loses data: back(forward(x)) is not x for {len(lost)} sampled rows of {move.table}, "
                f"keys {keys}. Correct `forward` or `back`, or accept it with lossy=True",
                shard=session.shard.name,
                step=f"{revision} step {number}",
            )


async def _sample_ranges(session: Session, move: Move) -> list[tuple[Key | None, Key | None]]:
    first = await session.execute(_range_end(move, lower=False, upper=False), [_SAMPLE_ROWS])
    if not first.rows:
        return []
    count, upto = _end_of(first)
    if count < _SAMPLE_ROWS:
        return [(None, None)]
    last = await session.execute(_last_key(move, "OFFSET $1"), [_SAMPLE_ROWS])
    return [(None, upto), (list(last.rows[0]), None)] if last.rows else [(None, upto)]


# --------------------------------------------------------------------------------------------------------------------
# Walking the key


def _table(move: Move) -> str:
    return ".".join(quote(part) for part in move.table.split("."))


def _columns(move: Move, suffix: str = "") -> str:
    # Qualified: in ORDER BY a bare name would mean the output column, which is the key's text, in another order.
    return ", ".join(f"walked.{quote(column)}{suffix}" for column in move.key)


def _last_key(move: Move, offset: str = "") -> str:
    descending = _columns(move, " DESC")
    return f"SELECT {_columns(move, '::text')} FROM {_table(move)} AS walked ORDER BY {descending} {offset} LIMIT 1"


def _range_end(move: Move, *, lower: bool, upper: bool = True) -> str:
    """
    Write the SQL that finds where a range of at most n rows ends; n is the last parameter.

    Returns one row (rows found, key of the last one as text…), or none when the range is empty.
    """
    where = bind_batch("{batch}", move.key, lower=lower, upper=upper)
    limit = len(move.key) * (lower + upper) + 1
    return (
        f"WITH batch AS MATERIALIZED (SELECT {_columns(move)} FROM {_table(move)} AS walked WHERE {where} "
        f"ORDER BY {_columns(move)} LIMIT ${limit}) "
        f"SELECT (SELECT count(*) FROM batch), {_columns(move, '::text')} FROM batch AS walked "
        f"ORDER BY {_columns(move, ' DESC')} LIMIT 1"
    )


def _end_of(found: Result) -> tuple[int, Key | None]:
    """Read what `_range_end` returned: rows in the range and the key of its last one."""
    if not found.rows:
        return 0, None
    rows, *last = found.rows[0]
    return int(rows), [str(part) for part in last]
