"""
The command line, hundreds of times: each run is a process of its own, forked from one that has imported everything.

Nearly a second of each run would go into importing Alembic, SQLAlchemy and the SQL parser. What is killed, stopped or
sent a signal, and what pages tell readers to type, runs the program itself.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["become", "load", "project", "shardmig"]

_lock = threading.Lock()


def shardmig(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `shardmig` with these arguments in a directory, as `subprocess.run` would; two minutes at most."""
    request = {"arguments": arguments, "cwd": str(cwd), "env": {**os.environ, **(env or {})}}
    with _lock, tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        socket.send_fds(_forker(), [b"!"], [asked.fileno(), out.fileno(), err.fileno()])
        pid = _answer()
        _forker().settimeout(120)
        try:
            code = _answer()
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise
        said = [_text(stream) for stream in (out, err)]
    return subprocess.CompletedProcess(arguments, code, *said)


def project(root: Path, *, shards: str, move: str) -> None:
    """Write a project of two revisions, not planned yet: 0001_base makes t (id, a), 0002_x adds b, `move` fills it."""
    scripts = root / "migrations"
    scripts.mkdir()
    (scripts / "HEAD").write_text("0002_x\n")
    (scripts / "0001_base.py").write_text(
        '"""base"""\nimport sqlalchemy as sa\nfrom alembic import op\n\n'
        'revision, down_revision = "0001_base", None\n\n\ndef upgrade():\n'
        '    op.create_table("t", sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("a", sa.Text))\n'
    )
    (scripts / "0002_x.py").write_text(
        '"""x"""\nimport sqlalchemy as sa\nfrom alembic import op\nfrom shardmig.operations import move_rows\n\n'
        'revision, down_revision = "0002_x", "0001_base"\n\n\ndef upgrade():\n'
        f'    op.add_column("t", sa.Column("b", sa.Text))\n\n\ndef move():\n    {move}\n'
    )
    (root / "shardmig.toml").write_text(f"{shards}\n[rollout]\nrequire_aware = false\n")


@functools.cache
def _forker() -> socket.socket:
    """Start the process that forks; it ends when this one does, as its end of the socket is closed."""
    here, there = socket.socketpair(socket.AF_UNIX)
    with there:
        command = [sys.executable, __file__, str(there.fileno())]
        forker = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
    atexit.register(_end, here, forker)
    return here


def _end(here: socket.socket, forker: subprocess.Popen[bytes]) -> None:
    here.shutdown(socket.SHUT_RDWR)  # although a fork of the tests may hold it too
    here.close()
    forker.wait()


def _answer() -> int:
    answer = b""
    while not answer.endswith(b"\n"):
        if not (byte := _forker().recv(1)):
            raise EOFError("the process that forks has ended; its words are above")
        answer += byte
    return int(answer)


def _text(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read().decode())


# --------------------------------------------------------------------------------------------------------------------
# The process that forks


def load() -> None:
    """Import what a run of the command line may need."""
    for module in pkgutil.walk_packages(importlib.import_module("shardmig").__path__, "shardmig."):
        if not module.name.endswith((".__main__", "pytest_plugin")):
            importlib.import_module(module.name)
    importlib.import_module("shardmig.sqltree")._binding()
    gc.freeze()  # a run neither looks through what was imported nor takes it apart at its end


def _serve(tests: socket.socket) -> None:
    load()
    while True:
        more, streams, *_ = socket.recv_fds(tests, 1, 3)
        if not more:
            return
        pid = os.fork()
        if pid == 0:
            tests.close()
            with os.fdopen(streams.pop(0)) as asked:
                request = json.load(asked)
            become(request, streams)
            return
        for stream in streams:
            os.close(stream)
        tests.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        tests.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Be a run of the command line; whatever it raises ends this process as it would end the program."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv, sys.path[0] = ["shardmig", *request["arguments"]], request["cwd"]
    importlib.import_module("shardmig.__main__").main()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
