"""Columns that a move names: none is said to be missing where the server would find it, typing errors are found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from psycopg.errors import InvalidColumnReference, UndefinedColumn

from shardmig import derivation
from shardmig.config import Lint
from shardmig.lint import lint_plan
from shardmig.lint.mentions import mentions, unknown
from shardmig.plan import BATCH, Move, Plan, Statement, Switch, quote
from shardmig.states import State

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.config import Shard

TABLES = """
CREATE TABLE orders (id bigint PRIMARY KEY, total numeric, city text, meta jsonb, "Paid" boolean, place point);
CREATE TABLE order_address (order_id bigint PRIMARY KEY, town text, zip text);
"""
COLUMNS = {
    "orders": {"id", "total", "city", "meta", "Paid", "place"},
    "order_address": {"order_id", "town", "zip"},
}
INTO = derivation.Shape("orders", ("id",), target="order_address", target_key=("order_id",), where='"Paid"', touch=True)
TOWN, CITY = {"town": "lower(city)", "zip": "meta ->> 'zip'"}, {"city": "town || zip"}
TYPES = {"town": "TEXT", "zip": "TEXT", "city": "TEXT"}
WITHIN = derivation.Shape("orders", ("id",))

FOUND_BY_THE_SERVER = [
    derivation.forward(INTO, TOWN),
    derivation.check(INTO, TOWN, TYPES),
    derivation.orphans(INTO),
    derivation.purge(INTO),
    derivation.back(INTO, CITY),
    derivation.back_check(INTO, CITY, TYPES),
    derivation.forward(WITHIN, {"city": "upper(meta ->> 'city')", "Paid": "total > 0"}),
    derivation.back_check(WITHIN, {"total": "id * 2"}, {"total": "NUMERIC"}),
    "SELECT id FROM orders WHERE {batch} AND ctid IS NOT NULL AND orders.xmin IS NOT NULL",
    "SELECT o.id FROM orders AS o WHERE {batch} AND o IS NOT NULL AND orders_of(o) = 1 AND count_of(city) > 0",
    "SELECT orders.id FROM orders WHERE {batch} AND public.orders.city <> ''",
    "SELECT id FROM orders WHERE {batch} AND EXISTS (SELECT FROM order_address WHERE order_id = id AND town = city)",
    "SELECT id FROM orders WHERE {batch} AND id IN (SELECT a.order_id FROM order_address a WHERE a.town = orders.city)",
    (
        "SELECT id FROM orders o, LATERAL (SELECT o.city || zip AS pair FROM order_address WHERE order_id = o.id) a "
        "WHERE {batch} AND pair <> ''"
    ),
    "SELECT id FROM orders, (SELECT town AS place_name FROM order_address) AS a WHERE {batch} AND place_name = city",
    "SELECT id FROM orders, jsonb_to_record(meta) AS r(colour text) WHERE {batch} AND colour = city AND r.colour <> ''",
    "SELECT id FROM orders, jsonb_each_text(meta) WHERE {batch} AND key = city AND value <> ''",
    "SELECT id FROM orders, unnest(ARRAY[1, 2]) AS number WHERE {batch} AND number = 1",
    "SELECT id FROM orders, generate_series(1, total::int) WITH ORDINALITY AS s(n, nth) WHERE {batch} AND nth = n",
    "SELECT a FROM orders AS o(a, b, c) WHERE {batch} AND b > 0 AND o.c <> ''",
    "SELECT id FROM (orders JOIN order_address ON order_id = id) AS pair WHERE {batch} AND pair.town = city",
    "SELECT orders.town FROM (orders JOIN order_address ON order_id = id) AS orders WHERE {batch}",
    "SELECT b FROM (orders JOIN order_address ON order_id = id) AS pair(a, b) WHERE {batch} AND pair.a = 1",
    "SELECT u.id FROM orders JOIN (SELECT 1 AS id) AS one USING (id) AS u WHERE {batch}",
    "SELECT id FROM orders JOIN order_address AS a ON a.order_id = id AND town = city WHERE {batch}",
    "SELECT id FROM orders JOIN (VALUES (1, 'x')) AS v(number, word) ON word = city WHERE {batch} AND v.number = id",
    "SELECT id FROM orders JOIN (SELECT 1 AS id) AS one USING (id) WHERE {batch}",
    "SELECT id AS key FROM orders WHERE {batch} ORDER BY key, city",
    "SELECT lower(city) AS c, count(*) AS n FROM orders WHERE {batch} GROUP BY c HAVING count(*) > 1 ORDER BY n",
    "SELECT id AS k FROM orders WHERE {batch} UNION SELECT order_id FROM order_address ORDER BY k",
    "SELECT DISTINCT ON (c) city AS c FROM orders WHERE {batch} ORDER BY c",
    "SELECT id, sum(total) OVER w FROM orders WHERE {batch} WINDOW w AS (PARTITION BY city ORDER BY id)",
    "SELECT place[0], (meta -> 'x') ->> 'y', ID, \"Paid\", CITY FROM orders WHERE {batch}",
    "SELECT id FROM orders TABLESAMPLE system (100) WHERE {batch} AND city = ''",
    "SELECT orders.*, city, CURRENT_DATE, current_user FROM orders WHERE {batch}",
    "SELECT o.to_jsonb FROM orders o WHERE {batch}",
    "SELECT o.count FROM orders o WHERE {batch}",
    "WITH orders AS (SELECT 1 AS nothing) SELECT nothing FROM orders WHERE {batch} AND orders.nothing = 1",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 9) SELECT n FROM t, orders WHERE {batch}",
    "WITH w AS (UPDATE orders SET city = '' RETURNING id AS changed, city) SELECT changed FROM w WHERE {batch}",
    (
        "INSERT INTO order_address AS a (order_id, town) SELECT id, city FROM orders WHERE {batch} "
        "ON CONFLICT (order_id) DO UPDATE SET town = excluded.town, zip = a.zip || town_of(excluded.zip) "
        "WHERE a.town <> excluded.zip RETURNING a.order_id, zip"
    ),
    (
        "UPDATE order_address AS a SET (town, zip) = (SELECT city, a.zip) FROM orders AS o "
        "WHERE a.order_id = o.id AND {batch} RETURNING total"
    ),
    "DELETE FROM order_address USING orders WHERE order_id = id AND {batch}",
]


def move(**changes: Any) -> Move:
    texts = {"forward": f"UPDATE orders SET city = '' WHERE {BATCH}", "check": f"SELECT id FROM orders WHERE {BATCH}"}
    return Move(**{"table": "orders", "key": ("id",), "writes": ("city",), **texts, **changes})


def missing(**changes: Any) -> list[tuple[str, ...]]:
    return [(mention.column, *mention.tables) for mention in unknown(mentions(move(**changes), "public"), COLUMNS)]


@pytest.mark.parametrize("sql", FOUND_BY_THE_SERVER)
def test_nothing_that_the_server_finds_is_missed(sql: str) -> None:
    assert [] == missing(check=sql)


def test_the_server_does_find_it_and_would_not_without_what_is_mentioned(shard: Shard, connect: Connect) -> None:
    """Each statement runs; with any one of the columns that it is said to name dropped, it does not."""
    admin = connect(shard)
    admin.execute(TABLES.encode())
    for name, argument in (("orders_of", "orders"), ("count_of", "text"), ("town_of", "text")):
        returns = "text" if name == "town_of" else "bigint"
        admin.execute(
            f"CREATE FUNCTION {name}({argument}) RETURNS {returns} LANGUAGE sql AS 'SELECT 1::{returns}'".encode()
        )
    tried = 0
    for sql in FOUND_BY_THE_SERVER:
        _explain(admin, sql)
        found = [mention for mention in mentions(move(check=sql), "public") if mention.sql == sql]
        for column, tables in {(mention.column, mention.tables) for mention in found}:
            tried += 1
            with admin.transaction(force_rollback=True):
                for table in tables:
                    admin.execute(f"ALTER TABLE {table} DROP COLUMN IF EXISTS {quote(column)} CASCADE".encode())
                with pytest.raises((UndefinedColumn, InvalidColumnReference)), admin.transaction():
                    _explain(admin, sql)

    assert tried > 80


def _explain(admin: Any, sql: str) -> None:
    admin.execute(("EXPLAIN " + sql.replace(BATCH, "TRUE")).encode())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"key": ("ident",)}, [("ident", "orders")]),
        ({"writes": ("cty",)}, [("cty", "orders")]),
        ({"restores": ("totl",)}, [("totl", "orders")]),
        ({"target": "order_address", "target_key": ("oid",)}, [("oid", "order_address"), ("city", "order_address")]),
        ({"forward": "UPDATE orders SET cty = town WHERE {batch}"}, [("cty", "orders"), ("town", "orders")]),
        ({"check": "SELECT id FROM orders AS o WHERE {batch} AND o.paid"}, [("paid", "orders")]),
        ({"check": "SELECT a.town, o.x FROM orders AS o, order_address AS a WHERE {batch} AND x = b.y"},
         [("x", "orders")]),
        ({"check": "SELECT x FROM orders, order_address WHERE {batch}"}, [("x", "orders", "order_address")]),
        ({"check": "SELECT id FROM orders WHERE {batch} AND EXISTS (SELECT FROM order_address WHERE x = id)"},
         [("x", "orders", "order_address")]),
        ({"check": "WITH s AS (SELECT totl FROM orders WHERE {batch}) SELECT anything, s.any FROM s"},
         [("totl", "orders")]),
        ({"check": "SELECT id FROM orders, (SELECT twn FROM order_address) AS a WHERE {batch} AND anything"},
         [("twn", "order_address")]),
        ({"check": "SELECT id FROM orders, LATERAL (SELECT o FROM order_address) AS a WHERE {batch} AND orders.o"},
         [("o", "orders")]),
        ({"check": "SELECT id FROM orders JOIN order_address ON idd = order_id WHERE {batch}"},
         [("idd", "orders", "order_address")]),
        ({"check": "SELECT id FROM other JOIN orders ON orders.idd = x WHERE {batch} AND y"}, [("idd", "orders")]),
        ({"back": "INSERT INTO order_address (order_id, twn) SELECT id, cty FROM orders WHERE {batch} "
         "ON CONFLICT (orderid) DO UPDATE SET tow = excluded.to, zip = zp RETURNING zi"},
         [("twn", "order_address"), ("orderid", "order_address"), ("tow", "order_address"), ("cty", "orders"),
          ("to", "order_address"), ("zp", "order_address"), ("zi", "order_address")]),
        ({"purge": "DELETE FROM order_address AS a USING orders WHERE a.id = orders.idd AND {batch}"},
         [("id", "order_address"), ("idd", "orders")]),
        ({"orphans": "SELECT FROM order_address WHERE {batch} GROUP BY twn, order_address.tw"},
         [("tw", "order_address")]),
        ({"check": "SELECT lower(f.id)) FROM"}, []),
        ({"check": "CREATE POLICY p ON orders USING ((SELECT x FROM order_address))"}, []),
        ({"check": "MERGE INTO orders USING order_address ON x = y WHEN MATCHED THEN UPDATE SET z = 1"}, []),
        ({"key": ("k" * 64,)}, []),
    ],
)  # fmt: skip
def test_what_no_table_in_question_has_is_found(changes: Any, found: Any) -> None:
    assert sorted(found) == sorted(missing(**changes))


# --------------------------------------------------------------------------------------------------------------------
# In the history


ORDERS = "CREATE TABLE orders (id bigint PRIMARY KEY, total numeric, city text)"
ADD = "ALTER TABLE orders ADD COLUMN cents bigint"


def plan(name: str, *steps: str | Move) -> Plan:
    made = [Statement(sql=step) if isinstance(step, str) else step for step in steps]
    return Plan(revision=name, parent=None, flag=name[5:], script_sha256="x", steps=(*made, Switch(to=State.LIVE)))


def cents(value: str = "total * 100", **changes: Any) -> Move:
    column = changes.pop("column", "cents")
    forward = derivation.forward(WITHIN, {column: value})
    check = derivation.check(WITHIN, {column: value}, {})
    return move(**{"writes": (column,), "forward": forward, "check": check, **changes})


def found(moved: Move, *, orders: str = ORDERS, **settings: Any) -> list[str]:
    plans = plan("0001_shop", orders), plan("0002_note", "ALTER TABLE orders ADD COLUMN note text")
    return [
        f"{violation.code} {violation.part}: {violation.message}"
        for violation in lint_plan(plan("0003_cents", ADD, moved), plans, Lint(**settings))
        if violation.fails
    ]


@pytest.mark.parametrize("value", ["total", "length(note)", "id + orders.total", "orders.id"])
def test_a_column_of_any_plan_up_to_this_one_is_known(value: str) -> None:
    assert [] == found(cents(value))


def test_a_misspelt_column_is_refused_once_with_the_one_that_is_meant() -> None:
    [said] = found(cents("totl * 100"))

    assert said == (
        "SM214 forward: the move fails on the first shard: orders has no column totl, and no plan adds it; "
        "did you mean total?"
    )


def test_where_none_is_like_it_the_cure_is_told() -> None:
    [said] = found(cents(key=("ident",)))

    assert said.endswith(
        "orders has no column ident, and no plan adds it; correct it, or name it in known_columns if every shard has it"
    )


def test_a_misspelt_column_to_fill_is_said_to_be_old_with_the_one_that_is_meant() -> None:
    [said] = found(cents(column="cnts"))

    assert said.startswith("SM201 forward: orders.cnts")
    assert said.endswith("; did you mean cents?")


def test_of_a_misspelt_table_the_one_is_told_that_has_the_column() -> None:
    elsewhere = derivation.Shape("ordrs", ("id",))
    forward = derivation.forward(elsewhere, {"cents": "total"})
    [said] = found(cents(table="ordrs", forward=forward))

    assert said.startswith("SM201 forward: ordrs.cents")
    assert said.endswith("; did you mean orders?")


def test_of_a_misspelt_second_table_the_new_one_is_told() -> None:
    elsewhere = derivation.Shape("orders", ("id",), target="adress", target_key=("order_id",))
    forward = derivation.forward(elsewhere, {"town": "city"})
    moved = move(target="adress", target_key=("order_id",), writes=("town",), forward=forward)
    judged = plan("0002_address", "CREATE TABLE address (order_id bigint PRIMARY KEY, town text)", moved)
    said = [one.message for one in lint_plan(judged) if one.code == "SM202"]

    assert ["; did you mean address?"] == [one[-len("; did you mean address?") :] for one in said]


@pytest.mark.parametrize(
    "orders",
    [
        "ALTER TABLE orders ADD COLUMN city text",
        "CREATE TABLE orders (id bigint, total numeric)",
        "CREATE TABLE orders (id bigint PRIMARY KEY) INHERITS (base)",
        "CREATE TABLE orders PARTITION OF base (id PRIMARY KEY) FOR VALUES IN (1)",
        "CREATE TABLE orders (id bigint PRIMARY KEY, LIKE base)",
        "CREATE TABLE orders OF base (PRIMARY KEY (id))",
        "CREATE TABLE shop.orders (id bigint PRIMARY KEY)",
    ],
)
def test_of_a_table_that_has_columns_from_elsewhere_nothing_is_said(orders: str) -> None:
    assert [] == found(cents("totl"), orders=orders)


def test_what_people_added_by_hand_and_functions_of_the_row_are_named_in_the_configuration() -> None:
    assert [] == found(
        cents("by_hand + orders.computed"), known_columns=("orders.by_hand",), known_functions=("computed",)
    )
    assert 2 == len(found(cents("by_hand + orders.computed")))
    assert ["SM214"] == [said[:5] for said in found(cents("computed"), known_functions=("computed",))]


@pytest.mark.parametrize("relax", ["orders.total", "orders.cents", "other.totl"])
def test_a_column_to_relax_is_known_or_of_a_table_that_is_not(relax: str) -> None:
    judged = plan("0002_cents", ADD, cents()).model_copy(update={"relax": (relax,)})

    assert () == lint_plan(judged, [plan("0001_shop", ORDERS)])


def test_a_misspelt_column_to_relax_is_found_long_before_done() -> None:
    judged = plan("0002_cents", ADD, cents()).model_copy(update={"relax": ("orders.totl",)})
    [found] = lint_plan(judged, [plan("0001_shop", ORDERS)])

    assert str(found) == (
        "SM214 relax lifts nothing, so DONE is refused: orders has no column totl, and no plan adds it; "
        "did you mean total?"
    )
