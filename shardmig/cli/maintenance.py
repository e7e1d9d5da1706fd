"""`shardmig maintenance`: take shards out of service while something too hard for online is done."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shardmig.cli import options

__all__ = ["maintenance", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(maintenance)


def maintenance(
    mode: Annotated[
        Literal["on", "read-only", "off"], typer.Argument(help="on: nobody enters; read-only: readers do; off: lifted.")
    ],
    shard: options.Shards = None,
    everything: options.All = False,
    terminate_older_than: options.TerminateOlderThan = None,
    reason: options.Reason = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Set or lift maintenance; returns when nobody is inside any more who does not know of it."""
    from shardmig.cli import progress, project, results

    here = project.anyhow(config)
    chosen = options.targets(here.config, shard, everything=everything)
    fleet = here.fleet(chosen, terminate_older_than_s=terminate_older_than, reason=reason)
    report = progress.run(fleet, lambda: fleet.maintain({"on": "offline"}.get(mode, mode)))
    results.show_report(report, output)
