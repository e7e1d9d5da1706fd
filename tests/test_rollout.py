"""Who is next, and when nobody is: decided without a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shardmig.config import Rollout, Shard
from shardmig.errors import ConfigError
from shardmig.outcomes import Outcome, ShardReport
from shardmig.rollout import FAILURES, Budget, partition, waves

if TYPE_CHECKING:
    from collections.abc import Sequence


def shards(count: int, **named: str) -> list[Shard]:
    """Make shards s0, s1, …; a keyword gives one its wave: `s2="canary"`."""
    return [
        Shard.model_validate({"name": f"s{n}", "url": "postgresql://nowhere/x", "wave": named.get(f"s{n}")})
        for n in range(count)
    ]


def order(targets: Sequence[Shard], **rollout: object) -> list[list[str]]:
    return [[shard.name for shard in wave.shards] for wave in waves(targets, Rollout.model_validate(rollout))]


def test_waves_double_after_the_canary() -> None:
    assert [["s2"], ["s0"], ["s1", "s3"], ["s4", "s5", "s6", "s7"], ["s8"]] == order(shards(9, s2="canary"))


def test_without_a_named_canary_the_first_target_goes_first() -> None:
    assert [["s0"], ["s1", "s2", "s3"]] == order(shards(4), waves="all")


def test_a_single_shard_has_no_canary_phase() -> None:
    [only] = waves(shards(1, s0="canary"), Rollout())

    assert not only.canary


def test_named_waves_follow_the_configuration_and_the_unnamed_come_last() -> None:
    targets = shards(6, s0="canary", s1="big", s3="small", s4="big")

    assert [["s0"], ["s1", "s4"], ["s3"], ["s2", "s5"]] == order(targets, waves="named")


@pytest.mark.parametrize("waved", ["doubling", "all", "named"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_every_target_is_in_exactly_one_wave(count: int, waved: str) -> None:
    walked = [name for wave in order(shards(count, s1="canary", s3="x"), waves=waved) for name in wave]

    assert sorted(walked) == sorted(shard.name for shard in shards(count))


def test_the_parts_of_a_fleet_are_stable_and_cover_it() -> None:
    fleet = shards(200)
    parts = [partition(fleet, f"{part}/16") for part in range(1, 17)]

    assert sorted(shard.name for part in parts for shard in part) == sorted(shard.name for shard in fleet)
    assert [shard.name for shard in parts[2]] == [
        s.name for s in partition(shards(400), "3/16") if int(s.name[1:]) < 200
    ]


@pytest.mark.parametrize("wrong", ["0/4", "5/4", "4", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_part_that_there_is_not_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="I/N"):
        partition(shards(3), wrong)


def report(outcome: Outcome, name: str = "s1") -> ShardReport:
    return ShardReport(name, outcome, 0.0)


@pytest.mark.parametrize("outcome", Outcome)
def test_only_what_is_wrong_counts_as_a_failure(outcome: Outcome) -> None:
    budget = Budget(Rollout(on_failure="halt"), [])
    budget.note(report(outcome))

    assert (outcome in FAILURES) == (budget.halted is not None)


def test_the_budget_is_spent_by_one_failure_more_than_it_bears() -> None:
    budget = Budget(Rollout(failures_max=2), [])
    budget.note(report(Outcome.FAILED, "s1"))
    budget.note(report(Outcome.UNREACHABLE, "s2"))
    assert budget.halted is None

    budget.note(report(Outcome.FAILED, "s3"))

    assert budget.halted == "3 shards failed, more than rollout.failures_max = 2"


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.DONE])
def test_a_canary_that_is_not_done_halts_whatever_the_policy(outcome: Outcome) -> None:
    budget = Budget(Rollout(), [])
    budget.note_canary(report(outcome))

    assert budget.halted is not None
    assert budget.halted.endswith(("failed", "was interrupted", f"ended as: {outcome.value}"))
