"""Throw-away shards with a project's migrations applied: what an application's tests run against."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from shardmig import local
from shardmig.config import Config
from shardmig.fleet import Fleet
from shardmig.repository import accepted_plans
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from shardmig.states import State

__all__ = ["LocalShards", "running"]

T = TypeVar("T")


class LocalShards(Mapping[str, str]):
    """The URL of each shard by its name; every migration is applied, every flag LIVE."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._urls = {shard.name: shard.url.get_secret_value() for shard in fleet.targets}

    def switch(self, flag: str, state: State, *, shard: str | None = None) -> None:
        """
        Take a flag to a state on one shard or on all, with every drain and move: the real thing, not an override.

        Raises:
            ExceptionGroup: a shard could not be switched; each error says why.
        """
        targets = [target for target in self._fleet.targets if shard in (None, target.name)]
        fleet = Fleet(self._fleet.config, self._fleet.plans, targets)
        _finish(lambda: fleet.switch(flag, state)).raise_for_failures()

    def __getitem__(self, name: str) -> str:
        """Return a shard's URL."""
        return self._urls[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names, the canary first."""
        return iter(self._urls)

    def __len__(self) -> int:
        """Return how many shards there are."""
        return len(self._urls)


@contextmanager
def running(names: Sequence[str], *, root: Path, migrations: str) -> Iterator[LocalShards]:
    """
    Run one server a shard, bring them to the head of the migrations, and leave nothing behind.

    Args:
        names: of the shards; the first is the canary.
        root: where the project is.
        migrations: the directory of its scripts, relative to the root.

    Raises:
        ScriptError, PlanError, LintFailed: the migrations are not in order.
        ExceptionGroup: they could not be applied.
    """
    with local.cluster(names) as servers:
        shards = local.shards(servers)
        config = Config.model_validate({"root": root, "migrations": migrations, "shards": shards})
        fleet = Fleet(config, accepted_plans(config), list(shards.values()))
        _finish(lambda: fleet.apply(until=Until.FILLED, aware="tests")).raise_for_failures()
        yield LocalShards(fleet)


def _finish(work: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run to the end on a loop of its own, also where the caller's thread has one running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()
