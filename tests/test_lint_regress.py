"""
PostgreSQL's own regression suite through the linter; long, and only where its SQL files are.

Give their directory (src/test/regress/sql of PostgreSQL's sources) as SHARDMIG_PG_REGRESS; they are not committed here.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from lint_shard import STATE

from shardmig import local, sqltree
from shardmig.config import Lint
from shardmig.lint import judge
from shardmig.lint.app import lint_statement
from shardmig.lint.mentions import mentions, unknown
from shardmig.plan import Move, quote_name

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long

DIRECTORY = os.environ.get("SHARDMIG_PG_REGRESS")
SETTINGS = Lint(pg_versions=(18, 18))
PSQL = re.compile(r"(?m)^\\[^\n]*$")
SERVER_WIDE = re.compile(
    r"\s*(?:--[^\n]*\n\s*)*(?:COPY|ALTER SYSTEM|(?:CREATE|DROP) (?:DATABASE|TABLESPACE|ROLE|USER))", re.IGNORECASE
)
COLUMNS = """
SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
"""


def files() -> list[Path]:
    if DIRECTORY is None:
        pytest.skip("SHARDMIG_PG_REGRESS names no directory of PostgreSQL's regression SQL")
    return sorted(Path(DIRECTORY).glob("*.sql"))


def statements(path: Path) -> Iterator[str]:
    text = PSQL.sub("", path.read_text(errors="replace"))
    try:
        ends = [token.offset for token in sqltree.tokens(text) if token.text == ";"]
    except sqltree.SqlError:
        yield from text.split(";")
        return
    start = 0
    for end in [*ends, len(text)]:
        yield text[start:end]
        start = end + 1


def test_nothing_in_the_suite_makes_the_linter_raise() -> None:
    accepted = 0
    for path in files():
        for sql in statements(path):
            accepted += not [v for v in judge(sql, known=SETTINGS) if v.fails]
            judge(sql, context="move", known=SETTINGS)
            lint_statement(sql)

    assert accepted > 1000


def test_whatever_is_accepted_as_structure_takes_nothing_away() -> None:
    ran, paths = 0, files()
    with local.cluster(["regress"]) as servers:  # of its own: the suite leaves roles, slots and subscriptions behind
        for path in paths:
            servers[0].create_database(path.stem)
            with psycopg.connect(servers[0].url(path.stem), autocommit=True) as connection:
                connection.execute("SET statement_timeout = '5s'")
                for sql in statements(path):
                    if not connection.closed:
                        ran += _run(connection, sql)

    assert ran > 1000


def _run(connection: psycopg.Connection, sql: str) -> bool:
    """Run a statement of the suite as a step of its story; one that is accepted must keep all there was."""
    accepted = sql.strip() and not [v for v in judge(sql, known=SETTINGS) if v.fails]
    idle = connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    if not accepted or not idle:
        if not SERVER_WIDE.match(sql):
            with suppress(psycopg.Error):
                connection.execute(sql)  # type: ignore[arg-type]
        return False
    try:
        before = set(connection.execute(STATE).fetchall())  # fails where the suite has broken a catalog on purpose
        connection.execute(sql)  # type: ignore[arg-type]
    except psycopg.Error:
        return False

    assert before - set(connection.execute(STATE).fetchall()) == set(), sql
    return True


def test_no_column_of_a_statement_that_runs_is_said_to_be_missing() -> None:
    ran, paths = 0, files()
    with local.cluster(["regress"]) as servers:
        for path in paths:
            servers[0].create_database(path.stem)
            options = "-c statement_timeout=5s"
            with psycopg.connect(servers[0].url(path.stem), autocommit=True, options=options) as connection:
                for sql in statements(path):
                    if not connection.closed and not SERVER_WIDE.match(sql):
                        ran += _named(connection, sql)

    assert ran > 1000


def _named(connection: psycopg.Connection, sql: str) -> bool:
    """Run a statement of the suite; one that runs must name no column that its tables are said to lack."""
    step = Move(table="none", key=("none",), writes=("none",), forward=sql, check=sql)
    columns: dict[str, set[str]] = {}
    lacking: list[str] = []
    with suppress(psycopg.Error):
        for table in {table for mention in mentions(step, "") for table in mention.tables}:
            found = connection.execute(COLUMNS, [quote_name(table)]).fetchall()
            columns |= {table: {column for (column,) in found}} if found else {}
        missing = [mention for mention in unknown(mentions(step, ""), columns) if mention.sql == sql]
        lacking = [
            mention.column for mention in missing if not (mention.dotted and _of_row(connection, mention.column))
        ]
    try:
        connection.execute(sql)
    except psycopg.Error:
        return False

    assert [] == lacking, sql
    return bool(columns)


def _of_row(connection: psycopg.Connection, name: str) -> bool:
    return bool(connection.execute("SELECT FROM pg_proc WHERE proname = %s AND pronargs = 1", [name]).fetchall())
