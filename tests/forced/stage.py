"""
The stage of a forced schedule: a shard, its runner, three processes, and somebody who looks.

A schedule is a text of steps, "A: put 1". After each one the stage waits until everybody is through or waits, and the
server says who does: nothing sleeps.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
from model.fences import Standby
from moving import VERSIONS, moving
from psycopg.conninfo import make_conninfo

from forced.actors import Actor, App, Played, Reader, wrong
from forced.doors import door_for
from forced.mutations import rows_of, weaken_ledger
from forced.runners import Mate, Runner
from forced.tables import KEYS, moved
from shardmig.config import SessionSettings, Shard
from shardmig.session import open_session
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Connect

    from forced.doors import Isolation
    from forced.mutations import Model
    from shardmig import local

__all__ = ["Stage", "play"]

_ALSO = """
CREATE TABLE gate ();
CREATE TABLE lease (state int, until timestamptz DEFAULT clock_timestamp() + '1 h');
GRANT ALL ON ALL TABLES IN SCHEMA public TO shop_app
"""


class Stage:
    """
    A shard with the tables of a model, its runner, and its applications.

    Attributes:
        model: what is played: the protocol, or what becomes of it with one thing changed.
        shard: the shard's name.
        rows: its settings about rows.
        truth: what the application last wrote, by key.
    """

    def __init__(self, model: Model, shard: str, look: psycopg.Connection[Any]) -> None:
        self.model = model
        self.shard = shard
        self.rows = rows_of(model)
        self.moved = moved(self.rows)
        self.truth = self.moved.first
        self.played = Played()
        self.look = look
        self.database = look.info.dbname
        self.actors: dict[str, Actor] = {}
        self._written = 0

    @property
    def apps(self) -> dict[str, App]:
        """The applications by name."""
        return {name: actor for name, actor in self.actors.items() if isinstance(actor, App)}

    def next_value(self, name: str) -> str:
        """Return a value that nobody wrote before."""
        self._written += 1
        return f"{name}{self._written}"

    def row(self, sql: str) -> tuple[Any, ...]:
        """Ask the shard for one row."""
        row: tuple[Any, ...] | None = self.look.execute(sql.encode()).fetchone()
        assert row is not None
        return row

    def value(self, sql: str) -> Any:
        """Ask the shard one thing."""
        return self.row(sql)[0]

    async def run(self, schedule: str) -> Played:
        """Play a schedule to its end, and judge."""
        for line in filter(None, map(str.strip, schedule.splitlines())):
            name, _, step = line.partition(": ")
            verb, *arguments = step.split()
            actor = self.actors[name]
            actor.then(partial(getattr(actor, verb), *arguments))
            await self._settle()
        for app in self.apps.values():
            app.then(app.leave)
        async with asyncio.timeout(20):
            for actor in self.actors.values():
                if actor.task is not None:
                    await actor.task
        self._judge()
        return self.played

    async def _settle(self) -> None:
        """Return when everybody is through or waits, and stays so."""
        async with asyncio.timeout(20):
            standing = await self._standing()
            while standing != (again := await self._standing()):
                standing = again

    async def _standing(self) -> tuple[bool, ...]:
        actors = list(self.actors.values())
        looks = {actor: actor.looks for actor in actors}
        while True:
            locked = {pid for (pid,) in self.look.execute("SELECT pid FROM pg_locks WHERE NOT granted")}
            # A look that was under way when the step was done does not count: two must have found somebody.
            if all(actor.through or actor.pid in locked or actor.looks > looks[actor] + 1 for actor in actors):
                return tuple(actor.through for actor in actors)
            await asyncio.sleep(0.0005)

    def _judge(self) -> None:
        """Read as whoever begins now."""
        state = State(self.value("SELECT state FROM shardmig.flag"))
        for key in KEYS:
            if problem := wrong(self.moved.reads(self.look, state, key), self.truth[key], state):
                lost = "" if self.truth[key] is None else ": a write is lost"
                self.played.wrong.append(f"whoever begins now in {state.name} reads {problem}{lost}")


@asynccontextmanager
async def play(
    shard: Shard,
    connect: Connect,
    model: Model,
    *,
    isolation: Isolation,
    weakened: bool,
    standby: local.Server | None = None,
) -> AsyncIterator[Stage]:
    """
    Set a stage.

    Args:
        shard: empty.
        connect: opens the connection that looks.
        model: what is played.
        isolation: of the applications' transactions.
        weakened: whether the ledger has lost what refuses this mutation.
        standby: of the shard's server, where the model reads from one.
    """
    stage = Stage(model, shard.name, connect(shard))
    url = shard.url.get_secret_value()
    exempt = ("shop_app",) if stage.rows.exempt else ()
    settings = SessionSettings(lock_timeout_ms=(5000,), exempt_roles=exempt)
    async with AsyncExitStack() as open_ones:
        here = await open_ones.enter_async_context(
            moving(shard, stage.moved.move, *stage.moved.made, settings=settings, dual=False)
        )
        mate = await open_ones.enter_async_context(open_session(shard, settings, pg_versions=VERSIONS, purpose="read"))
        stage.look.execute(_ALSO)
        # Applications that wait for each other are told soon; the mover goes by the server's own, longer time.
        stage.look.execute(f"ALTER ROLE shop_app IN DATABASE {stage.database} SET deadlock_timeout = '20ms'".encode())
        if weakened:
            weaken_ledger(stage.look, model)
        keeper = await _connect(url, open_ones)
        stage.actors["R"] = Runner(stage, "R", here, keeper)
        stage.actors["D"] = Mate(stage, "D", here, mate)
        for name in "ABC":
            connection = await _connect(url, open_ones, user="shop_app")
            stage.actors[name] = App(stage, name, connection, door_for(model, name)(connection, shard.name, isolation))
        if standby is not None and isinstance(model, Standby):
            there = await _connect(standby.url(stage.database), open_ones)
            stage.actors["S"] = Reader(stage, "S", there, model)
        yield stage


async def _connect(url: str, open_ones: AsyncExitStack, **keywords: str) -> psycopg.AsyncConnection[Any]:
    conninfo = make_conninfo(url, **keywords)
    connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=True)
    open_ones.push_async_callback(connection.close)
    return connection
