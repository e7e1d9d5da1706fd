"""What the linter allows runs on the oldest and on the newest server, and nobody could notice."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lint_shard import LintShard
from servers import other_majors

from shardmig import sqltree
from shardmig.config import Lint
from shardmig.lint import New, judge
from shardmig.local import find_binaries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardmig.binaries import Binaries

DATA = Path(__file__).parent / "data"
SQL = [
    case
    for name in ("lint-cases.jsonl", "lint-verdicts.jsonl", "lint-forms.jsonl")
    for case in map(json.loads, (DATA / name).read_text().splitlines())
    if case["kind"] == "sql"
]
ALLOWED = [case for case in SQL if case["verdict"] == "allow"]
OLD = {"context": "data_move", "new": {"tables": ["invoice"], "columns": {"t": ["n", "m"]}}}
STRUCTURE: dict[str, Any] = {"context": "structure"}


def majors() -> dict[int, Binaries]:
    return dict(sorted({**other_majors(), find_binaries().major: find_binaries()}.items()))


@pytest.fixture(scope="module")
def newest() -> Iterator[LintShard]:
    with LintShard.start("newest", majors()[max(majors())]) as shard:
        yield shard


@pytest.fixture(scope="module")
def oldest() -> Iterator[LintShard]:
    if len(majors()) == 1:
        pytest.skip("no other PostgreSQL major here; SHARDMIG_TEST_MAJORS=DIR fetches some")
    with LintShard.start("oldest", majors()[min(majors())]) as shard:
        yield shard


@pytest.fixture(params=["oldest", "newest"])
def shard(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# --------------------------------------------------------------------------------------------------------------------
# Every allowed case runs, and takes nothing away


def noticed(shard: LintShard, cases: list[dict[str, Any]]) -> list[str]:
    """Return the cases that do not run, or that running code could notice."""
    found = []
    for case in cases:
        if case.get("pg", 0) > shard.major:
            continue
        try:
            effect = shard.run(case)
        except psycopg.Error as error:
            found.append(f"{case['id']} {case['text']}: {error}")
        else:
            if effect:
                found.append(f"{case['id']} {case['text']}: {effect}")
    return found


def test_allowed_cases_run_and_change_nothing_that_exists(shard: LintShard) -> None:
    assert noticed(shard, ALLOWED[::9]) == []


@pytest.mark.long
def test_every_allowed_case_runs_and_changes_nothing_that_exists(shard: LintShard) -> None:
    assert noticed(shard, ALLOWED) == []


@pytest.mark.parametrize(
    ("case", "sql"),
    [
        (STRUCTURE, "DROP INDEX t_a"),
        (STRUCTURE, "ALTER TABLE t ADD COLUMN n float DEFAULT random()"),
        (STRUCTURE, "ALTER TABLE t ADD COLUMN n int CHECK (a > 0)"),
        (STRUCTURE, "ALTER TABLE t ALTER COLUMN c SET DEFAULT 6"),
        (STRUCTURE, "ALTER TABLE ref ADD CHECK (id > 0)"),
        (STRUCTURE, "CREATE INDEX ix ON t (c)"),
        (STRUCTURE, "GRANT SELECT ON t TO app"),
        (STRUCTURE, "ALTER TYPE mood RENAME VALUE 'x' TO 'z'"),
        (STRUCTURE, "SET lock_timeout = 7"),
        (OLD, "UPDATE t SET b = 'z' WHERE id = 1"),
        (OLD, "DELETE FROM child WHERE id = 1"),
        (OLD, "SELECT nextval('s')"),
        (OLD, "INSERT INTO pl VALUES (50)"),
    ],
)
def test_harm_would_be_seen(newest: LintShard, case: Any, sql: Any) -> None:
    effect = newest.run(case, sql)
    newest.connection.execute("SELECT setval('s', 1, false)")  # numbers drawn do not come back by themselves

    assert effect


# --------------------------------------------------------------------------------------------------------------------
# A mutated statement is refused, or harmless on a real server


def words(sql: str) -> list[str]:
    """Split a text where the server's lexer does; what it does not take is one word."""
    try:
        return [token.text for token in sqltree.tokens(sql) if "COMMENT" not in token.kind]
    except sqltree.SqlError:
        return [sql]


WORDS = [split for case in SQL if (split := words(case["text"]))]
TRIES = 40


def mutant(case: dict[str, Any], draw: random.Random) -> str | None:
    """Put pieces of other cases, allowed or not, into a statement until it is another one; None when that fails."""
    own = words(case["text"])
    for _ in range(TRIES):
        changed = list(own)
        for _ in range(draw.randint(1, 2)):
            other = draw.choice(WORDS)
            start, place = draw.randrange(len(other)), draw.randrange(len(changed))
            piece = other[start : start + draw.choice([0, 1, 1, 1, 2, 3, 5, 8, 99])]
            changed[place : place + draw.choice([0, 0, 1, 1, 1, 2, 3, 5])] = piece
            if not changed:
                return None
        sql = " ".join(changed)
        with suppress(sqltree.SqlError):
            if sqltree.parse(sql) and changed != own:
                return sql
    return None


def accepted(case: dict[str, Any], sql: str, major: int) -> bool:
    """Judge a text as a plan would, which knows its own sequences."""
    stated = case.get("new") or {}
    new = New(
        tables=frozenset(stated.get("tables", ())),
        columns={table: frozenset(columns) for table, columns in stated.get("columns", {}).items()},
        types=frozenset(stated.get("types", ())),
        sequences=frozenset({"invoice_no", "invoice_id_seq"}),
    )
    context: Any = "structure" if case["context"] == "structure" else "move"
    return not [v for v in judge(sql, context=context, new=new, known=Lint(pg_versions=(major, 18))) if v.fails]


def survives(shard: LintShard, case: dict[str, Any], seed: int) -> str:
    """Mutate a case and run what is still accepted: "refused", "fails" or "runs"."""
    sql = mutant(case, random.Random(seed))
    if sql is None or case.get("pg", 0) > shard.major or not accepted(case, sql, shard.major):
        return "refused"
    try:
        effect = shard.run(case, sql)
    except psycopg.Error:
        return "fails"

    assert not effect, f"{sql}\n(a mutant of {case['text']}) is accepted, and {effect}"
    return "runs"


@settings(max_examples=250, deadline=None)
@given(case=st.sampled_from(ALLOWED), seed=st.integers(0, 2**32))
def test_a_mutant_is_refused_or_harmless(newest: LintShard, case: Any, seed: Any) -> None:
    survives(newest, case, seed)


@pytest.mark.long
def test_thousands_of_mutants_are_refused_or_harmless(shard: LintShard) -> None:
    draw = random.Random(20)
    ends = [survives(shard, draw.choice(ALLOWED), draw.randrange(2**32)) for _ in range(8_000)]

    assert ends.count("runs") > 800
