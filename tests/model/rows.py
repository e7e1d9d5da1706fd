"""
One row and its two representations, with transactions, a mover and PostgreSQL's rules about rows that change.

Values are not kept, only what is known about them: a representation is ABSENT, STALE or FRESH (it holds what the last
committed write of the application said). As every write is taken to write a value of its own, that is exact, and the
number of states is finite although transactions come for ever.

What of PostgreSQL is in it (manual, "Transaction Isolation"):

* a statement takes a snapshot, then waits for whoever holds the row; under READ COMMITTED it then looks again at the
  row it waited for and at nothing else, and a row that is gone by then was not hit;
* a row inserted meanwhile is not seen by UPDATE, DELETE and FOR SHARE, but INSERT … ON CONFLICT meets it;
* under REPEATABLE READ a row changed since the transaction's snapshot is an error (40001), an unseen one is not hit.

"One table": both representations are columns of one row, so one lock and one statement. "Two tables": source and target
row have locks of their own; `entity` rows come and go as a whole, `value`s come and go in a source row that stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from model.flagrow import FIRST, FlagRow, flips, may_move
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.search import Label

__all__ = ["Rows", "World"]

OLD, DUAL, LIVE, DONE = State
ABSENT, STALE, FRESH = range(3)
SOURCE, TARGET = range(2)
NOBODY, MOVER = -1, -2  # holders of a lock that are no application

Tables = Literal["one", "entity", "value"]
Order = Literal["old", "new", "reverse_open", "by_state"]


class App(NamedTuple):
    """
    A process and its open transaction.

    Attributes:
        phase: IDLE, BEGUN (flag not yet read), OPEN, PREPARED.
        state: of the flag, as read.
        op: what it does to the row; "" before it begins to.
        at: number of its next statement.
        hit: bit by table: its statement found the row, holds it, and will have changed it.
        waits: NOT_WAITING, or WAITING for the row of its next statement; GONE or CHANGED tells what it finds awake.
        new_first: the order in which it takes the two tables.
        sees: bit by table: the row is in its snapshot; -1 under READ COMMITTED.
        changed: bit by table: somebody committed a change since that snapshot.
    """

    phase: int
    state: int
    op: str
    at: int
    hit: int
    waits: int
    new_first: bool
    sees: int
    changed: int


IDLE, BEGUN, OPEN, PREPARED = range(4)
NOT_WAITING, WAITING, GONE, CHANGED = range(4)
REST = App(IDLE, OLD, "", 0, 0, NOT_WAITING, new_first=False, sees=-1, changed=0)


class Mover(NamedTuple):
    """
    The mover and its open batch.

    Attributes:
        stage: how far the batch is; RESTING between two.
        found: the row that it reads was in its snapshot, and is the one that counts.
        value: what an unlocked read took along.
        orphan: the target row was seen without a source; back: the source row is as it was in the snapshot.
        repair: the batch also removes orphans.
        waits: as of an application.
    """

    stage: str
    found: bool = False
    value: int = ABSENT
    orphan: bool = False
    repair: bool = False
    waits: int = NOT_WAITING


RESTING = Mover("")


class World(NamedTuple):
    """Everything there is."""

    flag: FlagRow
    drain: int  # bit by process that is waited for; -1: nobody drains
    old: int
    new: int
    truth: bool  # the application has a value here
    locks: tuple[int, int]
    mover: Mover
    apps: tuple[App, ...]


UPSERT, UPDATE, DELETE = "upsert", "update", "delete"
# What an application does to each table, by operation and by the state it acts on.
_ENTITY = {
    "put": ((UPSERT, UPSERT), (UPSERT, UPSERT)),
    "set": ((UPDATE, UPSERT), ("", UPDATE)),
    "delete": ((DELETE, DELETE), (DELETE, DELETE)),
}
_VALUE = {"set": ((UPDATE, UPSERT), ("", UPSERT)), "clear": ((UPDATE, DELETE), ("", DELETE))}


@dataclass(frozen=True)
class Rows:
    """
    A model: the protocol, or what becomes of it with one thing changed.

    Attributes:
        tables: where the representations are.
        isolation: of the application's transactions.
        apps: how many processes.
        ops: what they do; all that fit `tables` by default.
        order: which table writers take first: "old" always, "new" always, "reverse_open" new while a reverse move is
            open, "by_state" old in DUAL and new in LIVE.
        back: which table a reverse move takes first.
        both: the second table is written even when the row was not found in the first.
        lock: how forward reads its source: "share", "touch" (and updates it), "none" (a join, or SELECT, then UPDATE).
        nothing: forward says DO NOTHING.
        purge: "two" statements, "one", or "no" purge.
        check: rows are compared before they count as moved, and repaired; False: nobody looks, so the move alone is
            what must be right.
        fenced: a batch holds the step row, so no flip overtakes it.
        prepared: transactions may be PREPAREd; "counted" in a drain, or "ignored".
        late: a drain that ends after a later flip is recorded all the same.
        unaware: processes that run code which knows no flag.
        refuse_snapshots: writers under one snapshot are refused in DUAL (rule 3).
        without: waits left out.
        skips: edges taken that do not exist.
    """

    tables: Tables = "one"
    isolation: Literal["RC", "RR"] = "RC"
    apps: int = 2
    ops: tuple[str, ...] = ()
    order: Order = "old"
    back: Literal["source", "target"] = "source"
    both: bool = False
    lock: Literal["share", "touch", "none"] = "share"
    nothing: bool = False
    purge: Literal["two", "one", "no"] = "two"
    check: bool = False
    fenced: bool = True
    prepared: Literal["never", "counted", "ignored"] = "never"
    late: bool = False
    unaware: int = 0
    refuse_snapshots: bool = True
    without: frozenset[str] = frozenset()
    skips: tuple[tuple[State, State], ...] = ()

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
        yield from self._mover_steps(world)

    def wrong(self, world: World) -> str | None:
        """Look at what each open transaction would read now, at what the next one would, and for deadlocks."""
        for who, app in enumerate(world.apps):
            if app.phase == OPEN and not app.op and app.sees < 0 and not _right(world, app.state):
                return f"app {who} reads {_what(world, app.state)} in {State(app.state).name}"
        if not _right(world, world.flag.state):
            return f"whoever begins now in {State(world.flag.state).name} reads {_what(world, world.flag.state)}"
        return self._deadlock(world)

    def canonical(self, world: World) -> World:
        """Sort the processes that run the same code."""
        apps = world.apps
        if self.unaware or all(apps[who] < apps[who + 1] for who in range(self.apps - 1)):
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
            yield (*me, ": BEGIN"), _with(world, who, app._replace(phase=BEGUN))
        elif app.phase == BEGUN:
            yield from self._read_flag(world, who)
        elif app.phase == PREPARED:
            yield (*me, ": COMMIT PREPARED"), self._commit(world, who)
        else:
            if not app.op:
                for op in self._ops():
                    if self._may_write(app):
                        yield from self._statement(world, who, app._replace(op=op))
            elif app.waits != WAITING and app.at < len(self._plan(app)):
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
            yield ("app ", who, says, ", new table first" if new_first else ""), _with(world, who, app)

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
        return self.ops or tuple(_VALUE if self.tables == "value" else _ENTITY)

    def _may_write(self, app: App) -> bool:
        """Rule 3: one snapshot and a mover that inserts do not go together."""
        refused = self.isolation == "RR" and self.tables != "one" and self.lock != "touch" and self.refuse_snapshots
        return not (refused and app.state == DUAL)

    def _plan(self, app: App) -> tuple[tuple[int, str], ...]:
        """List the statements of the transaction: table and verb, in order."""
        state, table = app.state, (_VALUE if self.tables == "value" else _ENTITY)
        source, target = table[app.op][state == DONE]
        if self.tables == "one":
            return ((SOURCE, table[app.op][0][0]),)
        if state == OLD:
            return ((SOURCE, source),)
        if not source:
            return ((TARGET, target),)
        both = ((SOURCE, source), (TARGET, target))
        return both[::-1] if app.new_first else both

    def _statement(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        """Run the next statement, or begin to wait in it."""
        table, verb = self._plan(app)[app.at]
        name = "row" if self.tables == "one" else ("source", "target")[table]
        me = ("app ", who, ": ", app.op, ": " if verb != app.op else "", verb if verb != app.op else "", " ", name)
        there = self._there(world, table)
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
            yield (*me, " waits"), _with(world, who, app._replace(waits=WAITING))
            return
        after = app._replace(at=app.at + 1, hit=app.hit | 1 << table, waits=NOT_WAITING)
        yield me, _with(_locked(world, table, who), who, after)

    def _missed(self, world: World, who: int, app: App) -> World:
        """
        Go on after a statement that hit nothing.

        No source row means that there is nothing to change, so the target is left alone and what was done there is
        taken back. No target row means nothing: it may not have been moved yet.
        """
        table, _ = self._plan(app)[app.at]
        nothing_there = table == SOURCE and self.tables != "value" and not self.both
        if nothing_there and app.hit:
            return self._leave(world, who)
        at = len(self._plan(app)) if nothing_there else app.at + 1
        return _with(world, who, app._replace(at=at, waits=NOT_WAITING))

    def _there(self, world: World, table: int) -> bool:
        return (world.old != ABSENT or self.tables == "value") if table == SOURCE else world.new != ABSENT

    def _prepare(self, world: World, who: int) -> World:
        after = _with(world, who, world.apps[who]._replace(phase=PREPARED))
        return _no_longer_open(after, who) if self.prepared == "ignored" else after

    def _commit(self, world: World, who: int) -> World:
        """Make what the transaction did true for all."""
        app = world.apps[who]
        plan = self._plan(app)
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
                old, new, truth = _outdated(old), _outdated(new), not removes
            if SOURCE in hits:
                old = ABSENT if removes else FRESH if app.state != DONE else STALE
            if TARGET in hits:
                new = ABSENT if removes else FRESH
        gone_tables = app.hit & (2 if self.tables == "value" else 3) if removes else 0
        mover = _overtaken(world.mover, app.hit, gone_tables)
        after = world._replace(old=old, new=new, truth=truth, mover=mover)
        return self._leave(after, who, changed=app.hit, gone=gone_tables)

    def _leave(self, world: World, who: int, changed: int = 0, gone: int = 0) -> World:
        """End a transaction: let go of its rows, wake who waits for them, count it out of the drain."""
        after = self._released(world, who, changed, gone)
        return _no_longer_open(_with(after, who, REST), who)

    def _released(self, world: World, holder: int, changed: int = 0, gone: int = 0) -> World:
        """Let go of what a transaction held, and tell everybody else what became of it."""
        flag, drain, old, new, truth, locks, mover, apps = world
        held = (locks[SOURCE] == holder) | (locks[TARGET] == holder) << 1
        if held:
            locks = (
                NOBODY if locks[SOURCE] == holder else locks[SOURCE],
                NOBODY if locks[TARGET] == holder else locks[TARGET],
            )
            apps = tuple(
                self._told(app, held, changed, gone) if app.phase == OPEN and who != holder else app
                for who, app in enumerate(apps)
            )
            if mover.waits == WAITING and held >> (wants := self._mover_wants(mover)) & 1:
                mover = mover._replace(waits=GONE if gone >> wants & 1 else NOT_WAITING)
        return World(flag, drain, old, new, truth, locks, mover, apps)

    def _told(self, app: App, held: int, changed: int, gone: int) -> App:
        if app.sees >= 0 and changed:
            app = app._replace(changed=app.changed | changed)
        if app.waits == WAITING:
            table, verb = self._plan(app)[app.at]
            if held >> table & 1:
                app = app._replace(waits=self._awake(app, table, verb, changed, gone))
        return app

    @staticmethod
    def _awake(app: App, table: int, verb: str, changed: int, gone: int) -> int:
        if app.sees >= 0 and app.sees >> table & 1 and changed >> table & 1:
            return CHANGED if verb != UPSERT or not gone >> table & 1 else NOT_WAITING
        return GONE if verb != UPSERT and gone >> table & 1 else NOT_WAITING

    # -- who switches, and the drain -----------------------------------------------------------------------------------

    def _switch_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        flag, drain = world.flag, world.drain
        if not (self.fenced and world.mover.stage):
            for after in flips(flag, self.without, self.skips):
                label = ("flip: ", State(flag.state).name, " → ", State(after.state).name)
                # A drain or move of before may vouch for nothing any more: its conditional UPDATE would find no row.
                yield label, world._replace(flag=after, drain=drain if self.late else -1)
        if not flag.drained:
            if drain < 0:
                counted = (BEGUN, OPEN, PREPARED) if self.prepared != "ignored" else (BEGUN, OPEN)
                mask = sum(1 << who for who, app in enumerate(world.apps) if app.phase in counted)
                yield ("drain: lists who is open: ", _names(mask)), world._replace(drain=mask)
            elif drain == 0:
                done = world._replace(flag=flag._replace(drained=True), drain=-1)
                yield ("drain: nobody of those is left; drained",), done
        direction = may_move(flag, self.without)
        if flag.moved and not world.mover.stage and direction is not None:
            yield self._conclude(world, direction)

    def _conclude(self, world: World, direction: str) -> tuple[Label, World]:
        """Compare, if anybody does, and record that the other representation is valid."""
        flag = world.flag
        if self.check and not _right(world, LIVE if direction == "forward" else DUAL):
            label, after = self._take_batch(world, direction)
            return ("check: rows differ; ", *label), after._replace(mover=after.mover._replace(repair=True))
        column = "new_valid" if direction == "forward" else "old_valid"
        return ("runner: all is moved: ", column), world._replace(flag=flag._replace(**{column: True}))

    # -- the mover -----------------------------------------------------------------------------------------------------

    def _mover_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        mover = world.mover
        if not mover.stage:
            direction = None if world.flag.moved else may_move(world.flag, self.without)
            if direction is not None:
                yield self._take_batch(world, direction)
            return
        if mover.waits == WAITING:
            # Its lock_timeout is below deadlock_timeout: it gives way before the server picks a victim.
            yield ("mover: lock timeout, ROLLBACK",), self._rest(world)
        else:
            yield self._batch_step(world)
            yield ("mover: crashes, ROLLBACK",), self._rest(world)

    def _take_batch(self, world: World, direction: str) -> tuple[Label, World]:
        if direction == "forward":
            mover = Mover("read", found=world.old != ABSENT, value=world.old, repair=not self.check)
            return ("mover: begins a batch and takes its snapshot",), world._replace(mover=mover)
        if self.tables == "one" or self.back == "source":
            mover = Mover("claim", found=self._there(world, SOURCE))
            return ("mover: begins a batch back",), world._replace(mover=mover)
        mover = Mover("back", found=world.new != ABSENT, orphan=True)
        return ("mover: begins a batch back and takes its snapshot",), world._replace(mover=mover)

    def _mover_wants(self, mover: Mover) -> int:
        return TARGET if mover.stage in {"write", "look", "back"} else SOURCE

    def _batch_step(self, world: World) -> tuple[Label, World]:
        return getattr(self, f"_mover_{world.mover.stage}")(world)  # type: ignore[no-any-return]

    def _mover_read(self, world: World) -> tuple[Label, World]:
        """Forward, first half of the statement: the source row."""
        mover = world.mover
        locks = self.lock != "none"
        following = "commit" if self.tables == "one" else "write"
        if mover.waits == GONE or not mover.found:
            return ("mover: finds no source row",), _batch(world, stage=following, found=False, waits=NOT_WAITING)
        if self.tables == "one" and not locks:
            return ("mover: SELECTs the row",), _batch(world, stage="update")
        if locks and world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the source row",), _batch(world, waits=WAITING)
        if not locks:
            return ("mover: reads the source row, unlocked",), _batch(world, stage=following)
        found = world.old != ABSENT
        after = _batch(world, stage=following, found=found, value=world.old)
        return ("mover: locks and reads the source row",), _locked(after, SOURCE, MOVER)

    def _mover_update(self, world: World) -> tuple[Label, World]:
        """One table, SELECT and UPDATE apart: the value is that of the SELECT."""
        if world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the row",), _batch(world, waits=WAITING)
        after = _batch(world, stage="commit", found=world.old != ABSENT)
        return ("mover: UPDATEs the row with what it selected",), _locked(after, SOURCE, MOVER)

    def _mover_write(self, world: World) -> tuple[Label, World]:
        """Forward, second half: the target row."""
        mover = world.mover
        following = "look" if mover.repair and self.purge != "no" else "commit"
        if not mover.found:
            return ("mover: has nothing to write",), _batch(world, stage=following)
        if world.locks[TARGET] not in (NOBODY, MOVER):
            return ("mover: waits for the target row",), _batch(world, waits=WAITING)
        found = not (self.nothing and world.new != ABSENT)
        after = _batch(world, stage=following, found=found, waits=NOT_WAITING)
        return ("mover: writes the target row" if found else "mover: leaves the target row as it is",), _locked(
            after, TARGET, MOVER
        )

    def _mover_look(self, world: World) -> tuple[Label, World]:
        """Purge, first statement: lock a target row that has no source row in the statement's snapshot."""
        mover = world.mover
        orphan = mover.orphan or (world.new != ABSENT and world.old == ABSENT and not mover.found)
        if not orphan or mover.waits == GONE:
            return ("mover: sees no orphan",), _batch(world, stage="commit", orphan=False, waits=NOT_WAITING)
        if world.locks[TARGET] not in (NOBODY, MOVER):
            return ("mover: sees an orphan, waits for it",), _batch(world, orphan=True, waits=WAITING)
        if self.purge == "one":
            after = _batch(world, stage="commit", orphan=True)
            return ("mover: deletes the orphan",), _locked(after, TARGET, MOVER)
        after = _batch(world, stage="delete", orphan=True)
        return ("mover: locks the orphan",), _locked(after, TARGET, MOVER)

    def _mover_delete(self, world: World) -> tuple[Label, World]:
        """Purge, second statement: its snapshot is newer than the lock."""
        still = world.old == ABSENT
        after = _batch(world, stage="commit", orphan=still)
        return ("mover: deletes the orphan" if still else "mover: it is an orphan no more",), after

    def _mover_claim(self, world: World) -> tuple[Label, World]:
        """Back, source first: lock the source row in a statement of its own."""
        mover = world.mover
        if mover.waits == GONE or not mover.found:
            return ("mover: finds no source row",), _batch(world, stage="commit_back", found=False, waits=NOT_WAITING)
        if world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the source row",), _batch(world, waits=WAITING)
        following = "commit_back" if self.tables == "one" else "take"
        after = _batch(world, stage=following, found=self._there(world, SOURCE))
        return ("mover: locks the source row",), _locked(after, SOURCE, MOVER)

    def _mover_take(self, world: World) -> tuple[Label, World]:
        """Back, source first: read the target row in the next statement, whose snapshot is newer than the lock."""
        if world.new != ABSENT and world.locks[TARGET] != NOBODY:
            return ("mover: waits for the target row",), _batch(world, waits=WAITING)
        after = _batch(world, stage="commit_back")
        return ("mover: reads the target row",), _locked(after, TARGET, MOVER) if world.new != ABSENT else after

    def _mover_back(self, world: World) -> tuple[Label, World]:
        """Back, target first: lock and read the target row, if the snapshot has one."""
        mover = world.mover
        if mover.found and mover.waits != GONE:
            if world.locks[TARGET] != NOBODY:
                return ("mover: waits for the target row",), _batch(world, waits=WAITING)
            after = _batch(world, stage="fill", value=world.new)
            return ("mover: locks and reads the target row",), _locked(after, TARGET, MOVER)
        return ("mover: finds no target row",), _batch(world, stage="fill", found=False, waits=NOT_WAITING)

    def _mover_fill(self, world: World) -> tuple[Label, World]:
        """Back, target first: the source row; without a target row only a version that nobody changed since."""
        mover = world.mover
        if not self._there(world, SOURCE) or mover.waits == GONE or not (mover.found or mover.orphan):
            return ("mover: leaves the source row as it is",), _batch(
                world, stage="commit_back", found=False, orphan=False, waits=NOT_WAITING
            )
        if world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the source row",), _batch(world, waits=WAITING)
        after = _batch(world, stage="commit_back", orphan=False, found=True)
        return ("mover: writes the source row",), _locked(after, SOURCE, MOVER)

    def _mover_commit(self, world: World) -> tuple[Label, World]:
        mover, old, new = world.mover, world.old, world.new
        changed = gone = 0
        if self.tables == "one":
            if mover.found and old != ABSENT:
                new, changed = (old if self.lock != "none" else mover.value), 1
        elif mover.orphan:
            new, changed, gone = ABSENT, 2, 2
        elif mover.found:
            new, changed = (old if self.lock != "none" else mover.value), 2 | (self.lock == "touch")
        return ("mover: COMMIT",), self._moved(world._replace(old=old, new=new), changed, gone)

    def _mover_commit_back(self, world: World) -> tuple[Label, World]:
        mover, old = world.mover, world.old
        if mover.found and self._there(world, SOURCE):
            old = world.new
        return ("mover: COMMIT",), self._moved(world._replace(old=old), 1 if mover.found else 0, 0)

    def _moved(self, world: World, changed: int, gone: int) -> World:
        # Progress commits with the rows; a fenced batch cannot be overtaken, so the flag is where it was.
        return self._rest(world._replace(flag=world.flag._replace(moved=True)), changed, gone)

    def _rest(self, world: World, changed: int = 0, gone: int = 0) -> World:
        return self._released(world, MOVER, changed, gone)._replace(mover=RESTING)

    # -- deadlocks -----------------------------------------------------------------------------------------------------

    def _deadlock(self, world: World) -> str | None:
        for who, app in enumerate(world.apps):
            if app.waits == WAITING:
                holder = world.locks[self._plan(app)[app.at][0]]
                other = world.apps[holder] if holder >= 0 else REST
                if other.waits == WAITING and world.locks[self._plan(other)[other.at][0]] == who:
                    return f"deadlock of app {who} and app {holder}"
        return None


# --------------------------------------------------------------------------------------------------------------------
# Small changes of a world


def _right(world: World, state: int) -> bool:
    """Whether what a reader in this state reads is what the application last wrote."""
    read = world.new if state >= LIVE else world.old
    return read == (FRESH if world.truth else ABSENT)


def _what(world: World, state: int) -> str:
    side, read = ("new", world.new) if state >= LIVE else ("old", world.old)
    if read == ABSENT:
        return f"{side}, and the row is missing there"
    return f"{side}, which is stale" if world.truth else f"{side}, and finds a row that was deleted"


def _with(world: World, who: int, app: App) -> World:
    flag, drain, old, new, truth, locks, mover, apps = world  # _replace would take twice as long
    return World(flag, drain, old, new, truth, locks, mover, (*apps[:who], app, *apps[who + 1 :]))


def _batch(world: World, **changes: Any) -> World:
    return world._replace(mover=world.mover._replace(**changes))


def _locked(world: World, table: int, holder: int) -> World:
    source, target = world.locks
    return world._replace(locks=(holder, target) if table == SOURCE else (source, holder))


def _no_longer_open(world: World, who: int) -> World:
    return world if world.drain < 0 else world._replace(drain=world.drain & ~(1 << who))


def _outdated(representation: int) -> int:
    return STALE if representation == FRESH else representation


def _overtaken(mover: Mover, changed: int, gone: int) -> Mover:
    """Tell the open batch of a commit: a row that came again under its key is not the one that was seen."""
    if not mover.stage:
        return mover
    found, orphan = mover.found, mover.orphan
    if mover.stage in {"read", "claim"}:
        found = found and not gone & 1
    elif mover.stage == "back":
        found = found and not gone & 2
    if mover.stage in {"back", "fill"}:
        orphan = orphan and not changed & 1
    return mover._replace(found=found, orphan=orphan, value=_outdated(mover.value))


def _names(mask: int) -> str:
    return ", ".join(f"app {who}" for who in range(8) if mask >> who & 1) or "nobody"
