"""
What rides on BEGIN, and what the shard answers. Pure: SQL text out, bytes in.

Answers are read as the server wrote them: the caller's row factories and type adapters have no say in this.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from shardmig.errors import WrongShard
from shardmig.flags.prepared import Form

if TYPE_CHECKING:
    from typing import TypeAlias

    from psycopg import IsolationLevel
    from psycopg.pq.abc import PGresult

    Isolation: TypeAlias = IsolationLevel | Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

__all__ = [
    "ASKING_MARK",
    "MARK",
    "MARKED",
    "ONE_SNAPSHOT",
    "Details",
    "FlagRow",
    "Opening",
    "Statements",
    "read_asked",
    "read_details",
    "read_flags",
    "read_opening",
    "statements",
]

_LEVELS = frozenset({"READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"})
ONE_SNAPSHOT = frozenset({"repeatable read", "serializable"})
"""The levels at which every statement of a transaction sees the same data, as the server spells them."""


MARK = b"default_transaction_read_only"
MARKED = b"on"
"""
The setting by which a transaction that may write is known again at its end.

The opening turns it on with SET LOCAL: for this transaction it is decided already, whatever begins next finds the
session's own again, which is off where anybody may write. The server reports it to the client whenever it changes, so
who commits need not ask: a COMMIT AND CHAIN in between shows in libpq's own memory. Readers lose no write, and go
without: on a full machine it would cost them a tenth of their transactions.
"""
ASKING_MARK = b"SELECT pg_catalog.current_setting('default_transaction_read_only')"
"""Asks for it, where nobody reports it: poolers may keep it for themselves."""

# Asked in every transaction, so no column more than needed: who writes must be able to (a standby is always read-only),
# who reads must know a standby. Where the server stands is asked again each time: tomorrow it may be another one.
_READING = "epoch, maintenance, pg_catalog.pg_is_in_recovery()"
_WRITING = "epoch, maintenance, pg_catalog.current_setting('transaction_read_only')"
# Defaults of server, database and role have a say in it, unless BEGIN names the level.
_ISOLATION = ", pg_catalog.current_setting('transaction_isolation')"
# Marked in the WHERE, for one more column would have to be described and kept.
_OPENING = "SELECT {columns} FROM shardmig.shard WHERE shard = {shard}{marking}"
_MARKING = " AND pg_catalog.set_config('default_transaction_read_only', 'on', true) = 'on'"

# Costs a transaction nothing but a glance at the server's own memory, and only one after a rollback asks.
_ASKING = ", (SELECT count(*) FROM pg_catalog.pg_prepared_statements WHERE name = '{name}')"

# Asked only when the answer is no.
_DETAILS = "SELECT pg_catalog.pg_is_in_recovery(), retry_after_s, reason FROM shardmig.shard WHERE shard = {shard}"

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
        read_only: the transaction may not write, whoever said so; only known of one that wants to.
        isolation: the level, in lower case; only known of a transaction that wants to write.
        standby: the server is in recovery; only known of a transaction that does not write.
    """

    epoch: bytes
    maintenance: int
    read_only: bool = False
    isolation: str = ""
    standby: bool = False

    @property
    def one_snapshot(self) -> bool:
        """Whether every statement of the transaction sees the same data."""
        return self.isolation in ONE_SNAPSHOT


class Details(NamedTuple):
    """Why a shard refuses: what a message says beyond the opening."""

    standby: bool
    retry_after_s: int
    reason: str | None


class FlagRow(NamedTuple):
    """A flag as the shard has it; `epoch` is the shard's, from the same statement."""

    epoch: bytes
    name: str
    state: int
    cross_table: bool
    touch_source: bool


class Statements(NamedTuple):
    """
    One kind of transaction on one shard, in the encoding of the connection.

    Attributes:
        name: of the prepared opening.
        openings: BEGIN and the opening in one message, one text for each `Form`.
        flags: epoch and flags.
        details: why the shard refuses.
        isolation: the level that BEGIN names, in lower case; empty when it names none.
        usual: second and third column of an opening that has nothing to tell but its first, the epoch.
    """

    name: str
    openings: tuple[bytes, ...]
    flags: bytes
    details: bytes
    isolation: str
    usual: tuple[bytes, bytes]


@lru_cache(maxsize=4096)
def statements(
    shard: str,
    *,
    write: bool,
    isolation: Isolation | None,
    deferrable: bool | None,
    encoding: str = "utf-8",
) -> Statements:
    """
    Write the statements that begin a transaction.

    Args:
        shard: its name.
        write: whether the transaction wants to write.
        isolation: the level; None leaves it to the session.
        deferrable: None leaves it to the session.
        encoding: of the connection.

    Raises:
        WrongShard: no shard can have this name.
        ValueError: no such isolation level.
    """
    level = _level(isolation)
    begin = _begin(write=write, level=level, deferrable=deferrable)
    columns = _READING if not write else _WRITING if level else _WRITING + _ISOLATION
    name = _literal(shard)
    marking = _MARKING if write else ""
    opening = _OPENING.format(columns=columns, shard=name, marking=marking)
    prepared = _name(opening)
    # Prepared behind BEGIN: in front of it, its snapshot would be older than the transaction's isolation level allows.
    forms = {
        Form.PLAIN: opening,
        Form.ASKING: _OPENING.format(columns=columns + _ASKING.format(name=prepared), shard=name, marking=marking),
        Form.PREPARING: f"PREPARE {prepared} AS {opening}; EXECUTE {prepared}",
        Form.EXECUTING: f"EXECUTE {prepared}",
    }
    return Statements(
        name=prepared,
        openings=tuple(f"{begin}; {forms[form]}".encode(encoding) for form in Form),
        flags=_FLAGS.format(shard=name).encode(encoding),
        details=_DETAILS.format(shard=name).encode(encoding),
        isolation=level.lower(),
        usual=(b"0", b"off" if write else b"f"),
    )


def _name(opening: str) -> str:
    from hashlib import blake2b  # noqa: PLC0415 - OpenSSL comes with it, which `import shardmig` does not need

    return "shardmig_" + blake2b(opening.encode(), digest_size=12).hexdigest()


def _level(isolation: Isolation | None) -> str:
    if isolation is None:
        return ""
    level = str(getattr(isolation, "name", isolation)).replace("_", " ").upper()
    if level not in _LEVELS:
        raise ValueError(f"no isolation level {isolation!r}: {', '.join(sorted(_LEVELS))}")
    return level


def _begin(*, write: bool, level: str, deferrable: bool | None) -> str:
    words = ["BEGIN"]
    if level:
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


def read_opening(answer: PGresult, *, write: bool, isolation: str) -> Opening | None:
    """
    Read the answer to the opening; None: the database has no such shard.

    Args:
        answer: of the statement that `statements` wrote for the same arguments.
        write: whether the transaction wants to write.
        isolation: what BEGIN named.
    """
    if not answer.ntuples:
        return None
    cell = answer.get_value
    epoch, maintenance = cell(0, 0) or b"", int(cell(0, 1) or 0)
    if not write:
        return Opening(epoch, maintenance, standby=cell(0, 2) == b"t")
    return Opening(epoch, maintenance, cell(0, 2) == b"on", isolation or (cell(0, 3) or b"").decode())


def read_asked(answer: PGresult) -> bool:
    """Read whether the opening is prepared already, from the answer to `Form.ASKING`."""
    return bool(answer.ntuples) and answer.get_value(0, answer.nfields - 1) == b"1"


def read_details(answer: PGresult) -> Details:
    """Read why a shard refuses."""
    cell = answer.get_value
    reason = cell(0, 2)
    return Details(
        standby=cell(0, 0) == b"t",
        retry_after_s=int(cell(0, 1) or 0),
        reason=None if reason is None else reason.decode(errors="replace"),
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
