"""Moving in laps: every row once, whatever happens, in a table that stays small."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moving import moving, notes, same_table, second_table

from shardmig import laps
from shardmig.config import Pace, SessionSettings
from shardmig.errors import StepFailed
from shardmig.events import BatchDone, BatchFailed
from shardmig.laps import Lap
from shardmig.plan import bind_batch
from shardmig.states import State

if TYPE_CHECKING:
    from conftest import Connect
    from moving import Moving

    from shardmig.config import Shard
    from shardmig.events import Event
    from shardmig.plan import Move

ROWS = 30_011
T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int, filler text DEFAULT repeat('x', 60))"
INDEXES = ("CREATE INDEX ON t (a)", "CREATE INDEX ON t (filler)")
FILL = f"INSERT INTO t (id, a) SELECT g, 'x' || g FROM generate_series(1, {ROWS}) g"
PACE = Pace(batch_rows=500, batch_rows_min=500, batch_rows_max=500)


async def size(here: Moving) -> int:
    [(found,)] = await here.rows("SELECT pg_total_relation_size('t')")
    return int(found)


async def all_once(here: Moving, rows: int = ROWS) -> None:
    """Look at every row's counter, and at what the step says."""
    assert [(rows, 1, 1)] == await here.rows("SELECT count(*), min(n), max(n) FROM t WHERE b = upper(a)")
    step = await here.step()
    assert (rows, None, step.upto) == (step.rows, step.lap, step.cursor)


# --------------------------------------------------------------------------------------------------------------------
# Positions


@given(rows=st.integers(1, 400), of=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 1000), width=st.integers(1, 3))
def test_laps_count_every_row_of_a_stretch_and_end(rows: int, of: int, seed: int, width: int) -> None:
    sizes, counted = random.Random(seed), 0
    move = same_table(key=("id", "b", "c")[:width])
    lap: Lap | None = Lap(0, of, rows, [str(rows)] * width)
    passed = []
    while lap is not None:
        assert lap == Lap.read(lap.written(), move), "the ledger keeps all of it"
        here = int(lap.at[0]) if lap.at else 0
        upto = min(here + sizes.randint(1, 50), rows)
        moved = lap.share(upto - here, [str(upto)] * width)
        counted += moved
        passed.append((lap.number, here, upto))
        lap = lap.reached([str(upto)] * width, moved)

    assert rows == counted
    for number in range(of):
        walked = [(after, upto) for lap_number, after, upto in passed if lap_number == number]
        assert [0, *[upto for _, upto in walked]] == [*[after for after, _ in walked], rows], "without a gap"


def test_between_two_stretches_there_is_no_lap() -> None:
    assert Lap.read(None, same_table()) is None


# --------------------------------------------------------------------------------------------------------------------
# Rows


async def test_a_row_that_is_locked_again_and_again_is_moved_in_laps_too(shard: Shard, connect: Connect) -> None:
    """Split down to one row, a batch still passes as many as there are laps; it is one row that is waited for."""
    stop, writers = threading.Event(), 3

    def keep_locked() -> None:
        connection = connect(shard)
        while not stop.is_set():
            with connection.transaction():
                connection.execute("UPDATE t SET filler = filler WHERE id = 10000")
                time.sleep(0.025)

    settings = SessionSettings(lock_wait_s=15)  # some of the rungs reach it within a second
    async with moving(shard, same_table(), T, *INDEXES, FILL, "VACUUM ANALYZE t", settings=settings) as here:
        with ThreadPoolExecutor(writers) as pool:
            busy = [pool.submit(keep_locked) for _ in range(writers)]
            try:
                assert await here.run(pace=Pace()).run()
            finally:
                stop.set()
        assert [None] * writers == [one.result() for one in busy]
        await all_once(here)


async def test_a_table_with_indexes_stays_small_and_each_row_is_moved_once(shard: Shard) -> None:
    async with moving(shard, same_table(), T, *INDEXES, FILL, "VACUUM ANALYZE t") as here:
        before = await size(here)
        heard, listener = notes()
        # Batches of other sizes from lap to lap: their rows are counted about, those of a stretch exactly.
        assert await here.run(pace=Pace(batch_rows=37, batch_rows_min=30), listener=listener).run()

        await all_once(here)
        assert 1.6 * before > await size(here)
        assert ROWS == sum(event.rows for event in heard if isinstance(event, BatchDone))


async def test_walked_once_it_doubles(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laps, "FEW_ROWS", ROWS + 1)
    async with moving(shard, same_table(), T, *INDEXES, FILL, "VACUUM ANALYZE t") as here:
        before = await size(here)
        assert await here.run(pace=PACE).run()

        await all_once(here)
        assert 1.7 * before < await size(here)


@pytest.mark.parametrize(
    ("move", "indexes"),
    [
        pytest.param(same_table(), (), id="no index beside the key"),
        pytest.param(same_table(), ("CREATE INDEX ON t (a)", "CREATE INDEX ON t (n, b)"), id="one on what is written"),
        pytest.param(second_table(), INDEXES, id="another table is written"),
    ],
)
async def test_where_laps_gain_nothing_the_table_is_walked_once(
    shard: Shard, move: Move, indexes: tuple[str, ...]
) -> None:
    other = "CREATE TABLE u (t_id bigint PRIMARY KEY, a text, n int)"
    async with moving(shard, move, T, other, *indexes, FILL, "VACUUM ANALYZE t") as here:
        assert await here.run(pace=PACE).run()

        step = await here.step()
        assert (ROWS, ceil(ROWS / 500)) == (step.rows, step.batches)


async def test_the_way_back_is_walked_in_laps_too(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index on what forward writes keeps it to one walk; the way back writes other columns."""
    monkeypatch.setattr(laps, "FEW_ROWS", 1)
    fill = "INSERT INTO t (id, a) SELECT g, 'x' || g FROM generate_series(1, 3000) g"
    async with moving(shard, same_table(), T, "CREATE INDEX ON t (b)", fill, "VACUUM ANALYZE t") as here:
        assert await here.run(pace=PACE).run()
        assert 3000 // 500 == (await here.step()).batches
        await here.finish()
        for state in (State.LIVE, State.DONE, State.LIVE):
            await here.to(state)
        await here.session.execute("UPDATE t SET b = 'NEW', a = 'stale'")

        assert await here.run("back", pace=PACE).run()
        assert [(3000,)] == await here.rows("SELECT count(*) FROM t WHERE a = 'new'")
        assert 3000 // 500 < (await here.step()).batches


KEYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "composite": ("a_id int NOT NULL DEFAULT 1, id text, PRIMARY KEY (a_id, id)", ("a_id", "id")),
    "uuid": ("id uuid PRIMARY KEY", ("id",)),
    "timestamptz": ("id timestamptz PRIMARY KEY", ("id",)),
    "numeric": ("id numeric PRIMARY KEY", ("id",)),
    "char": ("id char(8) PRIMARY KEY", ("id",)),
    "no hash": ("id money PRIMARY KEY", ("id",)),
}
VALUES = {
    "composite": "lpad(g::text, 8, '0')",
    "uuid": "md5(g::text)::uuid",
    "timestamptz": "timestamptz 'epoch' + g * interval '1 s'",
    "numeric": "g / 7.0",
    "char": "lpad(g::text, 8, '0')",
    "no hash": "g::money",
}


@pytest.mark.parametrize("kind", KEYS)
async def test_any_key_is_walked_and_one_without_hash_or_order_once(
    shard: Shard, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laps, "FEW_ROWS", 1)
    monkeypatch.setattr(laps, "STRETCH_ROWS", 700)
    columns, key = KEYS[kind]
    made = f"CREATE TABLE t ({columns}, a text, b text, n int)"
    fill = f"INSERT INTO t (id, a) SELECT {VALUES[kind]}, 'x' || g FROM generate_series(1, 2000) g"
    async with moving(shard, same_table(key=key), made, "CREATE INDEX ON t (a)", fill, "VACUUM ANALYZE t") as here:
        assert await here.run(pace=Pace(batch_rows=50, batch_rows_min=50, batch_rows_max=50)).run()

        await all_once(here, 2000)
        assert (kind in {"no hash", "uuid"}) == ((await here.step()).batches == 2000 // 50)


@pytest.mark.parametrize("key", [("id",), ("id", "twin"), ("id", "one"), ("one", "id", "twin")])
def test_laps_share_the_rows_alike(shard: Shard, connect: Connect, key: tuple[str, ...]) -> None:
    connection = connect(shard)
    connection.execute("CREATE TABLE t AS SELECT g AS id, g AS twin, 1 AS one FROM generate_series(1, 8000) g")

    found = [
        connection.execute(
            f"SELECT count(*) FROM t WHERE {Lap(number, 4, 8000, ['8000']).condition(key, 't')}"
        ).fetchone()
        for number in range(4)
    ]

    counts = [count for row in found if row for count in row]
    assert 8000 == sum(counts)
    assert all(1800 < count < 2200 for count in counts), counts


# --------------------------------------------------------------------------------------------------------------------
# What happens meanwhile


async def test_a_move_that_stops_within_a_lap_goes_on_there(shard: Shard) -> None:
    async with moving(shard, same_table(), T, *INDEXES, FILL, "VACUUM ANALYZE t") as here:
        seen = set()
        for _ in range(200):
            stop = asyncio.Event()
            left = random.randint(1, 12)

            def halt(event: Event, stop: asyncio.Event = stop) -> None:
                nonlocal left
                left -= isinstance(event, BatchDone)
                if not left:
                    stop.set()

            if await here.run(pace=PACE, listener=halt, stop=stop).run():
                break
            step = await here.step()
            assert {0, 1} >= {n for (n,) in await here.rows("SELECT DISTINCT coalesce(n, 0) FROM t")}
            seen.add(None if step.lap is None else step.lap[0])

        await all_once(here)
        assert seen >= {"0", "1", "2", "3"}


async def test_rows_written_meanwhile_are_left_as_their_writers_want_them(shard: Shard, connect: Connect) -> None:
    """Whoever writes in DUAL writes both; rows deleted, inserted and re-keyed between two laps count for no lap."""
    writer, keys = connect(shard), random.sample(range(1, ROWS - 3), 40)

    def meanwhile(event: Event) -> None:
        if isinstance(event, BatchDone) and keys:
            key = keys.pop()
            writer.execute("UPDATE t SET a = 'w', b = 'W' WHERE id = %s", [key])
            writer.execute("DELETE FROM t WHERE id = %s", [key + 1])
            writer.execute("INSERT INTO t (id, a, b) VALUES (%s, 'i', 'I')", [ROWS + key])
            writer.execute("UPDATE t SET id = -id, b = upper(a) WHERE id = %s", [key + 2])

    async with moving(shard, same_table(), T, *INDEXES, FILL, "VACUUM ANALYZE t") as here:
        assert await here.run(pace=PACE, listener=meanwhile).run()

        assert not keys
        assert [] == await here.rows("SELECT id FROM t WHERE b IS DISTINCT FROM upper(a)")


async def test_a_row_that_fails_is_named_within_its_lap(shard: Shard) -> None:
    refuse = f"ALTER TABLE t ADD CHECK (b <> 'X{ROWS - 5}')"
    async with moving(shard, same_table(), T, *INDEXES, FILL, refuse, "VACUUM ANALYZE t") as here:
        heard, listener = notes()
        with pytest.raises(StepFailed, match=f"the first row that fails is .*{ROWS - 5}"):
            await here.run(pace=PACE, listener=listener).run()

        assert [[str(ROWS - 5)]] == [event.culprit for event in heard if isinstance(event, BatchFailed)]


def test_a_condition_is_one_more_for_the_range() -> None:
    bound: Any = bind_batch("SELECT {batch}", ("id",), lower=True, upper=False, only="f(id) = 1")

    assert 'SELECT (("id") > ($1) AND (f(id) = 1))' == bound
