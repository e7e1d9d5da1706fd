"""`shardmig gate`: a deploy script's question before a release goes out."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["gate", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(gate)


def gate(
    what: Annotated[
        str | None, typer.Argument(help='"ledger", or a flag.', metavar="ledger|FLAG", show_default=False)
    ] = None,
    level: Annotated[
        str | None, typer.Argument(help="structure, dual, live or done; with a flag.", metavar="[LEVEL]")
    ] = None,
    same: Annotated[
        tuple[str, str] | None,
        typer.Option("--same", metavar="A B", help="Two shards have the same plans and flags: rows may go over."),
    ] = None,
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    expect: options.Expect = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Exit 0 only if every named shard is there: run it before a release that relies on it is started."""
    from shardmig.cli import progress, project, results
    from shardmig.errors import ConfigError

    if same is not None:
        if what is not None or shard or everything or wave or tag:
            raise ConfigError("--same A B names its two shards itself")
        here = project.load(config)
        fleet = here.fleet([here.config.shard(name) for name in same])
        results.show_same(progress.run(fleet, fleet.status, quiet=True), output)
    level = None if level is None else level.lower()
    levels = ("structure", "dual", "live", "done")
    if what is None or (what == "ledger") == (level is not None) or (level is not None and level not in levels):
        raise ConfigError(f"say `gate ledger`, or `gate FLAG LEVEL` with a level of {', '.join(levels)}")
    here = project.load(config)
    if level is not None:
        here.plan_of_flag(what)
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag, expect=expect)
    fleet = here.fleet(chosen)
    results.show_gate(progress.run(fleet, fleet.status, quiet=True), what, level, output)
