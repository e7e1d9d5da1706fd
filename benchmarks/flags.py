"""
What does it cost an application to know the flags?

* reading a flag in process, beside the SDKs of LaunchDarkly and OpenFeature, each with its data in memory;
* a transaction with flags, beside the same one without and beside one that reads the flag in a statement of its own;
  on a unix socket and behind a network of 0.6 ms, with the CPU time of client and server, round trips counted; one
  client on cores that sleep while it waits, one on cores that are kept awake, and several clients at once;
* the WAL of read-only transactions;
* read-only transactions of 16 clients, of psycopg and (where it is installed) of pgbench;
* a flip and its drain under a few hundred transactions a second, and what the application feels of it while one
  transaction stays open for 1.5 s.

Every comparison is made within one run, in turns: quote ratios, the absolute figures are this machine's.

    pip install openfeature-sdk launchdarkly-server-sdk
    python benchmarks/flags.py [--seconds 3] [--only read transaction wal throughput flip]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg

from shardmig import Flag, Flags, State, ledger, local
from shardmig.config import SessionSettings, Shard
from shardmig.flags.opening import statements
from shardmig.flags.prepared import Form
from shardmig.session import open_session
from shardmig.switching import drain, flip, read_flag
from shardmig.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from shardmig.session import Session

SPLIT_NAME = Flag("split_name")
flags = Flags(SPLIT_NAME)
LOOKUP = "SELECT epoch, maintenance FROM shardmig.shard WHERE shard = 'eu1'"
WORK = "SELECT full_name FROM customer WHERE id = 7"
UPDATE = "UPDATE customer SET first_name = 'Ada' WHERE id = 7"
ONE, FOUR, CHANGE = (WORK,), (WORK,) * 4, (WORK, UPDATE)  # what a transaction does
ROUND_TRIP_S = 0.0006
TURN = 50
CROWD = 4
CLIENTS = 16
ROWS = 1000


def main() -> None:
    parts: dict[str, Callable[[local.Server, float], None]] = {
        "read": read, "transaction": transaction, "wal": wal, "throughput": throughput, "flip": flip_and_drain,
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

Statements: TypeAlias = "tuple[str, ...]"
Way: TypeAlias = "Callable[[psycopg.Connection[Any], Statements], None]"


def transaction(server: local.Server, seconds: float) -> None:
    """
    Time transactions with flags and without, in turns, on a socket and behind a network.

    A core with nothing to do goes to sleep while an answer travels, and what wakes up computes a few times as slowly
    for a while. So one client alone is timed on cores that sleep and on cores that are kept awake, as other work keeps
    those of a server; and so are several clients at once.

    A turn is as many transactions as one application runs in a tenth of a second. In turns of one, whatever only some
    of the ways do finds its code and data gone from the caches each time: no application is like that, but one that
    does much else between two transactions comes near to it.
    """
    race("A transaction of one SELECT, unix socket", server.url(), seconds)
    with relay(server, ROUND_TRIP_S) as url:
        race(f"A transaction of one SELECT behind {ROUND_TRIP_S * 1e3} ms", url, seconds)
        race(f"A SELECT and the UPDATE of what it found, behind {ROUND_TRIP_S * 1e3} ms", url, seconds, CHANGE)
        crowd(f"A transaction of one SELECT behind {ROUND_TRIP_S * 1e3} ms", url, seconds, clients=CROWD, ways=WAYS)


def plain(connection: psycopg.Connection[Any], statements: Statements) -> None:
    with connection.transaction():
        work(connection, statements)


def with_flags(connection: psycopg.Connection[Any], statements: Statements = ONE) -> None:
    with flags.transaction(connection, shard="eu1", write=not connection.read_only) as view:
        _ = view[SPLIT_NAME].reads_new
        work(connection, statements)


def with_a_select(connection: psycopg.Connection[Any], statements: Statements) -> None:
    with connection.transaction():
        connection.execute(LOOKUP)
        work(connection, statements)


def work(connection: psycopg.Connection[Any], statements: Statements) -> None:
    for statement in statements:
        connection.execute(statement)


def race(title: str, url: str, seconds: float, statements: Statements = ONE) -> None:
    """Run all ways in turns under three conditions, and those in turns too."""
    conditions: dict[str, tuple[Race, int, Callable[[], AbstractContextManager[None]]]] = {
        "cores sleep while it waits": (Race(url, statements), TURN, nullcontext),
        "cores are kept awake": (Race(url, statements), TURN, awake),
        "cores sleep, turns of one": (Race(url, statements), 1, nullcontext),
    }
    for _ in range(round(seconds)):
        for runners, turn, condition in conditions.values():
            with condition():
                runners.run(0.7, turn)
    for name, (runners, *_) in conditions.items():
        table(f"{title}, one client, {name}", runners.rows())


class Race:
    """
    Each way to begin a transaction, on a connection of its own.

    Both sides begin alike (BEGIN, or BEGIN READ ONLY), and what psycopg prepares is prepared before the clock runs. A
    turn is compared with the plain turn of the same round, for machines drift; what is told is the median of those.
    """

    def __init__(self, url: str, statements: Statements) -> None:
        self.statements = statements
        self.ways = {**({} if UPDATE in statements else READING), **WAYS}
        self.opened = {name: connect(url, name) for name in self.ways}
        for name, way in self.ways.items():
            for _ in range(50):
                way(self.opened[name], statements)
        self.trips = {name: round_trips(way, self.opened[name], statements) for name, way in self.ways.items()}
        self.walls: dict[str, list[float]] = {name: [] for name in self.ways}
        self.cpus: dict[str, list[float]] = {name: [] for name in self.ways}
        self.served = dict.fromkeys(self.ways, 0.0)
        self.transactions = 0

    def run(self, seconds: float, turn: int) -> None:
        """Run so many transactions of each way, again and again."""
        before = {name: cpu_s(connection.info.backend_pid) for name, connection in self.opened.items()}
        ends_at = time.monotonic() + seconds * len(self.ways)
        while time.monotonic() < ends_at:
            for name, way in self.ways.items():
                walls, busy = [], time.process_time()
                for _ in range(turn):
                    begun = time.perf_counter()
                    way(self.opened[name], self.statements)
                    walls.append(time.perf_counter() - begun)
                self.cpus[name].append((time.process_time() - busy) / turn)
                self.walls[name].append(statistics.median(walls))
                self.transactions += turn
        for name, connection in self.opened.items():
            self.served[name] += cpu_s(connection.info.backend_pid) - before[name]

    def rows(self) -> dict[str, str]:
        """Say what was seen, and close the connections."""
        rows = {}
        for name, taken in self.walls.items():
            self.opened[name].close()
            plain_ones = self.walls["plain, read-only" if name in READING else "plain"]
            pairs = list(zip(taken, plain_ones, strict=True))
            rows[name] = (
                f"{statistics.median(taken) * 1e6:8.1f} us  {statistics.median(a / b for a, b in pairs) - 1:+7.2%}  "
                f"{statistics.median(a - b for a, b in pairs) * 1e6:+7.1f} us   "
                f"{self.trips[name]} round trips   CPU: client {statistics.median(self.cpus[name]) * 1e6:5.1f} us, "
                f"server {self.served[name] * len(self.ways) / self.transactions * 1e6:5.1f} us"
            )
        return rows


READING: dict[str, Way] = {"plain, read-only": plain, "with flags, read-only": with_flags}
WAYS: dict[str, Way] = {"plain": plain, "with flags": with_flags, "with a SELECT of its own": with_a_select}


def connect(url: str, way: str) -> psycopg.Connection[Any]:
    connection = psycopg.connect(url, autocommit=True)
    connection.read_only = way in READING
    return connection


@contextmanager
def awake() -> Iterator[None]:
    """Keep each core from going to sleep, by processes that compute only while nobody else wants to (SCHED_IDLE)."""
    if not hasattr(os, "SCHED_IDLE"):
        print("this system has no SCHED_IDLE: its cores sleep as they like")
        yield
        return
    program = [sys.executable, "-c", _SPINNER]
    spinners = [subprocess.Popen([*program, str(core)], stdout=subprocess.PIPE) for core in os.sched_getaffinity(0)]
    try:
        for spinner in spinners:
            assert spinner.stdout is not None
            spinner.stdout.readline()  # it begins now
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.communicate()


_SPINNER = """
import os, sys
parent = os.getppid()
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


def crowd(
    title: str,
    url: str,
    seconds: float,
    *,
    clients: int,
    ways: Iterable[str],
    statements: Statements = ONE,
    pool: Callable[[int], Executor] | None = None,
) -> None:
    """
    Have several clients do the same at once, for a second each way, in turns; the first is what others add to.

    Each is a process of its own, unless another pool is given.
    """
    medians: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    busy: list[float] = []
    with (pool or processes)(clients) as workers:
        for turn in range(-1, round(seconds * 2)):
            for name in ways:
                idle = idle_s()
                seen = [workers.submit(one_of_a_crowd, url, name, statements, 1.0) for _ in range(clients)]
                walls = [wall for client in seen for wall in client.result()]
                if turn < 0:  # it came, imported, connected and prepared
                    continue
                medians[name].append(statistics.median(walls))
                rates[name].append(len(walls))
                busy.append(1 - (idle_s() - idle) / len(os.sched_getaffinity(0)))
    rows, first = {}, next(iter(medians))
    for name, taken in medians.items():
        times = statistics.median(one / base for one, base in zip(taken, medians[first], strict=True))
        rate = statistics.median(one / base for one, base in zip(rates[name], rates[first], strict=True))
        rows[name] = (
            f"{statistics.median(taken) * 1e6:8.1f} us  {times - 1:+7.2%}   "
            f"{statistics.median(rates[name]):6.0f} tx/s  {rate - 1:+7.2%}"
        )
    table(f"{title}, {clients} clients at once, cores are {statistics.median(busy):.0%} busy", rows)


def processes(clients: int) -> Executor:
    return ProcessPoolExecutor(clients, mp_context=multiprocessing.get_context("spawn"))


_mine = threading.local()


def one_of_a_crowd(url: str, name: str, statements: Statements, seconds: float) -> list[float]:
    """Run transactions of one way, in a process or thread of its own; return how long each took."""
    way = {**WAYS, **READING}[name]
    opened: dict[str, psycopg.Connection[Any]] = vars(_mine)  # this thread's
    if name not in opened:
        opened[name] = connect(url, name)
        for _ in range(50):
            way(opened[name], statements)
    connection = opened[name]
    walls = []
    ends_at = time.monotonic() + seconds
    while (begun := time.monotonic()) < ends_at:
        way(connection, statements)
        walls.append(time.monotonic() - begun)
    return walls


def idle_s() -> float:
    """Return how long all cores together had nothing to do so far; proc(5) knows it on Linux."""
    path = Path("/proc/stat")
    if not path.exists():
        return float("nan")
    _, _, _, _, idle, waiting, *_ = path.read_text().split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def round_trips(way: Way, connection: psycopg.Connection[Any], statements: Statements) -> int:
    """Count the answers that the client had to wait for, in libpq's own trace of what went over the wire."""
    with tempfile.TemporaryFile("w+") as trace:
        connection.pgconn.trace(trace.fileno())
        way(connection, statements)
        connection.pgconn.untrace()
        trace.seek(0)
        return sum("ReadyForQuery" in line for line in trace)


def cpu_s(pid: int) -> float:
    """Return what a process has computed so far, to the nanosecond; proc(5) knows it on Linux."""
    path = Path(f"/proc/{pid}/schedstat")
    return int(path.read_text().split()[0]) / 1e9 if path.exists() else float("nan")


@contextmanager
def relay(server: local.Server, round_trip_s: float) -> Iterator[str]:
    """
    Relay TCP to the server's socket in a process of its own, each way late.

    A relay adds some of its own, so a first one is timed, and the second is as much less late: a statement takes
    `round_trip_s` longer than on the socket.
    """
    with psycopg.connect(server.url(), autocommit=True) as direct:
        target = round_trip_s + answer_s(direct)
    late = round_trip_s / 2
    for attempt in range(3):
        with _relaying(server, late) as url:
            with psycopg.connect(url, autocommit=True) as connection:
                found = answer_s(connection)
            if attempt == 2:
                print(f"\na round trip takes {(found - target + round_trip_s) * 1e3:.3f} ms longer than on the socket")
                yield url
                return
            late = max(0.0, late - (found - target) / 2)


def answer_s(connection: psycopg.Connection[Any]) -> float:
    taken = []
    for _ in range(300):
        begun = time.perf_counter()
        connection.execute("SELECT 1", prepare=True)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


@contextmanager
def _relaying(server: local.Server, late_s: float) -> Iterator[str]:
    path = str(server.socket_dir / f".s.PGSQL.{server.port}")
    program = [sys.executable, "-c", _RELAY, path, str(late_s)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            yield f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable gssencmode=disable"
        finally:
            process.kill()


_RELAY = """
import ctypes, os, signal, socket, sys, threading, time
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(29, 1000)  # PR_SET_TIMERSLACK: wake up to the microsecond, not 50 later
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who ended needs nobody to look after it
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
    if os.fork():  # a process for each client: their answers wait for no common interpreter
        client.close()
        continue
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: ends with the listener
    listener.close()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    upstream = socket.socket(socket.AF_UNIX)
    upstream.connect(path)
    threading.Thread(target=pump, args=(client, upstream), daemon=True).start()
    pump(upstream, client)
    os._exit(0)
"""


def wal(server: local.Server, _: float) -> None:
    """Count the WAL that a thousand read-only transactions write; each could prune a page, so a few before."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.read_only = True
        for _ in range(100):
            with_flags(connection)
        before = written(connection)
        for _ in range(1000):
            with_flags(connection)
        table("WAL", {"1000 read-only transactions": f"{written(connection) - before:8.0f} bytes"})


def written(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
    assert row is not None
    return int(row[0])


# --------------------------------------------------------------------------------------------------------------------
# Throughput


def throughput(server: local.Server, seconds: float) -> None:
    """
    Let 16 clients run read-only transactions, with flags and without, in turns; the machine is full.

    First threads of one process and processes with psycopg, as an application has them, with one SELECT and with four;
    then pgbench, whose client costs next to nothing, so that the server's part shows. There, what is sent is what the
    helper sends, once it has prepared. What the application itself sends is prepared too, as psycopg does after five
    times, or planned each time, which makes flags look cheaper than they are.
    """
    for many, selects in {"one SELECT": ONE, "four SELECTs": FOUR}.items():
        for kind, pool in {"threads of one process": ThreadPoolExecutor, "processes": processes}.items():
            title = f"Read-only transactions of {many}, psycopg, {kind}, unix socket"
            crowd(title, server.url(), seconds, clients=CLIENTS, ways=READING, statements=selects, pool=pool)
    program = shutil.which("pgbench") or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"), reverse=True)), None
    )
    if program is None:
        print("pgbench is not installed: throughput left out")
        return
    texts = statements("eu1", write=False, isolation=None, deferrable=None)
    begin, preparing, _ = texts.openings[Form.PREPARING].decode().split("; ")
    opening = texts.openings[Form.EXECUTING].decode().replace("; ", "\\; ")
    once = f"\\if :first\n{preparing};\nPREPARE work (int) AS {WORK.replace('7', '$1')};\n\\set first 0\n\\endif\n"
    begun = {"plain": begin, "with flags": opening, "with a SELECT of its own": f"{begin};\n{LOOKUP}"}
    for how, selects in {
        "of one SELECT, prepared": "EXECUTE work (:id);\n",
        "of four SELECTs, prepared": "EXECUTE work (:id);\n" * 4,
        "of one SELECT, planned each time": f"{WORK.replace('7', ':id')};\n",
    }.items():
        rates = measured(
            server,
            program,
            {name: f"{once}\\set id random(1, {ROWS})\n{text};\n{selects}COMMIT;\n" for name, text in begun.items()},
            rounds=max(3, round(seconds * 3)),
        )
        table(
            f"Read-only transactions {how}, pgbench, {CLIENTS} clients",
            {
                name: f"{statistics.median(seen):8.0f} tx/s  "
                f"{statistics.median(one / base for one, base in zip(seen, rates['plain'], strict=True)):6.1%}"
                for name, seen in rates.items()
            },
        )


def measured(server: local.Server, program: str, scripts: dict[str, str], *, rounds: int) -> dict[str, list[float]]:
    """Run each script for a second, in turns; return transactions a second, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in scripts}
    where = ["-h", str(server.socket_dir), "-p", str(server.port), "-U", "postgres", "postgres"]
    with tempfile.TemporaryDirectory() as place:
        for _ in range(rounds):
            for name, script in scripts.items():
                path = Path(place) / "script.sql"
                path.write_text(script)
                how = ["-n", "-D", "first=1", "-f", str(path), "-c", str(CLIENTS), "-j", "2", "-T", "1"]
                ended = subprocess.run([program, *how, *where], check=True, capture_output=True, text=True)
                line = next(line for line in ended.stdout.splitlines() if line.startswith("tps"))
                rates[name].append(float(line.split()[2]))
    return rates


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
