"""What an error of PostgreSQL or of the connection means for the work under way."""

from __future__ import annotations

import psycopg

__all__ = ["first_line", "folded", "is_connection_lost", "is_transient", "pointer", "sqlstate"]

_LOST = frozenset({"57P01", "57P02", "57P03", "57P05", "25P03", "25P04"})  # the server ended the session
_TRANSIENT = frozenset({"40001", "40P01", "55P03", "53300", "57P03"})


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of a psycopg error; None for anything else and for an error of the client."""
    return error.sqlstate if isinstance(error, psycopg.Error) else None


def is_connection_lost(error: BaseException) -> bool:
    """Whether the session is gone, so that nothing more is known of what was under way."""
    if not isinstance(error, psycopg.OperationalError) or isinstance(error, psycopg.errors.PipelineAborted):
        return False
    return error.sqlstate is None or error.sqlstate.startswith("08") or error.sqlstate in _LOST


def is_transient(error: BaseException) -> bool:
    """Whether the same again may succeed: serialization, deadlock, lock timeout, lost connection."""
    return is_connection_lost(error) or sqlstate(error) in _TRANSIENT


def first_line(error: Exception) -> str:
    """Return what happened in one line, without the statement and without hints."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return folded(primary or str(error))


def folded(text: str) -> str:
    """Put a text of several lines, which libpq also indents, into one."""
    return "; ".join(" ".join(line.split()) for line in text.strip().splitlines())


def pointer(error: psycopg.Error, sql: str) -> str:
    """
    Show where in a statement the server found the error.

    Returns:
        The line of the statement and a caret under it; empty when the server gave no position.
    """
    if not error.diag.statement_position:
        return ""
    at = int(error.diag.statement_position) - 1
    start = sql.rfind("\n", 0, at) + 1
    line = sql[start:].partition("\n")[0].replace("\t", " ")
    return f"{line}\n{' ' * (at - start)}^"
