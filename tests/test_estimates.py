"""`apply -n` says what moves would take and leaves no trace: no row, no lock, nothing a follower of the WAL sees."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from command_line import project, shardmig
from fleets import fleet_of
from moving import VERSIONS, customers, moving, plan_of, same_table, second_table

from shardmig import local
from shardmig.catalog import snapshot
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.estimates import Estimate, estimate
from shardmig.events import BatchDone
from shardmig.plan import Statement
from shardmig.session import open_session
from shardmig.todo import Until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from conftest import Connect

    from shardmig.events import Event
    from shardmig.fleet import Fleet

V = Statement(sql="CREATE TABLE v (id bigint PRIMARY KEY, a text, b text)")


def fleet_for(shard: Shard, **sections: Any) -> Fleet:
    move = same_table(
        table="v",
        forward="UPDATE v SET b = upper(a) WHERE {batch}",
        check="SELECT id FROM v WHERE {batch} AND b IS DISTINCT FROM upper(a)",
        back="UPDATE v SET a = lower(b) WHERE {batch}",
        back_check="SELECT id FROM v WHERE {batch} AND a IS DISTINCT FROM lower(b)",
    )
    return fleet_of([shard], plan_of(move).model_copy(update={"steps": (V, *plan_of(move).steps)}), **sections)


async def filled(fleet: Fleet, psql: psycopg.Connection[Any], rows: int) -> None:
    (await fleet.apply(until=Until.STRUCTURE)).raise_for_failures()
    psql.execute("INSERT INTO v SELECT g, 'x' || g FROM generate_series(1, %s) g", [rows])


async def forecast(fleet: Fleet) -> Estimate:
    [status] = await fleet.status(forecast=True)
    [one] = status.forecasts
    return one.estimate


async def test_a_move_that_is_left_is_estimated_on_the_shard(shard: Shard, connect: Connect) -> None:
    fleet, psql = fleet_for(shard), connect(shard)
    await filled(fleet, psql, 5000)
    psql.execute("ANALYZE v")
    guess = await forecast(fleet)

    assert (5000, "") == (guess.rows, guess.note)
    assert guess.batches is not None
    assert 1 <= guess.batches <= 100
    assert guess.seconds is not None
    assert guess.seconds > 0
    assert guess.wal_bytes is not None
    assert 5000 * 50 < guess.wal_bytes < 5000 * 2000


async def test_an_estimate_holds_within_a_factor(shard: Shard, connect: Connect) -> None:
    """Minutes are what the pace allows: here rows a second, so that no other load matters."""
    fleet, psql = fleet_for(shard, pace={"max_rows_per_s": 4000}), connect(shard)
    await filled(fleet, psql, 6000)
    psql.execute("ANALYZE v")
    guess = await forecast(fleet)
    heard: list[Event] = []
    fleet.listener = heard.append
    (await fleet.apply(aware="1")).raise_for_failures()

    assert guess.seconds == pytest.approx(1.5, rel=0.5)
    assert sum(event.rows for event in heard if isinstance(event, BatchDone)) == guess.rows


async def test_the_check_is_part_of_the_seconds(shard: Shard) -> None:
    """A comparison that takes ten milliseconds a row, of one table and of two."""
    table = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
    target = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
    sleeps = " AND pg_sleep(0.01)::text = ''"
    two = second_table()
    assert two.orphans is not None
    async with moving(shard, same_table(), table, target, customers(60), dual=False) as here:
        await here.session.execute("ANALYZE t")
        for move in (
            same_table(check=f"SELECT id FROM t WHERE {{batch}}{sleeps}"),
            second_table(orphans=f"{two.orphans}{sleeps.replace('AND', 'OR')}"),
        ):
            guess = await estimate(here.session, move, Pace(max_rows_per_s=120))

            assert guess.seconds is not None
            assert guess.check_s == pytest.approx(0.6, rel=0.3)
            assert guess.seconds == pytest.approx(0.5 + guess.check_s)


async def test_an_empty_table_has_nothing_to_move(shard: Shard, connect: Connect) -> None:
    fleet = fleet_for(shard)
    await filled(fleet, connect(shard), 0)

    assert "no rows to move" == str(await forecast(fleet))


async def test_a_table_that_was_never_analyzed_is_guessed_and_says_so(shard: Shard, connect: Connect) -> None:
    fleet, psql = fleet_for(shard), connect(shard)
    await filled(fleet, psql, 3000)
    guess = await forecast(fleet)
    few = connect(shard)
    few.execute("DELETE FROM v WHERE id > 50")

    assert "v was never analyzed, so its rows are a guess" == guess.note
    assert guess.rows is not None
    assert 300 < guess.rows < 30_000
    assert (50, "") == ((await forecast(fleet)).rows, (await forecast(fleet)).note)  # few rows are counted


async def test_before_its_columns_are_there_a_move_is_estimated_roughly(shard: Shard) -> None:
    table = "CREATE TABLE t (id bigint PRIMARY KEY, a text)"
    for move in (same_table(), second_table(), same_table(alias="t", forward="UPDATE t SET b = a WHERE {batch}")):
        async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
            await session.execute("DROP TABLE IF EXISTS t")
            await session.execute(table)
            await session.execute(customers(2000))
            await session.execute("ANALYZE t")
            guess = await estimate(session, move, Pace())

            assert (2000, "roughly, for what it fills is not there yet") == (guess.rows, guess.note)
            assert guess.seconds
            assert guess.wal_bytes
            assert [("x1",)] == (await session.execute("SELECT a FROM t WHERE id = 1")).rows


async def test_a_table_that_is_not_there_yet_has_no_estimate(shard: Shard) -> None:
    guess = await forecast(fleet_for(shard))

    assert (None, "its table is not there yet") == (guess.rows, str(guess))


async def test_what_was_moved_before_is_taken_off(shard: Shard, connect: Connect) -> None:
    small = {"batch_rows": 100, "batch_rows_min": 100, "batch_rows_max": 100}
    fleet, psql = fleet_for(shard, pace=small), connect(shard)
    await filled(fleet, psql, 2000)
    psql.execute("ANALYZE v")

    def stop(event: Event) -> None:
        if isinstance(event, BatchDone) and event.rows_done >= 1500:
            fleet.stop.set()

    fleet.listener = stop
    await fleet.apply(aware="1")
    fleet.stop.clear()
    part = await forecast(fleet)
    fleet.listener = None
    (await fleet.apply(aware="1")).raise_for_failures()
    [done] = await fleet.status(forecast=True)

    assert part.rows == pytest.approx(500, rel=0.1)
    assert () == done.forecasts


async def test_until_dual_nothing_is_moved_and_nothing_estimated(shard: Shard, connect: Connect) -> None:
    fleet = fleet_for(shard)
    await filled(fleet, connect(shard), 10)
    for until in (Until.STRUCTURE, Until.DUAL):
        [status] = await fleet.status(until=until, forecast=True)
        assert () == status.forecasts


async def test_what_the_shard_would_refuse_is_said_and_not_tried(shard: Shard, connect: Connect) -> None:
    """A trigger that fires would do more than a rolled back transaction takes back."""
    fleet, psql = fleet_for(shard), connect(shard)
    await filled(fleet, psql, 10)
    psql.execute(
        "CREATE SEQUENCE fired; CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql "
        "AS $$BEGIN PERFORM nextval('fired'); RETURN NEW; END$$;"
        "CREATE TRIGGER fire BEFORE UPDATE ON v FOR EACH ROW EXECUTE FUNCTION fire()"
    )
    [status] = await fleet.status(forecast=True)

    assert "trigger fire of v would fire for every moved row" in status.refused
    assert [(False,)] == psql.execute("SELECT is_called FROM fired").fetchall()


@pytest.mark.parametrize("until", [Until.STRUCTURE, Until.LIVE])
async def test_what_the_shard_would_refuse_is_said_before_structure_too(
    shard: Shard, connect: Connect, until: Until
) -> None:
    """Applying would refuse it then, and nothing would be moved that could be estimated."""
    connect(shard).execute("CREATE TABLE w (id bigint PRIMARY KEY, letters text)")
    adds = Statement(sql="ALTER TABLE w ADD COLUMN b text")
    move = same_table(
        table="w",
        forward="UPDATE w SET b = upper(leters) WHERE {batch}",
        check="SELECT id FROM w WHERE {batch} AND b IS DISTINCT FROM upper(leters)",
        back=None,
        back_check=None,
        restores=(),
    )
    fleet = fleet_of([shard], plan_of(move).model_copy(update={"steps": (adds, *plan_of(move).steps)}))
    [status] = await fleet.status(until=until, forecast=True)
    [applied] = (await fleet.apply(until=until)).shards

    said = "w has no column leters here, and no statement of these plans adds it; did you mean letters?"
    assert status.refused.endswith(said)
    assert applied.reason.endswith(said)
    assert ("id", "letters") == tuple(column.name for column in connect(shard).execute("TABLE w").description or ())


async def test_rows_that_stay_locked_are_said_and_the_rest_is_known(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardmig.rehearsal._TRIES", 2)
    fleet, psql = fleet_for(shard), connect(shard)
    await filled(fleet, psql, 10)
    psql.execute("BEGIN; SELECT FROM v WHERE id = 5 FOR UPDATE")

    assert "a sample of it failed: canceling statement due to lock timeout" == (await forecast(fleet)).note


async def test_a_dry_run_leaves_no_trace() -> None:
    """Catalog and rows are the same, nobody holds a lock, and whoever follows the WAL sees nothing."""
    with local.Server.start("logical", settings={"wal_level": "logical"}) as server:
        shard = Shard.model_validate({"name": "eu1", "url": server.create_database("shop")})
        fleet = fleet_for(shard)
        with psycopg.connect(server.url("shop"), autocommit=True) as psql:
            await filled(fleet, psql, 1000)
            psql.execute("ANALYZE v")
            psql.execute("CREATE PUBLICATION everything FOR ALL TABLES")
            psql.execute("SELECT pg_create_logical_replication_slot('follower', 'pgoutput')")
            changes = (
                "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('follower', NULL, NULL, "
                "'proto_version', '1', 'publication_names', 'everything')"
            )
            locks = (
                "SELECT count(*) FROM pg_locks WHERE pid NOT IN (pg_backend_pid(), %s) "
                "AND locktype IN ('relation', 'tuple', 'transactionid')"
            )
            rows = "SELECT xmin, ctid, * FROM v ORDER BY id"
            ledger = "SELECT xmin, ctid, * FROM shardmig.step"
            async with open_session(shard, SessionSettings(), pg_versions=VERSIONS, purpose="read") as looking:
                before = await snapshot(looking, ["public", "shardmig"])
                seen = [psql.execute(sql).fetchall() for sql in (rows, ledger, changes)]
                guess = await forecast(fleet)
                assert guess.seconds
                assert [(0,)] == psql.execute(locks, [looking.backend_pid]).fetchall()
                assert seen == [psql.execute(sql).fetchall() for sql in (rows, ledger, changes)]
                assert before == await snapshot(looking, ["public", "shardmig"])
            psql.execute("UPDATE v SET a = a WHERE id = 1")
            assert [(0,)] != psql.execute(changes).fetchall()  # the follower would have seen


async def test_the_command_tells_each_shard_in_text_and_json(shard: Shard, connect: Connect, tmp_path: Path) -> None:
    project(
        tmp_path,
        shards=f'[shards.eu1]\nurl = "{shard.url.get_secret_value()}"\n'
        '[shards.gone]\nurl = "postgresql://nobody@127.0.0.1:1/x?connect_timeout=1"\n',
        move='move_rows("t", forward={"b": "upper(a)"})',
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return shardmig(*arguments, cwd=tmp_path)

    assert 0 == run("plan").returncode
    assert 0 == run("apply", "0001_base", "--shard", "eu1").returncode
    connect(shard).execute("INSERT INTO t SELECT g, 'x' || g FROM generate_series(1, 40) g")
    text = run("apply", "--all", "-n")
    body = json.loads(run("apply", "--shard", "eu1", "-n", "-o", "json").stdout)

    assert 1 == text.returncode
    assert (
        "    t: about 40 rows, 1 batches, 1 s, 0.0 MB of WAL (roughly, for what it fills is not there yet)\n"
        in text.stdout
    )
    assert "gone: " in text.stdout
    [there] = body["shards"]
    [one] = there["forecasts"]
    assert ("0002_x", 3, "t", 40, 1) == (one["revision"], one["step"], one["table"], one["rows"], one["batches"])
    assert (None, True) == (there["refused"], one["seconds"] < 1)
    assert (
        0 == connect(shard).execute("SELECT count(*) FROM shardmig.migration WHERE revision = '0002_x'").fetchone()[0]
    )


async def test_an_estimate_rolls_back_what_it_tries(shard: Shard) -> None:
    table = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
    async with moving(shard, same_table(), table, customers(300), dual=False) as here:
        await estimate(here.session, here.move, Pace())

        assert [(0,)] == await here.rows("SELECT count(n) FROM t")
