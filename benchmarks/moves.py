"""
How fast do rows move, and what does the application feel meanwhile?

One column of a table is filled from another, beside eight connections that read and write single rows of it at a steady
rate, in several ways in turns: shardmig at both of its paces, one UPDATE of the whole table, bare keyset batches, and
the shapes that others use (pgroll: 1,000 rows through a row trigger; online_migrations: 1,000 rows and a pause of
50 ms; GitLab: 100 rows and 100 ms). Ways with pauses are watched for some seconds only.

Every way gets a new copy of the table, vacuumed and checkpointed. WAL lies on the disk of the temporary directory, in
segments as big as a real server's, written once before: a commit that waits for no disk would flatter small batches.
The ratios are those of one round, to its own idle time and its own whole UPDATE, and what is shown is their median.

    python benchmarks/moves.py [--rows 1000000] [--indexes 3] [--clusters 10] [--rounds 2] [--only fast gentle]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

import psycopg

from shardmig import ledger, local
from shardmig.binaries import find_binaries, unprivileged
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.events import BatchDone
from shardmig.moves import MoveRun
from shardmig.pace import Servo
from shardmig.plan import Move, Plan, Switch
from shardmig.session import open_session
from shardmig.states import State
from shardmig.switching import drain, flip, read_flag
from shardmig.turn import Turn, begin_migration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.events import Event

NEW = "split_part(full_name, ' ', 1)"
MOVE = Move(
    table="customer",
    key=("id",),
    writes=("first_name",),
    forward=f"UPDATE customer SET first_name = {NEW} WHERE {{batch}}",
    check=f"SELECT id FROM customer WHERE {{batch}} AND first_name IS DISTINCT FROM {NEW}",
)
REVISION = "0002_split"
WATCHED_S = 12.0  # of a way that would take minutes
CLIENTS = 8
SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "autovacuum": "on",
    "shared_buffers": "512MB",
    "wal_init_zero": "on",
    "wal_recycle": "on",
    "min_wal_size": "2GB",
    "max_wal_size": "4GB",
}
GAP = 10**15  # between two clusters of keys


@dataclass(frozen=True)
class Table:
    """What every way finds: a table of so many rows, indexes beside its key, and clusters of keys far apart."""

    rows: int
    indexes: int = 0
    clusters: int = 1

    def key(self, number: int) -> int:
        """Return the key of a row: the first is 1."""
        return number + (number - 1) * self.clusters // self.rows * GAP


@dataclass
class Measured:
    """
    What one way did in one round.

    Attributes:
        rows: moved, in so many `seconds` and `batches`; `empty` ones among them had no row.
        check_s: how long the check took, beside those.
        statement_ms: what each batch's statement took, where that is known.
        felt_ms: what each transaction of the application took.
        wal: bytes written meanwhile, by the application too.
        growth: bytes that table and indexes have grown by.
    """

    rows: int = 0
    seconds: float = 0.0
    check_s: float = 0.0
    batches: int = 0
    empty: int = 0
    statement_ms: list[float] = field(default_factory=list)
    felt_ms: list[float] = field(default_factory=list)
    wal: int = 0
    growth: int = 0

    @property
    def speed(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def main() -> None:
    ways: dict[str, Callable[[str, Table], Measured]] = {
        "whole": whole,
        "gentle": lambda url, table: asyncio.run(shardmig(url, table, Pace())),
        "fast": lambda url, table: asyncio.run(shardmig(url, table, Pace().at("fast"))),
        "keyset200": lambda url, table: keyset(url, table, 200),
        "keyset1000": lambda url, table: keyset(url, table, 1000),
        "pgroll": pgroll,
        "online_migrations": lambda url, table: keyset(url, table, 1000, pause_s=0.05),
        "gitlab": lambda url, table: keyset(url, table, 100, pause_s=0.1),
    }
    parser = argparse.ArgumentParser(description="How fast rows move, and what the application feels meanwhile.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--indexes",
        type=int,
        default=0,
        choices=[0, 3],
        help="beside the primary key, on columns that are there already",
    )
    parser.add_argument("--clusters", type=int, default=1, help="of keys, far apart")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tps", type=float, default=300.0, help="of the application, all connections together")
    parser.add_argument("--only", nargs="+", choices=ways, default=list(ways))
    parser.add_argument("--application", help=argparse.SUPPRESS)
    options = parser.parse_args()
    table = Table(options.rows, options.indexes, options.clusters)
    if options.application:
        application(options.application, table, options.tps)
        return
    with local.cluster(["eu1"], settings=SETTINGS) as (server,), wal_on_disk(server):
        url = server.create_database("shop")
        write_segments(url)
        everything = {**FLOORS, **ways}
        rounds = [play(url, table, options.tps, [*FLOORS, *options.only], everything) for _ in range(options.rounds)]
    show(rounds)


@contextmanager
def wal_on_disk(server: local.Server) -> Iterator[None]:
    """Give a server's WAL the segments of a real one, and a disk; the rest of its data may live in memory."""
    account = unprivileged()
    with tempfile.TemporaryDirectory(prefix="wal") as place:
        server.stop()
        resetwal = find_binaries().bindir / "pg_resetwal"
        subprocess.run([resetwal, "--wal-segsize=16", server.data], check=True, stdout=subprocess.DEVNULL, **account)
        inside, outside = server.data / "pg_wal", Path(place) / "pg_wal"
        shutil.copytree(inside, outside)
        shutil.rmtree(inside)
        inside.symlink_to(outside)
        for path in (Path(place), outside, *outside.rglob("*")):
            os.chown(path, account.get("user", -1), account.get("group", -1))
        server.restart()
        yield
        server.stop()


def write_segments(url: str) -> None:
    """
    Write as much WAL as the server keeps files for: it then renames old ones, as any server does that is not new.

    The first ways would have new ones made, filled and flushed while every COMMIT waits, four a second with three
    indexes: an application's p99 of 35 ms was seen there, and of 5 to 7 ms behind it.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT count(pg_logical_emit_message(false, 'x', repeat('x', 8 << 20))) "
            "FROM generate_series(1, pg_size_bytes(current_setting('min_wal_size')) / (8 << 20) + 10)"
        )
        connection.execute("CHECKPOINT")


def play(
    url: str, table: Table, tps: float, names: list[str], ways: dict[str, Callable[[str, Table], Measured]]
) -> dict[str, Measured]:
    """Measure each way once, with the application beside it."""
    played = {}
    for name in names:
        fill(url, table)
        with Application(url, table, tps) as app:
            wal, size = look(url)
            app.latencies()
            measured = ways[name](url, table)
            time.sleep(0.5)  # who waited for the last batch is through only now
            measured.felt_ms = app.latencies()
            after = look(url)
            measured.wal, measured.growth = after[0] - wal, after[1] - size
        played[name] = measured
        sys.stderr.write(f"{name}: {measured.speed:,.0f} rows/s, p99 {percentile(measured.felt_ms, 99):.2f} ms\n")
    return played


def rest(*_: object) -> Measured:
    time.sleep(WATCHED_S)
    return Measured(seconds=WATCHED_S)


def compute(url: str, _: Table) -> Measured:
    """Keep one core busy and touch no table: what any work at all costs an application on so many cores."""
    ends_at = time.monotonic() + WATCHED_S
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < ends_at:
            connection.execute("SELECT count(n) FROM generate_series(1, 100000) n")
    return Measured(seconds=WATCHED_S)


def show(rounds: list[dict[str, Measured]]) -> None:
    def median(name: str, figure: Callable[[Measured, dict[str, Measured]], float]) -> float:
        return statistics.median(figure(played[name], played) for played in rounds)

    print(
        f"idle: application p50 {median('idle', lambda m, _: percentile(m.felt_ms, 50)):.2f} ms, "
        f"p99 {median('idle', lambda m, _: percentile(m.felt_ms, 99)):.2f} ms, "
        f"worst {median('idle', lambda m, _: max(m.felt_ms)):.1f} ms; medians of {len(rounds)} rounds\n"
        f"beside a session that only computes: p99 {median('computing', felt):.1f} x idle"
    )
    columns = "way", "rows/s", "x whole", "p99, x idle", "worst ms", "rows a batch", "batch ms", "empty", "check/move"
    print(f"| {' | '.join([*columns, 'WAL B/row', 'growth'])} |")
    print("|---" * (len(columns) + 2) + "|")
    for name in rounds[0]:
        if name in FLOORS:
            continue
        cells = [
            f"{median(name, lambda m, _: m.speed):,.0f}",
            f"{median(name, lambda m, all_: m.speed / all_['whole'].speed if 'whole' in all_ else float('nan')):.2f}",
            f"{median(name, felt):.1f}",
            f"{median(name, lambda m, _: max(m.felt_ms)):.0f}",
            f"{median(name, lambda m, _: m.rows / m.batches):.0f}",
            f"{median(name, lambda m, _: statistics.fmean(m.statement_ms[12:]) if m.statement_ms else 0):.1f}",
            f"{median(name, lambda m, _: m.empty):.0f}",
            f"{median(name, lambda m, _: m.check_s / m.seconds):.2f}",
            f"{median(name, lambda m, _: m.wal / m.rows):.0f}",
            f"{median(name, lambda m, _: m.growth / 2**20):.0f} MB",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def felt(measured: Measured, played: dict[str, Measured]) -> float:
    """Return the application's p99, in times that of the idle server."""
    return percentile(measured.felt_ms, 99) / percentile(played["idle"].felt_ms, 99)


def percentile(values: list[float], rank: int) -> float:
    return statistics.quantiles(values, n=100)[rank - 1] if len(values) > 1 else float("nan")


FLOORS: dict[str, Callable[[str, Table], Measured]] = {"idle": rest, "computing": compute}


# --------------------------------------------------------------------------------------------------------------------
# The table and the application


def fill(url: str, table: Table) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS customer; DROP SCHEMA IF EXISTS shardmig CASCADE")
        connection.execute("CREATE TABLE customer (id bigint, full_name text, email text, note text, first_name text)")
        connection.execute(
            f"INSERT INTO customer SELECT n + (n - 1) * {table.clusters} / {table.rows} * {GAP}, "
            "'Ada' || n || ' Lovelace', 'c' || n || '@example.org', repeat('x', 60) "
            f"FROM generate_series(1, {table.rows}::bigint) n"
        )
        connection.execute("ALTER TABLE customer ADD PRIMARY KEY (id)")
        for column in ("email", "full_name", "note, id")[: table.indexes]:
            connection.execute(f"CREATE INDEX ON customer ({column})")
        connection.execute("VACUUM ANALYZE customer")
        connection.execute("CHECKPOINT")


def look(url: str) -> tuple[int, int]:
    """Return the WAL position and the table's size with its indexes, in bytes."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint, pg_total_relation_size('customer')"
        ).fetchone()
        assert row is not None
        return int(row[0]), int(row[1])


class Application:
    """Another process that reads and writes single rows at a steady rate, and says how long each transaction took."""

    def __init__(self, url: str, table: Table, tps: float) -> None:
        shape = ["--rows", str(table.rows), "--clusters", str(table.clusters), "--tps", str(tps)]
        program = [sys.executable, __file__, "--application", url, *shape]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.latencies()  # it is connected

    def __enter__(self) -> Self:
        """Return the running application; leaving the block ends it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def latencies(self) -> list[float]:
        """Return the milliseconds of each transaction since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        return json.loads(self._process.stdout.readline())  # type: ignore[no-any-return]


def application(url: str, table: Table, tps: float) -> None:
    took: list[float] = []
    for _ in range(CLIENTS):
        threading.Thread(target=client, args=(url, table, tps / CLIENTS, took), daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps(took[:]), flush=True)
        took.clear()


def client(url: str, table: Table, tps: float, took: list[float]) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        due = time.perf_counter()
        while True:
            due += random.expovariate(tps)
            time.sleep(max(0.0, due - time.perf_counter()))
            # From when it was due: a client that waits for a lock keeps the next one waiting too.
            key, began = table.key(random.randint(1, table.rows)), min(due, time.perf_counter())
            with connection.transaction():
                connection.execute("SELECT email FROM customer WHERE id = %s", [key])
                connection.execute(
                    "UPDATE customer SET full_name = 'Grace Hopper', first_name = 'Grace' WHERE id = %s", [key]
                )
            took.append((time.perf_counter() - began) * 1000)


# --------------------------------------------------------------------------------------------------------------------
# Ways to move


async def shardmig(url: str, table: Table, pace: Pace) -> Measured:
    shard = Shard.model_validate({"name": "eu1", "url": url})
    async with open_session(shard, SessionSettings(), pg_versions=(12, 19)) as session:
        await ledger.install(session)
        turn = await Turn.take(session)
        plan = Plan(
            revision=REVISION, parent=None, flag="split", script_sha256="0" * 64,
            steps=(Switch(to=State.DUAL), MOVE, Switch(to=State.LIVE)),
        )  # fmt: skip
        await session.flight(begin_migration("eu1", plan, position=1, text=""))
        await drain(turn, await flip(turn, await read_flag(session, "split"), State.DUAL))
        ended = [time.perf_counter()]
        measured = Measured(rows=table.rows)

        def listen(event: Event) -> None:
            if isinstance(event, BatchDone):
                ended.append(time.perf_counter())
                measured.empty += event.rows == 0

        with clocked(measured.statement_ms):
            assert await MoveRun(turn, REVISION, 2, MOVE, "forward", pace, listener=listen).run()
        measured.batches = len(ended) - 1
        measured.seconds, measured.check_s = ended[-1] - ended[0], time.perf_counter() - ended[-1]
        return measured


@contextmanager
def clocked(statement_ms: list[float]) -> Iterator[None]:
    """Write down what the servo is told of each batch."""
    done = Servo.done

    def noted(servo: Servo, rows: int, elapsed_ms: float) -> None:
        statement_ms.append(elapsed_ms)
        done(servo, rows, elapsed_ms)

    with patch.object(Servo, "done", noted):
        yield


def whole(url: str, table: Table) -> Measured:
    with psycopg.connect(url, autocommit=True) as connection:
        began = time.perf_counter()
        connection.execute(f"UPDATE customer SET first_name = {NEW}")
        return Measured(table.rows, time.perf_counter() - began, batches=1)


def keyset(url: str, table: Table, batch_rows: int, *, pause_s: float = 0.0) -> Measured:
    """Walk the key without a record of how far."""
    step = f"UPDATE customer SET first_name = {NEW} WHERE id > %s AND id <= %s"
    return walk(
        url, table, batch_rows, pause_s, lambda connection, after, upto: connection.execute(step, [after, upto])
    )


def pgroll(url: str, table: Table) -> Measured:
    """
    Fill through a row trigger, 1,000 rows at a time: what `pgroll start` does for a column with an `up` expression.

    After its pkg/backfill/templates (sql.go, function.go): rows that wait are marked by a column, and the trigger reads
    every column and search_path. The application's own writes fire it, too.
    """
    columns = ("id", "full_name", "email", "note", "first_name")
    declared = " ".join(f'"{name}" customer."{name}"%TYPE := NEW."{name}";' for name in columns)
    measured = Measured(table.rows)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"""
            ALTER TABLE customer ADD COLUMN waits boolean DEFAULT true;
            CREATE OR REPLACE FUNCTION fill_first_name() RETURNS trigger LANGUAGE plpgsql AS $$
            #variable_conflict use_variable
            DECLARE {declared} latest_schema text; search_path text;
            BEGIN
                SELECT current_setting INTO search_path FROM current_setting('search_path');
                IF search_path != 'public_0002_split' THEN
                    NEW.first_name = {NEW};
                    NEW.waits = false;
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER fill BEFORE INSERT OR UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION fill_first_name()
            """
        )
        began, after = time.perf_counter(), 0
        while True:
            with connection.transaction():
                last = connection.execute(
                    f"""
                    WITH batch AS (SELECT id FROM customer WHERE waits = true AND (id) > ('{after}')
                                   ORDER BY id LIMIT 1000 FOR NO KEY UPDATE),
                         updated AS (UPDATE customer SET id = customer.id FROM batch WHERE customer.id = batch.id
                                     RETURNING customer.id)
                    SELECT last_value(id) OVER () FROM updated
                    """
                ).fetchone()
            if last is None:
                break
            after, measured.batches = last[0], measured.batches + 1
        measured.seconds = time.perf_counter() - began
    return measured


def walk(
    url: str, table: Table, batch_rows: int, pause_s: float, move: Callable[[psycopg.Connection[Any], int, int], object]
) -> Measured:
    measured = Measured()
    with psycopg.connect(url, autocommit=True) as connection:
        began, after = time.perf_counter(), 0
        while True:
            end = connection.execute(
                "SELECT max(id) FROM (SELECT id FROM customer WHERE id > %s ORDER BY id LIMIT %s) AS batch",
                [after, batch_rows],
            ).fetchone()
            if end is None or end[0] is None or (pause_s and time.perf_counter() - began > WATCHED_S):
                break
            move(connection, after, end[0])
            measured.rows, measured.batches = measured.rows + batch_rows, measured.batches + 1
            after = end[0]
            time.sleep(pause_s)
        measured.seconds = time.perf_counter() - began
        measured.rows = min(measured.rows, table.rows)
    return measured


if __name__ == "__main__":
    main()
