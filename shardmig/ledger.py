"""
The ledger of one shard: the schema `shardmig` in its database.

Here is how it gets there and what its refusals mean; `records` reads it and `turn` writes it.
"""

from __future__ import annotations

import getpass
import os
from contextlib import contextmanager, suppress
from importlib import resources
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig.errors import Fenced, LockNotObtained, PreflightFailed, ShardError, SwitchRefused, WrongShard
from shardmig.session import Query
from shardmig.states import EDGES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.session import Session

__all__ = [
    "FENCED",
    "LEDGER_VERSION",
    "REFUSED",
    "install",
    "is_held",
    "os_user",
    "set_maintenance",
    "translated",
]

LEDGER_VERSION = 1
FENCED = "SM001"  # SQLSTATE: the step row belongs to another runner
REFUSED = "SM002"  # SQLSTATE: the ledger's own rules refuse a change

_INSTALL_LOCK = 0x5368_6D67  # one installer a database; any constant will do
_INSTALL_WAIT_MS = 60_000


async def install(session: Session, *, closed: str | None = None) -> None:
    """
    Make sure that the database has a ledger and that it knows this session's shard.

    Safe under concurrency: installers of one database wait for each other. Everything commits at once or not at all.

    Args:
        session: on the shard.
        closed: why a shard that was not known yet begins its life in maintenance, offline; None: it does not.

    Raises:
        WrongShard: the schema belongs to another shard, or the name to another schema; nothing was written.
        PreflightFailed: the owner role may not create the ledger's schema.
        ShardError: the ledger is newer than this shardmig.
    """
    try:
        # Fifty schema shards of one database may queue here, each for as long as an installation takes.
        async with session.transaction(local={"lock_timeout": f"{_INSTALL_WAIT_MS}ms"}):
            await session.execute("SELECT pg_advisory_xact_lock($1)", [_INSTALL_LOCK])
            if not await _installed(session):
                # One text, many statements: the simple protocol, for the ledger's own file alone.
                await session.connection.cursor().execute(_script())
            await _register(session, closed)
    except pg.InsufficientPrivilege as error:
        raise PreflightFailed(
            f"the ledger cannot be installed ({error.diag.message_primary}); run there as a superuser: "
            "GRANT CREATE ON DATABASE <database> TO <owner role>",
            shard=session.shard.name,
        ) from error


async def _installed(session: Session) -> bool:
    found = await session.execute("SELECT to_regprocedure('shardmig.ledger_version()') IS NOT NULL")
    if not found.value:
        return False
    version = (await session.execute("SELECT shardmig.ledger_version()")).value
    if version > LEDGER_VERSION:
        raise ShardError(
            f"its ledger is version {version}, this shardmig knows {LEDGER_VERSION}; upgrade shardmig here",
            shard=session.shard.name,
        )
    return True


async def _register(session: Session, closed: str | None) -> None:
    shard = session.shard
    known = await session.execute(
        "SELECT shard, schema_name FROM shardmig.shard WHERE shard = $1 OR schema_name = $2",
        [shard.name, shard.schema_name],
    )
    if known.rows == [(shard.name, shard.schema_name)]:
        return
    if known.rows:
        name, schema = known.rows[0]
        raise WrongShard(
            f"{shard.address} schema {schema!r} is shard {name!r}; correct the url or schema of {shard.name!r}, "
            "or after a split or copy rename it with `shardmig shard rename`. Nothing was written there",
            shard=shard.name,
        )
    await session.flight(
        [
            Query(
                "INSERT INTO shardmig.shard (shard, schema_name, epoch, maintenance, reason) "
                "VALUES ($1, $2, shardmig.draw_epoch(), CASE WHEN $3::text IS NULL THEN 0 ELSE 2 END, $3)",
                [shard.name, shard.schema_name, closed],
            ),
            Query("INSERT INTO shardmig.runner (shard) VALUES ($1)", [shard.name]),
        ]
    )


def _script() -> bytes:
    edges = ", ".join(
        f"({e.source.value}, {e.target.value}, '{e.guard.value}', {str(e.has_move).lower()}, "
        f"{'NULL' if e.invalidates is None else repr(e.invalidates)}::text, {str(e.forgets).lower()}, '{e.when}')"
        for e in EDGES
    )
    text = resources.files("shardmig").joinpath("ledger.sql").read_text(encoding="utf-8")
    return text.format(edges=edges, version=LEDGER_VERSION).encode()


# --------------------------------------------------------------------------------------------------------------------
# Maintenance, and what refusals mean


async def set_maintenance(session: Session, mode: str, reason: str | None) -> None:
    """Set maintenance "off", "read-only" or "offline"; the caller drains before relying on it."""
    call = Query("SELECT shardmig.maintenance($1, $2, $3)", (mode, reason, session.shard.name))
    try:
        with translated(session.shard.name):
            await session.transact([call], local={"shardmig.os_user": os_user()})
    except pg.LockNotAvailable as error:
        raise is_held(error, session.shard.name) from error


def os_user() -> str:
    """Name the operating system's user, for the log."""
    with suppress(Exception):  # no passwd entry in a container is no reason to stop
        return getpass.getuser()
    return str(os.getuid())


def is_held(error: pg.LockNotAvailable, shard: str) -> LockNotObtained:
    """Say that rows of the ledger are locked: statements of plans wait for locks by themselves."""
    return LockNotObtained(
        f"somebody holds rows of the ledger in a transaction that is not committed ({error.diag.message_primary}); "
        "end it, and try again",
        shard=shard,
    )


@contextmanager
def translated(shard: str, step: str | None = None) -> Iterator[None]:
    """Turn the SQLSTATEs of the ledger's functions and trigger into Fenced and SwitchRefused; others pass."""
    try:
        yield
    except pg.Error as error:
        if error.sqlstate == FENCED:
            raise Fenced(None, shard=shard, step=step) from error
        if error.sqlstate == REFUSED:
            hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
            raise SwitchRefused(f"{error.diag.message_primary}{hint}", shard=shard, step=step) from error
        raise
