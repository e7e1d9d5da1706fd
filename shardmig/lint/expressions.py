"""The closed world of expressions: which nodes, functions, operators and types may stand where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig.lint import datatypes, functions
from shardmig.lint.rules import expressions as rules
from shardmig.lint.rules.tables import OwnValuePerShard, RewritesTable, UnknownType
from shardmig.lint.rules.text import OwnState, UnknownSyntax
from shardmig.lint.scope import LEDGER_SCHEMA
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.judge import Judge
    from shardmig.lint.violation import Rule

__all__ = ["BATCH_NUMBER", "DEFAULT_OF_NEW", "DEFAULT_OF_OLD", "MOVE", "ROW_OF_NEW", "Place", "expression", "type_of"]

BATCH_NUMBER = 650017  # the parameter that stands for {batch} while a move's text is judged

_PURE = functions.IMMUTABLE | functions.STABLE | functions.CLOCK


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where an expression stands, and so what it may hold.

    Attributes:
        name: for messages.
        functions: functions it may call.
        values: SQL's functions without parentheses (CURRENT_USER, …) it may name; those of the clock always.
        columns: whether it may read columns.
        queries: judges a sub-select; None where none may stand.
        feeds_new: whether a value drawn from a sequence numbers rows of a new table.
        existing: whether what it computes is stored in rows that exist.
    """

    name: str
    functions: frozenset[str]
    values: bool = False
    columns: bool = False
    queries: Callable[[Judge, Node], None] | None = None
    feeds_new: bool = False
    existing: bool = False


DEFAULT_OF_OLD = Place("a default of an existing table", functions.IMMUTABLE | functions.CLOCK, existing=True)
DEFAULT_OF_NEW = Place("a default of a new table", _PURE | functions.VOLATILE, values=True, feeds_new=True)
ROW_OF_NEW = Place("a new table", _PURE, values=True, columns=True)
MOVE = _PURE | functions.VOLATILE | functions.AGGREGATES | functions.WINDOWS | functions.SETS


def expression(judge: Judge, node: object, place: Place) -> None:
    """Judge an expression, or a list of them; whatever is not known is refused."""
    if node is None:
        return
    if isinstance(node, list):
        for item in node:
            expression(judge, item, place)
        return
    if not isinstance(node, Node):
        judge.refuse(UnknownSyntax, None, f"{node!r} is no expression")
        return
    handler = _HANDLERS.get(node.kind)
    if handler is None:
        judge.refuse(UnknownSyntax, node, f"{node.kind} is not known to be harmless in {place.name}; write it plainly")
        return
    if node.kind != "ParamRef":
        judge.known(node)
    handler(judge, node, place)


def type_of(judge: Judge, node: Node, allowed: frozenset[str], rule: type[Rule] = UnknownType) -> str:
    """
    Judge a type and return its name: PostgreSQL's own bare, others as `New` spells them.

    Args:
        judge: collects.
        node: the TypeName.
        allowed: types of PostgreSQL that may stand here.
        rule: broken by a type that nobody knows.
    """
    judge.known(node)
    names: list[str] = node.get("names", [])
    for typmod in node.get("typmods", []):
        if not (
            isinstance(typmod, Node) and typmod.kind == "A_Const" and judge.known(typmod) and "ival" in typmod.fields
        ):
            judge.refuse(rule, node, "a type's modifiers are numbers")
    if not names:
        return ""
    name = names[-1]
    own = len(names) == 1 or (len(names) == 2 and names[0] == "pg_catalog")  # noqa: PLR2004 - schema and name
    if own and name in datatypes.CASTS:
        _scale(judge, node, name)
        judge_since(judge, datatypes.TYPE_SINCE.get(name), node, f"type {name}")
        if name not in allowed:
            _refuse_own_type(judge, node, name, rule)
        return name
    dotted = judge.scope.dotted(names)
    if dotted in judge.scope.new.types or dotted in judge.scope.settings.known_types:
        return dotted
    if names[0] == LEDGER_SCHEMA:
        judge.refuse(OwnState, node, "types of the schema shardmig are the runner's own")
    judge.refuse(
        rule,
        node,
        f"type {'.'.join(names)} is neither PostgreSQL's own nor created by a plan: it may be a domain whose CHECK "
        f"rewrites the table; use one of PostgreSQL's, or name it in known_types",
    )
    return dotted


def _scale(judge: Judge, node: Node, name: str) -> None:
    """Refuse numeric(3, -2) and numeric(2, 5) where a shard is older than they are."""
    numbers = [typmod.get("ival", 0) for typmod in node.get("typmods", []) if isinstance(typmod, Node)]
    if name == "numeric" and len(numbers) > 1 and not 0 <= numbers[1] <= numbers[0]:
        judge.since(15, node, "a scale below 0 or above the precision")


def judge_since(judge: Judge, version: int | None, node: Node, what: str) -> None:
    """Refuse what is younger than the oldest server, if it has an age at all."""
    if version is not None:
        judge.since(version, node, what)


def _refuse_own_type(judge: Judge, node: Node, name: str, rule: type[Rule]) -> None:
    from shardmig.lint.rules.tables import NoEquality  # noqa: PLC0415 - only this rare path speaks of it

    if name in datatypes.ANY:
        judge.refuse(
            NoEquality,
            node,
            f"{name} has no equality operator: SELECT DISTINCT * and UNION of today would fail; "
            f"{'use jsonb' if name == 'json' else 'use a type that has one'}",
        )
    else:
        judge.refuse(rule, node, f"{name} is not a type for columns; use text or a number")


# --------------------------------------------------------------------------------------------------------------------
# One handler a kind of node


def _leaf(judge: Judge, node: Node, _: Place) -> None:
    """Judge a constant or another node without expressions below it."""
    for value in node.fields.values():
        if isinstance(value, Node):  # a number or bit string that keeps its spelling
            judge.known(value)


def _args(judge: Judge, node: Node, place: Place) -> None:
    for name in ("arg", "args", "expr", "result", "defresult", "elements", "lidx", "uidx", "testexpr", "source"):
        expression(judge, node.get(name), place)


def _operator(judge: Judge, node: Node, place: Place) -> None:
    if "BETWEEN" not in node.get("kind", ""):  # which names itself there, and means >= and <=
        operator_name(judge, node.get("name", []), node)
    expression(judge, node.get("lexpr"), place)
    expression(judge, node.get("rexpr"), place)
    if place.existing and node.get("name", [""])[-1] in ("/", "%") and _is_zero(node.get("rexpr")):
        judge.refuse(rules.WrongPlace, node, "division by zero: every INSERT would fail; write the constant")


def operator_name(judge: Judge, names: list[str], node: Node) -> None:
    """Refuse operators that are not PostgreSQL's own."""
    own = len(names) == 1 or (len(names) == 2 and names[0] == "pg_catalog")  # noqa: PLR2004 - schema and name
    if not own or names[-1] not in functions.OPERATORS:
        judge.refuse(
            rules.UnknownOperator,
            node,
            f"operator {'.'.join(names)} is not PostgreSQL's own and may call anything; use a built-in one",
        )


def _is_zero(node: object) -> bool:
    if not isinstance(node, Node) or node.kind != "A_Const":
        return False
    value = node.get("ival", node.get("fval"))
    if isinstance(value, Node):
        value = value.get("fval", "1")
    try:
        return value is not None and float(value) == 0
    except ValueError:
        return False


def _cast(judge: Judge, node: Node, place: Place) -> None:
    type_of(judge, node.get("type_name"), datatypes.CASTS, rules.CastTo)
    expression(judge, node.get("arg"), place)


def _collate(judge: Judge, node: Node, place: Place) -> None:
    collation(judge, node)
    expression(judge, node.get("arg"), place)


def collation(judge: Judge, node: Node) -> None:
    """Refuse collations in schemas of others; an unknown bare name fails on the server, which is harmless."""
    names = node.get("collname", [])
    if len(names) > 1 and names[0] not in ("pg_catalog", *judge.scope.settings.schemas):
        judge.refuse(UnknownSyntax, node, f"collation {'.'.join(names)} is not PostgreSQL's own; use one that is")


def _column(judge: Judge, node: Node, place: Place) -> None:
    if not place.columns:
        judge.refuse(
            rules.WrongPlace,
            node,
            f"{place.name} cannot read a column; write a constant, and fill the rows in move()",
        )
    for part in node.get("fields", []):
        if isinstance(part, Node):
            judge.known(part)


def _value_function(judge: Judge, node: Node, place: Place) -> None:
    name: str = node.get("op", "").removeprefix("SVFOP_")
    if name.startswith(("CURRENT_DATE", "CURRENT_TIME", "LOCALTIME")):
        if place.existing:
            _own_value(judge, node, name)
        return
    if not place.values and not place.columns:
        judge.refuse(
            rules.UnknownFunction,
            node,
            f"{name} is not on the list for {place.name}: its value depends on who runs the plan; write a constant",
        )


def _own_value(judge: Judge, node: Node, name: str) -> None:
    judge.refuse(
        OwnValuePerShard,
        node,
        f"{name.lower()} is evaluated once on each shard: old rows get another value on every shard",
    )


def _parameter(judge: Judge, node: Node, place: Place) -> None:
    if judge.scope.step and node.get("number") == BATCH_NUMBER:
        return  # {batch}; where it may stand is judged with the whole step
    judge.refuse(
        rules.Parameter,
        node,
        f"${node.get('number', 0)} in {place.name} will never get a value; write the value itself",
    )


def _indirection(judge: Judge, node: Node, place: Place) -> None:
    expression(judge, node.get("arg"), place)
    for step in node.get("indirection", []):
        if isinstance(step, Node):
            expression(judge, step, place)


def _sublink(judge: Judge, node: Node, place: Place) -> None:
    if place.queries is None:
        judge.refuse(rules.WrongPlace, node, f"{place.name} cannot hold a sub-select; write a constant")
        return
    if "oper_name" in node.fields:
        operator_name(judge, node.get("oper_name"), node)
    expression(judge, node.get("testexpr"), place)
    place.queries(judge, node.get("subselect"))


def _call(judge: Judge, node: Node, place: Place) -> None:
    names: list[str] = node.get("funcname", [])
    expression(judge, node.get("args"), place)
    for name in ("agg_filter", "agg_order", "over"):
        if name in node.fields:
            _only_in_queries(judge, node, place, name)
    function(judge, names, node, place)


def _only_in_queries(judge: Judge, node: Node, place: Place, name: str) -> None:
    if place.queries is None:
        judge.refuse(rules.WrongPlace, node, f"{place.name} cannot aggregate")
    else:
        expression(judge, node.get(name), place)


def _window(judge: Judge, node: Node, place: Place) -> None:
    for name in ("partition_clause", "order_clause", "start_offset", "end_offset"):
        expression(judge, node.get(name), place)


def _sort(judge: Judge, node: Node, place: Place) -> None:
    expression(judge, node.get("node"), place)


def _grouping_set(judge: Judge, node: Node, place: Place) -> None:
    expression(judge, node.get("content"), place)


def function(judge: Judge, names: list[str], node: Node, place: Place) -> None:
    """Judge the name of a function that is called."""
    name = names[-1]
    known = judge.scope.settings.known_functions
    own = len(names) == 1 or (len(names) == 2 and names[0] == "pg_catalog")  # noqa: PLR2004 - schema and name
    if ".".join(names) in known:
        return
    if names[0] == LEDGER_SCHEMA and not own:
        judge.refuse(OwnState, node, f"{'.'.join(names)}() acts on the runner's own state; use `shardmig switch`")
    elif not own:
        _unknown(judge, node, names, place)
    elif name in place.functions:
        judge_since(judge, functions.SINCE.get(name), node, f"{name}()")
        arguments = len(node.get("args", []))
        judge_since(judge, functions.SINCE_WITH.get((name, arguments)), node, f"{name}() with {arguments} arguments")
        if name == "timezone" and node.get("funcformat") == "COERCE_SQL_SYNTAX" and arguments == 1:
            judge.since(17, node, "AT LOCAL")
        if place.existing and name in functions.CLOCK:
            _own_value(judge, node, f"{name}()")
    elif name in functions.SEQUENCE:
        _sequence(judge, node, name, place)
    elif place.existing and name in functions.VOLATILE:
        _rewrites(judge, node, name)
    elif name in functions.SIDE_EFFECTS:
        judge.refuse(rules.SideEffect, node, f"{name}() does more than compute a value; leave it out")
    else:
        _unknown(judge, node, names, place)


def _unknown(judge: Judge, node: Node, names: list[str], place: Place) -> None:
    judge.refuse(
        rules.UnknownFunction,
        node,
        f"{'.'.join(names)}() is not on the list for {place.name} and may do anything; "
        f"use a pure function of PostgreSQL, or name it in known_functions",
    )


def _rewrites(judge: Judge, node: Node, name: str) -> None:
    judge.refuse(
        RewritesTable,
        node,
        f"{name}() gives another value at each call, so the whole table is rewritten while everybody waits; "
        f"add the column without a default",
        lock="ACCESS EXCLUSIVE",
    )


def _sequence(judge: Judge, node: Node, name: str, place: Place) -> None:
    if place.existing:
        _rewrites(judge, node, name)
        return
    sequence = _sequence_named(judge, node)
    if sequence is None:
        judge.refuse(rules.OldSequence, node, f"{name}() takes the name of a sequence as a constant; write it out")
        return
    new = judge.scope.new.sequences
    if new is not None and sequence in new:
        return
    if place.feeds_new and (new is None or place is DEFAULT_OF_NEW):
        return
    judge.refuse(
        rules.OldSequence,
        node,
        f"{name}('{sequence}') takes numbers that the application's sequence will never give again; "
        f"create a sequence in this plan",
    )


def _sequence_named(judge: Judge, node: Node) -> str | None:
    """Return the sequence that nextval('schema.name'::regclass) names."""
    args = node.get("args", [])
    argument = args[0] if len(args) == 1 else None
    if isinstance(argument, Node) and argument.kind == "TypeCast":
        argument = argument.get("arg")
    if not isinstance(argument, Node) or argument.kind != "A_Const" or "sval" not in argument.fields:
        return None
    schema, _, name = argument.get("sval").rpartition(".")
    judge.schema(schema.strip('"'), name.strip('"'), node)
    return judge.scope.dotted([part.strip('"') for part in (schema, name) if part])


_HANDLERS: dict[str, Callable[[Judge, Node, Place], None]] = {
    "A_Const": _leaf,
    "A_Expr": _operator,
    "A_ArrayExpr": _args,
    "A_Indirection": _indirection,
    "A_Indices": _args,
    "BoolExpr": _args,
    "BooleanTest": _args,
    "CaseExpr": _args,
    "CaseWhen": _args,
    "CoalesceExpr": _args,
    "CollateClause": _collate,
    "ColumnRef": _column,
    "FuncCall": _call,
    "GroupingFunc": _args,
    "GroupingSet": _grouping_set,
    "MergeSupportFunc": _leaf,
    "MinMaxExpr": _args,
    "MultiAssignRef": _args,
    "NamedArgExpr": _args,
    "NullTest": _args,
    "ParamRef": _parameter,
    "RowExpr": _args,
    "SetToDefault": _leaf,
    "SortBy": _sort,
    "SQLValueFunction": _value_function,
    "SubLink": _sublink,
    "TypeCast": _cast,
    "WindowDef": _window,
}
