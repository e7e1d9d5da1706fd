"""The demo as one call: servers, project, story, verdict; nothing is left afterwards."""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from shardmig import local, switching
from shardmig.demo.stage import Stage, verdict_tables
from shardmig.demo.story import Scale, Story, project

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from shardmig.demo.verdict import Verdict
    from shardmig.local import Server

__all__ = ["run"]


def run(console: Console, scale: Scale, *, keep: bool = False, drains: bool = True) -> Verdict:
    """
    Tell the story on servers of its own, and remove them.

    Args:
        console: where it is shown.
        scale: how big it is.
        keep: when the story is over, leave servers and project until Ctrl-C.
        drains: False skips the runner's drains, to see the oracle notice.
    """
    with _terminating_as_interrupted():
        return _run(console, scale, keep=keep, drains=drains)


def _run(console: Console, scale: Scale, *, keep: bool, drains: bool) -> Verdict:
    stage = Stage(console)
    stage.act(f"{scale.shards} PostgreSQL servers start, each one a shard")
    with local.cluster(scale.shards) as servers:
        story = Story(project(servers), scale, stage)
        with nullcontext() if drains else _without_drains(), stage.lit():
            verdict = asyncio.run(story.tell())
        for table in verdict_tables(verdict, stage.seconds):
            console.print(table)
        if keep:
            _keep(console, story.root, servers)
    return verdict


@contextmanager
def _terminating_as_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: clean up and go."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_drains() -> Iterator[None]:
    """Have the runner believe that nobody is open, whoever is: a demo that cannot fail would prove nothing."""

    async def wait_for_nobody(*_: object, **__: object) -> None:
        return

    waits, switching.drain_shard = switching.drain_shard, wait_for_nobody
    try:
        yield
    finally:
        switching.drain_shard = waits


def _keep(console: Console, root: Path, servers: list[Server]) -> None:
    """Wait for Ctrl-C, with everything at hand."""
    console.print(f"\nThe servers go on until Ctrl-C. In another terminal:\n  cd {root} && shardmig status")
    for server in servers:
        console.print(f"  psql '{server.url()}'   # {server.name}", soft_wrap=True)
    with suppress(KeyboardInterrupt):
        signal.pause()
