"""
A session: one connection, prepared for migrating one shard.

Connecting costs the server's own handshake and one more round trip, in which every self-check, every setting and the
locks travel together. From then on each statement goes through the extended protocol, which refuses a second statement
hidden in the same text, and statements that belong together go in one flight: BEGIN, work, record and COMMIT leave in
one packet, so that no lock is ever held while the network is waited for.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - class_row fills the field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import psycopg
from psycopg.rows import class_row, tuple_row

from shardmig.errors import InDoubt, ShardBusy, ShardUnreachable, StepFailed
from shardmig.handshake import SET_ROLE, Answers, connect, judge, not_ready, questions
from shardmig.pgerrors import first_line, is_connection_lost, is_transient, pointer, sqlstate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from psycopg.rows import AsyncRowFactory

    from shardmig.config import SessionSettings, Shard

__all__ = [
    "LOCK_CLASS",
    "Holder",
    "Query",
    "Result",
    "Session",
    "is_connection_lost",
    "is_transient",
    "open_session",
    "pointer",
    "sqlstate",
]

Isolation = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
Purpose = Literal["run", "read"]
T = TypeVar("T")

LOCK_CLASS = 0x53686D67
"""
First key of the advisory lock that every session of shardmig holds, shared, as (LOCK_CLASS, 0).

A drain tells by it who is one of us: locktype 'advisory', classid LOCK_CLASS, objsubid 2. It is also the seed of the
runner's own, exclusive lock on the hash of the shard's name.
"""

_DYING_MS = 500  # the server takes a moment to notice that a runner was killed
_TAKE_OVER_WAIT_MS = 5_000  # for a terminated backend to let go of its locks


class Query(NamedTuple):
    """One statement and its parameters, written $1, $2, …"""

    sql: str
    params: Sequence[object] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """
    What one statement of a flight returned.

    Attributes:
        rows: in the server's order; empty for a statement that returns none.
        rowcount: rows returned or written; -1 when the statement has no count.
    """

    rows: list[tuple[Any, ...]]
    rowcount: int

    @property
    def value(self) -> Any:  # noqa: ANN401 - whatever the caller selected
        """The first column of the first row; None without a row."""
        return self.rows[0][0] if self.rows else None


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


class Session:
    """
    One prepared connection to one shard.

    Attributes:
        shard: the shard.
        settings: how the session behaves.
        purpose: "run" holds the runner lock, "read" does not.
        login: the role that connected; `observe` runs as it.
        deadlock_timeout_ms: the server's setting.
        sees_others: whether the login role sees other roles' activity (`pg_read_all_stats`).
        took_over: whose backend was terminated to get the runner lock; None as a rule.
        failed: the query of the last flight that the server refused.
    """

    def __init__(
        self, shard: Shard, settings: SessionSettings, *, pg_versions: tuple[int, int], purpose: Purpose = "run"
    ) -> None:
        self.shard = shard
        self.settings = settings
        self.purpose = purpose
        self.login = ""
        self.deadlock_timeout_ms = 0.0
        self.sees_others = False
        self.took_over: Holder | None = None
        self.failed: Query | None = None
        self._pg_versions = pg_versions
        self._open: psycopg.AsyncConnection[tuple[Any, ...]] | None = None

    # ----------------------------------------------------------------------------------------------------------------
    # Statements

    async def execute(self, sql: str, params: Sequence[object] = ()) -> Result:
        """Run one statement in its own transaction."""
        return (await self.flight([Query(sql, params)]))[0]

    async def execute_alone(self, sql: str, *, lock_timeout_ms: int = 0, statement_timeout_ms: int = 0) -> None:
        """
        Run a statement that refuses transactions, such as CREATE INDEX CONCURRENTLY.

        Its timeouts, none by default, are set on the session before it and the usual ones afterwards.
        """
        timeouts = {"lock_timeout": f"{lock_timeout_ms}ms", "statement_timeout": f"{statement_timeout_ms}ms"}
        before = (await self.flight([_current(timeouts), _set(timeouts, local=False)]))[0].value
        try:
            await self.flight([Query(sql)])
        finally:
            if not self.connection.broken and not self.connection.closed:
                await self.flight([_set(dict(zip(timeouts, before, strict=True)), local=False)])

    async def fetch(self, record: type[T], sql: str, params: Sequence[object] = ()) -> list[T]:
        """Run one SELECT and return its rows as records; column names are the record's fields."""
        return (await self._fly([Query(sql, params)], class_row(record)))[0][1]

    async def fetch_one(self, record: type[T], sql: str, params: Sequence[object] = ()) -> T | None:
        """Return the first row as a record; None without a row."""
        rows = await self.fetch(record, sql, params)
        return rows[0] if rows else None

    async def observe(self, record: type[T], sql: str, params: Sequence[object] = ()) -> list[T]:
        """
        Run one SELECT as the login role, in a transaction of its own.

        What a role sees of others in pg_stat_activity hangs on its membership in pg_read_all_stats; operators grant
        that to the role that connects, and the owner of the tables hardly ever has it.
        """
        if self.settings.owner is None:
            return await self.fetch(record, sql, params)
        flight = [Query("BEGIN READ ONLY"), _set({"role": "none"}), Query(sql, params), Query("COMMIT")]
        try:
            return (await self._fly(flight, class_row(record), only=2))[2][1]
        except psycopg.Error:
            await self.roll_back()
            raise

    async def flight(self, queries: Sequence[Query]) -> list[Result]:
        """
        Send statements together and return their results, in one round trip.

        Without BEGIN among them they still are one transaction, as PostgreSQL treats everything up to a Sync. A
        failure leaves the rest unexecuted; `failed` then is the query that was refused.
        """
        return [Result(rows, count) for count, rows in await self._fly(queries, tuple_row)]

    async def transact(
        self,
        queries: Sequence[Query],
        *,
        isolation: Isolation = "READ COMMITTED",
        local: Mapping[str, str] | None = None,
    ) -> list[Result]:
        """
        Run statements in one transaction and one flight, COMMIT included.

        Args:
            queries: what is executed, in this order.
            isolation: of the transaction.
            local: settings for this transaction only, such as {"lock_timeout": "10ms"}.

        Returns:
            One result for each query.

        Raises:
            InDoubt: the connection broke, and nobody here knows whether COMMIT arrived.
            psycopg.Error: a statement failed and everything was rolled back; `failed` names it.
        """
        prelude = [Query(f"BEGIN ISOLATION LEVEL {isolation}"), *([_set(local)] if local else [])]
        try:
            results = await self.flight([*prelude, *queries, Query("COMMIT")])
        except psycopg.Error as error:
            if is_connection_lost(error) or self.connection.broken:
                raise InDoubt(shard=self.shard.name) from error
            await self.roll_back()
            raise
        return results[len(prelude) : -1]

    @asynccontextmanager
    async def transaction(
        self, *, isolation: Isolation = "READ COMMITTED", local: Mapping[str, str] | None = None
    ) -> AsyncIterator[None]:
        """
        Keep a transaction open over several round trips; never around a lock that the application needs.

        Raises:
            InDoubt: the connection broke during COMMIT.
        """
        await self.flight([Query(f"BEGIN ISOLATION LEVEL {isolation}"), *([_set(local)] if local else [])])
        try:
            yield
        except BaseException:
            if not self.connection.closed:
                await self.roll_back()
            raise
        try:
            await self.flight([Query("COMMIT")])
        except psycopg.Error as error:
            if is_connection_lost(error) or self.connection.broken:
                raise InDoubt(shard=self.shard.name) from error
            raise

    async def roll_back(self) -> None:
        """End the open transaction, if there is one and the connection still lives."""
        if self.connection.info.transaction_status in {
            psycopg.pq.TransactionStatus.INTRANS,
            psycopg.pq.TransactionStatus.INERROR,
        }:
            await self.connection.rollback()

    # ----------------------------------------------------------------------------------------------------------------
    # The connection

    @property
    def connection(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        """The connection of psycopg; autocommit, never in a transaction between two calls."""
        if self._open is None:
            raise ShardUnreachable("the session is closed; open a new one", shard=self.shard.name)
        return self._open

    @property
    def backend_pid(self) -> int:
        """The server process that serves this session."""
        return self.connection.info.backend_pid

    @property
    def server_version(self) -> int:
        """The server's version as libpq counts it: 150018 is 15.18."""
        return self.connection.info.server_version

    async def connect(self, *, take_over: bool = False) -> None:
        """
        Connect, check, prepare and, for a runner, take the shard's lock.

        Raises:
            ShardUnreachable: no connection; the message shows the address and never a password.
            ThroughPooler, NotPrimary, PreflightFailed: a self-check failed; no setting was left behind anywhere.
            ShardBusy: another runner holds the lock; the message says who.
        """
        self._open = await connect(self.shard, self.settings)
        try:
            await self._prepare(take_over=take_over)
        except BaseException:
            await self.close()
            raise

    async def reconnect(self) -> None:
        """Replace a broken connection by a new one, with every check, setting and lock anew."""
        await self.close()
        await self.connect()

    async def close(self) -> None:
        """Close the connection; its locks and its open transaction end with it."""
        if self._open is not None:
            await self._open.close()
            self._open = None

    async def _prepare(self, *, take_over: bool) -> None:
        """Do everything in one flight; only a busy shard costs more."""
        pid, info, owner = self.backend_pid, self.connection.info, self.settings.owner
        asked = questions(self.shard, self.settings, backend_pid=pid, server_version=info.server_version)
        role = [Query(SET_ROLE, (pid, owner))] if owner else []
        try:
            flight = await self.flight([Query(*asked), *role, Query(_LOCKS[self.purpose], (pid, self.shard.name))])
        except psycopg.Error as error:
            if self.failed is None or self.failed.sql != SET_ROLE:
                raise ShardUnreachable(
                    f"the server refused the session: {first_line(error)}", shard=self.shard.name
                ) from error
            raise not_ready(
                self.shard,
                f"role {info.user} cannot become the owner: {first_line(error)}; "
                f"create it, GRANT {owner} TO {info.user}, or correct session.owner",
            ) from error
        answers = Answers(*flight[0].rows[0])
        encoding = info.parameter_status("server_encoding")
        judge(answers, self.shard, self._pg_versions, server_version=info.server_version, server_encoding=encoding)
        self.login, self.sees_others = answers.login, answers.sees_others
        self.deadlock_timeout_ms = answers.deadlock_timeout_ms
        schema, locked = flight[-1].rows[0]
        if schema != self.shard.schema_name:
            raise not_ready(
                self.shard,
                f"role {owner or self.login} may not use schema {self.shard.schema_name}; "
                f"GRANT USAGE, CREATE ON SCHEMA {self.shard.schema_name} TO {owner or self.login}",
            )
        if not locked:
            await self._meet_holder(take_over=take_over)

    async def _meet_holder(self, *, take_over: bool) -> None:
        """Wait a moment for the runner lock; then say who holds it or, on request, end that backend."""
        name = self.shard.name
        if not take_over and await self._lock_within(_DYING_MS):
            return
        holders = await self.observe(Holder, _HOLDER, (name,))
        who = str(holders[0]) if holders else "a runner that has just ended"
        if not take_over:
            raise ShardBusy(
                f"another runner works on this shard: {who}; wait for it, or take over if it is gone for good",
                shard=name,
            )
        try:
            await self._as_login(Query(_END_HOLDER, (name,)))
        except psycopg.errors.InsufficientPrivilege as error:
            raise ShardBusy(f"may not end {who}; GRANT pg_signal_backend TO {self.login}", shard=name) from error
        if not await self._lock_within(_TAKE_OVER_WAIT_MS):
            raise ShardBusy(f"did not end in time: {who}; end that server process", shard=name)
        self.took_over = holders[0] if holders else None

    async def _lock_within(self, limit_ms: int) -> bool:
        """Wait for the runner lock; False when somebody still holds it afterwards."""
        try:
            await self.transact([Query(_WAIT_FOR_LOCK, (self.shard.name,))], local={"lock_timeout": f"{limit_ms}ms"})
        except psycopg.errors.LockNotAvailable:
            return False
        return True

    async def _as_login(self, query: Query) -> Result:
        return (await self.transact([query], local={"role": "none"}))[0]

    async def _fly(
        self, queries: Sequence[Query], factory: AsyncRowFactory[T], *, only: int | None = None
    ) -> list[tuple[int, list[T]]]:
        """
        Send queries in one flight; `only` names the one whose rows suit the factory.

        Returns:
            Row count and rows of each query.
        """
        for query in queries:
            self._refuse_hidden_text(query)
        cursors = [psycopg.AsyncRawCursor(self.connection, row_factory=factory) for _ in queries]
        self.failed = None
        try:
            async with self.connection.pipeline():
                for cursor, query in zip(cursors, queries, strict=True):
                    await cursor.execute(query.sql, query.params)
        except psycopg.Error:
            done = sum(cursor.pgresult is not None for cursor in cursors)
            self.failed = queries[min(done, len(queries) - 1)]
            raise
        return [
            (cursor.rowcount, await cursor.fetchall() if cursor.description and only in {None, number} else [])
            for number, cursor in enumerate(cursors)
        ]

    def _refuse_hidden_text(self, query: Query) -> None:
        # A CR ends a "--" comment for the server though not for every reader, and nothing after a NUL is sent at all:
        # either way, what was reviewed is not what would run.
        for character, name in (("\0", "NUL"), ("\r", "carriage return")):
            if character in query.sql:
                raise StepFailed(f"the SQL contains a {name} character; take it out", shard=self.shard.name)


@asynccontextmanager
async def open_session(
    shard: Shard,
    settings: SessionSettings,
    *,
    pg_versions: tuple[int, int],
    purpose: Purpose = "run",
    take_over: bool = False,
) -> AsyncIterator[Session]:
    """
    Connect to a shard, prepare the session, and close it at the end.

    Args:
        shard: where.
        settings: how.
        pg_versions: oldest and newest server major that plans are judged for.
        purpose: "run" to change the shard, alone; "read" to look at it.
        take_over: end the runner that holds the shard, if there is one; `Session.took_over` says who it was.

    Raises:
        ShardUnreachable, ThroughPooler, NotPrimary, PreflightFailed, ShardBusy: see `Session.connect`.
    """
    session = Session(shard, settings, pg_versions=pg_versions, purpose=purpose)
    await session.connect(take_over=take_over)
    try:
        yield session
    finally:
        await session.close()


def _set(values: Mapping[str, str], *, local: bool = True) -> Query:
    calls = ", ".join(f"set_config(${n}, ${n + 1}, {local})" for n in range(1, 2 * len(values), 2))
    return Query(f"SELECT ARRAY[{calls}]", [x for pair in values.items() for x in pair])


def _current(names: Iterable[str]) -> Query:
    named = list(names)
    return Query(f"SELECT ARRAY[{', '.join(f'current_setting(${n})' for n in range(1, len(named) + 1))}]", named)


# --------------------------------------------------------------------------------------------------------------------
# The locks of a session; behind `pg_backend_pid() = $1`, as everything in the handshake


_RUNNER_LOCK = f"hashtextextended('shardmig ' || $2, {LOCK_CLASS})"
_PRESENCE = f"pg_try_advisory_lock_shared({LOCK_CLASS}, 0)"
_LOCKS: dict[Purpose, str] = {
    "read": f"SELECT current_schema()::text, pg_backend_pid() = $1 AND {_PRESENCE} AND $2::text IS NOT NULL",
    "run": f"""
SELECT current_schema()::text,
       pg_backend_pid() = $1 AND {_PRESENCE} AND NOT pg_is_in_recovery() AND pg_try_advisory_lock({_RUNNER_LOCK})
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

_END_HOLDER = f"SELECT pg_terminate_backend(held.pid) FROM ({_HELD}) AS held"
_WAIT_FOR_LOCK = f"SELECT pg_advisory_lock({_RUNNER_LOCK.replace('$2', '$1')})"
