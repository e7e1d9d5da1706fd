"""
Real PostgreSQL for every test: four servers a run, a fresh database on each for each test that asks.

Under pytest-xdist every worker has its own four. Roles exist on every server: `shop_owner` owns each fresh database
(and so its schema `public`), `shop_migrator` may become `shop_owner`, `shop_app` owns nothing; each one's password,
asked for over TCP only, is its name.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import psycopg
import pytest
import pytest_asyncio
from psycopg import sql
from psycopg.conninfo import make_conninfo

from shardmig import local
from shardmig.config import Config, Shard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

NAMES = ("eu1", "eu2", "us1", "us2")
ROLES = """
    CREATE ROLE shop_owner LOGIN PASSWORD 'shop_owner';
    CREATE ROLE shop_migrator LOGIN PASSWORD 'shop_migrator' IN ROLE shop_owner;
    CREATE ROLE shop_app LOGIN PASSWORD 'shop_app';
"""

_numbers = count(1)


class Connect(Protocol):
    """Open a raw connection that is closed after the test; keywords go above the URL's, as `user="shop_app"`."""

    def __call__(
        self, target: Shard | local.Server | str, *, autocommit: bool = True, **keywords: Any
    ) -> psycopg.Connection[Any]: ...


class AsyncConnect(Protocol):
    """The async twin of `Connect`."""

    def __call__(
        self, target: Shard | local.Server | str, *, autocommit: bool = True, **keywords: Any
    ) -> Awaitable[psycopg.AsyncConnection[Any]]: ...


@pytest.fixture(scope="session")
def servers() -> Iterator[list[local.Server]]:
    """Four running servers named eu1, eu2, us1 and us2, for the whole run: stop none of them."""
    with local.cluster(NAMES) as started:
        for server in started:
            with psycopg.connect(server.url(), autocommit=True) as connection:
                connection.execute(ROLES)
        yield started


@pytest.fixture(scope="session")
def admins(servers: list[local.Server]) -> Iterator[dict[str, psycopg.Connection[Any]]]:
    """Keep a connection to each server, by its name: two thousand tests create a database, and most of that was it."""
    with ExitStack() as closing:
        yield {server.name: closing.enter_context(psycopg.connect(server.url(), autocommit=True)) for server in servers}


@pytest.fixture
def fresh_database(admins: dict[str, psycopg.Connection[Any]]) -> Iterator[Callable[[local.Server], str]]:
    """Create this test's own database on a server; asked again for the same server it is the same database."""
    name = f"test{next(_numbers)}"
    created: dict[str, local.Server] = {}

    def create(server: local.Server) -> str:
        if server.name not in created:
            created[server.name] = server
            strategy = "STRATEGY FILE_COPY" if server.major >= 15 else ""
            admins[server.name].execute(f"CREATE DATABASE {name} OWNER shop_owner {strategy}".encode())
        return server.url(name)

    yield create
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda server: _drop(server, admins[server.name], name), created.values()))


def _drop(server: local.Server, admin: psycopg.Connection[Any], name: str) -> None:
    """Drop a database even when a test left prepared transactions in it."""
    if left := admin.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s", [name]).fetchall():
        with psycopg.connect(server.url(name), autocommit=True) as connection:
            for (gid,) in left:
                connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def databases(servers: list[local.Server], fresh_database: Callable[[local.Server], str]) -> dict[str, str]:
    """Return the superuser's URL of a fresh, empty database on each server, by the server's name."""
    with ThreadPoolExecutor() as pool:
        urls = pool.map(fresh_database, servers)
        return {server.name: url for server, url in zip(servers, urls, strict=True)}


@pytest.fixture
def shards(databases: dict[str, str]) -> dict[str, Shard]:
    """Return four empty shards: eu1 (the canary), eu2, us1, us2."""
    return {name: _shard(name, url) for name, url in databases.items()}


@pytest.fixture
def shard(servers: list[local.Server], fresh_database: Callable[[local.Server], str]) -> Shard:
    """Return one empty shard; the same as `shards["eu1"]`."""
    return _shard(servers[0].name, fresh_database(servers[0]))


def _shard(name: str, url: str) -> Shard:
    canary = "canary" if name == NAMES[0] else None
    return Shard.model_validate({"name": name, "url": url, "wave": canary, "tags": [name[:2]]})


@pytest.fixture
def config(shards: dict[str, Shard], tmp_path: Path) -> Callable[..., Config]:
    """Make a Config over the four shards, rooted in tmp_path: `config(session={"owner": "shop_owner"})`."""
    unasked = {"rollout": {"require_aware": False}}  # few tests are about that word
    return lambda **sections: Config.model_validate({"root": tmp_path, "shards": shards, **unasked, **sections})


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open raw psycopg connections: `connect(shard, user="shop_app")`."""
    with ExitStack() as closing:

        def open_one(
            target: Shard | local.Server | str, *, autocommit: bool = True, **keywords: Any
        ) -> psycopg.Connection[Any]:
            connection = psycopg.connect(make_conninfo(_url(target), **keywords), autocommit=autocommit)
            closing.callback(connection.close)
            return connection

        yield open_one


@pytest_asyncio.fixture
async def aconnect() -> AsyncIterator[AsyncConnect]:
    """Open raw async connections, as `connect` does sync ones."""
    async with AsyncExitStack() as closing:

        async def open_one(
            target: Shard | local.Server | str, *, autocommit: bool = True, **keywords: Any
        ) -> psycopg.AsyncConnection[Any]:
            conninfo = make_conninfo(_url(target), **keywords)
            connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=autocommit)
            closing.push_async_callback(connection.close)
            return connection

        yield open_one


def _url(target: Shard | local.Server | str) -> str:
    match target:
        case Shard():
            return target.url.get_secret_value()
        case local.Server():
            return target.url()
        case str():
            return target
