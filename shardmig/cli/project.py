"""What most verbs begin with: the configuration, its accepted plans, and a fleet over some of its shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig import config as configuration
from shardmig.cli import options
from shardmig.cli.console import note
from shardmig.errors import ConfigError, LintFailed, PlanError, ScriptError, ShardmigError
from shardmig.fleet import Fleet
from shardmig.repository import accepted_of, committed_plans, loaded_plans

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shardmig.config import Config, Shard, Speed
    from shardmig.plan import AcceptedPlan

__all__ = ["Project", "anyhow", "glance", "load"]


@dataclass(frozen=True, slots=True)
class Project:
    """
    A configuration and its accepted plans, oldest first.

    Attributes:
        config: the configuration.
        plans: the plans.
        unwritten: scripts that have no plan file, so that they were rendered just now.
        disorder: why the plans are only those of the committed files, if scripts are not in order; None as a rule.
    """

    config: Config
    plans: tuple[AcceptedPlan, ...]
    unwritten: tuple[str, ...] = ()
    disorder: ShardmigError | None = None

    def fleet(
        self,
        targets: Sequence[Shard],
        *,
        jobs: int | None = None,
        pace: Speed | None = None,
        take_over: bool = False,
        terminate_older_than_s: float | None = None,
        reason: str | None = None,
    ) -> Fleet:
        """Make a fleet of some shards."""
        config = self.config
        if pace is not None:
            config = config.model_copy(update={"pace": config.pace.at(pace)})
        return Fleet(
            config,
            self.plans,
            targets,
            jobs=jobs or self.config.rollout.jobs,
            take_over=take_over,
            terminate_older_than_s=terminate_older_than_s,
            reason=reason,
        )

    def revision(self, named: str) -> str:
        """Find the revision that an argument means; `options.revision` says how and what it raises."""
        return options.revision(named, [accepted.plan.revision for accepted in self.plans])

    def plan_of_flag(self, flag: str) -> AcceptedPlan:
        """
        Find the plan that a flag belongs to.

        Raises:
            ConfigError: no plan has it; names those that exist.
        """
        for accepted in self.plans:
            if accepted.plan.flag == flag:
                return accepted
        known = ", ".join(accepted.plan.flag for accepted in self.plans) or "none"
        raise ConfigError(f"no migration has a flag {flag!r}; known flags: {known}")


def load(path: Path | None, *, shards: bool = True) -> Project:
    """Load the configuration and its plans; errors name file, key and cure. `shards`: as for `config.load`."""
    return _project(configuration.load(path, shards=shards))


def glance(path: Path | None) -> Project:
    """Load for somebody who only looks at shards: where scripts are not in order, the committed plan files will do."""
    config = configuration.load(path)
    try:
        return _project(config)
    except (ScriptError, PlanError, LintFailed) as error:
        return Project(config, committed_plans(config), disorder=error)


def anyhow(path: Path | None) -> Project:
    """Load for verbs that need no script: whoever lets a move rest at night has not to mend a merge before."""
    here = glance(path)
    if here.disorder is not None:
        wrong, _, _ = str(here.disorder).partition("\n")
        note(f"the scripts are not in order, which is not needed here: {wrong}")
    return here


def _project(config: Config) -> Project:
    loaded = loaded_plans(config)
    unwritten = tuple(one.script.name for one in loaded if not one.from_file)
    return Project(config, accepted_of(config, loaded), unwritten)
