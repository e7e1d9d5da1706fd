"""`shardmig lint`: what is not known to be additive does not pass."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shardmig.cli import options
from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.config import Config
    from shardmig.lint.project import Linted

__all__ = ["lint", "lint_application", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(lint)


def lint(
    what: Annotated[
        list[str] | None, typer.Argument(help="Scripts or revisions.", metavar="[PATH|REVISION]...", show_default="all")
    ] = None,
    diff: Annotated[
        str | None, typer.Option("--diff", metavar="REF", help="Only what changed since a git ref.")
    ] = None,
    app: Annotated[
        list[Path] | None,
        typer.Option(
            "--app", metavar="PATH", help="Application code: SQL that a column would hurt, flags that no plan has."
        ),
    ] = None,
    prove: Annotated[bool, typer.Option("--prove", help="Also run the plans on a scratch server and look.")] = False,
    output: Annotated[
        Literal["text", "json", "github", "sarif", "gitlab"] | None,
        typer.Option("--output", "-o", help="How findings are written.", show_default="text; github in its actions"),
    ] = None,
    config: options.Config_ = None,
) -> None:
    """Judge scripts, plans and moves; exit 1 on violations, 2 when something could not be judged."""
    from shardmig import config as configuration
    from shardmig.lint.report import report

    here = configuration.load(config, shards=False)
    if app:
        if what or diff or prove:
            raise ConfigError("--app judges application code alone; leave the other arguments out")
        linted = lint_application(here, app)
    else:
        linted = _migrations(here, what, diff)
    form = output or ("github" if os.environ.get("GITHUB_ACTIONS") == "true" else "text")
    sys.stdout.write(report(linted, form))
    code = linted.exit_code
    if prove and code == 0:
        code = 0 if asyncio.run(_prove(here)) else 1
    raise typer.Exit(code)


def _migrations(here: Config, what: list[str] | None, diff: str | None) -> Linted:
    from shardmig.lint.project import changed_since, lint_directory

    directory = here.migrations_dir
    if not directory.is_dir():
        raise ConfigError(f"there is no migrations directory {directory}; `shardmig init` makes one")
    only = _named(directory, what) if what else None
    if diff is not None:
        changed = changed_since(diff, directory)
        only = [path for path in changed if only is None or path.resolve() in only]
    return lint_directory(directory, here.lint, only=only)


def _named(directory: Path, what: list[str]) -> list[Path]:
    """Find the scripts that arguments mean: a revision, the beginning of one, a script or plan file, or a directory."""
    names = sorted(path.stem for path in directory.glob("*.py"))
    paths = []
    for name in what:
        path = Path(name)
        if path.is_dir():
            found = sorted(path.glob("*.py"))
        elif path.is_file():
            found = [path.with_suffix(".py")]
        else:
            found = [directory / f"{options.revision(name, names)}.py"]
        if not found:
            raise ConfigError(f"{name}: no script in there; nothing was judged")
        paths += [path.resolve() for path in found]
    return paths


def lint_application(here: Config, paths: Sequence[Path]) -> Linted:
    """
    Judge application code against what the plans add and which flags they have.

    Raises:
        ConfigError: a path is not there.
    """
    from shardmig.lint.added import Added, added
    from shardmig.lint.app import lint_app
    from shardmig.repository import loaded_plans

    if missing := [path for path in paths if not path.exists()]:
        raise ConfigError(f"{missing[0]}: no such file or directory; nothing was judged")
    if not here.migrations_dir.is_dir():  # code may live in another repository than its migrations
        return lint_app(paths)
    known = Added()
    home = here.lint.schemas[0] if here.lint.schemas else "public"
    plans = [loaded.plan for loaded in loaded_plans(here)]
    for plan in plans:
        known.include(added(plan, home))
    asked = [plan.flag for plan in plans if plan.has_move]
    return lint_app(paths, columns=known.tables, flags=[plan.flag for plan in plans], asked=asked)


async def _prove(here: Config) -> bool:
    """Run every plan on a throw-away server and say what each step locked, rewrote, scanned or took away."""
    from shardmig import catalog, local
    from shardmig.cli import console
    from shardmig.errors import StepFailed
    from shardmig.repository import accepted_plans
    from shardmig.session import open_session

    sound = True
    with local.cluster(["scratch"]) as servers:
        [shard] = local.shards(servers).values()
        async with open_session(
            shard, here.session.model_copy(update={"owner": None}), pg_versions=(10, 99)
        ) as session:
            for accepted in accepted_plans(here):
                try:
                    proofs = await catalog.prove(session, accepted.plan)
                except StepFailed as failed:
                    console.tell(str(failed))
                    return False  # what follows may build on it
                for proof in proofs:
                    locks = ", ".join(f"{mode} on {relation}" for relation, mode in proof.locks)
                    harm = [*(f"rewrites {r}" for r in proof.rewrites), *(f"scans {s}" for s in proof.scans)]
                    harm += [str(difference) for difference in proof.missing]
                    sound = sound and not harm
                    verdict = f"{'; '.join(harm) or 'additive'}{f' ({locks})' if locks else ''}"
                    console.tell(f"{accepted.plan.revision} step {proof.number}: {verdict}")
    return sound
