"""An older ledger becomes the newest one in passing: at once or not at all, while the application goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from fleets import NOTE, SHOP, UPPER, fleet_of
from moving import VERSIONS, blocked

from shardmig import Flag, Flags, State, ledger
from shardmig.config import SessionSettings, Shard
from shardmig.errors import LockNotObtained, ShardError
from shardmig.events import StepDone
from shardmig.outcomes import Outcome
from shardmig.records import read_records
from shardmig.session import open_session
from shardmig.turn import Turn, begin_migration
from shardmig.verification import verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import psycopg
    from conftest import Connect

    from shardmig.events import Event

ONE = ledger.STEPS
TWO = """
ALTER TABLE shardmig.step ADD COLUMN note text;
COMMENT ON COLUMN shardmig.step.note IS 'What a second version adds';
CREATE TABLE shardmig.extra (shard text PRIMARY KEY REFERENCES shardmig.shard ON UPDATE CASCADE);
"""
STOP = 4711  # an advisory lock that a step waits for: the test decides when it goes on

UPPER_NAME = Flag("upper")


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, ...]]:
    """Make this process a newer shardmig, whose ledger has a second version."""

    def upgrade(sql: str = TWO) -> tuple[str, ...]:
        path = tmp_path / "ledger_2.sql"
        path.write_text(sql, encoding="utf-8")
        steps = (*ONE, str(path))
        monkeypatch.setattr(ledger, "STEPS", steps)
        return steps

    return upgrade


def older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the older shardmig again."""
    monkeypatch.setattr(ledger, "STEPS", ONE)


async def install(shard: Shard, **settings: Any) -> None:
    """Install or upgrade, without hurry: the lock that a step waits for is the test's own."""
    patient = SessionSettings(**{"lock_timeout_ms": (10_000,), **settings})
    async with open_session(shard, patient, pg_versions=VERSIONS) as session:
        await ledger.install(session)


async def held_back(psql: psycopg.Connection[Any], count: int) -> None:
    """Wait until so many sessions of this database wait for an advisory lock."""
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    async with asyncio.timeout(20):
        while psql.execute(waiting).fetchone() != (count,):
            await asyncio.sleep(0.002)


def version(psql: psycopg.Connection[Any]) -> int:
    [(found,)] = psql.execute("SELECT shardmig.ledger_version()").fetchall()
    return int(found)


def columns(psql: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    return psql.execute(
        "SELECT table_name::text, column_name::text FROM information_schema.columns "
        "WHERE table_schema = 'shardmig' ORDER BY 1, ordinal_position"
    ).fetchall()


async def test_a_newer_runner_upgrades_in_passing_and_everything_goes_on(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    assert (await fleet_of([shard], SHOP, UPPER).apply()).done
    psql = connect(shard)
    newer()

    assert (await fleet_of([shard], SHOP, UPPER).apply()).done

    assert 2 == version(psql)
    assert ("step", "note") in columns(psql)
    upgrades = psql.execute("SELECT shard, before, after FROM shardmig.log WHERE action = 'upgrade'").fetchall()
    assert [(shard.name, "1", "2")] == upgrades
    assert (await fleet_of([shard], SHOP, UPPER, NOTE).apply()).done
    assert (await fleet_of([shard], SHOP, UPPER, NOTE).switch("upper", State.DUAL)).done


@pytest.mark.parametrize("verb", ["switch", "maintain"])
async def test_every_verb_that_writes_upgrades_first(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]], verb: str
) -> None:
    assert (await fleet_of([shard], SHOP, UPPER).apply()).done
    newer()
    fleet = fleet_of([shard], SHOP, UPPER)

    report = await (fleet.switch("upper", State.DUAL) if verb == "switch" else fleet.maintain("read-only"))

    assert report.done
    assert 2 == version(connect(shard))


async def test_a_new_shard_and_an_upgraded_one_have_the_same_ledger(
    shards: dict[str, Shard], connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    old, new = shards["eu1"], shards["eu2"]
    await install(old)
    newer()

    await install(old)
    await install(new)

    assert columns(connect(new)) == columns(connect(old))
    assert 2 == version(connect(new)) == version(connect(old))


async def test_what_only_reads_reads_the_older_ledger_and_leaves_it(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    assert (await fleet_of([shard], SHOP, UPPER).apply()).done
    newer()
    fleet = fleet_of([shard], SHOP, UPPER)

    [status] = await fleet.status()
    [verdict] = await verify(fleet.config, fleet.plans, [shard], None)

    assert (Outcome.DONE, "its ledger is version 1, the next apply brings it to 2") == (status.outcome, status.reason)
    assert verdict.sound
    assert 1 == version(connect(shard))


async def test_a_ledger_too_old_to_be_read_names_the_command_that_upgrades_it(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, newer: Callable[..., tuple[str, ...]]
) -> None:
    assert (await fleet_of([shard], SHOP).apply()).done
    newer()
    monkeypatch.setattr("shardmig.records._STEPS", "SELECT note FROM shardmig.step WHERE shard = $1")
    fleet = fleet_of([shard], SHOP)

    [status] = await fleet.status()

    assert Outcome.FAILED is status.outcome
    assert f"`shardmig apply --shard {shard.name}` upgrades it" in status.reason
    monkeypatch.setattr("shardmig.records._STEPS", "SELECT *, note FROM shardmig.step WHERE shard = $1 AND false")
    assert (await fleet.apply()).done


async def test_an_older_runner_refuses_a_newer_ledger_and_says_what_to_upgrade(
    shard: Shard, monkeypatch: pytest.MonkeyPatch, newer: Callable[..., tuple[str, ...]]
) -> None:
    newer()
    await install(shard)
    older(monkeypatch)
    fleet = fleet_of([shard], SHOP)

    [applied], [status] = await fleet.apply(), await fleet.status()
    [verdict] = await verify(fleet.config, fleet.plans, [shard], None)

    cure = "its ledger is version 2, this shardmig knows 1; upgrade shardmig here"
    assert (Outcome.FAILED, Outcome.FAILED) == (applied.outcome, status.outcome)
    assert all(cure in str(said) for said in (applied.reason, status.reason, verdict.problem))
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        with pytest.raises(ShardError, match="upgrade shardmig here"):
            await ledger.install(session)


async def test_two_runners_that_upgrade_one_database_at_once_upgrade_it_once(
    servers: list[Any],
    fresh_database: Callable[[Any], str],
    connect: Connect,
    newer: Callable[..., tuple[str, ...]],
) -> None:
    url = fresh_database(servers[0])
    psql = connect(url)
    parts = [Shard.model_validate({"name": f"s{n}", "url": url, "schema": f"s{n}"}) for n in range(2)]
    for one in parts:
        psql.execute(f"CREATE SCHEMA {one.schema_name}")
        await install(one)
    newer(f"SELECT pg_advisory_xact_lock({STOP}); {TWO}")
    psql.execute(f"SELECT pg_advisory_lock({STOP})")

    both = [asyncio.create_task(install(one)) for one in parts]
    await held_back(psql, 2)  # one at the step's own lock, the other at the installers'
    psql.execute(f"SELECT pg_advisory_unlock({STOP})")
    await asyncio.gather(*both)

    assert 2 == version(psql)
    assert [(2,)] == psql.execute("SELECT count(*) FROM shardmig.log WHERE action = 'upgrade'").fetchall()


async def test_a_runner_of_the_version_before_finishes_what_it_does_next_door(
    servers: list[Any],
    fresh_database: Callable[[Any], str],
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    newer: Callable[..., tuple[str, ...]],
) -> None:
    url = fresh_database(servers[0])
    for name in ("s0", "s1"):
        connect(url).execute(f"CREATE SCHEMA {name}")
    first, second = (Shard.model_validate({"name": name, "url": url, "schema": name}) for name in ("s0", "s1"))
    fleet = fleet_of([first], SHOP, UPPER, lint={"schemas": ["s0", "s1"]})
    upgraded: list[Event] = []

    def upgrade_between_two_steps(event: Event) -> None:
        if isinstance(event, StepDone) and not upgraded:
            upgraded.append(event)
            newer()
            with ThreadPoolExecutor(1) as neighbour:
                neighbour.submit(asyncio.run, install(second)).result()
            older(monkeypatch)

    fleet.listener = upgrade_between_two_steps

    report = await fleet.apply()

    report.raise_for_failures()
    assert 1 == len(upgraded)
    assert 2 == version(connect(url))


def test_a_runner_killed_in_the_middle_leaves_the_older_ledger_whole(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    asyncio.run(install(shard))
    psql, witness = connect(shard), connect(shard)
    before = columns(witness)
    steps = newer(f"{TWO} SELECT pg_advisory_xact_lock({STOP});")
    psql.execute(f"SELECT pg_advisory_lock({STOP})")
    script = (
        "import asyncio, sys\n"
        "from shardmig import ledger\n"
        "from shardmig.config import SessionSettings, Shard\n"
        "from shardmig.session import open_session\n"
        f"ledger.STEPS = {steps!r}\n"
        "async def main():\n"
        "    shard = Shard.model_validate({'name': sys.argv[1], 'url': sys.argv[2]})\n"
        "    patient = SessionSettings(lock_timeout_ms=(10_000,))\n"
        "    async with open_session(shard, patient, pg_versions=(14, 18)) as session:\n"
        "        await ledger.install(session)\n"
        "asyncio.run(main())\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", script, shard.name, shard.url.get_secret_value()])
    asyncio.run(held_back(witness, 1))

    runner.kill()
    runner.wait()
    psql.execute(f"SELECT pg_advisory_unlock({STOP})")

    asyncio.run(install(shard))  # queues behind the dying backend, then does it anew
    assert 2 == version(witness)
    assert len(before) + 2 == len(columns(witness))
    assert [("1", "2")] == witness.execute("SELECT before, after FROM shardmig.log WHERE action = 'upgrade'").fetchall()


async def test_an_application_inside_a_transaction_neither_waits_nor_is_waited_for(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    assert (await fleet_of([shard], SHOP, UPPER).apply()).done
    newer(f"{TWO} SELECT pg_advisory_xact_lock({STOP});")
    flags = Flags(UPPER_NAME)
    inside, another, psql = connect(shard), connect(shard), connect(shard)
    psql.execute(f"SELECT pg_advisory_lock({STOP})")

    with flags.transaction(inside, shard=shard.name) as view:
        assert State.LIVE is view[UPPER_NAME]
        upgrade = asyncio.create_task(install(shard))
        await held_back(psql, 1)  # everything but COMMIT has happened, and its locks are held
        for _ in range(20):
            another.execute("SET lock_timeout = '1ms'")
            with flags.transaction(another, shard=shard.name) as beside:
                assert State.LIVE is beside[UPPER_NAME]
                another.execute("INSERT INTO customer VALUES (1, 'x', 'X') ON CONFLICT DO NOTHING")
        psql.execute(f"SELECT pg_advisory_unlock({STOP})")
        await upgrade
        assert 2 == version(psql)
        inside.execute("INSERT INTO customer VALUES (2, 'y', 'Y')")

    assert [(2,)] == psql.execute("SELECT count(*) FROM customer").fetchall()


async def test_a_step_that_would_stop_applications_is_rolled_back(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    await install(shard)
    newer("ALTER TABLE shardmig.flag ADD COLUMN note text;")

    with pytest.raises(ShardError, match="locks what applications read in every transaction"):
        await install(shard)

    assert 1 == version(connect(shard))
    assert ("flag", "note") not in columns(connect(shard))


async def test_a_table_of_the_ledger_that_stays_busy_parks_the_shard_and_names_who_holds_it(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    assert (await fleet_of([shard], SHOP).apply()).done
    newer()
    operator, colleague = connect(shard, autocommit=False), connect(shard)
    operator.execute("SELECT * FROM shardmig.step")

    with pytest.raises(LockNotObtained, match=rf"stayed busy .* held by .*{operator.info.backend_pid}"):
        await install(shard, lock_wait_s=0.3, lock_timeout_ms=(10, 20))

    assert colleague.execute("SELECT count(*) > 0 FROM shardmig.step").fetchall() == [(True,)]
    assert 1 == version(connect(shard))
    operator.rollback()
    assert (await fleet_of([shard], SHOP).apply()).done
    assert 2 == version(connect(shard))


async def test_the_ledger_tells_its_version(shard: Shard) -> None:
    await install(shard)
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS, purpose="read") as session:
        records = await read_records(session)

    assert records is not None
    assert ledger.newest() == records.version


async def test_a_claim_that_waits_for_the_upgrade_next_door_gets_its_step(
    shard: Shard, connect: Connect, newer: Callable[..., tuple[str, ...]]
) -> None:
    psql, witness = connect(shard), connect(shard)
    async with open_session(shard, SessionSettings(lock_timeout_ms=(400,)), pg_versions=VERSIONS) as session:
        await ledger.install(session)
        turn, _ = await Turn.take_and(session, begin_migration(shard.name, SHOP, position=1, text="x"))
        await turn.claim(SHOP.revision, 1)
        newer(f"{TWO} SELECT pg_advisory_xact_lock({STOP});")
        psql.execute(f"SELECT pg_advisory_lock({STOP})")
        neighbour = shard.model_copy(update={"name": "next door", "schema_name": "next_door"})
        witness.execute("CREATE SCHEMA next_door")
        upgrade = asyncio.create_task(install(neighbour))
        await held_back(witness, 1)

        claim = asyncio.create_task(turn.claim(SHOP.revision, 1))
        await blocked(witness, session.backend_pid)
        psql.execute(f"SELECT pg_advisory_unlock({STOP})")

        assert "RUNNING" == (await claim).status
        await upgrade
