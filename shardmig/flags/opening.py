"""
What rides on BEGIN, and what the shard answers. Pure: SQL text out, bytes in.

Answers are read as the server wrote them: the caller's row factories and type adapters have no say in this.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from shardmig.errors import WrongShard

if TYPE_CHECKING:
    from typing import TypeAlias

    from psycopg import IsolationLevel
    from psycopg.pq.abc import PGresult

    Isolation: TypeAlias = IsolationLevel | Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

__all__ = ["FlagRow", "Opening", "Statements", "read_flags", "read_opening", "statements"]

_LEVELS = frozenset({"READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"})
_ONE_SNAPSHOT = frozenset({"repeatable read", "serializable"})

# Where the server stands is asked in every transaction: the connection may lead to another one tomorrow. What the
# transaction got is asked because defaults of server, database and role have a say in it.
_OPENING = """\
SELECT epoch, maintenance, pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_isolation'),
 pg_catalog.current_setting('transaction_read_only'), retry_after_s, reason
 FROM shardmig.shard WHERE shard = {shard}"""

# Epoch and flags in ONE statement: under READ COMMITTED two statements may see two epochs, and the flags of one would
# be kept under the token of the other for good.
_FLAGS = """\
SELECT s.epoch, f.flag, f.state, f.cross_table, f.touch_source
 FROM shardmig.shard s LEFT JOIN shardmig.flag f USING (shard) WHERE s.shard = {shard}"""


class Opening(NamedTuple):
    """
    What a shard says of itself and of the transaction.

    Attributes:
        epoch: the token as the server wrote it; only ever compared.
        maintenance: 0 none, 1 read-only, 2 offline.
        standby: the server is in recovery.
        isolation: what the transaction really got, in lower case.
        read_only: the transaction may not write, whoever said so.
        retry_after_s: seconds after which a client that met maintenance should try again.
        reason: why the shard is in maintenance.
    """

    epoch: bytes
    maintenance: int
    standby: bool
    isolation: str
    read_only: bool
    retry_after_s: int
    reason: str | None

    @property
    def one_snapshot(self) -> bool:
        """Whether every statement of the transaction sees the same data."""
        return self.isolation in _ONE_SNAPSHOT


class FlagRow(NamedTuple):
    """A flag as the shard has it; `epoch` is the shard's, from the same statement."""

    epoch: bytes
    name: str
    state: int
    cross_table: bool
    touch_source: bool


class Statements(NamedTuple):
    """One kind of transaction on one shard, in the encoding of the connection."""

    begin: bytes
    opening: bytes
    begin_and_opening: bytes
    flags: bytes


@lru_cache(maxsize=4096)
def statements(
    shard: str, *, write: bool, isolation: Isolation | None, deferrable: bool | None, encoding: str
) -> Statements:
    """
    Write the statements that begin a transaction.

    Raises:
        WrongShard: no shard can have this name.
        ValueError: no such isolation level.
    """
    begin = _begin(write=write, isolation=isolation, deferrable=deferrable)
    name = _literal(shard)
    opening, flags = _OPENING.format(shard=name), _FLAGS.format(shard=name)
    return Statements(*(text.encode(encoding) for text in (begin, opening, f"{begin}; {opening}", flags)))


def _begin(*, write: bool, isolation: Isolation | None, deferrable: bool | None) -> str:
    words = ["BEGIN"]
    if isolation is not None:
        level = str(getattr(isolation, "name", isolation)).replace("_", " ").upper()
        if level not in _LEVELS:
            raise ValueError(f"no isolation level {isolation!r}: {', '.join(sorted(_LEVELS))}")
        words.append(f"ISOLATION LEVEL {level}")
    if not write:
        words.append("READ ONLY")
    if deferrable is not None:
        words.append("DEFERRABLE" if deferrable else "NOT DEFERRABLE")
    return " ".join(words)


def _literal(name: str) -> str:
    """Quote a shard's name so that it means the same whether or not standard_conforming_strings is on."""
    if "\0" in name:
        raise WrongShard("a shard's name has no NUL in it", shard=repr(name))
    quoted = name.replace("'", "''")
    return f"'{quoted}'" if "\\" not in quoted else "E'{}'".format(quoted.replace("\\", "\\\\"))


def read_opening(answer: PGresult, encoding: str) -> Opening | None:
    """Read the answer to the opening; None: the database has no such shard."""
    if not answer.ntuples:
        return None
    cell = answer.get_value
    reason = cell(0, 6)
    return Opening(
        epoch=cell(0, 0) or b"",
        maintenance=int(cell(0, 1) or 0),
        standby=cell(0, 2) == b"t",
        isolation=(cell(0, 3) or b"").decode(),
        read_only=cell(0, 4) == b"on",
        retry_after_s=int(cell(0, 5) or 0),
        reason=None if reason is None else reason.decode(encoding, "replace"),
    )


def read_flags(answer: PGresult) -> list[FlagRow]:
    """Read epoch and flags; a shard without flags gives one row with an empty name, an unknown shard none."""
    cell = answer.get_value
    return [
        FlagRow(
            epoch=cell(row, 0) or b"",
            name=(cell(row, 1) or b"").decode(errors="replace"),
            state=int(cell(row, 2) or 0),
            cross_table=cell(row, 3) == b"t",
            touch_source=cell(row, 4) == b"t",
        )
        for row in range(answer.ntuples)
    ]
