"""
What a script's expressions use: names, attributes, members of modules and of values.

Each judgement is about one node; whoever walks the tree asks for what lies below it.
"""

from __future__ import annotations

import ast
import builtins
import string
from typing import TYPE_CHECKING

from shardmig.lint import names
from shardmig.lint.calls import CONNECTING
from shardmig.lint.members import VALUE_MEMBERS, clock
from shardmig.lint.rules import script as rules

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeGuard

    from shardmig.lint.bindings import Bindings
    from shardmig.lint.members import Modules
    from shardmig.lint.violation import Violation

__all__ = ["Uses", "not_constant"]

_ENGINES = frozenset({"create_engine", "create_mock_engine", "create_pool_from_url", "engine_from_config", "inspect"})
_COLLECTIONS = frozenset({"c", "columns", "excluded"})  # of a table: what is taken of them is the name of a column
_PYTHONS = frozenset(dir(builtins)) - names.BUILTINS


class Uses:
    """
    Judges what is read, by what names stand for in this script.

    Args:
        bound: the script's names.
        known: the modules that it may know.
    """

    def __init__(self, bound: Bindings, known: Modules) -> None:
        self._bound = bound
        self._known = known

    def name(self, node: ast.Name) -> Iterator[Violation]:
        """Judge a name that is read: bound here, imported, or a harmless builtin."""
        if node.id == "op":
            yield rules.AliasOfOp.at(
                node, "op itself is passed on, which hides what is called; write op.<operation>(…)"
            )
            return
        yield from self._module_as_value(node)
        mine = node.id in self._bound
        if mine and node.id in _PYTHONS and node.id not in names.SHADOWED:
            yield rules.Dynamic.at(
                node, f"{node.id} is Python's own besides, and may be what is meant; name it differently"
            )
        elif node.id not in names.BUILTINS and (not mine or node.id.startswith("__")):
            rule = rules.Dynamic if node.id in names.DYNAMIC else rules.UnknownName
            yield rule.at(node, f"{node.id} is not known to be harmless in a script; write plain calls and values")

    def attribute(self, node: ast.Attribute) -> Iterator[Violation]:
        """Judge an attribute: nothing underscored, nothing changed, and of modules only what is listed."""
        if node.attr.startswith("_"):
            yield rules.Dynamic.at(node, f"{node.attr} is nobody's to use; write plain calls")
        if not isinstance(node.ctx, ast.Load):
            yield rules.Dynamic.at(node, f"{node.attr} of something else is changed; bind plain names only")
        if _of_op(node):
            if node.attr in CONNECTING:
                yield rules.Connection.at(node, f"op.{node.attr} reaches for a database; write the statement")
            else:
                yield rules.AliasOfOp.at(node, f"op.{node.attr} is taken without a call, which hides it; call it")
            return
        yield from self._module_as_value(node)
        if not self.is_of_value(node):
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):  # down to the name that was imported
                yield from self._member(inner, self._path(inner.value) or "")
                inner = inner.value

    def is_of_value(self, node: ast.Attribute) -> bool:
        """Whether an attribute is taken of a value, whose expression has to be judged before `member_of_value`."""
        owner = self._path(node.value)
        return not _of_op(node) and (owner is None or not (self._known.known(owner) or self._known.functions(owner)))

    def member_of_value(self, node: ast.Attribute) -> Iterator[Violation]:
        """Judge what is taken of a value, whose type nobody knows: only what no type has for harm."""
        column = isinstance(node.value, ast.Attribute) and node.value.attr in _COLLECTIONS
        if node.attr in VALUE_MEMBERS or node.attr.startswith("_") or column:
            return
        owner = self._path(node.value)
        if node.attr in names.CLOCKS:
            yield not_constant(node)
            return
        cure = "write it out, or use an f-string in the place of format()"
        if owner is not None and self._known.configured(owner):
            cure = f"if {owner} is a module, write import {owner}"
        yield rules.UnknownName.at(node, f"of values, {node.attr} is not known to only compute; {cure}")

    def formats(self, method: ast.expr) -> TypeGuard[ast.Attribute]:
        """Whether a call fills in a text that is known and takes no attributes of what it is given."""
        match method:
            case ast.Attribute(attr="format", value=ast.Constant(value=str(text))):
                return _takes_nothing(text)
            case ast.Attribute(attr="format", value=ast.Name(id=name)):
                known = self._bound.texts.get(name)
                return known is not None and _takes_nothing(known)
        return False

    def root(self, node: ast.expr) -> str | None:
        """Return the imported name (or "op") at the beginning of a chain of attributes and calls."""
        while isinstance(node, ast.Attribute | ast.Call):
            node = node.value if isinstance(node, ast.Attribute) else node.func
        if isinstance(node, ast.Name) and (
            node.id == "op" or node.id in self._bound.imported or node.id in names.BUILTINS
        ):
            return node.id
        return "" if isinstance(node, ast.Constant) else None

    def _module_as_value(self, node: ast.Name | ast.Attribute) -> Iterator[Violation]:
        path = self._path(node) or ""
        if self._known.known(path) and not self._known.configured(path):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            yield rules.UnknownName.at(
                node, f"the module {name} is passed on, which hides what is used of it; write it out"
            )

    def _member(self, node: ast.Attribute, owner: str) -> Iterator[Violation]:
        """Refuse members of modules that do more than describe."""
        if node.attr.startswith("_") or self._known.functions(owner) or self._known.has(owner, node.attr):
            return
        if clock(owner, node.attr):
            yield not_constant(node)
            return
        rule = rules.Connection if node.attr in _ENGINES else rules.UnknownName
        yield rule.at(
            node,
            f"{owner}.{node.attr} is not known to do no more than describe a column or compute a value; "
            f"use types, expressions and plain values",
        )

    def _path(self, node: ast.expr) -> str | None:
        """Return the dotted path of what an expression takes of something imported."""
        if isinstance(node, ast.Name):
            return self._bound.imported.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._path(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None


def not_constant(node: ast.AST) -> Violation:
    """Refuse what changes with the clock or the machine."""
    return rules.NotConstant.at(
        node, "the value is another one at each rendering; write the value, or use the server's"
    )


def _of_op(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "op"


def _takes_nothing(text: str) -> bool:
    """Whether the fields of a format take neither attributes nor items of their values."""
    try:
        fields = [(name or "", spec or "") for _, name, spec, _ in string.Formatter().parse(text)]
    except ValueError:
        return False
    return not any("." in name or "[" in name for name, _ in fields) and all(
        _takes_nothing(spec) for _, spec in fields if spec
    )
