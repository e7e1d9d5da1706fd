"""Results of verbs that look at shards or change them: one line a shard, or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from shardmig import planfile
from shardmig.cli import overview
from shardmig.cli.console import INTERRUPTED, show_json, tell
from shardmig.cli.plans import lock_note
from shardmig.outcomes import Outcome
from shardmig.progress import moved_of, rests_of
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardmig.outcomes import Report, ShardReport
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.records import Records, StepRow
    from shardmig.status import ShardStatus

__all__ = ["show_gate", "show_history", "show_left", "show_report", "show_same", "show_status", "show_steps"]

_SHA256 = 64  # characters
_SURE = frozenset({Outcome.DONE, Outcome.PENDING, Outcome.MAINTENANCE})  # what a status says of a shard that answered
_ASKED = _SURE | {Outcome.PLAN_CHANGED}


def show_report(report: Report, output: str, *, wide: bool = False) -> NoReturn:
    """Write every shard's fate, `wide` on a line each however many there are, and end with the exit code it means."""
    if output == "json":
        show_json(
            {
                "version": 1,
                "done": report.done,
                "outcomes": {outcome.value: len(shards) for outcome, shards in report.by_outcome().items()},
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
        alone = wide or len(report.shards) <= overview.SHARDS
        table = overview.FlagTable({one.shard: dict(one.flags) for one in report if one.flags}, alone=alone)
        said = overview.told((one.shard, one.reason) for one in report)
        overview.lines(_fates(report, {name: reason or table.of(name) for name, reason in said.items()}, wide=wide))
        for line in table.told_once():
            tell(line)
        done = sum(one.outcome is Outcome.DONE for one in report)
        tell(f"{done} of {len(report.shards)} shards done{overview.others(one.outcome for one in report)}")
    raise typer.Exit(0 if report.done else INTERRUPTED if report.interrupted else 1)


def _fates(report: Report, rest: Mapping[str, str], *, wide: bool) -> list[overview.Row]:
    """Give each shard a line; of many, those that ended alike share one, with the longest time, and failures do not."""
    groups: dict[tuple[Outcome, str, str | None], list[ShardReport]] = {}
    for one in report:
        alone = wide or len(report.shards) <= overview.SHARDS or one.outcome not in overview.ALIKE
        groups.setdefault((one.outcome, rest[one.shard], one.shard if alone else None), []).append(one)
    return [
        overview.Row(
            overview.named([one.shard for one in alike]), outcome, f"{max(one.seconds for one in alike):6.1f} s", said
        )
        for (outcome, said, _), alike in groups.items()
    ]


def show_status(
    found: Sequence[ShardStatus],
    plans: Sequence[AcceptedPlan],
    output: str,
    *,
    only: Sequence[str] = (),
    wide: bool = False,
) -> None:
    """Write where every shard is; `only` these flags, and `wide` whatever there is on a line a shard."""
    if output == "json":
        show_json({"version": 1, "shards": [_status_body(one, only) for one in found]})
    else:
        head = plans[-1].plan.revision if plans else "none"
        overview.show(found, head=head, flags=[accepted.plan.flag for accepted in plans], only=only, wide=wide)


def show_left(found: Sequence[ShardStatus], plans: Sequence[AcceptedPlan], output: str) -> NoReturn:
    """Write what apply would do on every shard; exit 1 if a shard could not be asked, or would refuse it."""
    if output == "json":
        show_json(
            {"version": 1, "dry_run": True, "shards": [{**_status_body(one), **_forecast_body(one)} for one in found]}
        )
    else:
        for line in _left(found):
            tell(line)
        tell(f"nothing was changed; head is {plans[-1].plan.revision if plans else 'none'}")
    raise typer.Exit(0 if all(one.outcome in _SURE and not one.refused for one in found) else 1)


def _left(found: Sequence[ShardStatus]) -> Iterator[str]:
    """Say what is left; shards of which the same is to be said share it, and only how long moves take may differ."""
    said = overview.told((one.shard, one.reason) for one in found)
    groups: dict[tuple[tuple[str, ...], str], list[ShardStatus]] = {}
    for one in found:
        nothing = "" if one.left else "nothing to do" if one.outcome is Outcome.DONE else said[one.shard]
        groups.setdefault((tuple(_tasks(one, "NAME")), nothing), []).append(one)
    for (_, nothing), alike in groups.items():
        names = overview.named([one.shard for one in alike])
        if nothing:
            yield f"{names}: {nothing}"
            continue
        first, together = alike[0], len({tuple(map(str, one.forecasts)) for one in alike}) == 1
        yield f"{names}:"
        for line in _tasks(first, first.shard if len(alike) == 1 else "NAME", takes=together):
            yield f"  {line}"
        if not together:
            yield from _takes(alike)


def _tasks(one: ShardStatus, name: str, *, takes: bool = False) -> Iterator[str]:
    """Yield what is to be done on a shard, or why that would be refused, which is said of `name`."""
    for item in one.left:
        yield item.plan.revision + (f" ({item.plan.message})" if item.plan.message else "")
        for line in _steps(item.accepted, item.statements, item.target):
            yield f"  {line}"
        yield from (f"  {each}" for each in one.forecasts if takes and each.revision == item.plan.revision)
    yield from one.held if one.left else ()
    if one.left and one.refused:
        refused = overview.own(one.shard, one.refused)
        yield f"would be refused: {refused.replace(f'--shard {one.shard}', f'--shard {name}')}"


def _takes(alike: Sequence[ShardStatus]) -> Iterator[str]:
    """Say how long moves take on each of some shards."""
    groups: dict[str, list[str]] = {}
    for one in alike:
        for each in one.forecasts:
            groups.setdefault(f"{each.revision}: {each}", []).append(one.shard)
    for said, shards in groups.items():
        yield f"  {overview.named(shards)}: {said}"


def _forecast_body(one: ShardStatus) -> dict[str, Any]:
    moves = [
        {"revision": each.revision, "step": each.number, "table": each.table, **asdict(each.estimate)}
        for each in one.forecasts
    ]
    return {"forecasts": moves, "refused": one.refused or None}


def _steps(accepted: AcceptedPlan, statements: Sequence[int], target: State | None) -> Iterator[str]:
    for number in statements:
        sql = getattr(accepted.plan.steps[number - 1], "sql", "")
        yield f"{number}. {' '.join(sql.split())}{lock_note(accepted, number)}"
    if target is not None:
        yield f"{accepted.plan.flag} → {target.name}" + (
            f", moving {', '.join(move.table for _, move in accepted.plan.moves)}" if accepted.plan.moves else ""
        )
    if accepted.plan.filled_elsewhere and target is State.DUAL:
        yield "   fill what is new there, then `shardmig apply --until filled`"


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
                tell(f"{one.shard}  {overview.brief(one.shard, why)}")
        tell(f"{wanted}: {sum(passed for _, passed, _ in verdicts)} of {len(verdicts)} shards are there")
    raise typer.Exit(0 if all(passed for _, passed, _ in verdicts) else 1)


def _passes(one: ShardStatus, what: str, level: str | None) -> tuple[bool, str]:
    if one.records is None or one.outcome is Outcome.PLAN_CHANGED:
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


def show_same(found: Sequence[ShardStatus], output: str) -> NoReturn:
    """Say in what two shards differ, and exit 1 unless in nothing."""
    one, other = found
    differences = list(_differences(one, other))
    if output == "json":
        show_json({"version": 1, "same": not differences, "differences": differences})
    else:
        for line in differences:
            tell(line)
        tell(f"{one.shard} and {other.shard} " + ("differ" if differences else "are the same"))
    raise typer.Exit(1 if differences else 0)


def _differences(one: ShardStatus, other: ShardStatus) -> Iterator[str]:
    for status in (one, other):
        if status.records is None:
            yield f"{status.shard}: {status.reason or 'no ledger'}"
    if one.records is None or other.records is None:
        return
    for what, left, right in (
        ("plan of", _plans_of(one.records), _plans_of(other.records)),
        ("flag", _states_of(one.records), _states_of(other.records)),
    ):
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                here, there = left.get(name, "not there"), right.get(name, "not there")
                yield f"{what} {name}: {one.shard} {here}; {other.shard} {there}"


def _plans_of(records: Records) -> dict[str, str]:
    """Name each plan by its hash; one that is not finished is like no other."""
    return {
        row.revision: row.sha256[:12] + ("" if row.finished_at else f" (not finished on {records.shard})")
        for row in records.migrations.values()
    }


def _states_of(records: Records) -> dict[str, str]:
    """Name each flag's state, and which representation holds all rows: a flip back may do without a check there."""
    return {
        name: _joined(
            records.state(name).name,
            *(f"{side} valid" for side, valid in (("old", row.old_valid), ("new", row.new_valid)) if valid),
            sep=", ",
        )
        for name, row in records.flags.items()
    }


def show_history(found: Sequence[ShardStatus], output: str) -> NoReturn:
    """Write the logs of shards, the plans applied among them, oldest first; exit 1 if one could not be asked."""
    if output == "json":
        show_json({"version": 1, "shards": [{"shard": one.shard, "log": _log_body(one)} for one in found]})
    for one in found if output != "json" else ():
        tell(f"{one.shard}: {overview.brief(one.shard, one.reason)}" if one.records is None else f"{one.shard}:")
        for line in _log_body(one):
            change = f"{_short(line['before'])} → {_short(line['after'])}" if line["after"] else ""
            what = _joined(str(line["flag"] or line["revision"] or ""), change, sep=" ")
            why = f" “{line['reason']}”" if line["reason"] else ""
            tell(f"  {line['at'].isoformat(timespec='seconds')}  {line['action']:<12} {what}  by {line['by']}{why}")
    raise typer.Exit(0 if all(one.outcome in _ASKED for one in found) else 1)


def _short(value: str | None) -> str:
    """Cut a plan's hash to what people compare."""
    return value[:12] if value is not None and len(value) == _SHA256 else value or ""


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
            lines.append({"at": row.finished_at, "action": "finish", "revision": row.revision, "by": row.finished_by})
    blank = {"flag": None, "revision": None, "before": None, "after": None, "reason": None}
    return sorted(({**blank, **line} for line in lines), key=lambda line: line["at"])


def _status_body(one: ShardStatus, only: Sequence[str] = ()) -> dict[str, Any]:
    records = one.records
    rows = [row for row in records.flags.values() if not only or row.flag in only] if records else []
    return {
        "shard": one.shard,
        "outcome": one.outcome.value,
        "reason": one.reason,
        "revision": overview.applied(one),
        "flags": {row.flag: State(row.state).name for row in rows},
        "maintenance": ("off", "read-only", "offline")[records.maintenance] if records else None,
        "runner": records.holder if records and records.at_work else None,
        "left": [
            {
                "revision": item.plan.revision,
                "statements": list(item.statements),
                "target": item.target.name if item.target is not None else None,
            }
            for item in one.left
        ],
        "moves": [
            _move_body(step, at_work=records.works_on(step)) for step in records.steps.values() if step.kind == "move"
        ]
        if records
        else [],
    }


def _move_body(step: StepRow, *, at_work: bool) -> dict[str, Any]:
    moved = moved_of(step, at_work=at_work)
    return {
        "revision": step.revision,
        "step": step.number,
        "status": step.status,
        "rows": step.rows,
        "of": step.rows_estimated,
        "compared": moved.compared,
        "percent": moved.percent,
        "rows_per_s": moved.rows_per_s,
        "eta_s": moved.eta_s,
        "waiting": rests_of(step, at_work=at_work),
    }


def _joined(*parts: str, sep: str = "; ") -> str:
    return sep.join(part for part in parts if part)


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
