"""A flight: statements that travel together, so that no lock is held while the network is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Query", "Result", "current_settings", "set_settings"]


class Query(NamedTuple):
    """One statement and its parameters, written $1, $2, …"""

    sql: str
    params: Sequence[object] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """
    What one statement of a flight returned.

    Attributes:
        rows: in the server's order; empty for a statement that returns none.
        rowcount: rows returned or written; -1 when the statement has no count.
    """

    rows: list[tuple[Any, ...]]
    rowcount: int

    @property
    def value(self) -> Any:  # noqa: ANN401 - whatever the caller selected
        """The first column of the first row; None without a row."""
        return self.rows[0][0] if self.rows else None


def set_settings(values: Mapping[str, str], *, local: bool = True) -> Query:
    """Set parameters, for this transaction alone unless not `local`."""
    calls = ", ".join(f"set_config(${n}, ${n + 1}, {local})" for n in range(1, 2 * len(values), 2))
    return Query(f"SELECT ARRAY[{calls}]", [x for pair in values.items() for x in pair])


def current_settings(names: Iterable[str]) -> Query:
    """Ask what parameters are, as one array in the order of the names."""
    named = list(names)
    return Query(f"SELECT ARRAY[{', '.join(f'current_setting(${n})' for n in range(1, len(named) + 1))}]", named)
