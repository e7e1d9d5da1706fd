"""
The oracle: tables beside the shop's that say what each row must be.

Whoever changes a row tells the oracle in the same transaction, and after it: the shop's own row is locked by then, so
the oracle adds no order of locks of its own. Migrations know nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from shardmig.demo.goods import Address, Name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from psycopg import Connection

__all__ = ["SCHEMA", "Oracle", "Truth", "disagreements"]

# A value of NULL: the row is gone. The version tells two writings of the same value apart.
SCHEMA = """
CREATE SCHEMA oracle;
CREATE TABLE oracle.customer (id bigint PRIMARY KEY, value text[], version bigint NOT NULL DEFAULT 1);
CREATE TABLE oracle.address (id bigint PRIMARY KEY, value text[], version bigint NOT NULL DEFAULT 1);
"""

_TELL = """
INSERT INTO oracle.{0} AS known (id, value) SELECT unnest(%s::bigint[]), %s::text[]
ON CONFLICT (id) DO UPDATE SET value = excluded.value, version = known.version + 1"""

# Both representations of both flags, whatever their state: in LIVE writers keep both.
_DISAGREEING = """
SELECT 'customer ' || id, coalesce(array_to_string(truth.value, ' '), 'nobody'),
       format('%s | %s %s', full_name, first_name, last_name)
FROM oracle.customer truth FULL JOIN customer USING (id)
WHERE truth.value IS DISTINCT FROM CASE WHEN customer.id IS NOT NULL THEN ARRAY[first_name, last_name] END
   OR array_to_string(truth.value, ' ') IS DISTINCT FROM full_name
UNION ALL
SELECT 'order ' || id, coalesce(array_to_string(truth.value, ' '), 'nothing'),
       concat_ws(' ', orders.street, orders.city, orders.zip, '|', moved.street, moved.city, moved.zip)
FROM oracle.address truth FULL JOIN orders USING (id) FULL JOIN order_address moved ON order_id = id
WHERE truth.value IS DISTINCT FROM
      CASE WHEN orders.id IS NOT NULL THEN ARRAY[orders.street, orders.city, orders.zip] END
   OR truth.value IS DISTINCT FROM
      CASE WHEN order_id IS NOT NULL THEN ARRAY[moved.street, moved.city, moved.zip] END
"""


class Truth(NamedTuple):
    """What the oracle says of some rows: their values, and a mark that changes whenever one of them does."""

    values: dict[int, Any]
    mark: tuple[tuple[int, int], ...]


class Oracle:
    """The oracle on one shard, in the transactions of one connection."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection

    def tell_name(self, customer: int, name: Name | None) -> None:
        """Say what a customer is called from this transaction on; None: the customer is gone."""
        self._tell("customer", [customer], name)

    def tell_addresses(self, orders: Iterable[int], address: Address | None) -> None:
        """Say where orders go from this transaction on; None: they are gone."""
        self._tell("address", orders, address)

    def _tell(self, subject: str, ids: Iterable[int], value: Name | Address | None) -> None:
        self._connection.execute(_TELL.format(subject), [list(ids), None if value is None else [*value]])

    def names(self, first: int, last: int) -> Truth:
        """Ask for the names of a range of customers."""
        return self._ask("customer", Name, first, last)

    def addresses(self, first: int, last: int) -> Truth:
        """Ask for the addresses of a range of orders."""
        return self._ask("address", Address, first, last)

    def _ask(self, subject: str, kind: type[Name | Address], first: int, last: int) -> Truth:
        select = f"SELECT id, version, value FROM oracle.{subject} WHERE id BETWEEN %s AND %s ORDER BY id"
        rows = self._connection.execute(select, [first, last]).fetchall()
        values = {row: kind(*value) for row, _, value in rows if value is not None}
        return Truth(values, tuple((row, version) for row, version, _ in rows))


def disagreements(connection: Connection[Any]) -> list[tuple[str, str, str]]:
    """Compare every row of a shard with the oracle: (row, what it must be, what it is) where they differ."""
    return connection.execute(_DISAGREEING).fetchall()
