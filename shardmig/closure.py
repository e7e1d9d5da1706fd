"""
The closure of a shard that a runner closes for its plans: when, for which of them, and open again whatever happens.

How a shard is closed and opened, and whose maintenance it is, says `maintenance`.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import maintenance
from shardmig.errors import ShardError
from shardmig.events import Warned
from shardmig.pgerrors import first_line
from shardmig.places import leave_place
from shardmig.records import read_records
from shardmig.states import State
from shardmig.steps import Stopped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence

    from shardmig.config import Maintenance, Pace
    from shardmig.edges import Edges
    from shardmig.events import Listener
    from shardmig.maintenance import Mode
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
    """

    session: Session
    settings: Maintenance
    stop: asyncio.Event
    listener: Listener | None
    closed: bool = False

    async def find(self, records: Records) -> None:
        """Find out whether a runner that was killed has left the shard closed."""
        if not self.closed:
            self.closed = records.maintenance > 0 and await maintenance.closed_for(self.session) is not None

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
            self.closed = True
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
        self.closed = False

    async def open_again(self, edges: Edges, plan_of: Callable[[str], Plan]) -> None:
        """Take back what was begun under the closing and is not finished, then let the shard serve."""
        records = await read_records(self.session)
        if records is None or not records.maintenance:  # people have opened it, or a failover lost that it was closed
            self.closed = False
            return
        for flag in await maintenance.begun_inside(self.session):
            await edges.steps.surely(partial(edges.take_back, plan_of(flag), State.OLD))
        await edges.steps.surely(partial(self._lift, edges.steps.turn))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say that the shard is closed where it could not be opened: nobody waits for the error."""
        try:
            yield
        except (ShardError, pg.Error) as error:
            self._say_closed(f"is still closed ({first_line(error)})")
        except asyncio.CancelledError:
            self._say_closed("may still be closed (stopped at once)")
            raise

    def _say_closed(self, how: str) -> None:
        if self.listener:
            shard = self.session.shard.name
            cure = f"`shardmig apply --shard {shard}` goes on, `shardmig maintenance off --shard {shard}` opens it"
            self.listener(Warned(shard, f"the shard {how}; {cure}"))


async def although_cancelled(work: Coroutine[object, object, None]) -> None:
    """Do work to its end although whoever waits for it is cancelled: for some seconds, then it is cancelled too."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(TimeoutError):
            await asyncio.wait_for(task, _AT_ONCE_S)
        raise
