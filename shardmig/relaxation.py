"""
What must be true before a flag goes DONE: writers of new alone may leave every old column out.

An old column that is NOT NULL without a default would make their INSERTs fail. The script may declare it in `relax`;
then this edge runs the one ALTER that shardmig ever runs on an existing column: DROP NOT NULL. So would a domain, a
CHECK or a unique index that does not take what stands in a column that is left out; where that is NULL, the server is
asked whether it does. Partitions and children count as the table does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from psycopg import errors as pg

from shardmig import locking
from shardmig.errors import PreflightFailed
from shardmig.lint.mentions import ANY, columns_read
from shardmig.plan import quote, quote_name
from shardmig.session import Query

if TYPE_CHECKING:
    from shardmig.events import Listener
    from shardmig.plan import Plan
    from shardmig.session import Session

__all__ = ["refuse_mandatory", "refuse_without_old", "relax"]

_IN_THE_WAY = """
WITH RECURSIVE tree AS (
    SELECT $1::regclass::oid AS oid, 0 AS level
    UNION
    SELECT i.inhrelid, level + 1 FROM pg_inherits AS i JOIN tree ON i.inhparent = tree.oid
), old AS (  -- and what is generated from it
    SELECT tree.level, c.oid, a.attname, a.attnum, a.attnotnull, t.typtype,
           format_type(a.atttypid, a.atttypmod) AS type,
           -- A row that is routed gets the defaults of the table that it was written to.
           a.attgenerated = '' AND (w.atthasdef OR w.attidentity <> '' OR t.typdefault IS NOT NULL) AS has_default,
           a.attgenerated = '' AND NOT w.atthasdef AND w.attidentity = '' AND t.typdefault IS NULL AS is_null
    FROM tree
    JOIN pg_class AS c USING (oid)
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_attribute AS w ON w.attrelid = CASE WHEN c.relispartition THEN $1::regclass ELSE c.oid END
         AND w.attname = a.attname
    JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE (a.attname = ANY ($2::text[]) OR '*' = ANY ($2::text[]) AND a.attname <> ALL ($3::text[]))
       OR a.attgenerated <> '' AND EXISTS (
            SELECT FROM pg_depend AS d
            JOIN pg_attribute AS g ON g.attrelid = d.refobjid AND g.attnum = d.refobjsubid
            LEFT JOIN pg_attrdef AS e ON d.classid = 'pg_attrdef'::regclass AND e.oid = d.objid
            WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid AND g.attname = ANY ($2::text[])
              AND (e.adnum = a.attnum  -- until 14 the column itself depends
                   OR d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = a.attnum))
), checked AS (
    SELECT k.oid, k.conrelid, k.conname, k.contype, k.conkey,
           pg_get_expr(k.conbin, k.conrelid) || ' IS NOT FALSE' AS holds
    FROM pg_constraint AS k JOIN tree ON tree.oid = k.conrelid
    WHERE k.contype <> 'n' AND (tree.level = 0 OR k.coninhcount = 0 AND k.conparentid = 0)
), keyed AS (
    SELECT i.indexrelid, i.indrelid, c.relname, parts.columns,
           CASE WHEN to_jsonb(i) ->> 'indnullsnotdistinct' = 'true' THEN NULL ELSE (  -- since 15
               SELECT string_agg(format('(%s) IS NULL', pg_get_indexdef(i.indexrelid, n, false)), ' OR ')
               FROM generate_series(1, i.indnkeyatts) AS n) END AS never
    FROM pg_index AS i
    JOIN tree ON tree.oid = i.indrelid
    JOIN pg_class AS c ON c.oid = i.indexrelid
    CROSS JOIN LATERAL (
        SELECT ARRAY(SELECT i.indkey[n]::int2 FROM generate_series(0, i.indnkeyatts - 1) AS n WHERE i.indkey[n] <> 0
                     UNION
                     SELECT d.refobjsubid::int2 FROM pg_depend AS d
                     WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.refobjsubid <> 0
                       AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid
                       AND coalesce(i.indexprs, i.indpred) IS NOT NULL) AS columns
    ) AS parts
    WHERE i.indisunique AND (tree.level = 0 OR NOT c.relispartition)
      AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))
), found AS (
    SELECT old.*, 0 AS rank, 'mandatory' AS kind, NULL::text AS what, NULL::int2[] AS columns, NULL::text AS harmless
    FROM old WHERE attnotnull AND NOT has_default
    UNION ALL
    SELECT old.*, 1, 'domain', type, ARRAY[attnum], format('%I IS NULL', attname)
    FROM old WHERE typtype = 'd' AND NOT has_default
    UNION ALL
    SELECT old.*, 2, 'constraint',
           format('%s (%s)', k.conname,
                  CASE k.contype WHEN 'c' THEN 'CHECK' WHEN 'f' THEN 'FOREIGN KEY' WHEN 'p' THEN 'PRIMARY KEY'
                                 WHEN 'u' THEN 'UNIQUE' ELSE 'EXCLUDE' END),
           k.conkey, CASE k.contype WHEN 'c' THEN k.holds END
    FROM old JOIN checked AS k ON k.conrelid = old.oid AND k.conkey && ARRAY[attnum, 0::int2]
    UNION ALL
    SELECT old.*, 3, 'index', k.relname, k.columns, k.never
    FROM old JOIN keyed AS k ON k.indrelid = old.oid AND attnum = ANY (k.columns)
)
SELECT DISTINCT level, oid::regclass::text AS relation, attname AS name, rank, kind, what,
       -- Asked of a row of NULLs alone: where another column has a say, nobody knows.
       (SELECT format('SELECT (%s) FROM (SELECT %s) AS left_out', found.harmless,
                      string_agg(format('NULL::%s AS %I', one.type, one.attname), ', '))
        FROM old AS one
        WHERE one.oid = found.oid AND one.level = found.level AND one.is_null AND one.attnum = ANY (found.columns)
        HAVING count(*) = cardinality(found.columns) AND found.harmless IS NOT NULL) AS harmless
FROM found
ORDER BY level, relation, name, rank, what
"""


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """
    What may keep writers from leaving a column out.

    Attributes:
        level: 0 for the table itself, 1 for its partitions and children, and so on.
        relation: where it is, as the server writes it.
        name: the column.
        rank: of the kind.
        kind: "mandatory", "domain", "constraint" or "index".
        what: the domain, the constraint or the index; None for NOT NULL.
        harmless: SQL of one boolean, true where NULL passes; None where nobody knows.
    """

    level: int
    relation: str
    name: str
    rank: int
    kind: Literal["mandatory", "domain", "constraint", "index"]
    what: str | None
    harmless: str | None


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
    while mandatory := await refuse_mandatory(session, plan):
        for table, name in mandatory:
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
        The columns that are to be relaxed next, as table and name: a partition's only when its table's are, which may
        be enough.

    Raises:
        PreflightFailed: a column is mandatory and not in `relax`, or a domain, a constraint or a unique index does not
            take what is left out; every one is listed.
    """
    mandatory: dict[int, list[tuple[str, str]]] = {}
    problems: dict[str, None] = {}
    told: dict[tuple[str, str, str, str | None], int] = {}
    known: dict[str, bool] = {}
    for table, columns in _old_columns(plan).items():
        params = [quote_name(table), sorted(columns), sorted(_staying(plan, table))]
        for one in await session.fetch(_Obstacle, _IN_THE_WAY, params):
            relation = one.relation if one.level else table
            if one.kind == "mandatory" and f"{table}.{one.name}" in plan.relax:
                mandatory.setdefault(one.level, []).append((relation, one.name))
                continue
            if one.harmless is not None and await _true(session, one.harmless, known):
                continue
            level = told.setdefault((table, one.name, one.kind, one.what), one.level)
            if level == one.level:  # what the table demands, its partitions do, too
                problems[_said(one, relation, f"{table}.{one.name}")] = None
    if problems:
        raise PreflightFailed(
            f"{plan.flag} cannot go DONE: " + "; ".join(problems) + ". It may stay LIVE for ever",
            shard=session.shard.name,
        )
    return mandatory[min(mandatory)] if mandatory else []


async def _true(session: Session, sql: str, known: dict[str, bool]) -> bool:
    """Ask the server something that partitions may ask again; an error is a no."""
    if sql not in known:
        try:
            known[sql] = (await session.execute(sql)).value is True
        except (pg.IntegrityError, pg.DataError, pg.ProgrammingError, pg.RaiseException):
            known[sql] = False
    return known[sql]


def _said(one: _Obstacle, relation: str, written: str) -> str:
    """Say what is in the way, and the cure."""
    column = f"{relation}.{one.name}"
    match one.kind:
        case "mandatory":
            return (
                f'{column} is NOT NULL without a default; a script that says relax = ["{written}"] before it is '
                "applied lets this edge drop that"
            )
        case "domain":
            return f"{column} is of the domain {one.what}, which takes no NULL; give the column a default"
        case "constraint":
            return f"{column} is under {one.what}: writers of new alone cannot keep that; drop it by hand"
        case "index":
            return f"{column} is in the unique index {one.what}: rows that leave it out may collide; drop it by hand"


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
        if missing := columns - {ANY} - {row[0] for row in found.rows}:
            raise PreflightFailed(
                f"{plan.flag} stays DONE: {', '.join(f'{table}.{column}' for column in sorted(missing))} is gone, and "
                "every write in LIVE would fail; add it again as it was, nullable, before going back",
                shard=session.shard.name,
            )


def _old_columns(plan: Plan) -> dict[str, set[str]]:
    """
    Return the old columns by table: those that `back` restores and those that the script relaxes.

    Without `back` nobody has said which are old: it may be each that `forward` reads.
    """
    old: dict[str, set[str]] = {}
    for _, move in plan.moves:
        said = move.back is not None or move.seed
        old.setdefault(move.table, set()).update(
            move.restores if said else columns_read(move.forward) - _staying(plan, move.table)
        )
    for written in plan.relax:
        table, _, column = written.rpartition(".")
        old.setdefault(table, set()).add(column)
    return old


def _staying(plan: Plan, table: str) -> set[str]:
    """Return columns of a table that writers of new alone write in any case: keys, and what moves fill."""
    moves = [move for _, move in plan.moves]
    keys = {column for move in moves if move.table == table for column in move.key}
    return keys | {column for move in moves if table == (move.target or move.table) for column in move.writes}
