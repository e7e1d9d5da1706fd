"""How far a move is, and how long it takes at the present speed: what can honestly be said. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardmig.records import StepRow

__all__ = ["Moved", "duration", "is_under_way", "moved_of", "paused", "rests_of", "state_of"]

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


@dataclass(frozen=True, slots=True)
class Moved:
    """
    Rows moved of rows there are, and compared of rows moved.

    Attributes:
        rows: moved so far, earlier runs included.
        estimated: rows of the table, by statistics; None when it was never analyzed.
        rows_per_s: moved or compared lately; None or 0 when neither happens.
        eta_s: seconds left, the check included, as the mover says; None when nothing honest can be said.
        compared: rows compared, behind the last batch; None before that.
    """

    rows: int
    estimated: int | None
    rows_per_s: float | None = None
    eta_s: float | None = None
    compared: int | None = None

    @property
    def percent(self) -> int | None:
        """Rounded down; None where statistics say nothing, or less than was moved already."""
        if not self.estimated or self.rows > self.estimated:
            return None
        return self.rows * 100 // self.estimated

    def __str__(self) -> str:
        """Say it in one line."""
        if self.compared is not None:
            share = f" ({self.compared * 100 // self.rows} %)" if self.rows and self.compared <= self.rows else ""
            said = f"{self.rows:,} rows moved, {self.compared:,} compared{share}"
        elif self.percent is not None:
            said = f"{self.rows:,} of about {self.estimated:,} rows moved ({self.percent} %)"
        else:
            said = f"{self.rows:,} rows moved" + (", more than were estimated" if self.estimated else "")
        if self.rows_per_s:
            said += f", {self.rows_per_s:,.0f} rows/s"
        return said + (f", {duration(self.eta_s)} left" if self.eta_s is not None else "")


def moved_of(step: StepRow, *, at_work: bool) -> Moved:
    """Read how far a move is from its record; it has a speed, and a time left, while somebody works on it alone."""
    speed, eta_s = (step.rows_per_s, step.eta_s) if at_work and step.waiting is None else (None, None)
    compared = step.checked_rows if step.check_cursor is not None else 0
    behind = step.bounded_at is not None and step.cursor == step.upto
    return Moved(step.rows, step.rows_estimated, speed, eta_s, compared if behind else None)


def rests_of(step: StepRow, *, at_work: bool) -> str | None:
    """Say why a move rests; where nobody works on it, an operator's pause is all that stays true."""
    if at_work:
        return step.waiting
    return paused(step.paused) if step.paused is not None else None


def paused(why: str) -> str:
    """Say that an operator lets a move rest."""
    return f"an operator paused it: {why}"


def is_under_way(step: StepRow) -> bool:
    """Say whether a move has begun and has something left."""
    return step.kind == "move" and step.bounded_at is not None and step.checked_at is None


def state_of(step: StepRow, *, at_work: bool) -> str | None:
    """
    Say what a move is about, in one line; None when it has not begun, or has nothing left.

    Args:
        step: its record.
        at_work: whether somebody works on it at the moment.
    """
    if not is_under_way(step):
        return None
    way = " back" if step.direction == "back" else ""
    why = rests_of(step, at_work=at_work)
    rests = f"; rests: {why}" if why is not None else ""
    return f"{step.revision} step {step.number}{way}: {moved_of(step, at_work=at_work)}{rests}"


def duration(seconds: float) -> str:
    """Write a length of time as people say it, never shorter than it is."""
    if seconds < _MINUTE_S:
        return f"{math.ceil(seconds)} s"
    if seconds < _HOUR_S:
        return f"{math.ceil(seconds / _MINUTE_S)} min"
    if seconds < _DAY_S:
        hours, minutes = divmod(math.ceil(seconds / _MINUTE_S), 60)
        return f"{hours} h {minutes} min"
    return f"{seconds / _DAY_S:.1f} days"
