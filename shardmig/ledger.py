"""
The ledger of one shard: install, read, record.

Reading is one flight of queries. Recording is done by server-side functions (`ledger.sql`) whose first write is the
step row itself, so that a record commits with what it records and a runner that lost its turn writes nothing. Such a
statement is a `Query`, ready to be put into a flight.
"""

from __future__ import annotations

import getpass
import os
import socket
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from psycopg import errors as pg

from shardmig.errors import Fenced, LockNotObtained, PreflightFailed, ShardError, SwitchRefused, WrongShard
from shardmig.plan import step_sha256
from shardmig.session import Query
from shardmig.states import EDGES, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Sequence
    from datetime import datetime

    from shardmig.plan import Plan
    from shardmig.session import Result, Session

__all__ = [
    "FENCED",
    "LEDGER_VERSION",
    "REFUSED",
    "FlagRow",
    "LogRow",
    "MigrationRow",
    "Records",
    "StepRow",
    "Turn",
    "begin_migration",
    "finish_migration",
    "flags_of",
    "flags_query",
    "holder_name",
    "in_turn",
    "install",
    "is_held",
    "last_states",
    "os_user",
    "read",
    "read_flags",
    "read_log",
    "set_maintenance",
    "translated",
]

LEDGER_VERSION = 1
FENCED = "SM001"  # SQLSTATE: the step row belongs to another runner
REFUSED = "SM002"  # SQLSTATE: the ledger's own rules refuse a change

_INSTALL_LOCK = 0x5368_6D67  # one installer a database; any constant will do
_INSTALL_WAIT_MS = 60_000


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


@dataclass(frozen=True, slots=True)
class StepRow:
    """
    One step's record.

    Keys (`upto`, `cursor`, `check_cursor`) are the text forms of the key columns, one element a column. `waiting` says
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
    rows: int
    batches: int
    rows_estimated: int | None
    check_cursor: list[str] | None
    checked_at: datetime | None
    waiting: str | None
    paused: str | None

    @property
    def done(self) -> bool:
        """Whether nothing is left of this step."""
        return self.status == "DONE"


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
        epoch: token of the present flags.
        maintenance: 0 none, 1 read-only, 2 offline; `reason` says why.
        term: term of the last runner.
        holder: who that was, and `since` when; None when its turn is over.
        flags: by name.
        migrations: by revision, in the order of the history.
        steps: by revision and number.
    """

    shard: str
    epoch: int = 0
    maintenance: int = 0
    reason: str | None = None
    term: int = 0
    holder: str | None = None
    since: datetime | None = None
    flags: dict[str, FlagRow] = field(default_factory=dict)
    migrations: dict[str, MigrationRow] = field(default_factory=dict)
    steps: dict[tuple[str, int], StepRow] = field(default_factory=dict)

    def state(self, flag: str) -> State:
        """Return a flag's state; no row is OLD."""
        row = self.flags.get(flag)
        return State.OLD if row is None else State(row.state)


# --------------------------------------------------------------------------------------------------------------------
# Install


async def install(session: Session, *, closed: str | None = None) -> None:
    """
    Make sure that the database has a ledger and that it knows this session's shard.

    Safe under concurrency: installers of one database wait for each other. Everything commits at once or not at all.

    Args:
        session: on the shard.
        closed: why a shard that was not known yet begins its life in maintenance, offline; None: it does not.

    Raises:
        WrongShard: the schema belongs to another shard, or the name to another schema; nothing was written.
        PreflightFailed: the owner role may not create the ledger's schema.
        ShardError: the ledger is newer than this shardmig.
    """
    try:
        # Fifty schema shards of one database may queue here, each for as long as an installation takes.
        async with session.transaction(local={"lock_timeout": f"{_INSTALL_WAIT_MS}ms"}):
            await session.execute("SELECT pg_advisory_xact_lock($1)", [_INSTALL_LOCK])
            if not await _installed(session):
                # One text, many statements: the simple protocol, for the ledger's own file alone.
                await session.connection.cursor().execute(_script())
            await _register(session, closed)
    except pg.InsufficientPrivilege as error:
        raise PreflightFailed(
            f"the ledger cannot be installed ({error.diag.message_primary}); run there as a superuser: "
            "GRANT CREATE ON DATABASE <database> TO <owner role>",
            shard=session.shard.name,
        ) from error


async def _installed(session: Session) -> bool:
    found = await session.execute("SELECT to_regprocedure('shardmig.ledger_version()') IS NOT NULL")
    if not found.value:
        return False
    version = (await session.execute("SELECT shardmig.ledger_version()")).value
    if version > LEDGER_VERSION:
        raise ShardError(
            f"its ledger is version {version}, this shardmig knows {LEDGER_VERSION}; upgrade shardmig here",
            shard=session.shard.name,
        )
    return True


async def _register(session: Session, closed: str | None) -> None:
    shard = session.shard
    known = await session.execute(
        "SELECT shard, schema_name FROM shardmig.shard WHERE shard = $1 OR schema_name = $2",
        [shard.name, shard.schema_name],
    )
    if known.rows == [(shard.name, shard.schema_name)]:
        return
    if known.rows:
        name, schema = known.rows[0]
        raise WrongShard(
            f"{shard.address} schema {schema!r} is shard {name!r}; correct the url or schema of {shard.name!r}, "
            "or after a split or copy rename it with `shardmig shard rename`. Nothing was written there",
            shard=shard.name,
        )
    await session.flight(
        [
            Query(
                "INSERT INTO shardmig.shard (shard, schema_name, epoch, maintenance, reason) "
                "VALUES ($1, $2, shardmig.draw_epoch(), CASE WHEN $3::text IS NULL THEN 0 ELSE 2 END, $3)",
                [shard.name, shard.schema_name, closed],
            ),
            Query("INSERT INTO shardmig.runner (shard) VALUES ($1)", [shard.name]),
        ]
    )


def _script() -> bytes:
    edges = ", ".join(
        f"({e.source.value}, {e.target.value}, '{e.guard.value}', {str(e.has_move).lower()}, "
        f"{'NULL' if e.invalidates is None else repr(e.invalidates)}::text, {str(e.forgets).lower()}, '{e.when}')"
        for e in EDGES
    )
    text = resources.files("shardmig").joinpath("ledger.sql").read_text(encoding="utf-8")
    return text.format(edges=edges, version=LEDGER_VERSION).encode()


# --------------------------------------------------------------------------------------------------------------------
# Read

_SHARD = """
SELECT s.shard, s.schema_name, shardmig.ledger_version(), s.epoch, s.maintenance, s.reason, r.term, r.holder, r.since
FROM shardmig.shard s JOIN shardmig.runner r USING (shard) WHERE s.shard = $1 OR s.schema_name = $2"""
_FLAGS = """
SELECT flag, revision, state, has_move, cross_table, needs, drained, new_valid, old_valid, epoch, changed_at
FROM shardmig.flag WHERE shard = $1 ORDER BY revision"""
_MIGRATIONS = """
SELECT revision, position, flag, sha256, CASE WHEN sha256 = ANY ($2::text[]) THEN '' ELSE plan END, started_at,
    finished_at, started_by
FROM shardmig.migration WHERE shard = $1 ORDER BY position"""
_STEP_COLUMNS = """revision, number, kind, sha256, status, term, attempts, started_at, finished_at, error, direction,
    bounded_at, upto, cursor, rows, batches, rows_estimated, check_cursor, checked_at, waiting,
    paused"""
_CLAIM = f"SELECT {_STEP_COLUMNS} FROM shardmig.claim_step($1, $2, $3, $4)"
_STEPS = f"SELECT {_STEP_COLUMNS} FROM shardmig.step WHERE shard = $1 ORDER BY revision, number"
_LOG = """
SELECT at, action, flag, revision, before, after, reason, session_user_name, os_user
FROM shardmig.log WHERE shard = $1 ORDER BY id"""


async def read(session: Session, *, known: Collection[str] = ()) -> Records | None:
    """
    Read everything about a session's shard, in one round trip.

    Args:
        session: on the shard.
        known: hashes of plans whose text the caller has; for these `MigrationRow.plan` is empty.

    Returns:
        None when the database has no ledger yet, or has one that does not know this shard's schema yet.

    Raises:
        WrongShard: the schema is another shard's, or the name another schema's; nothing was written.
        PreflightFailed: the ledger is another role's.
    """
    name = session.shard.name
    try:
        found, flags, migrations, steps = await session.flight(
            [
                Query(_SHARD, [name, session.shard.schema_name]),
                Query(_FLAGS, [name]),
                Query(_MIGRATIONS, [name, list(known)]),
                Query(_STEPS, [name]),
            ]
        )
    except (pg.UndefinedTable, pg.InvalidSchemaName):
        return None
    except pg.InsufficientPrivilege as error:
        raise _not_ours(session, error) from error
    row = _own_row(session, found.rows)
    if row is None:
        return None
    epoch, maintenance, reason, term, holder, since = row
    return Records(
        shard=name,
        epoch=epoch,
        maintenance=maintenance,
        reason=reason,
        term=term,
        holder=holder,
        since=since,
        flags=flags_of(flags),
        migrations={row[0]: MigrationRow(*row) for row in migrations.rows},
        steps={(row[0], row[1]): StepRow(*row) for row in steps.rows},
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
        raise WrongShard(
            f"{shard.address} schema {schema!r} is shard {name!r}; correct the url or schema of {shard.name!r}, "
            "or after a split or copy rename it with `shardmig shard rename`. Nothing was written there",
            shard=shard.name,
        )
    _, _, version, *own = rows[0]
    if version > LEDGER_VERSION:
        raise ShardError(
            f"its ledger is version {version}, this shardmig knows {LEDGER_VERSION}; upgrade shardmig here",
            shard=shard.name,
        )
    return tuple(own)


async def read_flags(session: Session) -> dict[str, FlagRow]:
    """Read the flags alone, by name; the ledger is there."""
    [found] = await session.flight([flags_query(session.shard.name)])
    return flags_of(found)


def flags_query(shard: str) -> Query:
    """Ask for the flags as part of another flight."""
    return Query(_FLAGS, (shard,))


def flags_of(found: Result) -> dict[str, FlagRow]:
    """Read what `flags_query` returned."""
    return {row[0]: FlagRow(*row) for row in found.rows}


async def last_states(session: Session) -> tuple[tuple[str, str], ...]:
    """Name the state of each flag for a report; none where there is no ledger, or no connection any more."""
    try:
        return tuple((row.flag, State(row.state).name) for row in (await read_flags(session)).values())
    except (pg.Error, ShardError):
        return ()


async def read_log(session: Session) -> list[LogRow]:
    """Read the append-only log of a shard, oldest line first."""
    return await session.fetch(LogRow, _LOG, [session.shard.name])


# --------------------------------------------------------------------------------------------------------------------
# Record


def holder_name() -> str:
    """Name this runner for others: user, host and process."""
    return f"{os_user()}@{socket.gethostname()} pid {os.getpid()}"


def os_user() -> str:
    """Name the operating system's user, for the log."""
    with suppress(Exception):  # no passwd entry in a container is no reason to stop
        return getpass.getuser()
    return str(os.getuid())


class Turn:
    """
    A runner's turn on one shard: its session, which holds the shard's lock, and its term, which fences its writes.

    Attributes:
        session: the connection; the same object after a renewal.
        term: raised by every take and every renewal.
    """

    __slots__ = ("_raised", "session", "term")

    def __init__(self, session: Session, term: int) -> None:
        self.session = session
        self.term = term
        self._raised = 0

    @classmethod
    async def take(cls, session: Session) -> Turn:
        """Become the one who writes to this shard; the session holds its runner lock and the ledger is there."""
        return (await cls.take_and(session, []))[0]

    @classmethod
    async def take_and(cls, session: Session, queries: Sequence[Query]) -> tuple[Turn, list[Result]]:
        """Take the turn and write in the same transaction; return what the queries returned."""
        with translated(session.shard.name):
            taken, *results = await session.transact([_raise_term(session), *queries])
        return cls(session, int(taken.value)), results

    @property
    def shard(self) -> str:
        """The shard's name."""
        return self.session.shard.name

    async def renew(self) -> None:
        """
        Reconnect after a broken connection and raise the term, so that nothing of the old connection counts any more.

        Raises:
            Fenced: another runner worked here meanwhile.
        """
        await self.session.reconnect()
        # A raise whose answer was lost may have happened. Taking another runner's for ours does no harm: this session
        # holds the shard's lock and the newest term, and every step is claimed and read anew.
        self._raised += 1
        [taken] = await self.session.flight([_raise_term(self.session)])
        term = int(taken.value)
        if term > self.term + self._raised:
            raise Fenced(None, shard=self.shard)
        self.term, self._raised = term, 0

    async def claim(self, revision: str, number: int) -> StepRow:
        """
        Put this term into a step row, then read the row.

        Waits for the row's lock, so a transaction in doubt has ended one way or the other when the cursor is read.

        Raises:
            Fenced: another runner took the shard over.
        """
        with translated(self.shard, f"{revision} step {number}"):
            [claimed] = await self.session.flight([self.claiming(revision, number)])
        return StepRow(*claimed.rows[0])

    def claiming(self, revision: str, number: int) -> Query:
        """Claim a step in the transaction that does it: for a step that nobody can have done."""
        return Query(_CLAIM, (self.shard, revision, number, self.term))

    def hold(self) -> Query:
        """Refuse the transaction unless this is still our turn; a successor waits until it ends."""
        return Query("SELECT shardmig.hold_turn($1, $2)", (self.shard, self.term))

    def record_step(self, revision: str, number: int) -> Query:
        """Record a step as done: the first write of the transaction that does it."""
        return Query("SELECT shardmig.record_step($1, $2, $3, $4)", (self.shard, revision, number, self.term))

    def record_switches(self, revision: str, numbers: Sequence[int]) -> Query:
        """Record that a flip took these steps, and that the plan is finished if they were the last; behind `hold`."""
        return Query(
            "WITH flipped AS (UPDATE shardmig.step SET status = 'DONE', finished_at = clock_timestamp(), error = NULL, "
            "started_at = coalesce(started_at, clock_timestamp()), attempts = attempts + 1, term = $4 "
            "WHERE shard = $1 AND revision = $2 AND number = ANY ($3::int[]) AND status <> 'DONE') "
            "UPDATE shardmig.migration SET finished_at = coalesce(finished_at, clock_timestamp()) "
            "WHERE shard = $1 AND revision = $2 AND NOT EXISTS (SELECT FROM shardmig.step s WHERE s.shard = $1 "
            "AND s.revision = $2 AND s.status <> 'DONE' AND s.number <> ALL ($3::int[]))",
            (self.shard, revision, list(numbers), self.term),
        )

    def record_batch(
        self, revision: str, number: int, *, expected: list[str] | None, reached: list[str] | None, rows: int
    ) -> Query:
        """Record a batch: the cursor goes from `expected` to `reached`, the first write of the batch's transaction."""
        return Query(
            "SELECT shardmig.record_batch($1, $2, $3, $4, $5, $6, $7)",
            (self.shard, revision, number, self.term, expected, reached, rows),
        )

    def begin_move(
        self, revision: str, number: int, direction: str, *, upto: list[str] | None, rows_estimated: int | None
    ) -> Query:
        """Note where a move ends and start it from nothing; refused unless the flag's state is drained (W1, W5)."""
        return Query(
            "SELECT shardmig.begin_move($1, $2, $3, $4, $5, $6, $7)",
            (self.shard, revision, number, self.term, direction, upto, rows_estimated),
        )

    def record_check(
        self, revision: str, number: int, *, expected: list[str] | None, reached: list[str] | None, finished: bool
    ) -> Query:
        """Record how far rows were compared; the check's cursor goes from `expected` to `reached`."""
        return Query(
            "SELECT shardmig.record_check($1, $2, $3, $4, $5, $6, $7)",
            (self.shard, revision, number, self.term, expected, reached, finished),
        )

    def record_waiting(self, revision: str, number: int, reason: str | None) -> Query:
        """Say why a move rests, for whoever looks at the shard; None when it goes on."""
        return Query(
            "UPDATE shardmig.step SET waiting = $5 WHERE shard = $1 AND revision = $2 AND number = $3 AND term = $4",
            (self.shard, revision, number, self.term, reason),
        )

    def record_failure(self, revision: str, number: int, error: str) -> Query:
        """Keep the reason why a step failed; what it did was rolled back."""
        return Query(
            "UPDATE shardmig.step SET status = 'FAILED', error = $5 "
            "WHERE shard = $1 AND revision = $2 AND number = $3 AND term <= $4 AND status <> 'DONE'",
            (self.shard, revision, number, self.term, error[:2000]),
        )

    def reopen_steps(self, revision: str, numbers: Sequence[int]) -> Query:
        """
        Make steps that this revision has behind it lie ahead again.

        Together with a flip back this says that the runner took it, not people: apply goes forward again.
        """
        return Query(
            "WITH unfinished AS (UPDATE shardmig.migration SET finished_at = NULL WHERE shard = $1 AND revision = $2) "
            "UPDATE shardmig.step SET status = 'PENDING', finished_at = NULL "
            "WHERE shard = $1 AND revision = $2 AND number = ANY ($3::int[]) AND term <= $4",
            (self.shard, revision, list(numbers), self.term),
        )

    def end(self) -> Query:
        """Say that nobody works on the shard any more; a successor's entry is left alone."""
        return Query(
            "UPDATE shardmig.runner SET holder = NULL, since = NULL WHERE shard = $1 AND term = $2",
            (self.shard, self.term),
        )


@asynccontextmanager
async def in_turn(session: Session) -> AsyncIterator[Turn]:
    """Hold the turn for a piece of work, and say afterwards that nobody works on the shard any more."""
    turn = await Turn.take(session)
    try:
        yield turn
    finally:
        with suppress(pg.Error, ShardError):
            await session.flight([turn.end()])


def _raise_term(session: Session) -> Query:
    return Query(
        "UPDATE shardmig.runner SET term = term + 1, holder = $2, since = clock_timestamp() WHERE shard = $1 "
        "RETURNING term",
        (session.shard.name, holder_name()),
    )


def begin_migration(shard: str, plan: Plan, *, position: int, text: str) -> list[Query]:
    """
    Enter a plan, its steps and its flag; everything is there already when it was begun before.

    The plan kept is the one first begun: `pending` compares it with the committed one.
    """
    touch = any(move.touch_source for _, move in plan.moves)
    return [
        Query(
            "INSERT INTO shardmig.migration (shard, revision, position, flag, sha256, plan, started_by) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
            (shard, plan.revision, position, plan.flag, plan.sha256, text, holder_name()),
        ),
        Query(
            "INSERT INTO shardmig.step (shard, revision, number, kind, sha256) "
            "SELECT $1, $2, n, k, h FROM unnest($3::int[], $4::text[], $5::text[]) AS s (n, k, h) "
            "ON CONFLICT DO NOTHING",
            (
                shard,
                plan.revision,
                list(range(1, len(plan.steps) + 1)),
                [step.kind for step in plan.steps],
                [step_sha256(step) for step in plan.steps],
            ),
        ),
        Query(
            "INSERT INTO shardmig.flag (shard, flag, revision, has_move, cross_table, touch_source, needs) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
            (shard, plan.flag, plan.revision, plan.has_move, plan.cross_table, touch, list(plan.needs)),
        ),
    ]


def finish_migration(shard: str, revision: str) -> Query:
    """Note that no step of a plan is left, if that is so."""
    return Query(
        "UPDATE shardmig.migration SET finished_at = coalesce(finished_at, clock_timestamp()) "
        "WHERE shard = $1 AND revision = $2 AND NOT EXISTS (SELECT FROM shardmig.step s "
        "WHERE s.shard = $1 AND s.revision = $2 AND s.status <> 'DONE')",
        (shard, revision),
    )


async def set_maintenance(session: Session, mode: str, reason: str | None) -> None:
    """Set maintenance "off", "read-only" or "offline"; the caller drains before relying on it."""
    call = Query("SELECT shardmig.maintenance($1, $2, $3)", (mode, reason, session.shard.name))
    try:
        with translated(session.shard.name):
            await session.transact([call], local={"shardmig.os_user": os_user()})
    except pg.LockNotAvailable as error:
        raise is_held(error, session.shard.name) from error


def is_held(error: pg.LockNotAvailable, shard: str) -> LockNotObtained:
    """Say that rows of the ledger are locked: statements of plans wait for locks by themselves."""
    return LockNotObtained(
        f"somebody holds rows of the ledger in a transaction that is not committed ({error.diag.message_primary}); "
        "end it, and try again",
        shard=shard,
    )


@contextmanager
def translated(shard: str, step: str | None = None) -> Iterator[None]:
    """Turn the SQLSTATEs of the ledger's functions and trigger into Fenced and SwitchRefused; others pass."""
    try:
        yield
    except pg.Error as error:
        if error.sqlstate == FENCED:
            raise Fenced(None, shard=shard, step=step) from error
        if error.sqlstate == REFUSED:
            hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
            raise SwitchRefused(f"{error.diag.message_primary}{hint}", shard=shard, step=step) from error
        raise
