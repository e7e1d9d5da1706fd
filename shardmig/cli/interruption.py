"""
Ctrl-C and SIGTERM while shards are worked on: a safe place, then at once, then now.

The first asks for the next safe place. The second cancels what is under way; servers are still told to stop, and a
shard that was closed is opened. Whoever asks a third time will not wait for that either: a server that does not answer,
or anything else that hangs, keeps nobody.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

from shardmig.cli.console import INTERRUPTED, err
from shardmig.events import MaintenanceSet, OutcomeReached, Parked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shardmig.events import Event

__all__ = ["Interruption"]

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CURSOR = "\x1b[?25h"  # progress hides it


class Interruption:
    """
    What people ask of work that runs, and the truth for whoever leaves it.

    Args:
        stop: set when work shall end at a safe place.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._asked = 0
        self._working: dict[str, None] = {}
        self._closed: dict[str, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[object] | None = None

    def __enter__(self) -> Self:
        """Heed signals in their own handler, not in the loop: that may be what hangs."""
        self._before = {number: signal.signal(number, lambda *_: self._heed()) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Leave signals to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def over(self, work: Callable[[], Awaitable[T]]) -> T:
        """Await work that may be interrupted."""
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        return await work()

    def listen(self, event: Event) -> None:
        """Remember where something is under way, and what is closed."""
        if isinstance(event, OutcomeReached | Parked):
            self._working.pop(event.shard, None)
        else:
            self._working[event.shard] = None
        if isinstance(event, MaintenanceSet):
            self._closed.pop(event.shard, None)
            if event.mode != "off":
                self._closed[event.shard] = event.mode

    def _heed(self) -> None:
        self._asked += 1
        if self._asked > 2 or self._loop is None:  # noqa: PLR2004 - the third time
            self._leave()
        with suppress(RuntimeError):  # the loop has just ended: so does the process
            self._loop.call_soon_threadsafe(self._safely if self._asked == 1 else self._at_once)

    def _safely(self) -> None:
        self._stop.set()
        err.print("stopping at the next safe place (once more to stop at once) …")

    def _at_once(self) -> None:
        if self._task is not None:
            self._task.cancel()
            err.print("stopping at once, servers are told (once more to leave without waiting for them) …")

    def _leave(self) -> NoReturn:
        """End the process with nothing but a word: what would be waited for, a lock of the display too, may hang."""
        os.write(2, f"{_CURSOR if err.is_terminal else ''}\n{self._truth()}\n".encode())
        os._exit(INTERRUPTED)

    def _truth(self) -> str:
        said = "left; what was committed is recorded, the same command goes on from there"
        if self._working:
            said += f". What was sent to {', '.join(self._working)} may still be carried out there"
        for shard, mode in self._closed.items():
            said += f"\n{shard} is {mode}; `shardmig maintenance off --shard {shard}` opens it, or the same command"
        return said
