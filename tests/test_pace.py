"""The servo finds its batch, and the brakes stop a move for what the server cannot keep up with."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moving import customers, moving, notes, same_table
from servers import standby_of

from shardmig import local
from shardmig.config import Pace, Shard
from shardmig.events import BatchDone, Event, Waiting
from shardmig.load import read_load
from shardmig.pace import Brakes, Load, Replica, Servo, Speed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Connect

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
MB = 1 << 20


# --------------------------------------------------------------------------------------------------------------------
# The servo


@pytest.mark.parametrize("us_per_row", [0.5, 4.0, 20.0])
def test_the_servo_is_within_a_fifth_of_its_target_after_twelve_batches(us_per_row: float) -> None:
    pace = Pace(batch_rows_max=100_000)
    servo = Servo(pace)
    for _ in range(12):
        servo.done(servo.rows, servo.rows * us_per_row / 1000)

    took_ms = servo.rows * us_per_row / 1000
    assert 0.8 <= took_ms / pace.batch_target_ms <= 1.2


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_under_noise_batches_take_the_target_on_average(noise: float) -> None:
    """A server that others use: each batch has its own luck, and a part of its time hangs on no row."""
    pace, took_ms = Pace(), []
    for seed in range(20):
        chance, servo = random.Random(seed), Servo(pace)
        for batch in range(60):
            luck = chance.lognormvariate(-(noise**2) / 2, noise)
            elapsed_ms = (0.3 + servo.rows * 0.003) * luck
            servo.done(servo.rows, elapsed_ms)
            if batch >= 12:
                took_ms.append(elapsed_ms)

    assert 0.8 <= statistics.fmean(took_ms) / pace.batch_target_ms <= 1.2


def test_one_slow_batch_shrinks_the_next_at_once_and_is_forgotten() -> None:
    servo = Servo(Pace())
    for _ in range(12):
        servo.done(servo.rows, servo.rows * 0.003)
    before = servo.rows
    servo.done(before, 16.0)

    assert before // 10 == servo.rows
    servo.done(servo.rows, servo.rows * 0.003)
    assert servo.rows == pytest.approx(before * 0.15, abs=2)


def test_a_split_goes_below_the_floor_down_to_one_row_and_climbs_back() -> None:
    servo = Servo(Pace())
    sizes = []
    for _ in range(6):
        servo.too_slow()
        sizes.append(servo.rows)
    assert [50, 12, 3, 1, 1, 1] == sizes
    for _ in range(12):
        servo.done(servo.rows, 0.001)
    assert servo.rows >= 50


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 1e4)), max_size=60))
def test_the_servo_keeps_its_bounds_whatever_happens(happened: list[tuple[bool, float]]) -> None:
    pace = Pace()
    servo = Servo(pace)
    for timed_out, elapsed_ms in happened:
        before = servo.rows
        if timed_out:
            servo.too_slow()
        else:
            servo.done(before, elapsed_ms)
        assert 1 <= servo.rows <= pace.batch_rows_max
        assert servo.rows <= before * 1.5 + 1


def test_a_limit_of_rows_a_second_is_kept_by_resting() -> None:
    servo = Servo(Pace(max_rows_per_s=1000))
    assert servo.pause_s(200, 0.05) == pytest.approx(0.15)
    assert servo.pause_s(200, 0.3) == 0


def test_speed_is_what_happened_lately() -> None:
    speed = Speed()
    assert speed.eta_s(0, 100) is None
    for second in range(30):
        speed.add(1000 if second < 15 else 10, float(second))
    assert speed.rows_per_s == pytest.approx(10, rel=0.2)
    assert speed.eta_s(900, 1000) == pytest.approx(10, rel=0.2)
    assert speed.eta_s(1001, 1000) is None
    assert speed.eta_s(900, None) is None


# --------------------------------------------------------------------------------------------------------------------
# The brakes


def test_nothing_in_the_way_is_no_reason_to_wait() -> None:
    assert Brakes(Pace()).judge(Load(at_s=0.0, written=100)) is None


def test_a_paused_replay_is_measured_by_what_was_written_when() -> None:
    """The server's own figure stands still while replay is paused."""
    brakes = Brakes(Pace(max_replica_lag_s=2))
    said = [brakes.judge(Load(float(t), 1000 * t, (Replica("r", min(1000 * t, 3000), 0.001),))) for t in range(1, 9)]

    assert [None] * 5 == said[:5]
    assert said[5] == "standby r is 2.0 s behind (max_replica_lag_s = 2)" or said[5] is None
    assert said[7] == "standby r is 4.0 s behind (max_replica_lag_s = 2)"
    assert brakes.judge(Load(9.0, 9000, (Replica("r", 9000),))) is None


def test_what_a_standby_lacks_is_dated_by_the_batches_between_two_looks() -> None:
    """Replay stands still from 10.3 s on: at 11.0 s, the first look behind it, the lag is 0.6 s, not 0."""
    brakes = Brakes(Pace(max_replica_lag_s=0.5))
    assert brakes.judge(Load(10.0, 10_000, (Replica("r", 10_000),))) is None
    for at_s in range(10_010, 11_000, 10):  # a batch every 10 ms
        brakes.wrote(at_s / 1000, at_s)

    said = brakes.judge(Load(11.0, 11_000, (Replica("r", 10_300, 0.001),)))
    assert said == "standby r is 0.6 s behind (max_replica_lag_s = 0.5)"
    assert brakes.judge(Load(12.0, 12_000, (Replica("r", 12_000),))) is None


def test_an_idle_standby_is_not_behind() -> None:
    brakes = Brakes(Pace(max_replica_lag_s=2))
    for t in range(10):
        assert brakes.judge(Load(float(t), 500, (Replica("r", 500, 60.0),))) is None


def test_a_standby_that_vanished_is_unknown_until_it_is_back() -> None:
    brakes = Brakes(Pace())
    two = (Replica("walreceiver", 10), Replica("walreceiver", 10))
    assert brakes.judge(Load(0.0, 10, two)) is None

    gone = brakes.judge(Load(1.0, 10, two[:1]))
    assert gone is not None
    assert "standby walreceiver vanished" in gone
    assert brakes.judge(Load(2.0, 10, two)) is None


def test_a_lag_that_this_role_may_not_see_is_unknown() -> None:
    hidden = Load(0.0, 10, (Replica("r", None),))
    assert "GRANT pg_read_all_stats" in (Brakes(Pace()).judge(hidden) or "")
    assert Brakes(Pace(max_replica_lag_s=None)).judge(hidden) is None
    assert Brakes(Pace(max_replica_lag_s=float("inf"))).judge(hidden) is None


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (Load(0.0, 10, slots=(("a", 5 * MB), ("b", 20 * MB))), "replication slot b keeps back 20 MB of WAL"),
        (Load(0.0, 30 * MB, archiving=True, archived=10 * MB), "20 MB of WAL are not archived yet"),
        (Load(0.0, 10, wraparound=7), "autovacuum prevents transaction id wraparound on the table (pid 7)"),
        (Load(0.0, 10, dead_bytes=20 * MB, snapshot_who="pid 9"), "20 MB of dead rows wait for vacuum .*; pid 9 keeps"),
        (Load(0.0, 10, snapshot_s=20.0, snapshot_who="pid 9"), "pid 9 has kept vacuum from removing"),
    ],
)
def test_each_brake_says_why(load: Load, reason: str) -> None:
    tight = Pace(max_slot_wal_mb=10, max_unarchived_mb=10, max_dead_mb=10, max_snapshot_age_s=10)
    off = Pace(max_slot_wal_mb=None, max_unarchived_mb=None, max_dead_mb=None, max_snapshot_age_s=None)

    with pytest.raises(AssertionError, match=reason.replace("(pid 7)", r"\(pid 7\)")):
        raise AssertionError(Brakes(tight).judge(load))
    assert load.wraparound or Brakes(off).judge(load) is None
    assert load.wraparound or Brakes(Pace()).judge(load) is None


def test_before_anything_was_archived_the_move_s_own_wal_counts() -> None:
    brakes = Brakes(Pace(max_unarchived_mb=10))
    assert brakes.judge(Load(0.0, 100 * MB, archiving=True)) is None
    assert "15 MB of WAL are not archived" in (brakes.judge(Load(1.0, 115 * MB, archiving=True)) or "")


# --------------------------------------------------------------------------------------------------------------------
# On real servers


@pytest.fixture
def primary() -> Iterator[local.Server]:
    """Start a server of its own: standbys, slots and archives are the server's, not a database's."""
    with local.Server.start("primary", settings={"wal_keep_size": "64MB", "max_slot_wal_keep_size": "-1"}) as server:
        yield server


async def test_a_server_s_batches_take_the_target_after_twelve(shard: Shard) -> None:
    """The rows themselves say how long each batch took: the first and last clock of the transaction that wrote them."""
    slow = same_table(
        forward="UPDATE t SET b = upper(a), at = clock_timestamp() WHERE {batch} AND pg_sleep(0.0005)::text = ''"
    )
    pace = Pace(batch_target_ms=30, batch_rows=5, batch_rows_min=1)
    stamped = "ALTER TABLE t ADD COLUMN at timestamptz"
    async with moving(shard, slow, T, stamped, customers(1500)) as here:
        assert await here.run(pace=pace).run()
        batches = await here.rows(
            "SELECT (extract(epoch FROM max(at) - min(at)) * 1000)::float8 FROM t GROUP BY xmin ORDER BY min(at)"
        )

        settled = [took_ms for (took_ms,) in batches[12:-1]]
        assert len(settled) > 5
        assert 0.8 <= statistics.fmean(settled) / pace.batch_target_ms <= 1.2


async def test_the_batch_behind_a_slow_one_is_small_already(shard: Shard) -> None:
    """Its end was looked for before anybody knew: what was found is thrown away."""
    asleep = "CASE id WHEN 1500 THEN pg_sleep(0.5)::text = '' ELSE true END"
    stumbling = same_table(forward=f"UPDATE t SET b = upper(a) WHERE {{batch}} AND {asleep}")
    async with moving(shard, stumbling, T, customers(3000)) as here:
        heard, listen = notes()
        assert await here.run(pace=Pace(batch_rows_min=1, batch_rows_max=400), listener=listen).run()

        sizes = [event.rows for event in heard if isinstance(event, BatchDone)]
        slow = next(n for n in range(len(sizes)) if sum(sizes[: n + 1]) >= 1500)
        assert sizes[slow] // 10 == sizes[slow + 1]


def shard_on(server: local.Server) -> Shard:
    return Shard.model_validate({"name": "eu1", "url": server.create_database("shop")})


async def test_a_standby_that_pauses_or_vanishes_stops_a_move_which_goes_on_by_itself(
    primary: local.Server, connect: Connect
) -> None:
    shard = shard_on(primary)
    pace = Pace(max_replica_lag_s=0.5, max_rows_per_s=2000)
    with standby_of(primary) as standby:
        async with moving(shard, same_table(), T, customers(20_000)) as here:
            replay = connect(standby)
            heard, listen = notes()
            run = asyncio.create_task(here.run(pace=pace, listener=listen).run())
            await until(heard, BatchDone)
            replay.execute("SELECT pg_wal_replay_pause()")
            paused_at = time.monotonic()
            said = (await until(heard, Waiting)).reason
            stopped_after_s = time.monotonic() - paused_at
            assert "s behind (max_replica_lag_s = 0.5)" in said
            assert 0.5 < stopped_after_s < 2
            heard.clear()
            replay.execute("SELECT pg_wal_replay_resume()")
            await until(heard, BatchDone)

            heard.clear()
            replay.close()
            standby.stop("immediate")
            assert "vanished" in (await until(heard, Waiting)).reason
            heard.clear()
            standby.restart()
            await until(heard, BatchDone)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run


async def test_batches_note_how_far_the_server_has_written(shard: Shard) -> None:
    """Half a second of batches, one look: some servers say themselves what a paused standby lacks, not all do."""
    async with moving(shard, same_table(), T, customers(200)) as here:
        run = here.run(pace=Pace(batch_rows=20, batch_rows_min=20, batch_rows_max=20, max_rows_per_s=400))
        assert await run.run()

        noted = list(run._rest._brakes._written)
        assert 3 <= len(noted) <= 6
        assert noted == sorted(set(noted))
        assert noted[-1][1] - noted[0][1] > 1000


async def until(heard: list[Event], kind: type[Any]) -> Any:
    async with asyncio.timeout(15):
        while not any(isinstance(event, kind) for event in heard):
            await asyncio.sleep(0.01)
    return next(event for event in heard if isinstance(event, kind))


async def test_what_the_server_keeps_back_is_seen(primary: local.Server, connect: Connect) -> None:
    """A slot that nobody reads, an archive that never works, dead rows, and a reader that pins them."""
    primary.restart(settings={"archive_mode": "on", "archive_command": "false"})
    shard = shard_on(primary)
    connect(shard).execute("SELECT pg_create_physical_replication_slot('forgotten', true)")
    async with moving(shard, same_table(), T, customers(20_000)) as here:
        before = await read_load(here.session, here.move)
        reader = connect(shard)
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        assert await here.run(pace=Pace(max_unarchived_mb=None)).run()
        async with asyncio.timeout(15):  # a backend tells of the rows that it left dead when it likes
            while (load := await read_load(here.session, here.move)).dead_bytes <= MB / 2:
                await asyncio.sleep(0.05)

        [(slot, kept)] = load.slots
        assert slot == "forgotten"
        assert kept >= load.written - before.written > MB
        assert (True, None) == (load.archiving, load.archived)
        assert load.snapshot_s is not None
        assert load.snapshot_who == f"pid {reader.info.backend_pid} of role postgres"
        assert "slot forgotten keeps back" in (Brakes(Pace(max_slot_wal_mb=0.5)).judge(load) or "")


async def test_the_archive_s_position_is_read_from_its_last_segment(primary: local.Server, connect: Connect) -> None:
    primary.restart(settings={"archive_mode": "on", "archive_command": "true"})
    shard = shard_on(primary)
    async with moving(shard, same_table(), T, customers(100)) as here:
        psql = connect(shard)
        switched = psql.execute("SELECT (pg_switch_wal() - '0/0')::bigint").fetchone()
        assert switched is not None
        async with asyncio.timeout(10):
            while not psql.execute("SELECT FROM pg_stat_archiver WHERE archived_count > 0").fetchall():
                await asyncio.sleep(0.02)
        load = await read_load(here.session, here.move)

        assert load.archived is not None
        assert 0 <= load.archived - switched[0] <= 16 * MB


async def test_a_role_that_may_not_look_sees_unknown_standbys_not_none(primary: local.Server, connect: Connect) -> None:
    shard = shard_on(primary)
    psql = connect(shard)
    psql.execute("CREATE ROLE weak LOGIN; GRANT CREATE ON DATABASE shop TO weak; GRANT ALL ON SCHEMA public TO weak")
    url = shard.url.get_secret_value().replace("//postgres", "//weak")
    with standby_of(primary):
        async with moving(shard.model_copy(update={"url": type(shard.url)(url)}), same_table(), T) as here:
            load = await read_load(here.session, here.move)

            assert [None] == [replica.replayed for replica in load.replicas]
            assert "is not visible to this role" in (Brakes(Pace()).judge(load) or "")
