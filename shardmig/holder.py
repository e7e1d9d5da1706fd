"""Who holds a shard: the runner's own lock, the presence of every session, and meeting another runner."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - class_row fills the field
from typing import TYPE_CHECKING, Literal, NamedTuple

from psycopg import errors as pg

from shardmig.errors import ShardBusy
from shardmig.flight import Query

if TYPE_CHECKING:
    from shardmig.session import Session

__all__ = ["LOCKS", "LOCK_CLASS", "Holder", "Own", "Purpose", "is_at_work", "meet_holder"]

Purpose = Literal["run", "read"]

LOCK_CLASS = 0x53686D67
"""
First key of the advisory lock that every session of shardmig holds, shared, as (LOCK_CLASS, 0).

A drain tells by it who is one of us: locktype 'advisory', classid LOCK_CLASS, objsubid 2. It is also the seed of the
runner's own, exclusive lock on the hash of the shard's name.
"""

_DYING_MS = 500  # the server takes a moment to notice that a runner was killed
_TAKE_OVER_WAIT_MS = 5_000  # for a terminated backend to let go of its locks


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a shard's runner lock; what this role may not see is None."""

    pid: int
    role: str | None
    application: str | None
    client: str | None
    since: datetime | None

    def __str__(self) -> str:
        """Describe the holder in one line."""
        since = f", connected since {self.since:%Y-%m-%d %H:%M:%S %Z}" if self.since else ""
        return (
            f"backend {self.pid} of role {self.role or '(not visible)'}, "
            f"application {self.application or '(unnamed)'}, from {self.client or 'a local socket'}{since}"
        )


class Own(NamedTuple):
    """
    A server process that serves, or served, this session.

    Attributes:
        pid: its number; another process may have it later.
        seen: a moment, by the server's clock, at which it was there.
    """

    pid: int
    seen: datetime

    def is_it(self, holder: Holder) -> bool:
        """Say whether a holder is this process: no later one has begun before it was seen."""
        return holder.pid == self.pid and holder.since is not None and holder.since <= self.seen


async def meet_holder(session: Session, *, take_over: bool, lost: Own | None = None) -> Holder | None:
    """
    Wait a moment for the runner lock; then say who holds it or, on request, end that backend.

    Args:
        session: which has not got the lock.
        take_over: end whoever has it.
        lost: the server process of a connection that this session has lost. It may live on, for a server that builds
            an index does not look whether its client is still there; it is ended without a request.

    Returns:
        Whose backend was ended.

    Raises:
        ShardBusy: another runner holds the lock; the message says who.
    """
    name = session.shard.name
    if not take_over and await _lock_within(session, _DYING_MS):
        return None
    holders = await session.observe(Holder, _HOLDER, (name,))
    who = str(holders[0]) if holders else "a runner that has just ended"
    if lost is not None and any(lost.is_it(holder) for holder in holders):
        await session.transact([Query(_END_LOST, (name, *lost))], local={"role": "none"})
        if await _lock_within(session, _TAKE_OVER_WAIT_MS):
            return None
        raise ShardBusy(
            f"the server process of this run's own lost connection does not end, though it was told to: {who}; look on "
            "the server whether it was stopped or waits for its disk, then apply again",
            shard=name,
        )
    if not take_over:
        raise ShardBusy(
            f"another runner works on this shard: {who}; wait for it, or take over if it is gone for good",
            shard=name,
        )
    try:
        await session.transact([Query(_END_HOLDER, (name,))], local={"role": "none"})
    except pg.InsufficientPrivilege as error:
        raise ShardBusy(f"may not end {who}; GRANT pg_signal_backend TO {session.login}", shard=name) from error
    if not await _lock_within(session, _TAKE_OVER_WAIT_MS):
        raise ShardBusy(f"did not end in time: {who}; end that server process", shard=name)
    return holders[0] if holders else None


async def is_at_work(session: Session) -> bool:
    """Say whether anybody holds the runner lock; the ledger keeps the name of a runner that was killed."""
    if session.purpose == "run":  # it does itself
        return True
    return bool((await session.execute(f"SELECT EXISTS ({_HELD})", (session.shard.name,))).value)


async def _lock_within(session: Session, limit_ms: int) -> bool:
    """Wait for the runner lock; False when somebody still holds it afterwards."""
    try:
        wait = {"lock_timeout": f"{limit_ms}ms", "statement_timeout": "0"}  # which may be shorter
        await session.transact([Query(_WAIT_FOR_LOCK, (session.shard.name,))], local=wait)
    except pg.LockNotAvailable:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------------
# The locks of a session; behind `pg_backend_pid() = $1`, as everything in the handshake


_RUNNER_LOCK = f"hashtextextended('shardmig ' || $2, {LOCK_CLASS})"
_PRESENCE = f"pg_try_advisory_lock_shared({LOCK_CLASS}, 0)"
LOCKS: dict[Purpose, str] = {
    "read": f"SELECT current_schema()::text, pg_backend_pid() = $1 AND {_PRESENCE} AND $2::text IS NOT NULL, NULL",
    "run": f"""
SELECT current_schema()::text,
       pg_backend_pid() = $1 AND {_PRESENCE} AND NOT pg_is_in_recovery() AND pg_try_advisory_lock({_RUNNER_LOCK}),
       clock_timestamp()
""",
}

# The bigint form of an advisory lock keeps its upper half in classid, its lower half in objid, and 1 in objsubid.
_HELD = f"""
SELECT l.pid FROM pg_locks AS l
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND ((l.classid::bigint << 32) | l.objid::bigint) = {_RUNNER_LOCK.replace("$2", "$1")}
"""

_HOLDER = f"""
SELECT held.pid, a.usename::text AS role, nullif(a.application_name, '') AS application, host(a.client_addr) AS client,
       a.backend_start AS since
FROM ({_HELD}) AS held LEFT JOIN pg_stat_activity AS a USING (pid)
"""

_END_LOST = f"""
SELECT pg_terminate_backend(held.pid) FROM ({_HELD}) AS held JOIN pg_stat_activity AS a USING (pid)
WHERE held.pid = $2 AND a.backend_start <= $3
"""
_END_HOLDER = f"SELECT pg_terminate_backend(held.pid) FROM ({_HELD}) AS held"
_WAIT_FOR_LOCK = f"SELECT pg_advisory_lock({_RUNNER_LOCK.replace('$2', '$1')})"
