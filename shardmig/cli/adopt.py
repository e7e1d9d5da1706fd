"""`shardmig adopt`: shards whose history so far was plain Alembic's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from shardmig.cli import options

if TYPE_CHECKING:
    from shardmig.config import Config, Shard
    from shardmig.outcomes import Report

__all__ = ["adopt", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(adopt)


def adopt(
    shard: options.Shards = None,
    everything: options.All = False,
    expect: options.Expect = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Note in each shard's ledger that its history begins after the revision where Alembic left it.

    That revision stands in the configuration as [lint] start_after; what is before it is not judged. Refused, with the
    list, when shards are at different revisions; nothing else is changed.
    """
    from shardmig import config as configuration
    from shardmig.cli import results

    here = configuration.load(config)
    chosen = options.targets(here, shard, everything=everything, expect=expect)
    results.show_report(asyncio.run(_adopt(here, chosen)), output)


async def _adopt(here: Config, chosen: list[Shard]) -> Report:
    from shardmig import adoption
    from shardmig.errors import ConfigError
    from shardmig.fleet import Fleet
    from shardmig.scripts import paths_after, paths_of

    fleet = Fleet(here, (), chosen, jobs=here.rollout.jobs)
    found = await fleet.ask(adoption.alembic_revisions)
    places = {" and ".join(at) or "no revision" for at in found.values() if not isinstance(at, Exception)}
    if len(places) > 1:
        listed = "\n".join(
            f"  {name}: {' and '.join(at) if isinstance(at, tuple) else at}" for name, at in found.items()
        )
        raise ConfigError(f"shards differ, none was adopted; bring them to one revision with Alembic first:\n{listed}")
    after = here.lint.start_after
    if not after:
        at = places.pop() if places else "no revision"
        raise ConfigError(
            f'say in shardmig.toml where history begins: [lint] start_after = "{at}"; nothing was changed'
        )
    paths_after(paths_of(here.migrations_dir), after, here.migrations_dir)  # one that no script has is a slip
    return await fleet.each(lambda session: adoption.adopt(session, after))
