"""A migration's whole life on four real servers with different data, through the command line alone."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Project

ALL = ("eu1", "eu2", "us1", "us2")
OLD, DUAL, LIVE, DONE = range(4)

NAMES = "SELECT id, full_name, first_name, last_name FROM customer ORDER BY id"
DISAGREE = """
SELECT count(*) FROM customer
WHERE full_name IS DISTINCT FROM first_name || coalesce(' ' || last_name, '')"""
COLUMNS = """
SELECT column_name FROM information_schema.columns WHERE table_schema = 'public' AND table_name = 'customer'"""


def columns(project: Project, shard: str) -> set[str]:
    return {name for (name,) in project.query(shard, COLUMNS)}


def test_a_migration_lives_from_structure_to_done_and_back(project: Project) -> None:
    project.seed()
    before = {shard: project.query(shard, "SELECT id, full_name FROM customer ORDER BY id") for shard in ALL}

    # structure alone: columns are there, nobody reads or writes them
    project.run("apply", "--all", "--until", "structure")
    for shard in ALL:
        assert {"first_name", "last_name", "full_name"} <= columns(project, shard)
        assert {"shop": OLD, "split_name": OLD, "order_address": OLD} | {"shop": project.flags(shard)["shop"]} == (
            project.flags(shard)
        )
        assert [(0,)] == project.query(shard, "SELECT count(first_name) FROM customer")

    # everything: moved, checked, LIVE on every shard, whatever its data
    report = project.run("apply", "--all", "-o", "json").json
    assert {"done"} == {one["outcome"] for one in report["shards"]}
    for shard in ALL:
        assert {"shop": LIVE, "split_name": LIVE, "order_address": LIVE} == project.flags(shard)
        assert [(0,)] == project.query(shard, DISAGREE)
        assert before[shard] == project.query(shard, "SELECT id, full_name FROM customer ORDER BY id")
        [(orders, addresses)] = project.query(
            shard, "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM order_address)"
        )
        assert orders == addresses
        assert [] == project.query(
            shard,
            "SELECT o.id FROM orders o LEFT JOIN order_address a ON a.order_id = o.id "
            "WHERE (o.street, o.city, o.zip) IS DISTINCT FROM (a.street, a.city, a.zip)",
        )

    # nothing is left, and saying so again changes nothing
    marks = {shard: project.query(shard, "SELECT epoch FROM shardmig.shard") for shard in ALL}
    project.run("apply", "--all")
    assert marks == {shard: project.query(shard, "SELECT epoch FROM shardmig.shard") for shard in ALL}
    project.run("status", "--exit-code")
    project.run("gate", "split_name", "LIVE", "--all", "--expect", "4")

    # switching back is one commit on one shard, and apply does not overrule it
    xmin = project.query("eu1", "SELECT max(xmin::text::bigint) FROM customer")
    project.run("switch", "split_name", "DUAL", "--shard", "eu1", "--reason", "names look wrong")
    assert xmin == project.query("eu1", "SELECT max(xmin::text::bigint) FROM customer"), "no row moved"
    assert (DUAL, LIVE) == (project.flags("eu1")["split_name"], project.flags("eu2")["split_name"])
    held = project.run("apply", "--all", code=1)
    assert "split_name is DUAL" in held.out
    assert DUAL == project.flags("eu1")["split_name"]
    told = project.run("history", "--shard", "eu1").out
    assert re.search(r"^  \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d  switch .*names look wrong", told, re.MULTILINE)
    [logged] = project.run("history", "--shard", "eu1", "-o", "json").json["shards"]
    assert all(datetime.fromisoformat(line["at"]).tzinfo and "T" in line["at"] for line in logged["log"])

    # forward again, then DONE on all
    project.run("switch", "split_name", "LIVE", "--shard", "eu1")
    project.run("switch", "split_name", "DONE", "--all")
    assert {DONE} == {project.flags(shard)["split_name"] for shard in ALL}

    # writers of new alone leave old stale and out
    for shard in ("eu1", "us2"):
        project.query(shard, "UPDATE customer SET first_name = 'Dora', last_name = 'New' WHERE id <= 3")
        project.query(
            shard, "INSERT INTO customer (first_name, last_name, email) VALUES ('Only', 'New', 'n@example.com')"
        )
        assert [(4,)] == project.query(shard, DISAGREE)

    # back to DUAL: through LIVE, with a reverse move that fills old again
    project.run("switch", "split_name", "DUAL", "--all")
    for shard in ALL:
        assert DUAL == project.flags(shard)["split_name"]
        assert [(0,)] == project.query(shard, DISAGREE)
    assert [("Dora New",)] == project.query("eu1", "SELECT full_name FROM customer WHERE id = 2")
    assert {"first_name", "last_name", "full_name"} <= columns(project, "eu1")

    # and giving up: OLD; what was moved is forgotten, so that going forward again moves everything anew
    project.run("switch", "split_name", "OLD", "--shard", "eu1")
    project.query("eu1", "UPDATE customer SET full_name = 'Changed Meanwhile' WHERE id = 5")
    project.run("switch", "split_name", "LIVE", "--shard", "eu1")
    assert [("Changed", "Meanwhile")] == project.query("eu1", "SELECT first_name, last_name FROM customer WHERE id = 5")


def test_an_address_that_moved_to_a_new_table_comes_back_after_done(project: Project) -> None:
    project.seed()
    project.run("apply", "--all")
    project.run("switch", "order_address", "DONE", "--shard", "eu1")
    project.query("eu1", "UPDATE order_address SET city = 'Elsewhere' WHERE order_id <= 4")
    project.run("switch", "order_address", "DUAL", "--shard", "eu1")

    assert [(4,)] == project.query("eu1", "SELECT count(*) FROM orders WHERE city = 'Elsewhere'")


def test_a_dry_run_names_what_is_left_and_changes_nothing(project: Project) -> None:
    planned = project.run("apply", "--all", "-n")

    assert 1 == planned.out.count("0002_split_name"), "shards of which the same is to be said share it"
    assert re.search(r"^eu1, eu2, us1, us2:$", planned.out, re.MULTILINE)
    assert "ALTER TABLE" in planned.out
    for shard in ALL:
        assert [(None,)] == project.query(shard, "SELECT to_regnamespace('shardmig')")


def test_a_dry_run_tells_what_is_done_once_and_how_long_it_takes_for_each(project: Project) -> None:
    project.seed()
    project.run("apply", "--all", "--until", "structure")

    planned = project.run("apply", "--all", "-n").out

    assert 1 == planned.count("0002_split_name (")
    assert "    customer: about" not in planned, "that is one shard's"
    takes = re.findall(r"^  (\w+): 0002_split_name: customer: about (\d+) rows", planned, re.MULTILINE)
    assert [name for name, _ in takes] == [shard for shard in ALL if shard in dict(takes)]
    assert len({rows for _, rows in takes}) > 1


@pytest.mark.parametrize("disorder", ["edited", "unreadable", "HEAD"])
def test_scripts_that_are_not_in_order_keep_nobody_from_looking_at_the_fleet(project: Project, disorder: str) -> None:
    project.run("apply", "--all", "--until", "structure")
    orderly = project.run("status").out
    script = project.migrations / "0002_split_name.py"
    match disorder:
        case "edited":
            script.write_text(script.read_text().replace("sa.Text", "sa.String(40)", 1))
        case "unreadable":
            script.write_text("<<<<<<< HEAD\n")
        case _:
            (project.migrations / "HEAD").write_text("<<<<<<< ours\n")

    seen = project.run("status", code=1)

    assert orderly == seen.out
    assert seen.err.startswith("note: compared with the committed plan files, for the scripts are not in order: ")
    assert ("0002_split_name" in seen.err) == (disorder != "HEAD")
    project.run("apply", "--all", code=2)
    for verb in (
        "history",
        "maintenance on",
        "maintenance off",
        "pause split_name --reason night",
        "resume split_name",
    ):
        assert "not in order, which is not needed here" in project.run(*verb.split(), "--all").err
