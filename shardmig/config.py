"""
The configuration: `shardmig.toml` (or `[tool.shardmig]` of a `pyproject.toml`) and the environment.

Every error in it is reported at once, with its key and its cure. A URL's password is never shown: `Shard.address` is
what messages print.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
)

from shardmig.errors import ConfigError
from shardmig.window import Window

__all__ = ["Config", "Lint", "Maintenance", "Pace", "Rollout", "SessionSettings", "Shard", "Speed", "load", "nearest"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FILES = ("shardmig.toml", "pyproject.toml")
_SPEEDS = {"gentle": 2.5, "fast": 20.0}  # batch_target_ms
Speed = Literal["gentle", "fast"]


class _Section(BaseModel):
    # An application that makes a Shard with a wrong keyword would read its url, password and all, in the error.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


_AS_WRITTEN = {"variables": "as written"}  # the context of a configuration that no shard is asked with


def _expand(value: object, info: ValidationInfo) -> object:
    """Put environment variables into a URL; a missing or empty one is an error."""
    if not isinstance(value, str) or info.context is _AS_WRITTEN:
        return value
    missing = [name for name in _VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise ValueError(f"environment variable {missing[0]} is not set")
    if empty := [name for name in _VARIABLE.findall(value) if not os.environ[name]]:
        # What is left out of a url is libpq's own default: the server of this machine, a database named like the user.
        raise ValueError(f"environment variable {empty[0]} is empty")
    expanded = _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    # SQLAlchemy's urls name their driver; libpq's do not.
    return re.sub(r"\Apostgres(?:ql)?\+\w+://", "postgresql://", expanded)


def _shard_name(value: str) -> str:
    if not _NAME.match(value):
        raise ValueError("a shard's name is letters, digits, '_', '-' or '.', at most 63 of them")
    return value


def _named_pace(value: object) -> object:
    """Take `pace = "fast"` for a section that says no more."""
    if not isinstance(value, str):
        return value
    if value not in _SPEEDS:
        raise ValueError('write "gentle", "fast" or a section [pace]')
    return {"batch_target_ms": _SPEEDS[value]}


def _window(value: str | None) -> str | None:
    if value is not None:
        Window.parse(value)
    return value


def _command(value: str | None) -> str | None:
    try:
        if value is None or shlex.split(value):
            return value
    except ValueError as error:
        raise ValueError(f"{value!r} is no command: {str(error).lower()}; write it as in a shell") from None
    raise ValueError("a command begins with a program; leave it out for none")


class Shard(_Section):
    """
    One PostgreSQL database, or one schema of it, with a name.

    Attributes:
        name: unique in the fleet; kept in the shard's own ledger.
        url: libpq URL or key=value string; `${VARIABLE}` is replaced from the environment.
        schema_name: the schema that unqualified names mean (key `schema`).
        wave: name of a rollout wave; "canary" goes first.
        tags: free labels for choosing targets.
    """

    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[str, AfterValidator(_shard_name)]
    url: Annotated[SecretStr, BeforeValidator(_expand)]
    schema_name: str = Field("public", alias="schema", min_length=1, max_length=63)
    wave: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Host, port and database without user or password, for messages."""
        url = self.url.get_secret_value()
        if "://" not in url:
            parts = dict(re.findall(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|\S+)", url))
            return f"{parts.get('host', 'local')}:{parts.get('port', '5432')}/{parts.get('dbname', '')}"
        try:
            split = urlsplit(url)
        except ValueError:
            return "(a url that cannot be read)"
        if url.count("@") != split.netloc.count("@"):  # what looks like host and path may be half a password
            return "(not shown: write the @ / ? # of a password as %40 %2F %3F %23)"
        return f"{split.netloc.rpartition('@')[2] or 'local'}{split.path}"

    @property
    def host(self) -> str:
        """Host and port: shards that share it share a server."""
        try:
            query = dict(parse_qsl(urlsplit(self.url.get_secret_value()).query))
        except ValueError:  # nobody will connect to it either
            return ""
        return query.get("host", "") + self.address.rpartition("/")[0] + query.get("port", "")


class SessionSettings(_Section):
    """
    How a session on a shard behaves.

    Attributes:
        owner: role that owns the tables; `SET ROLE` to it.
        grant: role → privileges granted to it on new tables.
        connect_timeout_s: seconds for one connection attempt, and for the first answer after it; when a runner
            waits so long for a later one, a second connection asks whether the server still works on it.
        lock_timeout_ms: the ladder of lock timeouts, one rung a real try of all locks together; the last one repeats.
        lock_wait_s: seconds after which a busy table parks the shard.
        old_holder_ms: a transaction older than this on the table is waited for without queueing.
        lock_hold_s: limit of a statement that locks an existing table while everybody waits for it; 0 is none.
        statement_timeout_s: limit of one structural statement; 0 is none.
        drain_timeout_s: seconds after which a drain gives up, naming who is still open.
        exempt_roles: roles whose transactions no drain waits for (backups: they read, they never decide).
        synchronous_commit: set explicitly; "off" would let a crash forget what was reported.
    """

    owner: str | None = None
    grant: dict[str, str] = {}
    connect_timeout_s: int = Field(10, ge=1, le=300)
    lock_timeout_ms: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (10, 10, 20, 20, 50, 50, 100), min_length=1
    )
    lock_wait_s: float = Field(60.0, gt=0)
    old_holder_ms: int = Field(200, ge=0)
    lock_hold_s: float = Field(5.0, ge=0)
    statement_timeout_s: float = Field(30.0, ge=0)
    drain_timeout_s: float = Field(600.0, gt=0)
    exempt_roles: tuple[str, ...] = ()
    synchronous_commit: Literal["on", "local", "remote_write", "remote_apply"] = "on"


class Lint(_Section):
    """
    What the linter takes as known.

    Attributes:
        pg_versions: oldest and newest server major of the fleet.
        schemas: schemas that plans may create tables in.
        known_types: types beyond PostgreSQL's own that new columns may have.
        known_functions: functions that defaults, indexes and moves may call, or triggers of tables that get a column.
        known_columns: columns ("table.column") that people gave to tables of plans by hand, on every shard, and those
            behind foreign tables.
        imports: modules that scripts may import beyond the standard list.
        start_after: revision up to which history is not judged (adopted from plain Alembic).
        app: files and directories of application code, from where shardmig.toml lies; `check` judges them.
    """

    pg_versions: tuple[int, int] = (14, 18)
    schemas: tuple[str, ...] = ("public",)
    known_types: tuple[str, ...] = ()
    known_functions: tuple[str, ...] = ()
    known_columns: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    start_after: str = ""
    app: tuple[str, ...] = ()


class Pace(_Section):
    """
    How fast rows are moved.

    Attributes:
        batch_target_ms: milliseconds that one batch's statement should take (2.5 is gentle, 20 is fast).
        batch_rows: rows of the first batch.
        batch_rows_min: floor of a batch.
        batch_rows_max: ceiling of a batch.
        max_rows_per_s: upper bound on rows a second; None is none.
        host_rows_per_s: upper bound on rows a second over all shards of one server, all runners together.
        host_moves: moves at a time on one server, of all runners that have such a limit; the others wait.
        window: when rows may be moved, as "22:00-06:00 Europe/Berlin"; None is at any time.
        parks_waiting: whether a move that waits for its window, or for others on its server, parks the shard at once
            instead of waiting for as long as that takes.
        max_replica_lag_s: a standby further behind stops the move; None ignores standbys.
        max_slot_wal_mb: a replication slot that keeps back more WAL stops the move; None ignores slots.
        max_unarchived_mb: more WAL that waits for archiving stops the move; None ignores the archive.
        max_dead_mb: more dead rows in the tables written stop the move until vacuum came; None ignores them.
        max_snapshot_age_s: an older transaction that keeps vacuum from working stops the move; None ignores it.
        max_rest_s: seconds for which a move may rest before the shard is parked.
    """

    batch_target_ms: float = Field(2.5, gt=0, le=1000)
    batch_rows: int = Field(200, ge=1)
    batch_rows_min: int = Field(50, ge=1)
    batch_rows_max: int = Field(50_000, ge=1)
    max_rows_per_s: int | None = Field(None, ge=1)
    host_rows_per_s: int | None = Field(None, ge=1)
    host_moves: int | None = Field(None, ge=1)
    window: Annotated[str | None, AfterValidator(_window)] = None
    parks_waiting: bool = False
    max_replica_lag_s: float | None = Field(5.0, gt=0)
    max_slot_wal_mb: float | None = Field(4096.0, gt=0)
    max_unarchived_mb: float | None = Field(1024.0, gt=0)
    max_dead_mb: float | None = Field(4096.0, gt=0)
    max_snapshot_age_s: float | None = Field(3600.0, gt=0)
    max_rest_s: float = Field(600.0, gt=0)

    def at(self, speed: Speed) -> Pace:
        """Return the same limits at a named speed."""
        return self.model_copy(update={"batch_target_ms": _SPEEDS[speed]})


class Maintenance(_Section):
    """
    When a runner closes a shard by itself.

    Attributes:
        rows_max: rows, by statistics, in the tables that a plan touches; a shard with more is never closed by a runner.
        heavy_rows: a plan that moves more rows than this, by statistics, closes the shard for writers, as long as that
            is within `rows_max`; None moves every number of rows while the shard serves.
        drain_timeout_s: seconds to wait for those inside, while nobody else gets in, and for any lock or drain as long
            as the shard is closed; then it serves again.
    """

    rows_max: int = Field(10_000, ge=0)
    heavy_rows: int | None = Field(None, ge=0)
    drain_timeout_s: float = Field(5.0, gt=0)


class Rollout(_Section):
    """
    How a fleet is walked.

    Attributes:
        jobs: shards at once.
        per_host: shards at once on one server address; None is no other limit than `jobs`.
        bake_s: seconds between the canary's last switch and its gates.
        assertions: SQL that must return one true value on the canary before any other shard is begun.
        gate: a command, `{shard}` replaced by the canary's name, that must exit 0 there likewise.
        gate_timeout_s: seconds after which the command has failed.
        waves: what comes after the canary: "doubling" (1, 2, 4, … shards), "all" at once, or "named": a wave for each
            name that shards bear as `wave`, in the order in which the configuration first names them.
        on_failure: whether a failed shard stops the shards that have not begun.
        failures_max: more failed shards than this stop the run in any case; None is no limit.
        park_after_s: seconds after which a blocked shard gives its place to others; it is tried again at the end.
        require_aware: no flag leaves OLD for DUAL unless `--aware RELEASE` vouches for the processes that run; False
            warns and goes on.
    """

    jobs: int = Field(16, ge=1, le=1000)
    per_host: int | None = Field(None, ge=1)
    bake_s: float = Field(0.0, ge=0)
    assertions: tuple[str, ...] = ()
    gate: Annotated[str | None, AfterValidator(_command)] = None
    gate_timeout_s: float = Field(300.0, gt=0)
    waves: Literal["doubling", "all", "named"] = "doubling"
    on_failure: Literal["continue", "halt"] = "continue"
    failures_max: int | None = Field(None, ge=0)
    park_after_s: float = Field(5.0, gt=0)
    require_aware: bool = True


class Config(_Section):
    """
    Everything that steers shardmig.

    Attributes:
        root: directory of the configuration file; relative paths start there.
        migrations: directory of scripts and plans.
        models: "package.module:Base.metadata" of the application's models.
        shards_from: "package.module:function" that lists shards, instead of `shards`.
        shards: the fleet by name, in the order written.
    """

    root: Path = Path()
    migrations: Path = Path("migrations")
    models: tuple[str, ...] = ()
    shards_from: str | None = None
    shards: dict[str, Shard] = {}
    session: SessionSettings = SessionSettings()
    lint: Lint = Lint()
    pace: Annotated[Pace, BeforeValidator(_named_pace)] = Pace()
    maintenance: Maintenance = Maintenance()
    rollout: Rollout = Rollout()

    @property
    def migrations_dir(self) -> Path:
        """The directory of scripts and plans, as a path that can be opened."""
        return self.root / self.migrations

    def shard(self, name: str) -> Shard:
        """
        Return one shard by name.

        Raises:
            ConfigError: no such shard; names those that exist.
        """
        try:
            return self.shards[name]
        except KeyError:
            known = ", ".join(list(self.shards)[:8]) or "none"
            more = f" … {len(self.shards)} in all" if len(self.shards) > 8 else ""  # noqa: PLR2004 - what fits a line
            raise ConfigError(f"no shard named {name!r}; known shards: {known}{more}") from None


def load(path: Path | None = None, *, shards: bool = True) -> Config:
    """
    Read the configuration.

    Args:
        path: the file; by default `shardmig.toml`, or a `pyproject.toml` with `[tool.shardmig]`, in the working
            directory or the nearest one above it.
        shards: whether shards will be asked. If not, their addresses stay as they are written and `shards_from` is not
            called: in CI and on a developer's machine the fleet's variables are not set, and must not be.

    Raises:
        ConfigError: no file, not TOML, or any number of wrong keys, all of them listed.
    """
    found = path or _find(Path.cwd())
    if found is None:
        raise ConfigError("no shardmig.toml here or above; `shardmig init` writes one")
    try:
        written = tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{found}: {error.strerror}; `shardmig init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{found}: not valid TOML: {error}") from error
    if found.name == "pyproject.toml":
        written = written.get("tool", {}).get("shardmig", {})
    return _parse(written, found, shards=shards)


def nearest(start: Path) -> Config:
    """Read the configuration of a directory or the nearest one above it, without shards; defaults where none is."""
    found = _find(start)
    return load(found, shards=False) if found else Config(root=start)


def _find(start: Path) -> Path | None:
    for directory in (start, *start.parents):
        for name in _FILES:
            candidate = directory / name
            if candidate.is_file() and (name != "pyproject.toml" or _has_section(candidate)):
                return candidate
    return None


def _has_section(path: Path) -> bool:
    try:
        return "shardmig" in tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False


def _parse(written: dict[str, Any], path: Path, *, shards: bool) -> Config:
    sections = written.get("shards", {})
    if isinstance(sections, Mapping):
        named = {n: {"name": n, **body} if isinstance(body, Mapping) else body for n, body in sections.items()}
        written = {**written, "shards": named}
    try:
        config = Config.model_validate(
            {**written, "root": path.resolve().parent}, context=None if shards else _AS_WRITTEN
        )
    except ValidationError as error:
        raise ConfigError("\n".join([f"{path}:", *(f"  {line}" for line in _problems(error))])) from None
    if config.shards_from is None:
        return config
    if config.shards:
        raise ConfigError(f"{path}: give either shards_from or [shards.*], not both")
    return config.model_copy(update={"shards": _listed(config, path)}) if shards else config


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key; take it out or correct its spelling"
        elif problem["type"] == "missing":
            yield f"{key}: missing; add it"
        else:
            yield f"{key}: {problem['msg'].removeprefix('Value error, ')}"


def _listed(config: Config, path: Path) -> dict[str, Shard]:
    """Call the application's own list of shards."""
    module_name, _, attribute = str(config.shards_from).partition(":")
    if str(config.root) not in sys.path:
        sys.path.insert(0, str(config.root))
    try:
        shards: Iterable[Shard] = getattr(importlib.import_module(module_name), attribute)()
        listed = {shard.name: shard for shard in shards}
    except Exception as error:
        raise ConfigError(f"{path}: shards_from = {config.shards_from!r} failed: {error}") from error
    if not listed:
        raise ConfigError(f"{path}: shards_from = {config.shards_from!r} lists no shard")
    return listed
