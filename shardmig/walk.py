"""
Walking a fleet: waves one after the other, shards of a wave side by side, blocked ones once more at the end.

What is done on a shard is the caller's; here is only who is next, and whether anybody is.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from shardmig.events import OutcomeReached, Parked
from shardmig.outcomes import Outcome, Report, ShardReport
from shardmig.rollout import BLOCKED, Budget

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from shardmig.config import Rollout, Shard
    from shardmig.events import Listener
    from shardmig.rollout import Wave

__all__ = ["Places", "Walk", "Work"]

T = TypeVar("T")


class Work(Protocol):
    """What is done on each shard; it ends in a report and raises nothing."""

    async def attempt(self, shard: Shard, *, hurried: bool) -> ShardReport:
        """Work on a shard; hurried work leaves a blocked one soon, for it will be tried again."""

    async def prove(self, shard: Shard, report: ShardReport) -> ShardReport:
        """Let a canary pass its trial, or take it back, and return what is to be reported of it."""


class Places:
    """
    How many shards are worked on at once, over all and on one server.

    Args:
        jobs: over all.
        per_host: on one server address; None is no limit.
    """

    def __init__(self, jobs: int, per_host: int | None) -> None:
        self._jobs = asyncio.Semaphore(jobs)
        self._hosts: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(per_host or jobs))

    async def side_by_side(self, shards: Sequence[Shard], work: Callable[[Shard], Awaitable[T]]) -> list[T]:
        """Do the same on every shard; results in the order of the shards."""

        async def one(shard: Shard) -> T:
            async with AsyncExitStack() as place:
                await place.enter_async_context(self._hosts[shard.host])  # a busy server keeps no place from others
                await place.enter_async_context(self._jobs)
                return await work(shard)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(shard)) for shard in shards]
        return [task.result() for task in tasks]


@dataclass(slots=True)
class Walk:
    """
    One walk over a fleet.

    Attributes:
        waves: in which order.
        rollout: when to halt.
        places: how many at once.
        work: what is done.
        stop: set by Ctrl-C.
        listener: told when a shard is parked and when it has its outcome.
        parks: whether blocked shards are tried again at the end.
    """

    waves: Sequence[Wave]
    rollout: Rollout
    places: Places
    work: Work
    stop: asyncio.Event
    listener: Listener | None = None
    parks: bool = True
    _budget: Budget = field(init=False)
    _reports: dict[str, ShardReport] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nothing failed."""
        self._budget = Budget(self.rollout, [])

    async def run(self) -> Report:
        """Walk; every shard of every wave ends in exactly one report, in the order of the waves."""
        parked: list[Shard] = []
        for wave in self.waves:
            if wave.canary:
                await self._canaries(wave)
            else:
                await self.places.side_by_side(wave.shards, lambda shard: self._one(shard, parked))
        await self.places.side_by_side(parked, self._again)
        return Report(tuple(self._reports[shard.name] for wave in self.waves for shard in wave.shards))

    async def _canaries(self, wave: Wave) -> None:
        """Work on the canaries and put them on trial; while one is not done, nobody else is begun."""

        async def one(shard: Shard) -> None:
            report = self._not_begun(shard) or await self.work.attempt(shard, hurried=False)
            self._settle(await self.work.prove(shard, report))

        await self.places.side_by_side(wave.shards, one)
        for shard in wave.shards:
            self._budget.note_canary(self._reports[shard.name])

    async def _one(self, shard: Shard, parked: list[Shard]) -> None:
        hurried = self.parks and sum(len(wave.shards) for wave in self.waves) > 1
        report = self._not_begun(shard) or await self.work.attempt(shard, hurried=hurried)
        if hurried and report.outcome in BLOCKED and not self.stop.is_set():
            parked.append(shard)
            self._reports[shard.name] = report
            if self.listener:
                self.listener(Parked(shard.name, report.reason))
        else:
            self._settle(report)

    async def _again(self, shard: Shard) -> None:
        """Try a parked shard again with all the patience there is; a halt leaves it as it was."""
        before = self._reports[shard.name]
        if self._not_begun(shard) is None:
            report = await self.work.attempt(shard, hurried=False)
            self._settle(replace(report, seconds=before.seconds + report.seconds))
        else:
            self._settle(before)

    def _not_begun(self, shard: Shard) -> ShardReport | None:
        if self.stop.is_set():
            return ShardReport(shard.name, Outcome.INTERRUPTED, 0, "not begun")
        if self._budget.halted is not None:
            return ShardReport(shard.name, Outcome.PENDING, 0, f"not begun: {self._budget.halted}")
        return None

    def _settle(self, report: ShardReport) -> None:
        self._reports[report.shard] = report
        self._budget.note(report)
        if self.listener:
            self.listener(OutcomeReached(report.shard, report.outcome.value, report.reason, report.seconds))
