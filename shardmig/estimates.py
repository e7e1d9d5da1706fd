"""
What a move will take: rows by statistics, everything else by one batch that is tried and rolled back.

Nothing is written, and no lock outlives the flight of the sample. Sequences that a sample draws from may skip values.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from psycopg import errors as pg

from shardmig.checks import RANGE_ROWS
from shardmig.keyset import bound, table
from shardmig.pgerrors import first_line
from shardmig.plan import BATCH, quote
from shardmig.preflight import preflight
from shardmig.progress import duration, moved_of
from shardmig.rehearsal import rolled_back
from shardmig.sampling import sample_ranges
from shardmig.session import Query
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardmig.config import Config, Pace
    from shardmig.keyset import Range
    from shardmig.plan import Move
    from shardmig.records import Records, StepRow
    from shardmig.session import Session
    from shardmig.todo import Todo

__all__ = ["Estimate", "Forecast", "estimate", "forecasts", "rows_by_statistics"]

_OVERHEAD_S = 0.0015  # of a batch, beside its statement: fence, COMMIT, round trip
_CHECKED = 0.2  # of a move's time goes into its check, where that cannot be tried
_EXPLAIN = "EXPLAIN (ANALYZE, WAL, TIMING OFF, FORMAT JSON)"
_MB = 1 << 20
_NOT_THERE = (pg.UndefinedTable, pg.UndefinedColumn)


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    What a move will take; None where nothing is known.

    Attributes:
        rows: rows to move: counted when there are few, else by statistics.
        batches: transactions.
        seconds: for moving and comparing them.
        wal_bytes: write-ahead log of the rows themselves.
        note: why this is rougher than usual, or not known; empty as a rule.
        check_s: how many of the seconds are for comparing.
    """

    rows: int | None
    batches: int | None = None
    seconds: float | None = None
    wal_bytes: int | None = None
    note: str = ""
    check_s: float = 0.0

    def __str__(self) -> str:
        """Say what is known in one line."""
        if self.rows == 0:
            return f"all rows moved, {duration(self.check_s)} of comparing left" if self.check_s else "no rows to move"
        known = [
            None if self.rows is None else f"about {self.rows:,} rows",
            None if self.batches is None else f"{self.batches:,} batches",
            None if self.seconds is None else duration(self.seconds),
            None if self.wal_bytes is None else f"{self.wal_bytes / _MB:,.1f} MB of WAL",
        ]
        said = ", ".join(part for part in known if part is not None)
        return said + (f" ({self.note})" if self.note and said else self.note)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The estimate of one move that is left to do on a shard."""

    revision: str
    number: int
    table: str
    estimate: Estimate

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.table}: {self.estimate}"


async def forecasts(session: Session, config: Config, todo: Sequence[Todo], records: Records) -> tuple[Forecast, ...]:
    """
    Estimate every move that applying would make on a shard, less what was moved there before.

    Raises:
        PreflightFailed: the shard would refuse these plans; nothing was tried.
    """
    if not todo:
        return ()
    await preflight(session, *(item.accepted for item in todo), lint=config.lint)
    found = []
    for revision, number, move in [place for item in todo for place in _moves_left(item, records)]:
        guess = await _guess(session, move, config.pace)
        step = records.steps.get((revision, number))
        found.append(Forecast(revision, number, move.table, _less(guess, step)))
    return tuple(found)


def _moves_left(item: Todo, records: Records) -> Iterator[tuple[str, int, Move]]:
    if not item.moves_only and (item.target is None or item.target < State.LIVE):
        return
    row = records.flags.get(item.plan.flag)
    if row is not None and row.new_valid:
        return
    for number, move in item.plan.moves:
        step = records.steps.get((item.plan.revision, number))
        if not move.seed and (step is None or step.checked_at is None):
            yield item.plan.revision, number, move


async def _guess(session: Session, move: Move, pace: Pace) -> Estimate:
    try:
        return await estimate(session, move, pace)
    except pg.Error as error:  # a dry run tells what it saw; the move itself would say the same
        await session.roll_back()
        return Estimate(None, note=f"a sample of it failed: {first_line(error)}")


def _less(guess: Estimate, step: StepRow | None) -> Estimate:
    """Take off what was moved before, and what was compared behind the last batch."""
    if step is None or not step.rows or not guess.rows:
        return guess
    moved = moved_of(step, at_work=False)
    left = 0 if moved.compared is not None else max(guess.rows - moved.rows, 0)
    share = left / guess.rows
    check_s = guess.check_s * (1 - min((moved.compared or 0) / moved.rows, 1))
    return replace(
        guess,
        rows=left,
        batches=None if guess.batches is None else round(guess.batches * share),
        seconds=None if guess.seconds is None else (guess.seconds - guess.check_s) * share + check_s,
        wal_bytes=None if guess.wal_bytes is None else round(guess.wal_bytes * share),
        check_s=check_s,
    )


async def estimate(session: Session, move: Move, pace: Pace) -> Estimate:
    """
    Estimate one move that has not begun.

    Where its columns or tables are not there yet, an UPDATE of the same rows is tried that changes nothing.

    Raises:
        psycopg.Error: the sample failed.
    """
    try:
        ranges = await sample_ranges(session, move, pace.batch_rows)
    except pg.UndefinedTable:
        await session.roll_back()
        return Estimate(None, note="its table is not there yet")
    if not ranges:
        return Estimate(0, 0, 0.0, 0)
    rows, note = await _rows(session, move, ranges[0])
    try:
        each_ms, wal, check_ms = await _sampled(session, move, move.forward, ranges[0])
    except _NOT_THERE:
        await session.roll_back()
        each_ms, wal, check_ms = await _sampled(session, move, _touching(move), ranges[0])
        note = "; ".join(filter(None, [note, "roughly, for what it fills is not there yet"]))
    batch_rows = min(max(pace.batch_target_ms / each_ms, pace.batch_rows_min), pace.batch_rows_max)
    batches = max(1, round(rows / batch_rows))
    seconds = rows * each_ms / 1000 + batches * _OVERHEAD_S
    for limit in (pace.max_rows_per_s, pace.host_rows_per_s):
        seconds = max(seconds, rows / limit if limit else 0)
    check_s = rows * check_ms / 1000 + math.ceil(rows / RANGE_ROWS) * _OVERHEAD_S
    return Estimate(rows, batches, seconds + check_s, round(wal * rows), note, check_s)


async def _rows(session: Session, move: Move, first: Range) -> tuple[int, str]:
    """Count few rows; of many believe the statistics, or where there are none the planner, who sees the size."""
    name = table(move.table)
    if first == (None, None):
        [counted] = await session.flight([Query(f"SELECT count(*) FROM {name}")])
        return int(counted.value), ""
    planned, analyzed = await session.flight(
        [Query(f"EXPLAIN (FORMAT JSON) SELECT FROM {name}"), rows_by_statistics(move)]
    )
    if analyzed.value is not None:
        return int(analyzed.value), ""
    return int(_plan(planned.value)["Plan"]["Plan Rows"]), f"{move.table} was never analyzed, so its rows are a guess"


async def _sampled(session: Session, move: Move, sql: str, rows: Range) -> tuple[float, float, float]:
    """Try a statement on a range, then the check; return a row's ms, its bytes of WAL, and the ms of its check."""
    named = quote(move.alias or "walked")
    counted = bound(f"SELECT count(*) FROM {table(move.table)} AS {named} WHERE {BATCH}", move, *rows)
    texts = [(move.check, False), (move.orphans, True)] if sql == move.forward else []
    compared = [bound(f"{_EXPLAIN} {text}", move, *rows, target=side) for text, side in texts if text is not None]
    tried, *looked, count = await rolled_back(session, [bound(f"{_EXPLAIN} {sql}", move, *rows), *compared, counted])
    plan, sampled = _plan(tried.value), max(count.value, 1)
    each_ms = max(plan["Execution Time"] / sampled, 1e-4)
    check_ms = sum(_plan(each.value)["Execution Time"] for each in looked) / sampled
    return each_ms, plan["Plan"].get("WAL Bytes", 0) / sampled, check_ms if texts else each_ms * _CHECKED


def _touching(move: Move) -> str:
    alias = f" AS {quote(move.alias)}" if move.alias else ""
    column = quote(move.key[0])
    own = f"{quote(move.alias)}.{column}" if move.alias else column
    return f"UPDATE {table(move.table)}{alias} SET {column} = {own} WHERE {BATCH}"


def _plan(explained: Any) -> dict[str, Any]:  # noqa: ANN401 - json, read by the driver or not
    found: dict[str, Any] = (json.loads(explained) if isinstance(explained, str) else explained)[0]
    return found


def rows_by_statistics(move: Move) -> Query:
    """Ask how many rows the source has, without counting; NULL when it was never analyzed."""
    return Query(_ROWS, [table(move.table)])


# Partitioned tables hold no rows themselves; their statistics say -1 or nothing until they are analyzed.
_ROWS = """
SELECT nullif(sum(greatest(c.reltuples, 0))::bigint, 0)
FROM (SELECT relid FROM pg_partition_tree(to_regclass($1)) WHERE isleaf UNION SELECT to_regclass($1)) AS tree
JOIN pg_class c ON c.oid = tree.relid AND c.relkind = 'r'
"""
