"""Who has kept a transaction open for too long is ended on request, by each verb that drains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg
import pytest

if TYPE_CHECKING:
    from conftest import Project


def test_each_verb_ends_on_request_what_its_drain_waits_for(project: Project) -> None:
    url = project.shards["eu1"].url.get_secret_value()
    project.run("apply", "0001_shop", "--shard", "eu1")
    for command in (
        ["apply", "--aware", "r2"],
        ["switch", "split_name", "OLD"],
        ["maintenance", "read-only"],
    ):
        with psycopg.connect(url, application_name="forgotten") as forgotten:
            forgotten.execute("SELECT 1")
            pid = forgotten.info.backend_pid

            ran = project.run(*command, "--shard", "eu1", "--terminate-older-than", "0")

            assert f"pid {pid}" in ran.err
            assert "application forgotten" in ran.err
            with pytest.raises(psycopg.OperationalError, match="administrator command"):
                forgotten.execute("SELECT 1")
    history = project.run("history", "--shard", "eu1").out
    assert 3 == history.count(" terminate ")
    assert 3 == history.count("application forgotten")


def test_without_the_request_the_drain_names_who_is_open_and_gives_up(project: Project) -> None:
    project.write_toml("[session]\ndrain_timeout_s = 0.2\n")
    project.run("apply", "0001_shop", "--shard", "eu1")
    with psycopg.connect(project.shards["eu1"].url.get_secret_value()) as forgotten:
        forgotten.execute("SELECT 1")

        told = project.run("maintenance", "on", "--shard", "eu1", code=1)

        assert "--terminate-older-than SECONDS" in " ".join(told.out.split())
        forgotten.execute("SELECT 1")
