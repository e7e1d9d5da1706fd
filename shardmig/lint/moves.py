"""The closed world of moves: one statement that writes only what the plan has added (or declares as restored)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint.expressions import expression
from shardmig.lint.queries import place_of, query, source, with_clause
from shardmig.lint.rules import moves as rules
from shardmig.lint.rules.tables import BorrowedShape
from shardmig.lint.rules.text import UnknownSyntax
from shardmig.lint.structure import refused
from shardmig.nearest import nearest
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.judge import Judge

__all__ = ["move", "purge", "read"]

_STRUCTURE = frozenset(
    {
        "AlterTableStmt",
        "CreateStmt",
        "CreateTableAsStmt",
        "IndexStmt",
        "CreateEnumStmt",
        "CreateSeqStmt",
        "CreateSchemaStmt",
    }
    | {"CommentStmt", "GrantStmt", "ViewStmt"}
)


def move(judge: Judge, statement: Node) -> None:
    """Judge one statement of a move, forward or reverse."""
    handler = _HANDLERS.get(statement.kind)
    if handler is not None:
        handler(judge, statement)
    elif statement.kind in _STRUCTURE:
        judge.refuse(
            rules.StructureInMove, None, "structure in a move runs once for every batch; write it in upgrade()"
        )
    else:
        refused(judge, statement)


def read(judge: Judge, statement: Node) -> None:
    """Judge a statement that may only read: a move's checks."""
    if statement.kind != "SelectStmt":
        judge.refuse(rules.WritesWhileChecking, None, "a check that writes is run again and again; write one SELECT")
        move(judge, statement)
        return
    query(judge, statement, write=_check_writes)


def purge(judge: Judge, statement: Node) -> None:
    """Judge the statement that deletes rows of the target whose source is gone."""
    if statement.kind != "DeleteStmt":
        judge.refuse(rules.MoveWrites, None, "a purge is one DELETE on the move's target")
    move(judge, statement)


def _check_writes(judge: Judge, statement: Node) -> None:
    judge.refuse(rules.WritesWhileChecking, statement, "a check that writes is run again and again; write one SELECT")
    move(judge, statement)


def _select(judge: Judge, statement: Node) -> None:
    if "into_clause" in statement.fields:
        judge.refuse(BorrowedShape, None, "SELECT INTO creates a table; create it in upgrade(), fill it by INSERT")
        return
    query(judge, statement, write=move)


def _insert(judge: Judge, statement: Node) -> None:
    judge.known(statement)
    table, new = _target(judge, statement)
    if not new:
        _old_table(judge, statement, table, "INSERT puts rows into", "they appear")
    with_clause(judge, statement, move)
    place = place_of(feeds_new=new)
    for column in statement.get("cols", []):
        _named(judge, column)
    if "select_stmt" in statement.fields:
        query(judge, statement.get("select_stmt"), feeds_new=new)
    conflict: Node | None = statement.get("on_conflict_clause")
    if conflict is not None:
        judge.known(conflict)
        _inference(judge, conflict)
        _assignments(judge, conflict, table, new=new)
        expression(judge, conflict.get("where_clause"), place)
    _returning(judge, statement)


def _inference(judge: Judge, conflict: Node) -> None:
    infer: Node | None = conflict.get("infer")
    if infer is None:
        return
    judge.known(infer)
    for element in infer.get("index_elems", []):
        judge.known(element)
        expression(judge, element.get("expr"), place_of())
    expression(judge, infer.get("where_clause"), place_of())


def _update(judge: Judge, statement: Node) -> None:
    judge.known(statement)
    table, new = _target(judge, statement)
    with_clause(judge, statement, move)
    _assignments(judge, statement, table, new=new)
    if not new and "where_clause" not in statement.fields:
        judge.refuse(
            rules.NoWhere,
            statement.get("relation"),
            f"every row of {table} is locked and rewritten in one transaction; bound it by WHERE",
            lock=f"ROW EXCLUSIVE on {table}, and every row",
        )
    for item in statement.get("from_clause", []):
        source(judge, item, place_of())
    expression(judge, statement.get("where_clause"), place_of())
    _returning(judge, statement)


def _delete(judge: Judge, statement: Node) -> None:
    judge.known(statement)
    table, new = _target(judge, statement)
    if not new:
        _old_table(judge, statement, table, "DELETE takes rows from", "they vanish")
    with_clause(judge, statement, move)
    for item in statement.get("using_clause", []):
        source(judge, item, place_of())
    expression(judge, statement.get("where_clause"), place_of())
    _returning(judge, statement)


def _merge(judge: Judge, statement: Node) -> None:
    judge.since(15, statement.get("relation"), "MERGE")
    judge.known(statement)
    table, new = _target(judge, statement)
    with_clause(judge, statement, move)
    source(judge, statement.get("source_relation"), place_of())
    expression(judge, statement.get("join_condition"), place_of())
    for clause in statement.get("merge_when_clauses", []):
        judge.known(clause)
        if clause.get("match_kind") == "MERGE_WHEN_NOT_MATCHED_BY_SOURCE":
            judge.since(17, statement.get("relation"), "WHEN NOT MATCHED BY SOURCE")
        expression(judge, clause.get("condition"), place_of())
        expression(judge, clause.get("values", []), place_of(feeds_new=new))
        match clause.get("command_type"):
            case "CMD_UPDATE":
                _assignments(judge, clause, table, new=new)
            case "CMD_NOTHING":
                pass
            case "CMD_INSERT" if new:
                for target in clause.get("target_list", []):
                    _named(judge, target)
            case _ if not new:
                _old_table(judge, statement, table, "MERGE inserts into or deletes from", "rows appear or vanish")
    if "returning_clause" in statement.fields:
        judge.since(17, statement.get("relation"), "MERGE … RETURNING")
    _returning(judge, statement)


def _target(judge: Judge, statement: Node) -> tuple[str, bool]:
    relation: Node = statement.get("relation")
    table = judge.relation(relation)
    return table, judge.scope.context != "reverse" and table in judge.scope.new.tables


def _old_table(judge: Judge, statement: Node, table: str, harm: str, effect: str) -> None:
    relation: Node = statement.get("relation")
    if judge.scope.context == "reverse":
        judge.refuse(
            rules.NotRestored,
            relation,
            f"a reverse move that inserts or deletes changes more than it declares; UPDATE restored columns of {table}",
        )
        return
    judge.refuse(
        rules.WritesOldTable,
        relation,
        f"{harm} {table}, which running code reads: {effect}; write only tables that this plan creates"
        + nearest(table, judge.scope.new.tables),
        lock=f"ROW EXCLUSIVE on {table}",
    )


def _assignments(judge: Judge, node: Node, table: str, *, new: bool) -> None:
    """Judge SET: each column must be new, or restored by a reverse move."""
    for target in node.get("target_list", []):
        _named(judge, target)
        expression(judge, target.get("val"), place_of(feeds_new=new))
        column = target.get("name", "")
        if judge.scope.context == "reverse":
            _restored(judge, target, table, column)
        elif judge.scope.touches == table and _itself(target, node):
            pass  # a row version of its own, and no other value
        elif not new and column not in judge.scope.new.columns.get(table, ()):
            judge.refuse(
                rules.WritesOldColumn,
                target,
                f"{table}.{column} is read by running code and was not added by this plan; write only new columns"
                + _meant(judge, table, column),
                lock=f"ROW EXCLUSIVE on {table} and its rows",
            )


def _meant(judge: Judge, table: str, column: str) -> str:
    """Ask whether the likeliest new column is meant, or the one of this name in the likeliest table."""
    new = judge.scope.new.columns
    if table in new:
        return nearest(column, new[table])
    return nearest(table, (other for other, columns in new.items() if column in columns))


def _named(judge: Judge, target: Node) -> None:
    """Judge the name of a column that is written, and the subscripts behind it."""
    judge.known(target)
    expression(judge, [step for step in target.get("indirection", []) if isinstance(step, Node)], place_of())


def _itself(target: Node, statement: Node) -> bool:
    """Whether a column is set to its own value."""
    relation: Node | None = statement.get("relation")
    value: Node | None = target.get("val")
    if relation is None or value is None or value.kind != "ColumnRef":
        return False
    alias: Node | None = relation.get("alias")
    own = relation.get("relname") if alias is None else alias.get("aliasname")
    return value.get("fields") == [own, target.get("name")] and "indirection" not in target.fields


def _restored(judge: Judge, target: Node, table: str, column: str) -> None:
    if column not in judge.scope.restores.get(table, ()):
        judge.refuse(
            rules.NotRestored,
            target,
            f"{table}.{column} is not declared as restored; name it in back= or restores=, or leave it alone",
        )


def _returning(judge: Judge, statement: Node) -> None:
    clause: Node | None = statement.get("returning_clause")
    if clause is None:
        return
    judge.known(clause, but={"options": (UnknownSyntax, "RETURNING WITH (OLD AS …) is new in 18; leave it out")})
    for target in clause.get("exprs", []):
        judge.known(target)
        expression(judge, target.get("val"), place_of())
    for node in sqltree.walk(clause):
        fields = node.get("fields", [""])
        if node.kind == "ColumnRef" and fields[0] in ("old", "new") and fields[0] not in _sources(statement):
            judge.since(18, node, f"{fields[0]} in RETURNING")


def _sources(statement: Node) -> set[str]:
    """Return the names that a statement's own tables and sub-selects go by."""
    sources = [node for node in sqltree.walk(statement) if node.kind in ("RangeVar", "RangeSubselect", "RangeFunction")]
    aliases = [(node.get("alias"), node.get("relname", "")) for node in sources]
    return {relname if alias is None else alias.get("aliasname") for alias, relname in aliases}


_HANDLERS: dict[str, Callable[[Judge, Node], None]] = {
    "DeleteStmt": _delete,
    "InsertStmt": _insert,
    "MergeStmt": _merge,
    "SelectStmt": _select,
    "UpdateStmt": _update,
}
