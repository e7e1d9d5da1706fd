"""
Every order in which the statements of a few transactions can run on a real server.

A schedule is a list of choices: who goes next among those who can. One that waits for a lock is out of the choice until
the server has granted it, so schedules that locks make impossible are not counted, and none is missed.
"""

from __future__ import annotations

import select
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from psycopg.pq import DiagnosticField, ExecStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import psycopg

    from shardmig.session import Query

__all__ = ["Actor", "Tally", "every_schedule"]

_GLANCE_S = 0.0003  # a statement that is not done by then may be waiting: the server is asked


class Actor:
    """
    One connection that runs one program, a statement at a time.

    Its program yields statements and is sent how many rows each one hit.

    Attributes:
        name: for the schedule.
        gives_way: it may be cancelled when everybody waits for everybody, and then begins again.
        isolation: of its transaction. One that fails with 40001 is over, and has left nothing.
    """

    def __init__(
        self,
        name: str,
        connection: psycopg.Connection[Any],
        program: Callable[[], Generator[Query | str, int, None]],
        *,
        gives_way: bool = False,
        isolation: str = "READ COMMITTED",
    ) -> None:
        self.name = name
        self.isolation = isolation
        self.gives_way = gives_way
        self._pgconn = connection.pgconn
        self._socket = connection.fileno()
        self.pid = connection.info.backend_pid
        self._program = program
        self.done = self.waiting = False

    def begin(self) -> None:
        self.done = self.waiting = False
        self._statements = self._program()
        self._pgconn.exec_(f"BEGIN ISOLATION LEVEL {self.isolation}".encode())
        self._next: Query | str = next(self._statements)

    def step(self, server: psycopg.Connection[Any]) -> None:
        """Send the next statement; return when it is done or waits for a lock."""
        sql, params = (self._next, ()) if isinstance(self._next, str) else self._next
        self._pgconn.send_query_params(sql.encode(), [None if p is None else str(p).encode() for p in params])
        self.look(server)

    def look(self, server: psycopg.Connection[Any]) -> None:
        """See whether the statement under way is done, waits, or goes on; waits until it is one of the first two."""
        while not self._answered():
            if server.execute("SELECT FROM pg_locks WHERE pid = %s AND NOT granted", [self.pid]).rowcount:
                self.waiting = not self._answered()
                if self.waiting:
                    return
                break
        self.waiting = False
        self._take_answer()

    def _answered(self) -> bool:
        if select.select([self._socket], [], [], _GLANCE_S)[0]:
            self._pgconn.consume_input()
        return not self._pgconn.is_busy()

    def _take_answer(self) -> None:
        hits, error = 0, None
        while (result := self._pgconn.get_result()) is not None:
            if result.status == ExecStatus.FATAL_ERROR:
                error = result
            hits = result.ntuples or int(result.command_tuples or 0)
        if error is not None:
            if error.error_field(DiagnosticField.SQLSTATE) != b"40001":
                raise RuntimeError(f"{self.name}: {error.error_message.decode()}")
            self._pgconn.exec_(b"ROLLBACK")
            self.done = True
            return
        try:
            self._next = self._statements.send(hits)
        except StopIteration:
            self.done = True

    def give_way(self, server: psycopg.Connection[Any]) -> None:
        """Be cancelled while waiting, as by a lock timeout, and begin again."""
        server.execute("SELECT pg_cancel_backend(%s)", [self.pid])
        self.abandon()
        self.begin()

    def abandon(self) -> None:
        while self._pgconn.get_result() is not None:
            pass
        self._pgconn.exec_(b"ROLLBACK")
        self.waiting = False


@dataclass
class Tally:
    """
    What all schedules came to.

    Attributes:
        schedules: how many.
        wrong: those after which something was wrong, and what; schedules as the names of who went.
    """

    schedules: int = 0
    wrong: list[str] = field(default_factory=list)


def every_schedule(
    actors: Sequence[Actor],
    server: psycopg.Connection[Any],
    *,
    prepare: Callable[[], None],
    judge: Callable[[], str | None],
    first: bool = False,
) -> Tally:
    """
    Run every schedule once.

    Args:
        actors: who takes part; their connections are idle.
        server: a connection of nobody's, to see who waits.
        prepare: sets the rows up before each schedule.
        judge: says what is wrong afterwards.
        first: the first schedule that goes wrong is enough.
    """
    tally, schedules = Tally(), _Schedules()
    while schedules.left():
        prepare()
        problem = _run(actors, server, schedules) or judge()
        tally.schedules += 1
        if problem:
            tally.wrong.append(f"{schedules}: {problem}")
            if first:
                break
    return tally


class _Schedules:
    """
    What is still to be tried: beginnings of schedules, each to be followed and then gone on with.

    Which of two waiting for one row comes first is the server's choice where the row is an index entry; so a beginning
    may turn out otherwise than before, and is then gone on with from where it differs.
    """

    def __init__(self) -> None:
        self._todo: list[tuple[str, ...]] = [()]
        self._known: set[tuple[str, ...]] = set()
        self._wanted: tuple[str, ...] = ()
        self.order: list[str] = []

    def left(self) -> bool:
        """Take the next one, if there is one."""
        if not self._todo:
            return False
        self._wanted, self.order = self._todo.pop(), []
        return True

    def choose(self, ready: Sequence[Actor]) -> Actor:
        here = len(self.order)
        if here < len(self._wanted):
            for actor in ready:
                if actor.name == self._wanted[here]:
                    self.order.append(actor.name)
                    return actor
            self._wanted = ()
        for other in ready[1:]:
            another = (*self.order, other.name)
            if another not in self._known:
                self._known.add(another)
                self._todo.append(another)
        self.order.append(ready[0].name)
        return ready[0]

    def __str__(self) -> str:
        return " ".join(self.order)


def _run(actors: Sequence[Actor], server: psycopg.Connection[Any], schedules: _Schedules) -> str | None:
    """Run one schedule to its end; say who deadlocked."""
    for actor in actors:
        actor.begin()
    while not all(actor.done for actor in actors):
        ready = [actor for actor in actors if not actor.done and not actor.waiting]
        if ready:
            schedules.choose(ready).step(server)
            _look(actors, server)
            continue
        for actor in actors:
            if actor.waiting and actor.gives_way:
                actor.give_way(server)
        _look(actors, server)
        stuck = [actor for actor in actors if actor.waiting]
        if stuck and not any(actor for actor in actors if not (actor.done or actor.waiting or actor.gives_way)):
            return _part(actors, server)
    return None


def _look(actors: Sequence[Actor], server: psycopg.Connection[Any]) -> None:
    for actor in actors:
        if actor.waiting:
            actor.look(server)


def _part(actors: Sequence[Actor], server: psycopg.Connection[Any]) -> str:
    """End those who wait for each other: the first is cancelled, the others get what they wait for."""
    stuck = [actor for actor in actors if actor.waiting]
    server.execute("SELECT pg_cancel_backend(%s)", [stuck[0].pid])
    for actor in [*stuck, *(actor for actor in actors if not actor.done and actor not in stuck)]:
        actor.abandon()
    return f"deadlock of {' and '.join(actor.name for actor in stuck)}"
