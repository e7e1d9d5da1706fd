"""What applications, the drain and whoever switches do to a row; with the mover's half, the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.flagrow import FIRST, flips, may_move
from model.handful import Handfuls
from model.world import (
    ABSENT,
    BEGUN,
    CHANGED,
    ENTITY,
    FRESH,
    GONE,
    IDLE,
    NOBODY,
    NOT_WAITING,
    OPEN,
    PREPARED,
    REST,
    RESTING,
    SOURCE,
    STALE,
    TARGET,
    UPSERT,
    VALUE,
    WAITING,
    App,
    World,
    locked,
    names,
    no_longer_open,
    outdated,
    overtaken,
    right,
    what,
    with_app,
)
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.search import Label

__all__ = ["Rows"]

OLD, DUAL, LIVE, DONE = State


@dataclass(frozen=True)
class Rows(Handfuls):
    """The model; its settings say what is changed about the protocol."""

    # -- what the search asks ------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[World]:
        """Begin with a row that is there, and without one."""
        for there in (True, False):
            old, new = (FRESH if there else ABSENT), ABSENT
            if self.tables == "one" and there:
                new = STALE
            yield World(FIRST, -1, old, new, there, (NOBODY, NOBODY), RESTING, (REST,) * self.apps)

    def steps(self, world: World) -> Iterator[tuple[Label, World]]:
        """Let any process, the mover or whoever switches do the next thing."""
        for who in range(self.apps):
            yield from self._app_steps(world, who)
        yield from self._switch_steps(world)
        yield from self.mover_steps(world)

    def wrong(self, world: World) -> str | None:
        """Look at what each open transaction would read now, at what the next one would, and for deadlocks."""
        for who, app in enumerate(world.apps):
            if app.phase == OPEN and not app.op and app.sees < 0 and not right(world, app.state):
                return f"app {who} reads {what(world, app.state)} in {State(app.state).name}"
        if not right(world, world.flag.state):
            return f"whoever begins now in {State(world.flag.state).name} reads {what(world, world.flag.state)}"
        return self._deadlock(world)

    def canonical(self, world: World) -> World:
        """Sort the processes that run the same code."""
        apps = world.apps
        if self.unaware or self.exempt or all(apps[who] < apps[who + 1] for who in range(self.apps - 1)):
            return world
        order = sorted(range(self.apps), key=lambda who: (apps[who], world.locks[0] == who, world.locks[1] == who,
                                                          world.drain >= 0 and world.drain >> who & 1))  # fmt: skip
        if order == list(range(self.apps)):
            return world
        place = {who: index for index, who in enumerate(order)}
        drain = -1 if world.drain < 0 else sum(1 << place[who] for who in order if world.drain >> who & 1)
        source, target = (place.get(holder, holder) for holder in world.locks)
        return world._replace(drain=drain, locks=(source, target), apps=tuple(apps[who] for who in order))

    # -- applications --------------------------------------------------------------------------------------------------

    def _app_steps(self, world: World, who: int) -> Iterator[tuple[Label, World]]:
        app = world.apps[who]
        me = ("app ", who)
        if app.phase == IDLE:
            yield (*me, ": BEGIN"), with_app(world, who, app._replace(phase=BEGUN))
        elif app.phase == BEGUN:
            yield from self._read_flag(world, who)
        elif app.phase == PREPARED:
            yield (*me, ": COMMIT PREPARED"), self._commit(world, who)
        else:
            if not app.op:
                for op in self._ops():
                    if self._may_write(app):
                        yield from self._statement(world, who, app._replace(op=op))
            elif app.waits != WAITING and app.at < len(self.plan(app)):
                yield from self._statement(world, who, app)
            elif app.waits != WAITING:
                yield (*me, ": COMMIT"), self._commit(world, who)
                if self.prepared != "never":
                    yield (*me, ": PREPARE TRANSACTION"), self._prepare(world, who)
            yield (*me, ": ends without a trace (read only, ROLLBACK, or crash)"), self._leave(world, who)

    def _read_flag(self, world: World, who: int) -> Iterator[tuple[Label, World]]:
        aware = who >= self.unaware
        state = world.flag.state if aware else OLD
        sees = -1
        if self.isolation == "RR":
            sees = (world.old != ABSENT or self.tables == "value") | (world.new != ABSENT) << 1
        for new_first in self._orders(world, state):
            app = App(OPEN, state, "", 0, 0, NOT_WAITING, new_first=new_first, sees=sees, changed=0)
            says = f": reads the flag: {State(state).name}" if aware else ": knows no flag, acts as OLD"
            yield ("app ", who, says, ", new table first" if new_first else ""), with_app(world, who, app)

    def _orders(self, world: World, state: int) -> tuple[bool, ...]:
        if self.tables == "one" or state not in (DUAL, LIVE):
            return (False,)
        match self.order:
            case "old":
                return (False,)
            case "new":
                return (True,)
            case "by_state":
                return (state == LIVE,)
            case "reverse_open":
                return (not world.flag.old_valid,)

    def _ops(self) -> tuple[str, ...]:
        return self.ops or tuple(VALUE if self.tables == "value" else ENTITY)

    def _may_write(self, app: App) -> bool:
        """Rule 3: one snapshot and a mover that inserts do not go together."""
        refused = self.isolation == "RR" and self.tables != "one" and self.lock != "touch" and self.refuse_snapshots
        return not (refused and app.state == DUAL)

    def _statement(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        """Run the next statement, or begin to wait in it."""
        table, verb = self.plan(app)[app.at]
        name = "row" if self.tables == "one" else ("source", "target")[table]
        me = ("app ", who, ": ", app.op, ": " if verb != app.op else "", verb if verb != app.op else "", " ", name)
        there = self.there(world, table)
        if app.waits == CHANGED:
            yield (*me, " fails: 40001"), self._leave(world, who)
            return
        if app.waits == GONE:
            yield (*me, " hits nothing: the row went while it waited"), self._missed(world, who, app)
            return
        if app.sees >= 0:
            seen, changed = app.sees >> table & 1, app.changed >> table & 1
            if verb != UPSERT and not seen:
                yield (*me, " hits nothing in its snapshot"), self._missed(world, who, app)
                return
            if (verb != UPSERT and changed) or (verb == UPSERT and there and (changed or not seen)):
                yield (*me, " fails: 40001"), self._leave(world, who)
                return
        elif verb != UPSERT and not there:
            yield (*me, " hits nothing"), self._missed(world, who, app)
            return
        if world.locks[table] not in (NOBODY, who):
            yield (*me, " waits"), with_app(world, who, app._replace(waits=WAITING))
            return
        after = app._replace(at=app.at + 1, hit=app.hit | 1 << table, waits=NOT_WAITING)
        yield me, with_app(locked(world, table, who), who, after)

    def _missed(self, world: World, who: int, app: App) -> World:
        """
        Go on after a statement that hit nothing.

        No source row means that there is nothing to change, so the target is left alone and what was done there is
        taken back. No target row means nothing: it may not have been moved yet.
        """
        table, _ = self.plan(app)[app.at]
        nothing_there = table == SOURCE and self.tables != "value" and not self.both
        if nothing_there and app.hit:
            return self._leave(world, who)
        at = len(self.plan(app)) if nothing_there else app.at + 1
        return with_app(world, who, app._replace(at=at, waits=NOT_WAITING))

    def _prepare(self, world: World, who: int) -> World:
        after = with_app(world, who, world.apps[who]._replace(phase=PREPARED))
        return no_longer_open(after, who) if self.prepared == "ignored" else after

    def _commit(self, world: World, who: int) -> World:
        """Make what the transaction did true for all."""
        app = world.apps[who]
        plan = self.plan(app)
        if not app.hit:
            return self._leave(world, who)
        removes = app.op in ("delete", "clear")
        hits = {table for table, _ in plan if app.hit >> table & 1}
        if self.tables == "one":
            # What is written to a representation is fresh; what is not becomes stale.
            old = ABSENT if removes else FRESH if app.state != DONE else STALE
            new = ABSENT if removes else FRESH if app.state != OLD else STALE
            truth = not removes
        else:
            old, new, truth = world.old, world.new, world.truth
            # Its effect is what it does to what it reads: clearing what is not there changes nothing.
            if (TARGET if app.state >= LIVE else SOURCE) in hits:
                old, new, truth = outdated(old), outdated(new), not removes
            if SOURCE in hits:
                old = ABSENT if removes else FRESH if app.state != DONE else STALE
            if TARGET in hits:
                new = ABSENT if removes else FRESH
        gone_tables = app.hit & (2 if self.tables == "value" else 3) if removes else 0
        mover = overtaken(world.mover, app.hit, gone_tables)
        after = world._replace(old=old, new=new, truth=truth, mover=mover)
        return self._leave(after, who, changed=app.hit, gone=gone_tables)

    def _leave(self, world: World, who: int, changed: int = 0, gone: int = 0) -> World:
        """End a transaction: let go of its rows, wake who waits for them, count it out of the drain."""
        after = self.released(world, who, changed, gone)
        return no_longer_open(with_app(after, who, REST), who)

    # -- who switches, and the drain -----------------------------------------------------------------------------------

    def _switch_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        flag, drain = world.flag, world.drain
        held = self.fenced and not (world.mover.whole and self.handful == "unheld")
        if not (held and world.mover.stage):
            for after in flips(flag, self.without, self.skips):
                label = ("flip: ", State(flag.state).name, " → ", State(after.state).name)
                # A drain or move of before may vouch for nothing any more: its conditional UPDATE would find no row.
                yield label, world._replace(flag=after, drain=drain if self.late else -1)
        if not flag.drained:
            if drain < 0:
                counted = (BEGUN, OPEN, PREPARED) if self.prepared != "ignored" else (BEGUN, OPEN)
                listed = enumerate(world.apps[self.exempt :], self.exempt)
                mask = sum(1 << who for who, app in listed if app.phase in counted)
                yield ("drain: lists who is open: ", names(mask)), world._replace(drain=mask)
            elif drain == 0:
                done = world._replace(flag=flag._replace(drained=True), drain=-1)
                yield ("drain: nobody of those is left; drained",), done
        direction = may_move(flag, self.without)
        if flag.moved and not world.mover.stage and direction is not None:
            yield self._conclude(world, direction)

    def _conclude(self, world: World, direction: str) -> tuple[Label, World]:
        """Compare, if anybody does, and record that the other representation is valid."""
        flag = world.flag
        if self.check and not right(world, LIVE if direction == "forward" else DUAL):
            label, after = self.take_batch(world, direction)
            return ("check: rows differ; ", *label), after._replace(mover=after.mover._replace(repair=True))
        column = "new_valid" if direction == "forward" else "old_valid"
        return ("runner: all is moved: ", column), world._replace(flag=flag._replace(**{column: True}))

    # -- deadlocks -----------------------------------------------------------------------------------------------------

    def _deadlock(self, world: World) -> str | None:
        for who, app in enumerate(world.apps):
            if app.waits == WAITING:
                holder = world.locks[self.plan(app)[app.at][0]]
                other = world.apps[holder] if holder >= 0 else REST
                if other.waits == WAITING and world.locks[self.plan(other)[other.at][0]] == who:
                    return f"deadlock of app {who} and app {holder}"
        return None
