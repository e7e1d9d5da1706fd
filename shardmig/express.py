"""
The express way of a shard on which nothing stands in the way: turn, plans, structure, small moves, flips, in a flight.

A flight of several transactions: each one commits what it did together with its record, in the order and under the
fences of the careful way (`runner`), and the first that is refused leaves the rest unrun. Whatever it is that refuses
(a lock that is not there at once, somebody to be waited for, the proof, a check, a statement, a lost connection), the
careful way then goes on from what is recorded: all of that is read anew, for people may have switched back meanwhile
what a flight has done; then it looks at each step, waits, proves in full and says why. So nothing here tries again, and
nothing explains.

It is for shards behind a canary, which has proved the same statements in full (`catalog.additive`). Here a locked table
is proved by what any loss would leave behind: another file, or an old column's row written anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import handful
from shardmig.edges import unvouched
from shardmig.errors import ShardUnreachable
from shardmig.events import BatchDone, FlagSwitched, StepDone, StepStarted, Waiting
from shardmig.ledger import os_user
from shardmig.locking import UNAWAITED
from shardmig.quiet import proof
from shardmig.records import flags_of, flags_query
from shardmig.session import Query, is_connection_lost
from shardmig.states import State
from shardmig.steps import LookAgain, in_doubt
from shardmig.structure import recorded
from shardmig.turn import Turn, begin_anew, finish_migration, holder_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shardmig.events import Event, Listener
    from shardmig.plan import Plan
    from shardmig.quiet import Quiet
    from shardmig.records import FlagRow, Records
    from shardmig.session import Result, Session
    from shardmig.todo import Todo

__all__ = ["Arrival", "Express", "fits"]

# Of what a flight repeats, with the same few rows of the ledger each time.
_PLANNED_ONCE = {"plan_cache_mode": "force_generic_plan"}

# Nothing that only adds takes this long; what does (a type edited by hand makes it a rewrite) makes nobody wait longer.
_STATEMENT_MS = 1000


@dataclass(frozen=True, slots=True)
class Arrival:
    """
    What a flight has done: it is all committed.

    Attributes:
        turn: taken in it; ended in it, if nothing is left.
        flags: as they are now, by name; not asked for, if nothing is left.
        left: plans whose rows are to be moved; their structure is there.
        taken: flags that are LIVE now.
    """

    turn: Turn
    flags: dict[str, FlagRow]
    left: tuple[Todo, ...]
    taken: tuple[str, ...]


@dataclass(slots=True)
class _Part:
    """
    One transaction of a flight.

    Attributes:
        queries: without BEGIN and COMMIT.
        steps: what it does, as revision and number.
        switched: what it does to flags.
        begin: of which kind it is.
        end: whether it is kept.
    """

    queries: list[Query] = field(default_factory=list)
    steps: list[tuple[str, int]] = field(default_factory=list)
    switched: list[Event] = field(default_factory=list)
    begin: str = "BEGIN"
    end: str = "COMMIT"

    def written(self) -> list[Query]:
        """Write it all."""
        return [Query(self.begin), *self.queries, Query(self.end)] if self.queries else []


def fits(todo: Sequence[Todo], records: Records) -> bool:
    """Say whether plans may go the express way: the shard serves, nothing is begun, all of it fits transactions."""
    return not records.maintenance and all(
        item.plan.online and not item.accepted.indexes and item.plan.revision not in records.migrations for item in todo
    )


@dataclass(slots=True)
class Express:
    """
    One journey of one shard.

    Attributes:
        session: on the shard, holding its runner lock.
        todo: what `fits`.
        records: just read.
        quiet: just found so.
        positions: of the revisions in the history.
        reason: for the log of what is switched.
        vouched: an operator vouches that every process which runs knows the flags.
        listener: told what was done.
    """

    session: Session
    todo: Sequence[Todo]
    records: Records
    quiet: Quiet
    positions: Mapping[str, int]
    reason: str | None
    vouched: bool
    listener: Listener | None
    _turn: Turn = field(init=False)
    _moved: dict[tuple[str, int], Query] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Name the turn that is to be taken."""
        self._turn = Turn(self.session, self.records.term + 1)

    async def travel(self) -> Arrival:
        """
        Take the turn and do what needs no waiting, in one flight.

        Raises:
            LookAgain: something was refused, or the connection broke; what committed before that is recorded.
            InDoubt: the connection broke, and the server does not come back.
        """
        shard, left = self._turn.shard, tuple(replace(item, statements=()) for item in self.todo if self._is_left(item))
        parts = list(self._parts(ends=not left))
        written = [part.written() for part in parts]
        flight = [query for queries in written for query in queries] + ([flags_query(shard)] if left else [])
        self._tell(StepStarted(shard, *step, self._kind(step)) for part in parts for step in part.steps)
        started = time.monotonic()
        try:
            results = await self.session.flight(flight, repeats=True)
        except pg.Error as error:
            if self.session.connection.broken or is_connection_lost(error):
                self._tell([Waiting(shard, "the connection was lost")])
                await self._come_back(error)
            else:
                committed = takewhile(
                    lambda queries: all(query is not self.session.failed for query in queries), written
                )
                await self.session.roll_back()
                self._tell(event for part, _ in zip(parts, committed, strict=False) for event in part.switched)
            raise LookAgain from error
        seconds, answers = time.monotonic() - started, dict(zip(map(id, flight), results, strict=True))
        self._tell(event for part in parts for event in self._done(part, answers, seconds))
        taken = tuple(item.plan.flag for item in self.todo if item.target is State.LIVE and not self._is_left(item))
        return Arrival(self._turn, flags_of(results[-1]) if left else {}, left, taken)

    def _is_left(self, item: Todo) -> bool:
        """Say whether a plan's drain, and its rows, are left to the careful way."""
        walks = item.plan.has_move and (item.target is not None or item.moves_only)
        return walks and item.plan.revision not in self.quiet.handfuls

    async def _come_back(self, lost: Exception) -> None:
        """Reconnect; where that fails, nobody knows how far the flight came."""
        try:
            await self.session.reconnect()
        except ShardUnreachable as gone:
            raise in_doubt(gone, self.session.shard.name) from lost

    # ----------------------------------------------------------------------------------------------------------------
    # What commits together

    def _parts(self, *, ends: bool) -> Iterator[_Part]:
        """
        Line up transactions: the structure of all plans, then each flag's way.

        Statements that lock nothing that exists go with what is before them or after them, each of the others alone.
        What the first transaction does is entered as done there, and needs no record behind it.
        """
        turn, part = self._turn, _Part([self._turn.taking(ends=ends)])
        ordered = [(item, number) for item in self.todo for number in item.statements]
        entered_done = list(takewhile(lambda place: place[1] not in place[0].accepted.locks, ordered))
        for item in self.todo:
            position, done = self.positions[item.plan.revision], {number for one, number in entered_done if one is item}
            part.queries += begin_anew(turn, item.plan, position=position, done=done)
        for place, (item, number) in enumerate(ordered):
            step = item.plan.revision, number
            if number in item.accepted.locks:
                yield part
                yield _Part(self._under_lock(item, number), [step])
                part = _Part()
            else:
                record, *statements = recorded(turn, item.accepted, number)
                part.queries += statements if place < len(entered_done) else [record, *statements]
                part.steps.append(step)
        yield from self._ways(part)

    def _under_lock(self, item: Todo, number: int) -> list[Query]:
        record, *statements = recorded(self._turn, item.accepted, number)
        locked = item.accepted.locked(number)
        rung_ms = max(1, self.session.settings.lock_timeout_ms[0] // len(locked))  # the server's limit is for each lock
        local = {
            "lock_timeout": f"{rung_ms}ms",
            "statement_timeout": f"{_STATEMENT_MS}ms",
            **UNAWAITED,
            **_PLANNED_ONCE,
        }
        limited = ", ".join([record.sql, *(f"set_config('{name}', '{value}', true)" for name, value in local.items())])
        proofs = [proof(self.quiet.tables[name]) for name in locked]
        return [Query(limited, record.params), *statements, *proofs]

    def _ways(self, part: _Part) -> Iterator[_Part]:
        """Take flags where they shall be, those of plans that move nothing together; `part` goes before them."""
        behind = part
        for item in self.todo:
            plan = item.plan
            if self._is_left(item):
                continue
            if item.target is None:
                part.queries.append(finish_migration(self._turn.shard, plan.revision))
            elif plan.has_move:
                yield from self._way_of_a_handful(part, plan)
                part = _Part()
            else:
                self._switch(part, plan, State.OLD, State.LIVE)
        if part is behind and not part.queries:  # a commit that waits for standbys has to follow what is UNAWAITED
            part.queries.append(self._turn.hold())
        yield part

    def _way_of_a_handful(self, part: _Part, plan: Plan) -> Iterator[_Part]:
        if tried := handful.tried(self._turn, plan):
            yield part
            yield _Part(tried, begin="BEGIN ISOLATION LEVEL REPEATABLE READ", end="ROLLBACK")
            part = _Part()
        if not self.vouched:
            part.switched.append(unvouched(self._turn.shard, plan))
        self._switch(part, plan, State.OLD, State.DUAL)
        yield part
        part = _Part([self._hold()], switched=[FlagSwitched(self._turn.shard, plan.flag, State.DUAL, State.LIVE)])
        moved = handful.moved(self._turn, plan, rows_max=self.quiet.rows_max)
        part.queries += moved.queries
        for number, record in moved.records.items():
            part.steps.append((plan.revision, number))
            self._moved[plan.revision, number] = record
        yield part

    def _switch(self, part: _Part, plan: Plan, source: State, target: State) -> None:
        part.queries += [self._hold(), handful.flip(self._turn, plan, source, target)]
        part.switched.append(FlagSwitched(self._turn.shard, plan.flag, source, target))

    def _hold(self) -> Query:
        """Hold the turn, and say for the log who switches and why."""
        hold = self._turn.hold()
        local = [f"set_config('{name}', '{value}', true)" for name, value in _PLANNED_ONCE.items()]
        said = {"reason": self.reason or "", "os_user": os_user(), "holder": holder_name()}
        local += [f"set_config('shardmig.{name}', ${number}, true)" for number, name in enumerate(said, 3)]
        return Query(", ".join([hold.sql, *local]), [*hold.params, *said.values()])

    # ----------------------------------------------------------------------------------------------------------------
    # What is told

    def _kind(self, step: tuple[str, int]) -> str:
        return "move" if step in self._moved else "statement"

    def _done(self, part: _Part, answers: Mapping[int, Result], seconds: float) -> Iterator[Event]:
        shard = self._turn.shard
        for step in part.steps:
            rows = answers[id(self._moved[step])].value if step in self._moved else 0
            if rows:
                yield BatchDone(shard, *step, rows, rows, rows, 0.0, None)
            yield StepDone(shard, *step, seconds)
        yield from part.switched

    def _tell(self, events: Iterable[Event]) -> None:
        for event in events:
            if self.listener:
                self.listener(event)
