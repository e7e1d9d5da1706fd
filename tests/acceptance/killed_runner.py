"""
Run `apply --all` of the project in the working directory again and again, killing it with SIGKILL.

A child is forked for each run, so that only the killed part costs time. Prints how many children were killed.

    killed_runner.py moments SEED KILLS SPAN_S    kill at random moments, up to KILLS times, then let one finish
    killed_runner.py boundaries URL...            on the first URL kill at the first boundary between two steps, on the
                                                  second at the second, …; each time let one finish
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from shardmig.cli import project
from shardmig.config import Shard
from shardmig.events import BatchDone, Draining, Waiting
from shardmig.outcomes import Outcome

if TYPE_CHECKING:
    from shardmig.events import Event


def run(here: project.Project, boundary: int | None) -> int:
    """Apply everything; die at the given boundary."""
    import asyncio  # noqa: PLC0415 - after the fork

    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        if isinstance(event, BatchDone | Waiting | Draining):
            return
        seen += 1
        if seen == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    fleet = here.fleet(list(here.config.shards.values()))
    fleet.listener = listen
    report = asyncio.run(fleet.apply())
    for one in report:
        if one.outcome is not Outcome.DONE:
            sys.stderr.write(f"{one}\n")
    return 0 if report.done else 1


def child(here: project.Project, boundary: int | None = None) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(run(here, boundary))
    return pid


def code_of(pid: int) -> int | None:
    """Exit code of a child; None when it was killed."""
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def moments(here: project.Project, seed: int, kills_max: int, span_s: float) -> tuple[int, int]:
    random.seed(seed)
    for kills in range(kills_max):
        pid = child(here)
        time.sleep(random.uniform(0, span_s))
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return kills, os.waitstatus_to_exitcode(status)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return kills_max, code_of(child(here)) or 0


def boundaries(here: project.Project, urls: list[str]) -> tuple[int, int]:
    for kills, url in enumerate(urls):
        shard = Shard.model_validate({"name": "eu1", "url": url})
        there = replace(here, config=here.config.model_copy(update={"shards": {"eu1": shard}}))
        if code_of(child(there, boundary=kills + 1)) is not None:
            return kills, 0
        if code := code_of(child(there)):
            return kills, code
    return len(urls), 0


def main() -> int:
    here = project.load(None)
    match sys.argv[1:]:
        case ["moments", seed, kills_max, span_s]:
            kills, code = moments(here, int(seed), int(kills_max), float(span_s))
        case ["boundaries", *urls]:
            kills, code = boundaries(here, urls)
        case _:
            return 2
    sys.stdout.write(f"{kills}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
