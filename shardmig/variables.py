"""The variables of a script: constants in its text, read without running it."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any, Literal

from shardmig.errors import ScriptError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["VARIABLES", "Variables", "assignments"]

VARIABLES = frozenset(
    {
        "revision",
        "down_revision",
        "flag",
        "needs",
        "protocol",
        "relax",
        "amends",
        "online",
        "depends_on",
        "branch_labels",
    }
)
_FLAG = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}\Z")


class Variables:
    """
    The module's variables that mean something to shardmig, as constants.

    Attributes:
        name: of the script, for messages.
        nodes: what is assigned, by variable.
    """

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name = name
        self.nodes: dict[str, ast.expr] = {}
        for variable, node in assignments(tree):
            if variable in VARIABLES:
                if variable in self.nodes:
                    raise ScriptError(f"{variable} is assigned twice; once is enough", path=name, line=node.lineno)
                self.nodes[variable] = node

    def fail(self, variable: str, reason: str) -> Any:  # noqa: ANN401 - it never returns; callers stay expressions
        """Raise ScriptError at a variable's line."""
        raise ScriptError(reason, path=self.name, line=self.nodes[variable].lineno)

    def value(self, variable: str) -> object:
        """Return a variable's constant; None when it is not assigned."""
        node = self.nodes.get(variable)
        if node is None:
            return None
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            self.fail(variable, f"{variable} must be a plain constant: it is read without running the script")
            return None

    def text(self, variable: str, default: str | None) -> str | None:
        """Return a string."""
        value = self.value(variable)
        if value is None:
            return default
        if isinstance(value, tuple) and variable == "down_revision":
            self.fail(variable, "the history is linear: down_revision names one revision, or None")
        if not isinstance(value, str):
            self.fail(variable, f'{variable} is a string, as in {variable} = "0001_shop"')
        return str(value)

    def texts(self, variable: str) -> tuple[str, ...]:
        """Return a tuple of strings; empty when it is not assigned."""
        value = self.value(variable)
        if value is None:
            return ()
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) and item for item in value):
            self.fail(variable, f'{variable} is a tuple of strings, as in {variable} = ("other",)')
        return tuple(str(item) for item in value)  # type: ignore[attr-defined]

    def boolean(self, variable: str, *, default: bool) -> bool:
        """Return True or False."""
        value = self.value(variable)
        if value is not None and not isinstance(value, bool):
            self.fail(variable, f"{variable} is True or False")
        return default if value is None else bool(value)

    def protocol(self) -> Literal["auto", "dual"]:
        """Return whether the flag walks through DUAL in any case."""
        value = self.text("protocol", "auto")
        if value not in ("auto", "dual"):
            self.fail("protocol", 'protocol is "auto" or "dual"')
        return "dual" if value == "dual" else "auto"

    def flag(self, number: str) -> str:
        """Name the flag: what the script says, or the revision's id without its leading number."""
        flag = self.text("flag", None) or re.sub(r"\A[0-9]+_(?=[A-Za-z])", "", number)
        if "flag" in self.nodes and not _FLAG.match(flag):
            self.fail("flag", f"flag {flag!r} is not a name; letters, digits and _ make one, at most 63")
        return flag


def assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the module's names and what they are assigned: `a = x`, `a: str = x`, `a, b = x, y`."""
    for node in tree.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from _unpacked(target, value)


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match target, value:
        case ast.Name(id=name), _:
            yield name, value
        case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
            for name_node, value_node in zip(names, values, strict=True):
                yield from _unpacked(name_node, value_node)
        case ast.Tuple(elts=names), _:
            for name_node in names:
                yield from _unpacked(name_node, value)
