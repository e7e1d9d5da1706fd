"""`shardmig status`: which shards are where."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options
from shardmig.outcomes import Outcome

__all__ = ["register", "status"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(status)


def status(
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    part: options.Partition = None,
    jobs: options.Jobs = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every few seconds, until Ctrl-C or until all are done.")
    ] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 unless every shard is done.")] = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Show each shard's flags, what is left and who works there; every shard unless some are named."""
    from shardmig.cli import progress, project, results

    here = project.load(config)
    named = bool(shard) or wave is not None or tag is not None
    chosen = options.targets(here.config, shard, everything=everything or not named, wave=wave, tag=tag, part=part)
    fleet = here.fleet(chosen, jobs=jobs)
    if watch:
        found = progress.watch(fleet, lambda found: results.show_status(found, here.plans, output))
    else:
        found = progress.run(fleet, fleet.status, quiet=True)
        results.show_status(found, here.plans, output)
    if exit_code and any(one.outcome is not Outcome.DONE for one in found):
        raise typer.Exit(1)
