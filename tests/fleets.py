"""Fleets for tests: a small history, and any number of databases over the four servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shardmig.config import Config, Shard
from shardmig.fleet import Fleet
from shardmig.lint import History
from shardmig.plan import AcceptedPlan, Move, Plan, Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardmig.local import Server

__all__ = ["NOTE", "SHOP", "UPPER", "accepted", "fleet_of", "many", "plan"]


def plan(revision: str, *steps: Statement | Move | Switch, parent: str | None = None, **more: Any) -> Plan:
    """Make a plan whose flag is its revision without the number."""
    return Plan(
        revision=revision,
        parent=parent,
        flag=revision.partition("_")[2],
        script_sha256="0" * 64,
        steps=steps,
        **more,
    )


SHOP = plan(
    "0001_shop", Statement(sql="CREATE TABLE customer (id bigint PRIMARY KEY, name text)"), Switch(to=State.LIVE)
)
UPPER = plan(
    "0002_upper",
    Statement(sql="ALTER TABLE customer ADD COLUMN upper_name text"),
    Switch(to=State.DUAL),
    Move(
        table="customer",
        key=("id",),
        writes=("upper_name",),
        forward="UPDATE customer SET upper_name = upper(name) WHERE {batch}",
        check="SELECT id FROM customer WHERE {batch} AND upper_name IS DISTINCT FROM upper(name)",
    ),
    Switch(to=State.LIVE),
    parent="0001_shop",
)
NOTE = plan(
    "0003_note",
    Statement(sql="ALTER TABLE customer ADD COLUMN note text"),
    Switch(to=State.LIVE),
    parent="0002_upper",
)


def accepted(*plans: Plan) -> list[AcceptedPlan]:
    history, made = History(Config().lint), []
    for one in plans:
        made.append(history.accept(one))
        history.add(one)
    return made


def fleet_of(shards: Sequence[Shard], *plans: Plan, **sections: Any) -> Fleet:
    """Make a fleet: `fleet_of(shards, SHOP, UPPER, rollout={"waves": "all"})`."""
    config = Config.model_validate({"shards": {shard.name: shard for shard in shards}, **sections})
    return Fleet(config, accepted(*plans), list(shards), jobs=config.rollout.jobs)


@contextmanager
def many(servers: Sequence[Server], count: int, prefix: str, **more: Any) -> Iterator[list[Shard]]:
    """Create databases round the servers, named like `prefix03`, and drop them at the end; the first is no canary."""
    names = [f"{prefix}{number:03}" for number in range(count)]
    with ThreadPoolExecutor(8) as pool:
        urls = list(
            pool.map(
                lambda place: servers[place[0] % len(servers)].create_database(place[1], owner="shop_owner"),
                enumerate(names),
            )
        )
        try:
            yield [
                Shard.model_validate({"name": name, "url": url, **more}) for name, url in zip(names, urls, strict=True)
            ]
        finally:
            list(
                pool.map(
                    lambda place: servers[place[0] % len(servers)].drop_database(place[1]),
                    enumerate(names),
                )
            )
