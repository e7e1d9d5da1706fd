"""`shardmig status`: which shards are where."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["register", "status"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(status)


def status(
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    jobs: options.Jobs = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 unless every shard is done.")] = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Show each shard's flags, what is left and who works there; every shard unless some are named."""
    from shardmig.cli import console, project

    here = project.load(config)
    named = bool(shard) or wave is not None or tag is not None
    chosen = options.targets(here.config, shard, everything=everything or not named, wave=wave, tag=tag)
    fleet = here.fleet(chosen, jobs=jobs)
    found = console.run(fleet, fleet.status, quiet=True)
    console.show_status(found, here.plans, output, exit_code=exit_code)
