"""CREATE TABLE: anything goes that concerns the new table alone; foreign keys must let old DELETEs work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import columns, datatypes, options
from shardmig.lint.expressions import DEFAULT_OF_NEW, ROW_OF_NEW, expression, operator_name, type_of
from shardmig.lint.keys import Table, columns_of, excludes_null, foreign_keys, unenforced
from shardmig.lint.rules.structure import IfExists
from shardmig.lint.rules.tables import BorrowedShape, NotPermanent, PartitionOfExisting
from shardmig.lint.rules.text import UnknownSyntax

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.judge import Judge
    from shardmig.sqltree import Node

__all__ = ["column", "create_table"]


def create_table(judge: Judge, statement: Node) -> None:
    """Judge CREATE TABLE."""
    relation: Node = statement.get("relation")
    parents = [judge.scope.relation(parent) for parent in statement.get("inh_relations", [])]
    judge.known(
        statement,
        but={
            "if_not_exists": (
                IfExists,
                "IF NOT EXISTS keeps whatever table has this name; the ledger makes a retry safe, leave it out",
            ),
            "of_typename": (
                BorrowedShape,
                "a typed table follows a type defined elsewhere; write its columns out",
            ),
            "tablespacename": (NotPermanent, "a tablespace may be missing on a shard; leave it out"),
            "access_method": (UnknownSyntax, "another table access method may be missing on a shard; leave it out"),
        },
    )
    options.permanent(judge, relation, "a table")
    options.owned_schema(judge, [relation.get("schemaname", ""), relation.get("relname", "")], relation)
    _parents(judge, statement, parents)
    if statement.get("oncommit", "ONCOMMIT_NOOP") != "ONCOMMIT_NOOP":
        judge.refuse(UnknownSyntax, relation, "ON COMMIT is for temporary tables; leave it out")
    options.storage_options(judge, statement.get("options", []))
    table = Table(judge.scope.relation(relation))
    options.column_names(judge, [item for item in statement.get("table_elts", []) if item.kind == "ColumnDef"])
    for element in [*statement.get("table_elts", []), *statement.get("constraints", [])]:
        match element.kind:
            case "ColumnDef":
                _column(judge, element, table)
            case "Constraint":
                _constraint(judge, element, table, None)
            case "TableLikeClause":
                judge.refuse(
                    BorrowedShape, element, "LIKE copies a shape that differs from shard to shard; write it out"
                )
            case kind:
                judge.refuse(UnknownSyntax, element, f"{kind} is not known in a table; leave it out")
    if "partspec" in statement.fields:
        _partition_by(judge, statement.get("partspec"), table)
    inherited = {name: action for parent in parents for name, action in judge.scope.new.emptied.get(parent, {}).items()}
    foreign_keys(judge, table, inherited=inherited, place=relation)


def column(judge: Judge, node: Node, name: str) -> None:
    """Judge a column that is added to a table of the same plan: it is empty, and nobody knows it."""
    table = Table(name, altered=True)
    _column(judge, node, table)
    foreign_keys(judge, table, inherited=judge.scope.new.emptied.get(name, {}), place=node)


def _parents(judge: Judge, statement: Node, parents: list[str]) -> None:
    place: Node = statement.get("relation")
    for parent in statement.get("inh_relations", []):
        judge.relation(parent)
    if not parents:
        return
    if "partbound" not in statement.fields:
        judge.refuse(
            BorrowedShape,
            place,
            f"the new table's rows appear in every SELECT from {', '.join(parents)}; make a table of its own",
            lock=f"SHARE UPDATE EXCLUSIVE on {parents[0]}",
        )
        return
    bound: Node = statement.get("partbound")
    judge.known(bound)
    for name in ("listdatums", "lowerdatums", "upperdatums"):
        for value in bound.get(name, []):
            if not (value.kind == "ColumnRef" and value.get("fields") in (["minvalue"], ["maxvalue"])):
                expression(judge, value, DEFAULT_OF_NEW)
    if parents[0] not in judge.scope.new.tables:
        judge.refuse(
            PartitionOfExisting,
            place,
            f"everything on {parents[0]} waits for the lock, and rows go elsewhere; leave partitions to their own job",
            lock=f"ACCESS EXCLUSIVE on {parents[0]}",
        )


def _column(judge: Judge, node: Node, table: Table) -> None:
    judge.known(node)
    columns.storage(judge, node)
    name: str = node.get("colname", "")
    kind: Node | None = node.get("type_name")
    if kind is not None:  # a column of a partition may have none
        names = kind.get("names", [])
        if len(names) == 1 and names[0] in datatypes.SERIAL and "array_bounds" not in kind.fields:
            judge.known(kind)
            table.not_null.add(name)
            table.defaulted.add(name)
        else:
            type_of(judge, kind, datatypes.ANY)
    constraints: list[Node] = node.get("constraints", [])
    loose = any(constraint.get("contype") == "CONSTR_ATTR_NOT_ENFORCED" for constraint in constraints)
    for constraint in constraints:
        if loose and constraint.get("contype") == "CONSTR_FOREIGN":
            unenforced(judge, constraint)
        _constraint(judge, constraint, table, name)


@dataclass(frozen=True, slots=True)
class _Written:
    """A constraint as it stands in the text: whose it is, and of which columns."""

    judge: Judge
    node: Node
    table: Table
    names: list[str]


def _constraint(judge: Judge, node: Node, table: Table, column_name: str | None) -> None:
    """Judge a constraint of a new table; `column_name` when it stands behind a column."""
    judge.known(node)
    names: list[str] = [column_name] if column_name is not None else node.get("keys", [])
    contype: str = node.get("contype", "").removeprefix("CONSTR_")
    handler = _CONSTRAINTS.get(contype)
    if handler is None:
        judge.refuse(UnknownSyntax, node, f"{contype} is not known in a table; leave it out")
        return
    handler(_Written(judge, node, table, names))
    if contype in ("CHECK", "FOREIGN") and not node.get("is_enforced"):
        judge.since(18, node, "NOT ENFORCED")


def _attribute(_: _Written) -> None:
    """NULL, DEFERRABLE and their kin say nothing that needs a judge."""


def _enforced(written: _Written) -> None:
    written.judge.since(18, written.node, "NOT ENFORCED")


def _not_null(written: _Written) -> None:
    if "keys" in written.node.fields or written.node.get("is_no_inherit"):
        written.judge.since(18, written.node, "NOT NULL of its own, or with NO INHERIT,")
    written.table.not_null.update(written.names)


def _default(written: _Written) -> None:
    expression(written.judge, written.node.get("raw_expr"), DEFAULT_OF_NEW)
    written.table.defaulted.update(written.names)


def _primary_key(written: _Written) -> None:
    written.table.not_null.update(written.names)
    written.table.unique.update(written.names)
    _index_of(written.judge, written.node)


def _unique(written: _Written) -> None:
    if written.node.get("nulls_not_distinct"):
        written.judge.since(15, written.node, "NULLS NOT DISTINCT")
        written.table.unique.update(written.names)
    written.table.distinct.update(written.names)
    _index_of(written.judge, written.node)


def _check(written: _Written) -> None:
    condition: Node = written.node.get("raw_expr")
    expression(written.judge, condition, ROW_OF_NEW)
    named = columns_of(condition, written.table.name)
    written.table.checked |= named
    if _may_dislike_null(condition):
        written.table.suspicious |= named


def _identity(written: _Written) -> None:
    options.sequence_options(written.judge, written.node.get("options", []))
    written.table.not_null.update(written.names)


def _generated(written: _Written) -> None:
    if written.node.get("generated_kind") == "v":
        written.judge.since(18, written.node, "a VIRTUAL generated column")
    expression(written.judge, written.node.get("raw_expr"), ROW_OF_NEW)
    written.table.computes(written.node.get("raw_expr"), "a generated column computes with it")


def _reference(written: _Written) -> None:
    written.table.keys.append((written.node, written.node.get("fk_attrs", written.names)))


def _exclusion(written: _Written) -> None:
    judge, node = written.judge, written.node
    _index_of(judge, node)
    for element, operators in node.get("exclusions", []):
        judge.known(element)
        expression(judge, element.get("expr"), ROW_OF_NEW)
        operator_name(judge, operators, node)
        written.table.distinct.add(element.get("name", ""))
        written.table.computes(element.get("expr"), "an EXCLUDE computes with it")
    where: Node | None = node.get("where_clause")
    expression(judge, where, ROW_OF_NEW)
    for name in columns_of(where, written.table.name):
        if not excludes_null(where, name):
            written.table.computed.setdefault(name, "the WHERE of an EXCLUDE names it")


_CONSTRAINTS: dict[str, Callable[[_Written], None]] = {
    "NULL": _attribute,
    "NOTNULL": _not_null,
    "DEFAULT": _default,
    "PRIMARY": _primary_key,
    "UNIQUE": _unique,
    "CHECK": _check,
    "IDENTITY": _identity,
    "GENERATED": _generated,
    "EXCLUSION": _exclusion,
    "FOREIGN": _reference,
    "ATTR_DEFERRABLE": _attribute,
    "ATTR_NOT_DEFERRABLE": _attribute,
    "ATTR_DEFERRED": _attribute,
    "ATTR_IMMEDIATE": _attribute,
    "ATTR_ENFORCED": _enforced,
    "ATTR_NOT_ENFORCED": _enforced,
}


def _index_of(judge: Judge, node: Node) -> None:
    if node.get("without_overlaps"):
        judge.since(18, node, "WITHOUT OVERLAPS")
    options.storage_options(judge, node.get("options", []))


def _partition_by(judge: Judge, node: Node, table: Table) -> None:
    judge.known(node)
    for part in node.get("part_params", []):
        judge.known(part)
        expression(judge, part.get("expr"), ROW_OF_NEW)
        for name in {part.get("name", ""), *columns_of(part.get("expr"), table.name)} - {""}:
            table.computed.setdefault(name, "the table is partitioned by it")


def _may_dislike_null(check: Node) -> bool:
    """Whether a CHECK is anything but a plain comparison, which NULL passes."""
    nodes = list(sqltree.walk(check))
    plain = all(node.kind in ("A_Expr", "A_Const", "ColumnRef", "TypeCast", "TypeName") for node in nodes)
    return not plain or any(
        node.get("kind") in ("AEXPR_DISTINCT", "AEXPR_NOT_DISTINCT", "AEXPR_NULLIF") for node in nodes
    )
