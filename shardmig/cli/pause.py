"""`shardmig pause` and `shardmig resume`: let running moves rest, from any terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["pause", "register", "resume"]

_Flag = Annotated[str, typer.Argument(help="The flag whose rows move, for example split_name.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(pause)
    app.command()(resume)


def pause(
    flag: _Flag,
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    reason: options.Reason = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Let the moves of a flag rest within a second or so, whoever runs them, until `resume`.

    The batch at work is finished and recorded. To end the move instead, Ctrl-C where it runs, or give it up from here:
    `shardmig switch FLAG OLD --take-over`.
    """
    _tell(flag, shard, everything=everything, wave=wave, tag=tag, reason=reason, output=output, config=config)


def resume(
    flag: _Flag,
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Let the paused moves of a flag go on; where no runner waits any more, `shardmig apply` does."""
    _tell(flag, shard, everything=everything, wave=wave, tag=tag, go_on=True, output=output, config=config)


def _tell(
    flag: str,
    shard: options.Shards,
    *,
    everything: bool,
    wave: str | None,
    tag: str | None,
    output: str,
    config: options.Config_,
    reason: str | None = None,
    go_on: bool = False,
) -> None:
    from shardmig.cli import progress, project, results

    here = project.anyhow(config)
    here.plan_of_flag(flag)
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag)
    fleet = here.fleet(chosen, reason=reason)
    report = progress.run(fleet, lambda: fleet.resume(flag) if go_on else fleet.pause(flag))
    results.show_report(report, output)
