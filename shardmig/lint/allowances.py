"""
Allow comments of a script: `# shardmig: allow SM125 -- why`, on the call or on the line above it.

What they allow is listed in the plan, and so in its checksum. Here the comments are read once more with their lines:
one comment speaks of one call.
"""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass

__all__ = ["Allowance", "allowances"]

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
