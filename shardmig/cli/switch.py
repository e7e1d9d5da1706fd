"""`shardmig switch`: take a flag from state to state, either way."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["register", "switch"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(switch)


def switch(
    flag: Annotated[str, typer.Argument(help="The flag, for example split_name.")],
    state: Annotated[str, typer.Argument(help="OLD, DUAL, LIVE or DONE.", metavar="STATE")],
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    jobs: options.Jobs = None,
    pace: options.Pace = None,
    aware: options.Aware = None,
    reason: options.Reason = None,
    expect: options.Expect = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Go DONE without asking, also where nothing leads back from there.")
    ] = False,
    take_over: options.TakeOver = False,
    terminate_older_than: options.TerminateOlderThan = None,
    recheck: options.Recheck = False,
    mismatches: options.Mismatches = None,
    log_json: options.LogJson = None,
    wide: options.Wide = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Take a flag to a state, one edge after the other, with the drains and moves each edge needs.

    LIVE → DUAL, switching back, is one commit. DONE → LIVE → DUAL moves the rows back first.
    """
    from shardmig.cli import progress, project, results
    from shardmig.errors import ConfigError
    from shardmig.states import State

    if state.upper() not in State.__members__:
        raise ConfigError(f"no state {state!r}: OLD, DUAL, LIVE or DONE")
    here = project.load(config)
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag, expect=expect)
    accepted = here.plan_of_flag(flag)
    if state.upper() == State.DONE.name:
        progress.confirm_done(accepted.plan, yes=yes)
    fleet = here.fleet(
        chosen, jobs=jobs, pace=pace, take_over=take_over, terminate_older_than_s=terminate_older_than, reason=reason
    )
    fleet.rechecks = recheck
    with progress.exporting(mismatches, [accepted]) as fleet.mismatches:
        report = progress.run(fleet, lambda: fleet.switch(flag, State[state.upper()], aware=aware), log_json=log_json)
    results.show_report(report, output, wide=wide)
