"""Judge a lone statement, without a plan around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from shardmig.config import Lint
from shardmig.lint.judge import judge_text
from shardmig.lint.moves import move
from shardmig.lint.scope import New, Scope
from shardmig.lint.structure import structure

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from shardmig.lint.violation import Violation

__all__ = ["judge"]

_NOTHING = New()


def judge(
    sql: str,
    *,
    context: Literal["structure", "move", "reverse"] = "structure",
    new: New = _NOTHING,
    restores: Mapping[str, Collection[str]] | None = None,
    known: Lint | None = None,
) -> list[Violation]:
    """
    Judge one statement; a table that is not known to be new is taken as existing.

    Args:
        sql: the text.
        context: a structure step, a move, or a reverse move.
        new: what the same plan has added.
        restores: table → old columns that a reverse move may write.
        known: the configuration's section on linting.

    Returns:
        Failures and warnings, in the order of the text.
    """
    scope = Scope(context=context, new=new, restores=restores or {}, settings=known or Lint())
    return judge_text(scope, sql, structure if context == "structure" else move).found
