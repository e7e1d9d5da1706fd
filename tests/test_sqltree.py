"""The wall around the parser: plain trees, true places, no exception but SqlError."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmig import sqltree
from shardmig.sqltree import Node, SqlError


def test_a_tree_holds_only_what_is_set() -> None:
    (statement,) = sqltree.parse("ALTER TABLE t ADD COLUMN n int")
    column = statement.get("cmds")[0].get("def")

    assert column.fields.keys() == {"colname", "type_name", "is_local", "location"}


def test_strings_numbers_and_empty_items_are_plain_values() -> None:
    (statement,) = sqltree.parse("SELECT DISTINCT '', 0, NULL")
    values = [target.get("val").fields for target in statement.get("target_list")]

    assert statement.get("distinct_clause") == [None]
    assert [{k: v for k, v in fields.items() if k != "location"} for fields in values] == [
        {"sval": ""},
        {"ival": 0},
        {"isnull": True},
    ]


def test_an_error_knows_its_character_and_not_its_byte() -> None:
    with pytest.raises(SqlError) as caught:
        sqltree.parse("SELECT 'ää' FORM t x y")

    assert caught.value.offset is not None
    assert "SELECT 'ää' FORM t x y"[caught.value.offset :].startswith(("FORM", "t", "x", "y"))


def test_tokens_tell_plain_literals_from_escaped_ones_and_keep_their_place() -> None:
    kinds = [(token.kind, token.text) for token in sqltree.tokens("'ä' E'x' \"N\" -- c")]

    assert kinds == [("SCONST", "'ä'"), ("SCONST", "E'x'"), ("IDENT", '"N"'), ("SQL_COMMENT", "-- c")]


def test_layout_and_comments_do_not_change_a_fingerprint_and_literals_do() -> None:
    assert sqltree.fingerprint("SELECT  1 -- x") == sqltree.fingerprint("select 1")
    assert sqltree.fingerprint("SELECT 1") != sqltree.fingerprint("SELECT 2")
    assert sqltree.fingerprint("SELECT '1'") != sqltree.fingerprint("SELECT 1")


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(SqlError) as caught:
        sqltree.parse("SELECT " + "1 + " * 5000 + "1")

    assert caught.value.too_deep


@pytest.mark.parametrize("read", [sqltree.parse, sqltree.tokens, sqltree.fingerprint])
@given(text=st.text() | st.text(alphabet="SELECT \"'$-/*{}()\\;\0\ud800é1a"))
def test_nothing_but_a_sql_error_comes_out_of_any_text(read: Any, text: Any) -> None:
    with contextlib.suppress(SqlError):
        read(text.replace("\0", " "))


def test_walk_meets_every_node() -> None:
    (statement,) = sqltree.parse("SELECT a + b FROM t WHERE c IN (SELECT 1)")
    kinds = [node.kind for node in sqltree.walk(statement)]

    assert kinds[0] == "SelectStmt"
    assert {"ResTarget", "A_Expr", "ColumnRef", "RangeVar", "SubLink"} <= set(kinds)
    assert repr(Node("X", {"a": 1})) == "X(a=1)"
