"""`shardmig provision`: an empty database becomes a shard like the others."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["provision", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(provision)


def provision(
    name: Annotated[str, typer.Argument(help="The new shard, as the configuration names it.")],
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Bring an empty database straight to the fleet's structure and to each flag's lowest state there.

    Nothing is drained, and nothing moved but what plans seed: until its flags stand, the new shard is in maintenance
    and nobody can enter.
    """
    from shardmig.cli import progress, project, results

    here = project.load(config)
    fleet = here.fleet([here.config.shard(name)])
    results.show_report(progress.run(fleet, fleet.provision), output)
