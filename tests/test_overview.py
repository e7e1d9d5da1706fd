"""What `status` says of many flags: the usual is told once, a shard's line has what is not."""

from __future__ import annotations

from shardmig.cli.overview import FlagTable, brief, told

FEW = {"eu1": {"shop": "LIVE", "split_name": "DUAL"}, "us1": {"shop": "LIVE"}}
NAMES = [f"f{number:02}" for number in range(1, 31)]


def many(**different: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return four shards on which thirty flags are LIVE, but for what is different."""
    usual = dict.fromkeys(NAMES, "LIVE")
    return {shard: {**usual, **different.get(shard, {})} for shard in ("eu1", "eu2", "us1", "us2")}


def test_few_flags_are_spelled_out_and_nothing_is_told_twice() -> None:
    table = FlagTable(FEW, ["shop", "split_name"])

    assert ("shop LIVE, split_name DUAL", "shop LIVE") == (table.of("eu1"), table.of("us1"))
    assert [] == table.told_once()


def test_of_many_flags_a_line_has_only_those_that_are_not_as_on_most_shards() -> None:
    table = FlagTable(many(us1={"f07": "DUAL"}), NAMES)

    assert ["", "", "f07 DUAL", ""] == [table.of(shard) for shard in ("eu1", "eu2", "us1", "us2")]
    assert ["30 flags on 4 shards: 29 LIVE on all; 1 differs: f07 LIVE on 3, DUAL on 1"] == table.told_once()


def test_on_a_line_of_its_own_a_shard_says_how_all_its_flags_are() -> None:
    """Whoever has switched one back looks for it there, also where it is so on all shards."""
    back = many(**{shard: {"f07": "DUAL"} for shard in ("eu1", "eu2", "us2")}, us1={"f01": "DONE", "f07": "OLD"})
    table = FlagTable(back, NAMES, alone=True)

    assert ["f07 DUAL, 29 more LIVE", "f01 DONE, f07 OLD, 28 more LIVE"] == [table.of("eu1"), table.of("us1")]
    assert [] == table.told_once()
    assert "30 flags LIVE" == FlagTable(many(), NAMES, alone=True).of("eu1")
    new = FlagTable({"eu1": {}}, NAMES, alone=True)
    assert "f01, f02, f03 and 27 more OLD" == new.of("eu1")
    assert "shop LIVE, split_name DUAL" == FlagTable(FEW, alone=True).of("eu1")


def test_a_shard_far_behind_makes_no_endless_line() -> None:
    states = many()
    states["us2"] = dict.fromkeys(NAMES[:10], "LIVE")

    assert "f11, f12, f13 and 17 more OLD" == FlagTable(states, NAMES).of("us2")
    [line] = FlagTable(states, NAMES).told_once()
    assert line.startswith("30 flags on 4 shards: 10 LIVE on all; 20 differ: f11 LIVE on 3, OLD on 1; f12 ")
    assert line.endswith(" and 17 more")


def test_what_is_not_live_on_any_shard_is_named() -> None:
    ahead = many(**{shard: {"f01": "DONE", "f02": "DONE"} for shard in ("eu1", "eu2", "us1", "us2")})

    assert ["31 flags on 4 shards: 2 DONE on all (f01, f02); 28 LIVE on all; 1 OLD on all (new)"] == FlagTable(
        ahead, [*NAMES, "new"]
    ).told_once()


def test_of_as_many_the_later_state_is_the_usual_one() -> None:
    table = FlagTable(many(eu1={"f01": "DUAL"}, eu2={"f01": "DUAL"}), NAMES)

    assert ["f01 DUAL", "f01 DUAL", "", ""] == [table.of(shard) for shard in ("eu1", "eu2", "us1", "us2")]


def test_a_flag_asked_for_is_on_every_line_and_counted() -> None:
    table = FlagTable(many(us1={"f07": "DUAL"}), NAMES, only=["f07"])

    assert ["f07 LIVE", "f07 DUAL"] == [table.of(shard) for shard in ("eu1", "us1")]
    assert ["f07 LIVE on 3, DUAL on 1"] == table.told_once()


def test_wide_leaves_nothing_out() -> None:
    table = FlagTable(many(us1={"f07": "DUAL"}), NAMES, wide=True)

    assert 30 == len(table.of("eu1").split(", "))
    assert [] == table.told_once()


def test_what_many_shards_say_alike_is_said_in_full_once() -> None:
    text = "{shard}: changed; amend it\n  1. shardmig amend --shard {shard}\n--- begun"
    reasons = [(shard, text.format(shard=shard)) for shard in ("eu1", "eu2")] + [
        ("us1", "us1, step 3: lost"),
        ("us2", ""),
    ]

    assert {
        "eu1": "changed; amend it\n  1. shardmig amend --shard eu1\n--- begun",
        "eu2": "changed; amend it (more at eu1)",
        "us1": "step 3: lost",
        "us2": "",
    } == told(reasons)
    assert "changed; amend it" == brief("eu1", reasons[0][1])


def test_shards_that_did_not_answer_have_no_state() -> None:
    assert ("", []) == (FlagTable({}, NAMES).of("eu1"), FlagTable({}, NAMES).told_once())
