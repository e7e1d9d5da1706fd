"""The processes of one release: started, listened to, drained."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

from shardmig.demo.tally import Tally

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable

    from shardmig.demo.tally import Workload

__all__ = ["Crew"]

_LINE_MAX = 1 << 22
_DRAIN_S = 30.0


class Crew:
    """
    Some processes of one release.

    Attributes:
        release: "a" or "b".
    """

    def __init__(self, release: Literal["a", "b"], heard: Callable[[Tally], None]) -> None:
        self.release = release
        self._heard = heard
        self._processes: list[Process] = []
        self._listening: list[asyncio.Task[None]] = []
        self._ready: list[asyncio.Event] = []
        self._closing = False

    @property
    def serving(self) -> int:
        """How many of its processes run."""
        return sum(process.returncode is None for process in self._processes)

    async def open(self, workload: Workload, *, processes: int) -> None:
        """Start processes; on return every clerk of each has served once, or one has ended and said why."""
        line = json.dumps(asdict(replace(workload, shards=dict(workload.shards)))).encode() + b"\n"
        for _ in range(processes):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "shardmig.demo.serve", self.release),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LINE_MAX,
                start_new_session=True,  # Ctrl-C is the story's: it drains the crews
            )
            ready = asyncio.Event()
            self._processes.append(process)
            self._ready.append(ready)
            self._listening.append(asyncio.create_task(self._listen(process, ready)))
            assert process.stdin is not None  # noqa: S101 - a pipe
            process.stdin.write(line)
        await asyncio.gather(*(ready.wait() for ready in self._ready))

    async def _listen(self, process: Process, ready: asyncio.Event) -> None:
        assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018 - pipes
        said = asyncio.create_task(process.stderr.read())
        async for line in process.stdout:
            tally = Tally.of(json.loads(line))
            self._heard(tally)
            if tally.ready:
                ready.set()
        code, words = await process.wait(), (await said).decode(errors="replace").strip()
        ready.set()
        if code or words or not self._closing:
            why = f"a process of release {self.release.upper()} ended with code {code}: {words[-2000:]}"
            self._heard(Tally(errors=1, error_examples=[why]))

    async def close(self) -> None:
        """Drain: each process finishes what it has begun, tells its last counts and ends."""
        self._closing = True
        for process in self._processes:
            assert process.stdin is not None  # noqa: S101 - a pipe
            with suppress(OSError):
                process.stdin.close()
        await asyncio.wait_for(asyncio.gather(*self._listening), _DRAIN_S)

    async def abandon(self) -> None:
        """End the processes at once; nothing is left of them on return."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*(process.wait() for process in self._processes), *self._listening, return_exceptions=True)
