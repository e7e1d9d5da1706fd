"""
Switching a flag: guard, flip, drain.

A flip is one conditional UPDATE; the ledger's trigger checks the guard and does the bookkeeping. What a guard needs is
earned before it: a drain here, a move and its check in `moves`.

The drain is what CREATE INDEX CONCURRENTLY does: list the transactions open at one moment, wait until none of those is
left. A transaction that is not listed began after the flip, so each of its snapshots sees it, at any isolation level.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import ledger
from shardmig.errors import DrainTimeout, LockNotObtained, SwitchedMeanwhile, SwitchRefused
from shardmig.events import Blocker, Draining, FlagSwitched, TransactionEnded, Warned
from shardmig.flight import refuse_rows
from shardmig.records import flags_of, flags_query, read_flags
from shardmig.session import LOCK_CLASS, Query
from shardmig.states import State
from shardmig.turn import holder_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from shardmig.events import Listener
    from shardmig.records import FlagRow
    from shardmig.session import Session
    from shardmig.turn import Turn

__all__ = ["drain", "drain_shard", "flip", "looks", "read_flag", "still_open", "vouch"]

_POLL_S = (0.002, 0.1)  # first and longest pause between two looks
_HIDDEN = "<insufficient privilege>"  # pg_stat_activity.query, to those who may not see it
_TELL_S = 0.5  # between two events about the same drain

# Sessions of shardmig itself are told by their advisory lock. They never decide by a flag, and a mover on another
# shard of this database must not be waited for. Of another role's session everybody sees pid, database, role and xmin;
# a process of the server itself (autovacuum) has no role, and its kind is hidden from most. Functions instead of the
# views over them, pg_locks and pg_stat_activity: a server process that is new plans and looks up three times less.
_HERE = "(SELECT d.oid FROM pg_database d WHERE d.datname = current_database())"
_OPEN = f"""
SELECT l.virtualtransaction AS id, a.pid, pg_get_userbyid(a.usesysid)::text AS role, a.application_name AS application,
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS age_s, left(a.query, 120) AS query
FROM pg_lock_status() l LEFT JOIN pg_stat_get_activity(NULL) a USING (pid)
WHERE l.locktype = 'virtualxid' AND l.granted AND l.virtualxid = l.virtualtransaction
  AND coalesce(nullif(a.datid, 0), {_HERE}) = {_HERE}
  AND l.pid <> pg_backend_pid()
  AND (a.pid IS NULL OR a.usesysid IS NOT NULL AND coalesce(a.backend_type, '') <> 'walsender')
  AND NOT coalesce(pg_get_userbyid(a.usesysid) = ANY ($1::text[]), false)
  AND NOT EXISTS (SELECT FROM pg_lock_status() ours WHERE ours.pid = l.pid AND ours.locktype = 'advisory'
                  AND ours.classid = {LOCK_CLASS} AND ours.objsubid = 2)
"""
# Prepared transactions leave the first list, survive a failover and still write what they decided.
_PREPARED = f"""
SELECT 'prepared ' || gid AS id, NULL::int AS pid, pg_get_userbyid(ownerid)::text AS role, NULL::text AS application,
       extract(epoch FROM clock_timestamp() - prepared)::float8 AS age_s, 'PREPARE TRANSACTION ' || gid AS query
FROM pg_prepared_xact() WHERE dbid = {_HERE}
"""
# A snapshot exported before the flip may have been imported after it; whoever did so shows an old backend_xmin.
_OLD_SNAPSHOT = f"""{_OPEN} AND age(a.backend_xmin) > age($2::text::xid)"""
# It may hand it on while we wait. Younger snapshots look as old while an old xid still runs, maybe in another database;
# then ours does too, and nobody new is waited for.
_HANDED_ON = f"{_OLD_SNAPSHOT} AND age(a.backend_xmin) > age(pg_snapshot_xmin(pg_current_snapshot())::xid)"


# On request only. Who is not listed (exempt roles, shardmig's own sessions, processes of the server itself) cannot be
# ended by it; what ended by itself meanwhile is not there to be ended.
_END = f"""
SELECT pg_terminate_backend(listed.pid) FROM ({_OPEN}) AS listed JOIN pg_stat_activity AS seen USING (pid)
WHERE listed.id = $2 AND listed.age_s > $3 AND seen.backend_type = 'client backend'
"""


@dataclass(frozen=True, slots=True)
class _Open:
    id: str
    pid: int | None
    role: str | None
    application: str | None
    age_s: float | None
    query: str | None

    def blocker(self) -> Blocker:
        """Describe it for people."""
        what = "client" if self.pid is not None else "prepared"
        return Blocker(self.pid, self.role, self.application, self.age_s, self.query, what)

    def cure(self) -> str:
        """Say how it ends."""
        if self.pid is not None:
            return f"SELECT pg_terminate_backend({self.pid})"
        name = self.id.removeprefix("prepared ").replace("'", "''")
        return f"ROLLBACK PREPARED '{name}', or COMMIT PREPARED"


# --------------------------------------------------------------------------------------------------------------------
# Flip


async def read_flag(session: Session, flag: str) -> FlagRow:
    """
    Read one flag of the session's shard.

    Raises:
        SwitchRefused: the shard has no such flag.
    """
    flags = await read_flags(session)
    row = flags.get(flag)
    if row is None:
        known = ", ".join(sorted(flags)) or "none"
        raise SwitchRefused(f"no flag {flag!r} here; known flags: {known}", shard=session.shard.name)
    return row


async def flip(
    turn: Turn,
    row: FlagRow,
    target: State,
    *,
    reason: str | None = None,
    records: Sequence[Query] = (),
    listener: Listener | None = None,
) -> FlagRow:
    """
    Take one edge of a flag; one commit, seen by every transaction that begins after it.

    Args:
        turn: whose turn it is; another runner's takeover refuses the flip.
        row: the flag as read; a flag that changed meanwhile refuses the flip.
        target: a neighbour of its state.
        reason: for the log.
        records: recorded in the same transaction.
        listener: told when it is committed.

    Returns:
        The flag as it is now.

    Raises:
        SwitchRefused: no such edge, its guard is not met, or the flag changed meanwhile; nothing is recorded either.
        LockNotObtained: an operator holds the flag in an open transaction.
        Fenced: another runner took the shard over.
    """
    shard = turn.shard
    edge = Query("SELECT shardmig.take_edge($1, $2, $3, $4, $5)", (shard, row.flag, row.state, int(target), row.epoch))
    local = {"shardmig.reason": reason or "", "shardmig.os_user": ledger.os_user(), "shardmig.holder": holder_name()}
    try:
        with ledger.translated(shard):
            *_, flags = await turn.session.transact([turn.hold(), edge, *records, flags_query(shard)], local=local)
    except pg.LockNotAvailable as error:
        raise LockNotObtained(
            f"somebody else is switching a flag of this shard and has not committed; {row.flag} stays where it is",
            shard=shard,
        ) from error
    if listener:
        listener(FlagSwitched(shard, row.flag, State(row.state), target))
    return flags_of(flags)[row.flag]


async def vouch(session: Session, flag: str, release: str) -> None:
    """Log that an operator vouches: no process older than this release, which knows the flag, runs any more (G0)."""
    await session.execute(
        "INSERT INTO shardmig.log (shard, action, flag, after, os_user) VALUES ($1, 'aware', $2, $3, $4)",
        [session.shard.name, flag, release, ledger.os_user()],
    )


# --------------------------------------------------------------------------------------------------------------------
# Drain


async def drain(
    turn: Turn, row: FlagRow, *, stop: asyncio.Event | None = None, listener: Listener | None = None
) -> FlagRow:
    """
    Wait out every transaction that was open when the flag last changed, and record that.

    A drain not recorded is done again, so a crash anywhere is safe. It vouches for the flip in `row` alone: a flip that
    happened meanwhile has drawn another epoch, and nothing is recorded.

    Returns:
        The flag, with `drained` true.

    Raises:
        DrainTimeout: somebody is still open after `drain_timeout_s`; the message says who.
        SwitchRefused: the flag changed while it was drained.
    """
    if row.drained:
        return row
    await drain_shard(turn.session, row.flag, stop=stop, listener=listener)
    drained = Query(
        "UPDATE shardmig.flag SET drained = true WHERE shard = $1 AND flag = $2 AND epoch = $3",
        (turn.shard, row.flag, row.epoch),
    )
    with ledger.translated(turn.shard):
        _, recorded, flags = await turn.session.transact([turn.hold(), drained, flags_query(turn.shard)])
    if recorded.rowcount != 1:
        raise SwitchedMeanwhile(f"flag {row.flag} was switched while it was drained; apply again", shard=turn.shard)
    return flags_of(flags)[row.flag]


def looks(session: Session, *, refuse: bool = False) -> list[Query]:
    """
    Look whether anybody is open, as the drain does and in its order, in one transaction that began after the flip.

    Whoever took a snapshot over is himself open: the second look for the open sees him, for the first goes through the
    processes one after the other, and may have been past him when he took it from one that it then found to be over.

    Args:
        session: on the shard.
        refuse: end the transaction by dividing by zero instead of answering true.
    """
    who = [list(session.settings.exempt_roles)]
    first, prepared, second = (
        refuse_rows(look) if refuse else Query(f"SELECT EXISTS ({look.sql})", look.params)
        for look in (Query(_OPEN, who), Query(_PREPARED), Query(_OPEN, who))
    )
    # pg_stat_activity is cached within a transaction.
    return session.observing([first, prepared, Query("SELECT pg_stat_clear_snapshot()"), second])


async def still_open(session: Session) -> tuple[Blocker, ...]:
    """Name the transactions for which a drain that begins now would wait, the oldest first."""
    return _oldest_first(await session.observe(_Open, _OPEN, [list(session.settings.exempt_roles)]))


async def drain_shard(
    session: Session,
    what: str,
    *,
    timeout_s: float | None = None,
    stop: asyncio.Event | None = None,
    listener: Listener | None = None,
) -> None:
    """
    Wait until every transaction of the database that is open now is over.

    Args:
        session: on the shard; its settings say how long, and which roles are not waited for.
        what: the flag, or "maintenance", for messages.
        timeout_s: when to give up; None is what the session's settings say.
        stop: set by Ctrl-C; stopping a drain is always safe.
        listener: told now and then who is still open.

    Raises:
        DrainTimeout: somebody is still open, or `stop` was set.

    Where `session.terminate_older_than_s` is set, older transactions in the way are ended, and the log says so.
    """
    if not any(answer.value is True for answer in await session.flight(looks(session))):
        return
    limit_s = session.settings.drain_timeout_s if timeout_s is None else timeout_s
    watch = _Watch(session, what, time.monotonic() + limit_s, stop or asyncio.Event(), listener)
    exempt = [list(session.settings.exempt_roles)]
    boundary = (await session.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::xid::text")).value
    await watch.wait_out(_OPEN, exempt)
    await watch.wait_out(_PREPARED, [])
    await watch.wait_out(_OLD_SNAPSHOT, [*exempt, boundary])
    await watch.wait_out(_HANDED_ON, [*exempt, boundary], newcomers=True)


@dataclass(slots=True)
class _Watch:
    session: Session
    what: str
    deadline: float
    stop: asyncio.Event
    listener: Listener | None
    told_at: float = 0.0
    looked_at: set[str] = field(default_factory=set)  # ids that were ended, or never will be

    async def wait_out(self, query: str, params: Sequence[object], *, newcomers: bool = False) -> None:
        """List what the query finds now, then look until none of *those* is left; nobody at all, with `newcomers`."""
        pause_s, longest_s = _POLL_S
        listed = await self._look(query, params)
        waited_for = {one.id for one in listed}
        while listed:
            if time.monotonic() > self.deadline or self.stop.is_set():
                raise self._give_up(listed)
            self._tell(listed)
            await self._end_old(listed)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), pause_s)
            pause_s = min(pause_s * 2, longest_s)
            listed = [one for one in await self._look(query, params) if newcomers or one.id in waited_for]

    def _tell(self, listed: Collection[_Open]) -> None:
        if self.listener and time.monotonic() - self.told_at > _TELL_S:
            self.told_at = time.monotonic()
            self.listener(Draining(self.session.shard.name, self.what, _oldest_first(listed)))

    async def _end_old(self, listed: Collection[_Open]) -> None:
        """End, on request, whose transaction is older than the limit; it is waited for as before."""
        limit_s = self.session.terminate_older_than_s
        if limit_s is None:
            return
        for one in listed:
            hidden = one.age_s is None and one.query == _HIDDEN
            if one.id not in self.looked_at and (hidden or (one.age_s or 0.0) > limit_s):
                self.looked_at.add(one.id)
                await self._end(one, limit_s)

    async def _end(self, one: _Open, limit_s: float) -> None:
        shard, blocker = self.session.shard.name, one.blocker()
        if one.pid is None:
            self._warn(f"{blocker}: it is never ended from here, whoever prepared it may rely on it; {one.cure()}")
            return
        if one.age_s is None:
            self._warn(
                f"cannot see how old the transaction of {blocker} is; GRANT pg_read_all_stats TO {self.session.login}"
            )
            return
        call = Query(_END, (list(self.session.settings.exempt_roles), one.id, limit_s))
        try:
            ended = (await self.session.transact([call], local={"role": "none"}))[0].rows
        except pg.InsufficientPrivilege as error:
            self._warn(
                f"may not end {blocker}; GRANT pg_signal_backend TO {self.session.login} "
                f"({str(error).strip().splitlines()[-1]})"
            )
            return
        if (True,) not in ended:
            return
        await self.session.execute(
            "INSERT INTO shardmig.log (shard, action, flag, reason, os_user) VALUES ($1, 'terminate', $2, $3, $4)",
            [shard, None if self.what == "maintenance" else self.what, str(blocker), ledger.os_user()],
        )
        if self.listener:
            self.listener(TransactionEnded(shard, self.what, blocker))

    def _warn(self, message: str) -> None:
        if self.listener:
            self.listener(Warned(self.session.shard.name, message))

    async def _look(self, query: str, params: Sequence[object]) -> list[_Open]:
        # A transaction of its own each time: pg_stat_activity is cached within one.
        return await self.session.observe(_Open, query, params)

    def _give_up(self, still_open: Collection[_Open]) -> DrainTimeout:
        shown = "; ".join(str(blocker) for blocker in _oldest_first(still_open)[:5])
        cures = "; ".join(one.cure() for one in still_open if one.pid is None)
        why = "stopped" if self.stop.is_set() else "timed out"
        return DrainTimeout(
            f"the drain of {self.what} {why}; still open: {shown}. Stopping here is safe; "
            f"end those transactions ({cures or 'or let --terminate-older-than SECONDS do it'}), or exempt their roles "
            "(session.exempt_roles), and go on later",
            shard=self.session.shard.name,
        )


def _oldest_first(listed: Collection[_Open]) -> tuple[Blocker, ...]:
    return tuple(one.blocker() for one in sorted(listed, key=lambda one: -(one.age_s or 0.0)))
