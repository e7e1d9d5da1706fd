"""
The repository's plans, ready for the runner: scripts read, linted, rendered or compared, and accepted.

This is the one door from files to shards, for the command line, the demo and applications' own tools alike.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from shardmig import planfile, sqltree
from shardmig.errors import LintFailed, PlanError, ScriptError
from shardmig.lint import History, lint_script
from shardmig.loading import load_plans
from shardmig.plan import Switch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardmig.config import Config
    from shardmig.loading import LoadedPlan
    from shardmig.plan import AcceptedPlan, Plan
    from shardmig.scripts import Script

__all__ = ["accepted_of", "accepted_plans", "committed_plans", "loaded_plans", "refusing"]


def loaded_plans(config: Config, *, rerender: bool = False) -> tuple[LoadedPlan, ...]:
    """
    Load the plans of the configuration's migrations directory, oldest first, not yet judged as a whole.

    Raises:
        ScriptError, PlanError, StalePlan: files are not in order.
        LintFailed: a script that had to be rendered is refused before it is imported.
    """
    return load_plans(
        config.migrations_dir,
        before_import=refusing(config),
        fingerprint=sqltree.fingerprint,
        rerender=rerender,
        start_after=config.lint.start_after,
    )


def accepted_plans(config: Config) -> tuple[AcceptedPlan, ...]:
    """
    Load and accept every plan, oldest first.

    Raises:
        ScriptError, PlanError, StalePlan: files are not in order, or a script describes nothing yet.
        LintFailed: something is not known to be additive.
    """
    return accepted_of(config, loaded_plans(config))


def committed_plans(config: Config) -> tuple[AcceptedPlan, ...]:
    """Accept what plan files say, oldest first and up to the first that is not in order, whatever scripts are like."""
    follows = {plan.parent: plan for path in sorted(config.migrations_dir.glob("*.sql")) if (plan := _written(path))}
    history = History(config.lint)
    accepted: list[AcceptedPlan] = []
    following = follows.pop(config.lint.start_after or None, None)
    with suppress(LintFailed):
        while following is not None:
            accepted.append(history.accept(following))
            history.add(following)
            following = follows.pop(following.revision, None)
    return tuple(accepted)


def _written(path: Path) -> Plan | None:
    with suppress(PlanError, OSError):
        return planfile.read(path)
    return None


def accepted_of(config: Config, plans: Sequence[LoadedPlan]) -> tuple[AcceptedPlan, ...]:
    """
    Accept plans that were loaded, oldest first.

    Raises:
        ScriptError: a script describes nothing yet.
        LintFailed: something is not known to be additive.
    """
    history = History(config.lint)
    accepted = []
    for loaded in plans:
        empty = all(isinstance(step, Switch) for step in loaded.plan.steps) and loaded.plan.protocol == "auto"
        if empty and not _explains(loaded.script):
            raise ScriptError("nothing is described yet; fill upgrade() or move()", path=loaded.script.name)
        accepted.append(history.accept(loaded.plan))
        history.add(loaded.plan)
    return tuple(accepted)


def _explains(script: Script) -> bool:
    """Say whether a script is one of those of autogenerate that only explain."""
    from shardmig.explanations import explained_in  # noqa: PLC0415 - loads Alembic, which most commands do without

    return bool(explained_in([script]))


def refusing(config: Config) -> Callable[[Script], None]:
    """Make the look that a script gets before it is imported: what must not be executed is not."""

    def look(script: Script) -> None:
        found = lint_script(script.source, path=script.name, settings=config.lint)
        failing = [violation for violation in found if violation.fails]
        if failing:
            lines = "\n".join(f"  {violation}" for violation in failing)
            raise LintFailed(f"{script.name} was not executed:\n{lines}", violations=found)

    return look
