"""SM1xx: what a structure step may do at all, whatever it names."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "AltersExisting",
    "Comment",
    "DataInStructure",
    "DatabaseCode",
    "Destroys",
    "EnumNeverGrows",
    "IfExists",
    "Locks",
    "Maintenance",
    "Opaque",
    "OtherObject",
    "Renames",
    "Replaces",
    "Rights",
    "SequenceOwner",
    "Session",
    "Transaction",
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


class EnumNeverGrows(Rule):
    """
    Warns that an enum can never grow here.

    Why: ALTER TYPE … ADD VALUE is not additive: code of today may read a label that it does not know.
    Example: `CREATE TYPE order_state AS ENUM ('new', 'paid')`.
    Use instead: text with the rule in the application, where values will be added.
    """

    code, name, warning = "SM192", "enum-never-grows", True
    INVALID = ("CREATE TYPE order_state AS ENUM ('new', 'paid')",)
