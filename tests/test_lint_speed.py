"""A thousand statements in a fifth of a second: a linter that is slow is switched off."""

from __future__ import annotations

import subprocess
import sys
import time

from shardmig.lint import judge

ADD = "ALTER TABLE t{0} ADD COLUMN n{0} int NOT NULL DEFAULT 0, ADD COLUMN m text"
CREATE = "CREATE TABLE x{0} (id bigint PRIMARY KEY, a text NOT NULL, b numeric(10, 2) CHECK (b > 0), c timestamptz)"
INDEX = "CREATE INDEX CONCURRENTLY ix{0} ON t (lower(b), a DESC) WHERE c IS NOT NULL"


def _round(number: int) -> float:
    statements = [form.format(f"{number}_{n}") for n in range(334) for form in (ADD, CREATE, INDEX)][:1000]
    before = time.process_time()
    for sql in statements:
        judge(sql)
    return time.process_time() - before


def test_a_thousand_statements_take_a_fifth_of_a_second() -> None:
    judge("SELECT 1")

    assert min(_round(number) for number in range(8)) < 0.2


def test_the_linter_loads_neither_the_parser_nor_alembic_before_it_needs_them() -> None:
    program = (
        "import sys; from shardmig.lint import lint_script; lint_script('x = 1');"
        "sys.exit(' '.join({'postgast', 'google', 'alembic', 'sqlalchemy', 'psycopg'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (run.returncode, run.stderr) == (0, "")
