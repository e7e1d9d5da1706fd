"""
The command line: one file a verb; `console` is the only place that prints.

Verbs import what they need when they run, so that `shardmig --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import (
    adopt,
    amend,
    apply,
    check,
    demo,
    gate,
    history,
    init,
    lint,
    local,
    maintenance,
    pause,
    plan,
    provision,
    revision,
    rule,
    shard,
    show,
    status,
    switch,
    verify,
)
from shardmig.cli.console import guarded

__all__ = ["app", "main"]

app = typer.Typer(
    name="shardmig",
    help="Change the schema of a sharded PostgreSQL application while it runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # "[rollout] gates" is a key, no markup
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 everything asked for is so; 1 it worked and something is not so; 2 it could not start; "
    "130 interrupted, resumable.",
)


def _version(wanted: bool | None) -> None:  # noqa: FBT001 - typer's callback
    if wanted:
        from importlib.metadata import version

        typer.echo(f"shardmig {version('shardmig')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = None,
) -> None:
    """Change the schema of a sharded PostgreSQL application while it runs."""


for verb in (
    init,
    revision,
    plan,
    lint,
    check,
    apply,
    switch,
    maintenance,
    pause,
    status,
    gate,
    verify,
    history,
    show,
    amend,
    provision,
    adopt,
    demo,
    rule,
):
    verb.register(app)
app.add_typer(shard.app, name="shard")
app.add_typer(local.app, name="local")


def main() -> None:
    """Run the command line; a mistake of the user ends in one line, never in a traceback."""
    guarded(app)
