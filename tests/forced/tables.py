"""What moves in a forced schedule: one table, two whose rows come and go, or two where values do; as in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from shardmig import derivation
from shardmig.plan import Move
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import psycopg
    from model.world import Settings

__all__ = ["KEYS", "Moved", "Written", "moved"]

KEYS = (1, 2, 9)  # 1 and 9 are there at the beginning
FIRST = "first"

_SOURCE = "CREATE TABLE orders (id int PRIMARY KEY, street text, line text)"
_TARGET = "CREATE TABLE order_address (order_id int PRIMARY KEY, line text)"
_ROWS = f"INSERT INTO orders (id, street) VALUES (1, '{FIRST}'), (9, '{FIRST}')"
_TO_NEW, _TO_OLD = {"line": "'new ' || street"}, {"street": "substr(line, 5)"}


class Written(NamedTuple):
    """One statement of a writer: whether it is the one of the second table, and what it says."""

    second: bool
    sql: str


@dataclass(frozen=True)
class Moved:
    """
    The tables of one kind, and the move between their representations.

    Attributes:
        kind: "one", "entity" or "value", as in the model.
        move: with the SQL that the product derives.
    """

    kind: str
    move: Move

    @property
    def made(self) -> tuple[str, ...]:
        """The statements that make the tables and the first rows."""
        if self.kind == "one":
            return (_SOURCE, _ROWS)
        valueless = ("INSERT INTO orders (id) VALUES (2)",) if self.kind == "value" else ()
        return (_SOURCE, _TARGET, _ROWS, *valueless)

    @property
    def first(self) -> dict[int, str | None]:
        """What the application wrote at the beginning; None where there is nothing."""
        return {key: None if key == 2 else FIRST for key in KEYS}

    def plan(self, op: str, state: State, key: int, value: str) -> Sequence[Written]:
        """List what a writer in this state does, old first; a value comes and goes in a row that stays."""
        if self.kind == "value":
            op = {"put": "set", "delete": "clear"}.get(op, op)
        if self.kind == "one":
            return [Written(second=False, sql=_one(op, state, key, value))]
        source, target = _source(op, state, key, value), _target(self.kind, op, state, key, value)
        olds = [Written(second=False, sql=source)] if source else []
        return [*olds, Written(second=True, sql=target)] if state.writes_new else olds

    def reads(self, connection: psycopg.Connection[Any], state: State, key: int) -> tuple[bool, str | None]:
        """Read as one does in this state: whether there is something, and what the application wrote there."""
        return self.read_from(connection.execute(self.query(state, key)).fetchone(), state)

    def query(self, state: State, key: int) -> str:
        """Write what a reader in this state asks."""
        if state.reads_new and self.kind != "one":
            return f"SELECT line FROM order_address WHERE order_id = {key}"
        return f"SELECT {'line' if state.reads_new else 'street'} FROM orders WHERE id = {key}"

    def read_from(self, row: tuple[str | None] | None, state: State) -> tuple[bool, str | None]:
        """Say what such a reader has read."""
        value = row[0] if row else None
        there = row is not None and (self.kind != "value" or value is not None)
        return there, value[4:] if value is not None and state.reads_new else value


def _one(op: str, state: State, key: int, value: str) -> str:
    values = {"street": f"'{value}'"} if state.writes_old else {}
    values |= {"line": f"'new {value}'"} if state.writes_new else {}
    if op == "delete":
        return f"DELETE FROM orders WHERE id = {key}"
    if op == "set":
        return f"UPDATE orders SET {', '.join(f'{name} = {v}' for name, v in values.items())} WHERE id = {key}"
    return (
        f"INSERT INTO orders (id, {', '.join(values)}) VALUES ({key}, {', '.join(values.values())}) "
        f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in values)}"
    )


def _source(op: str, state: State, key: int, value: str) -> str:
    """Write the first table; in DONE the row itself and nothing that moved."""
    inserts = "INSERT INTO orders ({0}) VALUES ({1}) ON CONFLICT (id) DO UPDATE SET {2}"
    deletes = f"DELETE FROM orders WHERE id = {key}"
    if state is State.DONE:
        return {"put": inserts.format("id", key, "id = excluded.id"), "delete": deletes}.get(op, "")
    return {
        "put": inserts.format("id, street", f"{key}, '{value}'", "street = excluded.street"),
        "set": f"UPDATE orders SET street = '{value}' WHERE id = {key}",
        "delete": deletes,
        "clear": f"UPDATE orders SET street = NULL WHERE id = {key}",
    }[op]


def _target(kind: str, op: str, state: State, key: int, value: str) -> str:
    if op in {"delete", "clear"}:
        return f"DELETE FROM order_address WHERE order_id = {key}"
    if op == "set" and kind == "entity" and state is State.DONE:
        return f"UPDATE order_address SET line = 'new {value}' WHERE order_id = {key}"
    return (
        f"INSERT INTO order_address VALUES ({key}, 'new {value}') "
        "ON CONFLICT (order_id) DO UPDATE SET line = excluded.line"
    )


def moved(settings: Settings) -> Moved:
    """Derive the move as the product does, and change in its SQL what the settings change."""
    two = settings.tables != "one"
    where = "street IS NOT NULL" if settings.tables == "value" else None
    target, key = ("order_address", ("order_id",)) if two else ("", ())
    shape = derivation.Shape("orders", ("id",), target, key, where=where, touch=settings.lock == "touch")
    values: Mapping[str, Any] = {
        "table": "orders",
        "key": ("id",),
        "writes": ("line",),
        "restores": ("street",),
        "touch_source": settings.lock == "touch",
        "forward": _forward(shape, settings),
        "check": derivation.check(shape, _TO_NEW, {"line": "TEXT"}),
        "back": derivation.back(shape, _TO_OLD),
        "back_check": derivation.back_check(shape, _TO_OLD, {"street": "TEXT"}),
    }
    second: Mapping[str, Any] = {
        "target": "order_address",
        "target_key": ("order_id",),
        "orphans": derivation.orphans(shape),
        "purge": derivation.purge(shape),
    }
    return Moved(settings.tables, Move(**values, **(second if two else {})))


def _forward(shape: derivation.Shape, settings: Settings) -> str:
    sql = derivation.forward(shape, _TO_NEW)
    if settings.lock == "none" and settings.tables == "one":
        return (
            "UPDATE orders SET line = 'new ' || selected.street FROM (SELECT id, street FROM orders WHERE {batch}) "
            "AS selected WHERE orders.id = selected.id"
        )
    if settings.lock == "none":
        sql = _without(sql, "FOR SHARE")
    return sql.partition("DO UPDATE")[0] + "DO NOTHING" if settings.nothing else sql


def _without(sql: str, part: str) -> str:
    assert part in sql
    return sql.replace(part, "")
