"""SM3xx: functions, operators, casts and expressions."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = ["CastTo", "OldSequence", "Parameter", "SideEffect", "UnknownFunction", "UnknownOperator", "WrongPlace"]


class UnknownFunction(Rule):
    """
    Refuses functions that are not on the list for their place.

    Why: a function may do anything, DDL too, also from a default, a CHECK, a WHERE or a view.
    Example: `ALTER TABLE t ADD COLUMN n int DEFAULT my_func()`.
    Use instead: PostgreSQL's own pure functions; or `known_functions = ["my_func"]` under `[lint]`.
    """

    code, name = "SM301", "unknown-function"
    VALID = ("CREATE TABLE x (b text DEFAULT lower('A'))",)
    INVALID = (
        "ALTER TABLE t ADD COLUMN n int DEFAULT my_func()",
        "ALTER TABLE t ADD COLUMN n timestamptz DEFAULT public.now()",
        "CREATE TABLE x (a int CHECK (do_ddl() > 0))",
    )


class SideEffect(Rule):
    """
    Refuses functions that are known to do something: set_config, pg_terminate_backend, setval, dblink, file access.

    Why: they end connections, move settings, wait for locks or leave the database.
    Example: `SELECT pg_advisory_lock(1)`.
    Use instead: nothing; configuration belongs into `[session]`.
    """

    code, name, context = "SM302", "side-effect", "move"
    INVALID = ("SELECT set_config('lock_timeout', '0', false)", "SELECT pg_sleep(1)", "SELECT dblink_exec('x', 'y')")


class UnknownOperator(Rule):
    """
    Refuses operators that are not PostgreSQL's own.

    Why: an operator is a function by another name.
    Example: `a <~~> b`, `a OPERATOR(public.+) b`.
    Use instead: PostgreSQL's own operators, unqualified.
    """

    code, name, context = "SM303", "unknown-operator", "move"
    VALID = ("UPDATE t SET n = a + 1 WHERE id < 10",)
    INVALID = ("UPDATE t SET n = a OPERATOR(public.+) 1 WHERE id < 10", "UPDATE t SET n = a <~~> 1 WHERE id < 10")


class WrongPlace(Rule):
    """
    Refuses expressions that do not belong where they stand.

    Why: a default cannot read a row; a sub-select in it is an error on the server; what the grammar takes elsewhere is
    not known to be harmless here.
    Example: `ALTER TABLE t ADD COLUMN n int DEFAULT (SELECT 1)`, division by zero in a default.
    Use instead: a constant.
    """

    code, name = "SM304", "wrong-place"
    INVALID = (
        "ALTER TABLE t ADD COLUMN n int DEFAULT (SELECT 1)",
        "ALTER TABLE t ADD COLUMN n int DEFAULT a",
        "ALTER TABLE t ADD COLUMN n int DEFAULT 1/0",
    )


class CastTo(Rule):
    """
    Refuses casts to types that nobody knows.

    Why: a cast to a domain runs its CHECK, a cast to an unknown type its functions.
    Example: `'x'::some_domain`.
    Use instead: a type of PostgreSQL, an enum of a plan, or `known_types` under `[lint]`.
    """

    code, name = "SM305", "cast-to-unknown"
    VALID = ("ALTER TABLE t ADD COLUMN n jsonb DEFAULT '{}'::jsonb",)
    INVALID = ("ALTER TABLE t ADD COLUMN n text DEFAULT 'x'::some_domain",)


class Parameter(Rule):
    """
    Refuses `$1` and `:name`: nobody will give them a value.

    Why: the runner binds the key range and nothing else; Alembic's offline mode silently puts NULL.
    Example: `UPDATE t SET n = $1 WHERE id < 10`.
    Use instead: the value itself.
    """

    code, name, context = "SM306", "parameter", "move"
    INVALID = ("UPDATE t SET n = $1 WHERE id < 10",)


class OldSequence(Rule):
    """
    Refuses to draw from a sequence that this plan did not create, except to number rows of a new table.

    Why: a number drawn is gone, also when the batch is rolled back and repeated.
    Example: `UPDATE t SET n = nextval('s') WHERE id < 10`.
    Use instead: CREATE SEQUENCE in the same plan.
    """

    code, name, context = "SM307", "old-sequence", "move"
    VALID = ("INSERT INTO invoice (id, total) SELECT nextval('invoice_no'), a FROM t WHERE id < 10",)
    INVALID = ("UPDATE t SET n = nextval('s') WHERE id < 10", "SELECT nextval('s')")
