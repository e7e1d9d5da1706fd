"""Shards against what the plans make: every kind of drift is seen, and what is no drift is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import shardmig
from fleets import SHOP as SHOP_PLAN
from fleets import UPPER, fleet_of
from servers import FaultProxy

from shardmig import verification
from shardmig.config import Config
from shardmig.fleet import Fleet
from shardmig.plan import Move
from shardmig.repository import accepted_plans
from shardmig.scratch import Scratch
from shardmig.states import State
from shardmig.verification import alike, verify, verify_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Connect

    from shardmig import local
    from shardmig.config import Shard
    from shardmig.plan import AcceptedPlan
    from shardmig.verification import Verdict

SHOP = Path(__file__).parents[1] / "migrations"


class Looking:
    """A project over four shards, brought to the head, and a scratch server beside them."""

    def __init__(self, config: Config, server: local.Server) -> None:
        self.config = config
        self.plans: tuple[AcceptedPlan, ...] = accepted_plans(config)
        self.scratch = Scratch(server, config, self.plans)

    async def apply(self, *shards: Shard, upto: str | None = None) -> None:
        fleet = Fleet(self.config, self.plans, shards or tuple(self.config.shards.values()))
        (await fleet.apply(upto=upto, aware="tests")).raise_for_failures()

    async def verdict(self, *shards: Shard) -> list[Verdict]:
        return await verify(self.config, self.plans, shards or tuple(self.config.shards.values()), self.scratch)

    async def switch(self, flag: str, state: State, shard: Shard) -> None:
        (await Fleet(self.config, self.plans, [shard]).switch(flag, state, aware="tests")).raise_for_failures()


@pytest.fixture
def looking(config: Callable[..., Config], servers: list[local.Server], tmp_path: Path) -> Looking:
    shutil.copytree(SHOP, tmp_path / "migrations")
    return Looking(config(), servers[0])


@pytest.fixture
async def one(shard: Shard, servers: list[local.Server], tmp_path: Path) -> tuple[Looking, Shard]:
    """Return one shard, brought to the head."""
    shutil.copytree(SHOP, tmp_path / "migrations")
    here = Looking(Config.model_validate({"root": tmp_path, "shards": {shard.name: shard}}), servers[0])
    await here.apply(shard)
    return here, shard


DRIFT = [
    ("ALTER TABLE customer ADD COLUMN nick text", [("extra", "column", "public.customer.nick")]),
    ("ALTER TABLE customer DROP COLUMN email", [("missing", "column", "public.customer.email")]),
    ("ALTER TABLE customer ALTER email TYPE varchar(50)", [("different", "column", "public.customer.email")]),
    ("ALTER TABLE customer ALTER email SET DEFAULT 'x'", [("different", "column", "public.customer.email")]),
    ("ALTER TABLE customer ALTER full_name DROP NOT NULL", [("different", "column", "public.customer.full_name")]),
    ("CREATE INDEX hot ON orders (amount)", [("extra", "index", "public.hot")]),
    ("DROP INDEX orders_customer_id", [("missing", "index", "public.orders_customer_id")]),
    ("CREATE TABLE by_hand ()", [("extra", "table", "public.by_hand")]),
    ("DROP TABLE order_address", "table"),
    ("ALTER TABLE orders ADD CHECK (amount > 0)", [("extra", "constraint", "public.orders.orders_amount_check")]),
    ("ALTER TABLE orders DISABLE TRIGGER ALL", [("different", "constraint", "public.orders.orders_customer_id_fkey")]),
    (
        "ALTER TABLE customer DISABLE TRIGGER ALL",
        [("different", "constraint", "public.orders.orders_customer_id_fkey")],
    ),
    ("CREATE TYPE mood AS ENUM ('glad')", [("extra", "enum", "public.mood")]),
    (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'orders_customer_id'::regclass",
        [("different", "index", "public.orders_customer_id")],
    ),
]


def said(verdict: Verdict) -> list[tuple[str, str, str]]:
    words = {(True, False): "extra", (False, True): "missing", (False, False): "different"}
    return [(words[d.before is None, d.after is None], d.kind, d.name) for d in verdict.differences]


@pytest.mark.parametrize(("change", "expected"), DRIFT, ids=[change for change, _ in DRIFT])
async def test_every_kind_of_drift_is_seen(
    one: tuple[Looking, Shard], connect: Connect, change: str, expected: Any
) -> None:
    here, shard = one
    connect(shard).execute(change)
    [verdict] = await here.verdict()

    assert not verdict.sound
    if expected == "table":
        assert ("missing", "table", "public.order_address") in said(verdict)
        assert {"missing"} == {what for what, _, _ in said(verdict)}
    else:
        assert expected == said(verdict)


async def test_a_shard_as_the_plans_make_it_is_sound(one: tuple[Looking, Shard], connect: Connect) -> None:
    """What belongs to one server only is no drift: owners, rights, settings of autovacuum aside, rows, statistics."""
    here, shard = one
    look = connect(shard)
    look.execute("INSERT INTO customer (full_name) SELECT 'Ada' FROM generate_series(1, 100)")
    look.execute("GRANT SELECT ON customer TO shop_app")
    look.execute("ALTER TABLE customer OWNER TO shop_owner")
    look.execute("VACUUM FULL customer")
    [verdict] = await here.verdict()

    assert () == verdict.differences
    assert ("0003_order_address", 0) == (verdict.revision, verdict.behind)


async def test_partitions_come_and_go(one: tuple[Looking, Shard], connect: Connect) -> None:
    here, shard = one
    look = connect(shard)
    look.execute("CREATE TABLE reading (at date, v int) PARTITION BY RANGE (at); CREATE INDEX reading_v ON reading (v)")
    [before] = await here.verdict()
    look.execute("CREATE TABLE reading_1 PARTITION OF reading FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')")
    look.execute("CREATE TABLE reading_rest PARTITION OF reading DEFAULT")
    [after] = await here.verdict()

    assert before == after
    assert ("extra", "partitioned table", "public.reading") in said(after)


async def test_a_shard_is_held_against_its_own_revision(looking: Looking) -> None:
    """A shard that is behind does not differ, and one that has more than its ledger knows does."""
    eu1, eu2, us1, us2 = looking.config.shards.values()
    await looking.apply(eu1)
    await looking.apply(eu2, upto="0001_shop")
    await looking.apply(us1, upto="0002_split_name")
    verdicts = await looking.verdict()

    assert [True] * 4 == [v.sound for v in verdicts]
    assert [("0003_order_address", 0), ("0001_shop", 2), ("0002_split_name", 1), (None, 3)] == [
        (v.revision, v.behind) for v in verdicts
    ]
    assert us2.name == verdicts[3].shard


async def test_the_ledger_is_held_against_the_catalog(looking: Looking, connect: Connect) -> None:
    """Structure that the ledger does not know, although a later plan makes it, is drift."""
    eu1 = next(iter(looking.config.shards.values()))
    await looking.apply(eu1, upto="0001_shop")
    connect(eu1).execute("ALTER TABLE customer ADD COLUMN first_name text")
    [verdict] = await looking.verdict(eu1)

    assert [("extra", "column", "public.customer.first_name")] == said(verdict)


async def test_a_revision_in_progress_may_be_there_by_half(one: tuple[Looking, Shard], connect: Connect) -> None:
    """0003's structure counts as begun: what it makes may be missing, but not be otherwise."""
    here, shard = one
    look = connect(shard)
    look.execute("UPDATE shardmig.step SET status = 'RUNNING' WHERE revision = '0003_order_address' AND number = 2")
    [as_it_is] = await here.verdict()
    look.execute("DELETE FROM shardmig.step WHERE revision = '0003_order_address' AND number = 1")
    [unknown] = await here.verdict()

    assert as_it_is.sound
    assert not unknown.sound or unknown.revision == "0002_split_name"


async def test_a_shard_that_changes_while_it_is_looked_at_is_looked_at_again(
    shard: Shard, servers: list[local.Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SHOP, tmp_path / "migrations")
    here = Looking(Config.model_validate({"root": tmp_path, "shards": {shard.name: shard}}), servers[0])
    await here.apply(shard, upto="0001_shop")
    look = verification.snapshot

    async def and_apply(*args: Any) -> Any:
        monkeypatch.setattr(verification, "snapshot", look)
        catalog = await look(*args)
        await here.apply(shard)
        return catalog

    monkeypatch.setattr(verification, "snapshot", and_apply)

    assert [True] == [verdict.sound for verdict in await here.verdict()]


async def test_not_null_that_a_flag_in_done_let_go_is_no_drift(one: tuple[Looking, Shard], connect: Connect) -> None:
    here, shard = one
    await here.switch("split_name", State.DONE, shard)
    nullable = "SELECT is_nullable FROM information_schema.columns WHERE column_name = 'full_name'"

    assert [("YES",)] == connect(shard).execute(nullable).fetchall()
    assert [True] == [verdict.sound for verdict in await here.verdict()]
    await here.switch("split_name", State.LIVE, shard)
    assert [True] == [verdict.sound for verdict in await here.verdict()]


async def test_shards_that_differ_alike_are_one_group(looking: Looking, connect: Connect) -> None:
    await looking.apply()
    shards = list(looking.config.shards.values())
    for shard in shards[1:3]:
        connect(shard).execute("ALTER TABLE customer ADD COLUMN nick text")
    connect(shards[3]).execute("DROP INDEX orders_customer_id")
    groups = alike(await looking.verdict())

    assert [["eu1"], ["eu2", "us1"], ["us2"]] == [[verdict.shard for verdict in group] for group, _ in groups]


async def test_without_a_scratch_server_most_shards_say_how_it_looks(looking: Looking, connect: Connect) -> None:
    await looking.apply()
    shards = list(looking.config.shards.values())
    for shard in shards[:3]:
        connect(shard).execute("CREATE TABLE from_before (id int)")
    verdicts = await verify(looking.config, looking.plans, shards, None)

    assert [True, True, True, False] == [verdict.sound for verdict in verdicts]
    assert ("missing", "table", "public.from_before") in said(verdicts[3])


async def test_a_shard_of_one_schema_is_compared_in_its_schema(
    servers: list[local.Server], shard: Shard, tmp_path: Path, connect: Connect
) -> None:
    shutil.copytree(SHOP, tmp_path / "migrations")
    connect(shard).execute("CREATE SCHEMA tenant; CREATE TABLE public.of_somebody_else ()")
    tenant = shard.model_copy(update={"schema_name": "tenant"})
    here = Looking(Config.model_validate({"root": tmp_path, "shards": {tenant.name: tenant}}), servers[0])
    await here.apply(tenant)
    [before] = await here.verdict()
    connect(tenant).execute("ALTER TABLE tenant.customer ADD COLUMN nick text")
    [after] = await here.verdict()

    assert before.sound
    assert [("extra", "column", "tenant.customer.nick")] == said(after)


async def test_a_shard_that_cannot_be_reached_is_not_sound(looking: Looking) -> None:
    shard = next(iter(looking.config.shards.values()))
    gone = shard.model_copy(update={"url": type(shard.url)("postgresql://x@127.0.0.1:1/x")})
    [verdict] = await looking.verdict(gone)

    assert not verdict.sound
    assert "127.0.0.1:1/x" in str(verdict.problem)


@pytest.mark.parametrize(
    ("cut", "problem"),
    [
        ("SELECT DISTINCT revision FROM shardmig.log", "could not be asked"),
        ("(?s).*IS DISTINCT FROM", "its connection broke; ask again"),
    ],
)
async def test_a_shard_whose_connection_breaks_meanwhile_is_that_shards_problem(
    one: tuple[Looking, Shard], servers: list[local.Server], connect: Connect, cut: str, problem: str
) -> None:
    here, shard = one
    split = next(accepted for accepted in here.plans if accepted.plan.flag == "split_name")
    connect(shard).execute("INSERT INTO customer (full_name, first_name, last_name) VALUES ('A B', 'A', 'B')")
    with FaultProxy(servers[0]) as proxy:
        through = proxy.way_to(shard)
        struck = proxy.cut_before(cut)
        [verdict] = await here.verdict(through)
        [rows] = await verify_rows(here.config, split, [through])

    assert struck.struck.is_set()
    assert problem in (verdict.problem or rows.problem or "")
    assert (verdict.problem is None) != (rows.problem is None)


async def test_forgetting_what_belongs_to_a_server_is_needed(
    one: tuple[Looking, Shard], connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison could not be sound by seeing nothing: without the leaving out, an owner alone would differ."""
    here, shard = one
    connect(shard).execute("ALTER TABLE customer OWNER TO shop_owner")
    monkeypatch.setattr(verification, "_comparable", lambda catalog: catalog)

    assert [False] == [verdict.sound for verdict in await here.verdict()]


# --------------------------------------------------------------------------------------------------------------------
# Rows


async def test_rows_that_disagree_are_counted_and_named(one: tuple[Looking, Shard], connect: Connect) -> None:
    here, shard = one
    look = connect(shard)
    look.execute(
        "INSERT INTO customer (full_name, first_name, last_name) SELECT 'A B', 'A', 'B' FROM generate_series(1, 100)"
    )
    split = next(accepted for accepted in here.plans if accepted.plan.flag == "split_name")
    [good] = await verify_rows(here.config, split, [shard])
    look.execute("UPDATE customer SET last_name = 'C' WHERE id <= 30")
    [bad] = await verify_rows(here.config, split, [shard])
    await here.switch("split_name", State.DUAL, shard)
    [held_against_old] = await verify_rows(here.config, split, [shard])
    look.execute("UPDATE customer SET last_name = 'B'")
    await here.switch("split_name", State.LIVE, shard)
    await here.switch("split_name", State.DONE, shard)
    [done] = await verify_rows(here.config, split, [shard])
    look.execute("UPDATE customer SET last_name = 'D'")  # which old may leave out in DONE
    await here.switch("split_name", State.LIVE, shard)
    [again] = await verify_rows(here.config, split, [shard])

    assert (0, None, "LIVE") == (good.rows, good.note, good.state)
    assert (30, 20, ("1",)) == (bad.rows, len(bad.keys), bad.keys[0])
    assert (30, "DUAL") == (held_against_old.rows, held_against_old.state)
    assert (0, "only new counts") == (done.rows, done.note)
    assert (0, "only new counts since DONE, until rows are moved back") == (again.rows, again.note)


async def test_in_live_old_is_held_against_new(one: tuple[Looking, Shard], connect: Connect) -> None:
    """An application that knows more than forward(old) writes what only back(new) agrees with."""
    here, shard = one
    connect(shard).execute("INSERT INTO customer (full_name, first_name) VALUES ('Ada Lovelace', 'Ada Lovelace')")
    split = next(accepted for accepted in here.plans if accepted.plan.flag == "split_name")
    [live] = await verify_rows(here.config, split, [shard])
    await here.switch("split_name", State.DUAL, shard)
    [dual] = await verify_rows(here.config, split, [shard])
    connect(shard).execute("UPDATE customer SET full_name = 'Grace Hopper'")
    [wrong] = await verify_rows(here.config, split, [shard])

    assert (0, 0, 1) == (live.rows, dual.rows, wrong.rows), "in DUAL behind it, what LIVE wrote is still right"


async def test_a_lossy_row_is_right_as_the_move_left_it(shard: Shard, connect: Connect) -> None:
    """In LIVE old does not follow from new, which the script accepts; new follows from old."""
    [move] = [step for step in UPPER.steps if isinstance(step, Move)]
    lossy = move.model_copy(
        update={
            "restores": ("name",),
            "back": "UPDATE customer SET name = lower(upper_name) WHERE {batch}",
            "back_check": "SELECT id FROM customer WHERE {batch} AND name IS DISTINCT FROM lower(upper_name)",
            "lossy": True,
        }
    )
    steps = tuple(lossy if step is move else step for step in UPPER.steps)
    fleet = fleet_of([shard], SHOP_PLAN, UPPER.model_copy(update={"steps": steps}))
    (await fleet.apply(upto="0001_shop")).raise_for_failures()
    look = connect(shard)
    look.execute("INSERT INTO customer VALUES (1, 'Ada'), (2, 'Grace')")
    (await fleet.apply()).raise_for_failures()
    [right] = await verify_rows(fleet.config, fleet.plans[1], [shard])
    look.execute("UPDATE customer SET upper_name = 'ALAN' WHERE id = 2")
    [wrong] = await verify_rows(fleet.config, fleet.plans[1], [shard])

    assert ("LIVE", 0, None) == (right.state, right.rows, right.note)
    assert (1, (("2",),)) == (wrong.rows, wrong.keys)


async def test_rows_whose_source_is_gone_are_named(one: tuple[Looking, Shard], connect: Connect) -> None:
    here, shard = one
    await here.switch("order_address", State.DUAL, shard)
    connect(shard).execute("INSERT INTO order_address (order_id, city) VALUES (7, 'Bern')")
    address = next(accepted for accepted in here.plans if accepted.plan.flag == "order_address")
    [found] = await verify_rows(here.config, address, [shard])

    assert (1, (("7",),)) == (found.rows, found.keys)


# --------------------------------------------------------------------------------------------------------------------
# The command line


async def test_the_command_groups_and_exits_by_what_it_found(
    looking: Looking, connect: Connect, tmp_path: Path
) -> None:
    await looking.apply()
    sections = [
        f'[shards.{shard.name}]\nurl = "{shard.url.get_secret_value()}"\n' for shard in looking.config.shards.values()
    ]
    (tmp_path / "shardmig.toml").write_text("\n".join(["[rollout]\nrequire_aware = false\n", *sections]))

    def run(*arguments: str) -> tuple[int, str]:
        done = shardmig("verify", *arguments, cwd=tmp_path)
        assert "" == done.stderr
        return done.returncode, done.stdout

    assert (0, "4 shards look as the plans say: eu1, eu2, us1, us2\n") == run("--all")
    connect(looking.config.shards["us1"]).execute("ALTER TABLE customer ADD COLUMN nick text")
    code, text = run("--all", "--data", "split_name")
    assert 1 == code
    assert "3 shards look as the plans say: eu1, eu2, us2\n1 shard differs: us1\n" in text
    assert "  extra      column public.customer.nick: text\n" in text
    assert "us1  customer: every row agrees (LIVE)" in text
    code, text = run("--all", "-o", "json")
    body = json.loads(text)
    assert (1, False, 1) == (code, body["sound"], body["version"])
    assert [
        {"what": "extra", "kind": "column", "name": "public.customer.nick", "plans": None, "shard": "text"}
    ] == body["groups"][1]["differences"]

    await looking.switch("split_name", State.DONE, looking.config.shards["eu1"])
    code, text = run("--shard", "eu1", "--data", "split_name")
    assert (1, True) == (code, "1 shard looks as the plans say" in text)
    assert "no row was compared, so nothing is known of the rows of split_name" in text
