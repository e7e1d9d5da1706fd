"""What only the lexer sees: names cut off at 63 bytes, backslashes, words that leave no trace in the tree."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint.rules import text as rules

if TYPE_CHECKING:
    from shardmig.lint.judge import Judge

__all__ = ["judge_tokens"]

NAME_BYTES = 63  # NAMEDATALEN - 1

_NEW_NUMBER = re.compile(r"(?i)\b0[xob]|\d_\d")
_NUMBER_NEEDS = 16  # 0x1F and 1_000 are numbers from PostgreSQL 16 on; before, 1_000 is 1 with the alias _000
_NOTEWORTHY = re.compile(
    rf'\\|[A-Za-z0-9_$]{{64}}|"(?:[^"]|""){{64}}|[^\x00-\x7f]|{_NEW_NUMBER.pattern[4:]}'
    r"|(?i:\b(?:nulls|by|enforced)\b)"
)
_COMMENTS = frozenset({"SQL_COMMENT", "C_COMMENT"})

# Two words that newer servers take and the tree forgets, for they say what is so anyway → the version that has them.
_SILENT = {("NULLS", "DISTINCT"): 15, ("BY", "TARGET"): 17}
_ENFORCED_NEEDS = 18
_BEFORE_A_COLUMN = frozenset({"NOT", "AND", "OR", "TABLE", "REFERENCES", "COLUMN", "ADD", "IN", "IS", "KEY"})


def judge_tokens(judge: Judge) -> None:
    """
    Refuse what the tree does not show; most texts hold nothing that is worth a scan.

    Raises:
        sqltree.SqlError: the lexer does not get through the text.
    """
    if not _NOTEWORTHY.search(judge.sql):
        return
    before = ""
    for token in sqltree.tokens(judge.sql):
        if token.kind in _COMMENTS:
            continue
        word = token.text.upper()
        if token.kind in ("IDENT", "UIDENT"):
            _identifier(judge, token)
        elif token.kind == "SCONST" and "\\" in token.text and token.text[0] == "'":
            judge.refuse(
                rules.HiddenText,
                token.offset + token.text.index("\\"),
                "a backslash in a plain literal depends on standard_conforming_strings; write an E'' literal",
                fix="E" + token.text.replace("\\", "\\\\"),
            )
        elif token.kind in ("ICONST", "FCONST") and _NEW_NUMBER.search(token.text):
            judge.since(_NUMBER_NEEDS, token.offset, f"the number {token.text}")
        elif (before, word) in _SILENT:
            judge.since(_SILENT[before, word], token.offset, f"{before} {word}")
        elif token.kind == "ENFORCED" and _closes_a_constraint(before):
            judge.since(_ENFORCED_NEEDS, token.offset, "ENFORCED")
        before = word


def _closes_a_constraint(before: str) -> bool:
    return before == ")" or (before.isidentifier() and before not in _BEFORE_A_COLUMN)


def _identifier(judge: Judge, token: sqltree.Token) -> None:
    name = token.text
    if name.startswith('"'):
        name = name[1:-1].replace('""', '"')
    if len(name.encode()) > NAME_BYTES:
        judge.refuse(
            rules.LongName,
            token.offset,
            f"{name[:20]}… has {len(name.encode())} bytes; PostgreSQL silently keeps {NAME_BYTES}; shorten it",
        )
    if not name.isascii() and (strange := _invisible(name)):
        judge.refuse(
            rules.HiddenText,
            token.offset,
            f"a name holds {strange}, which nobody sees; write it with letters",
        )


@lru_cache(maxsize=256)
def _invisible(name: str) -> str | None:
    """Return the name of the first character that a reader cannot see."""
    for character in name:
        if character != " " and unicodedata.category(character)[0] in "ZC":
            return unicodedata.name(character, f"U+{ord(character):04X}")
    return None
