"""Judge whole plans, in the order of history."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.config import Lint
from shardmig.errors import LintFailed
from shardmig.lint.added import Added, added, added_by, locked
from shardmig.lint.judge import judge_text
from shardmig.lint.mentions import mentions, relaxed, unknown
from shardmig.lint.rules import moves as move_rules
from shardmig.lint.rules.indexes import AmbiguousName, BlockingIndex, ConcurrentlyAlone, WideIndex
from shardmig.lint.rules.script import UnusedAllow
from shardmig.lint.scope import New, Scope, relation_name
from shardmig.lint.steps import judge_move
from shardmig.lint.structure import structure
from shardmig.plan import _SEAL, AcceptedPlan, Move, Plan, Statement

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from shardmig.lint.mentions import Mention
    from shardmig.lint.violation import Violation

__all__ = ["History", "accept", "lint_plan"]

_TEXTS = frozenset({"text", "varchar", "bpchar", "bytea", "jsonb"})


def lint_plan(plan: Plan, earlier: Sequence[Plan] = (), settings: Lint | None = None) -> tuple[Violation, ...]:
    """
    Judge a plan.

    Args:
        plan: the plan.
        earlier: the plans before it, in order.
        settings: the configuration's section on linting.

    Returns:
        Everything found: failures, warnings and what the plan allows, in the order of the plan.
    """
    return History(settings or Lint(), earlier).lint(plan)


def accept(plan: Plan, *, earlier: Sequence[Plan] = (), settings: Lint | None = None) -> AcceptedPlan:
    """
    Accept a plan: the only way to something that the runner executes.

    Args:
        plan: the plan.
        earlier: the plans before it, in order.
        settings: the configuration's section on linting.

    Raises:
        LintFailed: something in it is not known to be additive.
    """
    return History(settings or Lint(), earlier).accept(plan)


class History:
    """
    Plans in order, and what they have added so far: whole histories are judged in one walk.

    Args:
        settings: the configuration's section on linting.
        plans: plans that are history already.
    """

    def __init__(self, settings: Lint, plans: Sequence[Plan] = ()) -> None:
        self.settings = settings
        self.home = settings.schemas[0] if settings.schemas else "public"
        self.total = Added()
        self.by_flag: dict[str, Plan] = {}
        self.revisions: set[str] = set()
        for plan in plans:
            self.add(plan)

    def add(self, plan: Plan) -> None:
        """Make a plan history."""
        self.total.include(added(plan, self.home))
        self.by_flag.setdefault(plan.flag, plan)
        self.revisions.add(plan.revision)

    def findings(self, plan: Plan) -> tuple[Violation, ...]:
        """Judge a plan against this history, whatever it allows."""
        return (*self._identity(plan), *self._steps(plan))

    def lint(self, plan: Plan) -> tuple[Violation, ...]:
        """Judge a plan against this history, which stays as it is; what the plan allows is marked."""
        return tuple(_allowed(plan, self.findings(plan)))

    def accept(self, plan: Plan) -> AcceptedPlan:
        """
        Accept a plan against this history, which stays as it is.

        Raises:
            LintFailed: something in it is not known to be additive.
        """
        violations = self.lint(plan)
        failing = [violation for violation in violations if violation.fails]
        if failing:
            lines = "\n".join(f"  {violation}" for violation in failing)
            raise LintFailed(f"{plan.revision} is not additive:\n{lines}", violations=violations)
        return self._sealed(plan)

    def _identity(self, plan: Plan) -> Iterator[Violation]:
        other = self.by_flag.get(plan.flag)
        if other is not None and other.revision != plan.revision:
            yield move_rules.FlagTwice.violation(
                f"flag {plan.flag} belongs to {other.revision}, and one switch would turn both; give it another name",
                fix=f'flag = "{plan.flag}_again"',
            )
        if plan.revision in self.revisions:
            yield move_rules.FlagTwice.violation(f"revision {plan.revision} is there twice; rename one of them")
        for flag in plan.needs:
            if flag not in self.by_flag:
                yield move_rules.FlagTwice.violation(
                    f"needs names {flag}, a flag that no earlier plan has, so it would wait forever; correct the name",
                    fix=f'needs = ("{next(iter(self.by_flag), "other_flag")}",)',
                )

    def _steps(self, plan: Plan) -> Iterator[Violation]:
        so_far = Added()
        for number, step in enumerate(plan.steps, 1):
            if isinstance(step, Statement):
                for violation in self._statement(step, so_far):
                    yield replace(violation, step=number, line=step.line)
                so_far.include(added_by(step.sql, self.home, so_far))
            elif isinstance(step, Move):
                for part, violation in judge_move(step, self._known_to_moves(plan, so_far), self.settings):
                    yield replace(violation, step=number, line=step.line, part=part)
                for violation in self._unknown_columns(step, self._known_to_moves(plan, so_far), so_far):
                    yield replace(violation, step=number, line=step.line)
        yield from self._relaxed(plan, so_far)

    def _known_to_moves(self, plan: Plan, so_far: Added) -> New:
        known = Added()
        for flag in plan.needs:
            if flag in self.by_flag:
                known.include(added(self.by_flag[flag], self.home))
        known.include(so_far)
        return known.new(types=self.total.types)

    def _unknown_columns(self, move: Move, new: New, so_far: Added) -> Iterator[Violation]:
        """Refuse columns that no plan gives to tables that plans have made; of others nobody knows which they have."""
        columns = self._whole(so_far)
        functions = {name.rpartition(".")[2] for name in self.settings.known_functions}
        for mention in unknown(mentions(move, self.home), columns):
            written = move.target is None and mention.column in move.writes  # old columns: SM201 says that they are
            if (mention.dotted and mention.column in functions) or (written and mention.tables[0] not in new.tables):
                continue
            violation = move_rules.UnknownColumn.violation(
                f"the move fails on the first shard: {mention}, and no plan adds it{_meant(mention, columns)}",
                sql=mention.sql,
                offset=mention.offset,
            )
            yield replace(violation, part=mention.part)

    def _relaxed(self, plan: Plan, so_far: Added) -> Iterator[Violation]:
        """Refuse to relax what is not there: DONE, which may be months away, would find it mandatory."""
        columns = self._whole(so_far)
        for mention in unknown(relaxed(plan, self.home), columns):
            yield move_rules.UnknownColumn.violation(
                f"relax lifts nothing, so DONE is refused: {mention}, and no plan adds it{_meant(mention, columns)}"
            )

    def _statement(self, step: Statement, so_far: Added) -> list[Violation]:
        scope = Scope(new=so_far.new(types=self.total.types), settings=self.settings)
        found = judge_text(scope, step.sql, structure).found
        alone = _is_concurrent(step.sql)
        if alone is not None and alone == step.transactional:
            found.append(
                ConcurrentlyAlone.violation(
                    "CREATE INDEX CONCURRENTLY fails inside a transaction; render the plan anew"
                    if alone
                    else "only CREATE INDEX CONCURRENTLY may run outside a transaction; render the plan anew",
                    sql=step.sql,
                )
            )
        return [
            *found,
            *self._added_twice(step.sql, so_far),
            *self._partitioned_indexes(step.sql, so_far),
            *self._ambiguous_names(step.sql, so_far),
            *self._wide_indexes(step.sql, so_far),
        ]

    def _added_twice(self, sql: str, so_far: Added) -> Iterator[Violation]:
        """Refuse what the history has: every shard would, the canary first."""
        new, held = added_by(sql, self.home, so_far), self._columns(so_far)
        made = set(new.tables) if any(statement.kind == "CreateStmt" for statement in _parsed(sql)) else set()
        there = {*self.total.tables, *so_far.tables, *self.total.types, *so_far.types}
        named = self.total.relations | so_far.relations | self.total.sequences | so_far.sequences
        twice = sorted((made | new.types) & there | new.relations & named)
        for table, columns in (*new.tables.items(), *new.columns.items()):
            if table not in made:
                twice += [f"{table}.{column}" for column in columns if column in held.get(table, ())]
        for name in twice:
            yield move_rules.AddedTwice.violation(
                f"an earlier step adds {name} already, and the server refuses another; leave it out, or rename it",
                sql=sql,
                offset=max(sql.find(name.rpartition(".")[2]), 0),
            )

    def _partitioned_indexes(self, sql: str, so_far: Added) -> Iterator[Violation]:
        """Refuse what the server refuses (CREATE INDEX, "Building Indexes Concurrently")."""
        for statement in _parsed(sql):
            if statement.kind != "IndexStmt" or not statement.get("concurrent"):
                continue
            relation = statement.get("relation")
            table = relation_name(relation.get("schemaname", ""), relation.get("relname", ""), home=self.home)
            if table in self.total.partitioned | so_far.partitioned:
                yield BlockingIndex.violation(
                    f"{table} is partitioned, and PostgreSQL builds no index on it concurrently; index it in the plan "
                    f"that creates it, or index each partition",
                    sql=sql,
                )

    def _ambiguous_names(self, sql: str, so_far: Added) -> Iterator[Violation]:
        for table, columns in added_by(sql, self.home, so_far).columns.items():
            for column in columns:
                other = next((name for name, held in self._tables(so_far) if name != table and column in held), None)
                if other is not None:
                    yield AmbiguousName.violation(
                        f"{other}.{column} exists too: in a join of both, {column} without a prefix fails from now on; "
                        f"another name is safer",
                        sql=sql,
                        offset=max(sql.find(column), 0),
                        fix=f"{table}_{column}",
                    )

    def _wide_indexes(self, sql: str, so_far: Added) -> Iterator[Violation]:
        for statement in _parsed(sql):
            if statement.kind != "IndexStmt" or statement.get("access_method") != "btree":
                continue
            relation = statement.get("relation")
            table = relation_name(relation.get("schemaname", ""), relation.get("relname", ""), home=self.home)
            if table in so_far.tables:
                continue
            types = {
                column: kind for name, held in self._tables(so_far) if name == table for column, kind in held.items()
            }
            for element in [*statement.get("index_params", []), *statement.get("index_including_params", [])]:
                name = element.get("name", "")
                if types.get(name) in _TEXTS:
                    yield WideIndex.violation(
                        f"INSERT of a very long {table}.{name} fails, for a B-tree page takes about 2.7 kB; "
                        f"use a hash index or md5({name})",
                        sql=sql,
                        offset=max(sql.rfind(name), 0),
                        fix=f'op.create_index("{statement.get("idxname", "ix")}", "{table}", [sa.text("md5({name})")], '
                        f"postgresql_concurrently=True)",
                    )

    def _tables(self, so_far: Added) -> Iterator[tuple[str, dict[str, str]]]:
        for known in (self.total, so_far):
            yield from known.tables.items()
            yield from known.columns.items()

    def _whole(self, so_far: Added) -> dict[str, set[str]]:
        """Return the columns of the tables of which all are known."""
        held = self._columns(so_far)
        for name in self.settings.known_columns:
            table, _, column = name.rpartition(".")
            held.setdefault(table, set()).add(column)
        return {table: held[table] for table in self.total.whole | so_far.whole}

    def _columns(self, so_far: Added) -> dict[str, set[str]]:
        held: dict[str, set[str]] = {}
        for table, columns in self._tables(so_far):
            held.setdefault(table, set()).update(columns)
        return held

    def _sealed(self, plan: Plan) -> AcceptedPlan:
        locks: dict[int, str] = {}
        further: dict[int, tuple[str, ...]] = {}
        creates: dict[int, str] = {}
        indexes: dict[int, str] = {}
        so_far = Added()
        for number, step in enumerate(plan.steps, 1):
            if not isinstance(step, Statement):
                continue
            relations = locked(step.sql, self.home, so_far.tables) if step.transactional else ()
            if relations:
                locks[number], further[number] = relations[0], relations[1:]
            for statement in _parsed(step.sql):
                if statement.kind == "CreateStmt":
                    made = statement.get("relation")
                    schema = made.get("schemaname")
                    creates[number] = f"{schema}.{made.get('relname')}" if schema else made.get("relname")
                elif statement.kind == "IndexStmt" and not step.transactional:
                    indexes[number] = statement.get("idxname")
            so_far.include(added_by(step.sql, self.home, so_far))
        return AcceptedPlan(plan, locks, further=further, creates=creates, indexes=indexes, seal=_SEAL)


def _meant(mention: Mention, columns: Mapping[str, Collection[str]]) -> str:
    return mention.meant(columns) or "; correct it, or name it in known_columns if every shard has it"


def _parsed(sql: str) -> list[sqltree.Node]:
    try:
        return sqltree.parse(sql)
    except sqltree.SqlError:
        return []


def _is_concurrent(sql: str) -> bool | None:
    """Whether a text is one concurrent index; None when it cannot be read."""
    statements = _parsed(sql)
    if len(statements) != 1:
        return None
    return statements[0].kind == "IndexStmt" and bool(statements[0].get("concurrent"))


_ENTRY = re.compile(r"(?P<code>[A-Z]{2}\d{3})(?: step (?P<steps>\d+(?:, \d+)*):)?\s*(?P<reason>.*)")


def _allowed(plan: Plan, found: Iterable[Violation]) -> Iterator[Violation]:
    """Mark what the plan allows with a reason, in the steps it names; what it allows in vain is a violation itself."""
    entries = [match for match in map(_ENTRY.fullmatch, plan.allowed) if match is not None]
    used = set()
    for violation in found:
        for entry in entries:
            steps = (entry["steps"] or "").split(", ")
            if violation.ignorable and entry["code"] == violation.code and str(violation.step) in steps:
                used.add(entry)
                yield replace(violation, allowed=entry["reason"])
                break
        else:
            yield violation
    for entry in entries:
        code = entry["code"]
        if not entry["reason"]:
            yield UnusedAllow.violation(f"{code} is allowed without a reason; write # shardmig: allow {code} -- why")
        elif entry not in used and not code.startswith("SP"):  # those are found in the script, which is not here
            yield UnusedAllow.violation(
                f"{code} is allowed, but nothing here that may be allowed breaks it; take the comment out"
            )
