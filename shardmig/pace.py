"""
How big the next batch of a move is, and whether to wait and why. Pure: times, rows and observations in, decisions out.

What disturbs an application is the length of a transaction, not the number of them (pauses do not lower its p99), so
the servo aims at the time of one batch's statement. The shape is that of spirit's chunker: the last ten batches steer,
growth is at most half again, and a batch far over the target shrinks the next one at once. Not their 90th percentile
decides, as there, but their mean without the fastest and the slowest: under noise the former settles at two thirds of
the target.

The brakes know what a batch's length does not show: WAL that standbys, slots and the archive do not keep up with, and
dead rows that vacuum cannot remove. They stop a move, never steer its speed.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from shardmig.config import Pace

__all__ = ["Brakes", "Headway", "Load", "Replica", "Servo", "Speed"]

_WINDOW = 10  # batches that steer
_GROWTH = 1.5  # at most, from one batch to the next
_PANIC = 5.0  # a batch this many times over the target …
_SHRINK = 10  # … divides the next one by this
_SPLIT = 4  # and a batch that met a lock or a timeout by this
_APART_S = 0.1  # between two notes of how far the server had written
_LATELY_S = 10.0  # what "rows a second, lately" means
_MB = 1 << 20


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
            elapsed_ms: how long its statement took, waits for locks included.
        """
        if rows <= 0:
            return
        if elapsed_ms > _PANIC * self._pace.batch_target_ms:
            self._ms_per_row.clear()  # what was learnt before describes another load
            self.rows = min(self.rows, self._clamped(rows / _SHRINK))
            return
        self._ms_per_row.append(elapsed_ms / rows)
        wanted = self._pace.batch_target_ms / self._usual_ms_per_row()
        grown = math.ceil(self.rows * _GROWTH)
        # A batch that was split below the floor climbs back to it step by step.
        self.rows = min(self._clamped(wanted), grown)

    def too_slow(self) -> None:
        """Learn that a batch ran into a timeout: split it, below the floor if need be."""
        self._ms_per_row.clear()
        self.rows = max(1, self.rows // _SPLIT)

    def pause_s(self, rows: int, elapsed_s: float) -> float:
        """Return how long to rest after a batch so that `max_rows_per_s` holds."""
        if self._pace.max_rows_per_s is None:
            return 0.0
        return max(0.0, rows / self._pace.max_rows_per_s - elapsed_s)

    def _usual_ms_per_row(self) -> float:
        ordered = sorted(self._ms_per_row)
        return max(fmean(ordered[1:-1] or ordered), 1e-6)

    def _clamped(self, rows: float) -> int:
        return int(min(max(rows, self._pace.batch_rows_min), self._pace.batch_rows_max))


class Headway(NamedTuple):
    """
    How a move gets on, for whoever asks: noted once a second.

    Attributes:
        rows_per_s: moved or, behind the last batch, compared lately.
        eta_s: seconds left, the check included; None when nothing honest can be said.
        compared: rows compared so far, about.
    """

    rows_per_s: float
    eta_s: float | None
    compared: int


class Speed:
    """Rows a second over the last ten seconds, and what that means for the rest."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int]] = deque()
        self._rows = 0  # of all those batches but the first, whose beginning nobody saw

    def add(self, rows: int, now_s: float) -> None:
        """Note a batch that ended now."""
        self._rows += rows if self._ended else 0
        self._ended.append((now_s, rows))
        while self._ended[0][0] < now_s - _LATELY_S and len(self._ended) > 1:
            self._ended.popleft()
            self._rows -= self._ended[0][1]

    @property
    def rows_per_s(self) -> float:
        """Rows a second; 0 before the second batch."""
        elapsed_s = self._ended[-1][0] - self._ended[0][0] if self._ended else 0.0
        return self._rows / elapsed_s if elapsed_s > 0 else 0.0

    def eta_s(self, done: int, estimated: int | None) -> float | None:
        """Return the seconds left; None when nothing honest can be said."""
        speed = self.rows_per_s
        if estimated is None or done > estimated or not speed:
            return None
        return (estimated - done) / speed


# --------------------------------------------------------------------------------------------------------------------
# Brakes


@dataclass(frozen=True, slots=True)
class Replica:
    """
    One standby that streams from this server.

    Attributes:
        name: its application_name and address; several may share one.
        replayed: WAL position that it has replayed; None when this role may not see it.
        lag_s: what the server itself says, which stands still while replay is paused; None when it says nothing.
    """

    name: str
    replayed: int | None
    lag_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """
    What one look at the server showed.

    Attributes:
        at_s: the server's clock.
        written: WAL position up to which it has written.
        replicas: standbys that stream.
        slots: bytes of WAL that each replication slot keeps back, by name.
        archived: WAL position up to which it is archived; None when nothing was archived yet.
        archiving: whether WAL is archived at all.
        wraparound: pid of an autovacuum that prevents wraparound on a table of the move; None as a rule.
        dead_bytes: dead rows of those tables that vacuum has not removed, in bytes, by estimate.
        snapshot_s: age of the oldest transaction that keeps vacuum from removing rows; None without one.
        snapshot_who: who that is.
    """

    at_s: float
    written: int
    replicas: tuple[Replica, ...] = ()
    slots: tuple[tuple[str, int], ...] = ()
    archived: int | None = None
    archiving: bool = False
    wraparound: int | None = None
    dead_bytes: int = 0
    snapshot_s: float | None = None
    snapshot_who: str = ""


class Brakes:
    """Decide from one look after the other whether a move must wait."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._limit_s = math.inf if pace.max_replica_lag_s is None else pace.max_replica_lag_s
        self._written: deque[tuple[float, int]] = deque()  # when the server had written how far
        self._known: Counter[str] = Counter()
        self._first: int | None = None

    def wrote(self, at_s: float, written: int) -> None:
        """
        Note how far the server had written at a time.

        Batches note it too, between two looks: so the moment since which a standby lacks something is known to a tenth
        of a second, and one whose replay stands still stops the move one look after its limit at the latest.
        """
        last_s, last = self._written[-1] if self._written else (-math.inf, -1)
        if self._limit_s < math.inf and written > last and at_s >= last_s + _APART_S:
            self._written.append((at_s, written))

    def judge(self, load: Load) -> str | None:
        """
        Return why the move must wait, as a clause; None when nothing is in the way.

        A standby's lag is measured by what was written when, not by what the server says of it: that stands still
        while replay is paused. A standby that was there and is gone has an unknown lag, not none.
        """
        self._first = load.written if self._first is None else self._first
        return (
            self._replicas(load)
            or self._slots(load)
            or self._archive(load)
            or self._wraparound(load)
            or self._dead_rows(load)
            or self._snapshot(load)
        )

    def _replicas(self, load: Load) -> str | None:
        limit_s = self._limit_s
        if math.isinf(limit_s):
            return None
        self.wrote(load.at_s, load.written)
        here = Counter(replica.name for replica in load.replicas)
        gone = self._known - here
        self._known |= here
        if gone:
            return (
                f"standby {min(gone)} vanished, so its lag is unknown; bring it back, or if it is gone for good, "
                "interrupt and apply again"
            )
        if hidden := [replica.name for replica in load.replicas if replica.replayed is None]:
            return f"the lag of standby {hidden[0]} is not visible to this role; GRANT pg_read_all_stats to it"
        lags = {replica.name: self._lag_s(load, replica) for replica in load.replicas}
        oldest = min((replica.replayed or 0 for replica in load.replicas), default=load.written)
        while len(self._written) > 1 and self._written[0][1] <= oldest:
            self._written.popleft()
        name = max(lags, key=lambda each: lags[each], default=None)
        if name is not None and lags[name] > limit_s:
            return f"standby {name} is {lags[name]:.1f} s behind (max_replica_lag_s = {limit_s:g})"
        return None

    def _lag_s(self, load: Load, replica: Replica) -> float:
        assert replica.replayed is not None  # noqa: S101 - hidden ones were told apart
        if replica.replayed >= load.written:
            return 0.0
        missing = next((at_s for at_s, written in self._written if written > replica.replayed), load.at_s)
        return max(load.at_s - missing, replica.lag_s or 0.0)

    def _slots(self, load: Load) -> str | None:
        limit_mb = self._pace.max_slot_wal_mb
        name, kept = max(load.slots, key=lambda slot: slot[1], default=("", 0))
        if limit_mb is None or kept <= limit_mb * _MB:
            return None
        return f"replication slot {name} keeps back {kept / _MB:.0f} MB of WAL (max_slot_wal_mb = {limit_mb:g})"

    def _archive(self, load: Load) -> str | None:
        limit_mb = self._pace.max_unarchived_mb
        if not load.archiving or limit_mb is None:
            return None
        # Without anything archived yet, what this move has written since its beginning is what can be known.
        archived = self._first if load.archived is None else load.archived
        behind = load.written - (archived or 0)
        if behind <= limit_mb * _MB:
            return None
        return f"{behind / _MB:.0f} MB of WAL are not archived yet (max_unarchived_mb = {limit_mb:g})"

    def _wraparound(self, load: Load) -> str | None:
        if load.wraparound is None:
            return None
        return f"an autovacuum prevents transaction id wraparound on the table (pid {load.wraparound})"

    def _dead_rows(self, load: Load) -> str | None:
        limit_mb = self._pace.max_dead_mb
        if limit_mb is None or load.dead_bytes <= limit_mb * _MB:
            return None
        pinned = f"; {load.snapshot_who} keeps vacuum from removing them" if load.snapshot_who else ""
        return f"{load.dead_bytes / _MB:.0f} MB of dead rows wait for vacuum (max_dead_mb = {limit_mb:g}){pinned}"

    def _snapshot(self, load: Load) -> str | None:
        limit_s = self._pace.max_snapshot_age_s
        if limit_s is None or load.snapshot_s is None or load.snapshot_s <= limit_s:
            return None
        return (
            f"{load.snapshot_who} has kept vacuum from removing dead rows for {load.snapshot_s:.0f} s "
            f"(max_snapshot_age_s = {limit_s:g})"
        )
