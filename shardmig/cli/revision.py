"""`shardmig revision`: begin a migration."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options
from shardmig.errors import ConfigError

__all__ = ["register", "revision"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(revision)


def revision(
    message: Annotated[str | None, typer.Option("--message", "-m", help="What the migration does.")] = None,
    rebase: Annotated[bool, typer.Option("--rebase", help="Two branches each added one: put one behind.")] = False,
    config: options.Config_ = None,
) -> None:
    """Write a new script behind the newest one; then fill it, `shardmig plan`, and commit both files."""
    from shardmig import config as configuration
    from shardmig import scripts
    from shardmig.cli import console

    if rebase == (message is not None):
        raise ConfigError("say -m TEXT for a new script, or --rebase to join two heads")
    here = configuration.load(config)
    directory, after = here.migrations_dir, here.lint.start_after
    if rebase:
        written = scripts.rebase(directory, start_after=after)
    else:
        written = [scripts.revision(directory, str(message), start_after=after)]
    for path in written:
        console.tell(f"wrote {path}")
