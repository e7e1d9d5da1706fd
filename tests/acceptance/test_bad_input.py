"""Bad input: one clear error that names file or shard and the cure, and nothing changed anywhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import psycopg
import pytest
from servers import PgBouncer

if TYPE_CHECKING:
    from conftest import Project

    from shardmig.local import Server

LEDGER = "SELECT to_regnamespace('shardmig')::text"
HEAD = '"""{what}"""\nimport sqlalchemy as sa\nfrom alembic import op\nfrom shardmig.operations import move_rows\n\n'
HEAD += 'revision, down_revision = "0004_{name}", "0003_order_address"\n\n'


def untouched(project: Project) -> None:
    """No shard has as much as a ledger."""
    for shard in project.shards:
        assert [(None,)] == project.query(shard, LEDGER)


def script(project: Project, name: str, body: str) -> None:
    (project.migrations / f"0004_{name}.py").write_text(HEAD.format(what=name, name=name) + body)
    (project.migrations / "HEAD").write_text(f"0004_{name}\n")


def refused(project: Project, *arguments: str, says: str) -> str:
    """Expect exit code 2, a short message on stderr, and nothing on stdout."""
    result = project.run(*arguments, code=2)
    assert "" == result.out
    assert re.search(says, result.err), result.err
    return result.err


# --------------------------------------------------------------------------------------------------------------------
# Command line and configuration


def test_an_unknown_shard_is_named_with_those_that_exist(project: Project) -> None:
    refused(project, "apply", "--shard", "eu9", says="no shard named 'eu9'; known shards: eu1, eu2, us1, us2")
    untouched(project)


def test_apply_without_a_target_says_how_to_name_one(project: Project) -> None:
    refused(project, "apply", says="--shard NAME.*--all")
    untouched(project)


def test_a_wrong_number_of_shards_is_refused(project: Project) -> None:
    refused(project, "apply", "--all", "--expect", "5", says="4 shards are meant, 5 were expected")
    untouched(project)


def test_every_mistake_in_the_configuration_is_listed_with_its_key(project: Project) -> None:
    project.write_toml('[pace]\nbatch_target_ms = -1\n[rollout]\njobs = 0\ncolour = "red"\n')

    error = refused(project, "apply", "--all", says="shardmig.toml")

    for key in ("pace.batch_target_ms", "rollout.jobs", "rollout.colour"):
        assert key in error


def test_a_missing_configuration_names_init(project: Project) -> None:
    (project.root / "shardmig.toml").unlink()
    refused(project, "apply", "--all", says="shardmig init")


def test_an_environment_variable_that_is_not_set_is_named(project: Project) -> None:
    project.write_toml(urls={"eu1": "${NOBODY_SET_THIS}"})
    refused(project, "status", says="shards.eu1.url.*NOBODY_SET_THIS")


# --------------------------------------------------------------------------------------------------------------------
# Shards


def test_an_unreachable_shard_is_named_and_the_others_go_on(project: Project) -> None:
    project.write_toml(urls={"us1": "postgresql://someone:s3cret@127.0.0.1:1/nowhere"})

    result = project.run("apply", "--all", code=1)

    assert re.search(r"us1 +unreachable.*127\.0\.0\.1:1", result.out)
    assert "3 of 4 shards done" in result.out
    assert "s3cret" not in result.out + result.err
    assert [("shardmig",)] == project.query("eu1", LEDGER)


def test_a_password_is_in_no_output(project: Project) -> None:
    url = project.shards["eu1"].url.get_secret_value()
    wrong = [
        "postgresql://postgres:s3cret@127.0.0.1:1/x?connect_timeout=1",
        "host=127.0.0.1 port=1 user=postgres password=s3cret",
        "postgresql://postgres:s3cret@[broken",
        url.replace("postgresql://postgres", "postgresql://nobody_known:s3cret"),
    ]
    for bad in wrong:
        project.write_toml(urls={"eu1": bad})
        for verb in (
            ["apply", "--shard", "eu1"],
            ["status", "--shard", "eu1"],
            ["apply", "--shard", "eu1", "-o", "json"],
        ):
            result = project.run(*verb, code=None)
            assert "s3cret" not in result.out + result.err
            assert "eu1" in result.out + result.err


def test_the_wrong_database_behind_a_name_is_refused_before_anything_is_written(project: Project) -> None:
    project.run("apply", "--shard", "eu1", "--shard", "us1")
    before = project.query("eu1", "SELECT * FROM shardmig.step")
    project.write_toml(urls={"us1": project.shards["eu1"].url.get_secret_value()})

    result = project.run("apply", "--shard", "us1", code=1)

    assert re.search("us1 +wrong shard.*'eu1'", result.out)
    assert before == project.query("eu1", "SELECT * FROM shardmig.step")


def test_a_shard_through_a_transaction_pooler_is_refused(project: Project, servers: list[Server]) -> None:
    with PgBouncer(servers[0]) as pooler:
        project.write_toml(urls={"eu1": pooler.url(project.database("eu1"))})
        result = project.run("apply", "--shard", "eu1", code=1)

    assert "pooler" in result.out
    untouched(project)


def test_a_standby_is_refused(project: Project, servers: list[Server]) -> None:
    standby = servers[0].standby("standby")
    try:
        project.write_toml(urls={"eu1": standby.url(project.database("eu1"))})
        result = project.run("apply", "--shard", "eu1", code=1)
    finally:
        standby.close()

    assert "primary" in result.out
    untouched(project)


def test_a_role_that_does_not_own_the_tables_is_refused(project: Project) -> None:
    project.seed()
    project.query("eu1", "GRANT USAGE, CREATE ON SCHEMA public TO shop_app")
    project.query("eu1", "GRANT ALL ON ALL TABLES IN SCHEMA public, shardmig TO shop_app")
    project.query("eu1", "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA shardmig TO shop_app")
    project.write_toml('[session]\nowner = "shop_app"\n')

    result = project.run("apply", "--shard", "eu1", code=1)

    assert "customer" in result.out
    assert "own" in result.out
    assert [("shop", 2)] == project.query("eu1", "SELECT flag, state FROM shardmig.flag")


@pytest.mark.parametrize(
    ("ddl", "says"),
    [
        (
            (
                "CREATE TABLE gone (LIKE customer);"
                "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
                "'BEGIN INSERT INTO gone SELECT OLD.*; RETURN NULL; END';"
                "CREATE TRIGGER keep AFTER DELETE ON customer FOR EACH ROW EXECUTE FUNCTION keep()"
            ),
            r"trigger.*\[lint\]\s+known_functions",
        ),
        (
            (
                "CREATE FUNCTION noise() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
                "CREATE TRIGGER noise BEFORE UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION noise()"
            ),
            'trigger.*triggers="fire"',
        ),
    ],
)
def test_triggers_that_a_column_or_a_move_would_upset_are_refused(project: Project, ddl: str, says: str) -> None:
    project.seed()
    project.query("eu1", ddl)

    result = project.run("apply", "--shard", "eu1", code=1)

    assert re.search(says, result.out, re.DOTALL), result.out
    assert [(None,)] == project.query("eu1", "SELECT max(to_regclass('order_address')::text)")
    assert 0 == len([1 for (name,) in project.query("eu1", "SELECT flag FROM shardmig.flag") if name != "shop"])


# --------------------------------------------------------------------------------------------------------------------
# Scripts and plans


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("syntax", "def upgrade(:\n    pass\n", r"0004_syntax\.py:\d+"),
        (
            "reader",
            "def upgrade() -> None:\n    op.get_bind().execute(sa.text('SELECT 1'))\n",
            r"0004_reader\.py:\d+.*",
        ),
        (
            "unbound",
            (
                "def upgrade() -> None:\n    op.execute(sa.text(\"COMMENT ON TABLE customer IS ':x'\"))\n"
                "    op.execute(sa.text('COMMENT ON TABLE customer IS :y'))\n"
            ),
            r"0004_unbound\.py:\d+",
        ),
        ("dropper", "def upgrade() -> None:\n    op.drop_column('customer', 'full_name')\n", r"0004_dropper\.py:\d+"),
        ("raw", "def upgrade() -> None:\n    op.execute('DROP TABLE orders')\n", r"0004_raw"),
    ],
)
def test_a_script_that_is_wrong_stops_everything_before_any_shard(
    project: Project, name: str, body: str, says: str
) -> None:
    script(project, name, body)
    refused(project, "apply", "--all", says=says)
    untouched(project)


def test_two_heads_are_named(project: Project) -> None:
    script(project, "left", "def upgrade() -> None:\n    op.add_column('customer', sa.Column('a', sa.Text))\n")
    script(project, "right", "def upgrade() -> None:\n    op.add_column('customer', sa.Column('b', sa.Text))\n")
    error = refused(project, "apply", "--all", says="0004_left")
    assert "0004_right" in error
    untouched(project)


def test_an_edited_script_is_a_stale_plan(project: Project) -> None:
    path = project.migrations / "0002_split_name.py"
    path.write_text(path.read_text().replace('"last_name", sa.Text', '"last_name", sa.String(40)'))
    refused(project, "apply", "--all", says=r"0002_split_name.*shardmig plan")
    untouched(project)


def test_a_plan_edited_by_hand_is_refused(project: Project) -> None:
    path = project.migrations / "0002_split_name.sql"
    path.write_text(path.read_text().replace("last_name TEXT", "last_name VARCHAR(40)"))
    refused(project, "apply", "--all", says=r"0002_split_name\.sql")
    untouched(project)


def test_a_script_and_plan_changed_after_apply_are_shown_with_the_difference(project: Project) -> None:
    project.seed()
    project.run("apply", "--shard", "us1")
    path = project.migrations / "0002_split_name.py"
    path.write_text(path.read_text().replace('"last_name", sa.Text', '"last_name", sa.String(40)'))
    project.run("plan")

    result = project.run("apply", "--all", code=1)

    assert re.search("us1 +plan changed", result.out)
    assert re.search(r"-.*last_name TEXT", result.out)
    assert re.search(r"\+.*last_name VARCHAR\(40\)", result.out)
    assert "3 of 4 shards done" in result.out


def test_a_move_that_loses_data_is_refused_before_the_first_batch(project: Project) -> None:
    project.seed()
    path = project.migrations / "0002_split_name.py"
    text = path.read_text()
    naive = re.sub(
        r'"last_name": .*?END",?\s*\),?\n|"last_name": .*?END",\n',
        '"last_name": "split_part(full_name, \' \', 2)",\n',
        text,
        flags=re.DOTALL,
    )
    assert naive != text
    path.write_text(naive)
    project.run("plan")

    result = project.run("apply", "--shard", "eu1", code=1)

    assert "loses data" in result.out
    assert "lossy=True" in result.out
    assert 0 == project.flags("eu1")["split_name"]
    assert [(0,)] == project.query("eu1", "SELECT count(first_name) FROM customer")


def test_a_broken_connection_to_psycopg_is_never_a_traceback(project: Project) -> None:
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect("postgresql://127.0.0.1:1/x")
    project.write_toml(urls={"eu1": "this is no url"})
    result = project.run("apply", "--shard", "eu1", code=None)
    assert result.code in {1, 2}


def test_done_is_asked_about_where_nothing_leads_back_from_it(repository: Project) -> None:
    repository.write_toml('[shards.eu1]\nurl = "postgresql://127.0.0.1:1/nobody"\n')
    moved = 'def upgrade() -> None:\n    op.add_column("customer", sa.Column("upper", sa.Text()))\n\n\n'
    moved += 'def move() -> None:\n    move_rows("customer", forward={"upper": "upper(full_name)"})\n'
    script(repository, "upper", moved)
    repository.run("plan")

    says = "upper has no `back`.* nothing can fill it again.* say --yes"
    refused(repository, "switch", "upper", "DONE", "--all", says=says)
    for arguments in (["upper", "DONE", "--yes"], ["upper", "LIVE"], ["split_name", "DONE"]):
        assert "unreachable" in repository.run("switch", *arguments, "--all", code=1).out
