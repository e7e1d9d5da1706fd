"""SM14x: how an index comes onto a table that is in use."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "AmbiguousName",
    "BlockingIndex",
    "ConcurrentlyAlone",
    "IndexCanFail",
    "UniqueIndex",
    "UnnamedIndex",
    "WideIndex",
]


class BlockingIndex(Rule):
    """
    Refuses CREATE INDEX without CONCURRENTLY on an existing table.

    Why: it holds SHARE for the whole build: every INSERT, UPDATE and DELETE waits.
    Example: `CREATE INDEX ix ON t (a)`.
    Use instead: `postgresql_concurrently=True`; it becomes a step of its own, outside a transaction.
    """

    code, name = "SM140", "blocking-index"
    notices = "INSERT, UPDATE and DELETE wait until the index is built"
    fix = 'op.create_index("ix_t_a", "t", ["a"], postgresql_concurrently=True)'
    VALID = ("CREATE INDEX CONCURRENTLY ix ON t (a)",)
    INVALID = ("CREATE INDEX ix ON t (a)",)


class UniqueIndex(Rule):
    """
    Refuses unique indexes on an existing table.

    Why: a duplicate that is lawful today fails, already while the index is being built.
    Example: `CREATE UNIQUE INDEX CONCURRENTLY ux ON t (a)`.
    Use instead: a plain index; uniqueness belongs to a new table or is kept by the application.
    """

    code, name = "SM141", "unique-index"
    notices = "INSERT of a duplicate fails (23505)"
    fix = 'op.create_index("ix_t_a", "t", ["a"], postgresql_concurrently=True)  # without unique=True'
    INVALID = ("CREATE UNIQUE INDEX CONCURRENTLY ux ON t (a)",)


class IndexCanFail(Rule):
    """
    Refuses index expressions and predicates on an existing table that can fail or that nobody vouched for.

    Why: the expression is computed by every INSERT of today; where it fails, the INSERT fails.
    Example: `CREATE INDEX CONCURRENTLY ix ON t ((100 / (a - 500)))`.
    Use instead: plain columns; lower, upper, md5, coalesce; predicates IS [NOT] NULL and comparisons with constants.
    """

    code, name = "SM142", "index-can-fail"
    notices = "INSERT fails where the expression does (22012, 22003)"
    VALID = (
        "CREATE INDEX CONCURRENTLY ix ON t (lower(b)) WHERE a IS NOT NULL",
        "CREATE INDEX CONCURRENTLY ix ON t (a) WHERE b = 'open' AND c > 0",
    )
    INVALID = (
        "CREATE INDEX CONCURRENTLY ix ON t ((100 / (a - 500)))",
        "CREATE INDEX CONCURRENTLY ix ON t (a) WHERE b::int > 0",
    )


class UnnamedIndex(Rule):
    """
    Refuses a concurrent index without a name.

    Why: a build that was interrupted leaves an INVALID index; only by its name can the runner find and rebuild it.
    Example: `CREATE INDEX CONCURRENTLY ON t (a)`.
    Use instead: a name.
    """

    code, name = "SM143", "unnamed-index"
    fix = 'op.create_index("ix_t_a", "t", ["a"], postgresql_concurrently=True)'
    INVALID = ("CREATE INDEX CONCURRENTLY ON t (a)",)


class ConcurrentlyAlone(Rule):
    """
    Refuses a concurrent index inside a transaction, and anything else outside one.

    Why: CREATE INDEX CONCURRENTLY cannot run in a transaction (25001); everything else commits with its record.
    Example: a plan file whose header was edited by hand.
    Use instead: render the plan anew: `shardmig plan`.
    """

    code, name, context = "SM144", "concurrently-alone", "plan"


# --------------------------------------------------------------------------------------------------------------------
# Warnings: additive, but worth a look


class AmbiguousName(Rule):
    """
    Warns when a new column's name exists in another table.

    Why: an unqualified name in a join of today becomes ambiguous (42702), NATURAL JOIN joins by it, a sub-select that
    meant the outer table's column is captured.
    Example: `ALTER TABLE t ADD COLUMN name text` where `customer.name` exists.
    Use instead: a name with the table's prefix.
    """

    code, name, warning, context = "SM191", "ambiguous-name", True, "plan"
    notices = "SELECT name FROM t JOIN other fails (42702); NATURAL JOIN silently changes"


class WideIndex(Rule):
    """
    Warns when a B-tree index holds a column of unlimited text.

    Why: a value of more than about 2.7 kB after compression does not fit into a B-tree page; INSERTs of such values
    fail from then on.
    Example: `CREATE INDEX CONCURRENTLY ix ON t (body)` where body is text.
    Use instead: `USING hash`, or an index on md5(body).
    """

    code, name, warning, context = "SM193", "wide-index", True, "plan"
    notices = "INSERT of a very long value fails (54000)"
    fix = 'op.create_index("ix_t_b", "t", [sa.text("md5(b)")], postgresql_concurrently=True)'
