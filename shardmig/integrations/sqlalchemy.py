"""
Flags in SQLAlchemy's transactions: every BEGIN of an engine carries them.

    engine = install(create_engine("postgresql+psycopg://…"), flags, shard="eu1")

    with Session(engine) as session, session.begin():
        session.get(Customer, 1).rename(flags.of(session)[SPLIT_NAME], "Grace", "Hopper")

SQLAlchemy leaves BEGIN to the driver, which would send it without flags. So the driver is put into autocommit and BEGIN
becomes ours; COMMIT and ROLLBACK stay SQLAlchemy's. A read-only transaction is asked for by an execution option:
`engine.execution_options(shardmig_write=False)`, or SQLAlchemy's own `postgresql_readonly=True`. Where one database
holds several schema shards, `shardmig_shard="eu2"` names the one that is meant.

What outlives its transaction carries an old decision: objects of a session with expire_on_commit=False, for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, scoped_session

from shardmig.errors import WrongTransaction
from shardmig.flags.opening import ASKING_MARK, MARK
from shardmig.flags.transaction import refuse_another

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from sqlalchemy.ext.asyncio import AsyncEngine  # at run time it wants greenlet, which sync applications lack
    from sqlalchemy.pool import PoolProxiedConnection

    from shardmig.flags.connection import Flags

__all__ = ["SHARD", "WRITE", "install"]

WRITE = "shardmig_write"
"""The execution option: False begins READ ONLY."""

SHARD = "shardmig_shard"
"""The execution option: the shard that is meant, where the engine leads to several."""

AnyEngine = TypeVar("AnyEngine", bound="Engine | AsyncEngine")

_ASKED = (
    "shardmig_asked"  # of a pooled connection: the options of the transaction that begins next; None: no transaction
)
_AUTOCOMMIT = "shardmig_autocommit"  # of a pooled connection: whether the engine itself was made with AUTOCOMMIT

_installed: WeakSet[object] = WeakSet()


def install(engine: AnyEngine, flags: Flags, *, shard: str) -> AnyEngine:
    """
    Have every transaction of an engine read the shard's flags at its BEGIN.

    Errors of flags come up where SQLAlchemy begins: at the first statement of a session or connection. With isolation
    level AUTOCOMMIT there is no transaction, hence no view.

    Args:
        engine: of the dialect postgresql+psycopg, sync or async, before its first use.
        flags: what the application declares; `flags.of(session_or_connection)` then gives the view.
        shard: the shard that the engine leads to: one engine a shard.

    Returns:
        The same engine.

    Raises:
        WrongTransaction: another driver, or flags are installed on this engine already.
    """
    core = cast("Engine", getattr(engine, "sync_engine", engine))
    if core.dialect.driver != "psycopg":
        raise WrongTransaction(f"the engine's driver is {core.dialect.driver!r}; flags need postgresql+psycopg")
    if core.dialect in _installed:
        raise WrongTransaction("flags are installed on this engine already; one engine a shard")
    _installed.add(core.dialect)
    _Transactions(core, flags, shard=shard).listen()
    flags.find_driver(_driver)
    return engine


class _Transactions:
    """How the transactions of one engine begin and end."""

    def __init__(self, engine: Engine, flags: Flags, *, shard: str) -> None:
        self._engine = engine
        self._flags = flags
        self._shard = shard

    def listen(self) -> None:
        listeners: dict[str, Callable[..., None]] = {
            "connect": self._connected,
            "begin": self._asked,
            "begin_twophase": self._asked_for_two_phases,
            "commit": self._committing,
            "rollback": self._rolling_back,
            "reset": self._left,
            "invalidate": self._left,
        }
        for name, listener in listeners.items():
            event.listen(self._engine, name, listener)
        # BEGIN itself belongs where SQLAlchemy looks after errors: a broken connection leaves the pool, and what
        # psycopg raises comes as the SQLAlchemy error that applications know.
        self._engine.dialect.do_begin = self._begin  # type: ignore[method-assign,assignment]

    def _connected(self, connection: Any, entry: Any) -> None:  # noqa: ANN401 - psycopg's, adapted or not
        entry.info[_AUTOCOMMIT] = bool(connection.autocommit)

    def _asked(self, connection: Connection) -> None:
        options = connection.get_execution_options()
        level = options.get("isolation_level", "AUTOCOMMIT" if connection.info.get(_AUTOCOMMIT) else "")
        connection.info[_ASKED] = None if str(level).upper() == "AUTOCOMMIT" else options

    def _asked_for_two_phases(self, *_: object) -> None:
        raise WrongTransaction(
            f"shard {self._shard}: a two-phase transaction is begun by the driver, without flags; use an ordinary one"
        )

    def _begin(self, pooled: PoolProxiedConnection) -> None:
        options = pooled.info.pop(_ASKED, None)
        if options is None:
            return
        driver = cast("psycopg.Connection[Any]", pooled.driver_connection)
        how: dict[str, Any] = {
            "shard": options.get(SHARD, self._shard),
            "write": options.get(WRITE, not driver.read_only),
        }
        # SQLAlchemy takes the driver out of autocommit whenever it sets an isolation level; the level itself stays.
        if self._engine.dialect.is_async:
            cast("Any", pooled.dbapi_connection).run_async(lambda connection: self._abegin(connection, how))
            return
        if not driver.autocommit:
            driver.autocommit = True
        self._flags.transaction(driver, **how).__enter__()  # the end is SQLAlchemy's: _committing, _rolling_back

    async def _abegin(self, driver: psycopg.AsyncConnection[Any], how: dict[str, Any]) -> None:
        if not driver.autocommit:
            await driver.set_autocommit(True)
        await self._flags.atransaction(driver, **how).__aenter__()

    def _committing(self, connection: Connection) -> None:
        """
        Expire the view; refuse a COMMIT that the server would answer with a silent ROLLBACK, and roll back.

        SQLAlchemy takes a COMMIT that failed for the end of its transaction: it would go back to the pool open.
        """
        try:
            self._refuse_to_commit(connection)
        except Exception:
            if not connection.invalidated and not connection.closed:
                self._rolling_back(connection)
                self._engine.dialect.do_rollback(connection.connection)
            raise

    def _refuse_to_commit(self, connection: Connection) -> None:
        driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
        known = self._flags.known(driver)
        had_view = known.committing()
        if had_view and driver.info.transaction_status.name == "INERROR":
            raise WrongTransaction(
                f"shard {self._shard}: a statement failed inside and the error was caught, so everything was rolled "
                "back; put such a statement into begin_nested(), a savepoint"
            )
        if had_view and driver.info.transaction_status.name == "IDLE":
            raise WrongTransaction(
                f"shard {self._shard}: the transaction was ended by a statement of its own; what followed ran "
                "without flags. Let SQLAlchemy commit"
            )
        if had_view and known.marked:
            reported = driver.pgconn.parameter_status(MARK) if known.reported else _asked_mark(connection)
            refuse_another(reported, shard=self._shard)

    def _rolling_back(self, connection: Connection) -> None:
        if not connection.invalidated and not connection.closed:
            self._flags.known(connection.connection.driver_connection).rolling_back()

    def _left(self, connection: object, *_: object) -> None:
        """Expire the view of a connection that goes back to its pool, or to nowhere."""
        known = self._flags.known(getattr(connection, "driver_connection", connection))
        if known.view is not None:
            known.rolling_back()


def _asked_mark(connection: Connection) -> bytes:
    return str(connection.exec_driver_sql(ASKING_MARK.decode()).scalar_one()).encode()


def _driver(holder: object) -> object | None:
    """Find psycopg's connection below a connection or session of SQLAlchemy; a session begins its transaction."""
    match holder:
        case Connection():
            return None if holder.closed else holder.connection.driver_connection
        case Session():
            return _driver(holder.connection())
        case scoped_session():
            return _driver(holder())
    if hasattr(holder, "sync_session"):  # AsyncSession, async_scoped_session
        raise WrongTransaction("an async session begins with an await: view = await flags.aof(session)")
    if (connection := getattr(holder, "sync_connection", None)) is not None:  # AsyncConnection
        return _driver(connection)
    return None
