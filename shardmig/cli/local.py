"""`shardmig local`: throw-away PostgreSQL servers, to try things on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from shardmig.errors import ConfigError

__all__ = ["app", "up"]

app = typer.Typer(help="Throw-away PostgreSQL servers, to try things on.", no_args_is_help=True)


@app.callback()
def _local() -> None:
    """Throw-away PostgreSQL servers, to try things on."""


@app.command()
def up(
    count: Annotated[int, typer.Argument(help="How many servers.", min=1, max=64)] = 4,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Write the configuration there instead of printing it.", dir_okay=False),
    ] = None,
) -> None:
    """Run servers in the foreground, one shard each, and print a ready shardmig.toml; Ctrl-C removes everything."""
    from shardmig import local
    from shardmig.cli import console

    if write is not None and write.exists():
        raise ConfigError(f"{write} exists; take another name, nothing was started")
    stopped = {signal.SIGINT, signal.SIGTERM}
    with local.cluster([f"shard{number}" for number in range(1, count + 1)]) as servers:
        signal.pthread_sigmask(signal.SIG_BLOCK, stopped)
        text = local.toml(servers)
        if write is None:
            console.tell(text)
        else:
            write.write_text(text, encoding="utf-8")
            console.tell(f"wrote {write}")
        for server in servers:
            console.tell(f"# {server.name}: psql '{server.url()}'")
        console.err.print("running; Ctrl-C stops the servers and removes their data")
        signal.sigwait(stopped)
    if write is not None and write.exists():
        if write.read_text(encoding="utf-8") == text:
            write.unlink()
        else:
            console.tell(f"kept {write}, which was edited; its shards are gone")
