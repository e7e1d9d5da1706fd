"""What tests of flags and moves share: a shard with a plan begun on it, and the moves themselves."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardmig import ledger, switching
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.moves import MoveRun
from shardmig.plan import Move, Plan, Switch
from shardmig.records import read_records
from shardmig.session import open_session
from shardmig.states import State
from shardmig.turn import Turn, begin_migration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import psycopg

    from shardmig.checks import Direction
    from shardmig.events import Event
    from shardmig.records import FlagRow, StepRow
    from shardmig.session import Session

__all__ = [
    "FLAG",
    "REVISION",
    "VERSIONS",
    "Moving",
    "blocked",
    "customers",
    "moving",
    "notes",
    "plan_of",
    "same_table",
    "second_table",
]

VERSIONS = (12, 19)
REVISION = "0002_x"
FLAG = "x"


def same_table(table: str = "t", key: tuple[str, ...] = ("id",), **more: Any) -> Move:
    """Move a into b, upper case; every forward counts itself in n."""
    keys = ", ".join(key)
    values: dict[str, Any] = {
        "table": table,
        "key": key,
        "writes": ("b",),
        "restores": ("a",),
        "forward": f"UPDATE {table} SET b = upper(a), n = coalesce(n, 0) + 1 WHERE {{batch}}",
        "check": f"SELECT {keys} FROM {table} WHERE {{batch}} AND b IS DISTINCT FROM upper(a)",
        "back": f"UPDATE {table} SET a = lower(b) WHERE {{batch}}",
        "back_check": f"SELECT {keys} FROM {table} WHERE {{batch}} AND a IS DISTINCT FROM lower(b)",
    }
    return Move(**{**values, **more})


def second_table(key: tuple[str, ...] = ("id",), target_key: tuple[str, ...] = ("t_id",), **more: Any) -> Move:
    """Move a of t into a of u, whose rows carry t's key; u.n counts the moves of a row."""
    keys, held = ", ".join(key), ", ".join(target_key)
    match = " AND ".join(f"u.{h} = t.{k}" for h, k in zip(target_key, key, strict=True))
    values: dict[str, Any] = {
        "table": "t",
        "key": key,
        "target": "u",
        "target_key": target_key,
        "writes": ("a",),
        "restores": ("a",),
        "forward": (
            f"WITH source AS MATERIALIZED (SELECT {keys}, a FROM t WHERE {{batch}} FOR SHARE) "
            f"INSERT INTO u ({held}, a, n) SELECT {keys}, a, 1 FROM source "
            f"ON CONFLICT ({held}) DO UPDATE SET a = excluded.a, n = coalesce(u.n, 0) + 1"
        ),
        "check": (
            f"WITH source AS MATERIALIZED (SELECT {keys}, a FROM t WHERE {{batch}}) "
            f"SELECT {', '.join(f't.{k}' for k in key)} FROM source t LEFT JOIN u ON {match} "
            f"WHERE u.{target_key[0]} IS NULL OR u.a IS DISTINCT FROM t.a"
        ),
        "orphans": f"SELECT {held} FROM u WHERE {{batch}} AND NOT EXISTS (SELECT FROM t WHERE {match})",
        "purge": f"DELETE FROM u WHERE {{batch}} AND NOT EXISTS (SELECT FROM t WHERE {match})",
    }
    return Move(**{**values, **more})


@dataclass
class Moving:
    """A shard whose plan holds one move, and whoever works on it."""

    turn: Turn
    plan: Plan
    move: Move

    @property
    def session(self) -> Session:
        return self.turn.session

    @property
    def number(self) -> int:
        return self.plan.moves[0][0]

    async def flag(self) -> FlagRow:
        return await switching.read_flag(self.session, FLAG)

    async def step(self) -> StepRow:
        records = await read_records(self.session)
        assert records is not None
        return records.steps[REVISION, self.number]

    async def to(self, target: State, *, drain: bool = True) -> FlagRow:
        """Take one edge and drain behind it."""
        row = await switching.flip(self.turn, await self.flag(), target)
        return await switching.drain(self.turn, row) if drain else row

    def run(self, direction: Direction = "forward", *, move: Move | None = None, **more: Any) -> MoveRun:
        pace = more.pop("pace", Pace())
        return MoveRun(self.turn, REVISION, self.number, move or self.move, direction, pace, **more)

    async def finish(self, column: str = "new_valid") -> None:
        """Record that the rows are moved, as the runner does, and that they were compared, be it so or not."""
        direction = "forward" if column == "new_valid" else "back"
        await self.session.execute(
            "UPDATE shardmig.step SET checked_at = clock_timestamp(), direction = $1 WHERE kind = 'move'", [direction]
        )
        await self.session.execute(f"UPDATE shardmig.flag SET {column} = true WHERE flag = $1", [FLAG])

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return (await self.session.execute(sql)).rows


def plan_of(*moves: Move) -> Plan:
    return Plan(
        revision=REVISION,
        parent=None,
        flag=FLAG,
        script_sha256="0" * 64,
        steps=(Switch(to=State.DUAL), *moves, Switch(to=State.LIVE)),
    )


@asynccontextmanager
async def moving(
    shard: Shard, move: Move, *statements: str, settings: SessionSettings | None = None, dual: bool = True
) -> AsyncIterator[Moving]:
    """Open a session, run statements, begin a plan with this move, and take its flag to DUAL."""
    async with open_session(shard, settings or SessionSettings(), pg_versions=VERSIONS) as session:
        for statement in statements:
            await session.execute(statement)
        await ledger.install(session)
        turn = await Turn.take(session)
        plan = plan_of(move)
        await session.flight(begin_migration(shard.name, plan, position=1, text="x"))
        here = Moving(turn, plan, move)
        if dual:
            await here.to(State.DUAL)
        yield here


async def blocked(look: psycopg.Connection[Any], pid: int) -> None:
    """Wait until a server process waits for a lock."""
    async with asyncio.timeout(10):
        while not look.execute("SELECT FROM pg_locks WHERE pid = %s AND NOT granted", [pid]).fetchall():
            await asyncio.sleep(0.001)


def customers(rows: int) -> str:
    """Fill t with rows whose a is x1, x2, …"""
    return f"INSERT INTO t (id, a) SELECT g, 'x' || g FROM generate_series(1, {rows}) g"


def notes() -> tuple[list[Event], Callable[[Event], None]]:
    """Return a list and a listener that fills it."""
    heard: list[Event] = []
    return heard, heard.append
