"""Shards that are schemas of one database: one ledger for all, each with its own rows, flags and runner."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fleets import SHOP, UPPER, fleet_of

from shardmig.config import Shard
from shardmig.outcomes import Outcome
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

    from shardmig.local import Server


@pytest.fixture
def tenants(
    servers: list[Server],
    fresh_database: Callable[[Server], str],
    connect: Callable[..., psycopg.Connection[Any]],
    size: int,
) -> list[Shard]:
    """Return schemas of one database as shards."""
    url = fresh_database(servers[0])
    connection = connect(url)
    for number in range(size):
        connection.execute(f"CREATE SCHEMA tenant{number}")
    return [
        Shard.model_validate({"name": f"t{number}", "url": url, "schema": f"tenant{number}"}) for number in range(size)
    ]


@pytest.mark.parametrize("size", [10, pytest.param(200, marks=pytest.mark.long)])
async def test_schemas_of_one_database_are_walked_like_databases(
    tenants: list[Shard], connect: Callable[..., psycopg.Connection[Any]], size: int
) -> None:
    connection = connect(tenants[0])
    assert (await fleet_of(tenants, SHOP, rollout={"jobs": 8}).apply()).done
    for number in range(size):
        connection.execute(
            f"INSERT INTO tenant{number}.customer SELECT n, 'c' || n FROM generate_series(1, {number}) AS n"
        )

    # One tenant's row blocks nobody else's structure; one is switched back, the others stay.
    assert (await fleet_of(tenants, SHOP, UPPER, rollout={"jobs": 8}).apply()).done
    assert (await fleet_of(tenants[3:4], SHOP, UPPER).switch("upper", State.DUAL)).done

    states = dict(connection.execute("SELECT shard, state FROM shardmig.flag WHERE flag = 'upper'").fetchall())
    assert {f"t{number}": State.DUAL if number == 3 else State.LIVE for number in range(size)} == states
    for number in range(size):
        assert (number, 0) == connection.execute(
            f"SELECT count(*), count(*) FILTER (WHERE upper_name IS DISTINCT FROM upper(name)) "
            f"FROM tenant{number}.customer"
        ).fetchone()
    assert [(size,)] == connection.execute("SELECT count(DISTINCT shard) FROM shardmig.migration").fetchall()
    assert [Outcome.PENDING if n == 3 else Outcome.DONE for n in range(size)] == [
        one.outcome for one in await fleet_of(tenants, SHOP, UPPER).status()
    ]


@pytest.mark.parametrize("size", [2])
async def test_a_schema_is_one_shard_and_a_shard_one_schema(tenants: list[Shard]) -> None:
    await fleet_of(tenants, SHOP).apply()
    swapped = [
        tenants[0].model_copy(update={"schema_name": "tenant1"}),
        tenants[1].model_copy(update={"schema_name": "tenant0"}),
    ]

    assert [Outcome.WRONG_SHARD] * 2 == [one.outcome for one in await fleet_of(swapped, SHOP).status()]


@pytest.mark.parametrize("size", [2])
async def test_a_drain_waits_for_the_whole_database_and_says_who_is_open(
    tenants: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """PostgreSQL does not tell which schema an open transaction will touch, so every one counts."""
    await fleet_of(tenants, SHOP).apply()
    elsewhere = connect(tenants[1], autocommit=False, application_name="other_tenant")
    elsewhere.execute("SELECT 1 FROM tenant1.customer")

    [report] = await fleet_of(tenants[:1], SHOP, UPPER, session={"drain_timeout_s": 0.3}).apply()

    assert Outcome.PARKED is report.outcome
    assert "other_tenant" in report.reason
    elsewhere.rollback()
    assert (await fleet_of(tenants[:1], SHOP, UPPER).apply()).done


@pytest.mark.parametrize("size", [4])
async def test_a_new_schema_is_provisioned_beside_open_transactions(
    tenants: list[Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    assert (await fleet_of(tenants[:3], SHOP, UPPER).apply()).done
    open_one = connect(tenants[0], autocommit=False)
    open_one.execute("SELECT 1 FROM tenant0.customer")
    fleet = fleet_of(tenants, SHOP, UPPER)
    fleet.targets = tenants[3:]

    report = await asyncio.wait_for(fleet.provision(), 20)

    assert report.done, list(report)
    assert [(State.LIVE,)] == connect(tenants[0]).execute(
        "SELECT state FROM shardmig.flag WHERE shard = 't3' AND flag = 'upper'"
    ).fetchall()
