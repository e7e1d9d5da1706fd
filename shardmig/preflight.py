"""
Is a shard ready for these plans? Asked before anything changes, and answered with every reason at once.

One round trip asks what the touched tables are like and what the server can do: no more than these plans need, for a
new server process pays for every catalog that it has not yet seen. Another one follows where rows are moved between
tables that react (triggers, foreign keys, rules, children), and where anything is published. Tables that the plans
themselves create do not exist yet and are not asked about. Free disk is not asked either: PostgreSQL does not tell it
to a client, and a guess would only look like an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shardmig.catalog import mode_of
from shardmig.errors import PreflightFailed
from shardmig.keys import key_problems, unwalked
from shardmig.plan import Move, Statement, quote_name
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shardmig.plan import AcceptedPlan
    from shardmig.session import Result, Session

__all__ = ["Ready", "preflight", "touched"]

_GRANTABLE = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN", "ALL"})
_LZ4 = re.compile(r"\bCOMPRESSION\s+\"?lz4\b", re.IGNORECASE)
_DIES_WITH = re.compile(r"\bREFERENCES\b.*\bON\s+DELETE\s+CASCADE\b", re.IGNORECASE | re.DOTALL)
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "c": "a type"}


class Ready(NamedTuple):
    """
    Nothing stands in the way.

    Attributes:
        warnings: what somebody should know.
        answers: of the questions that travelled along.
    """

    warnings: list[str]
    answers: list[Result]


async def preflight(session: Session, *plans: AcceptedPlan, along: Sequence[Query] = ()) -> Ready:
    """
    Ask a shard whether plans can be applied there.

    Args:
        session: on the shard, as the owner.
        plans: everything that is to be applied, so that a plan may build on tables of one before it.
        along: questions of the caller's, for the same round trip.

    Raises:
        PreflightFailed: with every reason and its cure. Nothing was changed.
    """
    findings, answers = await _ask(session, plans, along)
    problems = [*_grant_problems(session, findings.grantees)]
    for accepted in plans:
        problems += _structure_problems(accepted, findings)
        for _, move in accepted.plan.moves:
            problems += _move_problems(move, findings)
    if problems := list(dict.fromkeys(problems)):
        several = "\n  - ".join(["the shard is not ready:", *problems])
        raise PreflightFailed(problems[0] if len(problems) == 1 else several, shard=session.shard.name)
    return Ready(list(dict.fromkeys(_warnings(plans, findings))), answers)


# --------------------------------------------------------------------------------------------------------------------
# What was found


@dataclass(frozen=True, slots=True)
class _Table:
    """
    What an existing table is like.

    Attributes:
        name: as the plans name it.
        kind: relkind.
        owner: its owner.
        owned: whether this session may do what only the owner may.
        referable: whether a foreign key of this session's tables may reference it.
        row_security: whether policies may hide rows.
        reacts: whether it has, or once had, triggers, foreign keys on either side, rules or children.
    """

    name: str
    kind: str
    owner: str
    owned: bool
    referable: bool
    row_security: bool
    reacts: bool


@dataclass(frozen=True, slots=True)
class _Rows:
    """
    What matters of an existing table whose rows are moved.

    Attributes:
        name: as the plans name it.
        subscribed: whether logical replication writes it.
        columns: column → whether it is NOT NULL.
        unique: columns of each valid, unconditional, immediate unique index on plain columns.
        walkable: columns of each valid, unconditional btree index, in order.
    """

    name: str
    subscribed: bool
    columns: dict[str, bool]
    unique: list[list[str]]
    walkable: list[list[str]]


@dataclass(frozen=True, slots=True)
class _Trigger:
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
class _Cascade:
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
class _Server:
    """What the server can do, and whether it publishes anything."""

    may_create: bool
    publishes: bool


@dataclass(frozen=True, slots=True)
class _Grantees:
    """Roles of session.grant that are not there, and those that may not use the schema."""

    missing: list[str]
    locked_out: list[str]


@dataclass(frozen=True, slots=True)
class _Published:
    """Publications of all tables, and those of each table asked about."""

    all_tables: list[str]
    tables: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class _Findings:
    plans: tuple[AcceptedPlan, ...]
    server: _Server
    grantees: _Grantees
    lz4: bool
    tables: dict[str, _Table]
    rows: dict[str, _Rows]
    triggers: list[_Trigger]
    cascades: list[_Cascade]
    published: _Published

    def coming(self, table: str) -> str | None:
        """Return the statement of these plans that creates a table."""
        for accepted in self.plans:
            for number, created in accepted.creates.items():
                step = accepted.plan.steps[number - 1]
                if created == table and isinstance(step, Statement):
                    return step.sql
        return None

    def mentions(self, word: str) -> bool:
        """Whether a statement of these plans may bring a column of this name."""
        name = re.compile(rf'(?<!\w)"?{re.escape(word)}"?(?!\w)', re.IGNORECASE)
        return any(name.search(sql) for sql in _statements(self.plans))


async def _ask(
    session: Session, plans: tuple[AcceptedPlan, ...], along: Sequence[Query]
) -> tuple[_Findings, list[Result]]:
    names = sorted({name for accepted in plans for name in touched(accepted)})
    asked = (names, [quote_name(name) for name in names])
    moves = [Query(_ROWS, asked)] if any(accepted.plan.moves for accepted in plans) else []
    flight = iter(
        await session.flight(
            [
                Query(_SERVER),
                *([Query(_GRANTEES, [list(session.settings.grant)])] if session.settings.grant else []),
                *([Query(_HAS_LZ4)] if _mention_lz4(plans) else []),
                Query(_TABLES, asked),
                *moves,
                *along,
            ]
        )
    )
    server = _Server(*next(flight).rows[0])
    grantees = _Grantees(*next(flight).rows[0]) if session.settings.grant else _Grantees([], [])
    lz4 = next(flight).value if _mention_lz4(plans) else True
    tables = {row[0]: _Table(*row) for row in next(flight).rows}
    rows = {row[0]: _Rows(*row) for row in next(flight).rows} if moves else {}
    answers = list(flight)
    watched = bool(moves) and any(table.reacts for table in tables.values())
    triggers, cascades = await _reactions(session, asked) if watched else ([], [])
    published = await _published(session, asked) if server.publishes else _Published([], {})
    return _Findings(plans, server, grantees, lz4, tables, rows, triggers, cascades, published), answers


async def _reactions(session: Session, asked: tuple[list[str], list[str]]) -> tuple[list[_Trigger], list[_Cascade]]:
    triggers, cascades = await session.flight([Query(_TRIGGERS, asked), Query(_CASCADES, asked)])
    return [_Trigger(*row) for row in triggers.rows], [_Cascade(*row) for row in cascades.rows]


async def _published(session: Session, asked: tuple[list[str], list[str]]) -> _Published:
    all_tables, tables = await session.flight([Query(_ALL_TABLES), Query(_PUBLISHED, asked)])
    return _Published(all_tables.value, dict(tables.rows))


def _mention_lz4(plans: Iterable[AcceptedPlan]) -> bool:
    return any(_LZ4.search(sql) for sql in _statements(plans))


def _statements(plans: Iterable[AcceptedPlan]) -> Iterator[str]:
    for accepted in plans:
        yield from (step.sql for step in accepted.plan.steps if isinstance(step, Statement))


def touched(accepted: AcceptedPlan) -> Iterator[str]:
    """Name the existing tables that a plan locks, and those between which it moves rows."""
    for number in accepted.locks:
        yield from accepted.locked(number)
    for _, move in accepted.plan.moves:
        yield move.table
        if move.target is not None:
            yield move.target


# --------------------------------------------------------------------------------------------------------------------
# What stands in the way


def _grant_problems(session: Session, grantees: _Grantees) -> Iterator[str]:
    for role, privileges in session.settings.grant.items():
        words = {word.split("(")[0].strip().upper().removesuffix(" PRIVILEGES") for word in privileges.split(",")}
        if unknown := sorted(words - _GRANTABLE):
            yield f"session.grant gives {role} {', '.join(unknown)}, which is no privilege on a table; correct it"
    for role in grantees.missing:
        yield f"role {role} of session.grant does not exist; create it or take it out"
    for role in grantees.locked_out:
        schema = session.shard.schema_name
        yield f"role {role} may not use schema {schema}; GRANT USAGE ON SCHEMA {schema} TO {role}"


def _structure_problems(accepted: AcceptedPlan, findings: _Findings) -> Iterator[str]:
    if (accepted.creates or accepted.indexes) and not findings.server.may_create:
        yield "the owner may not create in the shard's schema; GRANT CREATE ON SCHEMA to it"
    for number, name in [(step, name) for step in accepted.locks for name in accepted.locked(step)]:
        step = accepted.plan.steps[number - 1]
        table = findings.tables.get(name)
        if table is None:
            if findings.coming(name) is None:
                yield f"table {name} does not exist here; apply the migration that creates it first"
        elif isinstance(step, Statement):
            yield from _rights_problems(table, step)
    if not findings.lz4 and _mention_lz4([accepted]):
        yield "this server was built without lz4; leave out COMPRESSION lz4 or use a server that has it"


def _rights_problems(table: _Table, step: Statement) -> Iterator[str]:
    if table.kind not in {"r", "p"}:
        yield f"{table.name} is {_KINDS.get(table.kind, 'no table')}, not a table"
    elif mode_of(step.sql) == "SHARE ROW EXCLUSIVE" and step.transactional:  # a foreign key to it
        if not table.referable:
            yield f"the owner may not reference table {table.name}; GRANT REFERENCES ON {table.name} TO it"
    elif not table.owned:
        yield (
            f"table {table.name} belongs to {table.owner}, and only its owner may change it; "
            f"set session.owner to {table.owner}, or ALTER TABLE {table.name} OWNER TO your owner"
        )


def _move_problems(move: Move, findings: _Findings) -> Iterator[str]:
    source = findings.tables.get(move.table)
    target = findings.tables.get(move.target) if move.target is not None else source
    for name, table in ((move.table, source), (move.target or move.table, target)):
        if table is None and findings.coming(name) is None:
            yield f"table {name} of a move does not exist here; apply the migration that creates it first"
    for table in {id(table): table for table in (source, target) if table is not None}.values():
        yield from _moved_table_problems(table, findings.rows[table.name])
    if source is not None:
        rows = findings.rows[source.name]
        yield from key_problems(source.name, move.key, columns=rows.columns, unique=rows.unique)
        yield from _column_problems(rows, (*move.key, *move.restores), findings)
    if target is not None:
        rows = findings.rows[target.name]
        yield from _column_problems(rows, (*move.target_key, *move.writes), findings)
        if move.target is not None and not any(set(columns) == set(move.target_key) for columns in rows.unique):
            yield (
                f"table {target.name} has no unique index on exactly ({', '.join(move.target_key)}), "
                "by which a move finds the row to overwrite"
            )
    if move.triggers == "refuse":
        yield from _trigger_problems(move, findings)
        yield from _cascade_problems(move, findings)


def _moved_table_problems(table: _Table, rows: _Rows) -> Iterator[str]:
    if table.kind not in {"r", "p"}:
        yield f"{table.name} is {_KINDS.get(table.kind, 'no table')}; rows can only be moved between tables"
    elif not table.owned:
        yield (
            f"table {table.name} belongs to {table.owner}, and rows are moved as its owner; "
            f"set session.owner to {table.owner}, or ALTER TABLE {table.name} OWNER TO your owner"
        )
    if table.row_security:
        yield (
            f"table {table.name} has row level security: policies could hide rows from a move and its check alike; "
            f"ALTER TABLE {table.name} DISABLE ROW LEVEL SECURITY while rows are moved"
        )
    if rows.subscribed:
        yield (
            f"table {table.name} is written by logical replication, which knows nothing of dual writes; "
            "move its rows where they come from"
        )


def _column_problems(table: _Rows, columns: Iterable[str], findings: _Findings) -> Iterator[str]:
    for column in columns:
        if column not in table.columns and not findings.mentions(column):
            yield f"table {table.name} has no column {column} here, and no statement of these plans adds it"


def _trigger_problems(move: Move, findings: _Findings) -> Iterator[str]:
    """Name triggers that a move would fire, forward or back: they were written for the application's own writes."""
    written = {move.target or move.table: {*move.writes, *move.target_key}}
    if move.restores or move.touch_source:
        written[move.table] = written.get(move.table, set()) | set(move.restores or move.key)
    for trigger in findings.triggers:
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


def _cascade_problems(move: Move, findings: _Findings) -> Iterator[str]:
    """Name foreign keys that write old columns behind the application's back, and so past its dual writes."""
    for key in findings.cascades:
        if key.table == move.table:
            actions = [action for action in (key.on_update, _setting(key.on_delete)) if action]
            if actions and any(re.search(rf"(?<!\w){re.escape(column)}(?!\w)", move.forward) for column in key.columns):
                yield (
                    f"foreign key {key.name} of {key.table} writes ({', '.join(key.columns)}) by itself, {actions[0]}, "
                    'past the dual writes of the application; say triggers="fire" in move_rows if that cannot happen'
                )
            if key.on_delete == "CASCADE" and move.target is not None and not _dies_with_source(move, findings):
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


def _dies_with_source(move: Move, findings: _Findings) -> bool:
    """Whether target rows are deleted together with their source rows."""
    if move.target is not None and (creating := findings.coming(move.target)) and move.target not in findings.tables:
        return bool(_DIES_WITH.search(creating))
    return any(
        key.table == move.target and key.other == move.table and key.on_delete == "CASCADE" for key in findings.cascades
    )


# --------------------------------------------------------------------------------------------------------------------
# What somebody should know


def _warnings(plans: Iterable[AcceptedPlan], findings: _Findings) -> Iterator[str]:
    for accepted in plans:
        if findings.published.all_tables and accepted.creates:
            yield (
                f"publication {findings.published.all_tables[0]} is FOR ALL TABLES: "
                f"subscribers need {', '.join(accepted.creates.values())} before rows arrive there"
            )
        for name in accepted.locks.values():
            if publications := findings.published.tables.get(name):
                yield (
                    f"table {name} is published by {', '.join(publications)}: "
                    "add its new columns on the subscribers first, or they stop at the next row"
                )
        for _, move in accepted.plan.moves:
            table = findings.rows.get(move.table)
            if table and not any(tuple(index[: len(move.key)]) == move.key for index in table.walkable):
                yield unwalked(move.table, move.key)
            if move.triggers == "refuse":
                yield from _new_side_warnings(move, findings)


def _new_side_warnings(move: Move, findings: _Findings) -> Iterator[str]:
    """Name foreign keys that write or remove rows of the new table by themselves: old keeps what it had."""
    for key in findings.cascades:
        if key.table != move.target or (key.other == move.table and key.on_delete == "CASCADE"):
            continue
        written = set(key.columns) & set(move.writes) and (key.on_update or _setting(key.on_delete))
        if written or key.on_delete == "CASCADE":
            yield (
                f"foreign key {key.name} changes rows of {key.table} by itself ({written or 'ON DELETE CASCADE'}) and "
                f"nothing does the same in {move.table}: switching back would show what was there before, unless a "
                "foreign key there has the same effect"
            )


# --------------------------------------------------------------------------------------------------------------------
# SQL; $1 are names as the plans write them, $2 the same for regclass

_ASKED = "unnest($1::text[], $2::text[]) AS asked (name, address)"

_TABLES = f"""
SELECT asked.name,
       c.relkind::text,
       pg_get_userbyid(c.relowner)::text,
       pg_has_role(c.relowner, 'USAGE'),
       has_table_privilege(c.oid, 'REFERENCES'),
       c.relrowsecurity,
       c.relhastriggers OR c.relhasrules OR c.relhassubclass
FROM {_ASKED} JOIN pg_class AS c ON c.oid = to_regclass(asked.address)
"""

_PUBLISHED = f"""
SELECT asked.name, array_agg(p.pubname::text ORDER BY p.pubname)
FROM {_ASKED}
JOIN pg_class AS c ON c.oid = to_regclass(asked.address)
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_publication_tables AS p ON p.schemaname = n.nspname AND p.tablename = c.relname
GROUP BY asked.name
"""

_ROWS = f"""
SELECT asked.name,
       EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = c.oid),
       (SELECT coalesce(jsonb_object_agg(a.attname, a.attnotnull), '{{}}') FROM pg_attribute AS a
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
       coalesce(jsonb_agg(index.columns) FILTER (WHERE index.keeps_unique), '[]'),
       coalesce(jsonb_agg(index.columns) FILTER (WHERE index.is_btree), '[]')
FROM {_ASKED}
JOIN pg_class AS c ON c.oid = to_regclass(asked.address)
LEFT JOIN LATERAL (
    SELECT i.indisunique AND i.indimmediate AS keeps_unique,
           m.amname = 'btree' AS is_btree,
           (SELECT array_agg(a.attname::text ORDER BY k.place)
            FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, place)
            JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
            WHERE k.place <= i.indnkeyatts) AS columns
    FROM pg_index AS i
    JOIN pg_class AS x ON x.oid = i.indexrelid
    JOIN pg_am AS m ON m.oid = x.relam
    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
) AS index ON true
GROUP BY asked.name, c.oid
"""

# Rows of partitions and of tables that inherit are written through their parent, and fire what those have of their own.
_WHOLE = f"""
WITH RECURSIVE asked AS (
    SELECT asked.name, to_regclass(asked.address)::oid AS oid FROM {_ASKED}
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
FROM {_ASKED}
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

_SERVER = "SELECT has_schema_privilege(current_schema(), 'CREATE'), EXISTS (SELECT FROM pg_publication)"
_HAS_LZ4 = "SELECT EXISTS (SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY(enumvals))"
_ALL_TABLES = "SELECT ARRAY(SELECT pubname::text FROM pg_publication WHERE puballtables ORDER BY pubname)"

_GRANTEES = """
SELECT ARRAY(SELECT role FROM unnest($1::text[]) AS role WHERE to_regrole(quote_ident(role)) IS NULL),
       ARRAY(SELECT role FROM unnest($1::text[]) AS role
             WHERE to_regrole(quote_ident(role)) IS NOT NULL
               AND NOT has_schema_privilege(to_regrole(quote_ident(role)), current_schema(), 'USAGE'))
"""
