"""
Foreign keys of new tables: a DELETE that works today must work, whatever rows of new tables point there by then.

What it does to new rows reaches on: ON DELETE CASCADE takes them away, which keys to *them* may refuse; SET NULL and
SET DEFAULT change them, which anything that computes with the column may refuse. What is not known to go well is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint.rules.tables import ForeignKeyBlocks, ForeignKeyNotes, SetNullOnNotNull
from shardmig.lint.rules.text import UnknownSyntax

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardmig.lint.judge import Judge
    from shardmig.sqltree import Node

__all__ = ["ACTIONS", "EVERY", "Table", "columns_of", "excludes_null", "foreign_keys", "refuse_setting", "unenforced"]

ACTIONS = {"a": "NO ACTION", "r": "RESTRICT", "c": "CASCADE", "n": "SET NULL", "d": "SET DEFAULT"}
EVERY = "*"
"""Stands for all columns, where an expression takes the whole row."""


@dataclass
class Table:
    """
    What the foreign keys of a new table need to know about its columns.

    Attributes:
        name: as `New` spells it.
        altered: what is judged is a column that joins a table created before.
        not_null: columns that are.
        defaulted: columns with a default.
        unique: columns where not even NULL may stand twice.
        distinct: columns where no value may stand twice.
        checked: columns that a CHECK names.
        suspicious: those whose CHECK may dislike NULL.
        computed: columns that something else computes with → what.
        keys: the foreign keys, each with its columns.
    """

    name: str
    altered: bool = False
    not_null: set[str] = field(default_factory=set)
    defaulted: set[str] = field(default_factory=set)
    unique: set[str] = field(default_factory=set)
    distinct: set[str] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    suspicious: set[str] = field(default_factory=set)
    computed: dict[str, str] = field(default_factory=dict)
    keys: list[tuple[Node, list[str]]] = field(default_factory=list)

    def obstacle(self, name: str, action: str) -> str | None:
        """Say why DELETE could not set a column; None when it can."""
        because = self.computed.get(name) or self.computed.get(EVERY)
        if because is not None:
            return because
        if action == "d" and name in self.defaulted:
            if {name, EVERY} & self.checked:
                return "a CHECK names it, and may dislike its default"
            return "its one default would stand there twice" if name in self.unique | self.distinct else None
        return (
            "it is NOT NULL" if name in self.not_null
            else "a CHECK names it" if {name, EVERY} & self.suspicious
            else "NULL is distinct from nothing there" if name in self.unique
            else None
        )  # fmt: skip

    def computes(self, expression: object, what: str) -> None:
        """Note what an expression computes with."""
        for name in columns_of(expression, self.name):
            self.computed.setdefault(name, what)


def columns_of(expression: object, table: str) -> set[str]:
    """Return the columns that an expression names; EVERY when it takes the whole row."""
    names = set()
    for node in sqltree.walk(expression):
        if node.kind == "ColumnRef":
            last = node.get("fields", [""])[-1]
            names.add(last if isinstance(last, str) and last != table else EVERY)
    return names


def excludes_null(predicate: Node | None, name: str) -> bool:
    """Whether a predicate surely leaves out rows where a column is NULL."""
    if predicate is None:
        return False
    match predicate.kind:
        case "BoolExpr" if predicate.get("boolop") == "AND_EXPR":
            return any(excludes_null(operand, name) for operand in predicate.get("args", []))
        case "NullTest":
            return predicate.get("nulltesttype") == "IS_NOT_NULL" and _is_column(predicate.get("arg"), name)
    return False


def _is_column(node: Node | None, name: str) -> bool:
    return node is not None and node.kind == "ColumnRef" and node.get("fields", [""])[-1] == name


# --------------------------------------------------------------------------------------------------------------------
# Judging


def foreign_keys(judge: Judge, table: Table, *, inherited: Mapping[str, str], place: Node) -> None:
    """
    Judge the foreign keys of a new table, or of a column that joins one.

    Args:
        judge: collects what is wrong.
        table: all there is to know of it.
        inherited: columns that it has already and that a DELETE may set → action; they must stand what is added.
        place: where to point for those.
    """
    loses = table.name in judge.scope.new.cascading or any(
        key.get("fk_del_action") == "c" and _reached(judge, _target(judge, key), table, loses=False)
        for key, _ in table.keys
    )
    for key, names in table.keys:
        _foreign_key(judge, key, names, table, loses=loses)
    for name, action in inherited.items():
        obstacle = table.obstacle(name, action)
        if obstacle is not None:
            refuse_setting(judge, place, name, action, obstacle)


def _target(judge: Judge, key: Node) -> str:
    return judge.scope.relation(key.get("pktable"))


def _reached(judge: Judge, target: str, table: Table, *, loses: bool) -> bool:
    """Whether a DELETE of today may take rows of a key's target away."""
    new = judge.scope.new
    if target == table.name:
        return loses
    return target not in new.tables or target in new.cascading


def _foreign_key(judge: Judge, node: Node, names: list[str], table: Table, *, loses: bool) -> None:
    target = judge.relation(node.get("pktable"))
    if node.get("fk_with_period") or node.get("pk_with_period"):
        judge.since(18, node, "PERIOD")
    if not node.get("is_enforced"):
        unenforced(judge, node)
    if "fk_del_set_cols" in node.fields:
        judge.since(15, node, "ON DELETE SET … (columns)")
    if not _reached(judge, target, table, loses=loses):
        return
    action = node.get("fk_del_action", "a")
    exists = target not in judge.scope.new.tables and target != table.name
    lock = f"SHARE ROW EXCLUSIVE on {target}" if exists else None
    if action not in ("c", "n", "d"):
        why = f"{target} is in use already" if exists else f"{target} loses rows when an existing table does"
        judge.refuse(
            ForeignKeyBlocks,
            node,
            f"DELETE of today fails as soon as a new row points there, for {why} and the key says "
            f"{ACTIONS.get(action, 'nothing')}; write ON DELETE CASCADE or SET NULL",
            lock=lock,
            fix=f'sa.ForeignKey("{target}.…", ondelete="CASCADE")',
        )
        return
    if action == "c" and table.altered and table.name in judge.scope.new.referred:
        judge.refuse(
            ForeignKeyBlocks,
            node,
            f"DELETE of today takes rows of {table.name} along from now on, and the keys that point to it were judged "
            f"when it did not; write this key in CREATE TABLE",
            lock=lock,
        )
    for name in node.get("fk_del_set_cols", names) if action != "c" else ():
        obstacle = table.obstacle(name, action) or _overlap(table, node, names, name, action)
        if obstacle is not None:
            refuse_setting(judge, node, name, action, obstacle)
    bound = set(names) & (table.checked | table.computed.keys()) or {EVERY} & (table.checked | table.computed.keys())
    if exists and (node.get("fk_upd_action", "a") != "c" or bound):
        judge.refuse(
            ForeignKeyNotes,
            node,
            f"UPDATE of a key and TRUNCATE of {target} fail from now on, and each DELETE there looks into "
            f"{table.name}: add ON UPDATE CASCADE where keys change, and an index if none begins {', '.join(names)}",
            lock=lock,
        )


def _overlap(table: Table, node: Node, names: list[str], name: str, action: str) -> str | None:
    """Say which other key dislikes that a column of this one is set."""
    cleared = set(node.get("fk_del_set_cols", names))
    for other, columns in table.keys:
        if name not in columns:
            continue
        if other is not node and action == "d" and name in table.defaulted:
            return "another foreign key has it, too, and may not find its default"
        if other.get("fk_matchtype") == "f" and not set(columns) <= cleared:
            return "a MATCH FULL key has it beside columns that stay"
    return None


def refuse_setting(judge: Judge, place: Node | None, name: str, action: str, obstacle: str) -> None:
    """Refuse that a DELETE of today sets a column that cannot be set."""
    judge.refuse(
        SetNullOnNotNull,
        place,
        f"DELETE of today fails, for ON DELETE {ACTIONS[action]} cannot set {name}: {obstacle}; "
        f"write ON DELETE CASCADE",
    )


def unenforced(judge: Judge, constraint: Node) -> None:
    """Refuse NOT ENFORCED."""
    judge.refuse(
        UnknownSyntax, constraint, "a foreign key that is not enforced locks its table and keeps nothing; leave it out"
    )
