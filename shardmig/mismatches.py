"""
Rows that disagree, written to a file: the key of every one, where messages name the first twenty.

A range's keys are written as soon as the range was compared, so a table of which every row is wrong takes no more
memory than a sound one. The file is opened before any work begins: one that cannot be written stops nothing half way.
"""

from __future__ import annotations

import csv
import json
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shardmig.checks import Direction, Disagreement
    from shardmig.plan import AcceptedPlan, Move

__all__ = ["Mismatches", "exporting"]

_FACTS = ("shard", "flag", "table", "side")


class Mismatches:
    """
    A file of disagreeing rows, one line each: shard, flag, table, side and the row's key.

    The side says what is wrong: "new" (a row of the table walked, whose new representation is missing or differs),
    "old" (its old one does, while new counts), or "orphan" (a row of the second table whose source is gone).

    Attributes:
        path: where.
        rows: how many were written.
    """

    def __init__(self, path: Path, file: TextIO, moves: Sequence[Move]) -> None:
        self.path = path
        self.rows = 0
        self._file = file
        self._columns = list(dict.fromkeys(column for move in moves for column in (*move.key, *move.target_key)))
        self._csv = csv.writer(file) if path.suffix.lower() == ".csv" else None
        if self._csv:
            # Behind a prefix, for a key may have a column that is called "table".
            self._csv.writerow([*_FACTS, *(f"key_{column}" for column in self._columns)])
            file.flush()

    def add(self, shard: str, flag: str, move: Move, direction: Direction, found: Disagreement) -> None:
        """
        Write the rows of one range.

        Raises:
            ConfigError: the file cannot be written any more.
        """
        side = "new" if direction == "forward" else "old"
        orphans_in = move.target or move.table
        try:
            for key in found.differing:
                self._write((shard, flag, move.table, side), dict(zip(move.key, key, strict=True)))
            for key in found.orphaned:
                self._write((shard, flag, orphans_in, "orphan"), dict(zip(move.target_key, key, strict=True)))
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _write(self, facts: tuple[str, ...], key: dict[str, str]) -> None:
        if self._csv:
            self._csv.writerow([*facts, *(key.get(column, "") for column in self._columns)])
        else:
            line: dict[str, Any] = {**dict(zip(_FACTS, facts, strict=True)), "key": key}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.rows += 1


@contextmanager
def exporting(path: Path | None, plans: Sequence[AcceptedPlan]) -> Iterator[Mismatches | None]:
    """
    Open a file for the rows that disagree; what it held before is gone.

    Args:
        path: CSV if its name ends in .csv, else lines of JSON; None exports nothing.
        plans: whose moves may be checked: their key columns become the CSV's.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    moves = [move for accepted in plans for _, move in accepted.plan.moves]
    try:
        file = path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield Mismatches(path, file, moves)
    finally:
        with suppress(OSError):  # what a full disk did not take was refused by `add`, which left nothing unwritten
            file.close()


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--mismatches {path}: {error.strerror}; name a file that can be written")
