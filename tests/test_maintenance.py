"""A small shard is closed by the runner for what is too hard to do while it serves, and opened whatever happens."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import COLUMN, NOTE, SHOP, UPPER, fleet_of, plan

from shardmig import Flag, Flags, ShardInMaintenance, State
from shardmig.events import Draining, FlagSwitched, MaintenanceSet, StepDone, StepStarted, Waiting, Warned
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.steps import Stopped
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Connect

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.fleet import Fleet

OFFLINE = UPPER.model_copy(update={"online": False})
FLAG = Flag("upper")
WRONG = "SELECT id FROM customer WHERE upper_name IS DISTINCT FROM upper(name)"


def upper_of(expression: str) -> Any:
    """Make OFFLINE with another way to fill upper_name."""
    move = next(step for step in OFFLINE.steps if isinstance(step, Move))
    other = move.model_copy(
        update={
            "forward": f"UPDATE customer SET upper_name = {expression} WHERE {{batch}}",
            "check": f"SELECT id FROM customer WHERE {{batch}} AND upper_name IS DISTINCT FROM {expression}",
        }
    )
    return OFFLINE.model_copy(update={"steps": tuple(other if step is move else step for step in OFFLINE.steps)})


def ratio() -> Plan:
    """Make a plan behind OFFLINE whose move fails."""
    move = Move(
        table="customer",
        key=("id",),
        writes=("ratio",),
        forward="UPDATE customer SET ratio = 1 / (id - 7) WHERE {batch}",
        check="SELECT id FROM customer WHERE {batch} AND ratio IS DISTINCT FROM 1 / (id - 7)",
    )
    column = Statement(sql="ALTER TABLE customer ADD COLUMN ratio bigint")
    steps = (column, Switch(to=State.DUAL), move, Switch(to=State.LIVE))
    return plan("0003_ratio", *steps, parent="0002_upper", online=False)


FAILING = NOTE.model_copy(update={"online": False})  # where somebody has made that column already
OLD_BY_HAND = "SELECT shardmig.switch('upper', 'OLD', 'anew')"
DUAL_BY_HAND = "SELECT shardmig.switch('upper', 'DUAL', 'release')"
LIVE_BY_HAND = "SELECT shardmig.switch('upper', 'LIVE', 'go')"
LEFT_CLOSED = "SELECT shardmig.maintenance('offline', '0003_note is being applied', NULL, '0003_note')"
CLOSED_FOR_UPPER = LEFT_CLOSED.replace("0003_note", "0002_upper")


async def shop(shard: Shard, connect: Connect, rows: int = 300) -> psycopg.Connection[Any]:
    """Make a shop with customers n1, n2, …, and the statistics that go with them."""
    assert (await fleet_of([shard], SHOP).apply()).done
    psql = connect(shard)
    psql.execute("INSERT INTO customer SELECT g, 'n' || g FROM generate_series(1, %s) g", [rows])
    psql.execute("ANALYZE customer")
    return psql


def maintenance(psql: psycopg.Connection[Any]) -> tuple[int, str | None]:
    row: tuple[int, str | None] | None = psql.execute("SELECT maintenance, reason FROM shardmig.shard").fetchone()
    assert row is not None
    return row


def history(psql: psycopg.Connection[Any]) -> list[tuple[str, str | None]]:
    return psql.execute("SELECT after, revision FROM shardmig.log WHERE action = 'maintenance' ORDER BY id").fetchall()


def state(psql: psycopg.Connection[Any]) -> int:
    [(found,)] = psql.execute("SELECT state FROM shardmig.flag WHERE flag = 'upper'").fetchall()
    return int(found)


def told(fleet: Fleet, do: Callable[[Event], None] = lambda _: None) -> list[Event]:
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        do(event)

    fleet.listener = listen
    return events


class Clerk(threading.Thread):
    """An application that knows the flag: it adds customers as fast as it can, and waits where it is refused."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.added: list[int] = []
        self.refused: list[ShardInMaintenance] = []
        self.failed: list[Exception] = []
        self.done, self.was_refused, self.served = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> None:
        flags = Flags(FLAG)
        with psycopg.connect(self.shard.url.get_secret_value(), autocommit=True) as connection:
            number = 1_000
            while not self.done.is_set():
                number += 1
                try:
                    self._add(connection, flags, number)
                except ShardInMaintenance as error:
                    self.refused.append(error)
                    self.was_refused.set()
                except Exception as error:  # noqa: BLE001 - the test looks at whatever it was
                    self.failed.append(error)
                    return

    def _add(self, connection: psycopg.Connection[Any], flags: Flags, number: int) -> None:
        with flags.transaction(connection, shard=self.shard.name) as view:
            values: dict[str, object] = {"id": number, "name": f"n{number}"}
            if view[FLAG].writes_new:
                values["upper_name"] = f"N{number}"
            names = ", ".join(values)
            connection.execute(
                f"INSERT INTO customer ({names}) VALUES ({', '.join(['%s'] * len(values))})",  # type: ignore[arg-type]
                list(values.values()),
            )
        self.added.append(number)
        self.served.set()


async def test_an_application_is_refused_loses_nothing_and_is_served_again(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    clerk = Clerk(shard)
    fleet = fleet_of([shard], SHOP, OFFLINE)

    def wait_for_a_refusal(event: Event) -> None:
        if event == MaintenanceSet(shard.name, "offline", "0002_upper is being applied"):
            assert clerk.was_refused.wait(20)

    events = told(fleet, wait_for_a_refusal)
    clerk.start()
    assert await asyncio.to_thread(clerk.served.wait, 20)

    [report] = await fleet.apply()
    clerk.served.clear()
    assert await asyncio.to_thread(clerk.served.wait, 20)
    clerk.done.set()
    clerk.join()

    assert (Outcome.DONE, []) == (report.outcome, clerk.failed)
    assert {30} == {error.retry_after for error in clerk.refused}
    assert "0002_upper is being applied" in str(clerk.refused[0])
    rows = dict(psql.execute("SELECT id, upper_name FROM customer WHERE id > 1000").fetchall())
    assert sorted(clerk.added) == sorted(rows)
    assert [(0,)] == psql.execute(
        "SELECT count(*) FROM customer WHERE upper_name IS DISTINCT FROM upper(name)"
    ).fetchall()
    assert (0, None) == maintenance(psql)
    assert [("offline", "0002_upper"), ("off", None)] == history(psql)
    assert ["offline", "off"] == [event.mode for event in events if isinstance(event, MaintenanceSet)]


async def test_what_can_be_done_online_is_done_before_the_shard_is_closed(shard: Shard, connect: Connect) -> None:
    await shop(shard, connect)
    offline = OFFLINE.model_copy(update={"parent": "0002_note", "revision": "0003_upper"})
    fleet = fleet_of([shard], SHOP, COLUMN, offline)
    events = told(fleet)

    assert (await fleet.apply()).done

    seen = [
        (event.revision, event.step) if isinstance(event, StepStarted) else event.mode
        for event in events
        if isinstance(event, (StepStarted, MaintenanceSet))
    ]
    assert [("0002_note", 1), "offline", ("0003_upper", 1), ("0003_upper", 3), "off"] == seen


async def test_a_shard_with_more_rows_than_the_budget_is_told_of_and_not_closed(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)

    [report] = await fleet_of([shard], SHOP, OFFLINE, maintenance={"rows_max": 299}).apply()

    assert Outcome.FAILED is report.outcome
    assert "about 300 rows" in report.reason
    assert f"`shardmig maintenance on --shard {shard.name}`" in report.reason
    assert [] == history(psql)
    assert (await fleet_of([shard], SHOP, OFFLINE, maintenance={"rows_max": 300}).apply()).done


async def test_a_table_that_was_never_analyzed_is_not_taken_for_an_empty_one(shard: Shard, connect: Connect) -> None:
    assert (await fleet_of([shard], SHOP).apply()).done
    connect(shard).execute("INSERT INTO customer SELECT g, 'n' || g FROM generate_series(1, 5000) g")

    [report] = await fleet_of([shard], SHOP, OFFLINE, maintenance={"rows_max": 1000}).apply()

    assert (Outcome.FAILED, True) == (report.outcome, "more than maintenance.rows_max = 1,000" in report.reason)


async def test_a_heavy_plan_closes_the_shard_for_writers_alone(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    flags, app = Flags(FLAG), connect(shard)
    fleet = fleet_of([shard], SHOP, UPPER, maintenance={"heavy_rows": 100})
    met: list[type[Exception] | State] = []

    def write_and_read(event: Event) -> None:
        if isinstance(event, FlagSwitched):  # OLD → DUAL: rows are about to be moved
            for write in (True, False):
                try:
                    with flags.transaction(app, shard=shard.name, write=write) as view:
                        met.append(view[FLAG])
                except ShardInMaintenance as error:
                    met.append(type(error))

    events = told(fleet, write_and_read)

    assert (await fleet.apply()).done

    assert [ShardInMaintenance, State.DUAL, ShardInMaintenance, State.LIVE] == met
    assert [("read-only", "0002_upper"), ("off", None)] == history(psql)
    assert not [event for event in events if isinstance(event, Warned) and "heavy" in event.message]


@pytest.mark.parametrize(
    ("settings", "warned"), [({"heavy_rows": 300}, False), ({"heavy_rows": 100, "rows_max": 200}, True)]
)
async def test_a_plan_that_may_stay_online_closes_no_shard_that_is_light_or_too_large(
    shard: Shard, connect: Connect, settings: dict[str, int], *, warned: bool
) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, UPPER, maintenance=settings)
    events = told(fleet)

    assert (await fleet.apply()).done

    assert [] == history(psql)
    assert warned is any(isinstance(event, Warned) and "is heavy here" in event.message for event in events)


async def test_outside_its_window_a_shard_is_not_closed(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    [(hour,)] = psql.execute("SELECT extract(hour FROM now() AT TIME ZONE 'UTC')::int").fetchall()
    window = f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00 UTC"
    pace = {"window": window, "parks_waiting": True}
    fleet = fleet_of([shard], SHOP, UPPER, maintenance={"heavy_rows": 100}, pace=pace)

    [report] = await fleet.apply()

    assert (Outcome.PARKED, True) == (report.outcome, f"not closed yet: rows move only {window}" in report.reason)
    assert ([], (0, None)) == (history(psql), maintenance(psql))


async def test_a_shard_serves_while_it_waits_for_its_turn_on_the_server(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, UPPER, maintenance={"heavy_rows": 100}, pace={"host_moves": 1})
    host = fleet._hosts.of(shard)
    assert host.admit("another") is None
    met: list[tuple[int, str | None]] = []

    def let_pass(event: Event) -> None:
        if isinstance(event, Waiting) and "rows of another are moved on the same server" in event.reason:
            met.append(maintenance(psql))
            host.leave("another")

    told(fleet, let_pass)

    assert (await fleet.apply()).done

    assert ([(0, None)], [("read-only", "0002_upper"), ("off", None)]) == (met, history(psql))
    assert host.admit("another") is None  # the place is free again


async def test_a_closed_shard_does_not_rest_for_what_its_server_may_move(shard: Shard, connect: Connect) -> None:
    await shop(shard, connect)
    limits = {"host_rows_per_s": 5, "max_rows_per_s": 5}  # a minute for its rows
    fleet = fleet_of([shard], SHOP, UPPER, maintenance={"heavy_rows": 100}, pace=limits)
    at: list[float] = []
    told(fleet, lambda event: at.append(time.monotonic()) if isinstance(event, MaintenanceSet) else None)

    assert (await fleet.apply()).done

    closed_at, opened_at = at
    assert opened_at - closed_at < 30


async def test_a_failure_in_the_middle_opens_the_shard_with_its_flag_where_it_was(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    psql.execute("UPDATE customer SET name = 'x' WHERE id = 250")
    fleet = fleet_of([shard], SHOP, upper_of("(substr(name, 2)::int)::text"))

    [report] = await fleet.apply()

    assert (Outcome.FAILED, True) == (report.outcome, "0002_upper step 3" in report.reason)
    assert report.reason.partition("\n")[0].endswith("; upper is OLD again")
    assert ((0, None), State.OLD) == (maintenance(psql), state(psql))
    with Flags(FLAG).transaction(connect(shard), shard=shard.name) as view:
        assert State.OLD is view[FLAG]
    psql.execute("UPDATE customer SET name = 'n250' WHERE id = 250")
    assert (await fleet.apply()).done
    assert ((0, None), State.LIVE) == (maintenance(psql), state(psql))
    assert [("250",)] == psql.execute("SELECT upper_name FROM customer WHERE id = 250").fetchall()


@pytest.mark.parametrize(
    ("until", "by_hand", "expected"),
    [
        (Until.MOVED, [], State.DUAL),
        (Until.MOVED, [LIVE_BY_HAND], State.LIVE),
        (Until.MOVED, [LEFT_CLOSED], State.DUAL),
        (Until.STRUCTURE, [DUAL_BY_HAND, LEFT_CLOSED], State.DUAL),
        (Until.STRUCTURE, [LEFT_CLOSED, DUAL_BY_HAND], State.DUAL),
    ],
)
async def test_a_failure_takes_no_flag_back_that_the_closing_was_not_for(
    shard: Shard, connect: Connect, until: Until, by_hand: list[str], expected: State
) -> None:
    psql = await shop(shard, connect)
    assert (await fleet_of([shard], SHOP, UPPER).apply(until=until)).done
    for order in [*by_hand, "ALTER TABLE customer ADD COLUMN note text"]:
        psql.execute(order.encode())
    before = psql.execute("SELECT * FROM shardmig.flag WHERE flag = 'upper'").fetchall()
    moved = psql.execute("SELECT cursor FROM shardmig.step WHERE kind = 'move'").fetchall()

    [report] = await fleet_of([shard], SHOP, UPPER, FAILING).apply(until=Until.STRUCTURE)

    assert (Outcome.FAILED, True) == (report.outcome, "already exists" in report.reason)
    assert ((0, None), expected) == (maintenance(psql), state(psql))
    assert before == psql.execute("SELECT * FROM shardmig.flag WHERE flag = 'upper'").fetchall()
    assert moved == psql.execute("SELECT cursor FROM shardmig.step WHERE kind = 'move'").fetchall()


@pytest.mark.parametrize("by_hand", [[], [OLD_BY_HAND, DUAL_BY_HAND]])
async def test_a_flag_that_was_dual_when_the_shard_was_closed_stays_dual(
    shard: Shard, connect: Connect, by_hand: list[str]
) -> None:
    psql = await shop(shard, connect)
    assert (await fleet_of([shard], SHOP, OFFLINE).apply(until=Until.MOVED)).done
    for order in [CLOSED_FOR_UPPER, *by_hand]:
        psql.execute(order.encode())

    [report] = await fleet_of([shard], SHOP, upper_of("upper(name) || '!'")).apply()

    assert Outcome.PLAN_CHANGED is report.outcome
    assert ((0, None), State.DUAL) == (maintenance(psql), state(psql))


async def test_every_plan_that_a_shard_is_closed_for_is_named_and_goes_back_with_the_others(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE, ratio())

    [report] = await fleet.apply(until=Until.MOVED)

    assert (Outcome.FAILED, True) == (report.outcome, "division by zero" in report.reason)
    assert [("offline", "0002_upper"), ("offline", "0003_ratio"), ("off", None)] == history(psql)
    assert [("ratio", 0), ("shop", 2), ("upper", 0)] == psql.execute(
        "SELECT flag, state FROM shardmig.flag ORDER BY flag"
    ).fetchall()


async def test_somebody_who_stays_inside_parks_the_shard_and_it_serves_again(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    inside = connect(shard, autocommit=False, application_name="checkout")
    inside.execute("SELECT 1")
    fleet = fleet_of([shard], SHOP, OFFLINE, maintenance={"drain_timeout_s": 0.2})

    [report] = await fleet.apply()

    assert (Outcome.PARKED, True) == (report.outcome, "checkout" in report.reason)
    assert ((0, None), State.OLD) == (maintenance(psql), state(psql))
    inside.rollback()
    assert (await fleet.apply()).done


@pytest.mark.parametrize("stops", [False, True])
async def test_somebody_who_comes_later_keeps_the_shard_closed_no_longer_than_somebody_inside(
    shard: Shard, connect: Connect, *, stops: bool
) -> None:
    psql = await shop(shard, connect)
    later = connect(shard, autocommit=False, application_name="report")
    fleet = fleet_of([shard], SHOP, OFFLINE, session={"drain_timeout_s": 5}, maintenance={"drain_timeout_s": 0.2})
    at: list[float] = []

    def come(event: Event) -> None:
        if isinstance(event, FlagSwitched):
            later.execute("SELECT 1")
        elif isinstance(event, Draining) and stops:
            fleet.stop.set()
        elif isinstance(event, MaintenanceSet):
            at.append(time.monotonic())

    told(fleet, come)
    [report] = await fleet.apply()

    closed_at, opened_at = at
    assert opened_at - closed_at < 4
    assert (Outcome.INTERRUPTED if stops else Outcome.PARKED) is report.outcome
    assert "; upper stays DUAL: readers read old, writers write both" in report.reason
    assert ((0, None), State.DUAL) == (maintenance(psql), state(psql))
    with Flags(FLAG).transaction(connect(shard), shard=shard.name) as view:
        assert State.DUAL is view[FLAG]
    later.rollback()
    fleet.listener = None
    fleet.stop.clear()
    assert (await fleet.apply()).done
    assert [] == psql.execute(WRONG).fetchall()


async def test_a_busy_table_keeps_the_shard_closed_no_longer_than_somebody_inside(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    later = connect(shard, autocommit=False)
    fleet = fleet_of([shard], SHOP, OFFLINE, maintenance={"drain_timeout_s": 0.2})
    told(fleet, lambda event: isinstance(event, StepStarted) and later.execute("SELECT FROM customer"))

    [report] = await fleet.apply()

    assert (Outcome.PARKED, True) == (report.outcome, "stayed busy for 0.2 s" in report.reason)
    assert ((0, None), State.OLD) == (maintenance(psql), state(psql))


async def test_behind_a_closing_a_busy_table_is_waited_for_as_before(shard: Shard, connect: Connect) -> None:
    await shop(shard, connect)
    later = connect(shard, autocommit=False)
    fleet = fleet_of([shard], SHOP, OFFLINE, NOTE, maintenance={"drain_timeout_s": 0.2})
    waited: list[Event] = []

    def be_in_the_way(event: Event) -> None:
        if isinstance(event, MaintenanceSet) and event.mode == "off":
            later.execute("SELECT FROM customer")
        elif isinstance(event, Waiting):
            waited.append(event)
            if len(waited) > 1:  # a second later
                later.rollback()

    told(fleet, be_in_the_way)

    assert (await fleet.apply()).done
    assert len(waited) > 1


async def test_whoever_leaves_a_shard_closed_says_so_in_its_report(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    operator = connect(shard, autocommit=False)
    fleet = fleet_of([shard], SHOP, OFFLINE, maintenance={"drain_timeout_s": 0.2})

    def hold(event: Event) -> None:
        if isinstance(event, FlagSwitched):
            fleet.stop.set()
            operator.execute("SELECT FROM shardmig.shard FOR UPDATE")

    events = told(fleet, hold)
    [report] = await fleet.apply()
    operator.rollback()

    said = f"`shardmig maintenance off --shard {shard.name}` opens it"
    assert Outcome.INTERRUPTED is report.outcome
    assert "; upper stays DUAL: " in report.reason
    assert f"; the shard is still closed: `shardmig apply --shard {shard.name}` goes on, {said}" in report.reason
    assert 1 == len([event for event in events if isinstance(event, Warned) and said in event.message])
    assert (2, "0002_upper is being applied") == maintenance(psql)
    fleet.listener = None
    fleet.stop.clear()
    assert (await fleet.apply()).done


async def test_a_shard_that_was_quietly_left_closed_is_told_of(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(*_: object) -> None:
        raise Stopped

    psql = await shop(shard, connect)
    psql.execute(CLOSED_FOR_UPPER.encode())
    monkeypatch.setattr("shardmig.closure.Closure.open_again", stop)

    [report] = await fleet_of([shard], SHOP).apply()

    assert Outcome.MAINTENANCE is report.outcome
    assert report.reason.startswith(f"the shard is still closed: `shardmig apply --shard {shard.name}` goes on")


async def test_a_stop_opens_the_shard(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE)
    told(fleet, lambda event: fleet.stop.set() if isinstance(event, FlagSwitched) else None)

    [report] = await fleet.apply()

    assert Outcome.INTERRUPTED is report.outcome
    assert ((0, None), State.OLD) == (maintenance(psql), state(psql))


@pytest.mark.parametrize("patience_s", [10, 0])
async def test_whoever_stops_at_once_waits_until_the_shard_is_open_or_hears_that_it_may_not_be(
    shard: Shard, connect: Connect, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr("shardmig.closure._AT_ONCE_S", patience_s)
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE)

    def stop(event: Event) -> None:
        if isinstance(event, FlagSwitched) and fleet.stop.is_set():  # taken back: the shard is about to be opened
            run.cancel()
        elif isinstance(event, FlagSwitched):
            fleet.stop.set()

    events = told(fleet, stop)
    run = asyncio.create_task(fleet.apply())
    with pytest.raises(asyncio.CancelledError):
        await run

    said = [event for event in events if isinstance(event, Warned) and "the shard may still be closed" in event.message]
    assert (0 if patience_s else 1) == len(said)
    assert said or (0, None) == maintenance(psql)


async def test_read_only_set_by_people_is_not_enough_for_a_plan_that_wants_nobody_inside(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    psql.execute("SELECT shardmig.maintenance('read-only', 'reports')")

    [report] = await fleet_of([shard], SHOP, OFFLINE).apply()

    assert Outcome.MAINTENANCE is report.outcome
    assert "wants the shard offline, for what it writes may be read half-done" in report.reason
    assert f"`shardmig maintenance on --shard {shard.name}`" in report.reason
    assert (1, "reports") == maintenance(psql)


async def test_what_wants_nobody_inside_ends_where_people_let_somebody_in(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE)

    def lift(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            psql.execute("SELECT shardmig.maintenance('off', 'sale')")

    events = told(fleet, lift)
    [report] = await fleet.apply()

    assert Outcome.PARKED is report.outcome
    assert "the shard serves again" in report.reason
    assert [1] == [event.step for event in events if isinstance(event, StepDone)]
    assert [(300, 0)] == psql.execute("SELECT count(*), count(upper_name) FROM customer").fetchall()
    fleet.listener = None
    assert (await fleet.apply()).done
    assert [] == psql.execute(WRONG).fetchall()
    assert ["offline", "off", "offline", "off"] == [mode for mode, _ in history(psql)]


async def test_after_a_failover_that_lost_the_closing_nothing_is_done_until_the_shard_is_closed_again(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE)

    def fail_over(event: Event) -> None:
        if isinstance(event, StepStarted) and event.step == 1:
            with psql.transaction():
                psql.execute("SET LOCAL session_replication_role = replica")
                psql.execute("UPDATE shardmig.shard SET maintenance = 0, reason = NULL")
                psql.execute("DELETE FROM shardmig.log WHERE action = 'maintenance'")
            psql.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE application_name LIKE 'shardmig%' AND datname = current_database()"
            )

    events = told(fleet, fail_over)
    [report] = await fleet.apply()

    assert Outcome.PARKED is report.outcome
    assert "its maintenance was lifted or lost in a failover" in report.reason
    assert [] == [event for event in events if isinstance(event, StepDone)]
    fleet.listener = None
    assert (await fleet.apply()).done
    assert [] == psql.execute(WRONG).fetchall()
    assert ["offline", "off"] == [mode for mode, _ in history(psql)]


async def test_what_people_closed_meanwhile_no_runner_opens(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE)

    def close_by_hand(event: Event) -> None:
        if isinstance(event, FlagSwitched) and event.after is State.LIVE:
            psql.execute("SELECT shardmig.maintenance('offline', 'fire')")

    told(fleet, close_by_hand)

    assert (await fleet.apply()).done

    assert (2, "fire") == maintenance(psql)


async def test_what_people_closed_before_the_runner_could_stays_theirs(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, NOTE, OFFLINE)

    def close_by_hand(event: Event) -> None:
        if isinstance(event, FlagSwitched) and event.flag == "note":
            psql.execute("SELECT shardmig.maintenance('read-only', 'another disk')")

    told(fleet, close_by_hand)

    [report] = await fleet.apply()

    assert (Outcome.PARKED, True) == (report.outcome, "people have set maintenance meanwhile" in report.reason)
    assert ((1, "another disk"), [("read-only", None)]) == (maintenance(psql), history(psql))
    assert State.OLD == state(psql)


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from fleets import SHOP, fleet_of
from test_maintenance import OFFLINE
from shardmig.config import Shard
from shardmig.events import BatchDone, FlagSwitched

def listen(event):
    if type(event).__name__ == sys.argv[4] and getattr(event, "after", None) in (None, int(sys.argv[5])):
        os.kill(os.getpid(), signal.SIGKILL)

fleet = fleet_of([Shard.model_validate({"name": sys.argv[2], "url": sys.argv[3]})], SHOP, OFFLINE)
fleet.listener = listen
asyncio.run(fleet.apply())
"""


def killed(shard: Shard, event: str, after: State = State.OLD) -> None:
    """Apply in another process, which kills itself at an event."""
    arguments = [str(Path(__file__).parent), shard.name, shard.url.get_secret_value(), event, str(int(after))]
    result = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=60)
    assert -9 == result.returncode


@pytest.mark.parametrize(
    ("event", "after"),
    [
        ("MaintenanceSet", State.OLD),
        ("BatchDone", State.OLD),
        ("FlagSwitched", State.DUAL),
        ("FlagSwitched", State.LIVE),
    ],
)
async def test_a_runner_killed_in_the_middle_leaves_the_shard_closed_and_the_next_one_goes_on(
    shard: Shard, connect: Connect, event: str, after: State
) -> None:
    psql = await shop(shard, connect)
    fleet = fleet_of([shard], SHOP, OFFLINE)

    killed(shard, event, after)

    assert (2, "0002_upper is being applied") == maintenance(psql)
    [status] = await fleet.status()
    assert (Outcome.MAINTENANCE, True) == (status.outcome, "0002_upper is being applied" in status.reason)
    assert (await fleet.apply()).done
    assert ((0, None), State.LIVE) == (maintenance(psql), state(psql))
    assert [(0,)] == psql.execute(
        "SELECT count(*) FROM customer WHERE upper_name IS DISTINCT FROM upper(name)"
    ).fetchall()


async def test_after_a_kill_the_shard_serves_while_a_plan_is_applied_that_lets_it(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    offline = OFFLINE.model_copy(update={"parent": "0002_note", "revision": "0003_upper"})
    fleet = fleet_of([shard], SHOP, COLUMN, offline)
    assert (await fleet.apply(until=Until.STRUCTURE)).done
    for order in [CLOSED_FOR_UPPER.replace("0002", "0003"), DUAL_BY_HAND]:
        psql.execute(order.encode())
    events = told(fleet)

    assert (await fleet.apply()).done

    seen = [
        (event.flag, event.after) if isinstance(event, FlagSwitched) else event.mode
        for event in events
        if isinstance(event, (FlagSwitched, MaintenanceSet))
    ]
    before = [("upper", State.OLD), "off", ("note", State.LIVE)]
    assert [*before, "offline", ("upper", State.DUAL), ("upper", State.LIVE), "off"] == seen


async def test_after_a_kill_no_plan_that_lets_the_shard_serve_is_applied_while_nobody_can_open_it(
    shard: Shard, connect: Connect
) -> None:
    psql = await shop(shard, connect)
    psql.execute(CLOSED_FOR_UPPER.encode())
    operator = connect(shard, autocommit=False)
    operator.execute("SELECT FROM shardmig.shard FOR UPDATE")
    fleet = fleet_of([shard], SHOP, COLUMN)

    [report] = await fleet.apply()

    assert Outcome.PARKED is report.outcome
    assert "could not be opened for what is done while it serves" in report.reason
    assert 1 == report.reason.count("; the shard is still closed: ")
    operator.rollback()
    assert (await fleet.apply()).done
    assert (0, None) == maintenance(psql)


async def test_after_a_kill_a_run_that_cannot_go_on_opens_the_shard_as_it_was(shard: Shard, connect: Connect) -> None:
    psql = await shop(shard, connect)
    killed(shard, "BatchDone")
    assert State.DUAL == state(psql)

    [report] = await fleet_of([shard], SHOP, upper_of("upper(name) || '!'")).apply()

    assert Outcome.PLAN_CHANGED is report.outcome
    assert ((0, None), State.OLD) == (maintenance(psql), state(psql))
