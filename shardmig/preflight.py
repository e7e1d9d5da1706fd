"""Is a shard ready for these plans? Asked before anything changes, and answered with every reason at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from shardmig.catalog import mode_of
from shardmig.errors import PreflightFailed
from shardmig.findings import find, mention_lz4
from shardmig.keys import key_problems, unwalked
from shardmig.lint.added import added
from shardmig.lint.mentions import columns_updated, mentions, named, relaxed, unknown
from shardmig.nearest import nearest
from shardmig.plan import Move, Statement
from shardmig.reactions import reaction_problems, reaction_warnings, widening_problems
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shardmig.config import Lint
    from shardmig.findings import Findings, Grantees, Rows, Table
    from shardmig.plan import AcceptedPlan
    from shardmig.session import Result, Session

__all__ = ["Ready", "preflight"]

_GRANTABLE = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN", "ALL"})
_CONFLICT = re.compile(r"\bON\s+CONFLICT\s*\(([^()]*)\)", re.IGNORECASE)
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "c": "a type"}


class Ready(NamedTuple):
    """
    Nothing stands in the way.

    Attributes:
        warnings: what somebody should know.
        findings: what was found.
        answers: of the questions that travelled along.
    """

    warnings: list[str]
    findings: Findings
    answers: list[Result]


async def preflight(session: Session, *plans: AcceptedPlan, lint: Lint, along: Sequence[Query] = ()) -> Ready:
    """
    Ask a shard whether plans can be applied there.

    Args:
        session: on the shard, as the owner.
        plans: everything that is to be applied, so that a plan may build on tables of one before it.
        lint: what people vouch for.
        along: questions of the caller's, for the same round trip.

    Raises:
        PreflightFailed: with every reason and its cure. Nothing was changed.
    """
    findings, answers = await find(session, plans, along)
    problems = [*_grant_problems(session, findings.grantees)]
    for accepted in plans:
        problems += _structure_problems(accepted, findings)
        problems += _widening_problems(accepted, findings, session.shard.schema_name, lint)
        for _, move in accepted.plan.moves:
            problems += _move_problems(move, findings, session.settings.owner or session.login)
    problems += await _name_problems(session, findings)
    if problems := list(dict.fromkeys(problems)):
        several = "\n  - ".join(["the shard is not ready:", *problems])
        raise PreflightFailed(problems[0] if len(problems) == 1 else several, shard=session.shard.name)
    return Ready(list(dict.fromkeys(_warnings(plans, findings, session.shard.schema_name))), findings, answers)


# --------------------------------------------------------------------------------------------------------------------
# What stands in the way


def _grant_problems(session: Session, grantees: Grantees) -> Iterator[str]:
    for role, privileges in session.settings.grant.items():
        words = {word.split("(")[0].strip().upper().removesuffix(" PRIVILEGES") for word in privileges.split(",")}
        if unknown := sorted(words - _GRANTABLE):
            yield f"session.grant gives {role} {', '.join(unknown)}, which is no privilege on a table; correct it"
    for role in grantees.missing:
        yield f"role {role} of session.grant does not exist; create it or take it out"
    for role in grantees.locked_out:
        schema = session.shard.schema_name
        yield f"role {role} may not use schema {schema}; GRANT USAGE ON SCHEMA {schema} TO {role}"


def _structure_problems(accepted: AcceptedPlan, findings: Findings) -> Iterator[str]:
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
    if not findings.lz4 and mention_lz4([accepted]):
        yield "this server was built without lz4; leave out COMPRESSION lz4 or use a server that has it"


def _rights_problems(table: Table, step: Statement) -> Iterator[str]:
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


def _widening_problems(accepted: AcceptedPlan, findings: Findings, home: str, lint: Lint) -> Iterator[str]:
    columns = added(accepted.plan, home).columns
    for table in findings.tables:
        yield from widening_problems(
            table,
            columns.get(named(table, home), ()),
            findings.reactions,
            functions=lint.known_functions,
            held=lint.known_columns,
        )


def _move_problems(move: Move, findings: Findings, role: str) -> Iterator[str]:
    source = findings.tables.get(move.table)
    target = findings.tables.get(move.target) if move.target is not None else source
    for table in {id(table): table for table in (source, target) if table is not None}.values():
        yield from _moved_table_problems(table, findings, role)
    if source is not None:
        rows = findings.rows[source.name]
        yield from key_problems(source.name, move.key, columns=rows.columns, unique=rows.unique)
        yield from _touch_problems(move, rows)
    if target is not None:
        rows = findings.rows[target.name]
        if move.target is not None and not _finds_rows(move, rows.unique):
            held = ", ".join(move.target_key)
            yield (
                f"table {target.name} has no unique index on ({held}), nor does its move's SQL name one that begins "
                "with it, so rows cannot be overwritten there; make it the table's primary key or UNIQUE"
            )
    if move.triggers == "refuse":
        creating = None if target is not None or move.target is None else findings.coming(move.target)
        yield from reaction_problems(move, findings.reactions, creating=creating)


def _touch_problems(move: Move, rows: Rows) -> Iterator[str]:
    """Say which columns of the source a move would write that the server alone may."""
    updated = columns_updated(move.forward, move.table.rpartition(".")[2]) if rows.always else ()
    for column in rows.always:
        if column in updated:
            yield (
                f"{rows.name}.{column} is GENERATED ALWAYS AS IDENTITY, so no move may touch it; "
                f"ALTER TABLE {rows.name} ALTER COLUMN {column} SET GENERATED BY DEFAULT"
                + (", or leave touch_source out" if move.touch_source else "")
            )


def _finds_rows(move: Move, unique: Iterable[Sequence[str]]) -> bool:
    """
    Say whether a move finds the rows of its target that a row of the source becomes.

    One row is found by a unique index on the key it carries; several, by one that begins with it (the rows of a range
    are read by it), unless the SQL insists that there be one.
    """
    held = set(move.target_key)
    named = {name.strip(' "') for names in _CONFLICT.findall(move.forward) for name in names.split(",")}
    return any(set(columns) == held or (named != held and set(columns[: len(held)]) == held) for columns in unique)


def _moved_table_problems(table: Table, findings: Findings, role: str) -> Iterator[str]:
    if table.kind not in {"r", "p"}:
        yield f"{table.name} is {_KINDS.get(table.kind, 'no table')}; rows can only be moved between tables"
    elif not table.owned:
        yield (
            f"table {table.name} belongs to {table.owner}, and rows are moved as its owner; "
            f"set session.owner to {table.owner}, or ALTER TABLE {table.name} OWNER TO your owner"
        )
    if table.row_security:
        yield (
            f"table {table.name} has row level security that binds {role} too: policies could hide rows from a move "
            f"and its check alike; ALTER ROLE {role} BYPASSRLS, or, where the application works as {role}, "
            f"set session.owner to a member of {table.owner} that has BYPASSRLS"
        )
    if table.name in findings.subscribed:
        yield (
            f"table {table.name} is written by logical replication, which knows nothing of dual writes; "
            "move its rows where they come from"
        )
    if foreign := findings.reactions.foreign.get(table.name):
        yield (
            f"rows of {table.name} lie behind a foreign table ({', '.join(foreign)}), where no batch commits "
            "together with its progress; bring them into a partition of this server first"
        )


async def _name_problems(session: Session, findings: Findings) -> list[str]:
    """Say which tables and columns that are named are neither here nor coming; asks more only where there are such."""
    home = session.shard.schema_name
    columns = findings.columns(home)
    moves = [move for accepted in findings.plans for _, move in accepted.plan.moves]
    touched = [name for move in moves for name in (move.table, move.target or move.table)]
    tables = [name for name in touched if name not in findings.tables and findings.coming(name) is None]
    missing = [mention for move in moves for mention in unknown(mentions(move, home), columns)]
    missing += [mention for accepted in findings.plans for mention in unknown(relaxed(accepted.plan, home), columns)]
    if not tables and not missing:
        return []
    dotted = [mention.column for mention in missing if mention.dotted]
    of_rows, others = [
        answer.value for answer in await session.flight([Query(_FUNCTIONS, [dotted]), Query(_TABLES_HERE)])
    ]
    return [
        *(
            f"table {name} of a move does not exist here; apply the migration that creates it first"
            + nearest(name, others)
            for name in tables
        ),
        *(
            f"{mention} here, and no statement of these plans adds it{mention.meant(columns)}"
            for mention in missing
            if not (mention.dotted and mention.column in of_rows)
        ),
    ]


_FUNCTIONS = "SELECT ARRAY(SELECT proname::text FROM pg_proc WHERE proname = ANY($1::text[]) AND pronargs = 1)"
_TABLES_HERE = """
SELECT ARRAY(SELECT c.relname::text FROM pg_class AS c
             WHERE c.relnamespace = quote_ident(current_schema())::regnamespace AND c.relkind IN ('r', 'p'))
"""


# --------------------------------------------------------------------------------------------------------------------
# What somebody should know


def _warnings(plans: Iterable[AcceptedPlan], findings: Findings, home: str) -> Iterator[str]:
    for accepted in plans:
        if findings.published.all_tables and accepted.creates:
            yield (
                f"publication {findings.published.all_tables[0]} is FOR ALL TABLES: "
                f"subscribers need {', '.join(accepted.creates.values())} before rows arrive there"
            )
        for name in accepted.creates.values():
            schema = name.rpartition(".")[0] or home
            if publications := findings.published.schemas.get(schema):
                yield (
                    f"publication {publications[0]} is FOR TABLES IN SCHEMA {schema}: "
                    f"subscribers need {name} before rows arrive there"
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
                yield from reaction_warnings(move, findings.reactions)
