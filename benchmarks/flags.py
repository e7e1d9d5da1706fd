"""
What does it cost an application to know the flags?

* reading a flag in process, beside the SDKs of LaunchDarkly and OpenFeature, each with its data in memory;
* a transaction with flags, beside the same one without and beside one that reads the flag in a statement of its own;
  on a unix socket and behind a network of 0.6 ms;
* read-only transactions of 16 clients (pgbench, where it is installed);
* a flip and its drain under a few hundred transactions a second, and what the application feels of it while one
  transaction stays open for 1.5 s.

Every comparison is made within one run, in turns: quote ratios, the absolute figures are this machine's.

    pip install openfeature-sdk launchdarkly-server-sdk
    python benchmarks/flags.py [--seconds 3] [--only read transaction throughput flip]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from shardmig import Flag, Flags, State, ledger, local
from shardmig.config import SessionSettings, Shard
from shardmig.flags.opening import statements
from shardmig.session import open_session
from shardmig.switching import drain, flip, read_flag
from shardmig.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from shardmig.session import Session

SPLIT_NAME = Flag("split_name")
flags = Flags(SPLIT_NAME)
LOOKUP = "SELECT epoch, maintenance FROM shardmig.shard WHERE shard = 'eu1'"
WORK = "SELECT full_name FROM customer WHERE id = 7"
ROUND_TRIP_S = 0.0006
CLIENTS = 16
ROWS = 1000


def main() -> None:
    parts: dict[str, Callable[[local.Server, float], None]] = {
        "read": read, "transaction": transaction, "throughput": throughput, "flip": flip_and_drain,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description="What it costs an application to know the flags.")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each thing measured")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--writer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.writer:
        write_until_told(options.writer)
        return
    with local.cluster(["eu1"]) as (server,):
        asyncio.run(prepare(server))
        for name in options.only:
            parts[name](server, options.seconds)


async def prepare(server: local.Server) -> None:
    """Give the server a ledger, a flag in DUAL, and customers."""
    async with session_on(server) as session:
        await ledger.install(session)
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(
            f"""
            CREATE TABLE customer (id int PRIMARY KEY, full_name text, first_name text, last_name text);
            INSERT INTO customer SELECT n, 'Ada ' || n FROM generate_series(1, {ROWS}) n;
            INSERT INTO shardmig.flag (shard, flag, revision, has_move) VALUES ('eu1', 'split_name', '0002', true);
            UPDATE shardmig.flag SET state = 1;
            """
        )


def session_on(server: local.Server) -> AbstractAsyncContextManager[Session]:
    shard = Shard(name="eu1", url=server.url())  # type: ignore[arg-type]
    return open_session(shard, SessionSettings(), pg_versions=(12, 18))


def table(title: str, rows: dict[str, str]) -> None:
    print(f"\n{title}")
    width = max(map(len, rows))
    for name, figures in rows.items():
        print(f"  {name:<{width}}  {figures}")


# --------------------------------------------------------------------------------------------------------------------
# Reading in process


def read(server: local.Server, seconds: float) -> None:
    """Time one read of a flag; the best of several rounds, as noise only ever adds."""
    with (
        psycopg.connect(server.url(), autocommit=True) as connection,
        flags.transaction(connection, shard="eu1") as view,
    ):
        readers: dict[str, Callable[[], object]] = {
            "view[SPLIT_NAME]": lambda: view[SPLIT_NAME],
            "view[SPLIT_NAME].reads_new": lambda: view[SPLIT_NAME].reads_new,
        }
        closing = []
        for sdk in (openfeature, launchdarkly):
            found = sdk()
            if found is not None:
                name, reader, close = found
                readers[name] = reader
                closing.append(close)
        best = {name: nanoseconds(reader, seconds) for name, reader in readers.items()}
    ours = best["view[SPLIT_NAME].reads_new"]
    table("Reading a flag in process", {n: f"{ns:8.0f} ns  {ns / ours:6.1f} x" for n, ns in best.items()})
    for close in closing:
        close()


def nanoseconds(function: Callable[[], object], seconds: float) -> float:
    timer = timeit.Timer(function)
    calls, took = timer.autorange()
    rounds = max(3, int(seconds / took))
    return min(timer.repeat(rounds, calls)) / calls * 1e9


def openfeature() -> tuple[str, Callable[[], object], Callable[[], None]] | None:
    if importlib.util.find_spec("openfeature") is None:
        print("openfeature-sdk is not installed: left out")
        return None
    from openfeature import api  # noqa: PLC0415 - may be missing
    from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider  # noqa: PLC0415 - may be missing

    api.set_provider(InMemoryProvider({"split_name": InMemoryFlag("on", {"on": True, "off": False})}))
    client = api.get_client()

    def reader() -> bool:
        return bool(client.get_boolean_value("split_name", default_value=False))

    assert reader()
    return "OpenFeature, in-memory provider", reader, api.shutdown


def launchdarkly() -> tuple[str, Callable[[], object], Callable[[], None]] | None:
    if importlib.util.find_spec("ldclient") is None:
        print("launchdarkly-server-sdk is not installed: left out")
        return None
    from ldclient import Config, Context, LDClient  # noqa: PLC0415 - may be missing
    from ldclient.integrations.test_data import TestData  # noqa: PLC0415 - may be missing

    source = TestData.data_source()
    source.update(source.flag("split_name").variation_for_all(variation=True))
    client = LDClient(Config("sdk-key", update_processor_class=source, send_events=False, diagnostic_opt_out=True))
    context = Context.create("eu1")

    def reader() -> bool:
        return bool(client.variation("split_name", context, default=False))

    assert reader()
    return "LaunchDarkly, test data source", reader, client.close


# --------------------------------------------------------------------------------------------------------------------
# A transaction


def transaction(server: local.Server, seconds: float) -> None:
    """Time BEGIN, one SELECT, COMMIT three ways, in turns, on a socket and behind a network."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        compare("A transaction of one SELECT, unix socket", connection, seconds)
    with relay(server, ROUND_TRIP_S) as port:
        url = f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable gssencmode=disable"
        with psycopg.connect(url, autocommit=True) as connection:
            compare(f"The same behind a network of {ROUND_TRIP_S * 1000} ms", connection, seconds)


def compare(title: str, connection: psycopg.Connection[Any], seconds: float) -> None:
    def plain() -> None:
        with connection.transaction():
            connection.execute(WORK)

    def with_flags() -> None:
        with flags.transaction(connection, shard="eu1", write=False) as view:
            _ = view[SPLIT_NAME].reads_new
            connection.execute(WORK)

    def with_prepared_fence() -> None:
        with flags.transaction(connection, shard="eu1", write=False, fence="prepared"):
            connection.execute(WORK)

    def with_a_select() -> None:
        with connection.transaction():
            connection.execute(LOOKUP)
            connection.execute(WORK)

    ways = [plain, with_flags, with_prepared_fence, with_a_select]
    times: dict[str, list[float]] = {way.__name__: [] for way in ways}
    ends_at = time.monotonic() + seconds * len(ways)
    while time.monotonic() < ends_at:
        for way in ways:
            begun = time.perf_counter()
            way()
            times[way.__name__].append(time.perf_counter() - begun)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    base = medians["plain"]
    table(
        title, {n: f"{s * 1e6:8.1f} us  {s / base - 1:+7.1%}  {(s - base) * 1e6:+7.1f} us" for n, s in medians.items()}
    )


@contextmanager
def relay(server: local.Server, round_trip_s: float) -> Iterator[int]:
    """Relay TCP to the server's socket in threads of another process, each way half a round trip late."""
    path = str(server.socket_dir / f".s.PGSQL.{server.port}")
    program = [sys.executable, "-c", _RELAY, path, str(round_trip_s / 2)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


_RELAY = """
import socket, sys, threading, time
path, late = sys.argv[1], float(sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
def pump(source, target):
    while data := source.recv(65536):
        time.sleep(late)
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
while True:
    client, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    upstream = socket.socket(socket.AF_UNIX)
    upstream.connect(path)
    for pair in ((client, upstream), (upstream, client)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""


# --------------------------------------------------------------------------------------------------------------------
# Throughput


def throughput(server: local.Server, seconds: float) -> None:
    """Let pgbench's 16 clients run read-only transactions, three ways in turns; the server is the bottleneck."""
    program = shutil.which("pgbench") or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), reverse=True)), None
    )
    if program is None:
        print("pgbench is not installed: throughput left out")
        return
    opening = statements("eu1", write=False, isolation=None, deferrable=None).opening.decode()
    work = f"\\set id random(1, {ROWS})\n"
    select = "SELECT full_name FROM customer WHERE id = :id;\n"
    scripts = {
        "plain": f"{work}BEGIN READ ONLY;\n{select}COMMIT;\n",
        "with flags": f"{work}BEGIN READ ONLY\\; {opening};\n{select}COMMIT;\n",
        "with a SELECT": f"{work}BEGIN READ ONLY;\n{opening};\n{select}COMMIT;\n",
    }
    rates: dict[str, list[float]] = {name: [] for name in scripts}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(3):
            for name, script in scripts.items():
                path = Path(place) / "script.sql"
                path.write_text(script)
                where = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres", "postgres"]
                how = [program, "-n", "-f", str(path), "-c", str(CLIENTS), "-j", "2", "-T", str(max(1, round(seconds)))]
                ended = subprocess.run([*how, *where], check=True, capture_output=True, text=True)
                line = next(line for line in ended.stdout.splitlines() if line.startswith("tps"))
                rates[name].append(float(line.split()[2]))
    medians = {name: statistics.median(seen) for name, seen in rates.items()}
    base = medians["plain"]
    table(
        f"Read-only transactions, {CLIENTS} clients", {n: f"{r:8.0f} tx/s  {r / base:6.1%}" for n, r in medians.items()}
    )


# --------------------------------------------------------------------------------------------------------------------
# Flip and drain


def flip_and_drain(server: local.Server, seconds: float) -> None:
    """Flip there and back, each with its drain, beside eight writers; then once with a transaction open for 1.5 s."""
    with (
        tempfile.TemporaryDirectory() as place,
        application(server, Path(place)) as felt,
        psycopg.connect(server.url(), autocommit=True) as connection,
    ):
        done, begun = count(connection), time.monotonic()
        took, stalls = asyncio.run(flips(server, seconds * 5))
        rate = (count(connection) - done) / (time.monotonic() - begun)
    worst = max(ms for at, ms in felt if stalls[0] <= at <= stalls[1])
    usual = statistics.median(ms for _, ms in felt)
    took.sort()
    table(
        f"Flip and drain at about {rate:.0f} tx/s",
        {
            "flip + drain, median": f"{statistics.median(took) * 1e3:8.1f} ms of {len(took)}",
            "flip + drain, p99": f"{took[int(len(took) * 0.99)] * 1e3:8.1f} ms",
            "a transaction, median": f"{usual:8.1f} ms",
            "worst while one is open for 1.5 s": f"{worst:8.1f} ms",
        },
    )


@contextmanager
def application(server: local.Server, place: Path) -> Iterator[list[tuple[float, float]]]:
    """Run the writers in a process of their own; the list is filled at the end: when, and how many ms it took."""
    felt: list[tuple[float, float]] = []
    program = [sys.executable, __file__, "--writer", json.dumps([server.url(), str(place)])]
    with subprocess.Popen(program) as writer:
        try:
            while not (place / "begun").exists():
                time.sleep(0.01)
            yield felt
        finally:
            (place / "stop").touch()
            writer.wait(30)
            felt.extend((at, ms) for at, ms in json.loads((place / "latencies").read_text()))


def count(connection: psycopg.Connection[Any]) -> int:
    connection.execute("SELECT pg_stat_clear_snapshot()")
    row = connection.execute("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()").fetchone()
    assert row is not None
    return int(row[0])


async def flips(server: local.Server, seconds: float) -> tuple[list[float], tuple[float, float]]:
    took: list[float] = []
    async with session_on(server) as session:
        turn = await Turn.take(session)
        row = await drain(turn, await read_flag(session, "split_name"))
        await session.execute("UPDATE shardmig.flag SET new_valid = true")
        row = await read_flag(session, "split_name")

        async def there_or_back() -> None:
            nonlocal row
            begun = time.perf_counter()
            row = await flip(turn, row, State.LIVE if row.state == State.DUAL else State.DUAL)
            row = await drain(turn, row)
            took.append(time.perf_counter() - begun)

        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            await there_or_back()
            await asyncio.sleep(0.02)
        begun_at = time.time()
        with psycopg.connect(server.url()) as long:
            long.execute("SELECT pg_sleep(0)")
            closing = threading.Timer(1.5, long.commit)
            closing.start()
            await there_or_back()
            closing.join()
        stalls = (begun_at, time.time())
    return took[:-1], stalls


def write_until_told(arguments: str) -> None:
    """Be the application: eight threads with flags, each transaction one UPDATE; note how long each took."""
    url, place = json.loads(arguments)
    felt: list[tuple[float, float]] = []
    stop = Path(place) / "stop"

    def work(number: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.exists():
                begun = time.perf_counter()
                with flags.transaction(connection, shard="eu1") as view:
                    new = ", first_name = 'Grace'" if view[SPLIT_NAME].writes_new else ""
                    connection.execute(f"UPDATE customer SET full_name = 'Grace'{new} WHERE id = {number + 1}".encode())
                felt.append((time.time(), (time.perf_counter() - begun) * 1e3))
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    (Path(place) / "begun").touch()
    for thread in threads:
        thread.join()
    (Path(place) / "latencies").write_text(json.dumps(felt))


if __name__ == "__main__":
    main()
