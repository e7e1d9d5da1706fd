"""What must be true whenever nobody works on a shard: rows, ledger, catalog, and what `status` says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torture import ADDRESS, LABEL, disagreements

from chaos.history import STRUCTURE
from shardmig import State
from shardmig.states import EDGES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

    from chaos.history import History
    from shardmig import Flag

__all__ = ["look_at"]

_LAWFUL = {(edge.source.name, edge.target.name) for edge in EDGES}


class _Row(NamedTuple):
    """A flag as the ledger has it."""

    state: State = State.OLD
    new_valid: bool = False
    old_valid: bool = True

    def readable(self) -> set[State]:
        """Name the states as whose reader one reads what was written: this one, and what is said to be valid."""
        valid = {State.LIVE} if self.new_valid and self.state >= State.DUAL else set()
        return {self.state} | valid | ({State.OLD} if self.old_valid and self.state < State.DONE else set())


def look_at(connection: psycopg.Connection[Any], history: History, told: dict[str, Any]) -> Iterator[str]:
    """
    Say what is wrong on a shard.

    Args:
        connection: to it; all is read in one snapshot, for applications go on.
        history: what is migrated.
        told: what `status` said of this shard.
    """
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    flags = {
        name: _Row(State(state), new_valid, old_valid)
        for name, state, new_valid, old_valid in connection.execute(
            "SELECT flag, state, new_valid, old_valid FROM shardmig.flag"
        )
    }
    states = {name: row.state.name for name, row in flags.items()}
    if told["flags"] != states:
        yield f"status says {told['flags']}, the ledger {states}"
    for flag in (LABEL, ADDRESS):
        yield from _rows(connection, flag, flags.get(flag.name, _Row()))
    if history.papers and State.LIVE in flags.get("label", _Row()).readable():
        yield from _papers(connection)
    yield from _log(connection, states)
    yield from _catalog(connection, history)
    connection.execute("COMMIT")


def _rows(connection: psycopg.Connection[Any], flag: Flag, row: _Row) -> Iterator[str]:
    for state in sorted(row.readable()):
        yield from (f"{one} ({row})" for one in disagreements(connection, flag, state)[:3])


def _papers(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """Look at the flag's second move: nobody writes these rows, so they are moved or they are not."""
    [(bad,)] = connection.execute("SELECT count(*) FROM paper WHERE b IS DISTINCT FROM upper(a)").fetchall()
    if bad:
        yield f"{bad} papers were never moved"


def _log(connection: psycopg.Connection[Any], states: dict[str, str]) -> Iterator[str]:
    """Follow every flag through the log: lawful edges, each from where the one before led, to where the flag is."""
    here = dict.fromkeys(states, State.OLD.name)
    for flag, before, after in connection.execute(
        "SELECT flag, before, after FROM shardmig.log WHERE action = 'switch' ORDER BY id"
    ):
        if here[flag] != before or (before, after) not in _LAWFUL:
            yield f"the log takes {flag} from {before} to {after}, and it was {here[flag]}"
        here[flag] = after
    if here != states:
        yield f"the log ends with {here}, flags are {states}"


def _catalog(connection: psycopg.Connection[Any], history: History) -> Iterator[str]:
    """Find the structure of what is done, and none of what was never begun."""
    done = dict(
        connection.execute(
            "SELECT m.revision, coalesce(bool_and(s.status = 'DONE') FILTER (WHERE s.kind = 'statement'), true) "
            "FROM shardmig.migration m JOIN shardmig.step s USING (shard, revision) GROUP BY 1"
        ).fetchall()
    )
    there = {
        name
        for (name,) in connection.execute(
            "SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'public' "
            "UNION ALL SELECT indexrelid::regclass::text FROM pg_index WHERE indisvalid"
        )
    }
    for revision in history.scripts:
        wanted = set(STRUCTURE[revision[5:]])
        if done.get(revision) and not wanted <= there:
            yield f"{revision} is done, and {wanted - there} is not there"
        if revision not in done and wanted & there:
            yield f"{revision} was never begun, and {wanted & there} is there"
