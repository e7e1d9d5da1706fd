"""
What must be true before a flag goes DONE: writers of new alone may leave every old column out.

An old column that is NOT NULL without a default would make their INSERTs fail. The script may declare it in `relax`;
then this edge runs the one ALTER that shardmig ever runs on an existing column: DROP NOT NULL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig import locking
from shardmig.errors import PreflightFailed
from shardmig.plan import quote, quote_name
from shardmig.session import Query

if TYPE_CHECKING:
    from shardmig.events import Listener
    from shardmig.plan import Plan
    from shardmig.session import Session

__all__ = ["refuse_mandatory", "refuse_without_old", "relax"]

_IN_THE_WAY = """
SELECT a.attname AS name, a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS mandatory,
       (SELECT string_agg(format('%s (%s)', k.conname,
               CASE k.contype WHEN 'c' THEN 'CHECK' WHEN 'f' THEN 'FOREIGN KEY' WHEN 'p' THEN 'PRIMARY KEY'
                              WHEN 'u' THEN 'UNIQUE' ELSE 'EXCLUDE' END), ', ')
        FROM pg_constraint k
        WHERE k.conrelid = a.attrelid AND a.attnum = ANY (k.conkey) AND k.contype <> 'n') AS constraints
FROM pg_attribute a
WHERE a.attrelid = $1::regclass AND a.attname = ANY ($2::text[]) AND NOT a.attisdropped
"""


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    mandatory: bool
    constraints: str | None


async def relax(session: Session, plan: Plan, *, fence: Query | None = None, listener: Listener | None = None) -> None:
    """
    Make sure that every old column of a plan may be left out, relaxing those that its script names.

    Args:
        session: on the shard.
        plan: whose flag is to go DONE.
        fence: goes before each change in its transaction, and refuses it unless it is still the runner's turn; None for
            a closed shard.
        listener: told who is in the way.

    Raises:
        PreflightFailed: a column is mandatory and not in `relax`, or a constraint stands on it; every one is listed.
        LockNotObtained: the table stayed busy.
    """
    for table, name in await refuse_mandatory(session, plan):
        await locking.under_lock(
            session,
            table,
            [
                *([fence] if fence else []),
                Query(f"ALTER TABLE {quote_name(table)} ALTER COLUMN {quote(name)} DROP NOT NULL"),
                Query(
                    "INSERT INTO shardmig.log (shard, action, flag, revision, before, after) "
                    "VALUES ($1, 'relax', $2, $3, $4, 'nullable')",
                    (session.shard.name, plan.flag, plan.revision, f"{table}.{name} NOT NULL"),
                ),
            ],
            proof=False,  # a constraint goes away: the one change that is declared, not added
            behind=fence,
            on_wait=listener,
        )


async def refuse_mandatory(session: Session, plan: Plan) -> list[tuple[str, str]]:
    """
    Make sure that nothing but what the script relaxes keeps writers from leaving an old column out.

    Returns:
        The columns that are still to be relaxed, as table and name.

    Raises:
        PreflightFailed: a column is mandatory and not in `relax`, or a constraint stands on it; every one is listed.
    """
    mandatory, problems = [], []
    for table, columns in _old_columns(plan).items():
        for column in await session.fetch(_Column, _IN_THE_WAY, [quote_name(table), sorted(columns)]):
            written = f"{table}.{column.name}"
            if column.constraints:
                problems.append(f"{written} is under {column.constraints}: writers of new alone cannot keep that")
            if column.mandatory and written in plan.relax:
                mandatory.append((table, column.name))
            elif column.mandatory:
                problems.append(
                    f'{written} is NOT NULL without a default; a script that says relax = ["{written}"] before it is '
                    "applied lets this edge drop that"
                )
    if problems:
        raise PreflightFailed(
            f"{plan.flag} cannot go DONE: " + "; ".join(problems) + ". It may stay LIVE for ever",
            shard=session.shard.name,
        )
    return mandatory


async def refuse_without_old(session: Session, plan: Plan) -> None:
    """
    Make sure, before DONE is undone, that writers who keep old fresh again find its columns.

    Raises:
        PreflightFailed: somebody has dropped some of them; each is named.
    """
    for table, columns in _old_columns(plan).items():
        found = await session.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
            [quote_name(table)],
        )
        if missing := columns - {row[0] for row in found.rows}:
            raise PreflightFailed(
                f"{plan.flag} stays DONE: {', '.join(f'{table}.{column}' for column in sorted(missing))} is gone, and "
                "every write in LIVE would fail; add it again as it was, nullable, before going back",
                shard=session.shard.name,
            )


def _old_columns(plan: Plan) -> dict[str, set[str]]:
    """Return the old columns by table: those that `back` restores and those that the script relaxes."""
    old: dict[str, set[str]] = {}
    for _, move in plan.moves:
        old.setdefault(move.table, set()).update(move.restores)
    for written in plan.relax:
        table, _, column = written.rpartition(".")
        old.setdefault(table, set()).add(column)
    return old
