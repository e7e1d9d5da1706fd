"""
The ledger of one shard: the schema `shardmig` in its database.

Here is how it gets there and what its refusals mean; `records` reads it and `turn` writes it.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import random
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from importlib import resources
from itertools import count
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import locking
from shardmig.errors import (
    Fenced,
    LockNotObtained,
    PreflightFailed,
    ShardError,
    SwitchedMeanwhile,
    SwitchRefused,
    WrongShard,
)
from shardmig.flight import set_settings
from shardmig.session import Query
from shardmig.states import EDGES, Guard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from shardmig.config import Shard
    from shardmig.session import Session
    from shardmig.states import Edge

__all__ = [
    "FENCED",
    "REFUSED",
    "STEPS",
    "SWITCHED",
    "accept_proof",
    "install",
    "is_held",
    "lawful",
    "naming_holders",
    "newest",
    "os_user",
    "refuse_newer",
    "set_maintenance",
    "translated",
    "version_of",
    "wrong_shard",
]

STEPS: tuple[str, ...] = ("ledger.sql",)
"""
Files of this package, each of which takes the ledger one version further; the first one begins it.

A step that was released never changes. It only adds, for a runner of the version before may be at work on another shard
of the database: its statements and its calls must go on working. It leaves the tables `shard` and `flag` alone, which
applications read in every transaction, and it revokes from PUBLIC the functions that it adds.
"""

FENCED = "SM001"  # SQLSTATE: the step row belongs to another runner
SWITCHED = "SM004"  # SQLSTATE: a flag is no longer where it was read
REFUSED = "SM002"  # SQLSTATE: the ledger's own rules refuse a change

_INSTALL_LOCK = 0x5368_6D67  # one installer a database; any constant will do
_INSTALL_WAIT_MS = 60_000
_PAUSE_S = (0.05, 0.15)  # after a try that did not get a lock: the queue behind it drains

_TABLES = ("shardmig.runner", "shardmig.migration", "shardmig.step", "shardmig.amendment", "shardmig.log")
_STANDS_IN_THE_WAY = """
SELECT EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND granted AND mode = 'AccessExclusiveLock'
    AND locktype = 'relation' AND relation IN ('shardmig.shard'::regclass, 'shardmig.flag'::regclass))
"""


async def install(session: Session, *, closed: str | None = None) -> None:
    """
    Make sure that the database has this shardmig's ledger and that it knows this session's shard.

    An older ledger is taken to the newest version. Safe under concurrency: installers of one database wait for each
    other, and none waits for a table of the ledger longer than a rung of `lock_timeout_ms`. Everything commits at once
    or not at all.

    Args:
        session: on the shard.
        closed: why a shard that was not known yet begins its life in maintenance, offline; None: it does not.

    Raises:
        WrongShard: the schema belongs to another shard, or the name to another schema; nothing was written.
        PreflightFailed: the owner role may not create the ledger's schema, or somebody else's has its name.
        LockNotObtained: somebody kept a table of an older ledger busy; nothing was changed.
        ShardError: the ledger is newer than this shardmig.
    """
    settings = session.settings
    deadline_s = time.monotonic() + settings.lock_wait_s
    for tries in count():
        rung_ms = settings.lock_timeout_ms[min(tries, len(settings.lock_timeout_ms) - 1)]
        try:
            await _install(session, closed, lock_timeout_ms=rung_ms)
        except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
            if time.monotonic() > deadline_s:
                raise await _stayed_busy(session, error) from error
            await asyncio.sleep(random.uniform(*_PAUSE_S))  # noqa: S311 - jitter
        except pg.InsufficientPrivilege as error:
            raise PreflightFailed(
                f"the ledger cannot be installed ({error.diag.message_primary}); run there as a superuser: "
                "GRANT CREATE ON DATABASE <database> TO <owner role>",
                shard=session.shard.name,
            ) from error
        else:
            return


async def _install(session: Session, closed: str | None, *, lock_timeout_ms: int) -> None:
    # Fifty schema shards of one database may queue here, each for as long as an installation takes.
    async with session.transaction(local={"lock_timeout": f"{_INSTALL_WAIT_MS}ms"}):
        await session.execute("SELECT pg_advisory_xact_lock($1)", [_INSTALL_LOCK])
        version = await version_of(session)
        refuse_newer(version, session.shard)
        await session.flight([set_settings({"lock_timeout": f"{lock_timeout_ms}ms"})])
        for step in STEPS[version:]:
            await session.run_file(_text(step))
        if 0 < version < newest():
            await _upgraded(session, version)
        await _register(session, closed)


async def version_of(session: Session) -> int:
    """
    Return the version of the database's ledger; 0 is none.

    Raises:
        PreflightFailed: a schema of somebody else's has the ledger's name.
    """
    [(known, taken)] = (await session.execute(_IS_THERE)).rows
    if taken and not known:
        raise PreflightFailed(
            "a schema shardmig is there that is no ledger of shardmig's; rename it, or drop it if it is empty "
            "(the runner creates its own)",
            shard=session.shard.name,
        )
    return int((await session.execute("SELECT shardmig.ledger_version()")).value) if known else 0


_IS_THERE = "SELECT to_regprocedure('shardmig.ledger_version()') IS NOT NULL, to_regnamespace('shardmig') IS NOT NULL"


async def _upgraded(session: Session, before: int) -> None:
    """Note the version, unless what was done would make an application wait."""
    if (await session.execute(_STANDS_IN_THE_WAY)).value:
        raise ShardError(
            f"version {newest()} of the ledger locks what applications read in every transaction, so it was rolled "
            "back; report this",
            shard=session.shard.name,
        )
    await session.execute(
        "INSERT INTO shardmig.log (shard, action, before, after, os_user) "
        "SELECT shard, 'upgrade', $1, $2, $3 FROM shardmig.shard",
        [str(before), str(newest()), os_user()],
    )


@asynccontextmanager
async def naming_holders(session: Session) -> AsyncIterator[None]:
    """
    Say who keeps the ledger locked; of tables that plans touch, whoever waits for them has said so before.

    Raises:
        LockNotObtained: somebody does.
    """
    try:
        yield
    except pg.LockNotAvailable as error:
        await session.roll_back()
        raise LockNotObtained(
            f"its ledger is locked ({error.diag.message_primary}); held by {await _holders(session)}; "
            "apply again when it is over",
            shard=session.shard.name,
        ) from error


async def _holders(session: Session) -> str:
    held = await locking.holders(session, "shardmig.shard", "shardmig.flag", *_TABLES)
    return "; ".join(str(one.blocker(one.age_s)) for one in held) or "short transactions, none of them right now"


async def _stayed_busy(session: Session, error: pg.Error) -> LockNotObtained:
    who = await _holders(session)
    return LockNotObtained(
        f"the ledger there is older than this shardmig and stayed busy for {session.settings.lock_wait_s:g} s "
        f"({error.diag.message_primary}); held by {who}; nothing was changed, apply again when it is over",
        shard=session.shard.name,
    )


async def _register(session: Session, closed: str | None) -> None:
    shard = session.shard
    known = await session.execute(
        "SELECT shard, schema_name FROM shardmig.shard WHERE shard = $1 OR schema_name = $2",
        [shard.name, shard.schema_name],
    )
    if known.rows == [(shard.name, shard.schema_name)]:
        return
    if known.rows:
        raise wrong_shard(shard, *known.rows[0])
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


def newest() -> int:
    """Return the version of the ledger that this shardmig writes."""
    return len(STEPS)


def refuse_newer(version: int, shard: Shard) -> None:
    """
    Refuse a ledger that a newer shardmig has upgraded.

    Raises:
        ShardError: it says what to upgrade.
    """
    if version > newest():
        raise ShardError(
            f"its ledger is version {version}, this shardmig knows {newest()}; upgrade shardmig here", shard=shard.name
        )


def wrong_shard(shard: Shard, name: str, schema: str) -> WrongShard:
    """Say that the database behind a shard's url says it is another one."""
    return WrongShard(
        f"{shard.address} schema {schema!r} is shard {name!r}; correct the url or schema of {shard.name!r}, "
        "or after a split or copy rename it with `shardmig shard rename`. Nothing was written there",
        shard=shard.name,
    )


def _text(step: str) -> bytes:
    edges = ", ".join(
        f"({e.source.value}, {e.target.value}, '{e.guard.value}', {str(e.has_move).lower()}, "
        f"{'NULL' if e.invalidates is None else repr(e.invalidates)}::text, {str(e.forgets).lower()}, '{e.when}')"
        for e in EDGES
    )
    text = resources.files("shardmig").joinpath(step).read_text(encoding="utf-8")
    version = (
        "\nCREATE OR REPLACE FUNCTION shardmig.ledger_version() RETURNS int LANGUAGE sql IMMUTABLE "
        f"AS 'SELECT {STEPS.index(step) + 1}';\n"
    )
    for name, written in {"edges": edges, **lawful(EDGES)}.items():
        text = text.replace(f"{{{name}}}", written)
    return (text + version).encode()


def lawful(edges: Sequence[Edge]) -> dict[str, str]:
    """Write what the trigger on flags knows of edges, by one number an edge."""

    def number(edge: Edge) -> int:
        return 16 * edge.has_move + 4 * edge.source + edge.target

    def numbers(some: Iterable[Edge]) -> str:
        return ", ".join(str(number(edge)) for edge in some)

    guards = {edge: f"NEW.{edge.guard.value}" if edge.guard.value else "true" for edge in edges}
    return {
        "edge": "16 * OLD.has_move::int + 4 * OLD.state + NEW.state",
        "guards": " ".join(f"WHEN {number(edge)} THEN {met}" for edge, met in guards.items()),
        "ends_new": numbers(e for e in edges if e.invalidates == Guard.NEW_VALID.value),
        "ends_old": numbers(e for e in edges if e.invalidates == Guard.OLD_VALID.value),
        "forgetting": numbers(e for e in edges if e.forgets),
    }


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


async def let_rest(session: Session, flag: str, reason: str | None) -> None:
    """Let a flag's moves rest, whoever runs them, until `let_go_on`; `reason` is shown wherever the move is."""
    await _call(session, Query("SELECT shardmig.pause($1, $2, $3)", (flag, reason, session.shard.name)))


async def let_go_on(session: Session, flag: str) -> None:
    """Let a flag's moves go on that `let_rest` stopped."""
    await _call(session, Query("SELECT shardmig.resume($1, $2)", (flag, session.shard.name)))


async def _call(session: Session, call: Query) -> None:
    try:
        with translated(session.shard.name):
            await session.transact([call], local={"shardmig.os_user": os_user()})
    except (pg.UndefinedFunction, pg.InvalidSchemaName) as error:
        raise PreflightFailed(
            "this database has no ledger, so nothing moves here; `shardmig apply` there first", shard=session.shard.name
        ) from error


async def accept_proof(session: Session, reason: str | None) -> None:
    """Let a shard go on although the proof of its schemas failed: people have looked, and the log says so."""
    await session.execute(
        "WITH decided AS (UPDATE shardmig.step SET error = NULL WHERE shard = $1 AND status = 'DONE' "
        "AND error IS NOT NULL RETURNING revision) "
        "INSERT INTO shardmig.log (shard, action, revision, after, reason, os_user) "
        "SELECT $1, 'proof', revision, 'accepted', $2, $3 FROM decided",
        [session.shard.name, reason, os_user()],
    )


@cache
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
    """Turn the SQLSTATEs of the ledger's functions and trigger into errors that name the cure; others pass."""
    try:
        yield
    except pg.Error as error:
        if error.sqlstate == FENCED:
            raise Fenced(None, shard=shard, step=step) from error
        if error.sqlstate == SWITCHED:
            raise SwitchedMeanwhile(
                f"{error.diag.message_primary}; nothing was recorded, and apply goes on from where the flag is now",
                shard=shard,
                step=step,
            ) from error
        if error.sqlstate == REFUSED:
            hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
            raise SwitchRefused(f"{error.diag.message_primary}{hint}", shard=shard, step=step) from error
        raise
