"""Runs of the command line side by side: begun within milliseconds, killed, stopped and asked what they said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is also a program
from command_line import become, load

__all__ = ["PATIENCE_S", "Forker", "Run"]

PATIENCE_S = 60.0


class Run(NamedTuple):
    """One run: what was asked, and where its process writes."""

    arguments: tuple[str, ...]
    place: Path
    began_s: float

    @property
    def pid(self) -> int:
        return int((self.place / "pid").read_text())

    @property
    def code(self) -> int | None:
        """Its exit code; negative when a signal ended it; None while it runs."""
        with suppress(FileNotFoundError):
            return int((self.place / "code").read_text())
        return None

    @property
    def said(self) -> str:
        return (self.place / "out").read_text(errors="replace") + (self.place / "err").read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, within_s: float = PATIENCE_S) -> bool:
        """Wait until it has ended; say whether it has."""
        deadline = time.monotonic() + within_s
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.code is not None


class Forker:
    """A process that has imported everything, and forks a run of the command line for each line that it is told."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._runs = 0
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        """Be there."""
        return self

    def __exit__(self, *_: object) -> None:
        """End; runs that were begun go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def start(self, *arguments: str, cwd: Path) -> Run:
        self._runs += 1
        place = self._place / f"run{self._runs}"
        place.mkdir(parents=True)
        env = {**os.environ, "SHARDMIG_YES": "1"}
        request = {"arguments": arguments, "cwd": str(cwd), "env": env, "place": str(place)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + PATIENCE_S
        while not (place / "pid").exists():
            assert time.monotonic() < deadline, "the process that forks has ended"
            time.sleep(0.002)
        return Run(arguments, place, time.monotonic())


def _serve() -> None:
    """Fork for each line a keeper, who forks the run, waits for it and keeps its exit code."""
    load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request = json.loads(line)
            place = Path(request["place"])
            pid = os.fork()
            if pid == 0:
                streams = [os.open(place / name, os.O_WRONLY | os.O_CREAT) for name in ("out", "err")]
                become(request, streams)
                return
            _written(place / "pid", pid)
            _, status = os.waitpid(pid, 0)
            _written(place / "code", os.waitstatus_to_exitcode(status))
            os._exit(0)


def _written(path: Path, number: int) -> None:
    """Write a number, all of it or nothing."""
    (path.parent / f"{path.name}.new").write_text(str(number))
    (path.parent / f"{path.name}.new").rename(path)


if __name__ == "__main__":
    _serve()
