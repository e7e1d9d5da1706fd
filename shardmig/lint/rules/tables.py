"""SM12x, SM13x: what a new table, a new column and a foreign key may be."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "AddsConstraint",
    "AddsGenerated",
    "AddsIdentity",
    "BorrowedShape",
    "ForeignKeyBlocks",
    "ForeignKeyNotes",
    "NoEquality",
    "NotNullWithoutDefault",
    "NotPermanent",
    "OnlyParent",
    "OwnValuePerShard",
    "PartitionOfExisting",
    "RewritesTable",
    "SetNullOnNotNull",
    "UnknownType",
]


class NotNullWithoutDefault(Rule):
    """
    Refuses NOT NULL on a new column that has no default that is surely not null.

    Why: it fails on a table with rows, and where it succeeds every INSERT of today fails, because it does not name the
    column. `default=` of SQLAlchemy renders no DEFAULT; `server_default=` does.
    Example: `ALTER TABLE t ADD COLUMN n int NOT NULL`.
    Use instead: a nullable column, or one with a constant default.
    """

    code, name = "SM120", "not-null-without-default"
    notices = "INSERT fails: null value in column violates not-null constraint (23502)"
    fix = 'op.add_column("t", sa.Column("n", sa.Integer, nullable=False, server_default="0"))'
    VALID = ("ALTER TABLE t ADD COLUMN n int NOT NULL DEFAULT 0", "ALTER TABLE t ADD COLUMN n int")
    INVALID = (
        "ALTER TABLE t ADD COLUMN n int NOT NULL",
        "ALTER TABLE t ADD COLUMN n int NOT NULL DEFAULT NULL::int",
        "ALTER TABLE t ADD COLUMN n int NOT NULL DEFAULT nullif(1, 1)",
    )


class RewritesTable(Rule):
    """
    Refuses volatile defaults on a column of an existing table.

    Why: a volatile default rewrites the whole table under ACCESS EXCLUSIVE, with everybody waiting.
    Example: `ALTER TABLE t ADD COLUMN n uuid DEFAULT gen_random_uuid()`.
    Use instead: a nullable column; the application fills new rows, a move fills the old ones.
    """

    code, name = "SM121", "rewrites-table"
    notices = "every statement on the table waits while it is rewritten"
    fix = 'op.add_column("t", sa.Column("n", sa.Uuid))  # and fill it in move()'
    VALID = (
        "ALTER TABLE t ADD COLUMN n timestamptz DEFAULT now()",
        "CREATE TABLE x (id uuid DEFAULT gen_random_uuid())",
    )
    INVALID = (
        "ALTER TABLE t ADD COLUMN n uuid DEFAULT gen_random_uuid()",
        "ALTER TABLE t ADD COLUMN n float8 DEFAULT coalesce(NULL, random())",
    )


class AddsIdentity(Rule):
    """
    Refuses serial and identity columns on an existing table.

    Why: every row gets its own number, so the table is rewritten under ACCESS EXCLUSIVE.
    Example: `ALTER TABLE t ADD COLUMN n bigserial`.
    Use instead: a nullable column and CREATE SEQUENCE; the application or a move draws the numbers.
    """

    code, name = "SM122", "adds-identity"
    notices = "every statement on the table waits while it is rewritten"
    VALID = ("CREATE TABLE x (id bigserial PRIMARY KEY)",)
    INVALID = (
        "ALTER TABLE t ADD COLUMN n bigserial",
        "ALTER TABLE t ADD COLUMN n int GENERATED ALWAYS AS IDENTITY",
    )


class AddsGenerated(Rule):
    """
    Refuses generated columns on an existing table.

    Why: STORED rewrites the table, and an INSERT of today fails where the expression does; VIRTUAL makes `SELECT *`
    fail there.
    Example: `ALTER TABLE t ADD COLUMN n int GENERATED ALWAYS AS (a * 2) STORED`.
    Use instead: a plain column, written by the application and a move.
    """

    code, name = "SM123", "adds-generated"
    notices = "INSERT, or SELECT *, fails where the expression fails (22012)"
    fix = 'op.add_column("t", sa.Column("n", sa.Integer)); move_rows("t", forward={"n": "a * 2"})'
    VALID = ("CREATE TABLE x (a int, n int GENERATED ALWAYS AS (a * 2) STORED)",)
    INVALID = ("ALTER TABLE t ADD COLUMN n int GENERATED ALWAYS AS (a * 2) STORED",)


class AddsConstraint(Rule):
    """
    Refuses CHECK, UNIQUE, PRIMARY KEY and REFERENCES on a new column of an existing table.

    Why: they scan the table or build an index under ACCESS EXCLUSIVE; a reference makes DELETE on the other table
    fail, and without an index each of those scans this one.
    Example: `ALTER TABLE t ADD COLUMN n int REFERENCES ref (id)`.
    Use instead: the plain column and a concurrent index; the application keeps the rule.
    """

    code, name = "SM124", "adds-constraint"
    notices = "INSERT, UPDATE or a DELETE elsewhere fails (23503, 23505, 23514), or waits for the scan"
    fix = 'op.add_column("t", sa.Column("n", sa.Integer))  # without ForeignKey, unique= and CheckConstraint'
    INVALID = (
        "ALTER TABLE t ADD COLUMN n int REFERENCES ref (id)",
        "ALTER TABLE t ADD COLUMN n int UNIQUE",
        "ALTER TABLE t ADD COLUMN n int CHECK (n > 0)",
    )


class NoEquality(Rule):
    """
    Refuses types without equality (json, xml, point, …) on an existing table.

    Why: `SELECT DISTINCT *`, UNION, GROUP BY the row and row comparison of today need `=` for every column.
    Example: `ALTER TABLE t ADD COLUMN n json`.
    Use instead: jsonb for json; two numeric columns for point; text for xml.
    """

    code, name, ignorable = "SM125", "no-equality", True
    notices = "SELECT DISTINCT * and UNION fail: could not identify an equality operator (42883)"
    fix = 'op.add_column("t", sa.Column("n", postgresql.JSONB))'
    VALID = ("ALTER TABLE t ADD COLUMN n jsonb", "CREATE TABLE x (n json)")
    INVALID = ("ALTER TABLE t ADD COLUMN n json", "ALTER TABLE t ADD COLUMN n point[]")


class UnknownType(Rule):
    """
    Refuses types that are neither PostgreSQL's own, nor created by a plan, nor configured.

    Why: a domain with a CHECK rewrites the table even without a default, and a name does not show whether it is one.
    `sa.Enum` in `add_column` renders no CREATE TYPE.
    Example: `ALTER TABLE t ADD COLUMN n some_domain`.
    Use instead: a type of PostgreSQL; an enum that a plan creates; or `known_types = ["citext"]` under `[lint]`.
    """

    code, name = "SM126", "unknown-type"
    fix = "op.execute(\"CREATE TYPE order_state AS ENUM ('new', 'paid')\")  # before the column; or sa.Text"
    VALID = ("ALTER TABLE t ADD COLUMN n uuid[]",)
    INVALID = ("ALTER TABLE t ADD COLUMN n some_domain", "ALTER TABLE t ADD COLUMN n public.text")


class OnlyParent(Rule):
    """
    Refuses ONLY.

    Why: a column added to a parent only is an error where it has children, an index ON ONLY blocks writers and is
    invalid until every partition has its own.
    Example: `ALTER TABLE ONLY pl ADD COLUMN n int`.
    Use instead: the statement without ONLY.
    """

    code, name = "SM127", "only-parent"
    INVALID = ("ALTER TABLE ONLY ip ADD COLUMN n int", "CREATE INDEX ix ON ONLY pl (a)")


class NotPermanent(Rule):
    """
    Refuses temporary and unlogged tables and sequences, tablespaces and other access methods.

    Why: a temporary table shadows the real one of its name; an unlogged one is empty after a crash and on standbys; a
    tablespace may be missing on a shard.
    Example: `CREATE TEMP TABLE t (id int)`.
    Use instead: a plain CREATE TABLE.
    """

    code, name = "SM130", "not-permanent"
    VALID = ("CREATE TABLE x (id int)",)
    INVALID = (
        "CREATE TEMP TABLE x (id int)",
        "CREATE UNLOGGED TABLE x (id int)",
        "CREATE TABLE x (id int) TABLESPACE d",
    )


class BorrowedShape(Rule):
    """
    Refuses tables whose shape or rows come from elsewhere: LIKE, OF, INHERITS, AS, SELECT INTO.

    Why: the plan no longer says what the table looks like, so shards drift; INHERITS makes the new rows appear in the
    parent's SELECT of today; AS loads rows without batches.
    Example: `CREATE TABLE x AS SELECT * FROM t`.
    Use instead: the columns written out, and rows in `move()`.
    """

    code, name = "SM131", "borrowed-shape"
    fix = 'op.create_table("x", sa.Column(...), ...) in upgrade(), rows by move_rows(...) in move()'
    INVALID = (
        "CREATE TABLE x AS SELECT * FROM t",
        "CREATE TABLE x (LIKE t)",
        "CREATE TABLE x () INHERITS (ip)",
        "SELECT * INTO x FROM t",
    )


class PartitionOfExisting(Rule):
    """
    Refuses partitions of tables that exist.

    Why: the parent is locked ACCESS EXCLUSIVE and a DEFAULT partition is scanned; an INSERT that failed before
    succeeds, or rows go elsewhere.
    Example: `CREATE TABLE p2 PARTITION OF pl FOR VALUES FROM (1) TO (2)`.
    Use instead: the job that makes partitions every month; a plan is not a calendar.
    """

    code, name = "SM132", "partition-of-existing"
    notices = "everything on the parent waits; rows land elsewhere"
    INVALID = ("CREATE TABLE p2 PARTITION OF pl FOR VALUES FROM (1) TO (2)",)


class ForeignKeyBlocks(Rule):
    """
    Refuses a foreign key to an existing table unless deleting there still works.

    Why: with NO ACTION or RESTRICT a DELETE of today on the referenced table fails as soon as a new row points at it;
    deferred, it fails at COMMIT. The same goes for a key to a new table whose rows an existing one takes along,
    be it the table itself.
    Example: `CREATE TABLE line (id int PRIMARY KEY, t_id int REFERENCES t (id))`.
    Use instead: ON DELETE CASCADE or ON DELETE SET NULL.
    """

    code, name = "SM133", "foreign-key-blocks"
    notices = "DELETE on the referenced table fails (23503)"
    fix = 'sa.ForeignKey("t.id", ondelete="CASCADE")'
    VALID = (
        "CREATE TABLE line (id int PRIMARY KEY, t_id int REFERENCES t (id) ON DELETE CASCADE)",
        "CREATE TABLE tree (id int PRIMARY KEY, up int REFERENCES tree (id))",
    )
    INVALID = (
        "CREATE TABLE line (id int PRIMARY KEY, t_id int REFERENCES t (id))",
        "CREATE TABLE line (t_id int, FOREIGN KEY (t_id) REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TABLE line (id int PRIMARY KEY, t_id int REFERENCES t (id) ON DELETE CASCADE, up int REFERENCES line)",
    )


class SetNullOnNotNull(Rule):
    """
    Refuses ON DELETE SET NULL (or SET DEFAULT) where the column cannot take that value, or may not.

    Why: the DELETE of today then fails on the new table's NOT NULL, CHECK, UNIQUE or EXCLUDE, on an index or generated
    column that computes with it, where no partition takes the row, or on another key (MATCH FULL).
    Example: `CREATE TABLE line (t_id int NOT NULL REFERENCES t (id) ON DELETE SET NULL)`.
    Use instead: ON DELETE CASCADE, or a nullable column.
    """

    code, name = "SM134", "set-null-on-not-null"
    notices = "DELETE on the referenced table fails (23502, 23514)"
    fix = 'sa.ForeignKey("t.id", ondelete="CASCADE")'
    VALID = (
        "CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE SET NULL)",
        "CREATE TABLE line (t_id int UNIQUE REFERENCES t (id) ON DELETE SET NULL)",
    )
    INVALID = (
        "CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE SET NULL) PARTITION BY LIST (t_id)",
        "CREATE TABLE line (t_id int REFERENCES t ON DELETE SET NULL, n int GENERATED ALWAYS AS (7 / t_id) STORED)",
        "CREATE TABLE line (t_id int NOT NULL REFERENCES t (id) ON DELETE SET NULL)",
        "CREATE TABLE line (t_id int PRIMARY KEY REFERENCES t (id) ON DELETE SET NULL)",
        "CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE SET NULL CHECK (t_id IS NOT NULL))",
    )


# --------------------------------------------------------------------------------------------------------------------
# Warnings: additive, but worth a look


class OwnValuePerShard(Rule):
    """
    Warns that a default of the clock gives every shard its own value for its old rows.

    Why: now() is stable and evaluated once, so nothing is rewritten; but the same customer's rows on two shards get
    two values.
    Example: `ALTER TABLE t ADD COLUMN n timestamptz DEFAULT now()`.
    Use instead: a constant, if the value matters.
    """

    code, name, warning = "SM190", "own-value-per-shard", True
    VALID = ("ALTER TABLE t ADD COLUMN n timestamptz DEFAULT '2026-01-01 00:00:00+00'",)
    INVALID = ("ALTER TABLE t ADD COLUMN n timestamptz DEFAULT now()",)


class ForeignKeyNotes(Rule):
    """
    Warns what a foreign key to an existing table still costs.

    Why: TRUNCATE of the referenced table fails (0A000); without ON UPDATE CASCADE an UPDATE of its key fails; without
    an index on the new column each DELETE there scans the new table.
    Example: `CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE CASCADE)`.
    Use instead: ON UPDATE CASCADE where keys change, and an index on the column.
    """

    code, name, warning = "SM194", "foreign-key-notes", True
    notices = "UPDATE of a referenced key fails (23503)"
    fix = 'sa.ForeignKey("t.id", ondelete="CASCADE", onupdate="CASCADE")'
    VALID = ("CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE CASCADE ON UPDATE CASCADE)",)
    INVALID = ("CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE CASCADE)",)
