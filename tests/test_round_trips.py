"""How often a runner waits for the server: counted by a proxy, so that a chatty runner is noticed on a fast machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fleets import COLUMN, SHOP, fleet_of, plan
from servers import FaultProxy

from shardmig.config import Shard
from shardmig.plan import Plan, Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.local import Server

TABLES = plan(
    "0002_tables",
    *(Statement(sql=f"CREATE TABLE t{number} (id bigint PRIMARY KEY)") for number in range(10)),
    Switch(to=State.LIVE),
    parent="0001_shop",
)


@pytest.fixture
def proxied(servers: list[Server], fresh_database: Callable[[Server], str]) -> Iterator[tuple[FaultProxy, Shard]]:
    """Return a shard behind a proxy with a delay, which is what makes flights countable."""
    database = fresh_database(servers[0]).partition("?")[0].rpartition("/")[2]
    with FaultProxy(servers[0]) as proxy:
        proxy.delay(0.02)
        yield proxy, Shard.model_validate({"name": "eu1", "url": proxy.url(database)})


@pytest.mark.parametrize(
    ("migration", "most"),
    [
        (COLUMN, 7),  # startup, self-checks with the ledger, preflight, turn and plan, ALTER, flip, end
        (TABLES, 7),  # ten statements that lock nothing are one flight
    ],
    ids=["a column", "ten tables"],
)
async def test_a_small_migration_waits_for_the_server_a_known_number_of_times(
    proxied: tuple[FaultProxy, Shard], migration: Plan, most: int
) -> None:
    proxy, shard = proxied
    assert (await fleet_of([shard], SHOP).apply()).done
    proxy.round_trips = 0

    assert (await fleet_of([shard], SHOP, migration).apply()).done

    assert most == proxy.round_trips


async def test_a_shard_with_nothing_to_do_and_a_look_at_it_cost_two(proxied: tuple[FaultProxy, Shard]) -> None:
    proxy, shard = proxied
    fleet = fleet_of([shard], SHOP)
    assert (await fleet.apply()).done
    for ask in (fleet.apply, fleet.status):
        proxy.round_trips = 0
        await ask()

        assert 2 == proxy.round_trips, "startup, self-checks with the ledger; a password adds two"


async def test_ddl_its_record_and_its_commit_leave_in_one_flight(proxied: tuple[FaultProxy, Shard]) -> None:
    """No lock is ever held while the network is waited for: nothing is heard between the ALTER and its COMMIT."""
    proxy, shard = proxied
    assert (await fleet_of([shard], SHOP).apply()).done
    proxy.statements.clear()
    waits = [(0, 0)]
    proxy.statements = _Noting(lambda: waits.append((len(proxy.statements), proxy.round_trips)))

    assert (await fleet_of([shard], SHOP, COLUMN).apply()).done

    at = dict(waits)
    [ddl] = [number for number, sql in enumerate(proxy.statements, 1) if sql.startswith("ALTER TABLE")]
    commit = next(n for n, sql in enumerate(proxy.statements, 1) if n > ddl and sql.startswith("COMMIT"))
    assert at[ddl] == at[commit]


class _Noting(list[str]):
    """A list that says when something is appended."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def append(self, item: str) -> None:
        super().append(item)
        self._note()
