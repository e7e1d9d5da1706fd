"""What was promised, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig.states import State

if TYPE_CHECKING:
    from shardmig.demo.logbook import Logbook
    from shardmig.demo.traffic import Traffic

__all__ = ["Promise", "Verdict"]


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise: kept when `found` is what was `promised`."""

    text: str
    promised: int
    found: int

    @property
    def kept(self) -> bool:
        """Whether it was kept."""
        return self.found == self.promised


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    How the story ended.

    Attributes:
        traffic: what customers saw.
        logbook: what happened on each shard.
        disagreements: rows that were not as the oracle says when the shop had closed, all shards together.
        failures: commands of the story that did not end well, in words.
        switched_back_ms: how long it took until a shard was back in DUAL, connection included.
    """

    traffic: Traffic
    logbook: Logbook
    disagreements: list[str]
    failures: list[str]
    switched_back_ms: float

    @property
    def promises(self) -> tuple[Promise, ...]:
        """What was promised."""
        states = [state for page in self.logbook.pages.values() for state in page.states.values()]
        return (
            Promise("requests that failed", 0, self.traffic.errors),
            Promise("rows read that were wrong", 0, self.traffic.wrong),
            Promise("rows wrong at the end", 0, len(self.disagreements)),
            Promise("commands that failed", 0, len(self.failures)),
            Promise("flags LIVE", len(states), sum(state is State.LIVE for state in states)),
        )

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return all(promise.kept for promise in self.promises)

    @property
    def evidence(self) -> list[str]:
        """What went wrong, in words; a few examples of each."""
        return [*self.failures, *self.traffic.examples, *self.disagreements[:5]]
