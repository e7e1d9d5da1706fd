"""`shardmig check`: is the repository in order? For CI; asks no shard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from shardmig.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

    from shardmig.config import Config

__all__ = ["check", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(check)


def check(config: options.Config_ = None) -> None:
    """
    Exit 1 unless every plan is written, is what its script renders to, is additive, and covers the models.

    Application code that [lint] app names is judged too, as by `lint --app`.
    """
    from shardmig import config as configuration
    from shardmig.cli import console

    here = configuration.load(config, shards=False)
    problems = list(_problems(here))
    for problem in problems:
        console.tell(problem)
    if problems:
        raise typer.Exit(1)


def _problems(here: Config) -> Iterator[str]:
    from shardmig.cli import console
    from shardmig.errors import LintFailed, PlanError, ScriptError
    from shardmig.lint.project import lint_directory
    from shardmig.repository import accepted_of, loaded_plans

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
        yield f"{_counted(failures, 'violation')}; `shardmig lint` shows each with its cure"
        return
    try:
        accepted_of(here, loaded)
    except ScriptError as error:  # a script that describes nothing yet is additive, and no shard takes it
        yield str(error)
        return
    console.tell(f"{_counted(loaded, 'plan')}, head {loaded[-1].plan.revision if loaded else 'none'}: additive")
    yield from _uncovered(here)
    yield from _application(here)


def _counted(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) != 1 else ''}"


def _uncovered(here: Config) -> Iterator[str]:
    """Say what of the models no plan adds, and no script explains."""
    from shardmig.cli import console

    if not here.models:
        return
    if here.lint.start_after:
        console.tell("models were not compared: nothing here makes what was there before the adopted history ends")
        return
    from shardmig.autogenerate import differences

    found = differences(here)
    for title, _ in found.draft.written:
        yield f"the models have the {title}, and no plan adds it"
    for one in found.unexplained:
        yield f"{one.title}, and no script explains that"
    if found.any:
        yield 'models and plans differ; `shardmig revision -m "…" --autogenerate` writes what can be added'
    else:
        known = len(found.draft.explained)
        console.tell("models: as the plans make them" + (f", but for {known} explained differences" if known else ""))


def _application(here: Config) -> Iterator[str]:
    """Say what in the application's code a new column would hurt, and which of its flags no plan has."""
    from shardmig.cli import console
    from shardmig.cli.lint import lint_application

    if not here.lint.app:
        return
    linted = lint_application(here, [Path(os.path.relpath(here.root / path)) for path in here.lint.app])
    for note in linted.notes:
        console.tell(f"note: {note}")
    yield from map(str, linted.failures)
    if linted.failures:
        found = _counted(linted.failures, "violation")
        yield f"{found} in the application; `shardmig lint --app PATH` shows each with its cure"
    else:
        console.tell(f"application: clean, {linted.count} file{'s' if linted.count != 1 else ''}")
