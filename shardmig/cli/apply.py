"""`shardmig apply`: bring shards forward."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shardmig.cli import options

__all__ = ["apply", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(apply)


def apply(
    revision: Annotated[str | None, typer.Argument(help="Apply up to this revision.", show_default="the head")] = None,
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    jobs: options.Jobs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would be done; change nothing.")] = False,
    until: Annotated[
        Literal["structure", "dual", "moved", "live"], typer.Option(help="How far each migration goes.")
    ] = "live",
    aware: Annotated[
        str | None,
        typer.Option(metavar="RELEASE", help="You vouch: every process that runs is of this release or newer. Logged."),
    ] = None,
    expect: options.Expect = None,
    take_over: options.TakeOver = False,
    reason: options.Reason = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Apply what is left on the named shards; safe to repeat, to interrupt and to resume."""
    from shardmig.cli import console, project
    from shardmig.todo import Until

    here = project.load(config)
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag, expect=expect)
    fleet = here.fleet(chosen, jobs=jobs, take_over=take_over, reason=reason)
    if dry_run:
        found = console.run(fleet, lambda: fleet.status(until=Until(until)), quiet=True)
        console.show_left(found, here.plans, output)
    else:
        report = console.run(fleet, lambda: fleet.apply(until=Until(until), upto=revision, aware=aware))
        console.show_report(report, output)
