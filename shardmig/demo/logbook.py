"""What happened on each shard, as the runner's events tell it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardmig.events import BatchDone, Draining, FlagSwitched, OutcomeReached, StepDone, StepStarted, Waiting
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardmig.events import Event

__all__ = ["Logbook", "Page"]


@dataclass(slots=True)
class Page:
    """
    One shard.

    Attributes:
        states: flag → state; None while its structure is not there.
        doing: what the runner does there now; empty when it rests.
        share: of the rows of the move under way; None when none is.
        rows_moved: by all moves.
        drains_s: from each flip into DUAL until the last transaction older than it was over.
        seconds: that runners worked here.
    """

    states: dict[str, State | None]
    doing: str = ""
    share: float | None = None
    rows_moved: int = 0
    drains_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    flipped_at: float | None = None


class Logbook:
    """
    A page a shard; `hear` is a listener for fleets.

    Attributes:
        pages: shard → page.

    Args:
        shards: their names.
        flags: revision → its flag, where it moves rows.
    """

    def __init__(self, shards: Iterable[str], flags: Mapping[str, str]) -> None:
        self._flags = flags
        self.pages = {shard: Page(dict.fromkeys(flags.values())) for shard in shards}

    def hear(self, event: Event) -> None:
        """Enter one event."""
        page = self.pages[event.shard]
        match event:
            case FlagSwitched() if event.flag in page.states:
                page.states[event.flag] = event.after
                page.doing = f"{event.flag} is {event.after.name}"
                page.flipped_at = time.monotonic() if event.after is State.DUAL else None
            case Draining():
                oldest = event.blockers[0].age_s if event.blockers else None
                age = "" if oldest is None else f", oldest {oldest:.1f} s"
                page.doing = f"drains {event.flag}: {len(event.blockers)} still open{age}"
            case StepStarted(kind="move"):
                self._drained(page)
                page.doing, page.share = f"moves rows for {event.revision}", 0.0
            case StepStarted():
                page.doing = f"{event.revision} step {event.step}"
            case BatchDone():
                page.rows_moved += event.rows
                page.doing = f"moves rows for {event.revision}: {event.rows_done:,}"
                page.share = event.rows_done / event.rows_estimated if event.rows_estimated else None
            case StepDone():
                page.share = None
                flag = self._flags.get(event.revision)
                if flag is not None and page.states[flag] is None:
                    page.states[flag] = State.OLD
            case Waiting():
                page.doing = f"waits because {event.reason}"
            case OutcomeReached():
                page.doing, page.share = "", None
            case _:
                pass

    @staticmethod
    def _drained(page: Page) -> None:
        if page.flipped_at is not None:
            page.drains_s.append(time.monotonic() - page.flipped_at)
            page.flipped_at = None

    @property
    def drains_s(self) -> list[float]:
        """All drains, on all shards."""
        return [drain for page in self.pages.values() for drain in page.drains_s]
