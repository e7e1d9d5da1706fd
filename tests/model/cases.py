"""
What must hold, and what must not: each thing that the protocol waits for or refuses, taken away alone.

A case that fails names the harm that its trace must end in, so that it fails for its own reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.fences import Fences, Standby
from model.rows import Rows
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FAILING", "HOLDING", "Case"]

OLD, DUAL, LIVE, DONE = State


@dataclass(frozen=True)
class Case:
    """
    One model and what is known of it.

    Attributes:
        name: a sentence's beginning.
        model: the model.
        harm: what the last line of the trace says; "" when the model holds.
        quick: part of the sample that every run looks at.
    """

    name: str
    model: Any = field(repr=False)
    harm: str = ""
    quick: bool = False


HOLDING = (
    Case("one table, READ COMMITTED", Rows(), quick=True),
    Case("one table, REPEATABLE READ", Rows(isolation="RR")),
    Case("one table, three processes", Rows(apps=3)),
    Case("one table, prepared transactions counted by the drain", Rows(prepared="counted")),
    Case("two tables, rows come and go, READ COMMITTED", Rows("entity"), quick=True),
    Case("two tables, rows come and go, REPEATABLE READ refused in DUAL", Rows("entity", isolation="RR")),
    Case("two tables, rows come and go, REPEATABLE READ, the move touches its source",
         Rows("entity", isolation="RR", lock="touch")),
    Case("two tables, rows come and go, prepared transactions counted", Rows("entity", prepared="counted")),
    Case("two tables, rows come and go, compared and repaired before LIVE", Rows("entity", check=True)),
    Case("two tables, rows come and go, back takes new first and gives way", Rows("entity", back="target")),
    Case("two tables, rows come and go, back takes new first, REPEATABLE READ",
         Rows("entity", isolation="RR", back="target")),
    Case("two tables, values come and go, READ COMMITTED", Rows("value"), quick=True),
    Case("two tables, values come and go, REPEATABLE READ refused in DUAL", Rows("value", isolation="RR")),
    Case("two tables, values come and go, REPEATABLE READ, the move touches its source",
         Rows("value", isolation="RR", lock="touch")),
    Case("two tables, values come and go, prepared transactions counted", Rows("value", prepared="counted")),
    Case("two tables, values come and go, compared and repaired before LIVE", Rows("value", check=True)),
    Case("two tables, values come and go, back takes new first and gives way", Rows("value", back="target")),
    Case("two tables, values come and go, back takes new first, REPEATABLE READ",
         Rows("value", isolation="RR", back="target")),
    Case("the token on BEGIN, READ COMMITTED", Fences(), quick=True),
    Case("the token on BEGIN, REPEATABLE READ", Fences(isolation="RR")),
    Case("a random token and a failover that loses the last flip", Fences(failover=True)),
    Case("the same under REPEATABLE READ", Fences(failover=True, isolation="RR")),
    Case("snapshots taken over and handed on, and the drain waits until none is old",
         Fences(isolation="RR", imports=True)),
    Case("maintenance, drain, move, READ COMMITTED", Fences("maintenance")),
    Case("maintenance, drain, move, REPEATABLE READ", Fences("maintenance", isolation="RR"), quick=True),
    Case("flag and data of a standby in one snapshot", Standby(), quick=True),
    # Not ours, but sound where their assumption holds: what makes them fail below is the assumption.
    Case("leases, if no process ever pauses and transactions are drained too", Fences("lease", pauses=False)),
    Case("advisory locks under READ COMMITTED", Fences("advisory")),
    Case("draining the holders of a table lock under READ COMMITTED", Fences("holders")),
    Case("LOCK TABLE as a freeze under READ COMMITTED", Fences("freeze")),
)  # fmt: skip


def _without_a_wait() -> Iterator[Case]:
    harms = {
        "W1": "whoever begins now in LIVE reads new",
        "W2": "whoever begins now in LIVE reads new",
        "W3": "reads old, which is stale in DUAL",
        "W4": "reads new, which is stale in LIVE",
        "W5": "whoever begins now in DUAL reads old",
        "W6": "whoever begins now in DUAL reads old",
        "W7": "whoever begins now in LIVE reads new",
    }
    for wait, harm in harms.items():
        for tables in ("one", "entity", "value"):
            model = Rows(tables, without=frozenset({wait}))
            yield Case(f"without {wait}, tables: {tables}", model, harm, quick=tables == "one")


def _with_a_jump() -> Iterator[Case]:
    jumps = {
        (OLD, LIVE): "reads new",
        (OLD, DONE): "reads new",
        (DUAL, DONE): "reads new",
        (LIVE, OLD): "reads",
        (DONE, DUAL): "reads old",
        (DONE, OLD): "reads old",
    }
    for (source, target), harm in jumps.items():
        for tables in ("one", "entity", "value"):
            model = Rows(tables, skips=((source, target),))
            yield Case(
                f"{source.name} → {target.name} in one jump, tables: {tables}", model, harm, quick=tables == "one"
            )


FAILING = (
    *_without_a_wait(),
    *_with_a_jump(),
    Case("a drain that ends late vouches for a later flip", Rows(late=True), "stale", quick=True),
    Case("a drain that ends late, two tables", Rows("entity", late=True), "stale"),
    Case("a role that uses flags and is exempt from the drain", Rows(exempt=1), "stale", quick=True),
    Case("an exempt role that uses flags, two tables", Rows("entity", exempt=1), "stale"),
    Case("prepared transactions not counted, one table", Rows(prepared="ignored"), "stale", quick=True),
    Case("prepared transactions not counted, two tables", Rows("entity", prepared="ignored"), "missing"),
    Case("prepared transactions not counted, values come and go", Rows("value", prepared="ignored"), "missing"),
    Case("a process that knows no flag (G0)", Rows(unaware=1), "stale", quick=True),
    Case("a batch that a flip overtakes, one table", Rows(fenced=False), "stale"),
    Case("a batch that a flip overtakes, two tables", Rows("entity", fenced=False), "stale"),
    Case("SELECT, then UPDATE", Rows(lock="none"), "stale", quick=True),
    Case("an unlocked join, rows come and go", Rows("entity", lock="none"), "stale", quick=True),
    Case("an unlocked join, values come and go", Rows("value", lock="none"), "stale"),
    Case("DO NOTHING, rows come and go", Rows("entity", nothing=True), "stale", quick=True),
    Case("DO NOTHING, values come and go", Rows("value", nothing=True), "stale"),
    Case("purge in one statement, rows come and go", Rows("entity", purge="one"), "missing", quick=True),
    Case("purge in one statement, values come and go", Rows("value", purge="one"), "missing"),
    Case("no purge, rows come and go", Rows("entity", purge="no"), "was deleted"),
    Case("no purge, values come and go", Rows("value", purge="no"), "was deleted"),
    Case("new first, rows come and go", Rows("entity", order="new"), "was deleted", quick=True),
    Case("new first, values come and go", Rows("value", order="new"), "was deleted"),
    Case("old first in DUAL, new first in LIVE", Rows("entity", order="by_state"), "deadlock", quick=True),
    Case("old first in DUAL, new first in LIVE, values", Rows("value", order="by_state"), "deadlock"),
    Case("new first while a reverse move is open", Rows("entity", order="reverse_open", back="target"), "deadlock",
         quick=True),
    Case("new first while a reverse move is open, values",
         Rows("value", order="reverse_open", back="target"), "deadlock"),
    Case("the second table is written though the row is not in the first", Rows("entity", both=True), "was deleted",
         quick=True),
    Case("REPEATABLE READ in DUAL, rows come and go", Rows("entity", isolation="RR", refuse_snapshots=False),
         "was deleted", quick=True),
    Case("REPEATABLE READ in DUAL, values come and go", Rows("value", isolation="RR", refuse_snapshots=False),
         "was deleted"),
    Case("flags and token loaded by two statements", Fences("two statements"), "lost", quick=True),
    Case("flags kept under the token of BEGIN, and a failover that loses a flip",
         Fences("first token", failover=True), "lost", quick=True),
    Case("a token that counts, and a failover that loses a flip", Fences(failover=True, epochs="counter"), "lost",
         quick=True),
    Case("a drain that forgets snapshots taken over", Fences(isolation="RR", imports=True, old_snapshots="not"), "lost",
         quick=True),
    Case("a drain that lists once who took over a snapshot",
         Fences(isolation="RR", imports=True, old_snapshots="listed"), "lost", quick=True),
    Case("OLD when the flag cannot be read", Fences("default"), "lost", quick=True),
    Case("a cache kept up to date by messages", Fences("cache"), "lost", quick=True),
    Case("a cache kept up to date by messages, and no process ever pauses",
         Fences("cache", pauses=False), "lost", quick=True),
    Case("leases, and a process that pauses", Fences("lease"), "lost", quick=True),
    Case("a decision carried into the next transaction", Fences("carry"), "lost", quick=True),
    Case("advisory locks under REPEATABLE READ", Fences("advisory", isolation="RR"), "lost", quick=True),
    Case("draining the holders of a table lock under REPEATABLE READ", Fences("holders", isolation="RR"), "lost",
         quick=True),
    Case("LOCK TABLE as a freeze under REPEATABLE READ", Fences("freeze", isolation="RR"), "lost", quick=True),
    Case("maintenance without a drain", Fences("maintenance", drains=False), "lost", quick=True),
    Case("flag from the primary, data from a standby", Standby("primary"), "stale there", quick=True),
    Case("flag and data of a standby in two snapshots", Standby(one_snapshot=False), "stale there", quick=True),
)  # fmt: skip
