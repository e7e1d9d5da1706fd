"""
What the tests of flags share: a shard's ledger to set up, and one way to write a test for sync and async at once.

A door opens a connection and transactions on it; `SyncDoor` drives psycopg's Connection, `AsyncDoor` AsyncConnection.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from shardmig import State, ledger
from shardmig.config import SessionSettings
from shardmig.session import open_session
from shardmig.states import route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    import psycopg

    from shardmig import Flags, View
    from shardmig.config import Shard

__all__ = ["AsyncDoor", "Door", "Ledger", "SyncDoor", "install"]


async def install(shard: Shard) -> None:
    """Give a shard its ledger."""
    async with open_session(shard, SessionSettings(), pg_versions=(12, 18)) as session:
        await ledger.install(session)


class Ledger:
    """The ledger of one shard, changed by hand and lawfully: the trigger has its say."""

    def __init__(self, connection: psycopg.Connection[Any], shard: str) -> None:
        self.connection = connection
        self.shard = shard

    def add(self, flag: str, state: State = State.OLD, *, has_move: bool = True, **columns: bool) -> None:
        """Add a flag and walk it to a state."""
        named = "".join(f", {name}" for name in columns)
        values = "".join(f", {value}" for value in columns.values())
        self.connection.execute(
            f"INSERT INTO shardmig.flag (shard, flag, revision, has_move{named}) VALUES (%s, %s, %s, %s{values})",
            (self.shard, flag, f"0001_{flag}", has_move),
        )
        self.walk(flag, state, has_move=has_move)

    def walk(self, flag: str, state: State, *, has_move: bool = True) -> None:
        """Take one edge after the other, as if every drain and move were done."""
        for edge in route(self.state(flag), state, has_move=has_move):
            if edge.guard.value:
                self.mark(flag, drained=True)
                self.mark(flag, **{edge.guard.value: True})
            self.flip(flag, edge.target)

    def flip(self, flag: str, state: State) -> None:
        """Take one edge, in a commit of its own unless a transaction is open."""
        where = (int(state), self.shard, flag)
        self.connection.execute("UPDATE shardmig.flag SET state = %s WHERE shard = %s AND flag = %s", where)

    def mark(self, flag: str, **bits: bool) -> None:
        """Record what a runner would: drained, new_valid, old_valid."""
        changes = ", ".join(f"{name} = {value}" for name, value in bits.items())
        where = (self.shard, flag)
        self.connection.execute(f"UPDATE shardmig.flag SET {changes} WHERE shard = %s AND flag = %s", where)

    def state(self, flag: str) -> State:
        """Return the flag's state."""
        where = (self.shard, flag)
        found = self.connection.execute("SELECT state FROM shardmig.flag WHERE shard = %s AND flag = %s", where)
        return State(found.fetchone()[0])  # type: ignore[index]

    def epoch(self) -> int:
        """Return the shard's token."""
        found = self.connection.execute("SELECT epoch FROM shardmig.shard WHERE shard = %s", (self.shard,))
        return int(found.fetchone()[0])  # type: ignore[index]

    def maintenance(self, mode: int, *, reason: str | None = None, retry_after_s: int = 30) -> None:
        """Set 0 none, 1 read-only, 2 offline."""
        self.connection.execute(
            "UPDATE shardmig.shard SET maintenance = %s, reason = %s, retry_after_s = %s WHERE shard = %s",
            (mode, reason, retry_after_s, self.shard),
        )

    def force(self, statement: str) -> None:
        """Change the ledger behind its trigger's back, as a restore does."""
        with self.connection.transaction():
            self.connection.execute("SET LOCAL session_replication_role = replica")
            self.connection.execute(statement)


class Door(Protocol):
    """One of psycopg's two sides."""

    async def connect(self, target: Any, **keywords: Any) -> Any:
        """Open a connection, autocommit unless told otherwise; it is closed after the test."""

    def transaction(self, flags: Flags, connection: Any, **keywords: Any) -> AbstractAsyncContextManager[View]:
        """Open a transaction with flags."""

    def savepoint(self, connection: Any) -> AbstractAsyncContextManager[Any]:
        """Open `connection.transaction()`."""

    async def run(self, connection: Any, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""

    async def call(self, function: Any, *arguments: Any) -> Any:
        """Call a method that is awaitable on one side."""


class SyncDoor:
    def __init__(self, connect: Any, _: Any) -> None:
        self._connect = connect

    async def connect(self, target: Any, **keywords: Any) -> Any:
        return self._connect(target, **keywords)

    @asynccontextmanager
    async def transaction(self, flags: Flags, connection: Any, **keywords: Any) -> AsyncIterator[View]:
        with flags.transaction(connection, **keywords) as view:
            yield view

    @asynccontextmanager
    async def savepoint(self, connection: Any) -> AsyncIterator[Any]:
        with connection.transaction() as inner:
            yield inner

    async def run(self, connection: Any, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        cursor = connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []

    async def call(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


class AsyncDoor:
    """The async side; with `prepare_threshold`, every connection prepares after so many statements."""

    def __init__(self, _: Any, aconnect: Any, *, prepare_threshold: int = 5) -> None:
        self._connect = aconnect
        self._prepare_threshold = prepare_threshold

    async def connect(self, target: Any, **keywords: Any) -> Any:
        connection = await self._connect(target, **keywords)
        connection.prepare_threshold = self._prepare_threshold
        return connection

    @asynccontextmanager
    async def transaction(self, flags: Flags, connection: Any, **keywords: Any) -> AsyncIterator[View]:
        async with flags.atransaction(connection, **keywords) as view:
            yield view

    @asynccontextmanager
    async def savepoint(self, connection: Any) -> AsyncIterator[Any]:
        async with connection.transaction() as inner:
            yield inner

    async def run(self, connection: Any, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        cursor = await connection.execute(statement, parameters or None)
        return await cursor.fetchall() if cursor.description else []

    async def call(self, function: Any, *arguments: Any) -> Any:
        return await function(*arguments)
