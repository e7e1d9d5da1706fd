"""Moves rest and go on by a word from another terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from conftest import Project


def test_a_move_rests_until_it_is_resumed_and_apply_tells_who_wanted_it(project: Project) -> None:
    project.write_toml("[pace]\nmax_rest_s = 0.2\n")
    project.run("apply", "0001_shop", "--shard", "eu1")
    with psycopg.connect(project.shards["eu1"].url.get_secret_value()) as connection:
        connection.execute("INSERT INTO customer (email, full_name) VALUES ('ada@example.com', 'Ada Byron')")
    project.run("apply", "--shard", "eu1", "--until", "structure", "--aware", "r2")

    project.run("pause", "split_name", "--shard", "eu1", "--reason", "sale tonight")
    parked = project.run("apply", "--shard", "eu1", "--aware", "r2", code=1)
    project.run("resume", "split_name", "--shard", "eu1")
    project.run("apply", "--shard", "eu1", "--aware", "r2")

    assert "an operator paused it: sale tonight" in " ".join(parked.out.split())
    assert "sale tonight" in project.run("history", "--shard", "eu1").out


def test_what_cannot_rest_says_why(project: Project) -> None:
    no_ledger = project.run("pause", "split_name", "--shard", "eu1", code=1)
    project.run("apply", "0001_shop", "--shard", "eu1")
    not_begun = project.run("pause", "split_name", "--shard", "eu1", code=1)
    unknown = project.run("pause", "split_nam", "--shard", "eu1", code=2)
    nowhere = project.run("resume", "split_name", code=2)

    assert "no ledger" in " ".join(no_ledger.out.split())
    assert "has no flag split_name with a move" in " ".join(not_begun.out.split())
    assert "known flags" in unknown.err
    assert "--shard" in nowhere.err
