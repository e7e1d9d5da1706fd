"""When rows may be moved: a daily window of wall-clock time in a named time zone. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, tzinfo
from zoneinfo import ZoneInfo

__all__ = ["Window"]

_WRITTEN = re.compile(r"(\d\d:\d\d(?::\d\d)?)-(\d\d:\d\d(?::\d\d)?) +(\S+)\Z")
_EXAMPLE = '"22:00-06:00 Europe/Berlin"'


@dataclass(frozen=True, slots=True)
class Window:
    """
    A span of each day, across midnight if it ends before it begins.

    Attributes:
        written: as the configuration says it.
        begin: inclusive.
        end: exclusive.
        zone: whose clocks are meant; they decide also on the nights when those are changed.
    """

    written: str
    begin: time
    end: time
    zone: tzinfo

    @classmethod
    def parse(cls, written: str) -> Window:
        """
        Read a window such as "22:00-06:00 Europe/Berlin".

        Raises:
            ValueError: it is none; the message says what to write.
        """
        match = _WRITTEN.match(written)
        if match is None:
            raise ValueError(f"{written!r} is no window: write begin, end and time zone, as in {_EXAMPLE}")
        begin, end = (_time(part, written) for part in match.groups()[:2])
        if begin == end:
            raise ValueError(f"{written!r} ends when it begins; leave it out and rows move at any time")
        return cls(written, begin, end, _zone(match[3]))

    def is_open(self, at_s: float) -> bool:
        """Say whether rows may be moved at a moment, given in seconds since 1970."""
        now = datetime.fromtimestamp(at_s, self.zone).time()
        if self.begin < self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end


def _time(part: str, written: str) -> time:
    try:
        return time.fromisoformat("00:00" if part in ("24:00", "24:00:00") else part)
    except ValueError:
        raise ValueError(f"{part!r} in {written!r} is no time of day: write 00:00 to 23:59") from None


def _zone(name: str) -> tzinfo:
    if name.upper() == "UTC":
        return UTC  # known also where the system has no list of zones
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # not found, a directory, or no name at all
        raise ValueError(
            f"no time zone {name!r} here: write one of the IANA names, as in {_EXAMPLE}, or UTC, which needs no tzdata"
        ) from None
