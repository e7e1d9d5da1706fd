"""
One transaction with flags on the caller's own psycopg connection, sync and async: how it begins and how it ends.

The flags ride on BEGIN: one message, one round trip, no more than the BEGIN alone would cost. psycopg is loaded by
whoever made the connection, never here before that; its errors are told by `sqlstate`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from shardmig.errors import LedgerMissing, WriteRefused, WrongShard, WrongTransaction
from shardmig.flags.opening import (
    ASKING_MARK,
    MARK,
    MARKED,
    ONE_SNAPSHOT,
    read_asked,
    read_details,
    read_flags,
    read_opening,
    statements,
)
from shardmig.flags.prepared import Form

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from psycopg import Error
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn, PGresult

    from shardmig.flags.connection import Flags
    from shardmig.flags.core import View
    from shardmig.flags.opening import Isolation, Opening, Statements


__all__ = ["AsyncTransaction", "Transaction", "driver", "refuse_another"]

_IDLE, _ACTIVE, _IN_TRANSACTION, _IN_ERROR = range(4)  # pq.TransactionStatus
_COMMAND_OK, _TUPLES_OK = 1, 2  # pq.ExecStatus
_NO_LEDGER = frozenset({"42P01", "3F000"})  # undefined_table, invalid_schema_name
_NO_PRIVILEGE = "42501"
_NOT_IDLE = {
    _ACTIVE: "another statement is running on this connection; one transaction at a time",
    _IN_TRANSACTION: "a transaction is open on this connection already; inside it, connection.transaction() is a "
    "savepoint and keeps the view",
    _IN_ERROR: "a failed transaction is open on this connection; roll it back first",
}


class _Begin:
    """What both shells share: what is sent, and what the answers mean."""

    __slots__ = ("_connection", "_deferrable", "_flags", "_isolation", "_known", "_number", "_shard", "_write")

    def __init__(
        self,
        flags: Flags,
        connection: Any,  # noqa: ANN401 - Connection or AsyncConnection: the shells below know
        *,
        shard: str,
        write: bool,
        isolation: Isolation | None,
        deferrable: bool | None,
    ) -> None:
        self._flags = flags
        self._connection = connection
        self._shard = shard
        self._write = write
        self._isolation = isolation
        self._deferrable = deferrable
        self._known = flags.known(connection)
        self._number = 0  # of the beginning on this connection; 0: not begun

    def _steps(self) -> PQGen[View]:
        """
        Begin, and read the flags if their epoch is new to this process.

        One of psycopg's generators: the shells wait for it as psycopg does for its own, and hold the connection's lock
        all the time, so nobody else's statement comes in between.

        The usual transaction is written out here, with few calls: where more processes than cores take turns, each
        function that is entered comes from memory again and costs ten times what it takes alone.
        """
        connection, known, write = self._connection, self._known, self._write
        pgconn = connection.pgconn
        if (
            pgconn.transaction_status != _IDLE
            or known.view is not None
            or not connection.autocommit
            or pgconn.pipeline_status
            or (write and connection.read_only)
        ):
            self._refuse_or_tidy()
        self._number = known.begun = known.begun + 1
        before = pgconn.parameter_status(MARK) if write else None
        known.marked = known.reported = False
        texts = self._statements()
        if texts.name not in known.prepared.there or connection.prepare_threshold is None:
            return (yield from self._unusual(texts, before, None))
        pgconn.send_query(texts.openings[Form.EXECUTING])
        answer = (yield from known.execute(pgconn))[-1]
        view, cell = None, answer.get_value
        if answer.status == _TUPLES_OK and answer.ntuples and (cell(0, 1), cell(0, 2)) == texts.usual:
            view = self._flags.usual_view(cell(0, 0) or b"", shard=self._shard, write=write)
        if view is None:
            return (yield from self._unusual(texts, before, answer))
        if write:
            known.mark(before=before, now=pgconn.parameter_status(MARK))
        known.view = view
        return view

    def _unusual(self, texts: Statements, before: bytes | None, answer: PGresult | None) -> PQGen[View]:
        """
        Begin where more is to be done than usual; `answer` is what the prepared opening has got already.

        Whatever the opening says that is not usual comes here: its errors, maintenance, a standby, a new epoch.
        """
        flags, shard, write, known = self._flags, self._shard, self._write, self._known
        opening = yield from self._open(texts, answer=answer)
        if opening.standby and texts.isolation not in ONE_SNAPSHOT:
            self._refuse_two_snapshots()
            texts = self._statements()
            opening = yield from self._open(texts, first=b"ROLLBACK; ")
        if write:
            known.mark(before=before, now=self._connection.pgconn.parameter_status(MARK))
        if not flags.admits(opening, write=write):
            details = read_details((yield from _exchange(self._connection, texts.details)))
            raise flags.refusal(opening, details, shard=shard, write=write)
        reading = flags.recall(opening, shard=shard)
        if reading is None:
            reading = flags.remember(read_flags((yield from _exchange(self._connection, texts.flags))), shard=shard)
        known.view = view = flags.view(reading, opening, shard=shard, write=write)
        return view

    def _refuse_or_tidy(self) -> None:
        """Refuse what cannot begin a transaction; forget one whose block was never left, as a pool rolled it back."""
        connection, shard = self._connection, self._shard
        if self._write and connection.read_only:
            raise WriteRefused(f"shard {shard}: connection.read_only is set; say write=False")
        _refuse_unless_idle(connection)
        if not connection.autocommit:
            raise WrongTransaction(
                "the connection has autocommit=False, so psycopg would send a BEGIN of its own; connect with "
                "autocommit=True, transactions are then the blocks you write"
            )
        if connection.pgconn.pipeline_status:
            raise WrongTransaction(
                "the connection is in pipeline mode, where BEGIN cannot carry the flags; leave it first"
            )
        if self._known.view is not None:
            self._known.rolling_back()

    def _open(self, texts: Statements, *, first: bytes = b"", answer: PGresult | None = None) -> PQGen[Opening]:
        """Send the opening in the cheapest form that its server should understand, and plainer where it does not."""
        connection, prepared = self._connection, self._known.prepared
        form = Form.EXECUTING if answer is not None else prepared.form(texts.name, connection.prepare_threshold)
        while True:
            try:
                if answer is None:
                    answer = yield from _answered(connection, first + texts.openings[form])
                _rows(connection, answer)
                break
            except Exception as error:
                plainer = prepared.blame(texts.name, form, getattr(error, "sqlstate", None))
                if plainer is None:
                    raise
                form, first, answer = plainer, b"ROLLBACK; ", None
        if form is Form.PREPARING or form is Form.ASKING:
            prepared.learn(texts.name, there=form is Form.PREPARING or read_asked(answer))
        opening = read_opening(answer, write=self._write, isolation=texts.isolation)
        if opening is None:
            raise WrongShard(
                "no such shard in this database; check the routing. Nothing was changed", shard=self._shard
            )
        return opening

    def _statements(self) -> Statements:
        connection, isolation = self._connection, self._isolation
        if isolation is None:
            standby = self._known.standby and not self._write
            isolation = "REPEATABLE READ" if standby else connection.isolation_level
        return statements(
            self._shard,
            write=self._write,
            isolation=isolation,
            deferrable=self._deferrable if self._deferrable is not None else connection.deferrable,
            encoding="ascii" if self._shard.isascii() else connection.info.encoding,
        )

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
        self._known.standby = True

    def _refuse_to_commit(self) -> None:
        """Refuse to commit what is not there any more, or what the server would roll back without an error."""
        status = self._connection.pgconn.transaction_status
        if status == _IDLE or self._number != self._known.begun:
            raise WrongTransaction(
                f"shard {self._shard}: the transaction was ended inside its block (commit() or rollback()); what "
                "followed ran without flags. Let the block end it"
            )
        if status == _IN_ERROR:
            raise WrongTransaction(
                f"shard {self._shard}: a statement failed inside and the error was caught, so everything was rolled "
                "back; put such a statement into connection.transaction(), a savepoint"
            )

    def _commit(self) -> PQGen[bool]:
        """
        Commit the transaction whose flags were read, and no other.

        COMMIT is sent as psycopg would send it, for its commit() costs a full machine a twentieth of its transactions.

        Returns:
            False: psycopg keeps something open inside (a block, a pipeline), and its own commit() knows what to do.
        """
        connection, known = self._connection, self._known
        pgconn = connection.pgconn
        if self._number != known.begun or pgconn.transaction_status != _IN_TRANSACTION:
            self._refuse_to_commit()
        if known.marked:
            mark = pgconn.parameter_status(MARK)
            if not known.reported:  # in one more round trip
                mark = (yield from _exchange(connection, ASKING_MARK)).get_value(0, 0)
            refuse_another(mark, shard=self._shard)
        if known.view is not None:
            known.view.expire()
            known.view = None
        if pgconn.pipeline_status or getattr(connection, "_num_transactions", True):
            return False
        pgconn.send_query(b"COMMIT")
        answer = (yield from known.execute(pgconn))[-1]
        if answer.status != _COMMAND_OK:
            raise driver()[1](answer, connection.info.encoding)
        return True

    def _has_open(self) -> bool:
        """Whether there is something to roll back, and it is ours: a block left late ends nobody else's."""
        if self._number != self._known.begun or not self._number:
            return False
        self._known.rolling_back()
        return not self._connection.closed and self._connection.pgconn.transaction_status != _IDLE

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


class Transaction(_Begin):
    """A transaction with flags on a psycopg Connection; see `Flags.transaction`."""

    __slots__ = ()

    def __enter__(self) -> View:
        """Begin, and read the flags if their epoch is new to this process."""
        connection = self._connection
        if connection.pgconn.transaction_status != _IDLE:  # who streams holds the lock, and would wait for itself
            _refuse_unless_idle(connection)
        try:
            with connection.lock:
                view: View = connection.wait(self._steps())
                return view
        except BaseException as error:
            self._abandon()
            told = self._told(error)
            if told is not error:
                raise told from error
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back what failed."""
        if kind is not None:
            self._abandon()
            return
        connection = self._connection
        try:
            with connection.lock:
                committed = connection.wait(self._commit())
            if not committed:
                connection.commit()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        if self._has_open():
            try:
                self._connection.rollback()
            except Exception as error:  # noqa: BLE001 - the first failure is the one to tell
                _warn(self._shard, error)


class AsyncTransaction(_Begin):
    """A transaction with flags on a psycopg AsyncConnection; see `Flags.atransaction`."""

    __slots__ = ()

    async def __aenter__(self) -> View:
        """Begin, and read the flags if their epoch is new to this process."""
        connection = self._connection
        if connection.pgconn.transaction_status != _IDLE:  # who streams holds the lock, and would wait for itself
            _refuse_unless_idle(connection)
        try:
            async with connection.lock:
                view: View = await connection.wait(self._steps())
                return view
        except BaseException as error:
            await self._abandon()
            told = self._told(error)
            if told is not error:
                raise told from error
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit, or roll back what failed."""
        if kind is not None:
            await self._abandon()
            return
        connection = self._connection
        try:
            async with connection.lock:
                committed = await connection.wait(self._commit())
            if not committed:
                await connection.commit()
        except BaseException:
            await self._abandon()
            raise

    async def _abandon(self) -> None:
        if self._has_open():
            try:
                await self._connection.rollback()
            except Exception as error:  # noqa: BLE001 - the first failure is the one to tell
                _warn(self._shard, error)


def _warn(shard: str, error: Exception) -> None:
    import logging  # noqa: PLC0415 - a fifth of what `import shardmig` would cost, for what hardly ever happens

    logging.getLogger("shardmig.flags").warning("shard %s: rollback failed: %s", shard, error)


def _exchange(connection: Any, text: bytes) -> PQGen[PGresult]:  # noqa: ANN401 - Connection or AsyncConnection
    """Send statements in one message, and return the rows of the last."""
    return _rows(connection, (yield from _answered(connection, text)))


def _answered(connection: Any, text: bytes) -> PQGen[PGresult]:  # noqa: ANN401 - as above
    """
    Send statements in one message, and return the answer to the last, an error as well.

    Below psycopg's cursors: they would convert, count and adapt, and take our ROLLBACK for the application's.
    """
    execute, _ = driver()
    connection.pgconn.send_query(text)
    return (yield from execute(connection.pgconn))[-1]


def _rows(connection: Any, answer: PGresult) -> PGresult:  # noqa: ANN401 - as above
    """Return an answer that has rows; raise what is an error."""
    if answer.status != _TUPLES_OK:
        raise driver()[1](answer, connection.info.encoding)
    return answer


@cache
def driver() -> tuple[Callable[[PGconn], PQGen[list[PGresult]]], Callable[[PGresult, str], Error]]:
    """Return of psycopg the generator that waits for answers, and what makes an error of one."""
    from psycopg import errors, generators  # noqa: PLC0415 - whoever has a connection has loaded it

    return generators.execute, errors.error_from_result


def refuse_another(mark: bytes | None, *, shard: str) -> None:
    """Refuse to commit a transaction without the mark: the flags were read in one before it."""
    if mark != MARKED:
        raise WrongTransaction(
            f"shard {shard}: SQL ended the transaction inside its block and began another one (COMMIT AND CHAIN, "
            "COMMIT; BEGIN), which knows no flags and is rolled back; what was committed stays. Let the block end it "
            f"(or {MARK.decode()} was set inside, by which it is known)"
        )


def _refuse_unless_idle(connection: Any) -> None:  # noqa: ANN401 - as above
    status = connection.pgconn.transaction_status
    if status in _NOT_IDLE:
        raise WrongTransaction(_NOT_IDLE[status])
