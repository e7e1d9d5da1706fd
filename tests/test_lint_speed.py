"""A linter that is slow is switched off: its work is counted here; benchmarks/lint.py measures what it takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from shardmig import sqltree
from shardmig.lint import judge

ADD = "ALTER TABLE t{0} ADD COLUMN n{0} int NOT NULL DEFAULT 0, ADD COLUMN m text"
CREATE = "CREATE TABLE x{0} (id bigint PRIMARY KEY, a text NOT NULL, b numeric(10, 2) CHECK (b > 0), c timestamptz)"
INDEX = "CREATE INDEX CONCURRENTLY ix{0} ON t (lower(b), a DESC) WHERE c IS NOT NULL"


@pytest.mark.parametrize(("form", "most"), [(ADD, 900), (CREATE, 1700), (INDEX, 700)])
def test_a_statement_costs_few_calls(form: Any, most: Any) -> None:
    """A call and its return count as two; twice as many as today would be noticed in a history of 200 revisions."""
    judge(form.format("warm"))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        judge(form.format("cold"))
    finally:
        sys.setprofile(None)

    assert 0 < calls < most


def test_a_statement_is_parsed_once_and_scanned_only_where_the_tree_is_blind(monkeypatch: Any) -> None:
    binding = sqltree._binding()
    done = []
    sqltree.parse.cache_clear()  # another test may have parsed the same
    monkeypatch.setattr(binding, "parse", lambda sql, real=binding.parse: done.append("parse") or real(sql))
    monkeypatch.setattr(binding, "scan", lambda sql, real=binding.scan: done.append("scan") or real(sql))
    for form in (ADD, CREATE, INDEX):
        judge(form.format("once"))
        judge(form.format("once"))
    judge("ALTER TABLE t ADD COLUMN n text DEFAULT E'a\\\\b'")

    assert done == ["parse", "parse", "parse", "parse", "scan"]


def test_the_linter_loads_neither_the_parser_nor_alembic_before_it_needs_them() -> None:
    program = (
        "import sys; from shardmig.lint import lint_script; lint_script('x = 1');"
        "sys.exit(' '.join({'postgast', 'google', 'alembic', 'sqlalchemy', 'psycopg'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
