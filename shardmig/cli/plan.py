"""`shardmig plan`: render scripts into the files that reviewers read and shards execute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shardmig.cli import options

if TYPE_CHECKING:
    from shardmig.plan import Plan
    from shardmig.rendering import Renderer
    from shardmig.scripts import Script

__all__ = ["plan", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(plan)


def plan(
    revisions: Annotated[
        list[str] | None, typer.Argument(help="Revisions to render, or their first characters.", show_default="all")
    ] = None,
    output: Annotated[
        Literal["sql", "text", "json"], typer.Option("--output", "-o", help="sql shows the files; text a line a step.")
    ] = "text",
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Write nothing.")] = False,
    config: options.Config_ = None,
) -> None:
    """Render scripts, write each plan beside its script, and show the steps with the tables they lock."""
    from shardmig import config as configuration
    from shardmig import planfile
    from shardmig.cli import plans
    from shardmig.lint import History
    from shardmig.rendering import Renderer
    from shardmig.repository import refusing
    from shardmig.scripts import load_scripts

    here = configuration.load(config, shards=False)
    scripts = load_scripts(here.migrations_dir, start_after=here.lint.start_after)
    known = [script.revision for script in scripts]
    meant = {options.revision(name, known) for name in revisions or ()}
    renderer = Renderer(scripts, before_import=refusing(here))
    history = History(here.lint)
    shown = []
    try:
        for script in scripts:
            rendered, changed = _rendered(script, renderer)
            if not meant or script.revision in meant:
                shown.append((history.accept(rendered), changed))
                if changed and not dry_run:
                    planfile.write(rendered, script.plan_path)
            history.add(rendered)
    finally:  # what was written before one is refused is told, too
        plans.show_plans(shown, output, written=not dry_run)


def _rendered(script: Script, renderer: Renderer) -> tuple[Plan, bool]:
    """Render a script, and say whether its plan file is another or not there; a file in date keeps its bytes."""
    from shardmig import planfile
    from shardmig.errors import PlanError

    rendered = renderer.render(script)
    try:
        written = planfile.read(script.plan_path) if script.plan_path.exists() else None
    except PlanError:
        written = None
    in_date = written is not None and (written.sha256, written.script_sha256) == (rendered.sha256, script.sha256)
    return rendered, not in_date
