"""
Laps: how a move leaves a table nearly as small as it was.

A new version of a row goes where there is room. In a full page there is none: row after row goes to the end of the
table, each with a new entry in every index, and when all are moved, table and indexes have doubled. Yet once some rows
have left a page there is room in it: the server takes their dead versions away as soon as nobody sees them, and the
next version of a neighbour stays in the page and needs no new entry in any index (a HOT update).

So keys are walked in stretches, and each stretch in several laps: a lap moves the rows that a hash of their key gives
to it, spread over all pages. The first lap makes the room in which those behind it stay. Where a table has no index but
its key, a new version costs as much at its end as in its page, and to pass rows several times costs more: such a table
is walked once, as is one with an index on what is written, for there no update is HOT. And where rows do not lie in the
order of the key, neighbours in a page are moved at different times anyhow, while each lap would have to read the pages
of its stretch, which lie all over the table, again.

Pure: positions in, positions and SQL out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from shardmig.keyset import table
from shardmig.plan import quote
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.keyset import Key
    from shardmig.plan import Move

__all__ = ["FEW_ROWS", "LAPS", "STRETCH_ROWS", "Lap", "looks"]

LAPS = 4
"""
Laps over a stretch, a power of two: one row in so many finds no room. With three indexes beside the key four laps take
a third less of the server's time than one walk, eight take no less than that: rows are passed too often.
"""

STRETCH_ROWS = 65_536
"""
Rows of a stretch: some MB, which stay in memory from lap to lap; and at 100,000 rows a second a lap is a tenth of a
second behind the one before it, which is longer than most transactions that still see what is dead.
"""

FEW_ROWS = 20_000
"""Fewer rows, by statistics, are walked once: it matters little by how much so small a table grows."""


class _Head(NamedTuple):
    number: int
    of: int
    left: int


@dataclass(frozen=True, slots=True)
class Lap:
    """
    Where a move stands within a stretch of keys, which begins behind the step's cursor.

    Attributes:
        number: of the lap, from 0.
        of: how many there are.
        left: rows of the stretch that are not counted as moved yet.
        end: last key of the stretch.
        at: last key passed in this lap; None at its beginning.
    """

    number: int
    of: int
    left: int
    end: Key
    at: Key | None = None

    @property
    def last(self) -> bool:
        """Whether all rows that this lap passes are moved then."""
        return self.number + 1 == self.of

    def share(self, passed: int, upto: Key) -> int:
        """Say how many of the rows that are passed up to a key this lap moves: about, but of a stretch exactly."""
        if self.last and upto == self.end:
            return self.left
        return min((passed + self.number) // self.of, self.left)

    def reached(self, key: Key, rows: int) -> Lap | None:
        """Return where the move stands when this lap has moved `rows` up to a key; None: the stretch is done."""
        if key != self.end:
            return replace(self, at=key, left=self.left - rows)
        return None if self.last else replace(self, number=self.number + 1, at=None, left=self.left - rows)

    def condition(self, key: Sequence[str], alias: str | None) -> str:
        """Write which rows are this lap's: it hangs on the key alone, so a row is in one lap whoever else writes it."""
        return f"({_hash(key, alias)}) & {self.of - 1} = {self.number}"

    def written(self) -> Key:
        """Write it as the ledger keeps it."""
        return [str(self.number), str(self.of), str(self.left), *self.end, *(self.at or ())]

    @classmethod
    def read(cls, written: Key | None, move: Move) -> Lap | None:
        """Read what `written` wrote; None between two stretches."""
        if written is None:
            return None
        head, keys = _Head(*map(int, written[:3])), written[3:]
        width = len(move.key)
        return cls(*head, end=keys[:width], at=keys[width:] or None)


def looks(move: Move, written: Sequence[str], rows: int | None) -> list[Query]:
    """
    Ask whether a move is worth laps.

    It is where it updates many rows, which lie in the order of their key, of a table with indexes, none of them on what
    is written.

    Returns:
        Queries for one flight, the last of which answers with a boolean; none where the answer is no. The server
        refuses the first one (`undefined_function`) if the key has no hash.
    """
    if move.target is not None or move.seed or rows is None or rows < FEW_ROWS:
        return []
    name = table(move.table)
    hashed = Query(f"SELECT {_hash(move.key, 'walked')} FROM {name} AS walked LIMIT 1")
    return [hashed, Query(_WORTH, (name, list(written), move.key[0], _IN_ORDER))]


_IN_ORDER = 0.9  # correlation of the key's first column and the place of its row, by statistics

_WORTH = """
SELECT count(*) > 0 AND NOT bool_or(string_to_array(i.indkey::text, ' ')::int2[] && ARRAY(
    SELECT attnum FROM pg_attribute WHERE attrelid = i.indrelid AND attname = ANY ($2::text[])))
    AND EXISTS (SELECT FROM pg_stats s JOIN pg_namespace n ON n.nspname = s.schemaname JOIN pg_class c
            ON c.relnamespace = n.oid AND c.relname = s.tablename
        WHERE c.oid = $1::text::regclass AND s.attname = $3 AND abs(s.correlation) >= $4)
FROM pg_index i WHERE i.indrelid = $1::text::regclass AND NOT i.indisprimary"""


def _hash(key: Sequence[str], alias: str | None) -> str:
    # Of each column's own type, as text would hang on the session's DateStyle; an array's hash is known since ever.
    qualified = [(f"{quote(alias)}." if alias else "") + quote(column) for column in key]
    hashes = [f"hash_array(ARRAY[{column}])" for column in qualified]
    # Hashed once more: an array of two equal ones hashes to a multiple of 32 and a constant, all in one lap.
    return hashes[0] if len(hashes) == 1 else f"hashint4(hash_array(ARRAY[{', '.join(hashes)}]))"
