"""
Transactions with flags on the caller's own psycopg connection, sync and async.

The flags ride on BEGIN: one message, one round trip, no more than the BEGIN alone would cost. psycopg is never
imported here; its errors are told by `sqlstate`.
"""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from shardmig.errors import LedgerMissing, ViewExpired, WriteRefused, WrongShard, WrongTransaction
from shardmig.flags.core import Declared, Flag, FlagRow, Opening, Reading, View

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TypeAlias

    from psycopg import AsyncConnection, Connection, IsolationLevel
    from psycopg.pq.abc import PGresult

    Isolation: TypeAlias = IsolationLevel | Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

__all__ = ["AsyncTransaction", "Fence", "Flags", "Transaction"]

Fence = Literal["piggyback", "prepared"]

_logger = logging.getLogger("shardmig.flags")

_LEVELS = frozenset({"READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"})
_IDLE, _ACTIVE, _IN_TRANSACTION, _IN_ERROR = range(4)  # pq.TransactionStatus
_NO_LEDGER = frozenset({"42P01", "3F000"})  # undefined_table, invalid_schema_name
_NO_PRIVILEGE = "42501"

# pg_is_in_recovery() is asked for in every transaction: the connection may lead to another server tomorrow.
_OPENING = """\
SELECT epoch, maintenance, pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_isolation'),
 pg_catalog.current_setting('transaction_read_only'), retry_after_s, reason
 FROM shardmig.shard WHERE shard = {shard}"""

# Epoch and flags in ONE statement: under READ COMMITTED two statements may see two epochs, and the flags of one would
# be kept under the token of the other for good.
_FLAGS = """\
SELECT s.epoch, f.flag, f.state, f.cross_table, f.touch_source, f.old_valid
 FROM shardmig.shard s LEFT JOIN shardmig.flag f USING (shard) WHERE s.shard = {shard}"""


class Flags(Declared):
    """
    The flags a release declares: `flags = Flags(SPLIT_NAME, release="2026-11-22.1")`, once an application.

    Args:
        flags: every flag the code asks for; asking for another one is UnknownFlag.
        release: the release's name, for messages.
    """

    def __init__(self, *flags: Flag, release: str | None = None) -> None:
        super().__init__(*flags, release=release)
        self._claims: WeakKeyDictionary[object, _Claim] = WeakKeyDictionary()
        self._drivers: list[Callable[[object], object | None]] = []

    def transaction(
        self,
        connection: Connection[Any],
        *,
        shard: str,
        write: bool = True,
        isolation: Isolation | None = None,
        deferrable: bool | None = None,
        fence: Fence = "piggyback",
    ) -> Transaction:
        """
        Begin a transaction that knows the shard's flags; commit on success, roll back on an exception.

        Args:
            connection: idle, autocommit=True (BEGIN is ours). `connection.transaction()` inside is a savepoint.
            shard: the name this database must have; another one is WrongShard.
            write: False begins READ ONLY, which a standby and a read-only shard allow.
            isolation: None takes the connection's own setting, else the server's default.
            deferrable: of a SERIALIZABLE transaction with write=False; None takes the connection's own setting.
            fence: "piggyback" reads the epoch in the message of BEGIN; "prepared" in a message of its own, which is
                a little cheaper on a unix socket and a whole round trip dearer on a network.

        Returns:
            A context manager that gives the View.
        """
        return Transaction(
            self, connection, shard=shard, write=write, isolation=isolation, deferrable=deferrable, fence=fence
        )

    def atransaction(
        self,
        connection: AsyncConnection[Any],
        *,
        shard: str,
        write: bool = True,
        isolation: Isolation | None = None,
        deferrable: bool | None = None,
        fence: Fence = "piggyback",
    ) -> AsyncTransaction:
        """Do as `transaction` does on an async connection."""
        return AsyncTransaction(
            self, connection, shard=shard, write=write, isolation=isolation, deferrable=deferrable, fence=fence
        )

    def of(self, holder: object) -> View:
        """
        Return the view of the transaction that is open on a connection or session.

        Args:
            holder: a psycopg connection; with `integrations.sqlalchemy.install` also its connections and sessions.

        Raises:
            ViewExpired: no transaction with flags is open there.
        """
        driver: object = next((found for find in self._drivers if (found := find(holder)) is not None), holder)
        claim = self._claims.get(driver)
        if claim is None or claim.view is None or claim.view.expired:
            raise ViewExpired("no transaction with flags is open on this connection; begin one first")
        return claim.view

    async def aof(self, session: _AsyncSession) -> View:
        """Return the view of an async session, which begins its transaction here if it did nothing yet."""
        await session.connection()
        return self.of(session)

    def find_driver(self, find: Callable[[object], object | None]) -> None:
        """Teach `of` another kind of holder: `find` returns the psycopg connection below, or None."""
        self._drivers.append(find)

    # -- one transaction at a time on a connection ---------------------------------------------------------------------

    def claim(self, connection: Connection[Any] | AsyncConnection[Any]) -> _Claim:
        """
        Take an idle connection for one transaction.

        Raises:
            WrongTransaction: the connection cannot begin one, or another task is just beginning one on it.
        """
        _refuse_unless_idle(connection)
        mine = _Claim()
        found = self._claims.setdefault(connection, mine)
        if found is not mine:
            if found.view is None:
                raise WrongTransaction("another thread or task is beginning a transaction on this connection")
            found.view.expire()  # its block was never left, yet the connection is idle: a pool rolled it back
            self._claims[connection] = mine
        return mine

    def release_claim(self, connection: object) -> None:
        """Expire the view of the connection's transaction, which ends now."""
        claim = self._claims.pop(connection, None)
        if claim is not None and claim.view is not None:
            claim.view.expire()


class _AsyncSession(Protocol):
    async def connection(self) -> object: ...


class _Claim:
    """A connection taken for one transaction; `view` is None until it has begun."""

    __slots__ = ("__weakref__", "view")

    def __init__(self) -> None:
        self.view: View | None = None


class _Begin:
    """What both shells share: the statements, and what their answers mean."""

    def __init__(
        self,
        flags: Flags,
        connection: Any,  # noqa: ANN401 - Connection or AsyncConnection: the shells below know
        *,
        shard: str,
        write: bool,
        isolation: Isolation | None,
        deferrable: bool | None,
        fence: Fence,
    ) -> None:
        self._flags = flags
        self._connection = connection
        self._shard = shard
        self._write = write
        self._isolation = isolation
        self._deferrable = deferrable
        self._prepared = fence == "prepared"

    def _claim(self) -> _Claim:
        connection = self._connection
        if self._write and connection.read_only:
            raise WriteRefused(f"shard {self._shard}: connection.read_only is set; say write=False")
        if self._prepared and connection.prepare_threshold is None:
            raise WrongTransaction(
                "fence='prepared' needs a connection that prepares (prepare_threshold is None); use 'piggyback'"
            )
        return self._flags.claim(connection)

    @property
    def _statements(self) -> _Statements:
        connection = self._connection
        return _statements(
            self._shard,
            write=self._write,
            isolation=self._isolation if self._isolation is not None else connection.isolation_level,
            deferrable=self._deferrable if self._deferrable is not None else connection.deferrable,
            encoding=connection.info.encoding,
        )

    def _admit(self, answer: PGresult) -> Opening:
        opening = _opening(answer, self._connection.info.encoding)
        return self._flags.admit(opening, shard=self._shard, write=self._write)

    def _recall(self, opening: Opening) -> Reading | None:
        return self._flags.recall(opening, shard=self._shard)

    def _remember(self, answer: PGresult) -> Reading:
        return self._flags.remember(_flag_rows(answer), shard=self._shard)

    def _view(self, reading: Reading, opening: Opening) -> View:
        return self._flags.view(reading, opening, shard=self._shard, write=self._write)

    def _refuse_unless_open(self) -> None:
        """Refuse to commit what is not there any more, or what the server would roll back without an error."""
        status = self._connection.pgconn.transaction_status
        if status == _IDLE:
            raise WrongTransaction(
                f"shard {self._shard}: the transaction was ended inside its block (commit() or rollback()); what "
                "followed ran without flags. Let the block end it"
            )
        if status == _IN_ERROR:
            raise WrongTransaction(
                f"shard {self._shard}: a statement failed inside and the error was caught, so everything was rolled "
                "back; put such a statement into connection.transaction(), a savepoint"
            )

    def _is_over(self) -> bool:
        connection = self._connection
        return bool(connection.closed or connection.pgconn.transaction_status == _IDLE)


class Transaction(_Begin, AbstractContextManager["View"]):
    """A transaction with flags on a psycopg Connection; see `Flags.transaction`."""

    def __enter__(self) -> View:
        """Begin, and read the flags if their epoch is new to this process."""
        statements, claim = self._statements, self._claim()
        try:
            cursor = self._connection.cursor()
            if self._prepared:
                cursor.execute(statements.begin, prepare=False)
                cursor.execute(statements.opening, prepare=True)
            else:
                cursor.execute(statements.begin_and_opening, prepare=False)
                cursor.nextset()
            opening = self._admit(cursor.pgresult)
            reading = self._recall(opening)
            if reading is None:
                cursor.execute(statements.flags, prepare=False)
                reading = self._remember(cursor.pgresult)
            claim.view = self._view(reading, opening)
        except BaseException as error:
            self._abandon()
            refusal = _refusal(error, self._shard)
            if refusal is not None:
                raise refusal from error
            raise
        return claim.view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back what failed."""
        if kind is not None:
            self._abandon()
            return
        try:
            self._refuse_unless_open()
            self._flags.release_claim(self._connection)
            self._connection.commit()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._flags.release_claim(self._connection)
        if not self._is_over():
            try:
                self._connection.rollback()
            except Exception as error:  # noqa: BLE001 - the first failure is the one to tell
                _logger.warning("shard %s: rollback failed: %s", self._shard, error)


class AsyncTransaction(_Begin, AbstractAsyncContextManager["View"]):
    """A transaction with flags on a psycopg AsyncConnection; see `Flags.transaction`."""

    async def __aenter__(self) -> View:
        """Begin, and read the flags if their epoch is new to this process."""
        statements, claim = self._statements, self._claim()
        try:
            cursor = self._connection.cursor()
            if self._prepared:
                await cursor.execute(statements.begin, prepare=False)
                await cursor.execute(statements.opening, prepare=True)
            else:
                await cursor.execute(statements.begin_and_opening, prepare=False)
                cursor.nextset()
            opening = self._admit(cursor.pgresult)
            reading = self._recall(opening)
            if reading is None:
                await cursor.execute(statements.flags, prepare=False)
                reading = self._remember(cursor.pgresult)
            claim.view = self._view(reading, opening)
        except BaseException as error:
            await self._abandon()
            refusal = _refusal(error, self._shard)
            if refusal is not None:
                raise refusal from error
            raise
        return claim.view

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back what failed."""
        if kind is not None:
            await self._abandon()
            return
        try:
            self._refuse_unless_open()
            self._flags.release_claim(self._connection)
            await self._connection.commit()
        except BaseException:
            await self._abandon()
            raise

    async def _abandon(self) -> None:
        self._flags.release_claim(self._connection)
        if not self._is_over():
            try:
                await self._connection.rollback()
            except Exception as error:  # noqa: BLE001 - the first failure is the one to tell
                _logger.warning("shard %s: rollback failed: %s", self._shard, error)


# --------------------------------------------------------------------------------------------------------------------
# Statements out, answers in


class _Statements(NamedTuple):
    begin: bytes
    opening: bytes
    begin_and_opening: bytes
    flags: bytes


@lru_cache(maxsize=4096)
def _statements(
    shard: str, *, write: bool, isolation: Isolation | None, deferrable: bool | None, encoding: str
) -> _Statements:
    begin = _begin(write=write, isolation=isolation, deferrable=deferrable)
    name = _literal(shard)
    opening, flags = _OPENING.format(shard=name), _FLAGS.format(shard=name)
    return _Statements(*(text.encode(encoding) for text in (begin, opening, f"{begin}; {opening}", flags)))


def _begin(*, write: bool, isolation: Isolation | None, deferrable: bool | None) -> str:
    words = ["BEGIN"]
    if isolation is not None:
        level = str(getattr(isolation, "name", isolation)).replace("_", " ").upper()
        if level not in _LEVELS:
            raise ValueError(f"no isolation level {isolation!r}: {', '.join(sorted(_LEVELS))}")
        words.append(f"ISOLATION LEVEL {level}")
    if not write:
        words.append("READ ONLY")
    if deferrable is not None:
        words.append("DEFERRABLE" if deferrable else "NOT DEFERRABLE")
    return " ".join(words)


def _literal(name: str) -> str:
    """Quote a shard's name so that it means the same whether or not standard_conforming_strings is on."""
    if "\0" in name:
        raise WrongShard("a shard's name has no NUL in it", shard=repr(name))
    quoted = name.replace("'", "''")
    return f"'{quoted}'" if "\\" not in quoted else "E'{}'".format(quoted.replace("\\", "\\\\"))


def _opening(answer: PGresult, encoding: str) -> Opening | None:
    # Bytes as the server wrote them: the caller's own row factories and type adapters have no say in this.
    if not answer.ntuples:
        return None
    cell = answer.get_value
    reason = cell(0, 6)
    return Opening(
        epoch=cell(0, 0) or b"",
        maintenance=int(cell(0, 1) or 0),
        standby=cell(0, 2) == b"t",
        isolation=(cell(0, 3) or b"").decode(),
        read_only=cell(0, 4) == b"on",
        retry_after_s=int(cell(0, 5) or 0),
        reason=None if reason is None else reason.decode(encoding, "replace"),
    )


def _flag_rows(answer: PGresult) -> list[FlagRow]:
    cell = answer.get_value
    return [
        FlagRow(
            epoch=cell(row, 0) or b"",
            name=(cell(row, 1) or b"").decode(errors="replace"),  # b"": the shard has no flag yet
            state=int(cell(row, 2) or 0),
            cross_table=cell(row, 3) == b"t",
            touch_source=cell(row, 4) == b"t",
            old_valid=cell(row, 5) != b"f",
        )
        for row in range(answer.ntuples)
    ]


def _refuse_unless_idle(connection: Connection[Any] | AsyncConnection[Any]) -> None:
    status = connection.pgconn.transaction_status
    if status in _NOT_IDLE:
        raise WrongTransaction(_NOT_IDLE[status])
    if not connection.autocommit:
        raise WrongTransaction(
            "the connection has autocommit=False, so psycopg would send a BEGIN of its own; connect with "
            "autocommit=True, transactions are then the blocks you write"
        )
    if connection.pgconn.pipeline_status:
        raise WrongTransaction("the connection is in pipeline mode, where BEGIN cannot carry the flags; leave it first")


_NOT_IDLE = {
    _ACTIVE: "another statement is running on this connection; one transaction at a time",
    _IN_TRANSACTION: "a transaction is open on this connection already; inside it, connection.transaction() is a "
    "savepoint and keeps the view",
    _IN_ERROR: "a failed transaction is open on this connection; roll it back first",
}


def _refusal(error: BaseException, shard: str) -> LedgerMissing | None:
    """Tell what a failed BEGIN says about the ledger; None: nothing, the error goes on as it is."""
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate in _NO_LEDGER:
        return LedgerMissing(
            f"shard {shard}: this database has no ledger (schema shardmig); run `shardmig apply` there first"
        )
    if sqlstate == _NO_PRIVILEGE:
        return LedgerMissing(
            f"shard {shard}: this role may not read the ledger; GRANT USAGE ON SCHEMA shardmig and "
            "SELECT ON shardmig.shard, shardmig.flag"
        )
    return None
