"""
How a transaction comes to the state it acts on, and what a drain can know of that.

Rows are simple here (one row of one table; a write is an upsert of both or one of its representations; a move is one
step), so that every way to read a flag can be compared: the protocol's own, and those that do not work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from model.flagrow import FIRST, FlagRow, flips, may_move
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.search import Label

__all__ = ["Fences", "Standby"]

OLD, DUAL, LIVE, DONE = State
_NO_WAITS: frozenset[str] = frozenset()

Fence = Literal[
    "epoch",  # the protocol: the token rides on BEGIN; the flags of a known token apply, else both are read once more
    "first token",  # as above, but what is read then is kept under the token that rode on BEGIN
    "two statements",  # flags first, then the token under which they are kept
    "default",  # when the flag cannot be read, OLD is taken
    "cache",  # what was last heard is acted on; a message may come late or never
    "lease",  # as above, and the runner waits until no lease on another state is left
    "carry",  # what one transaction read, the next one of the same request uses too
    "advisory",  # a shared advisory lock by state; the runner waits for the holders of the others
    "holders",  # the drain lists who holds a lock on the flag's table
    "freeze",  # LOCK TABLE on the flag's table, then move and flip at once
    "maintenance",  # maintenance, drain, move and flip at once
]
IDLE, DECIDED, BEGUN, HALF, OPEN = range(5)
# What a remembered token is to the one that the shard has now.
CURRENT, PREVIOUS, NEXT, NEVER = range(4)


class Row(NamedTuple):
    """The row as committed: there or not, and which representation holds the last write."""

    there: bool
    old: bool
    new: bool

    def right(self, state: int) -> bool:
        """Whether a reader in this state reads what was written last."""
        return not self.there or (self.new if state >= LIVE else self.old)

    def written(self, state: int) -> Row:
        """Return the row after a write by a transaction in this state."""
        return Row(there=True, old=state != DONE, new=state != OLD)


class App(NamedTuple):
    """
    A process, what it remembers, and its open transaction.

    Attributes:
        phase: IDLE, DECIDED (before BEGIN), BEGUN, HALF (between snapshot or flags and what follows them), OPEN.
        state: what it acts on.
        known: the state it remembers; -1: none.
        token: what the token kept with it is to the present one.
        seen: the same of the token that rode on BEGIN, until the flags are read.
        wrote: it holds the row.
        snapshot: the row in its snapshot; None under READ COMMITTED.
        changed: the row was changed since.
        predates: its snapshot is older than the last flip.
    """

    phase: int = IDLE
    state: int = OLD
    known: int = -1
    token: int = NEVER
    seen: int = NEVER
    wrote: bool = False
    snapshot: Row | None = None
    changed: bool = False
    predates: bool = False

    def ended(self) -> App:
        """Forget the transaction, keep the memory."""
        return App(known=self.known, token=self.token)


class World(NamedTuple):
    """
    Everything there is.

    Attributes:
        drain: bit by process that is waited for; -1: nobody drains.
        holders: the same for those who hold an old snapshot, once they are listed.
        before: the flag's row before the last commit, if that was a flip.
    """

    flag: FlagRow
    row: Row
    drain: int
    offline: bool
    before: FlagRow | None
    apps: tuple[App, ...]
    holders: int = -1


@dataclass(frozen=True)
class Fences:
    """
    A model: one way to read the flag.

    Attributes:
        fence: that way.
        isolation: of the application's transactions.
        apps: how many processes.
        epochs: "random" or "counter"; matters after a failover that loses the last flip.
        failover: whether that happens.
        imports: transactions may take over the snapshot of an open one.
        old_snapshots: the drain also waits for snapshots older than the flip: until there is "none", for those who
            hold one at one moment ("listed"), or "not".
        drains: maintenance waits until nobody is inside.
        pauses: a process may be stopped between looking at its memory and BEGIN.
    """

    fence: Fence = "epoch"
    isolation: Literal["RC", "RR"] = "RC"
    apps: int = 2
    epochs: Literal["random", "counter"] = "random"
    failover: bool = False
    imports: bool = False
    old_snapshots: Literal["none", "listed", "not"] = "none"
    drains: bool = True
    pauses: bool = True

    def begin(self) -> Iterator[World]:
        """Begin with a row that is there, and without one."""
        for there in (True, False):
            yield World(FIRST, Row(there, old=True, new=False), -1, offline=False, before=None,
                        apps=(App(),) * self.apps)  # fmt: skip

    def steps(self, world: World) -> Iterator[tuple[Label, World]]:
        """Let any process or the runner do the next thing."""
        for who, app in enumerate(world.apps):
            me = ("app ", who)
            for what, after in self._app_steps(world, who, app):
                yield (*me, ": ", *what), after
        if self.fence in {"freeze", "maintenance"}:
            yield from self._freeze_steps(world)
        else:
            yield from self._runner_steps(world)

    def wrong(self, world: World) -> str | None:
        """Look at what each open transaction would read, and at what the next one would."""
        for who, app in enumerate(world.apps):
            read = app.snapshot or world.row
            if app.phase == OPEN and not app.wrote and not read.right(app.state):
                side = "new" if app.state >= LIVE else "old"
                return f"app {who} reads {side} in {State(app.state).name}, which is stale"
        if not world.row.right(world.flag.state):
            return f"whoever begins now in {State(world.flag.state).name} reads what is stale: a write is lost"
        return None

    def canonical(self, world: World) -> World:
        """Keep the names: there are few states."""
        return world

    # -- applications --------------------------------------------------------------------------------------------------

    def _app_steps(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        if app.phase == IDLE:
            yield from self._idle(world, who, app)
        elif app.phase == DECIDED:
            yield ("BEGIN, as decided: ", State(app.state).name), self._open(world, who, app, app.state)
            yield ("does not begin after all",), _with(world, who, app.ended())
        elif app.phase == BEGUN:
            yield from self._first_statement(world, who, app)
        elif app.phase == HALF:
            yield from self._second_statement(world, who, app)
        else:
            yield from self._work(world, who, app)
        if self.fence == "lease" and app.known >= 0:  # wherever the process is stopped meanwhile
            yield ("its lease on ", State(app.known).name, " ends"), _with(world, who, app._replace(known=-1))

    def _idle(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        if self.fence not in {"cache", "lease"}:
            yield ("BEGIN",), _with(world, who, app._replace(phase=BEGUN))
            return
        if app.known != world.flag.state:
            heard = app._replace(known=world.flag.state)
            yield ("hears that the flag is ", State(world.flag.state).name), _with(world, who, heard)
        if app.known < 0:
            return
        state = State(app.known)
        if self.pauses:
            yield ("remembers ", state.name), _with(world, who, app._replace(phase=DECIDED, state=state))
        else:
            yield ("remembers ", state.name, ", BEGIN at once"), self._open(world, who, app, state)

    def _first_statement(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        state, remembers = State(world.flag.state), self.fence in {"epoch", "first token", "two statements"}
        if self.imports:
            yield from self._import(world, who, app)
        if remembers and app.token == CURRENT:
            yield ("the token is known: ", State(app.known).name), self._open(world, who, app, app.known)
            return
        match self.fence:
            case "epoch" | "first token":
                snapshot = world.row if self.isolation == "RR" else None
                half = app._replace(phase=HALF, seen=CURRENT, state=int(state), snapshot=snapshot)
                yield ("the token is new",), _with(world, who, half)
            case "carry" | "default":
                learnt = app._replace(known=state, token=CURRENT)
                yield ("reads the flag: ", state.name), self._open(world, who, learnt, state)
                if self.fence == "default":
                    yield ("cannot read the flag, takes OLD",), self._open(world, who, app, OLD)
            case "maintenance":
                if world.offline:
                    yield ("is told of maintenance, ROLLBACK",), _ended(world, who)
                else:
                    yield ("reads the flag: ", state.name), self._open(world, who, app, state)
            case "two statements":
                half = app._replace(phase=HALF, state=state)
                yield ("reads the flags: ", state.name), _with(world, who, half)
            case _ if self.isolation == "RR":
                # The statement that locks takes its snapshot before it waits for the lock.
                half = app._replace(phase=HALF, state=state, snapshot=world.row)
                yield ("the statement that locks takes its snapshot: ", state.name), _with(world, who, half)
            case _:
                yield ("takes the lock",), _with(world, who, app._replace(phase=HALF, state=-1))

    def _second_statement(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        if self.fence in {"epoch", "first token"}:
            # One snapshot: flags and token are those of BEGIN, whatever happened since.
            state = State(app.state if self.isolation == "RR" else world.flag.state)
            token = app.seen if self.isolation == "RR" or self.fence == "first token" else CURRENT
            opened = app._replace(phase=OPEN, state=int(state), known=int(state), token=token, seen=NEVER)
            yield ("reads flags and token: ", state.name), _with(world, who, opened)
        elif self.fence == "two statements":
            known = app._replace(known=app.state, token=CURRENT)
            yield (
                ("reads the token, and keeps ", State(app.state).name, " under it"),
                self._open(world, who, known, app.state),
            )
        elif app.state < 0:
            state = State(world.flag.state)
            yield ("reads the flag: ", state.name), self._open(world, who, app, state)
        else:
            opened = app._replace(phase=OPEN)
            yield ("has the lock, acts as ", State(app.state).name), _with(world, who, opened)

    def _import(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        for other, exporter in enumerate(world.apps):
            if other != who and exporter.phase == OPEN and exporter.snapshot is not None:
                opened = App(OPEN, exporter.state, app.known, app.token, snapshot=exporter.snapshot,
                             changed=exporter.changed, predates=exporter.predates)  # fmt: skip
                yield ("takes over the snapshot of app ", other), _with(world, who, opened)

    def _open(self, world: World, who: int, app: App, state: int) -> World:
        snapshot = world.row if self.isolation == "RR" else None
        return _with(world, who, app._replace(phase=OPEN, state=int(state), snapshot=snapshot))

    def _work(self, world: World, who: int, app: App) -> Iterator[tuple[Label, World]]:
        free = not any(other.wrote for other in world.apps)
        if not app.wrote and free and not app.changed:
            yield ("writes in ", State(app.state).name), _with(world, who, app._replace(wrote=True))
        yield ("ends without a trace (read only, ROLLBACK, or crash)",), _ended(world, who)
        if app.wrote or self.fence == "carry":
            yield ("COMMIT",), self._commit(world, who, app)

    def _commit(self, world: World, who: int, app: App) -> World:
        after = _ended(world, who)
        if app.wrote:
            after = _changed(after, world.row.written(app.state))._replace(before=None)
        if self.fence == "carry":
            after = _with(after, who, app.ended()._replace(phase=DECIDED, state=app.state))
        return after

    # -- the runner ----------------------------------------------------------------------------------------------------

    def _runner_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        flag = world.flag
        for after in flips(flag, _NO_WAITS, ()):
            label = ("flip: ", State(flag.state).name, " → ", State(after.state).name)
            yield label, self._flipped(world, after)
        if not flag.drained:
            yield from self._drain(world)
        direction = may_move(flag, _NO_WAITS)
        if direction is not None and not any(app.wrote for app in world.apps if world.row.there):
            row, column = world.row, "new_valid" if direction == "forward" else "old_valid"
            copied = row._replace(new=row.old) if direction == "forward" else row._replace(old=row.new)
            moved = world._replace(flag=flag._replace(**{column: True}), before=None)
            yield ("mover: moves all, ", direction), _changed(moved, copied) if row.there else moved
        if self.failover and world.before is not None:
            yield ("failover: the last commit is lost",), self._failed_over(world)

    def _flipped(self, world: World, flag: FlagRow) -> World:
        older = {CURRENT: PREVIOUS, PREVIOUS: NEVER, NEXT: CURRENT, NEVER: NEVER}
        apps = tuple(
            app._replace(token=older[app.token], seen=older[app.seen], predates=app.snapshot is not None)
            for app in world.apps
        )
        return world._replace(flag=flag, drain=-1, holders=-1, before=world.flag if self.failover else None, apps=apps)

    def _failed_over(self, world: World) -> World:
        """Go on with a standby that never got the flip; a counter will give its number again, to another state."""
        lost = NEXT if self.epochs == "counter" else NEVER
        younger = {CURRENT: lost, PREVIOUS: CURRENT, NEXT: NEVER, NEVER: NEVER}
        apps = tuple(app.ended()._replace(token=younger[app.token]) for app in world.apps)
        assert world.before is not None
        return world._replace(flag=world.before, drain=-1, holders=-1, before=None, apps=apps)

    def _drain(self, world: World) -> Iterator[tuple[Label, World]]:
        flag, apps = world.flag, world.apps
        recorded = world._replace(flag=flag._replace(drained=True), drain=-1, holders=-1, before=None)
        leases = all(app.known in (flag.state, -1) for app in apps)
        if self.fence == "lease" and self.pauses:
            if leases:
                yield ("runner: no lease on another state is left; drained",), recorded
        elif self.fence == "advisory":
            if not any(app.phase == OPEN and app.state != flag.state for app in apps):
                yield ("runner: nobody holds another state's lock; drained",), recorded
        elif world.drain < 0:
            if self.fence != "lease" or leases:
                mask = sum(1 << who for who, app in enumerate(apps) if self._listed(app))
                yield ("drain: lists ", f"{mask:0{self.apps}b}"), world._replace(drain=mask)
        elif world.drain == 0 and self.old_snapshots == "listed" and world.holders < 0:
            mask = sum(1 << who for who, app in enumerate(apps) if app.predates)
            yield ("drain: lists who holds an old snapshot: ", f"{mask:0{self.apps}b}"), world._replace(holders=mask)
        elif world.drain == 0 and not self._old_snapshot_left(world):
            yield ("drain: nobody of those is left; drained",), recorded

    def _old_snapshot_left(self, world: World) -> bool:
        if self.old_snapshots == "listed":
            return world.holders > 0
        return self.old_snapshots == "none" and self.fence != "holders" and any(app.predates for app in world.apps)

    def _listed(self, app: App) -> bool:
        if self.fence == "holders":
            return app.phase == OPEN or (app.phase == HALF and self.isolation == "RC")
        return app.phase in {BEGUN, HALF, OPEN}

    def _freeze_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        """Move and flip in one commit, while nobody is believed to be inside."""
        if self.fence == "maintenance" and not world.offline:
            yield ("runner: maintenance on",), world._replace(offline=True)
            return
        if self.fence == "maintenance" and self.drains and world.drain < 0:
            mask = sum(1 << who for who, app in enumerate(world.apps) if self._listed(app))
            yield ("drain: lists ", f"{mask:0{self.apps}b}"), world._replace(drain=mask)
            return
        holding = OPEN if self.isolation == "RR" else HALF
        if world.drain > 0 or (self.fence == "freeze" and any(app.phase >= holding for app in world.apps)):
            return
        row, target = world.row, DONE if world.flag.state == OLD else OLD
        copied = row._replace(new=row.old) if target == DONE else row._replace(old=row.new)
        after = world._replace(flag=world.flag._replace(state=target), offline=False, drain=-1)
        changed = _changed(after, copied) if row.there else after
        yield ("runner: alone inside: moves all and flips to ", target.name), changed


def _with(world: World, who: int, app: App) -> World:
    return world._replace(apps=(*world.apps[:who], app, *world.apps[who + 1 :]))


def _ended(world: World, who: int) -> World:
    drain, holders = (mask if mask < 0 else mask & ~(1 << who) for mask in (world.drain, world.holders))
    return _with(world, who, world.apps[who].ended())._replace(drain=drain, holders=holders)


def _changed(world: World, row: Row) -> World:
    """Commit a row: whoever has it in a snapshot may not write it any more; one that was not there it may insert."""
    apps = tuple(app._replace(changed=True) if app.snapshot is not None else app for app in world.apps)
    return world._replace(row=row, apps=apps)


# --------------------------------------------------------------------------------------------------------------------
# Readers of a standby


class Replayed(NamedTuple):
    """What a standby has replayed."""

    state: int
    row: Row


class Pair(NamedTuple):
    """A primary with one writer, a standby behind it, and a reader there."""

    flag: FlagRow
    row: Row
    writer: int  # the state its open transaction acts on; -1: none
    draining: bool
    standby: Replayed
    behind: tuple[Replayed, ...]
    reader: int  # the state that its open transaction acts on; -1: none
    seen: Row | None  # its snapshot


@dataclass(frozen=True)
class Standby:
    """
    A model: reading from a standby that lags.

    Attributes:
        flag_from: where the reader's flag comes from.
        one_snapshot: the reader has flag and row from one snapshot (REPEATABLE READ).
        lag: commits that the standby may be behind.
    """

    flag_from: Literal["standby", "primary"] = "standby"
    one_snapshot: bool = True
    lag: int = 3

    def begin(self) -> Iterator[Pair]:
        """Begin with a row that is there."""
        row = Row(there=True, old=True, new=False)
        yield Pair(FIRST, row, -1, draining=False, standby=Replayed(OLD, row), behind=(), reader=-1, seen=None)

    def steps(self, pair: Pair) -> Iterator[tuple[Label, Pair]]:
        """Let writer, runner, standby and reader do the next thing."""
        if len(pair.behind) < self.lag:
            yield from self._primary(pair)
        if pair.behind:
            yield ("standby: replays a commit",), pair._replace(standby=pair.behind[0], behind=pair.behind[1:])
        if pair.reader >= 0:
            yield ("reader: ends",), pair._replace(reader=-1, seen=None)
        else:
            state = pair.flag.state if self.flag_from == "primary" else pair.standby.state
            seen = pair.standby.row if self.one_snapshot else None
            yield ("reader: BEGIN, flag ", State(state).name), pair._replace(reader=int(state), seen=seen)

    def _primary(self, pair: Pair) -> Iterator[tuple[Label, Pair]]:
        flag, row = pair.flag, pair.row
        if pair.writer < 0:
            yield ("writer: BEGIN in ", State(flag.state).name), pair._replace(writer=int(flag.state))
        else:
            written = pair._replace(row=row.written(pair.writer), writer=-1, draining=False)
            yield ("writer: writes, COMMIT",), _logged(written)
            yield ("writer: ROLLBACK",), pair._replace(writer=-1, draining=False)
        for after in flips(flag, _NO_WAITS, ()):
            label = ("flip: ", State(flag.state).name, " → ", State(after.state).name)
            yield label, _logged(pair._replace(flag=after, draining=pair.writer >= 0))
        if not flag.drained and not pair.draining:
            yield ("drain: nobody is left",), pair._replace(flag=flag._replace(drained=True))
        if (direction := may_move(flag, _NO_WAITS)) is not None:
            forward = direction == "forward"
            copied = row._replace(new=row.old) if forward else row._replace(old=row.new)
            valid = flag._replace(new_valid=True) if forward else flag._replace(old_valid=True)
            yield ("mover: moves, ", direction), _logged(pair._replace(row=copied, flag=valid))

    def wrong(self, pair: Pair) -> str | None:
        """Look at what the reader reads."""
        read = pair.seen or pair.standby.row
        if pair.reader >= 0 and not read.right(pair.reader):
            side = "new" if pair.reader >= LIVE else "old"
            return f"the reader on the standby reads {side} in {State(pair.reader).name}, which is stale there"
        return None

    def canonical(self, pair: Pair) -> Pair:
        """Nobody has a double."""
        return pair


def _logged(pair: Pair) -> Pair:
    return pair._replace(behind=(*pair.behind, Replayed(int(pair.flag.state), pair.row)))
