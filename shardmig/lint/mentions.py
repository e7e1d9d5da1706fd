"""
The columns that a plan's moves and its `relax` name, each with the tables of which one must have it.

A name counts only where there is no doubt what it means. Nothing is said of what may also come from a WITH query, a
sub-select or a function in FROM, of system columns, of names that stand for whole rows, nor of MERGE.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import functions
from shardmig.lint.expressions import BATCH_NUMBER
from shardmig.lint.scope import relation_name
from shardmig.nearest import nearest
from shardmig.plan import BATCH
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from shardmig.plan import Move, Plan

__all__ = ["ANY", "Mention", "columns_read", "columns_updated", "mentions", "named", "relaxed", "unknown"]

ANY = "*"
"""Among the columns that a text reads: it reads whole rows."""

_SYSTEM = frozenset({"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"})
_OF_ROWS = functions.IMMUTABLE | functions.STABLE | functions.VOLATILE | functions.AGGREGATES | functions.WINDOWS
_STATEMENTS = frozenset({"SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"})
_OF_OUTPUT = ("sort_clause", "group_clause", "distinct_clause")  # where a name may also be that of a result's column
_LONGEST = 63  # bytes of a name that the server keeps


@dataclass(frozen=True, slots=True)
class Mention:
    """
    A column that is named.

    Attributes:
        column: its name.
        tables: one of these has it, or the statement fails; as `relation_name` spells them.
        dotted: whether it is written behind its table: then it may be a function of the row (Composite Types, "Using
            Composite Types in Queries").
        part: which text of a move names it ("forward", "check", …); None where it stands in no text.
        sql: that text.
        offset: 0-based character in it.
    """

    column: str
    tables: tuple[str, ...]
    dotted: bool = False
    part: str | None = None
    sql: str | None = None
    offset: int = 0

    def __str__(self) -> str:
        """Say that the column is not there."""
        if len(self.tables) == 1:
            return f"{self.tables[0]} has no column {self.column}"
        return f"none of {', '.join(self.tables)} has a column {self.column}"

    def meant(self, columns: Mapping[str, Collection[str]]) -> str:
        """Ask whether the likeliest column of the tables is meant."""
        return nearest(self.column, {column for table in self.tables for column in columns[table]})


def unknown(named: Iterable[Mention], columns: Mapping[str, Collection[str]]) -> Iterator[Mention]:
    """
    Yield the columns that are named and surely not there, each once.

    Args:
        named: by a move, or in `relax`.
        columns: table → its columns, of those tables alone of which all columns are known.
    """
    told: set[tuple[str, str]] = set()
    for mention in named:
        names = {(table, mention.column) for table in mention.tables}
        if all(column not in columns.get(table, {column}) for table, column in names) and not names & told:
            told |= names
            yield mention


def named(table: str, home: str) -> str:
    """Return the name of a table that a plan writes as "table" or "schema.table", as `relation_name` spells it."""
    schema, _, name = table.rpartition(".")
    return relation_name(schema, name, home=home)


def relaxed(plan: Plan, home: str) -> Iterator[Mention]:
    """Yield the columns that a plan's `relax` names."""
    for written in plan.relax:
        table, _, column = written.rpartition(".")
        yield Mention(column, (named(table, home),))


@lru_cache(maxsize=1024)
def mentions(move: Move, home: str) -> tuple[Mention, ...]:
    """Read off a move the columns that it names: those of its texts, in order, then those of its arguments."""
    found = [
        mention
        for part in ("forward", "check", "orphans", "purge", "back", "back_check")
        if (text := getattr(move, part)) is not None
        for mention in _Text(part, text, home).read()
    ]
    source = (named(move.table, home),)
    target = (named(move.target or move.table, home),)
    found += [Mention(column, source) for column in (*move.key, *move.restores)]
    found += [Mention(column, target) for column in (*move.target_key, *move.writes)]
    return tuple(mention for mention in found if len(mention.column.encode()) <= _LONGEST)


@lru_cache(maxsize=1024)
def columns_read(text: str) -> frozenset[str]:
    """Return every name that a text reads as a column, whatever table it may be of; `ANY` where it reads whole rows."""
    try:
        nodes = list(sqltree.walk(sqltree.parse(text.replace(BATCH, f"${BATCH_NUMBER}"))))
    except sqltree.SqlError:
        return frozenset({ANY})
    rows = {node.get("relname") for node in nodes if node.kind == "RangeVar"}
    rows |= {node.get("aliasname") for node in nodes if node.kind == "Alias"}
    read = [node.get("fields") for node in nodes if node.kind == "ColumnRef"]
    whole = any(not isinstance(fields[-1], str) or (len(fields) == 1 and fields[0] in rows) for fields in read)
    return frozenset({fields[-1] for fields in read if isinstance(fields[-1], str)} | ({ANY} if whole else set()))


def columns_updated(text: str, table: str) -> frozenset[str]:
    """Return the columns of a table, named without its schema, that the UPDATEs of a text set."""
    try:
        nodes = sqltree.walk(sqltree.parse(text.replace(BATCH, f"${BATCH_NUMBER}")))
    except sqltree.SqlError:
        return frozenset()
    updates = [node for node in nodes if node.kind == "UpdateStmt" and node.get("relation").get("relname") == table]
    return frozenset(column.get("name") for update in updates for column in update.get("target_list", []))


@dataclass(frozen=True, slots=True)
class _Source:
    """What columns come from: the name it goes by, and the table; None where nobody knows which columns it has."""

    name: str
    table: str | None


_Scope = tuple[_Source, ...]
_OPAQUE = _Source("", None)


class _Text:
    """One text of a move."""

    def __init__(self, part: str, text: str, home: str) -> None:
        self.part = part
        self.text = text
        self.home = home
        self.commons: set[str] = set()
        self.found: list[Mention] = []

    def read(self) -> list[Mention]:
        """Return what the text names; nothing when it is not SQL, or nothing that moves or compares rows."""
        try:
            statements = sqltree.parse(self.text.replace(BATCH, f"${BATCH_NUMBER}"))  # as long, so places stay true
        except sqltree.SqlError:
            return []
        self.commons = {node.get("ctename") for node in sqltree.walk(statements) if node.kind == "CommonTableExpr"}
        if all(statement.kind in _STATEMENTS for statement in statements):
            self._visit(statements, ())
        return self.found

    def _visit(self, value: object, scope: _Scope) -> None:
        if isinstance(value, list):
            for item in value:
                self._visit(item, scope)
        elif isinstance(value, Node):
            if value.kind in _STATEMENTS:
                self._statement(value, scope)
            elif value.kind == "ColumnRef":
                self._column(value, scope)
            else:
                self._visit(list(value.fields.values()), scope)

    # ----------------------------------------------------------------------------------------------------------------
    # Statements

    def _statement(self, node: Node, outer: _Scope) -> None:
        self._visit(node.get("with_clause"), outer)
        match node.kind:
            case "SelectStmt":
                self._select(node, outer)
            case "InsertStmt":
                self._insert(node, outer)
            case "UpdateStmt" | "DeleteStmt":
                self._change(node, outer)

    def _select(self, node: Node, outer: _Scope) -> None:
        scope = outer + self._from(node.get("from_clause", []), outer)
        for name, value in node.fields.items():
            if name in ("larg", "rarg"):
                self._visit(value, outer)
            elif name not in ("with_clause", "from_clause"):
                self._visit(value, (*scope, _OPAQUE) if name in _OF_OUTPUT else scope)

    def _insert(self, node: Node, outer: _Scope) -> None:
        target = self._relation(node.get("relation"))
        for column in node.get("cols", []):
            self._note(column.get("name"), column, (target,))
        self._visit(node.get("select_stmt"), outer)
        conflict: Node | None = node.get("on_conflict_clause")
        if conflict is not None:
            infer: Node | None = conflict.get("infer")
            for element in [] if infer is None else infer.get("index_elems", []):
                self._note(element.get("name"), element, (target,))
            self._assignments(conflict, target)
            self._visit(list(conflict.fields.values()), (*outer, target, _Source("excluded", target.table)))
        self._visit(node.get("returning_clause"), (*outer, target))

    def _change(self, node: Node, outer: _Scope) -> None:
        target = self._relation(node.get("relation"))
        self._assignments(node, target)
        others = self._from([*node.get("from_clause", []), *node.get("using_clause", [])], outer)
        for name in ("target_list", "where_clause", "returning_clause"):
            self._visit(node.get(name), (*outer, target, *others))

    def _assignments(self, node: Node, target: _Source) -> None:
        for assigned in node.get("target_list", []):
            self._note(assigned.get("name"), assigned, (target,))

    # ----------------------------------------------------------------------------------------------------------------
    # What columns come from

    def _from(self, items: list[Node], outer: _Scope) -> _Scope:
        """Return what the items of FROM bring, after looking into those that hold expressions themselves."""
        sources = tuple(source for item in items for source in self._sources(item))
        for item in items:
            self._inside(item, outer, sources)
        return sources

    def _sources(self, item: Node) -> Iterator[_Source]:
        match item.kind:
            case "RangeVar":
                yield self._relation(item)
            case "JoinExpr":
                yield from self._sources(item.get("larg"))
                yield from self._sources(item.get("rarg"))
                for name in {"alias", "join_using_alias"} & item.fields.keys():
                    yield _Source(item.get(name).get("aliasname", ""), None)
            case _:
                yield _Source(item.get("alias").get("aliasname", "") if "alias" in item.fields else "", None)

    def _inside(self, item: Node, outer: _Scope, siblings: _Scope) -> None:
        match item.kind:
            case "JoinExpr":
                self._inside(item.get("larg"), outer, siblings)
                self._inside(item.get("rarg"), outer, siblings)
                self._visit(item.get("quals"), outer + siblings)
            case "RangeSubselect" if not item.get("lateral"):
                self._visit(item.get("subquery"), outer)
            case kind if kind != "RangeVar":
                self._visit(list(item.fields.values()), outer + siblings)

    def _relation(self, node: Node) -> _Source:
        alias: Node | None = node.get("alias")
        schema, name = node.get("schemaname", ""), node.get("relname", "")
        hidden = (not schema and name in self.commons) or (alias is not None and "colnames" in alias.fields)
        table = None if hidden else relation_name(schema, name, home=self.home)
        return _Source(name if alias is None else alias.get("aliasname", ""), table)

    # ----------------------------------------------------------------------------------------------------------------
    # Columns

    def _column(self, node: Node, scope: _Scope) -> None:
        match node.get("fields"):
            case [str(column)] if not any(source.name == column for source in scope):  # else it is the whole row
                self._note(column, node, scope)
            case [str(name), str(column)] if column not in _OF_ROWS:
                self._note(column, node, tuple(source for source in scope if source.name == name), dotted=True)

    def _note(self, column: str | None, node: Node, scope: _Scope, *, dotted: bool = False) -> None:
        tables = tuple(dict.fromkeys(source.table for source in scope if source.table is not None))
        if not column or column in _SYSTEM or not tables or any(source.table is None for source in scope):
            return
        offset = len(self.text.encode()[: node.offset].decode(errors="ignore"))
        self.found.append(Mention(column, tables, dotted, self.part, self.text, offset))
