"""Rows that disagree are all written to a file, range after range, whoever looks for them."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import project, shardmig
from fleets import accepted
from moving import FLAG, customers, moving, plan_of, same_table, second_table

from shardmig import checks
from shardmig.config import Config, Pace, Shard
from shardmig.errors import CheckFailed, ConfigError
from shardmig.events import BatchDone
from shardmig.fleet import Fleet
from shardmig.mismatches import exporting
from shardmig.plan import Plan, Statement
from shardmig.states import State
from shardmig.verification import verify_rows

if TYPE_CHECKING:
    import subprocess

    from conftest import Connect

    from shardmig.checks import Disagreement
    from shardmig.events import Event
    from shardmig.plan import AcceptedPlan, Move

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
U = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
SMALL = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)
TENTH = same_table(forward="UPDATE t SET b = CASE WHEN id % 10 <> 0 THEN upper(a) END WHERE {batch}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check, and no sample before it, find what is wrong, in many ranges."""
    monkeypatch.setattr(checks.Samples, "due", lambda *_: False)
    monkeypatch.setattr(checks, "RANGE_ROWS", 50)


@pytest.mark.usefixtures("small_ranges")
async def test_a_failed_check_shows_twenty_keys_and_exports_all(shard: Shard) -> None:
    async with moving(shard, TENTH, T, customers(500)) as here:
        ranges: list[Disagreement] = []
        with pytest.raises(CheckFailed, match=r"50 rows, keys (\(\d+0\), ){20}…; the flag"):
            await here.run(pace=SMALL, export=ranges.append).run()

        assert list(range(10, 501, 10)) == sorted(int(key[0]) for part in ranges for key in part.keys)
        assert len(ranges) >= 9  # one range is held in memory, never the table
        step = await here.step()
        assert (None, None) == (step.check_cursor, step.checked_at)


@pytest.mark.usefixtures("small_ranges")
async def test_without_a_file_the_first_wrong_range_ends_the_check(shard: Shard) -> None:
    async with moving(shard, TENTH, T, customers(500)) as here:
        with pytest.raises(CheckFailed, match=r" 5 rows, keys (\([1-5]0\)[,;] ){5}the flag"):
            await here.run(pace=SMALL).run()


@pytest.mark.usefixtures("small_ranges")
async def test_what_was_exported_is_not_exported_again_after_a_lost_connection(shard: Shard, connect: Connect) -> None:
    async with moving(shard, TENTH, T, customers(500)) as here:
        ranges: list[Disagreement] = []
        psql = connect(shard)

        def export(found: Disagreement) -> None:
            ranges.append(found)
            if len(ranges) == 3:
                psql.execute("SELECT pg_terminate_backend(%s)", [here.session.backend_pid])

        with pytest.raises(CheckFailed, match=" 50 rows"):
            await here.run(pace=SMALL, export=export).run()

        keys = [tuple(key) for part in ranges for key in part.keys]
        assert (50, 50) == (len(keys), len(set(keys)))


def plan_with(move: Move, *tables: str) -> list[AcceptedPlan]:
    plan = plan_of(move)
    made = tuple(Statement(sql=table) for table in tables)
    return accepted(plan.model_copy(update={"steps": (*made, *plan.steps)}))


EVEN = second_table(
    key=("table", "k"), target_key=("u_table", "u_k"), writes=("a",), restores=()
)  # a column may be called as it likes


async def test_a_csv_has_a_column_for_each_of_the_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    found = checks.Disagreement(differing=(["7", 'say "a, b"'],), orphaned=(["8", "x\ny"],))
    plans = [type("A", (), {"plan": Plan(**{**plan_of(EVEN).model_dump(), "steps": plan_of(EVEN).steps})})()]
    with exporting(path, plans) as file:
        assert file is not None
        file.add("eu1", "x", EVEN, "forward", found)
        assert 2 == file.rows

    with path.open(newline="") as text:
        assert [
            ["shard", "flag", "table", "side", "key_table", "key_k", "key_u_table", "key_u_k"],
            ["eu1", "x", "t", "new", "7", 'say "a, b"', "", ""],
            ["eu1", "x", "u", "orphan", "", "", "8", "x\ny"],
        ] == list(csv.reader(text))


async def test_lines_of_json_name_shard_flag_table_side_and_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    with exporting(path, []) as file:
        assert file is not None
        file.add("eu1", "x", same_table(), "back", checks.Disagreement(differing=(["Zürich"],)))

    assert [{"shard": "eu1", "flag": "x", "table": "t", "side": "old", "key": {"id": "Zürich"}}] == lines(path)


@pytest.mark.parametrize("name", ["missing/wrong.csv", "."])
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"--mismatches .*name a file that can be written"),
        exporting(tmp_path / name, []),
    ):
        pytest.fail("nothing may begin")


def test_a_disk_that_is_full_ends_the_check_with_its_own_words() -> None:
    one = checks.Disagreement(differing=(["1"],))
    with exporting(Path("/dev/full"), []) as file:
        assert file is not None
        with pytest.raises(ConfigError, match="/dev/full: No space left"):
            file.add("eu1", "x", same_table(), "forward", one)


# --------------------------------------------------------------------------------------------------------------------
# Verbs


async def test_rows_are_verified_while_they_move_as_far_as_they_are_moved(
    shard: Shard, connect: Connect, tmp_path: Path
) -> None:
    """Rows behind the cursor are not wrong, they are not moved yet."""
    async with moving(shard, same_table(), T, customers(200)) as here:
        config = Config.model_validate({"root": tmp_path, "shards": {shard.name: shard}})
        plans = [type("A", (), {"plan": here.plan})()]
        [none] = await verify_rows(config, plans[0], [shard])
        stop = asyncio.Event()

        def listen(event: Event) -> None:
            if isinstance(event, BatchDone) and event.rows_done >= 100:
                stop.set()

        assert not await here.run(pace=SMALL, stop=stop, listener=listen).run()
        connect(shard).execute("UPDATE t SET b = 'spoiled' WHERE id IN (7, 150)")
        with exporting(tmp_path / "wrong.jsonl", plans) as file:
            [some] = await verify_rows(config, plans[0], [shard], mismatches=file)
        assert await here.run().run()
        await here.finish()
        [all_] = await verify_rows(config, plans[0], [shard])

        assert "its rows are not moved yet" == none.note
        assert (1, (("7",),), True) == (some.rows, some.keys, some.moving)
        assert [{"id": "7"}] == [line["key"] for line in lines(tmp_path / "wrong.jsonl")]
        assert (0, False, None) == (all_.rows, all_.moving, all_.note)


def planned(tmp_path: Path, shard: Shard) -> None:
    project(
        tmp_path,
        shards=f'[shards.{shard.name}]\nurl = "{shard.url.get_secret_value()}"\n',
        move='move_rows("t", writes=("b",), forward="UPDATE t SET b = lower(a) WHERE {batch}",\n'
        '              check="SELECT id FROM t WHERE {batch} AND b IS DISTINCT FROM upper(a)")',
    )
    assert 0 == run(tmp_path, "plan").returncode


def run(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return shardmig(*arguments, cwd=where)


async def test_apply_and_switch_export_what_their_check_found(shard: Shard, connect: Connect, tmp_path: Path) -> None:
    planned(tmp_path, shard)
    assert 0 == run(tmp_path, "apply", "0001_base", "--all").returncode
    connect(shard).execute("INSERT INTO t SELECT g, 'x' || g FROM generate_series(1, 30) g")

    refused = run(tmp_path, "apply", "--all", "--mismatches", "missing/wrong.csv")
    assert 2 == refused.returncode
    assert "error: --mismatches missing/wrong.csv: No such file or directory" in refused.stderr
    assert [(None,)] == connect(shard).execute(
        "SELECT max(1) FROM information_schema.columns WHERE column_name = 'b'"
    ).fetchall()

    failed = run(tmp_path, "apply", "--all", "--aware", "1", "--mismatches", "wrong.jsonl")
    assert 1 == failed.returncode
    assert "30 rows that disagree are in wrong.jsonl" in failed.stderr
    assert list(range(1, 31)) == [int(line["key"]["id"]) for line in lines(tmp_path / "wrong.jsonl")]

    again = run(tmp_path, "switch", FLAG, "live", "--all", "--mismatches", "wrong.csv")
    assert 1 == again.returncode
    assert 31 == len((tmp_path / "wrong.csv").read_text().splitlines())

    alone = run(tmp_path, "verify", "--all", "--mismatches", "wrong.csv")
    assert (2, True) == (alone.returncode, "say whose with --data FLAG" in alone.stderr)


async def test_what_keeps_a_flag_from_done_is_exported(
    shard: Shard, connect: Connect, tmp_path: Path, small_ranges: None
) -> None:
    """Every row whose old would change on the way back, not only those of the first range."""
    plans = plan_with(
        same_table(
            table="v",
            forward="UPDATE v SET b = upper(a) WHERE {batch}",
            check="SELECT id FROM v WHERE {batch} AND b IS DISTINCT FROM upper(a)",
            back="UPDATE v SET a = lower(b) WHERE {batch}",
            back_check="SELECT id FROM v WHERE {batch} AND a IS DISTINCT FROM lower(b)",
        ),
        "CREATE TABLE v (id bigint PRIMARY KEY, a text, b text)",
    )
    fleet = Fleet(Config.model_validate({"root": tmp_path, "shards": {shard.name: shard}}), plans, [shard])
    (await fleet.apply(aware="tests")).raise_for_failures()
    connect(shard).execute("INSERT INTO v SELECT g, 'X' || g, 'x' || g FROM generate_series(1, 200) g")
    with exporting(tmp_path / "wrong.jsonl", plans) as fleet.mismatches:
        [report] = await fleet.switch(FLAG, State.DONE)

    assert "stays LIVE" in report.reason
    assert [("old", str(id_)) for id_ in range(1, 201)] == [
        (line["side"], line["key"]["id"]) for line in lines(tmp_path / "wrong.jsonl")
    ]
