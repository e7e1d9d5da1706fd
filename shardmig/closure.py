"""
The closure of a shard that a runner closes for its plans: when, for which of them, and open again whatever happens.

How a shard is closed and opened, and whose maintenance it is, says `maintenance`.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import maintenance
from shardmig.errors import DrainTimeout, LockNotObtained, ShardError, SwitchRefused
from shardmig.events import Warned
from shardmig.outcomes import Outcome
from shardmig.pgerrors import first_line
from shardmig.places import leave_place
from shardmig.records import read_records
from shardmig.states import State
from shardmig.steps import Stopped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from shardmig.config import Maintenance, Pace, SessionSettings
    from shardmig.edges import Edges
    from shardmig.events import Listener
    from shardmig.maintenance import Mode
    from shardmig.outcomes import ShardReport
    from shardmig.plan import Plan
    from shardmig.records import Records
    from shardmig.session import Session
    from shardmig.todo import Todo
    from shardmig.turn import Turn

__all__ = ["Closure", "although_cancelled"]

_AT_ONCE_S = 10.0  # for opening a shard, when somebody asks to stop at once


@dataclass(slots=True)
class Closure:
    """
    One runner's closing of one shard.

    Attributes:
        session: on the shard.
        settings: when a runner closes it.
        stop: set by Ctrl-C.
        listener: told what happens.
        closed: by a runner, this one or one that was killed.
        aftermath: what became of the shard and its flags when it was opened, as clauses for people.
    """

    session: Session
    settings: Maintenance
    stop: asyncio.Event
    listener: Listener | None
    closed: bool = False
    aftermath: list[str] = field(default_factory=list)
    _patient: SessionSettings = field(init=False)

    def __post_init__(self) -> None:
        """Remember how long may be waited while the shard serves."""
        self._patient = self.session.settings

    async def find(self, records: Records) -> None:
        """Find out whether a runner that was killed has left the shard closed."""
        self.aftermath.clear()
        if not self.closed and records.maintenance > 0 and await maintenance.closed_for(self.session) is not None:
            self._begin()

    def _begin(self) -> None:
        """Take the shard for closed, by whoever it was."""
        self.closed = True
        self.session.settings = maintenance.impatient(self._patient, self.settings)

    def _end(self) -> None:
        """Take the shard for open."""
        self.closed = False
        self.session.settings = self._patient

    @asynccontextmanager
    async def around(self, mode: Mode | None, todo: Sequence[Todo], edges: Edges) -> AsyncIterator[None]:
        """Close the shard for plans that want it, and open it when they are done; if they fail, `open_again` does."""
        if mode is None:
            yield
            return
        host, pace, steps = edges.host, edges.pace, edges.steps
        hurried = maintenance.hurried(pace, self.settings)
        try:
            if any(item.plan.has_move and (item.target is not None or item.moves_only) for item in todo):
                await steps.surely(partial(self._wait_to_move, edges, hurried if self.closed else pace))
            self._begin()
            await steps.surely(partial(self._close, steps.turn, mode, [item.plan.revision for item in todo]))
            # Its place on the server is kept until it serves again; no writer waits for what its neighbours move.
            edges.host, edges.pace = None, hurried
            yield
            edges.host, edges.pace = host, pace
            await steps.surely(partial(self._lift, steps.turn))
        finally:
            await leave_place(self.session, host)

    async def _wait_to_move(self, edges: Edges, pace: Pace) -> None:
        """Wait while the shard serves; one that a killed runner closed does not."""
        if not await maintenance.wait_to_move(self.session, pace, edges.host, stop=self.stop, listener=self.listener):
            raise Stopped

    async def _close(self, turn: Turn, mode: Mode, revisions: Sequence[str]) -> None:
        await maintenance.close(turn, mode, revisions, self.settings, stop=self.stop, listener=self.listener)
        turn.closed = maintenance.LEVELS[mode]

    async def _lift(self, turn: Turn) -> None:
        turn.closed = 0
        await maintenance.lift(turn, listener=self.listener)
        self._end()

    async def open_again(self, edges: Edges, plan_of: Callable[[str], Plan]) -> None:
        """Take back what was begun under the closing and is not finished, then let the shard serve."""
        records = await read_records(self.session)
        if records is None or not records.maintenance:  # people have opened it, or a failover lost that it was closed
            self._end()
            return
        for flag in await maintenance.begun_inside(self.session):
            await self._take_back(flag, edges, plan_of)
        await edges.steps.surely(partial(self._lift, edges.steps.turn))

    async def _take_back(self, flag: str, edges: Edges, plan_of: Callable[[str], Plan]) -> None:
        """
        Take a flag from DUAL to OLD, or leave it where somebody is in the way.

        The shard can serve then, too: readers read old, writers keep both, and the next move drains before it begins.
        """
        try:
            await edges.steps.surely(lambda: edges.take_back(plan_of(flag), State.OLD))
        except (DrainTimeout, LockNotObtained, SwitchRefused) as error:
            stays = f"{flag} stays DUAL: readers read old, writers write both, and the next apply goes on from there"
            self._say(f"{stays} ({first_line(error)})")
            self.aftermath.append(stays)
        else:
            self.aftermath.append(f"{flag} is OLD again")

    def told(self, report: ShardReport) -> ShardReport:
        """Add to a report, in its first line, what became of the shard; one that is still closed is not done."""
        if self.closed and report.outcome is Outcome.DONE:
            report = replace(report, outcome=Outcome.MAINTENANCE)
        what, line, details = report.reason.partition("\n")
        return replace(report, reason="; ".join(filter(None, [what, *self.aftermath])) + line + details)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say that the shard is closed where it could not be opened: nobody waits for the error."""
        try:
            yield
        except (ShardError, pg.Error) as error:
            self._say_closed("is still closed", f" ({first_line(error)})")
        except asyncio.CancelledError:
            self._say_closed("may still be closed", " (stopped at once)")
            raise
        else:
            if self.closed:
                self._say_closed("is still closed")

    def _say_closed(self, how: str, why: str = "") -> None:
        shard = self.session.shard.name
        cure = f"`shardmig apply --shard {shard}` goes on, `shardmig maintenance off --shard {shard}` opens it"
        self._say(f"the shard {how}{why}; {cure}")
        self.aftermath.append(f"the shard {how}: {cure}")

    def _say(self, message: str) -> None:
        if self.listener:
            self.listener(Warned(self.session.shard.name, message))


async def although_cancelled(work: Coroutine[object, object, None]) -> None:
    """Do work to its end although whoever waits for it is cancelled: for some seconds, then it is cancelled too."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(TimeoutError):
            await asyncio.wait_for(task, _AT_ONCE_S)
        raise
