"""
Kill whoever moves rows, wherever it is: nothing is lost, nothing is done twice.

The judge is outside the engine: each forward adds one to a counter in the row that it writes, so that a row moved
twice, or never, shows it. A batch and its record commit together, hence not even one batch may be repeated.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mover import MOVES, PACE, STRETCH_ROWS
from moving import customers, moving
from servers import FaultProxy

from shardmig import laps, local, patience
from shardmig.config import Shard
from shardmig.events import BatchDone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from conftest import Connect
    from moving import Moving

    from shardmig.events import Event

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
ROWS = 2000
INDEXED = ("CREATE INDEX ON t (a)", "ANALYZE t")  # without which a table is walked once
KILLS = {"sigkill": 8, "terminate": 10, "cut": 20, "stop": 2}
MANY = {"sigkill": 400, "terminate": 300, "cut": 400, "stop": 25}
FAULTS: tuple[Callable[[FaultProxy], object], ...] = (FaultProxy.cut_before, FaultProxy.cut_after, FaultProxy.reset)
BOTH = pytest.mark.parametrize("kind", MOVES)
QUICK_AND_LONG = pytest.mark.parametrize(
    "kills", [KILLS, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(1200)])], ids=["some", "many"]
)


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laps, "FEW_ROWS", STRETCH_ROWS)
    monkeypatch.setattr(laps, "STRETCH_ROWS", STRETCH_ROWS)


def begun(shard: Shard, kind: str) -> AbstractAsyncContextManager[Moving]:
    """Begin a move over `ROWS` rows, in laps or not."""
    return moving(shard, MOVES[kind], T, U, customers(ROWS), *(INDEXED if kind == "laps" else ()))


async def judged(here: Moving, kind: str) -> None:
    """Look at every row's counter."""
    counter, joined = ("u.n", "JOIN u ON t_id = id AND u.a = t.a") if here.move.cross_table else ("t.n", "")
    assert [(ROWS, 1, 1)] == await here.rows(f"SELECT count(*), min({counter}), max({counter}) FROM t {joined}")
    step = await here.step()
    assert (ROWS, None, True) == (step.rows, step.lap, step.checked_at is not None)
    if kind == "laps":
        assert step.batches > ROWS // PACE.batch_rows
    else:
        assert step.batches == ROWS // PACE.batch_rows


async def again(here: Moving) -> None:
    """Begin the same move from nothing, with every row's counter at nothing."""
    await here.session.execute("UPDATE t SET b = NULL, n = NULL")
    await here.session.execute("TRUNCATE u")
    await here.session.execute("UPDATE shardmig.step SET bounded_at = NULL, checked_at = NULL WHERE kind = 'move'")


# --------------------------------------------------------------------------------------------------------------------
# The runner


@pytest.fixture
def movers() -> Iterator[subprocess.Popen[str]]:
    """Start the program that forks movers; killing it ends nobody else, for each mover is waited for."""
    program = Path(__file__).with_name("mover.py")
    with subprocess.Popen(
        [sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.kill()


def run_and_kill(movers: subprocess.Popen[str], shard: Shard, kind: str, after_s: float | None) -> bool:
    """Let a mover run for a while; True when it was through before it was killed."""
    assert movers.stdin is not None
    assert movers.stdout is not None
    movers.stdin.write(f"{shard.url.get_secret_value()} {kind}\n")
    movers.stdin.flush()
    pid = int(movers.stdout.readline())
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    said = movers.stdout.readline()
    if said == "moved\n":
        assert movers.stdout.readline() == "ended\n"
    return said == "moved\n"


@BOTH
@QUICK_AND_LONG
async def test_a_runner_killed_at_any_moment(
    shard: Shard, movers: subprocess.Popen[str], kind: str, kills: dict[str, int]
) -> None:
    async with begun(shard, kind) as here:
        await here.session.close()
        killed = 0
        while killed < kills["sigkill"]:
            if run_and_kill(movers, shard, kind, random.uniform(0.01, 0.15)):
                await here.session.connect()
                await judged(here, kind)
                await again(here)
                await here.session.close()
            else:
                killed += 1
        assert run_and_kill(movers, shard, kind, None)
        await here.session.connect()
        await judged(here, kind)


# --------------------------------------------------------------------------------------------------------------------
# The connection and the server


@BOTH
@QUICK_AND_LONG
async def test_a_server_process_terminated_at_any_moment(
    shard: Shard, connect: Connect, kind: str, kills: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more often than a runner would bear with one batch: that has a test of its own."""
    monkeypatch.setattr(patience, "_BREAKS", 1000)
    monkeypatch.setattr(patience, "_BROKEN_S", 0.0)
    async with begun(shard, kind) as here:
        look = connect(shard)
        end = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'shardmig eu1' AND datname = current_database()"
        )
        terminated = 0
        while terminated < kills["terminate"]:
            run = asyncio.create_task(here.run(pace=PACE).run())
            while not run.done() and terminated < kills["terminate"]:
                await asyncio.sleep(random.uniform(0.0, 0.04))
                terminated += look.execute(end).rowcount
            assert await run
            await here.session.reconnect()
            await judged(here, kind)
            await again(here)


@BOTH
@QUICK_AND_LONG
async def test_a_connection_cut_before_and_after_commit(
    shard: Shard, connect: Connect, servers: list[local.Server], kind: str, kills: dict[str, int]
) -> None:
    with FaultProxy(servers[0]) as proxy:
        through = Shard.model_validate({**shard.model_dump(), "url": proxy.url(connect(shard).info.dbname)})
        async with begun(through, kind) as here:
            cuts = 0

            def cut(event: Event) -> None:
                nonlocal cuts
                if isinstance(event, BatchDone) and random.random() < 0.2:
                    cuts += 1
                    FAULTS[cuts % 3](proxy)

            while cuts < kills["cut"]:
                assert await here.run(pace=PACE, listener=cut).run()
                proxy.heal()
                await judged(here, kind)
                await again(here)


@BOTH
@QUICK_AND_LONG
async def test_a_server_that_stops_at_once_and_recovers(kind: str, kills: dict[str, int]) -> None:
    with local.Server.start() as server:
        shard = Shard.model_validate({"name": "eu1", "url": server.create_database("shop")})
        async with begun(shard, kind) as here:
            stopped = 0
            while stopped < kills["stop"]:
                run = asyncio.create_task(here.run(pace=PACE).run())
                while not run.done() and stopped < kills["stop"]:
                    await asyncio.sleep(random.uniform(0.05, 0.2))
                    await asyncio.to_thread(server.restart, "immediate")
                    stopped += 1
                assert await run
                await here.session.reconnect()
                await judged(here, kind)
                await again(here)
