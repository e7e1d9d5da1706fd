"""Throw-away shards with a project's migrations applied: what an application's tests run against."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from shardmig import config as configuration
from shardmig import local
from shardmig.adoption import adopt
from shardmig.config import Config, Lint
from shardmig.errors import ConfigError
from shardmig.fleet import Fleet
from shardmig.repository import accepted_plans
from shardmig.scratch import ANY_VERSION
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
        _finish(lambda: fleet.switch(flag, state, aware="tests")).raise_for_failures()

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
def running(
    names: Sequence[str], *, root: Path, migrations: str = "", base: Callable[[str], object] | None = None
) -> Iterator[LocalShards]:
    """
    Run one server a shard, bring them to the head of the migrations, and leave nothing behind.

    Args:
        names: of the shards; the first is the canary.
        root: where the project is; its configuration, if it has one, says how scripts are judged and where history
            begins, and none of its shards is asked for.
        migrations: the directory of its scripts, relative to the root; empty: the configuration's.
        base: makes of an empty database, by its URL, what the scripts take as given: where the project was adopted,
            what Alembic made up to `start_after`.

    Raises:
        ConfigError: the project was adopted, and nobody said what was there before.
        ScriptError, PlanError, LintFailed: the migrations are not in order.
        ExceptionGroup: they could not be applied.
    """
    project = _project(root, migrations)
    after = project.lint.start_after
    if after and base is None:
        raise ConfigError(_WITHOUT_BASE.format(after=after))
    plans = accepted_plans(project)
    with local.cluster(names) as servers:
        shards = local.shards(servers)
        lint = Lint(**{**project.lint.model_dump(), "pg_versions": ANY_VERSION})
        config = Config(root=project.root, migrations=project.migrations, shards=shards, lint=lint)
        fleet = Fleet(config, plans, list(shards.values()))
        if base is not None:
            for shard in shards.values():
                _in_thread(base, shard.url.get_secret_value())
        if after:
            _finish(lambda: fleet.each(lambda session: adopt(session, after))).raise_for_failures()
        _finish(lambda: fleet.apply(until=Until.FILLED, aware="tests")).raise_for_failures()
        yield LocalShards(fleet)


_WITHOUT_BASE = """this project was adopted at {after}, and shardmig has nothing of what was there before. Say what
makes that of an empty database, and the rest follows:

    # pytest's ini options: shardmig_base = "tests.base:build"
    def build(url: str) -> None:
        config = alembic.config.Config("alembic.ini")
        url = url.replace("postgresql://", "postgresql+psycopg://").replace("%", "%%")
        config.set_main_option("sqlalchemy.url", url)
        alembic.command.upgrade(config, "{after}")
"""


def _project(root: Path, migrations: str) -> Config:
    """Read how the project judges its scripts; the addresses of its fleet are none of a test's business."""
    project = configuration.nearest(root)
    return project.model_copy(update={"migrations": root / migrations}) if migrations else project


def _finish(work: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run to the end on a loop of its own."""
    return _in_thread(lambda _: asyncio.run(work()), "")


def _in_thread(work: Callable[[str], T], url: str) -> T:
    """Work where no loop runs, also where the caller's thread has one; Alembic's own env.py may want its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, url).result()
