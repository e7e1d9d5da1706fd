"""A new shard: straight to where the fleet is, closed until it is there; and a copied one, which gets its own name."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import NOTE, SHOP, UPPER, fleet_of, plan

from shardmig import Flag, Flags
from shardmig.errors import ConfigError, FlagError
from shardmig.events import BatchDone, Draining, FlagSwitched, OutcomeReached, StepStarted
from shardmig.fleet import Fleet
from shardmig.outcomes import Outcome
from shardmig.plan import Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.local import Server

INDEX = plan(
    "0004_index",
    Statement(sql="CREATE INDEX CONCURRENTLY customer_name ON customer (name)", transactional=False),
    Switch(to=State.LIVE),
    parent="0003_note",
)
HISTORY = (SHOP, UPPER, NOTE, INDEX)


def new(fleet: Fleet, name: str) -> Fleet:
    """Make a fleet of one new shard beside the others."""
    return Fleet(fleet.config, fleet.plans, [fleet.config.shard(name)])


def flags(connection: psycopg.Connection[Any]) -> dict[str, State]:
    return {flag: State(state) for flag, state in connection.execute("SELECT flag, state FROM shardmig.flag")}


async def test_a_new_shard_gets_each_flags_lowest_state_without_a_drain_or_a_move(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    old = fleet_of(list(shards.values())[:3], *HISTORY)
    assert (await old.apply()).done
    await fleet_of([shards["eu2"]], *HISTORY).switch("upper", State.DUAL)
    fleet = new(fleet_of(list(shards.values()), *HISTORY), "us2")
    events: list[Event] = []
    fleet.listener = events.append

    report = await fleet.provision()

    assert report.done, list(report)
    raised = {"shop": State.LIVE, "upper": State.DUAL, "note": State.LIVE, "index": State.LIVE}
    assert raised == flags(connect(shards["us2"]))
    assert {flag: state.name for flag, state in raised.items()} == dict(report.shards[0].flags)
    assert not [e for e in events if isinstance(e, BatchDone | Draining | FlagSwitched)]
    assert {"statement"} == {e.kind for e in events if isinstance(e, StepStarted)}
    assert [(0, None)] == connect(shards["us2"]).execute("SELECT maintenance, reason FROM shardmig.shard").fetchall()

    # From there on it is a shard like the others: forward, back, and nothing left.
    await fleet_of([shards["eu2"]], *HISTORY).switch("upper", State.LIVE)
    connect(shards["us2"]).execute("INSERT INTO customer (id, name) VALUES (1, 'ada')")
    everybody = fleet_of(list(shards.values()), *HISTORY)
    assert (await everybody.apply()).done
    assert [("ADA",)] == connect(shards["us2"]).execute("SELECT upper_name FROM customer").fetchall()
    assert (await new(everybody, "us2").switch("upper", State.OLD)).done


async def test_a_fleet_that_is_done_makes_a_shard_that_is_done(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    old = fleet_of([shards["eu1"]], SHOP, UPPER)
    assert (await old.apply()).done
    assert (await old.switch("upper", State.DONE)).done
    everybody = fleet_of([shards["eu1"], shards["us2"]], SHOP, UPPER)

    assert (await new(everybody, "us2").provision()).done

    assert State.DONE is flags(connect(shards["us2"]))["upper"]
    assert [Outcome.DONE] * 2 == [one.outcome for one in await everybody.status()]


async def test_nobody_enters_a_shard_before_its_flags_stand(shards: dict[str, Shard]) -> None:
    """An application that began in OLD could write what no move will ever find."""
    assert (await fleet_of([shards["eu1"]], SHOP, UPPER).apply()).done
    fleet = new(fleet_of([shards["eu1"], shards["us2"]], SHOP, UPPER), "us2")
    upper = Flags(Flag("upper"), release="1")
    refused: list[str] = []

    def enter(_: Event) -> None:
        with psycopg.connect(shards["us2"].url.get_secret_value(), autocommit=True) as connection:
            try:
                with upper.transaction(connection, shard="us2"):
                    refused.append("entered")
            except FlagError as error:
                refused.append(type(error).__name__)

    fleet.listener = lambda event: None if isinstance(event, OutcomeReached) else enter(event)
    assert (await fleet.provision()).done

    assert {"ShardInMaintenance"} == set(refused)
    enter(None)  # type: ignore[arg-type]
    assert "entered" == refused[-1]


async def test_an_interrupted_provision_stays_closed_and_goes_on(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    assert (await fleet_of([shards["eu1"]], *HISTORY).apply()).done
    fleet = new(fleet_of([shards["eu1"], shards["us2"]], *HISTORY), "us2")
    await half_made(fleet)
    assert [(2,)] == connect(shards["us2"]).execute("SELECT maintenance FROM shardmig.shard").fetchall()

    assert (await fleet.provision()).done
    assert State.LIVE is flags(connect(shards["us2"]))["upper"]


async def half_made(fleet: Fleet) -> None:
    """Leave the fleet's shard as a provision does that was killed in its first step."""
    begun = asyncio.Event()
    fleet.listener = lambda event: begun.set() if isinstance(event, StepStarted) else None
    dying = asyncio.create_task(fleet.provision())
    await begun.wait()
    dying.cancel()
    await asyncio.wait([dying])
    fleet.listener = None


async def test_a_shard_whose_provision_was_interrupted_holds_no_other_one_back(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Its flags are OLD because nobody is there, not because a release there knows nothing else."""
    assert (await fleet_of([shards["eu1"]], SHOP, UPPER).apply()).done
    everybody = fleet_of([shards["eu1"], shards["eu2"], shards["us2"]], SHOP, UPPER)
    await half_made(new(fleet_of([shards["eu1"], shards["us2"]], SHOP, UPPER), "us2"))

    assert (await new(everybody, "eu2").provision()).done

    assert {"shop": State.LIVE, "upper": State.LIVE} == flags(connect(shards["eu2"]))


async def test_apply_leaves_a_shard_whose_provision_was_interrupted_to_provision(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Also where it wants the shard offline, as it is: the flags of the others say how far this one goes."""
    offline = NOTE.model_copy(update={"online": False})
    for history in ((SHOP, UPPER, NOTE), (SHOP, UPPER, offline)):
        fleet = new(fleet_of([shards["us2"]], *history), "us2")
        await half_made(fleet)

        [report] = await fleet.apply()

        assert (Outcome.MAINTENANCE, "being provisioned; `shardmig provision us2` goes on and opens it") == (
            report.outcome,
            report.reason,
        )
        assert {State.OLD} >= set(flags(connect(shards["us2"])).values())
        connect(shards["us2"]).execute("DROP SCHEMA shardmig CASCADE; DROP TABLE IF EXISTS customer")


async def test_a_shard_that_has_a_ledger_or_rows_is_no_new_one(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    everybody = fleet_of([shards["eu1"], shards["us2"]], SHOP, UPPER)
    assert (await fleet_of([shards["eu1"]], SHOP, UPPER).apply()).done

    await fleet_of([shards["us2"]], SHOP).apply()
    [ledger] = await new(everybody, "us2").provision()
    assert (Outcome.FAILED, True) == (ledger.outcome, "no new shard" in ledger.reason)

    connect(shards["us2"]).execute("INSERT INTO customer VALUES (1, 'ada')")
    connect(shards["us2"]).execute("UPDATE shardmig.shard SET maintenance = 2, reason = 'being provisioned'")
    [rows] = await new(everybody, "us2").provision()
    assert (Outcome.FAILED, True) == (rows.outcome, "customer has rows already" in rows.reason)


async def test_a_shard_that_the_plans_do_not_make_whole_is_refused_before_anything_is_written(
    shard: Shard,
) -> None:
    fleet = fleet_of([shard], SHOP, lint={"start_after": "0000_adopted"})

    [report] = await fleet.provision()

    assert (Outcome.FAILED, True) == (report.outcome, "alembic upgrade 0000_adopted" in report.reason)
    with psycopg.connect(shard.url.get_secret_value()) as psql:
        assert [(None,)] == psql.execute("SELECT to_regnamespace('shardmig')").fetchall()


async def test_nothing_is_begun_while_another_shard_cannot_be_asked(shards: dict[str, Shard]) -> None:
    everybody = fleet_of([shards["eu1"], shards["us2"]], SHOP)

    with pytest.raises(ConfigError, match=r"lowest states are not known.*eu1: it has no ledger; if it is a"):
        await new(everybody, "us2").provision()


# --------------------------------------------------------------------------------------------------------------------
# Renaming


async def test_a_copy_gets_its_own_name_and_keeps_everything_it_recorded(
    shards: dict[str, Shard], servers: list[Server], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    assert (await fleet_of([shards["eu1"]], SHOP, UPPER).apply()).done
    database = connect(shards["eu1"]).info.dbname
    connect(shards["eu1"]).close()
    url = servers[0].create_database(f"{database}_copy", template=_free(servers[0], database))
    copy = type(shards["eu1"]).model_validate({"name": "eu9", "url": url})
    try:
        fleet = fleet_of([shards["eu1"], copy], SHOP, UPPER)
        [wrong] = [one for one in await fleet.status() if one.shard == "eu9"]
        assert (Outcome.WRONG_SHARD, True) == (wrong.outcome, "shardmig shard rename" in wrong.reason)

        report = await new(fleet, "eu9").rename(was="eu1")

        assert report.done, list(report)
        assert [Outcome.DONE] * 2 == [one.outcome for one in await fleet.status()]
        assert (await new(fleet, "eu9").switch("upper", State.OLD)).done
        assert (await fleet.apply()).shards[0].outcome is Outcome.DONE
        with psycopg.connect(url) as connection:
            assert [("eu1", "eu9")] == connection.execute(
                "SELECT before, after FROM shardmig.log WHERE action = 'rename'"
            ).fetchall()
            assert [("eu9",)] == connection.execute("SELECT DISTINCT shard FROM shardmig.log").fetchall()
    finally:
        servers[0].drop_database(f"{database}_copy")


def _free(server: Server, database: str) -> str:
    """End every session on a database, so that it can be copied."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])
    return database


async def test_the_original_itself_is_never_renamed(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    """Two urls that lead to one database are a mistake in the configuration, not a copy."""
    assert (await fleet_of([shards["eu1"]], SHOP).apply()).done
    twin = shards["eu1"].model_copy(update={"name": "eu9"})

    [report] = await new(fleet_of([shards["eu1"], twin], SHOP), "eu9").rename(was="eu1")

    assert Outcome.WRONG_SHARD is report.outcome
    assert "leads to the same database" in report.reason
    assert [("eu1",)] == connect(shards["eu1"]).execute("SELECT shard FROM shardmig.shard").fetchall()


async def test_a_database_that_is_somebody_elses_copy_is_refused(shards: dict[str, Shard]) -> None:
    assert (await fleet_of([shards["eu1"]], SHOP).apply()).done
    twin = shards["eu1"].model_copy(update={"name": "eu9"})

    [report] = await new(fleet_of([twin], SHOP), "eu9").rename(was="us1")

    assert Outcome.WRONG_SHARD is report.outcome
    assert "is not shard 'us1'; it holds eu1" in report.reason


def test_a_flag_row_alone_cannot_change_its_shard(
    shards: dict[str, Shard], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    asyncio.run(fleet_of([shards["eu1"]], SHOP).apply())
    connection = connect(shards["eu1"])
    connection.execute("INSERT INTO shardmig.shard (shard, epoch, schema_name) VALUES ('other', 1, 'x')")

    with pytest.raises(psycopg.Error, match="its identity cannot change"):
        connection.execute("UPDATE shardmig.flag SET shard = 'other'")
