"""What scripts say about tables: columns, types and keys, by the operations that created them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Column", "Table"]


@dataclass(frozen=True, slots=True)
class Column:
    """
    A column that a script added.

    Attributes:
        type_sql: its type as SQL; None when it has none.
        nullable: whether it may be NULL.
        always: whether it is GENERATED ALWAYS AS IDENTITY.
    """

    type_sql: str | None
    nullable: bool
    always: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """
    What scripts say about a table.

    Attributes:
        columns: columns by name; all of them if `created`, else only those that scripts added.
        primary_key: its columns in order; empty when it has none or nothing is known.
        uniques: sets of columns that are unique together, beside the primary key.
        created: whether a script created the table, so that `columns` and `primary_key` are complete.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    primary_key: tuple[str, ...] = ()
    uniques: tuple[frozenset[str], ...] = ()
    created: bool = False

    def after(self, before: Table | None) -> Table:
        """Put what a later call says behind what was known."""
        if self.created or before is None:
            return self
        return replace(before, columns={**before.columns, **self.columns})
