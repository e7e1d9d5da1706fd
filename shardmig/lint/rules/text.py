"""SM0xx: the text itself and the names in it."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "CatalogName",
    "DottedName",
    "HiddenText",
    "LongName",
    "NotSql",
    "OneStatement",
    "OwnState",
    "ServerVersion",
    "TooDeep",
    "UnknownSchema",
    "UnknownSyntax",
]


class NotSql(Rule):
    """
    Refuses text that PostgreSQL's grammar does not take.

    Why: what cannot be read cannot be known to be additive; skipping it would be a hole.
    Example: `ALTER TABLE t ADD COLUM n int` names a column "colum" and then stumbles over the rest.
    Use instead: SQL; a psql meta command has no meaning here.
    """

    code, name = "SM001", "not-sql"
    VALID = ("ALTER TABLE t ADD COLUMN n int",)
    INVALID = ("ALTER TABLE t ADD COLUM n int", "\\connect other", "DROP\N{NO-BREAK SPACE}TABLE child")


class OneStatement(Rule):
    """
    Refuses a text that is not exactly one statement.

    Why: one step is one statement with one record in the ledger; a second one would hide behind the first, and an
    empty one says that something was lost on the way.
    Example: `ALTER TABLE t ADD COLUMN n int; DROP TABLE child`.
    Use instead: one `op.execute` for each statement.
    """

    code, name = "SM002", "one-statement"
    fix = "one op.execute(...) for each statement"
    VALID = ("ALTER TABLE t ADD COLUMN n int;",)
    INVALID = ("ALTER TABLE t ADD COLUMN n int; ALTER TABLE t ADD COLUMN m int", "", "-- nothing")


class HiddenText(Rule):
    r"""
    Refuses characters that a reader, the parser and the server may take differently.

    Why: a carriage return ends a `--` comment for the server, so a DROP behind it really runs; a NUL ends the text; a
    backslash in a plain literal means another thing once standard_conforming_strings is off; bidirectional control
    characters show a reviewer other text than runs.
    Example: `ALTER TABLE t ADD COLUMN n text DEFAULT 'a\b'`.
    Use instead: `E'a\\b'` for a backslash; line feeds for line ends; letters in names.
    """

    code, name = "SM003", "hidden-text"
    VALID = (r"ALTER TABLE t ADD COLUMN n text DEFAULT E'a\\b'", r"ALTER TABLE t ADD COLUMN n text DEFAULT $$a\b$$")
    INVALID = (
        r"ALTER TABLE t ADD COLUMN n text DEFAULT 'a\b'",
        "ALTER TABLE t ADD COLUMN n int -- x\rDROP TABLE child",
        "ALTER TABLE t ADD COLUMN n int\0",
        "ALTER TABLE t ADD COLUMN n text DEFAULT '\N{RIGHT-TO-LEFT OVERRIDE}x'",
        'ALTER TABLE t ADD COLUMN "n\N{ZERO WIDTH SPACE}" int',
    )


class TooDeep(Rule):
    """
    Refuses expressions nested deeper than the parser hands out.

    Why: a tree that cannot be read cannot be judged.
    Example: an expression with a hundred levels of parentheses or a sum of sixty terms.
    Use instead: several shorter expressions; `concat_ws` or an array for long chains.
    """

    code, name = "SM004", "too-deep"
    INVALID = ("ALTER TABLE t ADD COLUMN n int DEFAULT " + "1+" * 90 + "1",)


class LongName(Rule):
    """
    Refuses names of more than 63 bytes.

    Why: PostgreSQL cuts them silently, so the code and the database would call the same thing differently, and two
    long names may become one.
    Example: `ALTER TABLE t ADD COLUMN <64 letters> int`.
    Use instead: a shorter name.
    """

    code, name = "SM005", "long-name"
    VALID = ("ALTER TABLE t ADD COLUMN " + "x" * 63 + " int",)
    INVALID = ("ALTER TABLE t ADD COLUMN " + "x" * 64 + " int", 'ALTER TABLE t ADD COLUMN "' + "ä" * 32 + '" int')


class OwnState(Rule):
    """
    Refuses anything in the schema `shardmig`.

    Why: the ledger there says what was done and which representation is read; a script that writes it makes every
    guard of the runner worthless.
    Example: `UPDATE shardmig.flag SET state = 2`.
    Use instead: `shardmig switch`, or nothing.
    """

    code, name = "SM006", "own-state"
    notices = "flags and progress would no longer say what is true"
    INVALID = ("CREATE TABLE shardmig.extra (id int)", "INSERT INTO shardmig.step VALUES (1)")


class CatalogName(Rule):
    """
    Refuses PostgreSQL's own schemas and names: pg_catalog, information_schema, everything that begins `pg_`.

    Why: a superuser may write catalogs, which is DDL in disguise; a relation in pg_temp shadows the real one for the
    rest of the session; and a move that reads catalogs is no move of rows.
    Example: `UPDATE pg_class SET relname = 'tt' WHERE relname = 't'`.
    Use instead: the statement that changes the object itself, if it is additive.
    """

    code, name = "SM007", "catalog"
    INVALID = ("CREATE TABLE pg_temp.t (id int)", "ALTER TABLE pg_catalog.pg_class ADD COLUMN n int")


class ServerVersion(Rule):
    """
    Refuses what the newest grammar takes and the oldest server of the fleet does not.

    Why: one shard would stop in the middle of a rollout with a syntax error that no other shard has.
    Example: `COMPRESSION lz4` (14), `MERGE` and `NULLS NOT DISTINCT` (15), `STORAGE` in ADD COLUMN (16).
    Use instead: wait until `pg_versions` in the configuration begins high enough.
    """

    code, name = "SM008", "server-version"
    VALID = ("ALTER TABLE t ADD COLUMN n text COMPRESSION pglz",)
    INVALID = (
        "ALTER TABLE t ADD COLUMN n text STORAGE EXTERNAL",
        "CREATE TABLE x (a int UNIQUE NULLS NOT DISTINCT)",
        "ALTER TABLE t ADD COLUMN n int DEFAULT 1_000",
    )


class UnknownSchema(Rule):
    """
    Refuses objects in a schema that the configuration does not name, and unconfigured schemas themselves.

    Why: a table in a schema that stands earlier in somebody's search_path captures unqualified names: a schema named
    like the login role turns `SELECT * FROM t` into a read of an empty table.
    Example: `CREATE SCHEMA app_user`.
    Use instead: `schemas = ["public", "billing"]` under `[lint]`, once the search_path of every role was looked at.
    """

    code, name = "SM009", "unknown-schema"
    notices = "unqualified names may mean another table"
    VALID = ("CREATE TABLE public.x (id int)",)
    INVALID = ("CREATE TABLE other.x (id int)", "CREATE SCHEMA app_user")


class UnknownSyntax(Rule):
    """
    Refuses every statement and every clause that nobody has vouched for.

    Why: a list of dangerous things is never complete; the list of known additive ones can be.
    Example: a clause that a new PostgreSQL version has added.
    Use instead: the plain form, without the named clause.
    """

    code, name = "SM010", "unknown-syntax"
    INVALID = ("CREATE TABLE x (id int) USING heap2", "CREATE SEQUENCE s RESTART 5")


class DottedName(Rule):
    """
    Refuses tables and indexes whose name has a dot in it.

    Why: `op.add_column("app.customer", …)` means a table that is called "app.customer", not the table customer of the
    schema app; on the server it does not exist, and in plans, messages and the ledger the two could not be told apart.
    Example: `ALTER TABLE "app.customer" ADD COLUMN n int`.
    Use instead: `schema="app"`; nothing for the shard's own schema. In `move_rows`, `"app.customer"` is the table
    customer of app.
    """

    code, name = "SM011", "dotted-name"
    VALID = ('ALTER TABLE "public"."customer" ADD COLUMN "first.name" int',)
    INVALID = (
        'ALTER TABLE "public.customer" ADD COLUMN n int',
        'CREATE TABLE "app.note" (id int)',
        'CREATE INDEX CONCURRENTLY "customer.by_email" ON customer (email)',
    )
