"""
Layer one: the script's source, before it is imported.

A closed world over Python's tree: syntax, imports, names, members and operations from lists, no work at module level,
`op` only as `op.<operation>(…)`. Loops, helpers and f-strings are fine: what counts is what they render, which layer
two judges.
"""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from shardmig.allowances import allowances
from shardmig.config import Lint
from shardmig.lint import names
from shardmig.lint.bindings import Bindings
from shardmig.lint.calls import call_violations, is_autocommit, operation
from shardmig.lint.members import Modules, clock
from shardmig.lint.rules import script as rules
from shardmig.lint.uses import Uses, not_constant

if TYPE_CHECKING:
    from shardmig.lint.violation import Rule, Violation

__all__ = ["lint_script"]

_DEFAULTS = Lint()
_MODULE_LEVEL = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)
_TYPE_CHECKING = frozenset({"typing.TYPE_CHECKING", "typing_extensions.TYPE_CHECKING"})


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
        refused = rules.NotPython.violation(f"not Python: {error.msg}; correct it")
        return (replace(refused, path=path, line=error.lineno or 1, column=error.offset),)
    except (ValueError, RecursionError, MemoryError) as error:
        return (replace(rules.NotPython.violation(f"not Python: {error}; correct it"), path=path, line=1),)
    try:
        script = _Script(settings, Bindings(tree))
        script.module(tree)
    except RecursionError:
        return (replace(rules.NotPython.violation("nested too deeply to be judged; simplify it"), path=path, line=1),)
    script.allow_comments(source)
    found = sorted(script.found, key=lambda violation: (violation.line or 0, violation.column or 0))
    return tuple(replace(violation, path=path) for violation in found)


class _Script(ast.NodeVisitor):
    """Walks a script once; what is not known to be harmless is a violation."""

    def __init__(self, settings: Lint, bound: Bindings) -> None:
        self.found: list[Violation] = []
        self.known = Modules(settings.imports, bound.modules)
        self.bound = bound
        self.uses = Uses(bound, self.known)

    def refuse(self, rule: type[Rule], node: ast.AST, message: str) -> None:
        """Note a violation at a node."""
        self.found.append(rule.at(node, message))

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
            self.found.append(replace(rules.UnusedAllow.violation(message), line=allowance.line))

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
                self.found.append(not_constant(node))
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
            if isinstance(inner, ast.Call) and self.uses.root(inner.func) in (None, "op"):
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
            harmless = harmless and not any(map(operation, ast.walk(statement)))
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
            if is_autocommit(item.context_expr) and item.optional_vars is None:
                continue
            if operation(item.context_expr) == "batch_alter_table":
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
        name = operation(node)
        if name is not None:
            self.found.extend(call_violations(node, name, created=self.bound.created))
        elif self.uses.formats(node.func):
            self.visit(node.func.value)
        else:
            self.visit(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(argument)

    def visit_Name(self, node: ast.Name) -> None:
        """Judge a name that is read."""
        if isinstance(node.ctx, ast.Load):
            self.found.extend(self.uses.name(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Judge an attribute, and what it is taken of."""
        self.found.extend(self.uses.attribute(node))
        if self.uses.is_of_value(node):
            found = len(self.found)
            self.visit(node.value)
            if len(self.found) == found:  # else the root of it is told already
                self.found.extend(self.uses.member_of_value(node))


def _is_none(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


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
