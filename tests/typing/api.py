"""Application code as a type checker sees it; never run, `mypy --strict` reads it."""

from __future__ import annotations

from typing import Any, assert_type

from psycopg import AsyncConnection, Connection, IsolationLevel
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from shardmig import Flag, Flags, ShardInMaintenance, State, View
from shardmig.flags import Peek
from shardmig.integrations.sqlalchemy import install

SPLIT_NAME = Flag("split_name")
ORDER_ADDRESS = Flag("order_address", at_least=State.DUAL)
flags = Flags(SPLIT_NAME, ORDER_ADDRESS, release="2026-11-22.1")


def sync_code(connection: Connection[tuple[Any, ...]]) -> int:
    try:
        with flags.transaction(connection, shard="eu1", isolation="SERIALIZABLE", deferrable=True) as view:
            assert_type(view, View)
            assert_type(view[SPLIT_NAME], State)
            assert_type(view[SPLIT_NAME].writes_new, bool)
            assert_type(view.run(SPLIT_NAME, old=lambda: 1, new=lambda: "one"), int | str)
            assert_type(flags.of(connection), View)
    except ShardInMaintenance as error:
        assert_type(error.retry_after, int)
    with flags.transaction(connection, shard="eu1", write=False, isolation=IsolationLevel.REPEATABLE_READ):
        pass
    flags.transaction(connection, shard="eu1", isolation="REPEATABLE")  # type: ignore[arg-type]
    flags.transaction(connection, "eu1")  # type: ignore[call-arg]
    flags.atransaction(connection, shard="eu1")  # type: ignore[arg-type]
    return 1  # reachable: a transaction swallows no exception


async def async_code(connection: AsyncConnection[Any]) -> int:
    async with flags.atransaction(connection, shard="eu1") as view:
        assert_type(await view.arun(SPLIT_NAME, old=number, new=text), int | str)
        view["split_name"]  # type: ignore[index]
    with flags.override(SPLIT_NAME, State.LIVE), flags.override(ORDER_ADDRESS, State.DONE, everywhere=True):
        assert_type(flags.peek("eu1", SPLIT_NAME), Peek)
    return 1


async def number() -> int:
    return 1


async def text() -> str:
    return "one"


async def sqlalchemy_code(sync_url: str, async_url: str) -> None:
    engine = install(create_engine(sync_url), flags, shard="eu1")
    aengine = install(create_async_engine(async_url), flags, shard="us1")
    assert_type(engine, Engine)
    assert_type(aengine, AsyncEngine)
    with Session(engine) as session:
        assert_type(flags.of(session)[SPLIT_NAME], State)
    async with AsyncSession(aengine) as asession:
        assert_type((await flags.aof(asession))[SPLIT_NAME], State)
