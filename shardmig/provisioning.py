"""
A new shard after fifty migrations: structure and flags at once, without a drain or rows to move but seeds.

That is sound because nobody was there before: the ledger's first commit registers the shard in maintenance, so that no
application transaction ever begins on it until its flags stand, and every table that a flag is about holds nothing but
what plans seed. That is moved as anywhere, in the order of the plans, but behind closed doors and in one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import ledger, relaxation
from shardmig.checks import shown
from shardmig.errors import CheckFailed, PreflightFailed
from shardmig.keyset import bound
from shardmig.ledger import os_user
from shardmig.patience import refusal
from shardmig.pgerrors import is_connection_lost
from shardmig.plan import Move, Switch, quote_name
from shardmig.records import read_records
from shardmig.session import Query
from shardmig.states import State, route
from shardmig.todo import Until, pending
from shardmig.turn import finish_migration, holder_name, in_turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.records import Records
    from shardmig.runner import Run
    from shardmig.session import Session

__all__ = ["being_provisioned", "lowest_states", "provision"]

_CLOSED = "being provisioned"


def being_provisioned(records: Records) -> bool:
    """Whether a shard is closed because its provisioning, under way or interrupted, has yet to open it."""
    return records.maintenance > 0 and records.reason == _CLOSED


def lowest_states(plans: Sequence[AcceptedPlan], fleet: Sequence[Records]) -> dict[str, State]:
    """Return each flag's lowest state over the fleet: what every release that runs there understands."""
    return {
        accepted.plan.flag: min((records.state(accepted.plan.flag) for records in fleet), default=State.LIVE)
        for accepted in plans
    }


async def provision(run: Run, plans: Sequence[AcceptedPlan], states: Mapping[str, State]) -> bool:
    """
    Bring an empty database to the structure of all plans and each flag to its state, then open it.

    Safe to repeat after an interruption: a shard that is still closed for this reason goes on.

    Args:
        run: on the new shard.
        plans: the whole history.
        states: flag → state, as `lowest_states` found them.

    Returns:
        True when the shard is open; False when a stop ended it at a safe place.

    Raises:
        PreflightFailed: the database is not a new one, or the plans do not make all of it.
    """
    session = run.session
    if after := run.config.lint.start_after:
        raise PreflightFailed(
            f"the structure up to {after} was never made by a plan of shardmig, so an empty database cannot get it; "
            f"let Alembic make that (alembic upgrade {after}), then `shardmig adopt` and `shardmig apply`",
            shard=session.shard.name,
        )
    if await read_records(session) is None:
        await ledger.install(session, closed=_CLOSED)
    records = await run.records()
    if not being_provisioned(records):
        raise PreflightFailed("it is no new shard: its ledger is there; `shardmig apply` goes on", shard=records.shard)
    todo, _ = pending(plans, records, until=Until.STRUCTURE)
    if not await run.apply(todo, records):
        return False
    await _refuse_rows(session, [accepted.plan for accepted in plans if states[accepted.plan.flag] > State.OLD])
    for accepted in plans:
        if states[accepted.plan.flag] is State.DONE:
            await relaxation.relax(session, accepted.plan)
    await _raise_flags(session, [accepted.plan for accepted in plans], states)
    return True


async def _raise_flags(session: Session, plans: Sequence[Plan], states: Mapping[str, State]) -> None:
    """Take every flag to its state, with the rows that seeds bring, and open the shard, in one transaction."""
    shard = session.shard.name
    said = {"shardmig.os_user": os_user(), "shardmig.holder": holder_name()}
    opened = Query("SELECT shardmig.maintenance('off', $2, $1)", (shard, "provisioned"))
    async with in_turn(session) as turn:
        with ledger.translated(shard):
            async with session.transaction(local=said):
                await session.flight([turn.hold()])
                for plan in plans:
                    state = states[plan.flag]
                    if state >= State.LIVE:
                        await _move_rows(session, plan)
                    await session.flight(list(_raised(shard, plan, state)))
                await session.flight([opened])


async def _move_rows(session: Session, plan: Plan) -> None:
    """
    Move all rows and compare them: those that this plan seeds, and what it makes of seeds of the plans before it.

    Raises:
        StepFailed: the server refused the move's SQL.
        CheckFailed: rows disagree; the shard stays closed, and nothing is moved.
    """
    for number, move in plan.moves:
        step = f"{plan.revision} step {number}"
        moving, looks = [bound(move.forward, move, None, None)], [bound(move.check, move, None, None)]
        if move.orphans is not None:  # a move with orphans has a purge; nobody is there who could bring a pair back
            moving.append(bound(str(move.purge), move, None, None, target=True))
            looks.append(bound(move.orphans, move, None, None, target=True))
        try:
            results = await session.flight([*moving, *looks])
        except pg.Error as error:
            if is_connection_lost(error):
                raise
            sql = session.failed.sql if session.failed else ""
            raise refusal(error, sql, move.table, session.shard.name, step) from error
        if wrong := [[str(value) for value in row] for result in results[len(moving) :] for row in result.rows]:
            raise CheckFailed(
                f"{move.table} disagrees after the move: {len(wrong)} rows, keys {shown(wrong)}; the shard stays "
                "closed. Correct the move, and provision again",
                shard=session.shard.name,
                step=step,
            )


async def _refuse_rows(session: Session, plans: Sequence[Plan]) -> None:
    """Refuse tables with rows: whoever filled them did so before the flags said how."""
    tables = sorted({table for plan in plans for _, move in plan.moves for table in (move.table, move.target) if table})
    looks = [Query(f"SELECT EXISTS (SELECT FROM {quote_name(table)})") for table in tables]
    answers = await session.flight(looks) if looks else []
    if filled := [table for table, answer in zip(tables, answers, strict=True) if answer.value]:
        raise PreflightFailed(
            f"it is no new shard: {', '.join(filled)} has rows already, and only a move may say they are right; "
            "`shardmig maintenance off`, then `shardmig apply`",
            shard=session.shard.name,
        )


def _raised(shard: str, plan: Plan, state: State) -> Iterator[Query]:
    """Walk a flag through its edges; what each guard asks for is true of a closed shard whose rows are moved."""
    which = (shard, plan.flag)
    for edge in route(State.OLD, state, has_move=plan.has_move):
        if edge.target is State.LIVE and plan.has_move:
            yield Query("UPDATE shardmig.flag SET drained = true WHERE shard = $1 AND flag = $2", which)
            yield Query(_COMPARED, (shard, plan.revision))
            yield Query("UPDATE shardmig.flag SET new_valid = true WHERE shard = $1 AND flag = $2", which)
        yield Query("UPDATE shardmig.flag SET drained = true WHERE shard = $1 AND flag = $2", which)
        yield Query("UPDATE shardmig.flag SET state = $3 WHERE shard = $1 AND flag = $2", (*which, int(edge.target)))
    yield Query("UPDATE shardmig.flag SET drained = true WHERE shard = $1 AND flag = $2", which)
    done = [
        number
        for number, step in enumerate(plan.steps, 1)
        if (isinstance(step, Switch) and step.to <= state) or (isinstance(step, Move) and state >= State.LIVE)
    ]
    yield Query(
        "UPDATE shardmig.step SET status = 'DONE', finished_at = clock_timestamp(), error = NULL "
        "WHERE shard = $1 AND revision = $2 AND number = ANY ($3::int[])",
        (shard, plan.revision, done),
    )
    if len(plan.steps) == len(done) + sum(not isinstance(step, Switch | Move) for step in plan.steps):
        yield finish_migration(shard, plan.revision)


_COMPARED = """
UPDATE shardmig.step SET direction = 'forward', bounded_at = clock_timestamp(), checked_at = clock_timestamp()
WHERE shard = $1 AND revision = $2 AND kind = 'move'
"""
