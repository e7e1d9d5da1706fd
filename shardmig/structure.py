"""
Executing structural statements, each committed with its record.

Those that lock nothing that exists run together, each of the others alone, concurrent indexes outside a transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from shardmig import locking
from shardmig.concurrently import execute_concurrently
from shardmig.errors import StepFailed
from shardmig.ledger import translated
from shardmig.plan import Statement, quote, quote_name
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.config import SessionSettings
    from shardmig.events import Listener
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.steps import Steps
    from shardmig.todo import Todo
    from shardmig.turn import Turn

__all__ = ["Structure", "build_index", "execute_together", "execute_under_lock", "recorded"]


@dataclass(slots=True)
class Structure:
    """
    Executing what is left of the structure of plans.

    Attributes:
        steps: does them.
        settings: of the session.
        fresh: revision and number of the steps that nobody can have done.
    """

    steps: Steps
    settings: SessionSettings
    fresh: set[tuple[str, int]] = field(default_factory=set)

    async def execute(self, item: Todo) -> None:
        """Execute the statements that are left, those that lock nothing existing together, each other one alone."""
        accepted = item.accepted
        free: list[int] = []
        for number in item.statements:
            if number not in accepted.locks and number not in accepted.indexes:
                free.append(number)
                continue
            await self._together(item, free)
            free = []
            self.steps.pass_on()
            if number in accepted.indexes:
                work = partial(build_index, self.steps, accepted, number)
            else:
                work = partial(self._under_lock, accepted, number)
            await self.steps.do(item.plan, number, work)
        await self._together(item, free)

    async def _together(self, item: Todo, numbers: Sequence[int]) -> None:
        if numbers:
            await self.steps.do(item.plan, numbers[0], partial(self._freely, item.accepted, numbers))

    async def _under_lock(self, accepted: AcceptedPlan, number: int) -> None:
        await execute_under_lock(
            self.steps.turn,
            accepted,
            number,
            listener=self.steps.listener,
            fresh=self._are_fresh(accepted.plan, [number]),
        )

    async def _freely(self, accepted: AcceptedPlan, numbers: Sequence[int]) -> None:
        fresh = self._are_fresh(accepted.plan, numbers)
        await execute_together(self.steps.turn, self.settings, accepted, numbers, fresh=fresh)

    def _are_fresh(self, plan: Plan, numbers: Sequence[int]) -> bool:
        """Say whether nobody can have done these steps: true once, for the first try may have happened."""
        steps = {(plan.revision, number) for number in numbers}
        fresh = steps <= self.fresh
        self.fresh -= steps
        return fresh


async def execute_together(
    turn: Turn, settings: SessionSettings, accepted: AcceptedPlan, numbers: Sequence[int], *, fresh: bool = False
) -> None:
    """Execute statements that lock no existing relation, in one transaction with their records."""
    queries: list[Query] = []
    for number in numbers:
        if fresh:
            queries.append(turn.claiming(accepted.plan.revision, number))
        if fresh or not (await turn.claim(accepted.plan.revision, number)).done:
            queries += recorded(turn, accepted, number)
    if not queries:
        return
    limits = {
        "statement_timeout": f"{int(settings.statement_timeout_s * 1000)}ms",
        "lock_timeout": f"{settings.lock_timeout_ms[-1]}ms",
    }
    with translated(turn.shard):
        await turn.session.transact(queries, local=limits)


async def execute_under_lock(
    turn: Turn,
    accepted: AcceptedPlan,
    number: int,
    *,
    listener: Listener | None,
    fresh: bool = False,
) -> None:
    """
    Execute one statement under a lock on an existing relation: record, statement, proof and COMMIT in one flight.

    Of a fresh step, which nobody can have done, the claim travels in that flight too.
    """
    claim = [turn.claiming(accepted.plan.revision, number)] if fresh else []
    if not fresh and (await turn.claim(accepted.plan.revision, number)).done:
        return
    with translated(turn.shard):
        await locking.under_lock(
            turn.session,
            accepted.locks[number],
            [*claim, *recorded(turn, accepted, number)],
            mode=locking.mode_of(_statement(accepted, number).sql),
            further=accepted.locked(number)[1:],
            behind=turn.hold(),
            on_wait=listener,
        )


async def build_index(steps: Steps, accepted: AcceptedPlan, number: int) -> None:
    """
    Build an index CONCURRENTLY: note the intent, build, look whether it is valid, record.

    An INVALID leftover of an interrupted build is dropped CONCURRENTLY and built again; IF NOT EXISTS would keep it.
    """
    turn, name = steps.turn, accepted.indexes[number]
    valid = await _index_is_valid(turn, name)
    # The claim is the intent: without one, whatever bears the name is somebody else's, now and at the next try.
    if valid is not None and not await _was_begun(turn, accepted.plan.revision, number):
        raise StepFailed(
            f"an index {name!r} is there already, not built by this step; drop it or name this one otherwise",
            shard=turn.shard,
        )
    if (await turn.claim(accepted.plan.revision, number)).done:
        return
    if valid is False:
        await execute_concurrently(steps, f"DROP INDEX CONCURRENTLY {quote(name)}")
    if not valid:
        await execute_concurrently(steps, _statement(accepted, number).sql)
    if not await _index_is_valid(turn, name):
        raise StepFailed(f"index {name!r} was built, but is not valid; apply again", shard=turn.shard)
    with translated(turn.shard):
        await turn.session.transact([turn.record_step(accepted.plan.revision, number)])


async def _was_begun(turn: Turn, revision: str, number: int) -> bool:
    found = await turn.session.execute(
        "SELECT attempts > 0 FROM shardmig.step WHERE shard = $1 AND revision = $2 AND number = $3",
        [turn.shard, revision, number],
    )
    return bool(found.value)


async def _index_is_valid(turn: Turn, name: str) -> bool | None:
    """Look an index up; None when there is none of that name."""
    found = await turn.session.execute(
        "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relname = $1 AND n.nspname = current_schema()",
        [name],
    )
    return None if found.value is None else bool(found.value)


def recorded(turn: Turn, accepted: AcceptedPlan, number: int) -> list[Query]:
    """Put the record first, then the statement, then the rights that roles get on the table it creates."""
    queries = [turn.record_step(accepted.plan.revision, number), Query(_statement(accepted, number).sql)]
    if (table := accepted.creates.get(number)) is not None:
        name = quote_name(table)
        for role, rights in turn.session.settings.grant.items():
            queries.append(Query(f"GRANT {rights} ON {name} TO {quote(role)}"))
            queries += _use_of_sequences(name, role)
    return queries


def _use_of_sequences(table: str, role: str) -> list[Query]:
    """Let a role that may insert draw from the sequences of serial columns, which a table's own rights leave out."""
    address = "SELECT set_config('shardmig.table', $1, true), set_config('shardmig.grantee', $2, true)"
    return [Query(address, (table, role)), Query(_GRANT_SEQUENCES)]


def _statement(accepted: AcceptedPlan, number: int) -> Statement:
    step = accepted.plan.steps[number - 1]
    if not isinstance(step, Statement):
        raise TypeError(f"step {number} of {accepted.plan.revision} is no statement")
    return step


# An anonymous block takes no parameters: they travel as settings. Of an identity column nobody asks for the right.
_GRANT_SEQUENCES = """
DO $grant$
DECLARE
    drawn record;
BEGIN
    FOR drawn IN
        SELECT d.objid::regclass AS name FROM pg_depend d
        JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind = 'S'
        WHERE d.refclassid = 'pg_class'::regclass AND d.deptype = 'a'
          AND d.refobjid = current_setting('shardmig.table')::regclass
          AND has_any_column_privilege(current_setting('shardmig.grantee'), d.refobjid, 'INSERT')
    LOOP
        EXECUTE format('GRANT USAGE ON SEQUENCE %s TO %I', drawn.name, current_setting('shardmig.grantee'));
    END LOOP;
END
$grant$
"""
