"""
Adopting shards whose history so far was plain Alembic's.

The ledger notes the revision at which a shard was adopted; nothing else changes there, Alembic's own table included.
What comes after that revision is shardmig's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig import ledger
from shardmig.errors import PreflightFailed
from shardmig.session import Query
from shardmig.turn import holder_name

if TYPE_CHECKING:
    from shardmig.config import Config
    from shardmig.records import Records
    from shardmig.session import Session

__all__ = ["adopt", "alembic_revisions", "refuse_unadopted", "unadopted"]


async def alembic_revisions(session: Session) -> tuple[str, ...]:
    """Read where Alembic says a shard is: one revision as a rule, none without its table, several with branches."""
    try:
        found = await session.execute("SELECT version_num FROM alembic_version ORDER BY version_num")
    except pg.UndefinedTable:
        return ()
    return tuple(row[0] for row in found.rows)


def unadopted(config: Config, records: Records) -> str:
    """Say why nothing may be applied to a shard whose history plain Alembic began; empty when nothing is wrong."""
    after = config.lint.start_after
    if not after or after in records.migrations:
        return ""
    return f"this shard was not adopted at {after}; `shardmig adopt --shard {records.shard}` first"


def refuse_unadopted(config: Config, records: Records) -> None:
    """
    Make sure that a shard's history begins where Alembic left it.

    Raises:
        PreflightFailed: nobody adopted it.
    """
    if reason := unadopted(config, records):
        raise PreflightFailed(reason, shard=records.shard)


async def adopt(session: Session, revision: str) -> bool:
    """
    Note in a shard's ledger that its history begins after an Alembic revision.

    Returns:
        False when the shard was adopted there before.

    Raises:
        PreflightFailed: Alembic says that the shard is somewhere else; nothing was changed.
    """
    shard = session.shard.name
    at = await alembic_revisions(session)
    if at != (revision,):
        raise PreflightFailed(
            f"Alembic has it at {' and '.join(at) or 'no revision'}, not at {revision}; "
            + (f'if that is right, say [lint] start_after = "{at[0]}"' if at else f"alembic upgrade {revision} first"),
            shard=shard,
        )
    await ledger.install(session)
    noted = await session.transact(
        [
            Query(
                "INSERT INTO shardmig.migration "
                "(shard, revision, position, flag, sha256, plan, finished_at, started_by, finished_by) "
                "VALUES ($1, $2, 0, '', 'adopted', '', clock_timestamp(), $3, $3) ON CONFLICT DO NOTHING RETURNING 1",
                (shard, revision, holder_name()),
            ),
        ]
    )
    if not noted[0].rows:
        return False
    await session.execute(
        "INSERT INTO shardmig.log (shard, action, revision, os_user) VALUES ($1, 'adopt', $2, $3)",
        [shard, revision, ledger.os_user()],
    )
    return True
