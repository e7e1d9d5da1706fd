"""Options that several verbs share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shardmig.errors import ConfigError
from shardmig.rollout import partition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.config import Config, Shard

__all__ = [
    "All",
    "Aware",
    "Config_",
    "Expect",
    "Jobs",
    "LogJson",
    "Mismatches",
    "Output",
    "Pace",
    "Partition",
    "Reason",
    "Recheck",
    "Shards",
    "Tag",
    "TakeOver",
    "TerminateOlderThan",
    "Wave",
    "Wide",
    "revision",
    "targets",
]

# A target is always named on the command line: an environment variable that somebody forgot must not choose shards.
Config_ = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="SHARDMIG_CONFIG",
        help="The configuration file.",
        show_default="shardmig.toml here or above",
    ),
]
Shards = Annotated[
    list[str] | None,
    typer.Option("--shard", "-s", metavar="NAME", help="A shard; repeatable."),
]
All = Annotated[bool, typer.Option("--all", help="Every shard of the configuration.")]
Wave = Annotated[str | None, typer.Option("--wave", metavar="NAME", help="The shards of one wave.")]
Tag = Annotated[str | None, typer.Option("--tag", metavar="TAG", help="The shards with this tag.")]
Expect = Annotated[
    int | None, typer.Option("--expect", metavar="N", help="Refuse to start unless exactly N shards are meant.")
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", envvar="SHARDMIG_JOBS", min=1, help="Shards at once.", show_default="rollout.jobs"),
]
LogJson = Annotated[
    Path | None,
    typer.Option(
        "--log-json",
        envvar="SHARDMIG_LOG_JSON",
        metavar="FILE",
        help="Append every event as a line of JSON: time, event, shard, step, reason, duration.",
    ),
]
Mismatches = Annotated[
    Path | None,
    typer.Option(
        "--mismatches",
        envvar="SHARDMIG_MISMATCHES",
        metavar="FILE",
        help="Write the key of every row that a check finds wrong: CSV if FILE ends in .csv, else lines of JSON.",
    ),
]
Output = Annotated[
    Literal["text", "json"], typer.Option("--output", "-o", envvar="SHARDMIG_OUTPUT", help="How the result is written.")
]
Pace = Annotated[
    Literal["gentle", "fast"] | None,
    typer.Option(
        "--pace",
        envvar="SHARDMIG_PACE",
        help="How fast rows move: in batches of 2.5 ms or of 20 ms; every limit of the configuration holds.",
        show_default="the configuration's",
    ),
]
Recheck = Annotated[
    bool,
    typer.Option(
        "--recheck", help="Compare all rows before a flag goes LIVE, also where that was done before; none is changed."
    ),
]
Aware = Annotated[
    str | None,
    typer.Option(
        "--aware", metavar="RELEASE", help="You vouch: every process that runs is of this release or newer. Logged."
    ),
]
Reason = Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why; kept in the shard's log.")]
Partition = Annotated[
    str | None,
    typer.Option(
        "--partition",
        envvar="SHARDMIG_PARTITION",
        metavar="I/N",
        help="Of the named shards, only the I-th of N stable parts: one runner each on many machines.",
    ),
]
TakeOver = Annotated[bool, typer.Option("--take-over", help="End another runner that works on these shards.")]
Wide = Annotated[bool, typer.Option("--wide", help="A line a shard, however many there are.")]
TerminateOlderThan = Annotated[
    float | None,
    typer.Option(
        "--terminate-older-than",
        metavar="SECONDS",
        min=0,
        help="End transactions older than this that a drain waits for: pg_terminate_backend, named in the log.",
    ),
]


def revision(named: str, revisions: Sequence[str]) -> str:
    """
    Return the revision that an argument means: its id, or the beginning of one alone.

    Args:
        named: what was typed.
        revisions: those that there are, oldest first.

    Raises:
        ConfigError: none begins like that, or several do; they are named.
    """
    if named in revisions:
        return named
    found = [one for one in revisions if named and one.startswith(named)]  # "" is a variable that somebody forgot
    if len(found) > 1:
        raise ConfigError(f"{named!r} begins {len(found)} revisions: {', '.join(found)}; type more of one")
    if not found:
        raise ConfigError(f"no revision {named!r}; the newest is {revisions[-1] if revisions else 'none'}")
    return found[0]


def targets(
    config: Config,
    shards: list[str] | None,
    *,
    everything: bool,
    wave: str | None = None,
    tag: str | None = None,
    expect: int | None = None,
    part: str | None = None,
) -> list[Shard]:
    """
    Return the shards that the options name, in the order of the configuration.

    `expect` counts before `part` takes its share: it is about the fleet, and every runner of it expects the same.

    Raises:
        ConfigError: nothing named, an unknown name, two ways of naming, not as many as expected, or no such part.
    """
    ways = [bool(shards), everything, wave is not None, tag is not None]
    if sum(ways) == 0:
        raise ConfigError("no target: name shards with --shard NAME, --wave NAME or --tag TAG, or say --all")
    if sum(ways) > 1:
        raise ConfigError("name the targets in one way: --shard, --wave, --tag or --all")
    if shards:
        chosen = [config.shard(name) for name in dict.fromkeys(shards)]
    else:
        chosen = [
            shard
            for shard in config.shards.values()
            if everything or (wave is not None and shard.wave == wave) or (tag is not None and tag in shard.tags)
        ]
    if not chosen:
        named = f"wave {wave!r}" if wave is not None else f"tag {tag!r}" if tag is not None else "the configuration"
        raise ConfigError(f"no shard in {named}; shardmig.toml lists shards as [shards.NAME] with a url")
    if expect is not None and len(chosen) != expect:
        raise ConfigError(f"{len(chosen)} shards are meant, {expect} were expected; nothing was begun")
    return partition(chosen, part) if part is not None else chosen
