"""`shardmig check`: is the repository in order? For CI; asks no shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from shardmig.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.config import Config

__all__ = ["check", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(check)


def check(config: options.Config_ = None) -> None:
    """Exit 1 unless every plan is written, is what its script renders to, and is additive."""
    from shardmig import config as configuration
    from shardmig.cli import console

    here = configuration.load(config)
    problems = list(_problems(here))
    for problem in problems:
        console.tell(problem)
    if problems:
        raise typer.Exit(1)


def _problems(here: Config) -> Iterator[str]:
    from shardmig.cli import console
    from shardmig.errors import LintFailed, PlanError, ScriptError
    from shardmig.lint.project import lint_directory
    from shardmig.repository import loaded_plans

    try:
        loaded = loaded_plans(here, rerender=True)
    except (ScriptError, PlanError, LintFailed) as error:
        yield str(error)
        return
    for one in loaded:
        if not one.from_file:
            yield f"{one.script.name} has no plan file; run `shardmig plan` and commit it"
    failures = lint_directory(here.migrations_dir, here.lint).failures
    yield from map(str, failures)
    if failures:
        yield f"{len(failures)} violations; `shardmig lint` shows each with its cure"
    else:
        console.tell(f"{len(loaded)} plans, head {loaded[-1].plan.revision if loaded else 'none'}: additive")
