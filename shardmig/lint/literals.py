"""
SQL in files of an application: literals of Python that begin like a statement, and the statements of a .sql file.

What is put in at run time becomes a hole; whether a text is SQL at all is for the parser to say.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig import sqltree

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Text", "filled", "parsed_python", "python_texts", "sql_texts"]

_BEGINS = re.compile(
    r"\s*(?:--[^\n]*\n\s*|/\*.*?\*/\s*)*(?:SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|COPY)\b", re.IGNORECASE | re.DOTALL
)
_GOES_ON = re.compile(r"\b(?:FROM|INTO|SET|VALUES|USING|TO|AS)\b|\*", re.IGNORECASE)
_PARAMETER = re.compile(r"%\(\w+\)[sbt]|%[sbt]|(?<![:\w]):(?!=)[A-Za-z_]\w*|(?<![?@#\w])\?(?![|&?])")
_HOLE = "______"


@dataclass(frozen=True, slots=True)
class Text:
    """One SQL text of an application: where it begins, and what its comments allow."""

    path: str
    sql: str
    line: int
    spread: bool  # whether its lines are the file's lines


def sql_texts(path: str, source: str) -> Iterator[Text]:
    """Yield the statements of a .sql file, psql's own lines blanked out: one that is no SQL hides no other."""
    text = re.sub(r"(?m)^[ \t]*\\[^\n]*$", "", source)
    try:
        ends = [token.offset for token in sqltree.tokens(filled(text)) if token.text == ";"]
    except sqltree.SqlError:
        ends = []
    start = 0
    for end in [*ends, len(text)]:
        if text[start:end].strip():
            yield Text(path, text[start:end], text.count("\n", 0, start) + 1, spread=True)
        start = end + 1


def parsed_python(source: str) -> ast.Module | None:
    """Parse a Python file; None: it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def python_texts(path: str, tree: ast.Module) -> Iterator[Text]:
    """Yield the literals of a Python file that look like SQL."""
    inner: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in inner or not isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                inner.add(id(node.value))  # a docstring
            continue
        text = _literal(node)
        if text is None:
            continue
        inner.update(id(child) for child in ast.walk(node))
        if _BEGINS.match(text) and _GOES_ON.search(text):
            spread = (node.end_lineno or node.lineno) - node.lineno == text.count("\n")
            yield Text(path, text, node.lineno, spread=spread)


def _literal(node: ast.expr) -> str | None:
    """Return the text of a literal; what is put in at run time becomes a hole."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(_literal(value) or _HOLE for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first = _literal(left)
            return None if first is None else first + (_literal(right) or _HOLE)
        case ast.BinOp(left=left, op=ast.Mod()):
            return _literal(left)
    return None


def filled(sql: str, filler: str = "1") -> str:
    """Put constants or names of the same length in the place of parameters, so that places stay true."""
    return _PARAMETER.sub(lambda match: "1".ljust(len(match[0])) if filler == "1" else filler * len(match[0]), sql)
