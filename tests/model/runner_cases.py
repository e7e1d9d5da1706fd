"""
What must hold of the runner's own ways, and what must not: several moves, a failover between two commits, a handful.

They stand apart from `cases`: those are mutations of the protocol, and each is played on real servers as a schedule of
transactions; these are mutations of one program, whose schedules are its tests (`test_moves_failures`, `test_handful`).
"""

from __future__ import annotations

from model.cases import Case
from model.rows import Rows
from model.several import Several

__all__ = ["RUNNER_FAILING", "RUNNER_HOLDING"]

RUNNER_HOLDING = (
    Case("two moves behind one flag", Several(), quick=True),
    Case("two moves, two processes", Several(apps=2), quick=True),
    Case("three moves behind one flag", Several(moves=3), quick=True),
    Case("two moves and a failover to an older copy at any moment", Several(failover=True)),
    # Two things each of which is enough: what either would let pass, the other finds.
    Case("the same, and the runner believes what it remembers: the ledger asks each move",
         Several(failover=True, rereads=False)),
    Case("the same, and the ledger does not ask: the runner begins with the first move again",
         Several(failover=True, asks="no")),
    Case("a handful, one table", Rows(handful="as built"), quick=True),
    Case("a handful, one table, REPEATABLE READ", Rows(isolation="RR", handful="as built")),
    Case("a handful, rows come and go", Rows("entity", handful="as built")),
    Case("a handful, rows come and go, REPEATABLE READ refused in DUAL",
         Rows("entity", isolation="RR", handful="as built")),
    Case("a handful, values come and go", Rows("value", handful="as built")),
    Case("a handful and prepared transactions, which it finds", Rows("value", prepared="counted", handful="as built")),
    Case("a handful of one table that SELECTs, then UPDATEs: the check refuses it",
         Rows(lock="none", check=True, handful="as built")),
    Case("a handful that says DO NOTHING: the check refuses it",
         Rows("value", nothing=True, check=True, handful="as built")),
)  # fmt: skip

RUNNER_FAILING = (
    Case("a failover between two moves, the runner believes what it remembers, and nobody asks each move",
         Several(failover=True, rereads=False, asks="no"), "new of move 2", quick=True),
    Case("the same, and one move is asked", Several(failover=True, rereads=False, asks="any"), "new of move 2",
         quick=True),
    Case("new is valid when the first of two moves is over", Several(early=True, asks="any"), "new of move 2",
         quick=True),
    Case("giving up forgets the first move alone", Several(forgets="first"), "new of move 2", quick=True),
    Case("a drain remembered beyond a flip", Several(believes_drain=True), "stale", quick=True),
    Case("all is moved, under whatever epoch, and no move is asked", Several(epoch=False, asks="no"), "stale",
         quick=True),
    *(
        Case(f"a handful, {change}, tables: {tables}", Rows(tables, handful=handful), harm,
             quick=tables == "entity")
        for tables in ("one", "entity", "value")
        for change, handful, harm in (
            ("and nobody looks who is open", "without looks", "stale"),
            ("and the looks come last", "looks last", "new, and" if tables != "one" else "stale"),
            ("and the looks come before DUAL is committed", "looks before DUAL", "stale"),
            ("and the flag is not held", "unheld", "stale"),
            ("under one snapshot", "one snapshot", "missing" if tables != "one" else "stale"),
        )
    ),
    Case("a handful that nobody compares, rows come and go", Rows("entity", handful="unchecked"), "was deleted",
         quick=True),
    Case("a handful that nobody compares, values come and go", Rows("value", handful="unchecked"), "was deleted"),
    Case("a handful of one table that SELECTs, then UPDATEs, and nobody compares",
         Rows(lock="none", check=True, handful="unchecked"), "stale"),
    # Compared as it is, it still wants its source rows locked: who deletes them meanwhile has nothing to wait for.
    Case("a handful with an unlocked join, rows come and go",
         Rows("entity", lock="none", check=True, handful="as built"), "was deleted", quick=True),
    Case("a handful that says DO NOTHING, and nobody compares",
         Rows("value", nothing=True, check=True, handful="unchecked"), "stale"),
    Case("a handful and prepared transactions, which it does not look for",
         Rows("value", prepared="ignored", handful="as built"), "missing", quick=True),
    Case("a handful and an exempt role that uses flags", Rows(exempt=1, handful="as built"), "stale"),
)  # fmt: skip
