"""
Breadth-first search over everything that can happen, until something is wrong or nothing is left.

A model says where it begins, what can happen next, and what is wrong about a state. States that differ only in who is
who are one (`canonical`); a trace is replayed from the beginning afterwards, so its names stay the same throughout.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Found", "Model", "TooLarge", "explore"]

S = TypeVar("S")
Label = tuple[object, ...]  # words of a sentence, joined only when a trace is shown


class Model(Protocol[S]):
    """What the search asks of a model."""

    def begin(self) -> Iterable[S]:
        """Yield the states it may begin in."""

    def steps(self, state: S) -> Iterator[tuple[Label, S]]:
        """Yield what can happen in a state: a label and the state after it."""

    def wrong(self, state: S) -> str | None:
        """Say what is wrong about a state; None when nothing is."""

    def canonical(self, state: S) -> S:
        """Return the state that stands for all that differ from this one only in names."""


class TooLarge(Exception):
    """The model has more states than the limit allows; nothing is known."""


@dataclass(frozen=True, slots=True)
class Found:
    """
    What a search found.

    Attributes:
        states: states looked at.
        steps: steps between them.
        seconds: time taken.
        trace: what happens until something is wrong, a sentence each, the last one saying what; empty when all is well.
    """

    states: int
    steps: int
    seconds: float
    trace: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing is ever wrong."""
        return not self.trace

    def __str__(self) -> str:
        """Show the verdict, and the trace numbered."""
        verdict = "holds" if self.holds else "fails"
        lines = [f"{verdict}: {self.states:,} states, {self.steps:,} steps, {self.seconds:.1f} s"]
        return "\n".join([*lines, *(f"  {n:2}. {line}" for n, line in enumerate(self.trace, 1))])


def explore(model: Model[S], *, limit: int = 3_000_000) -> Found:
    """
    Look at every state that can be reached, nearest first.

    Returns:
        What was found; a trace is one of the shortest.

    Raises:
        TooLarge: more than `limit` states.
    """
    return _Search(model, limit).run()


class _Search(Generic[S]):
    def __init__(self, model: Model[S], limit: int) -> None:
        self.model = model
        self.limit = limit
        self.before: dict[S, S | None] = {}

    def run(self) -> Found:
        began = time.perf_counter()
        model, before, canonical = self.model, self.before, self.model.canonical
        queue = deque(dict.fromkeys(canonical(state) for state in model.begin()))
        before.update(dict.fromkeys(queue))
        looked = steps = 0
        while queue:
            state = queue.popleft()
            looked += 1
            problem = model.wrong(state)
            if problem is not None:
                return Found(looked, steps, time.perf_counter() - began, self._trace(state))
            for _, reached in model.steps(state):
                steps += 1
                after = canonical(reached)
                if after not in before:
                    before[after] = state
                    queue.append(after)
            if len(before) > self.limit:
                raise TooLarge(f"more than {self.limit:,} states")
        return Found(looked, steps, time.perf_counter() - began)

    def _trace(self, last: S) -> tuple[str, ...]:
        """Replay the way to a state with its real names."""
        way = [last]
        while (earlier := self.before[way[-1]]) is not None:
            way.append(earlier)
        way.reverse()
        model = self.model
        here = next(state for state in model.begin() if model.canonical(state) == way[0])
        lines = []
        for wanted in way[1:]:
            label, here = next(step for step in model.steps(here) if model.canonical(step[1]) == wanted)
            lines.append("".join(map(str, label)))
        return (*lines, str(model.wrong(here)))
