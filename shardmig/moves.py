"""
Moving rows: batch after batch, each committed together with its own progress.

A batch is one flight: the step row (fence and cursor) first, then the rows, then COMMIT, and behind it the look for the
end of the next batch. A crash anywhere repeats at most one batch, and repeating one changes nothing, for a move
overwrites what it writes. Bounds are found by walking the key's index, never by arithmetic on ids, and are passed as
parameters. Many rows of one table are moved in laps (`laps.py`): a batch then moves some of the rows of its range, and
the cursor follows when all of them are moved.

Directions: forward fills new from old (flag in DUAL), back fills old from new (flag in LIVE, after DONE). The check
compares in the same direction, over the whole table, and repairs a range before it gives up on it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from psycopg import errors as pg

from shardmig import checks, laps
from shardmig.checks import Milestones, Samples
from shardmig.errors import CheckFailed, Fenced, PreflightFailed, StepFailed
from shardmig.estimates import rows_by_statistics
from shardmig.events import BatchDone, BatchFailed, RangeCompared
from shardmig.keyset import BY_INDEX, batch_end, either_end, end_of, last_key
from shardmig.laps import Lap
from shardmig.ledger import translated
from shardmig.pace import Headway, Servo, Speed
from shardmig.patience import Interrupted, Patience
from shardmig.rehearsal import Piece, located
from shardmig.rest import Rest
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from shardmig.checks import Direction, Disagreement
    from shardmig.config import Pace
    from shardmig.events import Listener
    from shardmig.hosts import Host
    from shardmig.keyset import Key, Position
    from shardmig.plan import Move
    from shardmig.records import StepRow
    from shardmig.session import Result
    from shardmig.turn import Turn

__all__ = ["MoveRun"]

T = TypeVar("T")

_RECORD_S = 1.0  # between two records of the check
_STATEMENT_MS = 10_000
_CLOCK = Query("SELECT clock_timestamp(), (pg_current_wal_insert_lsn() - '0/0')::bigint")


@dataclass(frozen=True, slots=True)
class _Ahead:
    """
    A batch found and not yet moved.

    Attributes:
        lap: the one that moves it; None where there are no laps.
        after: where its keys begin.
        upto: where they end.
        passed: rows of the table in between.
        rows: how many of them it moves, about.
    """

    lap: Lap | None
    after: Key | None
    upto: Key
    passed: int
    rows: int

    @property
    def next_lap(self) -> Lap | None:
        """Where the move stands behind it; None: nothing is left behind its last key."""
        return None if self.lap is None else self.lap.reached(self.upto, self.rows)

    @property
    def whole(self) -> bool:
        """Whether all rows of its range are moved then."""
        return self.lap is None or self.lap.last


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
        export: given the rows that no repair mends, range after range; without it the first such range ends the check.
        host: what moves of other shards on the same server share with this one.
    """

    turn: Turn
    revision: str
    number: int
    move: Move
    direction: Direction
    pace: Pace
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    listener: Listener | None = None
    export: Callable[[Disagreement], None] | None = None
    host: Host | None = None
    _servo: Servo = field(init=False)
    _rest: Rest = field(init=False)
    _speed: Speed = field(init=False, default_factory=Speed)
    _patience: Patience = field(init=False)
    _row: StepRow = field(init=False)
    _laps: int = field(init=False, default=1)
    _ahead: _Ahead | None = field(init=False, default=None)
    _bounded_at: datetime | None = field(init=False, default=None)
    _milestones: Milestones = field(init=False, default_factory=Milestones)
    _compared: Key | None = field(init=False, default=None)
    _compared_rows: int = field(init=False, default=0)  # about
    _piece: Piece | None = field(init=False, default=None)  # what is being worked on, for messages
    _recorded_at: float = field(init=False, default=0.0)
    _samples: Samples = field(init=False)
    _wrong: list[Key] = field(init=False, default_factory=list)  # the first keys that disagree
    _wrong_rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Start the servo."""
        self._servo, self._samples = Servo(self.pace), Samples(time.monotonic())
        self._patience = Patience(
            self.turn,
            self._where,
            self.move.table,
            self._claim,
            self._stands,
            self._note,
            self._split,
            self.stop,
            self.listener,
        )
        self._rest = Rest(self.turn, self.revision, self.number, self.move, self.pace, self._patience, self.host)

    async def run(self) -> bool:
        """
        Move what is left, then check all.

        Returns:
            True when every row was moved and agrees; False when `stop` was set before.

        Raises:
            Fenced: another runner took the shard over, or the flag was switched.
            SwitchRefused: the flag is not in the state that this direction needs, or not drained.
            CheckFailed: rows disagree that a repair did not mend; the message shows keys.
            StepFailed: the server refused the move's SQL.
            LockNotObtained, Overloaded, ShardUnreachable: what is usually waited for did not pass.
        """
        try:
            await self._patience.do(self._claim)
            if self._row.checked_at is not None and self._row.direction == self.direction:
                return True
            if self._row.waiting is not None:  # of a runner that was killed while it waited
                await self._patience.do(partial(self._note, None))
            await self._patience.do(self._begin)
            await self._patience.do(self._choose_laps)
            while self._row.cursor != self._row.upto:
                self._pass_on()
                await self._rest.mind(self._moving)
                await self._work(self._next_batch)
            self._speed = Speed()  # of the check, from here on
            while True:
                await self._rest.mind(self._comparing, load=False)
                if await self._work(self._check_next):
                    return True
                self._pass_on()
        except Interrupted:
            return False
        finally:
            await self._rest.end()

    @property
    def _where(self) -> str:
        return f"{self.revision} step {self.number}"

    @property
    def _position(self) -> Position:
        return self._row.cursor, self._row.lap

    def _stands(self) -> object:
        """Say how far the move is recorded to be: no more of it is kept when the connection breaks."""
        row: StepRow | None = getattr(self, "_row", None)  # none before it was claimed
        return None if row is None else (row.bounded_at, row.cursor, row.lap, row.check_cursor)

    @property
    def _sql(self) -> str:
        sql = checks.sql_of(self.move, self.direction)
        if sql is None:
            raise PreflightFailed(
                f"{self.revision} cannot be moved back: its script gives no `back`", shard=self.turn.shard
            )
        return sql

    async def _work(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do a piece of work until it succeeds; a refusal for good names its rows."""
        self._piece = None
        try:
            return await self._patience.do(work)
        except StepFailed as error:
            if self._piece is None:
                raise
            cause, reason = error.__cause__, str(error.args[0])
            piece, failure = await located(self.turn.session, self.move, self._piece, error, cause)
            if self.listener is not None:
                at = self.turn.shard, self.revision, self.number
                self.listener(BatchFailed(*at, piece.after, piece.upto, piece.rows, piece.culprit, reason))
            raise failure from cause

    @property
    def _moving(self) -> Headway:
        speed, rows = self._speed, self._row.rows_estimated
        left_s = speed.eta_s(self._row.rows, rows)
        if left_s is not None:
            left_s += self._samples.seconds_for(rows or 0)
        return Headway(speed.rows_per_s, left_s, 0)

    @property
    def _comparing(self) -> Headway:
        speed, rows = self._speed, self._compared_rows
        return Headway(speed.rows_per_s, speed.eta_s(rows, self._row.rows), rows)

    def _pass_on(self) -> None:
        if self.stop.is_set():
            raise Interrupted

    def _split(self) -> bool:
        divisible = self._servo.rows > 1
        self._servo.too_slow()
        return divisible

    async def _note(self, reason: str | None) -> None:
        """Say in the step row why nothing moves; None when it goes on."""
        await self.turn.session.flight([self.turn.record_waiting(self.revision, self.number, reason)])

    # ----------------------------------------------------------------------------------------------------------------
    # Batches

    async def _claim(self) -> None:
        """Read where the move stands; whatever is under way elsewhere has ended when this returns."""
        row = await self.turn.claim(self.revision, self.number)
        if self._bounded_at is not None and row.bounded_at != self._bounded_at:
            # A flip has forgotten the progress, or a failover its beginning.
            raise Fenced("the flag was switched while rows moved; apply again", shard=self.turn.shard, step=self._where)
        self._row, self._ahead = row, None
        # What disagrees is not recorded as compared, and must not be exported twice.
        if not self._wrong:
            self._compared, self._compared_rows = row.check_cursor, row.checked_rows if row.check_cursor else 0

    async def _begin(self) -> None:
        """Read the last key to move, after the drain: whoever writes later rows writes both representations."""
        if self._row.bounded_at is not None and self._row.direction == self.direction:
            self._bounded_at = self._row.bounded_at
            return
        last, estimated = await self.turn.session.flight([last_key(self.move), rows_by_statistics(self.move)])
        upto = [str(part) for part in last.rows[0]] if last.rows else None
        await self._transact(
            [
                self.turn.begin_move(
                    self.revision, self.number, self.direction, upto=upto, rows_estimated=estimated.value
                )
            ]
        )
        await self._claim()
        self._bounded_at = self._row.bounded_at

    async def _choose_laps(self) -> None:
        """Walk in laps where that keeps table and indexes small."""
        written = self.move.writes if self.direction == "forward" else self.move.restores
        looks = laps.looks(self.move, written, self._row.rows_estimated)
        try:
            if looks and (await self.turn.session.flight(looks))[-1].value:
                self._laps = laps.LAPS
        except pg.UndefinedFunction:  # no hash by which to part the rows
            await self.turn.session.roll_back()

    async def _next_batch(self) -> None:
        """Move one range of keys: step row, rows and COMMIT in one flight, and behind them the look for the next."""
        if self._row.cursor == self._row.upto:
            return  # the last batch was in doubt, and the step row says that it happened
        batch = self._ahead if self._ahead is not None else await self._find()
        self._ahead = None
        started, asked = time.monotonic(), self._servo.rows
        elapsed_s, found = await self._move_rows(batch)
        cursor, lap = self._behind(batch)
        self._row = replace(
            self._row, cursor=cursor, lap=lap, rows=self._row.rows + batch.rows, batches=self._row.batches + 1
        )
        self._servo.done(batch.rows, elapsed_s * 1000)
        if batch.whole:
            self._milestones.passed(batch.after, batch.upto, batch.passed)
        # A batch that took much too long shrinks the very next one: what was found for it is too much.
        if found is not None and self._servo.rows * 2 > asked:
            self._ahead = self._read_end(found, asked, batch.next_lap)
        self._tell(batch.rows)
        if batch.whole and self._samples.due(time.monotonic()):
            await self._sample(batch)
        await self._rest.after_batch(batch.rows, self._servo.pause_s(batch.rows, time.monotonic() - started))

    def _behind(self, batch: _Ahead) -> Position:
        """Say where the move stands when a batch is committed."""
        lap = batch.next_lap
        return (batch.upto, None) if lap is None else (self._row.cursor, lap.written())

    async def _move_rows(self, batch: _Ahead) -> tuple[float, Result | None]:
        """
        Commit one batch.

        Returns:
            The seconds that its statement took, and what the look for the next batch found; None at the end, and at
            that of a stretch.
        """
        behind = self._behind(batch)
        record = self.turn.record_batch(
            self.revision, self.number, expected=self._position, reached=behind, rows=batch.rows
        )
        only = None if batch.lap is None else batch.lap.condition(self.move.key, self.move.alias)
        self._piece = Piece("moving", (self._sql,), batch.after, batch.upto, only=only)
        [rows] = self._piece.queries(self.move)
        more = behind[0] != self._row.upto and (batch.lap is None or batch.next_lap is not None)
        ahead = [self._look(behind[0], batch.next_lap)] if more else []
        first = Query(f"{record.sql}, {self._limits(batch.rows)}", record.params)
        with translated(self.turn.shard, self._where):
            _, began, _, ended, _, *found = await self.turn.session.flight(
                [Query("BEGIN"), first, rows, _CLOCK, Query("COMMIT"), *ahead]
            )
        [(at, written)] = ended.rows
        self._rest.wrote(at.timestamp(), written)
        return (at - began.value).total_seconds(), found[0] if found else None

    async def _sample(self, batch: _Ahead) -> None:
        """Compare a range that was just moved."""
        began = time.monotonic()
        found = await self._compare(checks.differing, batch.after, batch.upto)
        self._samples.took(time.monotonic() - began, batch.passed)
        if found.keys:
            self._note_wrong(found)
            raise CheckFailed(
                f"the move of {self.move.table} is wrong: of rows just moved, {self._wrong_rows} disagree with its "
                f"check, keys {checks.shown(self._wrong)}; it stopped after {self._row.rows} rows. Correct what moves "
                "them or what checks them (`shardmig amend` replaces a plan that is not finished), and apply again",
                shard=self.turn.shard,
                step=self._where,
            )

    async def _find(self) -> _Ahead:
        lap = Lap.read(self._row.lap, self.move)
        if lap is None and self._laps > 1:
            [found] = await self.turn.session.flight(
                [batch_end(self.move, self._row.cursor, self._row.upto, laps.STRETCH_ROWS)]
            )
            rows, last = end_of(found)
            lap = Lap(0, self._laps, rows, self._upto if last is None else last)
        [found] = await self.turn.session.flight([self._look(self._row.cursor, lap)])
        return self._read_end(found, self._servo.rows, lap)

    def _look(self, cursor: Key | None, lap: Lap | None) -> Query:
        """Look for the end of the next batch: it passes as many rows as laps over it add up to what it moves."""
        if lap is None:
            return batch_end(self.move, cursor, self._upto, self._servo.rows)
        return batch_end(self.move, lap.at or cursor, lap.end, self._servo.rows * lap.of)

    def _read_end(self, found: Result, asked: int, lap: Lap | None) -> _Ahead:
        passed, last = end_of(found)
        # A short range is the last one; it ends at upto itself, which a row deleted meanwhile may have held.
        if lap is None:
            upto = last if last is not None and passed >= asked else self._upto
            return _Ahead(None, self._row.cursor, upto, passed, passed)
        upto = last if last is not None and passed >= asked * lap.of else lap.end
        return _Ahead(lap, lap.at or self._row.cursor, upto, passed, lap.share(passed, upto))

    @property
    def _upto(self) -> Key:
        assert self._row.upto is not None  # noqa: S101 - an empty table has nothing left
        return self._row.upto

    async def _transact(self, queries: Sequence[Query]) -> list[Result]:
        limits = Query(f"SELECT {self._limits(self._servo.rows)}")
        flight = [Query("BEGIN"), limits, *queries, Query("COMMIT")]
        with translated(self.turn.shard, self._where):
            return (await self.turn.session.flight(flight))[2:-1]

    def _limits(self, rows: int) -> str:
        """
        Write the calls that set what holds for one transaction only.

        While other rows are locked already, a locked one is waited for on the first rung only: nobody may have to wait
        long for those. One row alone may be waited for on the last. Both stay below deadlock_timeout, after which the
        server looks for deadlocks and might end the application's transaction instead of ours.
        """
        session = self.turn.session
        rungs = session.settings.lock_timeout_ms
        lock_ms = min(rungs[0] if rows > 1 else rungs[-1], max(session.deadlock_timeout_ms / 2, 1))
        local = {"lock_timeout": f"{lock_ms:.0f}ms", "statement_timeout": f"{_STATEMENT_MS}ms", **BY_INDEX}
        return ", ".join(f"set_config('{name}', '{value}', true)" for name, value in local.items())

    # ----------------------------------------------------------------------------------------------------------------
    # Check

    async def _check_next(self) -> bool:
        """Check one range and repair it if rows disagree; True when it was the last."""
        session, after = self.turn.session, self._compared
        passed = self._milestones.after(after)
        upto, rows = passed or (await checks.next_range(session, self.move, self.direction, after), checks.RANGE_ROWS)
        found = await self._compare(checks.disagreeing, after, upto)
        self._compared = upto or after
        self._tell_compared(rows if upto is not None else max(self._row.rows - self._compared_rows, 0))
        if found.keys:
            self._note_wrong(found)
        if not self._wrong:
            await self._record_check(finished=upto is None)
        elif upto is None or self.export is None:
            raise CheckFailed(
                f"{self.move.table} disagrees after move and repair: {self._wrong_rows} rows, keys "
                f"{checks.shown(self._wrong)}; the flag stays where it is. Correct those rows or the move, and apply "
                "again",
                shard=self.turn.shard,
                step=self._where,
            )
        return upto is None

    async def _compare(
        self, look: Callable[..., Awaitable[Disagreement]], after: Key | None, upto: Key | None
    ) -> Disagreement:
        """Compare a range; rows that disagree are moved once more before they count as wrong."""
        check = checks.check_of(self.move, self.direction)
        comparing = Piece("comparing", (check,) if check is not None else (), after, upto)
        self._piece = comparing
        found = await look(self.turn.session, self.move, self.direction, after, upto)
        if found.keys:
            await self._repair(found, after, upto)
            self._piece = comparing
            found = await look(self.turn.session, self.move, self.direction, after, upto)
        return found

    def _note_wrong(self, found: Disagreement) -> None:
        if self.export is not None:
            self.export(found)
        self._wrong_rows += len(found.keys)
        self._wrong += found.keys[: checks.SHOWN + 1 - len(self._wrong)]

    async def _record_check(self, *, finished: bool) -> None:
        """Record how far rows agree, now and then and at the end: a crash repeats a second of comparing."""
        if not finished and time.monotonic() - self._recorded_at < _RECORD_S:
            return
        expected, reached = self._row.check_cursor, self._compared
        await self._transact(
            [self.turn.record_check(self.revision, self.number, expected=expected, reached=reached, finished=finished)]
        )
        self._row = replace(self._row, check_cursor=reached)
        self._recorded_at = time.monotonic()

    async def _repair(self, found: Disagreement, after: Key | None, upto: Key | None) -> None:
        """Move the rows of a range again, then remove orphaned target rows, in pieces as small as a batch."""
        begin = after
        while True:
            end = await self._piece_end(begin, upto)
            if found.differing:
                await self._mend(Piece("moving", (self._sql,), begin, end))
            if found.orphaned:
                await self._mend(self._purge(begin, end))
            if end == upto:
                return
            begin = end

    async def _mend(self, piece: Piece) -> None:
        """Commit what a piece does, under the fence; the cursor stays where it is."""
        here, self._piece = self._position, piece
        record = self.turn.record_batch(self.revision, self.number, expected=here, reached=here, rows=0)
        await self._transact([record, *piece.queries(self.move)])

    def _purge(self, after: Key | None, upto: Key | None) -> Piece:
        """
        Say how target rows whose source is gone are removed: in two statements.

        The first locks the candidates; the second, whose snapshot is newer than those locks, looks again: a writer that
        was re-creating the pair meanwhile is seen, so its row stays.
        """
        locking, purge = f"{self.move.orphans}\nFOR UPDATE", str(self.move.purge)  # a move with orphans has both
        return Piece("purging", (locking, purge), after, upto, of_target=True)

    async def _piece_end(self, after: Key | None, upto: Key | None) -> Key | None:
        both = self.direction == "forward" and self.move.orphans is not None
        [found] = await self.turn.session.flight(
            [either_end(self.move, after, upto, rows_max=self._servo.rows, target=both)]
        )
        return [str(part) for part in found.rows[0]] if found.rows else upto

    def _tell(self, rows: int) -> None:
        self._speed.add(rows, time.monotonic())
        if self.listener is not None:
            at, row, way = (self.turn.shard, self.revision, self.number), self._row, self._moving
            self.listener(BatchDone(*at, rows, row.rows, row.rows_estimated, way.rows_per_s, way.eta_s))

    def _tell_compared(self, rows: int) -> None:
        self._compared_rows += rows
        self._speed.add(rows, time.monotonic())
        if self.listener is not None:
            at, way = (self.turn.shard, self.revision, self.number), self._comparing
            self.listener(RangeCompared(*at, way.compared, self._row.rows, way.rows_per_s, way.eta_s))
