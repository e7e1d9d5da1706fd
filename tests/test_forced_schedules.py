"""
Each mutation of the model on a real server: a forced schedule does its harm, and does none when nothing is taken away.

The settings of a case of the model are those of the stage, so both are asked the same thing, and say it in the same
words. A mutation without a schedule fails here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from forced.mutations import sound, weaken_drain
from forced.schedules import SCHEDULES
from forced.stage import play
from model.cases import FAILING, HOLDING, Case
from model.fences import Fences, Standby
from model.rows import Rows
from psycopg import errors as pg
from servers import standby_of

from shardmig import switching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Connect
    from forced.doors import Isolation
    from forced.mutations import Model
    from model.world import Tables

    from shardmig import local
    from shardmig.config import Shard


@pytest.fixture(autouse=True)
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a drain look often and tell of each look: the stage sees by it that the drain waits."""
    monkeypatch.setattr(switching, "_POLL_S", (0.001, 0.004))
    monkeypatch.setattr(switching, "_TELL_S", 0.0)


def isolation_of(model: Model) -> Isolation:
    return "REPEATABLE READ" if getattr(model, "isolation", "RC") == "RR" else "READ COMMITTED"


def listed(cases: tuple[Case, ...], *, unready: bool = False) -> list[Any]:
    """Keep the quick cases in every run; leave the others to the long one."""
    return [
        pytest.param(case, id=case.name, marks=[] if case.quick else [pytest.mark.long])
        for case in cases
        if not unready or SCHEDULES[case.name].unready
    ]


@pytest.fixture
def standby(request: pytest.FixtureRequest, servers: list[local.Server], shard: Shard) -> Iterator[local.Server | None]:
    """Run a standby of the shard's server, for the cases that need one."""
    if isinstance(request.node.callspec.params["case"].model, Standby):
        with standby_of(servers[0]) as made:
            yield made
    else:
        yield None


def test_every_mutation_of_the_model_has_a_schedule_and_no_other() -> None:
    assert len(FAILING) == len({case.name for case in FAILING})
    assert sorted(case.name for case in FAILING) == sorted(SCHEDULES)


@pytest.mark.parametrize("case", FAILING, ids=[case.name for case in FAILING])
def test_what_is_left_when_nothing_is_taken_away_is_proved(case: Case) -> None:
    assert sound(case.model) in [held.model for held in HOLDING]


@pytest.mark.parametrize("case", listed(FAILING))
async def test_harm_is_done_by(
    shard: Shard, connect: Connect, standby: local.Server | None, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    schedule = SCHEDULES[case.name]
    weaken_drain(case.model, monkeypatch)
    async with play(
        shard, connect, case.model, isolation=isolation_of(case.model), weakened=True, standby=standby
    ) as stage:
        played = await stage.run(schedule.steps)

    assert any((schedule.says or case.harm) in line for line in played.wrong), played


@pytest.mark.parametrize("case", listed(FAILING))
async def test_no_harm_is_done_when_nothing_is_taken_away_from(
    shard: Shard, connect: Connect, standby: local.Server | None, case: Case
) -> None:
    schedule, model = SCHEDULES[case.name], sound(case.model)
    async with play(shard, connect, model, isolation=isolation_of(model), weakened=False, standby=standby) as stage:
        played = await stage.run(schedule.steps)

    assert ([], schedule.refuses) == (played.wrong, tuple(played.refused))


@pytest.mark.parametrize("isolation", [pytest.param("REPEATABLE READ", marks=pytest.mark.long), "SERIALIZABLE"])
@pytest.mark.parametrize("case", listed(tuple(case for case in FAILING if isinstance(case.model, Rows))))
async def test_with_one_snapshot_too_no_harm_is_done(
    shard: Shard, connect: Connect, case: Case, isolation: Isolation
) -> None:
    """Whoever is in the way of it fails: refused in DUAL where two tables are written, or with 40001."""
    async with play(shard, connect, sound(case.model), isolation=isolation, weakened=False) as stage:
        played = await stage.run(SCHEDULES[case.name].steps)

    assert [] == played.wrong
    assert {"WriteRefused", "SerializationFailure", *SCHEDULES[case.name].refuses} >= set(played.refused)


@pytest.mark.parametrize("case", listed(FAILING, unready=True))
async def test_the_ledger_refuses_a_runner_that_forgets(shard: Shard, connect: Connect, case: Case) -> None:
    async with play(shard, connect, case.model, isolation="READ COMMITTED", weakened=False) as stage:
        played = await stage.run(SCHEDULES[case.name].steps)

    assert [] == played.wrong
    assert played.refused in (["SwitchRefused"], ["SwitchedMeanwhile"])  # at the flip; when rows begin to move


# --------------------------------------------------------------------------------------------------------------------
# Other ways that hold


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_after_maintenance_and_a_drain_nobody_is_inside(
    shard: Shard, connect: Connect, isolation: Isolation
) -> None:
    """Whoever began before may end; whoever begins is refused until the rows are moved."""
    async with play(shard, connect, Fences("maintenance"), isolation=isolation, weakened=False) as stage:
        played = await stage.run(
            """
            A: begin
            R: go DONE
            B: begin
            A: put 2
            A: commit
            B: begin
            B: put 1
            B: commit
            """
        )

    assert ([], ["ShardInMaintenance"]) == (played.wrong, played.refused)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("tables", ["entity", "value"])
async def test_a_writer_with_one_snapshot_fails_when_the_move_touches_its_source(
    shard: Shard, connect: Connect, isolation: Isolation, tables: Tables
) -> None:
    """It is not refused in DUAL then, and meets 40001 instead of rows that it cannot see."""
    model = Rows(tables, isolation="RR", lock="touch")
    async with play(shard, connect, model, isolation=isolation, weakened=False) as stage:
        played = await stage.run(SCHEDULES["REPEATABLE READ in DUAL, rows come and go"].steps)

    assert ([], ["SerializationFailure"]) == (played.wrong, played.refused)


# --------------------------------------------------------------------------------------------------------------------
# What is not built for its price alone: no schedule goes wrong with it, but those who read would have to write


async def test_a_lock_on_the_flag_makes_a_writer_of_whoever_reads(shard: Shard, connect: Connect) -> None:
    """FOR KEY SHARE costs every reading transaction an id and WAL, and none of it works on a standby."""
    async with play(shard, connect, Rows(), isolation="READ COMMITTED", weakened=False):
        app, has_id = connect(shard), "SELECT pg_current_xact_id_if_assigned() IS NOT NULL"
        reads, locks = "SELECT state FROM shardmig.flag", "SELECT state FROM shardmig.flag FOR KEY SHARE"
        for statement, writes in ((reads, False), (locks, True)):
            with app.transaction():
                app.execute(statement)
                assert (writes,) == app.execute(has_id).fetchone()

        app.read_only = True
        with pytest.raises(pg.ReadOnlySqlTransaction), app.transaction():
            app.execute(locks)


async def test_a_message_in_every_transaction_forbids_two_phases(shard: Shard, connect: Connect) -> None:
    async with play(shard, connect, Rows(), isolation="READ COMMITTED", weakened=False):
        app = connect(shard)
        app.execute("BEGIN; NOTIFY shardmig")
        with pytest.raises(pg.FeatureNotSupported, match="NOTIFY"):
            app.execute("PREPARE TRANSACTION 'told'")
