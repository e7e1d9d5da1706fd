"""
Progress on stderr.

On a terminal each shard that is worked on has a line of progress; elsewhere progress is silent, and only outcomes are
told, and now and then who is in the way.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from shardmig import mismatches
from shardmig.cli import overview
from shardmig.cli.console import err, out
from shardmig.cli.interruption import Interruption
from shardmig.errors import ConfigError
from shardmig.events import (
    BatchDone,
    Draining,
    FlagSwitched,
    MaintenanceSet,
    OutcomeReached,
    Parked,
    RangeCompared,
    StepStarted,
    TookOver,
    TransactionEnded,
    Waiting,
    Warned,
)
from shardmig.outcomes import Outcome
from shardmig.progress import Moved
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from rich.progress import Task

    from shardmig.events import Event, Listener
    from shardmig.fleet import Fleet
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.rollout import Wave
    from shardmig.status import ShardStatus

__all__ = ["confirm", "confirm_done", "exporting", "run", "watch"]

T = TypeVar("T")

_WATCH_S = 2.0  # between two looks at the fleet
_WARNED = 8  # shards of which the same warning is told
_BLOCKED_S = 30.0  # between two lines, without a terminal, about who is in the way of a shard


def run(fleet: Fleet, work: Callable[[], Awaitable[T]], *, quiet: bool = False, log_json: Path | None = None) -> T:
    """
    Run a fleet's work to its end, with progress and with Ctrl-C meaning "stop at a safe place".

    Args:
        fleet: told where to send its events.
        work: what to await.
        quiet: no progress at all.
        log_json: a file to which every event is appended.
    """
    with (
        _display(shards=len(fleet.targets), quiet=quiet) as show,
        _log(log_json) as write,
        Interruption(fleet.stop) as interruption,
    ):
        fleet.listener = _both(_both(show, write), interruption.listen)
        return asyncio.run(interruption.over(work))


@contextmanager
def exporting(path: Path | None, plans: Sequence[AcceptedPlan]) -> Iterator[Mismatches | None]:
    """Open the file of --mismatches, and say afterwards how many rows are in it."""
    with mismatches.exporting(path, plans) as file:
        yield file
        if file is not None:
            err.print(Text(f"{file.rows:,} rows that disagree are in {file.path}"))


def watch(fleet: Fleet, show: Callable[[list[ShardStatus]], None]) -> list[ShardStatus]:
    """Ask the fleet where it is and show it, again and again, until all are done or Ctrl-C; returns the last answer."""

    async def watching() -> list[ShardStatus]:
        while True:
            found = await fleet.status()
            if out.is_terminal:
                out.clear()
            show(found)
            if fleet.stop.is_set() or all(one.outcome is Outcome.DONE for one in found):
                return found
            with suppress(TimeoutError):
                await asyncio.wait_for(fleet.stop.wait(), _WATCH_S)

    return run(fleet, watching, quiet=True)


def confirm(order: Sequence[Wave], *, yes: bool) -> None:
    """Ask whether to walk several waves; as `_ask`."""
    if not yes and sum(not wave.canary for wave in order) > 1:
        listed = "; ".join(str(wave) for wave in order)
        _ask(listed, f"{len(order)} waves and no terminal to ask: say --yes. The order: {listed}")


def confirm_done(plan: Plan, *, yes: bool) -> None:
    """Ask whether a flag shall go where nothing leads back from; as `_ask`."""
    if not yes and not plan.has_way_back:
        why = "has no `back`" if plan.moves else "moves nothing"
        known = (
            f"the script of {plan.flag} {why}: from DONE on writers leave old alone, and nothing can fill it again to "
            "go back; LIVE costs little, and a flag may stay there for ever"
        )
        _ask(known, f"{known}. No terminal to ask: say --yes to go DONE all the same")


def _ask(known: str, cannot: str) -> None:
    """
    Ask whether to go on; whoever cannot be asked must have said so.

    Raises:
        ConfigError: nobody is there to be asked.
        Abort: the answer is no.
    """
    if not (sys.stdin.isatty() and err.is_terminal):
        raise ConfigError(cannot)
    typer.confirm(f"{known}\nGo on?", abort=True, err=True)


def _both(one: Listener | None, other: Listener | None) -> Listener | None:
    """Make one listener of two, either of which may be missing."""
    if one is None or other is None:
        return one or other

    def listen(event: Event) -> None:
        one(event)
        other(event)

    return listen


@contextmanager
def _log(path: Path | None) -> Iterator[Callable[[Event], None] | None]:
    """Append events to a file, each written at once: whoever follows it sees what happens."""
    if path is None:
        yield None
        return
    try:
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"--log-json {path}: {error.strerror}") from error
    with file:
        yield lambda event: print(json.dumps(_line(event), ensure_ascii=False), file=file)


def _line(event: Event) -> dict[str, object]:
    body = {name: _plain(value) for name, value in asdict(event).items()}
    return {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": type(event).__name__, **body}


def _plain(value: object) -> object:
    return value.name if isinstance(value, State) else value


@contextmanager
def _display(*, shards: int, quiet: bool) -> Iterator[Listener | None]:
    if quiet:
        yield None
        return
    with Progress(*_columns(), console=err, transient=True, disable=not err.is_terminal) as progress:
        lines = _Lines(progress, shards)
        try:
            yield lines.listen
        finally:
            lines.end()


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        _Words("{task.fields[shard]}"),
        _Words("{task.description}", gives_way=True),
        TimeElapsedColumn(),
    )


class _Words(TextColumn):
    """
    Words as they are, of which a terminal that is too narrow for the line never cuts those that do not give way.

    Args:
        shown: what of a task, as a format.
        gives_way: cut at the end where the line is too long for the terminal.
    """

    def __init__(self, shown: str, *, gives_way: bool = False) -> None:
        super().__init__(shown, markup=False, table_column=Column(no_wrap=not gives_way))
        self._gives_way = gives_way

    def render(self, task: Task) -> Text:
        """Keep to one line what gives way; it is the column that may wrap which is made narrower."""
        text = super().render(task)
        text.no_wrap, text.overflow = self._gives_way, "ellipsis" if self._gives_way else "fold"
        return text


class _Lines:
    """
    One line for each shard that is worked on, and above them what is told of single ones.

    Without a terminal progress is silent, and outcomes wait for the report; what is told of single shards is told, and
    who is in the way: at once, then every half a minute.

    Args:
        progress: where lines are.
        shards: how many there are; of many, one line counts those that ended as they should.
    """

    def __init__(self, progress: Progress, shards: int) -> None:
        self._progress = progress
        self._shards = shards
        self._tasks: dict[str, TaskID] = {}
        self._warned: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._blocked_at: dict[str, float] = {}

    def listen(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Warned():
                self._warned[event.message] += 1
                if self._warned[event.message] <= _WARNED:
                    self._tell(event.shard, ("warning: ", "yellow"), event.message)
            case TransactionEnded():
                self._tell(event.shard, ("ended", "yellow"), f", for the drain of {event.flag}: {event.blocker}")
            case MaintenanceSet(mode="off"):
                self._tell(event.shard, "serves again")
            case MaintenanceSet():
                self._tell(event.shard, (event.mode, "yellow"), f": {event.reason}")
            case _ if not self._progress.disable:
                self._follow(event)
            case Waiting() | Draining() if event.blockers:
                self._tell_blocked(event)

    def _tell_blocked(self, event: Waiting | Draining) -> None:
        now_s = time.monotonic()
        if now_s - self._blocked_at.get(event.shard, -_BLOCKED_S) >= _BLOCKED_S:
            self._blocked_at[event.shard] = now_s
            self._tell(event.shard, _describe(event) or "")

    def end(self) -> None:
        """Say how many shards had the warnings that were not told again."""
        for message, count in self._warned.items():
            if count > _WARNED:
                more = f"{count - _WARNED} more shard{'s' if count > _WARNED + 1 else ''}"
                self._tell(more, ("warning: ", "yellow"), message.partition(";")[0].partition("\n")[0])

    def _tell(self, shard: str, *said: str | tuple[str, str]) -> None:
        self._progress.console.print(Text.assemble(f"{shard}  ", *said))

    def _follow(self, event: Event) -> None:
        """Show on a terminal where a shard is."""
        if isinstance(event, OutcomeReached):
            self._drop(event.shard)
            if self._shards <= overview.SHARDS or Outcome(event.outcome) not in overview.ALIKE:
                self._tell(event.shard, f"{event.outcome}  {event.detail}".rstrip())
            if self._shards > overview.SHARDS:
                self._ended[event.outcome] += 1
                counts = ", ".join(f"{count} {outcome}" for outcome, count in self._ended.items())
                self._line("", f"of {self._shards} shards", counts)
        elif isinstance(event, Parked):
            self._drop(event.shard)
            self._tell(event.shard, f"is tried again at the end: {event.reason}")
        elif text := _describe(event):
            self._line(event.shard, event.shard, text)

    def _line(self, key: str, head: str, text: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=None, shard=head)
        self._progress.update(self._tasks[key], description=text)

    def _drop(self, shard: str) -> None:
        if (task := self._tasks.pop(shard, None)) is not None:
            self._progress.remove_task(task)


def _describe(event: Event) -> str | None:
    match event:
        case StepStarted():
            return f"{event.revision} step {event.step}: {event.kind}"
        case BatchDone():
            moved = Moved(event.rows_done, event.rows_estimated, event.rows_per_s, event.eta_s)
            return f"{event.revision} step {event.step}: {moved}"
        case RangeCompared():
            moved = Moved(event.rows_moved, None, event.rows_per_s, event.eta_s, event.rows_done)
            return f"{event.revision} step {event.step}: {moved}"
        case Waiting():
            return f"waits: {event.reason}" + (f" ({event.blockers[0]})" if event.blockers else "")
        case Draining():
            return f"drains {event.flag}: " + (str(event.blockers[0]) if event.blockers else "")
        case FlagSwitched():
            return f"{event.flag} {event.before.name} → {event.after.name}"
        case TookOver():
            return f"took over from {event.who}"
        case _:
            return None
