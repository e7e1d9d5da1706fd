"""
`lint --app PATH`: SQL in Python literals and .sql files that would notice a new column, and flags that no plan has.

What does not parse as SQL is not SQL for this mode: prose that begins with "select" costs nothing. Columns are known
only as far as migrations created them.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.allowances import allowances
from shardmig.lint.declarations import declarations, misnamed
from shardmig.lint.literals import Text, filled, parsed_python, python_texts, sql_texts
from shardmig.lint.project import Linted
from shardmig.lint.rules import application as rules
from shardmig.lint.scope import CATALOG_SCHEMAS
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from shardmig.lint.violation import Rule, Violation

__all__ = ["lint_app", "lint_statement"]

_SKIPPED = frozenset({".git", ".hg", ".tox", ".venv", "venv", "node_modules", "__pycache__", "site-packages", "build"})
_ALLOWED = re.compile(r"--\s*shardmig:\s*allow\s+(SA\d{3})\s*--\s*(\S.*)", re.IGNORECASE)
_WHOLE_ROW = frozenset({"to_json", "to_jsonb", "row_to_json", "json_agg", "jsonb_agg", "hstore"})


def lint_app(
    paths: Iterable[Path],
    *,
    columns: Mapping[str, Iterable[str]] | None = None,
    flags: Collection[str] | None = None,
    asked: Collection[str] = (),
) -> Linted:
    """
    Judge application code.

    Args:
        paths: files or directories; of directories every .py and .sql file.
        columns: table → columns, as far as known (`Added.tables`).
        flags: the flags of all plans; None: what the code declares is not compared with anything.
        asked: those of them whose state writers must ask; where whole directories are judged, a note names what no
            file declares.

    Returns:
        Findings by file and line; files that cannot be read are named in the notes.
    """
    paths = tuple(paths)
    judged = _Application({table: frozenset(names) for table, names in (columns or {}).items()}, flags)
    for path in _files(paths):
        judged.file(path)
    if flags is not None and any(path.is_dir() for path in paths):
        judged.note_undeclared(asked)
    return Linted(tuple(judged.found), judged.sources, judged.count, tuple(judged.notes))


class _Application:
    """Files of an application, judged one after the other."""

    def __init__(self, columns: Mapping[str, frozenset[str]], flags: Collection[str] | None) -> None:
        self.columns = columns
        self.flags = flags
        self.declared: set[str] = set()
        self.found: list[Violation] = []
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self.count = 0

    def file(self, path: Path) -> None:
        """Judge a file; one that cannot be read is noted."""
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            self.notes.append(f"{path} could not be read: {error}")
            return
        self.count += 1
        found = list(self._python(str(path), source) if path.suffix == ".py" else self._sql(str(path), source))
        if found:
            self.sources[str(path)] = source
            self.found += _allowed(path, source, found)

    def note_undeclared(self, asked: Collection[str]) -> None:
        """Note the flags that writers must ask and no file declares."""
        missing = [flag for flag in asked if flag not in self.declared]
        if missing:
            self.notes.append(
                f"no Flag(…) here names {', '.join(missing)}: before DUAL, code that writes these rows has to"
            )

    def _sql(self, path: str, source: str) -> Iterator[Violation]:
        for text in sql_texts(path, source):
            yield from _judged(text, self.columns)

    def _python(self, path: str, source: str) -> Iterator[Violation]:
        tree = parsed_python(source)
        if tree is None:
            return
        for text in python_texts(path, tree):
            yield from _judged(text, self.columns)
        for declaration in declarations(tree):
            self.declared.add(declaration.flag)
            if self.flags is not None and declaration.flag not in self.flags:
                yield replace(
                    misnamed(declaration, self.flags), path=path, line=declaration.line, column=declaration.column
                )


def lint_statement(sql: str, *, columns: Mapping[str, frozenset[str]] | None = None) -> list[Violation]:
    """Judge one SQL text of an application; what does not parse is nothing."""
    return _judged(Text("", sql, 1, spread=True), columns or {})


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            for directory, names, files in os.walk(path):
                names[:] = sorted(name for name in names if _is_own(Path(directory, name)))
                yield from (Path(directory, name) for name in sorted(files) if name.endswith((".py", ".sql")))
        else:
            yield path


def _is_own(directory: Path) -> bool:
    """Whether a directory holds the application's own code; a virtual environment of any name does not."""
    return directory.name not in _SKIPPED and not (directory / "pyvenv.cfg").exists()


# --------------------------------------------------------------------------------------------------------------------
# Judging it


def _judged(text: Text, columns: Mapping[str, frozenset[str]]) -> list[Violation]:
    for filler in "1", "_":  # parameters are values, or else names
        sql = filled(text.sql, filler)
        try:
            statements = sqltree.parse(sql.replace("\r", " ").replace("\0", " "))
        except sqltree.SqlError:
            continue
        break
    else:
        return []
    query = _Queries(text, sql, columns)
    for statement in statements:
        query.statement(statement)
    return query.found


def _allowed(path: Path, source: str, found: list[Violation]) -> list[Violation]:
    """Mark what a comment on the same line, or on the line above, allows."""
    if path.suffix == ".py":
        comments = [(c.code, c.reason, c.line) for c in allowances(source) if c.reason]
    else:
        comments = [
            (match[1].upper(), match[2].strip(), number)
            for number, line in enumerate(source.split("\n"), 1)
            if (match := _ALLOWED.search(line))
        ]
    marked = []
    for violation in found:
        line = violation.line or 0
        reasons = [why for code, why, at in comments if code == violation.code and at in (line - 1, line)]
        reason = next(iter(reasons), None)
        marked.append(violation if reason is None else replace(violation, allowed=reason))
    return marked


class _Queries:
    """The statements of one text."""

    def __init__(self, text: Text, sql: str, columns: Mapping[str, frozenset[str]]) -> None:
        self.text = text
        self.sql = sql
        self.columns = columns
        self.found: list[Violation] = []
        self.commons: dict[str, Node] = {}  # WITH queries by name, wherever they stand

    def refuse(self, rule: type[Rule], node: Node | None, message: str) -> None:
        """Note a finding at a node."""
        place = 0 if node is None else node.offset or next((n.offset for n in sqltree.walk(node) if n.offset), 0)
        offset = len(self.sql.encode("utf-8", "replace")[:place].decode("utf-8", "ignore"))
        violation = rule.violation(message, sql=self.text.sql, offset=offset)
        line = self.text.line + (violation.sql_line or 1) - 1 if self.text.spread else self.text.line
        self.found.append(replace(violation, path=self.text.path or None, line=line))

    def statement(self, node: Node) -> None:
        """Judge a statement."""
        self.commons = {n.get("ctename"): n.get("ctequery") for n in sqltree.walk(node) if n.kind == "CommonTableExpr"}
        match node.kind:
            case "SelectStmt":
                self._outer(node)
            case "InsertStmt":
                self._insert(node)
            case "CopyStmt":
                self._copy(node)
        if "returning_clause" in node.fields and _stars(node.get("returning_clause").get("exprs", [])):
            relation = node.get("relation")
            self.refuse(rules.SelectStar, relation, f"RETURNING * of {relation.get('relname')}: name the columns")
        for inner in sqltree.walk(node):
            self._anywhere(inner)

    def _outer(self, node: Node) -> None:
        """Judge the columns that a SELECT hands out."""
        if node.get("op", "SETOP_NONE") != "SETOP_NONE":
            if any(self._star(leaf) for leaf in _leaves(node)):
                self.refuse(
                    rules.UnionStar, node, "SELECT * under UNION: the sides differ once one table has a new column"
                )
            return
        star = self._star(node)
        if star is not None:
            self.refuse(
                rules.SelectStar,
                star,
                "SELECT * of a table: prepared statements fail after a column was added; name columns",
            )

    def _star(self, node: Node, above: tuple[Node, ...] = ()) -> Node | None:
        """Return the star of a SELECT that ranges over a table, or over a sub-select that has one."""
        star = _stars(node.get("target_list", []))
        if star is None or node in above:  # WITH queries may name each other
            return None
        qualifier = star.get("fields", [])[:-1]
        for item in _items(node.get("from_clause", [])):
            alias = item.get("alias")
            name = alias.get("aliasname") if alias else item.get("relname")
            if qualifier and qualifier[-1] != name:
                continue
            inner = item.get("subquery") if item.kind == "RangeSubselect" else self.commons.get(item.get("relname", ""))
            if inner is None:
                starred = item.kind == "RangeVar" and not _is_catalog(item)
            elif inner.kind == "SelectStmt":
                starred = any(self._star(leaf, (*above, node)) is not None for leaf in _leaves(inner))
            else:
                returning = inner.get("returning_clause")
                starred = returning is not None and _stars(returning.get("exprs", [])) is not None
            if starred:
                return star
        return None

    def _insert(self, node: Node) -> None:
        relation: Node = node.get("relation")
        source: Node | None = node.get("select_stmt")
        if source is None:
            return
        name = relation.get("relname")
        if any(self._star(leaf) is not None for leaf in _leaves(source)):
            self.refuse(rules.InsertSelectStar, relation, f"INSERT INTO {name} SELECT *: write both column lists")
        elif "cols" not in node.fields:
            self.refuse(rules.InsertWithoutColumns, relation, f"INSERT INTO {name} without a column list; name them")

    def _copy(self, node: Node) -> None:
        relation: Node | None = node.get("relation")
        if relation is not None and "attlist" not in node.fields:
            way = "FROM" if node.get("is_from") else "TO"
            self.refuse(
                rules.CopyWithoutColumns,
                relation,
                f"COPY {relation.get('relname')} {way} without a column list; name them",
            )
        elif node.get("query") is not None:
            self._outer(node.get("query"))

    def _anywhere(self, node: Node) -> None:
        match node.kind:
            case "JoinExpr" if node.get("is_natural"):
                self.refuse(
                    rules.NaturalJoin, node, "NATURAL JOIN joins by whatever both tables share; write USING (…)"
                )
            case "SelectStmt":
                self._unqualified(node)
                self._whole_rows(node)
            case "SubLink":
                self._captured(node.get("subselect"))
            case "TypeCast" if _is_row_cast(node):
                self.refuse(
                    rules.RowCast, node, "ROW(…) cast to a row type, which grows with the table; name the columns"
                )

    def _unqualified(self, node: Node) -> None:
        """Warn of the first bare column in a join; USING makes its own unambiguous."""
        items = list(_items(node.get("from_clause", [])))
        if sum(item.kind == "RangeVar" and not _is_catalog(item) for item in items) < 2:  # noqa: PLR2004 - a join has two sides
            return
        fine = {
            name
            for join in sqltree.walk(node.get("from_clause", []))
            if join.kind == "JoinExpr"
            for name in join.get("using_clause", [])
        }
        fine |= {target.get("name") for target in node.get("target_list", [])}  # ORDER BY and GROUP BY may mean these
        for column in _own_columns(
            [node.get(p) for p in ("target_list", "from_clause", "where_clause", "group_clause")]
        ):
            fields = column.get("fields", [])
            if len(fields) == 1 and isinstance(fields[0], str) and fields[0].strip("_") and fields[0] not in fine:
                self.refuse(
                    rules.UnqualifiedInJoin,
                    column,
                    f"{fields[0]} of which table? Another one may get a column of that name",
                )
                return

    def _captured(self, node: Node | None) -> None:
        """Warn of a bare column in a sub-select that none of its tables has."""
        if node is None or node.kind != "SelectStmt":
            return
        tables = [item.get("relname") for item in _items(node.get("from_clause", [])) if item.kind == "RangeVar"]
        if not tables or any(table not in self.columns for table in tables):
            return
        known = frozenset().union(*(self.columns[table] for table in tables))
        for column in _own_columns([node.get("target_list"), node.get("where_clause")]):
            fields = column.get("fields", [])
            if len(fields) == 1 and isinstance(fields[0], str) and fields[0] not in known:
                self.refuse(
                    rules.CapturedColumn,
                    column,
                    f"{fields[0]} is the outer query's, until {tables[0]} gets a column of that name; write its table",
                )

    def _whole_rows(self, node: Node) -> None:
        names = set()
        for item in _items(node.get("from_clause", [])):
            alias = item.get("alias")
            if item.kind == "RangeVar":
                names.add(alias.get("aliasname") if alias else item.get("relname"))
        for inner in sqltree.walk(node.get("target_list", [])):
            arg: Node | None = None
            if inner.kind == "FuncCall" and inner.get("funcname", [""])[-1] in _WHOLE_ROW:
                arg = next(iter(inner.get("args", [])), None)
            elif inner.kind == "TypeCast":
                arg = inner.get("arg")
            fields = arg.get("fields", []) if arg is not None and arg.kind == "ColumnRef" else []
            if len(fields) == 1 and fields[0] in names:
                self.refuse(
                    rules.WholeRow, inner, f"the whole row of {fields[0]} is one value, and grows; name what is needed"
                )


def _stars(targets: list[Node]) -> Node | None:
    """Return the first `*` or `t.*` that is handed out as it stands."""
    for target in targets:
        value = target.get("val")
        if isinstance(value, Node) and value.kind == "ColumnRef":
            last = value.get("fields", [None])[-1]
            if isinstance(last, Node) and last.kind == "A_Star":
                return value
    return None


def _leaves(node: Node) -> Iterator[Node]:
    if node.get("op", "SETOP_NONE") == "SETOP_NONE":
        yield node
    else:
        yield from _leaves(node.get("larg"))
        yield from _leaves(node.get("rarg"))


def _items(from_clause: list[Node]) -> Iterator[Node]:
    for item in from_clause:
        if item.kind == "JoinExpr":
            yield from _items([item.get("larg"), item.get("rarg")])
        else:
            yield item


def _own_columns(value: object) -> Iterator[Node]:
    """Yield the columns of a query, not those of its sub-selects."""
    if isinstance(value, list):
        for item in value:
            yield from _own_columns(item)
    elif isinstance(value, Node) and value.kind not in ("SelectStmt", "SubLink"):
        if value.kind == "ColumnRef":
            yield value
        for inner in value.fields.values():
            yield from _own_columns(inner)


def _is_catalog(item: Node) -> bool:
    schema, name = item.get("schemaname", ""), item.get("relname", "")
    return schema in CATALOG_SCHEMAS or schema.startswith("pg_") or (not schema and name.startswith("pg_"))


def _is_row_cast(node: Node) -> bool:
    arg = node.get("arg")
    names = node.get("type_name").get("names", [])
    return isinstance(arg, Node) and arg.kind == "RowExpr" and names[:1] != ["pg_catalog"] and names[-1:] != ["record"]
