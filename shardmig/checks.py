"""
Comparing old and new: which rows disagree, whether a move loses data, what it will cost.

A comparison goes in the direction of authority and both ways: while old is authoritative, new against forward(old) and
target rows without a source; while new is, old against back(new). Each range is compared in one statement, hence one
snapshot, in which a writer's two representations are seen both or not at all.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from psycopg import errors as pg

from shardmig.errors import PreflightFailed
from shardmig.keyset import BY_INDEX, batch_end, bound, either_end, end_of, last_key, table
from shardmig.patience import refusal
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from shardmig.config import Pace
    from shardmig.keyset import Key, Range
    from shardmig.plan import Move
    from shardmig.session import Result, Session

__all__ = [
    "SHOWN",
    "Direction",
    "Disagreement",
    "Estimate",
    "Milestones",
    "Samples",
    "compare",
    "differing",
    "disagreeing",
    "estimate",
    "next_range",
    "refuse_lossy",
    "rows_by_statistics",
    "shown",
    "sql_of",
]

Direction = Literal["forward", "back"]

_RANGE_ROWS = 10_000  # one range is one short snapshot
_SAMPLE_ROWS = 500  # at each end of the table, for the lossy test
_SAMPLE_TRIES = 40
_SAMPLED = 0.02  # share of a move's time that goes into comparing what was just moved
SHOWN = 20  # keys in a message
_OVERHEAD_S = 0.0015  # of a batch, beside its statement: fence, COMMIT, round trip


@dataclass(frozen=True, slots=True)
class Disagreement:
    """
    Rows of one range that disagree.

    Attributes:
        differing: keys of source rows whose counterpart is missing or differs.
        orphaned: keys of target rows whose source row is gone.
    """

    differing: tuple[Key, ...] = ()
    orphaned: tuple[Key, ...] = ()

    @property
    def keys(self) -> tuple[Key, ...]:
        """All of them."""
        return self.differing + self.orphaned

    def shown(self) -> str:
        """Show how many there are and the first keys."""
        return f"{len(self.keys)} rows, keys {shown(self.keys)}"


def sql_of(move: Move, direction: Direction) -> str | None:
    """Return the statement that moves rows in a direction; None when the script gives none."""
    return move.forward if direction == "forward" else move.back


async def disagreeing(
    session: Session, move: Move, direction: Direction, after: Key | None = None, upto: Key | None = None
) -> Disagreement:
    """
    Find rows that disagree in one range of keys.

    Args:
        session: on the shard.
        move: whose check is asked.
        direction: "forward": new against forward(old); "back": old against back(new).
        after: exclusive lower bound; None for the beginning.
        upto: inclusive upper bound; None for the end.
    """
    check = move.check if direction == "forward" else move.back_check
    orphans = move.orphans if direction == "forward" else None
    queries = [bound(check, move, after, upto)] if check is not None else []
    if orphans is not None:
        queries.append(bound(orphans, move, after, upto, target=True))
    if not queries:
        return Disagreement()
    results = await session.transact(queries, local=BY_INDEX)
    found = [tuple([str(value) for value in row] for row in result.rows) for result in results]
    differing = found.pop(0) if check is not None else ()
    return Disagreement(differing, found.pop(0) if found else ())


async def differing(
    session: Session, move: Move, direction: Direction, after: Key | None, upto: Key | None
) -> Disagreement:
    """Find source rows of a range whose counterpart differs; a gap of the source may hold any number of orphans."""
    check = move.check if direction == "forward" else move.back_check
    if check is None:
        return Disagreement()
    [found] = await session.transact([bound(check, move, after, upto)], local=BY_INDEX)
    return Disagreement(tuple([str(value) for value in row] for row in found.rows))


class Samples:
    """
    When a range that was just moved is compared: at once after the first, then as often as takes 2 % of the time.

    A move that is wrong shows in its first rows; the check of the whole table would show it after the last.
    """

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._spent_s = 0.0

    def due(self, now_s: float) -> bool:
        """Say whether the next sample keeps to its share."""
        return self._spent_s <= _SAMPLED * (now_s - self._began_s)

    def took(self, seconds: float) -> None:
        """Note what a sample took."""
        self._spent_s += seconds


class Milestones:
    """
    Ends of ranges that a move has passed, so that its check need not look for them again.

    Finding the end of a range costs more than comparing its rows, for the index is full of their dead versions.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[str, ...], Key] = {}
        self._last: tuple[str, ...] = ()
        self._rows = 0

    def passed(self, after: Key | None, upto: Key, rows: int) -> None:
        """Note a batch; the first one's beginning is the first milestone."""
        if not self._next and not self._rows:
            self._last = tuple(after or ())
        self._rows += rows
        if self._rows >= _RANGE_ROWS:
            self._next[self._last] = upto
            self._last, self._rows = tuple(upto), 0

    def after(self, key: Key | None) -> Key | None:
        """Return the milestone after this one; None when there is none, or when this is none."""
        return self._next.get(tuple(key or ()))


async def compare(
    session: Session, move: Move, direction: Direction, *, last: Key | None = None
) -> AsyncIterator[Disagreement]:
    """
    Compare the whole table, range after range, and yield each range's disagreement if there is one.

    Nothing is recorded and nothing repaired; rows written meanwhile are compared as they are when their range is.

    Args:
        session: on the shard.
        move: whose check is asked.
        direction: as `disagreeing`.
        last: the last key that is compared; None for the end.
    """
    after: Key | None = None
    while True:
        upto = await next_range(session, move, direction, after, last=last)
        found = await disagreeing(session, move, direction, after, upto or last)
        if found.keys:
            yield found
        if upto is None:
            return
        after = upto


async def next_range(
    session: Session, move: Move, direction: Direction, after: Key | None, *, last: Key | None = None
) -> Key | None:
    """Find where the next range to compare ends; None when the rest, up to `last`, is one range."""
    both = direction == "forward" and move.orphans is not None
    found = (await session.flight([either_end(move, after, last, rows_max=_RANGE_ROWS, target=both)]))[0]
    return [str(part) for part in found.rows[0]] if found.rows else None


# --------------------------------------------------------------------------------------------------------------------
# Before the first batch


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
    for after, upto in await _sample_ranges(session, move, _SAMPLE_ROWS):
        queries = [bound(sql, move, after, upto) for sql in (move.forward, move.back_check)]
        try:
            lost = (await _rolled_back(session, queries))[1].rows
        except pg.Error as error:
            failed = session.failed
            raise refusal(error, failed.sql if failed else "", move.table, session.shard.name, where) from error
        if lost:
            keys = [[str(value) for value in row] for row in lost]
            raise PreflightFailed(
                f"the move loses data: back(forward(x)) is not x for {len(lost)} sampled rows of {move.table}, "
                f"keys {shown(keys)}. Correct `forward` or `back`, or accept it with lossy=True",
                shard=session.shard.name,
                step=where,
            )


async def _rolled_back(session: Session, queries: list[Query]) -> list[Result]:
    """Run queries in one flight whose transaction is rolled back; locked rows are not waited for long, but often."""
    lock_ms = session.settings.lock_timeout_ms[0]  # other rows are locked meanwhile
    limits = {**BY_INDEX, "lock_timeout": f"{lock_ms}ms", "statement_timeout": "10s"}
    local = Query("SELECT " + ", ".join(f"set_config('{name}', '{value}', true)" for name, value in limits.items()))
    for attempt in range(_SAMPLE_TRIES):
        try:
            # One snapshot for all: a row that an application inserts in between was never moved, and is not lost.
            begin = Query("BEGIN ISOLATION LEVEL REPEATABLE READ")
            return (await session.flight([begin, local, *queries, Query("ROLLBACK")]))[2:-1]
        except (pg.LockNotAvailable, pg.DeadlockDetected, pg.SerializationFailure):
            await session.roll_back()
            if attempt + 1 == _SAMPLE_TRIES:
                raise
            await asyncio.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - jitter
        except pg.Error:
            await session.roll_back()
            raise
    raise AssertionError  # pragma: no cover - the last try returns or raises


async def _sample_ranges(session: Session, move: Move, rows: int) -> list[Range]:
    """Choose the first and the last rows of the table; all of them when there are few."""
    [first] = await session.flight([batch_end(move, None, None, rows)])
    count, upto = end_of(first)
    if count == 0:
        return []
    if count < rows:
        return [(None, None)]
    [last] = await session.flight([last_key(move, offset=rows)])
    return [(None, upto), ([str(part) for part in last.rows[0]], None)] if last.rows else [(None, upto)]


# --------------------------------------------------------------------------------------------------------------------
# What it will cost


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    What a move will take, by statistics and one sampled batch.

    Attributes:
        rows: rows of the source table, by statistics; None when it was never analyzed.
        batches: transactions.
        seconds: for moving them; the check comes on top, at about a fifth.
        wal_bytes: write-ahead log of the rows themselves.
    """

    rows: int | None
    batches: int | None = None
    seconds: float | None = None
    wal_bytes: int | None = None


async def estimate(session: Session, move: Move, pace: Pace) -> Estimate:
    """
    Estimate a move that has not begun: statistics, and one batch that is tried and rolled back.

    Where the structure is not there yet, only the rows are known.
    """
    rows = (await session.flight([rows_by_statistics(move)]))[0].value
    try:
        ranges = await _sample_ranges(session, move, pace.batch_rows)
        if not ranges or not rows:
            return Estimate(rows, 0, 0.0, 0) if not ranges else Estimate(rows)
        sampled = bound(f"EXPLAIN (ANALYZE, WAL, TIMING OFF, FORMAT JSON) {move.forward}", move, *ranges[0])
        counted = bound(f"SELECT count(*) FROM {table(move.table)} AS walked WHERE {{batch}}", move, *ranges[0])
        explained, count = await _rolled_back(session, [sampled, counted])
    except (pg.UndefinedTable, pg.UndefinedColumn):
        await session.roll_back()
        return Estimate(rows)
    plan = json.loads(explained.value) if isinstance(explained.value, str) else explained.value
    each_ms = max(plan[0]["Execution Time"] / count.value, 1e-4)
    wal = plan[0]["Plan"].get("WAL Bytes", 0) / count.value
    batch_rows = min(max(pace.batch_target_ms / each_ms, pace.batch_rows_min), pace.batch_rows_max)
    batches = max(1, round(rows / batch_rows))
    seconds = rows * each_ms / 1000 + batches * _OVERHEAD_S
    if pace.max_rows_per_s:
        seconds = max(seconds, rows / pace.max_rows_per_s)
    return Estimate(rows, batches, seconds, round(wal * rows))


def rows_by_statistics(move: Move) -> Query:
    """Ask how many rows the source has, without counting; NULL when it was never analyzed."""
    return Query(_ROWS, [table(move.table)])


def shown(keys: Sequence[Sequence[str]]) -> str:
    """Show the first twenty keys."""
    return ", ".join("(" + ", ".join(key) + ")" for key in keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")


# Partitioned tables hold no rows themselves; their statistics say -1 or nothing until they are analyzed.
_ROWS = """
SELECT nullif(sum(greatest(c.reltuples, 0))::bigint, 0)
FROM (SELECT relid FROM pg_partition_tree(to_regclass($1)) WHERE isleaf UNION SELECT to_regclass($1)) AS tree
JOIN pg_class c ON c.oid = tree.relid AND c.relkind = 'r'
"""
