"""
Which openings the server behind a connection holds prepared, and what to send next. Pure: nothing here talks to one.

To parse and plan the opening costs the server more than to run it. So it is prepared after a few transactions, in SQL
(PREPARE, EXECUTE): that rides on BEGIN in one message, as the plain SELECT does. The name is a hash of the text, hence
means the same to every client of a pooler that let it through to another one's server.

What is believed here may be wrong. psycopg deallocates everything after some rollbacks, applications and poolers may,
and behind a pooler each transaction may meet another server. Then the server says so, and nothing was done yet.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Form", "Prepared"]

_NOT_THERE = "26000"  # invalid_sql_statement_name
_THERE = "42P05"  # duplicate_prepared_statement
# "cached plan must not change result type", after an ALTER by hand; poolers that know no PREPARE say it too.
_NOT_POSSIBLE = "0A000"  # feature_not_supported

_KEPT = 32  # a connection: some ten kB of the server's memory each
_REST = 20  # plain openings after one that failed, before the next attempt
_PATIENCE = 4  # times as many after each further one: a pooler is soon left alone, a lost statement soon there again
_NEVER = float("inf")


class Form(IntEnum):
    """How an opening is sent."""

    PLAIN = 0
    ASKING = 1  # plain, and asks whether it is prepared already
    PREPARING = 2  # prepares and executes
    EXECUTING = 3


class Prepared:
    """
    The openings that a server holds prepared for one connection, as far as its client knows.

    Attributes:
        there: their names.
    """

    __slots__ = ("_doubted", "_due", "_plain", "there")

    def __init__(self) -> None:
        self.there: set[str] = set()
        self._doubted: set[str] = set()
        self._plain = 0  # openings sent since the last attempt
        self._due: float | None = None  # how many must be; None: as many as the connection wants of any statement

    def form(self, name: str, threshold: int | None) -> Form:
        """
        Choose the form of the next opening.

        Args:
            name: the prepared statement's.
            threshold: of the connection: how often a statement is sent before it is prepared; None: nothing is, which
                is what psycopg tells those who have a pooler.
        """
        if threshold is None:
            return Form.PLAIN
        if name in self.there:
            return Form.EXECUTING
        if name in self._doubted:
            return Form.ASKING
        if self._plain < (threshold if self._due is None else self._due) or len(self.there) >= _KEPT:
            self._plain += 1
            return Form.PLAIN
        return Form.PREPARING

    def learn(self, name: str, *, there: bool) -> None:
        """Believe what an answer shows."""
        self._doubted.discard(name)
        if there:
            self.there.add(name)

    def doubt(self) -> None:
        """Ask before the next use: a rollback by psycopg may have deallocated what was there."""
        if self.there:
            self._doubted |= self.there
            self.there.clear()

    def blame(self, name: str, form: Form, sqlstate: str | None) -> Form | None:
        """
        Learn from an error of the opening.

        Returns:
            The form to try instead, after a ROLLBACK; None: the opening itself is what failed.
        """
        if form is Form.PREPARING and sqlstate == _THERE:  # another client of the same pooler was first
            self.learn(name, there=True)
            return Form.EXECUTING
        if form >= Form.PREPARING and sqlstate in {_NOT_THERE, _NOT_POSSIBLE}:
            self.there.clear()
            self._doubted.clear()
            self._plain = 0
            self._due = _NEVER if sqlstate == _NOT_POSSIBLE else _PATIENCE * self._due if self._due else _REST
            return Form.PLAIN
        return None
