"""
The SQL of a move whose script gives expressions: pure text building, no checks.

What PostgreSQL does when rows change under a statement decides the shape of these texts (manual, "Read Committed
Isolation Level"): a row to be written is looked at again once its lock is granted, a row merely joined is not. So
forward locks the source rows it reads, back locks the target rows it reads, both in a materialized CTE.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy.dialects.postgresql.base import RESERVED_WORDS

from shardmig.plan import BATCH, quote
from shardmig.sqltext import pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Shape", "back", "back_check", "check", "forward", "orphans", "purge", "spelled"]

# SQLAlchemy's list holds the reserved words. PostgreSQL 18's other words that are no plain name everywhere ("SQL Key
# Words", all but the non-reserved ones) are quoted too: as a column some of them would be read as a function or a type.
_KEYWORDS = frozenset(RESERVED_WORDS) | frozenset(
    """
    bigint bit boolean char character coalesce collation concurrently dec decimal exists extract float greatest
    grouping inout int integer interval json json_array json_arrayagg json_exists json_object json_objectagg
    json_query json_scalar json_serialize json_table json_value lateral least merge_action national nchar none
    normalize nullif numeric out overlay position precision real row setof smallint substring system_user
    tablesample time timestamp treat trim values varchar xmlattributes xmlconcat xmlelement xmlexists xmlforest
    xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable
    """.split()  # noqa: SIM905 - sixty words are read as words
)
_PLAIN = re.compile(r"[a-z_][a-z0-9_]*\Z")
_UNCHANGED = frozenset({None, "TEXT", "VARCHAR"})  # storing an expression in these changes no value


@dataclass(frozen=True, slots=True)
class Shape:
    """
    Between which tables rows move, and which belong together.

    Attributes:
        table: source table as the script names it.
        key: its key.
        target: second table; None when new columns are in the source table.
        target_key: the target's columns that hold `key`, in its order.
        where: condition on source rows that have a target row; None when all have.
        touch: whether forward also updates the source rows, so that REPEATABLE READ writers retry.
    """

    table: str
    key: tuple[str, ...]
    target: str = ""
    target_key: tuple[str, ...] = ()
    where: str | None = None
    touch: bool = False

    def free(self, word: str, *columns: str) -> str:
        """Return a name that is neither one of the tables nor one of the columns: a CTE would hide that table."""
        taken = {name.rpartition(".")[2] for name in (self.table, self.target)} | {*columns}
        while word in taken:
            word += "_"
        return word


def forward(shape: Shape, values: Mapping[str, str]) -> str:
    """Write new from old: one UPDATE, or an upsert that reads the source under a lock."""
    if not shape.target:
        return _update(shape.table, values)
    source = shape.free("source")
    # FOR SHARE waits for whoever is changing the row, and then reads what they left.
    locked = _source(shape, values) + ("\nFOR NO KEY UPDATE" if shape.touch else "\nFOR SHARE")
    columns = _names([*shape.target_key, *values])
    updates = ",\n    ".join(f"{spelled(column)} = excluded.{spelled(column)}" for column in values)
    return (
        f"WITH {source} AS MATERIALIZED (\n{_indented(locked)}\n){_touched(shape, source)}\n"
        f"INSERT INTO {_table(shape.target)} ({columns})\n"
        f"SELECT {columns}\nFROM {source}\n"
        f"ON CONFLICT ({_names(shape.target_key)}) DO UPDATE\nSET {updates}"
    )


def check(shape: Shape, values: Mapping[str, str], types: Mapping[str, str | None]) -> str:
    """Select keys of rows whose new differs from forward(old), or that have no new row."""
    stored = {column: _stored(value, types.get(column)) for column, value in values.items()}
    if not shape.target:
        return _differing(shape, stored)
    source, target = shape.free("source"), shape.free("target")
    pairs = zip(shape.target_key, shape.key, strict=True)
    keys = ", ".join(f"{source}.{spelled(held)} AS {spelled(column)}" for held, column in pairs)
    differs = [f"{target}.{spelled(column)} IS DISTINCT FROM {source}.{spelled(column)}" for column in values]
    # One statement, so one snapshot: a writer's two rows are seen both or not at all.
    return (
        f"WITH {source} AS MATERIALIZED (\n{_indented(_source(shape, stored))}\n)\n"
        f"SELECT {keys}\nFROM {source}\n"
        f"LEFT JOIN {_table(shape.target)} AS {target} ON {_matching(target, shape.target_key, source)}\n"
        "WHERE " + "\n   OR ".join([f"{target}.{spelled(shape.target_key[0])} IS NULL", *differs])
    )


def orphans(shape: Shape) -> str:
    """Select keys of target rows without a source row, or whose source row does not match `where`."""
    return f"SELECT {_names(shape.target_key)}\n{_orphaned(shape)}"


def purge(shape: Shape) -> str:
    """Delete those rows; whoever runs it has locked them in an earlier statement of the transaction."""
    return f"DELETE {_orphaned(shape)}"


def back(shape: Shape, values: Mapping[str, str]) -> str:
    """
    Write old from new.

    Across tables the target row is locked and read before the source row. Writers go the other way, and where both meet
    the batch gives way: its lock timeout is the shorter one. A source row whose target row is gone gets NULL, unless
    somebody changed it meanwhile: an absent row cannot be locked, so whoever brings it back must win. The row's version
    (ctid) tells.
    """
    if not shape.target:
        return _update(shape.table, values)
    batch, target, source = shape.free("batch"), shape.free("target"), shape.free("source")
    # Columns of the WITH queries have names of their own, so that `where` means columns of the row itself.
    keys = [f"batch_{column}" for column in shape.key]
    held = [f"new_{column}" for column in shape.target_key]
    rows = _batch(shape, [*_renamed(shape.key, keys), "ctid AS version"])
    news = _target(shape, {f"new_{column}": value for column, value in values.items()}, held)
    news += f"\nWHERE {_row(shape.target_key)} IN (SELECT {_names(keys)} FROM {batch})\nFOR SHARE"
    updates = ",\n    ".join(f"{spelled(column)} = {target}.{spelled(f'new_{column}')}" for column in values)
    unchanged = f"{source}.ctid = {batch}.version"
    if shape.where:
        unchanged = f"({unchanged} AND {_wrapped(shape.where)})"
    return (
        f"WITH {batch} AS MATERIALIZED (\n{_indented(rows)}\n),\n"
        f"{target} AS MATERIALIZED (\n{_indented(news)}\n)\n"
        f"UPDATE {_table(shape.table)} AS {source}\nSET {updates}\n"
        f"FROM {batch}\nLEFT JOIN {target} ON {_matching(target, held, batch, keys)}\n"
        f"WHERE {_matching(source, shape.key, batch, keys)}\n"
        f"  AND ({target}.{spelled(held[0])} IS NOT NULL OR {unchanged})"
    )


def back_check(shape: Shape, values: Mapping[str, str], types: Mapping[str, str | None]) -> str:
    """Select keys of rows whose old differs from back(new); a target row that is gone means NULL."""
    stored = {column: _stored(value, types.get(column)) for column, value in values.items()}
    if not shape.target:
        return _differing(shape, stored)
    source, target = shape.free("source"), shape.free("target")
    wanted = shape.free("wanted", *shape.key, *values)
    columns = [_names([*shape.key, *values])]
    if shape.where:
        columns.append(f"{_wrapped(shape.where)} AS {wanted}")
    differs = "\n    OR ".join(f"{source}.{spelled(c)} IS DISTINCT FROM {target}.{spelled(c)}" for c in values)
    present = f"{target}.{spelled(shape.target_key[0])} IS NOT NULL"
    return (
        f"WITH {source} AS MATERIALIZED (\n{_indented(_batch(shape, columns))}\n)\n"
        f"SELECT {', '.join(f'{source}.{spelled(column)}' for column in shape.key)}\nFROM {source}\n"
        f"LEFT JOIN (\n{_indented(_target(shape, stored, shape.target_key))}\n) AS {target} "
        f"ON {_matching(target, shape.target_key, source, shape.key)}\n"
        f"WHERE ({differs})" + (f"\n  AND ({present} OR {source}.{wanted})" if shape.where else "")
    )


def spelled(name: str) -> str:
    """Write an identifier as a reader would: quoted only where it must be."""
    return name if _PLAIN.match(name) and name not in _KEYWORDS else quote(name)


# --------------------------------------------------------------------------------------------------------------------
# Parts


def _update(table: str, values: Mapping[str, str]) -> str:
    updates = ",\n    ".join(f"{spelled(column)} = {_wrapped(value)}" for column, value in values.items())
    return f"UPDATE {_table(table)}\nSET {updates}\nWHERE {BATCH}"


def _differing(shape: Shape, values: Mapping[str, str]) -> str:
    differs = "\n    OR ".join(f"{spelled(c)} IS DISTINCT FROM {_wrapped(value)}" for c, value in values.items())
    return f"SELECT {_names(shape.key)}\nFROM {_table(shape.table)}\nWHERE {BATCH}\n  AND ({differs})"


def _source(shape: Shape, values: Mapping[str, str]) -> str:
    """Select forward's values under the target's column names; only the source is in scope."""
    keys = _renamed(shape.key, shape.target_key)
    condition = f"\n  AND {_wrapped(shape.where)}" if shape.where else ""
    return _batch(shape, [*keys, *_values(values)]) + condition


def _batch(shape: Shape, columns: Sequence[str]) -> str:
    return f"SELECT {_lines(columns)}\nFROM {_table(shape.table)}\nWHERE {BATCH}"


def _target(shape: Shape, values: Mapping[str, str], keys: Sequence[str]) -> str:
    """Select back's values, and the key under the given names; only the target is in scope."""
    return f"SELECT {_lines([*_renamed(shape.target_key, keys), *_values(values)])}\nFROM {_table(shape.target)}"


def _touched(shape: Shape, source: str) -> str:
    if not shape.touch:
        return ""
    touched, first = shape.free("touched"), spelled(shape.key[0])
    update = (
        f"UPDATE {_table(shape.table)} AS {touched}\nSET {first} = {touched}.{first}\nFROM {source}\n"
        f"WHERE {_matching(touched, shape.key, source, shape.target_key)}"
    )
    return f",\n{shape.free('touch')} AS (\n{_indented(update)}\n)"


def _orphaned(shape: Shape) -> str:
    source = shape.free("source")
    outer = spelled(shape.target.rpartition(".")[2])
    condition = f" AND {_wrapped(shape.where)}" if shape.where else ""
    return (
        f"FROM {_table(shape.target)}\nWHERE {BATCH}\n  AND NOT EXISTS (\n"
        f"    SELECT FROM {_table(shape.table)} AS {source}\n"
        f"    WHERE {_matching(source, shape.key, outer, shape.target_key)}{condition}\n  )"
    )


def _values(values: Mapping[str, str]) -> list[str]:
    return [spelled(c) if value == c else f"{_wrapped(value)} AS {spelled(c)}" for c, value in values.items()]


def _renamed(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    pairs = zip(columns, names, strict=True)
    return [spelled(column) if column == name else f"{spelled(column)} AS {spelled(name)}" for column, name in pairs]


def _matching(one: str, columns: Sequence[str], other: str, others: Sequence[str] | None = None) -> str:
    pairs = zip(columns, others or columns, strict=True)
    return " AND ".join(f"{one}.{spelled(left)} = {other}.{spelled(right)}" for left, right in pairs)


def _stored(value: str, type_sql: str | None) -> str:
    """Round a value as its column does (numeric(10, 2), real, timestamp(0)), so that it can be compared."""
    return value if type_sql in _UNCHANGED else f"CAST({_wrapped(value)} AS {type_sql})"


def _wrapped(value: str) -> str:
    """Put an expression into parentheses; a comment at its end must not swallow the closing one."""
    if _PLAIN.match(value):
        return value
    return f"({value}\n)" if "--" in value else f"({value})"


def _indented(sql: str) -> str:
    """Indent every line that does not begin inside a literal."""
    return "    " + "".join(text if literal else text.replace("\n", "\n    ") for text, literal in pieces(sql))


def _lines(columns: Iterable[str]) -> str:
    return ",\n       ".join(columns)


def _names(columns: Iterable[str]) -> str:
    return ", ".join(spelled(column) for column in columns)


def _row(columns: Sequence[str]) -> str:
    return spelled(columns[0]) if len(columns) == 1 else f"({_names(columns)})"


def _table(name: str) -> str:
    return ".".join(spelled(part) for part in name.split("."))
