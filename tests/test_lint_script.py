"""Layer one: a script's source is judged before any of it runs."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest

from shardmig.config import Lint
from shardmig.lint import lint_script
from shardmig.lint.names import MEMBERS

HEAD = 'from alembic import op\nimport sqlalchemy as sa\nfrom sqlalchemy.dialects import postgresql\nrevision = "r1"\n'


def upgrade(*lines: str, head: str = "") -> str:
    return head + HEAD + "def upgrade():\n" + "".join(f"    {line}\n" for line in lines)


FINE = {
    "a loop": upgrade("for n in ('a', 'b'):", "    op.add_column('t', sa.Column(n, sa.Text()))"),
    "a comprehension": upgrade("[op.add_column('t', sa.Column(n, sa.Text)) for n in ('a', 'b')]"),
    "a helper": HEAD + "def add(n):\n    op.add_column('t', sa.Column(n, sa.Text))\ndef upgrade():\n    add('a')\n",
    "an f-string": upgrade("op.execute(f'COMMENT ON TABLE t IS {1 + 1!r}')"),
    "a table that is described": HEAD + "T = sa.table('t', sa.column('id', sa.Integer))\ndef upgrade():\n    pass\n",
    "types by every road": upgrade(
        "op.add_column('t', sa.Column('a', sa.dialects.postgresql.JSONB()))",
        "op.add_column('t', sa.Column('b', postgresql.ARRAY(sa.Text())))",
        "op.add_column('t', sa.Column('c', sa.types.Integer, server_default=sa.text('1')))",
        "op.add_column('t', sa.Column('d', sa.DateTime, server_default=sa.func.now()))",
    ),
    "a new table may have everything": upgrade(
        "op.create_table('x', sa.Column('id', sa.BigInteger, sa.Identity(), primary_key=True))",
        "op.add_column('x', sa.Column('n', sa.Integer, nullable=False))",
        "op.create_index(op.f('ix_x_n'), 'x', ['n'], unique=True)",
    ),
    "imports for types": (
        "from __future__ import annotations\nfrom collections.abc import Sequence\nfrom typing import TYPE_CHECKING\n"
        + HEAD
        + "if TYPE_CHECKING:\n    import os\nbranch_labels: str | Sequence[str] | None = None\n"
        + "def upgrade() -> None:\n    pass\n"
    ),
    "a move": (
        "from shardmig.operations import move_rows\n"
        + HEAD
        + "needs = ('other',)\ndef upgrade():\n    pass\n"
        + "def move():\n    move_rows('t', forward={'n': 'a'}, back={'a': 'n'})\n"
    ),
    "a comment on an old column": upgrade("op.alter_column('t', 'a', existing_type=sa.Integer(), comment='cents')"),
    "a concurrent index the old way": upgrade(
        "with op.get_context().autocommit_block():",
        "    op.create_index('i', 't', ['a'], postgresql_concurrently=True)",
    ),
}

FINE |= {
    "plain values and their methods": upgrade(
        "day = datetime.date(2026, 1, 1) + datetime.timedelta(days=1)",
        "name = uuid.uuid5(uuid.NAMESPACE_DNS, 'x').hex.upper().removeprefix('A')",
        "op.execute(COMMENT.format(name, day=day.isoformat()) + '{:>{}.2f}'.format(Decimal('1'), 8))",
        head="import datetime\nimport uuid\nfrom decimal import Decimal\nCOMMENT = 'COMMENT ON {} IS {day}'\n",
    ),
    "expressions and their methods": upgrade(
        "t = sa.table('t', sa.column('today'))",
        "op.execute(sa.func.pg_catalog.lower(t.c.today).label('n').compare(t.c.today.is_(None)))",
        "op.add_column('t', sa.Column('a', sa.String(9).with_variant(postgresql.CITEXT(), 'postgresql')))",
    ),
    "names that Python has, too": upgrade(
        "for id, type in (('a', sa.Text), ('b', sa.Integer)):", "    sa.Column(id, type)"
    ),
    "a parameter named like an import": upgrade(
        "def f(text):", "    return text.strip()", head="from sqlalchemy import text\n"
    ),
}

REFUSED = {
    "a module under another name": (upgrade("x = sa", "x.event"), "SP012"),
    "a submodule as a value": (upgrade("x = sa.sql"), "SP012"),
    "a constant that lies about types": (HEAD + "TYPE_CHECKING = True\nif TYPE_CHECKING:\n    import os\n", "SP003"),
    "a patched module": (upgrade("sa.text = 1"), "SP008"),
    "another dialect": (upgrade("sa.dialects.mysql"), "SP012"),
    "an unknown type of the dialect": (upgrade("postgresql.psycopg"), "SP012"),
    "a listener": (upgrade("sa.event.listen(sa.Table, 'after_create', None)"), "SP012"),
    "a decorator": (HEAD + "@sa.text\ndef upgrade():\n    pass\n", "SP003"),
    "a call at module level": (HEAD + "def f():\n    pass\nX = f()\n", "SP003"),
    "a dunder": (upgrade("op.execute.__self__"), "SP008"),
    "a private name": (upgrade("op._proxy.drop_table('t')"), "SP008"),
    "a builtin that prints": (upgrade("print('x')"), "SP012"),
    "offline mode": (upgrade("if op.get_context().as_sql:", "    pass"), "SP006"),
    "an async function": (upgrade("async def f():", "    pass"), "SP003"),
    "a file": (upgrade("with open('x') as f:", "    pass"), "SP012"),
    "op as an argument": (upgrade("def g(o):", "    o.drop_table('x')", "g(op)"), "SP005"),
    "op in a list": (upgrade("[op][0].drop_table('x')"), "SP005"),
    "op overwritten": (upgrade("op = None"), "SP005"),
    "a star import": (upgrade("pass", head="from sqlalchemy import *\n"), "SP002"),
    "a relative import": (upgrade("pass", head="from . import x\n"), "SP002"),
    "alembic itself": (upgrade("pass", head="import alembic\n"), "SP005"),
    "the ORM": (upgrade("pass", head="from sqlalchemy.orm import Session\n"), "SP002"),
    "an import inside": (upgrade("import subprocess"), "SP002"),
    "an engine": (upgrade("sa.create_engine('x')"), "SP006"),
    "inspection": (upgrade("sa.inspect(1)"), "SP006"),
    "today": (upgrade("datetime.date.today()", head="import datetime\n"), "SP013"),
    "a random id": (upgrade("uuid4()", head="from uuid import uuid4\n"), "SP013"),
    "a default that is not rendered": (
        upgrade("op.add_column('t', sa.Column('n', sa.Integer, default=5, nullable=False))"), "SP014",
    ),
    "an index in the column": (upgrade("op.add_column('t', sa.Column('n', sa.Integer, index=True))"), "SP014"),
    "a module behind a module": (upgrade("uuid.os.system('true')", head="import uuid\n"), "SP012"),
    "a module taken out of a module": (upgrade("os.system('true')", head="from uuid import os\n"), "SP002"),
    "the interpreter behind a module": (upgrade("datetime.sys.exit(3)", head="import datetime\n"), "SP012"),
    "a module behind a module of SQLAlchemy": (upgrade("sa.sql.functions.schema.util.compat"), "SP012"),
    "a package around what may be imported": (
        upgrade("shardmig.local.Server", head="import shardmig.operations\n"), "SP012",
    ),
    "annotations that are evaluated": (upgrade("typing.get_type_hints(upgrade)", head="import typing\n"), "SP012"),
    "a module that is passed on": (upgrade("x = datetime", "x.sys", head="import datetime\n"), "SP012"),
    "the frame of a generator": (upgrade("(n for n in ()).gi_frame.f_builtins['eval']('1')"), "SP012"),
    "a format that takes attributes": (upgrade("'{0.execute}'.format(sa)"), "SP012"),
    "a format that takes items": (upgrade("'{0[x]}'.format({})"), "SP012"),
    "a width that takes attributes": (upgrade("'{0:{1.real}}'.format(1, 2)"), "SP012"),
    "a format nobody has read": (upgrade("t = '{0.' + 'x}'", "t.format(1)"), "SP012"),
    "a format that is bound twice": (
        HEAD + "T = '{}'\ndef upgrade():\n    global T\n    T = '{0.' + 'x}'\n    T.format(1)\n", "SP012",
    ),
    "a format from a mapping": (upgrade("'{a.b}'.format_map({})"), "SP012"),
    "format itself": (upgrade("list(map(str.format, ['{0.x}'], [1]))"), "SP012"),
    "a builtin behind a local name": (upgrade("def f():", "    eval = 0", "eval('1')"), "SP008"),
    "a builtin behind a parameter": (upgrade("def f(getattr):", "    pass", "getattr(sa, 'x')"), "SP008"),
    "a builtin behind an import that never happens": (
        "from typing import TYPE_CHECKING\n" + HEAD + "if TYPE_CHECKING:\n    from x import eval\n"
        "def upgrade():\n    eval('1')\n", "SP008",
    ),
    "builtins under their own name": (upgrade("__builtins__ = {}", "__builtins__['eval']"), "SP008"),
    "one name for two modules": (upgrade("import datetime as sa", "sa.create_engine('x')"), "SP012"),
    "an import for types that happens": (
        "from datetime import date as TYPE_CHECKING\n" + HEAD + "def f():\n    from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import os\n", "SP012",
    ),
    "a module's name for something else": (upgrade("for sa in ():", "    pass"), "SP012"),
    "func for something else": (upgrade("func = [].append", "func.x", head="from sqlalchemy import func\n"), "SP012"),
    "op as a parameter": (upgrade("def g(op):", "    op.execute('x')"), "SP005"),
    "a pattern that takes attributes": (upgrade("match 1:", "    case int(gi_frame=x):", "        pass"), "SP012"),
    "a connection by any road": (upgrade("sa.MetaData().create_all(None)"), "SP012"),
    "a default that works": (HEAD + "def f():\n    pass\ndef g(x=f()):\n    pass\n", "SP003"),
    "a time of today behind a name": (
        upgrade("d = date(2026, 1, 1)", "d.today()", head="from datetime import date\n"), "SP013",
    ),
    "a comment that also alters": (upgrade("op.alter_column('t', 'a', comment='x', nullable=True)"), "SP004"),
}  # fmt: skip


@pytest.mark.parametrize("source", FINE.values(), ids=FINE)
def test_what_only_describes_passes(source: str) -> None:
    assert lint_script(source) == ()


@pytest.mark.parametrize(("source", "code"), REFUSED.values(), ids=REFUSED)
def test_what_could_do_anything_else_is_refused(source: str, code: str) -> None:
    found = lint_script(source, path="m.py")

    assert code in {violation.code for violation in found}
    assert all(violation.path == "m.py" and violation.line and violation.fails for violation in found)


def test_places_are_exact_and_count_from_one() -> None:
    (violation,) = lint_script(upgrade("x = 1; op.drop_table('t')"))

    assert (violation.line, violation.column) == (6, 12)


def test_the_configuration_adds_imports_with_their_submodules() -> None:
    source = upgrade("pass", head="import ourtypes.money\nfrom ourtypes import Money\n")

    assert [violation.code for violation in lint_script(source)] == ["SP002", "SP002"]
    assert lint_script(source, settings=Lint(imports=("ourtypes",))) == ()


@pytest.mark.parametrize(
    ("imported", "line", "codes"),
    [
        ("import ourtypes", "ourtypes.Money(2)", []),
        ("import ourtypes.money", "ourtypes.money.Money(2)", []),
        ("from ourtypes.money import Money", "Money(2)", []),
        ("import ourtypes.types", "ourtypes.types.Money(2)", []),
        ("import ourtypes", "ourtypes.os.getcwd()", ["SP012"]),
        ("import ourtypes", "ourtypes.psycopg.connect('')", ["SP012"]),
        ("from ourtypes import os", "os.getcwd()", ["SP002", "SP012"]),
        ("from ourtypes import psycopg", "psycopg.connect('')", ["SP012"]),
    ],
)
def test_a_configured_module_is_trusted_with_what_it_defines_not_with_what_it_imports(
    imported: str, line: str, codes: list[str]
) -> None:
    found = lint_script(upgrade(line, head=f"{imported}\n"), settings=Lint(imports=("ourtypes",)))

    assert [violation.code for violation in found] == codes


def test_no_listed_member_of_a_module_is_a_module() -> None:
    reached = [
        f"{module}.{name}"
        for module, listed in MEMBERS.items()
        if module != "typing_extensions"
        for name in listed
        if isinstance(getattr(import_module(module), name, None), ModuleType)
    ]

    assert reached == []


def test_a_syntax_error_names_its_line() -> None:
    (violation,) = lint_script(HEAD + "def upgrade(:\n    pass\n")

    assert (violation.code, violation.line) == ("SP001", 5)


@pytest.mark.parametrize(
    ("habit", "instead"),
    [
        ("op.add_column('order', sa.Column('n', sa.Integer, nullable=False))", 'server_default="0"'),
        ("op.add_column('order', sa.Column('n', sa.Integer, sa.ForeignKey('ref.id')))", 'op.add_column("order"'),
        ("op.add_column('order', sa.Column('n', sa.Integer, index=True))", "postgresql_concurrently=True"),
        ("op.alter_column('order', 'n', nullable=False)", "move_rows"),
        ("op.create_unique_constraint('u', 'order', ['n'])", "op.create_index"),
        ("op.rename_table('order', 'orders')", "op.create_table"),
        ("op.bulk_insert(sa.table('order'), [])", "move_rows"),
    ],
)
def test_a_habit_of_alembic_is_answered_with_a_line_to_paste(habit: str, instead: str) -> None:
    violation = lint_script(upgrade(habit))[0]

    assert instead in (violation.fix or "")
