"""
What the moves of several shards share when those shards live on one server: its disk, its WAL, its processors.

One runner's moves know of each other here; runners on other machines do not count. Pure: rows and times in, decisions
out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardmig.config import Pace, Shard

__all__ = ["Host", "Hosts"]


class Host:
    """
    One server's budget: how many moves at a time, and how many rows a second over all of them.

    Attributes:
        calm_until_s: until when nobody need look at its load again, by `time.monotonic`.

    Args:
        pace: `host_moves` and `host_rows_per_s`; None is no limit.
    """

    def __init__(self, pace: Pace) -> None:
        self._moves_max, self._rows_per_s = pace.host_moves, pace.host_rows_per_s
        self._moving: set[str] = set()
        self.calm_until_s = 0.0
        self._spent_until_s = 0.0

    def admit(self, shard: str) -> str | None:
        """Let a shard's move begin or go on, and return None; else why it must wait, as a clause."""
        if shard in self._moving or self._moves_max is None or len(self._moving) < self._moves_max:
            self._moving.add(shard)
            return None
        others = ", ".join(sorted(self._moving))
        return f"rows of {others} are moved on the same server (host_moves = {self._moves_max})"

    def leave(self, shard: str) -> None:
        """Give the place of a move to others; it may have had none."""
        self._moving.discard(shard)

    def pause_s(self, rows: int, now_s: float) -> float:
        """
        Spend a batch of the budget, and return how long its move must rest.

        Each batch takes its share of the server's time behind those of all others, so together they keep the limit.
        """
        if self._rows_per_s is None:
            return 0.0
        self._spent_until_s = max(self._spent_until_s, now_s) + rows / self._rows_per_s
        return self._spent_until_s - now_s


class Hosts:
    """The servers of a fleet, by address."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._known: dict[str, Host] = {}

    def of(self, shard: Shard) -> Host:
        """Return the server that a shard lives on: the same for all that share host and port."""
        return self._known.setdefault(shard.host, Host(self._pace))
