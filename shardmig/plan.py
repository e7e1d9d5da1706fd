"""
The plan: a script rendered once, frozen and checksummed.

A plan is everything that will be executed on a shard, step by step, and nothing else. It is written beside its script
as SQL (`planfile`), linted (`lint.accept`) and only then given to the runner, as an `AcceptedPlan`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from shardmig.states import State

__all__ = ["BATCH", "AcceptedPlan", "Move", "Plan", "Statement", "Step", "Switch", "bind_batch", "quote", "quote_name"]

_PARTS = re.compile(r'("(?:[^"]|"")*")(?=\.|\Z)|([^.]+)')  # quoted already, or plain
BATCH = "{batch}"  # the literal token in a move's SQL that becomes a key range


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Statement(_Frozen):
    """
    One structural SQL statement.

    Attributes:
        sql: exactly what is executed, without a terminator.
        transactional: False for CREATE INDEX CONCURRENTLY, which runs outside a transaction.
        line: line of the script that produced it; not part of the checksum.
    """

    kind: Literal["statement"] = "statement"
    sql: str
    transactional: bool = True
    line: int | None = None


class Move(_Frozen):
    """
    One data move, fully derived: every SQL text that the engine may execute for it.

    Each text but `bounds` holds `{batch}` exactly once. In the texts that walk the source (`forward`, `check`, `back`,
    `back_check`) it becomes a condition over `key`, in those that walk the target (`orphans`, `purge`) one over
    `target_key`.

    Attributes:
        table: the source table, walked by keyset; schema-qualified only if the script said so.
        alias: name that the key columns carry in a hand-written statement, if they need one.
        key: columns of a unique, not-null key of `table`, in the order they are walked.
        target: the second table of a cross-table move; None when source and target are one.
        target_key: columns of `target` that hold the values of `key`, in the same order; empty without a target.
        writes: target columns that forward fills.
        restores: source columns that back fills again.
        forward: writes new from old, overwriting whatever is there.
        check: returns the keys (columns of `key`) of rows whose new differs from forward(old).
        orphans: returns `target_key` of target rows whose source row is gone; cross-table only.
        purge: deletes those rows; cross-table only.
        back: writes old from new; None when the move cannot be undone after DONE.
        back_check: returns the keys of rows whose old differs from back(new); None with `back`.
        lossy: the script accepts that back(forward(x)) is not x.
        triggers: "fire" when user triggers on the tables written may fire, else such a move is refused.
        touch_source: forward also touches source rows, so that a REPEATABLE READ writer retries.
        seed: the rows are the plan's own: `forward` writes them, `purge` removes them on the way back to OLD.
        line: line of the script that called move_rows or seed_rows; not part of the checksum.
    """

    kind: Literal["move"] = "move"
    table: str
    seed: bool = False
    alias: str | None = None
    key: tuple[str, ...] = Field(min_length=1)
    target: str | None = None
    target_key: tuple[str, ...] = ()
    writes: tuple[str, ...] = Field(min_length=1)
    restores: tuple[str, ...] = ()
    forward: str
    check: str
    orphans: str | None = None
    purge: str | None = None
    back: str | None = None
    back_check: str | None = None
    lossy: bool = False
    triggers: Literal["refuse", "fire"] = "refuse"
    touch_source: bool = False
    line: int | None = None

    @property
    def cross_table(self) -> bool:
        """Whether old and new live in different tables."""
        return self.target is not None


class Switch(_Frozen):
    """The plan's flag takes the edges up to `to`; what an edge must wait for is done before it."""

    kind: Literal["switch"] = "switch"
    to: State


Step = Annotated[Statement | Move | Switch, Field(discriminator="kind")]


class Plan(_Frozen):
    """
    One script, rendered.

    Steps stand in the order they are applied: statements; then, with a move (or protocol "dual"), Switch(DUAL), the
    moves, Switch(LIVE); without, Switch(LIVE) alone. Steps are numbered from 1.

    Attributes:
        revision: the script's revision id.
        parent: the revision before it; None for the first. Not part of the checksum (a rebase changes nothing).
        flag: name of the migration's flag.
        script_sha256: hash of the script's bytes (line ends as LF) that this was rendered from.
        message: first line of the script's docstring.
        protocol: "dual" walks the flag through DUAL although nothing is moved.
        needs: flags that must be LIVE here before this one leaves OLD, because its moves read what they fill.
        relax: old columns ("table.column") whose NOT NULL is dropped on the edge LIVE → DONE.
        amends: hashes of this revision's earlier plans: a shard that finished one of them is as good as done, one that
            has not may be amended. Not part of the checksum (it changes nothing that is executed).
        online: False when the shard must be offline while this is applied.
        allowed: findings that the script's comments allow, each as "CODE step N: reason", or "CODE step N, M: reason"
            where one call made several steps; without a step where no step is meant.
        steps: what is executed.
    """

    revision: str
    parent: str | None
    flag: str
    script_sha256: str
    message: str = ""
    protocol: Literal["auto", "dual"] = "auto"
    needs: tuple[str, ...] = ()
    relax: tuple[str, ...] = ()
    amends: tuple[str, ...] = ()
    online: bool = True
    allowed: tuple[str, ...] = ()
    steps: tuple[Step, ...]

    @property
    def has_move(self) -> bool:
        """Whether the flag walks through DUAL."""
        return self.protocol == "dual" or bool(self.moves)

    @property
    def cross_table(self) -> bool:
        """Whether any move fills a second table."""
        return any(move.cross_table for _, move in self.moves)

    @property
    def touch_source(self) -> bool:
        """Whether every move that fills a second table touches its source rows: one that does not is enough to miss."""
        return self.cross_table and all(move.touch_source for _, move in self.moves if move.cross_table)

    @property
    def moves(self) -> tuple[tuple[int, Move], ...]:
        """The moves with their step numbers."""
        return tuple((n, s) for n, s in enumerate(self.steps, 1) if isinstance(s, Move))

    @property
    def filled_elsewhere(self) -> bool:
        """Whether the flag walks through DUAL though nothing is moved: the application fills what is new."""
        return self.has_move and not self.moves

    @property
    def has_way_back(self) -> bool:
        """Whether new can fill old again after DONE: every move says how; of a plan's own rows nothing moves back."""
        return bool(self.moves) and all(move.seed or move.back is not None for _, move in self.moves)

    @property
    def sha256(self) -> str:
        """
        Hash of every byte that is executed or steers execution.

        Parent, message, amended hashes, script hash and script lines are left out: they change nothing on a shard.
        """
        body = {
            "revision": self.revision,
            "flag": self.flag,
            "protocol": self.protocol,
            "needs": self.needs,
            "relax": self.relax,
            "online": self.online,
            "allowed": self.allowed,
            "steps": [step_body(step) for step in self.steps],
        }
        return _sha256(body)


class AcceptedPlan:
    """
    A plan that the linter accepted. Only `shardmig.lint.accept` builds one, and the runner takes nothing else.

    Attributes:
        plan: the plan.
        locks: step number → the existing relation that the statement locks (as written, "schema.table" or "table");
            statements that lock no existing relation are absent. Of several, which only the foreign keys of a new
            table lock, it is the first; `locked` returns all.
        creates: step number → the table that the statement creates, likewise as written.
        indexes: step number → the index that a non-transactional statement builds, unqualified.
        sha256: the plan's hash, computed once: a fleet compares it with every shard's ledger.
    """

    __slots__ = ("_further", "creates", "indexes", "locks", "plan", "sha256")

    def __init__(
        self,
        plan: Plan,
        locks: dict[int, str],
        *,
        further: dict[int, tuple[str, ...]] | None = None,
        creates: dict[int, str] | None = None,
        indexes: dict[int, str] | None = None,
        seal: object,
    ) -> None:
        if seal is not _SEAL:
            raise TypeError("only shardmig.lint.accept(plan) makes an AcceptedPlan")
        self.plan = plan
        self.locks = locks
        self.creates = creates or {}
        self.indexes = indexes or {}
        self.sha256 = plan.sha256
        self._further = further or {}

    def locked(self, number: int) -> tuple[str, ...]:
        """Return every existing relation that a step locks, in the order in which it does."""
        return (self.locks[number], *self._further.get(number, ())) if number in self.locks else ()


_SEAL = object()


def step_body(step: Statement | Move | Switch) -> dict[str, object]:
    """Return what of a step is executed or steers execution, ready for hashing."""
    unsaid = {"seed"} if isinstance(step, Move) and not step.seed else set()  # plans from before there were seeds
    return step.model_dump(mode="json", exclude={"line", *unsaid})


def step_sha256(step: Statement | Move | Switch) -> str:
    """Hash one step; the ledger keeps it to tell an amended or edited step from the one that ran."""
    return _sha256(step_body(step))


def bind_batch(
    sql: str, key: tuple[str, ...], *, lower: bool, upper: bool, alias: str | None = None, only: str | None = None
) -> str:
    """
    Replace `{batch}` by a row comparison over the key, before anything parses the SQL.

    Args:
        sql: text holding `{batch}` at most once.
        key: column names, unquoted.
        lower: whether the range has an exclusive lower bound.
        upper: whether it has an inclusive upper bound.
        alias: name that qualifies the key columns.
        only: one condition more that rows of the range must meet.

    Returns:
        SQL whose parameters are $1…$n for the lower bound and then the next n for the upper one, each only if asked
        for; without any bound the condition is TRUE.
    """
    columns = ", ".join((f"{quote(alias)}." if alias else "") + quote(column) for column in key)
    width = len(key)
    conditions = []
    if lower:
        conditions.append(f"({columns}) > ({_parameters(1, width)})")
    if upper:
        conditions.append(f"({columns}) <= ({_parameters(width + 1 if lower else 1, width)})")
    if only is not None:
        conditions.append(f"({only})")
    return sql.replace(BATCH, "(" + (" AND ".join(conditions) or "TRUE") + ")", 1)


def quote(identifier: str) -> str:
    """Quote one SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def quote_name(name: str) -> str:
    """Quote "table" or "schema.table", as a plan names it; what stands in quotes already, dots included, stays."""
    return ".".join(quoted or quote(plain) for quoted, plain in _PARTS.findall(name))


def _parameters(first: int, count: int) -> str:
    return ", ".join(f"${n}" for n in range(first, first + count))


def _sha256(body: object) -> str:
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
