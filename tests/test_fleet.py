"""A fleet on real servers: the canary and its trial, waves, halting, parking, and going on after each."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from fleets import COLUMN, NOTE, SHOP, UPPER, fleet_of, many, plan, run
from servers import FaultProxy, proxied

from shardmig.cli.results import _log_body, _status_body
from shardmig.events import BatchDone, FlagSwitched, OutcomeReached, Parked, StepStarted, Waiting, Warned
from shardmig.fleet import Fleet
from shardmig.outcomes import Outcome, ShardReport
from shardmig.plan import Move, Statement, Switch
from shardmig.session import open_session
from shardmig.states import State
from shardmig.todo import Until
from shardmig.turn import Turn, holder_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.local import Server

DONE, PENDING, FAILED, PARKED = Outcome.DONE, Outcome.PENDING, Outcome.FAILED, Outcome.PARKED


@pytest.fixture
def six(servers: list[Server]) -> Iterator[list[Shard]]:
    """Return six empty shards on four servers; the first one is the canary of every walk."""
    with many(servers, 6, "fleet") as shards:
        yield shards


def flags(shard: Shard) -> dict[str, int]:
    return dict(run(shard, "SELECT flag, state FROM shardmig.flag"))


def has_ledger(shard: Shard) -> bool:
    return run(shard, "SELECT to_regnamespace('shardmig') IS NOT NULL") == [(True,)]


async def outcomes(fleet: Fleet, **options: Any) -> dict[str, Outcome]:
    return {one.shard: one.outcome for one in await fleet.apply(**options)}


def heard(fleet: Fleet) -> list[Event]:
    events: list[Event] = []
    fleet.listener = events.append
    return events


# --------------------------------------------------------------------------------------------------------------------
# Waves


async def test_no_wave_begins_before_the_one_before_it_has_ended(six: list[Shard]) -> None:
    fleet = fleet_of(six, SHOP)
    events = heard(fleet)

    assert {DONE} == set((await outcomes(fleet)).values())

    for before, after in pairwise(fleet.waves()):
        ends = [n for n, e in enumerate(events) if isinstance(e, OutcomeReached) and e.shard in _names(before.shards)]
        begins = [n for n, e in enumerate(events) if isinstance(e, StepStarted) and e.shard in _names(after.shards)]
        assert max(ends) < min(begins)


def _names(shards: tuple[Shard, ...]) -> set[str]:
    return {shard.name for shard in shards}


@pytest.mark.parametrize(("per_host", "at_once"), [(1, 1), (2, 2), (None, 4)])
async def test_no_more_shards_than_allowed_are_worked_on_at_once_on_one_server(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, per_host: int | None, at_once: int
) -> None:
    working, seen, work_on = 0, [], Fleet.work_on

    async def counted(self: Fleet, *which: Any, **how: Any) -> ShardReport:
        nonlocal working
        working += 1
        seen.append(working)
        await asyncio.sleep(0.1)  # whoever may begin beside it has begun then
        try:
            return await work_on(self, *which, **how)
        finally:
            working -= 1

    monkeypatch.setattr(Fleet, "work_on", counted)
    with many(servers[:1], 5, f"host{per_host}_") as shards:
        await outcomes(fleet_of(shards, SHOP, rollout={"per_host": per_host, "waves": "all"}), until=Until.STRUCTURE)

    assert (5, at_once) == (len(seen), max(seen)), "the canary is alone in any case"


async def test_one_failed_shard_neither_stops_nor_hides_the_others(six: list[Shard]) -> None:
    run(six[2], "CREATE TABLE customer (id int)")

    found = await outcomes(fleet_of(six, SHOP))

    assert [DONE, DONE, FAILED, DONE, DONE, DONE] == list(found.values())


async def test_a_halt_leaves_what_was_not_begun_as_pending_with_the_reason(six: list[Shard]) -> None:
    run(six[1], "CREATE TABLE customer (id int)")
    fleet = fleet_of(six, SHOP, rollout={"on_failure": "halt"})

    report = await fleet.apply()

    assert [DONE, FAILED, PENDING, PENDING, PENDING, PENDING] == [one.outcome for one in report]
    assert f"not begun: {six[1].name} failed" in report.shards[2].reason
    assert not any(has_ledger(shard) for shard in six[2:])
    with pytest.raises(ExceptionGroup, match="5 of 6 shards are not done"):
        report.raise_for_failures()


async def test_the_failure_budget_halts_a_fleet_that_goes_on_otherwise(six: list[Shard]) -> None:
    for shard in six[1:3]:
        run(shard, "CREATE TABLE customer (id int)")
    fleet = fleet_of(six, SHOP, rollout={"failures_max": 1, "jobs": 1})

    assert [DONE, FAILED, FAILED, PENDING, PENDING, PENDING] == list((await outcomes(fleet)).values())


# --------------------------------------------------------------------------------------------------------------------
# The canary


async def test_a_canary_that_fails_its_gate_goes_back_and_no_other_shard_is_touched(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    for shard in six:
        run(shard, "INSERT INTO customer VALUES (1, 'ada')")
    rollout = {"assertions": ["SELECT count(*) = 0 FROM customer WHERE upper_name = 'ADA'"]}
    fleet = fleet_of(six, SHOP, UPPER, rollout=rollout)

    report = await fleet.apply()

    assert [FAILED, *[PENDING] * 5] == [one.outcome for one in report]
    assert "returned False, not true; upper is DUAL again" in report.shards[0].reason
    assert State.DUAL == flags(six[0])["upper"]
    assert all("upper" not in flags(shard) for shard in six[1:])
    assert [("LIVE", "DUAL")] == run(
        six[0], "SELECT before, after FROM shardmig.log WHERE flag = 'upper' AND reason LIKE 'the canary failed%'"
    )
    assert [(1, 1)] == run(six[0], "SELECT count(finished_at), count(finished_by) FROM shardmig.migration")

    # The cause removed, apply goes forward again by itself: nobody's decision is overruled.
    assert {DONE} == set((await outcomes(fleet_of(six, SHOP, UPPER))).values())
    assert {State.LIVE} == {State(flags(shard)["upper"]) for shard in six}


async def test_a_flag_that_went_live_before_the_trial_stays_live_when_the_canary_fails(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))

    [failed, *_] = await fleet_of(six, SHOP, NOTE, rollout={"assertions": ["SELECT false"]}).apply()

    assert FAILED is failed.outcome
    assert {"shop": State.LIVE, "note": State.OLD} == flags(six[0])


async def test_flags_go_back_when_a_later_step_of_the_canary_fails(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    broken = plan(
        "0003_broken",
        Statement(sql="ALTER TABLE customer ADD COLUMN ratio text"),
        Switch(to=State.DUAL),
        Move(
            table="customer",
            key=("id",),
            writes=("ratio",),
            forward="UPDATE customer SET ratio = (1 / (id - 1))::text WHERE {batch}",
            check="SELECT id FROM customer WHERE {batch} AND ratio IS NULL",
        ),
        Switch(to=State.LIVE),
        parent="0002_upper",
    )
    run(six[0], "INSERT INTO customer VALUES (1, 'ada')")

    [failed, *others] = await fleet_of(six, SHOP, UPPER, broken).apply()

    assert (FAILED, {PENDING}) == (failed.outcome, {one.outcome for one in others})
    assert {"shop": State.LIVE, "upper": State.DUAL, "broken": State.DUAL} == flags(six[0])


async def test_a_run_killed_while_the_canary_bakes_leaves_it_on_trial(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    killed = fleet_of(six, SHOP, UPPER, rollout={"bake_s": 600})
    baking = asyncio.Event()
    killed.listener = lambda event: baking.set() if isinstance(event, Waiting) and "bakes" in event.reason else None
    walking = asyncio.create_task(killed.apply())
    await asyncio.wait_for(baking.wait(), 30)
    walking.cancel()
    await asyncio.wait([walking])
    assert State.LIVE == flags(six[0])["upper"]

    [failed, *_] = await fleet_of(six, SHOP, UPPER, rollout={"assertions": ["SELECT false"]}).apply()

    assert FAILED is failed.outcome
    assert State.DUAL == flags(six[0])["upper"]


async def test_what_went_live_before_a_trial_was_interrupted_is_on_trial_too(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    stopped = fleet_of(six, SHOP, UPPER, NOTE)
    stopped.listener = lambda event: (
        stopped.stop.set() if isinstance(event, FlagSwitched) and event.after is State.LIVE else None
    )
    await stopped.apply()
    assert {"shop": State.LIVE, "upper": State.LIVE, "note": State.OLD} == flags(six[0])

    [failed, *_] = await fleet_of(six, SHOP, UPPER, NOTE, rollout={"assertions": ["SELECT false"]}).apply()

    assert FAILED is failed.outcome
    assert {"shop": State.LIVE, "upper": State.DUAL, "note": State.OLD} == flags(six[0])


async def test_whoever_lost_the_canary_to_another_runner_does_not_take_it_back(six: list[Shard]) -> None:
    """Nothing is wrong there: the other one has brought it LIVE, and lets it bake."""
    await outcomes(fleet_of(six, SHOP))
    run(six[0], "INSERT INTO customer SELECT g, 'ada' FROM generate_series(1, 100) g")
    slow = {"batch_rows": 5, "batch_rows_min": 5, "batch_rows_max": 5, "max_rows_per_s": 50}
    first, second = fleet_of(six, SHOP, UPPER, pace=slow), fleet_of(six, SHOP, UPPER, rollout={"bake_s": 600})
    moves, bakes, second.take_over = asyncio.Event(), asyncio.Event(), True
    first.listener = lambda event: moves.set() if isinstance(event, BatchDone) else None
    second.listener = lambda event: bakes.set() if isinstance(event, Waiting) and "bakes" in event.reason else None
    async with asyncio.timeout(30):
        losing = asyncio.create_task(first.apply())
        await moves.wait()
        winning = asyncio.create_task(second.apply())
        await bakes.wait()
        lost, *others = await losing
        second.stop.set()
        await winning

    assert (PARKED, {PENDING}) == (lost.outcome, {one.outcome for one in others})
    assert "Another runner took this shard over" in lost.reason
    assert State.LIVE == flags(six[0])["upper"]


async def test_a_stop_ends_the_bake_time_and_begins_nothing(six: list[Shard]) -> None:
    fleet = fleet_of(six, SHOP, rollout={"bake_s": 600})
    fleet.listener = lambda event: fleet.stop.set() if isinstance(event, Waiting) else None

    report = await asyncio.wait_for(fleet.apply(), 30)

    assert {Outcome.INTERRUPTED} == {one.outcome for one in report}
    assert not any(has_ledger(shard) for shard in six[1:])


async def test_baking_counts_from_the_last_switch_and_not_from_the_run(six: list[Shard]) -> None:
    first = fleet_of(six, SHOP, rollout={"bake_s": 600})
    first.listener = lambda event: first.stop.set() if isinstance(event, Waiting) else None
    await first.apply()
    # The clock is the flag's own: ten minutes later nothing is left of the bake time.
    run(six[0], "UPDATE shardmig.flag SET changed_at = changed_at - interval '10 min'")

    second = fleet_of(six, SHOP, rollout={"bake_s": 600})
    events = heard(second)

    assert {DONE} == set((await outcomes(second)).values())
    assert not [e for e in events if isinstance(e, Waiting)]


async def test_a_proven_canary_is_neither_baked_nor_asked_again(six: list[Shard], tmp_path: Path) -> None:
    gate = f"sh -c 'echo {{shard}} >> {tmp_path}/asked'"
    for _ in range(2):
        assert {DONE} == set((await outcomes(fleet_of(six, SHOP, rollout={"gate": gate}))).values())

    assert [six[0].name] == (tmp_path / "asked").read_text().split()


async def test_a_canary_that_was_applied_alone_is_asked_before_others_follow(six: list[Shard]) -> None:
    await outcomes(fleet_of(six[:1], SHOP))

    report = await fleet_of(six, SHOP, rollout={"assertions": ["SELECT false"]}).apply()
    again = await fleet_of(six, SHOP, rollout={"assertions": ["SELECT false"]}).apply()

    assert [FAILED, *[PENDING] * 5] == [one.outcome for one in report] == [one.outcome for one in again]
    assert {"shop": State.LIVE} == flags(six[0]), "whoever switched it alone takes it back himself"


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("sh -c 'echo no customers; exit 3'", "exited 3: no customers"),
        ("./nowhere {shard}", "cannot be started: No such file"),
        ("sleep 100", "took longer than 0.3 s"),
    ],
)
async def test_a_command_that_does_not_exit_zero_fails_the_canary(six: list[Shard], gate: str, says: str) -> None:
    rollout = {"gate": gate, "gate_timeout_s": 0.3 if "sleep" in gate else 30}

    report = await fleet_of(six, SHOP, rollout=rollout).apply()

    assert [FAILED, *[PENDING] * 5] == [one.outcome for one in report]
    assert says in report.shards[0].reason
    assert State.OLD == flags(six[0])["shop"]


async def test_a_command_is_over_when_it_exits_whatever_it_leaves_behind(six: list[Shard], tmp_path: Path) -> None:
    script = tmp_path / "smoke.sh"
    script.write_text(f"sleep 100 & echo $! > {tmp_path}/left\n")
    try:
        report = await fleet_of(six, SHOP, rollout={"gate": f"sh {script}", "gate_timeout_s": 5}).apply()
    finally:
        os.kill(int((tmp_path / "left").read_text()), signal.SIGKILL)

    assert report.done, report.shards[0].reason


async def test_no_session_waits_for_the_gate_so_none_can_be_cut_meanwhile(six: list[Shard], tmp_path: Path) -> None:
    script = tmp_path / "smoke.py"
    script.write_text(
        "import psycopg, sys\n"
        "with psycopg.connect(sys.argv[1]) as connection:\n"
        '    others = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND"\n'
        "        \" pid <> pg_backend_pid() AND backend_type = 'client backend'\").fetchall()\n"
        "sys.exit(len(others))\n"
    )
    rollout = {"gate": shlex.join([sys.executable, str(script), six[0].url.get_secret_value()])}

    assert {DONE} == set((await outcomes(fleet_of(six, SHOP, rollout=rollout))).values())


async def test_a_canary_that_was_switched_back_while_its_gate_ran_has_not_passed(
    six: list[Shard], tmp_path: Path
) -> None:
    script = tmp_path / "smoke.py"
    script.write_text(
        "import psycopg, sys\n"
        "with psycopg.connect(sys.argv[1]) as connection:\n"
        "    connection.execute(\"SELECT shardmig.switch('shop', 'OLD', 'smoke')\")\n"
    )
    rollout = {"gate": shlex.join([sys.executable, str(script), six[0].url.get_secret_value()])}

    report = await fleet_of(six, SHOP, rollout=rollout).apply()

    assert [PENDING] * 6 == [one.outcome for one in report], report.shards[0].reason
    assert "somebody switched it back" in report.shards[0].reason
    assert [] == run(six[0], "SELECT FROM shardmig.log WHERE action = 'canary' AND after = 'passed'")


@pytest.mark.parametrize("sql", ["SELECT 1", "SELECT NULL::boolean", "SELECT true WHERE false", "SELECT nonsense"])
async def test_an_assertion_must_return_exactly_true(six: list[Shard], sql: str) -> None:
    [failed, *_] = await fleet_of(six, SHOP, rollout={"assertions": [sql]}).apply()

    assert FAILED is failed.outcome
    assert sql in failed.reason


async def test_an_assertion_cannot_write(six: list[Shard]) -> None:
    sql = "INSERT INTO customer VALUES (1, 'x') RETURNING true"

    [failed, *_] = await fleet_of(six, SHOP, rollout={"assertions": [sql]}).apply()

    assert "read-only" in failed.reason
    assert [] == run(six[0], "SELECT * FROM customer")


async def test_structure_ahead_of_the_switch_asks_no_gate(six: list[Shard]) -> None:
    fleet = fleet_of(six, SHOP, rollout={"assertions": ["SELECT false"]})

    assert {DONE} == set((await outcomes(fleet, until=Until.STRUCTURE)).values())


# --------------------------------------------------------------------------------------------------------------------
# Parking


async def test_a_blocked_shard_gives_its_place_away_and_is_done_at_the_end(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    fleet = fleet_of(six, SHOP, NOTE, rollout={"jobs": 1, "park_after_s": 0.2})
    with psycopg.connect(six[1].url.get_secret_value()) as reader:
        reader.execute("SELECT * FROM customer")
        pid = reader.info.backend_pid
        others = {shard.name for shard in six} - {six[1].name}
        events: list[Event] = []

        def listen(event: Event) -> None:
            events.append(event)
            if isinstance(event, OutcomeReached):
                others.discard(event.shard)
            if not others:
                reader.rollback()

        fleet.listener = listen
        assert {DONE} == set((await outcomes(fleet)).values())

    [parked] = [event for event in events if isinstance(event, Parked)]
    assert six[1].name == parked.shard
    assert str(pid) in parked.reason
    assert six[1].name == [e.shard for e in events if isinstance(e, OutcomeReached)][-1]


async def test_a_shard_that_stays_blocked_ends_parked_and_the_blocker_is_named(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    fleet = fleet_of(six, SHOP, NOTE, rollout={"park_after_s": 0.1}, session={"lock_wait_s": 0.3})
    with psycopg.connect(six[3].url.get_secret_value(), application_name="nightly") as reader:
        reader.execute("SELECT * FROM customer")

        report = await fleet.apply()

    assert [DONE, DONE, DONE, PARKED, DONE, DONE] == [one.outcome for one in report]
    assert "nightly" in report.shards[3].reason
    assert {DONE} == set((await outcomes(fleet)).values())


async def test_a_shard_in_maintenance_is_tried_again_at_the_end(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    await fleet_of(six[2:3], SHOP).maintain("offline")
    fleet = fleet_of(six, SHOP, NOTE)
    lifted = asyncio.Event()

    def lift(event: Event) -> None:
        if isinstance(event, Parked):
            run(six[2], "SELECT shardmig.maintenance('off', 'done')")
            lifted.set()

    fleet.listener = lift

    assert {DONE} == set((await outcomes(fleet)).values())
    assert lifted.is_set()


async def test_a_shard_in_maintenance_whose_flag_is_held_is_pending_and_says_why(six: list[Shard]) -> None:
    await outcomes(fleet_of(six[:1], SHOP, UPPER))
    await fleet_of(six[:1], SHOP, UPPER).switch("upper", State.DUAL)
    await fleet_of(six[:1], SHOP, UPPER).maintain("offline")

    (found,) = await fleet_of(six[:1], SHOP, UPPER).apply()

    assert PENDING == found.outcome
    assert "upper is DUAL: somebody switched it back" in found.reason


async def test_a_move_that_rests_for_too_long_parks_the_shard(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP))
    run(six[4], "INSERT INTO customer SELECT n, 'a' FROM generate_series(1, 10) n")
    await outcomes(fleet_of(six, SHOP, UPPER), until=Until.DUAL)
    run(six[4], "SELECT shardmig.pause('upper', 'month end')")

    report = await fleet_of(six, SHOP, UPPER, rollout={"park_after_s": 0.2}, pace={"max_rest_s": 0.3}).apply()

    assert [DONE, DONE, DONE, DONE, PARKED, DONE] == [one.outcome for one in report]
    assert "month end" in report.shards[4].reason


# --------------------------------------------------------------------------------------------------------------------
# Switching


async def test_switching_needs_no_canary_and_moves_every_flag(six: list[Shard]) -> None:
    await outcomes(fleet_of(six, SHOP, UPPER))
    fleet = fleet_of(six, SHOP, UPPER, rollout={"assertions": ["SELECT false"]})
    events = heard(fleet)

    assert (await fleet.switch("upper", State.DUAL)).done

    assert 6 == len([event for event in events if isinstance(event, FlagSwitched)])
    held = await fleet_of(six, SHOP, UPPER).apply()
    assert {PENDING} == {one.outcome for one in held}, "what people switched back is theirs"


async def test_where_somebody_must_vouch_no_flag_leaves_old_without(six: list[Shard]) -> None:
    fleet = fleet_of(six, SHOP, UPPER, rollout={"require_aware": True})

    canary, *others = await fleet.apply()
    assert PENDING == canary.outcome
    assert "--aware RELEASE" in canary.reason
    assert {"upper": "OLD"} == {name: state for name, state in canary.flags if name == "upper"}
    assert [(0,)] == run(six[0], "SELECT count(upper_name) FROM customer"), "structure goes on"
    assert {PENDING} == {one.outcome for one in others}
    for target in (State.DUAL, State.LIVE):
        switched = (await fleet.switch("upper", target)).shards[0]
        assert (canary.outcome, canary.reason) == (switched.outcome, switched.reason), "the same wait, the same words"

    assert (await fleet.apply(aware="2026-11")).done
    assert (await fleet.apply()).done, "nothing leaves OLD any more"
    for target in (State.DUAL, State.LIVE, State.DUAL, State.OLD):
        assert (await fleet.switch("upper", target)).done, "nobody who knows the flag has gone"
    assert not (await fleet.switch("upper", State.LIVE)).done, "that may be long ago: who runs now?"
    assert (await fleet.switch("upper", State.LIVE, aware="2026-12")).done


async def test_what_needs_a_flag_that_waits_for_people_waits_with_it(six: list[Shard]) -> None:
    note = NOTE.model_copy(update={"needs": ("upper",)})
    fleet = fleet_of(six, SHOP, UPPER, note, rollout={"require_aware": True})

    canary, *_ = await fleet.apply()
    assert (PENDING, "note stays OLD until upper is LIVE") == (canary.outcome, canary.reason.split("; ")[-1])
    assert {"shop": State.LIVE, "upper": State.OLD, "note": State.OLD} == flags(six[0])
    switched = (await fleet.switch("note", State.LIVE)).shards[0]
    assert (PENDING, "note stays OLD until upper is LIVE") == (switched.outcome, switched.reason)
    [status, *_] = await fleet.status()
    assert status.held == ("upper waits for somebody who vouches (--aware RELEASE)", "note waits for upper")
    assert (await fleet.apply(aware="2026-11")).done

    assert not (await fleet.switch("nope", State.LIVE, aware="2026-12")).done
    assert [("2026-11",)] == run(six[0], "SELECT DISTINCT after FROM shardmig.log WHERE action = 'aware'")


async def test_a_dry_run_says_what_waits_for_people(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, UPPER, rollout={"require_aware": True})

    [without], [vouched] = await fleet.status(forecast=True), await fleet.status(forecast=True, aware="2026-11")

    assert [(State.LIVE, None), (State.LIVE, State.LIVE)] == [
        tuple(item.target for item in found.left) for found in (without, vouched)
    ]
    assert (1, 0) == (len(without.held), len(vouched.held))


@pytest.mark.parametrize("aware", ["2026-11", None])
async def test_whoever_switches_may_vouch_for_the_release_too(six: list[Shard], aware: str | None) -> None:
    fleet = fleet_of(six[:1], SHOP, UPPER)
    await outcomes(fleet, until=Until.STRUCTURE)
    events = heard(fleet)

    assert (await fleet.switch("upper", State.DUAL, aware=aware)).done

    warned = [event.message for event in events if isinstance(event, Warned)]
    logged = run(six[0], "SELECT flag, after FROM shardmig.log WHERE action = 'aware'")
    assert ([] if aware is None else [("upper", aware)]) == logged
    assert (aware is None) == any("(--aware RELEASE vouches, and logs it)" in message for message in warned)


async def test_a_flag_that_people_switch_meanwhile_parks_the_shard_and_says_to_go_on(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, UPPER)
    assert (await fleet.apply()).done

    def go_forward_again(event: Event) -> None:
        if isinstance(event, FlagSwitched) and event.after is State.DUAL:
            run(six[0], "SELECT shardmig.switch('upper', 'LIVE', 'we need it')")

    fleet.listener = go_forward_again

    [report] = await fleet.switch("upper", State.OLD)

    assert (PARKED, True) == (report.outcome, "was switched while it was drained; apply again" in report.reason)
    assert {"shop": State.LIVE, "upper": State.LIVE} == flags(six[0])


async def test_what_people_switch_back_while_the_answer_to_a_flip_is_lost_stays_back(
    six: list[Shard], servers: list[Server]
) -> None:
    await outcomes(fleet_of(six[:1], SHOP, UPPER), until=Until.MOVED)
    with proxied(servers[0], six[0]) as (proxy, far):
        cut = proxy.cut_after(skip=2)  # the turn is taken, and shop LIVE

        def switch_back(event: Event) -> None:
            if isinstance(event, Waiting):
                run(six[0], "SELECT shardmig.switch('upper', 'DUAL', 'names look wrong')")

        fleet = fleet_of([far], SHOP, UPPER)
        fleet.listener = switch_back
        [report] = await fleet.apply()

    assert cut.struck.is_set()
    assert PARKED is report.outcome
    assert "flag upper was switched by somebody else meanwhile" in report.reason
    assert State.DUAL == flags(six[0])["upper"]


async def test_what_people_take_forward_and_back_from_psql_is_theirs_too(six: list[Shard]) -> None:
    """Where their way forward is not recorded, a flag that was LIVE and is DUAL looks like one still on its way."""
    await outcomes(fleet_of(six[:1], SHOP, UPPER), until=Until.MOVED)
    for state in ("LIVE", "DUAL"):
        run(six[0], f"SELECT shardmig.switch('upper', '{state}', 'by hand')")

    [report] = await fleet_of(six[:1], SHOP, UPPER).apply()

    assert (PENDING, "upper is DUAL: somebody switched it back") == (report.outcome, report.reason.partition(";")[0])


async def test_a_canary_whose_schemas_lost_something_stops_until_people_decide(six: list[Shard]) -> None:
    fleet = fleet_of(six[:2], SHOP, COLUMN)
    run(six[0], "CREATE TABLE old (id int, name text)")

    def take_something_away(event: Event) -> None:
        if isinstance(event, StepStarted) and event.revision == "0002_note":
            run(six[0], "ALTER TABLE old DROP COLUMN name")

    fleet.listener = take_something_away

    canary, other = await fleet.apply()

    assert (FAILED, PENDING) == (canary.outcome, other.outcome)
    assert "column public.old.name is gone" in canary.reason
    fleet.listener = None
    alone = fleet_of(six[:1], *(accepted.plan for accepted in fleet.plans))
    [again], [status] = await alone.apply(), await alone.status()
    for told in (again, status):
        assert (FAILED, True, True) == (
            told.outcome,
            "column public.old.name is gone" in told.reason,
            "--despite-proof --reason TEXT" in told.reason,
        )
    assert {"shop": State.OLD, "note": State.OLD} == flags(six[0])
    alone.accepts_proof, alone.reason = True, "old was nobody's"
    assert (await alone.apply()).done
    assert [("0002_note", "accepted", "old was nobody's")] == run(
        six[0], "SELECT revision, after, reason FROM shardmig.log WHERE action = 'proof'"
    )
    assert (await fleet.apply()).done


async def test_two_runners_share_a_fleet_through_the_locks_of_its_shards(six: list[Shard]) -> None:
    """The first one waits on a busy shard; the second one leaves that to it and does all the others."""
    assert (await fleet_of(six, SHOP, rollout={"waves": "all"}).apply()).done
    assert (await fleet_of(six[:1], SHOP, UPPER).apply()).done  # the canary
    first = fleet_of(six[:2], SHOP, UPPER, rollout={"jobs": 1, "park_after_s": 60})
    second = fleet_of(six, SHOP, UPPER, rollout={"jobs": 1, "waves": "all"})
    by_first, by_second = heard(first), heard(second)

    def worked_on(events: list[Event]) -> set[str]:
        return {event.shard for event in events if isinstance(event, StepStarted)}

    with psycopg.connect(six[1].url.get_secret_value()) as busy:
        busy.execute("SELECT FROM customer")
        one = asyncio.create_task(first.apply())
        while not any(isinstance(event, Waiting) for event in by_first):
            await asyncio.sleep(0.01)
        two = asyncio.create_task(second.apply())
        while sum(isinstance(event, OutcomeReached) for event in by_second) < 5:
            await asyncio.sleep(0.01)
        busy.rollback()
        reports = await asyncio.gather(one, two)

    assert all(report.done for report in reports), reports
    assert ({six[1].name}, {shard.name for shard in six[2:]}) == (worked_on(by_first), worked_on(by_second))
    assert [six[1].name] == [event.shard for event in by_second if isinstance(event, Parked)]
    switched = "SELECT flag, after FROM shardmig.log WHERE action = 'switch' ORDER BY id"
    assert {(("shop", "LIVE"), ("upper", "DUAL"), ("upper", "LIVE"))} == {tuple(run(shard, switched)) for shard in six}


async def test_a_shard_that_hangs_keeps_nobody_elses_answer(six: list[Shard], servers: list[Server]) -> None:
    good, other = six[:2]
    await fleet_of([good, other], SHOP).apply()
    with FaultProxy(servers[1]) as proxy:
        hung = proxy.way_to(other)
        proxy.cut_after("SELECT", how="silence")
        async with asyncio.timeout(20):
            found = await fleet_of([good, hung], SHOP, session={"connect_timeout_s": 1}).status()

    assert [DONE, Outcome.UNREACHABLE] == [one.outcome for one in found]
    assert "did not answer" in found[1].reason


@pytest.mark.long
async def test_a_server_that_hangs_in_the_middle_of_a_run_keeps_no_other_shard(
    six: list[Shard], servers: list[Server]
) -> None:
    """Nothing is broken as TCP sees it, and the server's own limits do not hold: it answers nobody any more."""
    canary, good, other = six[:3]
    with FaultProxy(servers[2]) as proxy:
        hung = proxy.way_to(other)
        silent = proxy.cut_before("CREATE TABLE customer", how="silence")
        fleet = fleet_of([canary, good, hung], SHOP, session={"connect_timeout_s": 1}, rollout={"waves": "all"})
        async with asyncio.timeout(30):
            applying = asyncio.create_task(fleet.apply())
            assert await asyncio.to_thread(silent.struck.wait, 20)
            proxy.blackhole()
            report = await applying
        proxy.heal()
        again = await fleet.apply()

    assert [DONE, DONE, Outcome.IN_DOUBT] == [one.outcome for one in report]
    assert f"no connection to 127.0.0.1:{proxy.port}" in report.shards[2].reason
    assert again.done


async def test_a_runner_that_was_killed_is_not_said_to_be_at_work(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, COLUMN)
    await fleet.apply(upto="0001_shop")
    async with open_session(six[0], fleet.config.session, pg_versions=(14, 18)) as session:
        await Turn.take(session)
        [at_work] = await fleet.status()
    [left] = await fleet.status()
    (await fleet.apply()).raise_for_failures()
    run(six[0], "UPDATE shardmig.runner SET holder = 'one killed behind its last commit', since = now()")
    [done] = await fleet.status()

    assert f"worked on by {holder_name()}" in at_work.reason
    assert f"nobody is at work; left by {holder_name()}, who is gone (last seen 20" in left.reason
    assert "worked on" not in left.reason
    assert (DONE, "") == (done.outcome, done.reason)


async def test_where_nobody_is_at_work_nothing_takes_time_or_waits(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, UPPER)
    await fleet.apply(until=Until.DUAL)
    async with open_session(six[0], fleet.config.session, pg_versions=(14, 18)) as session:
        turn = await Turn.take(session)
        await turn.claim("0002_upper", 3)
        run(
            six[0],
            "UPDATE shardmig.step SET direction = 'forward', bounded_at = now(), upto = '{9}', rows = 10, "
            "rows_estimated = 100, rows_per_s = 5, eta_s = 18, noted_at = '2100-01-01 00:00:00+00' WHERE kind = 'move'",
        )
        [moves] = await fleet.status()
        run(six[0], "UPDATE shardmig.step SET waiting = 'rows of customer are locked by pid 1' WHERE kind = 'move'")
        [waits] = await fleet.status()
        await Turn.take(session)  # the next runner, which has not come so far
        [elsewhere] = await fleet.status()
    run(six[0], "UPDATE shardmig.step SET finished_at = '2101-01-01' WHERE kind = 'switch'")  # as psql's flip does
    [left] = await fleet.status()
    run(six[0], "UPDATE shardmig.step SET waiting = NULL, paused = 'sale' WHERE kind = 'move'")
    [paused] = await fleet.status()

    stands = "; 0002_upper step 3: 10 of about 100 rows moved (10 %)"
    assert moves.reason.endswith(f"worked on by {holder_name()}{stands}, 5 rows/s, 18 s left")
    assert waits.reason.endswith(f"worked on by {holder_name()}{stands}; rests: rows of customer are locked by pid 1")
    assert elsewhere.reason.endswith(f"worked on by {holder_name()}{stands}")
    gone = f"nobody is at work; left by {holder_name()}, who is gone (last seen 2100-01-01 00:00:00 UTC): apply again"
    assert left.reason.endswith(f"{gone}{stands}")
    assert paused.reason.endswith(f"{gone}{stands}; rests: an operator paused it: sale")
    bodies = [_status_body(one)["moves"][0] for one in (moves, waits, left, paused)]
    assert [18, None, None, None] == [body["eta_s"] for body in bodies]
    assert [None, "rows of customer are locked by pid 1", None, "an operator paused it: sale"] == [
        body["waiting"] for body in bodies
    ]


async def test_while_somebody_is_at_work_a_failure_of_the_run_before_is_not_how_it_goes(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, UPPER)
    await fleet.apply(until=Until.DUAL)
    said = []
    async with open_session(six[0], fleet.config.session, pg_versions=(14, 18)) as session:
        before = await Turn.take(session)
        await session.flight([before.record_failure("0002_upper", 3, f"{six[0].name}, 0002_upper step 3: no room")])
        said += await fleet.status()
        turn = await Turn.take(session)
        said += await fleet.status()
        await turn.claim("0002_upper", 3)
        said += await fleet.status()
        await session.flight([turn.record_failure("0002_upper", 3, "no room"), turn.end()])
    said += await fleet.status()

    assert [
        f"worked on by {holder_name()}; failed: 0002_upper step 3: no room",
        f"worked on by {holder_name()}; failed before, not tried again yet: 0002_upper step 3: no room",
        f"worked on by {holder_name()}",
        "failed: no room",
    ] == [one.reason.removeprefix("left: 0001_shop, 0002_upper; ") for one in said]


async def test_history_says_who_began_a_plan_and_who_finished_it(six: list[Shard]) -> None:
    """Of one nothing but this record is left, as after a kill; the other one's last step is a flip."""
    fleet = fleet_of(six[:1], SHOP, UPPER)
    await fleet.apply(upto="0001_shop")
    await fleet.apply(until=Until.STRUCTURE)
    run(six[0], "UPDATE shardmig.migration SET started_by = 'eve', finished_at = NULL, finished_by = NULL")
    (await fleet.apply()).raise_for_failures()
    [status] = await fleet.status(log=True)

    said = [(line["action"], line["by"]) for line in _log_body(status) if line["action"] in {"begin", "finish"}]
    assert [*[("begin", "eve")] * 2, *[("finish", holder_name())] * 2] == said


async def test_where_a_switch_was_left_in_the_midst_of_a_move_it_is_what_goes_on(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, UPPER)
    await fleet.apply()
    run(
        six[0], "UPDATE shardmig.step SET direction = 'back', bounded_at = now(), checked_at = NULL WHERE kind = 'move'"
    )
    async with open_session(six[0], fleet.config.session, pg_versions=(14, 18)) as session:
        await Turn.take(session)
    [left] = await fleet.status()

    goes_on = f": `shardmig switch upper DUAL --shard {six[0].name}` goes on back"
    assert left.reason.endswith(f"{goes_on}; 0002_upper step 3 back: 0 rows moved, 0 compared")

    await fleet.switch("upper", State.DUAL)
    run(six[0], "UPDATE shardmig.step SET direction = 'forward', bounded_at = now() WHERE kind = 'move'")
    async with open_session(six[0], fleet.config.session, pg_versions=(14, 18)) as session:
        await Turn.take(session)
    [left] = await fleet.status()

    goes_on = f": `shardmig switch upper LIVE --shard {six[0].name}` goes on"
    assert left.reason.startswith("upper is held at DUAL; nobody is at work; left by ")
    assert left.reason.endswith(f"{goes_on}; 0002_upper step 3: 0 rows moved, 0 compared")


async def test_a_ledger_that_somebody_locks_parks_the_shard_and_names_who(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, session={"lock_wait_s": 0.5})
    assert (await fleet.apply()).done
    with psycopg.connect(six[0].url.get_secret_value()) as busy:
        busy.execute("LOCK TABLE shardmig.step")
        pid = busy.info.backend_pid
        [status] = await fleet.status()
        [report] = await fleet.apply()

    for reached in (status, report):
        assert PARKED is reached.outcome
        assert f"held by pid {pid}" in reached.reason


async def test_a_schema_of_somebody_else_that_has_our_name_is_told_with_the_cure(six: list[Shard]) -> None:
    run(six[0], "CREATE SCHEMA shardmig; CREATE TABLE shardmig.shard (id int)")
    [status] = await fleet_of(six[:1], SHOP).status()
    [report] = await fleet_of(six[:1], SHOP).apply()

    assert (FAILED, FAILED) == (status.outcome, report.outcome)
    for reason in (status.reason, report.reason):
        assert "a schema shardmig is there that is no ledger" in reason


async def test_a_read_only_shard_is_shown_and_nothing_is_written_there(six: list[Shard]) -> None:
    fleet = fleet_of(six[:1], SHOP, COLUMN)
    await fleet.apply(upto="0001_shop")
    run(six[0], "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', "
                "current_database()); END $$")  # fmt: skip
    [status] = await fleet.status(forecast=True)
    [applied] = await fleet.apply()
    [paused] = await fleet.pause("shop")

    assert (PENDING, "0002_note") == (status.outcome, status.left[0].plan.revision)
    assert "read-only (default_transaction_read_only), so nothing can be applied" in status.reason
    for refused in (status.refused, applied.reason, paused.reason):
        assert "ALTER DATABASE" in refused
    assert (FAILED, FAILED) == (applied.outcome, paused.outcome)
