"""Foreign keys of new tables: which of them running releases would notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from shardmig import explanations as tell
from shardmig.wording import dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from shardmig.drafting import Explained
    from shardmig.wording import Key

__all__ = ["References", "blocks_delete", "referred"]

_KEEPS_DELETE = frozenset({"CASCADE", "SET NULL", "SET DEFAULT"})


class References:
    """
    Tells the foreign keys that a new table can have from those it cannot.

    Args:
        models: the tables of the models.
        there: the tables that exist.
        created: new tables, as they are added in their order; read, never changed.
        key: how schema and name become a key.
    """

    def __init__(
        self,
        models: Mapping[Key, sa.Table],
        there: Collection[Key],
        created: Collection[Key],
        key: Callable[[str | None, str], Key],
    ) -> None:
        self._models = models
        self._there = there
        self._created = created
        self._key = key
        self._cascading: set[Key] = set()  # new tables that lose rows when one in use does

    def sorted_out(
        self, key: Key, table: sa.Table
    ) -> tuple[list[tuple[list[str], Explained]], list[sa.ForeignKeyConstraint]]:
        """Return the keys that a table has to go without, by their columns, and those that it may have."""
        lost, kept = [], []
        # A table's keys to itself come last: whether they may block depends on the others.
        for fk in sorted(
            table.foreign_key_constraints, key=lambda fk: (self._key(*referred(fk)) == key, list(fk.column_keys))
        ):
            why = self._harm(key, fk)
            if why is None:
                kept.append(fk)
            else:
                lost.append(([column.name for column in fk.columns], _explained(dotted(key), fk, why)))
        return lost, kept

    def _harm(self, key: Key, fk: sa.ForeignKeyConstraint) -> str | None:
        """Say why a new table cannot have a foreign key; None when it can."""
        target = self._key(*referred(fk))
        itself = target == key
        if not itself and (fk.use_alter or (target not in self._created and target not in self._there)):
            return _NOT_THERE
        if target in self._models and not _is_unique(self._models[target], fk):
            return _NOT_UNIQUE
        if target not in self._there and target not in self._cascading:
            return None
        action = (fk.ondelete or "").upper()
        fails = action == "SET NULL" and not all(column.nullable for column in fk.columns)
        if fails or action not in _KEEPS_DELETE:
            return _DELETE_FAILS
        if action == "CASCADE":
            self._cascading.add(key)
        return None


def referred(fk: sa.ForeignKeyConstraint) -> Key:
    """Return schema and table that a foreign key names; the table itself may be missing."""
    parts = fk.elements[0].target_fullname.split(".")[:-1]
    return (parts[-2] if len(parts) > 1 else None, parts[-1])


def blocks_delete(table: str, fk: sa.ForeignKeyConstraint) -> Explained:
    """Explain a foreign key that the linter takes for one that blocks DELETE."""
    return _explained(table, fk, _DELETE_FAILS)


def _explained(table: str, fk: sa.ForeignKeyConstraint, why: str) -> Explained:
    columns = ", ".join(column.name for column in fk.columns)
    return tell.lost_key(table, columns, _target(fk), why.format(_target(fk)))


def _is_unique(target: sa.Table, fk: sa.ForeignKeyConstraint) -> bool:
    """Whether the columns that a foreign key names are a key of their table when it is created."""
    named = {element.target_fullname.rpartition(".")[2] for element in fk.elements}
    keys = [one for one in target.constraints if isinstance(one, sa.UniqueConstraint | sa.PrimaryKeyConstraint)]
    return any({column.name for column in key.columns} == named for key in keys)


def _target(fk: sa.ForeignKeyConstraint) -> str:
    columns = ", ".join(element.target_fullname.rpartition(".")[2] for element in fk.elements)
    return f"{dotted(referred(fk))} ({columns})"


_NOT_THERE = (
    "{0} is not there yet when the table is created (a circle of references, or a table that is left out), and "
    "adding the key later would scan and lock. The application keeps the rule."
)
_NOT_UNIQUE = (
    "PostgreSQL refuses it: no primary key or unique constraint of the models covers {0}. Say unique=True there, and a "
    "new table is created with the key; or let the application keep the rule."
)
_DELETE_FAILS = (
    'DELETE on {0} by running releases would fail as soon as a row here points there. Say ondelete="CASCADE" in the '
    'model, or "SET NULL" on a nullable column, and the table is created with it; or let the application keep the rule.'
)
