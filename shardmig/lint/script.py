"""
Layer one: the script's source, before it is imported.

A closed world over Python's tree: syntax, imports, names, members and operations from lists, no work at module level,
`op` only as `op.<operation>(…)`. Loops, helpers and f-strings are fine: what counts is what they render, which layer
two judges.
"""

from __future__ import annotations

import ast
import builtins
import string
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from shardmig.allowances import allowances
from shardmig.config import Lint
from shardmig.lint import names
from shardmig.lint.bindings import Bindings
from shardmig.lint.members import VALUE_MEMBERS, Modules, clock
from shardmig.lint.rules import script as rules

if TYPE_CHECKING:
    from typing import TypeGuard

    from shardmig.lint.violation import Rule, Violation

__all__ = ["lint_script"]

_DEFAULTS = Lint()
_CONNECTING = frozenset({"get_bind", "get_context", "run_async"})
_FACTS = frozenset({"revision", "down_revision", "branch_labels", "depends_on"})
_MODULE_LEVEL = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
_ENGINES = frozenset({"create_engine", "create_mock_engine", "create_pool_from_url", "engine_from_config", "inspect"})
_COLLECTIONS = frozenset({"c", "columns", "excluded"})  # of a table: what is taken of them is the name of a column
_TYPE_CHECKING = frozenset({"typing.TYPE_CHECKING", "typing_extensions.TYPE_CHECKING"})
_PYTHONS = frozenset(dir(builtins)) - names.BUILTINS


def lint_script(source: str, *, path: str | None = None, settings: Lint = _DEFAULTS) -> tuple[Violation, ...]:
    """
    Judge a script's source without running any of it.

    Args:
        source: the text of the script.
        path: how to call it in violations.
        settings: the configuration's section on linting.

    Returns:
        Violations in the order of the text; empty when the script may be imported and rendered.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape is no finding of ours
            tree = ast.parse(source)
    except SyntaxError as error:
        found = rules.NotPython.violation(f"not Python: {error.msg}; correct it")
        return (replace(found, path=path, line=error.lineno or 1, column=error.offset),)
    except (ValueError, RecursionError, MemoryError) as error:
        return (replace(rules.NotPython.violation(f"not Python: {error}; correct it"), path=path, line=1),)
    try:
        script = _Script(path, settings, Bindings(tree))
        script.module(tree)
    except RecursionError:
        return (replace(rules.NotPython.violation("nested too deeply to be judged; simplify it"), path=path, line=1),)
    script.allow_comments(source)
    return tuple(sorted(script.found, key=lambda violation: (violation.line or 0, violation.column or 0)))


class _Script(ast.NodeVisitor):
    """Walks a script once; what is not known to be harmless is a violation."""

    def __init__(self, path: str | None, settings: Lint, bound: Bindings) -> None:
        self.path = path
        self.settings = settings
        self.found: list[Violation] = []
        self.known = Modules(settings.imports, bound.modules)
        self.bound = bound

    def refuse(self, rule: type[Rule], node: ast.AST, message: str, *, fix: str | None = None) -> None:
        """Note a violation at a node."""
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1
        self.found.append(replace(rule.violation(message, fix=fix), path=self.path, line=line, column=column))

    def module(self, tree: ast.Module) -> None:
        """Judge the module: constants and functions, nothing that works."""
        self._ambiguous()
        for node in tree.body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if docstring or (isinstance(node, ast.If) and self._only_for_types(node)):
                continue
            if not isinstance(node, _MODULE_LEVEL):
                self.refuse(
                    rules.ModuleWork,
                    node,
                    f"{_spoken(node)} at module level runs whenever the history is read; move it into upgrade()",
                )
                continue
            if isinstance(node, ast.Assign | ast.AnnAssign):
                self._constant(node)
            if isinstance(node, ast.FunctionDef):
                self._signature(node.args, node.returns)
            if isinstance(node, ast.FunctionDef) and node.name == "downgrade":
                self._downgrade(node)
                continue
            self.visit(node)

    def allow_comments(self, source: str) -> None:
        """Refuse allow comments that can never allow anything."""
        from shardmig.lint.catalogue import BY_CODE  # noqa: PLC0415 - which lists every rule, these too

        for allowance in allowances(source):
            rule = BY_CODE.get(allowance.code)
            if not allowance.code:
                message = "this comment allows nothing: it names no code; write # shardmig: allow SM125 -- why"
            elif not allowance.reason:
                message = (
                    f"{allowance.code} is allowed without a reason; write # shardmig: allow {allowance.code} -- why"
                )
            elif rule is None:
                message = f"there is no rule {allowance.code}; correct the comment"
            elif not (rule.ignorable or rule.warning):
                message = f"{allowance.code} ({rule.name}) can never be allowed; change the statement"
            else:
                continue
            violation = rules.UnusedAllow.violation(message)
            self.found.append(replace(violation, path=self.path, line=allowance.line))

    # ----------------------------------------------------------------------------------------------------------------
    # Imports

    def _ambiguous(self) -> None:
        """Refuse names of two meanings, as far as judging relies on knowing which one it is."""
        for node, name, paths in self.bound.imported_twice:
            self.refuse(
                rules.UnknownName,
                node,
                f"{name} is {' and '.join(paths)}, and which is meant cannot be seen; import one by another name",
            )
        for name, node in self.bound.bound.items():
            path = self.bound.imported.get(name, "")
            if name == "op":
                self.refuse(rules.AliasOfOp, node, "op is bound to something else; leave the name alone")
            elif self.known.known(path) or self.known.functions(path) or path in _TYPE_CHECKING:
                self.refuse(
                    rules.UnknownName, node, f"{name} is {path} and something else; call the other one differently"
                )

    def _only_for_types(self, node: ast.If) -> bool:
        """Whether an `if TYPE_CHECKING:` holds imports that never happen."""
        return (
            isinstance(node.test, ast.Name)
            and self.bound.imported.get(node.test.id) in _TYPE_CHECKING
            and node.test.id not in self.bound.bound
            and not node.orelse
            and all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)
        )

    def visit_Import(self, node: ast.Import) -> None:
        """Judge `import x`."""
        for alias in node.names:
            if alias.name.partition(".")[0] == "alembic":
                self.refuse(rules.AliasOfOp, node, "what is called on alembic could not be seen; import op from it")
            elif not self.known.may_import(alias.name):
                self._forbidden(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Judge `from x import y`."""
        module = node.module or ""
        if node.level or any(alias.name == "*" for alias in node.names):
            self._forbidden(node, "." * node.level + module)
            return
        for alias in node.names:
            if module == "alembic" and alias.name == "op":
                if alias.asname not in (None, "op"):
                    self.refuse(rules.AliasOfOp, node, "op under another name hides what is called; import it as op")
            elif module == "alembic.op":
                self.refuse(
                    rules.AliasOfOp, node, "an operation under a name of its own hides what is called; import op"
                )
            elif clock(module, alias.name):
                self._not_constant(node)
            elif not (self.known.may_import(module) and self.known.has(module, alias.name)):
                self._forbidden(node, f"{module}.{alias.name}")

    def _forbidden(self, node: ast.AST, what: str) -> None:
        self.refuse(
            rules.ForbiddenImport,
            node,
            f"{what} is not on the list of imports: a plan must render the same everywhere and for ever; "
            f"write out what you need, or name a pure module in [lint] imports",
        )

    # ----------------------------------------------------------------------------------------------------------------
    # Statements

    def visit(self, node: ast.AST) -> None:
        """Judge a node; syntax that nobody has vouched for is refused."""
        if type(node).__name__ in names.NODES:
            super().visit(node)
        else:
            self.refuse(
                rules.UnknownName, node, f"{_spoken(node)} is not known to be harmless in a script; write it plainly"
            )

    def _constant(self, node: ast.Assign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if not isinstance(target, ast.Name | ast.Tuple):
                self.refuse(
                    rules.ModuleWork, node, "only plain names are assigned at module level; write it inside upgrade()"
                )
        if node.value is not None:
            self._no_calls(node.value)

    def _signature(self, arguments: ast.arguments, returns: ast.expr | None) -> None:
        """Judge what of a function runs with the module: defaults and annotations."""
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        annotations = [argument.annotation for argument in named if argument is not None]
        for value in [*arguments.defaults, *arguments.kw_defaults, *annotations, returns]:
            if value is not None:
                self._no_calls(value)

    def _no_calls(self, value: ast.expr) -> None:
        for inner in ast.walk(value):
            if isinstance(inner, ast.Call) and self._root(inner.func) in (None, "op"):
                self.refuse(
                    rules.ModuleWork,
                    inner,
                    "a call at module level runs whenever the history is read; move it into upgrade()",
                )

    def _downgrade(self, node: ast.FunctionDef) -> None:
        for statement in node.body:
            harmless = isinstance(statement, ast.Pass | ast.Raise) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            )
            harmless = harmless and not any(map(_operation, ast.walk(statement)))
            if not harmless and not (isinstance(statement, ast.Return) and _is_none(statement.value)):
                self.refuse(
                    rules.Downgrade,
                    statement,
                    "a downgrade takes away what the running release reads; going back is the flag, leave it empty",
                )
                return

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Judge a function; decorators would run at module level."""
        if node.decorator_list:
            self.refuse(
                rules.ModuleWork, node, f"a decorator on {node.name}() runs when the history is read; leave it out"
            )
        self.generic_visit(node)

    def _not_here(self, node: ast.AST) -> None:
        self.refuse(rules.ModuleWork, node, f"{_spoken(node)} has no place in a script; write plain functions")

    visit_AsyncFunctionDef = visit_ClassDef = visit_Await = visit_Yield = visit_YieldFrom = _not_here  # noqa: N815

    def _branch(self, node: ast.AST) -> None:
        self.refuse(
            rules.Branches,
            node,
            f"{_spoken(node)} may leave half a plan, or another one elsewhere; write straight lines and for loops",
        )

    visit_Try = visit_TryStar = visit_While = _branch  # noqa: N815

    def visit_With(self, node: ast.With) -> None:
        """Accept `with op.get_context().autocommit_block():`, which means nothing here; refuse every other."""
        for item in node.items:
            if _is_autocommit(item.context_expr) and item.optional_vars is None:
                continue
            if _operation(item.context_expr) == "batch_alter_table":
                self.visit(item.context_expr)
            else:
                self.refuse(
                    rules.UnknownName, item.context_expr, "this context manager is not known here; leave it out"
                )
        for statement in node.body:
            self.visit(statement)

    # ----------------------------------------------------------------------------------------------------------------
    # Expressions

    def visit_Call(self, node: ast.Call) -> None:
        """Judge a call: operations by their list, everything else by its name."""
        operation = _operation(node)
        if operation is not None:
            self._operation(node, operation)
        elif self._formats(node.func):
            self.visit(node.func.value)
        else:
            self.visit(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(argument)

    def _operation(self, node: ast.Call, name: str) -> None:
        given = {keyword.arg for keyword in node.keywords}
        if name == "batch_alter_table":
            self.refuse(rules.BatchAlter, node, "a batch hides what it alters; write op.add_column for each column")
        elif name == "bulk_insert":
            self.refuse(
                rules.RowsInUpgrade, node, "rows in upgrade() are not moved in batches; write move_rows in move()"
            )
        elif name in _CONNECTING:
            self.refuse(
                rules.Connection,
                node,
                f"op.{name}() reaches for a database, and a plan is rendered without one, the same for every shard; "
                f"write the statement with op.execute",
            )
        elif name == "alter_column" and "comment" in given and given <= names.ALTER_COMMENT:
            pass
        elif name not in names.OPERATIONS:
            self._not_additive(node, name)
        elif name == "add_column":
            self._added_column(node)

    def _not_additive(self, node: ast.Call, name: str) -> None:
        why, fix = names.REFUSED.get(name, ("it is not known to be additive", None))
        self.refuse(rules.NotAdditive, node, f"op.{name}: {why}; add beside it, and move the rows", fix=fix)

    def _added_column(self, node: ast.Call) -> None:
        table = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        if table is None or table in self.bound.created:
            return
        for column in [*node.args[1:], *(k.value for k in node.keywords if k.arg == "column")]:
            if isinstance(column, ast.Call) and _last_name(column.func) == "Column":
                self._column(column, str(table))

    def _column(self, node: ast.Call, table: str) -> None:
        given = {k.arg: k.value for k in node.keywords}
        name = str(node.args[0].value) if node.args and isinstance(node.args[0], ast.Constant) else "n"
        plain = f'op.add_column("{table}", sa.Column("{name}", …))'
        for argument in node.args:
            if isinstance(argument, ast.Call) and _last_name(argument.func) == "ForeignKey":
                self.refuse(
                    rules.ColumnWords,
                    argument,
                    "Alembic renders ADD FOREIGN KEY as a statement of its own, which scans the table; leave it out",
                    fix=plain,
                )
            if isinstance(argument, ast.Call) and _last_name(argument.func) in ("Enum", "ENUM"):
                self._enum(argument, table, name)
        for word, why in names.COLUMN_WORDS.items():
            if _is_true(given.get(word)):
                fix = plain
                if word == "index":
                    fix += (
                        f'\nop.create_index("ix_{table}_{name}", "{table}", ["{name}"], postgresql_concurrently=True)'
                    )
                self.refuse(rules.ColumnWords, node, f"{word}=True on an existing table: {why}; leave it out", fix=fix)
        nullable = given.get("nullable")
        if isinstance(nullable, ast.Constant) and nullable.value is False and "server_default" not in given:
            self.refuse(
                rules.ColumnWords,
                node,
                f"INSERT of today does not name {name} and fails, for it is NOT NULL without a server default"
                f"{' (default= renders nothing)' if 'default' in given else ''}; give it server_default=",
                fix=f'op.add_column("{table}", sa.Column("{name}", …, nullable=False, server_default="0"))',
            )

    def _enum(self, node: ast.Call, table: str, column: str) -> None:
        given = {k.arg: k.value for k in node.keywords}
        if any(isinstance(given.get(w), ast.Constant) and not given[w].value for w in ("create_type", "native_enum")):  # type: ignore[attr-defined]
            return
        labels = ", ".join(repr(a.value) for a in node.args if isinstance(a, ast.Constant)) or "…"
        kind = given.get("name")
        name = str(kind.value) if isinstance(kind, ast.Constant) and isinstance(kind.value, str) else "…"
        self.refuse(
            rules.ColumnWords,
            node,
            "an enum in op.add_column creates a type on the side, and a type never changes again: create it in sight",
            fix=f'op.execute("CREATE TYPE {name} AS ENUM ({labels})")\n'
            f'op.add_column("{table}", sa.Column("{column}", sa.Enum({labels}, name="{name}", create_type=False)))',
        )

    def _formats(self, method: ast.expr) -> TypeGuard[ast.Attribute]:
        """Whether a call fills in a text that is known and takes no attributes of what it is given."""
        match method:
            case ast.Attribute(attr="format", value=ast.Constant(value=str(text))):
                return _takes_nothing(text)
            case ast.Attribute(attr="format", value=ast.Name(id=name)):
                known = self.bound.texts.get(name)
                return known is not None and _takes_nothing(known)
        return False

    def visit_Name(self, node: ast.Name) -> None:
        """Judge a name that is read: bound here, imported, or a harmless builtin."""
        if not isinstance(node.ctx, ast.Load):
            return
        if node.id == "op":
            self.refuse(
                rules.AliasOfOp, node, "op itself is passed on, which hides what is called; write op.<operation>(…)"
            )
            return
        self._module_as_value(node)
        mine = node.id in self.bound
        if mine and node.id in _PYTHONS and node.id not in names.SHADOWED:
            self.refuse(
                rules.Dynamic, node, f"{node.id} is Python's own besides, and may be what is meant; name it differently"
            )
        elif node.id not in names.BUILTINS and (not mine or node.id.startswith("__")):
            self.refuse(
                rules.Dynamic if node.id in names.DYNAMIC else rules.UnknownName,
                node,
                f"{node.id} is not known to be harmless in a script; write plain calls and values",
            )

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Judge an attribute: nothing underscored, and of modules and of values only what is listed."""
        if node.attr.startswith("_"):
            self.refuse(rules.Dynamic, node, f"{node.attr} is nobody's to use; write plain calls")
        if not isinstance(node.ctx, ast.Load):
            self.refuse(rules.Dynamic, node, f"{node.attr} of something else is changed; bind plain names only")
        if isinstance(node.value, ast.Name) and node.value.id == "op":
            if node.attr in _CONNECTING:
                self.refuse(rules.Connection, node, f"op.{node.attr} reaches for a database; write the statement")
            else:
                self.refuse(rules.AliasOfOp, node, f"op.{node.attr} is taken without a call, which hides it; call it")
            return
        self._module_as_value(node)
        owner = self._path(node.value)
        if owner is None or not (self.known.known(owner) or self.known.functions(owner)):
            found = len(self.found)
            self.visit(node.value)
            if len(self.found) == found:  # else the root of it is told already
                self._member_of_value(node)
            return
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):  # down to the name that was imported
            self._member(inner, self._path(inner.value) or "")
            inner = inner.value

    def _module_as_value(self, node: ast.Name | ast.Attribute) -> None:
        path = self._path(node) or ""
        if self.known.known(path) and not self.known.configured(path):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            self.refuse(
                rules.UnknownName,
                node,
                f"the module {name} is passed on, which hides what is used of it; write it out",
            )

    def _member(self, node: ast.Attribute, owner: str) -> None:
        """Refuse members of modules that do more than describe."""
        if node.attr.startswith("_") or self.known.functions(owner) or self.known.has(owner, node.attr):
            return
        if clock(owner, node.attr):
            self._not_constant(node)
            return
        self.refuse(
            rules.Connection if node.attr in _ENGINES else rules.UnknownName,
            node,
            f"{owner}.{node.attr} is not known to do no more than describe a column or compute a value; "
            f"use types, expressions and plain values",
        )

    def _member_of_value(self, node: ast.Attribute) -> None:
        column = isinstance(node.value, ast.Attribute) and node.value.attr in _COLLECTIONS
        if node.attr in VALUE_MEMBERS or node.attr.startswith("_") or column:
            return
        owner = self._path(node.value)
        if node.attr in names.CLOCKS:
            self._not_constant(node)
            return
        cure = "write it out, or use an f-string in the place of format()"
        if owner is not None and self.known.configured(owner):
            cure = f"if {owner} is a module, write import {owner}"
        self.refuse(rules.UnknownName, node, f"of values, {node.attr} is not known to only compute; {cure}")

    def _not_constant(self, node: ast.AST) -> None:
        self.refuse(
            rules.NotConstant,
            node,
            "the value is another one at each rendering; write the value, or use the server's",
        )

    def _path(self, node: ast.expr) -> str | None:
        """Return the dotted path of what an expression takes of something imported."""
        if isinstance(node, ast.Name):
            return self.bound.imported.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._path(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    def _root(self, node: ast.expr) -> str | None:
        """Return the imported name (or "op") at the beginning of a chain of attributes and calls."""
        while isinstance(node, ast.Attribute | ast.Call):
            node = node.value if isinstance(node, ast.Attribute) else node.func
        if isinstance(node, ast.Name) and (
            node.id == "op" or node.id in self.bound.imported or node.id in names.BUILTINS
        ):
            return node.id
        return "" if isinstance(node, ast.Constant) else None


def _operation(node: ast.AST) -> str | None:
    """Return the operation that `op.name(…)` calls."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="op"), attr=name)):
            return name
    return None


def _takes_nothing(text: str) -> bool:
    """Whether the fields of a format take neither attributes nor items of their values."""
    try:
        fields = [(name or "", spec or "") for _, name, spec, _ in string.Formatter().parse(text)]
    except ValueError:
        return False
    return not any("." in name or "[" in name for name, _ in fields) and all(
        _takes_nothing(spec) for _, spec in fields if spec
    )


def _is_autocommit(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=inner, attr="autocommit_block"), args=[], keywords=[]):
            return _operation(inner) == "get_context"
    return False


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _is_true(node: ast.expr | None) -> bool:
    return node is not None and not (isinstance(node, ast.Constant) and not node.value)


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _spoken(node: ast.AST) -> str:
    return {
        "Expr": "a call",
        "ClassDef": "a class",
        "AsyncFunctionDef": "an async function",
        "Try": "try",
        "TryStar": "try",
        "While": "while",
        "If": "if",
        "For": "for",
    }.get(type(node).__name__, type(node).__name__.lower())
