"""
Maintenance that a runner sets by itself: close a small shard, do what is too hard to do while it serves, open it.

A plan that says `online = False` closes the shard for all (offline): what its steps write may be read half-done. A plan
that is only heavy closes it for writers (read-only): readers go by the flags, as ever. Whose maintenance it is stands
in the shard's log, with each revision it is for; what people set, no runner lifts.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from psycopg import errors as pg

from shardmig import switching
from shardmig.errors import Overloaded, PreflightFailed, SwitchedMeanwhile
from shardmig.events import MaintenanceSet, Waiting, Warned
from shardmig.findings import touched
from shardmig.ledger import is_held, os_user, translated
from shardmig.plan import quote_name
from shardmig.rest import admitted
from shardmig.session import Query
from shardmig.states import State
from shardmig.window import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.config import Maintenance, Pace, SessionSettings
    from shardmig.events import Listener
    from shardmig.hosts import Host
    from shardmig.session import Session
    from shardmig.todo import Todo
    from shardmig.turn import Turn

__all__ = [
    "LEVELS",
    "Mode",
    "begun_inside",
    "close",
    "closed_for",
    "hurried",
    "impatient",
    "lift",
    "modes",
    "wait_to_move",
]

Mode = Literal["read-only", "offline"]
LEVELS: dict[Mode, int] = {"read-only": 1, "offline": 2}  # as the ledger writes them

_LOOK_S = 1.0  # between two looks whether rows may move
_BATCH_MS = 100.0  # nobody waits for a row lock while writers are out


async def modes(
    session: Session, todo: Sequence[Todo], settings: Maintenance, *, listener: Listener | None
) -> list[Mode | None]:
    """
    Decide for each plan whether this shard is closed while it is applied, and for whom.

    Returns:
        One mode a plan, in their order; None where the shard goes on serving.

    Raises:
        PreflightFailed: a plan wants the shard offline, which is too large for a runner to close it by itself.
    """
    return [await _mode(session, item, settings, listener) for item in todo]


async def _mode(session: Session, item: Todo, settings: Maintenance, listener: Listener | None) -> Mode | None:
    plan, shard = item.plan, session.shard.name
    switches = item.target is not None or item.moves_only
    if plan.online and not (settings.heavy_rows is not None and plan.has_move and switches):
        return None
    if not item.statements and not switches:  # all but the note that it is finished is done
        return None
    rows = await _rows(session, item)
    within = rows <= settings.rows_max
    if not plan.online:
        if within:
            return "offline"
        raise PreflightFailed(
            f"{plan.revision} wants the shard offline, which has about {rows:,} rows in the tables that it touches, "
            f"more than maintenance.rows_max = {settings.rows_max:,}, so it was not closed. At a quiet hour "
            f"`shardmig maintenance on --shard {shard}`, apply, `shardmig maintenance off --shard {shard}`; or raise "
            "rows_max",
            shard=shard,
        )
    if settings.heavy_rows is None or rows <= settings.heavy_rows:
        return None
    if not within and listener:
        listener(
            Warned(
                shard,
                f"{plan.revision} is heavy here, about {rows:,} rows, and the shard too large to be closed for it "
                f"(maintenance.rows_max = {settings.rows_max:,}): its rows move while it serves",
            )
        )
    return "read-only" if within else None


async def _rows(session: Session, item: Todo) -> int:
    """Estimate, from statistics, how many rows the existing tables have that a plan touches."""
    names = [quote_name(name) for name in sorted(set(touched(item.accepted)))]
    return int((await session.execute(_ROWS, [names])).value)


def hurried(pace: Pace, settings: Maintenance) -> Pace:
    """Move in large batches while nobody else writes, and give up where the move would have to rest."""
    return pace.model_copy(
        update={
            "batch_target_ms": max(pace.batch_target_ms, _BATCH_MS),
            "max_rows_per_s": None,
            "max_rest_s": min(pace.max_rest_s, settings.drain_timeout_s),
            "parks_waiting": True,
        }
    )


def impatient(session: SessionSettings, settings: Maintenance) -> SessionSettings:
    """Wait for nobody's lock or transaction longer than for those inside: meanwhile the application waits, too."""
    limit_s = settings.drain_timeout_s
    waits = {"drain_timeout_s": session.drain_timeout_s, "lock_wait_s": session.lock_wait_s}
    return session.model_copy(update={name: min(wait_s, limit_s) for name, wait_s in waits.items()})


# --------------------------------------------------------------------------------------------------------------------
# Close and open


async def wait_to_move(
    session: Session, pace: Pace, host: Host | None, *, stop: asyncio.Event, listener: Listener | None
) -> bool:
    """
    Wait for the window and for a place on the server while the shard still serves: once it is closed, a move rests not.

    Returns:
        True when rows may move now, and the place is taken; False when `stop` was set before.

    Raises:
        Overloaded: they may not, and the configuration rather parks the shard.
    """
    window, shard = Window.parse(pace.window) if pace.window is not None else None, session.shard.name
    while not stop.is_set():
        reason = await admitted(session, window, host, float((await session.execute(_NOW)).value))
        if reason is None:
            return True
        if pace.parks_waiting:
            raise Overloaded(f"the shard is not closed yet: {reason}; apply again later", shard=shard)
        if listener:
            listener(Waiting(shard, reason))
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _LOOK_S)
    return False


async def close(
    turn: Turn,
    mode: Mode,
    revisions: Sequence[str],
    settings: Maintenance,
    *,
    stop: asyncio.Event | None = None,
    listener: Listener | None = None,
) -> None:
    """
    Close the shard for plans, each of which the log names, then wait until nobody is inside who does not know.

    Raises:
        SwitchedMeanwhile: people have closed it since the plans were begun, and it would be opened over their heads.
        DrainTimeout: somebody stays inside for longer than `drain_timeout_s`; the shard is closed then.
        LockNotObtained: an operator holds its row in an open transaction.
        Fenced: another runner took the shard over.
    """
    named = ", ".join(revisions)
    reason = f"{named} {'is' if len(revisions) == 1 else 'are'} being applied"
    closing = [Query(_CLOSE, (turn.shard, mode, reason, revision)) for revision in revisions]
    if not all((await _write(turn, [_locked(turn), *closing]))[1:]):
        raise SwitchedMeanwhile(f"people have set maintenance meanwhile; apply {named} again", shard=turn.shard)
    if listener:
        listener(MaintenanceSet(turn.shard, mode, reason))
    await switching.drain_shard(
        turn.session, "maintenance", timeout_s=settings.drain_timeout_s, stop=stop, listener=listener
    )


async def lift(turn: Turn, *, listener: Listener | None = None) -> None:
    """Let the shard serve again, unless people have closed it meanwhile."""
    *_, lifted = await _write(turn, [_locked(turn), Query(_LIFT, (turn.shard,))])
    if listener and lifted:
        listener(MaintenanceSet(turn.shard, "off", None))


def _locked(turn: Turn) -> Query:
    """Wait for whoever sets maintenance right now; what is read behind this is how they left it."""
    return Query("SELECT FROM shardmig.shard WHERE shard = $1 FOR UPDATE", (turn.shard,))


async def _write(turn: Turn, queries: Sequence[Query]) -> list[bool]:
    """Write under the fence; say which queries returned a row."""
    try:
        with translated(turn.shard):
            results = await turn.session.transact([turn.hold(), *queries], local={"shardmig.os_user": os_user()})
    except pg.LockNotAvailable as error:
        raise is_held(error, turn.shard) from error
    return [bool(result.rows) for result in results[1:]]


async def closed_for(session: Session) -> str | None:
    """Return the revision for which a runner closed this shard; None where it is open, or people closed it."""
    found = await session.execute(_CLOSED_FOR, [session.shard.name])
    return None if found.value is None else str(found.value)


async def begun_inside(session: Session) -> list[str]:
    """
    Name the flags that went from OLD to DUAL under a runner's closing, for a plan that it closed the shard for.

    A flag that was DUAL by then is none of them: since it is, writers have written what only a reader of new finds.
    """
    found = await session.execute(_BEGUN_INSIDE, [session.shard.name])
    return [str(flag) for (flag,) in found.rows]


# A table that was never analyzed is taken for one of small rows; one that grew since is scaled, as the planner does.
_ROWS = """
SELECT coalesce(sum(
    CASE WHEN c.reltuples < 0 OR c.relpages = 0 THEN pg_relation_size(c.oid) / 64.0
         ELSE c.reltuples / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::int) END), 0)::bigint
FROM pg_class AS c
WHERE c.relkind = 'r' AND c.oid IN (
    SELECT tree.relid FROM unnest($1::text[]) AS named (name), pg_partition_tree(to_regclass(named.name)) AS tree
    UNION SELECT to_regclass(named.name) FROM unnest($1::text[]) AS named (name)
)
"""
_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8"  # runners' clocks may differ
_CLOSED_FOR = """
SELECT revision FROM (
    SELECT revision, after FROM shardmig.log WHERE shard = $1 AND action = 'maintenance' ORDER BY id DESC LIMIT 1
) AS last WHERE after <> 'off'
"""
_CLOSE = f"""
SELECT shardmig.maintenance($2, $3, $1, $4)
WHERE (SELECT maintenance FROM shardmig.shard WHERE shard = $1) = 0 OR EXISTS ({_CLOSED_FOR} AND revision IS NOT NULL)
"""
_LIFT = f"SELECT shardmig.maintenance('off', NULL, $1) WHERE EXISTS ({_CLOSED_FOR} AND revision IS NOT NULL)"
# A closing lasts from its first line in the log, though the runner was killed and another one went on inside, until
# "off" or people's own maintenance. Whoever switches and whoever closes meet on the shard's row: ids are in order.
_BEGUN_INSIDE = f"""
WITH closing AS (
    SELECT revision, min(id) AS id FROM shardmig.log
    WHERE shard = $1 AND action = 'maintenance' AND id > coalesce((
        SELECT max(id) FROM shardmig.log
        WHERE shard = $1 AND action = 'maintenance' AND (after = 'off' OR revision IS NULL)), 0)
    GROUP BY revision
)
SELECT f.flag FROM shardmig.flag AS f JOIN closing USING (revision) JOIN shardmig.migration AS m USING (shard, revision)
WHERE f.shard = $1 AND f.state = {State.DUAL:d} AND m.finished_at IS NULL AND '{State.OLD.name}' = (
    SELECT before FROM shardmig.log AS l
    WHERE l.shard = $1 AND l.action = 'switch' AND l.flag = f.flag AND l.id > closing.id ORDER BY l.id LIMIT 1)
ORDER BY m.position DESC
"""
