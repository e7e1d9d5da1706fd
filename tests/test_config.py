from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from shardmig.cli.project import Project
from shardmig.config import Pace, Shard, load
from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DESIGNED = """
migrations = "migrations"
models = ["shop.models:Base.metadata"]

[shards.eu1]
url = "postgresql://migrator@eu1/shop"
wave = "canary"
tags = ["eu"]
[shards.us1]
url = "postgresql://migrator@us1/shop"
schema = "public"

[session]
owner = "shop_owner"
grant = { shop_app = "SELECT, INSERT, UPDATE, DELETE" }
lock_timeout_ms = [10, 10, 20, 20, 50, 50, 100]
drain_timeout_s = 600
exempt_roles = ["backup"]

[lint]
pg_versions = [15, 18]
schemas = ["public"]
known_types = []
known_functions = []
start_after = ""

[pace]
batch_target_ms = 3
max_replica_lag_s = 5

[rollout]
jobs = 16
bake_s = 60
waves = "doubling"
on_failure = "continue"
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_one(text: str, name: str = "shardmig.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_one


def test_the_documented_configuration_is_read(write: Callable[..., Path]) -> None:
    config = load(write(DESIGNED))

    assert ["eu1", "us1"] == list(config.shards)
    assert ("canary", ("eu",), "public") == (
        config.shard("eu1").wave,
        config.shard("eu1").tags,
        config.shard("us1").schema_name,
    )
    assert (10, 10, 20, 20, 50, 50, 100) == config.session.lock_timeout_ms
    assert (15, 18) == config.lint.pg_versions
    assert config.rollout.require_aware, "whoever says nothing is asked for --aware"


def test_a_pyproject_may_hold_it(write: Callable[..., Path]) -> None:
    path = write('[tool.shardmig]\nmigrations = "db"\n', "pyproject.toml")

    assert path.parent.resolve() / "db" == load(path).migrations_dir


def test_all_mistakes_are_reported_at_once_each_with_key_and_cure(write: Callable[..., Path]) -> None:
    path = write(
        'migration = "x"\n[shards."bad name"]\nurl = "x"\n[shards.eu1]\n'
        '[pace]\nbatch_rows = "many"\n[rollout]\njobs = 0\n'
    )

    with pytest.raises(ConfigError) as caught:
        load(path)

    for key in (
        "migration: unknown key",
        "shards.bad name.name",
        "shards.eu1.url: missing",
        "pace.batch_rows",
        "rollout.jobs",
    ):
        assert key in str(caught.value)


@pytest.mark.parametrize("text", ["[shards", "shards = 3", "[shards]\neu1 = 1", "pace = 1"])
def test_damaged_files_are_one_clear_error(write: Callable[..., Path], text: str) -> None:
    with pytest.raises(ConfigError, match=r"shardmig\.toml"):
        load(write(text))


def test_a_pace_is_a_name_or_a_section(write: Callable[..., Path]) -> None:
    assert load(write('pace = "fast"')).pace == Pace(batch_target_ms=20)
    assert load(write('pace = "gentle"')).pace == Pace()
    with pytest.raises(ConfigError, match=r'pace: write "gentle", "fast" or a section \[pace\]'):
        load(write('pace = "furious"'))


@pytest.mark.parametrize(("gate", "said"), [("sh -c 'x", "no closing quotation"), (" ", "begins with a program")])
def test_a_gate_that_is_no_command_is_refused_before_the_canary_goes_live(
    write: Callable[..., Path], gate: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"rollout.gate: .*{said}"):
        load(write(f'[rollout]\ngate = "{gate}"\n'))


def test_a_named_pace_keeps_every_limit() -> None:
    careful = Pace(max_replica_lag_s=1, host_moves=2)

    assert Pace(batch_target_ms=20, max_replica_lag_s=1, host_moves=2) == careful.at("fast")
    assert careful == careful.at("fast").at("gentle")


def test_a_url_takes_variables_from_the_environment(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('[shards.eu1]\nurl = "postgresql://u:${EU1_PASSWORD}@h/d"\n')
    with pytest.raises(ConfigError, match=r"shards\.eu1\.url: environment variable EU1_PASSWORD is not set"):
        load(path)
    monkeypatch.setenv("EU1_PASSWORD", "")
    with pytest.raises(ConfigError, match=r"shards\.eu1\.url: environment variable EU1_PASSWORD is empty"):
        load(path)
    monkeypatch.setenv("EU1_PASSWORD", "s3cret")

    assert "postgresql://u:s3cret@h/d" == load(path).shard("eu1").url.get_secret_value()


NOT_SHOWN = "(not shown: write the @ / ? # of a password as %40 %2F %3F %23)"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("postgresql://me:s3cret@db.example:5433/shop?sslmode=require", "db.example:5433/shop"),
        ("host=db port=1 dbname=shop user=me password='s3 cret'", "db:1/shop"),
        ("postgresql:///shop", "local/shop"),
        ("postgresql://me:s3cret@[broken", "(a url that cannot be read)"),
        ("postgresql://me:x@s3cret@db/shop", "db/shop"),
        *((f"postgresql://me:s3{mark}ret@db/shop", NOT_SHOWN) for mark in "/?#"),  # libpq takes the last two as meant
    ],
)
def test_neither_address_nor_text_of_a_shard_shows_its_password(url: str, address: str) -> None:
    shard = Shard(name="eu1", url=url)  # type: ignore[arg-type]

    assert address == shard.address
    assert "s3" not in repr(shard)
    assert "s3" not in str(shard.model_dump())


def test_a_shard_made_with_a_wrong_keyword_shows_no_password() -> None:
    with pytest.raises(ValidationError) as caught:
        Shard(name="eu1", uri="postgresql://me:s3cret@db/shop")  # type: ignore[call-arg]

    assert "s3cret" not in str(caught.value)


def test_an_unknown_shard_is_answered_with_the_known_ones(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="no shard named 'eu2'; known shards: eu1, us1"):
        load(write(DESIGNED)).shard("eu2")


def test_shards_may_come_from_the_application(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('shards_from = "fleet_of_shop:all_shards"\n')
    write(
        "from shardmig.config import Shard\n"
        "def all_shards():\n    return [Shard(name=f's{n}', url='postgresql:///x') for n in range(3)]\n",
        "fleet_of_shop.py",
    )
    monkeypatch.setattr(sys, "path", list(sys.path))

    assert ["s0", "s1", "s2"] == list(load(path).shards)


def test_a_url_of_sqlalchemy_is_understood() -> None:
    shard = Shard(name="eu1", url="postgresql+psycopg://me@db/shop")  # type: ignore[arg-type]

    assert "postgresql://me@db/shop" == shard.url.get_secret_value()


@pytest.mark.parametrize("name", ["nowhere:f", "os:nothing", "os"])
def test_a_list_of_shards_that_cannot_be_had_is_an_error(write: Callable[..., Path], name: str) -> None:
    with pytest.raises(ConfigError, match="shards_from"):
        load(write(f'shards_from = "{name}"\n'))


def test_a_pace_from_the_command_line_is_the_fleet_s(write: Callable[..., Path]) -> None:
    here = Project(load(write("[pace]\nhost_moves = 2")), ())

    assert Pace(host_moves=2, batch_target_ms=20) == here.fleet([], pace="fast").config.pace
    assert Pace(host_moves=2) == here.fleet([]).config.pace
