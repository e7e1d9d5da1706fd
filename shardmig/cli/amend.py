"""`shardmig amend`: where a shard's data breaks a step, put the committed, reviewed plan in its place."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["amend", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(amend)


def amend(
    revision: Annotated[str, typer.Argument(help="The revision whose committed plan says what it amends.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept in the shard's ledger.")],
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Replace the steps of a plan that are not finished on the named shards by the committed plan; then apply again.

    The script says amends = ("hash of the earlier plan",). Finished steps are never touched; the ledger keeps both.
    """
    from shardmig.cli import progress, project, results

    here = project.load(config)
    revision = here.revision(revision)
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag)
    fleet = here.fleet(chosen, reason=reason)
    report = progress.run(fleet, lambda: fleet.amend(revision, reason=reason))
    results.show_report(report, output)
