"""
A flag's row in the ledger, as its trigger keeps it.

Edges, guards and bookkeeping are read from `shardmig.states.EDGES`; a mutation takes one of them away.
Epochs are left out: a token that never repeats only tells whether the flag changed since, and whoever works under one
(a drain, a move) is put back by the flip itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardmig.states import EDGES, Guard, State

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FIRST", "FlagRow", "flips", "may_move"]

OLD, DUAL, LIVE, DONE = State


class FlagRow(NamedTuple):
    """State and bits; `moved` is the move's progress, which lives in the step row."""

    state: int
    drained: bool
    new_valid: bool
    old_valid: bool
    moved: bool


FIRST = FlagRow(OLD, drained=True, new_valid=False, old_valid=True, moved=False)

# Which wait each guard is, by the edge that needs it (the two move guards, W1 and W5, are in `may_move`).
_WAITS = {(DUAL, LIVE): "W2", (LIVE, DONE): "W3", (DUAL, OLD): "W4", (LIVE, DUAL): "W6"}


def flips(row: FlagRow, without: frozenset[str], skips: tuple[tuple[State, State], ...]) -> Iterator[FlagRow]:
    """
    Yield the row after each edge that may be taken now.

    Args:
        row: before.
        without: waits and bookkeeping to leave out: W2, W3, W4, W6 drop an edge's guard, W7 forgets nothing.
        skips: edges that do not exist, to be taken anyway.
    """
    for edge in EDGES:
        if edge.has_move and edge.source == row.state:
            waits = edge.guard is not Guard.NONE and _WAITS[edge.source, edge.target] not in without
            if not waits or getattr(row, edge.guard.value):
                invalid, forgets = edge.invalidates, edge.forgets and "W7" not in without
                yield FlagRow(
                    edge.target,
                    drained=False,
                    new_valid=row.new_valid and invalid != "new_valid",
                    old_valid=row.old_valid and invalid != "old_valid",
                    moved=row.moved and not forgets,
                )
    for source, target in skips:
        if source == row.state:
            yield row._replace(state=target, drained=False)


def may_move(row: FlagRow, without: frozenset[str]) -> str | None:
    """Say which way a move may go now: forward in DUAL after W1, back in LIVE after W5; None when neither may."""
    if row.state == DUAL and not row.new_valid and (row.drained or "W1" in without):
        return "forward"
    if row.state == LIVE and not row.old_valid and (row.drained or "W5" in without):
        return "back"
    return None
