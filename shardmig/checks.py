"""
Comparing old and new: which rows disagree.

A comparison goes in the direction of authority and both ways: while old is authoritative, new against forward(old) and
target rows without a source; while new is, old against back(new). Each range is compared in one statement, hence one
snapshot, in which a writer's two representations are seen both or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shardmig.keyset import BY_INDEX, bound, either_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from shardmig.keyset import Key
    from shardmig.plan import Move
    from shardmig.session import Session

__all__ = [
    "RANGE_ROWS",
    "SHOWN",
    "Direction",
    "Disagreement",
    "Milestones",
    "Samples",
    "check_of",
    "compare",
    "contradicting",
    "differing",
    "disagreeing",
    "next_range",
    "shown",
    "sql_of",
]

Direction = Literal["forward", "back"]

RANGE_ROWS = 10_000  # one range is one short snapshot
_SAMPLED = 0.02  # share of a move's time that goes into comparing what was just moved
SHOWN = 20  # keys in a message


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


def check_of(move: Move, direction: Direction) -> str | None:
    """Return the query that finds source rows whose counterpart differs; None when the script gives none."""
    return move.check if direction == "forward" else move.back_check


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
    check = check_of(move, direction)
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
    check = check_of(move, direction)
    if check is None:
        return Disagreement()
    [found] = await session.transact([bound(check, move, after, upto)], local=BY_INDEX)
    return Disagreement(tuple([str(value) for value in row] for row in found.rows))


async def contradicting(session: Session, move: Move, after: Key | None, upto: Key | None) -> Disagreement:
    """
    Find rows of a range of which neither representation follows from the other, in one snapshot.

    Since LIVE the application may have written into new what no forward(old) gives, and back(new) into old.
    """
    queries = [bound(check, move, after, upto) for check in (move.check, move.back_check) if check is not None]
    if move.orphans is not None:
        queries.append(bound(move.orphans, move, after, upto, target=True))
    results = await session.transact(queries, isolation="REPEATABLE READ", local=BY_INDEX)
    found = [[[str(value) for value in row] for row in result.rows] for result in results]
    orphaned = found.pop() if move.orphans is not None else []
    differing, *stale = found
    follows_not = {tuple(key) for keys in stale for key in keys}
    return Disagreement(tuple(key for key in differing if not stale or tuple(key) in follows_not), tuple(orphaned))


class Samples:
    """
    When a range that was just moved is compared: at once after the first, then as often as takes 2 % of the time.

    A move that is wrong shows in its first rows; the check of the whole table would show it after the last.
    """

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._spent_s, self._rows = 0.0, 0

    def due(self, now_s: float) -> bool:
        """Say whether the next sample keeps to its share."""
        return self._spent_s <= _SAMPLED * (now_s - self._began_s)

    def took(self, seconds: float, rows: int) -> None:
        """Note what a sample took."""
        self._spent_s += seconds
        self._rows += rows

    def seconds_for(self, rows: int) -> float:
        """Return what comparing so many rows takes, by what samples took: rather too long, for they are small."""
        return rows * self._spent_s / max(self._rows, 1)


class Milestones:
    """
    Ends of ranges that a move has passed, so that its check need not look for them again.

    Finding the end of a range costs more than comparing its rows, for the index is full of their dead versions.
    """

    def __init__(self) -> None:
        self._next: dict[tuple[str, ...], tuple[Key, int]] = {}
        self._last: tuple[str, ...] = ()
        self._rows = 0

    def passed(self, after: Key | None, upto: Key, rows: int) -> None:
        """Note a batch; the first one's beginning is the first milestone."""
        if not self._next and not self._rows:
            self._last = tuple(after or ())
        self._rows += rows
        if self._rows >= RANGE_ROWS:
            self._next[self._last] = upto, self._rows
            self._last, self._rows = tuple(upto), 0

    def after(self, key: Key | None) -> tuple[Key, int] | None:
        """Return the milestone after this one, and the rows up to it; None when there is none, or when this is none."""
        return self._next.get(tuple(key or ()))


async def compare(
    session: Session, move: Move, direction: Direction, *, last: Key | None = None, either: bool = False
) -> AsyncIterator[Disagreement]:
    """
    Compare the whole table, range after range, and yield each range's disagreement if there is one.

    Nothing is recorded and nothing repaired; rows written meanwhile are compared as they are when their range is.

    Args:
        session: on the shard.
        move: whose check is asked.
        direction: as `disagreeing`.
        last: the last key that is compared; None for the end.
        either: only rows that agree in no direction, see `contradicting`.
    """
    after: Key | None = None
    while True:
        upto = await next_range(session, move, direction, after, last=last)
        if either:
            found = await contradicting(session, move, after, upto or last)
        else:
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
    found = (await session.flight([either_end(move, after, last, rows_max=RANGE_ROWS, target=both)]))[0]
    return [str(part) for part in found.rows[0]] if found.rows else None


def shown(keys: Sequence[Sequence[str]]) -> str:
    """Show the first twenty keys."""
    return ", ".join("(" + ", ".join(key) + ")" for key in keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")
