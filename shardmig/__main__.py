"""`python -m shardmig` and the console script; says what to install when the command line is not there."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or name the missing extra in one line."""
    try:
        from shardmig.cli import main as run  # noqa: PLC0415 - application images have no command line
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich", "postgast"}:
            raise
        sys.exit(f"shardmig: the command line needs {error.name}; install it: pip install 'shardmig[cli]'")
    run()


if __name__ == "__main__":
    main()
