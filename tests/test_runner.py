"""Deciding what is left, and doing it on one shard: indexes, grants, foreign keys, needs, maintenance."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import accepted, plan
from servers import FaultProxy

from shardmig.config import Config
from shardmig.errors import PlanChanged, ShardUnreachable
from shardmig.events import StepDone, Waiting, Warned
from shardmig.fleet import Fleet
from shardmig.ledger import os_user
from shardmig.lint import History
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Plan, Statement, Switch, step_sha256
from shardmig.planfile import dumps
from shardmig.records import FlagRow, MigrationRow, Records, StepRow
from shardmig.states import State
from shardmig.todo import Held, Until, pending

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.local import Server
    from shardmig.session import Session

NOW = datetime(2026, 1, 1, tzinfo=UTC)

SHOP = plan(
    "0001_shop",
    Statement(sql="CREATE TABLE customer (id bigint PRIMARY KEY, name text, note text)"),
    Switch(to=State.LIVE),
)
SPLIT = plan(
    "0002_split",
    Statement(sql="ALTER TABLE customer ADD COLUMN upper_name text"),
    Switch(to=State.DUAL),
    Move(
        table="customer",
        key=("id",),
        writes=("upper_name",),
        forward="UPDATE customer SET upper_name = upper(name) WHERE {batch}",
        check="SELECT id FROM customer WHERE {batch} AND upper_name IS DISTINCT FROM upper(name)",
    ),
    Switch(to=State.LIVE),
    parent="0001_shop",
)
INDEX = plan(
    "0003_index",
    Statement(sql="CREATE INDEX CONCURRENTLY customer_name ON customer (name)", transactional=False),
    Switch(to=State.LIVE),
    parent="0002_split",
    flag="by_name",
)
ORDERS = plan(
    "0004_orders",
    Statement(
        sql="CREATE TABLE orders (id bigint PRIMARY KEY, customer_id bigint REFERENCES customer (id) ON DELETE CASCADE)"
    ),
    Switch(to=State.LIVE),
    parent="0003_index",
)


def records_of(*plans: Plan, done: Sequence[int] = (), state: State = State.OLD, **flag: Any) -> Records:
    """Say that plans were begun, with some steps done and every flag in one state."""
    blank = dict.fromkeys((f.name for f in fields(StepRow)), None)
    steps = {
        (plan.revision, number): StepRow(
            **{
                **blank,
                "revision": plan.revision,
                "number": number,
                "kind": step.kind,
                "sha256": step_sha256(step),
                "status": "DONE" if number in done else "PENDING",
            }
        )
        for plan in plans
        for number, step in enumerate(plan.steps, 1)
    }
    return Records(
        "eu1",
        migrations={
            p.revision: MigrationRow(p.revision, n, p.flag, p.sha256, dumps(p), NOW, None, "me")
            for n, p in enumerate(plans, 1)
        },
        flags={
            p.flag: replace(
                FlagRow(p.flag, p.revision, int(state), p.has_move, False, [], True, False, True, 1, NOW),  # noqa: FBT003
                **flag,
            )
            for p in plans
        },
        steps=steps,
    )


def is_built(psql: psycopg.Connection[Any]) -> bool:
    """Whether the index of `INDEX` is there and valid."""
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'customer_name'::regclass"
    return psql.execute(valid).fetchall() == [(True,)]


# --------------------------------------------------------------------------------------------------------------------
# Deciding


def test_on_an_empty_shard_everything_is_left() -> None:
    todo, held = pending(accepted(SHOP, SPLIT), Records("eu1"))

    assert [("0001_shop", (1,), State.LIVE), ("0002_split", (1,), State.LIVE)] == [
        (item.plan.revision, item.statements, item.target) for item in todo
    ]
    assert () == held


@pytest.mark.parametrize(
    ("until", "target", "moves_only"),
    [
        (Until.STRUCTURE, None, False),
        (Until.DUAL, State.DUAL, False),
        (Until.MOVED, State.DUAL, True),
        (Until.LIVE, State.LIVE, False),
    ],
)
def test_until_says_how_far_a_flag_goes(until: Until, target: State | None, moves_only: bool) -> None:  # noqa: FBT001
    [item], _ = pending(accepted(SHOP, SPLIT)[1:], Records("eu1"), until=until)

    assert (target, moves_only) == (item.target, item.moves_only)


def test_a_finished_plan_leaves_nothing() -> None:
    records = records_of(SPLIT, done=(1, 2, 3, 4), state=State.LIVE)
    finished = replace(records, migrations={k: replace(v, finished_at=NOW) for k, v in records.migrations.items()})

    assert ((), ()) == pending(accepted(SHOP, SPLIT)[1:], finished)


def test_a_flag_that_people_switched_back_is_held() -> None:
    records = records_of(SPLIT, done=(1, 2, 3, 4), state=State.DUAL)

    _, held = pending(accepted(SHOP, SPLIT)[1:], records)

    assert (Held("split", State.DUAL),) == held


def test_without_a_voucher_structure_is_left_and_the_flag_of_a_move_stays_old() -> None:
    todo, held = pending(accepted(SHOP, SPLIT), Records("eu1"), vouched=False)

    assert [("0001_shop", (1,), State.LIVE), ("0002_split", (1,), None)] == [
        (item.plan.revision, item.statements, item.target) for item in todo
    ]
    assert (Held("split", State.OLD, unvouched=True),) == held


@pytest.mark.parametrize("state", [State.DUAL, State.LIVE])
def test_what_has_left_old_needs_no_voucher_any_more(state: State) -> None:
    plans, records = accepted(SHOP, SPLIT)[1:], records_of(SPLIT, done=(1, 2), state=state)

    assert pending(plans, records) == pending(plans, records, vouched=False)


def test_a_plan_that_was_begun_otherwise_is_refused_with_the_difference() -> None:
    edited = SPLIT.model_copy(
        update={"steps": (Statement(sql="ALTER TABLE customer ADD COLUMN upper_name varchar(9)"), *SPLIT.steps[1:])}
    )

    with pytest.raises(
        PlanChanged, match=r"(?s)-ALTER TABLE customer ADD COLUMN upper_name text.*\+ALTER.*varchar\(9\)"
    ):
        pending(accepted(SHOP, edited), records_of(SHOP, SPLIT))


def test_a_revision_that_vanished_from_the_middle_of_the_history_is_refused() -> None:
    with pytest.raises(PlanChanged, match="0001_shop was begun there and is missing here"):
        pending([History(Config().lint, [SHOP]).accept(SPLIT)], records_of(SHOP, SPLIT))


def test_a_flag_that_another_revision_has_there_says_nothing_of_this_one() -> None:
    """Were it read as this plan's, a LIVE left behind would stand for a move that never ran."""
    renamed = SPLIT.model_copy(update={"revision": "0003_split"})

    with pytest.raises(PlanChanged, match="flag split of 0003_split is 0002_split's there"):
        pending(
            accepted(SHOP, renamed),
            records_of(SHOP, SPLIT, done=(1, 2, 3, 4), state=State.LIVE),
            history=accepted(SHOP, SPLIT),
        )


def test_a_newer_revision_of_somebody_else_is_no_obstacle() -> None:
    todo, _ = pending(accepted(SHOP), records_of(SHOP, SPLIT, done=(1, 2, 3, 4), state=State.LIVE))

    assert "0002_split" not in {item.plan.revision for item in todo}


def test_what_a_longer_history_knows_is_not_missing_when_less_is_asked_for() -> None:
    rebased = accepted(SHOP, INDEX, SPLIT)
    records = records_of(SHOP, SPLIT, done=(1, 2, 3, 4), state=State.LIVE)

    todo, _ = pending(rebased[:2], records, history=rebased)

    assert "0003_index" in {item.plan.revision for item in todo}


def test_a_history_does_not_go_on_past_a_revision_that_somebody_else_began() -> None:
    with pytest.raises(PlanChanged, match="0002_split was begun there and is missing here"):
        pending(accepted(SHOP, INDEX), records_of(SHOP, SPLIT, done=(1, 2, 3, 4), state=State.LIVE))


# --------------------------------------------------------------------------------------------------------------------
# Doing


@pytest.fixture
def fleet(shard: Shard) -> Callable[..., Fleet]:
    """Make a fleet of one shard: `fleet(SHOP, SPLIT, session={...})`."""

    def make(*plans: Plan, **sections: Any) -> Fleet:
        rollout = {"require_aware": False, **sections.pop("rollout", {})}
        config = Config.model_validate({"shards": {"eu1": shard}, "rollout": rollout, **sections})
        return Fleet(config, accepted(*plans), [shard])

    return make


async def applied(fleet: Fleet, **options: Any) -> None:
    report = await fleet.apply(**options)
    assert report.done, list(report)


async def test_a_checkout_that_is_older_than_the_shard_says_so(fleet: Callable[..., Fleet]) -> None:
    await applied(fleet(SHOP, SPLIT, INDEX))
    older = fleet(SHOP)
    said: list[Event] = []
    older.listener = said.append

    await applied(older)

    ahead = "it is ahead of these scripts, which do not know 0002_split, 0003_index"
    assert [Warned("eu1", f"{ahead}; is this checkout too old?")] == [e for e in said if isinstance(e, Warned)]
    [status] = await older.status()
    assert (Outcome.DONE, ahead) == (status.outcome, status.reason)


@pytest.mark.parametrize("style", ["German", "SQL, DMY", "Postgres, MDY"])
async def test_a_database_may_write_its_times_as_it_likes(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard, style: str
) -> None:
    """Where no ledger is, what is asked along is refused, and the session's own style rolled back with it."""
    psql = connect(shard)
    psql.execute(f"ALTER DATABASE {psql.info.dbname} SET DateStyle = '{style}'")

    await applied(fleet(SHOP, SPLIT))


async def test_structure_of_a_later_revision_does_not_wait_for_a_move(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    seen: list[Event] = []
    made = fleet(SHOP, SPLIT, INDEX)
    made.listener = seen.append

    await applied(made)

    steps = [(e.revision, e.step) for e in seen if isinstance(e, StepDone)]
    assert steps.index(("0003_index", 1)) < steps.index(("0002_split", 3))
    assert is_built(connect(shard))


async def test_an_invalid_index_that_a_killed_build_left_is_built_again(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    blocker, other = connect(shard, autocommit=False), connect(shard)
    blocker.execute("INSERT INTO customer VALUES (1, 'a')")
    made = fleet(SHOP, INDEX)
    building = asyncio.create_task(made.apply())
    building_is_seen = (
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONC%' AND pid <> pg_backend_pid()"
    )
    while not other.execute(building_is_seen + " AND wait_event_type = 'Lock'").fetchone() == (1,):  # noqa: SIM201
        await asyncio.sleep(0.01)
    other.execute(f"SELECT pg_terminate_backend(pid) FROM ({building_is_seen.replace('count(*)', 'pid')}) AS builder")
    # The runner comes back by itself: the leftover is dropped, and the build waits for the same transaction again.
    again = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%INDEX CONC%' AND wait_event_type = 'Lock'"
    while other.execute(again).fetchone() != (1,):
        await asyncio.sleep(0.01)
    blocker.commit()
    report = await building

    assert report.done, list(report)
    assert is_built(other)


async def test_a_build_that_outlives_its_connection_is_not_another_runners(
    fleet: Callable[..., Fleet],
    connect: Callable[..., psycopg.Connection[Any]],
    shard: Shard,
    servers: list[Server],
) -> None:
    """The server does not look whether its client is there while it waits, so it keeps the runner's lock."""
    await applied(fleet(SHOP))
    blocker, other = connect(shard, autocommit=False), connect(shard)
    blocker.execute("INSERT INTO customer VALUES (1, 'a')")
    builders = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%INDEX CONC%' AND wait_event_type = 'Lock'"
    with FaultProxy(servers[0]) as proxy:
        made = fleet(SHOP, INDEX)
        made.targets = [proxy.way_to(shard)]
        building = asyncio.create_task(made.apply())
        while not (first := other.execute(builders).fetchall()):
            await asyncio.sleep(0.01)
        proxy.reset()
        while other.execute(builders).fetchall() in ([], first) and not building.done():
            await asyncio.sleep(0.01)
        blocker.commit()
        report = await building

    assert report.done, list(report)
    assert is_built(other)


async def test_whom_an_index_waits_for_is_named_and_the_shard_parked(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    """An old snapshot of whatever table holds up the end of the build, and the server says nothing of itself."""
    await applied(fleet(SHOP))
    seen: list[Event] = []
    old = connect(shard, autocommit=False)
    old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old.execute("SELECT FROM pg_class")
    made = fleet(SHOP, INDEX, session={"lock_wait_s": 0.3})
    made.listener = seen.append
    async with asyncio.timeout(20):
        [report] = await made.apply()

    pid = old.info.backend_pid
    assert Outcome.PARKED is report.outcome
    assert f"pid {pid}, role postgres" in report.reason
    assert pid in [blocker.pid for event in seen if isinstance(event, Waiting) for blocker in event.blockers]
    old.commit()
    await applied(made)
    assert is_built(connect(shard))


async def test_an_index_that_waits_for_others_hears_of_a_stop(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    old = connect(shard, autocommit=False)
    old.execute("INSERT INTO customer VALUES (1, 'a')")
    made = fleet(SHOP, INDEX)
    made.listener = lambda event: made.stop.set() if isinstance(event, Waiting) else None
    async with asyncio.timeout(20):
        [report] = await made.apply()

    assert Outcome.INTERRUPTED is report.outcome


async def test_an_index_that_somebody_else_built_is_not_taken_for_ours(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    connect(shard).execute("CREATE INDEX customer_name ON customer (note)")

    for _ in ("at once", "and at the next try"):
        [report] = await fleet(SHOP, INDEX).apply()

        assert Outcome.FAILED is report.outcome
        assert "an index 'customer_name' is there already" in report.reason


async def test_new_tables_are_granted_to_the_roles_of_the_configuration(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP, session={"grant": {"shop_app": "SELECT, INSERT"}}))

    rights = connect(shard).execute(
        "SELECT has_table_privilege('shop_app', 'customer', 'INSERT'),"
        " has_table_privilege('shop_app', 'customer', 'DELETE')"
    )
    assert (True, False) == rights.fetchone()


async def test_a_role_that_may_insert_may_draw_from_the_sequence_of_a_serial_column(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    counted = Plan(
        revision="0001_shop", parent=None, flag="shop", script_sha256="0" * 64,
        steps=(
            Statement(sql='CREATE TABLE "Käufer" ("Nr." serial PRIMARY KEY, name text)'), Switch(to=State.LIVE)
        ),
    )  # fmt: skip
    roles = {"shop_app": "SELECT, INSERT", "shop_migrator": "SELECT"}
    await applied(fleet(counted, session={"grant": roles}))

    connect(shard, user="shop_app").execute("INSERT INTO \"Käufer\" (name) VALUES ('Ada')")
    rights = "SELECT has_sequence_privilege('shop_migrator', c.oid, 'USAGE') FROM pg_class c WHERE relkind = 'S'"
    assert [(False,)] == connect(shard).execute(rights + " AND relnamespace = 'public'::regnamespace").fetchall()


async def test_of_statements_that_run_together_the_one_that_failed_is_named(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    connect(shard).execute("CREATE TABLE third (id int)")
    tables = [Statement(sql=f"CREATE TABLE {t} (id bigint PRIMARY KEY)", line=n) for n, t in ((7, "a"), (9, "third"))]

    [report] = await fleet(SHOP.model_copy(update={"steps": (*tables, Switch(to=State.LIVE))})).apply()

    assert "step 2" in report.reason
    assert "(line 9 of the script)" in report.reason


async def test_a_table_with_a_key_into_an_old_one_waits_for_writers_without_stopping_them(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    writer, other = connect(shard, autocommit=False), connect(shard)
    writer.execute("INSERT INTO customer VALUES (1, 'a')")
    applying = asyncio.create_task(fleet(SHOP, ORDERS).apply())
    for number in range(2, 40):
        await asyncio.sleep(0.01)
        other.execute("SET lock_timeout = '200ms'")
        other.execute("INSERT INTO customer VALUES (%s, 'b')", [number])
    writer.commit()

    assert (await applying).done


async def test_a_table_that_stays_busy_parks_the_shard_and_names_the_blocker(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    reader = connect(shard, autocommit=False, application_name="nightly_report")
    reader.execute("SELECT * FROM customer")

    [report] = await fleet(SHOP, SPLIT, session={"lock_wait_s": 0.5}).apply()

    assert Outcome.PARKED is report.outcome
    assert str(reader.info.backend_pid) in report.reason
    assert "nightly_report" in report.reason
    reader.rollback()
    await applied(fleet(SHOP, SPLIT))


async def test_no_flag_leaves_old_before_its_structure_is_there(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    later = Plan(
        revision="0003_extra", parent="0002_split", flag="extra", script_sha256="0" * 64,
        steps=(Statement(sql="ALTER TABLE customer ADD COLUMN extra text"), Switch(to=State.LIVE)),
    )  # fmt: skip
    await applied(fleet(SHOP))
    reader, psql = connect(shard, autocommit=False), connect(shard)
    reader.execute("SELECT * FROM customer")
    made = fleet(SHOP, SPLIT, later, session={"lock_wait_s": 0.3})
    [report] = await made.apply()
    assert Outcome.PARKED is report.outcome

    for flag, state in (("split", State.DUAL), ("extra", State.LIVE)):
        [report] = await made.switch(flag, state)
        assert (Outcome.FAILED, True) == (report.outcome, "is not all there (apply it first)" in report.reason)
        with pytest.raises(psycopg.DatabaseError, match="is not all there"):
            psql.execute("SELECT shardmig.switch(%s, %s, 'by hand')", [flag, state.name])
    reader.rollback()
    await applied(made)


async def test_a_drain_that_nobody_ends_parks_the_shard_and_goes_on_later(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP, SPLIT), until=Until.STRUCTURE)
    open_one = connect(shard, autocommit=False, application_name="slow_batch")
    open_one.execute("SELECT 1")

    [report] = await fleet(SHOP, SPLIT, session={"drain_timeout_s": 0.3}).apply()

    assert Outcome.PARKED is report.outcome
    assert "slow_batch" in report.reason
    assert dict(report.flags) == {} or dict(report.flags)["split"] == "DUAL"
    open_one.rollback()
    await applied(fleet(SHOP, SPLIT))


async def test_a_flag_waits_for_the_flags_it_needs(fleet: Callable[..., Fleet], shard: Shard) -> None:
    needing = SPLIT.model_copy(update={"needs": ("shop",)})
    made = fleet(SHOP, needing)
    await applied(made, until=Until.STRUCTURE)

    [report] = await made.switch("split", State.DUAL)
    assert (Outcome.PENDING, "split stays OLD until shop is LIVE") == (report.outcome, report.reason)

    await applied(made)
    [report] = await made.switch("shop", State.OLD)
    assert "split reads from it" in report.reason
    assert shard.name == report.shard


async def test_a_shard_in_maintenance_is_left_alone_and_one_that_must_be_is_asked_for(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    made = fleet(SHOP)
    await applied(made)
    made.reason = "disk"
    await made.maintain("offline")

    [report] = await fleet(SHOP, SPLIT).apply()
    assert (Outcome.MAINTENANCE, True) == (report.outcome, "disk" in report.reason)

    offline = SPLIT.model_copy(update={"online": False})
    await applied(fleet(SHOP, offline))
    await made.maintain("off")
    assert [(0, None)] == connect(shard).execute("SELECT maintenance, reason FROM shardmig.shard").fetchall()
    who = connect(shard).execute("SELECT DISTINCT os_user FROM shardmig.log WHERE action = 'maintenance'").fetchall()
    assert [(os_user(),)] == who


async def test_a_plan_that_wants_maintenance_waits_for_who_is_inside_whoever_set_it(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    inside = connect(shard, autocommit=False, application_name="checkout")
    inside.execute("SELECT 1")
    connect(shard).execute("SELECT shardmig.maintenance('offline', 'by hand')")
    offline = SPLIT.model_copy(update={"online": False})

    [report] = await fleet(SHOP, offline, session={"drain_timeout_s": 0.3}).apply()

    assert (Outcome.PARKED, True) == (report.outcome, "checkout" in report.reason)
    inside.rollback()
    await applied(fleet(SHOP, offline))


async def test_a_switch_that_does_the_last_step_finishes_the_migration(fleet: Callable[..., Fleet]) -> None:
    made = fleet(SHOP, SPLIT)
    await applied(made, until=Until.MOVED)

    for flag in ("shop", "split"):
        await made.switch(flag, State.LIVE)

    [status] = await made.status()
    assert (Outcome.DONE, "") == (status.outcome, status.reason)


@pytest.mark.parametrize("until", [Until.DUAL, Until.LIVE])
async def test_what_the_application_has_to_fill_waits_in_dual_after_the_drain(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard, until: Until
) -> None:
    """Readers of a table that nobody filled and nobody checked would find it empty."""
    version = Plan(
        revision="0002_version", parent="0001_shop", flag="version", script_sha256="0" * 64, protocol="dual",
        steps=(
            Statement(sql="ALTER TABLE customer ADD COLUMN version int DEFAULT 0"),
            Switch(to=State.DUAL), Switch(to=State.LIVE),
        ),
    )  # fmt: skip
    made = fleet(SHOP, version, session={"drain_timeout_s": 0.2})
    await applied(made, until=Until.STRUCTURE)
    inside = connect(shard, autocommit=False)
    inside.execute("SELECT 'decided in OLD'")

    [report] = await made.apply(until=until)
    assert (Outcome.PARKED, True) == (report.outcome, "the drain of version" in report.reason)
    inside.rollback()
    for _ in range(2):
        [report] = await made.apply(until=until)
        assert (until is Until.LIVE) == (
            "version is DUAL, and everybody writes both: fill what is new" in report.reason
        )
    [status] = await made.status()
    assert status.records is not None
    assert (State.DUAL, True) == (status.records.state("version"), status.records.flags["version"].drained)
    assert (Outcome.PENDING, True) == (status.outcome, "version has to be filled in DUAL" in status.reason)

    await applied(made, until=Until.FILLED)
    await applied(made)
    assert Outcome.DONE is (await made.status())[0].outcome


@pytest.mark.parametrize("later", [(), (State.LIVE,)], ids=["from DONE", "from LIVE, that was DONE"])
@pytest.mark.parametrize("moves", [True, False])
async def test_where_nothing_leads_back_a_flag_stays_where_it_is_and_nothing_counts_as_failed(
    fleet: Callable[..., Fleet], later: tuple[State, ...], *, moves: bool
) -> None:
    steps = SPLIT.steps if moves else [step for step in SPLIT.steps if not isinstance(step, Move)]
    made = fleet(SHOP, SPLIT.model_copy(update={"protocol": "dual", "steps": tuple(steps)}))
    await made.apply()
    for state in (State.LIVE, State.DONE, *later):
        assert (await made.switch("split", state)).done

    for target in (State.DUAL, State.OLD):
        [report] = await made.switch("split", target)
        assert "split cannot go back from DONE" in report.reason
    [status] = await made.status()
    assert status.records is not None
    assert ((later or (State.DONE,))[-1], Outcome.DONE, "") == (
        status.records.state("split"),
        status.outcome,
        status.reason,
    )


async def test_an_operator_in_an_open_transaction_parks_the_shard(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    await applied(fleet(SHOP))
    operator = connect(shard, autocommit=False)
    operator.execute("SELECT shardmig.maintenance('read-only', 'thinking')")

    for [report] in (await fleet(SHOP, SPLIT).apply(), await fleet(SHOP).maintain("offline")):
        assert (Outcome.PARKED, True) == (report.outcome, "rows of the ledger" in report.reason)
    operator.rollback()
    await applied(fleet(SHOP, SPLIT))


async def test_done_is_refused_while_an_old_column_is_mandatory(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    strict = SHOP.model_copy(
        update={
            "steps": (
                Statement(sql="CREATE TABLE customer (id bigint PRIMARY KEY, name text NOT NULL, note text)"),
                Switch(to=State.LIVE),
            )
        }
    )
    [move] = [step for step in SPLIT.steps if isinstance(step, Move)]
    with_back = SPLIT.model_copy(
        update={
            "steps": (
                *SPLIT.steps[:2],
                move.model_copy(
                    update={
                        "restores": ("name",),
                        "back": "UPDATE customer SET name = upper_name WHERE {batch}",
                        "back_check": "SELECT id FROM customer WHERE {batch} AND name IS DISTINCT FROM upper_name",
                    }
                ),
                SPLIT.steps[3],
            )
        }
    )
    made = fleet(strict, with_back)
    await applied(made)
    connect(shard).execute("INSERT INTO customer VALUES (1, 'A', 'n', 'A')")

    [report] = await made.switch("split", State.DONE)
    assert Outcome.FAILED is report.outcome
    assert "customer.name is NOT NULL without a default" in report.reason
    assert State.LIVE is (await made.status())[0].records.state("split")  # type: ignore[union-attr]
    flag = "SELECT drained FROM shardmig.flag WHERE flag = 'split'"
    assert [(False,)] == connect(shard).execute(flag).fetchall()  # nobody waited, and nothing is left to flip on


async def test_done_is_refused_while_the_way_back_would_change_a_row(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    [move] = [step for step in SPLIT.steps if isinstance(step, Move)]
    with_back = move.model_copy(
        update={
            "restores": ("name",),
            "back": "UPDATE customer SET name = upper_name WHERE {batch}",
            "back_check": "SELECT id FROM customer WHERE {batch} AND name IS DISTINCT FROM upper_name",
        }
    )
    plan = SPLIT.model_copy(update={"steps": (*SPLIT.steps[:2], with_back, SPLIT.steps[3])})
    made = fleet(SHOP, plan)
    await applied(made)
    connect(shard).execute("INSERT INTO customer SELECT n, 'A', '', 'A' FROM generate_series(1, 3000) n")
    connect(shard).execute("UPDATE customer SET name = 'a' WHERE id = 1500")  # in the middle, where no sample looks

    [report] = await made.switch("split", State.DONE)

    assert Outcome.FAILED is report.outcome
    assert "1500" in report.reason
    assert State.LIVE is (await made.status())[0].records.state("split")  # type: ignore[union-attr]


async def test_undoing_done_is_refused_when_an_old_column_is_gone(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    made = fleet(SHOP, SPLIT.model_copy(update={"relax": ("customer.name",)}))
    await applied(made)
    assert (await made.switch("split", State.DONE)).done
    connect(shard).execute("ALTER TABLE customer DROP COLUMN name")

    [report] = await made.switch("split", State.LIVE)

    assert Outcome.FAILED is report.outcome
    assert "customer.name is gone" in report.reason


async def test_entering_dual_without_anybody_vouching_for_the_release_is_warned_of(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    heard: dict[bool, list[str]] = {}
    for vouched in (True, False):
        connect(shard).execute("DROP SCHEMA IF EXISTS shardmig CASCADE")
        connect(shard).execute("DROP TABLE IF EXISTS customer")
        seen: list[Event] = []
        made = fleet(SHOP, SPLIT)
        made.listener = seen.append
        await applied(made, aware="2026-11" if vouched else None)
        heard[vouched] = [event.message for event in seen if isinstance(event, Warned) and "vouched" in event.message]

    assert [] == heard[True]
    assert ["split" in message for message in heard[False]] == [True]


async def test_a_connection_that_breaks_while_a_shard_is_asked_is_that_shards_outcome(
    fleet: Callable[..., Fleet], connect: Callable[..., psycopg.Connection[Any]], shard: Shard
) -> None:
    made = fleet(SHOP)
    await applied(made)

    async def cut(session: Session) -> None:
        connect(shard).execute("SELECT pg_terminate_backend(%s)", [session.backend_pid])
        await session.execute("SELECT 1")

    answers = await made.ask(cut)

    assert isinstance(answers["eu1"], ShardUnreachable)
