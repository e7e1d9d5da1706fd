"""
A directory and the programs at work in it, both gone when their maker is, however it went.

A watchdog process makes the directory and reads from a pipe whose other end only the maker holds. The pipe ends with
the maker: after a normal exit, an exception, Ctrl-C or SIGKILL. Then the watchdog stops the programs and removes the
directory. The kernel's own parent-death signal is no help: it fires when the *thread* ends that started the child.

A maker that forks without executing another program shares its end of the pipe with the fork: the watchdog then waits
for both.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from shardmig.errors import LocalServerError

if TYPE_CHECKING:
    from shardmig.binaries import Account

__all__ = ["Den"]

# Deaf to Ctrl-C and to a service manager's SIGTERM for all: it ends when its work is done. It sends SIGQUIT, which
# PostgreSQL takes as "immediate shutdown" and which leaves no shared memory behind, and SIGKILL to what is deaf. Each
# program leads a process group, in which initdb has its children.
_WATCHDOG = """
trap '' HUP INT PIPE QUIT TERM
umask 077
den=$(mktemp -d "$1/shardmig-XXXXXX") || exit 1
# From here on nothing may end this but the end of the work: the maker may be dead before it hears the name.
chown "$2" "$den" && echo "$den"
exec >&- 2>/dev/null
cd /
# A dead child of a killed maker is a zombie until the system's first process sees to it, which may be never.
ended() {
    kill -0 "$1" || return 0
    state= && read -r state <"/proc/$1/stat"
    case $state in *') Z '*) return 0 ;; *) return 1 ;; esac
}
running=' '
while read -r verb pid; do
    case $verb in
        start) running="$running$pid " ;;
        gone) running="${running%% "$pid" *} ${running#* "$pid" }" ;;
    esac
done
for pid in $running; do kill -s QUIT -- "-$pid"; done
looks=0
for pid in $running; do
    until ended "$pid" || [ $looks -eq 500 ]; do sleep 0.02; looks=$((looks + 1)); done
    kill -s KILL -- "-$pid"
done
looks=0
until rm -rf "$den" || [ $looks -eq 100 ]; do sleep 0.1; looks=$((looks + 1)); done
"""
# A child writes its own number before it becomes the program: there is no moment when nobody knows of it, and the pipe
# does not end before the child has written.
_REGISTERED = 'echo "start $$" >&0 && exec "$@" </dev/null'

_MEMORY = Path("/dev/shm")  # noqa: S108 - directories in it come from mktemp, under names that nobody can guess
_MEMORY_FREE_MIN = 1 << 30  # a container's default of 64 MB is no room
_BASE_CHARACTERS_MAX = 70  # a socket's whole path has 104 bytes on BSD and macOS, 108 on Linux
_STOP_TIMEOUT_S = 30.0


class Den:
    """
    A private directory (mode 0700, short path) with a watchdog.

    Attributes:
        path: the directory, owned by the account that programs run as.
        account: that account, in subprocess's words; empty for the caller's own.
    """

    def __init__(self, account: Account) -> None:
        self.account = account
        self._maker = os.getpid()
        owner = f"{account.get('user', os.geteuid())}:{account.get('group', os.getegid())}"
        self._watchdog = subprocess.Popen(  # noqa: S603 - a constant program
            ["/bin/sh", "-c", _WATCHDOG, "shardmig-watchdog", _base(account), owner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C goes to the whole process group of the terminal
            bufsize=0,
        )
        atexit.register(self.close)
        with _piped(self._watchdog.stdout) as answer:
            self.path = Path(os.fsdecode(answer.read()).strip())
        if not self.path.name:
            self.close()
            raise LocalServerError("no directory for throw-away servers could be made; set TMPDIR to one with room")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        self._environment = {**kept, "HOME": str(self.path), "LC_ALL": "C"}

    @property
    def mine(self) -> bool:
        """Whether this process is the maker, not a fork of it: a fork's end must not take its parent's servers away."""
        return os.getpid() == self._maker

    def spawn(self, *command: str | Path, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a program in the directory, as the account; the watchdog knows of it before it runs."""
        return subprocess.Popen(  # noqa: S603 - the caller's programs
            ["/bin/sh", "-c", _REGISTERED, "sh", *command],
            stdin=_piped(self._watchdog.stdin),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=self.path,
            env=self._environment,
            **self.account,
        )

    def write(self, path: Path, text: str) -> None:
        """Write a file that the account can read, whatever the maker's umask; the directory keeps others out."""
        path.write_text(text)
        path.chmod(0o644)

    def run(self, *command: str | Path) -> None:
        """
        Run a program to its end.

        Raises:
            LocalServerError: it failed; the message is what it said.
        """
        process = self.spawn(*command, output=subprocess.PIPE)
        said, _ = process.communicate()
        self._gone(process)
        if process.returncode:
            raise LocalServerError(f"{Path(command[0]).name} failed: {os.fsdecode(said).strip()[-2000:]}")

    def end(self, process: subprocess.Popen[bytes], *, within_s: float = _STOP_TIMEOUT_S) -> None:
        """Wait until a spawned process has ended, as it was told to; kill it when it takes too long."""
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._gone(process)

    def _gone(self, process: subprocess.Popen[bytes]) -> None:
        """Tell the watchdog that this number may soon be another process's."""
        with suppress(OSError, ValueError):  # closed meanwhile: then the watchdog has done its work
            _piped(self._watchdog.stdin).write(b"gone %d\n" % process.pid)

    def close(self) -> None:
        """Let the watchdog stop what still runs and remove the directory; a second call changes nothing."""
        leash = _piped(self._watchdog.stdin)
        if not self.mine or leash.closed:
            return
        leash.close()
        self._watchdog.wait()
        atexit.unregister(self.close)


def _base(account: Account) -> Path:
    """Choose memory when it has room, else the temporary directory, unless the account cannot work there."""
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _MEMORY_FREE_MIN:
        return _MEMORY
    base = Path(tempfile.gettempdir())
    entered = subprocess.run(["/bin/sh", "-c", '[ -x "$1" ]', "sh", base], check=False, cwd="/", **account)  # noqa: S603 - a constant program
    fits = len(str(base)) <= _BASE_CHARACTERS_MAX
    return base if entered.returncode == 0 and fits else Path("/tmp")  # noqa: S108 - as for _MEMORY


def _piped(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened as a pipe"  # noqa: S101 - narrows what subprocess leaves optional
    return stream
