"""What customers saw, as the crews tell it: how many were served, how fast, and how many were told something wrong."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardmig.demo.tally import Tally

__all__ = ["Traffic", "percentile"]

_WINDOW_S = 2.0
_EXAMPLES = 5


def percentile(values: list[float], share: float) -> float:
    """Return the value that this share of all values does not exceed; 0 when there are none."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


class Traffic:
    """
    Everything that was counted since the shop opened.

    Attributes:
        requests: requests served, failed ones included.
        errors: requests that failed.
        wrong: rows read that were not what the oracle says.
        rows_read: rows read and compared.
        retries: transactions repeated after a serialization failure.
        examples: the first few errors and wrong reads, in words.
        latencies_ms: of every request.
    """

    def __init__(self) -> None:
        self.requests = self.errors = self.wrong = self.rows_read = self.retries = 0
        self.examples: list[str] = []
        self.latencies_ms: list[float] = []
        self._recent: deque[tuple[float, list[float]]] = deque()

    def hear(self, tally: Tally) -> None:
        """Add what a process told."""
        self.requests += len(tally.latencies_ms)
        self.errors += tally.errors
        self.wrong += tally.wrong
        self.rows_read += tally.rows_read
        self.retries += tally.retries
        self.examples = [*self.examples, *tally.error_examples, *tally.wrong_examples][:_EXAMPLES]
        self.latencies_ms += tally.latencies_ms
        self._recent.append((time.monotonic(), tally.latencies_ms))

    def _lately(self) -> list[float]:
        since = time.monotonic() - _WINDOW_S
        while self._recent and self._recent[0][0] < since:
            self._recent.popleft()
        return [latency for _, latencies in self._recent for latency in latencies]

    def now(self) -> tuple[float, float]:
        """Return requests a second and the 99th percentile in ms, of the last moments."""
        lately = self._lately()
        return len(lately) / _WINDOW_S, percentile(lately, 0.99)

    @property
    def worst_ms(self) -> float:
        """The longest any request took."""
        return max(self.latencies_ms, default=0.0)
