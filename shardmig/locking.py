"""
Taking a lock on a busy table without making the application wait.

Whoever queues for an ACCESS EXCLUSIVE lock makes everybody behind it queue too, so a plain ALTER TABLE behind one long
reader stops the application for as long as that reader runs. Therefore: while an old transaction holds the table, wait
without queueing; else queue for a few milliseconds, a little longer at each real try. The look, the change, its proof,
its record and COMMIT travel in one flight: while the lock is held, nobody waits for the network.

Nor for a standby: COMMIT keeps its locks until a synchronous standby has answered, so it is a local one, and a commit
with the session's own setting waits behind it, in the same flight, holding nothing. A failover in between loses the
change and its record together, for they are one transaction, and whatever is built upon them comes later in the WAL: a
standby that has a flag's flip has the structure before it. Nothing is reported before the second commit.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Literal

import psycopg

from shardmig.catalog import NOT_ADDITIVE, Mode, mode_of, proof_in_flight
from shardmig.errors import LockNotObtained, ProofFailed, StepFailed
from shardmig.events import Waiting
from shardmig.ladder import Held, Ladder, Try, Wait
from shardmig.plan import quote_name
from shardmig.session import Query, sqlstate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardmig.events import Blocker
    from shardmig.session import Result, Session

__all__ = ["UNAWAITED", "Mode", "holders", "mode_of", "under_lock"]

UNAWAITED = {"synchronous_commit": "local"}
"""For a transaction that holds what readers or writers need; another commit has to follow it in the same flight."""

_HELD_TOO_LONG = "SM003"  # SQLSTATE: the look inside the flight found an old transaction on the table
_CANCELED = "57014"  # by statement_timeout, or by somebody's pg_cancel_backend
_AGAIN = frozenset({"55P03", "40001", "40P01"})  # lock timeout, somebody changed the same catalog rows, deadlock
_LOOK_S = (0.02, 0.04)  # between two looks while an old transaction holds the table
_PAUSE_S = (0.05, 0.15)  # after a try that failed: the queue behind it drains

_REWRITTEN = (
    "a new column whose type is a domain with a CHECK writes the table anew: take the CHECK from the domain on this "
    "shard, or give the column a plain type (amend, or a new revision)"
)
_WEAKER = ["AccessShareLock", "RowShareLock"]  # what readers and lockers of rows hold
_CONFLICTS: dict[Mode, list[str]] = {
    "ACCESS EXCLUSIVE": [],
    "SHARE ROW EXCLUSIVE": _WEAKER,
    "SHARE UPDATE EXCLUSIVE": [*_WEAKER, "RowExclusiveLock"],
}
"""Modes that do *not* conflict (Explicit Locking, table 13.2); all others do."""


async def under_lock(
    session: Session,
    relation: str,
    queries: Sequence[Query],
    *,
    mode: Mode = "ACCESS EXCLUSIVE",
    further: Sequence[str] = (),
    proof: bool = True,
    behind: Query | None = None,
    on_wait: Callable[[Waiting], None] | None = None,
) -> list[Result]:
    """
    Run statements that lock an existing relation, in one transaction and one flight.

    A try that does not get the lock leaves nothing behind and is repeated whole, until `lock_wait_s` is over.

    Args:
        session: a session on the shard.
        relation: the existing relation, as the plan names it.
        queries: the fence first, then the change and its record; nothing that must not be repeated.
        mode: the lock that the statements need, see `mode_of`.
        further: more relations that they lock likewise: all that the foreign keys of a new table point to.
        proof: whether the facts of the relation must be the same before and after.
        behind: a write of the caller's for the commit that waits for standbys; without one, COMMIT itself does.
        on_wait: told at once and then each second who is in the way.

    Returns:
        One result for each query.

    Raises:
        LockNotObtained: the table stayed busy; the message names who held it last. Nothing was changed.
        ProofFailed: the relation's facts are not what they were; rolled back.
        StepFailed: a statement kept the lock for longer than `lock_hold_s`; rolled back.
        InDoubt, psycopg.Error: as `Session.transact`.
    """
    ladder = Ladder(session.settings, session.deadlock_timeout_ms)
    tell = _Teller(session.shard.name, on_wait, mode)
    clock = asyncio.get_running_loop().time
    deadline_s = clock() + session.settings.lock_wait_s
    held: list[Held] = []
    decision: Try | Wait = Try(ladder.rung_ms())
    while True:
        match decision:
            case Wait():
                tell.waiting(decision, clock())
                await asyncio.sleep(random.uniform(*_LOOK_S))  # noqa: S311 - jitter
            case Try():
                if decision.past_autovacuum:
                    tell.autovacuum(decision, held, clock())
                results = await _try(
                    session, (relation, *further), queries, decision, mode=mode, proof=proof, behind=behind
                )
                if isinstance(results, list):
                    return results
                if results == "missed":
                    ladder.tries += 1
                    await asyncio.sleep(random.uniform(*_PAUSE_S))  # noqa: S311 - jitter
        held = await holders(session, relation, *further, mode=mode)
        if clock() > deadline_s:
            raise _not_obtained(session, ", ".join((relation, *further)), held, ladder)
        decision = ladder.decide(held, clock())


async def holders(session: Session, *relations: str, mode: Mode = "ACCESS EXCLUSIVE") -> list[Held]:
    """Return the transactions of others that hold relations or their children in a conflicting mode."""
    may_hurry = _MAY_HURRY if session.server_version >= _PARAMETER_PRIVILEGES_SINCE else _IS_SUPERUSER
    return await session.observe(
        Held,
        _HOLDERS.replace("{may_hurry}", may_hurry),
        (list(map(quote_name, relations)), session.shard.schema_name, _CONFLICTS[mode]),
    )


async def _try(
    session: Session,
    relations: Sequence[str],
    queries: Sequence[Query],
    attempt: Try,
    *,
    mode: Mode,
    proof: bool,
    behind: Query | None,
) -> list[Result] | Literal["missed", "held"]:
    """Make one real try, unless the look at its beginning finds the table held by an old transaction."""
    remember, compare = proof_in_flight(session) if proof else (None, None)
    before = [
        Query(
            _ADDRESS,
            (
                list(map(quote_name, relations)),
                session.shard.schema_name,
                _CONFLICTS[mode],
                session.settings.old_holder_ms,
                attempt.past_autovacuum,
            ),
        ),
        Query(_LOOK),
        *([Query("SELECT set_config('role', $1, true)", (session.settings.owner,))] if session.settings.owner else []),
        *([remember] if remember else []),
        Query(_LOCK.replace("{mode}", mode)),
    ]
    flight = [*before, *queries, *([compare] if compare else [])]
    try:
        results = await session.transact(
            flight,
            isolation="REPEATABLE READ",
            local=_local(session, attempt) | (UNAWAITED if behind else {}),
            behind=[behind] if behind else (),
        )
    except psycopg.Error as error:
        state = sqlstate(error)
        if state == NOT_ADDITIVE:
            raise _not_additive(session, error.diag.message_primary or "") from error
        if state == _CANCELED:
            raise StepFailed(
                f"{error.diag.message_primary}: everybody waited for {', '.join(relations)}, so it was rolled back. "
                f"What only adds takes milliseconds; {_REWRITTEN}. For thousands of partitions raise "
                "session.lock_hold_s",
                shard=session.shard.name,
            ) from error
        if state == _HELD_TOO_LONG:
            return "held"
        if state in _AGAIN:
            return "missed"
        raise
    return results[len(before) : len(before) + len(queries)]


def _not_additive(session: Session, found: str) -> ProofFailed:
    """Say what the proof found; a linter that was told of a type cannot know what it is like on one shard."""
    cure = f"here {_REWRITTEN}" if found.startswith("storage ") else "report this: the linter missed it"
    return ProofFailed(f"{found}; it was rolled back; {cure}", shard=session.shard.name)


def _local(session: Session, attempt: Try) -> dict[str, str]:
    hold_s, limit_s = session.settings.lock_hold_s, session.settings.statement_timeout_s
    local = {"lock_timeout": f"{attempt.lock_timeout_ms:.0f}ms"}
    if hold_s and not 0 < limit_s <= hold_s:
        local["statement_timeout"] = f"{attempt.lock_timeout_ms + hold_s * 1000:.0f}ms"
    if session.settings.owner:
        local["role"] = "none"  # the login role may see more of others' activity than the owner
    if attempt.hurry:
        local["deadlock_timeout"] = "10ms"
    return local


def _not_obtained(session: Session, relation: str, held: Sequence[Held], ladder: Ladder) -> LockNotObtained:
    who = (
        "; ".join(str(holder.blocker(holder.age_s)) for holder in held) or "short transactions, none of them right now"
    )
    hidden = any(holder.pid is not None and holder.age_s is None for holder in held)
    hint = (
        f" (GRANT pg_read_all_stats TO {session.login} shows more, and whether it is an autovacuum)" if hidden else ""
    )
    return LockNotObtained(
        f"table {relation} stayed busy for {session.settings.lock_wait_s:g} s ({ladder.tries} tries); held by "
        f"{who}{hint}; nothing was changed, apply again when it is over",
        shard=session.shard.name,
    )


class _Teller:
    """Says who is in the way: at once when that changes, else each second."""

    def __init__(self, shard: str, on_wait: Callable[[Waiting], None] | None, mode: Mode) -> None:
        self._shard = shard
        self._waiting = "readers and writers" if mode == "ACCESS EXCLUSIVE" else "writers"
        self._on_wait = on_wait
        self._said: tuple[object, float] = (None, 0.0)

    def waiting(self, decision: Wait, now_s: float) -> None:
        self._say(decision.reason, decision.blockers, now_s)

    def autovacuum(self, decision: Try, held: Sequence[Held], now_s: float) -> None:
        reason = "autovacuum works on the table and is asked to yield"
        if not decision.hurry:
            reason += (
                f", which takes deadlock_timeout while {self._waiting} wait {decision.lock_timeout_ms:.0f} ms at most; "
                "GRANT SET ON PARAMETER deadlock_timeout avoids this"
            )
        self._say(reason, tuple(holder.blocker(holder.age_s) for holder in held), now_s)

    def _say(self, reason: str, blockers: tuple[Blocker, ...], now_s: float) -> None:
        what = (reason, frozenset(blocker.pid for blocker in blockers))
        if self._on_wait and (what != self._said[0] or now_s - self._said[1] >= 1):
            self._said = (what, now_s)
            self._on_wait(Waiting(self._shard, reason, blockers))


# --------------------------------------------------------------------------------------------------------------------
# SQL

_PARAMETER_PRIVILEGES_SINCE = 150_000
_MAY_HURRY = "has_parameter_privilege(session_user, 'deadlock_timeout', 'SET')"
_IS_SUPERUSER = "(SELECT rolsuper FROM pg_roles WHERE rolname = session_user)"

# The login role asks, and may have no rights on the schema: to_regclass would then find nothing, and without the
# relation there would be neither a look nor a proof.
_OIDS = """
SELECT c.oid, given.place
FROM unnest($1::text[]) WITH ORDINALITY AS given (name, place), parse_ident(given.name) AS written,
     pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relname = written[cardinality(written)]
  AND n.nspname = CASE cardinality(written) WHEN 1 THEN $2::text ELSE written[1] END
"""

# Who holds the relations in a conflicting mode. ALTER TABLE on a parent locks every child as strongly as the parent.
_TREE = """
WITH RECURSIVE tree (oid) AS (
    {relations}
    UNION
    SELECT i.inhrelid FROM pg_inherits AS i JOIN tree ON tree.oid = i.inhparent
)"""
_HELD = (
    _TREE
    + """, held AS (
    SELECT DISTINCT l.virtualtransaction AS transaction, l.pid
    FROM pg_locks AS l
    WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.relation IN (SELECT oid FROM tree)
      AND l.mode <> ALL({weaker})
), seen AS (
    SELECT held.*, a.usename, a.application_name, a.query, p.gid, p.owner,
           clock_timestamp() - coalesce(a.xact_start, p.prepared) AS age,
           coalesce(a.backend_type = 'autovacuum worker', false) AS autovacuum,
           coalesce(a.query LIKE '%(to prevent wraparound)', false) AS wraparound
    FROM held
    LEFT JOIN pg_stat_activity AS a ON a.pid = held.pid
    LEFT JOIN pg_locks AS t ON held.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
        AND t.virtualtransaction = held.transaction
    LEFT JOIN pg_prepared_xacts AS p ON p.transaction = t.transactionid
)"""
)

_HOLDERS = (
    _HELD.replace("{relations}", f"SELECT oid FROM ({_OIDS}) AS named").replace("{weaker}", "$3::text[]")
    + """
SELECT transaction,
       pid,
       coalesce(usename, owner)::text AS role,
       nullif(application_name, '') AS application,
       extract(epoch FROM age)::float8 AS age_s,
       CASE WHEN gid IS NOT NULL THEN format('PREPARE TRANSACTION %L', gid)
            ELSE nullif(left(regexp_replace(query, '\\s+', ' ', 'g'), 120), '') END AS query,
       CASE WHEN pid IS NULL THEN 'prepared' WHEN autovacuum THEN 'autovacuum' ELSE 'client' END AS what,
       wraparound,
       {may_hurry} AS may_hurry
FROM seen
ORDER BY age DESC NULLS LAST
"""
)

# The server's lock_timeout is for each lock, and whoever needs the first table waits until the last one is locked: all
# of them, and their children, share one. What may only be referenced cannot be locked beforehand: it gets what is left.
_LOCK = f"""
DO $lock$
DECLARE
    rung_ms CONSTANT float8 := extract(epoch FROM current_setting('lock_timeout')::interval) * 1000;
    began CONSTANT timestamptz := clock_timestamp();
    relation regclass;
BEGIN
    FOR relation IN
        {_TREE.replace("{relations}", "SELECT unnest(nullif(current_setting('shardmig.relations'), '')::oid[])")}
        SELECT c.oid FROM tree JOIN pg_class AS c USING (oid)
        WHERE c.relkind IN ('r', 'p') AND has_table_privilege(c.oid, 'UPDATE, DELETE, TRUNCATE')
    LOOP
        EXECUTE format('LOCK TABLE ONLY %s IN {{mode}} MODE', relation);
        PERFORM set_config(
            'lock_timeout',
            greatest(1, rung_ms - extract(epoch FROM clock_timestamp() - began) * 1000)::int || 'ms', true);
    END LOOP;
END
$lock$
"""

# An anonymous block takes no parameters: its arguments travel as settings of the transaction. The look is at every
# relation, and so is the proof; one that is not there leaves nothing to prove.
_ADDRESS = f"""
SELECT set_config('shardmig.relations', CASE WHEN found THEN oids::text ELSE '' END, true),
       set_config('shardmig.weaker', $3::text[]::text, true),
       set_config('shardmig.old_holder_ms', $4::int::text, true),
       set_config('shardmig.past_autovacuum', $5::boolean::text, true)
FROM (SELECT array_agg(oid ORDER BY place) AS oids, count(DISTINCT place) = cardinality($1) AS found
      FROM ({_OIDS}) AS named) AS relations
"""

_LOOK = f"""
DO $look$
BEGIN
    IF EXISTS (
        {
    _HELD.replace("{relations}", "SELECT unnest(nullif(current_setting('shardmig.relations'), '')::oid[])").replace(
        "{weaker}", "current_setting('shardmig.weaker')::text[]"
    )
}
        SELECT FROM seen
        WHERE extract(epoch FROM age) * 1000 >= current_setting('shardmig.old_holder_ms')::int
          AND NOT (autovacuum AND NOT wraparound AND current_setting('shardmig.past_autovacuum')::boolean)
    ) THEN
        RAISE EXCEPTION USING ERRCODE = '{_HELD_TOO_LONG}', MESSAGE = 'an older transaction holds the table';
    END IF;
END
$look$
"""
