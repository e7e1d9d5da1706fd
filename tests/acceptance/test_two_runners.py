"""Two runners on one shard: one works, the other is told who; a stopped one that wakes up writes nothing."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import psycopg
import pytest

from shardmig.states import State

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from conftest import Project

# A minute and a half of moving: a second command may take half of that on a busy machine.
SLOW = "[pace]\nbatch_rows = 10\nbatch_rows_min = 10\nbatch_rows_max = 10\nmax_rows_per_s = 20\n"
MOVED = "SELECT coalesce(sum(batches), 0)::int FROM shardmig.step WHERE kind = 'move'"


def until(true: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 30) -> None:
    """Wait for something that another process does; fail if that process ends first."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def moving(project: Project) -> subprocess.Popen[str]:
    """Start a slow runner on eu1 and return when its first batches are in."""
    project.seed()
    project.write_toml(SLOW)
    runner = project.start("apply", "--shard", "eu1")
    until(lambda: _batches(project) > 2, runner)
    return runner


def _batches(project: Project) -> int:
    try:
        return int(project.query("eu1", MOVED)[0][0])
    except Exception:  # noqa: BLE001 - the ledger is not there yet
        return 0


def test_the_second_of_two_runners_is_told_who_works_there(project: Project) -> None:
    first = moving(project)

    second = project.run("apply", "--shard", "eu1", code=1)

    assert "parked" in second.out
    assert str(first.pid) in second.out or "another runner" in second.out.lower()
    assert "worked on by" in project.run("status", "--shard", "eu1").out
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=30)
    assert 130 == first.returncode, (out, err)
    project.write_toml()
    project.run("apply", "--shard", "eu1")


def test_a_stopped_runner_that_was_taken_over_writes_nothing_when_it_wakes(project: Project) -> None:
    zombie = moving(project)
    os.kill(zombie.pid, signal.SIGSTOP)
    try:
        project.write_toml()
        project.run("apply", "--shard", "eu1", "--take-over")
        after = project.query("eu1", "SELECT * FROM shardmig.step ORDER BY revision, number")
        logged = project.query("eu1", "SELECT count(*) FROM shardmig.log")
        rows = project.query("eu1", "SELECT xmin, * FROM customer ORDER BY id")
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    out, _ = zombie.communicate(timeout=60)

    assert 1 == zombie.returncode, out
    assert "eu1" in out
    assert after == project.query("eu1", "SELECT * FROM shardmig.step ORDER BY revision, number")
    assert logged == project.query("eu1", "SELECT count(*) FROM shardmig.log")
    assert rows == project.query("eu1", "SELECT xmin, * FROM customer ORDER BY id")


def test_ctrl_c_ends_at_a_safe_place_and_apply_goes_on_from_there(project: Project) -> None:
    runner = moving(project)

    runner.send_signal(signal.SIGINT)
    out, _ = runner.communicate(timeout=30)

    assert 130 == runner.returncode
    assert "interrupted" in out
    [(cursor, rows)] = project.query(
        "eu1", "SELECT cursor, rows FROM shardmig.step WHERE kind = 'move' AND cursor IS NOT NULL"
    )
    assert cursor
    assert 0 < rows < 1200
    project.write_toml()
    project.run("apply", "--shard", "eu1")
    assert [(1200,)] == project.query(
        "eu1", "SELECT rows FROM shardmig.step WHERE revision = '0002_split_name' AND kind = 'move'"
    )


FLAG = "SELECT state, drained, new_valid, old_valid FROM shardmig.flag WHERE flag = 'split_name'"
SWITCHES = "SELECT before, after FROM shardmig.log WHERE action = 'switch' AND flag = 'split_name' ORDER BY id"


@pytest.mark.parametrize(
    ("verb", "stays", "goes"),
    [
        (["apply", "0002_split_name"], (State.DUAL, False, False, True), (State.LIVE, False, True, True)),
        (["switch", "split_name", "DONE"], (State.LIVE, False, True, True), (State.DONE, False, True, False)),
    ],
    ids=["before the move", "before DONE"],
)
def test_ctrl_c_during_a_drain_leaves_a_lawful_state(
    project: Project, verb: list[str], stays: tuple[object, ...], goes: tuple[object, ...]
) -> None:
    """A transaction that stays open keeps the drain waiting: nothing was moved, nothing is vouched for, all goes on."""
    project.seed()
    if verb[0] == "switch":
        project.run("apply", "0002_split_name", "--shard", "eu1")
    with psycopg.connect(project.shards["eu1"].url.get_secret_value(), autocommit=True) as reader:
        reader.execute("BEGIN; SELECT 1")
        runner = project.start(*verb, "--shard", "eu1")
        until(lambda: _drains(project), runner)
        pid = f"pid {reader.info.backend_pid}"
        assert f"oldest transaction there: {pid}" in project.run("status", code=None).out
        runner.send_signal(signal.SIGINT)
        out, err = runner.communicate(timeout=30)

        assert 130 == runner.returncode, (out, err)
        assert f"it waited for {pid}" in out
        assert f"eu1  drains split_name: {pid}" in err
        assert [stays] == project.query("eu1", FLAG)
        assert (verb[0] == "apply") == (project.query("eu1", MOVED) == [(0,)])

    project.run(*verb, "--shard", "eu1")
    assert [goes] == project.query("eu1", FLAG)
    edges = [("OLD", "DUAL"), ("DUAL", "LIVE"), ("LIVE", "DONE")]
    assert edges[: 2 if verb[0] == "apply" else 3] == project.query("eu1", SWITCHES)


def _drains(project: Project) -> bool:
    """Whether a session of shardmig looks for who is open."""
    looks = project.query(
        "eu1",
        "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database() "
        "AND query LIKE '%l.locktype = ''virtualxid''%'",
    )
    return bool(looks)
