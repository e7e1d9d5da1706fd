"""
A program that moves rows and can be killed: for each line on its standard input, a fresh process runs the move.

Forked from here, a mover is at work within milliseconds. It says its pid, and at the end "moved", or nothing when it
was killed.
"""

from __future__ import annotations

import asyncio
import os
import sys

from moving import REVISION, VERSIONS, same_table, second_table

from shardmig import laps
from shardmig.config import Pace, SessionSettings, Shard
from shardmig.errors import ShardBusy
from shardmig.moves import MoveRun
from shardmig.session import open_session
from shardmig.turn import Turn

PACE = Pace(batch_rows=10, batch_rows_min=10, batch_rows_max=10)
MOVES = {"same": same_table(), "second": second_table(), "laps": same_table()}
STRETCH_ROWS = 500  # where a test wants laps over fewer rows than a stretch has

__all__ = ["MOVES", "PACE", "STRETCH_ROWS"]


async def move(shard: Shard, kind: str) -> None:
    """Move what is left; the predecessor's server process may need a moment to notice that it is alone."""
    while True:
        try:
            async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
                turn = await Turn.take(session)
                if await MoveRun(turn, REVISION, 2, MOVES[kind], "forward", PACE).run():
                    sys.stdout.write("moved\n")
                return
        except ShardBusy:
            await asyncio.sleep(0.002)


def main() -> None:
    """Fork a mover for each line and wait for it; it is buried when the next one is asked for, so no pid is reused."""
    child = None
    for line in sys.stdin:
        if child is not None:
            os.waitpid(child, 0)
        url, kind = line.split()
        child = os.fork()
        if child == 0:
            laps.FEW_ROWS, laps.STRETCH_ROWS = STRETCH_ROWS, STRETCH_ROWS
            asyncio.run(move(Shard.model_validate({"name": "eu1", "url": url}), kind))
            sys.stdout.flush()
            os._exit(0)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        sys.stdout.write("ended\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
