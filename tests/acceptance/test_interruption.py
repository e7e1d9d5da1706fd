"""Whoever presses Ctrl-C again and again gets out, whatever hangs, and is told what may be left behind."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from servers import FaultProxy

from shardmig.cli.interruption import Interruption
from shardmig.events import MaintenanceSet, OutcomeReached, StepStarted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Project

    from shardmig.local import Server


class Screen:
    """A terminal on which a program writes its progress."""

    def __init__(self, project: Project, *arguments: str) -> None:
        self._terminal, there = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardmig", *arguments],
            cwd=project.root, stdout=subprocess.DEVNULL, stderr=there, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(there)
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while read := os.read(self._terminal, 65536):
                self.said += read.decode(errors="replace")
        except OSError:  # the program has ended
            return

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._terminal)


@pytest.fixture
def proxy(servers: list[Server]) -> Iterator[FaultProxy]:
    with FaultProxy(servers[0]) as proxy:
        yield proxy


def test_the_third_ctrl_c_leaves_although_the_server_is_silent(project: Project, proxy: FaultProxy) -> None:
    project.seed()
    project.write_toml(
        "[pace]\nbatch_rows = 50\nbatch_rows_max = 50\nmax_rows_per_s = 100\n",
        urls={"eu1": proxy.url(project.database("eu1"))},
    )
    screen = Screen(project, "apply", "--shard", "eu1")
    try:
        screen.until("rows moved")
        proxy.blackhole()
        screen.process.send_signal(signal.SIGINT)
        screen.until("stopping at the next safe place")
        screen.process.send_signal(signal.SIGINT)
        screen.until("stopping at once")
        screen.process.send_signal(signal.SIGINT)

        assert 130 == screen.process.wait(10)
        screen._reader.join()
        assert "What was sent to eu1 may still be carried out there" in screen.said
        assert screen.said.rindex("\x1b[?25h") > screen.said.rindex("\x1b[?25l"), "the cursor is shown again"
    finally:
        screen.close()

    proxy.reset()
    project.write_toml()
    project.run("apply", "--shard", "eu1")
    assert [(1200,)] == project.query(
        "eu1", "SELECT rows FROM shardmig.step WHERE revision = '0002_split_name' AND kind = 'move'"
    )


def test_who_leaves_is_told_where_something_may_still_happen_and_what_is_closed() -> None:
    interruption = Interruption(asyncio.Event())
    for event in (
        StepStarted("eu1", "0001_shop", 1, "statement"),
        MaintenanceSet("eu2", "offline", "0001_shop is being applied"),
        MaintenanceSet("us1", "read-only", "0001_shop is being applied"),
        MaintenanceSet("us1", "off", None),
        OutcomeReached("us1", "done", "", 1.0),
    ):
        interruption.listen(event)

    assert (
        "left; what was committed is recorded, the same command goes on from there. What was sent to eu1, eu2 may "
        "still be carried out there\n"
        "eu2 is offline; `shardmig maintenance off --shard eu2` opens it, or the same command"
    ) == interruption._truth()


def test_ctrl_c_while_the_program_ends_adds_no_word() -> None:
    program = """
import atexit, os, signal, sys
from shardmig.cli.console import guarded
atexit.register(os.kill, os.getpid(), signal.SIGINT)
guarded(lambda: sys.exit(1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    assert (1, "", "") == (done.returncode, done.stdout, done.stderr)
