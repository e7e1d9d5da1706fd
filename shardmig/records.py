"""
The records of one shard: what its ledger says was done there, and in which state each flag is.

Reading everything is one flight of queries; whoever reads needs no turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from psycopg import errors as pg

from shardmig.errors import LedgerOutdated, PreflightFailed, ShardError
from shardmig.holder import is_at_work
from shardmig.ledger import newest, refuse_newer, version_of, wrong_shard
from shardmig.session import Query
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from shardmig.config import Shard
    from shardmig.session import Result, Session

__all__ = [
    "STEP_COLUMNS",
    "FlagRow",
    "LogRow",
    "MigrationRow",
    "Records",
    "StepRow",
    "flags_of",
    "flags_query",
    "last_states",
    "read_flags",
    "read_log",
    "read_records",
    "records_queries",
]


@dataclass(frozen=True, slots=True)
class FlagRow:
    """A flag as the ledger has it; `drained`, `new_valid`, `old_valid` are the guards of its edges."""

    flag: str
    revision: str
    state: int
    has_move: bool
    cross_table: bool
    needs: list[str]
    drained: bool
    new_valid: bool
    old_valid: bool
    epoch: int
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class MigrationRow:
    """A plan begun on this shard, with the text that was executed."""

    revision: str
    position: int
    flag: str
    sha256: str
    plan: str
    started_at: datetime
    finished_at: datetime | None
    started_by: str
    finished_by: str | None = None


@dataclass(frozen=True, slots=True)
class StepRow:
    """
    One step's record.

    Keys (`upto`, `cursor`, `check_cursor`) are the text forms of the key columns, one element a column; `lap` is one of
    `laps.Lap`, written. `waiting` says
    why a move rests at the moment, `paused` that an operator wants it to.
    """

    revision: str
    number: int
    kind: str
    sha256: str
    status: str
    term: int
    attempts: int
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    direction: str | None
    bounded_at: datetime | None
    upto: list[str] | None
    cursor: list[str] | None
    lap: list[str] | None
    rows: int
    batches: int
    rows_estimated: int | None
    rows_per_s: float | None
    eta_s: float | None
    noted_at: datetime | None
    check_cursor: list[str] | None
    checked_rows: int
    checked_at: datetime | None
    waiting: str | None
    paused: str | None

    @property
    def done(self) -> bool:
        """Whether nothing is left of this step."""
        return self.status == "DONE"

    @property
    def disproved(self) -> str | None:
        """What the proof of whole schemas found after this step, until people decide; None as a rule."""
        return self.error if self.done else None


@dataclass(frozen=True, slots=True)
class LogRow:
    """One line of the append-only log."""

    at: datetime
    action: str
    flag: str | None
    revision: str | None
    before: str | None
    after: str | None
    reason: str | None
    session_user_name: str
    os_user: str | None


@dataclass(frozen=True, slots=True)
class Records:
    """
    Everything the ledger knows about one shard, read in one flight.

    Attributes:
        shard: the shard's name.
        version: of the ledger.
        epoch: token of the present flags.
        maintenance: 0 none, 1 read-only, 2 offline; `reason` says why.
        term: term of the last runner.
        holder: who that was, and `since` when; None when its turn is over.
        at_work: whether a session holds the shard; a holder without one was killed, or has lost its connection.
        flags: by name.
        migrations: by revision, in the order of the history.
        steps: by revision and number.
    """

    shard: str
    version: int = 0
    epoch: int = 0
    maintenance: int = 0
    reason: str | None = None
    term: int = 0
    holder: str | None = None
    since: datetime | None = None
    at_work: bool = False
    flags: dict[str, FlagRow] = field(default_factory=dict)
    migrations: dict[str, MigrationRow] = field(default_factory=dict)
    steps: dict[tuple[str, int], StepRow] = field(default_factory=dict)

    def state(self, flag: str) -> State:
        """Return a flag's state; no row is OLD."""
        row = self.flags.get(flag)
        return State.OLD if row is None else State(row.state)

    def works_on(self, step: StepRow) -> bool:
        """Say whether somebody is at work and has this step in hand, or has just failed in it."""
        return self.at_work and step.term == self.term

    @property
    def seen_at(self) -> datetime | None:
        """When the runner named there was seen last, by what it wrote; None without one."""
        if self.since is None:
            return None
        steps = [step for step in self.steps.values() if step.kind != "switch"]  # those are written for people, too
        wrote = (at for step in steps for at in (step.noted_at, step.started_at, step.finished_at) if at is not None)
        return max((self.since, *wrote))


# --------------------------------------------------------------------------------------------------------------------
# Read

_LACKING = (pg.UndefinedTable, pg.UndefinedColumn, pg.UndefinedFunction, pg.InvalidSchemaName)

# A server process that is new pays more for a join, or for putting rows in order, than for the rows.
_SHARD = """
SELECT shard, schema_name, shardmig.ledger_version(), epoch, maintenance, reason
FROM shardmig.shard WHERE shard = $1 OR schema_name = $2"""
_RUNNER = "SELECT term, holder, since FROM shardmig.runner WHERE shard = $1"
_FLAGS = """
SELECT flag, revision, state, has_move, cross_table, needs, drained, new_valid, old_valid, epoch, changed_at
FROM shardmig.flag WHERE shard = $1"""
_MIGRATIONS = """
SELECT revision, position, flag, sha256, CASE WHEN sha256 = ANY ($2::text[]) THEN '' ELSE plan END, started_at,
    finished_at, started_by, finished_by
FROM shardmig.migration WHERE shard = $1"""
STEP_COLUMNS = """revision, number, kind, sha256, status, term, attempts, started_at, finished_at, error, direction,
    bounded_at, upto, cursor, lap, rows, batches, rows_estimated,
    CASE WHEN noted_at > clock_timestamp() - interval '15 s' THEN rows_per_s END,
    CASE WHEN noted_at > clock_timestamp() - interval '15 s' THEN eta_s END, noted_at, check_cursor, checked_rows,
    checked_at, waiting, paused"""
_STEPS = f"SELECT {STEP_COLUMNS} FROM shardmig.step WHERE shard = $1"
_LOG = """
SELECT at, action, flag, revision, before, after, reason, session_user_name, os_user
FROM shardmig.log WHERE shard = $1 ORDER BY id"""


def records_queries(shard: Shard, *, known: Collection[str] = ()) -> list[Query]:
    """Ask for everything about a shard as part of another flight; `read_records` then has its answers."""
    return [
        Query(_SHARD, [shard.name, shard.schema_name]),
        Query(_RUNNER, [shard.name]),
        Query(_FLAGS, [shard.name]),
        Query(_MIGRATIONS, [shard.name, sorted(known)]),
        Query(_STEPS, [shard.name]),
    ]


async def read_records(session: Session, *, known: Collection[str] = ()) -> Records | None:
    """
    Read everything about a session's shard, in one round trip; one more says whether a runner named there lives.

    Args:
        session: on the shard.
        known: hashes of plans whose text the caller has; for these `MigrationRow.plan` is empty.

    Returns:
        None when the database has no ledger yet, or has one that does not know this shard's schema yet.

    Raises:
        WrongShard: the schema is another shard's, or the name another schema's; nothing was written.
        LedgerOutdated: it is an older version, which lacks what is asked for.
        PreflightFailed: the ledger is another role's, or lacks what its version has.
    """
    name = session.shard.name
    try:
        answers = await _answers(session, records_queries(session.shard, known=known))
    except pg.InsufficientPrivilege as error:
        raise _not_ours(session, error) from error
    if answers is None:
        return None
    found, runner, flags, migrations, steps = answers
    row = _own_row(session, found.rows)
    if row is None or not runner.rows:
        return None
    (version, epoch, maintenance, reason), (term, holder, since) = row, runner.rows[0]
    return Records(
        shard=name,
        version=version,
        epoch=epoch,
        maintenance=maintenance,
        reason=reason,
        term=term,
        holder=holder,
        since=since,
        at_work=holder is not None and await is_at_work(session),
        flags=flags_of(flags),
        migrations={row[0]: MigrationRow(*row) for row in sorted(migrations.rows, key=itemgetter(1))},
        steps={(row[0], row[1]): StepRow(*row) for row in sorted(steps.rows, key=itemgetter(0, 1))},
    )


async def _answers(session: Session, queries: Sequence[Query]) -> list[Result] | None:
    """Ask a ledger; None where there is none."""
    try:
        return await session.ask(queries)
    except _LACKING as error:
        version = await version_of(session)
        if version < newest():
            if version:
                raise _outdated(session, version, error) from error
            return None
        refuse_newer(version, session.shard)
    try:
        return await session.flight(queries)  # another runner may have installed it a moment ago
    except _LACKING as error:
        raise PreflightFailed(
            f"its ledger is version {version} and lacks what that version has ({error.diag.message_primary}), so "
            "schema shardmig was changed by hand; put back what is missing, as another shard has it "
            "(pg_dump --schema-only --schema shardmig)",
            shard=session.shard.name,
        ) from error


def _outdated(session: Session, version: int, error: pg.Error) -> LedgerOutdated:
    return LedgerOutdated(
        f"its ledger is version {version} and cannot be read by this shardmig, which has {newest()} "
        f"({error.diag.message_primary}); `shardmig apply --shard {session.shard.name}` upgrades it first",
        shard=session.shard.name,
    )


def _not_ours(session: Session, error: pg.Error) -> PreflightFailed:
    role = session.settings.owner or session.login
    return PreflightFailed(
        f"role {role} is not the one that the ledger belongs to ({error.diag.message_primary}); set session.owner to "
        "the owner of schema shardmig, as \\dn in psql shows it",
        shard=session.shard.name,
    )


def _own_row(session: Session, rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """Return what the ledger says of this shard itself; refuse to take another shard's for it."""
    shard = session.shard
    if not rows:
        return None
    if len(rows) > 1 or rows[0][:2] != (shard.name, shard.schema_name):
        name, schema = next(row[:2] for row in rows if row[:2] != (shard.name, shard.schema_name))
        raise wrong_shard(shard, name, schema)
    _, _, *own = rows[0]
    refuse_newer(own[0], shard)
    return tuple(own)


async def read_flags(session: Session) -> dict[str, FlagRow]:
    """Read the flags alone, by name; the ledger is there."""
    [found] = await session.flight([flags_query(session.shard.name)])
    return flags_of(found)


def flags_query(shard: str) -> Query:
    """Ask for the flags as part of another flight."""
    return Query(_FLAGS, [shard])


def flags_of(found: Result) -> dict[str, FlagRow]:
    """Read what `flags_query` returned."""
    return {row[0]: FlagRow(*row) for row in sorted(found.rows, key=itemgetter(1))}


async def last_states(session: Session) -> tuple[tuple[str, str], ...]:
    """Name the state of each flag for a report; none where there is no ledger, or no connection any more."""
    try:
        return tuple((row.flag, State(row.state).name) for row in (await read_flags(session)).values())
    except (pg.Error, ShardError):
        return ()


async def read_log(session: Session) -> list[LogRow]:
    """Read the append-only log of a shard, oldest line first."""
    return await session.fetch(LogRow, _LOG, [session.shard.name])
