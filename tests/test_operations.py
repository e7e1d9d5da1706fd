"""move_rows: arguments that make no move are refused; derived SQL is right, also while others write."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import RawCursor

from shardmig.derivation import Shape, forward, spelled
from shardmig.errors import ScriptError
from shardmig.lint import lint_plan
from shardmig.operations import MoveRows, collecting, move_rows
from shardmig.plan import Move, Plan, bind_batch
from shardmig.rendering import render
from shardmig.scripts import read_script
from shardmig.tables import Column, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from conftest import Connect
    from psycopg.abc import QueryNoTemplate

    from shardmig.config import Shard

FORWARD = {"street": "street", "city": "upper(city)"}
BACK = {"street": "street", "city": "lower(city)"}


def call(*args: Any, **keywords: Any) -> MoveRows:
    calls: list[MoveRows] = []
    with collecting(calls.append):
        move_rows(*args, **keywords)
    (made,) = calls
    return made


def derive(*args: Any, tables: Mapping[str, Table] | None = None, **keywords: Any) -> Move:
    return call(*args, **keywords).derive(tables or {}, line=None)


# --------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": {}}, "forward= names no column"),
        ({"forward": {"a": ""}}, r"forward\['a'\] is an SQL expression"),
        ({"forward": {"a": 1}}, r"forward\['a'\] is an SQL expression in a string, not 1"),
        ({"forward": {"": "b"}}, "names of columns"),
        ({"forward": {"a": "b WHERE {batch}"}}, "an expression sees one row"),
        ({"forward": {"a": "b || $1"}}, r"holds a parameter \(\$1\)"),
        ({"forward": {"a": "b\r"}}, "carriage return"),
        ({"forward": {"a": "b\n--! c"}}, "begins with --!"),
        ({"forward": {"a": "b"}, "writes": ("a",)}, "a mapping says it itself"),
        ({"forward": {"a": "b"}, "where": "c"}, "where= goes with into="),
        ({"forward": {"a": "b"}, "target_key": ("c",)}, "target_key= goes with into="),
        ({"forward": {"a": "b"}, "orphans": "{batch}"}, "orphans= goes with into="),
        ({"forward": {"a": "b"}, "touch_source": True}, "touch_source= goes with into="),
        ({"forward": {"a": "b"}, "into": "t"}, "into='t' is the table itself"),
        ({"forward": {"a": "b"}, "into": "u", "orphans": "{batch}"}, "orphans= and purge= go together"),
        ({"forward": {"a": "b"}, "alias": "x"}, "alias= goes with SQL given here"),
        ({"forward": {"a": "b"}, "lossy": True}, "there is no back="),
        ({"forward": {"a": "b"}, "restores": ("b",)}, "restores= goes with back="),
        ({"forward": {"a": "b"}, "back_check": "{batch}"}, "back_check= goes with back="),
        ({"forward": {"a": "b"}, "back": {"b": "a"}, "restores": ("b",)}, "a mapping says it itself"),
        ({"forward": {"a": "b"}, "back": "UPDATE {batch}"}, r'restores=\("full_name",\)'),
        ({"forward": {"a": "b"}, "back": "UPDATE {batch}", "restores": "b"}, "give back_check="),
        ({"forward": {"a": "b"}, "triggers": "ignore"}, 'triggers= is "refuse" or "fire"'),
        ({"forward": {"a": "b"}, "key": ()}, r'key= names columns, each once, as in key=\("id",\)'),
        ({"forward": {"a": "b"}, "key": ("id", "id")}, "key= names columns, each once"),
        ({"forward": {"a": "b"}, "key": ("id", 3)}, "key= names columns, each once"),
        ({"forward": "UPDATE t SET a = b"}, r"\{batch\} is not there in forward="),
        ({"forward": "UPDATE {batch} {batch}"}, r"\{batch\} is there 2 times in forward="),
        ({"forward": "UPDATE {batch};"}, "ends with a semicolon"),
        ({"forward": "UPDATE {batch}"}, r'name the columns it fills, as in writes=\("first_name",\)'),
        ({"forward": "UPDATE {batch}", "writes": "a"}, "give check="),
        ({"forward": "UPDATE {batch}", "writes": "a", "check": "SELECT"}, r"\{batch\} is not there in check="),
        (
            {"forward": "INSERT {batch}", "writes": "a", "check": "{batch}", "into": "u", "where": "x"},
            "where= goes with",
        ),
        ({"forward": ["UPDATE {batch}"]}, "forward= is SQL in a string"),
    ],
)
def test_arguments_that_make_no_move_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        call("t", **arguments)


def test_a_dollar_in_a_literal_is_no_parameter() -> None:
    assert isinstance(call("t", forward={"a": "b || '$1' || $$ $2 $$ -- $3"}), MoveRows)


def test_move_rows_outside_a_script_says_where_it_belongs() -> None:
    with pytest.raises(ScriptError, match=r"call it in the function move\(\)"):
        move_rows("t", forward={"a": "b"})


# --------------------------------------------------------------------------------------------------------------------
# Keys

ORDERS = Table(
    {
        "id": Column("BIGINT", nullable=False),
        "no": Column("TEXT", nullable=True),
        "city": Column("TEXT", nullable=True),
    },
    primary_key=("id",),
    created=True,
)
ADDRESS = Table(
    {"order_id": Column("BIGINT", nullable=False), "street": Column("TEXT", nullable=True)},
    primary_key=("order_id",),
    created=True,
)


SEVERAL = "INSERT INTO pairs (a, b) SELECT id, 1 FROM orders WHERE {batch}"
CHECK = "SELECT id FROM orders WHERE {batch}"


def test_by_hand_a_row_may_become_several() -> None:
    pairs = Table({}, ("a", "b"), created=True)
    move = derive(
        "orders",
        forward=SEVERAL,
        check=CHECK,
        writes="b",
        into="pairs",
        target_key="a",
        tables={"orders": ORDERS, "pairs": pairs},
    )

    assert ("a",) == move.target_key


def test_the_key_is_the_primary_key_that_scripts_gave_the_table() -> None:
    tables = {"orders": ORDERS, "order_address": ADDRESS}

    assert derive("orders", forward={"a": "b"}, tables=tables).key == ("id",)
    assert derive("orders", forward=FORWARD, into="order_address", tables=tables).target_key == ("order_id",)
    assert derive("orders", forward={"a": "b"}, key="city_id", tables=tables).key == ("city_id",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": "unknown"}, r'unknown was not created by op.create_table\(\).*give key=.*as in key=\("id",\)'),
        ({"table": "keyless"}, "keyless has no primary key: give key="),
        ({"table": "ordrs"}, r"ordrs was not created by op.create_table\(\).*; did you mean orders\?$"),
        ({"table": "orders", "key": ("id", "no")}, "orders.no may be NULL"),
        ({"table": "orders", "into": "unknown"}, "give target_key="),
        ({"table": "orders", "into": "pairs"}, r"target_key= \(a, b\) and the key of orders \(id\) differ in length"),
        ({"table": "orders", "into": "pairs", "target_key": "a"}, r"\(a\) is not unique in pairs"),
        (
            {"table": "orders", "into": "pairs", "target_key": "c", "forward": SEVERAL, "check": CHECK, "writes": "d"},
            r"\(c\) is not unique in pairs",
        ),
        ({"table": "orders", "into": "pairs", "target_key": {"a": "no"}}, "gives each of id one column of pairs"),
        ({"table": "orders", "into": "pairs", "target_key": {"a": "id", "b": "id"}}, "gives each of id one column"),
        ({"table": "orders", "into": "order_address", "forward": {"order_id": "1"}}, "leave it out of forward="),
        ({"table": "orders", "back": {"id": "a"}}, "a key is never written"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused(arguments: dict[str, Any], message: str) -> None:
    pairs = Table({"a": Column(None, nullable=False), "b": Column(None, nullable=False)}, ("a", "b"), created=True)
    tables = {"orders": ORDERS, "order_address": ADDRESS, "keyless": Table(created=True), "pairs": pairs}

    with pytest.raises(ScriptError, match=message):
        derive(arguments.pop("table"), **({"forward": {"x": "y"}} | arguments), tables=tables)


def test_a_missing_key_is_told_with_the_script_s_line(tmp_path: Path) -> None:
    path = tmp_path / "0001_x.py"
    path.write_text(
        "from shardmig.operations import move_rows\nrevision, down_revision = '0001_x', None\n"
        "def move():\n    move_rows(\n        't', forward={'a': 'b'})\n"
    )

    with pytest.raises(ScriptError, match=r"0001_x.py:4: t was not created .* give key="):
        render(read_script(path))


def test_hand_written_sql_is_kept_as_it_is() -> None:
    move = derive(
        "orders",
        forward="INSERT {batch}",
        check="SELECT 1 {batch}",
        writes=("a",),
        back="UPDATE {batch}",
        back_check="SELECT 2 {batch}",
        restores="b",
        orphans="SELECT 3 {batch}",
        purge="DELETE {batch}",
        into="u",
        key=["x", "y"],
        target_key=["p", "q"],
        alias="o",
        lossy=True,
        triggers="fire",
        touch_source=True,
    )

    assert move == Move(
        table="orders",
        alias="o",
        key=("x", "y"),
        target="u",
        target_key=("p", "q"),
        writes=("a",),
        restores=("b",),
        forward="INSERT {batch}",
        check="SELECT 1 {batch}",
        orphans="SELECT 3 {batch}",
        purge="DELETE {batch}",
        back="UPDATE {batch}",
        back_check="SELECT 2 {batch}",
        lossy=True,
        triggers="fire",
        touch_source=True,
    )


# --------------------------------------------------------------------------------------------------------------------
# Names


def test_words_that_the_server_reads_otherwise_are_quoted(shard: Shard, connect: Connect) -> None:
    connection = connect(shard)
    words = connection.execute("SELECT word, catcode = 'U' FROM pg_get_keywords()").fetchall()

    for word, plain in words:
        name = spelled(word)
        assert plain or name == f'"{word}"', word
        reading = f"SELECT t.{name}, x.{name} FROM (SELECT 'kept'::text AS {name}) AS t, LATERAL (SELECT {name}) AS x"
        assert connection.execute(_query(reading)).fetchone() == ("kept", "kept"), word
    assert [spelled(n) for n in ("a_1", "A", "1a", "a b", 'a"b', "é", "user")] == [
        "a_1", '"A"', '"1a"', '"a b"', '"a""b"', '"é"', '"user"',
    ]  # fmt: skip


def test_no_table_is_hidden_by_a_name_of_the_derived_sql() -> None:
    shape = Shape("source", ("id",), "touched", ("id",), touch=True)

    assert "WITH source_ AS MATERIALIZED" in forward(shape, {"a": "b"})
    assert "UPDATE source AS touched_" in forward(shape, {"a": "b"})


# --------------------------------------------------------------------------------------------------------------------
# Derived SQL on a real server


class Mover:
    """Runs a move's texts as the engine does: `$n` parameters, one range of keys."""

    def __init__(self, connection: psycopg.Connection[Any], move: Move) -> None:
        self.cursor = RawCursor(connection)
        self.move = move

    def run(self, text: str, *bounds: object) -> list[tuple[Any, ...]]:
        sql = getattr(self.move, text)
        key = self.move.target_key if text in ("orphans", "purge") else self.move.key
        both = {"lower": bool(bounds), "upper": bool(bounds)}
        self.cursor.execute(_query(bind_batch(sql, key, **both, alias=self.move.alias)), bounds)
        return sorted(self.cursor.fetchall()) if self.cursor.description else []


def _query(sql: str) -> QueryNoTemplate:
    return sql.encode()


@pytest.fixture
def shop(shard: Shard, connect: Connect) -> psycopg.Connection[Any]:
    connection = connect(shard)
    connection.execute(
        """
        CREATE TABLE orders (id bigint PRIMARY KEY, street text, city text, status text);
        CREATE TABLE order_address (order_id bigint PRIMARY KEY, street text, city text);
        INSERT INTO orders SELECT n, 'street ' || n, 'city', 'new' FROM generate_series(1, 6) AS n;
        """
    )
    return connection


def address(**keywords: Any) -> Move:
    return derive("orders", **({
        "forward": FORWARD, "back": BACK, "into": "order_address", "key": "id", "target_key": ("order_id",),
    } | keywords))  # fmt: skip


def addresses(connection: psycopg.Connection[Any]) -> dict[int, str]:
    return {n: f"{street} {city}" for n, street, city in connection.execute("SELECT * FROM order_address ORDER BY 1")}


def test_a_move_within_one_table_there_and_back(shard: Shard, connect: Connect) -> None:
    connection = connect(shard)
    connection.execute(
        """
        CREATE TABLE "Customer x" (a int, "b c" text, full_name text, first_name text, last_name text, cents int,
                                   price numeric(10, 1), PRIMARY KEY (a, "b c"));
        INSERT INTO "Customer x" (a, "b c", full_name, first_name, last_name, cents) VALUES
            (1, 'x', 'Grace Hopper', 'stale', NULL, NULL),
            (1, 'y', 'Cher', NULL, NULL, 0), (2, 'x', NULL, 'stale', NULL, NULL),
            (2, 'y', 'Grace Brewster Hopper', NULL, NULL, 155);
        """
    )
    table = Table({"price": Column("NUMERIC(10, 1)", nullable=True)})
    move = derive(
        "Customer x",
        key=("a", "b c"),
        forward={
            "first_name": "split_part(full_name, ' ', 1) -- the first word",
            "last_name": "nullif(substr(full_name, length(split_part(full_name, ' ', 1)) + 2), '')",
            "price": "cents / 100.0",
        },
        back={"full_name": "first_name || coalesce(' ' || last_name, '')"},
        tables={"Customer x": table},
    )
    mover = Mover(connection, move)

    assert mover.run("check") == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    mover.run("forward", 1, "x", 2, "x")  # (1, x) is excluded, (2, x) is included
    assert mover.run("check") == [(1, "x"), (2, "y")]
    assert mover.run("check", 1, "x", 2, "x") == []
    mover.run("forward")
    assert mover.run("check") == []  # 1.55 is stored as 1.6: the check rounds as the column does
    assert mover.run("back_check") == []
    connection.execute("""UPDATE "Customer x" SET first_name = 'Ada' WHERE a = 1""")
    assert mover.run("back_check") == [(1, "x"), (1, "y")]
    mover.run("back")
    assert mover.run("back_check") == []
    names = connection.execute('SELECT full_name FROM "Customer x" ORDER BY a, "b c"').fetchall()
    assert names == [("Ada Hopper",), ("Ada",), (None,), ("Grace Brewster Hopper",)]


def test_without_rounding_a_derived_check_never_agrees(shard: Shard, connect: Connect) -> None:
    connection = connect(shard)
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, a float8, b real); INSERT INTO t VALUES (1, 0.1)")

    for facts, disagreeing in ((Table({"b": Column("REAL", nullable=True)}), []), (Table(), [(1,)])):
        mover = Mover(connection, derive("t", key="id", forward={"b": "a"}, tables={"t": facts}))
        mover.run("forward")
        assert mover.run("check") == disagreeing


def test_a_move_into_a_second_table_there_and_back(shop: psycopg.Connection[Any]) -> None:
    mover = Mover(shop, address())
    shop.execute("INSERT INTO order_address VALUES (2, 'dead', 'dead'), (9, 'orphan', 'orphan')")

    mover.run("forward", 1, 4)
    assert mover.run("check") == [(1,), (5,), (6,)]
    assert mover.run("orphans") == [(9,)]
    mover.run("forward")
    mover.run("purge", 1, 6)
    assert mover.run("orphans") == [(9,)]
    mover.run("purge")
    assert (mover.run("check"), mover.run("orphans"), mover.run("back_check")) == ([], [], [])
    assert addresses(shop) == {n: f"street {n} CITY" for n in range(1, 7)}

    shop.execute(
        "UPDATE order_address SET street = 'moved' WHERE order_id = 3; DELETE FROM order_address WHERE order_id = 4"
    )
    assert mover.run("back_check") == [(3,), (4,)]
    mover.run("back", 3, 6)
    assert mover.run("back_check") == [(3,)]
    mover.run("back")
    assert mover.run("back_check") == []
    rows = shop.execute("SELECT id, street, status FROM orders WHERE id IN (2, 3, 4) ORDER BY id").fetchall()
    assert rows == [(2, "street 2", "new"), (3, "moved", "new"), (4, None, "new")]


def test_rows_that_the_condition_leaves_out_have_no_target_row_and_keep_what_they_hold(
    shop: psycopg.Connection[Any],
) -> None:
    mover = Mover(shop, address(where="status <> 'draft' AND id <> 1"))
    shop.execute("UPDATE orders SET status = 'draft' WHERE id = 2")
    mover.run("forward")

    assert list(addresses(shop)) == [3, 4, 5, 6]
    assert (mover.run("check"), mover.run("back_check"), mover.run("orphans")) == ([], [], [])
    shop.execute("UPDATE orders SET status = 'draft' WHERE id = 3; DELETE FROM order_address WHERE order_id = 4")
    assert mover.run("orphans") == [(3,)]
    mover.run("purge")
    assert mover.run("back_check") == [(4,)]
    mover.run("back")
    assert mover.run("back_check") == []
    rows = shop.execute("SELECT id, street FROM orders ORDER BY id LIMIT 4").fetchall()
    assert rows == [(1, "street 1"), (2, "street 2"), (3, "street 3"), (4, None)]


def test_a_composite_key_may_have_other_names_and_another_order_there(shard: Shard, connect: Connect) -> None:
    connection = connect(shard)
    connection.execute(
        """
        CREATE SCHEMA s;
        CREATE TABLE s.source (a int, b text, v int, PRIMARY KEY (a, b));
        CREATE TABLE target (y text, x int, v int, UNIQUE (x, y));
        INSERT INTO s.source VALUES (1, 'p', 10), (1, 'q', 11), (2, 'p', 12);
        """
    )
    mover = Mover(
        connection,
        derive(
            "s.source",
            key=("a", "b"),
            into="target",
            target_key={"y": "b", "x": "a"},
            forward={"v": "v + 1"},
            back={"v": "v - 1"},
        ),
    )

    assert mover.move.target_key == ("x", "y")
    mover.run("forward", 1, "p", 2, "p")
    assert mover.run("check") == [(1, "p")]
    mover.run("forward")
    connection.execute("DELETE FROM s.source WHERE b = 'q'; UPDATE target SET v = 100 WHERE x = 2")
    assert mover.run("orphans") == [(1, "q")]
    mover.run("purge")
    mover.run("back")
    assert (mover.run("check"), mover.run("orphans"), mover.run("back_check")) == ([], [], [])
    assert connection.execute("SELECT v FROM s.source ORDER BY a").fetchall() == [(10,), (99,)]


# --------------------------------------------------------------------------------------------------------------------
# While others write


@pytest.fixture
def beside(shard: Shard, connect: Connect) -> Callable[..., None]:
    """Run a mover's text beside a writer who began first; return when both are through."""

    def schedule(mover: Mover, text: str, first: str, *, second: str = "") -> None:
        writer, watcher = connect(shard), connect(shard)
        writer.execute("BEGIN")
        writer.execute(_query(first))
        thread = threading.Thread(target=mover.run, args=[text])
        pid = mover.cursor.connection.info.backend_pid
        thread.start()
        waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        while thread.is_alive() and watcher.execute(waits, [pid]).fetchone() != (True,):
            thread.join(0.002)
        assert thread.is_alive(), "the mover did not wait for the writer"
        if second:
            writer.execute(_query(second))
        writer.execute("COMMIT")
        thread.join()

    return schedule


def test_forward_copies_what_a_concurrent_writer_left(
    shop: psycopg.Connection[Any], beside: Callable[..., None]
) -> None:
    mover = Mover(shop, address())

    beside(
        mover,
        "forward",
        "UPDATE orders SET street = 'new street' WHERE id = 3",
        second="INSERT INTO order_address VALUES (3, 'new street', 'CITY')",
    )

    assert mover.run("check") == []
    assert addresses(shop)[3] == "new street CITY"


def test_an_unlocked_source_would_copy_a_stale_row(shop: psycopg.Connection[Any], beside: Callable[..., None]) -> None:
    move = address()
    mover = Mover(shop, move.model_copy(update={"forward": move.forward.replace("FOR SHARE", "")}))

    with pytest.raises(AssertionError, match="did not wait"):
        beside(mover, "forward", "UPDATE orders SET street = 'new street' WHERE id = 3")
    assert addresses(shop)[3] == "street 3 CITY"


def test_forward_does_not_bring_back_a_row_deleted_meanwhile(
    shop: psycopg.Connection[Any], beside: Callable[..., None]
) -> None:
    mover = Mover(shop, address())

    beside(mover, "forward", "DELETE FROM orders WHERE id = 3", second="DELETE FROM order_address WHERE order_id = 3")

    assert (mover.run("check"), mover.run("orphans")) == ([], [])
    assert 3 not in addresses(shop)


def test_back_copies_what_a_concurrent_writer_left(shop: psycopg.Connection[Any], beside: Callable[..., None]) -> None:
    mover = Mover(shop, address())
    mover.run("forward")

    beside(  # as a writer in DONE and one in LIVE would, one after the other
        mover,
        "back",
        "UPDATE order_address SET street = 'new street' WHERE order_id = 3",
        second="UPDATE orders SET street = 'new street' WHERE id = 3",
    )

    assert mover.run("back_check") == []
    assert shop.execute("SELECT street FROM orders WHERE id = 3").fetchone() == ("new street",)


def test_back_does_not_undo_a_writer_who_brings_an_absent_row_back(
    shop: psycopg.Connection[Any], beside: Callable[..., None]
) -> None:
    mover = Mover(shop, address())
    mover.run("forward")
    shop.execute("DELETE FROM order_address WHERE order_id = 3")
    written = (
        "INSERT INTO order_address VALUES (3, 'back again', 'CITY');"
        "UPDATE orders SET street = 'back again' WHERE id = 3"
    )

    beside(mover, "back", written)

    assert shop.execute("SELECT street FROM orders WHERE id = 3").fetchone() == ("back again",)
    assert mover.run("back_check") == []
    # Without looking at the row's version the writer's row is undone.
    shop.execute("DELETE FROM order_address WHERE order_id = 3")
    careless = mover.move.model_copy(
        update={"back": (mover.move.back or "").replace("source.ctid = batch.version", "TRUE")}
    )
    beside(Mover(shop, careless), "back", written)
    assert shop.execute("SELECT street FROM orders WHERE id = 3").fetchone() == (None,)


def test_back_locks_new_before_old(shop: psycopg.Connection[Any], shard: Shard, connect: Connect) -> None:
    """A writer in DONE, who holds new, never waits for a batch that holds old; one in LIVE sees the batch give way."""
    mover = Mover(shop, address())
    mover.run("forward")
    writer = connect(shard)
    writer.execute("BEGIN; SELECT FROM order_address WHERE order_id = 1 FOR UPDATE")
    shop.execute("SET lock_timeout = '50ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable):
        mover.run("back")  # waits for new, so it holds no old row that this could meet
    writer.execute("SET lock_timeout = '50ms'; UPDATE orders SET street = 'x' WHERE id = 1; COMMIT")


def test_touching_the_source_makes_a_repeatable_read_writer_retry(
    shop: psycopg.Connection[Any], shard: Shard, connect: Connect
) -> None:
    for touch, expected in ((False, 0), (True, None)):
        shop.execute("TRUNCATE order_address")
        writer = connect(shard)
        writer.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM orders")
        Mover(shop, address(touch_source=touch)).run("forward")
        try:
            writer.execute("UPDATE orders SET street = 'late' WHERE id = 3")
            hit = writer.execute("UPDATE order_address SET street = 'late' WHERE order_id = 3").rowcount
            writer.execute("COMMIT")
        except psycopg.errors.SerializationFailure:
            hit = None
        assert hit == expected  # 0: the row that the mover inserted was missed, and nobody knows


# --------------------------------------------------------------------------------------------------------------------
# The linter takes what is derived


@pytest.mark.parametrize(
    "arguments",
    [
        "forward={'n': 'a'}, back={'a': 'n'}",
        "forward={'n': 'a', 'm': 'lower(b)'}, into='u', target_key='k', back={'a': 'n', 'b': 'm'}",
        "forward={'n': 'a', 'm': 'b'}, into='u', target_key='k', back={'a': 'n'}, where='a IS NOT NULL'",
        "forward={'n': 'a', 'm': 'b'}, into='u', target_key='k', touch_source=True",
    ],
)
def test_the_linter_takes_what_is_derived(tmp_path: Path, arguments: str) -> None:
    path = tmp_path / "0001_x.py"
    path.write_text(
        f"""
import sqlalchemy as sa
from alembic import op
from shardmig.operations import move_rows
revision, down_revision = "0001_x", None
def upgrade():
    op.create_table("u",
        sa.Column("k", sa.BigInteger, primary_key=True), sa.Column("n", sa.Text), sa.Column("m", sa.Text))
    op.add_column("t", sa.Column("n", sa.Numeric(10, 2)))
    op.add_column("t", sa.Column("m", sa.Text))
def move():
    move_rows("t", key="id", {arguments})
"""
    )
    plan: Plan = render(read_script(path))

    assert [str(violation) for violation in lint_plan(plan) if violation.fails] == []
