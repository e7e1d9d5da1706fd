"""
The express way of a shard on which nothing stands in the way: turn, plans, structure and flips leave in one flight.

A flight of several transactions: each one commits what it did together with its record, in the order and under the
fences of the careful way (`runner`), and the first that is refused leaves the rest unrun. Whatever it is that refuses
(a lock that is not there at once, the proof, a statement, a lost connection), the careful way then goes on from what is
recorded: it looks at each step, waits, proves in full and says why. So nothing here tries again, and nothing explains.

It is for shards behind a canary, which has proved the same statements in full (`catalog.additive`). Here a locked table
is proved by what any loss would leave behind: another file, or an old column's row written anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from psycopg import errors as pg

from shardmig.errors import ShardUnreachable
from shardmig.events import FlagSwitched, StepDone, StepStarted, Waiting
from shardmig.ledger import os_user
from shardmig.plan import Switch, quote_name
from shardmig.records import flags_of, flags_query
from shardmig.session import Query, is_connection_lost
from shardmig.states import State
from shardmig.steps import in_doubt
from shardmig.structure import recorded
from shardmig.turn import Turn, begin_migration, finish_migration

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardmig.config import SessionSettings
    from shardmig.events import Listener
    from shardmig.plan import Plan
    from shardmig.records import FlagRow, Records
    from shardmig.session import Result, Session
    from shardmig.todo import Todo

__all__ = ["Arrival", "QuietTable", "fits", "proof", "questions", "quiet_tables", "travel"]


# Nothing that only adds takes this long; what does (a type edited by hand makes it a rewrite) makes nobody wait longer.
_STATEMENT_MS = 1000


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


@dataclass(frozen=True, slots=True)
class Arrival:
    """
    What a flight has done: it is all committed.

    Attributes:
        turn: taken in it; ended in it, if nothing is left.
        flags: as they are now, by name; not asked for, if nothing is left.
        left: plans whose rows are to be moved; their structure is there.
        taken: flags that are LIVE now.
    """

    turn: Turn
    flags: dict[str, FlagRow]
    left: tuple[Todo, ...]
    taken: tuple[str, ...]


def fits(todo: Sequence[Todo], records: Records) -> bool:
    """Say whether plans may go the express way: the shard serves, nothing is begun, all of it fits transactions."""
    return not records.maintenance and all(
        item.plan.online and not item.accepted.indexes and item.plan.revision not in records.migrations for item in todo
    )


def questions(todo: Sequence[Todo], settings: SessionSettings) -> list[Query]:
    """Ask whether the tables to be locked are quiet, as part of another flight."""
    names = _locked(todo)
    return [Query(_QUIET, [names, settings.old_holder_ms])] if names else []


def quiet_tables(todo: Sequence[Todo], answers: Sequence[Result]) -> dict[str, QuietTable] | None:
    """Read what `questions` asked: tables by address; None when one of them is not quiet, or no ordinary table."""
    tables = {row[0]: QuietTable(*row) for answer in answers for row in answer.rows}
    return tables if len(tables) == len(_locked(todo)) else None


async def travel(
    session: Session,
    todo: Sequence[Todo],
    records: Records,
    tables: Mapping[str, QuietTable],
    *,
    positions: Mapping[str, int],
    reason: str | None,
    listener: Listener | None,
) -> Arrival | None:
    """
    Take the turn and do what needs no waiting, in one flight.

    Args:
        session: on the shard, holding its runner lock.
        todo: what `fits`.
        records: just read.
        tables: every table that is locked, just found quiet.
        positions: of the revisions in the history.
        reason: for the log.
        listener: told what was done.

    Returns:
        None when something was refused; what committed before that is recorded, and the careful way goes on.

    Raises:
        InDoubt: the connection broke, and the server does not come back.
    """
    started = time.monotonic()
    turn = Turn(session, records.term + 1)
    last = all(not item.plan.has_move for item in todo)
    beginning = [
        query
        for item in todo
        for query in begin_migration(turn.shard, item.plan, position=positions[item.plan.revision], term=turn.term)
    ]
    flight = [
        *_transactions(
            turn, [turn.taking(ends=last), turn.hold(), *beginning], todo, tables, _ending(turn, todo, reason)
        ),
        *([] if last else [flags_query(records.shard)]),
    ]
    _tell_start(listener, turn.shard, todo)
    try:
        results = await session.flight(flight)
    except pg.Error as error:
        if session.connection.broken or is_connection_lost(error):
            if listener:
                listener(Waiting(records.shard, "the connection was lost"))
            await _come_back(session, error)
        else:
            await session.roll_back()
        return None
    _tell_end(listener, turn.shard, todo, time.monotonic() - started)
    left = tuple(replace(item, statements=()) for item in todo if item.plan.has_move)
    return Arrival(turn, {} if last else flags_of(results[-1]), left, tuple(_taken(todo)))


def _transactions(
    turn: Turn, beginning: list[Query], todo: Sequence[Todo], tables: Mapping[str, QuietTable], ending: list[Query]
) -> Iterator[Query]:
    """
    Line up what commits together.

    Statements that lock nothing that exists go with what is before them or after them, each of the others alone.
    """
    free = beginning
    for item in todo:
        for number in item.statements:
            done = recorded(turn, item.accepted, number)
            if number not in item.accepted.locks:
                free += done
                continue
            yield from _transaction(free)
            free = []
            proofs = [proof(tables[address]) for address in map(quote_name, item.accepted.locked(number))]
            record, *statements = done
            limits = {"lock_timeout": turn.session.settings.lock_timeout_ms[0], "statement_timeout": _STATEMENT_MS}
            limited = ", ".join([record.sql, *(f"set_config('{name}', '{ms}ms', true)" for name, ms in limits.items())])
            yield from _transaction([Query(limited, record.params), *statements, *proofs])
    yield from _transaction([*free, *ending])


def _transaction(queries: Sequence[Query]) -> Iterator[Query]:
    if queries:
        yield Query("BEGIN")
        yield from queries
        yield Query("COMMIT")


def _ending(turn: Turn, todo: Sequence[Todo], reason: str | None) -> list[Query]:
    """Take the flags of plans that move nothing where they shall be; the others have a way to go."""
    queries = []
    for item in todo:
        if item.plan.has_move:
            continue
        if item.target is State.LIVE:
            queries += [
                Query(_TAKE_EDGE, (turn.shard, item.plan.flag, int(State.LIVE))),
                turn.record_switches(item.plan.revision, _switches(item.plan)),
            ]
        else:
            queries.append(finish_migration(turn.shard, item.plan.revision))
    hold = turn.hold()
    said = "set_config('shardmig.reason', $3, true), set_config('shardmig.os_user', $4, true)"
    return [Query(f"{hold.sql}, {said}", [*hold.params, reason or "", os_user()]), *queries] if queries else []


def _taken(todo: Sequence[Todo]) -> Iterator[str]:
    return (item.plan.flag for item in todo if item.target is State.LIVE and not item.plan.has_move)


def _switches(plan: Plan) -> list[int]:
    return [number for number, step in enumerate(plan.steps, 1) if isinstance(step, Switch) and step.to is State.LIVE]


def proof(table: QuietTable) -> Query:
    """Refuse the transaction if it has taken anything from a table that was quiet before it; behind the change."""
    return Query(_PROOF, (table.address, table.oid, table.file, table.columns))


def _tell_start(listener: Listener | None, shard: str, todo: Sequence[Todo]) -> None:
    if listener is None:
        return
    for item in todo:
        for number in item.statements:
            listener(StepStarted(shard, item.plan.revision, number, "statement"))


def _tell_end(listener: Listener | None, shard: str, todo: Sequence[Todo], seconds: float) -> None:
    if listener is None:
        return
    for item in todo:
        for number in item.statements:
            listener(StepDone(shard, item.plan.revision, number, seconds))
        if item.target is State.LIVE and not item.plan.has_move:
            listener(FlagSwitched(shard, item.plan.flag, State.OLD, State.LIVE))


async def _come_back(session: Session, lost: Exception) -> None:
    """Reconnect; where that fails, nobody knows how far the flight came."""
    try:
        await session.reconnect()
    except ShardUnreachable as gone:
        raise in_doubt(gone, session.shard.name) from lost


def _locked(todo: Sequence[Todo]) -> list[str]:
    return sorted(
        {
            quote_name(name)
            for item in todo
            for number in item.statements
            for name in item.accepted.locked(number)
        }
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# SQL

# Whoever may not be seen, and every prepared transaction, counts as old. An event trigger may do anything to the table.
_QUIET = """
SELECT asked.address, c.oid, c.relnatts, c.relfilenode
FROM unnest($1::text[]) AS asked (address) JOIN pg_class AS c ON c.oid = to_regclass(asked.address)
WHERE c.relkind = 'r' AND NOT c.relhassubclass
  AND NOT EXISTS (SELECT FROM pg_event_trigger AS e WHERE e.evtenabled <> 'D')
  AND NOT EXISTS (
      SELECT FROM pg_locks AS l LEFT JOIN LATERAL pg_stat_get_activity(coalesce(l.pid, 0)) AS a ON true
      WHERE l.relation = c.oid AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
        AND coalesce(clock_timestamp() - a.xact_start >= $2::int * interval '1 ms', true))
"""

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

# The flag was begun in the same flight: nobody can have switched it before its structure was there.
_TAKE_EDGE = """
SELECT shardmig.take_edge(f.shard, f.flag, 0, $3::int, f.epoch) FROM shardmig.flag AS f
WHERE f.shard = $1 AND f.flag = $2
"""
