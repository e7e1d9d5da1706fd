"""
Release A: the code that serves when the story begins.

It knows neither the new columns nor flags nor shardmig, and nobody edits it: while structure is added beneath it, it
has to go on working as it is.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shardmig.demo.goods import Address, Name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection, IsolationLevel

__all__ = ["OldDesk", "release_a"]


@contextmanager
def release_a(
    connection: Connection[Any], shard: str, *, write: bool = True, isolation: IsolationLevel | None = None
) -> Iterator[OldDesk]:
    """Begin a transaction as applications do; the shard's name is of no interest yet."""
    del shard
    connection.read_only = not write
    connection.isolation_level = isolation
    with connection.transaction():
        yield OldDesk(connection)


class OldDesk:
    """One transaction's work: a name is one text, an address belongs to its order."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._execute = connection.execute

    def sign_up(self, name: Name) -> int:
        """Enter a customer."""
        found = self._execute("INSERT INTO customer (full_name) VALUES (%s) RETURNING id", [name.full]).fetchone()
        assert found is not None  # noqa: S101 - an INSERT returns its row
        return int(found[0])

    def rename(self, customer: int, name: Name) -> bool:
        """Change a name."""
        return self._execute("UPDATE customer SET full_name = %s WHERE id = %s", [name.full, customer]).rowcount == 1

    def close_account(self, customer: int) -> list[int] | None:
        """Remove a customer and the orders."""
        if not self._execute("SELECT FROM customer WHERE id = %s FOR UPDATE", [customer]).rowcount:
            return None
        rows = self._execute("SELECT id FROM orders WHERE customer_id = %s ORDER BY id FOR UPDATE", [customer])
        orders = [order for (order,) in rows.fetchall()]
        self._execute("DELETE FROM orders WHERE id = ANY(%s)", [orders])
        self._execute("DELETE FROM customer WHERE id = %s", [customer])
        return orders

    def names(self, first: int, last: int) -> dict[int, Name]:
        """Read names."""
        rows = self._execute("SELECT id, full_name FROM customer WHERE id BETWEEN %s AND %s", [first, last])
        return {customer: Name.split(full) for customer, full in rows}

    def order(self, customer: int, address: Address) -> int | None:
        """Enter an order."""
        found = self._execute(
            "INSERT INTO orders (customer_id, amount, street, city, zip) "
            "SELECT id, 9.99, %s, %s, %s FROM customer WHERE id = %s FOR KEY SHARE RETURNING id",
            [*address, customer],
        ).fetchone()
        return found and int(found[0])

    def readdress(self, order: int, address: Address) -> bool:
        """Send an order elsewhere."""
        update = "UPDATE orders SET street = %s, city = %s, zip = %s WHERE id = %s"
        return self._execute(update, [*address, order]).rowcount == 1

    def cancel(self, order: int) -> bool:
        """Remove an order."""
        return self._execute("DELETE FROM orders WHERE id = %s", [order]).rowcount == 1

    def addresses(self, first: int, last: int) -> dict[int, Address]:
        """Read addresses."""
        rows = self._execute("SELECT id, street, city, zip FROM orders WHERE id BETWEEN %s AND %s", [first, last])
        return {order: Address(*address) for order, *address in rows}
