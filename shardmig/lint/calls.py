"""
What a script calls on `op`: Alembic's operations, by their list.

Only what the source shows; the statements that come out of a call are layer two's to judge.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from shardmig.lint import names
from shardmig.lint.rules import script as rules

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from shardmig.lint.violation import Violation

__all__ = ["CONNECTING", "call_violations", "is_autocommit", "operation"]

CONNECTING = frozenset({"get_bind", "get_context", "run_async"})
"""Members of `op` that need a database."""


def operation(node: ast.AST) -> str | None:
    """Return the operation that `op.name(…)` calls."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="op"), attr=name)):
            return name
    return None


def is_autocommit(node: ast.expr) -> bool:
    """Whether this is `op.get_context().autocommit_block()`, which means nothing here."""
    match node:
        case ast.Call(func=ast.Attribute(value=inner, attr="autocommit_block"), args=[], keywords=[]):
            return operation(inner) == "get_context"
    return False


def call_violations(node: ast.Call, name: str, *, created: Collection[str]) -> Iterator[Violation]:
    """
    Judge the call of one operation.

    Args:
        node: the call; what its arguments compute is judged elsewhere.
        name: of the operation.
        created: tables that the script itself creates, whose columns may be of any kind.
    """
    given = {keyword.arg for keyword in node.keywords}
    if name == "batch_alter_table":
        yield rules.BatchAlter.at(node, "a batch hides what it alters; write op.add_column for each column")
    elif name == "bulk_insert":
        yield rules.RowsInUpgrade.at(node, "rows in upgrade() are not moved in batches; write move_rows in move()")
    elif name in CONNECTING:
        yield rules.Connection.at(
            node,
            f"op.{name}() reaches for a database, and a plan is rendered without one, the same for every shard; "
            f"write the statement with op.execute",
        )
    elif name == "alter_column" and "comment" in given and given <= names.ALTER_COMMENT:
        pass
    elif name not in names.OPERATIONS:
        why, fix = names.REFUSED.get(name, ("it is not known to be additive", None))
        yield rules.NotAdditive.at(node, f"op.{name}: {why}; add beside it, and move the rows", fix=fix)
    elif name == "add_column":
        yield from _added(node, created)


def _added(node: ast.Call, created: Collection[str]) -> Iterator[Violation]:
    table = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
    if table is None or table in created:
        return
    for column in [*node.args[1:], *(k.value for k in node.keywords if k.arg == "column")]:
        if isinstance(column, ast.Call) and _last_name(column.func) == "Column":
            yield from _column(column, str(table))


def _column(node: ast.Call, table: str) -> Iterator[Violation]:
    """Judge a column that is added to a table of today."""
    given = {k.arg: k.value for k in node.keywords}
    name = str(node.args[0].value) if node.args and isinstance(node.args[0], ast.Constant) else "n"
    plain = f'op.add_column("{table}", sa.Column("{name}", …))'
    for argument in node.args:
        if isinstance(argument, ast.Call) and _last_name(argument.func) == "ForeignKey":
            yield rules.ColumnWords.at(
                argument,
                "Alembic renders ADD FOREIGN KEY as a statement of its own, which scans the table; leave it out",
                fix=plain,
            )
        if isinstance(argument, ast.Call) and _last_name(argument.func) in ("Enum", "ENUM"):
            yield from _enum(argument, table, name)
    for word, why in names.COLUMN_WORDS.items():
        if _is_true(given.get(word)):
            fix = plain
            if word == "index":
                fix += f'\nop.create_index("ix_{table}_{name}", "{table}", ["{name}"], postgresql_concurrently=True)'
            yield rules.ColumnWords.at(node, f"{word}=True on an existing table: {why}; leave it out", fix=fix)
    nullable = given.get("nullable")
    if isinstance(nullable, ast.Constant) and nullable.value is False and "server_default" not in given:
        yield rules.ColumnWords.at(
            node,
            f"INSERT of today does not name {name} and fails, for it is NOT NULL without a server default"
            f"{' (default= renders nothing)' if 'default' in given else ''}; give it server_default=",
            fix=f'op.add_column("{table}", sa.Column("{name}", …, nullable=False, server_default="0"))',
        )


def _enum(node: ast.Call, table: str, column: str) -> Iterator[Violation]:
    given = {k.arg: k.value for k in node.keywords}
    if any(isinstance(given.get(w), ast.Constant) and not given[w].value for w in ("create_type", "native_enum")):  # type: ignore[attr-defined]
        return
    labels = ", ".join(repr(a.value) for a in node.args if isinstance(a, ast.Constant)) or "…"
    kind = given.get("name")
    name = str(kind.value) if isinstance(kind, ast.Constant) and isinstance(kind.value, str) else "…"
    yield rules.ColumnWords.at(
        node,
        "an enum in op.add_column creates a type on the side, and a type never changes again: create it in sight",
        fix=f'op.execute("CREATE TYPE {name} AS ENUM ({labels})")\n'
        f'op.add_column("{table}", sa.Column("{column}", sa.Enum({labels}, name="{name}", create_type=False)))',
    )


def _is_true(node: ast.expr | None) -> bool:
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
