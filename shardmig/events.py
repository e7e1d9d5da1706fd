"""
What the runner and the fleet say while they work; they never print, whoever listens does.

Events are facts about one shard, in the order they happened there. Nothing may depend on being heard: a listener that
is slow or absent changes nothing on a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardmig.states import State

__all__ = [
    "BatchDone",
    "BatchFailed",
    "Blocker",
    "Draining",
    "Event",
    "FlagSwitched",
    "Listener",
    "OutcomeReached",
    "Parked",
    "RangeCompared",
    "StepDone",
    "StepStarted",
    "TookOver",
    "TransactionEnded",
    "Waiting",
    "Warned",
]


@dataclass(frozen=True, slots=True)
class Blocker:
    """
    Somebody else's transaction that is in the way; what this role may not see is None.

    Attributes:
        pid: its server process; None for a prepared transaction.
        role: who runs it.
        application: its application_name.
        age_s: seconds since the transaction began.
        query: the beginning of its current or last query.
        what: "client", "autovacuum" or "prepared".
    """

    pid: int | None
    role: str | None
    application: str | None
    age_s: float | None
    query: str | None
    what: str = "client"

    def __str__(self) -> str:
        """Describe the blocker in one line."""
        who = f"pid {self.pid}" if self.pid is not None else "a prepared transaction"
        parts = [who if self.what != "autovacuum" else f"autovacuum {who}"]
        if self.role:
            parts.append(f"role {self.role}")
        if self.application:
            parts.append(f"application {self.application}")
        if self.age_s is not None:
            parts.append(f"open for {self.age_s:.1f} s")
        if self.query:
            parts.append(f"query: {self.query}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _OnShard:
    """Every event happens on one shard."""

    shard: str


@dataclass(frozen=True, slots=True)
class _InStep(_OnShard):
    """An event within step `step`, counted from 1, of a revision."""

    revision: str
    step: int


@dataclass(frozen=True, slots=True)
class StepStarted(_InStep):
    """A step begins, or goes on after an interruption."""

    kind: str


@dataclass(frozen=True, slots=True)
class StepDone(_InStep):
    """A step and its record are committed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class BatchDone(_InStep):
    """
    A batch of a move is committed.

    Attributes:
        rows: rows of this batch.
        rows_done: rows of this move so far, earlier runs included.
        rows_estimated: rows that this move will have; None when unknown.
        rows_per_s: lately.
        eta_s: seconds left at this speed, the check included; None when unknown.
    """

    rows: int
    rows_done: int
    rows_estimated: int | None
    rows_per_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class RangeCompared(_InStep):
    """
    Rows of a range were compared behind the last batch; those that disagreed are mended.

    Attributes:
        rows_done: rows compared so far, about.
        rows_moved: rows of the move.
        rows_per_s: compared lately; 0 before the second range.
        eta_s: seconds left at this speed; None when unknown.
    """

    rows_done: int
    rows_moved: int
    rows_per_s: float
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class BatchFailed(_InStep):
    """
    Rows of a move were refused for good: a batch, or a range that the check compares or purges. It is rolled back.

    Attributes:
        after: key before the first row, as text, one element a column; None for the beginning of the table.
        upto: key of the last row; None for the end.
        rows: how many they are, of the target when orphans are purged; None when that could not be asked.
        culprit: key of the first row that fails; None where it is not known, or no row is the cause.
        reason: the server's words.
    """

    after: list[str] | None
    upto: list[str] | None
    rows: int | None
    culprit: list[str] | None
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting(_OnShard):
    """
    Work rests until something else lets go.

    Attributes:
        reason: a clause that completes "waits because".
        blockers: who is in the way, the oldest first.
    """

    reason: str
    blockers: tuple[Blocker, ...] = ()


@dataclass(frozen=True, slots=True)
class FlagSwitched(_OnShard):
    """A flag took one edge, and the change is committed."""

    flag: str
    before: State
    after: State


@dataclass(frozen=True, slots=True)
class Draining(_OnShard):
    """Transactions that were open when a flag changed are waited out, the oldest first."""

    flag: str
    blockers: tuple[Blocker, ...]


@dataclass(frozen=True, slots=True)
class TransactionEnded(_OnShard):
    """A drain ended, on request, a transaction that it would have waited for; its session is gone with it."""

    flag: str
    blocker: Blocker


@dataclass(frozen=True, slots=True)
class MaintenanceSet(_OnShard):
    """A runner closed the shard by itself ("read-only", "offline"), or opened it again ("off")."""

    mode: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class TookOver(_OnShard):
    """Another runner was ended on request; `who` describes its session."""

    who: str


@dataclass(frozen=True, slots=True)
class Warned(_OnShard):
    """Nothing stands in the way, but somebody should know."""

    message: str


@dataclass(frozen=True, slots=True)
class Parked(_OnShard):
    """A blocked shard gave its place to others; it is tried again at the end of the run."""

    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeReached(_OnShard):
    """The shard's work is over for this run; `outcome` is the word that the report uses."""

    outcome: str
    detail: str = ""
    seconds: float = 0.0


Event = (
    StepStarted
    | StepDone
    | BatchDone
    | BatchFailed
    | RangeCompared
    | Waiting
    | FlagSwitched
    | Draining
    | TransactionEnded
    | MaintenanceSet
    | TookOver
    | Warned
    | Parked
    | OutcomeReached
)
Listener = Callable[[Event], None]
