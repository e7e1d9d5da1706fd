"""Whether a table can be walked by a key, and what to do where it cannot: told from its columns and indexes. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["key_problems", "unwalked"]


def key_problems(
    table: str, key: Sequence[str], *, columns: Mapping[str, bool], unique: Sequence[Sequence[str]]
) -> Iterator[str]:
    """
    Say why rows cannot be moved by a key, and which one would do.

    Args:
        table: its name.
        key: the columns that the script names, or those of the primary key that it knows.
        columns: column → whether it is NOT NULL.
        unique: columns of each unique index that holds for all rows at once.
    """
    if nullable := [column for column in key if columns.get(column) is False]:
        harm = f"key {', '.join(nullable)} of {table} may be NULL: such rows would be left behind"
        yield f"{harm}; {_cure(table, columns, unique)}"
    if not any(set(known) <= set(key) for known in unique):
        harm = f"({', '.join(key)}) is not unique in {table}: rows would be skipped"
        yield f"{harm}; {_cure(table, columns, unique)}"


def unwalked(table: str, key: Sequence[str]) -> str:
    """Say what is slow about a key whose index has another order."""
    index = f'op.create_index("{_plain(table)}_walk", "{table}", [{_listed(key)}], postgresql_concurrently=True)'
    named = ", ".join(key)
    return f"no btree index of {table} begins with ({named}): each batch sorts the table; in an earlier script {index}"


def _cure(table: str, columns: Mapping[str, bool], unique: Sequence[Sequence[str]]) -> str:
    """Say which key the table has, or how it gets one."""
    if usable := [known for known in unique if all(columns.get(column) for column in known)]:
        return "name another: " + " or ".join(f"key=({_tuple(known)})" for known in usable)
    if unique:
        first = unique[0]
        loose = ", ".join(f"ALTER COLUMN {column} SET NOT NULL" for column in first if not columns.get(column))
        return (
            f"it has no other key: ({', '.join(first)}) is unique but may be NULL. If no row has NULL there and no "
            f"release writes it, ALTER TABLE {table} {loose}, behind a validated CHECK (… IS NOT NULL) so that no row "
            f"is read under the lock, and key=({_tuple(first)}). Otherwise give the table a key of its own: "
            f"{_own(table)}"
        )
    strict = ", ".join(column for column, is_strict in columns.items() if is_strict) or "none here"
    return (
        f"it has no other key. Where some NOT NULL columns ({strict}) are unique together in fact, build the index by "
        f"hand: CREATE UNIQUE INDEX CONCURRENTLY {_plain(table)}_key ON {table} (…), and name them as key=. Where none "
        f"are, give the table a key of its own: {_own(table)}"
    )


def _own(table: str) -> str:
    return (
        f"in `shardmig maintenance`, ALTER TABLE {table} ADD COLUMN row_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY "
        'KEY rewrites the table and locks it meanwhile; then key=("row_id",)'
    )


def _plain(table: str) -> str:
    return table.rpartition(".")[2]


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _tuple(columns: Sequence[str]) -> str:
    return _listed(columns) + ("," if len(columns) == 1 else "")
