"""`shardmig init`: begin a project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["init", "register"]

_TOML = """\
# shardmig: what the fleet is and how it is changed. `shardmig --help` shows the verbs.

migrations = "migrations"
# models = ["shop.models:Base.metadata"]         # for `shardmig revision --autogenerate` and `shardmig check`

# One table a shard. ${VARIABLES} come from the environment; ~/.pgpass and service files work as everywhere.
# [shards.eu1]
# url = "${EU1_URL}"
# wave = "canary"                                # this one goes first
# [shards.us1]
# url = "postgresql://migrator@us1.example.com/shop"

[session]
# owner = "shop_owner"                           # role that owns the tables: SET ROLE
# grant = { shop_app = "SELECT, INSERT, UPDATE, DELETE" }   # on new tables

[lint]
pg_versions = [14, 18]                           # oldest and newest server of the fleet
# app = ["shop"]                                 # application code that `shardmig check` judges too
"""
_ATTRIBUTES = "*.sql text eol=lf"
_CI = """\
# Copy into your pipeline: nothing that is not additive gets past these two lines.
#   pip install 'shardmig[cli]'
#   shardmig check
"""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(init)


def init(
    directory: Annotated[Path, typer.Argument(help="Where to begin.", file_okay=False)] = Path(),
) -> None:
    """Write shardmig.toml, migrations/ and .gitattributes; nothing that exists is overwritten."""
    from shardmig.cli import console

    try:
        for line in _lay_out(directory):
            console.tell(line)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def _lay_out(directory: Path) -> Iterator[str]:
    migrations = directory / "migrations"
    migrations.mkdir(parents=True, exist_ok=True)
    configuration = directory / "shardmig.toml"
    names_shards = configuration.exists()
    yield from _written(configuration, _TOML)
    yield from _written(migrations / "README", _CI)
    attributes = directory / ".gitattributes"
    lines = attributes.read_text(encoding="utf-8").splitlines() if attributes.exists() else []
    if _ATTRIBUTES not in lines:
        attributes.write_text("\n".join([*lines, _ATTRIBUTES, ""]), encoding="utf-8")
        yield f"wrote {attributes}: plans keep their line ends, and so their hashes, on every platform"
    first = "" if names_shards else "name your shards in shardmig.toml, then "
    yield f'next: {first}`shardmig revision -m "first change"`'


def _written(path: Path, text: str) -> Iterator[str]:
    if path.exists():
        yield f"kept {path}"
    else:
        path.write_text(text, encoding="utf-8")
        yield f"wrote {path}"
