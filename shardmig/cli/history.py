"""`shardmig history`: the log of a shard."""

from __future__ import annotations

import typer

from shardmig.cli import options

__all__ = ["history", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(history)


def history(
    shard: options.Shards = None,
    everything: options.All = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Show what was applied, switched and decided on shards: what, from, to, when, by whom and why."""
    from shardmig.cli import progress, project, results

    here = project.anyhow(config)
    chosen = options.targets(here.config, shard, everything=everything)
    fleet = here.fleet(chosen)
    results.show_history(progress.run(fleet, lambda: fleet.status(log=True), quiet=True), output)
