"""
Several shards at once: each one in a session of its own, each one ending in exactly one outcome.

The canary goes first, the others follow in waves; a shard that fails neither stops nor hides the others unless the
policy says so. The runner keeps no state: what a shard needs is read from its own ledger, so any number of runs, from
any machine, may follow one another or meet.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from shardmig import amendment, ledger, renaming
from shardmig.errors import (
    ConfigError,
    ShardError,
    ShardmigError,
    ShardUnreachable,
    SwitchRefused,
    WrongShard,
)
from shardmig.events import Draining, Waiting
from shardmig.hosts import Hosts
from shardmig.outcomes import Outcome, Report, ShardReport, outcome_of
from shardmig.pgerrors import first_line, is_connection_lost
from shardmig.provisioning import being_provisioned, lowest_states, provision
from shardmig.quiet import still_asked
from shardmig.records import records_queries
from shardmig.rollout import Wave, waves
from shardmig.runner import Run
from shardmig.session import open_session
from shardmig.status import ShardStatus, read_status, with_forecasts
from shardmig.steps import looking_again
from shardmig.todo import Until, waiting
from shardmig.trial import held_back
from shardmig.walk import Places, Walk
from shardmig.work import GO_ON, Apply, Each

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from shardmig.config import Config, Shard
    from shardmig.events import Blocker, Event, Listener
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan
    from shardmig.session import Query, Session
    from shardmig.states import State

__all__ = ["Fleet"]

T = TypeVar("T")


@dataclass(slots=True)
class _Last:
    """Remembers who is in the way of a shard, if that was the last thing told of it."""

    listener: Listener | None
    blocker: Blocker | None = None

    def __call__(self, event: Event) -> None:
        blockers = event.blockers if isinstance(event, Draining | Waiting) else ()
        self.blocker = blockers[0] if blockers else None
        if self.listener:
            self.listener(event)


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
        terminate_older_than_s: end transactions older than this that a drain waits for; None: end nobody.
        reason: for the log.
        mismatches: a file for the rows that a check finds wrong.
        rechecks: compare all rows before a flag goes LIVE, also where that was done before; none is changed then.
        accepts_proof: go on where the proof of whole schemas failed before; people have looked.
    """

    config: Config
    plans: Sequence[AcceptedPlan]
    targets: Sequence[Shard]
    jobs: int = 16
    listener: Listener | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    take_over: bool = False
    terminate_older_than_s: float | None = None
    reason: str | None = None
    mismatches: Mismatches | None = None
    rechecks: bool = False
    accepts_proof: bool = False
    _hosts: Hosts = field(init=False)

    def __post_init__(self) -> None:
        """Know the servers that shards share."""
        self._hosts = Hosts(self.config.pace)

    async def apply(self, *, until: Until = Until.LIVE, upto: str | None = None, aware: str | None = None) -> Report:
        """
        Apply what is left on every target: the canary, its trial, then wave after wave.

        Args:
            until: how far each plan goes; only LIVE and FILLED put the canary on trial: then readers turn to new.
            upto: last revision to apply; None for the head.
            aware: the release for which the operator vouches that every process knows the flags.

        Returns:
            Every target's fate, in the order of the targets.
        """
        work = Apply(self, self._upto(upto), until, aware)
        fates = {one.shard: one for one in await self._walk(self.waves(), work).run()}
        return Report(tuple(fates[shard.name] for shard in self.targets))

    def waves(self) -> tuple[Wave, ...]:
        """Say in which order `apply` walks the targets."""
        return waves(self.targets, self.config.rollout)

    async def switch(self, flag: str, target: State, *, aware: str | None = None) -> Report:
        """
        Take a flag to a state on every target, one edge after the other, with the drains and moves it needs.

        Args:
            flag: its name.
            target: where it goes.
            aware: the release for which the operator vouches that every process knows the flag.
        """

        async def work(run: Run) -> ShardReport | None:
            if not await ledger.version_of(run.session):
                raise SwitchRefused("it has no ledger; `shardmig apply` begins one", shard=run.session.shard.name)
            records = await run.records()  # which upgrades an older ledger
            if aware is not None and flag in records.flags:
                await run.vouch(aware, [flag])
            if (held := waiting(records, flag, target, vouched=self.vouched(aware))) is not None:
                return held_back(records, [held])
            if await run.walk(flag, target):
                return None
            return ShardReport(run.session.shard.name, Outcome.INTERRUPTED, 0, GO_ON)

        return await self._walk([Wave("all", tuple(self.targets))], Each(self, work)).run()

    async def amend(self, revision: str, *, reason: str) -> Report:
        """Replace what is not finished of a plan on every target by the committed one; `apply` then goes on."""
        accepted = self._upto(revision)[-1]

        async def work(run: Run) -> None:
            records = await run.records()
            if amendment.amendable(accepted, records):
                await amendment.amend(run.session, accepted, records, reason=reason)

        return await self._on_each(work)

    async def provision(self) -> Report:
        """
        Bring empty targets straight to the lowest state that each flag has on the other shards of the configuration.

        Raises:
            ConfigError: another shard cannot be asked, so that nobody knows what the lowest state is.
        """
        new = {shard.name for shard in self.targets}
        others = [shard for shard in self.config.shards.values() if shard.name not in new]
        # No release runs on a shard that is being provisioned: its flags, OLD until it is opened, say nothing.
        asked = await replace(self, targets=others).status()
        found = [one for one in asked if one.records is None or not being_provisioned(one.records)]
        if silent := [one for one in found if one.records is None or one.outcome is Outcome.PLAN_CHANGED]:
            reasons = "; ".join(f"{one.shard}: {_silence(one)}" for one in silent)
            raise ConfigError(f"the flags' lowest states are not known, so nothing was begun: {reasons}")
        states = lowest_states(self.plans, [one.records for one in found if one.records is not None])

        async def work(run: Run) -> ShardReport | None:
            if not await provision(run, self.plans, states):
                return ShardReport(run.session.shard.name, Outcome.INTERRUPTED, 0, GO_ON)
            raised = tuple((flag, state.name) for flag, state in states.items())
            return ShardReport(run.session.shard.name, Outcome.DONE, 0, flags=raised)

        return await self._on_each(work)

    async def rename(self, *, was: str) -> Report:
        """Give the target's database, whose ledger says `was`, the target's name; never the database that is `was`."""
        original = self.config.shards.get(was)

        async def work(run: Run) -> None:
            number = await renaming.mark(run.session)
            if original is not None:
                async with self._session(original, self.config, purpose="read") as session:
                    if await renaming.sees(session, number):
                        raise WrongShard(
                            f"the url of {was!r} leads to the same database: what is there is {was!r} itself, not a "
                            "copy of it; correct one of the two urls. Nothing was written",
                            shard=run.session.shard.name,
                        )
            await renaming.rename(run.session, was=was, reason=self.reason)

        return await self._on_each(work)

    async def maintain(self, mode: str) -> Report:
        """Set maintenance on every target ("off", "read-only", "offline") and drain."""

        async def work(run: Run) -> None:
            await run.records()
            await run.maintain(mode)

        return await self._on_each(work)

    async def pause(self, flag: str) -> Report:
        """Let a flag's moves rest on every target, whoever runs them; they go on with `resume`."""
        return await self._beside(lambda session: ledger.let_rest(session, flag, self.reason))

    async def resume(self, flag: str) -> Report:
        """Let a flag's paused moves go on."""
        return await self._beside(lambda session: ledger.let_go_on(session, flag))

    def vouched(self, aware: str | None) -> bool:
        """Whether flags may leave OLD: somebody named a release whose processes know them, or nobody has to."""
        return aware is not None or not self.config.rollout.require_aware

    async def status(
        self,
        *,
        until: Until = Until.LIVE,
        upto: str | None = None,
        aware: str | None = None,
        log: bool = False,
        forecast: bool = False,
    ) -> list[ShardStatus]:
        """
        Ask every target where it is; changes nothing.

        Args:
            until: how far each plan is meant to go.
            upto: the last revision meant; None for the head.
            aware: a release, as `apply` takes it.
            log: whether to read the log too.
            forecast: whether to try, and roll back, what tells how long moves take.
        """
        plans = self._upto(upto)

        async def ask(shard: Shard) -> ShardStatus:
            try:
                async with self._session(shard, self.config, purpose="read", ask=self._questions(shard)) as session:
                    found = await read_status(
                        session,
                        self.config,
                        plans,
                        history=self.plans,
                        until=until,
                        vouched=self.vouched(aware),
                        log=log,
                    )
                    return await with_forecasts(session, self.config, found) if forecast else found
            except ShardmigError as error:
                return ShardStatus(shard.name, outcome_of(error), str(error))

        return await self._places().side_by_side(self.targets, ask)

    async def each(self, do: Callable[[Session], Awaitable[object]]) -> Report:
        """Do one thing in a runner's session on every target; what it raises is that shard's outcome."""

        async def work(run: Run) -> None:
            await do(run.session)

        return await self._on_each(work)

    async def ask(self, question: Callable[[Session], Awaitable[T]]) -> dict[str, T | ShardmigError]:
        """Ask every target one question; the answer, or why there is none, by the shard's name."""

        async def one(shard: Shard) -> tuple[str, T | ShardmigError]:
            try:
                async with self._session(shard, self.config, purpose="read") as session:
                    return shard.name, await question(session)
            except ShardmigError as error:
                return shard.name, error

        return dict(await self._places().side_by_side(self.targets, one))

    # ----------------------------------------------------------------------------------------------------------------

    async def _beside(self, say: Callable[[Session], Awaitable[None]]) -> Report:
        """Write something into every target's ledger beside whoever works there; their turn is not needed for it."""

        async def writing(session: Session) -> None:
            await session.refuse_read_only()
            await say(session)

        answers = await self.ask(writing)
        return Report(
            tuple(
                ShardReport(shard, outcome_of(answer), 0, str(answer), error=answer)
                if isinstance(answer, ShardmigError)
                else ShardReport(shard, Outcome.DONE, 0)
                for shard, answer in answers.items()
            )
        )

    async def _on_each(self, work: Callable[[Run], Awaitable[ShardReport | None]]) -> Report:
        """Do the same on every target, without canary, waves or parking."""
        return await self._walk([Wave("all", tuple(self.targets))], Each(self, work), parks=False).run()

    def _walk(self, order: Sequence[Wave], work: Each, *, parks: bool = True) -> Walk:
        return Walk(order, self.config.rollout, self._places(), work, self.stop, self.listener, parks=parks)

    def _places(self) -> Places:
        return Places(self.jobs, self.config.rollout.per_host)

    async def work_on(
        self,
        shard: Shard,
        work: Callable[[Run], Awaitable[ShardReport | None]],
        *,
        hurried: bool = False,
        ask: Sequence[Query] = (),
    ) -> ShardReport:
        """
        Work on one shard to its outcome; errors end here.

        Args:
            shard: where.
            work: returns what is to be reported; None when all is done.
            hurried: leave a blocked shard soon, it will be tried again.
            ask: what will be asked for it, so that it is answered while connecting; see `Session.ask`.
        """
        started, last, run = time.monotonic(), _Last(self.listener), None
        config = _hurried(self.config) if hurried else self.config
        asked = [*self._questions(shard), *still_asked(ask, self._hosts.of(shard))]
        try:
            async with self._session(shard, config, purpose="run", ask=asked) as session:
                session.tell = lambda reason: last(Waiting(shard.name, reason))
                run = Run(session, config, self.plans, last, self.stop, self.reason)
                run.mismatches, run.rechecks, run.host = self.mismatches, self.rechecks, self._hosts.of(shard)
                report = await looking_again(partial(work, run))
                flags = (report and report.flags) or await run.states()
        except ShardmigError as error:
            report, flags = ShardReport(shard.name, outcome_of(error), 0, str(error), error=error), ()
        report = report or ShardReport(shard.name, Outcome.DONE, 0)
        if report.outcome is Outcome.INTERRUPTED and last.blocker is not None:
            report = replace(report, reason=f"{report.reason}; it waited for {last.blocker}")
        if run is not None:
            report = run.told(report)
        return replace(report, seconds=time.monotonic() - started, flags=flags)

    @asynccontextmanager
    async def _session(
        self, shard: Shard, config: Config, *, purpose: str, ask: Sequence[Query] = ()
    ) -> AsyncIterator[Session]:
        """Open a session; whatever is no error of ours becomes one, so that it stays on its shard."""
        try:
            async with open_session(
                shard,
                config.session,
                pg_versions=config.lint.pg_versions,
                purpose="run" if purpose == "run" else "read",
                take_over=self.take_over and purpose == "run",
                ask=ask,
            ) as session:
                session.terminate_older_than_s = self.terminate_older_than_s
                async with ledger.naming_holders(session):
                    yield session
        except ShardmigError:
            raise
        except Exception as error:
            if is_connection_lost(error):
                raise ShardUnreachable(f"the connection broke: {first_line(error)}", shard=shard.name) from error
            raise ShardError(f"unexpected {type(error).__name__}: {first_line(error)}", shard=shard.name) from error

    def _questions(self, shard: Shard) -> list[Query]:
        """Read the ledger while connecting: what there is to do on most shards is nothing, and costs nothing more."""
        return records_queries(shard, known=[accepted.sha256 for accepted in self.plans])

    def _upto(self, revision: str | None) -> Sequence[AcceptedPlan]:
        if revision is None:
            return self.plans
        for place, accepted in enumerate(self.plans, 1):
            if accepted.plan.revision == revision:
                return self.plans[:place]
        raise ConfigError(
            f"no revision {revision!r}; the newest is {self.plans[-1].plan.revision if self.plans else None!r}"
        )


def _silence(status: ShardStatus) -> str:
    """Say why a shard does not tell where its flags are."""
    if status.records is None and status.outcome is Outcome.PENDING and not status.refused:
        return "it has no ledger; if it is a new one too, leave it out of the configuration until this one is open"
    return status.reason.removeprefix(f"{status.shard}: ") or status.outcome.value


def _hurried(config: Config) -> Config:
    """Shorten every wait for somebody else to the time after which a shard gives its place away."""
    limit_s, session, pace = config.rollout.park_after_s, config.session, config.pace
    return config.model_copy(
        update={
            "session": session.model_copy(
                update={
                    "lock_wait_s": min(limit_s, session.lock_wait_s),
                    "drain_timeout_s": min(limit_s, session.drain_timeout_s),
                }
            ),
            "pace": pace.model_copy(update={"max_rest_s": min(limit_s, pace.max_rest_s), "parks_waiting": True}),
        }
    )
