"""
The canary's trial: baking, gates, and going back when it fails.

The canary's own log says whether it passed, so a run that is killed while it bakes leaves no unproven canary behind
that the next run would take for a proven one.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from shardmig import gates
from shardmig.errors import GateFailed
from shardmig.events import Waiting
from shardmig.ledger import os_user
from shardmig.outcomes import Outcome, ShardReport, outcome_of
from shardmig.todo import pending

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from shardmig.config import Config, Shard
    from shardmig.events import Listener
    from shardmig.plan import AcceptedPlan
    from shardmig.records import Records
    from shardmig.runner import Run
    from shardmig.session import Session
    from shardmig.todo import Held

__all__ = ["Standing", "Trial", "WorkOn", "held_back"]


class WorkOn(Protocol):
    """Work on one shard to its outcome, in a session of its own; errors end in the report."""

    async def __call__(self, shard: Shard, work: Callable[[Run], Awaitable[ShardReport | None]]) -> ShardReport:
        """Do it; `work` returns what is not done, None when all is."""


_STANDING = """
SELECT max(at) FILTER (WHERE after = 'begun'), max(at) FILTER (WHERE after <> 'begun'),
       max(at) FILTER (WHERE after = 'passed'),
       (SELECT max(changed_at) FROM shardmig.flag WHERE shard = $1 AND state >= 2), clock_timestamp()
FROM shardmig.log WHERE shard = $1 AND action = 'canary'
"""
_LOG = "INSERT INTO shardmig.log (shard, action, after, reason, os_user) VALUES ($1, 'canary', $2, $3, $4)"
_BEGIN = """
INSERT INTO shardmig.log (shard, action, after, os_user) SELECT $1, 'canary', 'begun', $2
WHERE (SELECT after FROM shardmig.log WHERE shard = $1 AND action = 'canary' ORDER BY id DESC LIMIT 1)
    IS DISTINCT FROM 'begun'
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """
    How a canary stands in its trial, as its log has it; every time is its server's.

    Attributes:
        begun: when the last trial began: a run that goes on with one begins no other.
        ended: when a trial last ended, passed or not.
        passed: when one was last passed.
        switched: when a flag last went LIVE.
        now: the time of reading.
    """

    begun: datetime | None
    ended: datetime | None
    passed: datetime | None
    switched: datetime | None
    now: datetime

    @property
    def open(self) -> bool:
        """Whether a trial was begun and has not ended."""
        return self.begun is not None and (self.ended is None or self.ended < self.begun)

    @property
    def due(self) -> bool:
        """Whether a flag went LIVE, in whatever way, since a trial was last passed."""
        return self.open or (self.switched is not None and (self.passed is None or self.passed < self.switched))

    def bake_left_s(self, bake_s: float) -> float:
        """Return the seconds for which the canary has yet to bake, counted from its last switch."""
        if self.switched is None:
            return 0.0
        return max(0.0, bake_s - (self.now - self.switched).total_seconds())

    def on_trial(self, records: Records) -> list[str]:
        """List the flags that went LIVE in this trial, in the order of the history."""
        if not self.open or self.begun is None:
            return []
        begun = self.begun
        switched = {
            step.revision
            for step in records.steps.values()
            if step.kind == "switch" and step.done and step.finished_at is not None and step.finished_at >= begun
        }
        return [row.flag for row in records.migrations.values() if row.revision in switched]

    @classmethod
    async def read(cls, session: Session) -> Standing:
        """Read how far the canary's trial is."""
        return cls(*(await session.execute(_STANDING, [session.shard.name])).rows[0])

    @staticmethod
    async def begin(session: Session) -> None:
        """Note that a trial begins, unless one is open: what is switched from there on goes back if it fails."""
        await session.execute(_BEGIN, [session.shard.name, os_user()])

    @staticmethod
    async def end(session: Session, verdict: str, reason: str | None = None) -> None:
        """Note how the trial ended: "passed" or "failed"."""
        await session.execute(_LOG, [session.shard.name, verdict, reason, os_user()])


@dataclass(slots=True)
class Trial:
    """A canary's trial; the shard is free for operators while it bakes."""

    shard: Shard
    config: Config
    plans: Sequence[AcceptedPlan]
    work_on: WorkOn
    stop: asyncio.Event
    listener: Listener | None

    async def run(self) -> ShardReport:
        """Bake as long as is left, ask the gates, and note in the canary's log that it passed."""
        bake_s, gate = 0.0, False

        async def look(run: Run) -> ShardReport | None:
            nonlocal bake_s, gate
            standing = await Standing.read(run.session)
            rollout = self.config.rollout
            if not standing.due:
                return None
            bake_s, gate = standing.bake_left_s(rollout.bake_s), rollout.gate is not None
            return None if bake_s > 0 else await self._ask(run)

        report = await self.work_on(self.shard, look)
        while bake_s > 0 and report.outcome is Outcome.DONE:
            if not await self._bake(bake_s):
                return replace(report, outcome=Outcome.INTERRUPTED, reason="stopped while it baked; apply goes on")
            report = await self.work_on(self.shard, look)
        if gate and report.outcome is Outcome.DONE:
            report = await self._command(report)
        return report

    async def _bake(self, seconds: float) -> bool:
        """Wait; False when a stop was asked for."""
        if self.listener:
            self.listener(Waiting(self.shard.name, f"the canary bakes for {seconds:.0f} s before the others go"))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stop.wait(), seconds)
        return not self.stop.is_set()

    async def _ask(self, run: Run) -> ShardReport | None:
        """Ask the assertions; where no command is to be run, the canary has passed then."""
        rollout = self.config.rollout
        if held := await self._held(run):
            return held
        await gates.pass_assertions(run.session, rollout.assertions)
        if rollout.gate is None:
            await Standing.end(run.session, "passed")
        return None

    async def _command(self, report: ShardReport) -> ShardReport:
        """Run the gate's command, without a session: it may take minutes, and one that idles so long may be cut."""
        try:
            passed = await gates.pass_command(
                self.shard.name, self.config.rollout, directory=self.config.root, stop=self.stop
            )
        except GateFailed as error:
            return replace(report, outcome=outcome_of(error), reason=str(error), error=error)
        if not passed:
            return replace(report, outcome=Outcome.INTERRUPTED, reason="stopped in its gate; apply goes on")
        return await self.work_on(self.shard, self._pass)

    async def _pass(self, run: Run) -> ShardReport | None:
        if held := await self._held(run):
            return held
        await Standing.end(run.session, "passed")
        return None

    async def _held(self, run: Run) -> ShardReport | None:
        """Say what people switched back meanwhile: that has not passed."""
        _, held = pending(self.plans, records := await run.records())
        return held_back(records, held) if held else None

    async def fail(self, report: ShardReport) -> ShardReport:
        """Take back what went LIVE in this trial, if the canary can be reached, and say what became of it."""

        async def back(run: Run) -> None:
            nonlocal report
            standing = await Standing.read(run.session)
            if not standing.due:
                return
            run.reason = f"the canary failed: {report.reason}"[:1000]
            states = await run.go_back(standing.on_trial(await run.records()))
            await Standing.end(run.session, "failed", report.reason)
            report = replace(report, reason="; ".join([report.reason, *states]))

        went = await self.work_on(self.shard, back)
        return replace(report, flags=went.flags or report.flags)


def held_back(records: Records, held: Sequence[Held]) -> ShardReport:
    """Say that people hold flags back, and how to go on."""
    reasons = []
    if back := [one for one in held if one.switched_back]:
        names = ", ".join(f"{one.flag} is {one.state.name}" for one in back)
        reasons.append(f"{names}: somebody switched it back; `shardmig switch {back[0].flag} LIVE` goes forward again")
    reasons += [
        f"{one.flag} is {one.state.name}, and everybody writes both: fill what is new, then `shardmig apply "
        "--until filled`"
        for one in held
        if one.unfilled
    ]
    if unknown := [one.flag for one in held if one.unvouched]:
        reasons.append(
            f"{', '.join(unknown)} stays OLD until somebody vouches that every process which runs knows it: "
            "add --aware RELEASE ([rollout] require_aware)"
        )
    reasons += [f"{one.flag} stays OLD until {' and '.join(one.needs)} is LIVE" for one in held if one.needs]
    return ShardReport(records.shard, Outcome.PENDING, 0, "; ".join(reasons))
