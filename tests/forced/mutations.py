"""
The ledger with one thing taken away, and the protocol that is left when nothing is.

Settings are the model's own: what is one line in `model.cases` is here a guard less in the ledger on the server.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from model.fences import Fences, Standby
from model.rows import Rows

from shardmig import switching
from shardmig.ledger import lawful
from shardmig.states import EDGES, Edge, Guard, State

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    import pytest

__all__ = ["Model", "rows_of", "sound", "weaken_drain", "weaken_ledger"]

Model = Rows | Fences | Standby
_WAITS = {
    (State.DUAL, State.LIVE): "W2",
    (State.LIVE, State.DONE): "W3",
    (State.DUAL, State.OLD): "W4",
    (State.LIVE, State.DUAL): "W6",
}


def rows_of(model: Model) -> Rows:
    """Return the settings about rows; models about fences have one table, written and moved as it should be."""
    return model if isinstance(model, Rows) else Rows()


def sound(model: Model) -> Model:
    """Return the protocol where this model is one thing less: the same tables, isolation and happenings."""
    match model:
        case Rows():
            prepared = model.prepared if model.prepared == "never" else "counted"
            return Rows(model.tables, isolation=model.isolation, back=model.back, prepared=prepared)
        case Fences():
            return Fences(isolation=model.isolation, apps=model.apps, failover=model.failover, imports=model.imports)
        case Standby():
            return Standby()


def weaken_ledger(psql: psycopg.Connection[Any], model: Model) -> None:
    """Take out of the ledger what would refuse this mutation."""
    if isinstance(model, Fences) and model.epochs == "counter":
        psql.execute(
            "CREATE OR REPLACE FUNCTION shardmig.draw_epoch() RETURNS bigint LANGUAGE sql VOLATILE "
            "AS 'SELECT max(epoch) + 1 FROM shardmig.shard'"
        )
        drawn = "uuid_hash_extended(gen_random_uuid(), 0)"
        _rewrite(psql, "on_flag_write", lambda sql: _replaced(sql, drawn, "shardmig.draw_epoch()"))
    if not isinstance(model, Rows):
        return
    if model.skips or model.without - {"W1", "W5"}:
        before, after = lawful(EDGES), lawful(_edges(model))
        for name, written in (("guards", "CASE edge {} END"), ("forgetting", "edge IN ({})")):
            old, new = written.format(before[name]), written.format(after[name] or "NULL")
            _rewrite(psql, "on_flag_write", lambda sql: _replaced(sql, old, new))  # noqa: B023 - called at once
    if "W1" in model.without:
        _rewrite(psql, "on_flag_write", lambda sql: _replaced(sql, "OLD.state = 1 AND NEW.drained", "OLD.state = 1"))
    if "W5" in model.without:
        _rewrite(psql, "on_flag_write", lambda sql: _replaced(sql, "OLD.state = 2 AND NEW.drained", "OLD.state = 2"))
    if model.without & {"W1", "W5"}:
        _rewrite(psql, "begin_move", lambda sql: _replaced(sql, "AND f.drained", ""))
    if not model.fenced:
        condition = "AND s.term = my_term AND s.cursor IS NOT DISTINCT FROM expected"
        _rewrite(psql, "record_batch", lambda sql: _replaced(sql, condition, ""))


def _edges(model: Rows) -> list[Edge]:
    edges = [Edge(*skip, Guard.NONE, has_move=True, invalidates=None, forgets=False, when="") for skip in model.skips]
    for edge in EDGES:
        wait = _WAITS.get((edge.source, edge.target)) if edge.has_move else None
        forgets = edge.forgets and "W7" not in model.without
        edges.append(edge._replace(guard=Guard.NONE if wait in model.without else edge.guard, forgets=forgets))
    return edges


def _rewrite(psql: psycopg.Connection[Any], function: str, change: Callable[[str], str]) -> None:
    found = psql.execute("SELECT pg_get_functiondef(%s::regproc)", [f"shardmig.{function}"]).fetchone()
    assert found is not None
    psql.execute(change(found[0]).encode())


def _replaced(sql: str, old: str, new: str) -> str:
    """Replace words, also where they stand in two lines."""
    return _found(re.subn(r"\s+".join(map(re.escape, old.split())), new, sql))


def _found(replaced: tuple[str, int]) -> str:
    sql, hits = replaced
    assert hits == 1, "what this mutation takes away is not there any more"
    return sql


def weaken_drain(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out of the drain whom this mutation does not wait for."""
    if isinstance(model, Rows) and model.prepared == "ignored":
        monkeypatch.setattr(switching, "_PREPARED", switching._PREPARED + " AND false")
    if isinstance(model, Fences) and model.old_snapshots != "none":
        monkeypatch.setattr(switching, "_HANDED_ON", switching._HANDED_ON + " AND false")
    if isinstance(model, Fences) and model.old_snapshots == "not":
        monkeypatch.setattr(switching, "_OLD_SNAPSHOT", switching._OLD_SNAPSHOT + " AND false")
