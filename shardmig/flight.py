"""
A flight: statements that travel together, so that no lock is held while the network is waited for.

They leave in one message of libpq's pipeline. Psycopg's own pipeline sends each statement by itself, and a server that
is woken for each, and a client that asks each time whether it may write, cost more than the statements.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg import errors
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.waiting import Ready, Wait

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from psycopg import AsyncConnection, abc
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn, PGresult

__all__ = ["Query", "Result", "current_settings", "fly", "refuse_nothing", "refuse_rows", "set_settings"]


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
        names: of the columns.
    """

    rows: list[tuple[Any, ...]]
    rowcount: int
    names: tuple[str, ...] = ()

    @property
    def value(self) -> Any:  # noqa: ANN401 - whatever the caller selected
        """The first column of the first row; None without a row."""
        return self.rows[0][0] if self.rows else None


class _Message(NamedTuple):
    """A query as libpq takes it; with a name when its text comes several times, and then `begins` the first of them."""

    sql: bytes
    params: Sequence[Any]
    types: Sequence[int]
    formats: Sequence[int]
    name: bytes = b""
    begins: bool = False


async def fly(
    connection: AsyncConnection[Any],
    queries: Sequence[Query],
    *,
    done: list[Query],
    named: bool = False,
    repeats: bool = False,
) -> list[Result]:
    """
    Send statements in one message and wait for all answers.

    Args:
        connection: in autocommit mode; nobody else uses it meanwhile.
        queries: the statements; the extended protocol refuses a second one hidden in a text.
        done: where the statements are put that the server has executed; after an error, those before the refused one.
        named: whether the names of the columns are wanted.
        repeats: whether the server reads a text that comes several times with parameters only once. It keeps that
            until the connection ends, and plans by its `plan_cache_mode`.

    Returns:
        An answer for each statement. What came before an error is not read: rolled back with it are, maybe, the
        settings that say how to read a time.

    Raises:
        psycopg.Error: the first one; the statements behind it were not executed.
        asyncio.CancelledError: the server is told to stop, and the connection is closed: nobody heard how far it came.
    """
    transformer, pgconn = Transformer.from_context(connection), connection.pgconn
    messages = [_message(query, transformer) for query in queries]
    messages = _read_once(messages) if repeats else messages
    are_results = [part for message in messages for part in ((False, True) if message.begins else (True,))]
    answers: list[PGresult] = []
    fine: list[PGresult] = []
    async with connection.lock:
        pgconn.enter_pipeline_mode()
        try:
            await connection.wait(_exchange(pgconn, messages, answers))
        except asyncio.CancelledError:
            pgconn.finish()
            raise
        finally:
            _leave(pgconn)
            of_statements = zip(answers, are_results, strict=False)
            fine += [answer for answer, is_result in of_statements if is_result and answer.status in _FINE]
            done += queries[: len(fine)]
    for answer in answers:
        if answer.status not in _FINE:
            raise errors.error_from_result(answer, connection.info.encoding)
    if len(answers) < len(are_results):
        raise errors.OperationalError("the server closed the connection")
    return [_result(answer, transformer, named=named) for answer in fine]


_FINE = frozenset({ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.EMPTY_QUERY})


def _message(query: Query, transformer: abc.Transformer) -> _Message:
    params = transformer.dump_sequence(query.params, [PyFormat.AUTO] * len(query.params))
    # 3.2 takes no other sequence of formats than a list
    return _Message(query.sql.encode(), params, transformer.types or (), transformer.formats or [])


def _read_once(messages: Sequence[_Message]) -> list[_Message]:
    """Name the messages whose text, with parameters of the same types, comes several times."""
    times = Counter((message.sql, *message.types) for message in messages if message.params)
    names: dict[tuple[object, ...], bytes] = {}
    found = []
    for message in messages:
        read = (message.sql, *message.types)
        begins = read not in names
        if times[read] > 1:
            name = names.setdefault(read, f"shardmig_{next(_names)}".encode())
            found.append(message._replace(name=name, begins=begins))
        else:
            found.append(message)
    return found


_names = count(1)  # of prepared statements: another flight on the same connection has other ones


def _exchange(
    pgconn: PGconn,
    messages: Sequence[_Message],
    answers: list[PGresult],
) -> PQGen[None]:
    """Send, and collect answers up to the Sync; one of psycopg's generators, which its connection waits for."""
    for message in messages:
        _send(pgconn, message)
    pgconn.pipeline_sync()
    unsent = pgconn.flush()
    while True:
        ready: Ready | int | None = yield Wait.RW if unsent else Wait.R
        if ready is None:  # begun anew: the wait was cancelled, and psycopg has told the server so
            return
        if ready & Ready.R:
            try:
                pgconn.consume_input()
            except errors.OperationalError:
                if any(answer.status not in _FINE for answer in answers):
                    return  # the server said why before it went
                raise
            if _collect(pgconn, answers):
                return
        if unsent and ready & Ready.W:
            unsent = pgconn.flush()


def _send(pgconn: PGconn, message: _Message) -> None:
    if message.begins:
        pgconn.send_prepare(message.name, message.sql, message.types)
    if message.name:
        pgconn.send_query_prepared(message.name, message.params, message.formats)
    else:
        pgconn.send_query_params(message.sql, message.params, message.types, message.formats)


def _collect(pgconn: PGconn, answers: list[PGresult]) -> bool:
    """Take the answers that have arrived; True at the Sync, or when the connection is gone and no more will come."""
    between = False
    while not pgconn.is_busy():
        answer = pgconn.get_result()
        if answer is None:
            if between:  # twice nothing: all that arrived is read
                return pgconn.status == ConnStatus.BAD
            between = True
            continue
        between = False
        if answer.status == ExecStatus.PIPELINE_SYNC:
            return True
        answers.append(answer)
    return False


def _leave(pgconn: PGconn) -> None:
    """End the pipeline; a connection on which answers are still to come is of no use any more."""
    if pgconn.status == ConnStatus.BAD:
        return
    try:
        pgconn.exit_pipeline_mode()
    except errors.OperationalError:
        pgconn.finish()


def _result(answer: PGresult, transformer: abc.Transformer, *, named: bool) -> Result:
    if answer.status != ExecStatus.TUPLES_OK:
        return Result([], -1 if answer.command_tuples is None else answer.command_tuples)
    transformer.set_pgresult(answer)
    names = tuple((answer.fname(n) or b"").decode() for n in range(answer.nfields)) if named else ()
    return Result(transformer.load_rows(0, answer.ntuples, tuple), answer.ntuples, names)


def set_settings(values: Mapping[str, str], *, local: bool = True) -> Query:
    """Set parameters, for this transaction alone unless not `local`."""
    calls = ", ".join(f"set_config(${n}, ${n + 1}, {local})" for n in range(1, 2 * len(values), 2))
    return Query(f"SELECT ARRAY[{calls}]", [x for pair in values.items() for x in pair])


def current_settings(names: Iterable[str]) -> Query:
    """Ask what parameters are, as one array in the order of the names."""
    named = list(names)
    return Query(f"SELECT ARRAY[{', '.join(f'current_setting(${n})' for n in range(1, len(named) + 1))}]", named)


def refuse_rows(query: Query) -> Query:
    """Refuse the transaction, and all that is behind it in the flight, if a query finds any row."""
    said = "  -- divides by zero on purpose: whoever waits and explains comes next"
    return Query(f"SELECT 1 / (NOT EXISTS (\n{query.sql}\n))::int{said}", query.params)


def refuse_nothing(query: Query) -> Query:
    """Refuse the transaction, and all that is behind it in the flight, if an UPDATE writes no row."""
    return Query(f"WITH written AS ({query.sql} RETURNING 1) SELECT 1 / count(*) FROM written", query.params)
