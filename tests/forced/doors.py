"""
How a transaction comes to the state it acts on: the product's way, and those that do not work.

A door is one process's: it has a connection and remembers. Steps that a door has no use for do nothing, so that one
schedule can be played with any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import psycopg
from model.fences import Fences
from model.rows import Rows

from shardmig import Flag, Flags
from shardmig.states import State

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from forced.mutations import Model
    from shardmig import View

__all__ = ["FLAG", "Door", "Isolation", "Plain", "door_for"]

FLAG = Flag("x")
Isolation = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]


class Door:
    """The product: flags ride on BEGIN."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], shard: str, isolation: Isolation) -> None:
        self.connection = connection
        self.shard = shard
        self.isolation = isolation
        self.flags = Flags(FLAG)
        self.open: AbstractAsyncContextManager[View] | None = None

    async def begin(self) -> State | None:
        """Begin, and return the state to act on; None when it is not known yet."""
        self.open = self.flags.atransaction(self.connection, shard=self.shard, isolation=self.isolation)
        view = await self.open.__aenter__()
        return view[FLAG]

    async def resume(self) -> State | None:
        """Go on with a BEGIN that came to its state in two steps; None where it is done."""
        return None

    async def commit(self) -> None:
        """Commit."""
        if self.open is not None:
            await self.open.__aexit__(None, None, None)

    async def leave(self) -> None:
        """End the transaction, if one is left: ROLLBACK, a crash, or nothing after PREPARE TRANSACTION."""
        if self.open is not None:
            await self.open.__aexit__(ConnectionError, ConnectionError(), None)

    async def hear(self) -> None:
        """Learn what the flag is, outside of a transaction."""

    async def decide(self) -> None:
        """Look at what is remembered; what follows may come much later."""

    async def forget(self) -> None:
        """Lose what keeps the memory true."""


class Plain(Door):
    """Reads the flag in its transaction by itself, without the product."""

    async def begin(self) -> State | None:
        await self._begin()
        return await self.read()

    async def commit(self) -> None:
        await self.connection.execute("COMMIT")

    async def leave(self) -> None:
        if not self.connection.closed and self.connection.info.transaction_status.name != "IDLE":
            await self.connection.execute("ROLLBACK")

    async def _begin(self) -> None:
        await self.connection.execute(f"BEGIN ISOLATION LEVEL {self.isolation}")

    async def read(self) -> State:
        return State(await self._value("SELECT state FROM shardmig.flag"))

    async def _token(self) -> int:
        return int(await self._value("SELECT epoch FROM shardmig.shard"))

    async def _value(self, sql: str) -> Any:
        row = await (await self.connection.execute(sql)).fetchone()
        assert row is not None
        return row[0]


class _Unaware(Plain):
    """Knows no flag."""

    async def begin(self) -> State:
        await self._begin()
        return State.OLD


class _TwoStatements(Plain):
    """Reads the flags, then the token under which it keeps them."""

    async def begin(self) -> State | None:
        await self._begin()
        self.kept: dict[int, State] = getattr(self, "kept", {})
        if (known := self.kept.get(await self._token())) is not None:
            return known
        self.found = await self.read()
        return None

    async def resume(self) -> State | None:
        self.kept[await self._token()] = self.found
        return self.found


class _FirstToken(_TwoStatements):
    """Keeps the flags under the token that it saw before it read them."""

    async def begin(self) -> State | None:
        await self._begin()
        self.kept = getattr(self, "kept", {})
        self.token = await self._token()
        return self.kept.get(self.token)

    async def resume(self) -> State | None:
        if self.token not in self.kept:
            self.kept[self.token] = await self.read()
        return self.kept[self.token]


class _Default(Plain):
    """Takes OLD when the flag cannot be read."""

    async def begin(self) -> State | None:
        try:
            return await super().begin()
        except psycopg.errors.InsufficientPrivilege:
            await self.connection.execute("ROLLBACK")
            await self._begin()
            return State.OLD


class _Cache(Plain):
    """Acts on what it last heard: NOTIFY tells it to read again."""

    line: psycopg.AsyncConnection[Any] | None = None
    known: State | None = None

    async def hear(self) -> None:
        if self.line is None:
            self.line = await psycopg.AsyncConnection.connect(self.connection.info.dsn, autocommit=True)
            await self.line.execute("LISTEN shardmig")
        told = [note async for note in self.line.notifies(timeout=0)]
        if told or self.known is None:
            self.known = await self.read()

    async def forget(self) -> None:
        """Lose the line that messages come on; nobody keeps them for the next one."""
        if self.line is not None:
            await self.line.close()
            self.line = None

    async def begin(self) -> State | None:
        await self._begin()
        return self.known

    async def leave(self) -> None:
        await super().leave()
        await self.forget()


class _Lease(Plain):
    """Acts on a state as long as a lease on it lasts; looks before BEGIN, not after."""

    async def hear(self) -> None:
        await self.connection.execute("INSERT INTO lease (state) SELECT state FROM shardmig.flag")

    async def decide(self) -> None:
        self.known = State(await self._value("SELECT state FROM lease WHERE until > clock_timestamp()"))

    async def forget(self) -> None:
        """Time passes."""
        await self.connection.execute("UPDATE lease SET until = clock_timestamp()")

    async def begin(self) -> State:
        await self._begin()
        return self.known


class _Carry(Plain):
    """Reads the flag once in a request of several transactions."""

    known: State | None = None

    async def begin(self) -> State:
        await self._begin()
        self.known = self.known if self.known is not None else await self.read()
        return self.known


class _Advisory(Plain):
    """Holds an advisory lock while it acts."""

    first = "SELECT pg_advisory_xact_lock_shared(7)"

    async def begin(self) -> State | None:
        await self._begin()
        await self.connection.execute(self.first)
        return await self.read()


class _Holders(_Advisory):
    """Reads something else first; its lock on the flag's table is what the drain looks for."""

    first = "SELECT count(*) FROM gate"


_FENCES: dict[str, type[Door]] = {
    "two statements": _TwoStatements,
    "first token": _FirstToken,
    "default": _Default,
    "cache": _Cache,
    "lease": _Lease,
    "carry": _Carry,
    "advisory": _Advisory,
    "holders": _Holders,
    "freeze": Plain,
}


def door_for(model: Model, name: str) -> type[Door]:
    """Choose how the process of this name comes to its state."""
    match model:
        case Rows() if model.unaware and name == "A":
            return _Unaware
        case Rows() if not model.refuse_snapshots:
            return Plain
        case Fences():
            return _FENCES.get(model.fence, Door)
    return Door
