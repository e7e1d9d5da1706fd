"""
Traffic that does everything at once to two moving tables, and an oracle that knows what each row must be.

Each transaction decides by flags, as an application does, and writes what it did into the oracle's row last. So whoever
reads a row together with the oracle's, in one snapshot, sees whether the protocol kept its promise.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psycopg
from psycopg import errors as pg

from shardmig import Flag, Flags, State, derivation
from shardmig.errors import WriteRefused
from shardmig.lint import History
from shardmig.plan import Move, Plan, Statement, Switch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from shardmig import View
    from shardmig.config import Lint
    from shardmig.flags.opening import Isolation
    from shardmig.plan import AcceptedPlan

__all__ = ["ADDRESS", "LABEL", "ROWS", "Traffic", "accepted", "disagreements", "prepare"]

LABEL, ADDRESS = Flag("label"), Flag("address")
ROWS = 40
LONG_S = 1.0
_HASH = "0" * 64

# --------------------------------------------------------------------------------------------------------------------
# What is migrated


def plans(*, touch: bool) -> Iterator[Plan]:
    """
    One table whose column moves, and one whose column moves into a second table.

    Args:
        touch: whether the second move touches its source rows, so that writers with one snapshot need not be refused.
    """
    yield Plan(
        revision="0001_shop",
        parent=None,
        flag="shop",
        script_sha256=_HASH,
        steps=(
            Statement(sql="CREATE TABLE item (id bigint PRIMARY KEY, word text)"),
            Statement(sql="CREATE TABLE orders (id bigint PRIMARY KEY, street text)"),
            Switch(to=State.LIVE),
        ),
    )
    one, to_new, to_old = derivation.Shape("item", ("id",)), {"label": "'new ' || word"}, {"word": "substr(label, 5)"}
    yield Plan(
        revision="0002_label",
        parent="0001_shop",
        flag="label",
        script_sha256=_HASH,
        steps=(
            Statement(sql="ALTER TABLE item ADD COLUMN label text"),
            Switch(to=State.DUAL),
            Move(
                table="item",
                key=("id",),
                writes=("label",),
                restores=("word",),
                forward=derivation.forward(one, to_new),
                check=derivation.check(one, to_new, {"label": "TEXT"}),
                back=derivation.back(one, to_old),
                back_check=derivation.back_check(one, to_old, {"word": "TEXT"}),
            ),
            Switch(to=State.LIVE),
        ),
    )
    two = derivation.Shape("orders", ("id",), "order_address", ("order_id",), touch=touch)
    to_new, to_old = {"line": "'new ' || street"}, {"street": "substr(line, 5)"}
    yield Plan(
        revision="0003_address",
        parent="0002_label",
        flag="address",
        script_sha256=_HASH,
        steps=(
            Statement(sql="CREATE TABLE order_address (order_id bigint PRIMARY KEY, line text)"),
            Switch(to=State.DUAL),
            Move(
                table="orders",
                key=("id",),
                target="order_address",
                target_key=("order_id",),
                writes=("line",),
                restores=("street",),
                touch_source=touch,
                forward=derivation.forward(two, to_new),
                check=derivation.check(two, to_new, {"line": "TEXT"}),
                orphans=derivation.orphans(two),
                purge=derivation.purge(two),
                back=derivation.back(two, to_old),
                back_check=derivation.back_check(two, to_old, {"street": "TEXT"}),
            ),
            Switch(to=State.LIVE),
        ),
    )


def accepted(settings: Lint, *, touch: bool) -> list[AcceptedPlan]:
    history, made = History(settings), []
    for plan in plans(touch=touch):
        made.append(history.accept(plan))
        history.add(plan)
    return made


# --------------------------------------------------------------------------------------------------------------------
# The oracle, and how both worlds are read and written


def prepare(connection: psycopg.Connection[Any]) -> None:
    """Make the oracle: a row for each id that may ever be there; NULL means that there is none."""
    for flag in (LABEL, ADDRESS):
        connection.execute(f"CREATE TABLE oracle_{flag.name} (id bigint PRIMARY KEY, value text)")
        connection.execute(f"INSERT INTO oracle_{flag.name} SELECT generate_series(1, {ROWS})")


_READS = {
    (LABEL, False): ("item", "id", "word", ""),
    (LABEL, True): ("item", "id", "label", "new "),
    (ADDRESS, False): ("orders", "id", "street", ""),
    (ADDRESS, True): ("order_address", "order_id", "line", "new "),
}


def disagreements(connection: psycopg.Connection[Any], flag: Flag, state: State, only: int | None = None) -> list[str]:
    """Read rows as one does in this state, beside the oracle, in one statement; list what is not as it was written."""
    table, key, column, prefix = _READS[flag, state.reads_new]
    return [
        f"{flag.name} {state.name}: row {number} reads {read!r}, written was {value!r}"
        for number, there, read, value in connection.execute(
            f"SELECT o.id, r.{key} IS NOT NULL, r.{column}, o.value FROM oracle_{flag.name} o "
            f"LEFT JOIN {table} r ON r.{key} = o.id WHERE %(only)s::bigint IS NULL OR o.id = %(only)s",
            {"only": only},
        )
        if (there, read) != (value is not None, None if value is None else prefix + value)
    ]


class _Row(NamedTuple):
    connection: psycopg.Connection[Any]
    view: View
    number: int

    def hit(self, sql: str, *values: object) -> bool:
        return self.connection.execute(sql, values).rowcount > 0


def _insert_item(row: _Row, value: str) -> bool:
    """Fail where there is such a row."""
    columns = _columns(row, value)
    sql = f"INSERT INTO item (id, {', '.join(columns)}) VALUES ({', '.join(['%s'] * (1 + len(columns)))})"
    return row.hit(sql, row.number, *columns.values())


def _columns(row: _Row, value: str) -> dict[str, str]:
    state, columns = row.view[LABEL], {}
    if state.writes_old:
        columns["word"] = value
    if state.writes_new:
        columns["label"] = "new " + value
    return columns


def _put_item(row: _Row, value: str) -> bool:
    columns = _columns(row, value)
    names, updates = ", ".join(columns), ", ".join(f"{name} = excluded.{name}" for name in columns)
    marks = ", ".join(["%s"] * (1 + len(columns)))
    sql = f"INSERT INTO item (id, {names}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET {updates}"
    return row.hit(sql, row.number, *columns.values())


def _set_item(row: _Row, value: str) -> bool:
    columns = _columns(row, value)
    updates = ", ".join(f"{name} = %s" for name in columns)
    return row.hit(f"UPDATE item SET {updates} WHERE id = %s", *columns.values(), row.number)


def _delete_item(row: _Row, _: str) -> bool:
    return row.hit("DELETE FROM item WHERE id = %s", row.number)


_UPSERT_ADDRESS = "INSERT INTO order_address VALUES (%s, %s) ON CONFLICT (order_id) DO UPDATE SET line = excluded.line"


def _insert_order(row: _Row, value: str) -> bool:
    """Fail where there is such an order; what is left of its address is overwritten."""
    if row.view[ADDRESS] is State.DONE:
        row.hit("INSERT INTO orders (id) VALUES (%s)", row.number)
    return row.view.run(
        ADDRESS,
        old=lambda: row.hit("INSERT INTO orders (id, street) VALUES (%s, %s)", row.number, value),
        new=lambda: row.hit(_UPSERT_ADDRESS, row.number, "new " + value),
    )


def _put_order(row: _Row, value: str) -> bool:
    """Write the order itself in every state; only its street moves."""
    kept = (
        "INSERT INTO orders (id, street) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET street = excluded.street",
        "INSERT INTO orders (id) VALUES (%s) ON CONFLICT (id) DO UPDATE SET id = excluded.id",
    )
    if row.view[ADDRESS] is State.DONE:
        row.hit(kept[1], row.number)
        return row.hit(_UPSERT_ADDRESS, row.number, "new " + value)
    return row.view.run(
        ADDRESS,
        old=lambda: row.hit(kept[0], row.number, value),
        new=lambda: row.hit(_UPSERT_ADDRESS, row.number, "new " + value),
    )


def _set_order(row: _Row, value: str) -> bool:
    """Leave new alone when old has no such row: the upsert would make an address without an order."""
    if row.view[ADDRESS] is State.DONE:
        return row.hit("UPDATE order_address SET line = %s WHERE order_id = %s", "new " + value, row.number)
    found = False

    def old() -> bool:
        nonlocal found
        found = row.hit("UPDATE orders SET street = %s WHERE id = %s", value, row.number)
        return found

    return row.view.run(ADDRESS, old=old, new=lambda: found and row.hit(_UPSERT_ADDRESS, row.number, "new " + value))


def _delete_order(row: _Row, _: str) -> bool:
    gone = row.hit("DELETE FROM orders WHERE id = %s", row.number)
    if gone and row.view[ADDRESS].writes_new:
        row.hit("DELETE FROM order_address WHERE order_id = %s", row.number)
    return gone


_WRITES: dict[Flag, tuple[Callable[[_Row, str], bool], ...]] = {
    LABEL: (_insert_item, _put_item, _put_item, _set_item, _delete_item),
    ADDRESS: (_insert_order, _put_order, _put_order, _set_order, _delete_order),
}

# --------------------------------------------------------------------------------------------------------------------
# Traffic


_LEVELS: tuple[Isolation, ...] = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


class _RolledBack(Exception):
    """The application changed its mind."""


class _Gone(Exception):
    """The transaction was prepared, or its connection broke: nothing is left to end."""


_ENDS: dict[type[Exception], str] = {
    _RolledBack: "rolled back",
    WriteRefused: "refused",
    pg.SerializationFailure: "40001",
    pg.UniqueViolation: "was there",
}
# What somebody else did to a statement: nobody may.
_HINDERED = (pg.QueryCanceled, pg.LockNotAvailable)


@dataclass
class Traffic:
    """
    Threads that read and write until told to stop, here and in processes of their own.

    Attributes:
        url: of the shard.
        shard: its name.
        threads: how many a process; every second one remembers flags for itself.
        processes: how many beside this one. What they saw comes with the end.
        pause_s: longest ordinary pause inside a transaction; a few are ten times as long, and very few take LONG_S.
        lingers: share of pauses that take LONG_S.
        reads: they only read, which a standby lets them.
        seed: of what they do.
        endures: what may happen to a transaction without being a finding, by the name under which it is counted.
        counts: what became of transactions.
        apart: how many of them the other processes ran, each.
        levels: how many transactions there were at each isolation level.
        long: how many stayed open for LONG_S.
        wrong: reads that were not as written; deadlocks and surprises too.
    """

    url: str
    shard: str
    threads: int = 4
    processes: int = 2
    pause_s: float = 0.03
    lingers: float = 0.0015
    reads: bool = False
    seed: int = 1
    endures: dict[type[Exception], str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    long: int = 0
    wrong: list[str] = field(default_factory=list)
    apart: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _workers: list[threading.Thread] = field(default_factory=list)
    _others: list[_Apart] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Begin."""
        for number in range(self.processes):
            how = {"threads": self.threads, "pause_s": self.pause_s, "seed": self.seed + number + 1}
            self._others.append(_Apart(self.url, self.shard, how))
        remembered = [Flags(LABEL, ADDRESS) for _ in range(2)]
        for number in range(self.threads):
            one = _Worker(self, number, remembered[number % 2], self._stop, random.Random(self.seed * 1000 + number))
            self._workers.append(threading.Thread(target=one.run, name=f"traffic {number}", daemon=True))
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait for everybody."""
        self._stop.set()
        for worker in self._workers:
            worker.join(30)
        for seen in [other.ended() for other in self._others]:
            self.apart.append(sum(seen.counts.values()))
            self.counts += seen.counts
            self.levels += seen.levels
            self.long += seen.long
            self.wrong += seen.wrong

    @property
    def transactions(self) -> int:
        return sum(self.counts.values())


class _Seen(NamedTuple):
    """What the traffic of one process has to tell."""

    counts: Counter[str]
    levels: Counter[str]
    long: int
    wrong: list[str]


class _Apart:
    """Traffic in a process of its own, which began with nothing of ours: it reads its flags for itself."""

    def __init__(self, url: str, shard: str, how: dict[str, Any]) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_run_apart, args=(theirs, url, shard, how), daemon=True)
        self._process.start()
        theirs.close()

    def ended(self) -> _Seen:
        """Tell it to stop, and wait for it."""
        self._pipe.send("stop")
        seen: _Seen = self._pipe.recv()
        self._process.join(30)
        return seen


def _run_apart(pipe: Connection, url: str, shard: str, how: dict[str, Any]) -> None:
    with Traffic(url, shard, processes=0, **how) as traffic:
        pipe.recv()
    pipe.send(_Seen(traffic.counts, traffic.levels, traffic.long, traffic.wrong))


class _Worker:
    def __init__(self, traffic: Traffic, number: int, flags: Flags, stop: threading.Event, dice: random.Random) -> None:
        self.traffic = traffic
        self.name = f"w{traffic.seed}-{number}"
        self.flags = flags
        self.stop = stop
        self.dice = dice
        self.counts: Counter[str] = Counter()
        self.serial = 0

    def run(self) -> None:
        connection = self._connect()
        while not self.stop.is_set():
            if connection is None or connection.closed:
                connection = self._connect()
                continue
            what = self._transaction(connection)
            if what in self.traffic.endures.values():
                self.stop.wait(0.01)
            self.counts[what] += 1
            self.traffic.counts[what] += 1  # one addition under the interpreter's lock; off by a few at worst
        if connection is not None:
            connection.close()

    def _connect(self) -> psycopg.Connection[Any] | None:
        """Connect; None where nobody answers and that is endured."""
        try:
            return psycopg.connect(self.traffic.url, autocommit=True)
        except tuple(self.traffic.endures):
            self.stop.wait(0.02)
            return None

    def _transaction(self, connection: psycopg.Connection[Any]) -> str:
        dice = self.dice
        flag, kind = dice.choice((LABEL, ADDRESS)), dice.random()
        isolation = None if self.traffic.reads else dice.choices(_LEVELS, (70, 20, 10))[0]  # a standby has its own
        self.traffic.levels[str(isolation)] += 1
        writes = kind > 0.35 and not self.traffic.reads
        try:
            with self.flags.transaction(
                connection, shard=self.traffic.shard, write=writes, isolation=isolation
            ) as view:
                self._pause()
                if writes:
                    self._write(connection, view, flag)
                    self._end(connection)
                    return "written"
                self._read(connection, view, flag)
                return "read"
        except tuple(_ENDS) as end:
            return _ENDS[type(end)]
        except _Gone as gone:
            return str(gone)
        except pg.DeadlockDetected as error:
            self.traffic.wrong.append(f"deadlock: {error}")
            return "deadlock"
        except Exception as error:  # noqa: BLE001 - a surprise is a finding
            endured = (name for kind, name in self.traffic.endures.items() if isinstance(error, kind))
            if (name := next(endured, "")) and not isinstance(error, _HINDERED):
                return name
            self.traffic.wrong.append(f"{type(error).__name__}: {error}")
            return "surprise"

    def _pause(self) -> None:
        if self.dice.random() < self.traffic.lingers:
            self.traffic.long += 1
            time.sleep(LONG_S)
        elif self.dice.random() < 0.3:
            longest_s = self.traffic.pause_s * (10 if self.dice.random() < 0.03 else 1)
            time.sleep(self.dice.random() * longest_s)

    def _read(self, connection: psycopg.Connection[Any], view: View, flag: Flag) -> None:
        for _ in range(self.dice.randint(1, 3)):
            self.traffic.wrong += disagreements(connection, flag, view[flag], self.dice.randint(1, ROWS))
            self._pause()

    def _write(self, connection: psycopg.Connection[Any], view: View, flag: Flag) -> None:
        """Change one row or two, always in the order of their numbers, so that writers of any state never cross."""
        for number in sorted(self.dice.sample(range(1, ROWS + 1), self.dice.randint(1, 2))):
            self.serial += 1
            value = f"{self.name}-{self.serial}"
            write = self.dice.choice(_WRITES[flag])
            if write(_Row(connection, view, number), value):
                written = None if write in (_delete_item, _delete_order) else value
                connection.execute(f"UPDATE oracle_{flag.name} SET value = %s WHERE id = %s", [written, number])
        if self.dice.random() < 0.2:
            self._pause()

    def _end(self, connection: psycopg.Connection[Any]) -> None:
        """Commit by returning; or roll back, break the connection, or commit in two phases."""
        fate = self.dice.random()
        if fate < 0.06:
            raise _RolledBack
        if fate < 0.07:
            connection.close()
            raise _Gone("connection lost")
        if fate < 0.12:
            gid = f"{self.name}-{self.serial}"
            connection.execute(f"PREPARE TRANSACTION '{gid}'")
            self._pause()
            with suppress(pg.UndefinedObject):
                connection.execute(f"{'COMMIT' if self.dice.random() < 0.8 else 'ROLLBACK'} PREPARED '{gid}'")
            raise _Gone("prepared")
