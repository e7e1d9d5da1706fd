"""
Fixed rows of a new table: what a script says by `seed_rows`, and the SQL of it.

A seed is a move whose source is the plan itself: the check finds which of its rows are missing or differ and writes
them, in one transaction with the record of it, under the same fence as any batch. Going back to OLD removes them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from shardmig.derivation import spelled
from shardmig.errors import ScriptError
from shardmig.plan import BATCH, Move
from shardmig.sqltext import unwritable

if TYPE_CHECKING:
    from shardmig.tables import Table

__all__ = ["SeedRows"]

_ROWS_MAX = 1000  # what a reviewer may be asked to read
_LENGTH = re.compile(  # of types that hold so many characters and no more; CHAR alone is one
    r"(?:(?:VARCHAR|CHARACTER VARYING|BIT VARYING|CHARACTER|CHAR|BIT)\s*\(\s*(\d+)\s*\)|(?:CHARACTER|CHAR|BIT)\Z)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class SeedRows:
    """One call of `seed_rows`: rows as the script gives them, each a mapping column → constant."""

    table: str
    rows: Sequence[Mapping[str, object]]
    key: tuple[str, ...] | None

    def validate(self) -> None:
        """
        Refuse rows that do not make a seed.

        Raises:
            ScriptError: naming what is wrong and what to write.
        """
        if not self.table:
            raise ScriptError('seed_rows() begins with the name of the table, as in seed_rows("currency", [...])')
        if isinstance(self.rows, Mapping) or not self.rows or not all(isinstance(row, Mapping) for row in self.rows):
            raise ScriptError('seed_rows() takes a list of rows, as in [{"code": "EUR", "name": "Euro"}]')
        if len(self.rows) > _ROWS_MAX:
            raise ScriptError(
                f"{len(self.rows)} rows are no seed but data (at most {_ROWS_MAX}); load them by a program"
            )
        columns = set(self.rows[0])
        for row in self.rows:
            if set(row) != columns or not columns:
                raise ScriptError(f"every row of {self.table} names the same columns; write None for what is missing")

    def derive(self, tables: Mapping[str, Table], *, line: int | None) -> Move:
        """
        Derive the texts of the seed.

        Raises:
            ScriptError: the key is not known, a row has none of it, or two rows have the same.
        """
        known = tables.get(self.table)
        columns = tuple(self.rows[0])
        key = self.key or (known.primary_key if known else ())
        if not key:
            raise ScriptError(
                f'{self.table} has no primary key that a script created: give key=, a unique one, as in key=("id",)'
            )
        self._refuse_keys(key)
        types = {name: column.type_sql for name, column in known.columns.items()} if known else {}
        if unknown := [column for column in columns if known and known.created and column not in known.columns]:
            raise ScriptError(f"{self.table} has no column {unknown[0]}; correct its spelling")
        if blind := [column for column in columns if (types.get(column) or "").upper() == "JSON" and column not in key]:
            raise ScriptError(f"{self.table}.{blind[0]} is json, which cannot be compared; make it jsonb")
        values = self._values(columns, types)
        names = ", ".join(map(spelled, columns))
        updates = ",\n    ".join(f"{spelled(column)} = excluded.{spelled(column)}" for column in columns)
        same = "\n      AND ".join(
            [f"held.{spelled(c)} = seed.{spelled(c)}" for c in key]
            + [f"held.{spelled(c)} IS NOT DISTINCT FROM seed.{spelled(c)}" for c in columns if c not in key]
        )
        target = ".".join(map(spelled, self.table.split(".")))
        keys = ", ".join(map(spelled, key))
        return Move(
            table=self.table,
            seed=True,
            key=key,
            writes=columns,
            forward=(
                f"INSERT INTO {target} ({names})\nSELECT {names}\nFROM (VALUES\n{values}\n) AS seed ({names})\n"
                f"WHERE {BATCH}\nON CONFLICT ({keys}) DO UPDATE\nSET {updates}"
            ),
            check=(
                f"SELECT {keys}\nFROM (VALUES\n{values}\n) AS seed ({names})\n"
                f"WHERE {BATCH}\n  AND NOT EXISTS (\n    SELECT FROM {target} AS held\n    WHERE {same}\n  )"
            ),
            purge=(f"DELETE FROM {target}\nWHERE {BATCH}\n  AND ({keys}) IN (VALUES\n{self._values(key, types)}\n  )"),
            line=line,
        )

    def _refuse_keys(self, key: Sequence[str]) -> None:
        seen = set()
        for row in self.rows:
            values = tuple(row.get(column) for column in key)
            if None in values:
                raise ScriptError(f"a row of {self.table} has no {', '.join(key)}: a seed is found again by its key")
            if repr(values) in seen:
                raise ScriptError(f"two rows of {self.table} have the key {values[0] if len(values) == 1 else values}")
            seen.add(repr(values))

    def _values(self, columns: Sequence[str], types: Mapping[str, str | None]) -> str:
        rows = (
            ", ".join(_typed(row[column], types.get(column), f"{self.table}.{column}") for column in columns)
            for row in self.rows
        )
        return ",\n".join(f"    ({row})" for row in rows)


def _typed(value: object, type_sql: str | None, column: str) -> str:
    """Write a constant as its column stores it, so that it can be compared."""
    literal = _literal(value)
    if type_sql is None:
        return literal
    length = _LENGTH.match(type_sql)
    # An INSERT refuses what is too long; a CAST cuts it off and says nothing (Data Types, "Character Types").
    text = "" if value is None else str(value) if isinstance(value, int) else _text(value)
    if length and len(text.rstrip(" ")) > int(length[1] or 1):
        raise ScriptError(f"{value!r} is too long for {column}, {type_sql}; shorten it or widen the column")
    return f"CAST({literal} AS {type_sql})"


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float | Decimal) and math.isfinite(value)):
        return str(value)
    text = _text(value)
    if BATCH in text:
        raise ScriptError(f"{BATCH} in a row would be taken for a range of keys; write it another way")
    if reason := unwritable(text):
        raise ScriptError(f"a row cannot be written: {reason}")
    quoted = "'" + text.replace("'", "''") + "'"
    return "E" + quoted.replace("\\", "\\\\") if "\\" in text else quoted


def _text(value: object) -> str:
    match value:
        case str():
            return value
        case date() | time():
            return value.isoformat()
        case timedelta():
            return f"{value.total_seconds():.6f} seconds"  # 1e-05 is no interval
        case UUID() | float() | Decimal():
            return str(value)
        case Mapping() | list():
            return json.dumps(value, ensure_ascii=False, sort_keys=True)
        case _:
            raise ScriptError(f"{value!r} is no constant that a seed can hold; write a string in PostgreSQL's notation")
