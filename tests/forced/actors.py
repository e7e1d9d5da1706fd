"""
Who takes part in a forced schedule, and what an application's process does.

Each of them does its steps one after the other. A step that waits, for a row's lock or in a drain, lets the schedule go
on with the others; what its actor is to do next waits behind it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import psycopg
from model.fences import Standby
from psycopg import errors as pg

from forced.doors import FLAG, Door, Plain
from shardmig import Flags
from shardmig.errors import LedgerMissing, ShardInMaintenance, SwitchRefused, WriteRefused
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from forced.stage import Stage

__all__ = ["Actor", "App", "Played", "Reader", "wrong"]

_REFUSALS = (pg.SerializationFailure, WriteRefused, LedgerMissing, ShardInMaintenance, SwitchRefused)


class Played:
    """
    What a schedule came to.

    Attributes:
        wrong: what was read that had not been written, as the model says it; deadlocks too.
        refused: names of the errors by which somebody was refused.
    """

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.refused: list[str] = []

    def __repr__(self) -> str:
        """Show both."""
        return f"wrong: {self.wrong}, refused: {self.refused}"


class Actor:
    """Somebody with steps to do."""

    pid: int
    looks = 0  # how often a drain of this actor looked, and found somebody

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.name = name
        self.task: asyncio.Task[None] | None = None

    @property
    def through(self) -> bool:
        """Whether all its steps are done."""
        return self.task is None or self.task.done()

    def then(self, step: Callable[[], Awaitable[object]]) -> None:
        """Do a step after those that are not done yet."""
        self.task = asyncio.create_task(self._after(self.task, step))

    async def _after(self, earlier: asyncio.Task[None] | None, step: Callable[[], Awaitable[object]]) -> None:
        if earlier is not None:
            await earlier
        try:
            await step()
        except _REFUSALS as refusal:
            self.stage.played.refused.append(type(refusal).__name__)
            await self.give_up()
        except pg.DeadlockDetected:
            self.stage.played.wrong.append(f"deadlock of app {self.name} and another")
            await self.give_up()

    async def give_up(self) -> None:
        """Take back what was begun, after a refusal."""


class App(Actor):
    """
    An application's process with one connection.

    It decides by the state that its door gives it. After a refusal it does nothing until it begins anew.
    """

    def __init__(self, stage: Stage, name: str, connection: psycopg.AsyncConnection[Any], door: Door) -> None:
        super().__init__(stage, name)
        self.connection = connection
        self.door = door
        self.pid = connection.info.backend_pid
        self.state: State | None = None  # of its open transaction
        self.writes: dict[int, str | None] = {}  # what it wrote there, not committed yet
        self.left: list[Callable[[], Awaitable[None]]] = []  # statements of what it is doing
        self.then_was: dict[int, str | None] = {}
        self.new_first = False
        self.gid: str | None = None

    async def begin(self) -> None:
        self.then_was = dict(self.stage.truth)
        self.state = await self.door.begin()
        if self.state is not None:
            self._order()

    async def resume(self) -> None:
        """Go on with what it is in the middle of."""
        if self.left:
            while self.left:
                await self.left.pop(0)()
        elif (state := await self.door.resume()) is not None:
            self.state = state

    def _order(self) -> None:
        """Settle in which order it takes two tables."""
        both = self.state in {State.DUAL, State.LIVE}
        orders = {
            "old": False,
            "new": True,
            "by_state": self.state is State.LIVE,
            "reverse_open": not self.stage.value("SELECT old_valid FROM shardmig.flag"),
        }
        self.new_first = both and orders[self.stage.rows.order]

    async def put(self, key: str) -> None:
        await self.start("put", key)
        await self.resume()

    async def set(self, key: str) -> None:
        await self.start("set", key)
        await self.resume()

    async def delete(self, key: str) -> None:
        await self.start("delete", key)
        await self.resume()

    async def start(self, op: str, key: str) -> None:
        """Do the first statement of a change; `resume` does the rest."""
        if self.state is None:
            return
        value, number = self.stage.next_value(self.name), int(key)
        plan = list(self.stage.moved.plan(op, self.state, number, value))
        if self.new_first:
            plan.reverse()
        hits: dict[bool, bool] = {}

        async def run(second: bool, sql: str) -> None:  # noqa: FBT001 - of the plan
            entity = self.stage.moved.kind != "value"
            if second and entity and not self.stage.rows.both and hits.get(False) is False:
                return  # what hits no row in old must not be tried in new
            hits[second] = (await self.connection.execute(sql.encode())).rowcount > 0
            reads = self.state is not None and self.state.reads_new and self.stage.moved.kind != "one"
            if hits[second] and second == reads:
                self.writes[number] = None if op == "delete" else value

        self.left = [lambda w=written: run(w.second, w.sql) for written in plan]  # type: ignore[misc]
        await self.left.pop(0)()

    async def read(self, key: str) -> None:
        """Read as its state says, and compare with what was written last before its snapshot."""
        if self.state is None:
            return
        asked = await self.connection.execute(self.stage.moved.query(self.state, int(key)).encode())
        row = await asked.fetchone()
        truth = self.stage.truth if self.door.isolation == "READ COMMITTED" else self.then_was
        found = self.stage.moved.read_from(row, self.state)
        if problem := wrong(found, truth[int(key)], self.state):
            self.stage.played.wrong.append(f"app {self.name} reads {problem} in {self.state.name}")

    async def commit(self) -> None:
        if self.state is None:
            return
        if self.gid is not None:
            await self.connection.execute(f"COMMIT PREPARED '{self.gid}'")
        else:
            await self.door.commit()
        self.stage.truth.update(self.writes)
        self._end()

    async def prepare(self) -> None:
        self.gid = f"{self.stage.database}-{self.name}"
        await self.connection.execute(f"PREPARE TRANSACTION '{self.gid}'")
        await self.door.leave()

    async def leave(self) -> None:
        """End without a trace."""
        if self.gid is not None:
            await self.connection.execute(f"ROLLBACK PREPARED '{self.gid}'")
        await self.door.leave()
        self._end()

    async def give_up(self) -> None:
        await self.leave()

    def _end(self) -> None:
        self.state, self.gid, self.writes, self.left = None, None, {}, []

    async def hear(self) -> None:
        await self.door.hear()

    async def decide(self) -> None:
        await self.door.decide()

    async def forget(self) -> None:
        await self.door.forget()

    async def take(self, other: str) -> None:
        """Take over the snapshot of another application's open transaction, and read the flag in it."""
        exporter = self.stage.apps[other]
        row = await (await exporter.connection.execute("SELECT pg_export_snapshot()")).fetchone()
        assert row is not None
        await self.connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await self.connection.execute(f"SET TRANSACTION SNAPSHOT '{row[0]}'")
        self.then_was = exporter.then_was
        self.door = Plain(self.connection, self.door.shard, "REPEATABLE READ")  # BEGIN was not the product's
        self.state, self.new_first = await self.door.read(), False


def wrong(found: tuple[bool, str | None], truth: str | None, state: State) -> str | None:
    """Say what is wrong about what was read, in the model's words."""
    there, value = found
    side = "new" if state.reads_new else "old"
    if not there:
        return None if truth is None else f"{side}, and the row is missing there"
    if truth is None:
        return f"{side}, and finds a row that was deleted"
    return None if value == truth else f"{side}, which is stale"


class Reader(Actor):
    """
    A process that reads from a standby.

    With `flag_from="primary"` or without `one_snapshot` it reads by itself; else through the product.
    """

    def __init__(self, stage: Stage, name: str, connection: psycopg.AsyncConnection[Any], model: Standby) -> None:
        super().__init__(stage, name)
        self.connection = connection
        self.model = model
        self.pid = -1  # of another server
        self.state: State | None = None
        self.flags = Flags(FLAG)

    async def pause(self) -> None:
        """Let the standby fall behind."""
        await self.connection.execute("SELECT pg_wal_replay_pause()")

    async def catch_up(self) -> None:
        """Wait until the standby has everything."""
        written = self.stage.value("SELECT pg_current_wal_lsn()::text")
        caught_up = f"SELECT pg_last_wal_replay_lsn() >= '{written}'"
        async with await psycopg.AsyncConnection.connect(self.connection.info.dsn, autocommit=True) as look:
            while await (await look.execute(caught_up.encode())).fetchone() != (True,):
                await asyncio.sleep(0.002)

    async def begin(self) -> None:
        self.then_was = dict(self.stage.truth)
        if self.model == Standby():
            self.open = self.flags.atransaction(self.connection, shard=self.stage.shard, write=False)
            self.state = (await self.open.__aenter__())[FLAG]
            return
        await self.connection.execute("BEGIN")
        if self.model.flag_from == "primary":
            self.state = State(self.stage.value("SELECT state FROM shardmig.flag"))
        else:
            row = await (await self.connection.execute("SELECT state FROM shardmig.flag")).fetchone()
            self.state = State(row[0]) if row else None

    async def read(self, key: str) -> None:
        """Read as the state says."""
        assert self.state is not None
        asked = await self.connection.execute(self.stage.moved.query(self.state, int(key)).encode())
        found = self.stage.moved.read_from(await asked.fetchone(), self.state)
        truth = self.then_was if self.model == Standby() else self.stage.truth
        if problem := wrong(found, truth[int(key)], self.state):
            self.stage.played.wrong.append(f"the reader on the standby reads {problem} there")
