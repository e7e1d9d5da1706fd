"""SM2xx: moves."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "AddedTwice",
    "BatchToken",
    "ChangesByItself",
    "FlagTwice",
    "KeepsOldValue",
    "MoveWrites",
    "NoWhere",
    "NotRestored",
    "NotRowByRow",
    "ReadsOwnWrites",
    "StructureInMove",
    "UnknownColumn",
    "UnlockedSource",
    "WritesOldColumn",
    "WritesOldTable",
    "WritesWhileChecking",
]


class WritesOldColumn(Rule):
    """
    Refuses to write a column that this plan (or one it needs) did not add.

    Why: code of today reads it; a shard that is switched back must find it untouched.
    Example: `UPDATE t SET n = a, b = 'x' WHERE id < 100` where only n is new.
    Use instead: write the new column; name old ones in `back=` if a reverse move restores them.
    """

    code, name, context = "SM201", "writes-old-column", "move"
    notices = "rows change under it"
    VALID = ("UPDATE t SET n = a WHERE id < 100",)
    INVALID = ("UPDATE t SET n = a, b = 'x' WHERE id < 100", "UPDATE t SET (n, a) = (1, 2) WHERE id < 100")


class WritesOldTable(Rule):
    """
    Refuses INSERT and DELETE on a table that this plan (or one it needs) did not create.

    Why: rows appear or vanish under code of today.
    Example: `DELETE FROM t WHERE id < 100`.
    Use instead: a new table; or a new column that says what is done with the row.
    """

    code, name, context = "SM202", "writes-old-table", "move"
    notices = "rows appear or vanish"
    VALID = ("INSERT INTO invoice (id, total) SELECT id, a FROM t WHERE id < 10", "DELETE FROM invoice WHERE id < 10")
    INVALID = ("DELETE FROM t WHERE id < 100", "INSERT INTO t (id) VALUES (1)", "WITH d AS (DELETE FROM t) SELECT 1")


class NoWhere(Rule):
    """
    Refuses an UPDATE of an existing table without WHERE.

    Why: it locks and rewrites every row in one transaction.
    Example: `UPDATE t SET n = a`.
    Use instead: `WHERE {batch}`.
    """

    code, name, context = "SM203", "no-where", "move"
    notices = "writers of every row wait until the whole table is done"
    fix = 'move_rows("t", forward="UPDATE t SET n = a WHERE {batch}", ...)'
    VALID = ("UPDATE t SET n = a WHERE id < 10", "UPDATE invoice SET total = 0")
    INVALID = ("UPDATE t SET n = a",)


class StructureInMove(Rule):
    """
    Refuses everything in a move that is not one INSERT, UPDATE, DELETE, MERGE or SELECT.

    Why: structure has its own steps, with short locks and a proof; a move runs many times.
    Example: `CREATE INDEX CONCURRENTLY ix ON t (n)` in a move.
    Use instead: `upgrade()`.
    """

    code, name, context = "SM204", "structure-in-move", "move"
    INVALID = ("CREATE INDEX CONCURRENTLY ix ON t (n)", "ALTER TABLE t ADD COLUMN n int", "CREATE TABLE x (id int)")


class BatchToken(Rule):
    """
    Refuses a move's statement that does not hold `{batch}` exactly once where it bounds the rows.

    Why: it is replaced by the key range of the batch; anywhere but as an AND operand of the outer WHERE (or of the
    locked source SELECT) it bounds something else, and the statement walks the whole table.
    Example: `UPDATE t SET n = a WHERE {batch} OR a > 0`.
    Use instead: `WHERE {batch} AND …`.
    """

    code, name, context = "SM205", "batch-token", "plan"
    fix = "UPDATE t SET n = a WHERE {batch}"


class UnlockedSource(Rule):
    """
    Refuses a step that writes from a second table which it has not locked.

    Why: when the row to write is locked by the application, PostgreSQL looks again at that row only; the joined row
    stays as it was, and the stale value wins.
    Example: `UPDATE t SET n = r.name FROM ref r WHERE r.id = t.a AND {batch}`.
    Use instead: read the second table in `WITH s AS MATERIALIZED (SELECT … FOR SHARE)`.
    """

    code, name, context = "SM206", "unlocked-source", "plan"
    fix = (
        "WITH source AS MATERIALIZED (SELECT id, a FROM t WHERE {batch} FOR SHARE)\n"
        "INSERT INTO invoice (id, total) SELECT id, a FROM source\n"
        "ON CONFLICT (id) DO UPDATE SET total = EXCLUDED.total"
    )


class KeepsOldValue(Rule):
    """
    Refuses forward moves that keep what is already there: DO NOTHING, `new IS NULL`, MERGE.

    Why: after a move was given up and started again, dead values would stay; and MERGE cannot lock its source.
    Example: `INSERT … ON CONFLICT DO NOTHING`, `UPDATE t SET n = a WHERE {batch} AND n IS NULL`.
    Use instead: overwrite: `ON CONFLICT (key) DO UPDATE SET …`, or the UPDATE without the condition.
    """

    code, name, context = "SM207", "keeps-old-value", "plan"
    fix = "ON CONFLICT (id) DO UPDATE SET total = EXCLUDED.total"


class WritesWhileChecking(Rule):
    """
    Refuses checks that do more than read.

    Why: a check runs again and again, also long after the move.
    Example: `check="UPDATE t SET n = a WHERE {batch} RETURNING id"`.
    Use instead: one SELECT that returns the keys of rows that disagree.
    """

    code, name, context = "SM208", "writes-while-checking", "plan"
    fix = "SELECT id FROM t WHERE {batch} AND n IS DISTINCT FROM a"


class NotRestored(Rule):
    """
    Refuses a reverse move that writes anything but the old columns it declares as restored.

    Why: the way back may change exactly what the plan says, nothing else.
    Example: `back="UPDATE t SET b = n WHERE {batch}"` with `restores=("a",)`.
    Use instead: name the columns in `restores=`, or leave them alone.
    """

    code, name, context = "SM209", "not-restored", "reverse"
    VALID = ("UPDATE t SET a = n WHERE id < 10",)
    INVALID = ("UPDATE t SET b = n WHERE id < 10", "UPDATE t SET n = a WHERE id < 10", "DELETE FROM t WHERE id < 10")


class ReadsOwnWrites(Rule):
    """
    Refuses a forward move whose values depend on what is already in the new column.

    Why: new must be a function of old alone, or the check cannot say what it should be.
    Example: `UPDATE t SET n = coalesce(n, a) WHERE {batch}`.
    Use instead: `SET n = a`.
    """

    code, name, context = "SM210", "reads-own-writes", "plan"


class ChangesByItself(Rule):
    """
    Refuses values that differ each time they are computed, where a check compares them.

    Why: random(), now() and nextval() give the check another value than the move, so no row ever agrees.
    Example: `forward={"token": "gen_random_uuid()"}`.
    Use instead: a value that follows from the row, such as md5(id::text).
    """

    code, name, context = "SM211", "changes-by-itself", "plan"


class NotRowByRow(Rule):
    """
    Refuses clauses that make a batch's result depend on other batches: LIMIT, DISTINCT, aggregates, set operations.

    Why: the batch is a key range; a LIMIT leaves rows behind the cursor, an aggregate sees only a part of its group.
    Example: `INSERT INTO total (k, n) SELECT k, count(*) FROM t WHERE {batch} GROUP BY k`.
    Use instead: walk the table whose key is the group's, and aggregate in a sub-select.
    """

    code, name, context = "SM212", "not-row-by-row", "plan"


class MoveWrites(Rule):
    """
    Refuses a move whose statement does not write what the plan says it writes.

    Why: preflight, check and the way back go by `target`, `writes` and `restores`; a statement that writes elsewhere
    is checked by nothing.
    Example: `writes=("n",)` with `UPDATE t SET m = a WHERE {batch}`.
    Use instead: one statement for the declared columns of the declared table.
    """

    code, name, context = "SM213", "move-writes", "plan"


class UnknownColumn(Rule):
    """
    Refuses a move, and a `relax`, that names a column which its table does not have, where plans have made the table.

    Why: the server refuses the move on the canary, when structure is in place and writers write both; what `relax`
    misspells is still NOT NULL when the flag is to go DONE.
    Example: `forward={"total_cents": "totl * 100"}` where the column is called `total`.
    Use instead: the column's name. One that people added by hand, on every shard, is named under `[lint]`, as in
    `known_columns = ["orders.total_cents"]`; a function of the row, written `t.f`, in `known_functions`.
    """

    code, name, context = "SM214", "unknown-column", "plan"


class FlagTwice(Rule):
    """
    Refuses a flag or revision that an earlier plan already has, and `needs` of a flag that none has.

    Why: two migrations behind one flag cannot be switched apart.
    Example: `0002_split_name` and `0009_split_name`.
    Use instead: `flag = "split_name_again"` in the script.
    """

    code, name, context = "SM220", "flag-twice", "plan"
    fix = 'flag = "another_name"'


class AddedTwice(Rule):
    """
    Refuses a table, column, type, index or sequence that an earlier plan, or an earlier step, adds already.

    Why: the server refuses the second one, on the canary, after everything was reviewed.
    Example: `op.create_table("customer_tag", …)` in two scripts, of which `--autogenerate` wrote the second before the
    first was applied.
    Use instead: leave the second one out; allow it where people dropped the first on every shard.
    """

    code, name, context, ignorable = "SM221", "added-twice", "plan", True
