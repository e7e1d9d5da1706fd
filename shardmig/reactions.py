"""
What a table does by itself when its rows are written: triggers, rules, and foreign keys that write or delete rows.

They were made for the application's own writes: a move, and the way back, would set them off too, or they write past
the application's dual writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardmig.plan import Move
    from shardmig.session import Session

__all__ = ["ASKED", "NONE", "Cascade", "Reactions", "Trigger", "reaction_problems", "reaction_warnings", "reactions_of"]

_DIES_WITH = re.compile(r"\bREFERENCES\b.*\bON\s+DELETE\s+CASCADE\b", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Trigger:
    """
    A user trigger, or a rule, of a table or of its partitions.

    Attributes:
        columns: the columns of UPDATE OF; without them any write may fire it.
        rewrites: it sees rows on their way in (BEFORE … FOR EACH ROW) and may change any column of theirs.
    """

    table: str
    name: str
    columns: list[str]
    rewrites: bool


@dataclass(frozen=True, slots=True)
class Cascade:
    """
    A foreign key that writes rows of its table by itself.

    Attributes:
        table, columns: the referencing side, whose rows are written.
        other, other_columns: the referenced side, whose changes cause it.
        on_update, on_delete: "CASCADE", "SET NULL", "SET DEFAULT" or None.
    """

    name: str
    table: str
    columns: list[str]
    other: str
    other_columns: list[str]
    on_update: str | None
    on_delete: str | None


@dataclass(frozen=True, slots=True)
class Reactions:
    """What tables that were asked about do by themselves."""

    triggers: list[Trigger]
    cascades: list[Cascade]


NONE = Reactions([], [])


async def reactions_of(session: Session, asked: tuple[list[str], list[str]]) -> Reactions:
    """Ask what tables do by themselves: their names as the plans write them, and the same for regclass."""
    triggers, cascades = await session.flight([Query(_TRIGGERS, asked), Query(_CASCADES, asked)])
    return Reactions([Trigger(*row) for row in triggers.rows], [Cascade(*row) for row in cascades.rows])


def reaction_problems(move: Move, reactions: Reactions, *, creating: str | None) -> Iterator[str]:
    """
    Say what a move would set off, and what writes past the application's dual writes.

    Args:
        move: which may not fire triggers.
        reactions: of its tables.
        creating: the statement that is yet to create the move's target; None where it exists.
    """
    yield from _trigger_problems(move, reactions.triggers)
    yield from _cascade_problems(move, reactions.cascades, creating)


def reaction_warnings(move: Move, reactions: Reactions) -> Iterator[str]:
    """Name foreign keys that write or remove rows of the new table by themselves: old keeps what it had."""
    for key in reactions.cascades:
        if key.table != move.target or (key.other == move.table and key.on_delete == "CASCADE"):
            continue
        written = set(key.columns) & set(move.writes) and (key.on_update or _setting(key.on_delete))
        if written or key.on_delete == "CASCADE":
            yield (
                f"foreign key {key.name} changes rows of {key.table} by itself ({written or 'ON DELETE CASCADE'}) and "
                f"nothing does the same in {move.table}: switching back would show what was there before, unless a "
                "foreign key there has the same effect"
            )


def _trigger_problems(move: Move, triggers: Sequence[Trigger]) -> Iterator[str]:
    """Name triggers that a move would fire, forward or back: they were written for the application's own writes."""
    written = {move.target or move.table: {*move.writes, *move.target_key}}
    if move.restores or move.touch_source:
        written[move.table] = written.get(move.table, set()) | set(move.restores or move.key)
    for trigger in triggers:
        columns = written.get(trigger.table, set())
        if columns and (not trigger.columns or columns & set(trigger.columns)):
            yield (
                f"trigger {trigger.name} of {trigger.table} would fire for every moved row; "
                'say triggers="fire" in move_rows if it may, or ALTER TABLE … DISABLE TRIGGER while rows are moved'
            )
        elif trigger.rewrites and trigger.table in {move.table, move.target}:
            yield (
                f"trigger {trigger.name} of {trigger.table} may change columns of a row on its way in, past the dual "
                'writes of the application; say triggers="fire" in move_rows if it leaves those that move alone'
            )


def _cascade_problems(move: Move, cascades: Sequence[Cascade], creating: str | None) -> Iterator[str]:
    """Name foreign keys that write old columns behind the application's back, and so past its dual writes."""
    for key in cascades:
        if key.table == move.table:
            actions = [action for action in (key.on_update, _setting(key.on_delete)) if action]
            if actions and any(re.search(rf"(?<!\w){re.escape(column)}(?!\w)", move.forward) for column in key.columns):
                yield (
                    f"foreign key {key.name} of {key.table} writes ({', '.join(key.columns)}) by itself, {actions[0]}, "
                    'past the dual writes of the application; say triggers="fire" in move_rows if that cannot happen'
                )
            if (
                key.on_delete == "CASCADE"
                and move.target is not None
                and not _dies_with_source(move, cascades, creating)
            ):
                yield (
                    f"foreign key {key.name} deletes rows of {key.table} by itself, and their rows in {move.target} "
                    f"would stay; let {move.target} reference {move.table} ON DELETE CASCADE, "
                    'or say triggers="fire" in move_rows if that cannot happen'
                )
        if key.other == move.table and key.on_update and set(key.other_columns) & set(move.restores):
            yield (
                f"moving back writes {move.table}, and foreign key {key.name} would write {key.table} too "
                f'({key.on_update}); say triggers="fire" in move_rows if it may'
            )
        if key.other == (move.target or move.table) and key.on_update and set(key.other_columns) & set(move.writes):
            yield (
                f"moving writes {key.other}, and foreign key {key.name} would write {key.table} too "
                f'({key.on_update}); say triggers="fire" in move_rows if it may'
            )


def _setting(action: str | None) -> str | None:
    return None if action == "CASCADE" else action  # ON DELETE CASCADE leaves no row that could be stale


def _dies_with_source(move: Move, cascades: Sequence[Cascade], creating: str | None) -> bool:
    """Whether target rows are deleted together with their source rows."""
    if creating is not None:
        return bool(_DIES_WITH.search(creating))
    return any(key.table == move.target and key.other == move.table and key.on_delete == "CASCADE" for key in cascades)


# --------------------------------------------------------------------------------------------------------------------
# SQL; $1 are names as the plans write them, $2 the same for regclass

ASKED = "unnest($1::text[], $2::text[]) AS asked (name, address)"

# Rows of partitions and of tables that inherit are written through their parent, and fire what those have of their own.
_WHOLE = f"""
WITH RECURSIVE asked AS (
    SELECT asked.name, to_regclass(asked.address)::oid AS oid FROM {ASKED}
    UNION SELECT asked.name, i.inhrelid FROM asked JOIN pg_inherits AS i ON i.inhparent = asked.oid
)
"""

_TRIGGERS = f"""{_WHOLE}
SELECT DISTINCT asked.name,
       t.tgname::text,
       ARRAY(SELECT a.attname::text FROM unnest(t.tgattr::int2[]) AS k (attnum)
             JOIN pg_attribute AS a ON a.attrelid = t.tgrelid AND a.attnum = k.attnum ORDER BY 1),
       t.tgtype & 3 = 3 AND t.tgtype & 20 <> 0  -- ROW, BEFORE; INSERT or UPDATE
FROM asked
JOIN pg_trigger AS t ON t.tgrelid = asked.oid AND NOT t.tgisinternal AND t.tgenabled <> 'D'
UNION ALL
SELECT asked.name, r.rulename::text || ' (a rule)', '{{}}', false
FROM {ASKED}
JOIN pg_rewrite AS r ON r.ev_class = to_regclass(asked.address) AND r.ev_type <> '1' AND r.ev_enabled <> 'D'
ORDER BY 1, 2
"""

_ACTION = "CASE {column} WHEN 'c' THEN 'CASCADE' WHEN 'n' THEN 'SET NULL' WHEN 'd' THEN 'SET DEFAULT' END"
_COLUMNS = """
ARRAY(SELECT a.attname::text FROM unnest({key}) WITH ORDINALITY AS k (attnum, place)
      JOIN pg_attribute AS a ON a.attrelid = {relation} AND a.attnum = k.attnum ORDER BY k.place)
"""

_CASCADES = f"""{_WHOLE}
SELECT f.conname::text,
       coalesce((SELECT name FROM asked WHERE asked.oid = f.conrelid LIMIT 1), f.conrelid::regclass::text),
       {_COLUMNS.format(key="f.conkey", relation="f.conrelid")},
       coalesce((SELECT name FROM asked WHERE asked.oid = f.confrelid LIMIT 1), f.confrelid::regclass::text),
       {_COLUMNS.format(key="f.confkey", relation="f.confrelid")},
       {_ACTION.format(column="f.confupdtype")},
       {_ACTION.format(column="f.confdeltype")}
FROM pg_constraint AS f
WHERE f.contype = 'f' AND f.conparentid = 0 AND (f.confupdtype IN ('c', 'n', 'd') OR f.confdeltype IN ('c', 'n', 'd'))
  AND (f.conrelid IN (SELECT oid FROM asked) OR f.confrelid IN (SELECT oid FROM asked))
ORDER BY 1
"""
