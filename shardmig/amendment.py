"""
Amending: on one shard whose data breaks a step, the steps not finished there give way to the committed, reviewed plan.

What is finished is never touched, and the ledger keeps both plans word for word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig import planfile
from shardmig.errors import PlanChanged
from shardmig.ledger import os_user, translated
from shardmig.plan import Move, step_sha256
from shardmig.session import Query
from shardmig.todo import is_as_good_as_done, unamendable
from shardmig.turn import in_turn

if TYPE_CHECKING:
    from shardmig.plan import AcceptedPlan
    from shardmig.records import Records
    from shardmig.session import Session

__all__ = ["amend", "amendable"]


def amendable(accepted: AcceptedPlan, records: Records) -> bool:
    """
    Say whether a shard's plan is to be replaced by the committed one.

    Returns:
        False when the shard has the committed plan already, finished the one that it amends, or has yet to begin.

    Raises:
        PlanChanged: it may not be replaced; every reason is listed.
    """
    plan = accepted.plan
    row = records.migrations.get(plan.revision)
    if row is None or row.sha256 == accepted.sha256 or is_as_good_as_done(plan, row, shard=records.shard):
        return False
    begun = planfile.loads(row.plan, name=f"{plan.revision} in the ledger")
    problems = unamendable(begun, plan, records)
    if row.sha256 not in plan.amends:
        problems.append(f'the script does not say amends = ("{row.sha256}",), which is how reviewers know')
    if problems:
        difference = planfile.difference(begun, plan, names=("begun", "committed"))
        raise PlanChanged(
            f"{records.shard}: {plan.revision} cannot be amended there: {'; '.join(problems)}:\n{difference}"
        )
    return True


async def amend(session: Session, accepted: AcceptedPlan, records: Records, *, reason: str) -> None:
    """
    Replace what is not finished of a plan, in one transaction; `amendable` has allowed it.

    The progress of a move that is replaced is forgotten: its new statements write every row again. A pause is not: an
    operator wants the flag's moves to rest, whatever they are.

    Raises:
        SwitchedMeanwhile: the flag is not as it was read, so nor is what is finished; nothing was replaced.
    """
    plan, shard = accepted.plan, session.shard.name
    open_numbers = [
        number
        for number in range(1, len(plan.steps) + 1)
        if (plan.revision, number) not in records.steps or not records.steps[plan.revision, number].done
    ]
    steps = [plan.steps[number - 1] for number in open_numbers]
    moves = any(isinstance(step, Move) for step in steps)  # one that was added moves rows, too, before LIVE
    which, flag = (shard, plan.revision), records.flags[plan.flag]
    async with in_turn(session) as turn:
        with translated(shard):
            await session.transact(
                [
                    turn.hold(),
                    Query(  # no edge; the flag as it was read is locked first, as whoever switches does
                        "SELECT shardmig.take_edge($1, $2, $3, $3, $4)", (shard, flag.flag, flag.state, flag.epoch)
                    ),
                    Query(
                        "INSERT INTO shardmig.amendment (shard, revision, sha256, plan, reason) "
                        "SELECT shard, revision, sha256, plan, $3 FROM shardmig.migration "
                        "WHERE shard = $1 AND revision = $2",
                        (*which, reason),
                    ),
                    Query(
                        "UPDATE shardmig.migration SET sha256 = $3, plan = $4 WHERE shard = $1 AND revision = $2",
                        (*which, accepted.sha256, planfile.dumps(plan)),
                    ),
                    Query(_REMEMBER_PAUSE, which),
                    Query("DELETE FROM shardmig.step WHERE shard = $1 AND revision = $2 AND status <> 'DONE'", which),
                    Query(
                        "INSERT INTO shardmig.step (shard, revision, number, kind, sha256, paused) "
                        "SELECT $1, $2, n, k, h, "
                        "CASE k WHEN 'move' THEN nullif(current_setting('shardmig.paused'), '') END "
                        "FROM unnest($3::int[], $4::text[], $5::text[]) AS s (n, k, h)",
                        (*which, open_numbers, [step.kind for step in steps], [step_sha256(step) for step in steps]),
                    ),
                    Query(
                        "UPDATE shardmig.flag SET cross_table = $3, touch_source = $4, needs = $5, "
                        "new_valid = new_valid AND NOT $6::boolean WHERE shard = $1 AND revision = $2",
                        (*which, plan.cross_table, plan.touch_source, list(plan.needs), moves),
                    ),
                    Query(
                        "INSERT INTO shardmig.log (shard, action, revision, before, after, reason, os_user) "
                        "VALUES ($1, 'amend', $2, $3, $4, $5, $6)",
                        (*which, records.migrations[plan.revision].sha256, accepted.sha256, reason, os_user()),
                    ),
                ]
            )


# Locked, so that no pause and no resume comes in between.
_REMEMBER_PAUSE = """
SELECT set_config('shardmig.paused', coalesce(max(paused), ''), true) FROM (
    SELECT paused FROM shardmig.step WHERE shard = $1 AND revision = $2 FOR UPDATE) AS steps
"""
