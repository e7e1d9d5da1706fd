"""
Applying plans to one shard.

`todo.pending` has decided what is left; `Run.apply` does it. Structure of all plans comes first (a shard may be ahead
of any release, and a slow move must not hold up a hotfix's column), then each flag walks to its state: drain, move,
check, flip, one edge at a time. `Run.walk` is the same walk on request, in both directions.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import catalog, express, ledger, maintenance, quiet, switching
from shardmig.adoption import refuse_unadopted
from shardmig.closure import Closure, although_cancelled
from shardmig.edges import Edges
from shardmig.errors import (
    DrainTimeout,
    Fenced,
    InDoubt,
    LedgerOutdated,
    LockNotObtained,
    ProofFailed,
    ShardError,
    SwitchRefused,
)
from shardmig.events import Waiting, Warned
from shardmig.express import Express
from shardmig.preflight import preflight
from shardmig.records import Records, flags_of, flags_query, last_states, read_records
from shardmig.session import Query, is_connection_lost
from shardmig.states import State
from shardmig.steps import LookAgain, Steps, Stopped, looking_again
from shardmig.structure import Structure
from shardmig.turn import Turn, begin_migration, finish_migration, holder_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from shardmig.config import Config
    from shardmig.events import Listener
    from shardmig.express import Arrival
    from shardmig.hosts import Host
    from shardmig.maintenance import Mode
    from shardmig.mismatches import Mismatches
    from shardmig.outcomes import ShardReport
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.records import FlagRow
    from shardmig.session import Session
    from shardmig.todo import Todo

__all__ = ["Run"]


@dataclass(slots=True)
class Run:
    """
    One runner's work on one shard.

    Attributes:
        session: on the shard, holding its runner lock.
        config: pace and session settings.
        plans: the whole history, accepted, in order.
        listener: told what happens.
        stop: set by Ctrl-C; work ends at the next safe place, recorded and resumable.
        reason: for the log of what is switched.
        proves_schemas: prove around all structure that whole schemas only grew, as on a canary.
        follows_canary: another shard has proved the same statements in full, so the express way is open.
        mismatches: a file for the rows that a check finds wrong; None names the first of them only.
        rechecks: compare all rows before a flag goes LIVE, also where that was done before; none is changed then.
        host: what moves of other shards on the same server share with those here.
    """

    session: Session
    config: Config
    plans: Sequence[AcceptedPlan]
    listener: Listener | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str | None = None
    proves_schemas: bool = False
    follows_canary: bool = False
    mismatches: Mismatches | None = None
    rechecks: bool = False
    host: Host | None = None
    _steps: Steps = field(init=False)
    _edges: Edges = field(init=False)
    _vouched: bool = field(init=False, default=False)
    _closure: Closure = field(init=False)
    _states: tuple[tuple[str, str], ...] = field(init=False, default=())
    _hurried: bool = field(init=False, default=False)
    _term: int | None = field(init=False, default=None)  # the highest that is this run's own, or was there before
    _raised: int = field(init=False, default=0)  # how often it may be higher by now: answers were lost

    def __post_init__(self) -> None:
        """Take the shard for open."""
        self._closure = Closure(self.session, self.config.maintenance, self.stop, self.listener)

    async def records(self) -> Records:
        """
        Read the ledger, after installing it where it is missing and upgrading it where it is older.

        Raises:
            Fenced: another runner worked here since it was read before.
        """
        known = {accepted.sha256 for accepted in self.plans}
        try:
            records = await read_records(self.session, known=known)
        except LedgerOutdated:
            records = None
        else:
            if records is None:  # before there is a ledger: it would tell everybody that this shard is one of them
                refuse_unadopted(self.config, Records(self.session.shard.name))
        if records is None or records.version < ledger.newest():
            await ledger.install(self.session)
            records = await read_records(self.session, known=known)
        if records is None:
            raise ShardError("the ledger was removed while it was read; apply again", shard=self.session.shard.name)
        raised = self._raised if records.holder == holder_name() else 0
        if self._term is not None and records.term > self._term + raised:
            raise Fenced(None, shard=records.shard)
        self._term, self._raised = records.term, 0
        return records

    async def apply(self, todo: Sequence[Todo], records: Records) -> bool:
        """
        Do what `pending` left; within `opening`, if a runner may close the shard for it.

        Returns:
            True when all of it is done; False when `stop` ended it at a safe place.

        Raises:
            ShardError: of any kind; what committed before stays and is recorded.
            LookAgain: something was refused, or lost, before the turn was taken, or the shard has to be opened first;
                see `looking_again`.
        """
        if not todo:
            return True
        refuse_unadopted(self.config, records)
        arrival = await self._look_and_hurry(todo, records)
        if arrival is not None:
            self._states = _after(records, todo, arrival)
            todo = arrival.left
            if not todo:
                return True
        by_people = records.maintenance > 0 and not self._closure.closed
        modes: Sequence[Mode | None] = [None] * len(todo)
        if not by_people:
            modes = await maintenance.modes(self.session, todo, self.config.maintenance, listener=self.listener)
        if self._closure.closed and modes[0] is None and arrival is None:
            # Somebody was killed. What is done while a shard serves, which may be a large move, keeps nobody out.
            why = "it could not be opened for what is done while it serves; apply again"
            raise LookAgain from LockNotObtained(why, shard=records.shard)
        async with self._in_turn([] if arrival else self._beginning(todo, records), taken=arrival):
            fresh = {
                (item.plan.revision, number)
                for item in todo
                if item.plan.revision not in records.migrations
                for number in item.statements
            }
            structure = Structure(self._steps, self.config.session, fresh)
            if by_people and not all(item.plan.online for item in todo):
                # Whoever set maintenance by hand, or was told that its drain gave up, has not waited for who is inside.
                await switching.drain_shard(self.session, "maintenance", stop=self.stop, listener=self.listener)
                self._steps.turn.closed = records.maintenance
            for mode, group in groupby(zip(todo, modes, strict=True), key=itemgetter(1)):
                items = [item for item, _ in group]
                async with self._closure.around(mode, items, self._edges):
                    await self._apply_group(items, structure)
            return True
        return False

    async def _apply_group(self, todo: Sequence[Todo], structure: Structure) -> None:
        async with self._proved(todo):
            for item in todo:
                await structure.execute(item)
        for item in todo:
            await self._walk_plan(item)

    async def vouch(self, release: str, flags: Sequence[str]) -> None:
        """Log that an operator vouches for a release: every process that runs knows these flags (G0)."""
        self._vouched = True
        for flag in flags:
            await switching.vouch(self.session, flag, release)

    async def walk(self, flag: str, target: State) -> bool:
        """
        Take a flag to a state, one edge after the other, with the drains and moves each edge needs.

        Returns:
            True when it is there; False when `stop` ended it at a safe place.
        """
        async with self._in_turn():
            accepted = self._plan_of(flag)
            await self._edges.walk(flag, target, accepted)
            await self._steps.surely(partial(self._finish, accepted.plan))
            return True
        return False

    async def go_back(self, flags: Sequence[str]) -> tuple[str, ...]:
        """
        Take flags that this runner brought LIVE one edge back, newest first; the next apply goes forward again.

        A stop asked for does not keep them LIVE: going back is one commit a flag, without a wait.

        Returns:
            What became of each, for people.
        """
        async with self._in_turn():
            return tuple([await self._go_back(self._plan_of(flag).plan) for flag in reversed(flags)])
        raise AssertionError  # pragma: no cover - nothing in here asks whether to stop

    async def _go_back(self, plan: Plan) -> str:
        async def back() -> None:
            row = await switching.read_flag(self.session, plan.flag)
            if row.state == State.LIVE:
                await self._edges.take_back(plan, State.DUAL if row.has_move else State.OLD)

        try:
            await self._steps.surely(back)
        except SwitchRefused as refused:  # a later flag that went further reads from it: the structure stays anyway
            return f"{plan.flag} stays LIVE ({refused.args[0]})"
        state = State((await switching.read_flag(self.session, plan.flag)).state)
        return f"{plan.flag} is {state.name} again"

    async def maintain(self, mode: str) -> None:
        """Set maintenance ("off", "read-only", "offline"), then wait until nobody is inside who does not know."""
        await ledger.set_maintenance(self.session, mode, self.reason)
        if mode != "off":
            await switching.drain_shard(self.session, "maintenance", stop=self.stop, listener=self.listener)

    @asynccontextmanager
    async def opening(self, records: Records) -> AsyncIterator[bool]:
        """
        Open the shard at the end, however it ends, if it is a runner that closed it: this one, or one that was killed.

        What is not finished goes back to where it was when the shard was closed, and the next apply goes forward again.
        """
        await self._closure.find(records)
        try:
            yield self._closure.closed
        finally:
            if self._closure.closed:
                await although_cancelled(self._open_again())

    async def _open_again(self) -> None:
        async def opened() -> None:  # reads by itself what there is to do
            async with self._in_turn():
                await self._closure.open_again(self._edges, lambda flag: self._plan_of(flag).plan)

        with self._closure.telling():
            await looking_again(opened)

    def told(self, report: ShardReport) -> ShardReport:
        """Add to a report what became of a shard that was closed."""
        return self._closure.told(report)

    async def states(self) -> tuple[tuple[str, str], ...]:
        """Name the state of each flag for a report, as last seen."""
        return self._states or await last_states(self.session)

    @asynccontextmanager
    async def _in_turn(self, beginning: Sequence[Query] = (), *, taken: Arrival | None = None) -> AsyncIterator[None]:
        """Take the turn, begin, and end it; a stop asked for leaves the block quietly, at a safe place."""
        if taken is None:
            await self._take_turn(beginning)
        else:
            self._begin(taken.turn, taken.flags)
        try:
            yield
        except Stopped:
            pass
        except DrainTimeout:
            if not self.stop.is_set():
                raise
        except pg.LockNotAvailable as error:
            raise ledger.is_held(error, self.session.shard.name) from error
        finally:
            await self._end()

    async def _take_turn(self, beginning: Sequence[Query]) -> None:
        """Take the turn, and write what begins it; all of that may be written twice."""
        flags = flags_query(self.session.shard.name)
        try:
            turn, results = await Turn.take_and(self.session, [*beginning, flags])
        except pg.LockNotAvailable as error:
            raise ledger.is_held(error, self.session.shard.name) from error
        except (InDoubt, pg.OperationalError) as error:
            if not isinstance(error, InDoubt) and not is_connection_lost(error):
                raise
            if self.listener:
                self.listener(Waiting(self.session.shard.name, "the connection was lost"))
            await self.session.reconnect()
            self._raised += 1
            raise LookAgain from error
        self._begin(turn, flags_of(results[-1]))

    def _begin(self, turn: Turn, flags: dict[str, FlagRow]) -> None:
        self._term, self._raised = turn.term, 0
        self._steps = Steps(turn, self.stop, self.listener)
        self._edges = Edges(
            self._steps,
            self.config.pace,
            reason=self.reason,
            rechecks=self.rechecks,
            vouched=self._vouched,
            mismatches=self.mismatches,
            host=self.host,
            known=flags,
        )

    def _beginning(self, todo: Sequence[Todo], records: Records) -> list[Query]:
        """Enter all plans: from here on the shard's own ledger says what is going on."""
        positions = self._positions()
        return [
            query
            for item in todo
            if item.plan.revision not in records.migrations
            for query in begin_migration(records.shard, item.plan, position=positions[item.plan.revision])
        ]

    def _positions(self) -> dict[str, int]:
        return {accepted.plan.revision: place for place, accepted in enumerate(self.plans, 1)}

    async def _look_and_hurry(self, todo: Sequence[Todo], records: Records) -> Arrival | None:
        """
        See that the shard is ready; then go the express way, once, if it is open and every table quiet.

        Returns:
            Where it has led to; None where it was not gone.
        """
        hurries = self.follows_canary and not self._hurried and express.fits(todo, records) and not self.stop.is_set()
        along = quiet.questions(self.session, todo, self.config, self.host) if hurries else []
        accepted = [item.accepted for item in todo]
        ready = await preflight(self.session, *accepted, lint=self.config.lint, along=along)
        for warning in ready.warnings:
            if self.listener:
                self.listener(Warned(records.shard, warning))
        found = quiet.read(todo, self.config, self.host, ready) if hurries else None
        if found is None:
            return None
        self._hurried = True
        self._term = records.term + 1  # the flight's own, if it came so far
        journey = Express(
            self.session, todo, records, found, self._positions(), self.reason, self._vouched, self.listener
        )
        return await journey.travel()

    @asynccontextmanager
    async def _proved(self, todo: Sequence[Todo]) -> AsyncIterator[None]:
        """Prove on the canary that whole schemas only grew; elsewhere a locked table is proved in its transaction."""
        if not self.proves_schemas:
            yield
            return
        schemas = {self.session.shard.schema_name, *self.config.lint.schemas}
        executed = [(item.plan.revision, item.statements[-1]) for item in todo if item.statements]
        proving = False
        try:
            async with catalog.additive(self.session, sorted(schemas)):
                yield
                proving = True
        except ProofFailed as error:
            if proving and executed:  # what was executed is committed, so the ledger says what is wrong with it
                await self.session.flight([self._steps.turn.record_proof(*executed[-1], error.args[0])])
            raise

    async def _walk_plan(self, item: Todo) -> None:
        plan = item.plan
        if item.target is not None:
            await self._edges.walk(plan.flag, item.target, item.accepted)
        if item.moves_only:
            await self._steps.surely(partial(self._edges.make_valid, plan, forward=True))
        if item.target is not State.LIVE:  # the flip to LIVE has finished it
            await self._steps.surely(partial(self._finish, plan))

    async def _finish(self, plan: Plan) -> None:
        await self.session.flight([finish_migration(self._steps.turn.shard, plan.revision)])

    def _plan_of(self, flag: str) -> AcceptedPlan:
        for accepted in self.plans:
            if accepted.plan.flag == flag:
                return accepted
        known = ", ".join(a.plan.flag for a in self.plans) or "none"
        raise SwitchRefused(f"no flag {flag!r} in the migrations; known flags: {known}", shard=self.session.shard.name)

    async def _end(self) -> None:
        """End the turn, if the connection still can; a successor does not wait for it."""
        try:
            _, flags = await self.session.flight([self._steps.turn.end(), flags_query(self._steps.turn.shard)])
        except (pg.Error, ShardError):
            return
        self._states = _shown(flags_of(flags))


def _after(records: Records, todo: Sequence[Todo], arrival: Arrival) -> tuple[tuple[str, str], ...]:
    """Say how flags are behind a flight, those that it began and left where they begin among them."""
    flags = dict.fromkeys([*records.flags, *(item.plan.flag for item in todo)])
    taken = dict.fromkeys(arrival.taken, State.LIVE)
    return tuple((flag, taken.get(flag, records.state(flag)).name) for flag in flags)


def _shown(flags: dict[str, FlagRow]) -> tuple[tuple[str, str], ...]:
    return tuple((row.flag, State(row.state).name) for row in flags.values())
