"""
Places on a server, among the moves of all runners: each move marks itself where every runner can count.

The mark is an advisory lock, which a session holds, shared, in its own database; pg_locks shows those of the whole
server to everybody. It is gone with the session that held it, so nobody has to tidy up behind a runner that was killed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig.errors import ShardError
from shardmig.holder import LOCK_CLASS
from shardmig.session import Query

if TYPE_CHECKING:
    from shardmig.hosts import Host
    from shardmig.session import Session

__all__ = ["leave_place", "take_place"]

_MOVING = 1  # second key of the mark; what every session of shardmig holds has 0


async def take_place(session: Session, host: Host | None) -> str | None:
    """
    Take a place for a move that its own runner has admitted, or keep it, and return None; else why it must leave again.

    The mark comes first and the count behind it, so of two that come together at least one sees the other; whoever
    comes gives way, and who has a place keeps it.
    """
    if host is None or not host.is_limited:
        return None
    host.mark(session.shard.name, session.backend_pid)
    came, others = await session.flight([Query(_MARK, [LOCK_CLASS]), Query(_OTHERS, [LOCK_CLASS, host.marks])])
    host.others = int(others.value)
    if not came.rows or not host.is_overfull:
        return None
    return f"other runners move rows on the same server (host_moves = {host.moves_max})"


async def leave_place(session: Session, host: Host | None) -> None:
    """Give the place of a move to others; it may have had none."""
    if host is None:
        return
    host.leave(session.shard.name)
    if host.is_limited:
        with suppress(pg.Error, ShardError):  # a lost session has no mark any more
            await session.flight([Query(_UNMARK, [LOCK_CLASS])])


_HELD = f"l.locktype = 'advisory' AND l.classid = $1::int::oid AND l.objid = {_MOVING} AND l.objsubid = 2 AND l.granted"
_MARK = f"""
SELECT pg_try_advisory_lock_shared($1::int, {_MOVING})
WHERE NOT EXISTS (SELECT FROM pg_locks l WHERE {_HELD} AND l.pid = pg_backend_pid())
"""
_OTHERS = f"SELECT count(*) FROM pg_locks l WHERE {_HELD} AND l.pid <> ALL ($2::int[])"
_UNMARK = f"""
SELECT pg_advisory_unlock_shared($1::int, {_MOVING}) FROM pg_locks l WHERE {_HELD} AND l.pid = pg_backend_pid()
"""
