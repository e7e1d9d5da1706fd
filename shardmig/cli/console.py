"""
Everything that is printed: the result on stdout, progress on stderr, one line a shard.

On a terminal each shard that is worked on has a line of progress; elsewhere progress is silent and only outcomes are
told. Ctrl-C asks once for a safe place and ends at once when pressed again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from shardmig import planfile
from shardmig.errors import LintFailed, ShardmigError
from shardmig.events import BatchDone, Draining, FlagSwitched, OutcomeReached, StepStarted, TookOver, Waiting, Warned
from shardmig.outcomes import Outcome
from shardmig.plan import Move, Statement, Switch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from shardmig.events import Event
    from shardmig.fleet import Fleet, ShardStatus
    from shardmig.outcomes import Report
    from shardmig.plan import AcceptedPlan, Plan, Step

__all__ = [
    "err",
    "guarded",
    "out",
    "run",
    "show_gate",
    "show_history",
    "show_json",
    "show_left",
    "show_plans",
    "show_report",
    "show_status",
    "show_steps",
    "tell",
]

T = TypeVar("T")

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

_INTERRUPTED = 130
_COLOURS = {
    Outcome.DONE: "green",
    Outcome.PENDING: "yellow",
    Outcome.PARKED: "yellow",
    Outcome.MAINTENANCE: "yellow",
    Outcome.INTERRUPTED: "yellow",
}


def tell(line: str) -> None:
    """Write one line of the result."""
    out.print(Text(line))


def guarded(app: Callable[[], object]) -> NoReturn:
    """Run the command line and end the process; what a user did wrong is one line on stderr and exit code 2."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(_INTERRUPTED))  # verbs that can resume set their own
    try:
        app()
    except LintFailed as error:
        _show_violations(error)
    except ShardmigError as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)))
    except BrokenPipeError:  # `shardmig status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except asyncio.CancelledError:
        err.print("interrupted; what was committed is recorded, the same command goes on from there")
        sys.exit(_INTERRUPTED)
    sys.exit(2)


def _show_violations(error: LintFailed) -> None:
    err.print(Text.assemble(("error: ", "bold red"), str(error)))
    for violation in error.violations:
        err.print(Text(f"  {violation}"))


# --------------------------------------------------------------------------------------------------------------------
# Progress


def run(fleet: Fleet, work: Callable[[], Awaitable[T]], *, quiet: bool = False) -> T:
    """
    Run a fleet's work to its end, with progress and with Ctrl-C meaning "stop at a safe place".

    Args:
        fleet: told where to send its events.
        work: what to await.
        quiet: no progress at all.
    """
    with _display(quiet=quiet or not err.is_terminal) as listen:
        fleet.listener = listen
        return asyncio.run(_until_stopped(fleet, work))


async def _until_stopped(fleet: Fleet, work: Callable[[], Awaitable[T]]) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - inside asyncio.run

    def stop() -> None:
        if fleet.stop.is_set():
            task.cancel()
        else:
            fleet.stop.set()
            err.print("stopping at the next safe place (once more to stop at once) …")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    return await work()


@contextmanager
def _display(*, quiet: bool) -> Iterator[Callable[[Event], None] | None]:
    if quiet:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[shard]}"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield _Lines(progress).listen


class _Lines:
    """One line for each shard that is worked on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def listen(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, OutcomeReached):
            task = self._tasks.pop(event.shard, None)
            if task is not None:
                self._progress.remove_task(task)
            self._progress.print(Text(f"{event.shard}  {event.outcome}  {event.detail}".rstrip()))
            return
        if isinstance(event, Warned):
            self._progress.print(Text.assemble(f"{event.shard}  ", ("warning: ", "yellow"), event.message))
            return
        text = _describe(event)
        if text is None:
            return
        if event.shard not in self._tasks:
            self._tasks[event.shard] = self._progress.add_task(text, total=None, shard=event.shard)
        self._progress.update(self._tasks[event.shard], description=text)


def _describe(event: Event) -> str | None:
    match event:
        case StepStarted():
            return f"{event.revision} step {event.step}: {event.kind}"
        case BatchDone():
            of = f" of ~{event.rows_estimated:,}" if event.rows_estimated else ""
            eta = f", {event.eta_s:,.0f} s left" if event.eta_s is not None else ""
            return (
                f"{event.revision} step {event.step}: {event.rows_done:,}{of} rows, {event.rows_per_s:,.0f} rows/s{eta}"
            )
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


# --------------------------------------------------------------------------------------------------------------------
# Results


def show_json(body: object) -> None:
    """Write a result as JSON."""
    sys.stdout.write(json.dumps(body, indent=2, default=str, ensure_ascii=False) + "\n")


def show_report(report: Report, output: str) -> NoReturn:
    """Write every shard's fate and end with the exit code it means."""
    if output == "json":
        show_json(
            {
                "version": 1,
                "done": report.done,
                "shards": [
                    {
                        "shard": one.shard,
                        "outcome": one.outcome.value,
                        "reason": one.reason,
                        "seconds": round(one.seconds, 3),
                        "flags": dict(one.flags),
                    }
                    for one in report
                ],
            }
        )
    else:
        rows = [(one.shard, one.outcome, f"{one.seconds:6.1f} s", one.reason or _flags(one.flags)) for one in report]
        _lines(rows)
        done = sum(one.outcome is Outcome.DONE for one in report)
        tell(f"{done} of {len(report.shards)} shards done")
    raise typer.Exit(0 if report.done else _INTERRUPTED if report.interrupted else 1)


def show_status(found: Sequence[ShardStatus], plans: Sequence[AcceptedPlan], output: str, *, exit_code: bool) -> None:
    """Write where every shard is."""
    if output == "json":
        show_json({"version": 1, "shards": [_status_body(one) for one in found]})
    else:
        head = plans[-1].plan.revision if plans else "none"
        _lines([(one.shard, one.outcome, _applied(one), _joined(_states(one), one.reason)) for one in found])
        behind = sum(one.outcome is not Outcome.DONE for one in found)
        tell(f"head {head}; {len(found) - behind} of {len(found)} shards are there")
    if exit_code and any(one.outcome is not Outcome.DONE for one in found):
        raise typer.Exit(1)


def show_left(found: Sequence[ShardStatus], plans: Sequence[AcceptedPlan], output: str) -> NoReturn:
    """Write what apply would do on every shard; exit 1 if a shard could not be asked."""
    if output == "json":
        show_json({"version": 1, "dry_run": True, "shards": [_status_body(one) for one in found]})
    else:
        for one in found:
            if not one.left:
                tell(f"{one.shard}: {'nothing to do' if one.outcome is Outcome.DONE else one.reason}")
                continue
            tell(f"{one.shard}:")
            for item in one.left:
                tell(f"  {item.plan.revision}" + (f" ({item.plan.message})" if item.plan.message else ""))
                for line in _steps(item.accepted, item.statements, item.target):
                    tell(f"    {line}")
        tell(f"nothing was changed; head is {plans[-1].plan.revision if plans else 'none'}")
    unknown = any(one.records is None and one.outcome not in {Outcome.DONE, Outcome.PENDING} for one in found)
    raise typer.Exit(1 if unknown else 0)


def _steps(accepted: AcceptedPlan, statements: Sequence[int], target: State | None) -> Iterator[str]:
    for number in statements:
        sql = getattr(accepted.plan.steps[number - 1], "sql", "")
        yield f"{number}. {' '.join(sql.split())}{_lock(accepted, number)}"
    if target is not None:
        yield f"{accepted.plan.flag} → {target.name}" + (
            f", moving {', '.join(move.table for _, move in accepted.plan.moves)}" if accepted.plan.moves else ""
        )


def show_gate(found: Sequence[ShardStatus], what: str, level: str | None, output: str) -> NoReturn:
    """Say for every shard whether it is there, and exit 1 unless all are."""
    verdicts = [(one, *_passes(one, what, level)) for one in found]
    if output == "json":
        show_json(
            {
                "version": 1,
                "open": all(passed for _, passed, _ in verdicts),
                "shards": [{"shard": one.shard, "there": passed, "reason": why} for one, passed, why in verdicts],
            }
        )
    else:
        wanted = what if level is None else f"{what} {level}"
        for one, passed, why in verdicts:
            if not passed:
                tell(f"{one.shard}  {why}")
        tell(f"{wanted}: {sum(passed for _, passed, _ in verdicts)} of {len(verdicts)} shards are there")
    raise typer.Exit(0 if all(passed for _, passed, _ in verdicts) else 1)


def _passes(one: ShardStatus, what: str, level: str | None) -> tuple[bool, str]:
    if one.records is None:
        return False, one.reason or "no ledger; `shardmig apply` installs it"
    if level is None:
        return True, ""
    row = one.records.flags.get(what)
    if row is None:
        return False, f"{what} is not begun there"
    if level == "structure":
        unfinished = [
            step.number
            for step in one.records.steps.values()
            if step.revision == row.revision and step.kind == "statement" and not step.done
        ]
        return not unfinished, f"steps {unfinished} of {row.revision} are not done" if unfinished else ""
    state, wanted = State(row.state), State[level.upper()]
    return state >= wanted, "" if state >= wanted else f"{what} is {state.name}"


def show_history(found: Sequence[ShardStatus], output: str) -> None:
    """Write the logs of shards, the plans applied among them, oldest first."""
    if output == "json":
        show_json({"version": 1, "shards": [{"shard": one.shard, "log": _log_body(one)} for one in found]})
        return
    for one in found:
        tell(f"{one.shard}: {one.reason}" if one.records is None else f"{one.shard}:")
        for line in _log_body(one):
            change = f"{line['before'] or ''} → {line['after'] or ''}" if line["after"] else ""
            what = _joined(str(line["flag"] or line["revision"] or ""), change, sep=" ")
            why = f" “{line['reason']}”" if line["reason"] else ""
            tell(f"  {line['at']:%Y-%m-%d %H:%M:%S}  {line['action']:<12} {what}  by {line['by']}{why}")


def _log_body(one: ShardStatus) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {
            "at": line.at,
            "action": line.action,
            "flag": line.flag,
            "revision": line.revision,
            "before": line.before,
            "after": line.after,
            "reason": line.reason,
            "by": line.os_user or line.session_user_name,
        }
        for line in one.log
    ]
    for row in one.records.migrations.values() if one.records else ():
        lines.append({"at": row.started_at, "action": "begin", "revision": row.revision, "by": row.started_by})
        if row.finished_at is not None:
            lines.append({"at": row.finished_at, "action": "finish", "revision": row.revision, "by": row.started_by})
    blank = {"flag": None, "revision": None, "before": None, "after": None, "reason": None}
    return sorted(({**blank, **line} for line in lines), key=lambda line: line["at"])


def _status_body(one: ShardStatus) -> dict[str, Any]:
    records = one.records
    return {
        "shard": one.shard,
        "outcome": one.outcome.value,
        "reason": one.reason,
        "revision": _applied(one),
        "flags": {row.flag: State(row.state).name for row in records.flags.values()} if records else {},
        "maintenance": ("off", "read-only", "offline")[records.maintenance] if records else None,
        "runner": records.holder if records else None,
        "left": [
            {
                "revision": item.plan.revision,
                "statements": list(item.statements),
                "target": item.target.name if item.target is not None else None,
            }
            for item in one.left
        ],
        "moves": [
            {"revision": s.revision, "step": s.number, "status": s.status, "rows": s.rows, "of": s.rows_estimated}
            for s in (records.steps.values() if records else ())
            if s.kind == "move"
        ],
    }


def _applied(one: ShardStatus) -> str:
    """Name the newest revision whose plan is finished there."""
    finished = [row.revision for row in one.records.migrations.values() if row.finished_at] if one.records else []
    return finished[-1] if finished else "-"


def _states(one: ShardStatus) -> str:
    return _flags((row.flag, State(row.state).name) for row in one.records.flags.values()) if one.records else ""


def _flags(flags: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{flag} {state}" for flag, state in flags)


def _joined(*parts: str, sep: str = "; ") -> str:
    return sep.join(part for part in parts if part)


def _lines(rows: Sequence[tuple[str, Outcome, str, str]]) -> None:
    """Write one line a shard, in columns."""
    name = max((len(row[0]) for row in rows), default=0)
    middle = max((len(row[2]) for row in rows), default=0)
    for shard, outcome, detail, rest in rows:
        colour = _COLOURS.get(outcome, "red")
        line = Text.assemble(f"{shard:<{name}}  ", (f"{outcome.value:<14}", colour), f"{detail:<{middle}}  {rest}")
        line.rstrip()
        out.print(line)


def show_plans(plans: Sequence[tuple[AcceptedPlan, bool]], output: str, *, written: bool) -> None:
    """Write plans: their files as they are, a line a step, or JSON."""
    if output == "json":
        bodies = [
            {**accepted.plan.model_dump(mode="json"), "sha256": accepted.plan.sha256, "locks": accepted.locks}
            for accepted, _ in plans
        ]
        show_json({"version": 1, "plans": bodies})
    elif output == "sql":
        for accepted, _ in plans:
            tell(planfile.dumps(accepted.plan))
    else:
        for accepted, changed in plans:
            note = "" if not changed else "  (written)" if written else "  (would be written)"
            tell(f"{accepted.plan.revision}{note}")
            for number, step in enumerate(accepted.plan.steps, 1):
                tell(f"  {number}. {_step(step)}" + _lock(accepted, number))


def _step(step: Step) -> str:
    match step:
        case Statement():
            return " ".join(step.sql.split()) + ("" if step.transactional else "  -- outside a transaction")
        case Move():
            into = f" into {step.target}" if step.target else ""
            return f"move {step.table}{into} by ({', '.join(step.key)}): fills {', '.join(step.writes)}"
        case Switch():
            return f"switch to {step.to.name}"


def _lock(accepted: AcceptedPlan, number: int) -> str:
    return f"   -- locks {accepted.locks[number]}" if number in accepted.locks else ""


def show_steps(found: Sequence[ShardStatus], plan: Plan, output: str) -> None:
    """Write where each step of a plan is on each shard, and what differs from the plan that was begun there."""
    bodies = [_steps_body(one, plan) for one in found]
    if output == "json":
        show_json({"version": 1, "revision": plan.revision, "shards": bodies})
        return
    for body in bodies:
        tell(f"{body['shard']}: {body['state'] or body['reason'] or 'not begun'}")
        for step in body["steps"]:
            rows = f", {step['rows']:,} rows in {step['batches']:,} batches" if step["kind"] == "move" else ""
            error = f": {step['error']}" if step["error"] else ""
            tell(f"  {step['number']}. {step['kind']} {step['status']}{rows}{error}")
        if body["difference"]:
            tell(body["difference"])


def _steps_body(one: ShardStatus, plan: Plan) -> dict[str, Any]:
    records = one.records
    begun = records.migrations.get(plan.revision) if records else None
    difference = ""
    if begun is not None and begun.sha256 != plan.sha256:
        difference = planfile.difference(planfile.loads(begun.plan), plan, names=("begun", "committed"))
    return {
        "shard": one.shard,
        "reason": one.reason,
        "state": records.state(plan.flag).name if records and begun else None,
        "difference": difference,
        "steps": [
            {
                "number": step.number,
                "kind": step.kind,
                "status": step.status,
                "rows": step.rows,
                "batches": step.batches,
                "error": step.error,
            }
            for step in (records.steps.values() if records else ())
            if step.revision == plan.revision
        ],
    }
