"""
Every exception of shardmig; the docstring is the default message and names the cure.

    ShardmigError
    ├── ConfigError · ScriptError
    ├── PlanError ── StalePlan · PlanChanged
    ├── LintFailed                      (.violations)
    ├── ShardError                      (.shard, .step; psycopg's error is __cause__)
    │   ├── ShardUnreachable · ShardBusy · ThroughPooler · NotPrimary · LockNotObtained · StepFailed
    │   ├── SwitchRefused · DrainTimeout · PreflightFailed · CheckFailed · ProofFailed · Fenced · InDoubt
    │   ├── GateFailed · Overloaded · LedgerOutdated · SwitchedMeanwhile (a SwitchRefused)
    │   └── WrongShard                  (also a FlagError)
    ├── FlagError ── LedgerMissing · UnknownFlag · UnknownState · ShardBehind · ViewExpired · ShardInMaintenance
    │               WrongTransaction · WriteRefused
    └── LocalServerError

This module imports nothing: application code loads it with every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CheckFailed",
    "ConfigError",
    "DrainTimeout",
    "Fenced",
    "FlagError",
    "GateFailed",
    "InDoubt",
    "LedgerMissing",
    "LedgerOutdated",
    "LintFailed",
    "LocalServerError",
    "LockNotObtained",
    "NotPrimary",
    "Overloaded",
    "PlanChanged",
    "PlanError",
    "PreflightFailed",
    "ProofFailed",
    "ScriptError",
    "ShardBehind",
    "ShardBusy",
    "ShardError",
    "ShardInMaintenance",
    "ShardUnreachable",
    "ShardmigError",
    "StalePlan",
    "StepFailed",
    "SwitchRefused",
    "SwitchedMeanwhile",
    "ThroughPooler",
    "UnknownFlag",
    "UnknownState",
    "ViewExpired",
    "WriteRefused",
    "WrongShard",
    "WrongTransaction",
]


class ShardmigError(Exception):
    """Something shardmig refuses; the message says what happened and what to do."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or " ".join((type(self).__doc__ or "").split()))

    def __str__(self) -> str:
        """Return the message without quotes or arguments."""
        return str(self.args[0])


# --------------------------------------------------------------------------------------------------------------------
# What people write


class ConfigError(ShardmigError):
    """The configuration cannot be used: every problem is listed with its key and its cure."""


class ScriptError(ShardmigError):
    """
    A migration script cannot be rendered: it may only describe additions and moves.

    Attributes:
        path: the script, relative to the migrations directory's parent; None when unknown.
        line: 1-based line in it; None when unknown.
    """

    def __init__(self, message: str | None = None, *, path: str | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(f"{where}{message}" if message else None)
        self.path = path
        self.line = line


class PlanError(ShardmigError):
    """A plan file is damaged; `shardmig plan` writes it anew from its script."""


class StalePlan(PlanError):
    """A script was edited after its plan was written; run `shardmig plan` and commit both files."""


class PlanChanged(PlanError):
    """A plan differs from what a shard already executed; restore the committed file and write a new revision."""


class LintFailed(ShardmigError):
    """
    A plan is not additive; `shardmig lint` shows each violation with its cure.

    Attributes:
        violations: what the linter found, in the order of the plan (`shardmig.lint.Violation`).
    """

    def __init__(self, message: str | None = None, *, violations: Sequence[object] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)


class LocalServerError(ShardmigError):
    """A throw-away PostgreSQL server could not be run on this machine."""


# --------------------------------------------------------------------------------------------------------------------
# What happens on one shard


class ShardError(ShardmigError):
    """
    Something failed on one shard; the others are not concerned.

    Attributes:
        shard: the shard's name.
        step: "revision step n" when a step was being applied, else None.
    """

    def __init__(self, message: str | None = None, *, shard: str, step: str | None = None) -> None:
        super().__init__(message)
        self.shard = shard
        self.step = step

    def __str__(self) -> str:
        """Put shard and step in front of the message."""
        where = self.shard if self.step is None else f"{self.shard}, {self.step}"
        return f"{where}: {self.args[0]}"


class ShardUnreachable(ShardError):
    """No connection to the shard; nothing was changed there. Check its URL and the server, then apply again."""


class ShardBusy(ShardError):
    """Another runner works on this shard; wait for it or end it. `shardmig status` shows who it is."""


class ThroughPooler(ShardError):
    """
    The connection goes through a transaction pooler.

    A runner needs one server session of its own: give the server's own address in this shard's url.
    """


class NotPrimary(ShardError):
    """The server is a standby; give the primary's address in this shard's url."""


class LockNotObtained(ShardError):
    """A busy table could not be locked in time; apply again when the named transactions are over."""


class StepFailed(ShardError):
    """A step failed and was rolled back; repair the cause and apply again."""


class SwitchRefused(ShardError):
    """The flag may not take this edge now; the message says which guard is not met."""


class SwitchedMeanwhile(SwitchRefused):
    """Somebody switched the flag at the same moment; nothing was recorded, and the same command goes on from there."""


class DrainTimeout(ShardError):
    """Transactions older than the flip are still open; stopping here is safe, apply or switch again later."""


class PreflightFailed(ShardError):
    """The shard is not ready for this migration; nothing was changed there. Every reason is listed with its cure."""


class CheckFailed(ShardError):
    """Rows disagree after a move, so the flag stays where it is; repair the named rows or the move, apply again."""


class GateFailed(ShardError):
    """The canary did not pass its gate, so no other shard was begun; repair the cause and apply again."""


class Overloaded(ShardError):
    """The server's load, or an operator, kept a move at rest for too long; what is moved stays, apply again later."""


class LedgerOutdated(ShardError):
    """The shard's ledger is of an older version; `shardmig apply` upgrades it in passing."""


class ProofFailed(ShardError):
    """The catalog shows that a statement was not additive; it was rolled back. Report this: the linter missed it."""


class Fenced(ShardError):
    """Another runner took this shard over; this one stopped without writing anything more."""


class InDoubt(ShardError):
    """The connection broke during COMMIT; give the same command again: the ledger there decides whether it happened."""


# --------------------------------------------------------------------------------------------------------------------
# What application code meets


class FlagError(ShardmigError):
    """The version flags of a shard cannot be read or do not allow this transaction; nothing was guessed."""


class WrongShard(ShardError, FlagError):
    """The database behind this name is another shard; check the url or the routing. Nothing was changed."""


class LedgerMissing(FlagError):
    """The shard has no ledger (schema `shardmig`); run `shardmig apply` there before this release starts."""


class UnknownFlag(FlagError):
    """A flag is not declared in this Flags object; declare it once: Flags(Flag("name"), ...)."""


class UnknownState(FlagError):
    """The ledger holds a state that this version of shardmig does not know; upgrade the application's shardmig."""


class ShardBehind(FlagError):
    """A shard's flag is below what this release understands (`at_least`); bring the shard forward first."""


class ViewExpired(FlagError):
    """A view of the flags was used after its transaction; read the flags inside the transaction that uses them."""


class WrongTransaction(FlagError):
    """
    A transaction with flags cannot begin here.

    It needs an idle connection with autocommit=True, outside pipeline mode, because BEGIN carries the flags.
    """


class WriteRefused(FlagError):
    """The transaction may not write here: the server is a standby, or the isolation level could lose a write."""


class ShardInMaintenance(FlagError):
    """
    The shard is in maintenance; answer 503 and try again later.

    Attributes:
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str | None = None, *, retry_after: int = 30) -> None:
        super().__init__(message)
        self.retry_after = retry_after
