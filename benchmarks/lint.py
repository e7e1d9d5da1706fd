"""
How long does linting take, and how long a linter that is written in Rust?

* 200 revisions through the command line, each in a fresh interpreter: cold (nothing rendered yet: every script is
  imported, rendered and judged) and warm (every plan lies beside its script, as it does in a repository);
* 1,000 statements through `judge`, parsed and judged, after import;
* the same plans and the same statements through squawk, where it is installed.

Every comparison is made within one run, in turns, and the best of all rounds counts: quote ratios, the absolute
figures are this machine's. squawk judges PostgreSQL's statements against a list of what is known to be harmful; it
sees no scripts, and no plan around a statement.

    pip install squawk-cli
    python benchmarks/lint.py [--revisions 200] [--statements 1000] [--rounds 5] [--squawk PATH]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import judge

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = 'migrations = "migrations"\n[shards.eu1]\nurl = "postgresql://eu1/shop"\n'
SCRIPT = '''"""revision {0}"""
import sqlalchemy as sa
from alembic import op

revision = "r{0}"
down_revision = {1!r}


def upgrade() -> None:
    op.create_table(
        "table{0}",
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("amount", sa.Numeric(10, 2), server_default="0"),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
    )
    op.add_column("customer", sa.Column("column{0}", sa.Integer, server_default="0", nullable=False))
    op.create_index("ix_customer_{0}", "customer", ["column{0}"], postgresql_concurrently=True)
'''
FORMS = (
    "ALTER TABLE t{0} ADD COLUMN n{0} int NOT NULL DEFAULT 0, ADD COLUMN m text",
    "CREATE TABLE x{0} (id bigint PRIMARY KEY, a text NOT NULL, b numeric(10, 2) CHECK (b > 0), c timestamptz)",
    "CREATE INDEX CONCURRENTLY ix{0} ON t (lower(b), a DESC) WHERE c IS NOT NULL",
)


def main(revisions: int, statements: int, rounds: int, squawk: str | None) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        _history(directory / "migrations", revisions)
        (directory / "shardmig.toml").write_text(CONFIG)
        lint = [sys.executable, "-m", "shardmig", "lint"]
        contestants: dict[str, Callable[[], object]] = {"shardmig lint, cold": lambda: _run(lint, directory)}
        measured = _in_turns(contestants, rounds)
        _run([sys.executable, "-m", "shardmig", "plan"], directory)
        plans = sorted(str(path) for path in directory.glob("migrations/*.sql"))
        texts = [FORMS[n % len(FORMS)].format(n) for n in range(statements)]
        (directory / "statements.sql").write_text("".join(f"{text};\n" for text in texts))
        contestants = {
            "shardmig lint, warm": lambda: _run(lint, directory),
            "shardmig --help": lambda: _run([sys.executable, "-m", "shardmig", "--help"], directory),
            f"judge, {statements} statements": lambda: _judged(texts),
        }
        if squawk is not None:
            contestants["squawk, the plans"] = lambda: _run([squawk, *plans], directory, codes={0, 1})
            contestants[f"squawk, {statements} statements"] = lambda: _run(
                [squawk, str(directory / "statements.sql")], directory, codes={0, 1}
            )
        measured |= _in_turns(contestants, rounds)
    _table(measured, f"{revisions} revisions, {statements} statements, best of {rounds}")


def _history(directory: Path, revisions: int) -> None:
    directory.mkdir()
    before = None
    for number in range(revisions):
        (directory / f"r{number}.py").write_text(SCRIPT.format(number, before))
        before = f"r{number}"
    (directory / "HEAD").write_text(f"{before}\n")


def _in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """Return the lowest cost of each; everybody has a turn in every round."""
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, once in contestants.items():
            before = Cost.so_far()
            once()
            costs[name].append(Cost.so_far() - before)
    return {
        name: Cost(min(cost.wall_s for cost in spent), min(cost.cpu_s for cost in spent))
        for name, spent in costs.items()
    }


@dataclass(frozen=True)
class Cost:
    """Seconds on the wall, and seconds of CPU of this process and its children, which a busy machine changes less."""

    wall_s: float
    cpu_s: float

    @classmethod
    def so_far(cls) -> Cost:
        """Read the clocks."""
        times = os.times()
        return cls(time.perf_counter(), times.user + times.system + times.children_user + times.children_system)

    def __sub__(self, other: Cost) -> Cost:
        """Return what was spent since."""
        return Cost(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


def _run(command: list[str], directory: Path, codes: frozenset[int] | set[int] = frozenset({0})) -> None:
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if run.returncode not in codes:
        sys.exit(f"{' '.join(command[:4])} failed: {run.stdout}{run.stderr}")


def _judged(texts: list[str]) -> None:
    sqltree.parse.cache_clear()
    for text in texts:
        judge(text)


def _table(measured: dict[str, Cost], title: str) -> None:
    print(f"\n{title}\n\n| what | ms | ms of CPU | times squawk's CPU |\n|--|--|--|--|")
    for name, cost in measured.items():
        rival = measured.get("squawk, the plans" if "lint" in name else f"squawk, {name.removeprefix('judge, ')}")
        ratio = f"{cost.cpu_s / rival.cpu_s:.1f}" if rival else ""
        print(f"| {name} | {cost.wall_s * 1000:,.0f} | {cost.cpu_s * 1000:,.0f} | {ratio} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revisions", type=int, default=200)
    parser.add_argument("--statements", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--squawk", default=shutil.which("squawk"), help="the program, if it is not on the PATH")
    chosen = parser.parse_args()
    main(chosen.revisions, chosen.statements, chosen.rounds, chosen.squawk)
