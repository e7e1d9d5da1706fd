"""
A session: one connection, prepared for migrating one shard.

Connecting costs the server's own handshake and one more round trip, in which every self-check, every setting and the
locks travel together. From then on each statement goes through the extended protocol, which refuses a second statement
hidden in the same text, and statements that belong together go in one flight: BEGIN, work, record and COMMIT leave in
one packet, so that no lock is ever held while the network is waited for.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psycopg

from shardmig.errors import InDoubt, ShardUnreachable, StepFailed
from shardmig.flight import Query, Result, current_settings, fly, set_settings
from shardmig.handshake import (
    READ_ONLY,
    SCHEMA_EXISTS,
    SET_ROLE,
    Answers,
    connect,
    judge,
    not_ready,
    questions,
    read_only,
)
from shardmig.holder import LOCK_CLASS, LOCKS, Holder, Own, meet_holder
from shardmig.pgerrors import first_line, is_connection_lost, is_transient, pointer, sqlstate
from shardmig.pulse import in_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

    from shardmig.config import SessionSettings, Shard
    from shardmig.errors import PreflightFailed
    from shardmig.holder import Purpose

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
T = TypeVar("T")


class Session:
    """
    One prepared connection to one shard.

    Attributes:
        shard: the shard.
        settings: how the session behaves.
        purpose: "run" holds the runner lock, "read" does not.
        pg_versions: oldest and newest server major that it works with.
        login: the role that connected; `observe` runs as it.
        deadlock_timeout_ms: the server's setting.
        read_only: transactions are read-only by default; then only purpose "read" gets a session.
        took_over: whose backend was terminated to get the runner lock; None as a rule.
        terminate_older_than_s: a drain ends transactions older than this; None: it waits for all, as it should.
        failed: the query of the last flight that the server refused.
        asked: the questions that `ask` was last called with.
        tell: told what an answer that is long in coming waits for.
    """

    def __init__(
        self, shard: Shard, settings: SessionSettings, *, pg_versions: tuple[int, int], purpose: Purpose = "run"
    ) -> None:
        self.shard = shard
        self.settings = settings
        self.purpose = purpose
        self.login = ""
        self.deadlock_timeout_ms = 0.0
        self.read_only = False
        self.took_over: Holder | None = None
        self.terminate_older_than_s: float | None = None
        self.failed: Query | None = None
        self.asked: Sequence[Query] = ()
        self.tell: Callable[[str], None] | None = None
        self.pg_versions = pg_versions
        self._own: Own | None = None
        self._answered: tuple[Sequence[Query], list[Result]] = ((), [])
        self._open: psycopg.AsyncConnection[tuple[Any, ...]] | None = None
        self._limit_s: float | None = None  # for an answer, by our own clock

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
        before = (await self.flight([current_settings(timeouts), set_settings(timeouts, local=False)]))[0].value
        try:
            await self._fly([Query(sql)], limited=statement_timeout_ms > 0)
        finally:
            if not self.connection.broken and not self.connection.closed:
                await self.flight([set_settings(dict(zip(timeouts, before, strict=True)), local=False)])

    async def run_file(self, text: bytes) -> None:
        """Run many statements in one text, by the simple protocol: for the ledger's own files alone."""
        async with self._in_time():
            await self.connection.cursor().execute(text)

    async def fetch(self, record: type[T], sql: str, params: Sequence[object] = ()) -> list[T]:
        """Run one SELECT and return its rows as records; column names are the record's fields."""
        return _records(record, (await self._fly([Query(sql, params)], named=True))[0])

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
        flight = [Query("BEGIN READ ONLY"), set_settings({"role": "none"}), Query(sql, params), Query("COMMIT")]
        try:
            return _records(record, (await self._fly(flight, named=True))[2])
        except psycopg.Error:
            await self.roll_back()
            raise

    def observing(self, queries: Sequence[Query]) -> list[Query]:
        """Let the login role ask queries, as `observe` does, in the middle of a transaction of the owner's."""
        owner = self.settings.owner
        return [
            *([set_settings({"role": "none"})] if owner else []),
            *queries,
            *([set_settings({"role": owner})] if owner else []),
        ]

    async def flight(self, queries: Sequence[Query], *, repeats: bool = False) -> list[Result]:
        """
        Send statements together and return their results, in one round trip.

        Without BEGIN among them they still are one transaction, as PostgreSQL treats everything up to a Sync. A
        failure leaves the rest unexecuted; `failed` then is the query that was refused. Where it `repeats` itself, the
        server reads each text once.
        """
        return await self._fly(queries, repeats=repeats)

    async def ask(self, queries: Sequence[Query]) -> list[Result]:
        """Read in one flight, or in none: what was asked while connecting is answered until anything else is sent."""
        self.asked = list(queries)
        asked, answers = self._answered
        for start in range(len(answers) - len(queries) + 1):
            if list(asked[start : start + len(queries)]) == self.asked:
                return answers[start : start + len(queries)]
        return await self.flight(queries)

    async def transact(
        self,
        queries: Sequence[Query],
        *,
        isolation: Isolation = "READ COMMITTED",
        local: Mapping[str, str] | None = None,
        behind: Sequence[Query] = (),
    ) -> list[Result]:
        """
        Run statements in one transaction and one flight, COMMIT included.

        Args:
            queries: what is executed, in this order.
            isolation: of the transaction.
            local: settings for this transaction only, such as {"lock_timeout": "10ms"}.
            behind: executed in the same flight behind COMMIT, in a transaction of their own.

        Returns:
            One result for each query.

        Raises:
            InDoubt: the connection broke, and nobody here knows whether COMMIT arrived.
            psycopg.Error: a statement failed and everything was rolled back; `failed` names it.
        """
        prelude = [Query(f"BEGIN ISOLATION LEVEL {isolation}"), *([set_settings(local)] if local else [])]
        try:
            results = await self.flight([*prelude, *queries, Query("COMMIT"), *behind])
        except psycopg.Error as error:
            if is_connection_lost(error) or self.connection.broken:
                raise InDoubt(shard=self.shard.name) from error
            await self.roll_back()
            raise
        return results[len(prelude) : len(prelude) + len(queries)]

    @asynccontextmanager
    async def transaction(
        self, *, isolation: Isolation = "READ COMMITTED", local: Mapping[str, str] | None = None
    ) -> AsyncIterator[None]:
        """
        Keep a transaction open over several round trips; never around a lock that the application needs.

        Raises:
            InDoubt: the connection broke during COMMIT.
        """
        await self.flight([Query(f"BEGIN ISOLATION LEVEL {isolation}"), *([set_settings(local)] if local else [])])
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
            try:
                async with self._in_time():  # psycopg's own rollback() would wait for ever, cancelled or not
                    await fly(self.connection, [Query("ROLLBACK")], done=[])
            except psycopg.Error as error:
                if not is_connection_lost(error):  # the transaction ended with it; what is asked next says so
                    raise

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

    async def connect(self, *, take_over: bool = False, ask: Sequence[Query] = ()) -> None:
        """
        Connect, check, prepare and, for a runner, take the shard's lock.

        Args:
            take_over: end the runner that holds the shard.
            ask: questions that travel with the self-checks, for `Session.ask`; what is refused there is asked again by
                whoever wants to know.

        Raises:
            ShardUnreachable: no connection, or no answer; the message shows the address and never a password.
            ThroughPooler, NotPrimary, PreflightFailed: a self-check failed; no setting was left behind anywhere.
            ShardBusy: another runner holds the lock; the message says who.
        """
        # A server that hangs keeps no timeout of its own, and one such shard would keep the answers of all others.
        self._limit_s = self.settings.connect_timeout_s
        self._open = await connect(self.shard, self.settings)
        try:
            await self._prepare(take_over=take_over, ask=ask)
        except BaseException:
            await self.close()
            raise

    async def reconnect(self) -> None:
        """Replace a broken connection by a new one, with every check, setting and lock anew."""
        await self.close()
        await self.connect()

    async def refuse_read_only(self) -> None:
        """
        Make sure that something may be written.

        Raises:
            PreflightFailed: transactions are read-only by default; the message says where that is set.
        """
        if self.read_only:
            source = (await self.execute("SELECT source FROM pg_settings WHERE name = $1", [READ_ONLY])).value
            raise read_only(self.shard, source, login=self.login, database=self.connection.info.dbname)

    async def close(self) -> None:
        """Close the connection; its locks and its open transaction end with it."""
        if self._open is not None:
            await self._open.close()
            self._open = None

    async def _prepare(self, *, take_over: bool, ask: Sequence[Query]) -> None:
        """Do everything in one flight; only a busy shard, or an answer that is refused, costs more."""
        info = self.connection.info
        answers, (schema, locked, seen), answered = await self._shake_hands(ask)
        self._limit_s = self._reading_limit_s()
        lost, self._own = self._own, Own(info.backend_pid, seen) if seen else None
        encoding = info.parameter_status("server_encoding")
        judge(answers, self.shard, self.pg_versions, server_version=info.server_version, server_encoding=encoding)
        self.login, self.deadlock_timeout_ms = answers.login, answers.deadlock_timeout_ms
        if schema != self.shard.schema_name:
            raise await self._schema_problem()
        self.read_only = answers.read_only
        if self.purpose == "run":
            await self.refuse_read_only()
        # A lock wait that outlives deadlock_timeout makes the server look for deadlocks, and may end the application's
        # transaction instead of ours: half of it is the limit, whatever the ladder says.
        if self.settings.lock_timeout_ms[-1] > (limit_ms := self.deadlock_timeout_ms // 2):
            await self.flight([set_settings({"lock_timeout": f"{limit_ms:.0f}ms"}, local=False)])
        if locked:
            self._answered = (ask, answered)
        else:  # whoever holds the shard is changing what was read
            self.took_over = await meet_holder(self, take_over=take_over, lost=lost) or self.took_over

    async def _shake_hands(
        self, ask: Sequence[Query]
    ) -> tuple[Answers, tuple[str | None, bool, datetime | None], list[Result]]:
        """
        Send self-checks, settings, locks and questions.

        Returns:
            What the server says of itself; the schema that is used, whether the shard is locked, and when the server
            process of a runner was there; the answers.
        """
        pid, info, owner = self.backend_pid, self.connection.info, self.settings.owner
        checks = Query(*questions(self.shard, self.settings, backend_pid=pid, server_version=info.server_version))
        role = [Query(SET_ROLE, (pid, owner))] if owner else []
        hands = [checks, *role, Query(LOCKS[self.purpose], (pid, self.shard.name))]
        try:
            flight = await self.flight([*hands, *ask], repeats=True)
        except psycopg.Error as error:
            if self.failed in ask and not self.connection.broken:
                return await self._shake_hands(())  # an empty database has no ledger: no reason to refuse the session
            if self.failed is None or self.failed.sql != SET_ROLE:
                raise ShardUnreachable(
                    f"the server refused the session: {first_line(error)}", shard=self.shard.name
                ) from error
            raise not_ready(
                self.shard,
                f"role {info.user} cannot become the owner: {first_line(error)}; "
                f"create it, GRANT {owner} TO {info.user}, or correct session.owner",
            ) from error
        return Answers(*flight[0].rows[0]), flight[len(hands) - 1].rows[0], flight[len(hands) :]

    async def _schema_problem(self) -> PreflightFailed:
        schema, role = self.shard.schema_name, self.settings.owner or self.login
        if not (await self.execute(SCHEMA_EXISTS, [schema])).value:
            return not_ready(self.shard, f"schema {schema} does not exist; create it or correct the shard's `schema`")
        return not_ready(
            self.shard,
            f"role {role} may not use schema {schema}; GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}",
        )

    def _reading_limit_s(self) -> float | None:
        """Wait for an answer for longer than the server would work on it; whoever changes a shard has to hear of it."""
        limit_s = self.settings.statement_timeout_s
        return limit_s + self.settings.connect_timeout_s if self.purpose == "read" and limit_s else None

    async def _fly(
        self, queries: Sequence[Query], *, named: bool = False, limited: bool = True, repeats: bool = False
    ) -> list[Result]:
        """
        Send queries in one flight, and wait for the answers while the server works on them.

        Args:
            queries: what is sent.
            named: whether the results know the names of their columns.
            limited: whether the server ends a statement that takes too long.
            repeats: whether texts come several times.

        Raises:
            ShardUnreachable: whoever only reads, or shakes hands, was not answered in time.
            psycopg.Error: the first one; of the connection, too, when nobody works on the answer any more.
        """
        for query in queries:
            self._refuse_hidden_text(query)
        self._answered = ((), [])
        self.failed = None
        done: list[Query] = []
        try:
            async with self._in_time(limited=limited):
                return await fly(self.connection, queries, done=done, named=named, repeats=repeats)
        except (psycopg.Error, ShardUnreachable):
            self.failed = queries[min(len(done), len(queries) - 1)]
            raise

    def _in_time(self, *, limited: bool = True) -> AbstractAsyncContextManager[None]:
        return in_time(
            self.shard, self.settings, self.backend_pid, limit_s=self._limit_s, limited=limited, tell=self.tell
        )

    def _refuse_hidden_text(self, query: Query) -> None:
        # A CR ends a "--" comment for the server though not for every reader, and nothing after a NUL is sent at all:
        # either way, what was reviewed is not what would run.
        for character, name in (("\0", "NUL"), ("\r", "carriage return")):
            if character in query.sql:
                raise StepFailed(f"the SQL contains a {name} character; take it out", shard=self.shard.name)


def _records(record: type[T], result: Result) -> list[T]:
    return [record(**dict(zip(result.names, row, strict=True))) for row in result.rows]


@asynccontextmanager
async def open_session(
    shard: Shard,
    settings: SessionSettings,
    *,
    pg_versions: tuple[int, int],
    purpose: Purpose = "run",
    take_over: bool = False,
    ask: Sequence[Query] = (),
) -> AsyncIterator[Session]:
    """
    Connect to a shard, prepare the session, and close it at the end.

    Args:
        shard: where.
        settings: how.
        pg_versions: oldest and newest server major that plans are judged for.
        purpose: "run" to change the shard, alone; "read" to look at it.
        take_over: end the runner that holds the shard, if there is one; `Session.took_over` says who it was.
        ask: questions that travel with the self-checks, see `Session.connect`.

    Raises:
        ShardUnreachable, ThroughPooler, NotPrimary, PreflightFailed, ShardBusy: see `Session.connect`.
    """
    session = Session(shard, settings, pg_versions=pg_versions, purpose=purpose)
    await session.connect(take_over=take_over, ask=ask)
    try:
        yield session
    finally:
        await session.close()
