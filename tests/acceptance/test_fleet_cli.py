"""What an operator of a fleet types: waves need a yes, events go to a file, two shards are compared."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Project


def test_several_waves_without_a_terminal_need_a_yes(project: Project) -> None:
    refused = project.run("apply", "--all", code=2, env={"SHARDMIG_YES": "0"})

    assert re.search(r"canary \(eu1\); wave 1 \(eu2\); wave 2 \(us1, us2\)", refused.err)
    assert "--yes" in refused.err
    assert [(None,)] == project.query("eu1", "SELECT to_regnamespace('shardmig')")
    project.run("apply", "0001_shop", "--shard", "eu1", "--shard", "us1", env={"SHARDMIG_YES": "0"})


def test_failed_means_the_shards_that_are_not_done_and_events_are_lines_of_json(
    project: Project, tmp_path: Path
) -> None:
    log = tmp_path / "events.jsonl"
    project.run("apply", "0001_shop", "--all")
    project.run("apply", "--shard", "eu1", "--shard", "eu2")

    project.run("apply", "--all", "--failed", "--log-json", str(log))

    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"us1", "us2"} == {event["shard"] for event in events if event["event"] == "StepStarted"}
    assert {"done"} == {event["outcome"] for event in events if event["event"] == "OutcomeReached"}
    assert all(event["seconds"] >= 0 and event["revision"] for event in events if event["event"] == "StepDone")
    assert ["OLD", "DUAL"] == [
        event["before"]
        for event in events
        if event["event"] == "FlagSwitched" and (event["shard"], event["flag"]) == ("us1", "split_name")
    ]


def test_a_shard_that_fails_again_stops_no_other_one_when_only_failed_ones_are_meant(project: Project) -> None:
    """The canary is done, so it is still the canary: else the first that failed would be."""
    project.run("apply", "--shard", "eu1")
    project.query("eu2", "CREATE SCHEMA shardmig")

    again = project.run("apply", "--all", "--failed", code=1).out

    assert re.search(r"^eu2 +failed", again, re.MULTILINE)
    assert re.search(r"^us1 +done", again, re.MULTILINE)
    assert "3 of 4 shards done (1 failed)" in again

    assert "eu2: a schema shardmig is there" in project.run("history", "--all", code=1).out
    verified = project.run("verify", "--all", "--data", "split_name", code=1).out
    assert "not looked at: eu2: a schema shardmig is there" in verified
    assert "eu2  customer: a schema shardmig is there" in verified
    assert "eu1, us1, us2: nothing to do" in project.run("apply", "--all", "-n", code=1).out


def test_parts_of_the_fleet_make_the_whole_and_status_counts_outcomes(project: Project) -> None:
    project.run("apply", "0001_shop", "--all")
    for part in ("1/3", "2/3", "3/3"):
        project.run("apply", "--all", "--expect", "4", "--partition", part)

    assert "4 of 4 shards are there" in project.run("status", "--exit-code", "--watch").out

    project.run("maintenance", "on", "--shard", "us1", "--reason", "disk")
    assert "3 of 4 shards are there (1 in maintenance)" in project.run("status").out


def test_two_shards_are_the_same_until_one_is_switched(project: Project) -> None:
    project.run("apply", "--all")
    assert "are the same" in project.run("gate", "--same", "eu1", "us1").out

    project.run("switch", "split_name", "DUAL", "--shard", "us1")

    differ = project.run("gate", "--same", "eu1", "us1", code=1)
    assert "flag split_name: eu1 LIVE, old valid, new valid; us1 DUAL, old valid, new valid" in differ.out


def test_a_shard_whose_old_is_stale_is_like_none_where_it_is_valid(project: Project) -> None:
    """Rows of it would be read as they were before DONE, where the other shard goes back without a check."""
    project.run("apply", "--all")
    project.run("switch", "split_name", "DONE", "--shard", "us1")
    project.run("switch", "split_name", "LIVE", "--shard", "us1")

    differ = project.run("gate", "--same", "eu1", "us1", code=1)
    assert "flag split_name: eu1 LIVE, old valid, new valid; us1 LIVE, new valid" in differ.out


def test_a_gate_of_the_configuration_takes_the_canary_back_and_halts(project: Project) -> None:
    project.seed()
    project.write_toml("[rollout]\ngate = \"sh -c 'echo smoke on {shard}; exit 1'\"\n")

    halted = project.run("apply", "--all", code=1)

    assert re.search(r"eu1 +failed .*smoke on eu1; order_address is DUAL again; split_name is DUAL again", halted.out)
    assert "0 of 4 shards done (3 pending, 1 failed)" in halted.out
    assert {"shop": 2, "split_name": 1, "order_address": 1} == project.flags("eu1")
    assert {"shop": 2} == project.flags("us1")
    project.write_toml("[rollout]\ngate = 'true'\n")
    project.run("apply", "--all")


def test_a_new_shard_is_provisioned_and_a_renamed_one_keeps_its_past(project: Project) -> None:
    new = project.shards.pop("us2")
    project.write_toml()
    project.run("apply", "--all")
    project.shards["us2"] = new
    project.write_toml()

    project.run("provision", "us2")

    project.run("status", "--exit-code")
    project.run("provision", "us2", code=1)
    project.shards["us9"] = project.shards.pop("us2").model_copy(update={"name": "us9"})
    project.write_toml()
    assert "wrong shard" in project.run("status", "--shard", "us9").out
    project.run("shard", "rename", "us9", "--was", "us2", "--reason", "moved house")
    project.run("status", "--exit-code")
    assert re.search("rename +us2 → us9.*moved house", project.run("history", "--shard", "us9").out)


@pytest.mark.parametrize("sure", [True, False])
def test_a_frozen_step_is_amended_where_the_data_breaks_it(
    project: Project,
    sure: bool,  # noqa: FBT001 - two cases of one story
) -> None:
    """The script is corrected, reviewed and committed as any other; only the shard that needs it takes it."""
    project.run("apply", "0001_shop", "--all")
    project.query("us1", "INSERT INTO customer (full_name, email) VALUES ('Plato', 'p@example.com')")
    path = project.migrations / "0002_split_name.py"
    text = path.read_text()
    naive = text.replace(
        "forward={", 'forward={\n            "first_name": "(1 / (position(\' \' in full_name)))::text",'
    )
    naive = re.sub(r'\n\s*"first_name": "split_part[^\n]*', "", naive, count=1)
    path.write_text(naive)
    project.run("plan", "0002_split_name")
    failed = project.run("apply", "--all", code=1)
    assert re.search("us1 +failed.*division by zero", failed.out)
    [(begun,)] = project.query("us1", "SELECT sha256 FROM shardmig.migration WHERE revision = '0002_split_name'")

    path.write_text(text)
    project.run("plan", "0002")
    if not sure:
        amended = project.run("amend", "0002", "--shard", "us1", "--reason", "one word", code=1)
        assert f'amends = ("{begun}",)' in amended.out
        return
    changed = project.run("apply", "--shard", "us1", code=1).out
    shown = project.run("show", "0002", "--shard", "us1").out
    assert shown.startswith("us1: OLD\n  1. statement DONE\n")
    assert "--- begun\n+++ committed\n" in shown
    assert re.search("us1 +plan changed .*amend what is not finished$", project.run("status").out, re.MULTILINE)
    for step in re.findall(r"^  \d\. (.*)$", changed, re.MULTILINE):  # typed as it stands
        if step.startswith("write into the script, below its revision:  "):
            path.write_text(re.sub("(?m)(?<=^)(revision, .*)$", rf"\1\n{step.split('  ')[1]}", path.read_text()))
        else:
            verb, *arguments = shlex.split(step.replace("…", "one word"), comments=True)
            assert "shardmig" == verb
            project.run(*arguments)
    project.run("amend", "0002", "--all", "--reason", "nothing is left to amend")
    project.run("apply", "--all")
    project.run("status", "--exit-code")
    assert [("one word",)] == project.query("us1", "SELECT reason FROM shardmig.amendment")
    assert "one word" in project.run("history", "--shard", "us1").out


def test_status_of_many_shards_and_flags_says_what_is_not_as_everywhere(project: Project) -> None:
    """24 schemas as shards, six flags, two shards applied, one of them switched back."""
    names = [f"n{number:02}" for number in range(1, 25)]
    url = project.shards["eu1"].url.get_secret_value()
    for name in names:
        project.query("eu1", f"CREATE SCHEMA {name}")
    sections = [f'[shards.{name}]\nurl = "{url}"\nschema = "{name}"\n' for name in names]
    (project.root / "shardmig.toml").write_text("\n".join(["[rollout]\nrequire_aware = false\n", *sections]))
    shutil.rmtree(project.migrations)
    project.run("init")
    for number in range(1, 7):
        project.run("revision", "-m", f"step {number}")
        script = project.migrations / f"{number:04}_step_{number}.py"
        table = f'op.create_table("t{number}", sa.Column("id", sa.Integer, primary_key=True))'
        script.write_text(
            re.sub(r"    # Additions.*\n    pass\n", f"    {table}\n", script.read_text(), flags=re.DOTALL)
        )
    project.run("plan")
    project.run("apply", "0006", "--shard", "n01", "--shard", "n02")
    project.run("switch", "step_3", "OLD", "--shard", "n02")

    table = project.run("status").out.splitlines()

    expected = """
        n01                          done            0006_step_6
        n02                          pending         0006_step_6  step_3 OLD; step_3 is held at OLD
        22 shards: n03, n04, n05, …  pending         -            left: 0001_step_1 … 0006_step_6 (6 revisions)
        6 flags on 2 shards: 5 LIVE on all; 1 differs: step_3 LIVE on 1, OLD on 1
        head 0006_step_6; 1 of 24 shards are there (23 pending)"""
    assert [line.strip() for line in expected.splitlines() if line] == table

    one = project.run("status", "--flag", "step_3", "--shard", "n01", "--shard", "n02").out.splitlines()
    assert ["step_3 LIVE", "step_3 OLD; step_3 is held at OLD"] == [line.split("step_6  ")[1] for line in one[:2]]
    assert "step_3 LIVE on 1, OLD on 1" == one[2]
    assert 25 == len(project.run("status", "--wide").out.splitlines())
    assert "known flags: step_1" in project.run("status", "--flag", "stpe_3", code=2).err
    assert {"step_3": "LIVE"} == project.run("status", "--flag", "step_3", "-o", "json").json["shards"][0]["flags"]


def test_a_small_shard_is_closed_for_a_while_and_a_large_one_is_told_of(project: Project) -> None:
    """Here 1,200 customers are large and one is small."""
    project.seed()
    script = project.root / "migrations" / "0002_split_name.py"
    script.write_text(script.read_text().replace("relax = ", "online = False\nrelax = "))
    project.write_toml("[maintenance]\nrows_max = 200\n")
    project.run("plan")

    small = project.run("apply", "0002", "--aware", "r2", "--shard", "eu2")
    large = project.run("apply", "0002", "--shard", "eu1", code=1)

    assert re.search(r"eu2 +offline: 0002_split_name is being applied\neu2 +serves again", small.err)
    assert "more than maintenance.rows_max = 200, so it was not closed" in re.sub(r"\s+", " ", large.out)
    project.run("maintenance", "on", "--shard", "eu1")
    project.run("apply", "0002", "--shard", "eu1")
    project.run("maintenance", "off", "--shard", "eu1")
    assert {"shop": 2, "split_name": 2} == project.flags("eu1") == project.flags("eu2")
