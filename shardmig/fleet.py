"""
Several shards at once: each one in a session of its own, each one ending in exactly one outcome.

A shard that fails neither stops nor hides the others. The runner keeps no state: what a shard needs is read from its
own ledger, so any number of runs, from any machine, may follow one another or meet.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from shardmig import ledger
from shardmig.errors import ConfigError, ShardError, ShardmigError
from shardmig.events import OutcomeReached
from shardmig.outcomes import Outcome, Report, ShardReport, outcome_of
from shardmig.runner import Run
from shardmig.session import open_session
from shardmig.todo import Until, pending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from shardmig.config import Config, Shard
    from shardmig.events import Listener
    from shardmig.ledger import LogRow, Records
    from shardmig.plan import AcceptedPlan
    from shardmig.session import Session
    from shardmig.states import State
    from shardmig.todo import Todo

__all__ = ["Fleet", "ShardStatus"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """
    Where one shard is.

    Attributes:
        shard: its name.
        outcome: DONE, PENDING, MAINTENANCE, or why it could not be asked.
        reason: what is left or wrong; empty when done.
        records: what its ledger says; None without a ledger or a connection.
        left: what `apply` would do, in order.
        log: the append-only log, if it was asked for.
    """

    shard: str
    outcome: Outcome
    reason: str = ""
    records: Records | None = None
    left: tuple[Todo, ...] = ()
    log: tuple[LogRow, ...] = ()


@dataclass(slots=True)
class Fleet:
    """
    The shards that a command is about.

    Attributes:
        config: sessions, pace, rollout.
        plans: the whole history, accepted, in order.
        targets: the shards, in the order they are begun.
        jobs: how many at once.
        listener: told what happens; it must not block.
        stop: set by Ctrl-C.
        take_over: end whoever else is running on these shards.
        reason: for the log.
    """

    config: Config
    plans: Sequence[AcceptedPlan]
    targets: Sequence[Shard]
    jobs: int = 16
    listener: Listener | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    take_over: bool = False
    reason: str | None = None

    async def apply(self, *, until: Until = Until.LIVE, upto: str | None = None, aware: str | None = None) -> Report:
        """
        Apply what is left on every target.

        Args:
            until: how far each plan goes.
            upto: last revision to apply; None for the head.
            aware: the release for which the operator vouches that every process knows the flags.
        """
        plans = self._upto(upto)

        async def work(run: Run) -> ShardReport | None:
            records = await run.records()
            todo, held = pending(plans, records, until=until)
            if records.maintenance and all(item.plan.online for item in todo):
                return self._in_maintenance(records) if todo else None
            if aware is not None and any(item.target is not None and item.plan.has_move for item in todo):
                await run.vouch(aware, todo)
            if not await run.apply(todo, records):
                return ShardReport(records.shard, Outcome.INTERRUPTED, 0, "stopped at a safe place; apply goes on")
            if held:
                names = ", ".join(f"{one.flag} is {one.state.name}" for one in held)
                return ShardReport(
                    records.shard,
                    Outcome.PENDING,
                    0,
                    f"{names}: somebody switched it back; `shardmig switch {held[0].flag} LIVE` goes forward again",
                )
            return None

        return await self._each(work)

    async def switch(self, flag: str, target: State) -> Report:
        """Take a flag to a state on every target, one edge after the other, with the drains and moves it needs."""

        async def work(run: Run) -> ShardReport | None:
            if await run.walk(flag, target):
                return None
            return ShardReport(
                run.session.shard.name, Outcome.INTERRUPTED, 0, "stopped at a safe place; switch goes on"
            )

        return await self._each(work)

    async def maintain(self, mode: str) -> Report:
        """Set maintenance on every target ("off", "read-only", "offline") and drain."""

        async def work(run: Run) -> None:
            await run.records()
            await run.maintain(mode)

        return await self._each(work)

    async def status(self, *, until: Until = Until.LIVE, log: bool = False) -> list[ShardStatus]:
        """Ask every target where it is; changes nothing."""

        async def ask(shard: Shard) -> ShardStatus:
            try:
                async with self._session(shard, purpose="read") as session:
                    return await self._status(session, until, log=log)
            except ShardmigError as error:
                return ShardStatus(shard.name, outcome_of(error), str(error))

        return await self._at_once(ask)

    async def each(self, do: Callable[[Session], Awaitable[object]]) -> Report:
        """Do one thing in a runner's session on every target; what it raises is that shard's outcome."""

        async def work(run: Run) -> None:
            await do(run.session)

        return await self._each(work)

    async def ask(self, question: Callable[[Session], Awaitable[T]]) -> dict[str, T | ShardmigError]:
        """Ask every target one question; the answer, or why there is none, by the shard's name."""

        async def one(shard: Shard) -> tuple[str, T | ShardmigError]:
            try:
                async with self._session(shard, purpose="read") as session:
                    return shard.name, await question(session)
            except ShardmigError as error:
                return shard.name, error

        return dict(await self._at_once(one))

    # ----------------------------------------------------------------------------------------------------------------

    async def _status(self, session: Session, until: Until, *, log: bool) -> ShardStatus:
        shard = session.shard.name
        records = await ledger.read(session)
        lines = tuple(await ledger.read_log(session)) if log and records else ()
        todo, held = pending(self.plans, records or ledger.Records(shard), until=until)
        reasons = [f"{one.flag} is held at {one.state.name}" for one in held]
        if todo:
            reasons.append("left: " + ", ".join(item.plan.revision for item in todo))
        if records is not None and records.holder is not None:
            reasons.append(f"worked on by {records.holder}")
        if records is not None and records.maintenance:
            outcome = Outcome.MAINTENANCE
            reasons.insert(0, records.reason or "no reason given")
        else:
            outcome = Outcome.PENDING if todo or held else Outcome.DONE
        return ShardStatus(shard, outcome, "; ".join(reasons), records, todo, lines)

    async def _each(self, work: Callable[[Run], Awaitable[ShardReport | None]]) -> Report:
        return Report(tuple(await self._at_once(lambda shard: self._one(shard, work))))

    async def _one(self, shard: Shard, work: Callable[[Run], Awaitable[ShardReport | None]]) -> ShardReport:
        """Run one shard to its outcome; errors end here."""
        started = time.monotonic()
        if self.stop.is_set():
            return self._reached(ShardReport(shard.name, Outcome.INTERRUPTED, 0, "not begun"))
        try:
            async with self._session(shard, purpose="run") as session:
                run = Run(session, self.config, self.plans, self.listener, self.stop, self.reason)
                report = await work(run)
                flags = await self._flags(session)
        except ShardmigError as error:
            report, flags = ShardReport(shard.name, outcome_of(error), 0, str(error), error=error), ()
        except Exception as error:  # noqa: BLE001 - a bug or a surprise on one shard must not hide what became of others
            unexpected = ShardError(f"unexpected {type(error).__name__}: {error}", shard=shard.name)
            unexpected.__cause__ = error
            report, flags = ShardReport(shard.name, Outcome.FAILED, 0, str(unexpected), error=unexpected), ()
        report = report or ShardReport(shard.name, Outcome.DONE, 0)
        return self._reached(
            ShardReport(report.shard, report.outcome, time.monotonic() - started, report.reason, flags, report.error)
        )

    def _reached(self, report: ShardReport) -> ShardReport:
        if self.listener:
            self.listener(OutcomeReached(report.shard, report.outcome.value, report.reason))
        return report

    async def _flags(self, session: Session) -> tuple[tuple[str, str], ...]:
        records = await ledger.read(session)
        return tuple((name, records.state(name).name) for name in records.flags) if records else ()

    @asynccontextmanager
    async def _session(self, shard: Shard, *, purpose: str) -> AsyncIterator[Session]:
        async with open_session(
            shard,
            self.config.session,
            pg_versions=self.config.lint.pg_versions,
            purpose="run" if purpose == "run" else "read",
            take_over=self.take_over and purpose == "run",
        ) as session:
            yield session

    async def _at_once(self, work: Callable[[Shard], Awaitable[T]]) -> list[T]:
        """Do the same on every target, `jobs` at a time; results in the order of the targets."""
        places = asyncio.Semaphore(self.jobs)

        async def one(shard: Shard) -> T:
            async with places:
                return await work(shard)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(shard)) for shard in self.targets]
        return [task.result() for task in tasks]

    def _upto(self, revision: str | None) -> Sequence[AcceptedPlan]:
        if revision is None:
            return self.plans
        for place, accepted in enumerate(self.plans, 1):
            if accepted.plan.revision == revision:
                return self.plans[:place]
        raise ConfigError(
            f"no revision {revision!r}; the newest is {self.plans[-1].plan.revision if self.plans else None!r}"
        )

    def _in_maintenance(self, records: Records) -> ShardReport:
        cure = f"`shardmig maintenance off --shard {records.shard}`, then apply again"
        return ShardReport(records.shard, Outcome.MAINTENANCE, 0, f"{records.reason or 'no reason given'}; {cure}")
