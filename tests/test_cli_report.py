"""What `apply` says of a fleet: of hundreds of shards those that ended alike share a line, each other one is named."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import typer
from rich.console import Console
from rich.progress import Progress

from shardmig.cli import progress, results
from shardmig.events import Blocker, Draining, OutcomeReached, Parked, StepStarted, Waiting, Warned
from shardmig.outcomes import Outcome, Report, ShardReport

if TYPE_CHECKING:
    from shardmig.events import Event

NAMES = [f"s{number:03}" for number in range(400)]
LIVE = (("shop", "LIVE"),)
BLOCKER = Blocker(7, "shop", "checkout", 9.0, "SELECT 1", "client")


def fleet(**different: ShardReport) -> Report:
    """Return the report of 400 shards, all of them done but those that are different."""
    return Report(
        tuple(
            different.get(name) or ShardReport(name, Outcome.DONE, number / 100, flags=LIVE)
            for number, name in enumerate(NAMES)
        )
    )


def failed(name: str, reason: str = "step 1: no") -> ShardReport:
    return ShardReport(name, Outcome.FAILED, 1.0, f"{name}, {reason}", LIVE)


def said(report: Report, capsys: pytest.CaptureFixture[str], output: str = "text", *, wide: bool = False) -> str:
    with pytest.raises(typer.Exit):
        results.show_report(report, output, wide=wide)
    return capsys.readouterr().out


def test_of_many_shards_those_that_are_done_share_a_line_and_failures_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = fleet(s007=failed("s007"), s300=failed("s300"), s301=ShardReport("s301", Outcome.PARKED, 9.0, "pid 7"))

    assert [
        "397 shards: s000, s001, s002, …  done               4.0 s  shop LIVE",
        "s007                             failed             1.0 s  step 1: no",
        "s300                             failed             1.0 s  step 1: no",
        "s301                             parked             9.0 s  pid 7",
        "397 of 400 shards done (1 parked, 2 failed)",
    ] == said(report, capsys).splitlines()


def test_shards_that_were_not_begun_share_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    rest = {name: ShardReport(name, Outcome.PENDING, 0, "not begun: the canary s000 failed") for name in NAMES[1:]}

    lines = said(fleet(s000=failed("s000"), **rest), capsys).splitlines()
    assert ("s000", 3) == (lines[0].split()[0], len(lines))
    assert "399 shards: s001, s002, s003, …  pending" in lines[1]


def test_each_shard_has_its_line_in_json_where_asked_for_and_where_they_are_few(
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = Report(fleet().shards[:20])

    assert 400 == len(json.loads(said(fleet(), capsys, "json"))["shards"])
    assert 401 == len(said(fleet(), capsys, wide=True).splitlines())
    assert 21 == len(said(few, capsys).splitlines())


def shown(shards: int, *events: Event, terminal: bool = True) -> tuple[list[str], list[str]]:
    """Return what was told, and the lines of progress that are there at the end."""
    file = io.StringIO()
    console = Console(file=file, width=200)
    display = Progress(console=console, disable=not terminal)
    lines = progress._Lines(display, shards)
    for event in events:
        lines.listen(event)
    lines.end()
    return file.getvalue().splitlines(), [f"{task.fields['shard']} {task.description}" for task in display.tasks]


def test_on_a_terminal_those_that_ended_well_are_counted() -> None:
    begun = [StepStarted(name, "0001_shop", 1, "statement") for name in NAMES]
    ended = [OutcomeReached(name, "done", "", 1.0) for name in NAMES[2:399]]
    sick = [Parked("s000", "pid 7"), OutcomeReached("s001", "failed", "step 1: no", 1.0)]

    assert (
        ["s000  is tried again at the end: pid 7", "s001  failed  step 1: no"],
        ["s399 0001_shop step 1: statement", "of 400 shards 1 failed, 397 done"],
    ) == shown(400, *begun, *sick, *ended)


@pytest.mark.parametrize("width", [80, 50])
def test_a_narrow_terminal_cuts_what_is_said_of_a_shard_and_never_its_name(width: int) -> None:
    """What is said may come from anybody's query, and means nothing to the terminal."""
    console = Console(file=io.StringIO(), width=width)
    display = Progress(*progress._columns(), console=console)
    lines = progress._Lines(display, 2)
    query = replace(BLOCKER, query="UPDATE customer SET tags[1] = '[/bold]' WHERE id = 1")
    lines.listen(Waiting("customers-of-europe-west-017", "[/b] rows of customer are locked", (query,)))
    lines.listen(StepStarted("eu1", "0001_shop", 1, "statement"))
    with console.capture() as shown:
        console.print(display.get_renderable())
    long, short = shown.get().splitlines()

    assert "customers-of-europe-west-017 waits: [/b" in long
    assert "… 0:00:00" in long
    assert width == len(long)
    assert short.split()[1:3] == ["eu1", "0001_shop"]


def test_of_few_shards_each_outcome_is_told() -> None:
    assert (["eu1  done"], []) == shown(20, OutcomeReached("eu1", "done", "", 1.0))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_warning_of_the_whole_fleet_is_told_some_times_and_counted(*, terminal: bool) -> None:
    own = Warned("s399", "s399 alone")
    told, _ = shown(400, *(Warned(name, "nobody vouched; vouch") for name in NAMES), own, terminal=terminal)

    assert [f"{name}  warning: nobody vouched; vouch" for name in NAMES[:8]] == told[:8]
    assert ["s399  warning: s399 alone", "392 more shards  warning: nobody vouched"] == told[8:]


@pytest.mark.parametrize("event", [Waiting("eu1", "customer is locked", (BLOCKER,)), Draining("eu1", "x", (BLOCKER,))])
def test_without_a_terminal_who_is_in_the_way_is_told_at_once_and_each_half_minute(
    event: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    [line], _ = shown(2, event, event, terminal=False)
    assert line.startswith("eu1  ")
    assert "pid 7" in line
    assert 2 == len(shown(2, event, replace(event, shard="us1"), event, terminal=False)[0])

    monkeypatch.setattr(progress, "_BLOCKED_S", 0.0)
    assert [line, line] == shown(2, event, event, terminal=False)[0]


def test_without_a_terminal_progress_is_silent() -> None:
    events = StepStarted("eu1", "0001_shop", 1, "statement"), OutcomeReached("eu1", "failed", "no", 1.0)

    assert ([], []) == shown(1, *events, terminal=False)
