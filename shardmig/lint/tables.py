"""CREATE TABLE: anything goes that concerns the new table alone; foreign keys must let old DELETEs work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import columns, datatypes, options
from shardmig.lint.expressions import DEFAULT_OF_NEW, ROW_OF_NEW, expression, operator_name, type_of
from shardmig.lint.rules.structure import IfExists
from shardmig.lint.rules.tables import (
    BorrowedShape,
    ForeignKeyBlocks,
    ForeignKeyNotes,
    NotPermanent,
    PartitionOfExisting,
    SetNullOnNotNull,
)
from shardmig.lint.rules.text import UnknownSyntax

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.judge import Judge
    from shardmig.sqltree import Node

__all__ = ["column", "create_table"]

_ACTIONS = {"a": "NO ACTION", "r": "RESTRICT", "c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}


@dataclass
class _Table:
    """What the foreign keys of a table need to know about its columns."""

    name: str
    not_null: set[str] = field(default_factory=set)
    defaulted: set[str] = field(default_factory=set)
    unique: set[str] = field(default_factory=set)  # where not even NULL may stand twice
    distinct: set[str] = field(default_factory=set)  # where no value may stand twice
    suspicious: set[str] = field(default_factory=set)  # named by a CHECK that may dislike NULL
    keys: list[tuple[Node, list[str]]] = field(default_factory=list)


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
    table = _Table(judge.scope.relation(relation))
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
    for constraint, names in table.keys:
        _foreign_key(judge, constraint, names, table)
    if "partspec" in statement.fields:
        _partition_by(judge, statement.get("partspec"))


def column(judge: Judge, node: Node, name: str) -> None:
    """Judge a column that is added to a table of the same plan: it is empty, and nobody knows it."""
    table = _Table(name)
    _column(judge, node, table)
    for constraint, names in table.keys:
        _foreign_key(judge, constraint, names, table)


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


def _column(judge: Judge, node: Node, table: _Table) -> None:
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
    unenforced = any(constraint.get("contype") == "CONSTR_ATTR_NOT_ENFORCED" for constraint in constraints)
    for constraint in constraints:
        if unenforced and constraint.get("contype") == "CONSTR_FOREIGN":
            _unenforced(judge, constraint)
        _constraint(judge, constraint, table, name)


def _unenforced(judge: Judge, constraint: Node) -> None:
    judge.refuse(
        UnknownSyntax, constraint, "a foreign key that is not enforced locks its table and keeps nothing; leave it out"
    )


@dataclass(frozen=True, slots=True)
class _Written:
    """A constraint as it stands in the text: whose it is, and of which columns."""

    judge: Judge
    node: Node
    table: _Table
    names: list[str]


def _constraint(judge: Judge, node: Node, table: _Table, column_name: str | None) -> None:
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
    written.table.suspicious.update(_may_dislike_null(condition))


def _identity(written: _Written) -> None:
    options.sequence_options(written.judge, written.node.get("options", []))
    written.table.not_null.update(written.names)


def _generated(written: _Written) -> None:
    if written.node.get("generated_kind") == "v":
        written.judge.since(18, written.node, "a VIRTUAL generated column")
    expression(written.judge, written.node.get("raw_expr"), ROW_OF_NEW)


def _reference(written: _Written) -> None:
    written.table.keys.append((written.node, written.node.get("fk_attrs", written.names)))


def _exclusion(written: _Written) -> None:
    judge, node = written.judge, written.node
    _index_of(judge, node)
    for element, operators in node.get("exclusions", []):
        judge.known(element)
        expression(judge, element.get("expr"), ROW_OF_NEW)
        operator_name(judge, operators, node)
    expression(judge, node.get("where_clause"), ROW_OF_NEW)


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


def _partition_by(judge: Judge, node: Node) -> None:
    judge.known(node)
    for part in node.get("part_params", []):
        judge.known(part)
        expression(judge, part.get("expr"), ROW_OF_NEW)


def _may_dislike_null(check: Node) -> set[str]:
    """Return the columns a CHECK names, unless it is a plain comparison, which NULL passes."""
    nodes = list(sqltree.walk(check))
    if all(node.kind in ("A_Expr", "A_Const", "ColumnRef", "TypeCast", "TypeName") for node in nodes) and not any(
        node.get("kind") in ("AEXPR_DISTINCT", "AEXPR_NOT_DISTINCT", "AEXPR_NULLIF") for node in nodes
    ):
        return set()
    return {str(node.get("fields", [""])[-1]) for node in nodes if node.kind == "ColumnRef"}


# --------------------------------------------------------------------------------------------------------------------
# Foreign keys


def _foreign_key(judge: Judge, node: Node, names: list[str], table: _Table) -> None:
    target = judge.relation(node.get("pktable"))
    if node.get("fk_with_period") or node.get("pk_with_period"):
        judge.since(18, node, "PERIOD")
    if not node.get("is_enforced"):
        _unenforced(judge, node)
    if "fk_del_set_cols" in node.fields:
        judge.since(15, node, "ON DELETE SET … (columns)")
    new = judge.scope.new
    if target == table.name or (target in new.tables and target not in new.cascading):
        return
    action = node.get("fk_del_action", "a")
    lock = f"SHARE ROW EXCLUSIVE on {target}"
    if action not in ("c", "n", "d"):
        why = (
            f"{target} loses rows when an existing table does"
            if target in new.tables
            else f"{target} is in use already"
        )
        judge.refuse(
            ForeignKeyBlocks,
            node,
            f"DELETE of today fails as soon as a new row points there, for {why} and the key says "
            f"{_ACTIONS.get(action, 'nothing')}; write ON DELETE CASCADE or SET NULL",
            lock=lock,
            fix=f'sa.ForeignKey("{target}.…", ondelete="CASCADE")',
        )
        return
    if action in ("n", "d"):
        _set_null(judge, node, node.get("fk_del_set_cols", names), table, action)
    if target not in new.tables and node.get("fk_upd_action", "a") != "c":
        judge.refuse(
            ForeignKeyNotes,
            node,
            f"UPDATE of a key and TRUNCATE of {target} fail from now on, and each DELETE there looks into "
            f"{table.name}: add ON UPDATE CASCADE where keys change, and an index if none begins {', '.join(names)}",
            lock=lock,
        )


def _set_null(judge: Judge, node: Node, names: list[str], table: _Table, action: str) -> None:
    verb = _ACTIONS[action]
    for name in names:
        if action == "n" or name not in table.defaulted:
            obstacle = (
                "it is NOT NULL" if name in table.not_null
                else "a CHECK names it" if name in table.suspicious
                else "NULL is distinct from nothing there" if name in table.unique
                else None
            )  # fmt: skip
        else:
            obstacle = "its one default would stand there twice" if name in table.unique | table.distinct else None
        if obstacle is not None:
            judge.refuse(
                SetNullOnNotNull,
                node,
                f"DELETE of today fails, for ON DELETE {verb} cannot set {name}: {obstacle}; write ON DELETE CASCADE",
            )
