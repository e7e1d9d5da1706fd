"""The stage of a story: server and standby, two shards with applications, a project, and runs of its command line."""

from __future__ import annotations

import random
import re
import signal
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
from torture import Traffic

from chaos.forking import PATIENCE_S
from chaos.history import SEED, History
from shardmig import local
from shardmig.errors import NotPrimary, ShardInMaintenance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chaos.forking import Forker, Run

__all__ = ["SHARDS", "Stage"]

SHARDS = ("eu1", "eu2")
_ENDURED: dict[type[Exception], str] = {
    ShardInMaintenance: "closed",
    NotPrimary: "cut",
    psycopg.OperationalError: "cut",
    psycopg.InterfaceError: "cut",
}
_CODES = {0, 1, 2, 130, -signal.SIGKILL, -signal.SIGINT}


@dataclass
class Stage:
    """
    Where a story is played.

    Attributes:
        forker: of the command line.
        place: an empty directory.
        seed: of everything that is thrown.
        wrong: what was found.
        timeline: what was done, and when.
        counts: how often what was done.
    """

    forker: Forker
    place: Path
    seed: int
    wrong: list[str] = field(default_factory=list)
    timeline: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    standby: local.Server | None = None
    traffic: dict[str, Traffic] = field(default_factory=dict)
    failed_over: bool = False
    _began: float = field(default_factory=time.monotonic)
    _runs: list[Run] = field(default_factory=list)
    _heard: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Throw what the story is about; every second one has a standby."""
        self.dice = random.Random(self.seed)
        self.history = History.drawn(self.dice)
        self.root = self.place / "project"

    @contextmanager
    def stage(self) -> Iterator[None]:
        with ExitStack() as stack:
            self.server = stack.enter_context(local.Server.start("chaos", settings={"deadlock_timeout": "500ms"}))
            for shard in SHARDS:
                self.server.create_database(shard)
            if self.seed % 2:
                self.standby = self.server.standby("behind", settings={"wal_retrieve_retry_interval": "100ms"})
                stack.callback(self.standby.close)
            self.write_project()
            self.say("seed", f"{self.seed}: {', '.join(self.history.scripts)}; standby: {self.standby is not None}")
            self.must("apply", "0001_shop", "--all")
            for shard in SHARDS:
                with self.connected(shard) as connection:
                    connection.execute(SEED)
            for number, shard in enumerate(SHARDS):
                self.traffic[shard] = stack.enter_context(self._traffic(shard, threads=4 - number))
            if self.standby is not None:
                shard = SHARDS[0]
                behind = self._traffic(shard, url=self.standby.url(shard), threads=1, reads=True)
                self.traffic["standby"] = stack.enter_context(behind)
            yield
            for run in self._runs:
                run.send(signal.SIGCONT)
                run.send(signal.SIGKILL)

    def _traffic(self, shard: str, url: str | None = None, **how: Any) -> Traffic:
        seed = self.seed + len(self.traffic)
        return Traffic(
            url or self.url(shard), shard, processes=0, pause_s=0.1, lingers=0.03, seed=seed, endures=_ENDURED, **how
        )

    def url(self, shard: str) -> str:
        """Name whichever server takes writes."""
        servers = [server for server in (self.server, self.standby) if server is not None]
        hosts = ",".join(quote(str(server.socket_dir), safe="") for server in servers)
        ports = ",".join(str(server.port) for server in servers)
        return f"postgresql://postgres@/{shard}?host={hosts}&port={ports}&target_session_attrs=read-write"

    @contextmanager
    def connected(self, shard: str) -> Iterator[psycopg.Connection[Any]]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                connection = psycopg.connect(self.url(shard), autocommit=True, connect_timeout=5)
                break
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, "the server does not come back"
                time.sleep(0.05)
        with connection:
            yield connection

    def write_project(self) -> None:
        (self.root / "migrations").mkdir(parents=True)
        for revision, text in self.history.scripts.items():
            (self.root / "migrations" / f"{revision}.py").write_text(text)
        (self.root / "migrations" / "HEAD").write_text(f"{revision}\n")
        pace = self.dice.choice([30, 5000])  # to meet a move under way, or whoever is still open when it is over
        shards = "".join(
            f'[shards.{shard}]\nurl = "{self.url(shard)}"\n' + ('wave = "canary"\n' if shard == SHARDS[0] else "")
            for shard in SHARDS
        )
        (self.root / "shardmig.toml").write_text(
            f"[pace]\nbatch_rows = 5\nbatch_rows_min = 1\nbatch_rows_max = 5\nmax_rest_s = 4\nmax_rows_per_s = {pace}\n"
            "[session]\ndrain_timeout_s = 4\nlock_wait_s = 4\nconnect_timeout_s = 3\n"
            "[rollout]\npark_after_s = 2\nrequire_aware = false\n" + shards
        )
        self.must("plan")

    @property
    def primary(self) -> local.Server:
        return self.standby if self.failed_over and self.standby is not None else self.server

    @property
    def transactions(self) -> int:
        return sum(traffic.transactions for traffic in self.traffic.values())

    def summary(self) -> list[str]:
        """Count what was done, and what became of transactions."""
        ended = {shard: dict(traffic.counts) for shard, traffic in self.traffic.items()}
        return [f"{self.transactions} transactions: {ended}", f"acts: {self.counts}", *self.wrong]

    # -- telling -------------------------------------------------------------------------------------------------------

    def say(self, what: str, more: str = "") -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        self.timeline.append(f"{time.monotonic() - self._began:6.2f} {what} {more}".rstrip())

    def found(self, what: str) -> None:
        self.say("FOUND", what)
        self.wrong.append(what)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def start(self, *arguments: str) -> Run:
        run = self.forker.start(*arguments, cwd=self.root)
        self._runs.append(run)
        self.say(arguments[0], f"{' '.join(arguments[1:])} (pid {run.pid})")
        return run

    def finish(self, run: Run, within_s: float = PATIENCE_S) -> Run:
        if not run.wait(within_s):
            self.found(f"{' '.join(run.arguments)} hangs for {within_s:.0f} s: {run.said[-600:]}")
            run.send(signal.SIGKILL)
            run.wait()
        self.hear()
        return run

    def must(self, *arguments: str) -> Run:
        """Run something that nobody disturbs and that cannot fail."""
        run = self.finish(self.start(*arguments))
        if run.code != 0:
            self.found(f"{' '.join(arguments)} exits {run.code}: {run.said[-1500:]}")
        return run

    def hear(self) -> None:
        """Read what ended runs said: whatever happened to them, they know what to say."""
        for run in self._runs:
            if run.pid in self._heard or run.code is None:
                continue
            self._heard.add(run.pid)
            said = run.said
            words = re.sub(r"\s+", " ", said)[-300:]
            self.say(" ended", f"{run.arguments[0]} (pid {run.pid}): {run.code} {words}")
            if "Traceback" in said or "unexpected " in said or run.code not in _CODES:
                self.found(f"{' '.join(run.arguments)} exits {run.code}: {said[-2500:]}")

    def running(self) -> list[Run]:
        return [run for run in self._runs if run.code is None]
