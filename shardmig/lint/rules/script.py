"""SP0xx: the script, before it is imported."""

from __future__ import annotations

from shardmig.lint.violation import Rule

__all__ = [
    "AliasOfOp",
    "BatchAlter",
    "Branches",
    "ColumnWords",
    "Connection",
    "Downgrade",
    "Dynamic",
    "ForbiddenImport",
    "ModuleWork",
    "NotAdditive",
    "NotConstant",
    "NotPython",
    "NotRendered",
    "RowsInUpgrade",
    "UnknownName",
    "UnusedAllow",
]

_HEAD = 'from alembic import op\nimport sqlalchemy as sa\nrevision = "r1"\ndown_revision = None\n'
_GOOD = _HEAD + 'def upgrade():\n    op.add_column("t", sa.Column("n", sa.Integer))\n'


def _upgrade(*lines: str) -> str:
    return _HEAD + "def upgrade():\n" + "".join(f"    {line}\n" for line in lines)


class NotPython(Rule):
    """
    Refuses scripts that Python does not take.

    Why: what cannot be read cannot be judged.
    Example: a missing parenthesis.
    Use instead: Python.
    """

    code, name, context = "SP001", "not-python", "script"
    VALID = (_GOOD,)
    INVALID = (_upgrade('op.add_column("t", sa.Column("n", sa.Integer)'), "\0")


class ForbiddenImport(Rule):
    """
    Refuses imports beyond alembic's op, SQLAlchemy's types and expressions, shardmig.operations and value modules.

    Why: application models change after the migration was written; a driver or an engine reaches a database; os and
    random make every rendering another one.
    Example: `from myapp.models import Base`, `import psycopg`.
    Use instead: columns written out; or `imports = ["…"]` under `[lint]` for a pure helper module.
    """

    code, name, context = "SP002", "forbidden-import", "script"
    fix = "import sqlalchemy as sa\nfrom alembic import op\nfrom shardmig.operations import move_rows"
    VALID = (_GOOD, "import datetime\n" + _GOOD, "from sqlalchemy.dialects import postgresql\n" + _GOOD)
    INVALID = (
        "import os\n" + _GOOD,
        "from myapp.models import Base\n" + _GOOD,
        "from alembic import context\n" + _GOOD,
        _upgrade("from sqlalchemy.schema import DropTable"),
    )


class ModuleWork(Rule):
    """
    Refuses work at module level: calls, classes, loops, branches, decorators.

    Why: it runs when anything merely looks at the history.
    Example: `op.execute("…")` outside of `upgrade()`.
    Use instead: constants and functions at module level, work in `upgrade()` and `move()`.
    """

    code, name, context = "SP003", "module-work", "script"
    VALID = (_HEAD + "SQL = \"COMMENT ON TABLE t IS 'x'\"\ndef upgrade():\n    op.execute(SQL)\n",)
    INVALID = (_HEAD + 'op.execute("DROP TABLE t")\n', _HEAD + "class X(sa.Text):\n    pass\n")


class NotAdditive(Rule):
    """
    Refuses operations that do not add.

    Why: see the operation: what is dropped, renamed or altered is in use.
    Example: `op.drop_column("t", "a")`, `op.alter_column("t", "a", nullable=False)`.
    Use instead: op.add_column, op.create_table, op.create_index(…, postgresql_concurrently=True), op.execute.
    """

    code, name, context = "SP004", "not-additive", "script"
    notices = "what it reads is gone or different"
    VALID = (_GOOD, _upgrade('op.alter_column("t", "a", comment="amount in cents", existing_type=sa.Integer())'))
    INVALID = (
        _upgrade('op.drop_table("child")'),
        _upgrade('op.alter_column("t", "a", nullable=False)'),
        _upgrade('op.create_foreign_key("fk", "t", "ref", ["a"], ["id"])'),
        _upgrade('op.something_new("t")'),
    )


class AliasOfOp(Rule):
    """
    Refuses `op` by any other name: assigned, passed on, taken apart, imported differently.

    Why: what is called could no longer be seen.
    Example: `d = op.drop_table`, `getattr(op, "drop_" + "table")`, `from alembic.op import drop_table`.
    Use instead: `op.add_column(…)`.
    """

    code, name, context = "SP005", "alias-of-op", "script"
    fix = "from alembic import op"
    INVALID = (
        _upgrade("d = op.drop_table"),
        _upgrade("vars(op)"),
        "from alembic.op import drop_table as add_table\n" + _GOOD,
        "from alembic import op as o\n" + _GOOD,
    )


class Connection(Rule):
    """
    Refuses connections, engines, contexts and inspection.

    Why: there is no database while a plan is rendered: it must be the same for all shards.
    Example: `op.get_bind().execute(…)`, `sa.inspect(…)`.
    Use instead: the statement itself by op.execute; conditions on a shard's state do not belong into a script.
    """

    code, name, context = "SP006", "connection", "script"
    fix = "op.execute(\"CREATE TYPE order_state AS ENUM ('new', 'paid')\")"
    VALID = (
        _upgrade(
            "with op.get_context().autocommit_block():",
            '    op.create_index("ix", "t", ["a"], postgresql_concurrently=True)',
        ),
    )
    INVALID = (
        _upgrade('op.get_bind().execute(sa.text("DROP TABLE child"))'),
        _upgrade("op.run_async(f)"),
        _upgrade('op.get_context().impl.static_output("DROP TABLE child")'),
        _upgrade('sa.create_engine("postgresql://x")'),
    )


class Branches(Rule):
    """
    Refuses try, while and anything that looks at offline mode.

    Why: a plan is rendered offline and executed as it stands; a branch that is not taken there is not linted, and a
    swallowed error leaves half a plan.
    Example: `if not context.is_offline_mode(): …`.
    Use instead: straight lines and for loops over constants.
    """

    code, name, context = "SP007", "branches", "script"
    VALID = (_upgrade('for name in ("a1", "a2"):', '    op.add_column("t", sa.Column(name, sa.Integer))'),)
    INVALID = (_upgrade("try:", '    op.execute("COMMENT ON TABLE t IS NULL")', "except Exception:", "    pass"),)


class Dynamic(Rule):
    """
    Refuses eval, exec, getattr, vars, underscored attributes and their kin.

    Why: they hide what is called.
    Example: `eval("op.drop_table('child')")`, `op._proxy.drop_table("child")`.
    Use instead: plain calls.
    """

    code, name, context = "SP008", "dynamic", "script"
    INVALID = (
        _upgrade("eval(\"op.drop_table('child')\")"),
        _upgrade('sa.__builtins__["eval"]("1")'),
        _upgrade('globals()["op"]'),
    )


class Downgrade(Rule):
    """
    Refuses a `downgrade()` that does anything.

    Why: going back is the flag, one row in a shard; a downgrade drops what the running release reads.
    Example: `def downgrade(): op.drop_column("t", "n")`.
    Use instead: leave the function out, or empty.
    """

    code, name, context = "SP009", "downgrade", "script"
    fix = "def downgrade() -> None:\n    pass"
    notices = "the column it reads is gone"
    VALID = (
        _GOOD + "def downgrade():\n    pass\n",
        _GOOD + 'def downgrade():\n    raise NotImplementedError("flag")\n',
    )
    INVALID = (_GOOD + 'def downgrade():\n    op.drop_column("t", "n")\n',)


class BatchAlter(Rule):
    """
    Refuses `op.batch_alter_table`.

    Why: it hides which ALTERs it makes, and where it recreates the table, all of them.
    Example: `with op.batch_alter_table("t") as b: b.add_column(…)`.
    Use instead: `op.add_column("t", …)`; adjacent ones become one statement by themselves.
    """

    code, name, context = "SP010", "batch-alter", "script"
    fix = 'op.add_column("t", sa.Column("n", sa.Integer))\nop.add_column("t", sa.Column("m", sa.Integer))'
    INVALID = (_upgrade('with op.batch_alter_table("t") as b:', '    b.add_column(sa.Column("n", sa.Integer()))'),)


class RowsInUpgrade(Rule):
    """
    Refuses `op.bulk_insert`.

    Why: rows belong into `move()`, where they are moved in batches that survive a crash; into a table that exists they
    do not belong at all.
    Example: `op.bulk_insert(table, rows)`.
    Use instead: `move_rows`.
    """

    code, name, context = "SP011", "rows-in-upgrade", "script"
    fix = 'def move() -> None:\n    move_rows("t", into="line", …)'
    INVALID = (_upgrade('op.bulk_insert(sa.table("t", sa.column("id")), [{"id": 1}])'),)


class UnknownName(Rule):
    """
    Refuses names, members and syntax that a script has no business with, and names of two meanings.

    Why: layer one is a closed world too: what is not known to be harmless is not run. A pure module leads to others
    that are not, and many values lead to Python itself.
    Example: `open("data.csv")`, `sa.event.listen(…)`, `uuid.os.environ`, `"{0.x}".format(y)`.
    Use instead: SQLAlchemy's types and expressions, plain Python values and their methods, f-strings.
    """

    code, name, context = "SP012", "unknown-name", "script"
    VALID = (_upgrade('op.create_table("x", sa.Column("n", sa.Enum(*sorted({"a", "b"}), name="kind")))'),)
    INVALID = (
        _upgrade('open("x")'),
        _upgrade('sa.event.listen(sa.Table, "after_create", 1)'),
        "import uuid\n" + _upgrade('uuid.os.system("true")'),
        _upgrade('"{0.execute}".format(sa)'),
    )


class NotConstant(Rule):
    """
    Refuses values that are another one at each rendering.

    Why: a plan is rendered again to see whether it still says what its script says.
    Example: `datetime.date.today()`, `uuid.uuid4()`.
    Use instead: the value itself; `sa.func.now()` for the server's clock.
    """

    code, name, context = "SP013", "not-constant", "script"
    fix = 'server_default=sa.text("now()")'
    VALID = ("import datetime\nDAY = datetime.date(2026, 1, 1)\n" + _GOOD,)
    INVALID = (
        "import datetime\n" + _upgrade("x = datetime.date.today()"),
        "import uuid\n" + _upgrade("x = uuid.uuid4()"),
    )


class ColumnWords(Rule):
    """
    Refuses ForeignKey, Enum, unique=, index= and primary_key= in op.add_column, and NOT NULL with `default=` only.

    Why: they become statements of their own that scan or lock the table, or create a type that never changes again;
    `default=` renders nothing, so every INSERT of today fails on NOT NULL.
    Example: `op.add_column("t", sa.Column("r", sa.Integer, sa.ForeignKey("ref.id")))`.
    Use instead: the plain column, and an index by op.create_index(…, postgresql_concurrently=True).
    """

    code, name, context = "SP014", "column-words", "script"
    notices = "INSERT, UPDATE or DELETE fails or waits"
    VALID = (_upgrade('op.add_column("t", sa.Column("n", sa.Integer, server_default="0", nullable=False))'),)
    INVALID = (
        _upgrade('op.add_column("t", sa.Column("n", sa.Integer, sa.ForeignKey("ref.id")))'),
        _upgrade('op.add_column("t", sa.Column("n", sa.Integer, unique=True))'),
        _upgrade('op.add_column("t", sa.Column("n", sa.Enum("a", "b", name="kind")))'),
        _upgrade('op.add_column("t", sa.Column("n", sa.Integer, nullable=False))'),
    )


class NotRendered(Rule):
    """
    Refuses scripts that cannot be rendered to a plan.

    Why: what cannot be rendered cannot be judged, and it cannot be applied either.
    Example: `op.execute("SELECT :x")`, where nothing will ever give x a value.
    Use instead: see the message; it names the line and the cure.
    """

    code, name, context = "SP015", "not-rendered", "script"


class UnusedAllow(Rule):
    """
    Refuses allow comments that allow nothing, lack a reason, or name what can never be allowed.

    Why: a comment that silences nothing today may silence something tomorrow; one without a reason cannot be reviewed.
    Example: `# shardmig: allow SM125`.
    Use instead: `# shardmig: allow SM125 -- nobody selects DISTINCT * from t`, on the call.
    """

    code, name, context = "SP020", "unused-allow", "script"
    fix = "# shardmig: allow SM125 -- nobody selects DISTINCT * from t"
    INVALID = (
        _upgrade('op.add_column("t", sa.Column("n", sa.JSON))  # shardmig: allow SM125'),
        _upgrade('op.execute("x")  # shardmig: allow'),
        _upgrade('op.execute("DROP TABLE t")  # shardmig: allow SM101 -- I know'),
    )
