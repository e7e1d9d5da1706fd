"""What is left to do on one shard: decided from the plans and the shard's ledger, and from nothing else. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from shardmig import planfile
from shardmig.errors import PlanChanged, ProofFailed
from shardmig.plan import Statement, Switch, step_sha256
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.records import MigrationRow, Records

__all__ = ["Held", "Todo", "Until", "ahead", "is_as_good_as_done", "pending", "unamendable", "waiting"]


class Until(Enum):
    """How far to apply; each includes the ones before."""

    STRUCTURE = "structure"  # tables and columns are there, flags stay OLD
    DUAL = "dual"  # writers keep both representations
    MOVED = "moved"  # every row is moved and checked
    LIVE = "live"  # readers read new, where every row was moved and checked
    FILLED = "filled"  # also where nothing was: somebody says that the application has filled it


@dataclass(frozen=True, slots=True)
class Todo:
    """
    What is left of one plan on one shard.

    Attributes:
        accepted: the plan.
        statements: numbers of the structural steps not done.
        target: the state its flag shall reach; None when the flag is there or shall not move.
        moves_only: in DUAL, rows shall be moved, or at least everybody waited for, without going further.
    """

    accepted: AcceptedPlan
    statements: tuple[int, ...] = ()
    target: State | None = None
    moves_only: bool = False

    @property
    def plan(self) -> Plan:
        """The plan itself."""
        return self.accepted.plan


@dataclass(frozen=True, slots=True)
class Held:
    """
    A flag that waits for people: apply does not overrule them, `shardmig switch` goes forward again.

    Attributes:
        flag: its name.
        state: where it waits.
        unfilled: it is there for the first time, and the application has to fill it.
        unvouched: nobody said that every process which runs knows it.
        needs: flags that must be LIVE first, and will not be.
    """

    flag: str
    state: State
    unfilled: bool = False
    unvouched: bool = False
    needs: tuple[str, ...] = ()

    @property
    def switched_back(self) -> bool:
        """Whether people took it back: nothing else keeps it."""
        return not (self.unfilled or self.unvouched or self.needs)


def pending(
    plans: Sequence[AcceptedPlan],
    records: Records,
    *,
    until: Until = Until.LIVE,
    history: Sequence[AcceptedPlan] = (),
    vouched: bool = True,
) -> tuple[tuple[Todo, ...], tuple[Held, ...]]:
    """
    Decide what is left to do on one shard.

    Args:
        plans: the history up to the revision wanted, in order.
        records: what the ledger says.
        until: how far to go.
        history: the whole history, where `plans` is its beginning: what stands in it is not missing here.
        vouched: flags may leave OLD for DUAL, where a process that does not know them loses what it writes.

    Returns:
        What is left, in the order of the history, and the flags that people hold back.

    Raises:
        PlanChanged: a plan differs from what this shard has begun, its flag is another revision's there, or the
            ledger has a revision that is not here.
        ProofFailed: a step took something away here, and nobody has decided what to do about it.
    """
    for step in records.steps.values():
        if step.disproved is not None:
            raise ProofFailed(
                f"{step.disproved}. `shardmig verify --shard {records.shard}` shows what differs; repair it, or leave "
                f"it, then `shardmig apply --shard {records.shard} --despite-proof --reason TEXT` goes on",
                shard=records.shard,
                step=f"{step.revision} step {step.number}",
            )
    known = {accepted.plan.revision for accepted in (*plans, *history)}
    last = max((records.migrations[r].position for r in known if r in records.migrations), default=0)
    begins = any(accepted.plan.revision not in records.migrations for accepted in plans)
    for row in records.migrations.values():
        # One behind everything known here is somebody else's newer one, and no obstacle until this history goes on too.
        if row.revision not in known and row.position > 0 and (begins or row.position < last):
            raise PlanChanged(
                f"{records.shard}: {row.revision} was begun there and is missing here; bring its script and plan in, "
                f"`shardmig revision --rebase` puts yours behind it"
            )
    todo, held = [], []
    reached: dict[str, State] = {}
    for accepted in plans:
        left, keeps = _left(accepted, records, until, reached, vouched=vouched)
        if left is not None and left.target is not None:
            reached[accepted.plan.flag] = left.target
        if left is not None:
            todo.append(left)
        if keeps is not None:
            held.append(keeps)
    return tuple(todo), tuple(held)


def waiting(records: Records, flag: str, target: State, *, vouched: bool) -> Held | None:
    """Say what keeps a flag in OLD that somebody asks for further on: the same as keeps it there for `pending`."""
    row = records.flags.get(flag)
    if row is None or not records.state(flag) is State.OLD < target:
        return None
    if row.has_move and not vouched:
        return Held(flag, State.OLD, unvouched=True)
    missing = tuple(name for name in row.needs if records.state(name) < State.LIVE)
    return Held(flag, State.OLD, needs=missing) if missing else None


def ahead(history: Sequence[AcceptedPlan], records: Records) -> str:
    """Say which revisions a shard has that this checkout knows nothing of; empty where it has none."""
    known = {accepted.plan.revision for accepted in history}
    newer = [row.revision for row in records.migrations.values() if row.revision not in known and row.position > 0]
    return f"it is ahead of these scripts, which do not know {', '.join(newer)}" if newer else ""


def _left(
    accepted: AcceptedPlan, records: Records, until: Until, reached: Mapping[str, State], *, vouched: bool
) -> tuple[Todo | None, Held | None]:
    """Decide about one plan; `reached` says where the flags before it will be that go further."""
    plan = accepted.plan
    row = records.migrations.get(plan.revision)
    if row is not None and row.sha256 != accepted.sha256:
        if is_as_good_as_done(plan, row, shard=records.shard):
            return None, _held(planfile.loads(row.plan), records)
        raise _changed(plan, row, records)
    flag = records.flags.get(plan.flag)
    if flag is not None and flag.revision != plan.revision:
        raise PlanChanged(
            f"{records.shard}: the flag {plan.flag} of {plan.revision} is {flag.revision}'s there, whose state says "
            f'nothing of this plan; name another in the script: flag = "{plan.flag}_2"'
        )
    done = {number for (revision, number), step in records.steps.items() if revision == plan.revision and step.done}
    statements = tuple(n for n, s in enumerate(plan.steps, 1) if isinstance(s, Statement) and n not in done)
    state = records.state(plan.flag)
    been = max((s.to for n, s in enumerate(plan.steps, 1) if isinstance(s, Switch) and n in done), default=State.OLD)
    missing = tuple(name for name in plan.needs if reached.get(name, records.state(name)) < State.LIVE)
    wanted, held, moves_only = _target(plan, until), None, False
    if state < min(been, wanted):
        held, target = Held(plan.flag, state), None
    elif state is State.OLD < wanted and plan.has_move and not vouched:
        held, target = Held(plan.flag, state, unvouched=True), None
    elif state is State.OLD < wanted and missing:
        held, target = Held(plan.flag, state, needs=missing), None
    else:
        if plan.filled_elsewhere and until is Until.LIVE and state < State.LIVE:
            held = Held(plan.flag, State.DUAL, unfilled=been < State.LIVE)
        target = wanted if wanted > state else None
        valid = flag is not None and flag.new_valid
        moves = wanted is State.DUAL and (until is Until.MOVED or plan.filled_elsewhere)
        moves_only = moves and state < State.LIVE and not valid
    unfinished = row is None or (row.finished_at is None and len(done) == len(plan.steps))
    if unfinished or statements or target is not None or moves_only:
        return Todo(accepted, statements, target, moves_only), held
    return None, held


def _held(begun: Plan, records: Records) -> Held | None:
    """Say whether people hold back a flag whose plan was finished before the committed one amended it."""
    state = records.state(begun.flag)
    return Held(begun.flag, state) if state < State.LIVE else None


def is_as_good_as_done(plan: Plan, row: MigrationRow, *, shard: str) -> bool:
    """
    Say whether a shard finished a plan that this one amends.

    Raises:
        PlanChanged: it did, and rows that this one moves as well stay where they are, though readers read new.
    """
    if row.sha256 not in plan.amends or row.finished_at is None:
        return False
    finished = {(move.table, move.target, move.writes) for _, move in planfile.loads(row.plan).moves}
    added = [move for _, move in plan.moves if (move.table, move.target, move.writes) not in finished]
    if added:
        raise PlanChanged(
            f"{shard}: {row.revision} is finished there by the plan {row.sha256[:12]}, which did not move "
            f"{', '.join(move.table for move in added)} as the committed one does, and what is finished is never done "
            "again. Restore script and plan file, and write a new revision for what shall be moved, too"
        )
    return True


def unamendable(begun: Plan, plan: Plan, records: Records) -> list[str]:
    """Say why a plan that was begun on a shard may not give way to another one; what is finished there stays."""
    reasons = []
    if (begun.flag, begun.has_move) != (plan.flag, plan.has_move):
        reasons.append("a flag keeps its name, and whether it walks through DUAL")
    for number, step in enumerate(begun.steps, 1):
        done = records.steps[plan.revision, number].done
        if done and (number > len(plan.steps) or step_sha256(step) != step_sha256(plan.steps[number - 1])):
            reasons.append(f"step {number} is finished there and must stay as it is, at its place")
    if records.state(plan.flag) >= State.LIVE:
        steps = (records.steps.get((plan.revision, number)) for number, _ in plan.moves)
        if not all(step is not None and step.done for step in steps):
            reasons.append(f"{plan.flag} is {records.state(plan.flag).name} there, so nothing moves forward any more")
    return reasons


def _changed(plan: Plan, row: MigrationRow, records: Records) -> PlanChanged:
    """Say that a plan is not the one that was begun, what differs, and every step of the way on."""
    begun = planfile.loads(row.plan, name=f"{plan.revision} in the ledger")
    difference = planfile.difference(begun, plan, names=("begun", "committed"))
    reasons = unamendable(begun, plan, records)
    if reasons:
        cure = f": {'; '.join(reasons)}. Restore script and plan file, and write a new revision for what shall change"
        recipe = []
    else:
        cure = "; restore script and plan file, or amend what is not finished"
        recipe = _amending(plan, row, records.shard)
    told = f"{records.shard}: {plan.revision} is not the plan that was begun there{cure}"
    return PlanChanged("\n".join([told, *recipe, difference]))


def _amending(plan: Plan, row: MigrationRow, shard: str) -> list[str]:
    """Return what to type until the committed plan is in the place of the one that was begun."""
    hashes = "".join(f'"{sha256}", ' for sha256 in (*plan.amends, row.sha256)).rstrip()
    to_write = [
        f"write into the script, below its revision:  amends = ({hashes})",
        f"shardmig plan {plan.revision}   # then have script and plan file reviewed, and commit them",
    ]
    to_do = [
        f'shardmig amend {plan.revision} --shard {shard} --reason "…"   # or --all: wherever it is not finished',
        f"shardmig apply --shard {shard}",
    ]
    steps = to_do if row.sha256 in plan.amends else to_write + to_do
    return ["To amend it:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))]


def _target(plan: Plan, until: Until) -> State:
    if until is Until.STRUCTURE:
        return State.OLD
    if until is Until.FILLED or (until is Until.LIVE and not plan.filled_elsewhere):
        return State.LIVE
    return State.DUAL if plan.has_move else State.OLD
