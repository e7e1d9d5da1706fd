"""
The ladder to a lock on a busy table: queue now, and for how long, or wait for whoever holds it.

It decides from what holds the table at a moment, and does nothing itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardmig.events import Blocker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.config import SessionSettings

__all__ = ["Held", "Ladder", "Try", "Wait"]

_HURRIED_MS = 100  # how long to queue behind an autovacuum that was told to yield after 10 ms
_PATIENCE_MS = 200  # how long to queue beyond deadlock_timeout behind one that can only yield then


@dataclass(frozen=True, slots=True)
class Try:
    """Queue for the lock, for at most `lock_timeout_ms`; `hurry` tells an autovacuum to yield after 10 ms."""

    lock_timeout_ms: float
    hurry: bool = False
    past_autovacuum: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Do not queue: `blockers` hold the table, and queueing behind them would stop the application."""

    reason: str
    blockers: tuple[Blocker, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """One transaction that holds the table in a conflicting mode."""

    transaction: str
    pid: int | None
    role: str | None
    application: str | None
    age_s: float | None
    query: str | None
    what: str
    wraparound: bool
    may_hurry: bool

    def blocker(self, age_s: float | None) -> Blocker:
        """Describe the holder for events and messages; the ladder may know a better age."""
        return Blocker(self.pid, self.role, self.application, age_s, self.query, self.what)


@dataclass(slots=True)
class Ladder:
    """
    What to do next about one lock; decides, does nothing.

    Attributes:
        settings: rungs, and the age at which a transaction is old.
        deadlock_timeout_ms: the server's: an ordinary autovacuum yields after it.
        tries: real tries that did not get the lock.
    """

    settings: SessionSettings
    deadlock_timeout_ms: float
    tries: int = 0
    _began_s: float | None = None
    _first_seen: dict[str, float] = field(default_factory=dict)
    _announced: set[int | None] = field(default_factory=set)

    def decide(self, held: Sequence[Held], now_s: float) -> Try | Wait:
        """Choose between queueing and waiting, from what holds the table at this moment."""
        self._began_s = now_s if self._began_s is None else self._began_s
        # Of other roles' transactions a role without pg_read_all_stats sees no age: then count from the first sight.
        self._first_seen = {holder.transaction: self._first_seen.get(holder.transaction, now_s) for holder in held}
        ages = {
            holder: now_s - self._first_seen[holder.transaction] if holder.age_s is None else holder.age_s
            for holder in held
        }
        old = [holder for holder in held if ages[holder] * 1000 >= self.settings.old_holder_ms]
        yielding = [holder for holder in old if holder.what == "autovacuum" and not holder.wraparound]
        if len(old) > len(yielding):
            oldest_first = sorted(old, key=lambda holder: -ages[holder])
            return Wait(
                "an older transaction holds the table", tuple(holder.blocker(ages[holder]) for holder in oldest_first)
            )
        if yielding:
            softly = now_s - self._began_s < self.settings.lock_wait_s / 2
            return self._past_autovacuum(yielding, softly=softly)
        return Try(self.rung_ms())

    def rung_ms(self) -> float:
        """How long to queue now: longer at each real try, with jitter so that no two runners keep step."""
        rungs = self.settings.lock_timeout_ms
        return max(1.0, rungs[min(self.tries, len(rungs) - 1)] * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    def _past_autovacuum(self, yielding: Sequence[Held], *, softly: bool) -> Try | Wait:
        """
        Make an autovacuum yield, or wait for its end.

        It is cancelled by the deadlock check of whoever waits for it (Routine Vacuuming, "The Autovacuum Daemon"), so
        only a wait longer than deadlock_timeout gets past it. Where the role may shorten that for itself, nobody
        notices; elsewhere there is one long try for each worker, late, because it makes the application wait: most
        of them have ended by themselves before.
        """
        if all(holder.may_hurry for holder in yielding):
            return Try(max(_HURRIED_MS, self.rung_ms()), hurry=True, past_autovacuum=True)
        fresh = {holder.pid for holder in yielding} - self._announced
        if softly or not fresh:
            return Wait("autovacuum works on the table", tuple(holder.blocker(holder.age_s) for holder in yielding))
        self._announced |= fresh
        return Try(self.deadlock_timeout_ms + _PATIENCE_MS, past_autovacuum=True)
