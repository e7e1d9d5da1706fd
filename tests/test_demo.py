"""The demo keeps its promises, can break them, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from shardmig.demo import oracle
from shardmig.demo.goods import Name
from shardmig.demo.seed import seed
from shardmig.demo.show import run
from shardmig.demo.story import FULL, migrations_dir
from shardmig.demo.traffic import Traffic, percentile
from shardmig.planfile import read
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg
    from conftest import Connect

    from shardmig.config import Shard

ROOT = Path(__file__).parents[1]
MARK = "SHARDMIG_TEST_MARK"


class Demo:
    """A demo as people start it, whose processes can be told from all others by a mark in their environment."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardmig", "demo", "--fast"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, MARK: self._mark, "COLUMNS": "200"},
        )

    def lines_until(self, text: str) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line
            if text in line:
                return
        raise AssertionError(f"the demo ended without {text!r}")

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=120)
        return self.process.returncode, said

    def at_work(self) -> list[str]:
        """
        Return command lines of its processes.

        PostgreSQL overwrites its environment, but the watchdog is there until the last server and its data are gone.
        """
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"{MARK}={self._mark}".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return found


def test_the_story_keeps_every_promise_and_leaves_nothing() -> None:
    demo = Demo()

    code, said = demo.end()

    assert 0 == code, said
    assert "Every promise was kept." in said
    assert "$ shardmig apply --shard shard1 --aware B" in said
    assert int(re.search(r"([\d,]+) requests:", said)[1].replace(",", "")) > 1000  # type: ignore[index]
    assert [] == demo.at_work()


@pytest.mark.long
def test_without_drains_the_oracle_notices() -> None:
    """Who decided in OLD writes old alone, after everybody else has turned to new: the demo can fail."""
    verdict = run(Console(file=io.StringIO()), replace(FULL, rows=2_000, breath_s=0.5), drains=False)

    assert verdict.traffic.wrong > 0
    assert not verdict.kept
    assert any("must be" in words for words in verdict.evidence)
    assert 0 == verdict.traffic.errors, verdict.evidence


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "Columns and a table"), (signal.SIGTERM, "servers start")]
)
def test_a_signal_leaves_nothing(number: signal.Signals, moment: str) -> None:
    demo = Demo()
    list(demo.lines_until(moment))

    demo.process.send_signal(number)
    code, said = demo.end()

    assert 130 == code, said
    assert "Traceback" not in said
    assert [] == demo.at_work()


def test_a_killed_demo_leaves_nothing() -> None:
    """Servers go with their watchdog, the releases' processes with their standard input."""
    demo = Demo()
    list(demo.lines_until("Columns and a table"))
    for program in ("shardmig.demo.serve a", "shardmig-watchdog"):
        assert any(program in command for command in demo.at_work()), program

    demo.process.kill()
    demo.end()

    deadline = time.monotonic() + 30
    while left := demo.at_work():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.mark.long
def test_ten_stories_in_a_row_keep_every_promise() -> None:
    for _ in range(10):
        verdict = run(Console(file=io.StringIO()), FULL)

        assert verdict.kept, verdict.evidence
        assert {State.LIVE} == {state for page in verdict.logbook.pages.values() for state in page.states.values()}


# --------------------------------------------------------------------------------------------------------------------
# What the story is made of


@pytest.fixture
def shop(shard: Shard, connect: Connect) -> psycopg.Connection[tuple[object, ...]]:
    """Return a shard with the shop's whole structure and some rows, all of them in both representations."""
    connection = connect(shard)
    plans = {path.stem: read(path) for path in sorted(migrations_dir().glob("*.sql"))}
    for plan in plans.values():
        for step in plan.steps:
            if step.kind == "statement":
                connection.execute(step.sql)
    seed(connection, 500)
    connection.execute(
        "UPDATE customer SET (first_name, last_name) = (SELECT value[1], value[2] FROM oracle.customer o "
        "WHERE o.id = customer.id);"
        "INSERT INTO order_address (order_id, street, city, zip) SELECT id, street, city, zip FROM orders"
    )
    return connection


def test_the_oracle_agrees_with_what_was_seeded(shop: psycopg.Connection[tuple[object, ...]]) -> None:
    assert [] == oracle.disagreements(shop)


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE customer SET full_name = full_name || '!' WHERE id = 7",
        "UPDATE customer SET last_name = 'X' WHERE id = 7",
        "UPDATE customer SET first_name = NULL WHERE id = 7",
        "DELETE FROM orders WHERE customer_id = 7; DELETE FROM customer WHERE id = 7",
        "INSERT INTO customer (full_name, first_name) VALUES ('Nobody', 'Nobody')",
        "UPDATE orders SET zip = '-' WHERE id = 7",
        "UPDATE order_address SET city = '-' WHERE order_id = 7",
        "DELETE FROM orders WHERE id = 7",
        "DELETE FROM order_address WHERE order_id = 7",
        "INSERT INTO order_address VALUES (99999, 'x')",
    ],
)
def test_the_oracle_sees_each_kind_of_harm(shop: psycopg.Connection[tuple[object, ...]], harm: str) -> None:
    shop.execute(harm)

    assert oracle.disagreements(shop)


@pytest.mark.parametrize("name", [Name("Plato", None), Name("Grace", "Brewster Hopper"), Name("D'Arcy", "50 %s")])
def test_a_name_survives_being_written_in_full(name: Name) -> None:
    assert name == Name.split(name.full)


def test_a_percentile_is_a_value_that_was_seen() -> None:
    assert 0.0 == percentile([], 0.99)
    assert 3.0 == percentile([3.0, 1.0, 2.0], 0.99)
    assert 2.0 == percentile([3.0, 1.0, 2.0], 0.5)
    assert 0.0 == Traffic().worst_ms


def test_the_wheel_carries_the_shops_migrations(tmp_path: Path) -> None:
    """`pip install '.[local]'` leaves no checkout behind to find them in."""
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel; pip brings it only for that")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        wheel = tmp_path / build.build_wheel(str(tmp_path))
    finally:
        os.chdir(before)

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    carried = {name.rpartition("/")[2] for name in names if name.startswith("shardmig/demo/migrations/")}
    assert {path.name for path in (ROOT / "migrations").iterdir() if path.is_file()} == carried
