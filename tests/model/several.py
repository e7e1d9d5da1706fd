"""
Several moves behind one flag, and a failover between any two of their commits.

Rows are simple here, one of each move's table; a batch, a check and a record are one commit each, for `rows` has looked
into them. What is new is what a runner remembers: which moves are over, under which epoch, after which drain. A standby
that stopped replaying at any moment before takes over at any moment after: the ledger and all rows are then those of
back then, open transactions are gone, and only the runner still knows what was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from model.fences import Row
from model.flagrow import FIRST, FlagRow, flips, may_move
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.search import Label

__all__ = ["Several"]

OLD, DUAL, LIVE, DONE = State
_NO_WAITS: frozenset[str] = frozenset()
PENDING, BEGUN, MOVED, CHECKED = range(4)


class Step(NamedTuple):
    """A move's row in the ledger: its direction, and how far it is."""

    direction: str = ""
    stage: int = PENDING


class Shard(NamedTuple):
    """What is committed: a standby has some earlier one of these."""

    flag: FlagRow
    steps: tuple[Step, ...]
    rows: tuple[Row, ...]


class Runner(NamedTuple):
    """
    What the runner remembers.

    Attributes:
        at: the move it is at, from 1; one more than there are: all is moved; 0: it has begun nothing.
        direction: in which it moves.
        epoch: the flag's epoch that it read is the present one.
        earlier: that epoch is the one that the standby has.
        fenced: a flip has taken its steps from it.
        lost: its connection broke since it began, so that its term is another one.
        drained: it has once seen a drain end.
    """

    at: int = 0
    direction: str = ""
    epoch: bool = False
    earlier: bool = False
    fenced: bool = False
    lost: bool = False
    drained: bool = False


class World(NamedTuple):
    """
    Everything there is.

    Attributes:
        standby: what it has, once it has stopped replaying.
        flipped: the flag was flipped since then.
        over: it has taken over.
        drain: bit by process that is waited for; -1: nobody drains.
        apps: the state that each one's open transaction acts on; -1: none.
    """

    shard: Shard
    standby: Shard | None
    flipped: bool
    over: bool
    drain: int
    apps: tuple[int, ...]
    runner: Runner


@dataclass(frozen=True)
class Several:
    """
    A model: the protocol with several moves behind the flag, or what becomes of it with one thing changed.

    Attributes:
        moves: how many.
        apps: how many processes.
        failover: whether a standby takes over.
        asks: of which moves the ledger asks whether they were checked before one representation becomes valid.
        rereads: a runner whose connection broke begins again with the first move.
        epoch: what is recorded as valid is so under the epoch that was read before the moves.
        forgets: of which moves a flip forgets the progress.
        believes_drain: the runner goes by the drain that it remembers, not by the one on record.
        early: new is recorded as valid when the first move is over.
    """

    moves: int = 2
    apps: int = 1
    failover: bool = False
    asks: Literal["each", "any", "no"] = "each"
    rereads: bool = True
    epoch: bool = True
    forgets: Literal["each", "first"] = "each"
    believes_drain: bool = False
    early: bool = False

    def begin(self) -> Iterator[World]:
        """Begin with a row to move in each table."""
        rows = (Row(there=True, old=True, new=False),) * self.moves
        shard = Shard(FIRST._replace(moved=True), (Step(),) * self.moves, rows)
        yield World(shard, None, flipped=False, over=False, drain=-1, apps=(-1,) * self.apps, runner=Runner())

    def steps(self, world: World) -> Iterator[tuple[Label, World]]:
        """Let any process, the runner, whoever switches or the standby do the next thing."""
        for who, state in enumerate(world.apps):
            yield from self._app_steps(world, who, state)
        yield from self._flips(world)
        yield from self._drains(world)
        yield from self._runner_steps(world)
        if self.failover and not world.over:
            yield from self._standby_steps(world)

    def wrong(self, world: World) -> str | None:
        """Look at what each open transaction would read, and at what the next one would."""
        for number, row in enumerate(world.shard.rows, 1):
            for who, state in enumerate(world.apps):
                if state >= 0 and not row.right(state):
                    side = "new" if state >= LIVE else "old"
                    return f"app {who} reads {side} of move {number} in {State(state).name}, which is stale"
            if not row.right(world.shard.flag.state):
                side = "new" if world.shard.flag.state >= LIVE else "old"
                return f"whoever begins now reads {side} of move {number}, which is stale"
        return None

    def canonical(self, world: World) -> World:
        """Sort the processes."""
        if self.apps == 1 or list(world.apps) == sorted(world.apps):
            return world
        order = sorted(range(self.apps), key=lambda who: world.apps[who])
        drain = world.drain
        if drain > 0:
            drain = sum(1 << place for place, who in enumerate(order) if world.drain >> who & 1)
        return world._replace(drain=drain, apps=tuple(world.apps[who] for who in order))

    # -- applications --------------------------------------------------------------------------------------------------

    def _app_steps(self, world: World, who: int, state: int) -> Iterator[tuple[Label, World]]:
        shard = world.shard
        if state < 0:
            yield ("app ", who, ": BEGIN in ", State(shard.flag.state).name), _with(world, who, shard.flag.state)
            return
        for number, row in enumerate(shard.rows):
            rows = _put(shard.rows, number, row.written(state))
            after = world._replace(shard=shard._replace(rows=rows))
            yield ("app ", who, ": writes the row of move ", number + 1, ", COMMIT"), _with(after, who, -1)
        yield ("app ", who, ": ends without a trace"), _with(world, who, -1)

    # -- who switches, and the drain -----------------------------------------------------------------------------------

    def _flips(self, world: World) -> Iterator[tuple[Label, World]]:
        shard = world.shard
        for after in flips(shard.flag, _NO_WAITS, ()):
            steps = shard.steps
            if not after.moved:
                steps = (Step(), *((Step(),) * (self.moves - 1) if self.forgets == "each" else steps[1:]))
            label = ("flip: ", State(shard.flag.state).name, " → ", State(after.state).name)
            flipped = shard._replace(flag=after._replace(moved=True), steps=steps)
            runner = world.runner._replace(epoch=False, fenced=True)
            yield label, world._replace(shard=flipped, drain=-1, flipped=world.standby is not None, runner=runner)

    def _drains(self, world: World) -> Iterator[tuple[Label, World]]:
        flag, runner = world.shard.flag, world.runner
        if flag.drained:
            return
        if world.drain < 0:
            mask = sum(1 << who for who, state in enumerate(world.apps) if state >= 0)
            yield ("drain: lists ", f"{mask:0{self.apps}b}"), world._replace(drain=mask)
        elif world.drain == 0:
            shard = world.shard._replace(flag=flag._replace(drained=True))
            after = world._replace(
                shard=shard, drain=-1, runner=runner._replace(drained=self.believes_drain or runner.drained)
            )
            yield ("drain: nobody of those is left; drained",), after

    # -- the runner ----------------------------------------------------------------------------------------------------

    def _runner_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        runner = world.runner
        if not runner.at:
            direction = may_move(self._believed(world), _NO_WAITS)
            if direction is not None:
                begun = Runner(1, direction, epoch=True, earlier=not world.flipped, drained=runner.drained)
                yield ("runner: begins, ", direction), world._replace(runner=begun)
        elif runner.lost and self.rereads:
            yield ("runner: its term is another one, begins again",), _rests(world)
        elif runner.at > (1 if self.early else self.moves):
            yield self._record(world)
        else:
            yield self._work(world)

    def _believed(self, world: World) -> FlagRow:
        """Tell what the runner takes the flag for."""
        flag = world.shard.flag
        return flag._replace(drained=flag.drained or (self.believes_drain and world.runner.drained))

    def _work(self, world: World) -> tuple[Label, World]:
        """Do the next thing of a move: how far it is, its own row says."""
        shard, runner = world.shard, world.runner
        number = runner.at - 1
        step, row, me = shard.steps[number], shard.rows[number], ("runner: move ", runner.at)
        forward = runner.direction == "forward"
        if step == (runner.direction, CHECKED):
            return (*me, " is over"), world._replace(runner=runner._replace(at=runner.at + 1))
        if runner.fenced:
            return (*me, " is no longer its own"), _rests(world)
        if step.direction != runner.direction or step.stage == PENDING:
            flag = self._believed(world)
            if not (flag.drained and flag.state == (DUAL if forward else LIVE)):
                return (*me, " may not begin"), _rests(world)
            return (*me, " begins"), _stepped(world, number, Step(runner.direction, BEGUN), row)
        copied = row._replace(new=row.old) if forward else row._replace(old=row.new)
        stage = step.stage + 1
        says = " moves its row" if stage == MOVED else " compares its row, and repairs it"
        return (*me, says), _stepped(world, number, Step(runner.direction, stage), copied)

    def _record(self, world: World) -> tuple[Label, World]:
        """Record what became valid, if the ledger lets it."""
        flag, runner = world.shard.flag, world.runner
        forward, state = runner.direction == "forward", self._believed(world)
        checked = [step == (runner.direction, CHECKED) for step in world.shard.steps]
        asked = {"each": all(checked), "any": any(checked), "no": True}[self.asks]
        here = state.drained and state.state == (DUAL if forward else LIVE)
        if not (asked and here and (runner.epoch or not self.epoch)):
            return ("runner: may not record that all is moved",), _rests(world)
        valid = flag._replace(new_valid=True) if forward else flag._replace(old_valid=True)
        shard = world.shard._replace(flag=valid)
        says = "new_valid" if forward else "old_valid"
        return ("runner: all is moved: ", says), _rests(world._replace(shard=shard))

    # -- the standby ---------------------------------------------------------------------------------------------------

    def _standby_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        runner = world.runner
        if world.standby is None:
            after = world._replace(standby=world.shard, runner=runner._replace(earlier=runner.epoch))
            yield ("standby: replays no more",), after
            return
        # Whoever reconnects takes the turn anew: what a flip had taken from it is its own again.
        knows = runner._replace(epoch=runner.earlier, fenced=False, lost=runner.at > 0)
        gone = (-1,) * self.apps
        after = World(world.standby, None, flipped=False, over=True, drain=-1, apps=gone, runner=knows)
        yield ("failover: what the standby lacks is lost",), after


def _put(values: tuple[Row, ...], number: int, value: Row) -> tuple[Row, ...]:
    return (*values[:number], value, *values[number + 1 :])


def _with(world: World, who: int, state: int) -> World:
    drain = world.drain & ~(1 << who) if world.drain >= 0 and state < 0 else world.drain
    return world._replace(drain=drain, apps=(*world.apps[:who], state, *world.apps[who + 1 :]))


def _stepped(world: World, number: int, step: Step, row: Row) -> World:
    shard = world.shard
    steps = (*shard.steps[:number], step, *shard.steps[number + 1 :])
    return world._replace(shard=Shard(shard.flag, steps, _put(shard.rows, number, row)))


def _rests(world: World) -> World:
    return world._replace(runner=Runner(drained=world.runner.drained))
