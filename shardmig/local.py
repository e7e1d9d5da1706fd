"""
Throw-away PostgreSQL servers: real ones, for the demo, for scratch shards and for tests.

    with local.cluster(["eu1", "us1"]) as servers:
        url = servers[0].create_database("shop")

Nothing of them survives their maker (`shardmig.watchdog`). The data is worth nothing, so durability is off by default:
never keep anything in such a server.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from shardmig.binaries import Binaries, find_binaries, reachable, unprivileged
from shardmig.config import Shard
from shardmig.errors import LocalServerError
from shardmig.watchdog import Den

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["Binaries", "Mode", "Server", "cluster", "find_binaries", "shards", "toml"]

Mode = Literal["smart", "fast", "immediate"]

# pg_ctl's three ways to stop ("Shutting Down the Server").
_SIGNALS: dict[Mode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

_SETTINGS: dict[str, str | int] = {
    # Worthless data may be lost: no write waits for a disk.
    "fsync": "off",
    "full_page_writes": "off",
    "wal_init_zero": "off",
    "wal_recycle": "off",
    # What a real shard allows.
    "wal_level": "replica",
    "max_connections": 100,
    "max_prepared_transactions": 20,
    # Quiet: an autovacuum or a checkpoint at a random moment makes a test a lottery.
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "log_checkpoints": "off",
    "jit": "off",
    # Small.
    "shared_buffers": "32MB",
    "max_logical_replication_workers": 0,
    # Kept as files beside the data, so that they vanish with it even after a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
}
_SETTINGS_SINCE: dict[int, dict[str, str | int]] = {18: {"io_method": "sync"}}  # three processes fewer a server

_START_TIMEOUT_S = 60.0


class Server:
    """
    One running PostgreSQL server, gone when it is closed or its maker ends.

    Usable from several threads. `Server.start()` begins one, `cluster()` several.

    Attributes:
        name: given by the caller, unique among servers started together.
        port: of the socket's name, and of 127.0.0.1 if TCP was asked for.
        password: of the role `postgres`, asked for over TCP only.
        data: the data directory.
        log: the server's log.
        settings: what `restart()` writes into the configuration; `ALTER SYSTEM` still goes above it.
    """

    def __init__(self, home: _Home, name: str, *, port: int, tcp: bool) -> None:
        self.name = name
        self.port = port
        self.password = home.password
        self.data = home.den.path / name
        self.log = home.den.path / f"{name}.log"
        self.settings: dict[str, str | int] = {
            **_SETTINGS,
            "port": port,
            "listen_addresses": "127.0.0.1" if tcp else "",
            "unix_socket_directories": str(home.den.path),
        }
        self._home = home
        self._alone = False
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls,
        name: str = "server",
        *,
        settings: Mapping[str, str | int] | None = None,
        tcp: bool = False,
        binaries: Binaries | None = None,
    ) -> Server:
        """
        Start one server, ready for connections on return.

        Args:
            name: shows in its log's name and in `shards()`.
            settings: PostgreSQL's settings above ours: `{"fsync": "on", "max_connections": 500}`.
            tcp: also listen on 127.0.0.1 at a free port, with a random password.
            binaries: which PostgreSQL; what `find_binaries` finds by default.

        Raises:
            LocalServerError: no binaries, or the server did not start; the message ends with its log.
        """
        with _homely(binaries) as home:
            server = home.launch(name, settings=settings, tcp=tcp)
            server._alone = True  # noqa: SLF001 - its own class
            return server

    def __enter__(self) -> Self:
        """Return the running server; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the server and remove its data."""
        self.close()

    def __repr__(self) -> str:
        """Show name, version and where it can be reached."""
        return f"<Server {self.name}: PostgreSQL {self.version} at {self.url()}>"

    @property
    def version(self) -> str:
        """PostgreSQL's version, such as "18.6"."""
        return self._home.binaries.version

    @property
    def major(self) -> int:
        """PostgreSQL's major version, such as 18."""
        return self._home.binaries.major

    @property
    def socket_dir(self) -> Path:
        """Directory of the unix socket, libpq's `host`; only its owner and root can enter it."""
        return self._home.den.path

    @property
    def pid(self) -> int:
        """
        The postmaster's process number.

        Raises:
            LocalServerError: the server does not run.
        """
        if not self.running or self._process is None:
            raise LocalServerError(f"the server {self.name} does not run; `restart()` starts it")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self._process is not None and self._process.poll() is None

    def url(
        self, database: str = "postgres", *, role: str | None = None, password: str | None = None, tcp: bool = False
    ) -> str:
        """
        Return a libpq URL; through the socket no password is asked for.

        Args:
            database: its name.
            role: who connects; the superuser `postgres` by default.
            password: the role's, for TCP; the superuser's is known.
            tcp: through 127.0.0.1, if the server was started with `tcp=True`.
        """
        user = quote(role or "postgres", safe="")
        if not tcp:
            return (
                f"postgresql://{user}@/{quote(database, safe='')}?host={quote(str(self.socket_dir))}&port={self.port}"
            )
        if not self.settings["listen_addresses"]:
            raise LocalServerError(f"the server {self.name} has no TCP port; start it with tcp=True")
        secret = password if role else self.password
        login = user if secret is None else f"{user}:{quote(secret, safe='')}"
        return f"postgresql://{login}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def create_database(self, name: str, *, template: str | None = None, owner: str | None = None) -> str:
        """
        Create a database and return its URL.

        Args:
            name: of the new database.
            template: database to copy, which nobody may be connected to; PostgreSQL's `template1` by default.
            owner: role that owns it; `postgres` by default.
        """
        clauses: list[sql.SQL | sql.Composed] = [sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))]
        if template is not None:
            clauses.append(sql.SQL("TEMPLATE {}").format(sql.Identifier(template)))
        if owner is not None:
            clauses.append(sql.SQL("OWNER {}").format(sql.Identifier(owner)))
        if self.major >= 15:  # noqa: PLR2004 - CREATE DATABASE: STRATEGY is new in 15; files copy faster without fsync
            clauses.append(sql.SQL("STRATEGY FILE_COPY"))
        self._execute(sql.SQL(" ").join(clauses))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, ending every session on it."""
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement)

    def stop(self, mode: Mode = "fast") -> None:
        """
        Stop the server and keep its data; nothing happens when it is stopped already.

        Args:
            mode: `smart` waits for sessions, `fast` ends them, `immediate` is a crash: recovery at the next start.
        """
        with self._lock:
            self.signal(_SIGNALS[mode])
            self.wait()

    def kill(self) -> None:
        """Crash: end every process of the server at once, without a checkpoint."""
        self.stop("immediate")

    def restart(self, mode: Mode = "fast", *, settings: Mapping[str, str | int] | None = None) -> None:
        """
        Stop the server if it runs, and start it on the same data, ready for connections on return.

        Args:
            mode: how to stop it.
            settings: changes to `settings`, kept for later starts too.
        """
        with self._lock:
            self.stop(mode)
            self.settings.update(settings or {})
            lines = (
                f"{name} = '{str(value).replace(chr(39), chr(39) * 2)}'\n" for name, value in self.settings.items()
            )
            self._home.den.write(self.data / "shardmig.conf", "".join(lines))
            with self.log.open("ab") as log:
                self._process = self._home.den.spawn(self._home.program("postgres"), "-D", self.data, output=log)
            self._await_ready(self._process)

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for "ready" in the pid file, the only place where PostgreSQL says so (pg_ctl looks there too)."""
        expected, deadline = str(process.pid), time.monotonic() + _START_TIMEOUT_S
        while True:
            with suppress(OSError):
                said = (self.data / "postmaster.pid").read_text().split("\n")
                if said[0] == expected and len(said) > 7 and said[7].strip() == "ready":  # noqa: PLR2004 - the eighth line
                    return
            if process.poll() is not None:
                self.wait()
                raise LocalServerError(f"the server {self.name} did not start:\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise LocalServerError(f"the server {self.name} is not ready after 60 s:\n{self._last_words()}")
            time.sleep(0.002)

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:].strip()

    def standby(self, name: str, *, settings: Mapping[str, str | int] | None = None) -> Server:
        """
        Start a streaming standby of this server, open for reading.

        The primary goes on working if the binaries hold `pg_basebackup`; otherwise it is stopped while it is copied.

        Args:
            name: of the new server, and its `application_name` at the primary.
            settings: above the primary's: `{"recovery_min_apply_delay": "2s"}`.
        """
        own = {key: value for key, value in self.settings.items() if key not in {"port", "listen_addresses"}}
        standby = self._home.place(name, settings=own | dict(settings or {}), tcp=False)
        origin = f"user=postgres host={self.socket_dir} port={self.port}"
        if Path(self._home.program("pg_basebackup")).exists():
            copy = ("-D", standby.data, "-d", origin, "--checkpoint=fast", "--wal-method=stream", "--no-sync")
            self._home.den.run(self._home.program("pg_basebackup"), *copy)
        else:
            self.stop()
            self._home.den.run("cp", "-a", self.data, standby.data)
            self.restart()
        self._home.den.write(standby.data / "standby.signal", "")
        standby.restart(settings={"primary_conninfo": f"{origin} application_name={name}"})
        return standby

    def signal(self, number: signal.Signals) -> None:
        """Send the postmaster a signal, if it runs: SIGSTOP makes a server that hangs."""
        if self.running and self._process is not None:
            self._process.send_signal(number)

    def wait(self) -> None:
        """Wait until the postmaster has ended; one that does not end in half a minute is killed."""
        process = self._process
        if process is not None:
            self._home.den.end(process)
            self._process = None

    def close(self) -> None:
        """Stop the server and remove its data; a second call changes nothing."""
        if self._alone:
            self._home.close()
        elif self._home.den.mine:
            with self._lock:
                self.stop("immediate")
                self._home.forget(self)


@contextmanager
def _homely(binaries: Binaries | None) -> Iterator[_Home]:
    """Make a home that goes away again if what is begun in it fails."""
    home = _Home(binaries)
    try:
        yield home
    except BaseException:
        home.close()
        raise


@contextmanager
def cluster(
    names: int | Sequence[str],
    *,
    settings: Mapping[str, str | int] | None = None,
    tcp: bool = False,
    binaries: Binaries | None = None,
) -> Iterator[list[Server]]:
    """
    Run several servers; they start side by side from one initdb and are gone after the block.

    Args:
        names: of the servers, or how many: then they are named `shard1`, `shard2`, …
        settings: as for `Server.start`, for each of them.
        tcp: as for `Server.start`.
        binaries: as for `Server.start`.

    Yields:
        The running servers in the order of their names.
    """
    if isinstance(names, int):
        names = [f"shard{number}" for number in range(1, names + 1)]
    with _homely(binaries) as home:
        home.template()
        with ThreadPoolExecutor(max_workers=8) as pool:
            started = list(pool.map(lambda name: home.launch(name, settings=settings, tcp=tcp), names))
        yield started
        home.close()


# --------------------------------------------------------------------------------------------------------------------
# Servers as shards


def shards(servers: Iterable[Server], *, database: str = "postgres", role: str | None = None) -> dict[str, Shard]:
    """
    Return one shard a server by its name; the first is the canary.

    Args:
        servers: running servers.
        database: which of their databases is the shard.
        role: who connects; the superuser by default.
    """
    return {
        server.name: Shard.model_validate(
            {"name": server.name, "url": server.url(database, role=role), "wave": None if number else "canary"}
        )
        for number, server in enumerate(servers)
    }


def toml(servers: Iterable[Server], *, database: str = "postgres", role: str | None = None) -> str:
    """Return the `[shards.*]` sections of a shardmig.toml for these servers; arguments as for `shards`."""
    sections = []
    for shard in shards(servers, database=database, role=role).values():
        wave = f'wave = "{shard.wave}"\n' if shard.wave else ""
        sections.append(f'[shards.{shard.name}]\nurl = "{shard.url.get_secret_value()}"\n{wave}')
    return "\n".join(sections)


# --------------------------------------------------------------------------------------------------------------------
# Where servers live


class _Home:
    """A den for servers of one version, and the data directory they are copied from."""

    def __init__(self, binaries: Binaries | None) -> None:
        account = unprivileged()
        self.binaries = reachable(binaries or find_binaries(), account)
        self.den = Den(account)
        self.password = secrets.token_urlsafe(16)
        self.servers: list[Server] = []
        self._ports = count(5432)  # in sockets' names; a TCP port is looked for
        self._lock = threading.Lock()
        self._template: Path | None = None

    def program(self, name: str) -> Path:
        return self.binaries.bindir / name

    def template(self) -> Path:
        """Return a data directory to copy: initdb takes 0.4 s, a copy a few milliseconds."""
        with self._lock:
            if self._template is None:
                self._template = self._initdb(self.den.path / "template")
        return self._template

    def _initdb(self, data: Path) -> Path:
        password = self.den.path / "password"
        self.den.write(password, self.password)
        options = ["-U", "postgres", "-E", "UTF8", "--no-locale", "-N", "--wal-segsize=1", f"--pwfile={password}"]
        if self.binaries.major >= 18:  # noqa: PLR2004 - initdb: checksums are the default since 18
            options.append("--no-data-checksums")
        if self.binaries.major >= 16:  # noqa: PLR2004 - initdb: -c is new in 16; as in _SETTINGS, for initdb itself
            options += ["-c", "dynamic_shared_memory_type=mmap"]
        # The socket's directory admits nobody else; a TCP port admits every user of the machine.
        self.den.run(self.program("initdb"), "-D", data, *options, "--auth-local=trust", "--auth-host=scram-sha-256")
        password.unlink()
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude 'shardmig.conf'\n")
        return data

    def launch(self, name: str, *, settings: Mapping[str, str | int] | None = None, tcp: bool = False) -> Server:
        server = self.place(name, settings=settings, tcp=tcp)
        self.den.run("cp", "-a", self.template(), server.data)
        server.restart()
        return server

    def place(self, name: str, *, settings: Mapping[str, str | int] | None, tcp: bool) -> Server:
        """Give a server its port and its place; nothing runs yet."""
        since = [more for major, more in _SETTINGS_SINCE.items() if major <= self.binaries.major]
        with self._lock:
            if any(server.name == name for server in self.servers):
                raise LocalServerError(f"there is a server named {name!r} already")
            server = Server(self, name, port=_free_port() if tcp else next(self._ports), tcp=tcp)
            self.servers.append(server)
        for more in (*since, settings or {}):
            server.settings.update(more)
        return server

    def forget(self, server: Server) -> None:
        with self._lock, suppress(ValueError):
            self.servers.remove(server)
        shutil.rmtree(server.data, ignore_errors=True)

    def close(self) -> None:
        """Stop all servers at once, and wait for them: our own dead children would keep the watchdog waiting."""
        for server in list(self.servers):
            server.signal(signal.SIGQUIT)
        for server in list(self.servers):
            server.wait()
        self.den.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
