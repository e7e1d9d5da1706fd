"""Guesses which new column or table takes the place of one that is gone: by type and key, then by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import sqlalchemy as sa

    from shardmig.wording import Column, Wording

__all__ = ["column_successors", "table_successor"]

_ALIKE = 0.5  # similarity of two names of the same type, above which one may follow the other
_MUCH_ALIKE = 0.75  # … of different types
_SHARED = 0.6  # part of a table's columns that its successor has too


def column_successors(
    gone: Iterable[str], there: Mapping[str, Column], fresh: Mapping[str, Column]
) -> dict[str, tuple[str, str, str]]:
    """
    Guess for columns that are gone which new one follows.

    Returns:
        Column gone → its successor, and the expressions that make new from old and old from new.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for name in gone:
        taken = {successor for successor, *_ in found.values()}
        best = _best(name, there[name].type, {new: facts for new, facts in fresh.items() if new not in taken})
        if best is not None:
            old, new = there[name].type, fresh[best].type
            casts = ("", "") if old == new else (f"::{new}", f"::{old}")
            found[name] = best, f"{name}{casts[0]}", f"{best}{casts[1]}"
    return found


def _best(gone: str, kind: str, free: Mapping[str, Column]) -> str | None:
    same = [name for name, facts in free.items() if facts.type == kind]
    best = max(same or free, key=lambda name: _similarity(name, gone), default=None)
    enough = 0.0 if len(same) == 1 else _ALIKE if same else _MUCH_ALIKE
    return best if best is not None and _similarity(best, gone) >= enough else None


def table_successor(
    old: Wording, created: Mapping[str, sa.Table]
) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    """Find the new table that has the key and most of the columns of one that is gone: name, key, shared columns."""
    best: tuple[float, str] | None = None
    for name, table in created.items():
        keys = tuple(column.name for column in table.primary_key.columns)
        share = len({column.name for column in table.columns} & set(old.columns)) / max(len(old.columns), 1)
        if keys and keys == old.primary_key and share >= _SHARED and (best is None or share > best[0]):
            best = share, name
    if best is None:
        return None
    names = [column.name for column in created[best[1]].columns]
    shared = tuple(name for name in names if name in old.columns and name not in old.primary_key)
    return (best[1], old.primary_key, shared) if shared else None


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
