"""
Progress on stderr.

On a terminal each shard that is worked on has a line of progress; elsewhere progress is silent and only outcomes are
told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from shardmig import mismatches
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

    from shardmig.events import Event, Listener
    from shardmig.fleet import Fleet, ShardStatus
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan
    from shardmig.rollout import Wave

__all__ = ["confirm", "exporting", "run", "watch"]

T = TypeVar("T")

_WATCH_S = 2.0  # between two looks at the fleet


def run(fleet: Fleet, work: Callable[[], Awaitable[T]], *, quiet: bool = False, log_json: Path | None = None) -> T:
    """
    Run a fleet's work to its end, with progress and with Ctrl-C meaning "stop at a safe place".

    Args:
        fleet: told where to send its events.
        work: what to await.
        quiet: no progress at all.
        log_json: a file to which every event is appended.
    """
    with _display(quiet=quiet) as show, _log(log_json) as write, Interruption(fleet.stop) as interruption:
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
    """
    Ask whether to walk several waves; whoever cannot be asked must have said so.

    Raises:
        ConfigError: nobody is there to be asked.
        Abort: the answer is no.
    """
    if yes or sum(not wave.canary for wave in order) <= 1:
        return
    listed = "; ".join(str(wave) for wave in order)
    if not (sys.stdin.isatty() and err.is_terminal):
        raise ConfigError(f"{len(order)} waves and no terminal to ask: say --yes. The order: {listed}")
    typer.confirm(f"{listed}\nGo on?", abort=True, err=True)


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
def _display(*, quiet: bool) -> Iterator[Callable[[Event], None] | None]:
    if quiet:
        yield None
        return
    if not err.is_terminal:
        yield _warn
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[shard]}"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield _Lines(progress).listen


def _warn(event: Event) -> None:
    """Without a terminal progress is silent; a warning is not."""
    if isinstance(event, Warned):
        err.print(Text.assemble(f"{event.shard}  ", ("warning: ", "yellow"), event.message))
    if isinstance(event, TransactionEnded):
        err.print(_ended(event))
    if isinstance(event, MaintenanceSet):
        err.print(_closed(event))


def _ended(event: TransactionEnded) -> Text:
    return Text.assemble(f"{event.shard}  ", ("ended", "yellow"), f", for the drain of {event.flag}: {event.blocker}")


def _closed(event: MaintenanceSet) -> Text:
    if event.mode == "off":
        return Text(f"{event.shard}  serves again")
    return Text.assemble(f"{event.shard}  ", (event.mode, "yellow"), f": {event.reason}")


class _Lines:
    """One line for each shard that is worked on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def listen(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, OutcomeReached):
            self._drop(event.shard)
            self._progress.print(Text(f"{event.shard}  {event.outcome}  {event.detail}".rstrip()))
            return
        if isinstance(event, Parked):
            self._drop(event.shard)
            self._progress.print(Text(f"{event.shard}  is tried again at the end: {event.reason}"))
            return
        if isinstance(event, Warned):
            self._progress.print(Text.assemble(f"{event.shard}  ", ("warning: ", "yellow"), event.message))
            return
        if isinstance(event, TransactionEnded):
            self._progress.print(_ended(event))
            return
        if isinstance(event, MaintenanceSet):
            self._progress.print(_closed(event))
            return
        text = _describe(event)
        if text is None:
            return
        if event.shard not in self._tasks:
            self._tasks[event.shard] = self._progress.add_task(text, total=None, shard=event.shard)
        self._progress.update(self._tasks[event.shard], description=text)

    def _drop(self, shard: str) -> None:
        if (task := self._tasks.pop(shard, None)) is not None:
            self._progress.remove_task(task)


def _describe(event: Event) -> str | None:
    match event:
        case StepStarted():
            return f"{event.revision} step {event.step}: {event.kind}"
        case BatchDone():
            moved = Moved(event.rows_done, event.rows_estimated, event.rows_per_s)
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
