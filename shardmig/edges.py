"""
Taking a flag along the edges of its graph: what an edge's guard asks for is earned, then the flag flips.

Drain, move, check, flip: one edge at a time, in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import relaxation, switching
from shardmig.checks import compare
from shardmig.errors import CheckFailed, PreflightFailed, SwitchedMeanwhile, SwitchRefused
from shardmig.events import Warned
from shardmig.keyset import bound
from shardmig.ledger import translated
from shardmig.moves import MoveRun
from shardmig.patience import Interrupted
from shardmig.plan import Switch
from shardmig.sampling import refuse_lossy
from shardmig.states import Guard, State, route
from shardmig.steps import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.checks import Direction, Disagreement
    from shardmig.config import Pace
    from shardmig.hosts import Host
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan, Move, Plan
    from shardmig.records import FlagRow
    from shardmig.states import Edge
    from shardmig.steps import Steps
    from shardmig.turn import Turn

__all__ = ["Edges", "unvouched"]


@dataclass(slots=True)
class Edges:
    """
    One runner's walk along the edges of the flags of one shard.

    Attributes:
        steps: does what the guards ask for.
        pace: of the moves.
        reason: for the log of what is switched.
        rechecks: compare all rows before LIVE also where that was done before; none is changed then.
        vouched: an operator vouches that every process which runs knows the flags.
        mismatches: a file for the rows that a check finds wrong; None names the first of them only.
        host: what moves of other shards on the same server share with those here.
        known: the flags as just read; each is believed once.
    """

    steps: Steps
    pace: Pace
    reason: str | None = None
    rechecks: bool = False
    vouched: bool = False
    mismatches: Mismatches | None = None
    host: Host | None = None
    known: dict[str, FlagRow] = field(default_factory=dict)

    @property
    def _turn(self) -> Turn:
        return self.steps.turn

    async def walk(self, flag: str, target: State, accepted: AcceptedPlan) -> None:
        """Take a flag to a state, one edge after the other, each of which looks first how far it is."""
        row = self.known.get(flag) or await switching.read_flag(self._turn.session, flag)
        try:
            edges = route(State(row.state), target, has_move=row.has_move)
        except ValueError as error:
            raise SwitchRefused(f"flag {flag}: {error}", shard=self._turn.shard) from None
        if any(edge.guard is Guard.OLD_VALID for edge in edges):
            # Before the first of them: DONE → LIVE would be committed, and a move that cannot begin noted as failed.
            self._refuse_one_way(accepted.plan, row)
        for edge in edges:
            self.steps.pass_on()
            await self._take(accepted.plan, edge)

    async def make_valid(self, plan: Plan, *, forward: bool, row: FlagRow | None = None) -> None:
        """
        Move rows and check them all: forward in DUAL, back in LIVE.

        The drain comes first: whoever still writes only one representation would make a moved row stale again.

        Args:
            plan: whose rows.
            forward: whether new is filled from old.
            row: the flag, if it was just read.
        """
        row = row or await switching.read_flag(self._turn.session, plan.flag)
        if row.new_valid if forward else row.old_valid:
            return
        if not forward:
            self._refuse_one_way(plan, row)
        while True:
            row = await switching.drain(self._turn, row, stop=self.steps.stop, listener=self.steps.listener)
            term = self._turn.term
            for number, move in plan.moves:
                if forward or not move.seed:
                    await self._move(plan, number, move, forward=forward)
                else:
                    await self._pass_over(plan, number)
            if self._turn.term == term:
                break
            # A reconnect may have led to a standby that lacks the end of a move which was over: each says where it is.
            row = await switching.read_flag(self._turn.session, plan.flag)
        valid = self._turn.record_valid(plan.flag, "forward" if forward else "back", row.epoch)
        with translated(self._turn.shard):
            await self._turn.session.transact([valid])

    async def take_back(self, plan: Plan, target: State) -> None:
        """Take a flag back to a state that it had; the runner does it, not people, so that apply goes forward again."""
        row = await switching.read_flag(self._turn.session, plan.flag)
        for edge in route(State(row.state), target, has_move=row.has_move) if row.state > target else ():
            if edge.guard is Guard.DRAINED:
                row = await switching.drain(self._turn, row, listener=self.steps.listener)
            numbers = [n for n, s in enumerate(plan.steps, 1) if isinstance(s, Switch) and s.to is edge.source]
            records = [self._turn.reopen_steps(plan.revision, numbers)]
            row = await switching.flip(
                self._turn, row, edge.target, reason=self.reason, records=records, listener=self.steps.listener
            )

    async def _take(self, plan: Plan, edge: Edge) -> None:
        """Take one edge, if the flag has not taken it already; where it has, people may take it back meanwhile."""
        first: FlagRow | None = None

        async def take() -> None:
            nonlocal first
            row = self.known.pop(plan.flag, None) or await switching.read_flag(self._turn.session, plan.flag)
            first = first or row
            if row.state != edge.target:
                if (row.state, row.epoch) != (edge.source, first.epoch):
                    raise SwitchedMeanwhile(
                        f"flag {plan.flag} was switched by somebody else meanwhile; apply goes on from where it is now",
                        shard=self._turn.shard,
                    )
                await self._earn(plan, row, edge)
                await self._flip(plan, row, edge.target)
            if edge.target is State.OLD:
                await self._take_seeds_out(plan)

        await self.steps.surely(take)

    async def _earn(self, plan: Plan, row: FlagRow, edge: Edge) -> None:
        """Do what an edge's guard asks for."""
        match edge.guard:
            case Guard.NONE if edge.target is State.DUAL:
                self._warn_unless_vouched(plan)
                await self._try_out(plan)
            case Guard.NONE if edge.source is State.DONE:
                await relaxation.refuse_without_old(self._turn.session, plan)
            case Guard.NONE:
                pass
            case Guard.DRAINED if edge.target is State.DONE:
                await self._earn_done(plan, row)
            case Guard.DRAINED:
                await switching.drain(self._turn, row, stop=self.steps.stop, listener=self.steps.listener)
            case Guard.NEW_VALID if not row.new_valid:
                await self.make_valid(plan, forward=True, row=row)
            case Guard.NEW_VALID if self.rechecks:
                await self._refuse_contradicting(plan)
            case Guard.OLD_VALID if not row.old_valid:
                await self.make_valid(plan, forward=False, row=row)
            case _:
                pass

    async def _try_out(self, plan: Plan) -> None:
        for number, move in plan.moves:
            try:
                await refuse_lossy(
                    self._turn, plan.revision, number, move, stop=self.steps.stop, listener=self.steps.listener
                )
            except Interrupted:
                raise Stopped from None

    async def _earn_done(self, plan: Plan, row: FlagRow) -> None:
        """Drain, then look at all rows; a column in the way is told before it, and nobody waited for nothing."""
        await relaxation.refuse_mandatory(self._turn.session, plan)
        await switching.drain(self._turn, row, stop=self.steps.stop, listener=self.steps.listener)
        await self._refuse_lost(plan)
        await relaxation.relax(self._turn.session, plan, fence=self._turn.hold(), listener=self.steps.listener)

    async def _flip(self, plan: Plan, row: FlagRow, target: State) -> None:
        self.known[plan.flag] = await switching.flip(
            self._turn, row, target, reason=self.reason, listener=self.steps.listener
        )

    async def _take_seeds_out(self, plan: Plan) -> None:
        """Remove the plan's own rows when nobody who acts on DUAL is left; rows that refer to them keep them."""
        purges = [bound(move.purge, move, None, None) for _, move in plan.moves if move.seed and move.purge]
        if not purges:
            return
        row = await switching.read_flag(self._turn.session, plan.flag)
        await switching.drain(self._turn, row, stop=self.steps.stop, listener=self.steps.listener)
        try:
            # Whoever goes to DUAL again meanwhile finds them written anew by the next move, and checked.
            await self._turn.session.transact([self._turn.hold(), *reversed(purges)])
        except pg.IntegrityError as error:
            self.steps.say(Warned(self._turn.shard, f"{plan.flag}: seed rows stay: {error.diag.message_primary}"))

    def _refuse_one_way(self, plan: Plan, row: FlagRow) -> None:
        if not row.old_valid and not plan.has_way_back:
            raise PreflightFailed(
                f"{plan.flag} cannot go back from DONE: writers have left old alone, and its script has no `back` that "
                f"could fill it; it stays {State(row.state).name}, and may for ever",
                shard=self._turn.shard,
            )

    def _warn_unless_vouched(self, plan: Plan) -> None:
        if not self.vouched:
            self.steps.say(unvouched(self._turn.shard, plan))

    async def _refuse_contradicting(self, plan: Plan) -> None:
        """
        Before LIVE, compare all rows again; none is changed, for since LIVE new may be newer than old.

        What the application wrote then need not be forward(old), if old is back(new).
        """
        for number, move in plan.moves:
            if not move.seed:  # from LIVE on they were the application's
                what = "new is not forward(old)" + ("" if move.back_check is None else ", nor old back(new)")
                why = f"stays DUAL, and no row of {move.table} was changed: {what}"
                await self._refuse_differing(plan, number, "forward", why, either=True)

    async def _refuse_lost(self, plan: Plan) -> None:
        """
        Before DONE, compare all of old with back(new): the lossy test before the move has seen a sample only.

        From DONE on old goes stale, and the way back writes back(new) into every row.
        """
        for number, move in plan.moves:
            if not move.lossy and move.back is not None:
                why = f"stays LIVE: going back from DONE would change rows of {move.table}, for back(new) is not old"
                await self._refuse_differing(plan, number, "back", why, cure=", or say lossy=True")

    async def _refuse_differing(
        self, plan: Plan, number: int, direction: Direction, why: str, *, cure: str = "", either: bool = False
    ) -> None:
        move, first = dict(plan.moves)[number], None
        export = self._export(plan, move, direction)
        async for found in compare(self._turn.session, move, direction, either=either):
            self.steps.pass_on()
            first = first or found
            if export is None:
                break
            export(found)
        if first is not None:
            raise CheckFailed(
                f"{plan.flag} {why}; first keys: {first.shown()}. Correct those rows{cure}",
                shard=self._turn.shard,
                step=f"{plan.revision} step {number}",
            )

    async def _move(self, plan: Plan, number: int, move: Move, *, forward: bool) -> None:
        async def work() -> None:
            run = MoveRun(
                self._turn,
                plan.revision,
                number,
                move,
                "forward" if forward else "back",
                self.pace,
                stop=self.steps.stop,
                listener=self.steps.listener,
                export=self._export(plan, move, "forward" if forward else "back"),
                host=self.host,
            )
            if not await run.run():
                raise Stopped

        await self.steps.do(plan, number, work)

    async def _pass_over(self, plan: Plan, number: int) -> None:
        """Record that nothing moves back of a plan's own rows, for the ledger asks after each move."""
        turn, step = self._turn, (plan.revision, number)
        with translated(turn.shard):
            await turn.session.transact(
                [
                    turn.claiming(*step),
                    turn.begin_move(*step, "back", upto=None, rows_estimated=0),
                    turn.record_check(*step, expected=None, reached=None, finished=True),
                ]
            )

    def _export(self, plan: Plan, move: Move, direction: Direction) -> Callable[[Disagreement], None] | None:
        if self.mismatches is None:
            return None
        return partial(self.mismatches.add, self._turn.shard, plan.flag, move, direction)


def unvouched(shard: str, plan: Plan) -> Warned:
    """Warn (G0): a process that does not know the flag writes old alone, and the move would never see it."""
    return Warned(
        shard,
        f"nobody vouched that every process which runs knows the flag {plan.flag}; what an older one writes from now "
        "on is lost to readers of new (--aware RELEASE vouches, and logs it)",
    )
