"""The rows a shard of the shop has when the story begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardmig.demo import oracle
from shardmig.demo.goods import CITIES, FIRST_NAMES, LAST_NAMES, STREETS

if TYPE_CHECKING:
    from psycopg import Connection

__all__ = ["seed"]

_ROWS = """
CREATE TEMPORARY TABLE seed AS
SELECT n AS id,
       (%(first)s::text[])[1 + n %% cardinality(%(first)s::text[])] || n AS first_name,
       (%(last)s::text[])[1 + n / 7 %% cardinality(%(last)s::text[])] AS last_name,
       (%(street)s::text[])[1 + n %% cardinality(%(street)s::text[])] || ' ' || n %% 1000 AS street,
       (%(city)s::text[])[1 + n / 11 %% cardinality(%(city)s::text[])] AS city,
       CASE WHEN n %% 5 > 0 THEN lpad((n %% 100000)::text, 5, '0') END AS zip
FROM generate_series(1, %(rows)s) AS n
"""
# Ids are handed out in the order of the rows, so the n-th one is n.
_SHOP = """
INSERT INTO customer (full_name) SELECT concat_ws(' ', first_name, last_name) FROM seed ORDER BY id;
INSERT INTO orders (customer_id, amount, street, city, zip)
SELECT id, id % 100, street, city, zip FROM seed ORDER BY id;
INSERT INTO oracle.customer (id, value) SELECT id, ARRAY[first_name, last_name] FROM seed;
INSERT INTO oracle.address (id, value) SELECT id, ARRAY[street, city, zip] FROM seed;
DROP TABLE seed;
ANALYZE;
"""


def seed(connection: Connection[Any], rows: int) -> None:
    """
    Fill a shard whose structure is 0001_shop.

    Args:
        connection: on the shard, autocommit.
        rows: how many customers, each with one order.
    """
    words = {"first": FIRST_NAMES, "last": LAST_NAMES, "street": STREETS, "city": CITIES}
    with connection.transaction():
        connection.execute(oracle.SCHEMA)
        connection.execute(_ROWS, {name: list(choice) for name, choice in words.items()} | {"rows": rows})
        connection.execute(_SHOP)
