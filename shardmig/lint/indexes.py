"""CREATE INDEX: on an existing table concurrently, not unique, and computing nothing that can fail."""

from __future__ import annotations

from shardmig.lint import datatypes, functions
from shardmig.lint.expressions import ROW_OF_NEW, collation, expression, judge_since, operator_name, type_of
from shardmig.lint.judge import Judge
from shardmig.lint.keys import EVERY, columns_of, excludes_null, refuse_setting
from shardmig.lint.options import storage_options
from shardmig.lint.rules.indexes import BlockingIndex, IndexCanFail, UniqueIndex, UnnamedIndex
from shardmig.lint.rules.structure import IfExists
from shardmig.lint.rules.tables import NotPermanent, OnlyParent
from shardmig.lint.rules.text import UnknownSyntax
from shardmig.sqltree import Node

__all__ = ["create_index"]

_METHODS = frozenset({"btree", "hash", "gin", "gist", "brin", "spgist"})
_TESTS = frozenset(
    {"AEXPR_OP", "AEXPR_IN", "AEXPR_BETWEEN", "AEXPR_NOT_BETWEEN", "AEXPR_DISTINCT", "AEXPR_NOT_DISTINCT"}
)
_ONE_ARGUMENT = frozenset({"length", "md5", "initcap", "reverse"})  # length(bytea, name) can fail


def create_index(judge: Judge, statement: Node) -> None:
    """Judge CREATE INDEX."""
    judge.known(
        statement,
        but={
            "if_not_exists": (
                IfExists,
                "IF NOT EXISTS keeps the INVALID index of a failed attempt; the runner rebuilds it, leave it out",
            ),
            "table_space": (NotPermanent, "a tablespace may be missing on a shard; leave it out"),
        },
    )
    relation: Node = statement.get("relation")
    table = judge.relation(relation)
    existing = table not in judge.scope.new.tables
    if not relation.get("inh"):
        judge.refuse(OnlyParent, relation, "ONLY leaves an invalid index on the parent; leave it out")
    if statement.get("access_method", "btree") not in _METHODS:
        judge.refuse(UnknownSyntax, relation, f"index method {statement.get('access_method')} is not PostgreSQL's own")
    if statement.get("nulls_not_distinct"):
        judge.since(15, relation, "NULLS NOT DISTINCT")
    storage_options(judge, statement.get("options", []))
    if existing:
        _on_existing(judge, statement, table)
    for element in [*statement.get("index_params", []), *statement.get("index_including_params", [])]:
        _element(judge, element, existing=existing)
    if "where_clause" in statement.fields:
        predicate: Node = statement.get("where_clause")
        if existing:
            if not _predicate(judge, predicate):
                _can_fail(judge, predicate, "the predicate")
        else:
            expression(judge, predicate, ROW_OF_NEW)
    _deletes(judge, statement, table)


def _deletes(judge: Judge, statement: Node, table: str) -> None:
    """Refuse what keeps a DELETE of today from setting a column of a new table."""
    for name, action in judge.scope.new.emptied.get(table, {}).items():
        obstacle = _obstacle(judge, statement, table, name, action)
        if obstacle is not None:
            refuse_setting(
                judge, statement.get("relation"), name, action, f"{obstacle}; or add WHERE {name} IS NOT NULL"
            )


def _obstacle(judge: Judge, statement: Node, table: str, name: str, action: str) -> str | None:
    """Say why an index of a new table may refuse that a DELETE sets one of its columns; None when it does not."""
    predicate: Node | None = statement.get("where_clause")
    if action == "n" and excludes_null(predicate, name):
        return None
    elements: list[Node] = statement.get("index_params", [])
    computing = [
        part
        for part in [predicate, *(element.get("expr") for element in elements)]
        if {name, EVERY} & columns_of(part, table)
    ]
    scratch = Judge(judge.sql, judge.scope)  # what is wrong besides is told already
    if statement.get("unique"):
        if computing:
            return "a unique index computes with it"
        if (action == "d" or statement.get("nulls_not_distinct")) and name in [e.get("name", "") for e in elements]:
            return "a unique index has it once"
    elif not all(_total(scratch, part) or _predicate(scratch, part) for part in computing) or scratch.found:
        return "an index computes with it, and that may fail"
    return None


def _on_existing(judge: Judge, statement: Node, table: str) -> None:
    relation: Node = statement.get("relation")
    name = statement.get("idxname", "")
    columns = ", ".join(f'"{element.get("name", "…")}"' for element in statement.get("index_params", []))
    fix = f'op.create_index("{name or f"ix_{table}"}", "{table}", [{columns}], postgresql_concurrently=True)'
    if not statement.get("concurrent"):
        judge.refuse(
            BlockingIndex,
            relation,
            f"every INSERT, UPDATE and DELETE on {table} waits until the index is built; build it concurrently",
            lock=f"SHARE on {table}",
            fix=fix,
        )
    elif not name:
        judge.refuse(UnnamedIndex, relation, "an interrupted build can only be found by name; name it", fix=fix)
    if statement.get("unique"):
        judge.refuse(
            UniqueIndex,
            relation,
            f"duplicates that {table} takes today fail, already during the build; make it a plain index",
            lock=f"SHARE UPDATE EXCLUSIVE on {table}",
            fix=fix,
        )


def _element(judge: Judge, element: Node, *, existing: bool) -> None:
    judge.known(element)
    if "collation" in element.fields:
        collation(judge, Node("CollateClause", {"collname": element.get("collation")}))
    if "opclass" in element.fields:
        _operator_class(judge, element)
    if "expr" not in element.fields:
        return
    computed: Node = element.get("expr")
    if not existing:
        expression(judge, computed, ROW_OF_NEW)
    elif not _total(judge, computed):
        _can_fail(judge, computed, "the expression")


def _operator_class(judge: Judge, element: Node) -> None:
    names: list[str] = element.get("opclass", [])
    if ".".join(names) in judge.scope.settings.known_functions:
        return
    own = len(names) == 1 or names[0] == "pg_catalog"
    if not own or names[-1] not in functions.OPERATOR_CLASSES:
        judge.refuse(
            UnknownSyntax,
            element,
            f"operator class {'.'.join(names)} is not PostgreSQL's own and may compute anything; "
            f"name it in known_functions if every shard has it",
        )


def _can_fail(judge: Judge, node: Node, what: str) -> None:
    judge.refuse(
        IndexCanFail,
        node,
        f"INSERT of today fails wherever {what} does, and this one is not known to work for every row; "
        f"use plain columns, lower, upper, md5, coalesce, IS NULL and comparisons with constants",
    )


def _total(judge: Judge, node: object) -> bool:
    """Whether an expression has a value for every row, and always the same."""
    if not isinstance(node, Node) or not judge.known(node):
        return False
    match node.kind:
        case "ColumnRef":
            return all(isinstance(part, str) for part in node.get("fields", []))
        case "A_Const":
            return True
        case "TypeCast":  # of a constant: computed once, when the index is defined
            type_of(judge, node.get("type_name"), datatypes.CASTS)
            constant = node.get("arg")
            return isinstance(constant, Node) and constant.kind == "A_Const" and _total(judge, constant)
        case "CollateClause":
            collation(judge, node)
            return _total(judge, node.get("arg"))
        case "CoalesceExpr":
            return all(_total(judge, arg) for arg in node.get("args", []))
        case "FuncCall":
            return _total_call(judge, node)
        case _:
            return False


def _total_call(judge: Judge, node: Node) -> bool:
    names: list[str] = node.get("funcname", [])
    args = node.get("args", [])
    plain = not node.fields.keys() & {"agg_order", "agg_filter", "over", "agg_star", "agg_distinct", "agg_within_group"}
    if ".".join(names) in judge.scope.settings.known_functions:
        return plain and all(_total(judge, arg) for arg in args)
    own = len(names) == 1 or (len(names) == 2 and names[0] == "pg_catalog")  # noqa: PLR2004 - schema and name
    if not (own and plain and names[-1] in functions.TOTAL):
        return False
    judge_since(judge, functions.SINCE.get(names[-1]), node, f"{names[-1]}()")
    return not (names[-1] in _ONE_ARGUMENT and len(args) > 1) and all(_total(judge, arg) for arg in args)


def _predicate(judge: Judge, node: object) -> bool:
    """Whether a predicate can be computed for every row."""
    if not isinstance(node, Node) or not _known_kind(node) or not judge.known(node):
        return False
    match node.kind:
        case "ColumnRef":
            return _total(judge, node)
        case "A_Const":
            return True
        case "NullTest":
            return _total(judge, node.get("arg"))
        case "BooleanTest":
            return _predicate(judge, node.get("arg"))
        case "BoolExpr":
            return all(_predicate(judge, arg) for arg in node.get("args", []))
        case "A_Expr":
            return _comparison(judge, node)
        case _:
            return False


def _known_kind(node: Node) -> bool:
    return node.kind in ("ColumnRef", "A_Const", "NullTest", "BooleanTest", "BoolExpr", "A_Expr")


def _comparison(judge: Judge, node: Node) -> bool:
    """Whether a comparison has a total left side and constants on the right."""
    operator: list[str] = node.get("name", [""])
    words = node.get("kind") in ("AEXPR_BETWEEN", "AEXPR_NOT_BETWEEN", "AEXPR_DISTINCT", "AEXPR_NOT_DISTINCT")
    if node.get("kind") not in _TESTS or (not words and operator[-1] not in functions.COMPARISONS):
        return False
    if not words:
        operator_name(judge, operator, node)
    right = node.get("rexpr")
    constants = right if isinstance(right, list) else [right]
    return _total(judge, node.get("lexpr")) and all(_constant(judge, constant) for constant in constants)


def _constant(judge: Judge, node: object) -> bool:
    if not isinstance(node, Node):
        return False
    if node.kind == "A_Expr" and node.get("name") == ["-"] and "lexpr" not in node.fields:
        return _constant(judge, node.get("rexpr"))
    return node.kind in ("A_Const", "TypeCast") and _total(judge, node)
