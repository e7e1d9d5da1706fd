"""
What the moves of several shards share when those shards live on one server: its disk, its WAL, its processors.

One runner's moves know of each other here; those of other runners are counted on the server itself (`places`). Pure:
rows and times in, decisions out.
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
        moves_max: moves at a time; None is no limit.
        others: moves of other runners there, as seen last.

    Args:
        pace: `host_moves` and `host_rows_per_s`; None is no limit.
    """

    def __init__(self, pace: Pace) -> None:
        self.moves_max, self._rows_per_s = pace.host_moves, pace.host_rows_per_s
        self.others = 0
        self._moving: dict[str, int | None] = {}  # shard → process that holds its mark
        self.calm_until_s = 0.0
        self._spent_until_s = 0.0

    def admit(self, shard: str) -> str | None:
        """Let a shard's move begin or go on, and return None; else why it must wait, as a clause."""
        if shard in self._moving or self.moves_max is None or len(self._moving) < self.moves_max:
            self._moving.setdefault(shard)
            return None
        others = ", ".join(sorted(self._moving))
        return f"rows of {others} are moved on the same server (host_moves = {self.moves_max})"

    @property
    def is_limited(self) -> bool:
        """Whether moves of other runners matter."""
        return self.moves_max is not None or self._rows_per_s is not None

    @property
    def is_overfull(self) -> bool:
        """Whether more moves than allowed have marked themselves, those of other runners included."""
        return self.moves_max is not None and len(self._moving) + self.others > self.moves_max

    @property
    def marks(self) -> list[int]:
        """Server processes that hold marks of this runner's moves."""
        return [pid for pid in self._moving.values() if pid is not None]

    def mark(self, shard: str, pid: int) -> None:
        """Note which server process holds the mark of a move."""
        self._moving[shard] = pid

    def leave(self, shard: str) -> None:
        """Give the place of a move to others; it may have had none."""
        self._moving.pop(shard, None)

    def pause_s(self, rows: int, now_s: float) -> float:
        """
        Spend a batch of the budget, and return how long its move must rest.

        Each batch takes its share of the server's time behind those of all others, so together they keep the limit.
        Each move of another runner takes as much as one of this runner's.
        """
        if self._rows_per_s is None:
            return 0.0
        own = max(len(self._moving), 1)
        self._spent_until_s = max(self._spent_until_s, now_s) + rows / self._rows_per_s * (own + self.others) / own
        return self._spent_until_s - now_s


class Hosts:
    """The servers of a fleet, by address."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._known: dict[str, Host] = {}

    def of(self, shard: Shard) -> Host:
        """Return the server that a shard lives on: the same for all that share host and port."""
        return self._known.setdefault(shard.host, Host(self._pace))
