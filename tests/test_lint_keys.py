"""Foreign keys of new tables: what is accepted lets a DELETE of today work, what is refused would have made it fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

from shardmig.config import Lint
from shardmig.lint import lint_plan
from shardmig.plan import Plan, Statement

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.config import Shard

OLD = "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 9);"
OLD += "CREATE TABLE v (a int, b int, PRIMARY KEY (a, b)); INSERT INTO v VALUES (1, 1), (2, 1)"
ROWS = "INSERT INTO a (id, x) VALUES (1, 1), (2, 2)"

Case = tuple[tuple[str, ...], str, str]


def table(more: str = "", *, x: str = "ON DELETE SET NULL", tail: str = "") -> str:
    return f"CREATE TABLE a (id int PRIMARY KEY, x int REFERENCES t (id) {x}{more and ', '}{more}) {tail}"


def default(more: str = "") -> str:
    return table(more, x="ON DELETE SET DEFAULT DEFAULT 9")


# Statements of a plan, the rule that refuses them, rows of a later release.
REFUSED: dict[str, Case] = {
    "a unique index that computes": ((table(), "CREATE UNIQUE INDEX u ON a ((coalesce(x, 0)))"), "SM134", ROWS),
    "a unique index that begins to hold the row": (
        (table("o int DEFAULT 5"), "CREATE UNIQUE INDEX u ON a (o) WHERE x IS NULL"), "SM134", ROWS,
    ),
    "a unique index of a default": ((default(), "CREATE UNIQUE INDEX u ON a (x)"), "SM134", ROWS),
    "an index that fails": ((table(), "CREATE INDEX i ON a ((100 / coalesce(x, 0)))"), "SM134", ROWS),
    "an index whose predicate fails": (
        (table(), "CREATE INDEX i ON a (id) WHERE 100 / coalesce(x, 0) > 1"), "SM134", ROWS,
    ),
    "EXCLUDE": ((table("EXCLUDE USING btree ((coalesce(x, 0)) WITH =)"),), "SM134", ROWS),
    "EXCLUDE of a default": ((default("EXCLUDE USING btree (x WITH =)"),), "SM134", ROWS),
    "EXCLUDE that begins to hold the row": (
        (table("o int DEFAULT 5, EXCLUDE USING btree (o WITH =) WHERE (x IS NULL)"),), "SM134", ROWS,
    ),
    "a generated column": (
        (table("y int GENERATED ALWAYS AS (100 / coalesce(x, 0)) STORED"),), "SM134", ROWS,
    ),
    "a generated column that comes later": (
        (table(), "ALTER TABLE a ADD COLUMN y int GENERATED ALWAYS AS (100 / coalesce(x, 0)) STORED"), "SM134", ROWS,
    ),
    "a CHECK that comes later": ((table(), "ALTER TABLE a ADD COLUMN y int CHECK (x IS NOT NULL)"), "SM134", ROWS),
    "a CHECK of the whole row": ((table("CHECK (a.* IS NOT NULL)"),), "SM134", ROWS),
    "a CHECK that dislikes the default": ((default("CHECK (x < 5)"),), "SM134", ROWS),
    "a partition key": (
        (
            "CREATE TABLE a (id int, x int REFERENCES t (id) ON DELETE SET NULL) PARTITION BY LIST (x)",
            "CREATE TABLE a1 PARTITION OF a FOR VALUES IN (1, 2)",
        ), "SM134", ROWS,
    ),
    "a CHECK of a partition": (
        (
            "CREATE TABLE a (id int, x int REFERENCES t (id) ON DELETE SET NULL) PARTITION BY LIST (id)",
            "CREATE TABLE a1 PARTITION OF a (CHECK (x IS NOT NULL)) FOR VALUES IN (1, 2)",
        ), "SM134", ROWS,
    ),
    "an index of a partition": (
        (
            "CREATE TABLE a (id int, x int REFERENCES t (id) ON DELETE SET NULL) PARTITION BY LIST (id)",
            "CREATE TABLE a1 PARTITION OF a FOR VALUES IN (1, 2)",
            "CREATE UNIQUE INDEX u ON a1 ((coalesce(x, 0)))",
        ), "SM134", ROWS,
    ),
    "MATCH FULL beside it": (
        (table("y int DEFAULT 1, FOREIGN KEY (x, y) REFERENCES v (a, b) MATCH FULL ON DELETE CASCADE"),),
        "SM134", ROWS,
    ),
    "a second key that may not find the default": (
        (default("y int DEFAULT 1, FOREIGN KEY (x, y) REFERENCES v (a, b) ON DELETE CASCADE"),), "SM134", ROWS,
    ),
    "a key to itself in a table that loses rows": (
        (table("up int REFERENCES a (id)", x="ON DELETE CASCADE"),), "SM133",
        f"{ROWS}; UPDATE a SET up = 1 WHERE id = 2",
    ),
    "one that comes later": (
        (table(x="ON DELETE CASCADE"), "ALTER TABLE a ADD COLUMN up int REFERENCES a (id)"), "SM133",
        f"{ROWS}; UPDATE a SET up = 1 WHERE id = 2",
    ),
    "a key to itself that cannot be cleared": (
        (table("up int NOT NULL DEFAULT 1 REFERENCES a ON DELETE SET NULL", x="ON DELETE CASCADE"),), "SM134", ROWS,
    ),
    "a table that loses rows only later": (
        (
            "CREATE TABLE a (id int PRIMARY KEY)",
            "CREATE TABLE b (a_id int REFERENCES a (id))",
            "ALTER TABLE a ADD COLUMN x int REFERENCES t (id) ON DELETE CASCADE",
        ), "SM133", f"{ROWS}; INSERT INTO b VALUES (1), (2)",
    ),
}  # fmt: skip

ACCEPTED: dict[str, Case] = {
    "a plain key": ((table(), "CREATE INDEX i ON a (x)"), "", ROWS),
    "a unique column": ((table(), "CREATE UNIQUE INDEX u ON a (x)"), "", ROWS),
    "a unique index without the rows that are cleared": (
        (
            table("o int DEFAULT 5"),
            "CREATE UNIQUE INDEX u ON a (o, (coalesce(x, 0))) WHERE x IS NOT NULL AND o IS NOT NULL",
        ), "", ROWS,
    ),
    "an index that cannot fail": ((table(), "CREATE INDEX i ON a ((coalesce(x, 0))) WHERE x IS NULL"), "", ROWS),
    "EXCLUDE of the column": ((table("EXCLUDE USING btree (x WITH =)"),), "", ROWS),
    "a CHECK that NULL passes": ((table("CHECK (x < 5)"),), "", ROWS),
    "computing with another column": (
        (table("n int DEFAULT 4, m int GENERATED ALWAYS AS (100 / n) STORED, CHECK (n IS NOT NULL)"),), "", ROWS,
    ),
    "a default that is there": ((default(),), "", ROWS),
    "MATCH FULL that is cleared as a whole": (
        (
            "CREATE TABLE a (id int, x int, y int, FOREIGN KEY (x, y) REFERENCES v MATCH FULL ON DELETE SET NULL)",
        ), "", "INSERT INTO a VALUES (1, 1, 1), (2, 2, 1)",
    ),
    "a tree that goes with its root": (
        (table("up int REFERENCES a (id) ON DELETE CASCADE", x="ON DELETE CASCADE"),), "",
        f"{ROWS}; UPDATE a SET up = 1 WHERE id = 2",
    ),
    "a tree that stays": (
        (table("up int REFERENCES a (id)"), "CREATE TABLE b (a_id int REFERENCES a (id))"), "",
        f"{ROWS}; UPDATE a SET up = 1 WHERE id = 2; INSERT INTO b VALUES (1)",
    ),
    "a key of a table that nobody refers to": (
        ("CREATE TABLE a (id int PRIMARY KEY)", "ALTER TABLE a ADD COLUMN x int REFERENCES t (id) ON DELETE CASCADE"),
        "", ROWS,
    ),
}  # fmt: skip


def codes(statements: tuple[str, ...]) -> list[str]:
    steps = tuple(Statement(sql=sql) for sql in statements)
    judged = Plan(revision="0001_a", parent=None, flag="a", script_sha256="x", steps=steps)
    return [found.code for found in lint_plan(judged, (), Lint(pg_versions=(15, 18))) if found.fails]


def deletes(connection: psycopg.Connection, statements: tuple[str, ...], rows: str) -> None:
    """Create it all, insert the rows, and do what an application does today."""
    connection.execute(OLD)
    for statement in statements:
        connection.execute(statement)
    connection.execute(rows)
    connection.execute("DELETE FROM v WHERE a = 2")
    connection.execute("DELETE FROM t WHERE id = 1")
    connection.execute("DELETE FROM t WHERE id = 2")


@pytest.mark.parametrize(("statements", "code", "rows"), REFUSED.values(), ids=REFUSED)
def test_what_would_make_a_delete_of_today_fail_is_refused(
    statements: tuple[str, ...], code: str, rows: str, shard: Shard, connect: Connect
) -> None:
    assert codes(statements) == [code]

    with pytest.raises((psycopg.IntegrityError, psycopg.DataError)):
        deletes(connect(shard), statements, rows)


@pytest.mark.parametrize(("statements", "_", "rows"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_accepted_lets_every_delete_work(
    statements: tuple[str, ...], _: str, rows: str, shard: Shard, connect: Connect
) -> None:
    assert codes(statements) == []

    deletes(connect(shard), statements, rows)
