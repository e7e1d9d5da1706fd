"""Judge one text: what is checked before it is parsed, then the closed world of its context."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint.lexical import judge_tokens
from shardmig.lint.nodes import FIELDS
from shardmig.lint.rules import text as rules
from shardmig.lint.scope import CATALOG_SCHEMAS, LEDGER_SCHEMA, Scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.violation import Rule, Violation
    from shardmig.sqltree import Node

__all__ = ["Judge", "judge_text"]

_FORBIDDEN = re.compile("[\0\r\u202a-\u202e\u2066-\u2069]")
_NAMES = {"RangeVar": ("schemaname", "relname"), "IndexStmt": ("idxname",)}
_WHAT = {"\0": "a NUL character", "\r": "a carriage return"}


class Judge:
    """
    Collects what one text does wrong.

    Attributes:
        sql: the text.
        scope: what it is judged against.
        found: the violations so far, in the order of the text.
    """

    __slots__ = ("_encoded", "found", "scope", "sql")

    def __init__(self, sql: str, scope: Scope) -> None:
        self.sql = sql
        self.scope = scope
        self.found: list[Violation] = []
        self._encoded: bytes | None = None if sql.isascii() else sql.encode("utf-8", "replace")

    def refuse(
        self,
        rule: type[Rule],
        place: Node | int | None,
        message: str,
        *,
        lock: str | None = None,
        fix: str | None = None,
    ) -> None:
        """
        Note a violation.

        Args:
            rule: the rule broken.
            place: node, or 0-based character; None for the whole text.
            message: the harm, then the cure.
            lock: lock taken on something that exists.
            fix: what to write instead, if the place knows better than the rule.
        """
        offset = place if isinstance(place, int) else 0 if place is None else self.offset(place)
        self.found.append(rule.violation(message, sql=self.sql, offset=offset, lock=lock, fix=fix))

    def offset(self, node: Node) -> int:
        """Return the character at which a node begins; the first one inside it when the grammar keeps none."""
        place = node.offset
        if not place:
            place = next((inner.offset for inner in sqltree.walk(node) if inner.offset), 0)
        return place if self._encoded is None else len(self._encoded[:place].decode("utf-8", "ignore"))

    def known(self, node: Node, *, but: dict[str, tuple[type[Rule], str]] | None = None) -> bool:
        """
        Refuse every set field of a node that nobody has vouched for.

        Args:
            node: the node; its kind must be in `nodes.FIELDS`.
            but: known dangerous fields → the rule and words that say why.
        """
        expected = FIELDS.get(node.kind)
        if expected is None:
            self.refuse(rules.UnknownSyntax, node, f"{node.kind} is not known to be additive; leave it out")
            return False
        if node.fields.keys() <= expected:
            return True
        strange = node.fields.keys() - expected
        for name in sorted(strange):
            rule, message = (but or {}).get(name, (rules.UnknownSyntax, ""))
            self.refuse(rule, node, message or f"{_spoken(name)} is not known to be additive here; leave it out")
        return False

    def since(self, version: int, place: Node | int | None, what: str) -> None:
        """Refuse what the oldest server of the fleet does not know."""
        oldest = self.scope.settings.pg_versions[0]
        if oldest < version:
            self.refuse(
                rules.ServerVersion,
                place,
                f"{what} needs PostgreSQL {version}, and a shard may run {oldest}; "
                f"raise pg_versions when none does any more",
            )

    def relation(self, node: Node) -> str:
        """Return a relation's name; refuse what is nobody's to touch: catalogs and the ledger."""
        self.known(node)
        if "alias" in node.fields:
            self.known(node.get("alias"))
        self.schema(node.get("schemaname", ""), node.get("relname", ""), node)
        return self.scope.relation(node)

    def schema(self, schema: str, name: str, place: Node | None) -> bool:
        """Refuse names in the ledger's schema and in PostgreSQL's own."""
        if schema == LEDGER_SCHEMA:
            self.refuse(rules.OwnState, place, "the schema shardmig holds the runner's own state; leave it alone")
        elif schema.startswith("pg_") or schema in CATALOG_SCHEMAS or (not schema and name.startswith("pg_")):
            self.refuse(rules.CatalogName, place, f"{schema or name} is PostgreSQL's own; leave catalogs alone")
        else:
            return True
        return False


def judge_text(scope: Scope, sql: str, world: Callable[[Judge, Node], None]) -> Judge:
    """
    Judge a text that should be one statement.

    Args:
        scope: what it is judged against.
        sql: the text, `{batch}` already replaced.
        world: judges the statement once it is known to be one.
    """
    judge = Judge(sql, scope)
    if not _readable(judge):
        return judge
    try:
        statements = sqltree.parse(sql)
        judge_tokens(judge)
    except sqltree.SqlError as error:
        _unreadable(judge, error)
        return judge
    if len(statements) != 1:
        count = "no statement" if not statements else f"{len(statements)} statements"
        judge.refuse(rules.OneStatement, None, f"{count} in one step: what follows the first hides behind it; split it")
    for statement in statements:
        world(judge, statement)
        if '"' in sql:
            _dots(judge, statement)
    return judge


def _dots(judge: Judge, statement: Node) -> None:
    """Refuse names of relations with a dot in them: they read like a schema and a name, and are neither."""
    home = next(iter(judge.scope.settings.schemas), "public")
    for node in sqltree.walk(statement):
        for field in _NAMES.get(node.kind, ()):
            schema, dot, name = node.get(field, "").rpartition(".")
            if dot:
                judge.refuse(
                    rules.DottedName,
                    node,
                    f'"{schema}.{name}" is one name with a dot in it, not {name} of schema {schema}; write them apart',
                    fix=f'"{name}"' + ("" if schema == home else f', schema="{schema}"'),
                )


def _readable(judge: Judge) -> bool:
    """Refuse what makes parser and server see different text; false when parsing would be pointless."""
    found = _FORBIDDEN.search(judge.sql)
    if found is None:
        return True
    what = _WHAT.get(found[0], "a bidirectional control character")
    judge.refuse(
        rules.HiddenText,
        found.start(),
        f"the text holds {what}: reader, parser and server would not see the same statement; take it out",
    )
    return False


def _unreadable(judge: Judge, error: sqltree.SqlError) -> None:
    if error.too_deep:
        judge.refuse(rules.TooDeep, None, "nested too deeply to be judged; write several shorter expressions")
        return
    place = error.offset or 0
    if judge.sql.lstrip().startswith("\\"):
        judge.refuse(rules.NotSql, place, "a psql meta command is not SQL; write the statement itself")
    else:
        judge.refuse(rules.NotSql, min(place, len(judge.sql)), f"not SQL: {error.message}; correct it")


def _spoken(field: str) -> str:
    return field.replace("_", " ").removesuffix(" clause")
