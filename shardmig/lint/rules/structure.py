"""SM1xx: structure steps."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "AddsConstraint",
    "AddsGenerated",
    "AddsIdentity",
    "AltersExisting",
    "AmbiguousName",
    "BlockingIndex",
    "BorrowedShape",
    "Comment",
    "ConcurrentlyAlone",
    "DataInStructure",
    "DatabaseCode",
    "Destroys",
    "EnumNeverGrows",
    "ForeignKeyBlocks",
    "ForeignKeyNotes",
    "IfExists",
    "IndexCanFail",
    "Locks",
    "Maintenance",
    "NoEquality",
    "NotNullWithoutDefault",
    "NotPermanent",
    "OnlyParent",
    "Opaque",
    "OtherObject",
    "OwnValuePerShard",
    "PartitionOfExisting",
    "Renames",
    "Replaces",
    "RewritesTable",
    "Rights",
    "SequenceOwner",
    "Session",
    "SetNullOnNotNull",
    "Transaction",
    "UniqueIndex",
    "UnknownType",
    "UnnamedIndex",
    "WideIndex",
]


class Destroys(Rule):
    """
    Refuses DROP and TRUNCATE, whatever they name.

    Why: releases that run today read it, and a shard that is switched back needs it.
    Example: `DROP TABLE child`, `ALTER TABLE t DROP COLUMN a`.
    Use instead: leave it; contract long after every shard is DONE and no release reads it, by hand.
    """

    code, name = "SM101", "destroys"
    notices = "every statement that names it fails"
    INVALID = ("DROP TABLE child", "TRUNCATE t", "ALTER TABLE t DROP COLUMN a", "DROP INDEX CONCURRENTLY ix")


class Renames(Rule):
    """
    Refuses RENAME and SET SCHEMA.

    Why: for running code a renamed table is a dropped one.
    Example: `ALTER TABLE t RENAME COLUMN a TO b`.
    Use instead: add the new column, move the rows, switch the flag.
    """

    code, name = "SM102", "renames"
    notices = "the old name is gone"
    fix = 'op.add_column("t", sa.Column("new_name", ...)) in upgrade(), and move_rows("t", forward=..., back=...)'
    INVALID = ("ALTER TABLE t RENAME TO tt", "ALTER TABLE t SET SCHEMA s2", "ALTER TYPE mood RENAME VALUE 'x' TO 'y'")


class AltersExisting(Rule):
    """
    Refuses every ALTER but ALTER TABLE … ADD COLUMN.

    Why: types rewrite, constraints scan and refuse old writes, defaults and triggers change what old writes do.
    Example: `ALTER TABLE t ALTER COLUMN a TYPE bigint`, `ALTER TABLE t ADD CHECK (a > 0) NOT VALID`.
    Use instead: a new column or table that has it from its birth, and a move.
    """

    code, name = "SM103", "alters-existing"
    notices = "what it writes and reads behaves differently from one moment to the next"
    fix = 'op.add_column("t", sa.Column("a_new", ...)) in upgrade(), and move_rows("t", forward={"a_new": "a"}, ...)'
    INVALID = (
        "ALTER TABLE t ALTER COLUMN a TYPE bigint",
        "ALTER TABLE t ADD UNIQUE (a)",
        "ALTER TABLE t ADD COLUMN n int, ALTER COLUMN a SET DEFAULT 1",
        "ALTER SEQUENCE s RESTART",
    )


class Replaces(Rule):
    """
    Refuses OR REPLACE.

    Why: what stood there before is gone without a trace, and what replaces it may answer differently.
    Example: `CREATE OR REPLACE VIEW v AS SELECT 1`.
    Use instead: a new object under a new name, used by the release that knows it.
    """

    code, name = "SM104", "replaces"
    notices = "the same name answers differently"
    INVALID = ("CREATE OR REPLACE VIEW v AS SELECT 1",)


class Opaque(Rule):
    """
    Refuses statements whose effect is not in their text: DO, CALL, EXECUTE, EXPLAIN, COPY, cursors, LOAD, NOTIFY.

    Why: a body is a string to the parser and may do anything, also what the catalog never shows.
    Example: `DO $$ BEGIN PERFORM 1; END $$`.
    Use instead: the plain statements themselves, in `upgrade()` or `move_rows`.
    """

    code, name = "SM105", "opaque"
    INVALID = ("DO $$ BEGIN PERFORM 1; END $$", "CALL p()", "EXPLAIN ANALYZE DELETE FROM t", "COPY t FROM STDIN")


class Session(Rule):
    """
    Refuses SET, RESET, DISCARD and their kin.

    Why: the runner sets timeouts, role and search_path and relies on them; a script that moves them moves the meaning
    of everything after it.
    Example: `SET LOCAL statement_timeout = 0`.
    Use instead: `[session]` in the configuration.
    """

    code, name = "SM106", "session"
    INVALID = ("SET search_path = s2", "RESET ALL", "SET ROLE postgres", "DISCARD ALL")


class Transaction(Rule):
    """
    Refuses BEGIN, COMMIT, SAVEPOINT and every other transaction control.

    Why: a step commits together with its record in the ledger; whoever commits in between tears them apart.
    Example: `COMMIT`.
    Use instead: nothing; each step has its transaction.
    """

    code, name = "SM107", "transaction"
    INVALID = ("COMMIT", "BEGIN", "SAVEPOINT a", "PREPARE TRANSACTION 'x'")


class Locks(Rule):
    """
    Refuses LOCK.

    Why: the runner takes locks with a ladder of short timeouts; a LOCK in a script waits in everybody's way.
    Example: `LOCK TABLE t IN SHARE MODE`.
    Use instead: nothing; `FOR UPDATE` or `FOR SHARE` in a move locks single rows.
    """

    code, name = "SM108", "locks"
    notices = "it waits"
    INVALID = ("LOCK TABLE t",)


class Maintenance(Rule):
    """
    Refuses VACUUM, ANALYZE, CLUSTER, REINDEX, REFRESH, CHECKPOINT.

    Why: they rewrite or block, and belong to the operator's hours, not to a release.
    Example: `VACUUM FULL t`.
    Use instead: the operator's own tools.
    """

    code, name = "SM109", "maintenance"
    INVALID = ("VACUUM t", "REINDEX TABLE t", "REFRESH MATERIALIZED VIEW mv")


class DatabaseCode(Rule):
    """
    Refuses code in the database: functions, triggers, rules, policies, casts, operators, event triggers.

    Why: a trigger or rule acts on old writes; a new overload captures calls of old ones (`price(5)` answers another
    type); bodies cannot be judged.
    Example: `CREATE TRIGGER trg BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()`.
    Use instead: the application writes both representations in DUAL.
    """

    code, name = "SM110", "database-code"
    notices = "its own writes and calls do something else"
    INVALID = (
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE TRIGGER trg BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()",
    )


class Rights(Rule):
    """
    Refuses changes of rights, owners and roles, except GRANT on what this plan creates.

    Why: a REVOKE stops running code; a GRANT on existing tables is not part of a release's structure.
    Example: `REVOKE SELECT ON t FROM app`.
    Use instead: `grant = { app = "SELECT, INSERT" }` under `[session]`, which holds for every new table.
    """

    code, name = "SM111", "rights"
    notices = "permission denied, or more than it should have"
    INVALID = ("REVOKE SELECT ON t FROM app", "GRANT SELECT ON t TO app", "REASSIGN OWNED BY a TO b", "CREATE ROLE r")


class DataInStructure(Rule):
    """
    Refuses INSERT, UPDATE, DELETE, MERGE and SELECT in `upgrade()`.

    Why: structure takes short locks in one go; rows are moved in small batches with a cursor that survives a crash.
    Example: `op.execute("UPDATE t SET n = a")` in `upgrade()`.
    Use instead: `move_rows` in `move()`.
    """

    code, name = "SM112", "data-in-structure"
    notices = "rows locked for as long as the whole table takes"
    fix = 'def move() -> None:\n    move_rows("t", forward={"n": "a"}, back={"a": "n"})'
    INVALID = ("UPDATE t SET n = a", "INSERT INTO t VALUES (1)", "SELECT 1")


class OtherObject(Rule):
    """
    Refuses objects that plans do not manage: views, domains, extensions, statistics, publications, languages, servers.

    Why: views pin columns, domains cannot evolve online, extensions bring names and casts of their own, a publication
    of all tables stops UPDATEs of those without a key.
    Example: `CREATE EXTENSION pgcrypto`.
    Use instead: set them up before the fleet exists, or by hand where they belong.
    """

    code, name = "SM113", "other-object"
    INVALID = (
        "CREATE VIEW v2 AS SELECT 1",
        "CREATE DOMAIN pos AS int CHECK (VALUE > 0)",
        "CREATE EXTENSION pgcrypto",
        "CREATE PUBLICATION p FOR ALL TABLES",
    )


class IfExists(Rule):
    """
    Refuses IF EXISTS and IF NOT EXISTS.

    Why: the ledger makes a retry safe; the clause only hides drift: another table, a column of another type, an
    INVALID index of a failed attempt. ADD COLUMN IF NOT EXISTS queues for ACCESS EXCLUSIVE even when it does nothing.
    Example: `CREATE TABLE IF NOT EXISTS x (id int)`.
    Use instead: the statement without the clause.
    """

    code, name = "SM114", "if-exists"
    fix = "the same statement without IF [NOT] EXISTS"
    VALID = ("CREATE TABLE x (id int)",)
    INVALID = (
        "CREATE TABLE IF NOT EXISTS x (id int)",
        "ALTER TABLE t ADD COLUMN IF NOT EXISTS n int",
        "ALTER TABLE IF EXISTS t ADD COLUMN n int",
        "CREATE INDEX CONCURRENTLY IF NOT EXISTS ix ON t (a)",
    )


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
    deferred, it fails at COMMIT. The same goes for a key to a new table whose rows an existing one takes along.
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
    )


class SetNullOnNotNull(Rule):
    """
    Refuses ON DELETE SET NULL (or SET DEFAULT) where the column cannot take that value.

    Why: the DELETE of today then fails on the new table's NOT NULL, CHECK or UNIQUE.
    Example: `CREATE TABLE line (t_id int NOT NULL REFERENCES t (id) ON DELETE SET NULL)`.
    Use instead: ON DELETE CASCADE, or a nullable column.
    """

    code, name = "SM134", "set-null-on-not-null"
    notices = "DELETE on the referenced table fails (23502, 23514)"
    fix = 'sa.ForeignKey("t.id", ondelete="CASCADE")'
    VALID = ("CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE SET NULL)",)
    INVALID = (
        "CREATE TABLE line (t_id int NOT NULL REFERENCES t (id) ON DELETE SET NULL)",
        "CREATE TABLE line (t_id int PRIMARY KEY REFERENCES t (id) ON DELETE SET NULL)",
        "CREATE TABLE line (t_id int REFERENCES t (id) ON DELETE SET NULL CHECK (t_id IS NOT NULL))",
    )


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


class SequenceOwner(Rule):
    """
    Refuses a sequence owned by an existing column.

    Why: dropping the column later would drop the sequence; ownership is a change of the existing table's dependencies.
    Example: `CREATE SEQUENCE s OWNED BY t.id`.
    Use instead: CREATE SEQUENCE without OWNED BY.
    """

    code, name = "SM150", "sequence-owner"
    fix = 'op.execute("CREATE SEQUENCE invoice_no")'
    VALID = ("CREATE SEQUENCE invoice_no",)
    INVALID = ("CREATE SEQUENCE s OWNED BY t.id",)


class Comment(Rule):
    """
    Refuses COMMENT on anything but a table or a column.

    Why: only these are known to pass beside open readers and writers and to mean nothing to programs.
    Example: `COMMENT ON DATABASE d IS 'x'`.
    Use instead: a comment on the table.
    """

    code, name = "SM151", "comment"
    VALID = ("COMMENT ON TABLE t IS 'orders'", "COMMENT ON COLUMN t.a IS 'amount'")
    INVALID = ("COMMENT ON DATABASE d IS 'x'", "COMMENT ON INDEX ix IS 'x'")


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


class EnumNeverGrows(Rule):
    """
    Warns that an enum can never grow here.

    Why: ALTER TYPE … ADD VALUE is not additive: code of today may read a label that it does not know.
    Example: `CREATE TYPE order_state AS ENUM ('new', 'paid')`.
    Use instead: text with the rule in the application, where values will be added.
    """

    code, name, warning = "SM192", "enum-never-grows", True
    INVALID = ("CREATE TYPE order_state AS ENUM ('new', 'paid')",)


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
