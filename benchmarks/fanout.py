"""
One revision, one new table and two columns on existing tables, brought to many databases: who needs how long?

All ways in one run on the same throw-away servers, interleaved, each on databases of its own copied from one template,
so that their ratios mean something on any machine. Every way connects over TCP with a password, as it would elsewhere.

* floor: asyncio and psycopg, one transaction a database, no ledger, no check, no look: what nobody can beat;
* shardmig: with ledger, preflight, lock ladder, proof, flag, self-checks;
* alembic in one process: `alembic.command.upgrade` in a loop;
* alembic processes: `alembic upgrade head`, eight at once;
* psql: `psql -1 -f`, eight at once.

    python benchmarks/fanout.py [--databases 64] [--servers 4] [--jobs 16] [--rounds 1] [--processes 16]

Processes are measured on the first `--processes` databases only and scaled: they take a second each. A second run of
shardmig with nothing to do and `status` follow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from shardmig import local
from shardmig.config import Config, Shard
from shardmig.fleet import Fleet
from shardmig.lint import History
from shardmig.plan import AcceptedPlan, Plan, Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BASE = ("CREATE TABLE customer (id bigint PRIMARY KEY, name text)", "CREATE TABLE orders (id bigint PRIMARY KEY)")
CHANGE = (
    "CREATE TABLE address (id bigint PRIMARY KEY, city text)",
    "ALTER TABLE customer ADD COLUMN email text",
    "ALTER TABLE orders ADD COLUMN note text",
)
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
    """Databases round the servers, each a fresh copy of a template with the two tables."""

    def __init__(self, servers: Sequence[local.Server], number: int) -> None:
        self.servers, self.number = servers, number
        for server in servers:
            with psycopg.connect(server.create_database("base"), autocommit=True) as connection:
                for sql in BASE:
                    connection.execute(sql)

    def fresh(self, prefix: str) -> list[Shard]:
        """Create one database for each shard."""
        names = [f"{prefix}{next(_names)}" for _ in range(self.number)]
        with ThreadPoolExecutor(len(self.servers)) as pool:
            urls = list(pool.map(self._create, range(self.number), names))
        return [Shard.model_validate({"name": n, "url": url}) for n, url in zip(names, urls, strict=True)]

    def _create(self, place: int, name: str) -> str:
        server = self.servers[place % len(self.servers)]
        server.create_database(name, template="base")
        return server.url(name, tcp=True)

    def drop(self, shards: Sequence[Shard]) -> None:
        """Drop them again."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(
                pool.map(
                    lambda place: self.servers[place[0] % len(self.servers)].drop_database(place[1].name),
                    enumerate(shards),
                )
            )


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


def plan(revision: str, parent: str | None, statements: Sequence[str]) -> Plan:
    steps = (*(Statement(sql=sql) for sql in statements), Switch(to=State.LIVE))
    return Plan(revision=revision, parent=parent, flag=revision[5:], script_sha256="0" * 64, steps=steps)


PLANS = accepted(plan("0001_base", None, BASE), plan("0002_change", "0001_base", CHANGE))


def fleet(shards: Sequence[Shard], jobs: int) -> Fleet:
    config = Config.model_validate({"rollout": {"waves": "all"}, "session": {"lock_wait_s": 5}})
    return Fleet(config, PLANS, shards, jobs=jobs)


def begin_ledgers(shards: Sequence[Shard], jobs: int) -> None:
    """Let the ledgers know the first revision, whose tables the template has: a fleet in mid-life."""
    for url in urls(shards):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP TABLE customer, orders")
    report = asyncio.run(fleet(shards, jobs).apply(upto="0001_base"))
    report.raise_for_failures()


def ours(shards: Sequence[Shard], jobs: int) -> None:
    asyncio.run(fleet(shards, jobs).apply()).raise_for_failures()


def look(shards: Sequence[Shard], jobs: int) -> None:
    found = asyncio.run(fleet(shards, jobs).status())
    assert all(one.outcome.value == "done" for one in found)


def floor(shards: Sequence[Shard], jobs: int) -> None:
    async def one(url: str, places: asyncio.Semaphore) -> None:
        async with places, await psycopg.AsyncConnection.connect(url) as connection, connection.pipeline():
            for sql in CHANGE:
                await connection.execute(sql)

    async def everything() -> None:
        places = asyncio.Semaphore(jobs)
        async with asyncio.TaskGroup() as group:
            for url in urls(shards):
                group.create_task(one(url, places))

    asyncio.run(everything())


def alembic_ini(directory: Path) -> Path:
    (directory / "versions").mkdir()
    (directory / "env.py").write_text(ENV)
    (directory / "versions" / "1.py").write_text(REVISION.format(revision="1", parent=None, statements=()))
    (directory / "versions" / "2.py").write_text(REVISION.format(revision="2", parent="1", statements=CHANGE))
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


# --------------------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return seconds passed, and seconds of CPU of this process and its children."""
    began, cpu = time.perf_counter(), cpu_s()
    work()
    return time.perf_counter() - began, cpu_s() - cpu


def cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(databases: Databases, arguments: argparse.Namespace, place: Path) -> dict[str, list[tuple[float, float]]]:
    """Run every way once a round; per database: seconds and CPU seconds."""
    file = place / "change.sql"
    file.write_text("".join(f"{sql};\n" for sql in CHANGE))
    ini, jobs = alembic_ini(place), arguments.jobs
    psql = shutil.which("psql", path=f"{local.find_binaries().bindir}{os.pathsep}{os.environ['PATH']}")
    few = min(arguments.processes, arguments.databases)
    ways: dict[str, tuple[Callable[[Sequence[Shard]], None], int]] = {
        "floor: asyncio psycopg": (lambda shards: floor(shards, jobs), arguments.databases),
        "shardmig apply": (lambda shards: ours(shards, jobs), arguments.databases),
        "alembic, one process": (lambda shards: alembic_loop(shards, ini), arguments.databases),
        "alembic, a process each": (lambda shards: alembic_processes(shards, ini), few),
    }
    if psql:
        ways["psql, a process each"] = (lambda shards: psql_processes(shards, psql, file), arguments.databases)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for name, (work, number) in ways.items():
            shards = databases.fresh("d")
            if name.startswith("shardmig"):
                begin_ledgers(shards, jobs)
            found.setdefault(name, []).append(per(number, timed(lambda: work(shards[:number]))))  # noqa: B023
            if name.startswith("shardmig"):
                again = found.setdefault("shardmig apply, nothing to do", [])
                again.append(per(number, timed(lambda: ours(shards, jobs))))  # noqa: B023
                found.setdefault("shardmig status", []).append(per(number, timed(lambda: look(shards, jobs))))  # noqa: B023
            databases.drop(shards)
    return found


def per(number: int, measured: tuple[float, float]) -> tuple[float, float]:
    return measured[0] / number, measured[1] / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    for name, default in (("databases", 64), ("servers", 4), ("jobs", 16), ("rounds", 1), ("processes", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        local.cluster([f"s{n}" for n in range(arguments.servers)], tcp=True) as servers,
    ):
        databases = Databases(servers, arguments.databases)
        found = measure(databases, arguments, Path(place))
    base = statistics.median(seconds for seconds, _ in found["floor: asyncio psycopg"])
    print(f"{arguments.databases} databases on {arguments.servers} servers, {arguments.jobs} at once")
    print(f"{'':32}{'s / 100':>9}{'x floor':>9}{'shards/s':>10}{'client CPU ms':>15}")
    for name, rounds in found.items():
        seconds, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"{name:32}{seconds * 100:9.2f}{seconds / base:9.2f}{1 / seconds:10.0f}{cpu * 1000:15.1f}")
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
