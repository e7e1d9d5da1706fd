"""
Transactions with flags on the caller's own psycopg connection, sync and async.

The flags ride on BEGIN: one message, one round trip, no more than the BEGIN alone would cost. psycopg is never
imported here; its errors are told by `sqlstate`.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

from shardmig.errors import LedgerMissing, ViewExpired, WriteRefused, WrongShard, WrongTransaction
from shardmig.flags.core import Declared
from shardmig.flags.opening import ONE_SNAPSHOT, read_details, read_flags, read_opening, statements

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

    from psycopg import AsyncConnection, Connection
    from psycopg.pq.abc import PGresult

    from shardmig.flags.core import Flag, View
    from shardmig.flags.opening import Isolation, Opening, Statements


__all__ = ["AsyncTransaction", "Fence", "Flags", "Transaction"]

Fence = Literal["piggyback", "prepared"]

_IDLE, _ACTIVE, _IN_TRANSACTION, _IN_ERROR = range(4)  # pq.TransactionStatus
_NO_LEDGER = frozenset({"42P01", "3F000"})  # undefined_table, invalid_schema_name
_NO_PRIVILEGE = "42501"
_NOT_IDLE = {
    _ACTIVE: "another statement is running on this connection; one transaction at a time",
    _IN_TRANSACTION: "a transaction is open on this connection already; inside it, connection.transaction() is a "
    "savepoint and keeps the view",
    _IN_ERROR: "a failed transaction is open on this connection; roll it back first",
}


class Flags(Declared):
    """
    The flags a release declares: `flags = Flags(SPLIT_NAME, release="2026-11-22.1")`, once an application.

    Args:
        flags: every flag the code asks for; asking for another one is UnknownFlag.
        release: the release's name, for messages.
    """

    def __init__(self, *flags: Flag, release: str | None = None) -> None:
        super().__init__(*flags, release=release)
        self._claims: WeakKeyDictionary[object, Claim] = WeakKeyDictionary()
        self.standbys: WeakSet[object] = WeakSet()
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
        """Return the view of an async session of SQLAlchemy; its transaction begins here if it did nothing yet."""
        return self.of(await session.connection())

    def find_driver(self, find: Callable[[object], object | None]) -> None:
        """Teach `of` another kind of holder: `find` returns the psycopg connection below, or None."""
        self._drivers.append(find)

    # -- one transaction at a time on a connection ---------------------------------------------------------------------

    def claim(self, connection: Connection[Any] | AsyncConnection[Any]) -> Claim:
        """
        Take an idle connection for one transaction.

        Raises:
            WrongTransaction: the connection cannot begin one, or another task is just beginning one on it.
        """
        _refuse_unless_idle(connection)
        mine = Claim()
        found = self._claims.setdefault(connection, mine)
        if found is not mine:
            if found.view is None:
                raise WrongTransaction("another thread or task is beginning a transaction on this connection")
            found.view.expire()  # its block was never left, yet the connection is idle: a pool rolled it back
            self._claims[connection] = mine
        return mine

    def release_claim(self, connection: object) -> bool:
        """Expire the view of the connection's transaction, which ends now; False when there was none."""
        claim = self._claims.pop(connection, None)
        if claim is None or claim.view is None:
            return False
        claim.view.expire()
        return True


class _AsyncSession(Protocol):
    async def connection(self) -> object: ...


class Claim:
    """A connection taken for one transaction; `view` is None until it has begun."""

    __slots__ = ("__weakref__", "view")

    def __init__(self) -> None:
        self.view: View | None = None


class _Begin:
    """What both shells share: what is sent, and what the answers mean."""

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
        self._fence = fence

    def _claim(self) -> Claim:
        connection = self._connection
        if self._write and connection.read_only:
            raise WriteRefused(f"shard {self._shard}: connection.read_only is set; say write=False")
        if self._fence == "prepared" and connection.prepare_threshold is None:
            raise WrongTransaction(
                "fence='prepared' needs a connection that prepares (prepare_threshold is None); use 'piggyback'"
            )
        return self._flags.claim(connection)

    def _steps(self, claim: Claim) -> Generator[_Message, PGresult, View]:
        """Begin: yield what to send, take its last answer, and return the view of what was begun."""
        flags, shard, write = self._flags, self._shard, self._write
        texts = self._statements()
        if self._fence == "prepared":
            yield _Message(texts.begin)
            answer = yield _Message(texts.opening, prepare=True)
        else:
            answer = yield _Message(texts.begin_and_opening)
        opening = self._opening(answer, texts)
        if opening.standby and texts.isolation not in ONE_SNAPSHOT:
            self._refuse_two_snapshots()
            texts = self._statements()
            opening = self._opening((yield _Message(b"ROLLBACK; " + texts.begin_and_opening)), texts)
        if not flags.admits(opening, write=write):
            details = read_details((yield _Message(texts.details)))
            raise flags.refusal(opening, details, shard=shard, write=write)
        reading = flags.recall(opening, shard=shard)
        if reading is None:
            reading = flags.remember(read_flags((yield _Message(texts.flags))), shard=shard)
        claim.view = flags.view(reading, opening, shard=shard, write=write)
        return claim.view

    def _statements(self) -> Statements:
        connection, isolation = self._connection, self._isolation
        if isolation is None:
            known = not self._write and connection in self._flags.standbys
            isolation = "REPEATABLE READ" if known else connection.isolation_level
        return statements(
            self._shard,
            write=self._write,
            isolation=isolation,
            deferrable=self._deferrable if self._deferrable is not None else connection.deferrable,
            encoding="ascii" if self._shard.isascii() else connection.info.encoding,
        )

    def _opening(self, answer: PGresult, texts: Statements) -> Opening:
        opening = read_opening(answer, write=self._write, isolation=texts.isolation)
        if opening is None:
            raise WrongShard(
                "no such shard in this database; check the routing. Nothing was changed", shard=self._shard
            )
        return opening

    def _refuse_two_snapshots(self) -> None:
        """
        Have flags and data of a standby read in one snapshot.

        A standby replays flips and moves between two statements, and no drain on the primary waits for its readers.
        """
        if self._isolation is not None:
            raise WrongTransaction(
                f"shard {self._shard}: on a standby flags and data must come from one snapshot; "
                "leave isolation away or say isolation='REPEATABLE READ'"
            )
        self._flags.standbys.add(self._connection)

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

    def _told(self, error: BaseException) -> BaseException:
        """Translate what a failed BEGIN says about the ledger; anything else stays the driver's error."""
        sqlstate = getattr(error, "sqlstate", None)
        if sqlstate in _NO_LEDGER:
            return LedgerMissing(
                f"shard {self._shard}: this database has no ledger (schema shardmig); run `shardmig apply` there first"
            )
        if sqlstate == _NO_PRIVILEGE:
            return LedgerMissing(
                f"shard {self._shard}: this role may not read the ledger; GRANT USAGE ON SCHEMA shardmig and "
                "SELECT ON shardmig.shard, shardmig.flag"
            )
        return error


class Transaction(_Begin, AbstractContextManager["View"]):
    """A transaction with flags on a psycopg Connection; see `Flags.transaction`."""

    def __enter__(self) -> View:
        """Begin, and read the flags if their epoch is new to this process."""
        claim = self._claim()
        try:
            return self._begin(claim)
        except BaseException as error:
            self._abandon()
            told = self._told(error)
            if told is not error:
                raise told from error
            raise

    def _begin(self, claim: Claim) -> View:
        cursor = self._connection.cursor()
        steps = self._steps(claim)
        message = next(steps)
        try:
            while True:
                cursor.execute(message.sql, prepare=message.prepare)
                message = steps.send(_last_answer(cursor))
        except StopIteration as begun:
            return cast("View", begun.value)

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
                _warn(self._shard, error)


class AsyncTransaction(_Begin, AbstractAsyncContextManager["View"]):
    """A transaction with flags on a psycopg AsyncConnection; see `Flags.transaction`."""

    async def __aenter__(self) -> View:
        """Begin, and read the flags if their epoch is new to this process."""
        claim = self._claim()
        try:
            return await self._begin(claim)
        except BaseException as error:
            await self._abandon()
            told = self._told(error)
            if told is not error:
                raise told from error
            raise

    async def _begin(self, claim: Claim) -> View:
        cursor = self._connection.cursor()
        steps = self._steps(claim)
        message = next(steps)
        try:
            while True:
                await cursor.execute(message.sql, prepare=message.prepare)
                message = steps.send(_last_answer(cursor))
        except StopIteration as begun:
            return cast("View", begun.value)

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
                _warn(self._shard, error)


class _Message(NamedTuple):
    """What is sent at once; several statements in one text are never prepared, whatever the connection's habit."""

    sql: bytes
    prepare: bool = False


def _warn(shard: str, error: Exception) -> None:
    import logging  # noqa: PLC0415 - a fifth of what `import shardmig` would cost, for what hardly ever happens

    logging.getLogger("shardmig.flags").warning("shard %s: rollback failed: %s", shard, error)


def _last_answer(cursor: Any) -> PGresult:  # noqa: ANN401 - Cursor or AsyncCursor; nextset() waits for nothing
    while cursor.nextset():
        pass
    return cast("PGresult", cursor.pgresult)


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
