"""
Renaming a shard after a split or a copy: its database still says whose copy it is.

The name is the identity that every transaction checks, so giving it to another database by mistake would be worse than
any failed migration: the database that bears the old name in the configuration must not be this one.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from shardmig.errors import WrongShard
from shardmig.ledger import os_user
from shardmig.session import Query

if TYPE_CHECKING:
    from shardmig.session import Session

__all__ = ["mark", "rename", "sees"]

_MARK_CLASS = 0x534D4B00  # advisory locks whose second key is drawn at random: a mark that only one database shows


async def mark(session: Session) -> int:
    """Leave a mark in a session's database for as long as the session lives; returns what to look for."""
    number = secrets.randbelow(2**31)
    await session.execute("SELECT pg_advisory_lock_shared($1::int, $2::int)", [_MARK_CLASS, number])
    return number


async def sees(session: Session, number: int) -> bool:
    """Say whether this session's database is the marked one; copies and other databases are not."""
    found = await session.execute(
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = $1::int::oid "
        "AND objid = $2::int::oid AND objsubid = 2 "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
        [_MARK_CLASS, number],
    )
    return bool(found.value)


async def rename(session: Session, *, was: str, reason: str | None) -> None:
    """
    Give a database's ledger this session's shard name; everything that it has recorded goes with it.

    One commit; transactions under the old name that begin after it meet WrongShard.

    Raises:
        WrongShard: its schema is not the shard `was`; nothing was written.
    """
    shard = session.shard
    rows = (await session.execute("SELECT shard, schema_name FROM shardmig.shard")).rows
    if (was, shard.schema_name) not in rows:
        here = ", ".join(f"{name} (schema {schema})" for name, schema in rows) or "none"
        raise WrongShard(f"{shard.address} is not shard {was!r}; it holds {here}", shard=shard.name)
    await session.transact(
        [
            Query(
                "UPDATE shardmig.shard SET shard = $1, epoch = shardmig.draw_epoch() "
                "WHERE shard = $2 AND schema_name = $3",
                (shard.name, was, shard.schema_name),
            ),
            Query("UPDATE shardmig.log SET shard = $1 WHERE shard = $2", (shard.name, was)),
            Query(
                "INSERT INTO shardmig.log (shard, action, before, after, reason, os_user) "
                "VALUES ($1, 'rename', $2, $1, $3, $4)",
                (shard.name, was, reason, os_user()),
            ),
        ]
    )
