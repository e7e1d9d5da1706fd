"""Every rule, once, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig.lint.rules import application, expressions, indexes, moves, script, structure, tables, text
from shardmig.lint.violation import Rule

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["BY_CODE", "RULES"]


def _rules_of(module: ModuleType) -> list[type[Rule]]:
    return [
        member
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Rule) and member.__module__ == module.__name__
    ]


_MODULES = (text, structure, tables, indexes, moves, expressions, script, application)
RULES: tuple[type[Rule], ...] = tuple(
    sorted(
        (rule for module in _MODULES for rule in _rules_of(module)),
        key=lambda rule: (("SM", "SP", "SA").index(rule.code[:2]), rule.code),
    )
)
BY_CODE = {rule.code: rule for rule in RULES}
