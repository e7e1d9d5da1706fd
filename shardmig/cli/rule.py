"""`shardmig rule`: a rule of the linter, explained."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

__all__ = ["register", "rule"]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(rule)


def rule(
    code: Annotated[str | None, typer.Argument(help="For example SM120.", show_default="list all")] = None,
) -> None:
    """Explain a rule: what it does, why, examples, what to write instead; without a code, list all."""
    from shardmig.lint.explain import explain

    sys.stdout.write(explain(code))
