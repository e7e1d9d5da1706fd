"""Plans, shown: their files as they are, a line a step, or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig import planfile
from shardmig.cli.console import show_json, tell
from shardmig.plan import Move, Statement, Switch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.plan import AcceptedPlan, Step

__all__ = ["lock_note", "show_plans"]


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
                tell(f"  {number}. {_step(step)}" + lock_note(accepted, number))


def _step(step: Step) -> str:
    match step:
        case Statement():
            return " ".join(step.sql.split()) + ("" if step.transactional else "  -- outside a transaction")
        case Move(seed=True):
            return f"seed {step.table} by ({', '.join(step.key)}): fills {', '.join(step.writes)}"
        case Move():
            into = f" into {step.target}" if step.target else ""
            return f"move {step.table}{into} by ({', '.join(step.key)}): fills {', '.join(step.writes)}"
        case Switch():
            return f"switch to {step.to.name}"


def lock_note(accepted: AcceptedPlan, number: int) -> str:
    """Say which relation a step locks."""
    return f"   -- locks {', '.join(accepted.locked(number))}" if number in accepted.locks else ""
