"""What a walk does on each shard: the same on every one, or applying plans with a trial for the canary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardmig import ledger
from shardmig.events import Warned
from shardmig.outcomes import Outcome, ShardReport
from shardmig.provisioning import being_provisioned
from shardmig.rollout import FAILURES
from shardmig.states import State
from shardmig.todo import Until, ahead, pending
from shardmig.trial import Standing, Trial, held_back

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from shardmig.config import Shard
    from shardmig.fleet import Fleet
    from shardmig.plan import AcceptedPlan
    from shardmig.records import Records
    from shardmig.runner import Run
    from shardmig.session import Query
    from shardmig.todo import Todo

__all__ = ["GO_ON", "Apply", "Each"]

GO_ON = "stopped at a safe place; the same command goes on from there"
_READ_ONLY = 1  # records.maintenance


@dataclass(slots=True)
class Each:
    """
    Work that is the same on every shard and puts nobody on trial.

    Attributes:
        fleet: whose shards they are.
        work: returns what is to be reported; None when all is done.
    """

    fleet: Fleet
    work: Callable[[Run], Awaitable[ShardReport | None]]

    async def attempt(self, shard: Shard, *, hurried: bool) -> ShardReport:
        """Do it."""
        return await self.fleet.work_on(shard, self.work, hurried=hurried)

    async def prove(self, shard: Shard, report: ShardReport) -> ShardReport:  # noqa: ARG002 - nobody is on trial
        """Leave the report as it is."""
        return report


class Apply(Each):
    """Applying plans, with a trial for the canary."""

    __slots__ = ("_aware", "_canaries", "_due", "_looks", "_plans", "_until")

    def __init__(self, fleet: Fleet, plans: Sequence[AcceptedPlan], until: Until, aware: str | None) -> None:
        super().__init__(fleet, self._apply)
        self._plans, self._until, self._aware = plans, until, aware
        self._canaries = {shard.name for wave in fleet.waves() if wave.canary for shard in wave.shards}
        self._due: set[str] = set()
        self._looks: Sequence[Query] = ()

    async def attempt(self, shard: Shard, *, hurried: bool) -> ShardReport:
        """Apply; a shard is asked while connecting what the one before it was asked before it was begun."""
        return await self.fleet.work_on(shard, self.work, hurried=hurried, ask=self._looks)

    async def _apply(self, run: Run) -> ShardReport | None:
        records = await run.records()
        if being_provisioned(records):
            cure = f"`shardmig provision {records.shard}` goes on and opens it"
            return ShardReport(records.shard, Outcome.MAINTENANCE, 0, f"{records.reason}; {cure}")
        if self.fleet.accepts_proof and any(step.disproved for step in records.steps.values()):
            await ledger.accept_proof(run.session, self.fleet.reason)
            records = await run.records()
        async with run.opening(records) as closed:
            return await self._apply_to(run, records, by_people=records.maintenance > 0 and not closed)

    async def _apply_to(self, run: Run, records: Records, *, by_people: bool) -> ShardReport | None:
        vouched = self.fleet.vouched(self._aware)
        todo, held = pending(self._plans, records, until=self._until, history=self.fleet.plans, vouched=vouched)
        if self.fleet.listener and (further := ahead(self.fleet.plans, records)):
            self.fleet.listener(Warned(records.shard, f"{further}; is this checkout too old?"))
        if by_people and (records.maintenance == _READ_ONLY or all(item.plan.online for item in todo)):
            return _in_maintenance(records, todo) if todo else held_back(records, held) if held else None
        if self._aware is not None and any(item.target is not None and item.plan.has_move for item in todo):
            await run.vouch(self._aware, [item.plan.flag for item in todo])
        run.proves_schemas = records.shard in self._canaries
        run.follows_canary = bool(self._canaries) and not run.proves_schemas
        if records.shard in self._canaries and any(item.target is State.LIVE for item in todo):
            await Standing.begin(run.session)
        if not todo and not held and records.shard not in self._canaries:
            self._looks = ()
            flags = tuple((name, records.state(name).name) for name in records.flags)
            return ShardReport(records.shard, Outcome.DONE, 0, flags=flags)
        if not await run.apply(todo, records):
            return ShardReport(records.shard, Outcome.INTERRUPTED, 0, GO_ON)
        self._looks = run.session.asked if todo else ()
        if held:
            return held_back(records, held)
        if records.shard in self._canaries and self._until in (Until.LIVE, Until.FILLED):
            await self._prepare_trial(run)
        return None

    async def _prepare_trial(self, run: Run) -> None:
        """Find out whether the canary has yet to be tried; where nothing is asked of it, being done is all."""
        standing, rollout = await Standing.read(run.session), self.fleet.config.rollout
        if standing.due and (rollout.bake_s or rollout.assertions or rollout.gate):
            self._due.add(run.session.shard.name)
        elif standing.due:
            await Standing.end(run.session, "passed")

    async def prove(self, shard: Shard, report: ShardReport) -> ShardReport:
        """Bake the canary and ask its gates; a canary that failed, here or before, goes back."""
        fleet = self.fleet
        trial = Trial(shard, fleet.config, fleet.plans, fleet.work_on, fleet.stop, fleet.listener)
        if report.outcome is Outcome.DONE and shard.name in self._due:
            report = replace(await trial.run(), seconds=report.seconds, flags=report.flags)
        if report.outcome in FAILURES:
            report = await trial.fail(report)
        return report


def _in_maintenance(records: Records, todo: Sequence[Todo]) -> ShardReport:
    cure = f"`shardmig maintenance off --shard {records.shard}`, then apply again"
    if offline := [item.plan.revision for item in todo if not item.plan.online]:
        cure = (
            f"{offline[0]} wants the shard offline, for what it writes may be read half-done: "
            f"`shardmig maintenance on --shard {records.shard}`, or off where a runner may close it, then apply again"
        )
    return ShardReport(records.shard, Outcome.MAINTENANCE, 0, f"{records.reason or 'no reason given'}; {cure}")
