"""
The whole protocol on a real server, under traffic that does everything at once.

`SHARDMIG_TORTURE_CYCLES=50 pytest -m long -s tests/test_torture.py` walks the whole graph fifty times, CI
a few times.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from torture import ADDRESS, LABEL, Traffic, accepted, disagreements, prepare

from shardmig import State, switching
from shardmig.errors import CheckFailed
from shardmig.events import FlagSwitched
from shardmig.runner import Run
from shardmig.session import open_session
from shardmig.todo import Until, pending

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import psycopg
    from conftest import Connect

    from shardmig.config import Config, Shard
    from shardmig.events import Event

pytestmark = pytest.mark.long

CYCLES = int(os.environ.get("SHARDMIG_TORTURE_CYCLES", "6"))
CYCLE = (State.DUAL, State.LIVE, State.DONE, State.LIVE, State.DUAL, State.OLD)
VERSIONS = (12, 19)


class Walk:
    """A runner on one shard, and what it has seen."""

    def __init__(self, run: Run, look: psycopg.Connection[Any], flips: list[FlagSwitched], *, touches: bool) -> None:
        self.run = run
        self.touches = touches
        self.look = look
        self.flips = flips
        self.wrong: list[str] = []

    async def cycle(self) -> None:
        """Take both flags through every state and back, and compare all rows at each."""
        for target in CYCLE:
            for flag in (LABEL, ADDRESS):
                await self.run.walk(flag.name, target)
                self.wrong += disagreements(self.look, flag, target)


@pytest.fixture
async def walk(
    request: pytest.FixtureRequest, shard: Shard, config: Callable[..., Config], connect: Connect
) -> AsyncIterator[Walk]:
    settings = config(pace={"batch_rows": 8, "batch_rows_min": 1, "batch_rows_max": 8})  # several batches a move
    flips: list[FlagSwitched] = []

    def hear(event: Event) -> None:
        if isinstance(event, FlagSwitched):
            flips.append(event)

    look = connect(shard)
    async with open_session(shard, settings.session, pg_versions=VERSIONS) as session:
        run = Run(session, settings, accepted(settings.lint, touch=touches(request)), listener=hear)
        records = await run.records()
        todo, _ = pending(run.plans, records, until=Until.STRUCTURE)
        await run.apply(todo, records)
        prepare(look)
        yield Walk(run, look, flips, touches=touches(request))


def touches(request: pytest.FixtureRequest) -> bool:
    return bool(getattr(request, "param", False))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("walk", [False, True], indirect=True, ids=["one snapshot refused", "source touched"])
async def test_no_write_is_lost_and_no_read_is_wrong_whatever_happens(walk: Walk, shard: Shard) -> None:
    began = time.monotonic()
    with Traffic(shard.url.get_secret_value(), shard.name) as traffic:
        for _ in range(CYCLES):
            await walk.cycle()
    for flag in (LABEL, ADDRESS):
        walk.wrong += disagreements(walk.look, flag, State.OLD)

    print(f"\n{CYCLES} cycles, {len(walk.flips)} flips, {traffic.transactions} transactions, "  # noqa: T201
          f"{time.monotonic() - began:.0f} s: {dict(traffic.counts)}, {traffic.long} long, "
          f"{dict(traffic.levels)}, {traffic.apart} in other processes")  # fmt: skip
    assert [] == traffic.wrong[:20]
    assert [] == walk.wrong[:20]
    assert len(walk.flips) == 12 * CYCLES
    assert traffic.long
    assert all(traffic.apart), "each process of its own wrote, too"
    assert 3 == len(traffic.levels)
    refused = set() if walk.touches else {"refused"}
    expected = {"written", "read", "rolled back", "prepared", "40001", "was there", "connection lost"} | refused
    assert expected == set(traffic.counts)


async def test_without_the_drain_the_same_traffic_finds_wrong_rows(
    walk: Walk, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_waited_for(*_: object, **__: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(switching, "drain_shard", not_waited_for)
    began, cycles = time.monotonic(), 0
    with Traffic(shard.url.get_secret_value(), shard.name, pause_s=0.1) as traffic:
        while time.monotonic() < began + 60 and not traffic.wrong and not walk.wrong:
            try:
                await walk.cycle()
            except CheckFailed as failed:  # a writer of old came after the repair
                walk.wrong.append(str(failed))
            cycles += 1

    print(f"\n{cycles} cycles, {traffic.transactions} transactions: {(traffic.wrong + walk.wrong)[:3]}")  # noqa: T201
    harms = ("reads", "disagree", "would change rows")  # the last: the look at all rows before DONE
    assert any(harm in line for line in [*traffic.wrong, *walk.wrong] for harm in harms)
