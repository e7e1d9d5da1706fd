"""
A move among everything else that happens to a table: an application, vacuum, readers, dumps and index builds.

The writers never conflict with each other, and lock rows in the opposite order of the move: every deadlock is the
move's, and its victim must never be the application.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Self

import psycopg
import pytest
from moving import REVISION, customers, moving, same_table

from shardmig import local
from shardmig.binaries import find_binaries
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.events import BatchDone, Waiting
from shardmig.moves import MoveRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.events import Event

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int) WITH (autovacuum_vacuum_threshold = 50)"
WRITERS = 4
DEADLOCK_MS = 60
REASONS = ("rows of t are locked", "a deadlock or a serialization failure ended a batch")


class Application:
    """
    Writers of DUAL, each with rows of its own, where the move is about to arrive; the highest key is locked first.

    Attributes:
        refused: how often each SQLSTATE ended a transaction.
        committed: transactions.
        near: the key around which they write.
    """

    def __init__(self, url: str, rows: int) -> None:
        self.refused: Counter[str] = Counter()
        self.committed = 0
        self.near = 0
        self._url, self._rows = url, rows
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]

    def __enter__(self) -> Self:
        """Begin to write."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let every writer finish its transaction."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _write(self, number: int) -> None:
        chance = random.Random(number)
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._stop.is_set():
                first = min(self.near + chance.randrange(300), self._rows - 200) // WRITERS
                ids = [(first + place) * WRITERS + number + 1 for place in range(0, 40, 8)]
                word = f"w{self.committed}"
                try:
                    with connection.transaction():
                        for id_ in reversed(ids):
                            connection.execute("UPDATE t SET a = %s, b = upper(%s) WHERE id = %s", [word, word, id_])
                            time.sleep(0.001)
                    self.committed += 1
                except psycopg.Error as error:
                    self.refused[error.sqlstate or "?"] += 1


@pytest.fixture
def server() -> Iterator[local.Server]:
    """Start a server whose autovacuum comes all the time and that looks for deadlocks soon."""
    settings = {
        "deadlock_timeout": f"{DEADLOCK_MS}ms",
        "autovacuum_naptime": "1s",
        "autovacuum_vacuum_cost_delay": "0",
        "log_autovacuum_min_duration": "-1",
    }
    with local.Server.start("busy", settings=settings) as started:
        yield started


@contextmanager
def disturbing(work: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Repeat something beside the test until it is over; what it raises ends it, and is handed out."""
    stop, failed = threading.Event(), []

    def repeat() -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:  # noqa: BLE001 - told below, by the test
            failed.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield failed
    finally:
        stop.set()
        thread.join(60)


def vacuum(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM t")


def read_long(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM t")
        connection.execute("SELECT pg_sleep(1)")


def dump(url: str) -> None:
    program = find_binaries().bindir / "pg_dump"
    subprocess.run([program, "--format=plain", "--file=/dev/null", url], check=True, capture_output=True)


def index(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE INDEX t_a ON t (a)")
        connection.execute("DROP INDEX CONCURRENTLY t_a")
        time.sleep(0.1)


def index_concurrently(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE INDEX CONCURRENTLY t_b ON t (b)")
        connection.execute("DROP INDEX CONCURRENTLY t_b")


DISTURBANCES = {
    "vacuum": vacuum,
    "a long reader": read_long,
    "pg_dump": dump,
    "CREATE INDEX": index,
    "CREATE INDEX CONCURRENTLY": index_concurrently,
}


def needs_pg_dump() -> None:
    if not (find_binaries().bindir / "pg_dump").exists():
        pytest.skip(f"no pg_dump in {find_binaries().bindir}")


async def moved_among(
    server: local.Server, rows: int, rows_per_s: int, *disturbances: Callable[[str], None], run: type[MoveRun] = MoveRun
) -> tuple[Application, list[Event]]:
    """Move a table's rows among everything, and hold the outcome against what must be true."""
    url = server.create_database("busy")
    shard = Shard.model_validate({"name": "eu1", "url": url})
    # A writer that does not know its place must not wait for long: the batch is small, and the pace gives it time.
    pace = Pace(batch_rows=100, batch_rows_max=200, max_rows_per_s=rows_per_s, max_replica_lag_s=None)
    heard: list[Event] = []
    async with moving(shard, same_table(), T, customers(rows), settings=SessionSettings()) as here:
        with Application(url, rows) as application, ExitStack() as stack:

            def listen(event: Event) -> None:
                heard.append(event)
                if isinstance(event, BatchDone):
                    application.near = event.rows_done

            others = [stack.enter_context(disturbing(partial(work, url))) for work in disturbances]
            made = run(here.turn, REVISION, here.number, here.move, "forward", pace, listener=listen)
            assert await asyncio.wait_for(made.run(), 60)
        wrong = await here.rows("SELECT count(*) FROM t WHERE b IS DISTINCT FROM upper(a)")
        moved = await here.rows("SELECT count(n) FROM t")

    assert [[]] * len(others) == others
    assert [(0,)] == wrong
    assert [(rows,)] == moved
    assert application.committed > 50
    return application, heard


def reasons(heard: list[Event]) -> set[str]:
    return {event.reason for event in heard if isinstance(event, Waiting)}


async def test_a_move_goes_on_among_everything_and_the_application_is_never_a_victim(server: local.Server) -> None:
    kinds = [vacuum, read_long, index]
    if (find_binaries().bindir / "pg_dump").exists():
        kinds.append(dump)
    application, heard = await moved_among(server, 5000, 2500, *kinds)

    assert {} == dict(application.refused)
    assert reasons(heard) <= set(REASONS)
    assert any(isinstance(event, BatchDone) for event in heard)


@pytest.mark.long
@pytest.mark.parametrize("name", DISTURBANCES)
async def test_each_disturbance_alone_stops_no_move_and_hurts_no_writer(server: local.Server, name: str) -> None:
    if name == "pg_dump":
        needs_pg_dump()
    application, heard = await moved_among(server, 8000, 2000, DISTURBANCES[name])

    assert {} == dict(application.refused)
    assert reasons(heard) <= set(REASONS)


@pytest.mark.long
async def test_everything_at_once_for_longer(server: local.Server) -> None:
    needs_pg_dump()
    # Two index builders on one table end each other as deadlocks, with no move near: one of them is enough.
    application, heard = await moved_among(server, 30_000, 2000, vacuum, read_long, dump, index)

    assert {} == dict(application.refused)
    assert reasons(heard) <= set(REASONS)


class Stubborn(MoveRun):
    """Waits for locked rows for longer than the server waits before it looks for deadlocks."""

    def _limits(self, rows: int) -> str:
        return super()._limits(rows).replace(f"{DEADLOCK_MS // 2}ms", "5000ms").replace("'10ms'", "'5000ms'")


@pytest.mark.long
async def test_with_a_longer_lock_timeout_the_application_would_be_a_victim(server: local.Server) -> None:
    application, _ = await moved_among(server, 8000, 2000, run=Stubborn)

    assert application.refused["40P01"] > 0
