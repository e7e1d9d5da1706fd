"""From models to scripts: forty-odd changes, each written, linted, applied to a real shard, and looked at again."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from command_line import shardmig
from model_changes import CASES, Case, shop, table

from shardmig.autogenerate import autogenerate, differences
from shardmig.config import Config, Shard
from shardmig.drafting import written
from shardmig.errors import ConfigError, ShardUnreachable
from shardmig.fleet import Fleet
from shardmig.lint.project import lint_directory
from shardmig.models import load_models
from shardmig.repository import accepted_plans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Connect

    from shardmig import local

ROOT = Path(__file__).parents[1]


def apply(config: Config, shard: Shard) -> None:
    """Bring a shard to the head; accepting the plans is the linter's word that they are additive."""
    asyncio.run(Fleet(config, accepted_plans(config), [shard]).apply()).raise_for_failures()


def project(root: Path, **sections: Any) -> Config:
    return Config.model_validate({"root": root, **sections})


def shard_at(url: str) -> Shard:
    return Shard.model_validate({"name": "eu1", "url": url})


@pytest.fixture(scope="module")
def shop_shard(servers: list[local.Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Make the shop, by autogenerate from an empty shard; yield the database to copy and its migrations."""
    root = tmp_path_factory.mktemp("shop")
    shard = shard_at(servers[0].create_database("shop_template"))
    path, found = autogenerate(project(root), "the shop", shard, models=[shop(sa.MetaData())])
    assert path is not None
    assert [] == [one.title for one in found.draft.explained]
    apply(project(root), shard)
    yield "shop_template", root / "migrations"
    servers[0].drop_database("shop_template")


@pytest.fixture
def copied(shop_shard: tuple[str, Path], servers: list[local.Server], tmp_path: Path) -> Iterator[Shard]:
    """Copy the shop and its migrations for one test."""
    template, migrations = shop_shard
    shutil.copytree(migrations, tmp_path / "migrations")
    yield shard_at(servers[0].create_database("shop_copied", template=template))
    servers[0].drop_database("shop_copied")


@pytest.mark.parametrize(
    "case",
    # A third of them in every run, the others in the long one.
    [pytest.param(case, id=case.name, marks=[pytest.mark.long] if at % 3 else []) for at, case in enumerate(CASES)],
)
def test_each_change_is_written_and_explained(case: Case, copied: Shard, tmp_path: Path) -> None:
    config = project(tmp_path, lint=case.lint)
    path, found = autogenerate(config, "the change", copied, models=case.models)

    assert sorted(case.written) == sorted(title for title, _ in found.draft.written)
    assert sorted(case.explained) == sorted(one.title for one in found.draft.explained)
    if path is None:
        assert not found.any
        return
    text = path.read_text(encoding="utf-8")
    for part in case.source:
        assert part in text or part in text.replace("\n#    ", " ")
    assert () == lint_directory(config.migrations_dir, config.lint).failures
    apply(config, copied)
    again, rest = autogenerate(config, "the change again", copied, models=case.models)
    assert again is None, [*rest.draft.written, *rest.unexplained]


@pytest.mark.parametrize("name", ["a table with everything", "a renamed column"])
def test_a_scratch_shard_says_what_a_real_one_says(copied: Shard, tmp_path: Path, name: str) -> None:
    config = project(tmp_path)
    [case] = (case for case in CASES if case.name == name)

    assert differences(config, copied, models=case.models) == differences(config, models=case.models)


def test_there_are_forty_changes_and_the_docs_show_what_becomes_of_them() -> None:
    assert len(CASES) >= 40
    assert table() in (ROOT / "docs" / "autogenerate.md").read_text(encoding="utf-8")


def test_a_guessed_move_can_be_taken_as_it_is(copied: Shard, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "a renamed column")
    config = project(tmp_path)
    path, _ = autogenerate(config, "rename", copied, models=case.models)
    assert path is not None
    text = path.read_text(encoding="utf-8")
    stub = "\n".join(line.removeprefix("#        ") for line in text.split("\n") if line.startswith("#        "))
    head, _, move = stub.partition("\n#\n" if "\n#\n" in stub else "\n")
    path.write_text(text.replace("import sqlalchemy as sa\n", f"import sqlalchemy as sa\n{head}\n") + f"\n\n{move}\n")

    [*_, accepted] = accepted_plans(config)
    assert [("customer", ("name",), ("full_name",))] == [
        (m.table, m.writes, m.restores) for _, m in accepted.plan.moves
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("def f(:", r"SyntaxError: .*models_\w+\.py:1"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(.*models_\w+\.py:1\)"),
        ("raise SystemExit('configure me')", "SystemExit: configure me"),
        ("Base = 3", "there is no metadata in int"),
        ("class Base:\n    metadata = 3", "is no MetaData but int"),
    ],
)
def test_models_that_cannot_be_imported_are_one_clear_line(source: str, message: str, tmp_path: Path) -> None:
    name = f"models_{zlib.crc32(source.encode())}"  # a module of that name is imported once and for all
    (tmp_path / f"{name}.py").write_text(source)

    with pytest.raises(ConfigError, match=message) as caught:
        load_models(project(tmp_path, models=[f"{name}:Base.metadata"]))
    assert "\n" not in str(caught.value)


def test_no_models_and_a_table_described_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "twice_described.py").write_text(
        "import sqlalchemy as sa\none, two = sa.MetaData(), sa.MetaData()\n"
        "for m in (one, two):\n    sa.Table('t', m, sa.Column('id', sa.Integer))\n"
    )

    with pytest.raises(ConfigError, match=r"add models = "):
        load_models(project(tmp_path))
    with pytest.raises(ConfigError, match="table t is described twice"):
        load_models(project(tmp_path, models=["twice_described:one", "twice_described:two"]))
    assert 1 == len(load_models(project(tmp_path, models=["twice_described:one", "twice_described:one"])))


def test_comparing_changes_nothing_on_a_shard(copied: Shard, tmp_path: Path, connect: Connect) -> None:
    look = connect(copied)
    everything = "SELECT c.oid, c.relname, c.xmin FROM pg_class c ORDER BY 1"
    before = look.execute(everything).fetchall()
    case = next(case for case in CASES if "a unique constraint" in case.name)
    differences(project(tmp_path), copied, models=case.models)

    assert before == look.execute(everything).fetchall()


def test_partitions_extensions_and_the_ledger_are_no_difference(
    copied: Shard, tmp_path: Path, connect: Connect
) -> None:
    look = connect(copied)
    look.execute("CREATE TABLE event_2026 PARTITION OF event FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')")
    look.execute("CREATE TABLE alembic_version (version_num text)")

    assert not differences(project(tmp_path), copied, models=[shop(sa.MetaData())]).any


def test_an_index_that_is_there_by_hand_is_told(copied: Shard, tmp_path: Path, connect: Connect) -> None:
    connect(copied).execute("CREATE INDEX by_hand ON customer (balance)")
    found = differences(project(tmp_path), copied, models=[shop(sa.MetaData())])

    assert ["index by_hand is gone from the models"] == [one.title for one in found.unexplained]


def test_a_message_used_before_gets_a_flag_of_its_own(copied: Shard, tmp_path: Path) -> None:
    config = project(tmp_path)
    models = [shop(sa.MetaData(), nick=sa.Column(sa.Text))]
    path, _ = autogenerate(config, "the shop", copied, models=models)

    assert path is not None
    assert 'flag = "the_shop_2"' in path.read_text()
    assert () == lint_directory(config.migrations_dir, config.lint).failures


def test_a_shard_that_is_behind_gets_nothing_written_twice(copied: Shard, tmp_path: Path) -> None:
    config, models = project(tmp_path), [shop(sa.MetaData(), nick=sa.Column(sa.Text))]
    autogenerate(config, "nick", copied, models=models)

    with pytest.raises(ConfigError, match=f"{copied.name} is behind the committed scripts.*: 0002_nick; "):
        autogenerate(config, "nick again", copied, models=models)


def test_an_adopted_history_is_compared_with_a_real_shard_only(copied: Shard, tmp_path: Path) -> None:
    config = project(tmp_path, lint={"start_after": "0001_the_shop"})
    models = [shop(sa.MetaData(), nick=sa.Column(sa.Text))]

    with pytest.raises(ConfigError, match="--shard NAME"):
        differences(config, models=models)
    path, _ = autogenerate(config, "nick", copied, models=models)
    assert path is not None
    assert 'down_revision = "0001_nick", "0001_the_shop"' in path.read_text()


def test_long_calls_are_written_an_argument_a_line() -> None:
    call = ast.parse(f"f({', '.join(repr('x' * 20) for _ in range(8))}, g(a='it\\'s', b={'y' * 90!r}), c=1)").body[0]
    assert isinstance(call, ast.Expr)
    text = written(call.value)

    assert ast.dump(call) == ast.dump(ast.parse(text).body[0])
    assert max(map(len, text.split("\n"))) < 116
    assert '    "xxxxxxxxxxxxxxxxxxxx",' in text


def test_a_role_without_temporary_tables_is_told_what_to_grant(copied: Shard, tmp_path: Path, connect: Connect) -> None:
    connect(copied).execute(f"REVOKE TEMPORARY ON DATABASE {connect(copied).info.dbname} FROM PUBLIC")
    url = copied.url.get_secret_value().replace("postgres@", "shop_app@")
    assert "shop_app" in url

    with pytest.raises(ConfigError, match="GRANT TEMPORARY ON DATABASE"):
        differences(project(tmp_path), shard_at(url), models=[shop(sa.MetaData())])


def test_a_foreign_key_to_nowhere_is_a_clear_error(copied: Shard, tmp_path: Path) -> None:
    models = shop(sa.MetaData())
    sa.Table("lost", models, sa.Column("id", sa.ForeignKey("nowhere.id"), primary_key=True))

    with pytest.raises(ConfigError, match="could not find table 'nowhere'"):
        differences(project(tmp_path), copied, models=[models])


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run the real command line in a project whose models are a file."""
    (tmp_path / "shardmig.toml").write_text('models = ["shop_models:metadata"]\n')

    def run(*arguments: str) -> tuple[int, str]:
        done = shardmig(*arguments, cwd=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout + done.stderr

    return run


def models_file(root: Path, columns: str) -> None:
    (root / "shop_models.py").write_text(
        "import sqlalchemy as sa\nmetadata = sa.MetaData()\n"
        f"sa.Table('customer', metadata, sa.Column('id', sa.Integer, primary_key=True), {columns})\n"
    )


def test_from_models_to_a_checked_repository(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    models_file(tmp_path, "sa.Column('name', sa.Text)")
    code, said = command("revision", "-m", "customers", "--autogenerate")
    assert (0, "+ table customer\n") == (code, said[: said.index("wrote")])
    assert 0 == command("plan")[0]
    assert 0 == command("check")[0]

    models_file(tmp_path, "sa.Column('full_name', sa.Text), sa.Column('age', sa.Integer, index=True)")
    code, said = command("check")
    assert 1 == code
    assert "the models have the column customer.age, and no plan adds it" in said
    assert "column customer.name is gone from the models, and no script explains that" in said
    code, said = command("revision", "-m", "ages", "--autogenerate")
    assert 0 == code
    assert "? column customer.name is gone from the models" in said
    assert 0 == command("plan")[0]
    assert 0 == command("lint")[0]
    code, said = command("check")
    assert (0, True) == (code, "but for 1 explained difference" in said), said
    code, said = command("revision", "-m", "again", "--autogenerate")
    assert (0, True) == (code, said.startswith("nothing to write")), said
    assert ["0001_customers.py", "0002_ages.py"] == sorted(p.name for p in (tmp_path / "migrations").glob("*.py"))


def test_mistakes_end_in_one_line(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    code, said = command("revision", "-m", "x", "--autogenerate")
    assert (2, True) == (code, "cannot be imported: ModuleNotFoundError" in said), said
    code, said = command("revision", "-m", "x", "--shard", "eu1")
    assert (2, True) == (code, "--shard with --autogenerate" in said), said
    code, said = command("revision", "-m", "x", "--autogenerate", "--shard", "eu1")
    assert (2, True) == (code, "no shard named 'eu1'" in said), said
    assert not re.findall("Traceback", said)


def test_an_unreachable_shard_is_named(tmp_path: Path) -> None:
    gone = shard_at("postgresql://nobody@127.0.0.1:1/x?connect_timeout=1")

    with pytest.raises(ShardUnreachable, match=r"127\.0\.0\.1:1/x"):
        differences(project(tmp_path), gone, models=[sa.MetaData()])
