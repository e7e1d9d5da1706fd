"""`shardmig shard`: what is done to a shard as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["app", "rename"]

app = typer.Typer(help="Shards as a whole: rename one after a split or a copy.", no_args_is_help=True)


@app.callback()
def _shard() -> None:
    """Shards as a whole: rename one after a split or a copy."""


@app.command()
def rename(
    new: Annotated[str, typer.Argument(help="The name that the configuration gives it.", metavar="NEW")],
    was: Annotated[str, typer.Option("--was", help="The name in its ledger.", metavar="OLD")],
    reason: options.Reason = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """
    Give a copied database its own name: its ledger still says whose copy it is, and every transaction is refused.

    Refused while the url of OLD leads to the same database.
    """
    from shardmig.cli import progress, project, results

    here = project.load(config)
    fleet = here.fleet([here.config.shard(new)], reason=reason)
    results.show_report(progress.run(fleet, lambda: fleet.rename(was=was)), output)
