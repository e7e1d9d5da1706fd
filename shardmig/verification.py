"""
Shards against what the committed plans make of an empty server, and so against each other.

A shard is held against the revision that its own ledger says it has, so one that is behind is no other shard, and what
the ledger knows nothing of is drift. What belongs to one server only (owners, privileges, partitions that come and go
with time, the order of columns) is left out.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from shardmig.catalog import Catalog, Difference, snapshot
from shardmig.checks import SHOWN, compare
from shardmig.errors import ConfigError, InDoubt, ShardmigError
from shardmig.pgerrors import first_line
from shardmig.plan import Statement
from shardmig.records import Records, read_records
from shardmig.session import open_session
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from shardmig.checks import Direction, Disagreement
    from shardmig.config import Config, Shard
    from shardmig.keyset import Key
    from shardmig.mismatches import Mismatches
    from shardmig.plan import AcceptedPlan, Move
    from shardmig.records import FlagRow, StepRow
    from shardmig.scratch import Scratch
    from shardmig.session import Session

__all__ = ["Disagreeing", "Verdict", "alike", "verify", "verify_rows"]

_OF_THE_SERVER = frozenset(
    {"storage", "privileges", "schema", "extension", "event trigger", "publication", "limits", "statistics"}
)
_OWNER = re.compile(r"\Aowner [^,]+(, )?")
_PLACE = re.compile(r"\A#\d+, ")
_PRIVILEGES = re.compile(r",? ?privileges \{[^}]*\}")
_COMPRESSION = re.compile(r",? ?compression \w")
_PARTITION = re.compile(r"\bchild of .*(FOR VALUES|DEFAULT)")
_ATTACHED = re.compile(r" ON ONLY ")


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What verifying one shard found.

    Attributes:
        shard: its name.
        revision: the newest revision that its ledger says is there; None before the first.
        behind: how many revisions are newer.
        differences: `before` is what the plans make, `after` what the shard has.
        problem: why it could not be looked at; None when it was.
    """

    shard: str
    revision: str | None = None
    behind: int = 0
    differences: tuple[Difference, ...] = ()
    problem: str | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing differs."""
        return self.problem is None and not self.differences


@dataclass(frozen=True, slots=True)
class Disagreeing:
    """
    Rows of one shard that disagree with their move.

    Attributes:
        shard: its name.
        state: of the flag.
        table: whose rows were walked.
        rows: how many disagree.
        keys: the first of them, of rows that differ and of rows whose source is gone.
        note: why there was nothing to compare; None when there was.
        problem: why the shard could not be asked; None when it was.
        moving: whether rows are still being moved, so that those not moved yet were left out.
    """

    shard: str
    state: str
    table: str
    rows: int = 0
    keys: tuple[tuple[str, ...], ...] = ()
    note: str | None = None
    problem: str | None = None
    moving: bool = False


@dataclass(frozen=True, slots=True)
class _Looked:
    """One shard's catalog, and what its ledger says of it."""

    shard: Shard
    catalog: Catalog
    level: int
    begun: int
    relaxed: frozenset[tuple[str, str]]


_LOOKS = 5  # at a shard that a runner changes while it is looked at
_LIFTED = "SELECT DISTINCT revision FROM shardmig.log WHERE shard = $1 AND action = 'relax'"


# --------------------------------------------------------------------------------------------------------------------
# Structure


async def verify(
    config: Config, plans: Sequence[AcceptedPlan], targets: Sequence[Shard], scratch: Scratch | None, *, jobs: int = 16
) -> list[Verdict]:
    """
    Compare every target's catalog with what the plans make; nothing is changed anywhere.

    Args:
        config: the project's.
        plans: the whole history, accepted, in order.
        targets: the shards.
        scratch: a server to build on; None holds shards against what most of them look like.
        jobs: shards at once.

    Returns:
        One verdict a target, in their order.
    """
    places = asyncio.Semaphore(jobs)

    async def look(shard: Shard) -> _Looked | Verdict:
        async with places:
            try:
                return await _look(config, plans, shard)
            except (ShardmigError, psycopg.Error) as error:
                return Verdict(shard.name, problem=_problem(error))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(look(shard)) for shard in targets]
    found = [task.result() for task in tasks]
    expected = await _expected(config, plans, scratch, [one for one in found if isinstance(one, _Looked)])
    return [_judged(one, plans, expected) if isinstance(one, _Looked) else one for one in found]


def _problem(error: ShardmigError | psycopg.Error) -> str:
    """Say why a shard was not looked at; a connection that breaks is its shard's alone, and leaves nothing in doubt."""
    if isinstance(error, InDoubt):
        return "its connection broke; ask again"
    return str(error) if isinstance(error, ShardmigError) else f"it could not be asked: {first_line(error)}"


async def _look(config: Config, plans: Sequence[AcceptedPlan], shard: Shard) -> _Looked:
    async with open_session(shard, config.session, pg_versions=config.lint.pg_versions, purpose="read") as session:
        before = await _recorded(session, plans, shard)
        for _ in range(_LOOKS):  # a runner at work may change both between catalog and ledger
            catalog = await snapshot(session, _schemas(config, shard))
            stands, before = before, await _recorded(session, plans, shard)
            if stands == before:
                break
    return _Looked(shard, _comparable(catalog), *before)


async def _recorded(
    session: Session, plans: Sequence[AcceptedPlan], shard: Shard
) -> tuple[int, int, frozenset[tuple[str, str]]]:
    """Read up to which plan the ledger knows structure, as `_level` counts, and which columns a plan let go."""
    found = await read_records(session)
    lifted = await session.execute(_LIFTED, [shard.name]) if found is not None else None
    records, gone = found or Records(shard.name), {row[0] for row in lifted.rows} if lifted is not None else set()
    relaxed = {
        ("column", _column(shard, written))
        for accepted in plans
        if accepted.plan.revision in gone or records.state(accepted.plan.flag) is State.DONE
        for written in accepted.plan.relax
    }
    return *_level(plans, records), frozenset(relaxed)


def _schemas(config: Config, shard: Shard) -> list[str]:
    return list(dict.fromkeys([shard.schema_name, *(s for s in config.lint.schemas if s != "public")]))


def _column(shard: Shard, written: str) -> str:
    parts = written.split(".")
    return ".".join(parts if len(parts) > 2 else [shard.schema_name, *parts])  # noqa: PLR2004 - schema, table, column


def _level(plans: Sequence[AcceptedPlan], records: Records) -> tuple[int, int]:
    """Count the plans whose structure is there as a whole, and up to which one any of it is."""
    whole, begun = 0, 0
    for place, accepted in enumerate(plans, 1):
        done = [
            (step := records.steps.get((accepted.plan.revision, number))) is not None and step.done
            for number, one in enumerate(accepted.plan.steps, 1)
            if isinstance(one, Statement)
        ]
        known = accepted.plan.revision in records.migrations
        if known and all(done) and whole == place - 1:
            whole = place
        if known and (any(done) or all(done)):
            begun = place
    return whole, max(whole, begun)


async def _expected(
    config: Config, plans: Sequence[AcceptedPlan], scratch: Scratch | None, looked: Sequence[_Looked]
) -> Mapping[tuple[str, int], Catalog]:
    """Return what each revision that some shard has should look like, schema by schema."""
    if scratch is None:
        return _commonest(looked)
    wanted: dict[str, set[int]] = {}
    for one in looked:
        wanted.setdefault(one.shard.schema_name, set()).update({one.level, one.begun})
    made: dict[tuple[str, int], Catalog] = {}
    for schema, levels in wanted.items():
        shard = await scratch.shard(schema)
        for level in sorted(levels):
            if level:
                await scratch.apply(shard, upto=plans[level - 1].plan.revision)
            async with open_session(
                shard, scratch.config.session, pg_versions=scratch.config.lint.pg_versions, purpose="read"
            ) as session:
                made[schema, level] = _comparable(await snapshot(session, _schemas(config, shard)))
    return made


def _commonest(looked: Sequence[_Looked]) -> Mapping[tuple[str, int], Catalog]:
    """Let most shards of a revision say how it looks: with an adopted history nobody can build it from nothing."""
    seen: dict[tuple[str, int], Counter[frozenset[tuple[tuple[str, str], str]]]] = {}
    for one in looked:
        for level in {one.level, one.begun}:
            facts = frozenset(one.catalog.facts.items())
            seen.setdefault((one.shard.schema_name, level), Counter())[facts] += 1
    return {key: Catalog(dict(counted.most_common(1)[0][0])) for key, counted in seen.items()}


def _comparable(catalog: Catalog) -> Catalog:
    """Leave out what may differ between shards that are alike."""
    parts = {name for (_, name), fact in catalog.facts.items() if _PARTITION.search(fact)}
    kept = {}
    for (kind, name), fact in catalog.facts.items():
        if kind in _OF_THE_SERVER or any(name == part or name.startswith(f"{part}.") for part in parts):
            continue
        if kind in ("index", "invalid index") and any(f" ON {part} " in fact for part in parts):
            continue
        plain = _PLACE.sub("", _OWNER.sub("", fact))
        kept[kind, name] = _ATTACHED.sub(" ON ", _COMPRESSION.sub("", _PRIVILEGES.sub("", plain)))
    return Catalog(kept)


def _judged(one: _Looked, plans: Sequence[AcceptedPlan], expected: Mapping[tuple[str, int], Catalog]) -> Verdict:
    schema = one.shard.schema_name
    # What the revision in progress makes may be there already, and may be missing.
    least = _relaxed(expected[schema, one.level], one).facts
    most = _relaxed(expected[schema, one.begun], one).facts
    actual = dict(_relaxed(one.catalog, one).facts)
    found = []
    for _, name in [key for key in actual if key[0] == "invalid index"]:
        fact = actual.pop(("invalid index", name))
        index = ("index", name)
        found.append(Difference(*index, most.get(index), f"INVALID, a failed build: {fact}"))
        least, most = ({key: value for key, value in facts.items() if key != index} for facts in (least, most))
    found += [
        Difference(*key, least.get(key, most.get(key)), actual.get(key))
        for key in {*least, *most, *actual}
        if actual.get(key) not in (least.get(key), most.get(key))
    ]
    revision = plans[one.level - 1].plan.revision if one.level else None
    ordered = sorted(found, key=lambda difference: (difference.kind, difference.name))
    return Verdict(one.shard.name, revision, len(plans) - one.level, tuple(ordered))


def _relaxed(catalog: Catalog, one: _Looked) -> Catalog:
    """Forget NOT NULL of old columns that a flag in DONE lets go, and keeps off when it goes back."""
    if not one.relaxed:
        return catalog
    plain = {key: fact.replace(", not null", "") if key in one.relaxed else fact for key, fact in catalog.facts.items()}
    return Catalog(plain)


def alike(verdicts: Iterable[Verdict]) -> list[tuple[list[Verdict], tuple[Difference, ...]]]:
    """Group shards that differ in the same way; those that do not differ come first, then the largest group."""
    groups: dict[tuple[object, ...], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.differences, verdict.problem), []).append(verdict)
    ordered = sorted(groups.values(), key=lambda group: (not group[0].sound, -len(group)))
    return [(group, group[0].differences) for group in ordered]


# --------------------------------------------------------------------------------------------------------------------
# Rows


async def verify_rows(
    config: Config,
    accepted: AcceptedPlan,
    targets: Sequence[Shard],
    *,
    jobs: int = 4,
    mismatches: Mismatches | None = None,
) -> list[Disagreeing]:
    """
    Compare old and new over all rows of a plan's moves, range after range; nothing is changed.

    While old counts, new is held against it, as far as rows are moved; from LIVE on, old against new; in DONE nothing.

    Args:
        config: the project's.
        accepted: the plan.
        targets: the shards.
        jobs: shards at once.
        mismatches: a file for all rows that disagree; None counts them and names the first.

    Raises:
        ConfigError: the plan moves nothing.
    """
    if not accepted.plan.moves:
        raise ConfigError(f"{accepted.plan.flag} moves no rows, so there are none to compare")
    places = asyncio.Semaphore(jobs)

    async def look(shard: Shard) -> list[Disagreeing]:
        async with places:
            try:
                return await _rows(config, accepted, shard, mismatches)
            except (ShardmigError, psycopg.Error) as error:
                return [Disagreeing(shard.name, "unknown", accepted.plan.moves[0][1].table, problem=_problem(error))]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(look(shard)) for shard in targets]
    return [found for task in tasks for found in task.result()]


async def _rows(
    config: Config, accepted: AcceptedPlan, shard: Shard, mismatches: Mismatches | None
) -> list[Disagreeing]:
    plan = accepted.plan
    async with open_session(shard, config.session, pg_versions=config.lint.pg_versions, purpose="read") as session:
        records = await read_records(session)
        row = records.flags.get(plan.flag) if records else None
        state = State.OLD if row is None else State(row.state)
        found = []
        for number, move in plan.moves:
            step = records.steps.get((plan.revision, number)) if records else None
            blank = Disagreeing(shard.name, state.name, move.table, note=_incomparable(row, state, step, move))
            if blank.note is None:
                last = None if step is None or row is None or row.new_valid else step.cursor
                export = partial(mismatches.add, shard.name, plan.flag, move) if mismatches else None
                # What was written in LIVE, new may know alone: behind it, and of a lossy move, either has to follow.
                either = move.back_check is not None and (
                    move.lossy if state is State.LIVE else row is not None and row.new_valid
                )
                blank = await _compared(session, move, state, blank, last=last, either=either, export=export)
            found.append(blank)
        after = await read_records(session)
    if row is not None and after is not None and after.flags[plan.flag].epoch != row.epoch:
        return [replace(one, problem="its flag was switched while rows were compared; ask again") for one in found]
    return found


def _incomparable(row: FlagRow | None, state: State, step: StepRow | None, move: Move) -> str | None:
    """Say why there is nothing to compare; None when there is."""
    if row is None:
        return "its structure is not there yet"
    if state <= State.DUAL and not row.new_valid and (step is None or step.cursor is None):
        return "its rows are not moved yet"
    if state is State.LIVE and not row.old_valid:
        return "only new counts since DONE, until rows are moved back"
    if state is State.LIVE and move.back_check is None:
        return "new counts, and nothing says how old follows from it"
    return "only new counts" if state is State.DONE else None


async def _compared(
    session: Session,
    move: Move,
    state: State,
    blank: Disagreeing,
    *,
    last: Key | None,
    either: bool,
    export: Callable[[Direction, Disagreement], None] | None,
) -> Disagreeing:
    rows = 0
    keys: list[tuple[str, ...]] = []
    direction: Direction = "back" if state is State.LIVE else "forward"
    async for part in compare(session, move, direction, last=last, either=either):
        rows += len(part.keys)
        keys += [tuple(key) for key in part.keys[: SHOWN - len(keys)]]
        if export is not None:
            export(direction, part)
    return replace(blank, rows=rows, keys=tuple(keys), moving=last is not None)
