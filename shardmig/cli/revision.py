"""`shardmig revision`: begin a migration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardmig.cli import options
from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from shardmig.config import Config, Shard

__all__ = ["register", "revision"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(revision)


def revision(
    message: Annotated[str | None, typer.Option("--message", "-m", help="What the migration does.")] = None,
    autogenerate: Annotated[
        bool, typer.Option("--autogenerate", help="Write what the models add; explain the rest.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            "-s",
            metavar="NAME",
            help="Compare the models with a real shard.",
            show_default="a scratch server built from the plans",
            allow_from_autoenv=False,
        ),
    ] = None,
    rebase: Annotated[bool, typer.Option("--rebase", help="Two branches each added one: put one behind.")] = False,
    config: options.Config_ = None,
) -> None:
    """Write a new script behind the newest one; then fill it, `shardmig plan`, and commit both files."""
    from shardmig import config as configuration
    from shardmig import revision as revisions
    from shardmig.cli import console

    if rebase == (message is not None):
        raise ConfigError("say -m TEXT for a new script, or --rebase to join two heads")
    if (rebase and autogenerate) or (shard is not None and not autogenerate):
        raise ConfigError("--autogenerate goes with -m TEXT, and --shard with --autogenerate")
    here = configuration.load(config, shards=shard is not None)
    directory, after = here.migrations_dir, here.lint.start_after
    if autogenerate:
        _autogenerate(here, str(message), None if shard is None else here.shard(shard))
        return
    if rebase:
        written = revisions.rebase(directory, start_after=after)
    else:
        written = [revisions.revision(directory, str(message), start_after=after)]
    for path in written:
        console.tell(f"wrote {path}")


def _autogenerate(here: Config, message: str, shard: Shard | None) -> None:
    from shardmig.autogenerate import autogenerate
    from shardmig.cli import console

    path, found = autogenerate(here, message, shard)
    for title, _ in found.draft.written:
        console.tell(f"+ {title}")
    for one in found.unexplained:
        console.tell(f"? {one.title}")
    known = len(found.draft.explained) - len(found.unexplained)
    note = f"; {known} differences are explained in earlier scripts" if known else ""
    if path is None:
        console.tell(f"nothing to write: the models add nothing{note}")
        return
    console.tell(f"wrote {path}{note}")
    if found.unexplained:
        console.tell("what is marked ? cannot be added: the script says how each of them goes")
