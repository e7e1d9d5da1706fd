"""SQL as text: where it is literal, so that its layout may not change, and what no plan file can hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HEADER_MARK", "code", "pieces", "tidy", "unwritable"]

HEADER_MARK = "--!"  # begins a header line of a plan file

# PostgreSQL manual, "Lexical Structure". A backslash escapes only in E'' (standard_conforming_strings is on), block
# comments nest, and a dollar quote does not begin inside an identifier.
_LITERAL = re.compile(
    r"""
      (?<![\w$]) [eE] ' (?: [^'\\] | '' | \\. )* '
    | ' (?: [^'] | '' )* '
    | " (?: [^"] | "" )* "
    | (?<![\w$]) (?P<tag> \$ (?: [^\W\d]\w* )? \$ ) .*? (?P=tag)
    | -- [^\n]*
    | /\*
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")


def pieces(sql: str) -> Iterator[tuple[str, bool]]:
    """
    Split SQL into code and literals, in order; joined they are the text again.

    Yields:
        (text, whether it is literal): strings, quoted identifiers, dollar quotes and comments are literal. What is
        unterminated counts as code: the parser will complain about it.
    """
    position = 0
    for start, end in _literals(sql):
        if start > position:
            yield sql[position:start], False
        yield sql[start:end], True
        position = end
    if position < len(sql):
        yield sql[position:], False


def code(sql: str) -> str:
    """Return SQL with every literal replaced by one blank, to look for tokens in."""
    return "".join(" " if literal else text for text, literal in pieces(sql))


def tidy(sql: str) -> str:
    """
    Lay out generated SQL: no blanks at the ends of lines, four spaces for a tab that indents.

    Literals and comments keep every byte.
    """
    parts = [
        text
        if literal
        else re.sub(r"\n\t+", lambda m: "\n" + "    " * (len(m[0]) - 1), re.sub(r"[ \t]+\n", "\n", text))
        for text, literal in pieces(sql)
    ]
    return "".join(parts).strip()


def unwritable(sql: str) -> str | None:
    """
    Say why an SQL text cannot stand in a plan file; None when it can.

    NUL and carriage return are refused because server and parser read what is behind them differently.
    """
    if "\0" in sql:
        return "it holds a NUL character; PostgreSQL reads nothing behind it"
    if "\r" in sql:
        return "it holds a carriage return, which ends a comment for the server; end lines with a line feed"
    if sql.startswith(HEADER_MARK) or f"\n{HEADER_MARK}" in sql:
        return f"one of its lines begins with {HEADER_MARK}, which begins a header line of the plan file; indent it"
    if any("\ud800" <= character <= "\udfff" for character in sql):
        return "it holds half a surrogate pair, which is no character"
    return None


def _literals(sql: str) -> Iterator[tuple[int, int]]:
    position = 0
    while match := _LITERAL.search(sql, position):
        position = _comment_end(sql, match.end()) if match[0] == "/*" else match.end()
        yield match.start(), position


def _comment_end(sql: str, position: int) -> int:
    """Find where a block comment ends; an open one ends with the text."""
    depth = 1
    while depth and (edge := _COMMENT_EDGE.search(sql, position)):
        depth += 1 if edge[0] == "/*" else -1
        position = edge.end()
    return len(sql) if depth else position
