"""A shard restored from an older backup, under the same name and URL: the process that knew it better is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from flag_doors import AsyncDoor, Ledger, SyncDoor, install
from psycopg import sql

from shardmig import Flag, Flags, ShardBehind, State, UnknownFlag

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Connect
    from flag_doors import Door

    from shardmig import local
    from shardmig.config import Shard

LIVE_ONLY = Flag("split_name", at_least=State.LIVE)
NOTE = "CREATE TABLE note (id int PRIMARY KEY); GRANT ALL ON note TO PUBLIC"


@pytest.fixture
def shard_in_dual(shard: Shard, connect: Connect) -> Shard:
    """Leave a shard whose migration moves rows just now."""
    asyncio.run(install(shard))
    connection = connect(shard)
    connection.execute(NOTE)
    Ledger(connection, "eu1").add("split_name", State.DUAL)
    connection.close()
    return shard


@pytest.fixture
def backup(servers: list[local.Server], shard_in_dual: Shard) -> Callable[[], None]:
    """Take a backup, file by file; the function puts it in the place of the shard's database, as a restore does."""
    name = psycopg.conninfo.conninfo_to_dict(shard_in_dual.url.get_secret_value())["dbname"]
    kept = f"{name}_backup"
    servers[0].create_database(kept, template=str(name))

    def restore() -> None:
        with psycopg.connect(servers[0].url(), autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(str(name))))
            rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
            admin.execute(rename.format(sql.Identifier(kept), sql.Identifier(str(name))))

    return restore


@pytest.fixture(params=[SyncDoor, AsyncDoor], ids=["sync", "async"])
def door(request: pytest.FixtureRequest, connect: Any, aconnect: Any) -> Door:
    made: Door = request.param(connect, aconnect)
    return made


@pytest.mark.parametrize("at_least", [State.LIVE, None])
async def test_a_shard_restored_from_an_older_backup_is_behind_the_release(
    door: Door, shard_in_dual: Shard, backup: Callable[[], None], connect: Connect, *, at_least: State | None
) -> None:
    """Its epochs are those of before, and what this process remembers of them must not let it write."""
    flag = LIVE_ONLY if at_least else Flag("split_name")
    flags = Flags(flag, release="8")
    before = await door.connect(shard_in_dual)
    if at_least is None:
        async with door.transaction(flags, before, shard="eu1") as view:
            assert State.DUAL is view[flag]
    live = connect(shard_in_dual)
    Ledger(live, "eu1").walk("split_name", State.LIVE)
    async with door.transaction(flags, before, shard="eu1") as view:
        assert State.LIVE is view[flag]

    backup()

    after = await door.connect(shard_in_dual)
    if at_least is None:
        async with door.transaction(flags, after, shard="eu1") as view:
            assert State.DUAL is view[flag]
        return
    for _ in range(2):  # read, then remembered
        with pytest.raises(ShardBehind, match=r"release 8.*split_name DUAL"):
            async with door.transaction(flags, after, shard="eu1"):
                await door.run(after, "INSERT INTO note VALUES (1)")
    assert [] == connect(shard_in_dual).execute("SELECT id FROM note").fetchall()


async def test_a_typo_is_an_error_and_what_was_written_before_it_is_rolled_back(
    door: Door, shard_in_dual: Shard, connect: Connect
) -> None:
    connection = await door.connect(shard_in_dual)

    with pytest.raises(UnknownFlag, match="split_nmae"):  # noqa: PT012 - what came before it is the point
        async with door.transaction(Flags(Flag("split_name")), connection, shard="eu1") as view:
            await door.run(connection, "INSERT INTO note VALUES (1)")
            assert view[Flag("split_nmae")]
    assert [] == connect(shard_in_dual).execute("SELECT id FROM note").fetchall()
