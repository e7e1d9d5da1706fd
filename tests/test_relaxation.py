"""DONE is granted exactly where writers of new alone can go on: the server itself is the judge."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from moving import VERSIONS, plan_of, same_table
from servers import other_majors

from shardmig import ledger, local
from shardmig.config import SessionSettings, Shard
from shardmig.errors import PreflightFailed
from shardmig.lint.mentions import columns_read
from shardmig.relaxation import refuse_mandatory, relax
from shardmig.session import Query, Session, open_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from shardmig.plan import Plan

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
PARTED = (
    "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int) PARTITION BY RANGE (id)",
    "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (1) TO (100)",
)
WITH_A = "CREATE TABLE t (id bigint PRIMARY KEY, a {}, b text, n int)"

# What is made, and what is said of it; nothing where DONE is granted.
TABLES = {
    "not null": (
        (WITH_A.format("text NOT NULL"),),
        't.a is NOT NULL without a default; a script that says relax = ["t.a"]',
    ),
    "default": ((WITH_A.format("text NOT NULL DEFAULT ''"),), ""),
    "domain not null": (
        ("CREATE DOMAIN person AS text NOT NULL", WITH_A.format("person")),
        "t.a is of the domain person, which takes no NULL; give the column a default",
    ),
    "domain of a domain": (
        ("CREATE DOMAIN one AS text CHECK (VALUE IS NOT NULL)", "CREATE DOMAIN two AS one", WITH_A.format("two")),
        "t.a is of the domain two",
    ),
    "domain with a default": (
        ("CREATE DOMAIN person AS text NOT NULL DEFAULT ''", WITH_A.format("person")),
        "",
    ),
    "domain that takes null": (("CREATE DOMAIN person AS text CHECK (VALUE <> '')", WITH_A.format("person")), ""),
    "check that takes null": ((WITH_A.format("text CHECK (a <> '' AND a NOT LIKE '%s')"),), ""),
    "check that takes none": (
        (WITH_A.format("text CONSTRAINT has_a CHECK (a IS NOT NULL)"),),
        "t.a is under has_a (CHECK)",
    ),
    "nulls not distinct": (
        (T, "CREATE UNIQUE INDEX one_a ON t (a) NULLS NOT DISTINCT"),
        "t.a is in the unique index one_a",
    ),
    "unique": ((T, "CREATE UNIQUE INDEX one_a ON t (a) INCLUDE (n)"), ""),
    "unique, with a default": (
        (WITH_A.format("text DEFAULT 'x'"), "CREATE UNIQUE INDEX one_a ON t (a)"),
        "t.a is in the unique index one_a",
    ),
    "unique lower": ((T, "CREATE UNIQUE INDEX one_a ON t (lower(a))"), ""),
    "unique coalesce": ((T, "CREATE UNIQUE INDEX one_a ON t (coalesce(a, ''))"), "t.a is in the unique index one_a"),
    "unique where none": (
        (T, "CREATE UNIQUE INDEX one_b ON t (b) WHERE a IS NULL"),
        "t.a is in the unique index one_b",
    ),
    "generated": (
        (WITH_A.format("text, c text GENERATED ALWAYS AS (lower(a)) STORED NOT NULL"),),
        "t.c is NOT NULL without a default",
    ),
    "in a partition": ((*PARTED, "ALTER TABLE t1 ALTER a SET NOT NULL"), "t1.a is NOT NULL without a default"),
    "default of the whole": (
        (*PARTED, "ALTER TABLE t1 ALTER a SET NOT NULL", "ALTER TABLE t ALTER a SET DEFAULT ''"),
        "",
    ),
    "check in a partition": (
        (*PARTED, "ALTER TABLE t1 ADD CONSTRAINT has_a CHECK (a IS NOT NULL)"),
        "t1.a is under has_a (CHECK)",
    ),
    "unique in a partition": (
        (*PARTED, "CREATE UNIQUE INDEX one_a ON t1 (coalesce(a, ''))"),
        "t1.a is in the unique index one_a",
    ),
}


@asynccontextmanager
async def made(shard: Shard, *texts: str) -> AsyncIterator[Session]:
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        await ledger.install(session)
        await session.transact([Query(text) for text in texts])
        yield session


def one_way(**more: Any) -> Plan:
    return plan_of(same_table(back=None, back_check=None, restores=(), **more))


async def refusal(session: Session, plan: Plan) -> str:
    try:
        await refuse_mandatory(session, plan)
    except PreflightFailed as error:
        return str(error)
    return ""


async def can_go_on(session: Session) -> bool:
    """Write two rows of new alone."""
    try:
        await session.transact(
            [Query("INSERT INTO t (id, b) VALUES (1, 'X')"), Query("INSERT INTO t (id, b) VALUES (2, 'X')")]
        )
    except psycopg.Error:
        return False
    return True


async def judged(shard: Shard, case: str) -> None:
    texts, said = TABLES[case]
    async with made(shard, *texts) as session:
        refused = await refusal(session, plan_of(same_table()))

        assert said in refused, case
        assert await can_go_on(session) == (refused == ""), case


@pytest.mark.parametrize("case", TABLES)
async def test_done_is_granted_exactly_where_writers_of_new_alone_can_go_on(shard: Shard, case: str) -> None:
    await judged(shard, case)


@pytest.mark.long
async def test_it_is_on_other_majors() -> None:
    majors = other_majors()
    if not majors:
        pytest.skip("no other PostgreSQL major here; SHARDMIG_TEST_MAJORS=DIR fetches some")
    for major, binaries in majors.items():
        with local.Server.start(f"pg{major}", binaries=binaries) as server:
            for n, case in enumerate(TABLES):
                if case != "nulls not distinct" or major >= 15:
                    url = server.create_database(f"d{n}")
                    await judged(Shard.model_validate({"name": "eu1", "url": url}), case)
            url = server.create_database("parted")
            await test_relaxing_reaches_every_partition(Shard.model_validate({"name": "eu1", "url": url}))


async def test_without_a_way_back_what_forward_reads_may_be_old(shard: Shard) -> None:
    plan = one_way()
    async with made(shard, WITH_A.format("text NOT NULL")) as session:
        assert "t.a is NOT NULL without a default" in await refusal(session, plan)

        relaxing = plan.model_copy(update={"relax": ("t.a",)})
        assert [("t", "a")] == await refuse_mandatory(session, relaxing)
        await relax(session, relaxing)
        assert await can_go_on(session)


async def test_where_forward_reads_whole_rows_any_column_but_its_own_may_be_old(shard: Shard) -> None:
    forward = "UPDATE t SET b = to_jsonb(t) ->> 'a' WHERE {batch}"
    async with made(
        shard, "CREATE TABLE t (id bigint PRIMARY KEY, a text NOT NULL, b text NOT NULL, n int)"
    ) as session:
        refused = await refusal(session, one_way(forward=forward))

        assert ("t.a is NOT NULL" in refused, "t.b is NOT NULL" in refused, "t.id" in refused) == (True, False, False)


def test_a_text_reads_columns_and_whole_rows() -> None:
    assert {"a", "b", "c"} == columns_read("UPDATE t SET x = upper(a) FROM u WHERE {batch} AND u.b = t.c")
    for rows in ("to_jsonb(t)", "(SELECT count(z.*) FROM u AS z)", "to_jsonb(z) FROM u AS z"):
        assert "*" in columns_read(f"UPDATE t SET x = {rows}")


async def test_relaxing_reaches_every_partition(shard: Shard) -> None:
    """What a partition alone demands does not end when its table's demand does, in PostgreSQL 18."""
    texts = (*PARTED, "ALTER TABLE t1 ALTER a SET NOT NULL", "ALTER TABLE t ALTER a SET NOT NULL")
    plan = plan_of(same_table()).model_copy(update={"relax": ("t.a",)})
    async with made(shard, *texts) as session:
        await relax(session, plan)

        assert [] == await refuse_mandatory(session, plan)
        assert await can_go_on(session)


async def test_what_a_table_demands_is_told_once_and_not_of_each_partition(shard: Shard) -> None:
    async with made(shard, *PARTED, "ALTER TABLE t ALTER a SET NOT NULL") as session:
        refused = await refusal(session, plan_of(same_table()))

        assert ("t.a is NOT NULL" in refused, "t1.a" in refused) == (True, False)
