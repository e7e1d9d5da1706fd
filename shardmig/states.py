"""
The states of a flag and the edges between them, as data.

    OLD ⇄ DUAL ⇄ LIVE ⇄ DONE          with a move (or protocol = "dual")
    OLD ⇄ LIVE                         without one: LIVE means only "the structure is there"

Neighbours are compatible: each one's writes keep fresh what the other reads. Anything further apart is not, so a flag
takes one edge at a time and waits (`Guard`) for the transactions that still act on the state before.
The ledger's trigger, the runner and the protocol's model all read `EDGES`; nothing else says which edge exists.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple

__all__ = ["EDGES", "Edge", "Guard", "State", "edge", "route"]


class State(IntEnum):
    """
    Which representation of the data the application reads and writes on one shard.

    The booleans are plain attributes of the members, not properties: they are read in every transaction.
    """

    reads_old: bool
    reads_new: bool
    writes_old: bool
    writes_new: bool

    OLD = 0  # reads old, writes old; the structure may or may not be there yet
    DUAL = 1  # reads old, writes both; the rows are being moved
    LIVE = 2  # reads new, writes both; moved and checked
    DONE = 3  # reads new, writes new; old goes stale


for _state in State:
    _state.reads_new = _state >= State.LIVE
    _state.reads_old = not _state.reads_new
    _state.writes_old = _state <= State.LIVE
    _state.writes_new = _state >= State.DUAL


class Guard(Enum):
    """What must be true of a flag's row before an edge is taken; the value is the column that says so."""

    NONE = ""
    DRAINED = "drained"  # every transaction older than the last flip is over
    NEW_VALID = "new_valid"  # new was moved and checked, and every writer since wrote it
    OLD_VALID = "old_valid"  # old is fresh: DONE was never visited, or a reverse move was checked


class Edge(NamedTuple):
    """
    One lawful change of a flag.

    Attributes:
        source: state before.
        target: state after.
        guard: what the flag's row must say.
        has_move: whether this edge belongs to flags with a move (True) or without one (False).
        invalidates: column that becomes false with the flip, or None.
        forgets: whether the move's progress (cursor, counts, check) is forgotten with the flip.
        when: who takes this edge, and why; part of the documentation and of the refusal's message.
    """

    source: State
    target: State
    guard: Guard
    has_move: bool
    invalidates: str | None
    forgets: bool
    when: str


EDGES: tuple[Edge, ...] = (
    # G0: no process may run code that does not know the flag; a pooler hides processes, so the operator vouches.
    Edge(State.OLD, State.DUAL, Guard.NONE, has_move=True, invalidates=None, forgets=True,
         when="apply, before the move: writers start to keep both representations"),
    # W2: readers turn to new only when every row was moved and the check found none that disagrees.
    Edge(State.DUAL, State.LIVE, Guard.NEW_VALID, has_move=True, invalidates=None, forgets=False,
         when="apply, after move and check; again at once after a switch back"),
    # W6: writers in LIVE kept old fresh, so going back needs no wait and moves no row.
    Edge(State.LIVE, State.DUAL, Guard.OLD_VALID, has_move=True, invalidates=None, forgets=False,
         when="switching back: one commit"),
    # W3: a reader of old that began in DUAL must be over before writers stop keeping old fresh.
    Edge(State.LIVE, State.DONE, Guard.DRAINED, has_move=True, invalidates="old_valid", forgets=False,
         when="on request, when nobody will go back: writers stop writing old"),
    # W4: a reader of new that began in LIVE must be over before writers stop keeping new fresh.
    # W7: what was moved goes stale from here on, so nothing of the progress may be kept.
    Edge(State.DUAL, State.OLD, Guard.DRAINED, has_move=True, invalidates="new_valid", forgets=True,
         when="giving up"),
    # Writers keep both again; old is stale until the reverse move has filled and checked it.
    Edge(State.DONE, State.LIVE, Guard.NONE, has_move=True, invalidates=None, forgets=True,
         when="undoing DONE, before the reverse move"),
    Edge(State.OLD, State.LIVE, Guard.NONE, has_move=False, invalidates=None, forgets=False,
         when="apply: the structure is there"),
    Edge(State.LIVE, State.OLD, Guard.NONE, has_move=False, invalidates=None, forgets=False,
         when="switching back: one commit"),
)  # fmt: skip


def edge(source: State, target: State, *, has_move: bool) -> Edge | None:
    """Find the edge between two states; None when a flag of this kind has no such edge."""
    return next((e for e in EDGES if (e.source, e.target, e.has_move) == (source, target, has_move)), None)


def route(source: State, target: State, *, has_move: bool) -> tuple[Edge, ...]:
    """
    List the edges from one state to another, in order; empty when the flag is there already.

    Raises:
        ValueError: a flag without a move never visits `target`.
    """
    if source == target:
        return ()
    direct = edge(source, target, has_move=has_move)
    if direct is not None:
        return (direct,)
    towards = State(source + (1 if target > source else -1))
    first = edge(source, towards, has_move=has_move)
    if first is None:
        raise ValueError(f"a flag without a move is only ever OLD or LIVE, not {target.name}")
    return (first, *route(towards, target, has_move=has_move))
