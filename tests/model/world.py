"""
One row and its two representations, who is about to change it, and PostgreSQL's rules about rows that change.

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

from shardmig.states import State

if TYPE_CHECKING:
    from model.flagrow import FlagRow

__all__ = [
    "ABSENT",
    "BEGUN",
    "CHANGED",
    "DELETE",
    "ENTITY",
    "FRESH",
    "GONE",
    "IDLE",
    "MOVER",
    "NOBODY",
    "NOT_WAITING",
    "OPEN",
    "PREPARED",
    "REST",
    "RESTING",
    "SOURCE",
    "STALE",
    "TARGET",
    "UPDATE",
    "UPSERT",
    "VALUE",
    "WAITING",
    "App",
    "Mover",
    "Settings",
    "Tables",
    "World",
    "in_batch",
    "locked",
    "mover_wants",
    "names",
    "no_longer_open",
    "outdated",
    "overtaken",
    "right",
    "what",
    "with_app",
]

OLD, DUAL, LIVE, DONE = State
ABSENT, STALE, FRESH = range(3)
SOURCE, TARGET = range(2)
NOBODY, MOVER = -1, -2  # holders of a lock that are no application

Tables = Literal["one", "entity", "value"]
Order = Literal["old", "new", "reverse_open", "by_state"]
Handful = Literal[
    "never",
    "as built",
    "without looks",  # nobody looks who is open
    "looks last",  # behind the rows and the check, not before them
    "looks before DUAL",  # and OLD → DUAL is in the same transaction, so that whoever begins meanwhile acts on OLD
    "unheld",  # the flag's row is not locked, and who is open was asked about the flip before
    "one snapshot",  # that of the transaction, older than the looks
    "unchecked",
]


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
        whole: it is a handful: drain, move, check and flip in one transaction.
    """

    stage: str
    found: bool = False
    value: int = ABSENT
    orphan: bool = False
    repair: bool = False
    waits: int = NOT_WAITING
    whole: bool = False


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
ENTITY = {
    "put": ((UPSERT, UPSERT), (UPSERT, UPSERT)),
    "set": ((UPDATE, UPSERT), ("", UPDATE)),
    "delete": ((DELETE, DELETE), (DELETE, DELETE)),
}
VALUE = {"set": ((UPDATE, UPSERT), ("", UPSERT)), "clear": ((UPDATE, DELETE), ("", DELETE))}


@dataclass(frozen=True)
class Settings:
    """
    The protocol, or what becomes of it with one thing changed.

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
        exempt: processes whose role the drain does not wait for, although they use the flag.
        handful: the runner may do all in one transaction; "as built", or with one thing changed (`handful`).
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
    exempt: int = 0
    handful: Handful = "never"
    refuse_snapshots: bool = True
    without: frozenset[str] = frozenset()
    skips: tuple[tuple[State, State], ...] = ()

    def plan(self, app: App) -> tuple[tuple[int, str], ...]:
        """List the statements of the transaction: table and verb, in order."""
        state, table = app.state, (VALUE if self.tables == "value" else ENTITY)
        source, target = table[app.op][state == DONE]
        if self.tables == "one":
            return ((SOURCE, table[app.op][0][0]),)
        if state == OLD:
            return ((SOURCE, source),)
        if not source:
            return ((TARGET, target),)
        both = ((SOURCE, source), (TARGET, target))
        return both[::-1] if app.new_first else both

    def there(self, world: World, table: int) -> bool:
        return (world.old != ABSENT or self.tables == "value") if table == SOURCE else world.new != ABSENT

    def released(self, world: World, holder: int, changed: int = 0, gone: int = 0) -> World:
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
            if mover.waits == WAITING and held >> (wants := mover_wants(mover)) & 1:
                mover = mover._replace(waits=GONE if gone >> wants & 1 else NOT_WAITING)
        return World(flag, drain, old, new, truth, locks, mover, apps)

    def _told(self, app: App, held: int, changed: int, gone: int) -> App:
        if app.sees >= 0 and changed:
            app = app._replace(changed=app.changed | changed)
        if app.waits == WAITING:
            table, verb = self.plan(app)[app.at]
            if held >> table & 1:
                app = app._replace(waits=self._awake(app, table, verb, changed, gone))
        return app

    @staticmethod
    def _awake(app: App, table: int, verb: str, changed: int, gone: int) -> int:
        if app.sees >= 0 and app.sees >> table & 1 and changed >> table & 1:
            return CHANGED if verb != UPSERT or not gone >> table & 1 else NOT_WAITING
        return GONE if verb != UPSERT and gone >> table & 1 else NOT_WAITING


def right(world: World, state: int) -> bool:
    """Whether what a reader in this state reads is what the application last wrote."""
    read = world.new if state >= LIVE else world.old
    return read == (FRESH if world.truth else ABSENT)


def what(world: World, state: int) -> str:
    side, read = ("new", world.new) if state >= LIVE else ("old", world.old)
    if read == ABSENT:
        return f"{side}, and the row is missing there"
    return f"{side}, which is stale" if world.truth else f"{side}, and finds a row that was deleted"


def with_app(world: World, who: int, app: App) -> World:
    flag, drain, old, new, truth, locks, mover, apps = world  # _replace would take twice as long
    return World(flag, drain, old, new, truth, locks, mover, (*apps[:who], app, *apps[who + 1 :]))


def in_batch(world: World, **changes: Any) -> World:
    return world._replace(mover=world.mover._replace(**changes))


def locked(world: World, table: int, holder: int) -> World:
    source, target = world.locks
    return world._replace(locks=(holder, target) if table == SOURCE else (source, holder))


def no_longer_open(world: World, who: int) -> World:
    return world if world.drain < 0 else world._replace(drain=world.drain & ~(1 << who))


def outdated(representation: int) -> int:
    return STALE if representation == FRESH else representation


def overtaken(mover: Mover, changed: int, gone: int) -> Mover:
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
    return mover._replace(found=found, orphan=orphan, value=outdated(mover.value))


def names(mask: int) -> str:
    return ", ".join(f"app {who}" for who in range(8) if mask >> who & 1) or "nobody"


def mover_wants(mover: Mover) -> int:
    """Say which table the mover's next lock is in."""
    return TARGET if mover.stage in {"write", "look", "back"} else SOURCE
