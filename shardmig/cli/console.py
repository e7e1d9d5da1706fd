"""
The two streams: the result on stdout, progress and problems on stderr; and how the command line ends.

This module, `progress` and `results` are the only ones that print.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import signal
import sys
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.text import Text

from shardmig.errors import ShardmigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INTERRUPTED", "err", "guarded", "note", "out", "show_json", "tell"]

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

INTERRUPTED = 130


def tell(line: str) -> None:
    """Write one line of the result."""
    out.print(Text(line))


def note(line: str) -> None:
    """Write what the reader should know, beside the result."""
    err.print(Text.assemble(("note: ", "yellow"), line))


def guarded(app: Callable[[], object]) -> NoReturn:
    """Run the command line and end the process; what a user did wrong is one line on stderr and exit code 2."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))  # verbs that can resume set their own
    atexit.register(gc.freeze)  # what ends with the process is not taken apart first, which took a fifth of a second
    try:
        app()
    except ShardmigError as error:
        err.print(Text.assemble(("error: ", "bold red"), str(error)))
    except BrokenPipeError:  # `shardmig status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except asyncio.CancelledError:
        err.print("interrupted; what was committed is recorded, the same command goes on from there")
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said: while Python ends it would only add a traceback
    sys.exit(2)


def show_json(body: object) -> None:
    """Write a result as JSON; times are ISO 8601 with their zone."""
    sys.stdout.write(json.dumps(body, indent=2, default=_plain, ensure_ascii=False) + "\n")


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
