"""
What a table does by itself when its rows are written: triggers, rules, and foreign keys that write or delete rows.

They were made for the application's own writes: a move, and the way back, would set them off too, or they write past
the application's dual writes. And they were made for the columns that there were: one more may break them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from shardmig.plan import Move
    from shardmig.session import Session

__all__ = [
    "NONE",
    "WHOLE",
    "Cascade",
    "Reactions",
    "Trigger",
    "reaction_problems",
    "reaction_warnings",
    "reactions_of",
    "widening_problems",
]

_DIES_WITH = re.compile(r"\bREFERENCES\b.*\bON\s+DELETE\s+CASCADE\b", re.IGNORECASE | re.DOTALL)

_EVENTS = frozenset({"INSERT", "UPDATE", "DELETE"})
_VERB = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)

# A row written out as so many values: NEW.*, (OLD).*, and $1.* of EXECUTE … USING NEW.
_SPREAD = re.compile(r"(?:\b(?:NEW|OLD)\b|\$\d+)\s*\)?\s*\.\s*\*", re.IGNORECASE)
_ROW = r"(?:\b(?:NEW|OLD)\s*\.\s*\*|\bROW\s*\(\s*(?:NEW|OLD)\s*\.\s*\*\s*\))"
_COPES = re.compile(
    r"\b(?:to_jsonb?|row_to_json|hstore)\s*\(\s*(?:NEW|OLD)\s*\.\s*\*\s*\)"  # one value, whatever the columns
    rf"|{_ROW}\s*(?:IS\s+(?:NOT\s+)?DISTINCT\s+FROM|=|<>|!=)\s*{_ROW}",  # both sides have one more
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Trigger:
    """
    A user trigger, or a rule, of a table or of its partitions.

    Attributes:
        events: what fires it, of INSERT, UPDATE and DELETE.
        columns: the columns of UPDATE OF; without them any UPDATE fires it.
        rewrites: it sees rows on their way (BEFORE … FOR EACH ROW, DO INSTEAD): it may change any column of theirs, or
            keep those that are deleted.
        schema, function: what it calls; None of a rule.
        spreads: the text of that function, where it fires for each row and something is written out there with ".*".
    """

    table: str
    name: str
    events: list[str]
    columns: list[str]
    rewrites: bool
    schema: str | None
    function: str | None
    spreads: str | None


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
    """
    What tables that were asked about do by themselves.

    Attributes:
        triggers, cascades: of theirs.
        columns: table → the columns that it has.
        foreign: table → those of its partitions, or of tables that inherit from it, that are foreign tables.
    """

    triggers: list[Trigger]
    cascades: list[Cascade]
    columns: dict[str, list[str]]
    foreign: dict[str, list[str]]


NONE = Reactions([], [], {}, {})


async def reactions_of(session: Session, asked: tuple[list[str], list[str]]) -> Reactions:
    """Ask what tables do by themselves: their names as the plans write them, and the same for regclass."""
    triggers, cascades, columns, foreign = await session.flight(
        [Query(sql, asked) for sql in (_TRIGGERS, _CASCADES, _COLUMNS_OF, _FOREIGN)]
    )
    return Reactions(
        [Trigger(*row) for row in triggers.rows],
        [Cascade(*row) for row in cascades.rows],
        dict(columns.rows),
        dict(foreign.rows),
    )


def widening_problems(
    table: str, coming: Collection[str], reactions: Reactions, *, functions: Collection[str], held: Collection[str]
) -> Iterator[str]:
    """
    Say what would break for the code that runs when a table gets columns.

    Args:
        table: which exists.
        coming: the columns that plans add to it; those it has already break nothing more.
        reactions: of the table.
        functions: those for which people vouch that they cope with one column more.
        held: columns ("table.column") of which people say that they are there.
    """
    new = [column for column in coming if column not in reactions.columns.get(table, ())]
    if not new:
        return
    more = ", ".join(new)
    for trigger in reactions.triggers:
        known = {trigger.function, f"{trigger.schema}.{trigger.function}"} & {*functions}
        if trigger.table == table and trigger.spreads and not known and _spreads(trigger.spreads):
            yield (
                f"trigger {trigger.name} of {table} calls {trigger.function}(), which uses NEW.* or OLD.*; "
                f"with {more} those get longer: where that does not fit, every write to {table} fails; name the "
                f"columns in {trigger.function}() or, if it copes with more, list it in [lint] known_functions"
            )
    for part in reactions.foreign.get(table, ()):
        if unsaid := [f"{part}.{column}" for column in new if f"{part}.{column}" not in held]:
            yield (
                f"{part}, a part of {table}, is a foreign table: what lies behind it has no {more}, so INSERTs that go "
                f"there would fail, and SELECT *; add it there first, then list {', '.join(unsaid)} in "
                "[lint] known_columns"
            )


def _spreads(source: str) -> bool:
    return _SPREAD.search(_COPES.sub(" ", source)) is not None


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
    for trigger in triggers:
        if fired := {e for doing in _writes(move) if doing[0] == trigger.table for e in _fired(trigger, *doing[1:])}:
            narrows = fired == {"UPDATE"} and trigger.function is not None and not trigger.rewrites
            narrow = ", or make it one for UPDATE OF columns that the move leaves alone" if narrows else ""
            yield (
                f"trigger {trigger.name} of {trigger.table} would fire for every moved row; "
                f'say triggers="fire" in move_rows if it may{narrow}; DISABLE TRIGGER would stop it for the '
                "application too, so only while that stands still"
            )
        elif trigger.rewrites and trigger.table in {move.table, move.target}:
            yield (
                f"trigger {trigger.name} of {trigger.table} may change columns of a row on its way in, or keep one "
                "that is deleted, past the dual writes of the application; "
                'say triggers="fire" in move_rows if it leaves those that move alone'
            )


def _writes(move: Move) -> Iterator[tuple[str, frozenset[str], set[str]]]:
    """Say what a move does, forward and back: table, events of triggers, columns that its UPDATEs set."""
    yield move.target or move.table, _events(move.forward, move.purge or ""), {*move.writes, *move.target_key}
    if move.back is not None:
        yield move.table, _events(move.back), set(move.restores)
    if move.touch_source:
        yield move.table, frozenset({"UPDATE"}), set(move.key)


def _events(*texts: str) -> frozenset[str]:
    """Read off what statements may do; of words that mean something else there, too much."""
    verbs = {verb.upper() for text in texts for verb in _VERB.findall(text)}
    return _EVENTS & verbs if verbs and "MERGE" not in verbs else _EVENTS


def _fired(trigger: Trigger, events: frozenset[str], columns: set[str]) -> frozenset[str]:
    fired = events & set(trigger.events)
    return fired - {"UPDATE"} if trigger.columns and not columns & set(trigger.columns) else fired


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

_ASKED = "unnest($1::text[], $2::text[]) AS asked (name, address)"

# Rows of partitions and of tables that inherit are written through their parent, and fire what those have of their own.
WHOLE = f"""
WITH RECURSIVE asked AS (
    SELECT asked.name, to_regclass(asked.address)::oid AS oid FROM {_ASKED}
    UNION SELECT asked.name, i.inhrelid FROM asked JOIN pg_inherits AS i ON i.inhparent = asked.oid
)
"""

_FIRED = """
array_remove(ARRAY[CASE WHEN {inserts} THEN 'INSERT' END, CASE WHEN {updates} THEN 'UPDATE' END,
                   CASE WHEN {deletes} THEN 'DELETE' END], NULL)
"""

_TRIGGERS = f"""{WHOLE}
SELECT DISTINCT asked.name,
       t.tgname::text,
       {_FIRED.format(inserts="t.tgtype & 4 <> 0", updates="t.tgtype & 16 <> 0", deletes="t.tgtype & 8 <> 0")},
       ARRAY(SELECT a.attname::text FROM unnest(t.tgattr::int2[]) AS k (attnum)
             JOIN pg_attribute AS a ON a.attrelid = t.tgrelid AND a.attnum = k.attnum ORDER BY 1),
       t.tgtype & 3 = 3 AND t.tgtype & 28 <> 0,  -- ROW, BEFORE; any of them
       n.nspname::text, p.proname::text,
       CASE WHEN t.tgtype & 1 = 1 AND p.prosrc ~ '[.][[:space:]]*[*]' THEN p.prosrc END
FROM asked
JOIN pg_trigger AS t ON t.tgrelid = asked.oid AND NOT t.tgisinternal AND t.tgenabled <> 'D'
JOIN pg_proc AS p ON p.oid = t.tgfoid
JOIN pg_namespace AS n ON n.oid = p.pronamespace
UNION ALL
SELECT asked.name, r.rulename::text || ' (a rule)',
       {_FIRED.format(inserts="r.ev_type = '3'", updates="r.ev_type = '2'", deletes="r.ev_type = '4'")},
       '{{}}', r.is_instead, NULL, NULL, NULL
FROM {_ASKED}
JOIN pg_rewrite AS r ON r.ev_class = to_regclass(asked.address) AND r.ev_type <> '1' AND r.ev_enabled <> 'D'
ORDER BY 1, 2
"""

_COLUMNS_OF = f"""
SELECT asked.name, ARRAY(SELECT a.attname::text FROM pg_attribute AS a
                         WHERE a.attrelid = to_regclass(asked.address) AND a.attnum > 0 AND NOT a.attisdropped)
FROM {_ASKED}
"""

_FOREIGN = f"""{WHOLE}
SELECT asked.name, array_agg(c.oid::regclass::text ORDER BY c.oid::regclass::text)
FROM asked JOIN pg_class AS c ON c.oid = asked.oid AND c.relkind = 'f'
GROUP BY asked.name
"""

_ACTION = "CASE {column} WHEN 'c' THEN 'CASCADE' WHEN 'n' THEN 'SET NULL' WHEN 'd' THEN 'SET DEFAULT' END"
_COLUMNS = """
ARRAY(SELECT a.attname::text FROM unnest({key}) WITH ORDINALITY AS k (attnum, place)
      JOIN pg_attribute AS a ON a.attrelid = {relation} AND a.attnum = k.attnum ORDER BY k.place)
"""

_CASCADES = f"""{WHOLE}
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
