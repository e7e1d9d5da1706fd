"""
Applying plans to one shard.

`pending` decides what is left, from the plans and the ledger alone; `apply` does it. Structure of all plans comes first
(a shard may be ahead of any release, and a slow move must not hold up a hotfix's column), then each flag walks to its
state: drain, move, check, flip, one edge at a time. `walk` is the same walk on request, in both directions.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import ledger, locking, moves, planfile, relaxation, switching
from shardmig.errors import (
    DrainTimeout,
    InDoubt,
    LockNotObtained,
    PlanChanged,
    PreflightFailed,
    ShardError,
    ShardUnreachable,
    StepFailed,
    SwitchRefused,
)
from shardmig.events import StepDone, StepStarted, Waiting, Warned
from shardmig.ledger import Turn
from shardmig.plan import Move, Statement, Switch, quote
from shardmig.preflight import preflight
from shardmig.session import Query, is_connection_lost, pointer
from shardmig.states import Edge, Guard, State, route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from shardmig.config import Config
    from shardmig.events import Listener
    from shardmig.ledger import FlagRow, Records
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.session import Session

__all__ = ["Held", "Run", "Todo", "Until", "pending"]


class _Stopped(Exception):
    """Ctrl-C was pressed; everything done so far is recorded."""


class Until(Enum):
    """How far to apply; each includes the ones before."""

    STRUCTURE = "structure"  # tables and columns are there, flags stay OLD
    DUAL = "dual"  # writers keep both representations
    MOVED = "moved"  # every row is moved and checked
    LIVE = "live"  # readers read new


@dataclass(frozen=True, slots=True)
class Todo:
    """
    What is left of one plan on one shard.

    Attributes:
        accepted: the plan.
        statements: numbers of the structural steps not done.
        target: the state its flag shall reach; None when the flag is there or shall not move.
        moves_only: the flag is in DUAL, and rows shall be moved without going further.
    """

    accepted: AcceptedPlan
    statements: tuple[int, ...] = ()
    target: State | None = None
    moves_only: bool = False

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.accepted.plan


@dataclass(frozen=True, slots=True)
class Held:
    """A flag that somebody switched back: apply does not overrule people, `shardmig switch` goes forward again."""

    flag: str
    state: State


def pending(
    plans: Sequence[AcceptedPlan], records: Records, *, until: Until = Until.LIVE
) -> tuple[tuple[Todo, ...], tuple[Held, ...]]:
    """
    Decide what is left to do on one shard.

    Args:
        plans: the history up to the revision wanted, in order.
        records: what the ledger says.
        until: how far to go.

    Returns:
        What is left, in the order of the history, and the flags that people hold back.

    Raises:
        PlanChanged: a plan differs from what this shard has begun, or the ledger has a revision that is not there.
    """
    known = {accepted.plan.revision for accepted in plans}
    last = max((records.migrations[r].position for r in known if r in records.migrations), default=0)
    for row in records.migrations.values():
        if row.revision not in known and row.position < last:
            raise PlanChanged(
                f"{records.shard}: {row.revision} was applied there and is missing here; restore its script and plan"
            )
    todo, held = [], []
    for accepted in plans:
        left, keeps = _left(accepted, records, until)
        if left is not None:
            todo.append(left)
        if keeps is not None:
            held.append(keeps)
    return tuple(todo), tuple(held)


def _left(accepted: AcceptedPlan, records: Records, until: Until) -> tuple[Todo | None, Held | None]:
    plan = accepted.plan
    row = records.migrations.get(plan.revision)
    if row is not None and row.sha256 != plan.sha256:
        begun = planfile.loads(row.plan, name=f"{plan.revision} in the ledger")
        raise PlanChanged(
            f"{records.shard}: {plan.revision} is not the plan that was begun there; restore the committed script and "
            f"plan, and write a new revision for what shall change:\n"
            f"{planfile.difference(begun, plan, names=('begun', 'committed'))}"
        )
    done = {number for (revision, number), step in records.steps.items() if revision == plan.revision and step.done}
    statements = tuple(n for n, s in enumerate(plan.steps, 1) if isinstance(s, Statement) and n not in done)
    state, flag = records.state(plan.flag), records.flags.get(plan.flag)
    reached = max((s.to for n, s in enumerate(plan.steps, 1) if isinstance(s, Switch) and n in done), default=State.OLD)
    if state < reached:
        held, target, moves_only = Held(plan.flag, state), None, False
    else:
        held, wanted = None, _target(plan, until)
        target = wanted if wanted > state else None
        valid = flag is not None and flag.new_valid
        moves_only = until is Until.MOVED and plan.has_move and state < State.LIVE and not valid
    unfinished = row is None or (row.finished_at is None and len(done) == len(plan.steps))
    if unfinished or statements or target is not None or moves_only:
        return Todo(accepted, statements, target, moves_only), held
    return None, held


def _target(plan: Plan, until: Until) -> State:
    if until is Until.STRUCTURE:
        return State.OLD
    if until is Until.LIVE:
        return State.LIVE
    return State.DUAL if plan.has_move else State.OLD


# --------------------------------------------------------------------------------------------------------------------
# Doing it


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
    """

    session: Session
    config: Config
    plans: Sequence[AcceptedPlan]
    listener: Listener | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str | None = None
    _turn: Turn = field(init=False)

    async def records(self) -> Records:
        """Read the ledger, after installing it where it is missing."""
        records = await ledger.read(self.session)
        if records is None:
            await ledger.install(self.session)
            records = await ledger.read(self.session)
        if records is None:
            raise ShardError("the ledger was removed while it was read; apply again", shard=self.session.shard.name)
        return records

    async def apply(self, todo: Sequence[Todo], records: Records) -> bool:
        """
        Do what `pending` left.

        Returns:
            True when all of it is done; False when `stop` ended it at a safe place.

        Raises:
            ShardError: of any kind; what committed before stays and is recorded.
        """
        if not todo:
            return True
        if records.maintenance == 0 and (offline := [t.plan.revision for t in todo if not t.plan.online]):
            raise PreflightFailed(
                f"{offline[0]} wants the shard in maintenance; `shardmig maintenance on --shard {records.shard}` first",
                shard=records.shard,
            )
        for warning in await preflight(self.session, *(item.accepted for item in todo)):
            self._say(Warned(records.shard, warning))
        async with self._in_turn():
            await self._begin(todo, records)
            for item in todo:
                await self._structure(item)
            for item in todo:
                await self._walk_plan(item)
            return True
        return False

    async def vouch(self, release: str, todo: Sequence[Todo]) -> None:
        """Log that an operator vouches for a release: every process that runs knows these flags (G0)."""
        for item in todo:
            await switching.vouch(self.session, item.plan.flag, release)

    async def walk(self, flag: str, target: State) -> bool:
        """
        Take a flag to a state, one edge after the other, with the drains and moves each edge needs.

        Returns:
            True when it is there; False when `stop` ended it at a safe place.
        """
        async with self._in_turn():
            await self._walk(flag, target, self._plan_of(flag))
            return True
        return False

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """Take the turn and end it; a stop asked for leaves the block quietly, at a safe place."""
        self._turn = await Turn.take(self.session)
        try:
            yield
        except _Stopped:
            pass
        except DrainTimeout:
            if not self.stop.is_set():
                raise
        finally:
            await self._end()

    def _pass_on(self) -> None:
        """Go on, unless Ctrl-C asked to stop; everything done so far is recorded."""
        if self.stop.is_set():
            raise _Stopped

    async def maintain(self, mode: str) -> None:
        """Set maintenance ("off", "read-only", "offline"), then wait until nobody is inside who does not know."""
        await ledger.set_maintenance(self.session, mode, self.reason)
        if mode != "off":
            await switching.drain_shard(self.session, "maintenance", stop=self.stop, listener=self.listener)

    # ----------------------------------------------------------------------------------------------------------------
    # Structure

    async def _begin(self, todo: Sequence[Todo], records: Records) -> None:
        """Enter all plans in one flight: from here on the shard's own ledger says what is going on."""
        positions = {accepted.plan.revision: place for place, accepted in enumerate(self.plans, 1)}
        queries = [
            query
            for item in todo
            if item.plan.revision not in records.migrations
            for query in ledger.begin_migration(
                self._turn.shard, item.plan, position=positions[item.plan.revision], text=planfile.dumps(item.plan)
            )
        ]
        if queries:
            with ledger.translated(self._turn.shard):
                await self.session.transact([self._turn.hold(), *queries])

    async def _structure(self, item: Todo) -> None:
        """Execute the statements that are left, those that lock nothing existing together, each other one alone."""
        free: list[int] = []
        for number in item.statements:
            step = item.plan.steps[number - 1]
            assert isinstance(step, Statement)  # noqa: S101 - pending lists statements only
            if step.transactional and number not in item.accepted.locks:
                free.append(number)
                continue
            await self._together(item, free)
            free = []
            self._pass_on()
            if step.transactional:
                await self._step(item.plan, number, lambda n=number: self._locked(item, n))  # type: ignore[misc]
            else:
                await self._step(item.plan, number, lambda n=number: self._index(item, n))  # type: ignore[misc]
        await self._together(item, free)

    async def _together(self, item: Todo, numbers: Sequence[int]) -> None:
        if numbers:
            await self._step(item.plan, numbers[0], lambda: self._free(item, numbers))

    async def _free(self, item: Todo, numbers: Sequence[int]) -> None:
        """Run statements that lock no existing relation, in one transaction with their records."""
        plan = item.plan
        left = [n for n in numbers if not (await self._turn.claim(plan.revision, n)).done]
        queries = []
        for number in left:
            step = plan.steps[number - 1]
            assert isinstance(step, Statement)  # noqa: S101 - numbers of statements
            queries += [self._turn.record_step(plan.revision, number), Query(step.sql), *self._grants(item, number)]
        if queries:
            with ledger.translated(self._turn.shard):
                await self.session.transact(queries, local=self._limits())

    async def _locked(self, item: Todo, number: int) -> None:
        """Run one statement under a lock on an existing relation: fence, statement, proof and COMMIT in one flight."""
        plan = item.plan
        if (await self._turn.claim(plan.revision, number)).done:
            return
        step = plan.steps[number - 1]
        assert isinstance(step, Statement)  # noqa: S101 - a number of a statement
        queries = [self._turn.record_step(plan.revision, number), Query(step.sql), *self._grants(item, number)]
        with ledger.translated(self._turn.shard):
            await locking.under_lock(
                self.session,
                item.accepted.locks[number],
                queries,
                mode=locking.mode_of(step.sql),
                on_wait=self.listener,
            )

    def _grants(self, item: Todo, number: int) -> list[Query]:
        table = item.accepted.creates.get(number)
        if table is None:
            return []
        name = ".".join(quote(part) for part in table.split("."))
        return [
            Query(f"GRANT {privileges} ON {name} TO {quote(role)}")
            for role, privileges in self.config.session.grant.items()
        ]

    async def _index(self, item: Todo, number: int) -> None:
        """
        Build an index CONCURRENTLY: note the intent, build, look whether it is valid, record.

        An INVALID leftover of an interrupted build is dropped CONCURRENTLY and built again; IF NOT EXISTS would keep
        it.
        """
        plan = item.plan
        row = await self._turn.claim(plan.revision, number)
        if row.done:
            return
        step = plan.steps[number - 1]
        assert isinstance(step, Statement)  # noqa: S101 - a number of a statement
        name = item.accepted.indexes[number]
        valid = await self._index_validity(name)
        if valid and row.attempts == 1:
            raise StepFailed(f"an index {name!r} is there already, not built by this step", shard=self._turn.shard)
        if valid is False:
            await self.session.execute_alone(f"DROP INDEX CONCURRENTLY {quote(name)}")
        if not valid:
            await self.session.execute_alone(step.sql)
        if not await self._index_validity(name):
            raise StepFailed(f"index {name!r} was built, but is not valid; apply again", shard=self._turn.shard)
        with ledger.translated(self._turn.shard):
            await self.session.transact([self._turn.record_step(plan.revision, number)])

    async def _index_validity(self, name: str) -> bool | None:
        found = await self.session.execute(
            "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relname = $1 AND n.nspname = current_schema()",
            [name],
        )
        return found.value  # type: ignore[no-any-return]

    def _limits(self) -> dict[str, str]:
        timeout_ms = int(self.config.session.statement_timeout_s * 1000)
        return {"statement_timeout": f"{timeout_ms}ms", "lock_timeout": f"{self.config.session.lock_timeout_ms[-1]}ms"}

    async def _step(self, plan: Plan, number: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do a step; a broken connection is repaired once, and what was in doubt is decided by the step row."""
        where = f"{plan.revision} step {number}"
        step = plan.steps[number - 1]
        self._say(StepStarted(self._turn.shard, plan.revision, number, step.kind))
        started = time.monotonic()
        try:
            try:
                await work()
            except (InDoubt, pg.OperationalError) as error:
                if not (isinstance(error, InDoubt) or is_connection_lost(error)):
                    raise
                self._say(Waiting(self._turn.shard, "the connection was lost"))
                await self._turn.renew()
                await work()
        except (InDoubt, ShardUnreachable):
            raise
        except ShardError as error:
            error.step = error.step or where
            await self._note_failure(plan, number, str(error))
            raise
        except pg.Error as error:
            failed = self._failure(error, where, step)
            await self._note_failure(plan, number, str(failed))
            raise failed from error
        self._say(StepDone(self._turn.shard, plan.revision, number, time.monotonic() - started))

    def _failure(self, error: pg.Error, where: str, step: object) -> ShardError:
        shard = self._turn.shard
        if isinstance(error, pg.LockNotAvailable):
            return LockNotObtained(f"{error.diag.message_primary}; apply again", shard=shard, step=where)
        if is_connection_lost(error):
            return InDoubt(shard=shard, step=where)
        failed = self.session.failed
        caret = pointer(error, failed.sql) if failed else ""
        line = getattr(step, "line", None)
        script = f" (line {line} of the script)" if line else ""
        return StepFailed(f"{error.diag.message_primary or error}{script}\n{caret}".rstrip(), shard=shard, step=where)

    async def _note_failure(self, plan: Plan, number: int, error: str) -> None:
        """Keep the reason in the ledger, if the connection still can; the error itself is raised anyway."""
        try:
            await self.session.flight([self._turn.record_failure(plan.revision, number, error)])
        except (pg.Error, ShardError):
            return

    # ----------------------------------------------------------------------------------------------------------------
    # Flags

    async def _walk_plan(self, item: Todo) -> None:
        plan = item.plan
        if item.target is not None:
            await self._walk(plan.flag, item.target, item.accepted)
        if item.moves_only:
            await self._make_valid(plan, forward=True)
        records = await self.records()
        if all(step.done for (revision, _), step in records.steps.items() if revision == plan.revision):
            await self.session.flight([ledger.finish_migration(self._turn.shard, plan.revision)])

    async def _walk(self, flag: str, target: State, accepted: AcceptedPlan) -> None:
        row = await switching.read_flag(self.session, flag)
        try:
            edges = route(State(row.state), target, has_move=row.has_move)
        except ValueError as error:
            raise SwitchRefused(f"flag {flag}: {error}", shard=self._turn.shard) from None
        for edge in edges:
            self._pass_on()
            await self._earn(accepted.plan, row, edge)
            row = await self._flip(accepted.plan, await switching.read_flag(self.session, flag), edge.target)

    async def _earn(self, plan: Plan, row: FlagRow, edge: Edge) -> None:
        """Do what an edge's guard asks for."""
        match edge.guard:
            case Guard.NONE if edge.target is State.DUAL:
                for number, move in plan.moves:
                    await moves.refuse_lossy(self.session, plan.revision, number, move)
            case Guard.NONE:
                pass
            case Guard.DRAINED:
                await switching.drain(self._turn, row, stop=self.stop, listener=self.listener)
            case Guard.NEW_VALID if not row.new_valid:
                await self._make_valid(plan, forward=True)
            case Guard.OLD_VALID if not row.old_valid:
                await self._make_valid(plan, forward=False)
            case _:
                pass
        if edge.target is State.DONE:
            await relaxation.relax(self.session, plan)

    async def _make_valid(self, plan: Plan, *, forward: bool) -> None:
        """
        Move rows and check them all: forward in DUAL, back in LIVE.

        The drain comes first: whoever still writes only one representation would make a moved row stale again.
        """
        row = await switching.read_flag(self.session, plan.flag)
        row = await switching.drain(self._turn, row, stop=self.stop, listener=self.listener)
        for number, move in plan.moves:
            await self._move(plan, number, move, forward=forward)
        column = "new_valid" if forward else "old_valid"
        valid = Query(
            f"UPDATE shardmig.flag SET {column} = true WHERE shard = $1 AND flag = $2 AND epoch = $3",
            (self._turn.shard, plan.flag, row.epoch),
        )
        numbers = [number for number, _ in plan.moves]
        records = [self._turn.record_step(plan.revision, number) for number in numbers]
        await self._claim(plan, numbers)  # a reconnect in between has raised the term
        with ledger.translated(self._turn.shard):
            results = await self.session.transact([self._turn.hold(), *records, valid])
        if results[-1].rowcount != 1:
            raise SwitchRefused(f"flag {plan.flag} was switched while rows moved; apply again", shard=self._turn.shard)

    async def _move(self, plan: Plan, number: int, move: Move, *, forward: bool) -> None:
        async def work() -> None:
            run = moves.MoveRun(
                self._turn,
                plan.revision,
                number,
                move,
                "forward" if forward else "back",
                self.config.pace,
                stop=self.stop,
                listener=self.listener,
            )
            if not await run.run():
                raise _Stopped

        await self._step(plan, number, work)

    async def _flip(self, plan: Plan, row: FlagRow, target: State) -> FlagRow:
        forward = target > row.state
        numbers = [n for n, s in enumerate(plan.steps, 1) if isinstance(s, Switch) and s.to is target and forward]
        done = {n for (r, n), s in (await self.records()).steps.items() if r == plan.revision and s.done}
        new = [number for number in numbers if number not in done]
        await self._claim(plan, new)
        records = [self._turn.record_step(plan.revision, number) for number in new]
        return await switching.flip(
            self._turn, row, target, reason=self.reason, records=records, listener=self.listener
        )

    async def _claim(self, plan: Plan, numbers: Sequence[int]) -> None:
        for number in numbers:
            await self._turn.claim(plan.revision, number)

    def _plan_of(self, flag: str) -> AcceptedPlan:
        for accepted in self.plans:
            if accepted.plan.flag == flag:
                return accepted
        known = ", ".join(a.plan.flag for a in self.plans) or "none"
        raise SwitchRefused(f"no flag {flag!r} in the migrations; known flags: {known}", shard=self.session.shard.name)

    async def _end(self) -> None:
        """End the turn, if the connection still can; a successor does not wait for it."""
        try:
            await self.session.flight([self._turn.end()])
        except (pg.Error, ShardError):
            return

    def _say(self, event: StepStarted | StepDone | Waiting | Warned) -> None:
        if self.listener:
            self.listener(event)
