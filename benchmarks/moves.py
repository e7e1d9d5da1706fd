"""
How fast do rows move, and what does the application feel meanwhile?

One column of a table is filled from another, beside eight connections that read and write single rows of it, in several
ways in turns: shardmig at its default pace and at `batch_target_ms = 20`, one UPDATE of the whole table, bare keyset
batches, and the shapes that others use (pgroll: 1,000 rows through a row trigger; online_migrations: 1,000 rows and a
pause of 50 ms; GitLab: 100 rows and 100 ms). Slow ways are watched for some seconds only.

Quote ratios within one run: the absolute figures are this machine's.

    python benchmarks/moves.py [--rows 1000000] [--indexes 3] [--rounds 2] [--tps 300] [--only fast gentle]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import psycopg

from shardmig import ledger, local
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.events import BatchDone
from shardmig.moves import MoveRun
from shardmig.plan import Move, Plan, Switch
from shardmig.session import open_session
from shardmig.states import State
from shardmig.switching import drain, flip, read_flag
from shardmig.turn import Turn, begin_migration

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "max_wal_size": "4GB",
}


@dataclass
class Measured:
    """What one way did in one round."""

    rows: int = 0
    seconds: float = 0.0
    check_s: float = 0.0
    batches: int = 0
    statement_ms: list[float] = field(default_factory=list)


def main() -> None:
    ways: dict[str, Callable[[str, int], Measured]] = {
        "whole": whole,
        "gentle": lambda url, rows: asyncio.run(shardmig(url, rows, Pace())),
        "fast": lambda url, rows: asyncio.run(shardmig(url, rows, Pace(batch_target_ms=20))),
        "keyset200": lambda url, rows: keyset(url, rows, 200),
        "keyset1000": lambda url, rows: keyset(url, rows, 1000),
        "pgroll": pgroll,
        "online_migrations": lambda url, rows: keyset(url, rows, 1000, pause_s=0.05),
        "gitlab": lambda url, rows: keyset(url, rows, 100, pause_s=0.1),
    }
    parser = argparse.ArgumentParser(description="How fast rows move, and what the application feels meanwhile.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--indexes", type=int, default=0, choices=[0, 3], help="beside the primary key")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tps", type=float, default=300.0, help="of the application, all connections together")
    parser.add_argument("--only", nargs="+", choices=ways, default=list(ways))
    parser.add_argument("--application", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.application:
        application(options.application, options.rows, options.tps)
        return
    with local.cluster(["eu1"], settings=SETTINGS) as (server,):
        compare(server, options, {name: ways[name] for name in options.only})


def compare(server: local.Server, options: argparse.Namespace, ways: dict[str, Callable[[str, int], Measured]]) -> None:
    url = server.create_database("shop")
    measured: dict[str, list[Measured]] = defaultdict(list)
    felt: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[list[int]]] = defaultdict(list)
    for turn in range(options.rounds):
        for name in ["idle", *ways]:
            fill(url, options.rows, options.indexes)
            with Application(url, options.rows, options.tps) as app:
                before = look(url)
                app.latencies()
                if name == "idle":
                    time.sleep(WATCHED_S)
                else:
                    measured[name].append(ways[name](url, options.rows))
                time.sleep(0.5)  # who waited for the last batch is through only now
                felt[name] += app.latencies()
                costs[name].append([there - here for here, there in zip(before, look(url), strict=True)])
            sys.stderr.write(f"round {turn + 1}: {name}\n")
    show(measured, felt, costs)


def show(measured: dict[str, list[Measured]], felt: dict[str, list[float]], costs: dict[str, list[list[int]]]) -> None:
    idle = percentile(felt["idle"], 99)
    whole_speed = statistics.median(m.rows / m.seconds for m in measured["whole"]) if measured["whole"] else None
    print(
        f"idle: application p50 {percentile(felt['idle'], 50):.2f} ms, p99 {idle:.2f} ms, "
        f"worst {max(felt['idle']):.1f} ms"
    )
    print("| way | rows/s | x whole | app p99, x idle | worst ms | rows a batch | check/move | WAL B/row | growth MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, rounds in measured.items():
        speed = statistics.median(m.rows / m.seconds for m in rounds)
        last = rounds[-1]
        wal, size = (statistics.median(c[place] for c in costs[name]) for place in (0, 1))
        print(
            f"| {name} | {speed:,.0f} | {speed / whole_speed if whole_speed else 0:.2f} "
            f"| {percentile(felt[name], 99) / idle:.1f} | {max(felt[name], default=0):.0f} "
            f"| {last.rows / max(last.batches, 1):.0f} | {last.check_s / last.seconds:.2f} "
            f"| {wal / max(last.rows, 1):.0f} | {size / 2**20:.0f} |"
        )


def percentile(values: list[float], rank: int) -> float:
    return statistics.quantiles(values, n=100)[rank - 1] if len(values) > 1 else float("nan")


# --------------------------------------------------------------------------------------------------------------------
# The table and the application


def fill(url: str, rows: int, indexes: int) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS customer; DROP SCHEMA IF EXISTS shardmig CASCADE")
        connection.execute("CREATE TABLE customer (id bigint, full_name text, email text, note text, first_name text)")
        connection.execute(
            "INSERT INTO customer SELECT n, 'Ada' || n || ' Lovelace', 'c' || n || '@example.org', repeat('x', 60) "
            f"FROM generate_series(1, {rows}) n"
        )
        connection.execute("ALTER TABLE customer ADD PRIMARY KEY (id)")
        for column in ("email", "full_name", "first_name")[:indexes]:
            connection.execute(f"CREATE INDEX ON customer ({column})")
        connection.execute("VACUUM ANALYZE customer")
        connection.execute("CHECKPOINT")


def look(url: str) -> list[int]:
    """Return the WAL position and the table's size with its indexes, in bytes."""
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint, pg_total_relation_size('customer')"
        ).fetchone()
        assert row is not None
        return list(row)


class Application:
    """Another process that reads and writes single rows at a steady rate, and says how long each transaction took."""

    def __init__(self, url: str, rows: int, tps: float) -> None:
        program = [sys.executable, __file__, "--application", url, "--rows", str(rows), "--tps", str(tps)]
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


def application(url: str, rows: int, tps: float) -> None:
    took: list[float] = []
    for _ in range(CLIENTS):
        threading.Thread(target=client, args=(url, rows, tps / CLIENTS, took), daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps(took[:]), flush=True)
        took.clear()


def client(url: str, rows: int, tps: float, took: list[float]) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        due = time.perf_counter()
        while True:
            due += random.expovariate(tps)
            time.sleep(max(0.0, due - time.perf_counter()))
            # From when it was due: a client that waits for a lock keeps the next one waiting too.
            key, began = random.randint(1, rows), min(due, time.perf_counter())
            with connection.transaction():
                connection.execute("SELECT email FROM customer WHERE id = %s", [key])
                connection.execute(
                    "UPDATE customer SET full_name = 'Grace Hopper', first_name = 'Grace' WHERE id = %s", [key]
                )
            took.append((time.perf_counter() - began) * 1000)


# --------------------------------------------------------------------------------------------------------------------
# Ways to move


async def shardmig(url: str, rows: int, pace: Pace) -> Measured:
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
        measured = Measured(rows=rows)

        def listen(event: Event) -> None:
            if isinstance(event, BatchDone):
                ended.append(time.perf_counter())

        assert await MoveRun(turn, REVISION, 2, MOVE, "forward", pace, listener=listen).run()
        measured.batches = len(ended) - 1
        measured.seconds, measured.check_s = ended[-1] - ended[0], time.perf_counter() - ended[-1]
        return measured


def whole(url: str, rows: int) -> Measured:
    with psycopg.connect(url, autocommit=True) as connection:
        began = time.perf_counter()
        connection.execute(f"UPDATE customer SET first_name = {NEW}")
        return Measured(rows, time.perf_counter() - began, batches=1)


def keyset(url: str, rows: int, batch_rows: int, *, pause_s: float = 0.0) -> Measured:
    """Walk the key without a record of how far."""
    step = f"UPDATE customer SET first_name = {NEW} WHERE id > %s AND id <= %s"
    return walk(url, rows, batch_rows, pause_s, lambda connection, after, upto: connection.execute(step, [after, upto]))


def pgroll(url: str, rows: int) -> Measured:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"""
            CREATE OR REPLACE FUNCTION fill_first_name() RETURNS trigger LANGUAGE plpgsql AS $$
            DECLARE full_name text := NEW.full_name;
            BEGIN NEW.first_name = {NEW}; RETURN NEW; END $$;
            CREATE TRIGGER fill BEFORE INSERT OR UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION fill_first_name()
            """
        )
    batch = """
        WITH batch AS (SELECT id FROM customer WHERE id > %s ORDER BY id LIMIT 1000 FOR NO KEY UPDATE),
             updated AS (UPDATE customer SET id = customer.id FROM batch WHERE customer.id = batch.id
                         RETURNING customer.id)
        SELECT last_value(id) OVER () FROM updated
    """
    return walk(url, rows, 1000, 0.0, lambda connection, after, _: connection.execute(batch, [after]))


def walk(
    url: str, rows: int, batch_rows: int, pause_s: float, move: Callable[[psycopg.Connection[Any], int, int], object]
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
        measured.rows = min(measured.rows, rows)
    return measured


if __name__ == "__main__":
    main()
