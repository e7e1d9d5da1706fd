"""The README does what it says: its blocks are run literally, its tables are tried, its links lead somewhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from command_line import shardmig
from pages import Block, Terminal, blocks_of, section_of

from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Connect

    from shardmig import local
    from shardmig.config import Shard

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

DEMO = "python3 -m venv .venv && .venv/bin/pip install '.[local]' && .venv/bin/shardmig demo\n"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest\n"
ELSEWHERE = {
    DEMO,  # test_demo runs the story and builds the wheel that this installs
    TESTS,  # this is what runs now
    "pip install 'shardmig[cli]' 'psycopg[binary]'\n",
}


def blocks(section: str = "") -> list[Block]:
    """Return the blocks of one section, or all."""
    return blocks_of(section_of(README, section) if section else README)


def test_the_two_commands_stand_there_as_they_are_typed() -> None:
    assert DEMO in [block.text for block in blocks("See it")]
    assert TESTS in [block.text for block in blocks("Working on shardmig")]


def test_every_block_is_run_by_some_test() -> None:
    sections = (
        "A first migration in five minutes",
        "On your own shards",
        "Reading a flag in application code",
    )
    run = [block for section in sections for block in blocks(section)]

    assert [block for block in blocks() if block not in run and block.text not in ELSEWHERE] == []
    assert {"bash", "python", "text", "toml"} == {block.language for block in run}


@pytest.fixture
def second_terminal(tmp_path: Path) -> Iterator[Terminal]:
    """Run the first block of the first migration, which keeps its terminal, and open another one."""
    first, *_ = blocks("A first migration in five minutes")
    terminal = Terminal(tmp_path)
    foreground = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", first.text.replace("shardmig local", "exec shardmig local")],
        cwd=tmp_path,
        env=terminal.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert foreground.stdout is not None
    said = next((line for line in foreground.stdout if "running" in line), None)
    assert said is not None, "the servers did not start"
    try:
        yield Terminal(tmp_path / "shop")
    finally:
        foreground.send_signal(signal.SIGINT)
        foreground.communicate(timeout=60)
    assert not (tmp_path / "shop" / "shardmig.toml").exists(), "Ctrl-C removes what is of no use any more"


def test_the_first_migration_goes_as_told(second_terminal: Terminal) -> None:
    second_terminal.follow(blocks("A first migration in five minutes")[1:])

    assert "2 of 2 shards are there" in second_terminal.run(
        "shardmig switch split_name LIVE --shard shard2 && shardmig status --exit-code"
    )


def test_your_own_shards_go_as_told(tmp_path: Path, servers: list[local.Server], shards: dict[str, Shard]) -> None:
    """Two databases with a table that shardmig has never seen, and a role that may become its owner."""
    for name in ("eu1", "us1"):
        with psycopg.connect(shards[name].url.get_secret_value(), autocommit=True) as connection:
            connection.execute("SET ROLE shop_owner")
            connection.execute(
                "CREATE TABLE customer (id int PRIMARY KEY, full_name text NOT NULL);"
                "INSERT INTO customer SELECT n, 'Grace Brewster Hopper' FROM generate_series(1, 1000) n;"
                "INSERT INTO customer VALUES (0, 'Plato'), (-1, 'Ada Lovelace')"
            )
    databases = {name: psycopg.conninfo.conninfo_to_dict(shards[name].url.get_secret_value()) for name in shards}
    urls = {
        f"{server.name.upper()}_URL": server.url(str(databases[server.name]["dbname"]), role="shop_migrator")
        for server in servers
    }
    terminal = Terminal(tmp_path, **urls)

    terminal.follow([block for block in blocks("On your own shards") if block.text not in ELSEWHERE])

    for name in ("eu1", "us1"):
        with psycopg.connect(shards[name].url.get_secret_value()) as connection:
            rows = connection.execute("SELECT DISTINCT first_name, last_name FROM customer ORDER BY 1").fetchall()
            assert [("Ada", "Lovelace"), ("Grace", "Brewster Hopper"), ("Plato", None)] == rows


def test_the_example_across_two_tables_works_in_each_state(shard: Shard, connect: Connect, project_with: Any) -> None:
    [block] = blocks("Reading a flag in application code")
    names: dict[str, Any] = {}
    exec(block.text, names)  # noqa: S102 - the README is ours
    flags, flag = names["flags"], names["ORDER_ADDRESS"]
    project_with(shard)
    connection = connect(shard)
    connection.execute("INSERT INTO customer (full_name) VALUES ('Ada')")
    connection.execute("INSERT INTO orders (customer_id, amount) VALUES (1, 9)")

    for state in State:
        with flags.override(flag, state):
            names["send_elsewhere"](connection, shard.name, 1, state.name)
        [(old, new)] = connection.execute(
            "SELECT o.city, a.city FROM orders o LEFT JOIN order_address a ON a.order_id = o.id"
        ).fetchall()

        assert (state.writes_old, state.writes_new) == (old == state.name, new == state.name)


@pytest.fixture
def project_with(tmp_path: Path) -> Any:
    """Return a function that applies the shop's structure to a shard."""

    def apply(shard: Shard) -> None:
        (tmp_path / "migrations").symlink_to(ROOT / "migrations")
        (tmp_path / "shardmig.toml").write_text(f'[shards.{shard.name}]\nurl = "{shard.url.get_secret_value()}"\n')
        Terminal(tmp_path).run("shardmig apply --all --until structure")

    return apply


REJECTED = re.findall(r"^\| `(op\..+)` \| (\w+) \| (.+) \|$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """Begin a project whose first script makes the customers that the README's table speaks of."""
    terminal = Terminal(tmp_path_factory.mktemp("rejected"))
    terminal.run("shardmig init && shardmig revision -m shop")
    (terminal.home / "migrations" / "0001_shop.py").write_text(
        '"""shop"""\n\nimport sqlalchemy as sa\nfrom alembic import op\n\n'
        'revision, down_revision = "0001_shop", None\n\n\ndef upgrade() -> None:\n'
        '    id, email = sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("email", sa.Text)\n'
        '    op.create_table("customer", id, email)\n'
    )
    terminal.run("shardmig plan && shardmig revision -m next")
    return terminal


@pytest.mark.parametrize(("line", "code"), [(line, code) for line, code, _ in REJECTED])
def test_what_is_said_to_be_rejected_is_rejected_by_that_rule(repository: Terminal, line: str, code: str) -> None:
    script = repository.home / "migrations" / "0002_next.py"
    script.write_text(
        '"""next"""\n\nimport sqlalchemy as sa\nfrom alembic import op\n\n'
        f'revision, down_revision = "0002_next", "0001_shop"\n\n\ndef upgrade() -> None:\n    {line}\n'
    )

    said = json.loads(shardmig("lint", "-o", "json", cwd=repository.home).stdout)

    assert code in [violation["code"] for violation in said["violations"]], said


def test_every_link_and_picture_is_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)

    assert len(REJECTED) > 5
    assert "docs/images/demo.svg" in targets
    assert [] == [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_every_page_of_the_docs_is_listed_and_its_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)

    assert [] == [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert page.name == "README.md" or f"]({page.name})" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def test_the_picture_of_the_states_is_drawn_from_the_edges() -> None:
    spec = spec_from_file_location("draw_states", ROOT / "tools" / "draw_states.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018 - one thing
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    assert module.drawing() == module.IMAGE.read_text(encoding="utf-8"), "run tools/draw_states.py"
