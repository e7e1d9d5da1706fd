"""The pages about writing, configuring, adopting and repairing: what they say is what happens."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from pages import Terminal, blocks_of, section_of
from typer.main import get_command

from shardmig import binaries, config, gates
from shardmig.cli import app
from shardmig.operations import move_rows
from shardmig.outcomes import Outcome
from shardmig.sampling import _SAMPLE_ROWS
from shardmig.variables import VARIABLES

if TYPE_CHECKING:
    from pydantic import BaseModel

    from shardmig.config import Shard

DOCS = Path(__file__).parents[1] / "docs"

SHOP = '''"""the shop"""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001_shop", None


def upgrade() -> None:
    op.create_table(
        "customer",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("full_name", sa.Text, nullable=False),
    )
    op.create_table(
        "currency",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("code", sa.Text, unique=True),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("city", sa.Text),
        sa.Column("currency", sa.Text),
        sa.Column("tags", sa.Text),
    )
'''
ROWS = """
INSERT INTO customer (full_name) VALUES ('Ada Lovelace'), ('Plato');
INSERT INTO currency (code) VALUES ('EUR'), ('SEK');
INSERT INTO orders (city, currency, tags)
    VALUES ('London', 'SEK', 'gift'), (NULL, 'EUR', 'late,big,gift'), ('Athens', NULL, NULL);
"""


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the rows of a section's tables by what stands in the first column, all without backquotes."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {name: rest for first, *rest in cells for name in re.findall(r"`([^`]+)`", first)}


def project(home: Path, *shards: Shard) -> Terminal:
    """Begin a project whose first script is the shop's."""
    terminal = Terminal(home)
    terminal.run("shardmig init && shardmig revision -m shop")
    (home / "migrations" / "0001_shop.py").write_text(SHOP)
    sections = [f'[shards.{shard.name}]\nurl = "{shard.url.get_secret_value()}"\n' for shard in shards]
    (home / "shardmig.toml").write_text("\n".join(["[rollout]\nrequire_aware = false\n", *sections]))
    return terminal


def fetch(shard: Shard, sql: str) -> list[tuple[object, ...]]:
    with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as connection:
        cursor = connection.execute(sql)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


# --------------------------------------------------------------------------------------------------------------------
# Writing moves

NEW = "SELECT first_name, last_name FROM customer ORDER BY id"
ADDRESSES = "SELECT order_id, city FROM order_address ORDER BY 1"
CURRENCIES = "SELECT currency_id, currency FROM orders ORDER BY id"
TAGS = "SELECT order_id, position, tag FROM order_tag ORDER BY 1, 2"
USES = "SELECT currency_id, orders FROM currency_use ORDER BY 1"


def test_the_moves_of_the_page_run_there_and_back(tmp_path: Path, shard: Shard) -> None:
    terminal = project(tmp_path, shard)
    terminal.run("shardmig apply --all")
    fetch(shard, ROWS)
    for block in blocks_of(page("writing-moves.md")):
        terminal.follow([block])
        (tmp_path / "migrations" / "HEAD").write_text(f"{Path(block.file).stem}\n")
    terminal.run("shardmig plan && shardmig check && shardmig apply --all")

    assert [("Ada", "Lovelace"), ("Plato", None)] == fetch(shard, NEW)
    assert [(1, "London"), (3, "Athens")] == fetch(shard, ADDRESSES)
    assert [(2, "SEK"), (1, "EUR"), (None, None)] == fetch(shard, CURRENCIES)
    assert [(1, 1, "gift"), (2, 1, "late"), (2, 2, "big"), (2, 3, "gift")] == fetch(shard, TAGS)
    assert [(1, 1), (2, 1)] == fetch(shard, USES)

    # what is shorter when it moves again leaves nothing behind
    terminal.run("shardmig switch order_tag DUAL --all && shardmig switch order_tag OLD --all")
    fetch(shard, "UPDATE orders SET tags = 'big' WHERE id = 2")
    terminal.run("shardmig switch order_tag LIVE --all")
    assert [(1, 1, "gift"), (2, 1, "big")] == fetch(shard, TAGS)

    for flag in ("split_name", "order_address", "order_currency", "order_tag"):
        terminal.run(f"shardmig switch {flag} DONE --all")
    fetch(shard, "UPDATE customer SET last_name = 'Byron' WHERE id = 1")
    fetch(shard, "UPDATE order_address SET city = 'Paris' WHERE order_id = 1")
    fetch(shard, "UPDATE orders SET currency_id = 1")
    fetch(shard, "INSERT INTO order_tag VALUES (2, 2, 'late'), (3, 1, 'new')")
    for flag in ("split_name", "order_address", "order_currency", "order_tag"):
        terminal.run(f"shardmig switch {flag} DUAL --all")

    assert [("Ada Byron",), ("Plato",)] == fetch(shard, "SELECT full_name FROM customer ORDER BY id")
    assert [("Paris",), (None,), ("Athens",)] == fetch(shard, "SELECT city FROM orders ORDER BY id")
    assert [("EUR",)] * 3 == fetch(shard, "SELECT currency FROM orders")
    assert [("gift",), ("big,late",), ("new",)] == fetch(shard, "SELECT tags FROM orders ORDER BY id")


def test_every_argument_of_move_rows_stands_there_with_its_default() -> None:
    told = rows_of(section_of(page("writing-moves.md"), "Arguments of `move_rows`"))
    parameters = inspect.signature(move_rows).parameters

    assert list(parameters) == sorted(told, key=list(parameters).index)
    for name in ("lossy", "triggers", "touch_source"):
        default = parameters[name].default
        assert told[name][0] == f'`"{default}"`' if isinstance(default, str) else f"`{default}`", name


def test_every_variable_of_a_script_stands_there() -> None:
    told = rows_of(section_of(page("writing-moves.md"), "Variables of a script"))

    assert VARIABLES - {"depends_on", "branch_labels"} == told.keys()


def test_the_size_of_the_sample_is_told() -> None:
    assert f"The first {_SAMPLE_ROWS} and the last {_SAMPLE_ROWS} rows" in page("writing-moves.md")


# --------------------------------------------------------------------------------------------------------------------
# Configuration

SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": config.Config,
    "[shards.NAME]": config.Shard,
    "[session]": config.SessionSettings,
    "[lint]": config.Lint,
    "[pace]": config.Pace,
    "[maintenance]": config.Maintenance,
    "[rollout]": config.Rollout,
}
TABLES = {
    "root",
    "shards",
    "session",
    "lint",
    "pace",
    "maintenance",
    "rollout",
}  # sections of their own, or no key


def as_toml(default: object) -> str:
    """Write a default as the page does."""
    if default is None:
        return "\N{EN DASH}"
    return f"`{json.dumps(str(default) if isinstance(default, Path) else default)}`"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_of_the_configuration_stands_there_with_its_default(title: str) -> None:
    fields = {field.alias or name: field for name, field in SECTIONS[title].model_fields.items()}
    expected = {
        name: "required" if field.is_required() else as_toml(field.get_default(call_default_factory=True))
        for name, field in fields.items()
        if name not in (TABLES if title == "Top level" else {"name"})
    }

    assert expected == {key: cells[0] for key, cells in rows_of(section_of(page("configuration.md"), title)).items()}


def test_every_variable_of_the_environment_stands_there() -> None:
    read = {
        parameter.envvar
        for command in get_command(app).commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        if parameter.envvar
    }

    assert read == rows_of(section_of(page("configuration.md"), "Environment")).keys()
    for module, variable in ((binaries, "SHARDMIG_PG_BINDIR"), (gates, "SHARDMIG_SHARD")):
        assert variable in inspect.getsource(module)
        assert f"`{variable}`" in page("configuration.md")


@pytest.mark.parametrize("place", ["shardmig.toml", "pyproject.toml"])
def test_the_example_of_a_configuration_is_one(tmp_path: Path, place: str) -> None:
    [block] = blocks_of(page("configuration.md"))
    text = block.text
    if place == "pyproject.toml":
        text = "[tool.shardmig]\n" + re.sub(r"^\[", "[tool.shardmig.", text, flags=re.MULTILINE)
    (tmp_path / place).write_text(text)

    loaded = config.load(tmp_path / place)

    assert ["eu1", "us1"] == list(loaded.shards)
    assert (600, "shop_owner", float("inf")) == (
        loaded.rollout.bake_s,
        loaded.session.owner,
        loaded.pace.max_snapshot_age_s,
    )


# --------------------------------------------------------------------------------------------------------------------
# Adopting

ENV = """
from alembic import context
from sqlalchemy import NullPool, create_engine, make_url
import os

url = make_url(os.environ["ALEMBIC_URL"]).set(drivername="postgresql+psycopg")
with create_engine(url, poolclass=NullPool).connect() as connection:
    context.configure(connection=connection, target_metadata=None)
    with context.begin_transaction():
        context.run_migrations()
"""
OLD = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "1975ea83b712", None


def upgrade() -> None:
    op.create_table("customer", sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("full_name", sa.Text))
    op.execute("UPDATE customer SET full_name = upper(full_name)")
"""


@pytest.fixture
def alembic_project(tmp_path: Path, shards: dict[str, Shard]) -> Terminal:
    """Make what there was before: Alembic's directory, and two shards at its head."""
    (tmp_path / "alembic" / "versions").mkdir(parents=True)
    (tmp_path / "alembic" / "env.py").write_text(ENV)
    (tmp_path / "alembic" / "versions" / "1975ea83b712_customers.py").write_text(OLD)
    (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = alembic\npath_separator = os\n")
    urls = {f"{name.upper()}_URL": shards[name].url.get_secret_value() for name in ("eu1", "us1", "eu2")}
    terminal = Terminal(tmp_path, **urls)
    for name in ("EU1_URL", "US1_URL"):
        terminal.run(f"ALEMBIC_URL=${name} alembic upgrade head")
    return terminal


def test_an_alembic_project_is_adopted_as_told(alembic_project: Terminal, shards: dict[str, Shard]) -> None:
    text = page("adopting.md")
    env = alembic_project.home / "alembic" / "env.py"

    alembic_project.follow(blocks_of(section_of(text, "Five steps")))

    assert ENV == env.read_text()
    assert "0001_nickname\n" == (env.parent / "versions" / "HEAD").read_text()
    for name in ("eu1", "us1"):
        assert [("1975ea83b712",)] == fetch(shards[name], "SELECT version_num FROM alembic_version")
        assert [("text",)] == fetch(shards[name], NICKNAME)

    toml = alembic_project.home / "shardmig.toml"
    toml.write_text(toml.read_text() + '\n[shards.new]\nurl = "${EU2_URL}"\n')
    alembic_project.run(
        "\n".join(block.text for block in blocks_of(section_of(text, "A new shard, or a developer's database")))
    )
    assert [("text",)] == fetch(shards["eu2"], NICKNAME)
    assert [("1975ea83b712",)] == fetch(shards["eu2"], "SELECT version_num FROM alembic_version")


def test_alembic_would_run_the_scripts_of_shardmig_too(alembic_project: Terminal, shards: dict[str, Shard]) -> None:
    """The page warns of it, and says how it shows."""
    alembic_project.follow(blocks_of(section_of(page("adopting.md"), "Five steps"))[:-2])
    alembic_project.run("ALEMBIC_URL=$EU1_URL alembic upgrade head")

    assert [("0001_nickname",)] == fetch(shards["eu1"], "SELECT version_num FROM alembic_version")
    said = alembic_project.run("shardmig apply --shard eu1 || [ $? = 1 ]")
    assert "already exists" in said
    assert "`already exists`" in page("adopting.md")


NICKNAME = "SELECT data_type FROM information_schema.columns WHERE column_name = 'nickname'"


# --------------------------------------------------------------------------------------------------------------------
# When something fails


def test_every_outcome_stands_there() -> None:
    told = rows_of(section_of(page("when-something-fails.md"), "Outcomes"))

    assert [outcome.value for outcome in Outcome] == [name for name in told if name in {o.value for o in Outcome}]


@pytest.fixture
def split(tmp_path: Path, shard: Shard) -> Terminal:
    """Bring a shard LIVE with the page's own migration."""
    terminal = project(tmp_path, shard)
    terminal.run("shardmig apply --all")
    fetch(shard, ROWS)
    terminal.follow(blocks_of(section_of(page("writing-moves.md"), "In one table")))
    (tmp_path / "migrations" / "HEAD").write_text("0002_split_name\n")
    terminal.run("shardmig apply --all --aware 2026-11")
    return terminal


def test_what_psql_is_told_to_do_works(split: Terminal, shard: Shard) -> None:
    section = section_of(page("when-something-fails.md"), "At three in the morning, from psql")
    for block in blocks_of(section):
        for statement in block.text.split(";\n"):
            fetch(shard, statement)

    assert [(1, 0)] == fetch(
        shard,
        "SELECT state, maintenance FROM shardmig.flag JOIN shardmig.shard USING (shard) WHERE flag = 'split_name'",
    )
    assert [("switch",), ("pause",), ("resume",), ("maintenance",), ("maintenance",)] == fetch(
        shard, "SELECT action FROM (SELECT * FROM shardmig.log ORDER BY id DESC LIMIT 5) AS last ORDER BY id"
    )
    assert "held at DUAL" in split.run("shardmig status")


def test_contracting_by_hand_ends_what_the_page_says_it_ends(split: Terminal, shard: Shard) -> None:
    split.run("shardmig switch split_name DONE --all")
    [block] = blocks_of(section_of(page("when-something-fails.md"), "Contracting by hand"))
    fetch(shard, block.text)

    refused = split.run("shardmig switch split_name LIVE --all || [ $? = 1 ]")
    assert "customer.full_name is gone" in refused
    assert re.search("missing +column .*full_name", split.run("shardmig verify --all || [ $? = 1 ]"))
    assert "1 of 1 shards done" in split.run("shardmig apply --all")


def commands() -> list[tuple[str, str]]:
    """Return where command lines of shardmig stand in blocks of any page, and the lines."""
    found = []
    for path in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            lines = [line.split("#")[0].strip() for line in block.splitlines()]
            found += [(path.name, line) for line in lines if line.startswith("shardmig ")]
    return found


@pytest.mark.parametrize(("where", "line"), commands())
def test_a_command_line_in_the_docs_has_only_options_that_exist(where: str, line: str) -> None:
    words = [word.strip("[()]") for word in shlex.split(line)[1:]]
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}

    assert set() == {word for word in words if word.startswith("-")} - known, where
