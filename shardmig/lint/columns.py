"""ALTER TABLE … ADD COLUMN, the one ALTER that is additive, and columns of new tables."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardmig.lint import datatypes, functions, options, tables
from shardmig.lint.expressions import DEFAULT_OF_OLD, collation, expression, type_of
from shardmig.lint.rules.structure import AltersExisting, Destroys, IfExists, Rights
from shardmig.lint.rules.tables import (
    AddsConstraint,
    AddsGenerated,
    AddsIdentity,
    NotNullWithoutDefault,
    OnlyParent,
    OwnValuePerShard,
    RewritesTable,
)
from shardmig.lint.rules.text import UnknownSyntax
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from shardmig.lint.judge import Judge
    from shardmig.lint.violation import Rule

__all__ = ["alter_table", "storage"]

_CLOCK_WORDS = frozenset({"now", "today", "tomorrow", "yesterday"})
_STRICT_OPERATORS = functions.COMPARISONS | {"+", "-", "*", "/", "%", "^", "||"}
_TIMES = frozenset({"date", "time", "timetz", "timestamp", "timestamptz"})


def alter_table(judge: Judge, statement: Node) -> None:
    """Judge ALTER TABLE: ADD COLUMN, once or several times, and nothing else."""
    kind = statement.get("objtype", "").removeprefix("OBJECT_")
    if kind != "TABLE":
        _other_object(judge, statement, kind)
        return
    judge.known(
        statement,
        but={"missing_ok": (IfExists, "IF EXISTS passes silently where the table is missing; leave it out")},
    )
    relation: Node = statement.get("relation")
    table = judge.relation(relation)
    if not relation.get("inh"):
        judge.refuse(OnlyParent, relation, "ONLY fails where the table has children; leave it out")
    added = [command.get("def") for command in statement.get("cmds", []) if command.get("subtype") == "AT_AddColumn"]
    options.column_names(judge, added)
    for command in statement.get("cmds", []):
        if command.get("subtype") != "AT_AddColumn":
            _other_action(judge, command, table)
            continue
        judge.known(
            command,
            but={
                "missing_ok": (
                    IfExists,
                    "IF NOT EXISTS queues for the lock even when it does nothing, and hides a wrong type; leave it out",
                )
            },
        )
        if command.get("behavior") not in ("DROP_RESTRICT", None):
            judge.refuse(UnknownSyntax, relation, "CASCADE has no meaning here; leave it out")
        if table in judge.scope.new.tables:
            tables.column(judge, command.get("def"), table)
        else:
            _Added(judge, command.get("def"), table).judge_column()


def _other_object(judge: Judge, statement: Node, kind: str) -> None:
    subtypes = {command.get("subtype") for command in statement.get("cmds", [])}
    rule: type[Rule] = AltersExisting
    if subtypes == {"AT_ChangeOwner"}:
        rule = Rights
    elif any(str(subtype).startswith("AT_Drop") for subtype in subtypes):
        rule = Destroys
    judge.refuse(
        rule, None, f"ALTER {kind.replace('_', ' ')} changes what exists; only ADD COLUMN of a table is additive"
    )


def _other_action(judge: Judge, command: Node, table: str) -> None:
    subtype: str = command.get("subtype", "").removeprefix("AT_")
    rule, why, lock = _ACTIONS.get(subtype, _OTHER_ACTION)
    fix = None
    if subtype == "AddConstraint" and command.get("def").get("contype") == "CONSTR_FOREIGN":
        lock = "SHARE ROW EXCLUSIVE on both tables"
        fix = f'op.add_column("{table}", sa.Column(...))  # without a foreign key; the application keeps the rule'
    judge.refuse(rule, command, f"{why}; add a column beside it and move the rows", lock=f"{lock} on {table}", fix=fix)


_OTHER_ACTION: tuple[type[Rule], str, str] = (
    AltersExisting,
    "this ALTER changes what exists while it is used",
    "ACCESS EXCLUSIVE",
)
_ACTIONS: dict[str, tuple[type[Rule], str, str]] = {
    "DropColumn": (Destroys, "running code still reads the column", "ACCESS EXCLUSIVE"),
    "DropConstraint": (Destroys, "running code relies on the constraint", "ACCESS EXCLUSIVE"),
    "ChangeOwner": (Rights, "the new owner decides who may read", "ACCESS EXCLUSIVE"),
    "AlterColumnType": (
        AltersExisting,
        "a type change rewrites the table while everybody waits",
        "ACCESS EXCLUSIVE",
    ),
    "SetNotNull": (AltersExisting, "old INSERTs of NULL fail, and the table is scanned", "ACCESS EXCLUSIVE"),
    "DropNotNull": (AltersExisting, "running code may meet a NULL it does not expect", "ACCESS EXCLUSIVE"),
    "ColumnDefault": (AltersExisting, "old INSERTs store another value", "ACCESS EXCLUSIVE"),
    "AddConstraint": (AltersExisting, "old writes are refused from now on, NOT VALID or not", "ACCESS EXCLUSIVE"),
    "AddIndexConstraint": (AltersExisting, "old duplicates are refused from now on", "ACCESS EXCLUSIVE"),
    "ValidateConstraint": (AltersExisting, "the table is scanned", "SHARE UPDATE EXCLUSIVE"),
    "SetStatistics": (AltersExisting, "plans of running queries change", "SHARE UPDATE EXCLUSIVE"),
    "SetRelOptions": (AltersExisting, "storage settings are no part of a release", "SHARE UPDATE EXCLUSIVE"),
    "ClusterOn": (AltersExisting, "storage settings are no part of a release", "SHARE UPDATE EXCLUSIVE"),
    "SetTableSpace": (AltersExisting, "the table is rewritten", "ACCESS EXCLUSIVE"),
    "EnableRowSecurity": (AltersExisting, "running code sees no rows any more", "ACCESS EXCLUSIVE"),
    "ForceRowSecurity": (AltersExisting, "running code sees no rows any more", "ACCESS EXCLUSIVE"),
    "AttachPartition": (
        AltersExisting,
        "rows appear in the parent, the partition is scanned",
        "ACCESS EXCLUSIVE",
    ),
    "DetachPartition": (AltersExisting, "rows vanish from the parent", "ACCESS EXCLUSIVE"),
    "EnableTrig": (AltersExisting, "old writes do something else", "SHARE ROW EXCLUSIVE"),
    "DisableTrig": (AltersExisting, "old writes do something else", "SHARE ROW EXCLUSIVE"),
}


def storage(judge: Judge, node: Node) -> None:
    """Judge COLLATE, COMPRESSION and STORAGE of a column."""
    if "compression" in node.fields:
        judge.since(14, node, "COMPRESSION")
    if "storage_name" in node.fields:
        judge.since(16, node, "STORAGE")
    if "coll_clause" in node.fields:
        clause: Node = node.get("coll_clause")
        judge.known(clause)
        collation(judge, clause)


class _Added:
    """A column added to a table that exists: nullable, or with a default that is surely harmless."""

    def __init__(self, judge: Judge, node: Node, table: str) -> None:
        self.judge = judge
        self.node = node
        self.table = table
        self.name: str = node.get("colname", "")
        self.lock = f"ACCESS EXCLUSIVE on {table}"

    def judge_column(self) -> None:
        judge = self.judge
        judge.known(self.node)
        storage(judge, self.node)
        if self._serial():
            self._refuse(AddsIdentity, self.node, "numbering every row rewrites the table while everybody waits")
            kind = ""
        else:
            kind = type_of(judge, self.node.get("type_name"), datatypes.COMPARABLE)
        default: Node | None = None
        not_null: Node | None = None
        for constraint in self.node.get("constraints", []):
            judge.known(constraint)
            match constraint.get("contype"):
                case "CONSTR_NULL":
                    pass
                case "CONSTR_NOTNULL":
                    not_null = constraint
                    self._plain(constraint)
                case "CONSTR_DEFAULT":
                    default = constraint.get("raw_expr")
                case contype:
                    self._constraint(constraint, contype)
        if default is not None:
            self._default(default)
            self._clock_word(default, kind)
        if not_null is not None and not _surely_not_null(default):
            self._not_null(not_null, default)

    def _serial(self) -> bool:
        names = self.node.get("type_name").get("names", [])
        return len(names) == 1 and names[0] in datatypes.SERIAL

    def _plain(self, constraint: Node) -> None:
        """Refuse NOT NULL with anything behind it that the newest grammar adds."""
        if constraint.get("is_no_inherit") or not constraint.get("initially_valid"):
            self.judge.refuse(
                UnknownSyntax, constraint, "NOT NULL with NO INHERIT or NOT VALID is new in 18; leave it out"
            )

    def _constraint(self, constraint: Node, contype: str) -> None:
        kind = contype.removeprefix("CONSTR_")
        if kind == "IDENTITY":
            self._refuse(AddsIdentity, constraint, "numbering every row rewrites the table while everybody waits")
        elif kind == "GENERATED":
            virtual = constraint.get("generated_kind") == "v"
            if virtual:
                self.judge.since(18, constraint, "a VIRTUAL generated column")
            harm = "SELECT * of today fails" if virtual else "the table is rewritten, and INSERT of today fails"
            self._refuse(AddsGenerated, constraint, f"{harm} where the expression does")
        elif kind in ("CHECK", "UNIQUE", "PRIMARY", "EXCLUSION", "FOREIGN"):
            fix = f'op.add_column("{self.table}", sa.Column("{self.name}", ...))  # without the constraint'
            words = {"FOREIGN": "REFERENCES", "PRIMARY": "PRIMARY KEY"}.get(kind, kind)
            self._refuse(
                AddsConstraint, constraint, f"{words} refuses what running code writes, and scans or locks", fix
            )
        else:
            self._refuse(UnknownSyntax, constraint, f"{kind.replace('_', ' ')} is not known to be additive here")

    def _refuse(self, rule: type[Rule], place: Node, harm: str, fix: str | None = None) -> None:
        self.judge.refuse(
            rule, place, f"{harm}: add {self.name} as a plain column and fill it in move()", lock=self.lock, fix=fix
        )

    def _default(self, default: Node) -> None:
        """Judge the default; whoever rewrites the table is told which one, and what to paste."""
        before = len(self.judge.found)
        expression(self.judge, default, DEFAULT_OF_OLD)
        fix = f'op.add_column("{self.table}", sa.Column("{self.name}", …))  # no default: fill it in move()'
        self.judge.found[before:] = [
            replace(found, lock=self.lock, fix=fix) if found.code == RewritesTable.code else found
            for found in self.judge.found[before:]
        ]

    def _clock_word(self, default: Node, kind: str) -> None:
        value: object = default
        while isinstance(value, Node) and value.kind == "TypeCast":
            kind = (value.get("type_name").get("names") or [kind])[-1]
            value = value.get("arg")
        if isinstance(value, Node) and kind in _TIMES and str(value.get("sval", "")).strip().lower() in _CLOCK_WORDS:
            self.judge.refuse(
                OwnValuePerShard,
                default,
                f"'{value.get('sval')}' becomes the moment of the migration, on each shard another one, for good",
            )

    def _not_null(self, place: Node, default: Node | None) -> None:
        table, name = self.table, self.name
        why = "has no default" if default is None else "has a default that may be NULL"
        self.judge.refuse(
            NotNullWithoutDefault,
            place,
            f"INSERT of today does not name {name} and fails, for {name} is NOT NULL and {why}; "
            f"give it a constant default (server_default=), or make it nullable",
            lock=self.lock,
            fix=f'op.add_column("{table}", sa.Column("{name}", ..., nullable=False, server_default="0"))',
        )


def _surely_not_null(node: object) -> bool:
    """Whether an expression without columns cannot be NULL; when in doubt it can."""
    if not isinstance(node, Node):
        return False
    args = node.get("args", [])
    match node.kind:
        case "A_Const":
            sure = not node.get("isnull")
        case "A_ArrayExpr" | "SQLValueFunction":
            sure = True
        case "TypeCast" | "CollateClause":
            sure = _surely_not_null(node.get("arg"))
        case "A_Expr":
            sides = [node.fields[side] for side in ("lexpr", "rexpr") if side in node.fields]
            strict = node.get("kind") == "AEXPR_OP" and node.get("name", [""])[-1] in _STRICT_OPERATORS
            sure = strict and all(map(_surely_not_null, sides))
        case "BoolExpr" | "MinMaxExpr":
            sure = all(map(_surely_not_null, args))
        case "CoalesceExpr":
            sure = any(map(_surely_not_null, args))
        case "FuncCall":
            sure = node.get("funcname", [""])[-1] in functions.STRICT and all(map(_surely_not_null, args))
        case _:
            sure = False
    return sure
