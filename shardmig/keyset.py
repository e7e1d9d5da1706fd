"""
Walking a table by its key: where a range of rows ends, found in the key's index and never by arithmetic on ids.

A range is half open, (after, upto]; a bound that is None is the table's own end. Keys travel as text, one element a
column, and are compared as what they are, in the order of their column. Pure: this module only writes SQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig.plan import bind_batch, quote, quote_name
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.plan import Move
    from shardmig.session import Result

__all__ = [
    "BY_INDEX",
    "Key",
    "Position",
    "Range",
    "batch_end",
    "bound",
    "either_end",
    "end_of",
    "extent",
    "last_key",
    "range_params",
    "table",
]

Key = list[str]
Range = tuple[Key | None, Key | None]
Position = tuple[Key | None, Key | None]  # of a move: its cursor, and its lap as the ledger keeps it

BY_INDEX = {"enable_hashjoin": "off", "enable_mergejoin": "off", "enable_seqscan": "off", "jit": "off"}
"""
Settings under which ranges are worked on.

A batch is a few rows of an index range, but the planner guesses a third of the table for a row comparison and would
hash whole tables for it, above all on a new table that nobody analyzed yet.
"""


def bound(
    sql: str, move: Move, after: Key | None, upto: Key | None, *, target: bool = False, only: str | None = None
) -> Query:
    """
    Bind one of a move's texts to a range: over the source's key, or over the target's for `orphans` and `purge`.

    `only` is one condition more, over the source's key.
    """
    key, alias = (move.target_key, None) if target else (move.key, move.alias)
    text = bind_batch(sql, key, lower=after is not None, upper=upto is not None, alias=alias, only=only)
    return Query(text, range_params(after, upto))


def range_params(after: Key | None, upto: Key | None) -> list[object]:
    """List the parameters of a range in the order that `bind_batch` numbers them."""
    return [*(after or ()), *(upto or ())]


def table(name: str) -> str:
    """Quote a table's name, schema included."""
    return quote_name(name)


def last_key(move: Move, *, offset: int = 0) -> Query:
    """Find the last key of the source, or the one `offset` rows before it, as text."""
    descending = _columns(move.key, " DESC")
    sql = f"SELECT {_columns(move.key, '::text')} FROM {table(move.table)} AS walked ORDER BY {descending}"
    return Query(f"{sql} OFFSET $1 LIMIT 1", [offset])


def extent(move: Move, rows_max: int) -> str:
    """Write a SELECT of one row: `rows` of the source, counted up to `rows_max`, and the `last` key as text[]."""
    walked, descending = f"FROM {table(move.table)} AS walked", _columns(move.key, " DESC")
    return (
        f"SELECT (SELECT count(*) FROM (SELECT {walked} LIMIT {rows_max}) AS counted) AS rows, "
        f"(SELECT ARRAY[{_columns(move.key, '::text')}] {walked} ORDER BY {descending} LIMIT 1) AS last"
    )


def batch_end(move: Move, after: Key | None, upto: Key | None, rows_max: int, *, target: bool = False) -> Query:
    """
    Find where a range of at most `rows_max` rows of the source, or of the target, ends; `end_of` reads the answer.

    The statement has one row: rows found, and the key of the last one as text…, NULL when the range holds fewer. Rows
    are counted only then, and one key becomes text, not all: the walk alone costs a fifth of that.
    """
    name, key = (move.target or move.table, move.target_key) if target else (move.table, move.key)
    where = bind_batch("{batch}", key, lower=after is not None, upper=upto is not None)
    params = [*range_params(after, upto), rows_max]
    rows, walked = f"${len(params)}::bigint", f"FROM {table(name)} AS walked WHERE {where}"
    last = f"SELECT {_columns(key)} {walked} ORDER BY {_columns(key)} OFFSET {rows} - 1 LIMIT 1"
    missing = f"walked.{quote(key[0])} IS NULL"  # columns of a key never are
    return Query(
        f"SELECT CASE WHEN {missing} THEN (SELECT count(*) {walked}) ELSE {rows} END, "
        f"{_columns(key, '::text')} FROM (VALUES (1)) AS one LEFT JOIN ({last}) AS walked ON true",
        params,
    )


def end_of(found: Result) -> tuple[int, Key | None]:
    """Read what `batch_end` returned: rows in the range, and the key of its last one unless they are too few."""
    [(rows, *last)] = found.rows
    return int(rows), None if last[0] is None else [str(part) for part in last]


def either_end(move: Move, after: Key | None, upto: Key | None, *, rows_max: int, target: bool) -> Query:
    """
    Find the first key at which `rows_max` rows of the source, or as many of the target, lie in the range.

    A gap of the source may hold any number of target rows (dead values of a move that was given up); bounding both
    keeps every range small. One row with the key as text…, or none when the range holds less than that of each.
    """
    params = [*range_params(after, upto), rows_max - 1]
    ends = [_nth(table(move.table), move.key, move.key, after, upto)]
    if target and move.target is not None:
        ends.append(_nth(table(move.target), move.target_key, move.key, after, upto))
    order = _columns(move.key)
    found = " UNION ALL ".join(f"({end} OFFSET ${len(params)} LIMIT 1)" for end in ends)
    return Query(f"SELECT {_columns(move.key, '::text')} FROM ({found}) AS walked ORDER BY {order} LIMIT 1", params)


def _nth(name: str, key: Sequence[str], names: Sequence[str], after: Key | None, upto: Key | None) -> str:
    where = bind_batch("{batch}", tuple(key), lower=after is not None, upper=upto is not None)
    named = ", ".join(f"walked.{quote(c)} AS {quote(n)}" for c, n in zip(key, names, strict=True))
    return f"SELECT {named} FROM {name} AS walked WHERE {where} ORDER BY {_columns(key)}"


def _columns(key: Sequence[str], suffix: str = "") -> str:
    # Qualified: in ORDER BY a bare name would mean the output column, which is the key's text, in another order.
    return ", ".join(f"walked.{quote(column)}{suffix}" for column in key)
