"""The closed world of queries: what a move may read, and how."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from shardmig.lint import datatypes
from shardmig.lint.expressions import MOVE, Place, collation, expression, type_of
from shardmig.lint.rules import moves as rules
from shardmig.lint.rules.tables import BorrowedShape
from shardmig.lint.rules.text import UnknownSyntax
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.judge import Judge

__all__ = ["place_of", "query", "source", "with_clause"]

_WRITING = frozenset({"InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"})
_SAMPLES = frozenset({"bernoulli", "system"})


def place_of(*, feeds_new: bool = False) -> Place:
    """Return what an expression of a move may hold."""
    return _FEEDING if feeds_new else _READING


def _inner(judge: Judge, node: Node, *, feeds_new: bool) -> None:
    query(judge, node, feeds_new=feeds_new)


_READING = Place("a move", MOVE, values=True, columns=True, queries=partial(_inner, feeds_new=False))
_FEEDING = Place("a move", MOVE, values=True, columns=True, queries=partial(_inner, feeds_new=True), feeds_new=True)


def query(
    judge: Judge, node: Node, *, feeds_new: bool = False, write: Callable[[Judge, Node], None] | None = None
) -> None:
    """
    Judge a SELECT or VALUES.

    Args:
        judge: collects.
        node: the SelectStmt.
        feeds_new: whether its values number rows of a new table.
        write: judges data-modifying WITH queries; None below the top level, where the server refuses them.
    """
    if node.kind != "SelectStmt":
        judge.refuse(UnknownSyntax, node, f"{node.kind} is no query")
        return
    judge.known(
        node,
        but={"into_clause": (BorrowedShape, "SELECT INTO creates a table; create it in upgrade(), fill it by INSERT")},
    )
    place = place_of(feeds_new=feeds_new)
    with_clause(judge, node, write)
    for part in ("larg", "rarg"):
        if part in node.fields:
            query(judge, node.get(part), feeds_new=feeds_new)
    for target in node.get("target_list", []):
        judge.known(target)
        expression(judge, target.get("val"), place)
        expression(judge, [step for step in target.get("indirection", []) if isinstance(step, Node)], place)
    for item in node.get("from_clause", []):
        source(judge, item, place)
    for part in (
        "where_clause",
        "having_clause",
        "group_clause",
        "sort_clause",
        "limit_offset",
        "limit_count",
        "window_clause",
    ):
        expression(judge, node.get(part), place)
    expression(judge, [item for item in node.get("distinct_clause", []) if item is not None], place)
    for row in node.get("values_lists", []):
        expression(judge, row, place)
    for lock in node.get("locking_clause", []):
        judge.known(lock)
        for relation in lock.get("locked_rels", []):
            judge.relation(relation)


def with_clause(judge: Judge, node: Node, write: Callable[[Judge, Node], None] | None) -> None:
    """Judge the WITH queries of a statement, each on its own."""
    clause: Node | None = node.get("with_clause")
    if clause is None:
        return
    judge.known(clause)
    for common in clause.get("ctes", []):
        judge.known(common)
        inner: Node = common.get("ctequery")
        if inner.kind not in _WRITING:
            query(judge, inner, feeds_new=True)
        elif write is None:
            judge.refuse(
                rules.WritesOldTable if inner.kind == "DeleteStmt" else UnknownSyntax,
                common,
                f"a WITH query that writes stands below the top level ({common.get('ctename')}): the server "
                f"refuses it, and it hides; write it at the top",
            )
        else:
            write(judge, inner)


def source(judge: Judge, node: Node, place: Place) -> None:
    """Judge one item of FROM or USING."""
    if node.get("alias") is not None:
        judge.known(node.get("alias"))
    match node.kind:
        case "RangeVar":
            judge.relation(node)
        case "JoinExpr":
            judge.known(node)
            source(judge, node.get("larg"), place)
            source(judge, node.get("rarg"), place)
            expression(judge, node.get("quals"), place)
        case "RangeSubselect":
            judge.known(node)
            if "alias" not in node.fields:
                judge.since(16, node, "a sub-select in FROM without a name")
            query(judge, node.get("subquery"), feeds_new=place.feeds_new)
        case "RangeFunction":
            _function_source(judge, node, place)
        case "RangeTableSample":
            judge.known(node)
            source(judge, node.get("relation"), place)
            if node.get("method", [""])[-1] not in _SAMPLES:
                judge.refuse(UnknownSyntax, node, "this sampling method is not PostgreSQL's own")
            expression(judge, [*node.get("args", []), node.get("repeatable")], place)
        case kind:
            judge.refuse(UnknownSyntax, node, f"{kind} is not known to be harmless in FROM; write it plainly")


def _function_source(judge: Judge, node: Node, place: Place) -> None:
    judge.known(node)
    for item in node.get("functions", []):
        for part in item if isinstance(item, list) else [item]:
            if isinstance(part, list):
                _column_definitions(judge, part)
            else:
                expression(judge, part, place)
    _column_definitions(judge, node.get("coldeflist", []))


def _column_definitions(judge: Judge, definitions: list[Node]) -> None:
    for definition in definitions:
        judge.known(definition)
        type_of(judge, definition.get("type_name"), datatypes.CASTS)
        if "coll_clause" in definition.fields:
            judge.known(definition.get("coll_clause"))
            collation(judge, definition.get("coll_clause"))
