"""Where SQL is literal: the layout of generated SQL may change, what a script wrote may not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmig.sqltext import code, pieces, tidy

PARTS = st.sampled_from(["'", '"', "$$", "$a$", "E'", "\\", "--", "/*", "*/", "\n", " ", "\t", "x", "$1", "''"])


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT 'a''b' || \"c\"\"d\"", "SELECT   ||  "),
        (r"SELECT E'a\'b' || e'\\' || 'a\' || c", "SELECT   ||   ||   || c"),
        ("SELECT $$ it's $$, $a$ $$ $a$, a$b$c, $1", "SELECT  ,  , a$b$c, $1"),
        ("a -- 'x\nb /* 1 /* 2 */ ' */ c", "a  \nb   c"),
        ("open 'x", "open 'x"),
        ("open /* x", "open  "),
        ("name'e'", "name "),
    ],
)
def test_literals_and_comments_are_no_code(sql: str, expected: str) -> None:
    assert code(sql) == expected


@given(st.lists(PARTS).map("".join))
def test_pieces_are_the_text(sql: str) -> None:
    assert "".join(text for text, _ in pieces(sql)) == sql


@given(st.lists(PARTS).map("".join))
def test_tidying_twice_changes_no_more(sql: str) -> None:
    assert tidy(tidy(sql)) == tidy(sql)


def test_tidying_leaves_literals_alone() -> None:
    assert tidy("\nCREATE \t\n\t\ta DEFAULT 'x \t\n\ty' \n\n") == "CREATE\n        a DEFAULT 'x \t\n\ty'"
