"""`shardmig apply`: bring shards forward."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from shardmig.cli import options
from shardmig.errors import ConfigError
from shardmig.outcomes import Outcome

__all__ = ["apply", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(apply)


def apply(
    revision: Annotated[
        str | None, typer.Argument(help="Apply up to this revision; its first characters do.", show_default="the head")
    ] = None,
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    jobs: options.Jobs = None,
    pace: options.Pace = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show what would be done, and how long moves take; change nothing.")
    ] = False,
    until: Annotated[
        Literal["structure", "dual", "moved", "live", "filled"],
        typer.Option(
            help="How far each migration goes; filled: live, also where the application has filled what is new."
        ),
    ] = "live",
    aware: options.Aware = None,
    expect: options.Expect = None,
    part: options.Partition = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only shards that are not done, behind the canary.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", envvar="SHARDMIG_YES", help="Walk all waves without asking first.")
    ] = False,
    take_over: options.TakeOver = False,
    terminate_older_than: options.TerminateOlderThan = None,
    reason: options.Reason = None,
    recheck: options.Recheck = False,
    despite_proof: Annotated[
        bool,
        typer.Option("--despite-proof", help="Go on where a proof failed: you have looked. Wants --reason; logged."),
    ] = False,
    mismatches: options.Mismatches = None,
    log_json: options.LogJson = None,
    wide: options.Wide = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Apply what is left on the named shards; safe to repeat, to interrupt and to resume.

    Of several shards the canary goes first, alone, with its bake time and gates ([rollout]); the others follow in
    waves. Blocked shards are tried again at the end.
    """
    from shardmig.cli import console, progress, project, results
    from shardmig.todo import Until

    here = project.load(config)
    if here.unwritten:
        console.note(
            f"{', '.join(here.unwritten)}: no plan file, so what runs is rendered now and reviewed by nobody; "
            "`shardmig plan` writes it, commit it"
        )
    revision = here.revision(revision) if revision is not None else None
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag, expect=expect, part=part)
    fleet = here.fleet(
        chosen, jobs=jobs, pace=pace, take_over=take_over, terminate_older_than_s=terminate_older_than, reason=reason
    )
    fleet.rechecks = recheck
    if despite_proof and not reason:
        raise ConfigError("--despite-proof wants --reason TEXT: the log keeps why it is right to go on")
    fleet.accepts_proof = despite_proof
    if failed:
        found = progress.run(fleet, lambda: fleet.status(until=Until(until), upto=revision, aware=aware), quiet=True)
        behind = {one.shard for one in found if one.outcome is not Outcome.DONE}
        if behind:  # the first of them would be the canary, and one that fails again would stop all others
            behind |= {shard.name for each in fleet.waves() if each.canary for shard in each.shards}
        fleet.targets = [target for target in chosen if target.name in behind]
    if dry_run:
        found = progress.run(
            fleet, lambda: fleet.status(until=Until(until), upto=revision, aware=aware, forecast=True), quiet=True
        )
        results.show_left(found, here.plans, output)
    else:
        progress.confirm(fleet.waves(), yes=yes)
        with progress.exporting(mismatches, here.plans) as fleet.mismatches:
            report = progress.run(
                fleet, lambda: fleet.apply(until=Until(until), upto=revision, aware=aware), log_json=log_json
            )
        results.show_report(report, output, wide=wide)
