"""A runner killed at any moment, run again: everything ends as in a run that nobody disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Project


RUNNER = Path(__file__).with_name("killed_runner.py")


def kill(project: Project, *arguments: object) -> int:
    """Run the killed runner; return how many of its children died."""
    done = subprocess.run(
        [sys.executable, RUNNER, *map(str, arguments)],
        cwd=project.root, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("wanted", [15, pytest.param(50, marks=pytest.mark.long)])
def test_kills_at_random_moments_change_nothing_of_the_result(seeded: Callable[[], Project], wanted: int) -> None:
    project = seeded()
    project.run("apply", "--all")
    undisturbed = {shard: project.picture(shard) for shard in project.shards}

    kills = 0
    while kills < wanted:
        died = kill(seeded(), "moments", kills, 25, 0.25)
        kills += died
        assert died, "the runner finished before anybody killed it"
        assert undisturbed == {shard: project.picture(shard) for shard in project.shards}


@pytest.mark.long
def test_a_kill_at_every_boundary_between_steps_changes_nothing_of_the_result(seeded: Callable[[], Project]) -> None:
    project = seeded()
    project.shards = {"eu1": project.shards["eu1"]}
    project.write_toml()
    project.run("apply", "--all")
    undisturbed = project.picture("eu1")

    copies = [seeded().shards["eu1"] for _ in range(40)]
    kills = kill(project, "boundaries", *(shard.url.get_secret_value() for shard in copies))

    assert 12 < kills < 40, "two migrations with a move have more boundaries than 12, and all must be reached"
    for number, shard in enumerate(copies[:kills], 1):
        project.shards["eu1"] = shard
        assert undisturbed == project.picture("eu1"), f"boundary {number}"
