"""
Applying plans to one shard.

`todo.pending` has decided what is left; `Run.apply` does it. Structure of all plans comes first (a shard may be ahead
of any release, and a slow move must not hold up a hotfix's column), then each flag walks to its state: drain, move,
check, flip, one edge at a time. `Run.walk` is the same walk on request, in both directions.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import catalog, ledger, moves, planfile, relaxation, structure, switching
from shardmig.errors import (
    CheckFailed,
    DrainTimeout,
    InDoubt,
    LockNotObtained,
    PreflightFailed,
    ShardError,
    ShardUnreachable,
    StepFailed,
    SwitchRefused,
)
from shardmig.events import StepDone, StepStarted, Waiting, Warned
from shardmig.plan import Move, Switch
from shardmig.preflight import preflight
from shardmig.records import flags_of, flags_query, last_states, read_records
from shardmig.session import Query, is_connection_lost, pointer
from shardmig.states import Edge, Guard, State, route
from shardmig.turn import Turn, begin_migration, finish_migration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from shardmig.checks import Direction, Disagreement
    from shardmig.config import Config
    from shardmig.events import Listener
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.records import FlagRow, Records
    from shardmig.session import Session
    from shardmig.todo import Todo

__all__ = ["Run"]


_UNCHANGED = "; nothing was changed there"  # what a refused connection adds, which an earlier COMMIT may belie


class _Stopped(Exception):
    """Ctrl-C was pressed; everything done so far is recorded."""


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
        mismatches: a file for the rows that a check finds wrong; None names the first of them only.
    """

    session: Session
    config: Config
    plans: Sequence[AcceptedPlan]
    listener: Listener | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reason: str | None = None
    proves_schemas: bool = False
    mismatches: Mismatches | None = None
    _turn: Turn = field(init=False)
    _vouched: bool = field(init=False, default=False)
    _known: dict[str, FlagRow] = field(init=False, default_factory=dict)  # as just read; each is believed once
    _fresh: set[tuple[str, int]] = field(init=False, default_factory=set)  # steps that nobody can have done
    _states: tuple[tuple[str, str], ...] = field(init=False, default=())

    async def records(self) -> Records:
        """Read the ledger, after installing it where it is missing."""
        known = {accepted.sha256 for accepted in self.plans}
        records = await read_records(self.session, known=known)
        if records is None:
            await ledger.install(self.session)
            records = await read_records(self.session, known=known)
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
        after = self.config.lint.start_after
        if after and after not in records.migrations:
            raise PreflightFailed(
                f"this shard was not adopted at {after}; `shardmig adopt --shard {records.shard}` first",
                shard=records.shard,
            )
        if records.maintenance == 0 and (offline := [t.plan.revision for t in todo if not t.plan.online]):
            raise PreflightFailed(
                f"{offline[0]} wants the shard in maintenance; `shardmig maintenance on --shard {records.shard}` first",
                shard=records.shard,
            )
        for warning in await preflight(self.session, *(item.accepted for item in todo)):
            self._say(Warned(records.shard, warning))
        async with self._in_turn(self._beginning(todo, records)):
            self._fresh = {
                (item.plan.revision, number)
                for item in todo
                if item.plan.revision not in records.migrations
                for number in item.statements
            }
            if not all(item.plan.online for item in todo):
                # Whoever set maintenance by hand, or was told that its drain gave up, has not waited for who is inside.
                await switching.drain_shard(self.session, "maintenance", stop=self.stop, listener=self.listener)
            async with self._proved():
                for item in todo:
                    await self._structure(item)
            for item in todo:
                await self._walk_plan(item)
            return True
        return False

    async def vouch(self, release: str, todo: Sequence[Todo]) -> None:
        """Log that an operator vouches for a release: every process that runs knows these flags (G0)."""
        self._vouched = True
        for item in todo:
            await switching.vouch(self.session, item.plan.flag, release)

    async def walk(self, flag: str, target: State) -> bool:
        """
        Take a flag to a state, one edge after the other, with the drains and moves each edge needs.

        Returns:
            True when it is there; False when `stop` ended it at a safe place.
        """
        async with self._in_turn():
            accepted = self._plan_of(flag)
            await self._walk(flag, target, accepted)
            await self._surely(partial(self._finish, accepted.plan))
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
        numbers = [n for n, step in enumerate(plan.steps, 1) if isinstance(step, Switch) and step.to is State.LIVE]

        async def flip() -> None:
            row = await switching.read_flag(self.session, plan.flag)
            if row.state == State.LIVE:
                target = State.DUAL if row.has_move else State.OLD
                records = [self._turn.reopen_steps(plan.revision, numbers)]
                await switching.flip(
                    self._turn, row, target, reason=self.reason, records=records, listener=self.listener
                )

        try:
            await self._surely(flip)
        except SwitchRefused as refused:  # a later flag that went further reads from it: the structure stays anyway
            return f"{plan.flag} stays LIVE ({refused.args[0]})"
        state = State((await switching.read_flag(self.session, plan.flag)).state)
        return f"{plan.flag} is {state.name} again"

    async def states(self) -> tuple[tuple[str, str], ...]:
        """Name the state of each flag for a report, as last seen."""
        return self._states or await last_states(self.session)

    @asynccontextmanager
    async def _in_turn(self, beginning: Sequence[Query] = ()) -> AsyncIterator[None]:
        """Take the turn, begin, and end it; a stop asked for leaves the block quietly, at a safe place."""
        await self._take_turn(beginning)
        try:
            yield
        except _Stopped:
            pass
        except DrainTimeout:
            if not self.stop.is_set():
                raise
        except pg.LockNotAvailable as error:
            raise ledger.is_held(error, self.session.shard.name) from error
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

    async def _take_turn(self, beginning: Sequence[Query]) -> None:
        """Take the turn, and write what begins it; all of that may be written twice."""
        flags = flags_query(self.session.shard.name)
        for attempts_left in (2, 1, 0):
            try:
                self._turn, results = await Turn.take_and(self.session, [*beginning, flags])
            except pg.LockNotAvailable as error:
                raise ledger.is_held(error, self.session.shard.name) from error
            except (InDoubt, pg.OperationalError) as error:
                lost = isinstance(error, InDoubt) or is_connection_lost(error)
                if not lost or not attempts_left:
                    raise
                await self.session.reconnect()
            else:
                self._known = flags_of(results[-1])
                return

    def _beginning(self, todo: Sequence[Todo], records: Records) -> list[Query]:
        """Enter all plans: from here on the shard's own ledger says what is going on."""
        positions = {accepted.plan.revision: place for place, accepted in enumerate(self.plans, 1)}
        return [
            query
            for item in todo
            if item.plan.revision not in records.migrations
            for query in begin_migration(
                records.shard, item.plan, position=positions[item.plan.revision], text=planfile.dumps(item.plan)
            )
        ]

    def _proved(self) -> AbstractAsyncContextManager[None]:
        """Prove on the canary that whole schemas only grew; elsewhere a locked table is proved in its transaction."""
        if not self.proves_schemas:
            return nullcontext()
        schemas = {self.session.shard.schema_name, *self.config.lint.schemas}
        return catalog.additive(self.session, sorted(schemas))

    async def _structure(self, item: Todo) -> None:
        """Execute the statements that are left, those that lock nothing existing together, each other one alone."""
        accepted = item.accepted
        free: list[int] = []
        for number in item.statements:
            if number not in accepted.locks and number not in accepted.indexes:
                free.append(number)
                continue
            await self._together(item, free)
            free = []
            self._pass_on()
            if number in accepted.indexes:
                work = partial(structure.build_index, self._turn, accepted, number)
            else:
                work = partial(self._under_lock, accepted, number)
            await self._step(item.plan, number, work)
        await self._together(item, free)

    async def _together(self, item: Todo, numbers: Sequence[int]) -> None:
        if numbers:
            await self._step(item.plan, numbers[0], partial(self._freely, item.accepted, numbers))

    async def _under_lock(self, accepted: AcceptedPlan, number: int) -> None:
        await structure.execute_under_lock(
            self._turn,
            self.config.session,
            accepted,
            number,
            listener=self.listener,
            fresh=self._are_fresh(accepted.plan, [number]),
        )

    async def _freely(self, accepted: AcceptedPlan, numbers: Sequence[int]) -> None:
        fresh = self._are_fresh(accepted.plan, numbers)
        await structure.execute_together(self._turn, self.config.session, accepted, numbers, fresh=fresh)

    def _are_fresh(self, plan: Plan, numbers: Sequence[int]) -> bool:
        """Say whether nobody can have done these steps: true once, for the first try may have happened."""
        steps = {(plan.revision, number) for number in numbers}
        fresh = steps <= self._fresh
        self._fresh -= steps
        return fresh

    async def _step(self, plan: Plan, number: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do a step; a broken connection is repaired once, and what was in doubt is decided by the step row."""
        where = f"{plan.revision} step {number}"
        step = plan.steps[number - 1]
        self._say(StepStarted(self._turn.shard, plan.revision, number, step.kind))
        started = time.monotonic()
        try:
            await self._surely(work)
        except (InDoubt, ShardUnreachable):
            raise
        except ShardError as error:
            error.step = error.step or where
            await self._note_failure(plan, number, str(error))
            raise
        except pg.Error as error:
            number = self._failed_step(plan, number)
            failed = self._failure(error, f"{plan.revision} step {number}", plan.steps[number - 1])
            await self._note_failure(plan, number, str(failed))
            raise failed from error
        self._say(StepDone(self._turn.shard, plan.revision, number, time.monotonic() - started))

    def _failed_step(self, plan: Plan, first: int) -> int:
        """Tell which of the statements that run together the server refused."""
        sql = self.session.failed.sql if self.session.failed else None
        return next((n for n, step in enumerate(plan.steps, 1) if getattr(step, "sql", None) == sql), first)

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
            await self._surely(partial(self._make_valid, plan, forward=True))
        if item.target is not State.LIVE:  # the flip to LIVE has finished it
            await self._surely(partial(self._finish, plan))

    async def _finish(self, plan: Plan) -> None:
        await self.session.flight([finish_migration(self._turn.shard, plan.revision)])

    async def _walk(self, flag: str, target: State, accepted: AcceptedPlan) -> None:
        row = self._known.get(flag) or await switching.read_flag(self.session, flag)
        try:
            edges = route(State(row.state), target, has_move=row.has_move)
        except ValueError as error:
            raise SwitchRefused(f"flag {flag}: {error}", shard=self._turn.shard) from None
        for edge in edges:
            self._pass_on()
            await self._surely(partial(self._take, accepted.plan, edge))

    async def _take(self, plan: Plan, edge: Edge) -> None:
        """Take one edge, if the flag has not taken it already."""
        row = self._known.pop(plan.flag, None) or await switching.read_flag(self.session, plan.flag)
        if row.state != edge.target:
            await self._earn(plan, row, edge)
            await self._flip(plan, row, edge.target)

    async def _surely(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what looks first how far it is; when the connection breaks, reconnect and look again."""
        for attempts_left in (2, 1, 0):
            try:
                await work()
            except (InDoubt, pg.OperationalError) as error:
                lost = isinstance(error, InDoubt) or is_connection_lost(error)
                if not lost or not attempts_left:
                    raise
                self._say(Waiting(self._turn.shard, "the connection was lost"))
                await self._come_back(error)
            else:
                return

    async def _come_back(self, lost: Exception) -> None:
        """Reconnect; where that fails, say whether it is known what became of the last COMMIT."""
        try:
            await self._turn.renew()
        except ShardUnreachable as gone:
            if not isinstance(lost, InDoubt):
                raise
            raise InDoubt(
                f"the connection broke during COMMIT and did not come back ({gone.args[0].removesuffix(_UNCHANGED)}); "
                "apply again: the ledger there decides whether the step happened",
                shard=self._turn.shard,
            ) from lost

    async def _earn(self, plan: Plan, row: FlagRow, edge: Edge) -> None:
        """Do what an edge's guard asks for."""
        match edge.guard:
            case Guard.NONE if edge.target is State.DUAL:
                self._warn_unless_vouched(plan)
                for number, move in plan.moves:
                    await moves.refuse_lossy(self.session, plan.revision, number, move)
            case Guard.NONE if edge.source is State.DONE:
                await relaxation.refuse_without_old(self.session, plan)
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
            await self._refuse_lost(plan)
            await relaxation.relax(self.session, plan, fence=[self._turn.hold()], listener=self.listener)

    def _warn_unless_vouched(self, plan: Plan) -> None:
        """G0: a process that does not know the flag writes old alone, and the move would never see it."""
        if not self._vouched:
            self._say(
                Warned(
                    self._turn.shard,
                    f"nobody vouched that every process which runs knows the flag {plan.flag}; what an older one "
                    "writes from now on is lost to readers of new (apply --aware RELEASE vouches, and logs it)",
                )
            )

    async def _refuse_lost(self, plan: Plan) -> None:
        """
        Before DONE, compare all of old with back(new): the lossy test before the move has seen a sample only.

        From DONE on old goes stale, and the way back writes back(new) into every row.
        """
        for number, move in plan.moves:
            if move.lossy or move.back is None:
                continue
            export, first = self._export(plan, move, "back"), None
            async for found in moves.compare(self.session, move, "back"):
                self._pass_on()
                first = first or found
                if export is None:
                    break
                export(found)
            if first is not None:
                raise CheckFailed(
                    f"{plan.flag} stays LIVE: going back from DONE would change rows of {move.table}, for back(new) is "
                    f"not what stands in old; first keys: {first.shown()}. Correct those rows, or say lossy=True",
                    shard=self._turn.shard,
                    step=f"{plan.revision} step {number}",
                )

    async def _make_valid(self, plan: Plan, *, forward: bool) -> None:
        """
        Move rows and check them all: forward in DUAL, back in LIVE.

        The drain comes first: whoever still writes only one representation would make a moved row stale again.
        """
        row = await switching.read_flag(self.session, plan.flag)
        if row.new_valid if forward else row.old_valid:
            return
        if not forward and not plan.moves:
            raise PreflightFailed(
                f"{plan.flag} cannot go back from DONE: writers have left old alone, and its script has no move that "
                "could fill it; it may stay LIVE for ever",
                shard=self._turn.shard,
            )
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
                export=self._export(plan, move, "forward" if forward else "back"),
            )
            if not await run.run():
                raise _Stopped

        await self._step(plan, number, work)

    def _export(self, plan: Plan, move: Move, direction: Direction) -> Callable[[Disagreement], None] | None:
        if self.mismatches is None:
            return None
        return partial(self.mismatches.add, self._turn.shard, plan.flag, move, direction)

    async def _flip(self, plan: Plan, row: FlagRow, target: State) -> None:
        forward = target > row.state
        numbers = [n for n, s in enumerate(plan.steps, 1) if isinstance(s, Switch) and s.to is target and forward]
        records = [self._turn.record_switches(plan.revision, numbers)] if numbers else []
        self._known[plan.flag] = await switching.flip(
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
            _, flags = await self.session.flight([self._turn.end(), flags_query(self._turn.shard)])
        except (pg.Error, ShardError):
            return
        self._states = tuple((row.flag, State(row.state).name) for row in flags_of(flags).values())

    def _say(self, event: StepStarted | StepDone | Waiting | Warned) -> None:
        if self.listener:
            self.listener(event)
