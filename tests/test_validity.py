"""A flag goes LIVE with all of its rows or not at all, whatever is lost or switched while they move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fleets import fleet_of, plan
from psycopg import errors as pg
from servers import await_caught_up, standby_of

from shardmig import local
from shardmig.config import Shard
from shardmig.events import StepDone, StepStarted
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Statement, Switch
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from conftest import Connect

    from shardmig.events import Event

CUSTOMERS = """
CREATE TABLE customer (id bigint PRIMARY KEY, name text);
INSERT INTO customer SELECT g, 'x' || g FROM generate_series(1, 300) g
"""
FILLED = "SELECT count(*), count(a), count(b) FROM customer"
FLAG = "SELECT state, new_valid FROM shardmig.flag"


def upper(column: str) -> Move:
    return Move(
        table="customer",
        key=("id",),
        writes=(column,),
        forward=f"UPDATE customer SET {column} = upper(name) WHERE {{batch}}",
        check=f"SELECT id FROM customer WHERE {{batch}} AND {column} IS DISTINCT FROM upper(name)",
    )


TWO_MOVES = plan(
    "0001_up",
    Statement(sql="ALTER TABLE customer ADD COLUMN a text, ADD COLUMN b text"),
    Switch(to=State.DUAL),
    upper("a"),
    upper("b"),
    Switch(to=State.LIVE),
)


def once(kind: type[StepStarted | StepDone], number: int, act: Callable[[], object]) -> Callable[[Event], None]:
    """Do something when a step begins or ends for the first time."""
    left = [act]

    def listen(event: Event) -> None:
        if left and isinstance(event, kind) and event.step == number:
            left.pop()()

    return listen


async def test_a_move_whose_end_was_lost_before_the_next_one_began_is_done_again(
    shard: Shard, connect: Connect
) -> None:
    """As on a standby that lacks all of the first move: its rows, its progress, its end."""
    psql = connect(shard)
    psql.execute(CUSTOMERS)

    def fail_over() -> None:
        with psql.transaction():
            psql.execute("UPDATE customer SET a = NULL")
            psql.execute(
                "UPDATE shardmig.step SET status = 'PENDING', direction = NULL, bounded_at = NULL, upto = NULL, "
                "cursor = NULL, checked_at = NULL WHERE number = 3"
            )
        psql.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE application_name LIKE 'shardmig%' AND datname = current_database()"
        )

    fleet = fleet_of([shard], TWO_MOVES)
    fleet.listener = once(StepStarted, 4, fail_over)
    (await fleet.apply(aware="1")).raise_for_failures()

    assert [(300, 300, 300)] == psql.execute(FILLED).fetchall()
    assert [(2, True)] == psql.execute(FLAG).fetchall()


@pytest.mark.long
async def test_a_failover_between_two_moves_leaves_no_row_behind(connect: Connect) -> None:
    with local.Server.start("primary") as primary, standby_of(primary) as standby:
        connect(primary.create_database("shop")).execute(CUSTOMERS)
        await_caught_up(primary, standby)
        hosts, ports = f"{primary.socket_dir},{standby.socket_dir}", f"{primary.port},{standby.port}"
        url = f"postgresql://postgres@/shop?host={hosts}&port={ports}&target_session_attrs=read-write"
        shard, spare = Shard.model_validate({"name": "eu1", "url": url}), connect(standby)
        fleet = fleet_of([shard], TWO_MOVES, pace={"max_replica_lag_s": None})
        (await fleet.apply(until=Until.DUAL, aware="1")).raise_for_failures()

        def cut() -> None:
            await_caught_up(primary, standby)
            spare.execute("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
            spare.execute("SELECT pg_reload_conf()")
            while spare.execute("SELECT FROM pg_stat_wal_receiver").fetchall():
                spare.execute("SELECT pg_sleep(0.01)")

        def fail_over() -> None:
            primary.kill()
            spare.execute("SELECT pg_promote()")
            assert [(300, 0, 0)] == connect(standby.url("shop")).execute(FILLED).fetchall()

        cuts, fails_over = once(StepStarted, 3, cut), once(StepStarted, 4, fail_over)
        fleet.listener = lambda event: (cuts(event), fails_over(event))[0]
        (await fleet.apply(aware="1")).raise_for_failures()

        assert [(300, 300, 300)] == connect(standby.url("shop")).execute(FILLED).fetchall()


async def test_a_flag_that_people_switched_after_the_last_row_was_compared_keeps_its_moves_undone(
    shard: Shard, connect: Connect
) -> None:
    """Moves recorded as done for a flag that is not valid would be refused by every later apply."""
    psql = connect(shard)
    psql.execute(CUSTOMERS)

    def switch() -> None:
        psql.execute("SELECT shardmig.switch('up', 'OLD', 'wait')")
        psql.execute("SELECT shardmig.switch('up', 'DUAL', 'go on')")

    fleet = fleet_of([shard], TWO_MOVES)
    fleet.listener = once(StepDone, 4, switch)
    [first] = await fleet.apply(aware="1")

    assert Outcome.PARKED is first.outcome
    assert "flag up of shard eu1 was switched while rows moved; nothing was recorded" in first.reason
    assert {"PENDING"} == statuses(psql)
    (await fleet.apply(aware="1")).raise_for_failures()
    assert [(2, True)] == psql.execute(FLAG).fetchall()
    assert {"DONE"} == statuses(psql)


CHECKED = "UPDATE shardmig.step SET direction = 'forward', checked_at = now() WHERE kind = 'move'"


@pytest.mark.parametrize(
    ("before", "earned", "refusal"),
    [
        ("SELECT", "drained = true, new_valid = true", "not all rows of 0001_up were moved and compared"),
        (CHECKED.replace("forward", "back"), "drained = true, new_valid = true", "not all rows of 0001_up were moved"),
        (CHECKED, "new_valid = true", "new becomes valid only in DUAL, after the drain"),
        (CHECKED, "new_valid = true, drained = NULL", "new becomes valid only in DUAL, after the drain"),
        (CHECKED, "old_valid = true, drained = true", "cannot go from DUAL to LIVE yet: new was not moved and checked"),
        (CHECKED, "new_valid = NULL, drained = true", "cannot go from DUAL to LIVE"),
        (CHECKED, "drained = true, new_valid = true", None),
    ],
)
async def test_what_a_flip_earns_on_its_way_is_judged_as_if_it_came_before(
    shard: Shard, connect: Connect, before: str, earned: str, refusal: str | None
) -> None:
    psql = connect(shard)
    psql.execute(CUSTOMERS)
    (await fleet_of([shard], TWO_MOVES).apply(until=Until.DUAL, aware="1")).raise_for_failures()
    psql.execute("UPDATE shardmig.flag SET drained = false")
    psql.execute(before)
    live = f"UPDATE shardmig.flag SET state = 2, {earned}"

    if refusal is None:
        psql.execute(live)
    else:
        with pytest.raises(pg.Error, match=refusal):
            psql.execute(live)

    assert [(1, False) if refusal else (2, True)] == psql.execute(FLAG).fetchall()


def statuses(psql: psycopg.Connection[Any]) -> set[str]:
    return {row[0] for row in psql.execute("SELECT status FROM shardmig.step WHERE kind = 'move'").fetchall()}
