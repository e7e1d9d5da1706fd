"""
Release B: the same shop, which asks in every transaction which representation counts on this shard.

This is what application code looks like between two representations: one UPDATE for both names, and for the address,
which moves into a table of its own, old and new through `view.run`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from psycopg.sql import SQL, Identifier

from shardmig import Flag, Flags
from shardmig.demo.goods import Address, Name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection, IsolationLevel

    from shardmig import View

__all__ = ["ORDER_ADDRESS", "SPLIT_NAME", "NewDesk", "back_office_b", "release_b"]

SPLIT_NAME = Flag("split_name")
ORDER_ADDRESS = Flag("order_address")
flags = Flags(SPLIT_NAME, ORDER_ADDRESS, release="B")
back_office_flags = Flags(SPLIT_NAME, release="B")


@contextmanager
def release_b(
    connection: Connection[Any], shard: str, *, write: bool = True, isolation: IsolationLevel | None = None
) -> Iterator[NewDesk]:
    """Begin a transaction that knows the shard's flags."""
    with flags.transaction(connection, shard=shard, write=write, isolation=isolation) as view:
        yield NewDesk(connection, view)


@contextmanager
def back_office_b(
    connection: Connection[Any], shard: str, *, write: bool = True, isolation: IsolationLevel | None = None
) -> Iterator[NewDesk]:
    """
    Begin a transaction of the back office, a program that knows names and no addresses.

    It writes under REPEATABLE READ. A program that declares ORDER_ADDRESS may not, while addresses move: its snapshot
    could miss rows that the mover inserts. So programs declare the flags they act on, and no others.
    """
    with back_office_flags.transaction(connection, shard=shard, write=write, isolation=isolation) as view:
        yield NewDesk(connection, view)


class NewDesk:
    """One transaction's work, in the representations that this shard's flags ask for."""

    def __init__(self, connection: Connection[Any], view: View) -> None:
        self._execute = connection.execute
        self._view = view

    def _name_columns(self, name: Name) -> dict[str, str | None]:
        state = self._view[SPLIT_NAME]
        values: dict[str, str | None] = {}
        if state.writes_old:
            values["full_name"] = name.full
        if state.writes_new:
            values |= {"first_name": name.first, "last_name": name.last}
        return values

    def sign_up(self, name: Name) -> int:
        """Enter a customer."""
        values = self._name_columns(name)
        insert = SQL("INSERT INTO customer ({}) VALUES ({}) RETURNING id").format(
            SQL(", ").join(map(Identifier, values)), SQL(", ").join([SQL("%s")] * len(values))
        )
        found = self._execute(insert, [*values.values()]).fetchone()
        assert found is not None  # noqa: S101 - an INSERT returns its row
        return int(found[0])

    def rename(self, customer: int, name: Name) -> bool:
        """Change a name: one UPDATE, whatever has to be written."""
        values = self._name_columns(name)
        update = SQL("UPDATE customer SET {} WHERE id = %s").format(
            SQL(", ").join(SQL("{} = %s").format(Identifier(column)) for column in values)
        )
        return self._execute(update, [*values.values(), customer]).rowcount == 1

    def close_account(self, customer: int) -> list[int] | None:
        """Remove a customer and the orders."""
        if not self._execute("SELECT FROM customer WHERE id = %s FOR UPDATE", [customer]).rowcount:
            return None
        rows = self._execute("SELECT id FROM orders WHERE customer_id = %s ORDER BY id FOR UPDATE", [customer])
        orders = [order for (order,) in rows.fetchall()]
        self._remove(orders)
        self._execute("DELETE FROM customer WHERE id = %s", [customer])
        return orders

    def names(self, first: int, last: int) -> dict[int, Name]:
        """Read names from where they count."""
        if self._view[SPLIT_NAME].reads_new:
            select = "SELECT id, first_name, last_name FROM customer WHERE id BETWEEN %s AND %s"
            return {customer: Name(*name) for customer, *name in self._execute(select, [first, last])}
        rows = self._execute("SELECT id, full_name FROM customer WHERE id BETWEEN %s AND %s", [first, last])
        return {customer: Name.split(full) for customer, full in rows}

    def order(self, customer: int, address: Address) -> int | None:
        """Enter an order; its row comes first, for addresses belong to orders."""
        old = address if self._view[ORDER_ADDRESS].writes_old else Address(None, None, None)
        found = self._execute(
            "INSERT INTO orders (customer_id, amount, street, city, zip) "
            "SELECT id, 9.99, %s, %s, %s FROM customer WHERE id = %s FOR KEY SHARE RETURNING id",
            [*old, customer],
        ).fetchone()
        if found is None:
            return None
        if self._view[ORDER_ADDRESS].writes_new:
            self._write_new_address(found[0], address)
        return int(found[0])

    def readdress(self, order: int, address: Address) -> bool:
        """Send an order elsewhere; whoever holds the order's row owns its address, in whichever table."""
        if not self._execute("SELECT FROM orders WHERE id = %s FOR NO KEY UPDATE", [order]).rowcount:
            return False
        self._view.run(
            ORDER_ADDRESS,
            old=lambda: self._write_old_address(order, address),
            new=lambda: self._write_new_address(order, address),
        )
        return True

    def _write_old_address(self, order: int, address: Address) -> None:
        self._execute("UPDATE orders SET street = %s, city = %s, zip = %s WHERE id = %s", [*address, order])

    def _write_new_address(self, order: int, address: Address) -> None:
        # An upsert: the mover may or may not have been here.
        self._execute(
            "INSERT INTO order_address (order_id, street, city, zip) VALUES (%s, %s, %s, %s) "
            "ON CONFLICT (order_id) DO UPDATE SET street = excluded.street, city = excluded.city, zip = excluded.zip",
            [order, *address],
        )

    def cancel(self, order: int) -> bool:
        """Remove an order."""
        return self._remove([order]) == 1

    def _remove(self, orders: list[int]) -> int:
        removed = self._execute("DELETE FROM orders WHERE id = ANY(%s)", [orders]).rowcount
        if removed and self._view[ORDER_ADDRESS].writes_new:
            self._execute("DELETE FROM order_address WHERE order_id = ANY(%s)", [orders])
        return removed

    def addresses(self, first: int, last: int) -> dict[int, Address]:
        """Read addresses from where they count."""
        if self._view[ORDER_ADDRESS].reads_new:
            select = "SELECT order_id, street, city, zip FROM order_address WHERE order_id BETWEEN %s AND %s"
        else:
            select = "SELECT id, street, city, zip FROM orders WHERE id BETWEEN %s AND %s"
        return {order: Address(*address) for order, *address in self._execute(select, [first, last])}
