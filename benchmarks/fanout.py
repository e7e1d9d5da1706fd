"""
One revision, brought to many databases: who needs how long?

The revision has a new table, two columns on existing tables, a small move that fills one of them, and flags. All ways
in one run on the same throw-away servers, interleaved, each on databases of its own copied from one template, so that
their ratios mean something on any machine. Every way connects over TCP with a password, as it would elsewhere.

* floor: asyncio and psycopg, one transaction a database, the move one UPDATE; no ledger, no check, no look, no flag:
  what nobody can beat;
* shardmig: with ledger, preflight, lock ladder, proof, flags, drains, checked move, self-checks;
* alembic in one process: `alembic.command.upgrade` in a loop;
* alembic processes: `alembic upgrade head`, eight at once;
* psql: `psql -1 -f`, and dbmate, where one is on the PATH: `dbmate up`, eight at once each.

    python benchmarks/fanout.py [--databases 64] [--servers 4] [--jobs 16] [--rounds 1] [--processes 16] [--rows 100]
                                [--latency-ms 0] [--ways floor,shardmig,...] [--memory]

Processes are measured on the first `--processes` databases only and scaled: they take a second each. `--rows 0` leaves
the move out. `--latency-ms` puts a proxy between every way and its servers, a process of its own that delays answers.
A second run of shardmig with nothing to do and `status` follow. `--memory` compares the peak of a process that applies
to a hundred databases with that of one that applies to all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from shardmig import local
from shardmig.config import Config, Shard
from shardmig.fleet import Fleet
from shardmig.lint import History
from shardmig.plan import AcceptedPlan, Move, Plan, Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BASE = ("CREATE TABLE customer (id bigint PRIMARY KEY, name text)", "CREATE TABLE orders (id bigint PRIMARY KEY)")
CHANGE = (
    "CREATE TABLE address (id bigint PRIMARY KEY, city text)",
    "ALTER TABLE customer ADD COLUMN email text",
    "ALTER TABLE orders ADD COLUMN note text",
)
FILL = "UPDATE customer SET email = name || '@example.com'"
ENV = """
from alembic import context
from sqlalchemy import create_engine, pool
url = context.get_x_argument(as_dictionary=True).get("url") or context.config.attributes["url"]
with create_engine(url, poolclass=pool.NullPool).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
REVISION = """
from alembic import op
revision, down_revision = {revision!r}, {parent!r}
def upgrade():
    for sql in {statements!r}:
        op.execute(sql)
"""

_names = count(1)


class Databases:
    """
    Databases round the servers, each a fresh copy of a template with the two tables.

    Args:
        servers: where.
        number: how many a way.
        rows: of the table whose column the move fills.
        ports: where each server is reached; its own, or a proxy's.
    """

    def __init__(self, servers: Sequence[local.Server], number: int, rows: int, ports: Sequence[int]) -> None:
        self.servers, self.number, self.ports = servers, number, ports
        for server in servers:
            fill = f"INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, {rows}) AS n"
            _run(server.create_database("base"), [*BASE, fill])
            server.create_database("begun")
            begun = Shard.model_validate({"name": "begun", "url": server.url("begun")})
            asyncio.run(fleet([begun], 1, rows).apply(upto="0001_base")).raise_for_failures()
            _run(server.url("begun"), [fill])

    def fresh(self, prefix: str, *, begun: bool = False) -> list[Shard]:
        """Create one database for each shard; where the first revision is `begun`, the ledger knows it."""
        names = [f"{prefix}{next(_names)}" for _ in range(self.number)]
        with ThreadPoolExecutor(len(self.servers)) as pool:
            urls = list(pool.map(lambda place, name: self._create(place, name, begun=begun), range(self.number), names))
        return [Shard.model_validate({"name": n, "url": url}) for n, url in zip(names, urls, strict=True)]

    def _create(self, place: int, name: str, *, begun: bool) -> str:
        server, port = self.servers[place % len(self.servers)], self.ports[place % len(self.servers)]
        server.create_database(name, template="begun" if begun else "base")
        if begun:  # a copy is a shard of its own
            _run(server.url(name), [f"UPDATE shardmig.shard SET shard = '{name}'"])
        return server.url(name, tcp=True).replace(f":{server.port}/", f":{port}/")

    def drop(self, shards: Sequence[Shard]) -> None:
        """Drop them again."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(
                pool.map(
                    lambda place: self.servers[place[0] % len(self.servers)].drop_database(place[1].name),
                    enumerate(shards),
                )
            )

    def cpu_s(self) -> float:
        """Return the seconds of CPU that the servers have used, processes that have ended included."""
        return sum(map(_cpu_of, [server.pid for server in self.servers]))


def _run(url: str, statements: Sequence[str]) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for sql in statements:
            connection.execute(sql.encode())


def _cpu_of(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def urls(shards: Sequence[Shard]) -> list[str]:
    return [shard.url.get_secret_value() for shard in shards]


# --------------------------------------------------------------------------------------------------------------------
# The ways; each returns after everything is committed everywhere


def accepted(*plans: Plan) -> list[AcceptedPlan]:
    history, made = History(Config().lint), []
    for plan in plans:
        made.append(history.accept(plan))
        history.add(plan)
    return made


def plan(revision: str, parent: str | None, statements: Sequence[str], move: Move | None = None) -> Plan:
    flips = (Switch(to=State.DUAL), move, Switch(to=State.LIVE)) if move else (Switch(to=State.LIVE),)
    steps = (*(Statement(sql=sql) for sql in statements), *flips)
    return Plan(revision=revision, parent=parent, flag=revision[5:], script_sha256="0" * 64, steps=steps)


MOVE = Move(
    table="customer",
    key=("id",),
    writes=("email",),
    forward=f"{FILL} WHERE {{batch}}",
    check="SELECT id FROM customer WHERE {batch} AND email IS DISTINCT FROM name || '@example.com'",
)


@cache
def plans(*, moves: bool) -> list[AcceptedPlan]:
    move = MOVE if moves else None
    return accepted(plan("0001_base", None, BASE), plan("0002_change", "0001_base", CHANGE, move))


def fleet(shards: Sequence[Shard], jobs: int, rows: int) -> Fleet:
    config = Config.model_validate({"rollout": {"waves": "all", "require_aware": False}, "session": {"lock_wait_s": 5}})
    return Fleet(config, plans(moves=rows > 0), shards, jobs=jobs)


def ours(shards: Sequence[Shard], jobs: int, rows: int) -> None:
    asyncio.run(fleet(shards, jobs, rows).apply()).raise_for_failures()


def look(shards: Sequence[Shard], jobs: int, rows: int) -> None:
    found = asyncio.run(fleet(shards, jobs, rows).status())
    assert all(one.outcome.value == "done" for one in found)


def change(rows: int) -> tuple[str, ...]:
    return (*CHANGE, FILL) if rows else CHANGE


def floor(shards: Sequence[Shard], jobs: int, rows: int) -> None:
    async def one(url: str, places: asyncio.Semaphore) -> None:
        async with places, await psycopg.AsyncConnection.connect(url) as connection, connection.pipeline():
            for sql in change(rows):
                await connection.execute(sql.encode())

    async def everything() -> None:
        places = asyncio.Semaphore(jobs)
        async with asyncio.TaskGroup() as group:
            for url in urls(shards):
                group.create_task(one(url, places))

    asyncio.run(everything())


def alembic_ini(directory: Path, rows: int) -> Path:
    (directory / "versions").mkdir()
    (directory / "env.py").write_text(ENV)
    (directory / "versions" / "1.py").write_text(REVISION.format(revision="1", parent=None, statements=()))
    (directory / "versions" / "2.py").write_text(REVISION.format(revision="2", parent="1", statements=change(rows)))
    (directory / "alembic.ini").write_text(f"[alembic]\nscript_location = {directory}\n")
    return directory / "alembic.ini"


def alembic_loop(shards: Sequence[Shard], ini: Path) -> None:
    from alembic import command  # noqa: PLC0415 - its import is not what is measured
    from alembic.config import Config as AlembicConfig  # noqa: PLC0415

    for url in urls(shards):
        config = AlembicConfig(str(ini), stdout=StringIO())
        config.attributes["url"] = _sqlalchemy(url)
        with redirect_stdout(StringIO()):
            command.upgrade(config, "head")


def _sqlalchemy(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def side_by_side(commands: Sequence[list[str]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(
            lambda words: subprocess.run(words, capture_output=True, text=True, check=False), commands
        ):
            assert done.returncode == 0, done.stderr


def alembic_processes(shards: Sequence[Shard], ini: Path) -> None:
    side_by_side(
        [
            [sys.executable, "-m", "alembic", "-c", str(ini), "-x", f"url={_sqlalchemy(url)}", "upgrade", "head"]
            for url in urls(shards)
        ]
    )


def psql_processes(shards: Sequence[Shard], psql: str, file: Path) -> None:
    side_by_side([[psql, "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", str(file), url] for url in urls(shards)])


def dbmate_processes(shards: Sequence[Shard], dbmate: str, directory: Path) -> None:
    options = ["--migrations-dir", str(directory), "--no-dump-schema"]
    side_by_side([[dbmate, "--url", f"{url}?sslmode=disable", *options, "up"] for url in urls(shards)])


# --------------------------------------------------------------------------------------------------------------------
# Ten milliseconds away


@contextmanager
def proxies(ports: Sequence[int], latency_ms: float) -> Iterator[list[int]]:
    """Let each server be reached at a port whose answers come later; without latency, at its own."""
    if not latency_ms:
        yield list(ports)
        return
    command = [sys.executable, __file__, "--proxy", str(latency_ms), *map(str, ports)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.terminate()


async def proxy(latency_ms: float, ports: Sequence[int]) -> None:
    """Listen once for each port and pass everything on, answers later; statements of one flight are delayed once."""
    loop = asyncio.get_running_loop()
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        upstream, towards = await asyncio.open_connection("127.0.0.1", port)

        async def answer() -> None:
            while data := await upstream.read(65536):
                loop.call_later(latency_ms / 1000, writer.write, data)
            loop.call_later(latency_ms / 1000, writer.close)

        answering = loop.create_task(answer())
        serving.add(answering)  # the loop itself holds its tasks weakly
        with suppress(OSError):
            while data := await reader.read(65536):
                towards.write(data)
        towards.close()
        await answering
        serving.discard(answering)

    listening = [
        await asyncio.start_server(lambda r, w, port=port: serve(r, w, port), "127.0.0.1", 0) for port in ports
    ]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in listening]), flush=True)
    await asyncio.gather(*(server.serve_forever() for server in listening))


# --------------------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What one database took, in seconds: time, CPU of this process and its children, CPU of the server."""

    passed_s: float
    client_s: float
    server_s: float


def timed(databases: Databases, work: Callable[[], None], number: int) -> Measured:
    began, cpu, servers = time.perf_counter(), cpu_s(), databases.cpu_s()
    work()
    passed_s, client_s = time.perf_counter() - began, cpu_s() - cpu
    time.sleep(0.2)  # a server process is counted when it has ended
    return Measured(passed_s / number, client_s / number, (databases.cpu_s() - servers) / number)


def cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


Way = tuple["Callable[[Sequence[Shard]], None]", int]


def ways(arguments: argparse.Namespace, place: Path) -> dict[str, Way]:
    """Return each way's work, and on how many databases it is measured."""
    jobs, rows, number = arguments.jobs, arguments.rows, arguments.databases
    few = min(arguments.processes, number)
    sql = "".join(f"{sql};\n" for sql in change(rows))
    (place / "change.sql").write_text(sql)
    (place / "dbmate").mkdir()
    (place / "dbmate" / "20260101000000_change.sql").write_text(f"-- migrate:up\n{sql}-- migrate:down\n")
    ini = alembic_ini(place, rows)
    psql = shutil.which("psql", path=f"{local.find_binaries().bindir}{os.pathsep}{os.environ['PATH']}")
    dbmate = shutil.which("dbmate")
    found: dict[str, Way] = {
        FLOOR: (lambda shards: floor(shards, jobs, rows), number),
        OURS: (lambda shards: ours(shards, jobs, rows), number),
        "alembic, one process": (lambda shards: alembic_loop(shards, ini), number),
        "alembic, a process each": (lambda shards: alembic_processes(shards, ini), few),
    }
    if psql:
        found["psql, a process each"] = (lambda shards: psql_processes(shards, psql, place / "change.sql"), number)
    if dbmate:
        found["dbmate, a process each"] = (lambda shards: dbmate_processes(shards, dbmate, place / "dbmate"), number)
    else:
        print("dbmate is not on the PATH and left out")
    chosen = arguments.ways.split(",") if arguments.ways else [""]
    return {name: way for name, way in found.items() if any(word in name for word in chosen)}


def measure(databases: Databases, arguments: argparse.Namespace, place: Path) -> dict[str, list[Measured]]:
    """Run every way once a round; what one database took."""
    jobs, rows = arguments.jobs, arguments.rows
    found: dict[str, list[Measured]] = {}
    chosen = ways(arguments, place)
    for _ in range(arguments.rounds):
        for name, (work, number) in chosen.items():
            shards = databases.fresh("d", begun=name == OURS)
            found.setdefault(name, []).append(timed(databases, lambda: work(shards[:number]), number))  # noqa: B023
            if name == OURS:
                again = timed(databases, lambda: ours(shards, jobs, rows), number)  # noqa: B023
                found.setdefault(f"{OURS}, nothing to do", []).append(again)
                seen = timed(databases, lambda: look(shards, jobs, rows), number)  # noqa: B023
                found.setdefault("shardmig status", []).append(seen)
            databases.drop(shards)
    return found


def peak_mb(shards: Sequence[Shard], arguments: argparse.Namespace) -> float:
    """Apply in a process of its own, and return its peak memory."""
    command = [sys.executable, __file__, "--peak", "--jobs", str(arguments.jobs), "--rows", str(arguments.rows)]
    given = json.dumps([{"name": shard.name, "url": shard.url.get_secret_value()} for shard in shards])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return float(done.stdout)


def tell_peak(arguments: argparse.Namespace) -> None:
    """Apply to the shards on stdin, and print the peak of this process in MB."""
    ours([Shard.model_validate(one) for one in json.load(sys.stdin)], arguments.jobs, arguments.rows)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def table(found: dict[str, list[Measured]], arguments: argparse.Namespace) -> None:
    medians = {
        name: Measured(*(statistics.median(values) for values in zip(*rounds, strict=True)))
        for name, rounds in found.items()
    }
    floor_s = medians[FLOOR].passed_s if FLOOR in medians else float("nan")
    ours_s = medians[OURS].passed_s if OURS in medians else float("nan")
    far = f", answers {arguments.latency_ms:g} ms later" if arguments.latency_ms else ""
    move = f"a move of {arguments.rows} rows" if arguments.rows else "no move"
    print(f"{arguments.databases} databases on {arguments.servers} servers, {arguments.jobs} at once, {move}{far}")
    print(f"{'':28}{'s / 100':>9}{'x floor':>9}{'x ours':>8}{'shards/s':>10}{'CPU ms: client':>16}{'server':>8}")
    for name, one in medians.items():
        ratios = f"{one.passed_s / floor_s:9.2f}{one.passed_s / ours_s:8.2f}{1 / one.passed_s:10.0f}"
        print(f"{name:28}{one.passed_s * 100:9.2f}{ratios}{one.client_s * 1000:16.1f}{one.server_s * 1000:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    for name, default in (
        ("databases", 64), ("servers", 4), ("jobs", 16), ("rounds", 1), ("processes", 16), ("rows", 100)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="how much later answers come")
    parser.add_argument("--ways", default="", help="words that a way's name must have one of, with commas between")
    parser.add_argument("--memory", action="store_true", help="compare the peak on a hundred databases with all")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--proxy", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.proxy:
        with suppress(KeyboardInterrupt):
            asyncio.run(proxy(float(arguments.proxy[0]), [int(port) for port in arguments.proxy[1:]]))
        return
    if arguments.peak:
        tell_peak(arguments)
        return
    with (
        tempfile.TemporaryDirectory() as place,
        local.cluster([f"s{n}" for n in range(arguments.servers)], tcp=True) as servers,
        proxies([server.port for server in servers], arguments.latency_ms) as ports,
    ):
        databases = Databases(servers, arguments.databases, arguments.rows, ports)
        if arguments.memory:
            shards = databases.fresh("d", begun=True)
            few, everything = peak_mb(shards[:100], arguments), peak_mb(shards, arguments)
            print(
                f"peak memory, 100 shards: {few:.0f} MB; {len(shards)}: {everything:.0f} MB; x {everything / few:.2f}"
            )
        else:
            table(measure(databases, arguments, Path(place)), arguments)


FLOOR = "floor: asyncio psycopg"
OURS = "shardmig apply"

if __name__ == "__main__":
    main()
