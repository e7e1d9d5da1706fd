"""
What does an application feel while a column is added to a busy table, and when does the column land?

Two situations, all policies in one run on one throw-away server, so that their ratios mean something on any machine:

* a reader holds the table for some seconds while ten writers go on;
* twenty connections write transaction after transaction without a pause, each for a few milliseconds only.

    python benchmarks/stall.py [--reader 6] [--rounds 1]

The writers are their own process: what they feel must not be what the measuring process does.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from shardmig import local
from shardmig.config import SessionSettings, Shard
from shardmig.errors import LockNotObtained
from shardmig.locking import under_lock
from shardmig.session import Query, open_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

ROWS = 1_000
GIVE_UP_S = 12.0  # a policy that starves is stopped here

_columns = itertools.count(1)


def add_column() -> str:
    return f"ALTER TABLE customer ADD COLUMN extra_{next(_columns)} text"


# --------------------------------------------------------------------------------------------------------------------
# Policies: each adds one column, and gives up after GIVE_UP_S


async def ours(url: str, give_up_s: float) -> bool:
    settings = SessionSettings(lock_wait_s=give_up_s)
    async with open_session(Shard(name="eu1", url=url), settings, pg_versions=(12, 18)) as session:
        try:
            await under_lock(session, "customer", [Query(add_column())])
        except LockNotObtained:
            return False
    return True


async def no_timeout(url: str, give_up_s: float) -> bool:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(f"SET statement_timeout = {give_up_s * 1000:.0f}".encode())
        await connection.execute(add_column().encode())
    return True


async def half_a_second(url: str, give_up_s: float) -> bool:
    """Queue for 500 ms, then pause for 1 s, 2 s, 4 s … with jitter, as pgroll does."""
    pauses = (2**n * random.uniform(0.9, 1.1) for n in itertools.count())
    return await _again_and_again(url, give_up_s, b"SET lock_timeout = 500", add_column().encode(), pauses)


async def nowait(url: str, give_up_s: float) -> bool:
    """Try every 50 ms without queueing at all."""
    block = f"DO $$ BEGIN LOCK TABLE customer IN ACCESS EXCLUSIVE MODE NOWAIT; {add_column()}; END $$"
    return await _again_and_again(url, give_up_s, b"SELECT 1", block.encode(), itertools.repeat(0.05))


async def _again_and_again(
    url: str, give_up_s: float, prepare: bytes, try_once: bytes, pauses: Iterator[float]
) -> bool:
    deadline = time.monotonic() + give_up_s
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(prepare)
        while True:
            try:
                await connection.execute(try_once)
            except psycopg.errors.LockNotAvailable:
                pause_s = next(pauses)
                if time.monotonic() + pause_s > deadline:
                    return False
                await asyncio.sleep(pause_s)
            else:
                return True


POLICIES: dict[str, Callable[[str, float], Awaitable[bool]]] = {
    "shardmig": ours,
    "no timeout (Alembic)": no_timeout,
    "500 ms, pause 1, 2, 4 … s": half_a_second,
    "NOWAIT every 50 ms": nowait,
}


# --------------------------------------------------------------------------------------------------------------------
# The application


def application(url: str, connections: int, pause_s: float) -> None:
    """Write from some connections until told to stop on stdin; print the worst statement of each time asked."""
    worst = [0.0] * connections
    stopping = threading.Event()
    ready = threading.Barrier(connections + 1)

    def felt(connection: psycopg.Connection[object], number: int) -> None:
        row = number + connections * random.randrange(20)
        began = time.monotonic()
        connection.execute("UPDATE customer SET name = name WHERE id = %s", [row])
        worst[number] = max(worst[number], time.monotonic() - began)

    def write(number: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            ready.wait()
            while not stopping.is_set():
                with connection.transaction():
                    felt(connection, number)
                    stopping.wait(0.002)  # the application thinks, and the table stays locked meanwhile
                    felt(connection, number)
                stopping.wait(pause_s)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    ready.wait()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "reset":
            worst[:] = [0.0] * connections
            print("reset", flush=True)
        else:
            break
    stopping.set()
    for thread in threads:
        thread.join()
    print(json.dumps(max(worst)), flush=True)


class Application:
    """The process of writers, as this one sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.worst_s = 0.0
        self._process = process

    def ask(self, word: str) -> str:
        """Say a word and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextmanager
def traffic(url: str, connections: int, pause_s: float) -> Iterator[Application]:
    command = [sys.executable, __file__, "--application", url, str(connections), str(pause_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        running = Application(process)
        yield running
        running.worst_s = float(running.ask("stop"))


# --------------------------------------------------------------------------------------------------------------------
# What is measured


@dataclass(frozen=True, slots=True)
class Measured:
    """How one policy did: seconds of the worst statement, seconds until the column was there, None if never."""

    worst_s: float
    landed_s: float | None


async def behind_a_reader(url: str, policy: Callable[[str, float], Awaitable[bool]], reader_s: float) -> Measured:
    """Measure the landing from the moment the reader has left."""
    with traffic(url, connections=10, pause_s=0.005) as writers:
        async with await psycopg.AsyncConnection.connect(url) as reader:
            await reader.execute("SELECT count(*) FROM customer")
            await asyncio.sleep(0.5)  # it is an old transaction by now
            writers.ask("reset")
            adding = asyncio.create_task(_timed(policy, url, reader_s + GIVE_UP_S))
            await asyncio.sleep(reader_s)
            await reader.rollback()
            left = time.monotonic()
        landed, done = await adding
        await asyncio.sleep(0.2)
    return Measured(writers.worst_s, landed - left if done else None)


async def under_steady_traffic(url: str, policy: Callable[[str, float], Awaitable[bool]]) -> Measured:
    with traffic(url, connections=20, pause_s=0.0) as writers:
        writers.ask("reset")
        began = time.monotonic()
        landed, done = await _timed(policy, url, GIVE_UP_S)
        await asyncio.sleep(0.2)
    return Measured(writers.worst_s, landed - began if done else None)


async def nobody_migrates(url: str, connections: int, pause_s: float, seconds: float) -> float:
    """Return the worst statement without any DDL: the machine's own noise."""
    with traffic(url, connections, pause_s) as writers:
        writers.ask("reset")
        await asyncio.sleep(seconds)
    return writers.worst_s


async def _timed(policy: Callable[[str, float], Awaitable[bool]], url: str, give_up_s: float) -> tuple[float, bool]:
    done = await policy(url, give_up_s)
    return time.monotonic(), done


def table(title: str, noise_s: float, measured: dict[str, Measured], landing: str) -> None:
    ours_ms = measured["shardmig"].worst_s * 1000
    print(f"\n{title}\n")
    print(f"| policy | worst application stall, ms | times ours | {landing} |")
    print("|---|---|---|---|")
    for name, one in measured.items():
        landed = "never" if one.landed_s is None else f"{one.landed_s:.2f}"
        print(f"| {name} | {one.worst_s * 1000:,.0f} | {one.worst_s * 1000 / ours_ms:.1f} | {landed} |")
    print(f"| (no DDL at all) | {noise_s * 1000:,.0f} | {noise_s * 1000 / ours_ms:.1f} | |")


def worst_of(rounds: list[Measured]) -> Measured:
    """Return the worst of all rounds, in both columns."""
    landings = [one.landed_s for one in rounds]
    known = [landed for landed in landings if landed is not None]
    return Measured(max(one.worst_s for one in rounds), max(known) if len(known) == len(landings) else None)


async def main(reader_s: float, rounds: int) -> None:
    with local.Server.start() as server:
        url = server.url()
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute(
                f"CREATE TABLE customer AS SELECT n AS id, 'x' AS name FROM generate_series(1, {ROWS}) AS n".encode()
            )
            admin.execute("ALTER TABLE customer ADD PRIMARY KEY (id)")
        noise_s = await nobody_migrates(url, 10, 0.005, reader_s / 2)
        behind = {
            name: worst_of([await behind_a_reader(url, policy, reader_s) for _ in range(rounds)])
            for name, policy in POLICIES.items()
        }
        table(
            f"Behind a reader that holds the table for {reader_s:g} s, ten writers",
            noise_s, behind, "column there, s after the reader left",
        )  # fmt: skip
        noise_s = await nobody_migrates(url, 20, 0.0, 3.0)
        steady = {
            name: worst_of([await under_steady_traffic(url, policy) for _ in range(rounds)])
            for name, policy in POLICIES.items()
        }
        table("Under steady traffic of twenty connections", noise_s, steady, "column there, s after the start")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", type=float, default=6.0, help="seconds that the reader holds the table")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of each policy; the worst one counts")
    parser.add_argument("--application", nargs=3, metavar=("URL", "CONNECTIONS", "PAUSE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.application:
        application(chosen.application[0], int(chosen.application[1]), float(chosen.application[2]))
    else:
        asyncio.run(main(chosen.reader, chosen.rounds))
