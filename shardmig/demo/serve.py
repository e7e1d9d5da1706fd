"""
One process of a release: `python -m shardmig.demo.serve a` reads a workload from stdin and tells counts on stdout.

It serves until its stdin ends, finishes what it has begun, and tells the rest: that is how a deployment drains a
process, and why none outlives the demo.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import TYPE_CHECKING

from shardmig.demo.clerks import Clerk, Register, audit, back_office, counter, slow
from shardmig.demo.tally import Counts, Workload

if TYPE_CHECKING:
    from shardmig.demo.goods import Release

__all__ = ["main"]

_REPORT_S = 0.1
_TURN_S = 0.0005  # of a thread; Python's 5 ms would count its own queue as the shop's latency


def main() -> None:
    """Serve until stdin ends."""
    sys.setswitchinterval(_TURN_S)
    workload = Workload(**json.loads(sys.stdin.readline()))
    stop = threading.Event()
    shop, office = _release(sys.argv[1])
    often, now_and_then = workload.think_s, workload.rest_s
    jobs = [
        *[(counter, shop, often)] * workload.counters,
        *[(slow, shop, now_and_then)] * 2,
        (audit, shop, now_and_then),
        (back_office, office, often),
    ]
    counts = Counts(len(workload.shards) * len(jobs))
    threads: list[threading.Thread] = []
    for shard, url in workload.shards.items():
        register = Register(workload.rows)
        for job, release, rest_s in jobs:
            clerk = Clerk(len(threads), shard, url, release, register, counts, stop, rest_s, workload.slow_s)
            threads.append(threading.Thread(target=clerk.work, args=[job]))
    threads.append(threading.Thread(target=_report, args=[counts, stop]))
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    _tell(counts)


def _release(name: str) -> tuple[Release, Release]:
    """Load one release, and nothing of the other: its shop and its back office."""
    if name == "a":
        from shardmig.demo.release_a import release_a  # noqa: PLC0415

        return release_a, release_a
    from shardmig.demo.release_b import back_office_b, release_b  # noqa: PLC0415

    return release_b, back_office_b


def _report(counts: Counts, stop: threading.Event) -> None:
    while not stop.wait(_REPORT_S):
        _tell(counts)


def _tell(counts: Counts) -> None:
    sys.stdout.write(json.dumps(counts.report()) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
