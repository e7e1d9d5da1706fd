"""
For each mutation of the model, the schedule that does its harm on a real server.

A line is one step, "who: what". R switches, drains and moves as shardmig does (D is a second process of it), A, B and C
are processes of the application. Rows 1 and 9 are there at the beginning, 2 is not. `R: go LIVE` takes every edge on
the way and does what each waits for; a step that waits lets the schedule go on. Most follow the model's own trace
(`pytest -m long -s tests/test_model.py` prints it), so that the server is asked what the model says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SCHEDULES", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """
    A schedule, and what is known of it.

    Attributes:
        steps: a line each.
        says: what is read wrong, where it differs from the last line of the model's trace.
        refuses: errors that somebody meets when nothing is taken away; none as a rule.
        unready: the mutation lets the runner forget something that the ledger does not: it refuses.
    """

    steps: str
    says: str = ""
    refuses: tuple[str, ...] = ()
    unready: bool = False


OLD_WRITER_STAYS = """
    A: begin
    R: go LIVE
    A: put 1
    A: commit
"""
NOT_MOVED = "R: go LIVE"
OLD_READER_STAYS = """
    R: go DUAL
    R: drain
    A: begin
    R: go DONE
    B: begin
    B: put 1
    B: commit
    A: read 1
    A: leave
"""
NEW_READER_STAYS = """
    R: go LIVE
    A: begin
    R: go OLD
    B: begin
    B: put 1
    B: commit
    A: read 1
    A: leave
"""
NEW_WRITER_STAYS = """
    R: go DONE
    A: begin
    R: go DUAL
    A: put 1
    A: commit
"""
NOT_MOVED_BACK = """
    R: go DONE
    A: begin
    A: put 1
    A: commit
    R: go DUAL
"""
GAVE_UP = """
    R: go DUAL
    R: move
    R: go OLD
    A: begin
    A: put 1
    A: commit
    R: go LIVE
"""
LATE_DRAIN = """
    R: go DUAL
    R: drain
    C: begin
    R: flip OLD
    D: drain
    A: begin
    R: flip DUAL
    C: leave
    R: go LIVE
    A: put 1
    A: commit
"""
PREPARED = """
    A: begin
    A: put 2
    A: prepare
    R: go LIVE
    A: commit
"""
UNAWARE = """
    R: go LIVE
    A: begin
    A: put 1
    A: commit
"""
OVERTAKEN = """
    R: go DUAL
    R: drain
    D: start_batch
    R: go OLD
    A: begin
    A: put 2
    A: commit
    R: flip DUAL
    R: drain
    R: begin_move
    D: end_batch
    R: go LIVE
"""
WRITER_HOLDS_THE_ROW = """
    R: go DUAL
    R: drain
    A: begin
    A: put 1
    R: go LIVE
    A: commit
"""
DEAD_VALUE = """
    A: begin
    R: flip DUAL
    B: begin
    B: put 1
    B: commit
    A: put 1
    A: commit
    R: go LIVE
"""
ORPHAN_COMES_BACK = """
    A: begin
    R: flip DUAL
    B: begin
    B: put 1
    B: commit
    A: delete 1
    A: commit
    R: drain
    B: begin
    B: put 1
    R: go LIVE
    B: commit
"""
ORPHAN = """
    A: begin
    R: flip DUAL
    B: begin
    B: put 1
    B: commit
    A: delete 1
    A: commit
    R: go LIVE
"""
NEW_FIRST = """
    R: go DUAL
    R: drain
    A: begin
    A: start delete 1
    R: go LIVE
    A: resume
    A: commit
"""
TWO_ORDERS = """
    R: go DUAL
    R: move
    A: begin
    A: start put 1
    R: go LIVE
    B: begin
    B: start put 1
    A: resume
    B: resume
    A: commit
    B: commit
"""
TWO_ORDERS_IN_LIVE = """
    R: go LIVE
    R: drain
    A: begin
    A: start put 1
    R: go DONE
    R: flip LIVE
    B: begin
    B: start put 1
    A: resume
    B: resume
    A: commit
    B: commit
"""
NOT_IN_OLD = """
    R: go DUAL
    R: drain
    A: begin
    A: set 2
    R: go LIVE
    A: commit
"""
ONE_SNAPSHOT = """
    R: go DUAL
    R: drain
    A: begin
    R: go LIVE
    A: delete 1
    A: commit
"""
EPOCH_AFTER_FLAGS = """
    A: begin
    R: go DUAL
    A: resume
    A: leave
    R: drain
    A: begin
    R: go LIVE
    A: put 1
    A: commit
"""
EPOCH_BEFORE_FLAGS = """
    R: go DUAL
    R: drain
    A: begin
    R: flip OLD
    A: resume
    A: leave
    R: fail_over
    A: begin
    R: go LIVE
    A: put 1
    A: commit
"""
EPOCH_REPEATED = """
    R: go DUAL
    R: drain
    R: flip OLD
    A: begin
    A: leave
    R: fail_over
    R: go LIVE
    A: begin
    A: put 1
    A: commit
"""
TAKEN_OVER = """
    A: begin
    R: go LIVE
    B: take A
    A: leave
    B: put 2
    B: commit
"""
TAKEN_OVER_TWICE = """
    A: begin
    R: go LIVE
    B: take A
    A: leave
    A: take B
    B: leave
    A: put 2
    A: commit
"""
UNREADABLE = """
    R: go DUAL
    R: drain
    R: hide
    A: begin
    R: show
    R: go LIVE
    A: put 1
    A: commit
"""
PAUSED = """
    A: hear
    A: decide
    A: forget
    R: go DUAL
    R: drain
    A: begin
    R: go LIVE
    A: put 1
    A: commit
"""
NOT_TOLD = """
    A: hear
    A: forget
    R: go DUAL
    R: drain
    A: hear
    A: decide
    A: begin
    R: go LIVE
    A: put 1
    A: commit
"""
CARRIED = """
    A: begin
    A: commit
    R: go DUAL
    R: drain
    A: begin
    R: go LIVE
    A: put 1
    A: commit
"""
LOCK_AFTER_SNAPSHOT = """
    R: lock
    A: begin
    R: flip DUAL
    R: drain
    R: unlock
    R: go LIVE
    A: put 2
    A: commit
"""
FROZEN = """
    R: lock
    A: begin
    R: go DONE
    A: put 2
    A: commit
"""
INSIDE = """
    A: begin
    R: go DONE
    A: put 2
    A: commit
"""
STANDBY_BEHIND = """
    S: pause
    R: go LIVE
    S: begin
    S: read 1
"""
STANDBY_GOES_ON = """
    R: go DUAL
    R: drain
    S: catch_up
    S: begin
    R: go DONE
    A: begin
    A: put 1
    A: commit
    S: catch_up
    S: read 1
"""

_WAITS = {
    "W1": Schedule(OLD_WRITER_STAYS, unready=True),
    "W2": Schedule(NOT_MOVED, unready=True),
    "W3": Schedule(OLD_READER_STAYS, unready=True),
    "W4": Schedule(NEW_READER_STAYS, unready=True),
    "W5": Schedule(NEW_WRITER_STAYS, unready=True),
    "W6": Schedule(NOT_MOVED_BACK, unready=True),
    "W7": Schedule(GAVE_UP),
}
_JUMPS = {
    "OLD → LIVE": Schedule(NOT_MOVED, unready=True),
    "OLD → DONE": Schedule("R: go DONE", unready=True),
    "DUAL → DONE": Schedule("R: go DUAL\nR: go DONE", unready=True),
    "LIVE → OLD": Schedule(NEW_READER_STAYS, unready=True),
    "DONE → DUAL": Schedule(NOT_MOVED_BACK, unready=True),
    "DONE → OLD": Schedule(NOT_MOVED_BACK.replace("DUAL", "OLD"), unready=True),
}
_OTHERS = {
    "a drain that ends late vouches for a later flip": Schedule(LATE_DRAIN, refuses=("SwitchedMeanwhile",)),
    "a drain that ends late, two tables": Schedule(LATE_DRAIN, refuses=("SwitchedMeanwhile",)),
    "a role that uses flags and is exempt from the drain": Schedule(OLD_WRITER_STAYS),
    "an exempt role that uses flags, two tables": Schedule(OLD_WRITER_STAYS),
    "prepared transactions not counted, one table": Schedule(PREPARED),
    "prepared transactions not counted, two tables": Schedule(PREPARED),
    "prepared transactions not counted, values come and go": Schedule(PREPARED),
    "a process that knows no flag (G0)": Schedule(UNAWARE),
    "a batch that a flip overtakes, one table": Schedule(OVERTAKEN),
    "a batch that a flip overtakes, two tables": Schedule(OVERTAKEN, says="missing"),
    "SELECT, then UPDATE": Schedule(WRITER_HOLDS_THE_ROW),
    "an unlocked join, rows come and go": Schedule(WRITER_HOLDS_THE_ROW),
    "an unlocked join, values come and go": Schedule(WRITER_HOLDS_THE_ROW),
    "DO NOTHING, rows come and go": Schedule(DEAD_VALUE),
    "DO NOTHING, values come and go": Schedule(DEAD_VALUE),
    "purge in one statement, rows come and go": Schedule(ORPHAN_COMES_BACK),
    "purge in one statement, values come and go": Schedule(ORPHAN_COMES_BACK),
    "no purge, rows come and go": Schedule(ORPHAN),
    "no purge, values come and go": Schedule(ORPHAN),
    "new first, rows come and go": Schedule(NEW_FIRST),
    "new first, values come and go": Schedule(NEW_FIRST),
    "old first in DUAL, new first in LIVE": Schedule(TWO_ORDERS),
    "old first in DUAL, new first in LIVE, values": Schedule(TWO_ORDERS),
    "new first while a reverse move is open": Schedule(TWO_ORDERS_IN_LIVE),
    "new first while a reverse move is open, values": Schedule(TWO_ORDERS_IN_LIVE),
    "the second table is written though the row is not in the first": Schedule(NOT_IN_OLD),
    "REPEATABLE READ in DUAL, rows come and go": Schedule(ONE_SNAPSHOT, refuses=("WriteRefused",)),
    "REPEATABLE READ in DUAL, values come and go": Schedule(ONE_SNAPSHOT, refuses=("WriteRefused",)),
    "flags and token loaded by two statements": Schedule(EPOCH_AFTER_FLAGS),
    "flags kept under the token of BEGIN, and a failover that loses a flip": Schedule(EPOCH_BEFORE_FLAGS),
    "a token that counts, and a failover that loses a flip": Schedule(EPOCH_REPEATED),
    "a drain that forgets snapshots taken over": Schedule(TAKEN_OVER),
    "a drain that lists once who took over a snapshot": Schedule(TAKEN_OVER_TWICE),
    "OLD when the flag cannot be read": Schedule(UNREADABLE, refuses=("LedgerMissing",)),
    "a cache kept up to date by messages": Schedule(PAUSED),
    "a cache kept up to date by messages, and no process ever pauses": Schedule(NOT_TOLD),
    "leases, and a process that pauses": Schedule(PAUSED),
    "a decision carried into the next transaction": Schedule(CARRIED),
    "advisory locks under REPEATABLE READ": Schedule(LOCK_AFTER_SNAPSHOT),
    "draining the holders of a table lock under REPEATABLE READ": Schedule(LOCK_AFTER_SNAPSHOT),
    "LOCK TABLE as a freeze under REPEATABLE READ": Schedule(FROZEN),
    "maintenance without a drain": Schedule(INSIDE),
    "flag from the primary, data from a standby": Schedule(STANDBY_BEHIND),
    "flag and data of a standby in two snapshots": Schedule(STANDBY_GOES_ON),
}


def _named() -> Iterator[tuple[str, Schedule]]:
    for wait, schedule in _WAITS.items():
        for tables in ("one", "entity", "value"):
            yield f"without {wait}, tables: {tables}", schedule
    for jump, schedule in _JUMPS.items():
        for tables in ("one", "entity", "value"):
            yield f"{jump} in one jump, tables: {tables}", schedule
    yield from _OTHERS.items()


SCHEDULES = dict(_named())
