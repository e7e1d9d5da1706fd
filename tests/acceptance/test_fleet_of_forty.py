"""Forty shards, seven of them sick in seven ways: thirty-three are LIVE, seven are named, one more apply heals all."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import SHOP, fleet_of, many, run, upper
from servers import FaultProxy

from shardmig.events import StepStarted
from shardmig.outcomes import Outcome
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.local import Server

UPPER = upper("UPDATE customer SET upper_name = upper(name) WHERE {batch} AND name <> ''")
UNREACHABLE, BLOCKED, WRONG, UNTRUE, CUT, CLOSED, EDITED = 5, 9, 13, 18, 22, 30, 39
SICK = (UNREACHABLE, BLOCKED, WRONG, UNTRUE, CUT, CLOSED, EDITED)


def elsewhere(shard: Shard, url: str) -> Shard:
    """Let a shard's name lead to another address."""
    return type(shard).model_validate({"name": shard.name, "url": url, "wave": shard.wave})


def picture(shard: Shard) -> list[tuple[Any, ...]]:
    """Everything that a second run would change if it did anything."""
    return run(shard, "SELECT s.*, f.*, t.* FROM shardmig.shard s, shardmig.flag f, shardmig.step t ORDER BY f, t")


@pytest.fixture
def forty(servers: list[Server]) -> Iterator[list[Shard]]:
    with many(servers, 40, "forty") as shards:
        yield shards


async def test_a_sick_shard_hides_nobody_and_one_apply_finishes_exactly_what_is_left(
    forty: list[Shard], servers: list[Server]
) -> None:
    assert (await fleet_of(forty, SHOP, rollout={"waves": "all"}).apply()).done
    for shard in forty:
        run(shard, "INSERT INTO customer SELECT n, 'c' || n FROM generate_series(1, 20) AS n")

    with ExitStack() as stack:
        gone = stack.enter_context(FaultProxy(servers[UNREACHABLE % 4]))
        breaking = stack.enter_context(FaultProxy(servers[CUT % 4]))
        reader = stack.enter_context(
            psycopg.connect(forty[BLOCKED].url.get_secret_value(), application_name="nightly_report")
        )
        pid = reader.info.backend_pid

        # Seven causes.
        sick = list(forty)
        sick[UNREACHABLE] = gone.way_to(forty[UNREACHABLE])
        gone.refuse()
        reader.execute("SELECT * FROM customer")
        sick[WRONG] = elsewhere(forty[WRONG], forty[WRONG + 4].url.get_secret_value())
        run(forty[UNTRUE], "INSERT INTO customer VALUES (99, '')")
        sick[CUT] = breaking.way_to(forty[CUT])
        closing = fleet_of([forty[CLOSED]], SHOP)
        closing.reason = "disk is being replaced"
        await closing.maintain("offline")
        run(forty[EDITED], "ALTER TABLE customer ADD COLUMN upper_name varchar(3)")

        def listen(event: Event) -> None:
            if isinstance(event, StepStarted) and event.shard == forty[CUT].name and not breaking.refusing:
                breaking.refuse()  # the connection that is open goes on, until the answer to its COMMIT is lost
                breaking.cut_after()

        patience = {"park_after_s": 0.3}
        fleet = fleet_of(sick, SHOP, UPPER, rollout=patience, session={"lock_wait_s": 0.6})
        fleet.listener = listen
        report = await fleet.apply()

        named = {one.shard: (one.outcome, one.reason) for one in report if one.outcome is not Outcome.DONE}
        expected = {
            UNREACHABLE: (Outcome.UNREACHABLE, r"no connection to 127\.0\.0\.1:\d+/forty005.*nothing was changed"),
            BLOCKED: (Outcome.PARKED, rf"pid {pid}.*nightly_report.*SELECT \* FROM customer.*apply again"),
            WRONG: (Outcome.WRONG_SHARD, r"is shard 'forty017'; correct the url"),
            UNTRUE: (Outcome.FAILED, r"0002_upper step 3.*disagree.*99.*Correct (those rows|what moves them)"),
            CUT: (Outcome.IN_DOUBT, r"broke during COMMIT and did not come back.*apply again"),
            CLOSED: (Outcome.MAINTENANCE, r"disk is being replaced; `shardmig maintenance off --shard forty030`"),
            EDITED: (Outcome.FAILED, r"0002_upper step 1.*\"upper_name\" of relation \"customer\" already exists"),
        }
        assert {forty[number].name for number in SICK} == set(named)
        for number, (outcome, cure) in expected.items():
            found, reason = named[forty[number].name]
            assert outcome is found, reason
            assert re.search(cure, reason, re.DOTALL), reason
        healthy = [shard for number, shard in enumerate(forty) if number not in SICK]
        assert 33 == len(healthy)
        for shard in healthy:
            assert [(State.LIVE,)] == run(shard, "SELECT state FROM shardmig.flag WHERE flag = 'upper'")
        before = {shard.name: picture(shard) for shard in healthy}

        # The causes are removed, and the same command does exactly what is left.
        gone.heal()
        breaking.heal()
        reader.rollback()
        sick[WRONG] = forty[WRONG]
        run(forty[UNTRUE], "UPDATE customer SET name = 'Nobody' WHERE id = 99")
        await closing.maintain("off")
        run(forty[EDITED], "ALTER TABLE customer DROP COLUMN upper_name")
        again = fleet_of(sick, SHOP, UPPER, rollout=patience)
        worked_on: set[str] = set()
        again.listener = lambda event: worked_on.add(event.shard) if isinstance(event, StepStarted) else None

        assert (await again.apply()).done

        # What was in doubt had happened, all of it: one flight holds the whole of a small migration.
        assert worked_on == {forty[number].name for number in SICK if number != CUT}
        assert before == {shard.name: picture(shard) for shard in healthy}
        for shard in forty:
            assert [(State.LIVE, 0)] == run(
                shard,
                "SELECT f.state, (SELECT count(*) FROM customer WHERE upper_name IS DISTINCT FROM upper(name)) "
                "FROM shardmig.flag f WHERE flag = 'upper'",
            )
        assert {Outcome.DONE} == {one.outcome for one in await again.status()}
