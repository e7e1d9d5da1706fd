"""`shardmig status`: which shards are where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardmig.cli import options
from shardmig.outcomes import Outcome

if TYPE_CHECKING:
    from shardmig.status import ShardStatus

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
    flag: Annotated[
        list[str] | None, typer.Option("--flag", metavar="FLAG", help="Speak of this flag alone; repeatable.")
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="A line a shard with every flag, however many.")] = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 unless every shard is done.")] = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Show each shard's flags, what is left and who works there; every shard unless some are named.

    Of many flags those that are LIVE are counted; of many shards only what is not as everywhere is spelled out. Scripts
    that are not in order keep nobody from looking: the committed plan files are compared with, and the exit code is 1.
    """
    from shardmig.cli import console, progress, project, results

    here = project.glance(config)
    named = bool(shard) or wave is not None or tag is not None
    chosen = options.targets(here.config, shard, everything=everything or not named, wave=wave, tag=tag, part=part)
    fleet = here.fleet(chosen, jobs=jobs)
    only = [here.plan_of_flag(name).plan.flag for name in flag or ()]

    def show(found: list[ShardStatus]) -> None:
        results.show_status(found, here.plans, output, only=only, wide=wide)

    if watch:
        found = progress.watch(fleet, show)
    else:
        found = progress.run(fleet, fleet.status, quiet=True)
        show(found)
    if here.disorder is not None:
        console.note(f"compared with the committed plan files, for the scripts are not in order: {here.disorder}")
        raise typer.Exit(1)
    if exit_code and any(one.outcome is not Outcome.DONE for one in found):
        raise typer.Exit(1)
