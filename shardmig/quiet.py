"""
Whether a shard is quiet enough for the express way: asked along with the preflight, and judged here.

Every table to be locked is held by no old transaction, and no event trigger may do anything to it; where rows are to be
moved, they are a handful, and nothing makes the move rest. What changes between this look and the flight is found by
the flight itself, but for the server's load: it is looked at once a second, for all its shards, and a handful of rows
is what a move writes between two looks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from shardmig.flight import set_settings
from shardmig.load import load_of, load_query
from shardmig.pace import Brakes
from shardmig.plan import quote_name
from shardmig.rest import arranged
from shardmig.session import Query
from shardmig.states import State
from shardmig.window import Window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardmig.config import Config, Pace
    from shardmig.findings import Table
    from shardmig.hosts import Host
    from shardmig.pace import Load
    from shardmig.plan import Move
    from shardmig.preflight import Ready
    from shardmig.session import Session
    from shardmig.todo import Todo

__all__ = ["Quiet", "QuietTable", "proof", "questions", "read", "still_asked"]

_LOOK_S = 1.0  # between two looks at a server, as in a move
_PAGES = 64  # of a table with a handful of rows, dead ones included: read from end to end several times


class QuietTable(NamedTuple):
    """
    An ordinary table that no old transaction holds.

    Attributes:
        address: its name as regclass reads it.
        oid: which it is.
        columns: how many it has had so far, dropped ones included.
        file: where its rows are; a rewrite changes that.
    """

    address: str
    oid: int
    columns: int
    file: int


class Quiet(NamedTuple):
    """
    What was found.

    Attributes:
        tables: those to be locked, by name.
        handfuls: revisions whose moves may travel with the flight.
        rows_max: rows of a handful.
    """

    tables: Mapping[str, QuietTable]
    handfuls: frozenset[str]
    rows_max: int


def questions(session: Session, todo: Sequence[Todo], config: Config, host: Host | None) -> list[Query]:
    """Ask, as the last part of another flight."""
    moves, owner, names = _moves(todo, config), session.settings.owner, _locked(todo)
    places = ", ".join(f"to_regclass(${n})" for n in range(2, 2 + len(names)))
    held = Query(_HELD.format(names=places), [f"{session.settings.old_holder_ms} ms", *map(quote_name, names)])
    asked = [*([held] if names else []), *(Query(_SIZE, [quote_name(name)]) for name in _sources(moves))]
    if not moves or _is_calm(config.pace, host):
        return asked
    return [*asked, *([set_settings({"role": "none"})] if owner else []), load_query(moves)]


def still_asked(asked: Sequence[Query], host: Host) -> list[Query]:
    """Leave out of what another shard was asked what need not be asked now: the load of a server just looked at."""
    unasked = load_query([]).sql if host.calm_until_s > time.monotonic() else None
    return [query for query in asked if query.sql != unasked]


def read(todo: Sequence[Todo], config: Config, host: Host | None, ready: Ready) -> Quiet | None:
    """Read what `questions` asked; None when a table to be locked is not quiet, or no ordinary table."""
    moves, locked, found = _moves(todo, config), _locked(todo), ready.findings.tables
    answers = iter(ready.answers)
    held = {oid for (oid,) in next(answers).rows} if locked else set()
    pages = {name: _pages(*next(answers).rows[0]) for name in _sources(moves)}
    if (locked and ready.findings.server.triggered) or any(
        name not in found or not _is_ordinary(found[name]) or found[name].oid in held for name in locked
    ):
        return None
    of_load = list(answers)  # none where the server was calm when it was asked; that may be over by now
    rests = bool(of_load) and _rests(config.pace, host, load_of(of_load[-1]))
    small = {name for name in pages if _is_small(found.get(name), pages[name], config.pace.batch_rows)}
    handfuls = frozenset(
        item.plan.revision
        for item in _walking(todo, config)
        if not item.plan.moves or (not rests and all(move.table in small for _, move in item.plan.moves))
    )
    tables = {
        name: QuietTable(quote_name(name), found[name].oid, found[name].columns, found[name].file) for name in locked
    }
    return Quiet(tables, handfuls, config.pace.batch_rows)


def _pages(size: int | None, block_size: str) -> int | None:
    return None if size is None else size // int(block_size)


def _is_ordinary(table: Table) -> bool:
    return table.kind == "r" and not table.parent


def _is_small(table: Table | None, pages: int | None, rows_max: int) -> bool:
    """Say whether a table is a handful, by its statistics, if it has any; one to be made is as the flight makes it."""
    if table is None or pages is None:
        return table is None
    known = table.known_pages > 0 and table.known_rows >= 0
    return (
        _is_ordinary(table)
        and pages <= _PAGES
        and (not known or table.known_rows / table.known_pages * pages <= rows_max)
    )


def _is_calm(pace: Pace, host: Host | None) -> bool:
    """Say whether the server was just looked at for another shard; the window is told by its clock, each time."""
    return pace.window is None and host is not None and host.calm_until_s > time.monotonic()


def _rests(pace: Pace, host: Host | None, load: Load) -> bool:
    """Say whether a move would have to rest now."""
    window = Window.parse(pace.window) if pace.window is not None else None
    if arranged(window, None, "", load.at_s) is not None or Brakes(pace).judge(load) is not None:
        return True
    if host is not None:
        host.calm_until_s = time.monotonic() + _LOOK_S
    return False


def _locked(todo: Sequence[Todo]) -> list[str]:
    names = {name for item in todo for number in item.statements for name in item.accepted.locked(number)}
    return sorted(names)


def _sources(moves: Sequence[Move]) -> list[str]:
    return sorted({move.table for move in moves})


def _walking(todo: Sequence[Todo], config: Config) -> list[Todo]:
    """
    List the plans that may go all the way to LIVE through DUAL.

    Limits that moves share with others, or that make them rest after a batch, are kept by the careful way.
    """
    pace, heavy_rows = config.pace, config.maintenance.heavy_rows
    limited = any(limit is not None for limit in (pace.max_rows_per_s, pace.host_rows_per_s, pace.host_moves))
    if limited or (heavy_rows is not None and heavy_rows < pace.batch_rows):
        return []
    return [
        item
        for item in todo
        if item.plan.has_move and item.target is State.LIVE and not any(move.seed for _, move in item.plan.moves)
    ]


def _moves(todo: Sequence[Todo], config: Config) -> list[Move]:
    return [move for item in _walking(todo, config) for _, move in item.plan.moves]


def proof(table: QuietTable) -> Query:
    """Refuse the transaction if it has taken anything from a table that was quiet before it; behind the change."""
    return Query(_PROOF, (table.address, table.oid, table.file, table.columns))


# --------------------------------------------------------------------------------------------------------------------
# SQL

# Whoever may not be seen, and every prepared transaction, counts as old.
_HELD = """
SELECT l.relation FROM pg_lock_status() AS l
WHERE l.relation = ANY (ARRAY[{names}]::oid[]) AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
  AND NOT EXISTS (SELECT FROM pg_stat_get_activity(coalesce(l.pid, 0)) AS a
                  WHERE clock_timestamp() - a.xact_start < $1::interval)
"""

_SIZE = "SELECT pg_relation_size(to_regclass($1)), current_setting('block_size')"

# Refused by dividing by zero: no function to call, and whoever reads the error is the careful way, which finds its own
# words. A column that is dropped, or changes its type, its default or its nullability, is a row of pg_attribute anew.
_PROOF = """
SELECT 1 / (
    EXISTS (SELECT FROM pg_class AS c
            WHERE c.oid = to_regclass($1::text) AND c.oid = $2::oid AND c.relfilenode = $3::oid)
    AND NOT EXISTS (SELECT FROM pg_attribute AS a
                    WHERE a.attrelid = $2::oid AND a.attnum BETWEEN 1 AND $4::int
                      AND a.xmin = pg_current_xact_id()::xid)
)::int
"""
