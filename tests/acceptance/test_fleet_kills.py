"""The runner of a whole fleet is killed at random moments: status tells the truth each time, nothing is done twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import many

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Project

    from shardmig.local import Server

CUSTOMERS = 40
SEED = f"""
INSERT INTO customer (full_name, email)
SELECT 'Ada Lovelace ' || n, 'c' || n || '@example.com' FROM generate_series(1, {CUSTOMERS}) AS n;
INSERT INTO orders (customer_id, amount, street, city, zip)
SELECT id, 1, 'Street', 'City', '00001' FROM customer;
"""
SWITCHES = """
SELECT flag, before, after, count(*) FROM shardmig.log WHERE action = 'switch' GROUP BY 1, 2, 3 ORDER BY 1, min(id)"""
ONCE = [
    ("order_address", "OLD", "DUAL", 1),
    ("order_address", "DUAL", "LIVE", 1),
    ("shop", "OLD", "LIVE", 1),
    ("split_name", "OLD", "DUAL", 1),
    ("split_name", "DUAL", "LIVE", 1),
]
TRUTH = """
SELECT coalesce((SELECT count(*) = 3 AND bool_and(finished_at IS NOT NULL) FROM shardmig.migration), false)
   AND coalesce((SELECT bool_and(state = 2) FROM shardmig.flag), false)
   AND coalesce((SELECT bool_and(status = 'DONE') FROM shardmig.step), false)"""


LEFT = """
SELECT FROM pg_stat_activity
WHERE backend_type = 'client backend' AND datname LIKE 'killed%' AND pid <> pg_backend_pid()"""


@pytest.fixture
def fleet(project: Project, servers: list[Server], size: int) -> Iterator[Project]:
    """Make the project one of many seeded shards at the first revision."""
    with many(servers, size, "killed") as shards:
        project.shards = {shard.name: shard for shard in shards}
        project.write_toml('[rollout]\njobs = 8\nwaves = "all"\n')
        project.run("apply", "0001_shop", "--all")
        for name in project.shards:
            project.query(name, SEED)
        yield project


def kill_after(project: Project, log: Path, lines: int) -> bool:
    """Start `apply --all`, kill it with SIGKILL when it has told so many events; False when it ended before."""
    before = len(log.read_text().splitlines()) if log.exists() else 0
    runner = subprocess.Popen(
        [sys.executable, "-m", "shardmig", "apply", "--all", "--yes", "--log-json", str(log)],
        cwd=project.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while runner.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) - before >= lines:
            runner.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    return runner.returncode == -signal.SIGKILL


def let_servers_end(servers: list[Server]) -> None:
    """Wait for what was sent before the kill: a server carries out the flight that it has, and then hangs up."""
    for server in servers:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            while connection.execute(LEFT).rowcount > 0:
                time.sleep(0.002)


def truth(project: Project) -> dict[str, bool]:
    """Say from the shards themselves, without shardmig, which of them are done."""
    found = {}
    for name, shard in project.shards.items():
        with psycopg.connect(shard.url.get_secret_value()) as connection:
            [(done,)] = connection.execute(TRUTH).fetchall()
            found[name] = bool(done)
    return found


def told(project: Project) -> dict[str, bool]:
    status: dict[str, Any] = project.run("status", "-o", "json").json
    return {one["shard"]: one["outcome"] == "done" for one in status["shards"]}


@pytest.mark.parametrize(("size", "kills"), [(16, 3), pytest.param(64, 30, marks=pytest.mark.long)])
def test_a_killed_fleet_is_told_truly_and_finished_once(
    fleet: Project, servers: list[Server], tmp_path: Path, size: int, kills: int
) -> None:
    log, chance = tmp_path / "events.jsonl", random.Random(kills)
    killed = 0
    for _ in range(kills):
        killed += kill_after(fleet, log, chance.randint(1, 2 * size * 12 // kills))
        let_servers_end(servers)
        assert truth(fleet) == told(fleet)

    fleet.run("apply", "--all")

    assert killed >= min(kills, 3) - 1, "the runner finished before anybody killed it"
    assert {True} == set(truth(fleet).values())
    for name in fleet.shards:
        assert ONCE == fleet.query(name, SWITCHES)
        assert [(CUSTOMERS,), (CUSTOMERS,)] == fleet.query(
            name, "SELECT rows FROM shardmig.step WHERE kind = 'move' ORDER BY revision"
        )
        assert [(0,)] == fleet.query(
            name, "SELECT count(*) FROM customer WHERE full_name <> first_name || ' ' || last_name"
        )
    assert all(json.loads(line)["shard"] in fleet.shards for line in log.read_text().splitlines() if line.endswith("}"))
