"""Shards behind the canary: one flight where nothing stands in the way, and the careful way wherever something does."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING

import psycopg
import pytest
from fleets import COLUMN, SHOP, UPPER, fleet_of, many, plan, run
from servers import proxied

from shardmig.config import Config, Lint, Shard
from shardmig.events import StepDone, StepStarted, Waiting
from shardmig.fleet import Fleet
from shardmig.lint import History
from shardmig.outcomes import Outcome
from shardmig.plan import Plan, Statement, Switch
from shardmig.quiet import QuietTable, proof
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.events import Event
    from shardmig.local import Server

ORDERS = plan(
    "0002_orders",
    Statement(
        sql="CREATE TABLE orders (id bigint PRIMARY KEY, customer_id bigint REFERENCES customer ON DELETE CASCADE)"
    ),
    Statement(sql="ALTER TABLE customer ADD COLUMN email text"),
    Statement(sql="CREATE TABLE invoice (id bigint PRIMARY KEY)"),
    Switch(to=State.LIVE),
    parent="0001_shop",
)
MOOD = plan(
    "0002_mood",
    Statement(sql="ALTER TABLE customer ADD COLUMN mood mood"),
    Switch(to=State.LIVE),
    parent="0001_shop",
)


@pytest.fixture
def two(servers: list[Server]) -> Iterator[list[Shard]]:
    """Return a canary and the shard behind it, both with the table of the shop."""
    with many(servers[:2], 2, "express") as shards:
        asyncio.run(_apply(shards, SHOP))
        yield shards


async def _apply(shards: list[Shard], *plans: Plan) -> None:
    assert (await fleet_of(shards, *plans).apply()).done


def columns(shard: Shard, table: str = "customer") -> set[str]:
    found = run(shard, f"SELECT attname FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0")
    return {name for (name,) in found}


def states(shard: Shard) -> dict[str, State]:
    return {flag: State(state) for flag, state in run(shard, "SELECT flag, state FROM shardmig.flag")}


# --------------------------------------------------------------------------------------------------------------------
# Where nothing stands in the way


async def test_four_transactions_and_their_records_are_one_flight(two: list[Shard], servers: list[Server]) -> None:
    with proxied(servers[1], two[1], delay_s=0.02) as (proxy, far):
        assert (await fleet_of([two[0], far], SHOP, ORDERS).apply()).done

        assert 4 == proxy.round_trips, "startup, self-checks with the ledger, preflight, all the rest"
        begins = [sql for sql in proxy.statements if sql.startswith("BEGIN")]
        assert 4 == len(begins)


INVOICE = plan(
    "0003_invoice",
    Statement(sql="CREATE TABLE invoice (id bigint PRIMARY KEY)"),
    Switch(to=State.LIVE),
    parent="0002_note",
)
PAID = plan(
    "0004_paid",
    Statement(sql="ALTER TABLE invoice ADD COLUMN paid text"),
    Switch(to=State.LIVE),
    parent="0003_invoice",
)


@pytest.mark.parametrize(
    ("begun", "left", "most"),
    [
        ((SHOP,), (COLUMN, INVOICE), 3),
        ((SHOP, COLUMN), (INVOICE,), 3),
        ((SHOP, COLUMN, INVOICE), (PAID,), 4),
    ],
    ids=["the same", "a part", "something else"],
)
async def test_what_one_shard_was_asked_the_next_one_is_asked_while_connecting(
    servers: list[Server], begun: tuple[Plan, ...], left: tuple[Plan, ...], most: int
) -> None:
    """Where something else is left, what was answered is of no use, and the shard is asked anew."""
    with many(servers[:3], 3, "asked") as shards:
        await _apply(shards[:2], SHOP)
        await _apply(shards[2:], *begun)
        with proxied(servers[2], shards[2], delay_s=0.02) as (proxy, far):
            assert (await fleet_of([*shards[:2], far], *dict.fromkeys((SHOP, COLUMN, INVOICE, *left))).apply()).done

            assert most == proxy.round_trips, "startup, everything that is asked, all the rest"
        assert {"id"} == columns(shards[2], "invoice") - {"paid"}


async def test_what_is_recorded_is_what_the_careful_way_records(two: list[Shard]) -> None:
    """The canary went one way, the shard behind it the other; their ledgers say the same."""
    fleet = fleet_of(two, SHOP, ORDERS, UPPER.model_copy(update={"parent": "0002_orders", "revision": "0003_upper"}))
    said: list[Event] = []
    fleet.listener = said.append
    assert (await fleet.apply()).done

    asked = (
        "SELECT revision, number, sha256, status, attempts > 0, num_nulls(started_at, finished_at) FROM shardmig.step",
        "SELECT revision, position, flag, sha256, plan, finished_at IS NULL, finished_by FROM shardmig.migration",
        "SELECT flag, revision, state, has_move, drained, new_valid, old_valid FROM shardmig.flag ORDER BY 1",
        "SELECT action, flag, revision, before, after, reason, os_user FROM shardmig.log WHERE flag <> 'shop'",
        "SELECT holder FROM shardmig.runner",
    )
    ledgers = [[sorted(run(shard, sql)) for sql in asked] for shard in two]
    assert ledgers[0] == ledgers[1]
    told = [[type(e) for e in said if e.shard == shard.name and isinstance(e, StepStarted | StepDone)] for shard in two]
    assert told[0].count(StepDone) <= told[1].count(StepDone), "statements that run together are one step to the canary"


@pytest.mark.parametrize("until", [Until.STRUCTURE, Until.LIVE])
async def test_the_report_has_the_flags_that_the_ledger_has_by_either_way(two: list[Shard], until: Until) -> None:
    fleet = fleet_of(two, SHOP, ORDERS, UPPER.model_copy(update={"parent": "0002_orders", "revision": "0003_upper"}))
    report = await fleet.apply(until=until)

    state = State.OLD if until is Until.STRUCTURE else State.LIVE
    expected = (("shop", "LIVE"), ("orders", state.name), ("upper", state.name))
    assert [expected, expected] == [one.flags for one in report]


async def test_a_shard_alone_is_nobodys_follower(two: list[Shard], servers: list[Server]) -> None:
    """Without a canary nobody has proved the statements in full: each table is, in its own transaction."""
    with proxied(servers[1], two[1]) as (proxy, far):
        assert (await fleet_of([far], SHOP, ORDERS).apply()).done

    assert any("$proof$" in sql for sql in proxy.statements)


# --------------------------------------------------------------------------------------------------------------------
# Where something does


async def test_nobody_queues_behind_an_old_transaction(two: list[Shard], servers: list[Server]) -> None:
    said: list[Event] = []
    with proxied(servers[1], two[1]) as (proxy, far), psycopg.connect(two[1].url.get_secret_value()) as reader:
        fleet = fleet_of([two[0], far], SHOP, COLUMN, rollout={"park_after_s": 30})
        fleet.listener = said.append
        reader.execute("SELECT FROM customer")
        await asyncio.sleep(0.25)
        applying = asyncio.create_task(fleet.apply())
        while not any(isinstance(event, Waiting) for event in said):
            await asyncio.sleep(0.01)
        assert not applying.done()
        tries = [sql for sql in proxy.statements if sql.lstrip().startswith("SELECT 1 / (")]
        reader.rollback()
        assert (await applying).done

    assert [] == tries, "the flight was not even sent"
    assert "note" in columns(two[1])


async def test_a_lock_that_is_not_there_at_once_is_left_to_the_careful_way(two: list[Shard]) -> None:
    """A transaction that is young when it is looked for, and holds the table for longer than a rung."""
    fleet = fleet_of(two, SHOP, ORDERS)
    with psycopg.connect(two[1].url.get_secret_value()) as writer:
        listening = asyncio.Event()

        def hold(event: Event) -> None:
            if isinstance(event, StepStarted) and event.shard == two[1].name and not listening.is_set():
                writer.execute("UPDATE customer SET name = name")  # after the look, before the flight
                listening.set()

        fleet.listener = hold
        applying = asyncio.create_task(fleet.apply())
        await listening.wait()
        await asyncio.sleep(0.4)
        assert not applying.done()
        assert [(0,)] == run(two[1], "SELECT count(*) FROM pg_locks WHERE NOT granted"), "others would wait behind it"
        writer.commit()
        assert (await applying).done

    assert "email" in columns(two[1])
    assert [(1,)] == run(two[1], "SELECT max(attempts) FROM shardmig.step WHERE kind = 'switch'")


async def test_a_column_that_somebody_added_by_hand_fails_its_shard_and_says_so(two: list[Shard]) -> None:
    run(two[1], "ALTER TABLE customer ADD COLUMN email int")

    failed = (await fleet_of(two, SHOP, ORDERS).apply()).shards[1]

    assert Outcome.FAILED is failed.outcome
    assert 'column "email" of relation "customer" already exists; somebody made it on this shard' in failed.reason
    assert "drop it there if nobody uses it, then apply again" in failed.reason.partition("\n")[0]
    assert [(2, "FAILED")] == run(two[1], "SELECT number, status FROM shardmig.step WHERE error IS NOT NULL")
    assert [("DONE",)] == run(two[1], "SELECT status FROM shardmig.step WHERE revision = '0002_orders' AND number = 1")


async def test_a_type_edited_by_hand_that_rewrites_the_table_is_rolled_back(two: list[Shard]) -> None:
    """
    On the canary the column costs nothing; where the domain got a CHECK, adding it writes the whole table anew.

    A sequence is not rolled back: it tells that the express way would not have made anybody wait for that for long.
    """
    for shard in two:
        run(shard, "CREATE DOMAIN mood AS text")
    run(two[1], "CREATE SEQUENCE short")
    run(
        two[1],
        "ALTER DOMAIN mood ADD CHECK (coalesce(VALUE, 'x') <> '' AND current_setting('statement_timeout') <> '1s' "
        "OR nextval('short') > 0)",
    )
    run(two[1], "INSERT INTO customer VALUES (1, 'x')")
    history = History(Lint(known_types=("mood",)))
    accepted = []
    for one in (SHOP, MOOD):
        accepted.append(history.accept(one))
        history.add(one)
    config = Config.model_validate({"shards": {shard.name: shard for shard in two}})

    failed = (await Fleet(config, accepted, two).apply(aware="1")).shards[1]

    assert Outcome.FAILED is failed.outcome
    assert "storage public.customer changed" in failed.reason
    assert "mood" not in columns(two[1])
    assert [(True,)] == run(two[1], "SELECT is_called FROM short")


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ("ALTER TABLE customer ADD COLUMN note text", True),
        ("ALTER TABLE customer ADD COLUMN note text DEFAULT 'x' NOT NULL", True),
        ("COMMENT ON COLUMN customer.name IS 'x'", True),
        ("CREATE TABLE child (id bigint REFERENCES customer)", True),
        ("ALTER TABLE customer ADD COLUMN note timestamptz DEFAULT clock_timestamp()", False),
        ("ALTER TABLE customer DROP COLUMN name", False),
        ("ALTER TABLE customer ALTER COLUMN name SET NOT NULL", False),
        ("ALTER TABLE customer ALTER COLUMN name SET DEFAULT 'x'", False),
        ("ALTER TABLE customer ALTER COLUMN name TYPE varchar(9)", False),
        ("ALTER TABLE customer RENAME COLUMN name TO title", False),
        ("ALTER TABLE customer RENAME TO client", False),
        ("DROP TABLE customer", False),
        ("TRUNCATE customer", False),
    ],
)
def test_what_takes_something_from_a_column_leaves_a_trace(two: list[Shard], change: str, *, passes: bool) -> None:
    with psycopg.connect(two[1].url.get_secret_value()) as connection:
        found = connection.execute(
            "SELECT 'customer', oid, relnatts, relfilenode FROM pg_class WHERE oid = 'customer'::regclass"
        ).fetchone()
        assert found is not None
        query = proof(QuietTable(*found))
        connection.execute(change.encode())
        with nullcontext() if passes else pytest.raises(psycopg.errors.DivisionByZero):
            psycopg.RawCursor(connection).execute(query.sql.encode(), query.params)


async def test_an_event_trigger_calls_for_the_full_proof(two: list[Shard], servers: list[Server]) -> None:
    """It may do anything to the table, and here it does: what the plan does not say is rolled back."""
    run(two[1], "CREATE INDEX by_name ON customer (name)")
    run(
        two[1],
        "CREATE FUNCTION meddle() RETURNS event_trigger LANGUAGE plpgsql AS "
        "$$BEGIN EXECUTE 'DROP INDEX IF EXISTS by_name'; END$$",
    )
    run(two[1], "CREATE EVENT TRIGGER meddle ON ddl_command_end WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION meddle()")

    failed = (await fleet_of(two, SHOP, COLUMN).apply()).shards[1]

    assert Outcome.FAILED is failed.outcome
    assert "index public.by_name is gone" in failed.reason
    assert "note" not in columns(two[1])


async def test_a_table_with_children_calls_for_the_full_proof(two: list[Shard], servers: list[Server]) -> None:
    """They are changed with it, and have files and columns of their own."""
    run(two[1], "CREATE TABLE regular () INHERITS (customer)")
    with proxied(servers[1], two[1]) as (proxy, far):
        assert (await fleet_of([two[0], far], SHOP, COLUMN).apply()).done

    assert any("$proof$" in sql for sql in proxy.statements)


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
async def test_a_connection_that_breaks_at_a_commit_repeats_nothing(
    two: list[Shard], servers: list[Server], skip: int, *, before: bool
) -> None:
    with proxied(servers[1], two[1]) as (proxy, far):
        cut = proxy.cut_before(skip=skip) if before else proxy.cut_after(skip=skip)
        report = await fleet_of([two[0], far], SHOP, ORDERS).apply()

        assert cut.struck.is_set()
    assert report.done
    assert {"id", "name", "email"} == columns(two[1])
    assert [("DONE",)] == run(two[1], "SELECT DISTINCT status FROM shardmig.step")
    assert [(1,)] == run(two[1], "SELECT count(*) FROM shardmig.log WHERE flag = 'orders'")


async def test_what_people_switched_back_while_the_connection_was_lost_stays_back(
    two: list[Shard], servers: list[Server]
) -> None:
    """All of the flight was committed, and only its answer is lost: no runner was there since, and no other term."""
    with proxied(servers[1], two[1]) as (proxy, far):
        cut = proxy.cut_after(skip=2)

        def switch_back(event: Event) -> None:
            if isinstance(event, Waiting) and event.shard == far.name:
                run(two[1], "SELECT shardmig.switch('orders', 'OLD', 'something looks wrong')")

        fleet = fleet_of([two[0], far], SHOP, ORDERS)
        fleet.listener = switch_back
        report = (await fleet.apply()).shards[1]

        assert cut.struck.is_set()
    assert Outcome.PENDING is report.outcome
    assert "orders is OLD: somebody switched it back" in report.reason
    assert {"shop": State.LIVE, "orders": State.OLD} == states(two[1])


@pytest.mark.parametrize("hurried", [True, False])
async def test_whoever_lost_the_connection_overrules_neither_another_runner_nor_people(
    two: list[Shard],
    servers: list[Server],
    hurried: bool,  # noqa: FBT001
) -> None:
    with proxied(servers[1], two[1]) as (proxy, far):
        fleet = fleet_of([two[0], far] if hurried else [far], SHOP, UPPER)
        if not hurried:
            assert (await fleet.apply(until=Until.STRUCTURE)).done
        cut = proxy.cut_before("UPDATE shardmig.runner")

        async def work() -> None:
            assert (await fleet_of(two[1:], SHOP, UPPER).apply()).done
            assert (await fleet_of(two[1:], SHOP, UPPER).switch("upper", State.DUAL)).done

        def meanwhile(event: Event) -> None:
            if isinstance(event, Waiting) and event.shard == far.name:
                assert cut.struck.is_set()
                with ThreadPoolExecutor() as pool:
                    pool.submit(asyncio.run, work()).result()

        fleet.listener = meanwhile
        report = (await fleet.apply()).shards[-1]

    assert (Outcome.PENDING if hurried else Outcome.PARKED) is report.outcome, "a shard alone is not tried again"
    assert {"shop": State.LIVE, "upper": State.DUAL} == states(two[1])


async def test_whoever_lost_the_connection_before_a_switch_leaves_the_shard_to_who_switched_since(
    two: list[Shard], servers: list[Server]
) -> None:
    await _apply(two[1:], SHOP, UPPER)
    with proxied(servers[1], two[1]) as (proxy, far):
        proxy.cut_before("UPDATE shardmig.runner")

        def meanwhile(event: Event) -> None:
            if isinstance(event, Waiting):
                with ThreadPoolExecutor() as pool:
                    other = fleet_of(two[1:], SHOP, UPPER).switch("upper", State.OLD)
                    assert pool.submit(asyncio.run, other).result().done

        fleet = fleet_of([far], SHOP, UPPER)
        fleet.listener = meanwhile
        [report] = await fleet.switch("upper", State.DUAL)

    assert Outcome.PARKED is report.outcome
    assert State.OLD is states(two[1])["upper"]


async def test_a_server_that_does_not_come_back_leaves_the_shard_in_doubt(
    two: list[Shard], servers: list[Server]
) -> None:
    with proxied(servers[1], two[1]) as (proxy, far):

        def refuse(event: Event) -> None:
            if isinstance(event, StepStarted) and event.shard == far.name:
                proxy.refuse()
                proxy.cut_after()

        fleet = fleet_of([two[0], far], SHOP, ORDERS)
        fleet.listener = refuse
        assert Outcome.IN_DOUBT is (await fleet.apply()).shards[1].outcome
        proxy.heal()
        assert (await fleet_of([two[0], far], SHOP, ORDERS).apply()).done

    assert [(1,)] == run(two[1], "SELECT count(*) FROM shardmig.log WHERE flag = 'orders'")


async def test_whoever_lost_the_turn_writes_nothing(two: list[Shard]) -> None:
    """The term that the flight counts on is not the last one any more: not even its free statements are kept."""
    fleet = fleet_of(two, SHOP, ORDERS)

    def take(event: Event) -> None:
        if isinstance(event, StepStarted) and event.shard == two[1].name and not taken:
            taken.append(run(two[1], "UPDATE shardmig.runner SET term = term + 5 RETURNING term")[0][0])

    taken: list[int] = []
    fleet.listener = take
    assert (await fleet.apply()).done

    assert [(1,)] == run(two[1], "SELECT max(attempts) FROM shardmig.step"), "no step was there before the next turn"
    assert [(taken[0] + 1,)] == run(two[1], "SELECT term FROM shardmig.runner"), "the careful way took the next turn"
