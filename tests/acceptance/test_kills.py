"""A runner killed at any moment, run again: everything ends as in a run that nobody disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shardmig.config import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Project

    from shardmig import local

RUNNER = Path(__file__).with_name("killed_runner.py")

ROWS = """
SELECT 'customer', to_jsonb(c) - 'created_at' FROM customer c
UNION ALL SELECT 'orders', to_jsonb(o) - 'created_at' FROM orders o
UNION ALL SELECT 'order_address', to_jsonb(a) FROM order_address a
ORDER BY 1, 2"""
LEDGER = """
SELECT m.revision, m.position, m.sha256, m.finished_at IS NOT NULL, s.number, s.kind, s.sha256, s.status, s.cursor,
       s.upto, s.rows, s.checked_at IS NOT NULL
FROM shardmig.migration m JOIN shardmig.step s USING (shard, revision) ORDER BY m.position, s.number"""
FLAGS = "SELECT flag, state, has_move, new_valid, old_valid FROM shardmig.flag ORDER BY flag"
SWITCHES = "SELECT flag, before, after FROM shardmig.log WHERE action = 'switch' ORDER BY id"
COLUMNS = """
SELECT c.oid::regclass::text, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
WHERE n.nspname = 'public' AND a.attnum > 0 ORDER BY 1, 2"""
INDEXES = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid FROM pg_index
WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace) ORDER BY 1"""


def picture(project: Project, shard: str) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that must not depend on how often the runner died."""
    return {
        name: project.query(shard, sql)
        for name, sql in {
            "rows": ROWS,
            "ledger": LEDGER,
            "flags": FLAGS,
            "switches": SWITCHES,
            "columns": COLUMNS,
            "indexes": INDEXES,
        }.items()
    }


@pytest.fixture
def seeded(project: Project, servers: list[local.Server]) -> Iterator[Callable[[], Project]]:
    """Return a function that makes every shard of the project a fresh copy of the seeded shop."""
    project.seed()
    made: list[tuple[local.Server, str]] = []
    templates = {name: project.database(name) for name in project.shards}

    def again() -> Project:
        for server in servers:
            if server.name not in project.shards:
                continue
            name = f"killed_{len(made)}"
            url = server.create_database(name, template=templates[server.name])
            made.append((server, name))
            project.shards[server.name] = Shard.model_validate({"name": server.name, "url": url})
        project.write_toml("[pace]\nbatch_rows = 50\nmax_rows_per_s = 6000\n")
        return project

    yield again
    for server, name in made:
        server.drop_database(name)


def kill(project: Project, *arguments: object) -> int:
    """Run the killed runner; return how many of its children died."""
    done = subprocess.run(
        [sys.executable, RUNNER, *map(str, arguments)],
        cwd=project.root, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    return int(done.stdout)


def test_fifty_kills_at_random_moments_change_nothing_of_the_result(seeded: Callable[[], Project]) -> None:
    project = seeded()
    project.run("apply", "--all")
    undisturbed = {shard: picture(project, shard) for shard in project.shards}

    kills = 0
    while kills < 50:
        died = kill(seeded(), "moments", kills, 25, 0.25)
        kills += died
        assert died, "the runner finished before anybody killed it"
        assert undisturbed == {shard: picture(project, shard) for shard in project.shards}


def test_a_kill_at_every_boundary_between_steps_changes_nothing_of_the_result(seeded: Callable[[], Project]) -> None:
    project = seeded()
    project.shards = {"eu1": project.shards["eu1"]}
    project.write_toml()
    project.run("apply", "--all")
    undisturbed = picture(project, "eu1")

    boundary = 1
    while kill(seeded(), "boundary", boundary):
        assert undisturbed == picture(project, "eu1"), f"boundary {boundary}"
        boundary += 1

    assert boundary > 12, "fewer boundaries than two migrations with a move have"
