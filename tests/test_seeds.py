"""Fixed rows of a new table: written, checked, the application's from LIVE on, and gone where a plan is given up."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from fleets import accepted, fleet_of
from moving import notes

from shardmig import planfile
from shardmig.errors import LintFailed, ScriptError
from shardmig.events import Warned
from shardmig.operations import collecting, seed_rows
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.seeds import SeedRows
from shardmig.states import State
from shardmig.tables import Column, Table
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from conftest import Connect

    from shardmig import local
    from shardmig.config import Shard
    from shardmig.fleet import Fleet

CURRENCY = "CREATE TABLE currency (code varchar(3) PRIMARY KEY, name text, rate numeric(10, 2), since date)"
COLUMNS = {
    "code": "VARCHAR(3)",
    "name": "TEXT",
    "rate": "NUMERIC(10, 2)",
    "since": "DATE",
    "facts": "JSON",
    "sign": "CHAR",
}
KNOWN = {
    "currency": Table(
        {name: Column(type_sql, nullable=True) for name, type_sql in COLUMNS.items()}, ("code",), created=True
    )
}
ROWS: list[dict[str, Any]] = [
    {"code": "EUR", "name": "the 'Euro'", "rate": 1.005, "since": date(1999, 1, 1)},
    {"code": "USD", "name": None, "rate": Decimal("1.1"), "since": "1792-04-02"},
    {"code": "Ä--", "name": "a ; b $1 -- c", "rate": None, "since": None},
]
WRITTEN = [
    ("EUR", "the 'Euro'", Decimal("1.01"), date(1999, 1, 1)),
    ("USD", None, Decimal("1.10"), date(1792, 4, 2)),
    ("Ä--", "a ; b $1 -- c", None, None),
]


def seed(rows: list[dict[str, Any]] = ROWS, **more: Any) -> Move:
    return SeedRows("currency", rows, None).derive(KNOWN, line=9).model_copy(update=more)


def plan(*moves: Move, before: tuple[str, ...] = (), **more: Any) -> Plan:
    statements = tuple(Statement(sql=sql) for sql in (CURRENCY, *before))
    steps = (*statements, Switch(to=State.DUAL), *moves, Switch(to=State.LIVE))
    return Plan(revision="0002_currency", parent=None, flag="currency", script_sha256="0" * 64, steps=steps, **more)


@pytest.fixture
def psql(shard: Shard, connect: Connect) -> psycopg.Connection[Any]:
    return connect(shard)


def rows(psql: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    return psql.execute('SELECT * FROM currency ORDER BY code COLLATE "C"').fetchall()


# --------------------------------------------------------------------------------------------------------------------
# The script


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], r"takes a list of rows, as in \[{"),
        ({"code": "EUR"}, "takes a list of rows"),
        (["EUR"], "takes a list of rows"),
        ([{}], "names the same columns"),
        ([{"code": "EUR", "name": "a"}, {"code": "USD"}], "names the same columns; write None"),
        ([{"code": "EUR"}, {"code": "EUR"}], "two rows of currency have the key EUR"),
        ([{"code": None}], "has no code: a seed is found again by its key"),
        ([{"name": "Euro"}], "has no code"),
        ([{"code": "EUR", "nmae": "Euro"}], "currency has no column nmae"),
        ([{"code": "EUR", "facts": {"a": 1}}], "currency.facts is json, which cannot be compared; make it jsonb"),
        ([{"code": object()}], "is no constant that a seed can hold"),
        ([{"code": "EURO"}], r"'EURO' is too long for currency.code, VARCHAR\(3\); shorten it or widen"),
        ([{"code": 1000}], "1000 is too long for currency.code"),
        ([{"code": "EUR", "sign": "€€"}], "too long for currency.sign, CHAR;"),
        ([{"code": "{batch}"}], "would be taken for a range of keys"),
        ([{"code": "a\0b"}], "cannot be written"),
        ([{"code": str(n)} for n in range(1001)], "1001 rows are "),
    ],
)
def test_what_makes_no_seed_is_refused_with_what_to_write(given: Any, said: str) -> None:
    with pytest.raises(ScriptError, match=said), collecting(lambda call: call.derive(KNOWN, line=1) and None):
        seed_rows("currency", given)


def test_a_key_that_no_script_knows_must_be_given() -> None:
    with pytest.raises(ScriptError, match=r'give key=, a unique one, as in key=\("id",\)'):
        SeedRows("elsewhere", ROWS, None).derive({}, line=1)


def test_seeds_are_described_in_scripts_only() -> None:
    with pytest.raises(ScriptError, match=r"call it in the function move\(\)"):
        seed_rows("currency", ROWS)


def test_a_seed_survives_the_plan_file_and_other_plans_keep_their_hash() -> None:
    written = plan(seed())

    assert written == planfile.loads(planfile.dumps(written))
    assert "--! seed: yes\n" in planfile.dumps(written)
    ordinary = seed().model_copy(update={"seed": False})
    assert "--! seed" not in planfile.dumps(plan(ordinary))
    assert plan(ordinary).sha256 != written.sha256


# --------------------------------------------------------------------------------------------------------------------
# The linter


@pytest.mark.parametrize(
    ("statements", "change", "code"),
    [
        ((), {}, None),
        (("UPDATE",), {"forward": "UPDATE currency SET code = 'x', name = 'y' WHERE {batch}"}, "a seed puts rows in"),
        ((), {"forward": seed().forward.replace("DO UPDATE", "DO NOTHING").partition("\nSET")[0]}, "SM"),
        ((), {"purge": "DELETE FROM orders WHERE {batch}"}, "SM"),
        ((), {"seed": False}, "has nothing to purge"),
    ],
    ids=["as derived", "an update", "keeps what is there", "deletes elsewhere", "no seed"],
)
def test_a_seed_is_judged_as_a_move(statements: Any, change: dict[str, Any], code: str | None) -> None:
    one = plan(seed(**change))
    if code is None:
        assert accepted(one)
    else:
        with pytest.raises(LintFailed, match=code):
            accepted(one)


def test_rows_of_a_table_that_was_there_before_are_the_application_s() -> None:
    old = Plan(
        revision="0001_base", parent=None, flag="base", script_sha256="0" * 64,
        steps=(Statement(sql=CURRENCY), Switch(to=State.LIVE)),
    )  # fmt: skip
    later = plan(seed()).model_copy(update={"steps": (Switch(to=State.DUAL), seed(), Switch(to=State.LIVE))})

    with pytest.raises(LintFailed, match=r"INSERT puts rows into .*currency, which running code reads"):
        accepted(old, later)
    assert accepted(old, later.model_copy(update={"needs": ("base",)}))


# --------------------------------------------------------------------------------------------------------------------
# On a shard


@pytest.fixture
def fleet(shard: Shard) -> Callable[..., Fleet]:
    return lambda *moves, **more: fleet_of([shard], plan(*(moves or (seed(),)), **more))


async def test_seeds_are_there_before_live_as_their_columns_store_them(
    fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]
) -> None:
    (await fleet().apply(aware="1")).raise_for_failures()

    assert WRITTEN == rows(psql)
    assert [("DONE",)] == psql.execute("SELECT status FROM shardmig.step WHERE kind = 'move'").fetchall()
    assert [(2,)] == psql.execute("SELECT state FROM shardmig.flag").fetchall()


async def test_every_kind_of_constant_is_written(shard: Shard, psql: psycopg.Connection[Any]) -> None:
    kinds: dict[str, tuple[str, object, object]] = {
        "i": ("BIGINT", -7, -7),
        "b": ("BOOLEAN", True, True),
        "f": ("DOUBLE PRECISION", float("inf"), float("inf")),
        "u": ("UUID", UUID(int=5), UUID(int=5)),
        "j": ("JSONB", {"b": [1, None], "a": "ü'"}, {"b": [1, None], "a": "ü'"}),
        "v": ("INTERVAL", timedelta(hours=25), timedelta(hours=25)),
        "w": ("INTERVAL", timedelta(microseconds=10), timedelta(microseconds=10)),
        "t": ("TEXT", "tab\tand\nline \\ end", "tab\tand\nline \\ end"),
    }
    columns = {name: Column(type_sql, nullable=True) for name, (type_sql, _, _) in kinds.items()}
    move = SeedRows("kinds", [{name: value for name, (_, value, _) in kinds.items()}], None).derive(
        {"kinds": Table(columns, ("i",), created=True)}, line=1
    )
    table = f"CREATE TABLE kinds ({', '.join(f'{name} {kind[0]}' for name, kind in kinds.items())}, PRIMARY KEY (i))"
    (await fleet_of([shard], plan(move, before=(table,))).apply(aware="1")).raise_for_failures()

    assert [tuple(expected for _, _, expected in kinds.values())] == psql.execute("SELECT * FROM kinds").fetchall()


async def test_a_seed_that_a_constraint_refuses_blames_no_row_of_the_table(
    fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]
) -> None:
    refused = fleet()
    (await refused.apply(until=Until.STRUCTURE)).raise_for_failures()
    psql.execute("ALTER TABLE currency ADD CHECK (rate > 1.05)")
    [report] = await refused.apply(aware="1")

    assert 'violates check constraint "currency_rate_check"' in report.reason
    assert "rolled back while moving currency, all keys; Correct the cause (or the move: " in report.reason


async def test_a_seed_of_a_key_alone_is_written(fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]) -> None:
    (await fleet(seed([{"code": "EUR"}, {"code": "USD"}])).apply(aware="1")).raise_for_failures()

    assert ["EUR", "USD"] == [row[0] for row in rows(psql)]


async def test_a_move_finds_the_seeds_that_stand_before_it(
    fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]
) -> None:
    move = Move(
        table="price", key=("id",), writes=("name",),
        forward="WITH known AS MATERIALIZED (SELECT code, name FROM currency FOR SHARE) "
        "UPDATE price SET name = (SELECT known.name FROM known WHERE known.code = price.code) WHERE {batch}",
        check="SELECT price.id FROM price LEFT JOIN currency AS c ON c.code = price.code "
        "WHERE {batch} AND price.name IS DISTINCT FROM c.name",
    )  # fmt: skip
    psql.execute("CREATE TABLE price (id int PRIMARY KEY, code text); INSERT INTO price VALUES (1, 'EUR'), (2, 'USD')")
    added = "ALTER TABLE price ADD COLUMN name text"
    (await fleet(seed(), move, before=(added,)).apply(aware="1")).raise_for_failures()

    assert [("the 'Euro'",), (None,)] == psql.execute("SELECT name FROM price ORDER BY id").fetchall()


async def test_until_live_the_plan_s_values_count_and_from_live_on_the_application_s(
    fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]
) -> None:
    here = fleet()
    (await here.apply(aware="1")).raise_for_failures()
    psql.execute("UPDATE currency SET name = 'Teuro' WHERE code = 'EUR'")
    (await here.switch("currency", State.DUAL)).raise_for_failures()
    here.rechecks = True
    (await here.switch("currency", State.LIVE)).raise_for_failures()
    assert "Teuro" == rows(psql)[0][1]

    (await here.switch("currency", State.DONE)).raise_for_failures()
    (await here.switch("currency", State.DUAL)).raise_for_failures()
    assert 3 == len(rows(psql))


async def test_giving_up_takes_the_seeds_out_and_going_on_writes_them_again(
    fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]
) -> None:
    here = fleet()
    (await here.apply(aware="1")).raise_for_failures()
    psql.execute("UPDATE currency SET name = 'Teuro' WHERE code = 'EUR'; INSERT INTO currency VALUES ('own')")
    (await here.switch("currency", State.OLD)).raise_for_failures()
    assert ["own"] == [row[0] for row in rows(psql)]
    (await here.switch("currency", State.LIVE)).raise_for_failures()

    assert WRITTEN == [row for row in rows(psql) if row[0] != "own"]


async def test_seeds_that_rows_refer_to_stay_and_somebody_is_told(
    fleet: Callable[..., Fleet], psql: psycopg.Connection[Any]
) -> None:
    table = "CREATE TABLE bill (id bigint PRIMARY KEY, code varchar(3) REFERENCES currency)"
    here = fleet(before=(table,))
    (await here.apply(aware="1")).raise_for_failures()
    psql.execute("INSERT INTO bill VALUES (1, 'EUR')")
    heard, here.listener = notes()
    (await here.switch("currency", State.OLD)).raise_for_failures()

    assert 3 == len(rows(psql))
    assert any("currency: seed rows stay: " in event.message for event in heard if isinstance(event, Warned))


async def test_seeds_and_their_record_are_one_transaction(
    shard: Shard, psql: psycopg.Connection[Any], fleet: Callable[..., Fleet]
) -> None:
    """A row that cannot be written leaves none; the ledger says that nothing is done, and the same command goes on."""
    here = fleet()
    (await here.apply(until=Until.STRUCTURE)).raise_for_failures()
    psql.execute("ALTER TABLE currency ADD CONSTRAINT no_dollar CHECK (code <> 'USD')")
    [failed] = await here.apply(aware="1")
    assert [] == rows(psql)
    assert "violates check constraint" in failed.reason
    psql.execute("ALTER TABLE currency DROP CONSTRAINT no_dollar")
    (await here.apply(aware="1")).raise_for_failures()

    assert WRITTEN == rows(psql)


async def test_a_new_shard_is_provisioned_with_the_seeds(
    servers: list[local.Server], shards: dict[str, Shard], connect: Connect
) -> None:
    first = fleet_of([shards["eu1"]], plan(seed()))
    (await first.apply(aware="1")).raise_for_failures()
    both = fleet_of([shards["eu1"], shards["eu2"]], plan(seed()))
    new = replace(both, targets=[shards["eu2"]])
    (await new.provision()).raise_for_failures()

    assert WRITTEN == rows(connect(shards["eu2"]))


LABEL = Move(
    table="currency", key=("code",), writes=("label",),
    forward="UPDATE currency SET label = 'l:' || code WHERE {batch}",
    check="SELECT code FROM currency WHERE {batch} AND label IS DISTINCT FROM 'l:' || code",
)  # fmt: skip
SIGN = Move(
    table="currency", key=("code",), target="sign", target_key=("code",), writes=("label",),
    forward="WITH source AS MATERIALIZED (SELECT code, label FROM currency WHERE {batch} FOR SHARE) "
    "INSERT INTO sign (code, label) SELECT code, label FROM source ON CONFLICT (code) DO UPDATE "
    "SET label = excluded.label",
    check="SELECT code FROM currency LEFT JOIN sign AS t USING (code) "
    "WHERE {batch} AND (t.code IS NULL OR t.label IS DISTINCT FROM currency.label)",
    orphans="SELECT code FROM sign WHERE {batch} AND NOT EXISTS (SELECT FROM currency AS s WHERE s.code = sign.code)",
    purge="DELETE FROM sign WHERE {batch} AND NOT EXISTS (SELECT FROM currency AS s WHERE s.code = sign.code)",
)  # fmt: skip


def follower(revision: str, parent: str, sql: str, *moves: Move) -> Plan:
    """Make a plan behind others."""
    steps = (Statement(sql=sql), Switch(to=State.DUAL), *moves, Switch(to=State.LIVE))
    return Plan(revision=revision, parent=parent, flag=revision[5:], script_sha256="0" * 64, steps=steps)


LABELLED = follower("0003_label", "0002_currency", "ALTER TABLE currency ADD COLUMN label text", LABEL)
ORPHAN = SeedRows("sign", [{"code": "XXX", "label": "none"}], ("code",)).derive({}, line=1)
SIGNED = follower(
    "0004_sign", "0003_label", "CREATE TABLE sign (code varchar(3) PRIMARY KEY, label text)", ORPHAN, SIGN
)


async def test_a_new_shard_has_what_later_plans_make_of_the_seeds_of_earlier_ones(
    shards: dict[str, Shard], connect: Connect
) -> None:
    """Each move finds what stands before it: seeds, and what another move has made of them."""
    history = (plan(seed()), LABELLED, SIGNED)
    (await fleet_of([shards["eu1"]], *history).apply(aware="1")).raise_for_failures()
    new = replace(fleet_of([shards["eu1"], shards["eu2"]], *history), targets=[shards["eu2"]])
    (await new.provision()).raise_for_failures()

    found = [
        (rows(psql), psql.execute("SELECT * FROM sign ORDER BY code").fetchall())
        for psql in (connect(shards["eu1"]), connect(shards["eu2"]))
    ]
    assert found[0] == found[1]
    assert [("EUR", "l:EUR"), ("USD", "l:USD"), ("Ä--", "l:Ä--")] == found[1][1]


async def test_a_flag_that_is_not_live_elsewhere_leaves_the_seeds_to_its_own_move(
    shards: dict[str, Shard], connect: Connect
) -> None:
    history = (plan(seed()), LABELLED)
    old = fleet_of([shards["eu1"]], *history)
    (await old.apply(aware="1")).raise_for_failures()
    (await old.switch("label", State.DUAL)).raise_for_failures()
    new = replace(fleet_of([shards["eu1"], shards["eu2"]], *history), targets=[shards["eu2"]])
    (await new.provision()).raise_for_failures()
    psql = connect(shards["eu2"])
    assert [(None,)] * 3 == psql.execute("SELECT label FROM currency").fetchall()

    (await new.switch("label", State.LIVE)).raise_for_failures()
    assert [("l:EUR",), ("l:USD",), ("l:Ä--",)] == psql.execute("SELECT label FROM currency ORDER BY code").fetchall()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"forward": "UPDATE currency SET label = 'x' WHERE {batch}"}, "currency disagrees after the move: 3 rows"),
        ({"forward": "UPDATE currency SET label = (1 / 0)::text WHERE {batch}"}, "division by zero"),
    ],
)
async def test_a_new_shard_whose_seeds_a_move_does_not_bear_stays_closed(
    shard: Shard, psql: psycopg.Connection[Any], wrong: dict[str, str], said: str
) -> None:
    move = LABEL.model_copy(update=wrong)
    behind = LABELLED.model_copy(update={"steps": tuple(move if step is LABEL else step for step in LABELLED.steps)})
    [report] = await fleet_of([shard], plan(seed()), behind).provision()

    assert said in report.reason
    assert "0003_label step 3" in report.reason
    assert [] == rows(psql)
    assert [("currency", 0), ("label", 0)] == psql.execute(
        "SELECT flag, state FROM shardmig.flag ORDER BY 1"
    ).fetchall()
    assert [(2,)] == psql.execute("SELECT maintenance FROM shardmig.shard").fetchall()
