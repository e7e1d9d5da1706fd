"""
The stage: acts and commands as lines that stay, the shop and its shards as a picture that moves.

Where no terminal is, lines are all there is.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shardmig.demo.traffic import percentile
from shardmig.outcomes import Outcome
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType

    from shardmig.demo.crew import Crew
    from shardmig.demo.logbook import Logbook, Page
    from shardmig.demo.traffic import Traffic
    from shardmig.demo.verdict import Verdict
    from shardmig.outcomes import Report

__all__ = ["Stage", "verdict_tables"]

_STATES = {State.OLD: "dim", State.DUAL: "yellow", State.LIVE: "bold green", State.DONE: "blue"}
_FRAMES_PER_S = 8


class Stage:
    """Where a story is shown; told everything by the story."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._acts = 0
        self._scene: tuple[Logbook, Traffic, Sequence[Crew]] | None = None

    @contextmanager
    def lit(self) -> Iterator[None]:
        """Show the moving picture, on a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self, console=self._console, refresh_per_second=_FRAMES_PER_S, transient=True):
            yield

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self._began

    def show(self, logbook: Logbook, traffic: Traffic, crews: Sequence[Crew]) -> None:
        """Take these as what the moving picture shows from now on."""
        self._scene = (logbook, traffic, crews)

    def act(self, title: str) -> None:
        """Begin an act."""
        self._acts += 1
        at = f"{self.seconds:5.1f} s "
        self._console.print(Text.assemble((at, "dim"), (f" {self._acts}  ", "bold cyan"), (title, "bold")))

    def command(self, line: str) -> None:
        """Say what somebody would type for what happens next."""
        self._console.print(Text.assemble(" " * 12, ("$ ", "green"), line))

    def reported(self, report: Report, seconds: float) -> None:
        """Tell how a command ended: one line when all is well, else one a shard."""
        done = sum(one.outcome is Outcome.DONE for one in report)
        self._console.print(Text(f"{'':12}  {done} of {len(report.shards)} shards done in {seconds:.1f} s", "dim"))
        for one in report:
            if one.outcome is not Outcome.DONE:
                self._console.print(Text(f"{'':14}{one.shard}: {one.outcome.value}: {one.reason}", "red"))

    def __rich__(self) -> RenderableType:
        """Draw the moving picture."""
        if self._scene is None:
            return Text("")
        logbook, traffic, crews = self._scene
        return Group("", _shards(logbook), "", _customers(traffic, crews))


def _shards(logbook: Logbook) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    flags = list(next(iter(logbook.pages.values())).states)
    for heading, width in (("shard", max(map(len, logbook.pages))), *((flag, len(flag)) for flag in flags)):
        table.add_column(heading, min_width=width, no_wrap=True)
    table.add_column("rows moved", min_width=len("rows moved"), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for shard, page in logbook.pages.items():
        states = [_state(page.states[flag]) for flag in flags]
        table.add_row(Text(shard, "bold"), *states, f"{page.rows_moved:,}", _doing(page))
    return table


def _state(state: State | None) -> Text:
    return Text("-", "dim") if state is None else Text(state.name, _STATES[state])


def _doing(page: Page) -> RenderableType:
    if page.share is None:
        return Text(page.doing, "dim", overflow="ellipsis")
    bar = Table.grid(padding=(0, 1, 0, 0))
    bar.add_row(Bar(1.0, 0.0, min(page.share, 1.0), width=20, color="green"), Text(page.doing, "dim"))
    return bar


def _customers(traffic: Traffic, crews: Sequence[Crew]) -> Text:
    rate, p99 = traffic.now()
    serving = "  ".join(f"release {crew.release.upper()}: {crew.serving} processes" for crew in crews if crew.serving)
    faults = "bold red" if traffic.errors or traffic.wrong else "green"
    return Text.assemble(
        (serving or "closed", "bold"),
        f"   {rate:,.0f} requests/s   p99 {p99:.1f} ms   worst {traffic.worst_ms:.0f} ms   ",
        (f"{traffic.errors:,} errors   {traffic.wrong:,} wrong reads", faults),
    )


# --------------------------------------------------------------------------------------------------------------------
# The verdict


def verdict_tables(verdict: Verdict, seconds: float) -> Iterator[RenderableType]:
    """Draw what was promised and kept, and what it took."""
    yield ""
    yield _promises(verdict)
    yield ""
    yield _each_shard(verdict)
    yield ""
    yield Text("\n".join(_figures(verdict)))
    if not verdict.kept:
        yield ""
        yield Text("\n".join(verdict.evidence), "red")
    yield ""
    ending = ("Every promise was kept.", "bold green") if verdict.kept else ("A promise was broken.", "bold red")
    yield Text.assemble(ending, f" The story took {seconds:.0f} s.")


def _promises(verdict: Verdict) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("promise")
    table.add_column("promised", justify="right")
    table.add_column("found", justify="right")
    table.add_column("")
    for promise in verdict.promises:
        mark = Text("✓ kept", "bold green") if promise.kept else Text("✗ broken", "bold red")
        table.add_row(promise.text, f"{promise.promised:,}", f"{promise.found:,}", mark)
    return table


def _each_shard(verdict: Verdict) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("shard")
    for heading in ("rows moved", "runner's time", "longest drain"):
        table.add_column(heading, justify="right")
    for shard, page in verdict.logbook.pages.items():
        longest = max(page.drains_s, default=0.0)
        table.add_row(Text(shard, "bold"), f"{page.rows_moved:,}", f"{page.seconds:.1f} s", f"{longest * 1000:,.0f} ms")
    return table


def _figures(verdict: Verdict) -> Iterator[str]:
    traffic, drains = verdict.traffic, sorted(verdict.logbook.drains_s)
    p50, p99 = (percentile(traffic.latencies_ms, share) for share in (0.5, 0.99))
    yield (
        f"{traffic.requests:,} requests: half within {p50:.1f} ms, 99 % within {p99:.1f} ms, "
        f"the longest took {traffic.worst_ms:,.0f} ms"
    )
    yield (
        f"{traffic.rows_read:,} rows read and compared with the oracle; "
        f"{traffic.retries:,} REPEATABLE READ writers retried, as they must"
    )
    if drains:
        yield f"flip and drain: median {drains[len(drains) // 2] * 1000:,.0f} ms, longest {drains[-1] * 1000:,.0f} ms"
    yield f"switching a shard back took {verdict.switched_back_ms:,.0f} ms"
