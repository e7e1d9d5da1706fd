"""Fleets for tests: a small history, and any number of databases over the four servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg

from shardmig.config import Config, Shard
from shardmig.fleet import Fleet
from shardmig.lint import History
from shardmig.plan import AcceptedPlan, Move, Plan, Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardmig.local import Server

__all__ = ["COLUMN", "NOTE", "SHOP", "UPPER", "accepted", "fleet_of", "many", "plan", "run", "upper"]


def plan(revision: str, *steps: Statement | Move | Switch, parent: str | None = None, **more: Any) -> Plan:
    """Make a plan; its flag is its revision without the number unless another one is given."""
    named = {"flag": revision.partition("_")[2], **more}
    return Plan(revision=revision, parent=parent, script_sha256="0" * 64, steps=steps, **named)


def upper(forward: str) -> Plan:
    """Make the plan of `UPPER` with another way to move name into upper_name."""
    move = Move(
        table="customer",
        key=("id",),
        writes=("upper_name",),
        forward=forward,
        check="SELECT id FROM customer WHERE {batch} AND upper_name IS DISTINCT FROM upper(name)",
    )
    column = Statement(sql="ALTER TABLE customer ADD COLUMN upper_name text")
    return plan("0002_upper", column, Switch(to=State.DUAL), move, Switch(to=State.LIVE), parent="0001_shop")


SHOP = plan(
    "0001_shop", Statement(sql="CREATE TABLE customer (id bigint PRIMARY KEY, name text)"), Switch(to=State.LIVE)
)
UPPER = upper("UPDATE customer SET upper_name = upper(name) WHERE {batch}")
COLUMN = plan(
    "0002_note",
    Statement(sql="ALTER TABLE customer ADD COLUMN note text"),
    Switch(to=State.LIVE),
    parent="0001_shop",
)
NOTE = COLUMN.model_copy(update={"revision": "0003_note", "parent": "0002_upper"})


def accepted(*plans: Plan) -> list[AcceptedPlan]:
    history, made = History(Config().lint), []
    for one in plans:
        made.append(history.accept(one))
        history.add(one)
    return made


def fleet_of(shards: Sequence[Shard], *plans: Plan, **sections: Any) -> Fleet:
    """Make a fleet: `fleet_of(shards, SHOP, UPPER, rollout={"waves": "all"})`."""
    rollout = {"require_aware": False, **sections.pop("rollout", {})}
    config = Config.model_validate({"shards": {shard.name: shard for shard in shards}, "rollout": rollout, **sections})
    return Fleet(config, accepted(*plans), list(shards), jobs=config.rollout.jobs)


def run(shard: Shard, sql: str) -> list[tuple[Any, ...]]:
    """Run one text on a shard, as its superuser; the rows of the last statement that has some."""
    with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


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
