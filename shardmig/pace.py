"""
How big the next batch of a move is. Pure: it knows times and rows, nothing of a database.

What disturbs an application is the length of a transaction, not the number of them (pauses do not lower its p99), so
the servo aims at the time of one batch's statement. The shape is that of spirit's chunker: the 90th percentile of the
last ten batches steers, growth is at most half again, and a batch far over the target shrinks the next one at once.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardmig.config import Pace

__all__ = ["Servo"]

_WINDOW = 10  # batches that steer
_GROWTH = 1.5  # at most, from one batch to the next
_PANIC = 5.0  # a batch this many times over the target …
_SHRINK = 10  # … divides the next one by this


class Servo:
    """
    Steer the rows of a batch towards `batch_target_ms`.

    Attributes:
        rows: rows that the next batch should have.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._ms_per_row: deque[float] = deque(maxlen=_WINDOW)
        self.rows = self._clamped(pace.batch_rows)

    def done(self, rows: int, elapsed_ms: float) -> None:
        """
        Learn from a batch.

        Args:
            rows: source rows it covered.
            elapsed_ms: how long its transaction took.
        """
        if rows <= 0:
            return
        if elapsed_ms > _PANIC * self._pace.batch_target_ms:
            self._ms_per_row.clear()  # what was learnt before describes another load
            self.rows = self._clamped(rows / _SHRINK)
            return
        self._ms_per_row.append(elapsed_ms / rows)
        wanted = self._pace.batch_target_ms / self._percentile90()
        self.rows = self._clamped(min(wanted, self.rows * _GROWTH))

    def too_slow(self) -> None:
        """Learn that a batch ran into a timeout: split it."""
        self._ms_per_row.clear()
        self.rows = max(1, self.rows // 2)

    def pause_s(self, rows: int, elapsed_s: float) -> float:
        """Return how long to rest after a batch so that `max_rows_per_s` holds."""
        if self._pace.max_rows_per_s is None:
            return 0.0
        return max(0.0, rows / self._pace.max_rows_per_s - elapsed_s)

    def _percentile90(self) -> float:
        ordered = sorted(self._ms_per_row)
        return max(ordered[int(0.9 * (len(ordered) - 1) + 0.5)], 1e-6)

    def _clamped(self, rows: float) -> int:
        return int(min(max(rows, self._pace.batch_rows_min), self._pace.batch_rows_max))
