"""The story: what an operator does, when he rests and looks, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg

from chaos.looks import look_at
from chaos.stage import SHARDS, Stage
from shardmig import State

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Chaos"]

_END = """
SELECT pg_terminate_backend(pid), application_name FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
ORDER BY (application_name LIKE 'shardmig%%') DESC, random() LIMIT %s"""
_ACTS_A_LOOK = 5
_PREPARED_S = 2  # an application that lives has ended by then what it prepared


@dataclass
class Chaos(Stage):
    """
    One story.

    Attributes:
        cut_off: the standby hears nothing any more.
        closed: the operator has set maintenance.
        amended: revisions whose plans were amended.
    """

    cut_off: bool = False
    closed: bool = False
    amended: set[str] = field(default_factory=set)

    def play(self, acts: int) -> None:
        """Play it: so many acts, a look after every few, and the end, which must be a happy one."""
        with self.stage():
            self._apply()
            for number in range(1, acts + 1):
                self._act()
                if number % _ACTS_A_LOOK == 0:
                    self._look()
            self._end()

    # -- acts ----------------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        self.hear()
        acts: list[tuple[int, Callable[[], None]]] = [
            (4 if self.running() else 9, self._apply),
            (4, self._switch),
            (2, self._pause),
            (2, self._maintain),
            (2, self._terminate),
            (1, self._crash),
            (1, self._amend),
            (1, self._verify),
            (1, self._by_hand),
        ]
        if self.running():
            acts += [(8, self._signal)]
        if self.standby is not None and not self.failed_over:
            acts += [(2, self._fail_over)]
        weights, todo = zip(*acts, strict=True)
        [act] = self.dice.choices(todo, weights)
        act()
        time.sleep(self.dice.random() ** 2 * 1.5)
        self._resolve()

    def _where(self) -> list[str]:
        return self.dice.choice([["--all"], ["--all"], ["--shard", "eu1"], ["--shard", "eu2"]])

    def _apply(self) -> None:
        until = self.dice.choice([[], [], [], ["--until", self.dice.choice(["structure", "dual", "moved", "filled"])]])
        over = ["--take-over"] if self.dice.random() < 0.25 else []
        upto = [self.dice.choice(list(self.history.scripts))] if self.dice.random() < 0.2 else []
        self.start("apply", *upto, *self._where(), *until, *over)

    def _switch(self) -> None:
        there = self._flags(self.dice.choice(SHARDS), below=4)[1:]  # of the shop nobody thinks
        flag = self.dice.choice(there or self.history.flags[1:])
        state = self.dice.choice(["OLD", "DUAL", "DUAL", "LIVE", "LIVE", "LIVE", "DONE"])
        more = [option for option in ("--take-over", "--recheck") if self.dice.random() < 0.25]
        self.start("switch", flag, state, *self._where(), "--yes", *more)

    def _pause(self) -> None:
        flag = self.dice.choice(["label", "address"])
        self.finish(self.start(self.dice.choice(["pause", "resume", "resume"]), flag, *self._where()))

    def _maintain(self) -> None:
        mode = "off" if self.closed else self.dice.choice(["on", "read-only"])
        self.closed = mode != "off"
        self.start("maintenance", mode, "--all", "--reason", "chaos")

    def _terminate(self) -> None:
        """End some sessions, whosever they are."""
        with self.connected(self.dice.choice(SHARDS)) as connection, suppress(psycopg.OperationalError):
            ended = connection.execute(_END, [self.dice.randint(1, 3)]).fetchall()
            self.say("terminate", ", ".join(name for _, name in ended))

    def _crash(self) -> None:
        self.say("crash")
        self.primary.stop("immediate")
        time.sleep(self.dice.random())
        self.primary.restart("immediate")

    def _fail_over(self) -> None:
        """Cut the standby off from what is committed; the next time, let it take over."""
        assert self.standby is not None
        if not self.cut_off:
            self.say("cut off")
            with psycopg.connect(self.standby.url(), autocommit=True) as connection:
                connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
                connection.execute("SELECT pg_reload_conf()")
            self.cut_off = True
            return
        self.say("failover")
        self.server.stop("immediate")
        with psycopg.connect(self.standby.url(), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        self.failed_over = True

    def _amend(self) -> None:
        """Write what moves in other words; where that is refused, take it back."""
        flag = self.dice.choice(["label", "address"])
        revision = self.history.of(flag)
        script = self.root / "migrations" / f"{revision}.py"
        plan = script.with_suffix(".sql")
        if revision in self.amended:
            return
        before = script.read_text(), plan.read_text()
        [digest] = re.findall(r"^--! plan: (\w+)$", before[1], re.MULTILINE)
        other = re.sub(r"'new ' \|\| (\w+)", r"concat('new ', \1)", before[0])
        script.write_text(other.replace("\n\n\ndef upgrade", f'\namends = ("{digest}",)\n\n\ndef upgrade', 1))
        self.must("plan", revision)
        run = self.finish(self.start("amend", revision, "--all", "--reason", "chaos"))
        # One of the two may have it; then it stays, and the other gets it at the end.
        if run.code == 0 or any(self._begun(shard, revision) not in {digest, None} for shard in SHARDS):
            self.amended.add(revision)
            return
        script.write_text(before[0])
        plan.write_text(before[1])

    def _begun(self, shard: str, revision: str) -> str | None:
        """Return the hash of the plan that was begun on a shard."""
        with self.connected(shard) as connection:
            sql = "SELECT sha256 FROM shardmig.migration WHERE revision = %s"
            found = connection.execute(sql, [revision]).fetchone()
        return str(found[0]) if found else None

    def _verify(self) -> None:
        self.start("verify", "--all", "--data", self.dice.choice(["label", "address"]))

    def _by_hand(self) -> None:
        """Type a switch into psql; the ledger says whether that is lawful."""
        flag, state = self.dice.choice(["label", "address"]), self.dice.choice(["OLD", "DUAL", "LIVE"])
        with self.connected(self.dice.choice(SHARDS)) as connection:
            said = "done"
            try:
                connection.execute("SELECT shardmig.switch(%s, %s, 'chaos')", [flag, state])
            except psycopg.Error as error:
                said = str(error).split("\n", maxsplit=1)[0]
        self.say("psql", f"{flag} {state}: {said}")

    def _signal(self) -> None:
        run = self.dice.choice(self.running())
        how = self.dice.choice(["KILL", "KILL", "INT", "INT INT", "STOP"])
        time.sleep(max(run.began_s + 0.1 - time.monotonic(), 0.0))  # until it is the program
        self.say("signal", f"{how} to {run.arguments[0]} (pid {run.pid})")
        if how == "STOP":
            run.send(signal.SIGSTOP)
            time.sleep(self.dice.random())
            run.send(signal.SIGCONT)
            return
        for number in how.split():
            run.send(signal.Signals[f"SIG{number}"])
            time.sleep(0.05)

    def _resolve(self) -> None:
        """End what was prepared and left by an application that lost its connection."""
        for shard in SHARDS:
            with self.connected(shard) as connection, suppress(psycopg.Error):
                for (gid,) in connection.execute(
                    "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() "
                    "AND prepared < clock_timestamp() - make_interval(secs => %s)",
                    [_PREPARED_S],
                ).fetchall():
                    connection.execute(f"ROLLBACK PREPARED '{gid}'")

    def _held(self, shard: str) -> list[str]:
        with self.connected(shard) as connection:
            rows = connection.execute("SELECT flag FROM shardmig.flag WHERE state < 2 ORDER BY revision").fetchall()
        return [flag for (flag,) in rows]

    # -- looks ---------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Wait until nobody works, then compare everything with everything."""
        for run in self.running():
            if not run.wait(15):
                self.say("signal", f"INT to {run.arguments[0]} (pid {run.pid}), for a look")
                run.send(signal.SIGINT)
        for run in self.running():
            self.finish(run, 30)
        self.hear()
        run = self.finish(self.start("status", "--all", "-o", "json"))
        if run.code != 0:
            self.found(f"status exits {run.code}: {run.said[-800:]}")
            return
        told = {one["shard"]: one for one in json.loads((run.place / "out").read_text())["shards"]}
        for shard in SHARDS:
            with self.connected(shard) as connection:
                for one in look_at(connection, self.history, told[shard]):
                    self.found(f"{shard}: {one}")
        for name, traffic in self.traffic.items():
            read, traffic.wrong[:] = list(traffic.wrong), []
            for one in read[:5]:
                self.found(f"{name}: {one}")

    # -- the end -------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Take all hindrances away: a plain apply then finishes what people do not hold, and all is as planned."""
        self.say("the end")
        if self.cut_off and not self.failed_over:
            self._fail_over()
        for run in self.running():
            run.send(signal.SIGINT)
        for run in self.running():
            self.finish(run, 30)
        self._look()
        self._free()
        for _ in range(3):
            if self.finish(self.start("apply", "--all")).code == 0:
                break
            # Somebody switched it back, or has to fill it; the canary goes first, and the other waits for it.
            for shard in SHARDS:
                for flag in self._flags(shard, below=State.LIVE):
                    self.finish(self.start("switch", flag, "LIVE", "--shard", shard))
        self.must("apply", "--all")
        self._look()
        self._verified()

    def _verified(self) -> None:
        """See that everything is open, and as the plans and the moves make it."""
        for shard in SHARDS:
            with self.connected(shard) as connection:
                if connection.execute("SELECT FROM shardmig.shard WHERE maintenance > 0").fetchall():
                    self.found(f"{shard} is still closed")
        for flag in ("label", "address"):
            verified = self.finish(self.start("verify", "--all", "--data", flag))
            in_vain = "2 shards look as" in verified.said and "only new counts" in verified.said
            if verified.code != 0 and not (in_vain and "disagree" not in verified.said):
                self.found(f"verify of {flag} exits {verified.code}: {verified.said[-1500:]}")

    def _free(self) -> None:
        """
        Let go of what the operator and applications hold.

        What people closed they open, also where a failover closed it again; what a runner closed, apply opens.
        """
        for shard in SHARDS:
            with self.connected(shard) as connection:
                closed = connection.execute("SELECT FROM shardmig.shard WHERE reason = 'chaos'").fetchall()
            if closed:
                self.must("maintenance", "off", "--shard", shard)
        for flag in ("label", "address"):
            self.finish(self.start("resume", flag, "--all"))
        for revision in self.amended:
            self.must("amend", revision, "--all", "--reason", "chaos")
        time.sleep(_PREPARED_S)
        self._resolve()

    def _flags(self, shard: str, *, below: int) -> list[str]:
        """Name a shard's flags in states below one, in the order of their revisions."""
        sql = "SELECT flag FROM shardmig.flag WHERE state < %s ORDER BY revision"
        with self.connected(shard) as connection:
            return [flag for (flag,) in connection.execute(sql, [below]).fetchall()]
