"""Rows move into a second table: writers of one snapshot, who may miss one, stay out or are waited for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from fleets import fleet_of, plan

from shardmig import derivation
from shardmig.derivation import Shape
from shardmig.errors import WriteRefused
from shardmig.events import Draining
from shardmig.flags import Flag, Flags
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    import psycopg
    from conftest import Connect

    from shardmig.config import Shard
    from shardmig.events import Event

SPLIT = Flag("split")
ORDERS = "CREATE TABLE orders (id bigint PRIMARY KEY, city text, price text)"


def copy(target: str, column: str, value: str | None = None, *, touch: bool = False) -> Move:
    shape = Shape("orders", ("id",), target, ("order_id",), touch=touch)
    values = {column: value or column}
    return Move(
        table="orders",
        key=("id",),
        target=target,
        target_key=("order_id",),
        writes=(column,),
        forward=derivation.forward(shape, values),
        check=derivation.check(shape, values, {}),
        orphans=derivation.orphans(shape),
        purge=derivation.purge(shape),
        touch_source=touch,
    )


def split(*moves: Move, **more: Any) -> Plan:
    tables = (
        Statement(sql="CREATE TABLE address (order_id bigint PRIMARY KEY, city text)"),
        Statement(sql="CREATE TABLE cost (order_id bigint PRIMARY KEY, price bigint)"),
    )
    return plan("0001_split", *tables, Switch(to=State.DUAL), *moves, Switch(to=State.LIVE), **more)


@pytest.mark.parametrize("also", [True, False])
async def test_one_move_that_does_not_touch_its_source_keeps_them_out(
    shard: Shard, connect: Connect, *, also: bool
) -> None:
    """A row that it copies meanwhile would be missed, whatever the other moves of the plan touch."""
    app = connect(shard)
    app.execute(f"{ORDERS}; INSERT INTO orders VALUES (1, 'Paris', '5')")
    moves = copy("address", "city", touch=True), copy("cost", "price", "price::bigint", touch=also)
    (await fleet_of([shard], split(*moves)).apply(until=Until.DUAL, aware="1")).raise_for_failures()

    if also:
        enter(app).__exit__(None, None, None)
    else:
        with pytest.raises(WriteRefused, match="split"):
            enter(app)


async def test_an_amended_move_that_touches_its_source_no_more_waits_for_who_was_let_in(
    shard: Shard, connect: Connect
) -> None:
    """Who was let in misses the row that is copied now: he would delete it in the old table alone."""
    app, psql = connect(shard), connect(shard)
    psql.execute(f"{ORDERS}; INSERT INTO orders VALUES (1, 'Paris', '5'), (2, 'Rome', 'seven')")
    naive = split(copy("cost", "price", "price::bigint", touch=True))
    [broken] = await fleet_of([shard], naive).apply(aware="1")
    assert Outcome.FAILED is broken.outcome
    writer = enter(app)
    app.execute("SELECT count(*) FROM orders")

    fleet = fleet_of([shard], split(copy("cost", "price", "length(price)"), amends=(naive.sha256,)))
    (await fleet.amend("0001_split", reason="seven")).raise_for_failures()
    waits = asyncio.Event()

    def listen(event: Event) -> None:
        if isinstance(event, Draining):
            waits.set()

    fleet.listener = listen
    applying = asyncio.create_task(fleet.apply(aware="1"))
    await asyncio.wait_for(waits.wait(), 10)
    app.execute("DELETE FROM orders WHERE id = 1; DELETE FROM cost WHERE order_id = 1")
    writer.__exit__(None, None, None)
    (await applying).raise_for_failures()

    assert [(2, 5)] == psql.execute("SELECT order_id, price FROM cost").fetchall()


async def test_a_move_that_an_amendment_adds_moves_its_rows_before_live(shard: Shard, connect: Connect) -> None:
    """All that was planned before is moved, and new valid, but not by the new plan."""
    psql = connect(shard)
    psql.execute(f"{ORDERS}; INSERT INTO orders VALUES (1, 'Paris', '5')")
    first, second = copy("address", "city"), copy("cost", "price", "price::bigint")
    short, amended = split(first), split(first, second, amends=(split(first).sha256,))
    (await fleet_of([shard], short).apply(until=Until.MOVED, aware="1")).raise_for_failures()
    (await fleet_of([shard], amended).amend("0001_split", reason="costs, too")).raise_for_failures()
    (await fleet_of([shard], amended).apply(aware="1")).raise_for_failures()

    assert [(1, 5)] == psql.execute("SELECT order_id, price FROM cost").fetchall()
    assert [(1, "Paris")] == psql.execute("SELECT order_id, city FROM address").fetchall()


async def test_where_readers_read_new_already_no_move_may_be_added(shard: Shard, connect: Connect) -> None:
    connect(shard).execute(f"{ORDERS}; INSERT INTO orders VALUES (1, 'Paris', '5')")
    first, second = copy("address", "city"), copy("cost", "price", "price::bigint")
    (await fleet_of([shard], split(first)).apply(until=Until.MOVED, aware="1")).raise_for_failures()
    connect(shard).execute("SELECT shardmig.switch('split', 'LIVE', 'now')")
    amended = fleet_of([shard], split(first, second, amends=(split(first).sha256,)))
    [report] = await amended.amend("0001_split", reason="costs, too")

    assert Outcome.PLAN_CHANGED is report.outcome
    assert "0001_split is finished there" in report.reason
    assert "did not move orders as the committed one does" in report.reason


async def test_an_amendment_adds_no_move_where_the_plan_is_finished(shard: Shard, connect: Connect) -> None:
    """It would be as good as done, and readers of new would miss what nobody has moved."""
    connect(shard).execute(f"{ORDERS}; INSERT INTO orders VALUES (1, 'Paris', '5')")
    first, second = copy("address", "city"), copy("cost", "price", "price::bigint")
    (await fleet_of([shard], split(first)).apply(aware="1")).raise_for_failures()

    reworded, amends = copy("address", "city", "upper(city)"), (split(first).sha256,)
    longer = await fleet_of([shard], split(first, second, amends=amends)).apply(aware="1")
    other = await fleet_of([shard], split(reworded, amends=amends)).apply(aware="1")

    assert [Outcome.PLAN_CHANGED, Outcome.DONE] == [one.outcome for (one,) in (longer, other)]


def enter(app: psycopg.Connection[Any]) -> Any:
    """Begin a transaction that writes in one snapshot."""
    transaction = Flags(SPLIT).transaction(app, shard="eu1", isolation="REPEATABLE READ")
    transaction.__enter__()
    return transaction
