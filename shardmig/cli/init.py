"""`shardmig init`: begin a project."""

from __future__ import annotations

import os
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["init", "register"]

_TOML = """\
# shardmig: what the fleet is and how it is changed. `shardmig --help` shows the verbs.

migrations = "{migrations}"
# models = ["shop.models:Base.metadata"]         # for `shardmig revision --autogenerate` and `shardmig check`

# One table a shard. ${{VARIABLES}} come from the environment; ~/.pgpass and service files work as everywhere.
# [shards.eu1]
# url = "${{EU1_URL}}"
# wave = "canary"                                # this one goes first
# [shards.us1]
# url = "postgresql://migrator@us1.example.com/shop"

[session]
# owner = "shop_owner"                           # role that owns the tables: SET ROLE
# grant = {{ shop_app = "SELECT, INSERT, UPDATE, DELETE" }}   # on new tables

[rollout]
# bake_s = 600                                   # between the canary's last switch and its gates
# gate = "./smoke-test {{shard}}"                  # must exit 0 on the canary before any other shard is begun

[lint]
pg_versions = [14, 18]                           # oldest and newest server of the fleet
# app = ["shop"]                                 # application code that `shardmig check` judges too
{start_after}"""
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
    """
    Write shardmig.toml, migrations/ and .gitattributes; nothing that exists is overwritten.

    Beside an alembic.ini no directory is made: Alembic's scripts stay where they are, and are followed there.
    """
    from shardmig.cli import console

    try:
        for line in _lay_out(directory):
            console.tell(line)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def _lay_out(directory: Path) -> Iterator[str]:
    found = _alembics(directory)
    migrations = found or directory / "migrations"
    migrations.mkdir(parents=True, exist_ok=True)
    configuration = directory / "shardmig.toml"
    names_shards = configuration.exists()
    yield from _written(configuration, _configuration(directory, migrations, adopts=found is not None))
    if found is None:
        yield from _written(migrations / "README", _CI)
    attributes = directory / ".gitattributes"
    lines = attributes.read_text(encoding="utf-8").splitlines() if attributes.exists() else []
    if _ATTRIBUTES not in lines:
        attributes.write_text("\n".join([*lines, _ATTRIBUTES, ""]), encoding="utf-8")
        yield f"wrote {attributes}: plans keep their line ends, and so their hashes, on every platform"
    first = "" if names_shards else "name your shards in shardmig.toml, then "
    if found is None:
        if (directory / "alembic.ini").exists():
            yield (
                f"alembic.ini names no scripts that are here, so {migrations} is a history of its own; to follow "
                "Alembic's, say migrations = its versions in shardmig.toml, and `shardmig adopt`"
            )
        yield f'next: {first}`shardmig revision -m "first change"`'
    else:
        yield f"Alembic's scripts are in {migrations}, and those of shardmig will follow them there"
        yield f"next: bring every shard to one revision, {first}`shardmig adopt --all`"


def _alembics(directory: Path) -> Path | None:
    """Return where the project's Alembic has its scripts, if it has one in the usual shape."""
    written = ConfigParser({"here": str(directory)}, strict=False)
    with suppress(ConfigParserError, UnicodeDecodeError):
        written.read(directory / "alembic.ini", encoding="utf-8")
        versions = directory / written.get("alembic", "script_location") / "versions"
        return versions if versions.is_dir() else None
    return None


def _configuration(directory: Path, migrations: Path, *, adopts: bool) -> str:
    """Write the configuration; where there is one newest revision of Alembic's, it is the one to begin after."""
    from shardmig.scripts import newest_of

    newest = newest_of(migrations) if adopts else []
    revision = newest[0] if len(newest) == 1 else ""
    line = f'{"" if revision else "# "}start_after = "{revision}"'
    said = f"{line:<48} # Alembic made what is up to there: `shardmig adopt`\n" if adopts else ""
    where = Path(os.path.relpath(migrations, directory)).as_posix()
    return _TOML.format(migrations=where, start_after=said)


def _written(path: Path, text: str) -> Iterator[str]:
    if path.exists():
        yield f"kept {path}"
    else:
        path.write_text(text, encoding="utf-8")
        yield f"wrote {path}"
