"""`shardmig demo`: see the promise kept."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["demo", "register"]

_WITHOUT = "Do not wait for transactions older than a flip: the oracle reports wrong reads, for the demo can fail."


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(demo)


def demo(
    rows: Annotated[
        int | None, typer.Option(min=100, help="Customers a shard.", show_default="20000, or 2000 with --fast")
    ] = None,
    shards: Annotated[int, typer.Option(min=2, max=16, help="Shards, each one a PostgreSQL server.")] = 4,
    fast: Annotated[bool, typer.Option("--fast", help="A short story on few rows.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the servers running at the end, until Ctrl-C.")] = False,
    drains: Annotated[bool, typer.Option("--drains/--without-drains", hidden=True, help=_WITHOUT)] = True,
) -> None:
    """
    Migrate four PostgreSQL servers under the traffic of a little shop.

    Starts throw-away servers, tells the story, compares every answer with an oracle, and removes everything. Exit code
    1 when a promise was broken.
    """
    from dataclasses import replace

    from shardmig.cli import console
    from shardmig.demo.show import run
    from shardmig.demo.story import FAST, FULL

    scale = replace(FAST if fast else FULL, shards=shards)
    try:
        verdict = run(console.out, scale if rows is None else replace(scale, rows=rows), keep=keep, drains=drains)
    except KeyboardInterrupt:
        console.err.print("interrupted; servers, processes and data are gone")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if verdict.kept else 1)
