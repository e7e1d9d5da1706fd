"""
Flags that application code declares: `Flag("split_name")`, compared with the flags that plans have.

A shard cannot tell a misspelt flag from one whose migration has not come yet: neither has a row, so both are OLD. The
repository, which holds code and plans, can.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from shardmig.lint.rules.application import UnknownFlag

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from shardmig.lint.violation import Violation

__all__ = ["Declaration", "declarations", "misnamed"]


@dataclass(frozen=True, slots=True)
class Declaration:
    """A flag's name where it is declared; line and column of the name are 1-based."""

    flag: str
    line: int
    column: int


def declarations(tree: ast.Module) -> Iterator[Declaration]:
    """Yield the flags that a module declares by name; a name that is computed is left alone."""
    spellings = {name for node in ast.walk(tree) for name in _imported(node)}
    if not spellings:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in spellings:
            name = next((k.value for k in node.keywords if k.arg == "name"), node.args[0] if node.args else None)
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Declaration(name.value, name.lineno, name.col_offset + 1)


def misnamed(declaration: Declaration, flags: Collection[str]) -> Violation:
    """Say that no plan has a flag, and which one may be meant."""
    near = get_close_matches(declaration.flag, flags, n=1)
    known = f"did you mean {near[0]}?" if near else f"plans have {', '.join(flags) or 'none'}"
    return UnknownFlag.violation(
        f"no plan has a flag {declaration.flag}, so it reads OLD on every shard, for ever; {known}",
        fix=f'Flag("{near[0]}")' if near else None,
    )


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield how a module may spell shardmig's Flag after an import."""
    match node:
        case ast.ImportFrom(module=str(module), level=0) if module.partition(".")[0] == "shardmig":
            yield from (alias.asname or alias.name for alias in node.names if alias.name == "Flag")
        case ast.Import():
            yield from (f"{alias.asname or alias.name}.Flag" for alias in node.names if alias.name == "shardmig")


def _dotted(node: ast.expr) -> str:
    """Write a name or a dotted name; anything else is empty."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return f"{module}.{name}"
    return ""
