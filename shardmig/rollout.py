"""
The order in which a fleet is walked, and when the walk halts: decided here, from the configuration alone. Pure.

The canary goes first and alone; what is wrong shows there, and switching it back is cheap. The others follow in waves.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from shardmig.errors import ConfigError
from shardmig.outcomes import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardmig.config import Rollout, Shard
    from shardmig.outcomes import ShardReport

__all__ = ["BLOCKED", "CANARY", "FAILURES", "Budget", "Wave", "partition", "waves"]

CANARY = "canary"

FAILURES = frozenset({Outcome.FAILED, Outcome.UNREACHABLE, Outcome.IN_DOUBT, Outcome.PLAN_CHANGED, Outcome.WRONG_SHARD})
"""Outcomes that count against the budget: something is wrong there, and waiting will not cure it."""

BLOCKED = frozenset({Outcome.PARKED, Outcome.MAINTENANCE})
"""Outcomes that pass by themselves: the shard gives its place to others and is tried again at the end."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Shards that are walked together; `canary` marks the one that must succeed before any other is begun."""

    name: str
    shards: tuple[Shard, ...]
    canary: bool = False

    def __str__(self) -> str:
        """Name the wave, and its shards while they fit a line."""
        names = ", ".join(shard.name for shard in self.shards[:4])
        return f"{self.name} ({names}{f' … {len(self.shards)} shards' if len(self.shards) > 4 else ''})"  # noqa: PLR2004


def waves(targets: Sequence[Shard], rollout: Rollout) -> tuple[Wave, ...]:
    """
    Put targets into waves, each in the order of the targets.

    A single target has no canary phase: whoever names one shard watches it himself.

    Returns:
        The canary first, if there are others to protect: the shards whose wave is "canary", else the first target.
    """
    if len(targets) <= 1:
        return (Wave("the shard", tuple(targets)),) if targets else ()
    canaries = tuple(shard for shard in targets if shard.wave == CANARY) or (targets[0],)
    names = {shard.name for shard in canaries}
    rest = [shard for shard in targets if shard.name not in names]
    return (Wave(CANARY, canaries, canary=True), *_following(rest, rollout))


def _following(rest: Sequence[Shard], rollout: Rollout) -> Iterator[Wave]:
    match rollout.waves:
        case "all" if rest:
            yield Wave("wave 1", tuple(rest))
        case "doubling":
            begin = 0
            for number in count(1):
                if begin >= len(rest):
                    return
                end = begin + 2 ** (number - 1)
                yield Wave(f"wave {number}", tuple(rest[begin:end]))
                begin = end
        case "named":
            # Shards that bear no name come last: nobody said how early they may go.
            for name in sorted({shard.wave for shard in rest}, key=lambda name: _first(rest, name)):
                yield Wave(name or "the others", tuple(shard for shard in rest if shard.wave == name))


def _first(shards: Sequence[Shard], wave: str | None) -> float:
    return next(place for place, shard in enumerate(shards) if shard.wave == wave) if wave else float("inf")


def partition(shards: Sequence[Shard], wanted: str) -> list[Shard]:
    """
    Take a stable part of the fleet: "3/16" is the third of sixteen.

    Which part a shard is in depends on its name and on the number of parts alone, so that runners on different machines
    agree, and a new shard moves no other.

    Raises:
        ConfigError: not I/N with 1 ≤ I ≤ N.
    """
    part, _, parts = wanted.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"--partition {wanted!r}: write I/N with I from 1 to N, for example 3/16")
    return [shard for shard in shards if _place(shard.name, int(parts)) == int(part)]


def _place(name: str, parts: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % parts + 1


@dataclass(slots=True)
class Budget:
    """
    How many failures a walk bears.

    Attributes:
        rollout: the policy.
        failed: names of the shards that failed so far.
        halted: why no further shard is begun; None while the walk goes on.
    """

    rollout: Rollout
    failed: list[str]
    halted: str | None = None

    def note(self, report: ShardReport) -> None:
        """Count one shard's outcome, and halt where the policy says so."""
        if report.outcome not in FAILURES:
            return
        self.failed.append(report.shard)
        if self.halted is not None:
            return
        if self.rollout.on_failure == "halt":
            self.halted = f'{report.shard} failed, and rollout.on_failure = "halt"'
        elif self.rollout.failures_max is not None and len(self.failed) > self.rollout.failures_max:
            self.halted = (
                f"{len(self.failed)} shards failed, more than rollout.failures_max = {self.rollout.failures_max}"
            )

    def note_canary(self, report: ShardReport) -> None:
        """Halt unless the canary is done: what it did not survive, or has not reached, no other shard shall try."""
        if report.outcome is not Outcome.DONE:
            verb = {Outcome.FAILED: "failed", Outcome.INTERRUPTED: "was interrupted"}
            self.halted = f"the canary {report.shard} {verb.get(report.outcome, f'ended as: {report.outcome.value}')}"
