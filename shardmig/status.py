"""Where one shard is, in words: what its ledger says, what is left to do there, what is wrong or in the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardmig import ledger
from shardmig.adoption import unadopted
from shardmig.errors import PlanChanged, PreflightFailed
from shardmig.estimates import forecasts
from shardmig.handshake import READ_ONLY
from shardmig.outcomes import Outcome
from shardmig.progress import is_under_way, state_of
from shardmig.records import Records, read_log, read_records
from shardmig.states import State
from shardmig.switching import still_open
from shardmig.todo import ahead, pending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.config import Config
    from shardmig.estimates import Forecast
    from shardmig.plan import AcceptedPlan
    from shardmig.records import LogRow, StepRow
    from shardmig.session import Session
    from shardmig.todo import Held, Todo, Until

__all__ = ["ShardStatus", "read_status", "with_forecasts"]

_REVISIONS_NAMED = 4  # of what is left; more are told by the first and the last


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """
    Where one shard is.

    Attributes:
        shard: its name.
        outcome: DONE, PENDING, MAINTENANCE, PLAN_CHANGED, or why it could not be asked.
        reason: what is left or wrong; empty when done.
        records: what its ledger says; None without a ledger or a connection.
        left: what `apply` would do, in order.
        log: the append-only log, if it was asked for.
        forecasts: what each move that is left would take, if that was asked for.
        refused: why the shard would refuse what is left, if that was asked for; empty when it would not.
        held: what each flag waits for that does not go on by itself.
    """

    shard: str
    outcome: Outcome
    reason: str = ""
    records: Records | None = None
    left: tuple[Todo, ...] = ()
    log: tuple[LogRow, ...] = ()
    forecasts: tuple[Forecast, ...] = ()
    refused: str = ""
    held: tuple[str, ...] = ()


async def read_status(
    session: Session,
    config: Config,
    plans: Sequence[AcceptedPlan],
    *,
    history: Sequence[AcceptedPlan],
    until: Until,
    vouched: bool,
    log: bool,
) -> ShardStatus:
    """
    Ask a shard where it is; changes nothing.

    Args:
        session: a session on the shard.
        config: says what was adopted.
        plans: what is meant to be there, in order.
        history: all plans, in order.
        until: how far each of `plans` is meant to go.
        vouched: somebody says that every process which runs knows the flags.
        log: whether to read the log too.
    """
    shard = session.shard.name
    records = await read_records(session, known={accepted.sha256 for accepted in history})
    lines = tuple(await read_log(session)) if log and records else ()
    try:
        todo, held = pending(plans, records or Records(shard), until=until, history=history, vouched=vouched)
    except PlanChanged as changed:
        return ShardStatus(shard, Outcome.PLAN_CHANGED, str(changed), records, (), lines)
    reasons = [*(kept := tuple(map(_keeps, held)))]
    if records is not None and (further := ahead(history, records)):
        reasons.append(further)
    if refused := unadopted(config, records or Records(shard)):
        reasons.append(refused)
    if session.read_only:
        reasons.append(f"read-only ({READ_ONLY}), so nothing can be applied")
    if todo:
        reasons.append(f"left: {_named([item.plan.revision for item in todo])}")
    if records is not None:
        reasons += await _at_work(session, records, held, left=bool(todo) or records.maintenance > 0)
        reasons += _recorded(records)
    if records is not None and records.maintenance:
        outcome = Outcome.MAINTENANCE
        reasons.insert(0, records.reason or "no reason given")
    else:
        outcome = Outcome.PENDING if todo or held or refused else Outcome.DONE
    return ShardStatus(shard, outcome, "; ".join(reasons), records, todo, lines, refused=refused, held=kept)


async def with_forecasts(session: Session, config: Config, found: ShardStatus) -> ShardStatus:
    """Try, and roll back, what tells how long the moves that are left take there, or why they are refused."""
    records = found.records or Records(found.shard)
    try:
        await session.refuse_read_only()
        return replace(found, forecasts=await forecasts(session, config, found.left, records))
    except PreflightFailed as refused:
        return replace(found, refused=str(refused))


def _keeps(held: Held) -> str:
    if held.unvouched:
        return f"{held.flag} waits for somebody who vouches (--aware RELEASE)"
    if held.needs:
        return f"{held.flag} waits for {' and '.join(held.needs)}"
    return f"{held.flag} {'has to be filled in' if held.unfilled else 'is held at'} {held.state.name}"


def _named(revisions: Sequence[str]) -> str:
    if len(revisions) > _REVISIONS_NAMED:
        return f"{revisions[0]} … {revisions[-1]} ({len(revisions)} revisions)"
    return ", ".join(revisions)


async def _at_work(session: Session, records: Records, held: Sequence[Held], *, left: bool) -> list[str]:
    """Say who works there, or left something undone, and who is in the way."""
    if records.holder is None:
        return []
    if not records.at_work:
        goes_on = _goes_on(records, held) or ("apply again" if left else None)
        seen = f" (last seen {records.seen_at:%Y-%m-%d %H:%M:%S %Z})" if records.seen_at else ""
        return [f"nobody is at work; left by {records.holder}, who is gone{seen}: {goes_on}"] if goes_on else []
    in_the_way = await still_open(session)
    return [
        f"worked on by {records.holder}",
        *(f"oldest transaction there: {blocker}" for blocker in in_the_way[:1]),
    ]


def _goes_on(records: Records, held: Sequence[Held]) -> str | None:
    """Say what goes on where a switch was left in the midst of a move; None elsewhere: the rest is `apply`'s."""
    people = {one.flag for one in held if one.switched_back}
    for step in filter(is_under_way, records.steps.values()):
        flag = records.migrations[step.revision].flag
        if step.direction == "back" and records.state(flag) is State.LIVE:
            return f"`shardmig switch {flag} {State.DUAL.name} --shard {records.shard}` goes on back"
        if step.direction == "forward" and flag in people:
            return f"`shardmig switch {flag} {State.LIVE.name} --shard {records.shard}` goes on"
    return None


def _recorded(records: Records) -> list[str]:
    """Say what failed and was not tried again since, where moves stand, and whether the ledger is an old one."""
    steps = records.steps.values()
    said = [_failed(step, records) for step in steps if step.status == "FAILED"]
    said += [stands for step in steps if (stands := state_of(step, at_work=records.works_on(step)))]
    if records.version < ledger.newest():
        said.append(f"its ledger is version {records.version}, the next apply brings it to {ledger.newest()}")
    return said


def _failed(step: StepRow, records: Records) -> str:
    """Say why a step failed; what did so in an earlier run is not how the present one goes."""
    reason = (step.error or "").removeprefix(f"{records.shard}, ").partition("\n")[0]
    before = records.at_work and not records.works_on(step)
    return f"failed before, not tried again yet: {reason}" if before else f"failed: {reason}"
