"""What a plan adds: the objects that no running code knows, and what later plans must know about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import datatypes
from shardmig.lint.scope import New, relation_name
from shardmig.plan import Statement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardmig.plan import Plan
    from shardmig.sqltree import Node

__all__ = ["Added", "added", "added_by", "locked"]

_INDEXED = ("CONSTR_PRIMARY", "CONSTR_UNIQUE", "CONSTR_EXCLUSION")


@dataclass(slots=True)
class Added:
    """
    What one or several plans add, names as `New` spells them.

    Attributes:
        tables: new tables → their columns → type.
        columns: existing tables → new columns → type.
        types: enum types.
        sequences: sequences, those of serial and identity columns included.
        relations: what is named by hand among tables, indexes and sequences, which share one space of names.
        cascading: new tables that lose rows when an existing table does.
        partitioned: new tables that are partitioned.
        referred: new tables that foreign keys point to.
        emptied: new tables → columns that a DELETE on an existing table sets → action.
        whole: new tables that have only columns which plans name: they take over none, and nobody had to give them a
            key by hand, for they have one.
    """

    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    types: set[str] = field(default_factory=set)
    sequences: set[str] = field(default_factory=set)
    relations: set[str] = field(default_factory=set)
    cascading: set[str] = field(default_factory=set)
    partitioned: set[str] = field(default_factory=set)
    referred: set[str] = field(default_factory=set)
    emptied: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)

    def include(self, other: Added) -> None:
        """Add what another one holds."""
        for mine, theirs in (
            (self.tables, other.tables),
            (self.columns, other.columns),
            (self.emptied, other.emptied),
        ):
            for table, columns in theirs.items():
                mine.setdefault(table, {}).update(columns)
        self.types |= other.types
        self.sequences |= other.sequences
        self.relations |= other.relations
        self.cascading |= other.cascading
        self.partitioned |= other.partitioned
        self.referred |= other.referred
        self.whole |= other.whole

    def new(self, *, types: set[str]) -> New:
        """Return it as what a statement is judged against, with the enum types of all history."""
        return New(
            tables=frozenset(self.tables),
            columns={table: frozenset(columns) for table, columns in self.columns.items()},
            types=frozenset(self.types | types),
            sequences=frozenset(self.sequences),
            cascading=frozenset(self.cascading),
            referred=frozenset(self.referred),
            emptied={table: dict(columns) for table, columns in self.emptied.items()},
        )


@lru_cache(maxsize=4096)
def added(plan: Plan, home: str) -> Added:
    """
    Read off a plan what it adds; a statement that cannot be read adds nothing.

    Args:
        plan: the plan.
        home: the schema that an unqualified name means.
    """
    total = Added()
    for step in plan.steps:
        if isinstance(step, Statement):
            total.include(added_by(step.sql, home, total))
    return total


def added_by(sql: str, home: str, before: Added) -> Added:
    """Read off one statement what it adds to what the plan has added before."""
    found = Added()
    for statement in _statements(sql):
        match statement.kind:
            case "CreateStmt":
                _table(found, statement, home, before)
            case "AlterTableStmt":
                _columns(found, statement, home, before)
            case "CreateEnumStmt":
                found.types.add(_dotted(statement.get("type_name", []), home))
            case "CreateSeqStmt":
                name = _relation(statement.get("sequence"), home)
                found.sequences.add(name)
                found.relations.add(name)
            case "IndexStmt" if statement.get("idxname"):
                found.relations.add(_beside(statement.get("relation"), statement.get("idxname"), home))
    return found


def locked(sql: str, home: str, new: Mapping[str, object]) -> tuple[str, ...]:
    """
    Return the existing relations whose locks a structure statement waits for, in the order of the text.

    Several are only what the foreign keys of a new table point to. CREATE INDEX CONCURRENTLY is left out: it runs
    alone, without a short timeout.

    Args:
        sql: the statement.
        home: the schema that an unqualified name means.
        new: the tables that the plan has created before.
    """
    for statement in _statements(sql):
        match statement.kind:
            case "AlterTableStmt":
                candidates = [statement.get("relation")]
            case "CreateStmt":
                own = _relation(statement.get("relation"), home)
                candidates = [key for key in _referenced(statement) if _relation(key, home) != own]
            case "CommentStmt":
                return _commented(statement, home, new)
            case _:
                candidates = []
        existing: dict[str, str] = {}
        for relation in candidates:
            if (name := _relation(relation, home)) not in new:
                existing.setdefault(name, _written(relation.get("schemaname", ""), relation.get("relname", "")))
        if existing:
            return tuple(existing.values())
    return ()


def _statements(sql: str) -> list[Node]:
    try:
        return sqltree.parse(sql)
    except sqltree.SqlError:
        return []


def _relation(node: Node, home: str) -> str:
    return relation_name(node.get("schemaname", ""), node.get("relname", ""), home=home)


def _beside(table: Node, name: str, home: str) -> str:
    """Name what lies in the schema of its table: indexes, those of constraints too."""
    return relation_name(table.get("schemaname", ""), name, home=home)


def _dotted(names: list[str], home: str) -> str:
    return relation_name(names[-2] if len(names) > 1 else "", names[-1], home=home)


def _written(schema: str, name: str) -> str:
    return f"{schema}.{name}" if schema else name


def _commented(statement: Node, home: str, new: Mapping[str, object]) -> tuple[str, ...]:
    names = statement.get("object", [])
    if statement.get("objtype") == "OBJECT_COLUMN":
        names = names[:-1]
    if not isinstance(names, list) or not names or _dotted(names, home) in new:
        return ()
    return (_written(names[-2] if len(names) > 1 else "", names[-1]),)


def _table(found: Added, statement: Node, home: str, before: Added) -> None:
    name = _relation(statement.get("relation"), home)
    columns = found.tables.setdefault(name, {})
    found.relations.add(name)
    if "partspec" in statement.fields:
        found.partitioned.add(name)
    for element in statement.get("table_elts", []):
        if element.kind == "ColumnDef":
            _column(found, element, name, columns)
    for parent in statement.get("inh_relations", []):
        above = _relation(parent, home)
        found.emptied.setdefault(name, {}).update(before.emptied.get(above, {}))
        if above in before.cascading:
            found.cascading.add(name)
    elements = [*statement.get("table_elts", []), *statement.get("constraints", [])]
    _foreign_keys(found, name, elements, home, before)
    for element in elements:
        _constraint_indexes(found, statement.get("relation"), element, home)
    if _is_whole(statement, elements):
        found.whole.add(name)


def _is_whole(statement: Node, elements: list[Node]) -> bool:
    """Say whether a table has a primary key, and no columns of another table or type."""
    keyed = any(c.get("contype") == "CONSTR_PRIMARY" for element in elements for c, _ in _constraints(element))
    own = all(element.kind in ("ColumnDef", "Constraint") for element in elements)
    return keyed and own and not {"inh_relations", "of_typename"} & statement.fields.keys()


def _foreign_keys(found: Added, name: str, elements: list[Node], home: str, before: Added) -> None:
    """Read off what a DELETE of today does to a new table, from its columns and constraints."""
    keys = [
        (constraint, names)
        for element in elements
        for constraint, names in _constraints(element)
        if constraint.get("contype") == "CONSTR_FOREIGN"
    ]
    reached = []
    for constraint, names in keys:
        target = _relation(constraint.get("pktable"), home)
        if target in before.tables or target == name:
            found.referred.add(target)
        if target in before.cascading or (target not in before.tables and target != name):
            reached.append((constraint, names))
            if constraint.get("fk_del_action") == "c":
                found.cascading.add(name)
    if name in found.cascading | before.cascading:
        reached = keys
    defaulted = {
        column
        for element in elements
        for constraint, names in _constraints(element)
        if constraint.get("contype") == "CONSTR_DEFAULT"
        for column in names
    }
    for constraint, names in reached:
        action = constraint.get("fk_del_action", "a")
        for column in constraint.get("fk_del_set_cols", names) if action in ("n", "d") else ():
            sets = "d" if action == "d" and column in defaulted else "n"
            found.emptied.setdefault(name, {})[column] = sets


def _constraint_indexes(found: Added, table: Node, element: Node, home: str) -> None:
    """Read off the indexes that constraints with a name make; without one, the server finds a name that is free."""
    for constraint, _ in _constraints(element):
        if constraint.get("contype") in _INDEXED and constraint.get("conname"):
            found.relations.add(_beside(table, constraint.get("conname"), home))


def _constraints(element: Node) -> list[tuple[Node, list[str]]]:
    """Return the constraints of an element of a table, each with its columns."""
    if element.kind == "ColumnDef":
        return [(constraint, [element.get("colname", "")]) for constraint in element.get("constraints", [])]
    return [(element, element.get("fk_attrs", []))] if element.kind == "Constraint" else []


def _columns(found: Added, statement: Node, home: str, before: Added) -> None:
    name = _relation(statement.get("relation"), home)
    columns = (found.tables if name in before.tables else found.columns).setdefault(name, {})
    for command in statement.get("cmds", []):
        if command.get("subtype") in ("AT_AddColumn", "AT_AddConstraint"):
            _constraint_indexes(found, statement.get("relation"), command.get("def"), home)
        if command.get("subtype") == "AT_AddColumn":
            _column(found, command.get("def"), name, columns)
            if name in before.tables:
                _foreign_keys(found, name, [command.get("def")], home, before)


def _column(found: Added, node: Node, table: str, columns: dict[str, str]) -> None:
    column = node.get("colname", "")
    kind: Node | None = node.get("type_name")
    names = [] if kind is None else kind.get("names", [])
    columns[column] = names[-1] + ("[]" if kind is not None and "array_bounds" in kind.fields else "") if names else ""
    identity = any(c.get("contype") == "CONSTR_IDENTITY" for c in node.get("constraints", []))
    if identity or (len(names) == 1 and names[0] in datatypes.SERIAL):
        found.sequences.add(f"{table}_{column}_seq")


def _keys(statement: Node) -> list[Node]:
    return [
        node
        for node in sqltree.walk([statement.get("table_elts", []), statement.get("constraints", [])])
        if node.kind == "Constraint" and node.get("contype") == "CONSTR_FOREIGN"
    ]


def _referenced(statement: Node) -> list[Node]:
    return [constraint.get("pktable") for constraint in _keys(statement)]
