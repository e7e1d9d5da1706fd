"""A COMMIT whose answer never comes is decided by the step row or the flag, whichever COMMIT of a run it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from servers import FaultProxy

from shardmig.cli import project as cli_project

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Project

    from shardmig.local import Server


@pytest.mark.long
@pytest.mark.parametrize("after", [True, False], ids=["after COMMIT", "before COMMIT"])
async def test_a_connection_cut_at_any_commit_changes_nothing_of_the_result(
    seeded: Callable[[], Project],
    servers: list[Server],
    after: bool,  # noqa: FBT001 - two cases of one story
) -> None:
    project = seeded()
    project.shards = {"eu1": project.shards["eu1"]}
    project.write_toml()
    project.run("apply", "--all")
    undisturbed = project.picture("eu1")

    with FaultProxy(servers[0]) as proxy:
        number = 0
        while True:
            project = seeded()
            project.write_toml(urls={"eu1": proxy.url(project.database("eu1"))})
            here = cli_project.load(project.root / "shardmig.toml")
            cut = proxy.cut_after(skip=number) if after else proxy.cut_before(skip=number)
            report = await here.fleet(list(here.config.shards.values())).apply()
            proxy.heal()

            assert report.done, list(report)
            assert undisturbed == project.picture("eu1"), f"COMMIT {number}"
            if not cut.struck.is_set():
                break
            number += 1 if after else 3  # one cut before COMMIT is much like another: the server rolls back

    assert number > 8, "fewer COMMITs than two migrations with a move have"
