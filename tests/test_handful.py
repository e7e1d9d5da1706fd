"""
A move of a handful of rows in the express way's flight, as forced schedules.

Where nobody is in its way, it is done in one flight; where somebody is, the careful way goes on, and nothing is lost.
What makes it so is taken away in some cases, one thing each: then a row is lost.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import SHOP, fleet_of, many, plan, run
from moving import moving, plan_of, same_table, second_table
from servers import proxied

from shardmig import express, handful, quiet, switching
from shardmig.events import BatchDone, Draining, FlagSwitched, StepDone, StepStarted, Waiting, Warned
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.session import Query
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Connect

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.fleet import Fleet
    from shardmig.local import Server

FORWARD = "UPDATE customer SET upper_name = upper(name) WHERE {batch}"
FILL = "INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, {0}) AS n"


def upper(**more: Any) -> Plan:
    """Move name into upper_name, the same table."""
    values: dict[str, Any] = {
        "table": "customer",
        "key": ("id",),
        "writes": ("upper_name",),
        "restores": ("name",),
        "forward": FORWARD,
        "check": "SELECT id FROM customer WHERE {batch} AND upper_name IS DISTINCT FROM upper(name)",
        "back": "UPDATE customer SET name = lower(upper_name) WHERE {batch}",
        "back_check": "SELECT id FROM customer WHERE {batch} AND name IS DISTINCT FROM lower(upper_name)",
    }
    return plan(
        "0002_upper",
        Statement(sql="ALTER TABLE customer ADD COLUMN upper_name text"),
        Switch(to=State.DUAL),
        Move(**{**values, **more}),
        Switch(to=State.LIVE),
        parent="0001_shop",
    )


# Its structure locks nothing that exists, so that schedules can hold rows of customer all the while.
def copied(revision: str, parent: str, source: str = "customer", key: str = "id", target: str = "contact") -> Plan:
    """Move names into a table of their own."""
    return plan(
        revision,
        Statement(sql=f"CREATE TABLE {target} (customer_id bigint PRIMARY KEY, name text)"),
        Switch(to=State.DUAL),
        Move(
            table=source,
            key=(key,),
            alias="c",
            target=target,
            target_key=("customer_id",),
            writes=("name",),
            forward=f"WITH source AS MATERIALIZED (SELECT c.{key}, c.name FROM {source} c WHERE {{batch}} "
            f"ORDER BY c.{key} FOR SHARE) INSERT INTO {target} (customer_id, name) SELECT {key}, name FROM source "
            "ON CONFLICT (customer_id) DO UPDATE SET name = excluded.name",
            check=f"SELECT c.{key} FROM {source} c LEFT JOIN {target} t ON t.customer_id = c.{key} "
            "WHERE {batch} AND (t.customer_id IS NULL OR t.name IS DISTINCT FROM c.name)",
            orphans=f"SELECT customer_id FROM {target} WHERE {{batch}} "
            f"AND NOT EXISTS (SELECT FROM {source} c WHERE c.{key} = {target}.customer_id)",
            purge=f"DELETE FROM {target} WHERE {{batch}} "
            f"AND NOT EXISTS (SELECT FROM {source} c WHERE c.{key} = {target}.customer_id)",
        ),
        Switch(to=State.LIVE),
        parent=parent,
    )


CONTACT = copied("0002_contact", "0001_shop")
UPSERT = "INSERT INTO contact VALUES ({0}, 'new') ON CONFLICT (customer_id) DO UPDATE SET name = excluded.name"
EXEMPT = "shop_app"  # a role whose open transactions no drain waits for
PATIENT = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = 20000', current_database()); END $$"


@pytest.fixture
def two(servers: list[Server]) -> Iterator[list[Shard]]:
    """Return a canary and the shard behind it, each with three customers."""
    with many(servers[:2], 2, "handful") as shards:
        assert asyncio.run(fleet_of(shards, SHOP).apply()).done
        for shard in shards:
            run(shard, FILL.format(3))
        yield shards


def heard(fleet: Fleet, shard: Shard, act: Callable[[Event], None] = lambda _: None) -> list[Event]:
    """Let something happen at each event of a shard, and return all of them."""
    events: list[Event] = []

    def listen(event: Event) -> None:
        if event.shard == shard.name:
            events.append(event)
            act(event)

    fleet.listener = listen
    return events


def before_the_flight(act: Callable[[], object]) -> Callable[[Event], None]:
    """Act once, after all was found quiet and before the flight leaves."""
    done: list[object] = []
    return lambda event: done.append(act()) if isinstance(event, StepStarted) and not done else None


def went(events: list[Event]) -> list[str]:
    """Name what was told of flags and the move, in order."""
    return [
        f"{e.before.name}-{e.after.name}" if isinstance(e, FlagSwitched) else type(e).__name__
        for e in events
        if isinstance(e, FlagSwitched | BatchDone | Draining) or (isinstance(e, StepDone) and e.step == 3)
    ]


def differing(shard: Shard) -> list[tuple[Any, ...]]:
    return run(shard, "SELECT id FROM customer WHERE upper_name IS DISTINCT FROM upper(name) ORDER BY id")


APART = (
    "SELECT c.id, t.customer_id FROM customer c FULL JOIN contact t ON t.customer_id = c.id "
    "WHERE c.name IS DISTINCT FROM t.name"
)
FLAGS = "SELECT flag, state, drained, new_valid, old_valid FROM shardmig.flag ORDER BY 1"
SWITCHES = "SELECT flag, before, after, count(*) FROM shardmig.log WHERE flag <> '' GROUP BY 1, 2, 3 ORDER BY min(id)"
STATE = "SELECT state FROM shardmig.flag WHERE flag <> 'shop'"
STEP = """
SELECT kind, status, direction, bounded_at IS NULL, upto, cursor, rows, batches, check_cursor, checked_at IS NULL,
    error, waiting, started_at IS NULL, finished_at IS NULL, attempts > 0
FROM shardmig.step WHERE revision = '0002_upper' ORDER BY number"""
AT_ONCE = ["OLD-DUAL", "BatchDone", "StepDone", "DUAL-LIVE"]


# --------------------------------------------------------------------------------------------------------------------
# Where nobody is in the way


async def test_a_small_move_travels_with_the_rest(two: list[Shard], servers: list[Server]) -> None:
    with proxied(servers[1], two[1], delay_s=0.02) as (proxy, far):
        fleet = fleet_of([two[0], far], SHOP, upper())
        events = heard(fleet, far)
        assert (await fleet.apply()).done

        assert 4 == proxy.round_trips, "startup, self-checks with the ledger, preflight, all the rest"
    assert AT_ONCE == went(events)
    assert [] == differing(two[1])
    assert 1 == sum("nobody vouched" in event.message for event in events if isinstance(event, Warned))
    assert run(two[0], STEP) == run(two[1], STEP)


async def test_the_owner_moves_and_the_login_role_looks(servers: list[Server], connect: Connect) -> None:
    owned = {"session": {"owner": "shop_owner"}}
    with many(servers[:2], 2, "owned") as shards:
        assert (await fleet_of(shards, SHOP, **owned).apply()).done
        run(shards[1], FILL.format(3))
        fleet = fleet_of(shards, SHOP, upper(), **owned)
        events = heard(fleet, shards[1])
        assert (await fleet.apply()).done

        assert AT_ONCE == went(events)
        assert [] == differing(shards[1])


async def test_an_empty_table_has_no_batch(two: list[Shard]) -> None:
    run(two[1], "DELETE FROM customer")
    fleet = fleet_of(two, SHOP, upper())
    events = heard(fleet, two[1])
    assert (await fleet.apply()).done

    assert ["OLD-DUAL", "StepDone", "DUAL-LIVE"] == went(events)
    assert [(0, 0, None)] == run(two[1], "SELECT rows, batches, upto FROM shardmig.step WHERE kind = 'move'")


async def test_a_table_that_the_flight_itself_fills_is_moved_on(two: list[Shard]) -> None:
    """It is not there yet when its size is asked for; the second plan needs the first one's flag."""
    copy = copied("0003_copy", "0002_contact", "contact", "customer_id", "copy")
    fleet = fleet_of(two, SHOP, CONTACT, copy.model_copy(update={"needs": ("contact",)}))
    events = heard(fleet, two[1])
    assert (await fleet.apply()).done

    assert [*AT_ONCE, *AT_ONCE] == went(events)
    assert [(3,)] == run(two[1], "SELECT count(*) FROM copy")
    assert [(1,)] == run(two[1], "SELECT max(attempts) FROM shardmig.step"), "in one flight"


@pytest.mark.parametrize("until", [Until.STRUCTURE, Until.DUAL, Until.MOVED])
async def test_it_goes_no_further_than_it_shall(two: list[Shard], until: Until) -> None:
    assert (await fleet_of(two, SHOP, upper()).apply(until=until)).done

    flags = "SELECT flag, state, drained, new_valid FROM shardmig.flag ORDER BY 1"
    assert run(two[0], flags) == run(two[1], flags)
    assert run(two[0], STEP) == run(two[1], STEP)


# --------------------------------------------------------------------------------------------------------------------
# Whom the drain waits for (W1)


@pytest.mark.parametrize("looks", [True, False])
async def test_a_writer_who_has_read_old_is_waited_for(
    two: list[Shard], connect: Connect, monkeypatch: pytest.MonkeyPatch, *, looks: bool
) -> None:
    if not looks:
        monkeypatch.setattr(handful.switching, "looks", lambda *_, **__: [])
    writer = connect(two[1])

    def begin() -> None:
        writer.execute("BEGIN")
        writer.execute("SELECT state FROM shardmig.flag")

    def write(event: Event) -> None:
        between(event)
        if isinstance(event, Draining if looks else FlagSwitched) and writer.info.transaction_status:
            writer.execute("UPDATE customer SET name = 'late' WHERE id = 2")
            writer.execute("COMMIT")

    between = before_the_flight(begin)
    fleet = fleet_of(two, SHOP, upper(lossy=True))
    events = heard(fleet, two[1], write)
    assert (await fleet.apply()).done

    assert (["OLD-DUAL", "Draining", *AT_ONCE[1:]] if looks else AT_ONCE) == went(events)
    assert ([] if looks else [(2,)]) == differing(two[1])


@pytest.mark.parametrize("listed", [True, False])
async def test_a_prepared_transaction_is_waited_for(
    two: list[Shard], connect: Connect, monkeypatch: pytest.MonkeyPatch, *, listed: bool
) -> None:
    if not listed:
        monkeypatch.setattr(switching, "_PREPARED", switching._PREPARED + " AND false")
    writer = connect(two[1])

    def prepare() -> None:
        writer.execute("BEGIN")
        writer.execute("INSERT INTO customer VALUES (9, 'late')")
        writer.execute("PREPARE TRANSACTION 'handful'")

    def commit(event: Event) -> None:
        between(event)
        if isinstance(event, Draining if listed else FlagSwitched) and not committed:
            committed.append(writer.execute("COMMIT PREPARED 'handful'"))

    committed: list[object] = []
    between = before_the_flight(prepare)
    fleet = fleet_of(two, SHOP, CONTACT)
    heard(fleet, two[1], commit)
    done, waited = (await fleet.apply()).done, bool(committed)
    if not committed:  # a database with a prepared transaction cannot be dropped
        writer.execute("ROLLBACK PREPARED 'handful'")

    assert done
    assert waited
    assert ([] if listed else [(9, None)]) == run(two[1], APART)


@pytest.mark.parametrize("held", [1, 2, 3])
async def test_a_dual_writer_in_the_middle_of_it_is_whole(
    two: list[Shard], connect: Connect, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """
    One transaction drains, moves and checks; a writer who began in DUAL writes both representations meanwhile.

    It is held at a row, by a role that the drain exempts: rows before that one are moved already, those after it not.
    """
    monkeypatch.setattr(handful, "_LOCKED_MS", 15000)
    run(two[1], f"GRANT SELECT, UPDATE ON customer TO {EXEMPT}")
    run(two[1], PATIENT)
    holder, look = connect(two[1], user=EXEMPT), connect(two[1])

    def hold() -> None:
        holder.execute("BEGIN")
        holder.execute("SELECT FROM customer WHERE id = %s FOR UPDATE", [held])
        meanwhile.start()

    def write() -> None:
        while look.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount < 1:
            time.sleep(0.001)
        with psycopg.connect(two[1].url.get_secret_value()) as writer:
            states.extend(writer.execute(STATE).fetchall())
            for number in range(held + 1, 4):
                writer.execute("UPDATE customer SET name = 'new' WHERE id = %s", [number])
                writer.execute(UPSERT.format(number).encode())
            writer.execute("INSERT INTO customer (id, name) VALUES (9, 'new')")
            writer.execute(UPSERT.format(9).encode())
        holder.rollback()

    states: list[tuple[int]] = []
    meanwhile = threading.Thread(target=write)
    slow = {"lock_timeout_ms": (4500,), "exempt_roles": (EXEMPT,)}
    fleet = fleet_of(two, SHOP, CONTACT, session=slow)
    events = heard(fleet, two[1], before_the_flight(hold))
    assert (await fleet.apply()).done
    meanwhile.join()

    assert [(1,)] == states
    assert AT_ONCE == went(events), "nothing was refused"
    assert [] == run(two[1], APART)


# --------------------------------------------------------------------------------------------------------------------
# What refuses it


@pytest.mark.parametrize("tried", [True, False])
async def test_a_row_that_would_be_lost_keeps_the_flag_old(
    two: list[Shard], monkeypatch: pytest.MonkeyPatch, *, tried: bool
) -> None:
    if not tried:
        monkeypatch.setattr(handful, "tried", lambda *_: [])
    run(two[1], "UPDATE customer SET name = 'McCarthy' WHERE id = 2")

    report = (await fleet_of(two, SHOP, upper()).apply()).shards[1]

    assert (Outcome.FAILED if tried else Outcome.DONE) is report.outcome
    assert not tried or "the move loses data" in report.reason
    assert [(0 if tried else 2,)] == run(two[1], STATE)


@pytest.mark.parametrize("checked", [True, False])
async def test_a_check_that_fails_keeps_the_flag_in_dual(
    two: list[Shard], monkeypatch: pytest.MonkeyPatch, *, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(handful, "_checks", lambda _: ())
    run(two[1], "UPDATE customer SET name = 'hidden' WHERE id = 2")
    fleet = fleet_of(two, SHOP, upper(forward=f"{FORWARD} AND name <> 'hidden'", lossy=True))
    events = heard(fleet, two[1])

    report = (await fleet.apply()).shards[1]

    assert (Outcome.FAILED if checked else Outcome.DONE) is report.outcome
    assert not checked or "keys (2)" in report.reason
    assert [(1 if checked else 2,)] == run(two[1], STATE)
    assert 1 == went(events).count("OLD-DUAL"), "told once, although the careful way went on from there"


@pytest.mark.parametrize("checked", [True, False])
async def test_a_target_row_without_a_source_refuses_it(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch, *, checked: bool
) -> None:
    if not checked:
        monkeypatch.setattr(handful, "_checks", lambda _: ())
    tables = (
        "CREATE TABLE t (id bigint PRIMARY KEY, a text)",
        "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)",
    )
    async with moving(shard, second_table(), *tables) as here:
        for late in ("INSERT INTO t VALUES (1, 'x')", "INSERT INTO u VALUES (77, 'orphan')"):
            await here.session.execute(late)
        moved = handful.moved(here.turn, here.plan, rows_max=200)
        with nullcontext() if checked is False else pytest.raises(psycopg.errors.DivisionByZero):
            await here.session.transact([here.turn.hold(), *moved.queries])

        assert checked is not (await here.flag()).new_valid


async def test_a_row_that_somebody_holds_is_waited_for(two: list[Shard], connect: Connect) -> None:
    """By a role that the drain exempts, or its drain would wait for it."""
    run(two[1], f"GRANT SELECT, UPDATE ON customer TO {EXEMPT}")
    holder = connect(two[1], user=EXEMPT)

    def hold() -> None:
        holder.execute("BEGIN")
        holder.execute("SELECT FROM customer WHERE id = 2 FOR UPDATE")

    def let_go(event: Event) -> None:
        between(event)
        if isinstance(event, Waiting):
            waits.append(event)
            holder.rollback()

    waits: list[Waiting] = []
    between = before_the_flight(hold)
    fleet = fleet_of(two, SHOP, CONTACT, session={"exempt_roles": (EXEMPT,)})
    heard(fleet, two[1], let_go)
    assert (await fleet.apply()).done

    assert any("locked" in event.reason for event in waits)
    assert [] == run(two[1], APART)


@pytest.mark.parametrize("counted", [True, False])
async def test_a_table_that_grew_meanwhile_is_moved_in_batches(
    two: list[Shard], monkeypatch: pytest.MonkeyPatch, *, counted: bool
) -> None:
    if not counted:
        monkeypatch.setattr(handful, "_MOVED", handful._MOVED.replace("<= $5::bigint", "<= $5::bigint * 10"))
    grow = before_the_flight(
        lambda: run(two[1], "INSERT INTO customer SELECT n, 'late' FROM generate_series(4, 900) AS n")
    )
    fleet = fleet_of(two, SHOP, upper(lossy=True))
    events = heard(fleet, two[1], grow)
    assert (await fleet.apply()).done

    assert counted is (went(events).count("BatchDone") > 1)
    assert [] == differing(two[1])


async def test_whoever_lost_the_turn_moves_nothing(two: list[Shard]) -> None:
    fleet = fleet_of(two, SHOP, upper())
    took = before_the_flight(lambda: run(two[1], "UPDATE shardmig.runner SET term = term + 5"))
    events = heard(fleet, two[1], took)
    assert (await fleet.apply()).done

    assert AT_ONCE == went(events), "the careful way told of its own alone"
    assert [(2,)] == run(two[1], "SELECT count(*) FROM shardmig.log WHERE flag = 'upper' AND action = 'switch'")


@pytest.mark.parametrize("fenced", [True, False])
async def test_whoever_loses_the_turn_on_the_way_moves_nothing(
    two: list[Shard], connect: Connect, monkeypatch: pytest.MonkeyPatch, *, fenced: bool
) -> None:
    """Its flight waits for a lock on the table when another runner raises the term."""
    if not fenced:
        monkeypatch.setattr(express.Express, "_hold", lambda _: Query("SELECT 1"))
    holder, look = connect(two[1]), connect(two[1])

    def hold() -> None:
        holder.execute("BEGIN")
        holder.execute("LOCK TABLE customer IN ACCESS SHARE MODE")
        meanwhile.start()

    def take_over() -> None:
        while look.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount < 1:
            time.sleep(0.001)
        look.execute("UPDATE shardmig.runner SET term = term + 5")
        holder.rollback()

    meanwhile = threading.Thread(target=take_over)
    fleet = fleet_of(two, SHOP, upper(), session={"lock_timeout_ms": (400,)})
    heard(fleet, two[1], before_the_flight(hold))
    assert (await fleet.apply()).done
    meanwhile.join()

    [(attempts,)] = run(two[1], "SELECT attempts FROM shardmig.step WHERE kind = 'move'")
    assert fenced is (attempts > 1), "the careful way claims a step more than once"


async def test_nobody_switches_the_flag_between_looks_and_record(shard: Shard, connect: Connect) -> None:
    """What the looks find is about the flip that the row shows: `drained` must not vouch for another one."""
    operator = connect(shard)
    operator.execute("SET lock_timeout = '20ms'")
    async with moving(shard, second_table(), "CREATE TABLE t (id bigint PRIMARY KEY, a text)") as here:
        queries = handful.moved(here.turn, here.plan, rows_max=200).queries
        first = next(number for number, query in enumerate(queries) if "pg_lock_status" in query.sql)
        await here.session.flight([Query("BEGIN"), here.turn.hold(), *queries[:first]])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            operator.execute("UPDATE shardmig.flag SET drained = true")
        await here.session.roll_back()


@pytest.mark.parametrize("there", [State.OLD, State.LIVE])
async def test_a_flag_that_is_elsewhere_refuses_all_that_goes_with_its_flip(
    shard: Shard, connect: Connect, there: State
) -> None:
    """Not even the record that it was switched is kept."""
    psql = connect(shard)
    tables = (
        "CREATE TABLE t (id bigint PRIMARY KEY, a text)",
        "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)",
    )
    async with moving(shard, second_table(), *tables) as here:
        psql.execute("SET session_replication_role = replica")
        psql.execute("UPDATE shardmig.flag SET state = %s", (int(there),))
        waiting = [handful.flip(here.turn, here.plan, State.DUAL, State.LIVE)]
        moved = handful.moved(here.turn, here.plan, rows_max=200).queries
        for queries in (waiting, moved):
            with pytest.raises(psycopg.errors.DivisionByZero):
                await here.session.transact(queries)

            assert [(int(there), "PENDING")] == psql.execute(
                "SELECT DISTINCT state, status FROM shardmig.flag, shardmig.step WHERE number > 1"
            ).fetchall()


async def test_all_statements_on_locked_rows_share_the_time_that_one_would_have(shard: Shard) -> None:
    """The server's limit is for each statement, and rows stay locked from the first to the last."""
    moves = [second_table(), same_table()]  # two forwards, two checks, one look for orphans
    async with moving(shard, moves[0], "CREATE TABLE t (id bigint PRIMARY KEY, a text)") as here:
        limits = handful.moved(here.turn, plan_of(*moves), rows_max=200).queries[0]
        *_, limit = await here.session.transact([limits, Query("SHOW statement_timeout")])

        assert f"{handful._LOCKED_MS // 5}ms" == limit.value


# --------------------------------------------------------------------------------------------------------------------
# What makes a move rest


@pytest.mark.parametrize(
    ("section", "travels"),
    [
        ({}, True),
        ({"window": "{open}"}, True),
        ({"window": "{closed}", "parks_waiting": True}, False),
        ({"max_rows_per_s": 10_000}, False),
        ({"host_rows_per_s": 10_000}, False),
        ({"host_moves": 1}, False),
        ({"batch_rows": 2}, False),
        ({"max_slot_wal_mb": 0.000001, "max_rest_s": 0.1}, False),
    ],
)
async def test_limits_of_moves_are_kept(
    two: list[Shard], connect: Connect, section: dict[str, Any], *, travels: bool
) -> None:
    now = datetime.now(UTC)
    hours = {"open": (-1, 1), "closed": (1, 2)}
    spans = {
        name: "-".join(f"{now + timedelta(hours=hour):%H:%M}" for hour in span) + " UTC" for name, span in hours.items()
    }
    pace = {name: value.format(**spans) if isinstance(value, str) else value for name, value in section.items()}
    psql = connect(two[1])
    if "max_slot_wal_mb" in pace:
        psql.execute("SELECT pg_create_physical_replication_slot('handful', true)")
        run(two[1], "INSERT INTO customer VALUES (4, 'customer 4')")
    try:
        assert (await fleet_of(two[:1], SHOP, upper()).apply()).done
        assert (await fleet_of(two, SHOP, upper(), pace=pace).apply()).shards[1].outcome in {
            Outcome.DONE,
            Outcome.PARKED,
        }
    finally:
        if "max_slot_wal_mb" in pace:
            psql.execute("SELECT pg_drop_replication_slot('handful')")

    alone = "SELECT attempts FROM shardmig.step WHERE kind = 'move'"
    assert ([(1,)] == run(two[1], alone)) is travels, "the careful way claims a step more than once"


async def test_a_server_is_looked_at_once_a_second_for_all_its_shards(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards whose server was just looked at are not asked for its load, neither then nor while connecting."""
    monkeypatch.setattr(quiet, "_LOOK_S", 60)
    looks: list[object] = []
    read = quiet.load_of
    monkeypatch.setattr(quiet, "load_of", lambda answer: looks.append(answer) or read(answer))
    with many(servers[:1], 5, "calm") as shards:
        assert (await fleet_of(shards, SHOP).apply()).done
        assert (await fleet_of(shards, SHOP, upper(), rollout={"jobs": 1}).apply()).done
        attempts = [run(shard, "SELECT attempts FROM shardmig.step WHERE kind = 'move'") for shard in shards[1:]]

    assert [[(1,)]] * 4 == attempts, "all in their flights"
    assert 1 == len(looks)


async def test_a_look_may_get_too_old_between_question_and_answer(
    two: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server was calm when the load was not asked for; when answers are read that time is over."""
    read = quiet.read

    def late(todo: Any, config: Any, host: Any, ready: Any) -> Any:
        host.calm_until_s = 0.0
        return read(todo, config, host, ready)

    monkeypatch.setattr(quiet, "read", late)
    fleet = fleet_of(two, SHOP, upper())
    for shard in two:
        fleet._hosts.of(shard).calm_until_s = math.inf
    report = await fleet.apply()

    assert report.done, report
    assert [(1,)] == run(two[1], "SELECT attempts FROM shardmig.step WHERE kind = 'move'"), "in its flight"


# --------------------------------------------------------------------------------------------------------------------
# Connections that break


@pytest.mark.parametrize("before", [True, False])
async def test_a_connection_that_breaks_at_any_commit_changes_nothing_of_the_result(
    two: list[Shard], servers: list[Server], *, before: bool
) -> None:
    """A runner that is killed leaves the same behind: what was sent is executed up to a COMMIT, or not at all."""
    picture = ("SELECT id, name, upper_name FROM customer ORDER BY 1", FLAGS, STEP, SWITCHES)
    assert (await fleet_of(two[:1], SHOP, upper()).apply()).done
    undisturbed = [run(two[0], sql) for sql in picture]

    struck = 0
    with many(servers[1:2], 6, "cut") as shards:
        assert (await fleet_of(shards, SHOP).apply()).done
        for skip, shard in enumerate(shards):
            run(shard, FILL.format(3))
            with proxied(servers[1], shard) as (proxy, far):
                cut = proxy.cut_before(skip=skip) if before else proxy.cut_after(skip=skip)
                assert (await fleet_of([two[0], far], SHOP, upper()).apply()).done, skip
                struck += cut.struck.is_set()

            assert undisturbed == [run(shard, sql) for sql in picture], skip

    assert struck >= 4, "turn and plan, structure, DUAL, the rest"
