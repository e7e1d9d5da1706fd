"""CREATE TABLE: anything goes that concerns the new table alone; foreign keys must let old DELETEs work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import columns, datatypes
from shardmig.lint.expressions import DEFAULT_OF_NEW, ROW_OF_NEW, expression, operator_name, type_of
from shardmig.lint.rules import structure as rules
from shardmig.lint.rules.text import UnknownSyntax
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from shardmig.lint.judge import Judge

__all__ = ["column", "create_table", "permanent", "storage_options"]

_OPTIONS = frozenset(
    {
        "fillfactor", "toast_tuple_target", "parallel_workers", "vacuum_truncate", "vacuum_index_cleanup",
        "log_autovacuum_min_duration", "deduplicate_items", "buffering", "fastupdate", "gin_pending_list_limit",
        "pages_per_range", "autosummarize",
    }
)  # fmt: skip
_ACTIONS = {"a": "NO ACTION", "r": "RESTRICT", "c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}
_FK_ATTRIBUTES = frozenset(
    {"CONSTR_ATTR_DEFERRABLE", "CONSTR_ATTR_NOT_DEFERRABLE", "CONSTR_ATTR_DEFERRED", "CONSTR_ATTR_IMMEDIATE"}
)


@dataclass
class _Table:
    """What the foreign keys of a table need to know about its columns."""

    name: str
    not_null: set[str] = field(default_factory=set)
    defaulted: set[str] = field(default_factory=set)
    unique: set[str] = field(default_factory=set)
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
                rules.IfExists,
                "IF NOT EXISTS keeps whatever table has this name; the ledger makes a retry safe, leave it out",
            ),
            "of_typename": (
                rules.BorrowedShape,
                "a typed table follows a type defined elsewhere; write its columns out",
            ),
            "tablespacename": (rules.NotPermanent, "a tablespace may be missing on a shard; leave it out"),
            "access_method": (UnknownSyntax, "another table access method may be missing on a shard; leave it out"),
        },
    )
    permanent(judge, relation, "a table")
    from shardmig.lint.structure import owned_schema  # noqa: PLC0415 - the dispatcher imports this module

    owned_schema(judge, [relation.get("schemaname", ""), relation.get("relname", "")], relation)
    _parents(judge, statement, parents)
    if statement.get("oncommit", "ONCOMMIT_NOOP") != "ONCOMMIT_NOOP":
        judge.refuse(UnknownSyntax, relation, "ON COMMIT is for temporary tables; leave it out")
    storage_options(judge, statement.get("options", []))
    table = _Table(judge.scope.relation(relation))
    for element in [*statement.get("table_elts", []), *statement.get("constraints", [])]:
        match element.kind:
            case "ColumnDef":
                _column(judge, element, table)
            case "Constraint":
                _constraint(judge, element, table, None)
            case "TableLikeClause":
                judge.refuse(
                    rules.BorrowedShape, element, "LIKE copies a shape that differs from shard to shard; write it out"
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


def permanent(judge: Judge, relation: Node, what: str) -> None:
    """Refuse temporary and unlogged relations, and what is nobody's to create."""
    judge.known(relation)
    persistence = relation.get("relpersistence", "p")
    if persistence == "t":
        judge.refuse(
            rules.NotPermanent,
            relation,
            f"{what} that is temporary shadows the real one of its name; make it permanent",
        )
    elif persistence != "p":
        judge.refuse(
            rules.NotPermanent,
            relation,
            f"{what} that is unlogged is empty after a crash and on standbys; make it logged",
        )


def storage_options(judge: Judge, options: list[Node]) -> None:
    """Judge WITH (…) of a new table or index."""
    for option in options:
        judge.known(option)
        name = option.get("defname", "")
        known = name in _OPTIONS or name.startswith("autovacuum_")
        if not known or option.get("defnamespace", "toast") != "toast":
            judge.refuse(UnknownSyntax, option, f"storage parameter {name} is not known; leave it out")


def _parents(judge: Judge, statement: Node, parents: list[str]) -> None:
    place: Node = statement.get("relation")
    for parent in statement.get("inh_relations", []):
        judge.relation(parent)
    if not parents:
        return
    if "partbound" not in statement.fields:
        judge.refuse(
            rules.BorrowedShape,
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
            rules.PartitionOfExisting,
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
    for constraint in node.get("constraints", []):
        _constraint(judge, constraint, table, name)


def _constraint(judge: Judge, node: Node, table: _Table, column_name: str | None) -> None:
    """Judge a constraint of a new table; `column_name` when it stands behind a column."""
    judge.known(node)
    names: list[str] = [column_name] if column_name is not None else node.get("keys", [])
    contype: str = node.get("contype", "")
    match contype:
        case "CONSTR_NULL":
            pass
        case "CONSTR_NOTNULL":
            table.not_null.update(names)
        case "CONSTR_DEFAULT":
            expression(judge, node.get("raw_expr"), DEFAULT_OF_NEW)
            table.defaulted.update(names)
        case "CONSTR_PRIMARY":
            table.not_null.update(names)
            table.unique.update(names)
            _index_of(judge, node)
        case "CONSTR_UNIQUE":
            if node.get("nulls_not_distinct"):
                judge.since(15, node, "NULLS NOT DISTINCT")
                table.unique.update(names)
            _index_of(judge, node)
        case "CONSTR_CHECK":
            expression(judge, node.get("raw_expr"), ROW_OF_NEW)
            table.suspicious.update(_may_dislike_null(node.get("raw_expr")))
        case "CONSTR_IDENTITY":
            from shardmig.lint.structure import sequence_options  # noqa: PLC0415 - as above

            sequence_options(judge, node.get("options", []))
            table.not_null.update(names)
        case "CONSTR_GENERATED":
            if node.get("generated_kind") == "v":
                judge.since(18, node, "a VIRTUAL generated column")
            expression(judge, node.get("raw_expr"), ROW_OF_NEW)
        case "CONSTR_EXCLUSION":
            _exclusion(judge, node)
        case "CONSTR_FOREIGN":
            attributes = node.get("fk_attrs", names)
            table.keys.append((node, attributes))
        case _ if contype in _FK_ATTRIBUTES:
            pass
        case "CONSTR_ATTR_NOT_ENFORCED" | "CONSTR_ATTR_ENFORCED":
            judge.since(18, node, "NOT ENFORCED")
        case _:
            judge.refuse(
                UnknownSyntax, node, f"{contype.removeprefix('CONSTR_')} is not known in a table; leave it out"
            )
    if contype in ("CONSTR_CHECK", "CONSTR_FOREIGN") and not node.get("is_enforced"):
        judge.since(18, node, "NOT ENFORCED")


def _index_of(judge: Judge, node: Node) -> None:
    if node.get("without_overlaps"):
        judge.since(18, node, "WITHOUT OVERLAPS")
    storage_options(judge, node.get("options", []))


def _exclusion(judge: Judge, node: Node) -> None:
    storage_options(judge, node.get("options", []))
    for element, operators in node.get("exclusions", []):
        judge.known(element)
        expression(judge, element.get("expr"), ROW_OF_NEW)
        operator_name(judge, operators, node)
    expression(judge, node.get("where_clause"), ROW_OF_NEW)


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
            rules.ForeignKeyBlocks,
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
            rules.ForeignKeyNotes,
            node,
            f"UPDATE of a key and TRUNCATE of {target} fail from now on, and each DELETE there looks into "
            f"{table.name}: add ON UPDATE CASCADE where keys change, and an index on {', '.join(names)}",
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
            obstacle = "its one default would stand there twice" if name in table.unique else None
        if obstacle is not None:
            judge.refuse(
                rules.SetNullOnNotNull,
                node,
                f"DELETE of today fails, for ON DELETE {verb} cannot set {name}: {obstacle}; write ON DELETE CASCADE",
            )
