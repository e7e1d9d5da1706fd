"""SA0xx: application code that would notice a new column, or asks for a flag that nobody has."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "CapturedColumn",
    "CopyWithoutColumns",
    "InsertSelectStar",
    "InsertWithoutColumns",
    "NaturalJoin",
    "RowCast",
    "SelectStar",
    "UnionStar",
    "UnknownFlag",
    "UnqualifiedInJoin",
    "WholeRow",
]


class SelectStar(Rule):
    """
    Finds `SELECT *` and `RETURNING *` of a table.

    Why: a prepared statement fails once with every connection after a column was added, and drivers prepare by
    themselves (psycopg after five runs); the row also grows in places that unpack it.
    Example: `SELECT * FROM customer WHERE id = %s`.
    Use instead: the columns that are used.
    """

    code, name, context, ignorable = "SA001", "select-star", "application", True
    notices = "cached plan must not change result type (0A000) until the connection is replaced"
    VALID = (
        "SELECT id, name FROM customer",
        "SELECT count(*) FROM customer",
        "SELECT id FROM (SELECT * FROM customer) c",
    )
    INVALID = ("SELECT * FROM customer", "SELECT c.* FROM customer c", "UPDATE customer SET a = 1 RETURNING *")


class InsertWithoutColumns(Rule):
    """
    Warns of INSERT without a column list.

    Why: the values go to columns by position; while new columns stand last and may be left out it works, in a table
    that was created anew with another order it does not.
    Example: `INSERT INTO customer VALUES (1, 'x')`.
    Use instead: `INSERT INTO customer (id, name) VALUES (1, 'x')`.
    """

    code, name, context, warning = "SA002", "insert-without-columns", "application", True
    VALID = ("INSERT INTO customer (id) VALUES (1)", "INSERT INTO customer DEFAULT VALUES")
    INVALID = ("INSERT INTO customer VALUES (1, 'x')",)


class CopyWithoutColumns(Rule):
    """
    Finds COPY of a table without a column list.

    Why: COPY FROM wants every column of the table in each line, COPY TO hands them all out.
    Example: `COPY customer FROM STDIN`.
    Use instead: `COPY customer (id, name) FROM STDIN`.
    """

    code, name, context, ignorable = "SA003", "copy-without-columns", "application", True
    notices = "missing data for column (22P04)"
    VALID = ("COPY customer (id, name) FROM STDIN", "COPY (SELECT id FROM customer) TO STDOUT")
    INVALID = ("COPY customer FROM STDIN", "COPY customer TO STDOUT")


class InsertSelectStar(Rule):
    """
    Finds INSERT … SELECT *.

    Why: the source has one column more than the target from one moment to the next.
    Example: `INSERT INTO customer_archive SELECT * FROM customer`.
    Use instead: both column lists written out.
    """

    code, name, context, ignorable = "SA004", "insert-select-star", "application", True
    notices = "INSERT has more expressions than target columns (42601)"
    VALID = ("INSERT INTO archive (id) SELECT id FROM customer",)
    INVALID = ("INSERT INTO archive SELECT * FROM customer",)


class UnionStar(Rule):
    """
    Finds UNION, INTERSECT and EXCEPT over `SELECT *`.

    Why: the two sides no longer have the same number of columns.
    Example: `SELECT * FROM customer UNION ALL SELECT * FROM customer_archive`.
    Use instead: the columns written out.
    """

    code, name, context, ignorable = "SA005", "union-star", "application", True
    notices = "each UNION query must have the same number of columns (42601)"
    VALID = ("SELECT id FROM customer UNION SELECT id FROM archive",)
    INVALID = ("SELECT * FROM customer UNION SELECT * FROM archive",)


class NaturalJoin(Rule):
    """
    Finds NATURAL JOIN.

    Why: it joins by every name that both tables have; a new column makes the result empty without any error.
    Example: `SELECT id FROM customer NATURAL JOIN address`.
    Use instead: `JOIN address USING (customer_id)`.
    """

    code, name, context, ignorable = "SA006", "natural-join", "application", True
    notices = "rows silently vanish from the result"
    VALID = ("SELECT c.id FROM customer c JOIN address a USING (customer_id)",)
    INVALID = ("SELECT c.id FROM customer c NATURAL JOIN address",)


class UnqualifiedInJoin(Rule):
    """
    Warns of columns without a table in a join of several.

    Why: when the other table gets a column of that name, the statement fails.
    Example: `SELECT name FROM customer c JOIN address a ON a.customer_id = c.id`.
    Use instead: `c.name`.
    """

    code, name, context, warning = "SA007", "unqualified-in-join", "application", True
    notices = "column reference is ambiguous (42702)"
    VALID = ("SELECT c.name FROM customer c JOIN address a ON a.customer_id = c.id",)
    INVALID = ("SELECT name FROM customer c JOIN address a ON a.customer_id = c.id",)


class CapturedColumn(Rule):
    """
    Warns of a column in a sub-select that belongs to the outer query.

    Why: when the inner table gets a column of that name, the inner one is meant from then on, without any error.
    Known only for tables whose columns the migrations tell.
    Example: `SELECT id FROM customer WHERE id IN (SELECT customer_id FROM address WHERE city = home)`.
    Use instead: `customer.home`.
    """

    code, name, context, warning = "SA008", "captured-column", "application", True
    notices = "the sub-select silently answers another question"


class RowCast(Rule):
    """
    Finds `ROW(…)` cast to a table's row type.

    Why: the row type has one field more from one moment to the next.
    Example: `ROW(1, 'x')::customer`.
    Use instead: the columns themselves.
    """

    code, name, context, ignorable = "SA009", "row-cast", "application", True
    notices = "cannot cast type record (42846)"
    VALID = ("SELECT ROW(1, 'x')",)
    INVALID = ("SELECT ROW(1, 'x')::customer",)


class WholeRow(Rule):
    """
    Warns of a whole row used as one value: to_jsonb(t), row_to_json(t), t::text.

    Why: the value grows by the new column, for everybody who reads it.
    Example: `SELECT to_jsonb(c) FROM customer c`.
    Use instead: `jsonb_build_object('id', c.id)`.
    """

    code, name, context, warning = "SA010", "whole-row", "application", True
    notices = "documents silently hold one key more"
    VALID = ("SELECT to_jsonb(c.name) FROM customer c",)
    INVALID = ("SELECT to_jsonb(c) FROM customer c", "SELECT c::text FROM customer c")


class UnknownFlag(Rule):
    """
    Finds `Flag("…")` whose name no plan has.

    Why: a flag without a row is OLD, as it has to be before its migration reaches a shard. So a misspelt one is OLD for
    ever: no error anywhere, old is read and written in LIVE, too, and the check before LIVE blames the rows.
    Example: `SPLIT_NAME = Flag("splt_name")`.
    Use instead: the flag's name as `shardmig plan` and `shardmig status` show it, the revision without its number
    unless the script says `flag = "…"`.
    """

    code, name, context, ignorable = "SA011", "unknown-flag", "application", True
    notices = "every shard is OLD for it, whatever its state"
