"""`shardmig verify`: do the shards look as the plans say, and so like each other?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardmig.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.catalog import Difference
    from shardmig.cli.project import Project
    from shardmig.config import Shard
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan
    from shardmig.verification import Disagreeing, Verdict

__all__ = ["register", "verify"]

_NAMED = 8  # shards of a group that are named on its line


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(verify)


def verify(
    shard: options.Shards = None,
    everything: options.All = False,
    wave: options.Wave = None,
    tag: options.Tag = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FLAG", help="Also compare the rows that this flag's move moves.")
    ] = None,
    mismatches: options.Mismatches = None,
    expect: options.Expect = None,
    jobs: options.Jobs = None,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Compare shards with what the committed plans make of an empty server; exit 1 when something differs."""
    from shardmig.cli import console, progress, project
    from shardmig.errors import ConfigError

    if mismatches is not None and data is None:
        raise ConfigError("--mismatches is about rows: say whose with --data FLAG")
    here = project.load(config)
    chosen = options.targets(here.config, shard, everything=everything, wave=wave, tag=tag, expect=expect)
    at_once = jobs or here.config.rollout.jobs
    moved = here.plan_of_flag(data) if data is not None else None
    with progress.exporting(mismatches, [moved] if moved else []) as file:
        verdicts = _verdicts(here, chosen, at_once)
        rows = _rows(here, moved, chosen, at_once, file) if moved is not None else []
    in_vain = bool(rows) and all(one.note for one in rows)
    sound = all(verdict.sound for verdict in verdicts) and not any(one.rows or one.problem for one in rows)
    sound = sound and not in_vain
    if output == "json":
        console.show_json(_body(verdicts, rows, sound=sound))
    else:
        _show(verdicts, len(here.plans))
        _show_rows(rows)
        if in_vain:
            console.tell(f"no row was compared, so nothing is known of the rows of {data}")
    raise typer.Exit(0 if sound else 1)


def _verdicts(here: Project, chosen: Sequence[Shard], jobs: int) -> list[Verdict]:
    from shardmig.scratch import scratch
    from shardmig.verification import verify

    if here.config.lint.start_after:  # nothing of ours makes what was there before
        return asyncio.run(verify(here.config, here.plans, chosen, None, jobs=jobs))
    with scratch(here.config, here.plans) as server:
        return asyncio.run(verify(here.config, here.plans, chosen, server, jobs=jobs))


def _rows(
    here: Project, moved: AcceptedPlan, chosen: Sequence[Shard], jobs: int, file: Mismatches | None
) -> list[Disagreeing]:
    from shardmig.verification import verify_rows

    return asyncio.run(verify_rows(here.config, moved, chosen, jobs=jobs, mismatches=file))


# --------------------------------------------------------------------------------------------------------------------
# Results


def _show(verdicts: Sequence[Verdict], plans: int) -> None:
    from shardmig.cli import console
    from shardmig.cli.overview import own
    from shardmig.verification import alike

    for group, differences in alike(verdicts):
        first = group[0]
        if first.problem is not None:
            console.tell(f"not looked at: {_names(group)}: {own(first.shard, first.problem)}")
        elif not differences:
            console.tell(f"{len(group)} {_shards(group)} as the plans say: {_names(group)}{_behind(group, plans)}")
        else:
            console.tell(f"{len(group)} {_shards(group, verb='differ')}: {_names(group)}")
            for difference in differences:
                console.tell(f"  {_said(difference)}")


def _shards(group: Sequence[Verdict], verb: str = "look") -> str:
    one = {"look": "looks", "differ": "differs"}[verb]
    return f"shard {one}" if len(group) == 1 else f"shards {verb}"


def _names(group: Sequence[Verdict]) -> str:
    names = ", ".join(verdict.shard for verdict in group[:_NAMED])
    return names + (f" and {len(group) - _NAMED} more" if len(group) > _NAMED else "")


def _behind(group: Sequence[Verdict], plans: int) -> str:
    behind = [verdict for verdict in group if verdict.behind]
    if not behind:
        return ""
    named = ", ".join(f"{v.shard} at {v.revision or 'nothing'}, {plans - v.behind} of {plans}" for v in behind[:_NAMED])
    more = f" and {len(behind) - _NAMED} more" if len(behind) > _NAMED else ""
    return f" (behind: {named}{more})"


def _said(difference: Difference) -> str:
    match _what(difference):
        case "missing":
            return f"missing    {difference.kind} {difference.name}: {difference.before}"
        case "extra":
            return f"extra      {difference.kind} {difference.name}: {difference.after}"
        case _:
            return (
                f"different  {difference.kind} {difference.name}: {difference.after}; "
                f"the plans make it {difference.before}"
            )


def _what(difference: Difference) -> str:
    return "missing" if difference.after is None else "extra" if difference.before is None else "different"


def _show_rows(rows: Sequence[Disagreeing]) -> None:
    from shardmig.cli import console
    from shardmig.cli.overview import own

    for one in rows:
        if one.problem or one.note:
            said = own(one.shard, one.problem) if one.problem else f"nothing to compare, {one.note}"
            console.tell(f"{one.shard}  {one.table}: {said} ({one.state})")
        elif one.rows:
            keys = ", ".join("(" + ", ".join(key) + ")" for key in one.keys)
            more = ", …" if one.rows > len(one.keys) else ""
            console.tell(f"{one.shard}  {one.table}: {one.rows} rows disagree in {one.state}, keys {keys}{more}")
        else:
            which = "every row moved so far" if one.moving else "every row"
            console.tell(f"{one.shard}  {one.table}: {which} agrees ({one.state})")


def _body(verdicts: Sequence[Verdict], rows: Sequence[Disagreeing], *, sound: bool) -> dict[str, Any]:
    from shardmig.verification import alike

    return {
        "version": 1,
        "sound": sound,
        "groups": [
            {
                "shards": [verdict.shard for verdict in group],
                "problem": group[0].problem,
                "differences": [
                    {"what": _what(d), "kind": d.kind, "name": d.name, "plans": d.before, "shard": d.after}
                    for d in differences
                ],
            }
            for group, differences in alike(verdicts)
        ],
        "shards": [{"shard": v.shard, "revision": v.revision, "behind": v.behind, "sound": v.sound} for v in verdicts],
        "rows": [
            {
                "shard": one.shard,
                "state": one.state,
                "table": one.table,
                "disagree": one.rows,
                "keys": [list(key) for key in one.keys],
                "note": one.problem or one.note,
                "moving": one.moving,
            }
            for one in rows
        ],
    }
