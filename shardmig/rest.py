"""
When a move rests, and why: asked once a second, between two batches.

An operator's pause comes first, then what this run has arranged for itself (its window, its share of the server), then
the server's load. The reason is an event, and stands in the step row for whoever looks at the shard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from shardmig import progress
from shardmig.errors import Overloaded
from shardmig.load import read_load
from shardmig.pace import Brakes
from shardmig.places import leave_place, take_place
from shardmig.window import Window

if TYPE_CHECKING:
    from shardmig.config import Pace
    from shardmig.hosts import Host
    from shardmig.pace import Headway
    from shardmig.patience import Patience
    from shardmig.plan import Move
    from shardmig.session import Session
    from shardmig.turn import Turn

__all__ = ["Rest", "admitted", "arranged"]

_LOOK_S = 1.0  # between two looks


class _Reason(NamedTuple):
    """Why a move rests; what is `arranged` is sure to pass, and is not counted against `max_rest_s`."""

    text: str
    arranged: bool = False


@dataclass(slots=True)
class Rest:
    """
    Lets one move rest while something says so.

    Attributes:
        turn: whose turn it is.
        revision: of the plan.
        number: of the step.
        move: what is moved.
        pace: limits, window.
        patience: does what may fail, and waits.
        host: what moves on the same server share; None when this one is alone.
    """

    turn: Turn
    revision: str
    number: int
    move: Move
    pace: Pace
    patience: Patience
    host: Host | None = None
    _brakes: Brakes = field(init=False)
    _window: Window | None = field(init=False)
    _looked_at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Read the window."""
        self._brakes = Brakes(self.pace)
        self._window = Window.parse(self.pace.window) if self.pace.window is not None else None

    async def mind(self, headway: Headway, *, load: bool = True) -> None:
        """
        Look now and then, and rest while there is a reason to.

        Args:
            headway: noted for whoever asks how far the move is and how long it takes.
            load: whether what is done next makes the server's load worse: moving does, comparing does not.

        Raises:
            Interrupted: a stop was asked for.
            Overloaded: the reason did not pass within `max_rest_s`, or the configuration rather parks the shard.
        """
        if time.monotonic() - self._looked_at < _LOOK_S:
            return
        said, since = None, time.monotonic()
        while (reason := await self.patience.do(lambda: self._reason(headway, load=load))) is not None:
            if reason.arranged and not self.pace.parks_waiting:
                since = time.monotonic()
            elif reason.arranged or time.monotonic() - since > self.pace.max_rest_s:
                raise Overloaded(
                    f"the move of {self.move.table} rests: {reason.text}; what is moved stays, apply again later",
                    shard=self.turn.shard,
                )
            self.patience.say(reason.text)
            if reason.text != said:
                said = reason.text
                await self.patience.do(lambda why=said: self.patience.note(why))  # type: ignore[misc]
            await self.patience.rest(_LOOK_S)
        if said is not None:
            await self.patience.do(lambda: self.patience.note(None))
        self._looked_at = time.monotonic()

    def wrote(self, at_s: float, written: int) -> None:
        """Note how far the server had written its WAL when a batch was done, by its own clock."""
        self._brakes.wrote(at_s, written)

    async def after_batch(self, rows: int, pause_s: float) -> None:
        """Rest so that the limits of this move and of its server hold; `pause_s` is what the former asks for."""
        if self.host is not None:
            pause_s = max(pause_s, self.host.pause_s(rows, time.monotonic()))
        if pause_s > 0:
            await self.patience.rest(pause_s)

    async def end(self) -> None:
        """Leave the server to other moves."""
        await leave_place(self.turn.session, self.host)

    async def _reason(self, headway: Headway, *, load: bool) -> _Reason | None:
        session = self.turn.session
        noted = await session.execute(_LOOK, [self.turn.shard, self.revision, self.number, self.turn.term, *headway])
        if not noted.rows:
            return None  # another runner's by now: the next record says so
        paused, at_s = noted.rows[0]
        if paused is not None:
            await self.end()
            return _Reason(progress.paused(paused))
        if (waits := await admitted(session, self._window, self.host, at_s)) is not None:
            return _Reason(waits, arranged=True)
        braked = self._brakes.judge(await read_load(session, self.move)) if load else None
        return _Reason(braked) if braked is not None else None


async def admitted(session: Session, window: Window | None, host: Host | None, at_s: float) -> str | None:
    """Take a place on a server as `arranged` does, among the moves of all runners."""
    waits = arranged(window, host, session.shard.name, at_s)
    waits = waits if waits is not None else await take_place(session, host)
    if waits is not None:
        await leave_place(session, host)
    return waits


def arranged(window: Window | None, host: Host | None, shard: str, at_s: float) -> str | None:
    """
    Take a place on a server for a shard's move, and return None; else why the move must wait, as a clause.

    Args:
        window: when rows may be moved; None is at any time.
        host: the server; None is no limit.
        shard: whose rows.
        at_s: now, by the server's clock, in seconds since 1970.
    """
    if window is not None and not window.is_open(at_s):
        if host is not None:
            host.leave(shard)
        return f"rows move only {window.written} (window)"
    return host.admit(shard) if host is not None else None


# The window is told by the server's clock: runners' may differ.
_LOOK = """
UPDATE shardmig.step SET rows_per_s = $5, eta_s = $6, checked_rows = $7, noted_at = clock_timestamp()
WHERE shard = $1 AND revision = $2 AND number = $3 AND term = $4
RETURNING paused, extract(epoch FROM clock_timestamp())::float8
"""
