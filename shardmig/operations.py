"""
What a script may call beside `alembic.op`: `move_rows` and `seed_rows`, in the function `move()`.

A call only notes what the script asks for. Its SQL is derived when the whole script has been read, because the key may
come from a table that an earlier script created.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from shardmig import derivation
from shardmig.derivation import Shape
from shardmig.errors import ScriptError
from shardmig.nearest import nearest
from shardmig.plan import BATCH, Move
from shardmig.seeds import SeedRows
from shardmig.sqltext import code, unwritable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.tables import Table

__all__ = ["MoveRows", "collecting", "move_rows", "seed_rows"]

_OVERRIDING = re.compile(r"\bOVERRIDING\s+SYSTEM\s+VALUE\b", re.IGNORECASE)
_PARAMETER = re.compile(r"\$\d")


def move_rows(
    table: str,
    *,
    forward: Mapping[str, str] | str,
    back: Mapping[str, str] | str | None = None,
    check: str | None = None,
    back_check: str | None = None,
    key: str | Sequence[str] | None = None,
    into: str | None = None,
    target_key: Mapping[str, str] | Sequence[str] | str | None = None,
    where: str | None = None,
    writes: Sequence[str] | None = None,
    restores: Sequence[str] | None = None,
    orphans: str | None = None,
    purge: str | None = None,
    alias: str | None = None,
    lossy: bool = False,
    triggers: Literal["refuse", "fire"] = "refuse",
    touch_source: bool = False,
) -> None:
    """
    Move the rows of a table from their old representation to the new one, in small batches.

    `forward` and `back` are each a mapping column → SQL expression, from which statement and check are derived, or SQL
    with the token `{batch}` exactly once. A check is SQL that returns the keys of rows that disagree; none is good.

    Args:
        table: the table whose rows hold old; walked by `key`.
        forward: how new follows from old. Expressions see one row of `table`.
        back: how old follows from new; expressions see one row of `into`, or of `table` without it. Across tables a
            source row whose target row is gone gets NULL. Without `back` the move cannot be undone after DONE.
        check: instead of the derived one; mandatory when `forward` is SQL.
        back_check: instead of the derived one; mandatory when `back` is SQL.
        key: columns of a unique, not-null key of `table`; its primary key if an earlier script created the table.
        into: second table, filled from `table`, one row for a row.
        target_key: columns of `into` that hold `key`: a mapping column → key column, or columns in the key's order;
            its primary key if a script created it.
        where: condition on rows of `table` that have a row in `into`; with expressions only.
        writes: columns that `forward` fills, when it is SQL.
        restores: old columns that `back` fills, when it is SQL.
        orphans: instead of the derived SQL that returns `target_key` of rows of `into` without a source row.
        purge: the DELETE of those rows; goes with `orphans`.
        alias: name that the key's columns carry in SQL given here, if they need one.
        lossy: accept that back(forward(x)) is not x.
        triggers: "fire" to let user triggers on the written tables fire, instead of refusing the move.
        touch_source: also update the source rows, so that a REPEATABLE READ writer who missed a row retries.

    Raises:
        ScriptError: the arguments do not make a move; the message says what to write.
    """
    sink = _sink.get()
    if sink is None:
        raise ScriptError("move_rows() only describes a move; call it in the function move() of a migration script")
    call = MoveRows(
        table,
        forward=forward,
        back=back,
        check=check,
        back_check=back_check,
        key=_columns("key", key),
        into=into,
        target_key=target_key if isinstance(target_key, Mapping) else _columns("target_key", target_key),
        where=where,
        writes=_columns("writes", writes),
        restores=_columns("restores", restores),
        orphans=orphans,
        purge=purge,
        alias=alias,
        lossy=lossy,
        triggers=triggers,
        touch_source=touch_source,
    )
    call.validate()
    sink(call)


def seed_rows(table: str, rows: Sequence[Mapping[str, object]], *, key: str | Sequence[str] | None = None) -> None:
    """
    Put fixed rows into a table that this script creates: currencies, roles, settings.

    They are written after the flag is in DUAL, in the order of the calls of `move()`, overwrite what has their key, and
    are compared before LIVE. From LIVE on they belong to the application. Going back to OLD removes them again.

    Args:
        table: a table created in `upgrade()`.
        rows: constants, column → value; every row names the same columns, the key's among them.
        key: a unique key of the table; its primary key if a script created it.

    Raises:
        ScriptError: these are no fixed rows; the message says what to write.
    """
    sink = _sink.get()
    if sink is None:
        raise ScriptError("seed_rows() only describes rows; call it in the function move() of a migration script")
    call = SeedRows(table, rows, _columns("key", key))
    call.validate()
    sink(call)


_sink: ContextVar[Callable[[MoveRows | SeedRows], None] | None] = ContextVar("_sink", default=None)


@contextmanager
def collecting(sink: Callable[[MoveRows | SeedRows], None]) -> Iterator[None]:
    """Give every call of `move_rows` and `seed_rows` to `sink` while a script is rendered."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRows:
    """One call of `move_rows`: its arguments, and what follows from them."""

    table: str = field(kw_only=False)
    forward: Mapping[str, str] | str
    back: Mapping[str, str] | str | None
    check: str | None
    back_check: str | None
    key: tuple[str, ...] | None
    into: str | None
    target_key: Mapping[str, str] | tuple[str, ...] | None
    where: str | None
    writes: tuple[str, ...] | None
    restores: tuple[str, ...] | None
    orphans: str | None
    purge: str | None
    alias: str | None
    lossy: bool
    triggers: Literal["refuse", "fire"]
    touch_source: bool

    def validate(self) -> None:
        """
        Refuse arguments that do not fit together.

        Raises:
            ScriptError: naming the argument and what to write.
        """
        if not self.table:
            raise ScriptError('move_rows() begins with the name of the table, as in move_rows("customer", ...)')
        if self.triggers not in ("refuse", "fire"):
            raise ScriptError('triggers= is "refuse" or "fire"')
        for name, values in (("forward", self.forward), ("back", self.back)):
            _expressions(name, values) if isinstance(values, Mapping) else _statement(name, values)
        for name in ("check", "back_check", "orphans", "purge"):
            _statement(name, getattr(self, name))
        if self.where is not None:
            _expression("where", self.where)
        self._forward_fits()
        self._back_fits()
        self._tables_fit()

    def _forward_fits(self) -> None:
        if isinstance(self.forward, Mapping):
            if self.writes is not None:
                raise ScriptError("writes= says what a hand-written forward= fills; a mapping says it itself")
            return
        if not self.writes:
            raise ScriptError('forward= is SQL: name the columns it fills, as in writes=("first_name",)')
        if self.check is None:
            raise ScriptError(
                "forward= is SQL: give check=, a SELECT with {batch} that returns the keys of rows that disagree"
            )
        if self.where is not None:
            raise ScriptError("where= goes with expressions; write the condition into the SQL of forward= and check=")

    def _back_fits(self) -> None:
        if self.back is None:
            for name in ("restores", "back_check"):
                if getattr(self, name) is not None:
                    raise ScriptError(f"{name}= goes with back=")
            if self.lossy:
                raise ScriptError("lossy= accepts that back= loses something, and there is no back=")
        elif isinstance(self.back, Mapping):
            if self.restores is not None:
                raise ScriptError("restores= says what a hand-written back= fills; a mapping says it itself")
        elif not self.restores:
            raise ScriptError('back= is SQL: name the old columns it fills, as in restores=("full_name",)')
        elif self.back_check is None:
            raise ScriptError(
                "back= is SQL: give back_check=, a SELECT with {batch} that returns the keys of rows that disagree"
            )

    def _tables_fit(self) -> None:
        if self.into is None:
            for name in ("target_key", "orphans", "purge", "where"):
                if getattr(self, name) is not None:
                    raise ScriptError(f"{name}= goes with into=, the second table of a move")
            if self.touch_source:
                raise ScriptError("touch_source= goes with into=: a move within one table touches its rows anyway")
        elif self.into == self.table:
            raise ScriptError(f"into={self.into!r} is the table itself; leave into= out")
        if (self.orphans is None) != (self.purge is None):
            raise ScriptError("orphans= and purge= go together: one finds the rows, the other deletes them")
        if self.alias is not None and (isinstance(self.forward, Mapping) or isinstance(self.back, Mapping)):
            raise ScriptError("alias= goes with SQL given here; SQL derived from expressions has none")

    def derive(self, tables: Mapping[str, Table], *, line: int | None) -> Move:
        """
        Derive every text that the move needs.

        Args:
            tables: what this script and those before it say about tables, by name as written.
            line: line of the call.

        Raises:
            ScriptError: the key is not known, or cannot be one.
        """
        key = self.key or _primary_key(self.table, tables, argument="key")
        _refuse_nullable(self.table, key, tables)
        target_key = self._target_key(key, tables)
        self._refuse_always(target_key, tables)
        shape = Shape(self.table, key, self.into or "", target_key, self.where, self.touch_source)
        return Move(
            table=self.table,
            alias=self.alias,
            key=key,
            target=self.into,
            target_key=target_key,
            lossy=self.lossy,
            triggers=self.triggers,
            touch_source=self.touch_source,
            line=line,
            **self._forward_texts(shape, tables),
            **self._orphan_texts(shape),
            **self._back_texts(shape, tables),
        )

    def _forward_texts(self, shape: Shape, tables: Mapping[str, Table]) -> dict[str, Any]:
        if isinstance(self.forward, str):
            return {"writes": self.writes, "forward": self.forward, "check": self.check}
        if clash := [column for column in self.forward if column in shape.target_key]:
            raise ScriptError(f"forward= fills {clash[0]}, which target_key= fills already; leave it out of forward=")
        return {
            "writes": tuple(self.forward),
            "forward": derivation.forward(shape, self.forward),
            "check": self.check or derivation.check(shape, self.forward, _types(self.into or self.table, tables)),
        }

    def _orphan_texts(self, shape: Shape) -> dict[str, Any]:
        if not shape.target:
            return {}
        if self.orphans is not None:
            return {"orphans": self.orphans, "purge": self.purge}
        return {"orphans": derivation.orphans(shape), "purge": derivation.purge(shape)}

    def _back_texts(self, shape: Shape, tables: Mapping[str, Table]) -> dict[str, Any]:
        if self.back is None:
            return {}
        if isinstance(self.back, str):
            return {"restores": self.restores, "back": self.back, "back_check": self.back_check}
        if clash := [column for column in self.back if column in shape.key]:
            raise ScriptError(f"back= fills {clash[0]}, which is part of the key; a key is never written")
        return {
            "restores": tuple(self.back),
            "back": derivation.back(shape, self.back),
            "back_check": self.back_check or derivation.back_check(shape, self.back, _types(self.table, tables)),
        }

    def _target_key(self, key: tuple[str, ...], tables: Mapping[str, Table]) -> tuple[str, ...]:
        if self.into is None:
            return ()
        if isinstance(self.target_key, Mapping):
            held = {column: name for name, column in self.target_key.items()}
            if set(held) != set(key) or len(held) != len(self.target_key):
                raise ScriptError(f"target_key= gives each of {', '.join(key)} one column of {self.into}")
            columns = tuple(held[column] for column in key)
        else:
            columns = self.target_key or _primary_key(self.into, tables, argument="target_key")
        if len(columns) != len(key):
            raise ScriptError(
                f"target_key= ({', '.join(columns)}) and the key of {self.table} ({', '.join(key)}) differ in length; "
                f"give target_key={{column of {self.into}: column of {self.table}}}"
            )
        table, carried = tables.get(self.into), frozenset(columns)
        if table and table.created and not any(self._finds_rows(carried, unique) for unique in _uniques(table)):
            raise ScriptError(
                f"({', '.join(columns)}) is not unique in {self.into}, so rows cannot be overwritten there; make it "
                "the primary key or a UNIQUE constraint of the new table. Where one row becomes several, forward= is "
                "SQL, and the constraint begins with it and holds more columns"
            )
        return columns

    def _refuse_always(self, target_key: tuple[str, ...], tables: Mapping[str, Table]) -> None:
        """Refuse to fill what the server alone fills, unless the SQL insists."""
        known = tables.get(self.into or "")
        insists = isinstance(self.forward, str) and _OVERRIDING.search(self.forward)
        for column in (*target_key, *(self.writes or self.forward)) if known and not insists else ():
            if known and column in known.columns and known.columns[column].always:
                raise ScriptError(
                    f"{self.into}.{column} is GENERATED ALWAYS AS IDENTITY, so the move cannot fill it; create it with "
                    "sa.Identity(), without always=True"
                )

    def _finds_rows(self, carried: frozenset[str], unique: frozenset[str]) -> bool:
        """Say whether a constraint finds what a source row becomes: one row, or by hand several."""
        return carried == unique if isinstance(self.forward, Mapping) else carried <= unique


# --------------------------------------------------------------------------------------------------------------------
# What scripts said about tables


def _primary_key(table: str, tables: Mapping[str, Table], *, argument: str) -> tuple[str, ...]:
    known = tables.get(table)
    if known and known.primary_key:
        return known.primary_key
    if known and known.created:
        reason, near = "has no primary key", ""
    else:
        reason, near = "was not created by op.create_table() in these scripts", nearest(table, {*tables} - {table})
    raise ScriptError(
        f'{table} {reason}: give {argument}=, a unique, not-null key of it, as in {argument}=("id",); for one that has '
        f"none, docs/writing-moves.md says how it gets it{near}"
    )


def _refuse_nullable(table: str, key: tuple[str, ...], tables: Mapping[str, Table]) -> None:
    known = tables.get(table)
    for column in key:
        fact = known.columns.get(column) if known else None
        if fact and fact.nullable and known and column not in known.primary_key:
            raise ScriptError(
                f"{table}.{column} may be NULL, so it cannot be part of the key: rows without a value would be left "
                "behind; name a unique key whose columns are NOT NULL"
            )


def _uniques(table: Table) -> frozenset[frozenset[str]]:
    return frozenset([frozenset(table.primary_key), *table.uniques])


def _types(table: str, tables: Mapping[str, Table]) -> dict[str, str | None]:
    known = tables.get(table)
    return {name: column.type_sql for name, column in known.columns.items()} if known else {}


# --------------------------------------------------------------------------------------------------------------------
# What an argument may be


def _columns(name: str, columns: str | Sequence[object] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    given = [columns] if isinstance(columns, str) else list(columns)
    names = tuple(column for column in given if isinstance(column, str) and column)
    if not names or len(set(names)) < len(given):
        raise ScriptError(f'{name}= names columns, each once, as in {name}=("id",)')
    return names


def _expressions(name: str, values: Mapping[Any, object]) -> None:
    if not values:
        raise ScriptError(f'{name}= names no column; write {name}={{"column": "expression"}}')
    for column, expression in values.items():
        if not isinstance(column, str) or not column:
            raise ScriptError(f"{name}= maps names of columns to expressions, not {column!r}")
        _expression(f"{name}[{column!r}]", expression)


def _expression(name: str, expression: object) -> None:
    if not isinstance(expression, str) or not expression.strip():
        raise ScriptError(f"{name} is an SQL expression in a string, not {expression!r}")
    if BATCH in expression:
        raise ScriptError(f"{name} is an expression: {BATCH} belongs into SQL; an expression sees one row")
    _refuse_text(name, expression)


def _statement(name: str, sql: object) -> None:
    if sql is None:
        return
    if not isinstance(sql, str) or not sql.strip():
        raise ScriptError(f"{name}= is SQL in a string, or for forward= and back= a mapping column → expression")
    if sql.count(BATCH) != 1:
        times = "not there" if BATCH not in sql else f"there {sql.count(BATCH)} times"
        raise ScriptError(f"{BATCH} is {times} in {name}=; write it exactly once, as in WHERE {BATCH} AND ...")
    if sql.rstrip().endswith(";"):
        raise ScriptError(f"{name}= ends with a semicolon; leave it out")
    _refuse_text(name, sql)


def _refuse_text(name: str, sql: str) -> None:
    if _PARAMETER.search(code(sql)):
        raise ScriptError(f"{name} holds a parameter ($1), and nobody will give it a value; write the value")
    reason = unwritable(sql)
    if reason:
        raise ScriptError(f"{name} cannot be executed: {reason}")
