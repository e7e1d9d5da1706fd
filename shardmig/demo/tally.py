"""What a release's process counts, and how it tells the story: one JSON object a line."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Counts", "Tally", "Workload"]

_EXAMPLES = 5  # of errors and wrong reads that are told word by word


@dataclass(frozen=True, slots=True)
class Workload:
    """
    What a release's process shall do.

    Attributes:
        shards: name → URL.
        rows: customers a shard was seeded with.
        counters: clerks a shard who serve one short request after the other.
        think_s: their mean pause.
        slow_s: how long a slow clerk's transaction stays open, at most.
        rest_s: the mean pause of slow clerks and auditors.
    """

    shards: Mapping[str, str]
    rows: int
    counters: int
    think_s: float
    slow_s: float
    rest_s: float


@dataclass(slots=True)
class Tally:
    """
    Counts since the last report.

    Attributes:
        latencies_ms: of requests, their own pauses taken off.
        retries: transactions repeated after a serialization failure (40001).
        rows_read: rows compared with the oracle.
        errors: requests that failed; `error_examples` are the first few.
        wrong: rows that were not what the oracle says; `wrong_examples` are the first few.
        ready: every clerk has served once.
    """

    latencies_ms: list[float] = field(default_factory=list)
    retries: int = 0
    rows_read: int = 0
    errors: int = 0
    error_examples: list[str] = field(default_factory=list)
    wrong: int = 0
    wrong_examples: list[str] = field(default_factory=list)
    ready: bool = False

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Tally:
        """Read a report."""
        return cls(**told)


class Counts:
    """A tally that several threads add to."""

    def __init__(self, clerks: int) -> None:
        self._lock = threading.Lock()
        self._tally = Tally()
        self._waiting = {*range(clerks)}

    def served(self, clerk: int, latency_s: float) -> None:
        """Count a request."""
        with self._lock:
            self._tally.latencies_ms.append(round(latency_s * 1000, 2))
            self._waiting.discard(clerk)

    def retried(self) -> None:
        """Count a repeated transaction."""
        with self._lock:
            self._tally.retries += 1

    def failed(self, what: str) -> None:
        """Count a request that failed."""
        with self._lock:
            self._tally.errors += 1
            self._tally.error_examples = [*self._tally.error_examples, what][:_EXAMPLES]

    def compared(self, rows: int, wrong: list[str]) -> None:
        """Count rows compared with the oracle, and those that differ."""
        with self._lock:
            self._tally.rows_read += rows
            self._tally.wrong += len(wrong)
            self._tally.wrong_examples = [*self._tally.wrong_examples, *wrong][:_EXAMPLES]

    def report(self) -> dict[str, Any]:
        """Return what was counted since the last report."""
        with self._lock:
            tally, self._tally = self._tally, Tally()
            tally.ready = not self._waiting
        return asdict(tally)
