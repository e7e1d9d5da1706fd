"""Plans of a migrations directory: the file is the plan; a script is rendered only where it is missing or changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig import planfile
from shardmig.errors import StalePlan
from shardmig.plan import BATCH
from shardmig.scripts import load_scripts, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardmig.plan import Plan
    from shardmig.rendering import Renderer
    from shardmig.scripts import Script

__all__ = ["LoadedPlan", "load_plans"]


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """
    A plan, and where it comes from.

    Attributes:
        script: its script.
        plan: the plan.
        from_file: False when there is no plan file yet, so that it was rendered just now.
    """

    script: Script
    plan: Plan
    from_file: bool


def load_plans(
    directory: Path,
    *,
    before_import: Callable[[Script], None] | None = None,
    fingerprint: Callable[[str], str] | None = None,
    rerender: bool = False,
    start_after: str = "",
) -> tuple[LoadedPlan, ...]:
    """
    Load the plans of a migrations directory, oldest first.

    The file is the plan. A file whose script is unchanged is taken as it is; otherwise the script is rendered and
    compared. A script without a file is rendered, and `from_file` says so.

    Args:
        directory: the migrations directory.
        before_import: called with each script before it is executed, and only then; raises to refuse it (the linter).
        fingerprint: gives two SQL texts the same value only if they mean the same, literals included; without it a
            text that is laid out differently is another text.
        rerender: also render scripts that did not change: a plan file edited by hand shows.
        start_after: as for `load_scripts`.

    Raises:
        ScriptError: a script or the history is not in order.
        PlanError: a plan file is damaged.
        StalePlan: a plan file is not what its script renders to.
    """
    scripts = load_scripts(directory, start_after=start_after)
    render = _rendering(scripts, before_import)
    return tuple(_load(script, render, fingerprint, rerender=rerender) for script in scripts)


def _rendering(scripts: Sequence[Script], before_import: Callable[[Script], None] | None) -> Callable[[Script], Plan]:
    """Return what renders a script of a history."""
    renderer: Renderer | None = None

    def render(script: Script) -> Plan:
        nonlocal renderer
        from shardmig.rendering import Renderer  # noqa: PLC0415 - Alembic is loaded only when something is rendered

        renderer = renderer or Renderer(scripts, before_import=before_import)
        return renderer.render(script)

    return render


def _load(
    script: Script, render: Callable[[Script], Plan], fingerprint: Callable[[str], str] | None, *, rerender: bool
) -> LoadedPlan:
    if not script.plan_path.exists():
        return LoadedPlan(script, render(script), from_file=False)
    written = planfile.read(script.plan_path)
    if written.revision != script.revision:
        raise StalePlan(f"{planfile_name(script)} is the plan of {written.revision}; run `shardmig plan` and commit it")
    if written.script_sha256 == script.sha256 and not rerender:
        return LoadedPlan(script, written, from_file=True)
    rendered = render(script)
    if written.sha256 == rendered.sha256:
        return LoadedPlan(script, rendered, from_file=True)  # comments or the parent changed: nothing that is executed
    if fingerprint and _same(written, rendered, fingerprint):
        return LoadedPlan(script, written, from_file=True)
    difference = planfile.difference(written, rendered, names=(planfile_name(script), script.name))
    raise StalePlan(
        f"{planfile_name(script)} is not what {script.name} renders to; run `shardmig plan` and commit both files:\n"
        f"{difference}"
    )


def planfile_name(script: Script) -> str:
    """How messages call a script's plan file."""
    return name_of(script.plan_path)


def _same(one: Plan, other: Plan, fingerprint: Callable[[str], str]) -> bool:
    """Compare plans whose SQL may be laid out differently."""
    try:
        return _normal(one, fingerprint).sha256 == _normal(other, fingerprint).sha256
    except ValueError:  # not parseable, so not comparable
        return False


def _normal(plan: Plan, fingerprint: Callable[[str], str]) -> Plan:
    texts = ("sql", "forward", "check", "orphans", "purge", "back", "back_check")
    steps = [
        step.model_copy(
            update={t: fingerprint(sql.replace(BATCH, "$1")) for t in texts if (sql := getattr(step, t, None))}
        )
        for step in plan.steps
    ]
    return plan.model_copy(update={"steps": tuple(steps)})
