"""
The runner's short way: drain, move, check, record and flip in one transaction (`shardmig.handful`).

It is a batch of `mover` that holds the flag from its first statement on, looks who is open instead of waiting for them,
compares what it has moved, and whose COMMIT is also the flip. Whatever it does not find as it wants it makes it roll
back, and the careful way goes on from DUAL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.flagrow import flips
from model.mover import Batches
from model.world import ABSENT, BEGUN, OPEN, PREPARED, Mover, in_batch
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.flagrow import FlagRow
    from model.search import Label
    from model.world import World

__all__ = ["Handfuls"]

OLD, DUAL, LIVE, _ = State


class Handfuls(Batches):
    """The mover's half of the model, with its short way."""

    def mover_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        yield from super().mover_steps(world)
        flag, begins = world.flag, OLD if self.handful == "looks before DUAL" else DUAL
        if self.handful == "never" or world.mover.stage or flag.state != begins or flag.new_valid:
            return
        if self.handful == "unheld" and self._open(world):
            return  # the looks were a statement of their own, before the flag is held
        stage = "looks" if self.handful in {"as built", "looks before DUAL", "one snapshot", "unchecked"} else "begin"
        mover = Mover(stage, found=world.old != ABSENT, value=world.old, whole=True)
        yield ("handful: begins, and holds the flag",), world._replace(mover=mover)

    def _mover_looks(self, world: World) -> tuple[Label, World]:
        """Look who is open, and give up if anybody is."""
        if self._open(world):
            return ("handful: somebody is open, ROLLBACK",), self._rest(world)
        if self.handful == "looks last":
            return ("handful: nobody is open",), in_batch(world, stage="commit")
        return ("handful: nobody is open",), in_batch(world, stage="begin")

    def _mover_begin(self, world: World) -> tuple[Label, World]:
        """Begin the statement that moves; its snapshot is its own."""
        if self.handful == "one snapshot":
            # A row that came is not seen; one that was changed is an error.
            seen = world.mover.found
            if seen and world.mover.value != world.old:
                return ("handful: 40001, ROLLBACK",), self._rest(world)
            return ("handful: moves under the snapshot of before",), in_batch(world, stage="read", found=seen)
        after = in_batch(world, stage="read", found=world.old != ABSENT, value=world.old)
        return ("handful: begins to move",), after

    def _mover_check(self, world: World) -> tuple[Label, World]:
        """Compare in a statement of its own, which sees what was moved and whatever is committed by now."""
        following = "looks" if self.handful == "looks last" else "commit"
        blind = self.handful == "unchecked" or (self.handful == "one snapshot" and not world.mover.found)
        if not blind and self.copied(world) != world.old:
            return ("handful: rows differ, ROLLBACK",), self._rest(world)
        return ("handful: nothing differs" if not blind else "handful: sees nothing that differs",), in_batch(
            world, stage=following
        )

    def _last(self, world: World) -> str:
        return "check" if world.mover.whole else super()._last(world)

    def _mover_commit(self, world: World) -> tuple[Label, World]:
        begins = OLD if self.handful == "looks before DUAL" else DUAL
        if world.mover.whole and world.flag.state != begins:
            return ("handful: the flag is elsewhere, ROLLBACK",), self._rest(world)
        return super()._mover_commit(world)

    def _moved(self, world: World, changed: int, gone: int) -> World:
        if not world.mover.whole:
            return super()._moved(world, changed, gone)
        flag = self._flipped(world.flag, DUAL) if world.flag.state == OLD else world.flag
        live = self._flipped(flag._replace(drained=True, new_valid=True, moved=True), LIVE)
        return self._rest(world._replace(flag=live, drain=-1), changed, gone)

    def _flipped(self, flag: FlagRow, target: State) -> FlagRow:
        return next(after for after in flips(flag, self.without, ()) if after.state == target)

    def _open(self, world: World) -> bool:
        counted = (BEGUN, OPEN, PREPARED) if self.prepared != "ignored" else (BEGUN, OPEN)
        return any(app.phase in counted for app in world.apps[self.exempt :])
