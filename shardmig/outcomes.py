"""How it ended: one outcome a shard, one report for all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from shardmig.errors import (
    DrainTimeout,
    Fenced,
    InDoubt,
    LockNotObtained,
    Overloaded,
    PlanChanged,
    ShardBusy,
    ShardmigError,
    ShardUnreachable,
    SwitchedMeanwhile,
    WrongShard,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Outcome", "Report", "ShardReport", "outcome_of"]


class Outcome(Enum):
    """What became of one shard; exactly one of these."""

    DONE = "done"  # everything asked for is so
    PENDING = "pending"  # something is left: a flag held back by people, or a run that was not meant to do all
    PARKED = "parked"  # blocked by somebody who was named, or taken over by another runner; nothing is wrong
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    IN_DOUBT = "in doubt"  # the connection broke during COMMIT and did not come back
    MAINTENANCE = "in maintenance"
    PLAN_CHANGED = "plan changed"
    WRONG_SHARD = "wrong shard"
    INTERRUPTED = "interrupted"


_OUTCOMES: tuple[tuple[type[ShardmigError], Outcome], ...] = (
    (WrongShard, Outcome.WRONG_SHARD),
    (PlanChanged, Outcome.PLAN_CHANGED),
    (ShardUnreachable, Outcome.UNREACHABLE),
    (InDoubt, Outcome.IN_DOUBT),
    (LockNotObtained, Outcome.PARKED),
    (DrainTimeout, Outcome.PARKED),
    (ShardBusy, Outcome.PARKED),
    (Fenced, Outcome.PARKED),
    (Overloaded, Outcome.PARKED),
    (SwitchedMeanwhile, Outcome.PARKED),
)


def outcome_of(error: ShardmigError) -> Outcome:
    """Tell a shard's outcome from the error that ended it."""
    return next((outcome for kind, outcome in _OUTCOMES if isinstance(error, kind)), Outcome.FAILED)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """
    One shard's fate.

    Attributes:
        shard: its name.
        outcome: how it ended.
        seconds: how long it took.
        reason: what to know and to do; empty when done.
        flags: flag → state, as last seen; empty when the ledger could not be read.
        error: what ended it, with psycopg's error as its cause.
    """

    shard: str
    outcome: Outcome
    seconds: float
    reason: str = ""
    flags: tuple[tuple[str, str], ...] = ()
    error: ShardmigError | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Every target's fate, in the order of the targets."""

    shards: tuple[ShardReport, ...]

    def __iter__(self) -> Iterator[ShardReport]:
        """Go through the shards."""
        return iter(self.shards)

    @property
    def done(self) -> bool:
        """Whether everything asked for is so on every shard."""
        return all(one.outcome is Outcome.DONE for one in self.shards)

    @property
    def interrupted(self) -> bool:
        """Whether somebody asked to stop before the end."""
        return any(one.outcome is Outcome.INTERRUPTED for one in self.shards)

    def by_outcome(self) -> dict[Outcome, list[ShardReport]]:
        """Group the shards by outcome, in the order of `Outcome`; outcomes that nobody had are left out."""
        groups = {outcome: [one for one in self.shards if one.outcome is outcome] for outcome in Outcome}
        return {outcome: shards for outcome, shards in groups.items() if shards}

    def raise_for_failures(self) -> None:
        """
        Raise what ended the shards that are not done.

        Raises:
            ExceptionGroup: one error a shard, in the order of the targets.
        """
        errors = [
            one.error or ShardmigError(f"{one.shard}: {one.outcome.value}: {one.reason}")
            for one in self.shards
            if one.outcome is not Outcome.DONE
        ]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(self.shards)} shards are not done", errors)
