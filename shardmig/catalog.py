"""
The catalog of a shard, and the proof that a change was additive.

A catalog is a set of facts: object → what the server says of it. A change is additive when every fact from before is
still there, word for word. The proof knows nothing of SQL text, so no text can talk it round. It exists twice: here,
over whole schemas, around a migration; and inside the transaction, for the one table that is locked, where the server
itself compares and raises, because a client's round trip would keep the lock.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

import psycopg

from shardmig.errors import ProofFailed, StepFailed
from shardmig.pgerrors import first_line, pointer
from shardmig.plan import Move, Statement, bind_batch
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from shardmig.plan import Plan
    from shardmig.session import Session

__all__ = [
    "NOT_ADDITIVE",
    "Catalog",
    "Difference",
    "Mode",
    "StepProof",
    "additive",
    "drift",
    "fingerprint",
    "mode_of",
    "proof_in_flight",
    "prove",
    "snapshot",
]

Mode = Literal["ACCESS EXCLUSIVE", "SHARE ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE"]

NOT_ADDITIVE = "SM004"  # SQLSTATE: the proof inside a transaction found a fact gone or changed

_PASSING = frozenset({"invalid index"})  # a failed build leaves one; whoever builds again drops it
_PRIVATE = "storage"  # the kind of facts that are true of one server only


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """
    One object that two catalogs see differently.

    Attributes:
        kind: "table", "column", "index", …
        name: qualified and quoted.
        before: what the first catalog says; None when it does not have the object.
        after: what the second one says; None likewise.
    """

    kind: str
    name: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        """Describe the difference in one line."""
        if self.after is None:
            return f"{self.kind} {self.name} is gone (was: {self.before})"
        if self.before is None:
            return f"{self.kind} {self.name} is new: {self.after}"
        if self.kind == _PRIVATE:
            return f"{self.name} was rewritten ({self.before} became {self.after})"
        return f"{self.kind} {self.name} changed from ({self.before}) to ({self.after})"


@dataclass(frozen=True, slots=True)
class Catalog:
    """The facts of some schemas: (kind, name) → fact."""

    facts: Mapping[tuple[str, str], str]

    def not_in(self, after: Catalog) -> list[Difference]:
        """Return what of this catalog is gone or changed in a later one; empty means that the change was additive."""
        return sorted(
            Difference(*key, fact, after.facts.get(key))
            for key, fact in self.facts.items()
            if after.facts.get(key) != fact and key[0] not in _PASSING
        )

    def new_in(self, after: Catalog) -> list[Difference]:
        """Return what a later catalog has beside this one."""
        return sorted(Difference(*key, None, fact) for key, fact in after.facts.items() if key not in self.facts)

    def comparable(self) -> Catalog:
        """Leave out what differs between two servers that hold the same schema."""
        return Catalog({key: fact for key, fact in self.facts.items() if key[0] != _PRIVATE})


async def snapshot(session: Session, schemas: Iterable[str]) -> Catalog:
    """
    Read the facts of whole schemas, in one round trip and from one snapshot.

    It takes the locks that a SELECT would take, because the text of an expression needs them: it disturbs nobody, and
    waits only for whoever keeps readers out.
    """
    named = [list(schemas)]
    relations, rest = _queries(_has_compression(session))
    flight = await session.transact([Query(relations, named), Query(rest, named)], isolation="REPEATABLE READ")
    return Catalog({(kind, name): fact or "" for part in flight for kind, name, fact in part.rows})


@asynccontextmanager
async def additive(session: Session, schemas: Iterable[str]) -> AsyncIterator[None]:
    """
    Prove whole schemas around a migration, outside of its locks and transactions.

    Whatever somebody else takes away meanwhile is blamed too: two changes at a time are worth a look.

    Raises:
        ProofFailed: a fact from before is gone or changed; what was done inside is committed.
    """
    named = list(schemas)
    before = await snapshot(session, named)
    yield
    if missing := before.not_in(await snapshot(session, named)):
        raise ProofFailed(
            f"the catalog lost something: {'; '.join(map(str, missing))}. What was applied is committed, and no shard "
            "goes on before people decide; report this: the linter missed it",
            shard=session.shard.name,
        )


def drift(expected: Catalog, actual: Catalog) -> list[Difference]:
    """
    Compare two shards, leaving out what is private to a server.

    Returns:
        Every difference, by kind and name; `before` is the expected fact.
    """
    left, right = expected.comparable(), actual.comparable()
    return sorted([*left.not_in(right), *left.new_in(right)], key=lambda found: (found.kind, found.name))


async def fingerprint(session: Session, schemas: Iterable[str]) -> str:
    """
    Hash the comparable facts on the server: equal hashes mean no drift, and only 64 characters travel.

    The hash depends on how the server's version words its facts, so compare within one major version.
    """
    relations, rest = _queries(_has_compression(session))
    result = await session.execute(_FINGERPRINT.format(relations=relations, rest=rest), [list(schemas)])
    return str(result.value)


def proof_in_flight(session: Session) -> tuple[Query, Query]:
    """
    Return the two statements that bracket a change of some relations inside its transaction.

    Their oids are expected in the setting `shardmig.relations` of the transaction, as an array. The first statement
    remembers their facts, the second compares and raises NOT_ADDITIVE. Both are anonymous blocks, so nothing has to be
    installed and the client's version decides what is proved.
    """
    return _in_flight(_has_compression(session))


def mode_of(sql: str) -> Mode:
    """Return the lock that a statement of a plan takes on an existing relation (LINT: ALTER, foreign key, COMMENT)."""
    verb = re.match(r"\s*(\w+)", sql)
    match verb[1].upper() if verb else "":
        case "CREATE":
            return "SHARE ROW EXCLUSIVE"
        case "COMMENT":
            return "SHARE UPDATE EXCLUSIVE"
        case _:
            return "ACCESS EXCLUSIVE"


# --------------------------------------------------------------------------------------------------------------------
# A plan on a scratch server


@dataclass(frozen=True, slots=True)
class StepProof:
    """
    What one step did on a scratch server.

    Attributes:
        number: of the step in its plan.
        locks: (relation, mode) of relations that existed before the plan, strongest mode each; empty for a statement
            that cannot run in a transaction, whose locks are gone when it returns.
        rewrites: relations that existed before and whose storage was replaced.
        scans: tables that existed before the plan and were read from end to end.
        missing: facts that the step took away or changed.
    """

    number: int
    locks: tuple[tuple[str, str], ...]
    rewrites: tuple[str, ...]
    scans: tuple[str, ...]
    missing: tuple[Difference, ...]


async def prove(session: Session, plan: Plan) -> list[StepProof]:
    """
    Run a plan's statements and moves on a scratch server and look at what they did.

    The plans before it must have run there. Every step commits, so that the next plan can be proved after it. Moves run
    over whatever rows there are, each of its texts once.

    Raises:
        StepFailed: a step does not run; the message shows where.
    """
    before = await snapshot(session, [session.shard.schema_name])
    existing = [name for kind, name in before.facts if kind in {"table", "partitioned table", "materialized view"}]
    proofs = []
    for number, step in enumerate(plan.steps, 1):
        if isinstance(step, Statement | Move):
            try:
                proofs.append(await _prove_step(session, number, step, existing))
            except psycopg.Error as error:
                where = pointer(error, session.failed.sql) if session.failed else ""
                said = f"it does not run on an empty server: {first_line(error)}\n{where}".rstrip()
                raise StepFailed(said, shard=session.shard.name, step=f"{plan.revision} step {number}") from error
    return proofs


async def _prove_step(session: Session, number: int, step: Statement | Move, existing: list[str]) -> StepProof:
    schemas = [session.shard.schema_name]
    before = await snapshot(session, schemas)
    footprint: list[tuple[str, str | None, int]] = []
    if isinstance(step, Statement) and not step.transactional:
        await session.execute_alone(step.sql)
    else:
        look = Query(_FOOTPRINT, [existing])
        earlier, *_, later = await session.transact([look, *(Query(sql) for sql in _texts(step)), look])
        # What this backend counted in transactions before may not have been handed in yet: only the growth is ours.
        footprint = [
            (name, mode, scans - scans_before)
            for (name, mode, scans), (_, _, scans_before) in zip(later.rows, earlier.rows, strict=True)
        ]
    missing = before.not_in(await snapshot(session, schemas))
    return StepProof(
        number=number,
        locks=tuple((name, mode) for name, mode, _ in footprint if mode),
        rewrites=tuple(difference.name for difference in missing if difference.kind == _PRIVATE),
        scans=tuple(name for name, _, scans in footprint if scans and isinstance(step, Statement)),
        missing=tuple(missing),
    )


def _texts(step: Statement | Move) -> list[str]:
    if isinstance(step, Statement):
        return [step.sql]
    source = (step.forward, step.check, step.back, step.back_check)
    target = (step.orphans, step.purge)
    return [
        *(bind_batch(sql, step.key, lower=False, upper=False, alias=step.alias) for sql in source if sql),
        *(bind_batch(sql, step.target_key, lower=False, upper=False) for sql in target if sql),
    ]


# --------------------------------------------------------------------------------------------------------------------
# SQL

_MARK = re.compile(r"^-{20,} what is no relation$", re.MULTILINE)
_COMPRESSION_SINCE = 140_000  # server version that brought pg_attribute.attcompression


def _has_compression(session: Session) -> bool:
    return session.server_version >= _COMPRESSION_SINCE


@cache
def _queries(has_compression: bool) -> tuple[str, str]:  # noqa: FBT001 - the cache's key
    relations, rest = _facts(has_compression)
    in_schemas = "n.nspname = ANY($1)"
    kinds = "c.relkind IN ('r', 'p', 'v', 'm', 'f', 'c', 'S')"
    return relations.replace("{relations}", f"{in_schemas} AND {kinds}"), rest.replace("{schemas}", in_schemas)


@cache
def _facts(has_compression: bool) -> tuple[str, str]:  # noqa: FBT001 - the cache's key
    text = files("shardmig").joinpath("catalog.sql").read_text(encoding="utf-8")
    relations, rest = _MARK.split(text)
    return relations.replace("{compression}", "a.attcompression::text" if has_compression else "NULL"), rest


@cache
def _in_flight(has_compression: bool) -> tuple[Query, Query]:  # noqa: FBT001 - the cache's key
    relations, _ = _facts(has_compression)
    facts = relations.replace(
        "{relations}", "c.oid = ANY (nullif(current_setting('shardmig.relations', true), '')::oid[])"
    )
    return Query(_REMEMBER.replace("{facts}", facts)), Query(_COMPARE)


# Planning the question takes longer than answering it, so it is planned before the lock is taken and only executed
# while it is held: a prepared statement keeps its plan for the session.
_REMEMBER = """
DO $proof$
DECLARE
    facts text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_prepared_statements WHERE name = 'shardmig_facts') THEN
        EXECUTE $prepare$
            PREPARE shardmig_facts AS
            SELECT coalesce(jsonb_object_agg(kind || ' ' || object, fact), '{}')::text FROM ({facts}) AS facts
        $prepare$;
    END IF;
    EXECUTE 'EXECUTE shardmig_facts' INTO facts;
    PERFORM set_config('shardmig.before', facts, true);
END
$proof$
"""

_COMPARE = f"""
DO $proof$
DECLARE
    facts text;
    missing text;
BEGIN
    IF coalesce(current_setting('shardmig.relations', true), '') = '' THEN
        RAISE EXCEPTION USING ERRCODE = '{NOT_ADDITIVE}',
            MESSAGE = 'a relation that the plan names was not found, so nothing is proved of what was changed';
    END IF;
    EXECUTE 'EXECUTE shardmig_facts' INTO facts;
    SELECT string_agg(
        CASE WHEN a.value IS NULL THEN b.key || ' is gone'
             ELSE b.key || ' changed from (' || b.value || ') to (' || a.value || ')' END,
        '; ' ORDER BY b.key)
    INTO missing
    FROM jsonb_each_text(current_setting('shardmig.before')::jsonb) AS b
    LEFT JOIN jsonb_each_text(facts::jsonb) AS a ON a.key = b.key
    WHERE a.value IS DISTINCT FROM b.value AND b.key NOT LIKE 'invalid index %';
    IF missing IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = '{NOT_ADDITIVE}', MESSAGE = missing;
    END IF;
END
$proof$
"""

_FINGERPRINT = f"""
SELECT encode(sha256(convert_to(coalesce(
           string_agg(concat_ws(chr(31), kind, object, fact), chr(30) ORDER BY kind COLLATE "C", object COLLATE "C"), ''
       ), 'UTF8')), 'hex')
FROM ({{relations}} UNION ALL {{rest}}) AS facts
WHERE kind <> '{_PRIVATE}'
"""

# What the open transaction did to relations that existed before it: the strongest lock and the scans counted so far.
_FOOTPRINT = """
SELECT existing.name,
       (SELECT l.mode FROM pg_locks AS l
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.relation = to_regclass(existing.name)
          AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        ORDER BY array_position(ARRAY['AccessExclusiveLock', 'ExclusiveLock', 'ShareRowExclusiveLock', 'ShareLock',
                                      'ShareUpdateExclusiveLock', 'RowExclusiveLock', 'RowShareLock',
                                      'AccessShareLock'], l.mode)
        LIMIT 1),
       coalesce(pg_stat_get_xact_numscans(to_regclass(existing.name)), 0)
FROM unnest($1::text[]) AS existing (name)
ORDER BY existing.name
"""
