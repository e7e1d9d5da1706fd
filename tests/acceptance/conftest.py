"""A project of its own for each test: the shop's migrations, four shards with different data, the real command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from command_line import shardmig
from psycopg.conninfo import conninfo_to_dict

from shardmig.config import Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig import local

SHOP = Path(__file__).parents[2] / "migrations"

ROWS = {"eu1": 1200, "eu2": 1, "us1": 0, "us2": 700}
"""Customers a shard: many, one, none, many; half of them with an order."""

SEED = """
INSERT INTO customer (full_name, email)
SELECT CASE n % 4 WHEN 0 THEN 'Plato' WHEN 1 THEN 'Ada Lovelace' WHEN 2 THEN 'Grace Brewster Hopper'
                  ELSE 'Zoë "Zo" O''Brien %s :x' END || ' ' || n, 'c' || n || '@example.com'
FROM generate_series(1, {rows}) AS n;
"""


CONTENT = """
SELECT 'customer', to_jsonb(c) - 'created_at' FROM customer c
UNION ALL SELECT 'orders', to_jsonb(o) - 'created_at' FROM orders o
UNION ALL SELECT 'order_address', to_jsonb(a) FROM order_address a
ORDER BY 1, 2"""
LEDGER = """
SELECT m.revision, m.position, m.sha256, m.finished_at IS NOT NULL, s.number, s.kind, s.sha256, s.status, s.cursor,
       s.upto, s.rows, s.checked_at IS NOT NULL
FROM shardmig.migration m JOIN shardmig.step s USING (shard, revision) ORDER BY m.position, s.number"""
FLAGS = "SELECT flag, state, has_move, new_valid, old_valid FROM shardmig.flag ORDER BY flag"
SWITCHES = "SELECT flag, before, after FROM shardmig.log WHERE action = 'switch' ORDER BY id"
COLUMNS = """
SELECT c.oid::regclass::text, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
WHERE n.nspname = 'public' AND a.attnum > 0 ORDER BY 1, 2"""
INDEXES = """
SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid FROM pg_index
WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace) ORDER BY 1"""


@dataclass
class Result:
    """What a run of the command line said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Project:
    """A directory with shardmig.toml and migrations/, and what can be done with it."""

    root: Path
    shards: dict[str, Shard]

    @property
    def migrations(self) -> Path:
        return self.root / "migrations"

    def run(self, *arguments: str, code: int | None = 0, env: dict[str, str] | None = None) -> Result:
        """Run `shardmig` with these arguments and expect its exit code."""
        done = shardmig(*arguments, cwd=self.root, env={"SHARDMIG_YES": "1", **(env or {})})
        result = Result(done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in result.err, result.err
        assert code is None or code == result.code, f"{result.out}\n{result.err}"
        return result

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "shardmig", *arguments],
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def write_toml(self, more: str = "", *, urls: dict[str, str] | None = None) -> None:
        sections = [
            f'[shards.{name}]\nurl = "{(urls or {}).get(name, shard.url.get_secret_value())}"\n'
            + ('wave = "canary"\n' if shard.wave else "")
            for name, shard in self.shards.items()
        ]
        if "[rollout]" not in more:
            more += "\n[rollout]\n"
        more = more.replace("[rollout]\n", "[rollout]\nrequire_aware = false\n")  # few stories are about that word
        (self.root / "shardmig.toml").write_text("\n".join([more, *sections]))

    def query(self, shard: str, sql: str, *params: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.shards[shard].url.get_secret_value(), autocommit=True) as connection:
            cursor = connection.execute(sql, params or None)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def database(self, shard: str) -> str:
        """Name of the shard's database on its server."""
        return str(conninfo_to_dict(self.shards[shard].url.get_secret_value())["dbname"])

    def flags(self, shard: str) -> dict[str, int]:
        return dict(self.query(shard, "SELECT flag, state FROM shardmig.flag"))

    def picture(self, shard: str) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that must not depend on how often the runner died."""
        queries = {
            "rows": CONTENT,
            "ledger": LEDGER,
            "flags": FLAGS,
            "switches": SWITCHES,
            "columns": COLUMNS,
            "indexes": INDEXES,
        }
        return {name: self.query(shard, sql) for name, sql in queries.items()}

    def seed(self) -> None:
        """Create the shop's tables on every shard and fill each one differently."""
        self.run("apply", "0001_shop", "--all")
        for name, rows in ROWS.items():
            self.query(name, SEED.format(rows=rows))
            self.query(
                name,
                "INSERT INTO orders (customer_id, amount, street, city, zip) "
                "SELECT id, id * 1.5, 'Street ' || id, CASE WHEN id % 3 = 0 THEN NULL ELSE 'City ' || id END, "
                "lpad(id::text, 5, '0') FROM customer WHERE id % 2 = 0",
            )


@pytest.fixture
def repository(tmp_path: Path) -> Project:
    """Make the shop a project without shards, for verbs that ask none."""
    root = tmp_path / "shop"
    root.mkdir()
    shutil.copytree(SHOP, root / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    made = Project(root, {})
    made.write_toml()
    return made


@pytest.fixture
def project(tmp_path: Path, shards: dict[str, Shard]) -> Project:
    """Make the shop a project over four empty shards."""
    root = tmp_path / "shop"
    root.mkdir()
    shutil.copytree(SHOP, root / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    made = Project(root, shards)
    made.write_toml()
    return made


@pytest.fixture
def seeded(project: Project, servers: list[local.Server]) -> Iterator[Callable[[], Project]]:
    """Return a function that makes every shard of the project a fresh copy of the seeded shop."""
    project.seed()
    made: list[tuple[local.Server, str]] = []
    templates = {name: project.database(name) for name in project.shards}

    def again() -> Project:
        for server in servers:
            if server.name not in project.shards:
                continue
            name = f"killed_{len(made)}"
            url = server.create_database(name, template=templates[server.name])
            made.append((server, name))
            project.shards[server.name] = Shard.model_validate({"name": server.name, "url": url})
        project.write_toml("[pace]\nbatch_rows = 50\nmax_rows_per_s = 6000\n")
        return project

    yield again
    for server, name in made:
        server.drop_database(name)
