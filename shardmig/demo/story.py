"""
The story: four shards migrated under live traffic, release A swapped for release B, one shard switched back.

Every act calls what the command line calls, and says which command that would have been.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psycopg

from shardmig import config as configuration
from shardmig import local
from shardmig.demo import oracle
from shardmig.demo.crew import Crew
from shardmig.demo.logbook import Logbook
from shardmig.demo.seed import seed
from shardmig.demo.tally import Workload
from shardmig.demo.traffic import Traffic
from shardmig.demo.verdict import Verdict
from shardmig.fleet import Fleet
from shardmig.repository import accepted_plans
from shardmig.states import State
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from shardmig.config import Config, Shard
    from shardmig.demo.stage import Stage
    from shardmig.local import Server
    from shardmig.outcomes import Report
    from shardmig.plan import AcceptedPlan

__all__ = ["FAST", "FULL", "Scale", "Story", "migrations_dir", "project"]


@dataclass(frozen=True, slots=True)
class Scale:
    """
    How big the story is.

    Attributes:
        rows: customers a shard, each with an order.
        shards: how many, each a server of its own.
        processes: of each release.
        counters: clerks a process and shard who serve short requests.
        think_s: their mean pause between requests.
        slow_s: the longest a transaction stays open.
        rest_s: pause between such transactions of one clerk of release A, and of release B. A table that is never
            without one lets no ALTER TABLE through, so A's are seldom; drains have to do with all there are, so B's
            come one after the other.
        breath_s: how long each act is watched before the next one.
    """

    rows: int = 20_000
    shards: int = 4
    processes: int = 2
    counters: int = 2
    think_s: float = 0.03
    slow_s: float = 1.5
    rest_s: tuple[float, float] = (5.0, 0.3)
    breath_s: float = 2.0


FULL = Scale()
FAST = Scale(rows=2_000, slow_s=0.6, rest_s=(2.0, 0.1), breath_s=0.5)


def migrations_dir() -> Path:
    """Return the shop's migrations: a wheel carries them in this package, a checkout has them at its top."""
    carried = Path(__file__).parent / "migrations"
    return carried if carried.is_dir() else Path(__file__).parents[2] / "migrations"


def project(servers: Sequence[Server]) -> Path:
    """
    Make a project over the servers, as `shardmig init` would: shardmig.toml and the shop's migrations.

    It lives where the servers live, and goes when they go.
    """
    root = servers[0].socket_dir / "shop"
    shutil.copytree(migrations_dir(), root / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "shardmig.toml").write_text(local.toml(servers), encoding="utf-8")
    return root


@dataclass(slots=True)
class Story:
    """
    The story on running servers.

    Attributes:
        root: the project's directory.
        scale: how big it is.
        stage: where it is shown.
        traffic: what customers saw so far.
        logbook: what happened on each shard so far.
    """

    root: Path
    scale: Scale
    stage: Stage
    traffic: Traffic = field(default_factory=Traffic)
    logbook: Logbook = field(init=False)
    _config: Config = field(init=False)
    _plans: Sequence[AcceptedPlan] = field(init=False)
    _shards: list[Shard] = field(init=False)
    _crews: list[Crew] = field(init=False, default_factory=list)
    _failures: list[str] = field(init=False, default_factory=list)
    _switched_back_ms: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        """Load the project as every verb of the command line does."""
        self._config = configuration.load(self.root / "shardmig.toml")
        self._plans = accepted_plans(self._config)
        self._shards = list(self._config.shards.values())
        moving = {a.plan.revision: a.plan.flag for a in self._plans if a.plan.has_move}
        self.logbook = Logbook(self._config.shards, moving)

    async def tell(self) -> Verdict:
        """
        Tell it from the first table to the verdict.

        Whatever happens, the releases' processes are over when this returns or raises.
        """
        self.stage.show(self.logbook, self.traffic, self._crews)
        try:
            await self._furnish()
            await self._open()
            await self._add_structure()
            await self._swap_releases()
            await self._migrate_canary()
            await self._migrate_rest()
            await self._switch_back_and_forth()
            await self._close()
        finally:
            for crew in self._crews:
                await crew.abandon()
        return Verdict(
            self.traffic,
            self.logbook,
            await asyncio.to_thread(self._disagreements),
            self._failures,
            self._switched_back_ms,
        )

    # ----------------------------------------------------------------------------------------------------------------
    # The acts

    async def _furnish(self) -> None:
        first = self._plans[0].plan.revision
        self.stage.act(f"{self.scale.rows:,} customers and their orders move into each shard")
        await self._apply(self._shards, "--all", upto=first)
        await asyncio.to_thread(self._seed)

    async def _open(self) -> None:
        self.stage.act("The shop opens: release A serves, and knows nothing of what will come")
        await self._start("a")
        await self._watch()

    async def _add_structure(self) -> None:
        self.stage.act("Columns and a table are added under its feet; release A goes on as it is")
        await self._apply(self._shards, "--all", until=Until.STRUCTURE)
        await self._watch()

    async def _swap_releases(self) -> None:
        self.stage.act("Release B asks the shard in every transaction; it replaces A without a pause")
        await self._start("b")
        await self._crews[0].close()
        await self._watch()

    async def _migrate_canary(self) -> None:
        canary = self._shards[0]
        self.stage.act(f"{canary.name} goes first: writers keep both, transactions drain, rows move, readers turn")
        await self._apply([canary], f"--shard {canary.name}", aware="B")
        await self._watch()

    async def _migrate_rest(self) -> None:
        self.stage.act("The others follow in waves; a shard that is done costs one look")
        await self._apply(self._shards, "--all", aware="B")
        await self._watch()

    async def _switch_back_and_forth(self) -> None:
        shard, flag = self._shards[-1], self._plans[1].plan.flag
        self.stage.act(f"Second thoughts: {shard.name} goes back, one commit, and forward again")
        started = time.monotonic()
        await self._switch(shard, flag, State.DUAL, reason="second thoughts")
        self._switched_back_ms = (time.monotonic() - started) * 1000
        await self._watch()
        await self._switch(shard, flag, State.LIVE, reason="all is well")
        await self._watch()

    async def _close(self) -> None:
        self.stage.act("The shop closes, and every row is compared with the oracle")
        await self._crews[-1].close()

    # ----------------------------------------------------------------------------------------------------------------
    # What acts are made of

    async def _watch(self) -> None:
        """Let customers come and go for a while."""
        await asyncio.sleep(self.scale.breath_s)

    async def _start(self, release: Literal["a", "b"]) -> None:
        crew = Crew(release, self.traffic.hear)
        self._crews.append(crew)
        scale = self.scale
        urls = {shard.name: shard.url.get_secret_value() for shard in self._shards}
        rest_s = scale.rest_s[release == "b"]
        workload = Workload(urls, scale.rows, scale.counters, scale.think_s, scale.slow_s, rest_s)
        await crew.open(workload, processes=scale.processes)

    async def _apply(
        self,
        targets: Sequence[Shard],
        named: str,
        *,
        upto: str | None = None,
        until: Until = Until.LIVE,
        aware: str | None = None,
    ) -> None:
        options = [
            upto,
            named,
            None if until is Until.LIVE else f"--until {until.value}",
            None if aware is None else f"--aware {aware}",
        ]
        self.stage.command("shardmig apply " + " ".join(option for option in options if option))
        await self._run(targets, lambda fleet: fleet.apply(upto=upto, until=until, aware=aware))

    async def _switch(self, shard: Shard, flag: str, state: State, *, reason: str) -> None:
        self.stage.command(f'shardmig switch {flag} {state.name} --shard {shard.name} --reason "{reason}"')
        await self._run([shard], lambda fleet: fleet.switch(flag, state), reason=reason)

    async def _run(
        self, targets: Sequence[Shard], work: Callable[[Fleet], Awaitable[Report]], *, reason: str | None = None
    ) -> None:
        fleet = Fleet(
            self._config,
            self._plans,
            targets,
            jobs=self._config.rollout.jobs,
            listener=self.logbook.hear,
            reason=reason,
        )
        started = time.monotonic()
        report = await work(fleet)
        for one in report:
            self.logbook.pages[one.shard].seconds += one.seconds
        if not report.done:
            self._failures += [f"{one.shard}: {one.outcome.value}: {one.reason}" for one in report if one.reason]
        self.stage.reported(report, time.monotonic() - started)

    def _seed(self) -> None:
        """Fill all shards side by side."""

        def fill(shard: Shard) -> None:
            with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as connection:
                seed(connection, self.scale.rows)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(fill, self._shards))

    def _disagreements(self) -> list[str]:
        """Compare every row of every shard with the oracle, in both representations."""
        found = []
        for shard in self._shards:
            with psycopg.connect(shard.url.get_secret_value(), autocommit=True) as connection:
                found += [
                    f"{shard.name}: {row} is {found_there}, must be {truth}"
                    for row, truth, found_there in oracle.disagreements(connection)
                ]
        return found
