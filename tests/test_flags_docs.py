"""The pages about flags: their code runs, in order, on a real shard."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flag_doors import Ledger, install
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardmig
from shardmig import Flag, Flags, State
from shardmig.integrations import pytest_plugin

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.config import Shard

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ["flag-aware-code.md", "how-it-can-go-wrong.md", "testing-both-worlds.md"]


def blocks(page: str, language: str = "python") -> list[str]:
    return [text for name, text in FENCE.findall((DOCS / page).read_text(encoding="utf-8")) if name == language]


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)
    full_name: Mapped[str | None]
    first_name: Mapped[str | None]
    last_name: Mapped[str | None]

    def rename(self, state: State, first: str, last: str) -> None:
        if state.writes_old:
            self.full_name = f"{first} {last}"
        if state.writes_new:
            self.first_name, self.last_name = first, last


def update(connection: Any, table: str, key: int, values: dict[str, object]) -> None:
    columns = sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(n), v) for n, v in values.items())
    connection.execute(sql.SQL("UPDATE {} SET {} WHERE id = {}").format(sql.Identifier(table), columns, key))


@pytest.fixture
def world(shard: Shard, connect: Connect) -> dict[str, Any]:
    """Give what the pages take for granted: a shard with two flags in DUAL, a customer, an order."""
    asyncio.run(install(shard))
    ledger = Ledger(connect(shard), "eu1")
    ledger.connection.execute(
        """
        CREATE TABLE customer (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
            full_name text, first_name text, last_name text);
        CREATE TABLE orders (id int PRIMARY KEY, address text);
        CREATE TABLE order_address (order_id int PRIMARY KEY, address text);
        INSERT INTO customer (full_name) VALUES ('Ada Lovelace');
        INSERT INTO orders VALUES (1, '1 Quay');
        """
    )
    ledger.add("split_name", State.DUAL)
    ledger.add("order_address", State.DUAL, cross_table=True)
    parts = {name: str(value) for name, value in conninfo_to_dict(shard.url.get_secret_value()).items()}
    url = make_url("postgresql+psycopg://").set(
        username=parts["user"], database=parts["dbname"], query={"host": parts["host"], "port": parts["port"]}
    )
    split_name = Flag("split_name")
    return {
        "connection": connect(shard),
        "writer": connect(shard),
        "mover": connect(shard),
        "sqlalchemy_url": url,
        "update": update,
        "Customer": Customer,
        "SPLIT_NAME": split_name,
        "flags": Flags(split_name),
        "State": State,
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, world: dict[str, Any]) -> None:
    found = blocks(page)
    assert found
    for number, block in enumerate(found, 1):
        exec(compile(block, f"docs/{page}, block {number}", "exec"), world)  # noqa: S102 - the page's own examples

    names = world["mover"].execute("SELECT full_name, first_name, last_name FROM customer WHERE id = 1").fetchone()
    assert {
        "flag-aware-code.md": ("Ada Byron", "Grace", "Hopper"),
        "how-it-can-go-wrong.md": ("Ada Lovelace", None, None),
        "testing-both-worlds.md": ("Ada Lovelace", "Ada", "Lovelace"),
    }[page] == names
    if "engine" in world:
        world["engine"].dispose()


def test_every_error_of_begin_is_told() -> None:
    text = (DOCS / "flag-aware-code.md").read_text(encoding="utf-8")
    told = {name for name in shardmig.__all__ if f"`{name}`" in text}
    errors = {name for name in shardmig.__all__ if isinstance(getattr(shardmig, name), type)
              and issubclass(getattr(shardmig, name), shardmig.FlagError)}  # fmt: skip

    assert set() == errors - told - {"FlagError", "UnknownFlag"}


def test_every_option_of_the_plugin_is_told() -> None:
    text = (DOCS / "testing-both-worlds.md").read_text(encoding="utf-8")
    source = Path(pytest_plugin.__file__).read_text(encoding="utf-8")
    options = re.findall(r"\"(shardmig_\w+|--[\w-]+)\"", source)

    assert [] == [option for option in options if option not in text]
    assert {"shardmig_flags"} == set(
        tomllib.loads(blocks("testing-both-worlds.md", "toml")[0])["tool"]["pytest"]["ini_options"]
    )
