"""`shardmig show`: one revision, as committed and as a shard has it."""

from __future__ import annotations

from typing import Annotated

import typer

from shardmig.cli import options

__all__ = ["register", "show"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(show)


def show(
    revision: Annotated[str, typer.Argument(help="The revision, its first characters, or its flag.")],
    shard: options.Shards = None,
    everything: options.All = False,
    output: options.Output = "text",
    config: options.Config_ = None,
) -> None:
    """Show a revision's plan; with shards, where each of its steps is there, and what differs from the plan begun."""
    from shardmig import planfile
    from shardmig.cli import console, progress, project, results

    asked = bool(shard or everything)
    here = project.load(config, shards=asked)
    flags = {accepted.plan.flag: accepted.plan for accepted in here.plans}
    revisions = {accepted.plan.revision: accepted.plan for accepted in here.plans}
    plan = flags.get(revision) or revisions[here.revision(revision)]
    if not asked:
        console.show_json(plan.model_dump(mode="json")) if output == "json" else console.tell(planfile.dumps(plan))
        return
    fleet = here.fleet(options.targets(here.config, shard, everything=everything))
    results.show_steps(progress.run(fleet, fleet.status, quiet=True), plan, output)
