"""What users ask of the canary before the rest of the fleet follows: assertions in SQL, and a command of their own."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

from psycopg import errors as pg

from shardmig.errors import GateFailed
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shardmig.config import Rollout
    from shardmig.session import Session

__all__ = ["pass_assertions", "pass_command"]

_SHOWN = 400  # characters of a command's output that a message repeats: its end, where the reason is
_READ = 4 * _SHOWN + 4096  # bytes that hold them, and what else may stand behind them, as blank lines


async def pass_assertions(session: Session, assertions: Sequence[str]) -> None:
    """
    Ask each assertion of the canary.

    Raises:
        GateFailed: one is not true, or the server refuses it; the message shows its SQL.
    """
    for sql in assertions:
        try:
            [_, answer] = await session.transact([Query("SET TRANSACTION READ ONLY"), Query(sql)])
        except pg.Error as error:
            message = f"the server refuses the assertion {sql!r}: {error.diag.message_primary or error}"
            raise GateFailed(message, shard=session.shard.name) from error
        if [len(row) for row in answer.rows] != [1] or answer.value is not True:
            raise GateFailed(
                f"the assertion {sql!r} returned {_shown(answer.rows)}, not true", shard=session.shard.name
            )


async def pass_command(shard: str, rollout: Rollout, *, directory: Path, stop: asyncio.Event) -> bool:
    """
    Run the gate's command for the canary, without a shell.

    Returns:
        True when it exited 0; False when `stop` ended it before.

    Raises:
        GateFailed: it could not be started, exited otherwise, or took too long; the message ends with its last words.
    """
    assert rollout.gate is not None  # noqa: S101 - asked only where one is configured
    words = [word.replace("{shard}", shard) for word in shlex.split(rollout.gate)]
    shown = shlex.join(words)
    with tempfile.TemporaryFile() as said:  # a pipe would end with the last process that the command leaves behind
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                cwd=directory,
                env={**os.environ, "SHARDMIG_SHARD": shard},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, and what is ended is ended with all it started
            )
        except OSError as error:
            raise GateFailed(f"the gate {shown} cannot be started: {error.strerror}", shard=shard) from error
        in_time = await _ends_in_time(process, rollout.gate_timeout_s, stop)
        if not in_time and stop.is_set():
            return False
        said.seek(max(said.seek(0, os.SEEK_END) - _READ, 0))
        words_said = said.read().decode(errors="replace").strip()[-_SHOWN:]
    if not in_time:
        raise GateFailed(
            f"the gate {shown} took longer than {rollout.gate_timeout_s:g} s; it said: {words_said}", shard=shard
        )
    if process.returncode:
        raise GateFailed(f"the gate {shown} exited {process.returncode}: {words_said}", shard=shard)
    return True


async def _ends_in_time(process: asyncio.subprocess.Process, limit_s: float, stop: asyncio.Event) -> bool:
    """Wait for a command; end it, and what it started, when it takes too long or a stop is asked for."""
    ending, stopping = asyncio.create_task(process.wait()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({ending, stopping}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        return ending.done()
    finally:
        stopping.cancel()
        if not ending.done():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await ending


def _shown(rows: Sequence[tuple[object, ...]]) -> str:
    if len(rows) == 1 and len(rows[0]) == 1:
        return repr(rows[0][0])
    return f"{len(rows)} rows"
