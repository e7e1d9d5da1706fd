"""A project of its own for each test: the shop's migrations, four shards with different data, the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

if TYPE_CHECKING:

    from shardmig.config import Shard

SHOP = Path(__file__).parents[2] / "migrations"

ROWS = {"eu1": 1200, "eu2": 1, "us1": 0, "us2": 700}
"""Customers a shard: many, one, none, many; half of them with an order."""

SEED = """
INSERT INTO customer (full_name, email)
SELECT CASE n % 4 WHEN 0 THEN 'Plato' WHEN 1 THEN 'Ada Lovelace' WHEN 2 THEN 'Grace Brewster Hopper'
                  ELSE 'Zoë "Zo" O''Brien %s :x' END || ' ' || n, 'c' || n || '@example.com'
FROM generate_series(1, {rows}) AS n;
"""


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
        done = subprocess.run(
            [sys.executable, "-m", "shardmig", *arguments],
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **(env or {})},
        )
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
def project(tmp_path: Path, shards: dict[str, Shard]) -> Project:
    """Make the shop a project over four empty shards."""
    root = tmp_path / "shop"
    root.mkdir()
    shutil.copytree(SHOP, root / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    made = Project(root, shards)
    made.write_toml()
    return made
