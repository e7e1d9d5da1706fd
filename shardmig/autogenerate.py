"""
Models against a shard: what a script can add, and what it can only explain.

Alembic finds the differences, the server itself says whether two types, defaults or expressions are the same, and the
linter decides what may be written. Nothing is left out in silence: what no addition closes is explained.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from shardmig.comparison import Comparison
from shardmig.drafting import Judge, imports
from shardmig.errors import ConfigError, ShardUnreachable
from shardmig.explanations import comment_block, explained_in
from shardmig.fleet import Fleet
from shardmig.models import load_models
from shardmig.repository import accepted_plans
from shardmig.revision import revision
from shardmig.scratch import scratch
from shardmig.scripts import load_scripts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shardmig.config import Config, Shard
    from shardmig.drafting import Draft, Explained

__all__ = ["Differences", "autogenerate", "differences"]


@dataclass(frozen=True, slots=True)
class Differences:
    """
    How models and shard differ.

    Attributes:
        draft: additions, accepted by the linter, and everything that has to be explained.
        known: titles that committed scripts explain already.
    """

    draft: Draft
    known: frozenset[str]

    @property
    def unexplained(self) -> tuple[Explained, ...]:
        """What nobody has been told."""
        return tuple(one for one in self.draft.explained if one.title not in self.known)

    @property
    def any(self) -> bool:
        """Whether there is anything for a script to say."""
        return bool(self.draft.written or self.unexplained)


def differences(
    config: Config, shard: Shard | None = None, *, models: Sequence[sa.MetaData] | None = None
) -> Differences:
    """
    Compare the models with a shard; nothing is changed there.

    Args:
        config: the project's.
        shard: a real one; None builds a scratch shard from the committed plans.
        models: the metadata; None imports what the configuration names.

    Raises:
        ConfigError: the models cannot be imported.
        ScriptError, PlanError, LintFailed: the committed plans are not in order.
        LocalServerError: no scratch server can be started.
        ShardUnreachable: the real shard does not answer.
    """
    models = load_models(config) if models is None else models
    accepted = accepted_plans(config) if config.migrations_dir.is_dir() else ()
    if shard is None and config.lint.start_after:
        raise ConfigError(
            f"nothing here makes what was there before {config.lint.start_after}, so there is no scratch shard to "
            "compare with; name a real one with --shard NAME"
        )
    if shard is not None:
        found = _compared(config, models, shard)
    else:
        with scratch(config, accepted) as server:
            built = asyncio.run(server.shard())
            asyncio.run(server.apply(built))
            found = _compared(config, models, built)
    known = (
        explained_in(load_scripts(config.migrations_dir, start_after=config.lint.start_after))
        if config.migrations_dir.is_dir()
        else frozenset()
    )
    return Differences(Judge(config, accepted).draft(found.additions, found.explained), known)


def autogenerate(
    config: Config, message: str, shard: Shard | None = None, *, models: Sequence[sa.MetaData] | None = None
) -> tuple[Path | None, Differences]:
    """
    Write a script that brings shards to the models, as far as additions go.

    Returns:
        The script, None when there is nothing to write; and what was found.

    Raises:
        As `differences`; ConfigError: the real shard lacks what committed plans add, so it would be written again.
    """
    if shard is not None:
        _refuse_behind(config, shard)
    found = differences(config, shard, models=models)
    if not found.any:
        return None, found
    sources = [source for _, source in found.draft.written]
    path = revision(
        config.migrations_dir,
        message,
        upgrade=found.draft.body or "    pass  # nothing of what differs can be added",
        rest=comment_block(found.unexplained),
        imports=imports(sources),
        start_after=config.lint.start_after,
    )
    return path, found


def _refuse_behind(config: Config, shard: Shard) -> None:
    accepted = accepted_plans(config) if config.migrations_dir.is_dir() else ()
    [status] = asyncio.run(Fleet(config, accepted, [shard]).status())
    if left := [item.plan.revision for item in status.left if item.statements]:
        raise ConfigError(
            f"{shard.name} is behind the committed scripts, and what they add would be written again: "
            f"{', '.join(left)}; `shardmig apply --shard {shard.name} --until structure` first"
        )


def _compared(config: Config, models: Sequence[sa.MetaData], shard: Shard) -> Comparison:
    engine = sa.create_engine("postgresql+psycopg://", poolclass=NullPool, creator=lambda: _connect(config, shard))
    try:
        with engine.connect() as connection:
            comparison = Comparison(connection, models, config.lint.imports)
            comparison.run()
            connection.rollback()
            return comparison
    except sa.exc.OperationalError as error:
        reason = str(error.orig).partition("\n")[0]
        raise ShardUnreachable(f"{shard.address}: {reason}", shard=shard.name) from error
    except sa.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise ConfigError(f"the models cannot be compared with {shard.name}: {reason}") from error
    finally:
        engine.dispose()


def _connect(config: Config, shard: Shard) -> psycopg.Connection[Any]:
    return psycopg.connect(
        shard.url.get_secret_value(),
        options=f"-c search_path={_escaped(shard.schema_name)} -c lock_timeout=1s",
        connect_timeout=config.session.connect_timeout_s,
    )


def _escaped(name: str) -> str:
    """Write a schema's name for libpq's `options`."""
    quoted = '"' + name.replace('"', '""') + '"'
    return quoted.replace("\\", "\\\\").replace(" ", "\\ ")
