"""
The flags of an application on its psycopg connections, and what is known of each connection.

psycopg is loaded by whoever made the connection, never here before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from shardmig.errors import ViewExpired
from shardmig.flags.core import Declared
from shardmig.flags.opening import MARKED
from shardmig.flags.prepared import Prepared
from shardmig.flags.transaction import AsyncTransaction, Transaction, driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import AsyncConnection, Connection

    from shardmig.flags.core import Flag, View
    from shardmig.flags.opening import Isolation


__all__ = ["Flags", "Known"]


class Flags(Declared):
    """
    The flags a release declares: `flags = Flags(SPLIT_NAME, release="2026-11-22.1")`, once an application.

    Args:
        flags: every flag the code asks for; asking for another one is UnknownFlag.
        release: the release's name, for messages.
    """

    def __init__(self, *flags: Flag, release: str | None = None) -> None:
        super().__init__(*flags, release=release)
        self._known: WeakKeyDictionary[object, Known] = WeakKeyDictionary()
        self._drivers: list[Callable[[object], object | None]] = []

    def transaction(
        self,
        connection: Connection[Any],
        *,
        shard: str,
        write: bool = True,
        isolation: Isolation | None = None,
        deferrable: bool | None = None,
    ) -> Transaction:
        """
        Begin a transaction that knows the shard's flags; commit on success, roll back on an exception.

        Args:
            connection: idle, autocommit=True (BEGIN is ours). `connection.transaction()` inside is a savepoint. What
                rides on BEGIN is prepared after `connection.prepare_threshold` transactions; None never prepares.
            shard: the name this database must have; another one is WrongShard.
            write: False begins READ ONLY, which a standby and a read-only shard allow.
            isolation: None takes the connection's own setting, else the server's default.
            deferrable: of a SERIALIZABLE transaction with write=False; None takes the connection's own setting.

        Returns:
            A context manager that gives the View.
        """
        return Transaction(self, connection, shard=shard, write=write, isolation=isolation, deferrable=deferrable)

    def atransaction(
        self,
        connection: AsyncConnection[Any],
        *,
        shard: str,
        write: bool = True,
        isolation: Isolation | None = None,
        deferrable: bool | None = None,
    ) -> AsyncTransaction:
        """Do as `transaction` does on an async connection."""
        return AsyncTransaction(self, connection, shard=shard, write=write, isolation=isolation, deferrable=deferrable)

    def of(self, holder: object) -> View:
        """
        Return the view of the transaction that is open on a connection or session.

        Args:
            holder: a psycopg connection; with `integrations.sqlalchemy.install` also its connections and sessions.

        Raises:
            ViewExpired: no transaction with flags is open there.
        """
        below: object = next((found for find in self._drivers if (found := find(holder)) is not None), holder)
        known = self._known.get(below)
        if known is None or known.view is None:
            raise ViewExpired("no transaction with flags is open on this connection; begin one first")
        return known.view

    async def aof(self, session: _AsyncSession) -> View:
        """Return the view of an async session of SQLAlchemy; its transaction begins here if it did nothing yet."""
        return self.of(await session.connection())

    def find_driver(self, find: Callable[[object], object | None]) -> None:
        """Teach `of` another kind of holder: `find` returns the psycopg connection below, or None."""
        self._drivers.append(find)

    def known(self, connection: object) -> Known:
        """Return what is known of a psycopg connection."""
        return self._known.get(connection) or self._known.setdefault(connection, Known())


class _AsyncSession(Protocol):
    async def connection(self) -> object: ...


class Known:
    """
    What one Flags object knows of one connection, for as long as that lives.

    Attributes:
        begun: how many transactions; a block that is left late finds that it is not the last.
        view: of the transaction that is open; None: there is none.
        standby: its server was one when it last answered a reader.
        prepared: the openings that its server holds prepared.
        marked: whether the transaction that was begun last is known again by its mark.
        reported: whether the server told of the mark by itself, as it will of its end.
        execute: psycopg's generator that waits for answers.
    """

    __slots__ = ("__weakref__", "begun", "execute", "marked", "prepared", "reported", "standby", "view")

    def __init__(self) -> None:
        self.execute = driver()[0]
        self.begun = 0
        self.view: View | None = None
        self.standby = False
        self.prepared = Prepared()
        self.marked = False
        self.reported = False

    def mark(self, *, before: bytes | None, now: bytes | None) -> None:
        """Learn that a transaction is marked, and what was reported before it and with it."""
        self.marked = True
        self.reported = now == MARKED != before

    def committing(self) -> bool:
        """Expire the view of the transaction that ends now; False when there was none."""
        view, self.view = self.view, None
        if view is None:
            return False
        view.expire()
        return True

    def rolling_back(self) -> None:
        """Do as `committing` does; psycopg may deallocate what is prepared when it rolls back."""
        self.committing()
        self.prepared.doubt()
