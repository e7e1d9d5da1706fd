"""
Allow comments: `# shardmig: allow SM125 -- why`, on the call or on the line above it; one comment speaks of one call.

What a script's comments allow, and in which steps, is listed in the plan, and so in its checksum.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass

__all__ = ["Allowance", "Calls", "allowances"]

_COMMENT = re.compile(r"#\s*shardmig:\s*allow\b(?P<what>.*)", re.IGNORECASE)
_WHAT = re.compile(r"\s+(?P<codes>[A-Z]{2}\d{3}(?:\s*,\s*[A-Z]{2}\d{3})*)\s*(?:--\s*(?P<reason>.*\S))?\s*\Z")


@dataclass(frozen=True, slots=True)
class Allowance:
    """
    One code that a comment allows.

    Attributes:
        code: the rule's code; empty when the comment names none.
        reason: why; empty when the comment does not say.
        line: 1-based line of the comment.
        above: whether the comment stands alone on its line, and so speaks of the next one.
    """

    code: str
    reason: str
    line: int
    above: bool = False


def allowances(source: str) -> tuple[Allowance, ...]:
    """Return what a script's comments allow, in order; text inside literals is no comment."""
    if "shardmig:" not in source:
        return ()
    found: list[Allowance] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            comment = _COMMENT.match(token.string) if token.type == tokenize.COMMENT else None
            if comment is not None:
                above = not token.line[: token.start[1]].strip()
                found += _parsed(comment["what"], token.start[0], above=above)
    except (tokenize.TokenError, SyntaxError):
        pass  # whoever imports the script says what is wrong with it
    return tuple(found)


def _parsed(what: str, line: int, *, above: bool) -> list[Allowance]:
    match = _WHAT.match(what)
    if match is None:
        return [Allowance("", "", line, above)]
    codes = [code.strip() for code in match["codes"].split(",")]
    return [Allowance(code, match["reason"] or "", line, above) for code in codes]


class Calls:
    """
    The calls of a script, and of which of them a comment speaks.

    Args:
        source: the script.
    """

    def __init__(self, source: str) -> None:
        spans = [
            (node.lineno, node.end_lineno or node.lineno)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Expr | ast.Assign | ast.Return)
        ]
        self._spans = sorted(spans, key=lambda span: span[1] - span[0])  # innermost first

    def meant(self, comment: Allowance, line: int, sql: str | None) -> bool:
        """
        Whether a comment stands on the call that made a step, or alone on the line above it.

        Args:
            comment: the comment.
            line: 1-based line that the step carries.
            sql: the step's statement; None for a move.
        """
        first, last = next((span for span in self._spans if span[0] <= line <= span[1]), (line, line))
        if first <= comment.line <= last:
            return True
        if comment.above:
            return comment.line == first - 1
        # Adjacent ADD COLUMNs of one table are one statement, which carries the line of the first.
        merged = sql is not None and sql.count("ADD COLUMN") > 1
        return merged and comment.line > last and self._adjacent(last, comment.line)

    def _adjacent(self, line: int, until: int) -> bool:
        """Whether one statement follows another without a gap of code until a line."""
        return any(first <= until <= last and first > line for first, last in self._spans)
