"""
What a shard is like where plans touch it: their tables, the server's abilities, the roles that are granted something.

One round trip asks for no more than these plans need, for a new server process pays for every catalog that it has not
yet seen. Another one follows where rows are moved between tables that react (triggers, foreign keys, rules, children),
where a table with triggers or children gets columns, and where anything is published or rows to be moved may be written
by a subscription. Tables that the plans themselves create do not exist yet and are not asked about. Free disk is not
asked either: PostgreSQL does not tell it to a client, and a guess would only look like an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig.lint.added import Added, added
from shardmig.lint.mentions import named
from shardmig.plan import Statement, quote_name
from shardmig.reactions import NONE, WHOLE, reactions_of
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shardmig.plan import AcceptedPlan
    from shardmig.reactions import Reactions
    from shardmig.session import Result, Session

__all__ = ["Findings", "Grantees", "Rows", "Table", "find", "mention_lz4", "touched"]

_LZ4 = re.compile(r"\bCOMPRESSION\s+\"?lz4\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Table:
    """
    What an existing table is like.

    Attributes:
        name: as the plans name it.
        kind: relkind.
        owner: its owner.
        owned: whether this session may do what only the owner may.
        referable: whether a foreign key of this session's tables may reference it.
        row_security: whether policies would hide rows from the role that this session works as.
        reacts: whether it has, or once had, triggers, foreign keys on either side, rules or children.
        parent: whether it has, or once had, children.
        fires: whether it has triggers that people made.
        oid: which it is.
        columns: how many it has had so far, dropped ones included.
        file: where its rows are; a rewrite changes that.
        known_pages, known_rows: of the last VACUUM or ANALYZE; rows are -1, or pages 0, where there was none.
    """

    name: str
    kind: str
    owner: str
    owned: bool
    referable: bool
    row_security: bool
    reacts: bool
    parent: bool
    fires: bool
    oid: int
    columns: int
    file: int
    known_pages: int
    known_rows: float


@dataclass(frozen=True, slots=True)
class Rows:
    """
    What matters of an existing table whose rows are moved.

    Attributes:
        name: as the plans name it.
        columns: column → whether it is NOT NULL.
        always: columns that are GENERATED ALWAYS AS IDENTITY.
        unique: columns of each valid, unconditional, immediate unique index on plain columns.
        walkable: columns of each valid, unconditional btree index, in order.
    """

    name: str
    columns: dict[str, bool]
    always: list[str]
    unique: list[list[str]]
    walkable: list[list[str]]


@dataclass(frozen=True, slots=True)
class Server:
    """What the server can do, whether it publishes anything, and whether event triggers fire on statements."""

    may_create: bool
    publishes: bool
    triggered: bool


@dataclass(frozen=True, slots=True)
class Grantees:
    """Roles of session.grant that are not there, and those that may not use the schema."""

    missing: list[str]
    locked_out: list[str]


@dataclass(frozen=True, slots=True)
class Published:
    """Publications of all tables, of each schema's, and of each table asked about or of a partition of its."""

    all_tables: list[str]
    schemas: dict[str, list[str]]
    tables: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Findings:
    """
    What was found, for these plans.

    Attributes:
        plans, server, grantees, lz4, tables, rows, reactions, published: as their types say; by name of the table.
        subscribed: tables moved that logical replication writes, or partitions of theirs.
    """

    plans: tuple[AcceptedPlan, ...]
    server: Server
    grantees: Grantees
    lz4: bool
    tables: dict[str, Table]
    rows: dict[str, Rows]
    reactions: Reactions
    published: Published
    subscribed: frozenset[str]

    def coming(self, table: str) -> str | None:
        """Return the statement of these plans that creates a table."""
        for accepted in self.plans:
            for number, created in accepted.creates.items():
                step = accepted.plan.steps[number - 1]
                if created == table and isinstance(step, Statement):
                    return step.sql
        return None

    def columns(self, home: str) -> dict[str, set[str]]:
        """
        Return the columns that moved tables will have when the structure of these plans is in place.

        Args:
            home: the schema that an unqualified name means; tables are spelled as `relation_name` does.
        """
        coming, parents = Added(), {named(table.name, home) for table in self.tables.values() if table.parent}
        for accepted in self.plans:
            coming.include(added(accepted.plan, home))
        # What a parent gets, its children get; which those are was not asked.
        inherited = {column for parent in parents for column in coming.columns.get(parent, ())}
        found = {named(name, home): {*rows.columns, *inherited} for name, rows in self.rows.items()}
        for table, new in (*coming.tables.items(), *coming.columns.items()):
            if table in found or table in coming.whole:
                found.setdefault(table, set()).update(new)
        return found


async def find(
    session: Session, plans: tuple[AcceptedPlan, ...], along: Sequence[Query]
) -> tuple[Findings, list[Result]]:
    """Ask what these plans need to know, and questions of the caller's along with it, whose answers come second."""
    home = session.shard.schema_name
    names = sorted({name for accepted in plans for name in touched(accepted)})
    asked = (names, [quote_name(name) for name in names])
    moved = sorted({name for accepted in plans for name in _moved(accepted)})
    flight = iter(
        await session.ask(
            [
                Query(_SERVER),
                *([Query(_GRANTEES, [list(session.settings.grant)])] if session.settings.grant else []),
                *([Query(_HAS_LZ4)] if mention_lz4(plans) else []),
                *([Query(_SUBSCRIBES)] if moved else []),
                *(Query(_TABLE, [quote_name(name)]) for name in names),
                *(Query(sql, [quote_name(name)]) for name in moved for sql in _ROWS),
                *along,
            ]
        )
    )
    server = Server(*next(flight).rows[0])
    grantees = Grantees(*next(flight).rows[0]) if session.settings.grant else Grantees([], [])
    lz4 = next(flight).value if mention_lz4(plans) else True
    subscribes = next(flight).value if moved else False
    tables = {name: Table(name, *row) for name in names for row in next(flight).rows}
    asked_rows = {name: [next(flight) for _ in _ROWS] for name in moved}
    rows = {name: _rows(name, *found) for name, found in asked_rows.items() if name in tables}
    answers = list(flight)
    widened = {table for accepted in plans for table in added(accepted.plan, home).columns}
    watched = any(
        (moved and table.reacts) or ((table.fires or table.parent) and named(name, home) in widened)
        for name, table in tables.items()
    )
    reactions = await reactions_of(session, asked) if watched else NONE
    published = await _published(session, asked) if server.publishes else Published([], {}, {})
    subscribed = await _subscribed(session, moved) if subscribes else frozenset()
    return Findings(plans, server, grantees, lz4, tables, rows, reactions, published, subscribed), answers


def _rows(name: str, columns: Result, indexes: Result) -> Rows:
    names = {str(number): column for number, column, *_ in columns.rows}
    keys = [([names[n] for n in key.split()[:width]], unique, btree) for key, width, unique, btree in indexes.rows]
    return Rows(
        name,
        columns={column: not_null for _, column, not_null, _ in columns.rows},
        always=[column for _, column, _, always in columns.rows if always],
        unique=[key for key, unique, _ in keys if unique],
        walkable=[key for key, _, btree in keys if btree],
    )


async def _published(session: Session, asked: tuple[list[str], list[str]]) -> Published:
    of_schemas = [Query(_PUBLISHED_SCHEMAS)] if session.server_version >= _SCHEMAS_PUBLISHED_SINCE else []
    all_tables, tables, *schemas = await session.flight([Query(_ALL_TABLES), Query(_PUBLISHED, asked), *of_schemas])
    return Published(all_tables.value, {name: who for found in schemas for name, who in found.rows}, dict(tables.rows))


async def _subscribed(session: Session, moved: list[str]) -> frozenset[str]:
    found = await session.execute(_SUBSCRIBED, [moved, [quote_name(name) for name in moved]])
    return frozenset(name for (name,) in found.rows)


def mention_lz4(plans: Iterable[AcceptedPlan]) -> bool:
    """Whether a statement wants lz4, which not every server was built with."""
    return any(_LZ4.search(sql) for sql in _statements(plans))


def _statements(plans: Iterable[AcceptedPlan]) -> Iterator[str]:
    for accepted in plans:
        yield from (step.sql for step in accepted.plan.steps if isinstance(step, Statement))


def touched(accepted: AcceptedPlan) -> Iterator[str]:
    """Name the existing tables that a plan locks, and those between which it moves rows."""
    for number in accepted.locks:
        yield from accepted.locked(number)
    yield from _moved(accepted)


def _moved(accepted: AcceptedPlan) -> Iterator[str]:
    for _, move in accepted.plan.moves:
        yield move.table
        if move.target is not None:
            yield move.target


# --------------------------------------------------------------------------------------------------------------------
# SQL. Asked of a server process that is new and pays for each join, cast and subquery, not for rows: hence a text for
# each table, which it reads once. $1 is its name for regclass.

_TABLE = """
SELECT c.relkind::text, pg_get_userbyid(c.relowner)::text, pg_has_role(c.relowner, 'USAGE'),
       has_table_privilege(c.oid, 'REFERENCES'), row_security_active(c.oid),
       c.relhastriggers OR c.relhasrules OR c.relhassubclass, c.relhassubclass,
       c.relhastriggers AND EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal),
       c.oid, c.relnatts, c.relfilenode, c.relpages, c.reltuples
FROM pg_class AS c WHERE c.oid = to_regclass($1)
"""

# 403 is the access method btree, on every server.
_ROWS = (
    """
SELECT a.attnum, a.attname, a.attnotnull, a.attidentity = 'a' FROM pg_attribute AS a
WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped
""",
    """
SELECT i.indkey::text, i.indnkeyatts, i.indisunique AND i.indimmediate,
       (SELECT x.relam = 403 FROM pg_class AS x WHERE x.oid = i.indexrelid)
FROM pg_index AS i
WHERE i.indrelid = to_regclass($1) AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
""",
)

# $1 are names as the plans write them, $2 the same for regclass. A partitioned table is published and subscribed to as
# its partitions, unless somebody said otherwise.
_PUBLISHED = f"""{WHOLE}
SELECT asked.name, array_agg(DISTINCT p.pubname::text ORDER BY p.pubname::text)
FROM asked
JOIN pg_class AS c ON c.oid = asked.oid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_publication_tables AS p ON p.schemaname = n.nspname AND p.tablename = c.relname
GROUP BY asked.name
"""

_SUBSCRIBED = f"""{WHOLE}
SELECT DISTINCT asked.name FROM asked JOIN pg_subscription_rel AS s ON s.srrelid = asked.oid
"""

_SCHEMAS_PUBLISHED_SINCE = 150_000  # FOR TABLES IN SCHEMA
_PUBLISHED_SCHEMAS = """
SELECT n.nspname::text, array_agg(p.pubname::text ORDER BY p.pubname)
FROM pg_publication_namespace AS s
JOIN pg_publication AS p ON p.oid = s.pnpubid
JOIN pg_namespace AS n ON n.oid = s.pnnspid
GROUP BY n.nspname
"""

_SERVER = """
SELECT has_schema_privilege(current_schema(), 'CREATE'), EXISTS (SELECT FROM pg_publication),
       EXISTS (SELECT FROM pg_event_trigger AS e WHERE e.evtenabled <> 'D')
"""
_HAS_LZ4 = "SELECT EXISTS (SELECT FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY(enumvals))"
_SUBSCRIBES = "SELECT EXISTS (SELECT FROM pg_subscription_rel)"
_ALL_TABLES = "SELECT ARRAY(SELECT pubname::text FROM pg_publication WHERE puballtables ORDER BY pubname)"

_GRANTEES = """
SELECT ARRAY(SELECT role FROM unnest($1::text[]) AS role WHERE to_regrole(quote_ident(role)) IS NULL),
       ARRAY(SELECT role FROM unnest($1::text[]) AS role
             WHERE to_regrole(quote_ident(role)) IS NOT NULL
               AND NOT has_schema_privilege(to_regrole(quote_ident(role)), current_schema(), 'USAGE'))
"""
