"""The mover: what a batch does to the row, statement by statement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.flagrow import may_move
from model.world import (
    ABSENT,
    GONE,
    MOVER,
    NOBODY,
    NOT_WAITING,
    RESTING,
    SOURCE,
    TARGET,
    WAITING,
    Mover,
    Settings,
    World,
    in_batch,
    locked,
)
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.search import Label

__all__ = ["Batches"]

OLD, DUAL, LIVE, DONE = State


class Batches(Settings):
    """The mover's half of the model."""

    # -- the mover -----------------------------------------------------------------------------------------------------

    def mover_steps(self, world: World) -> Iterator[tuple[Label, World]]:
        mover = world.mover
        if not mover.stage:
            direction = None if world.flag.moved else may_move(world.flag, self.without)
            if direction is not None:
                yield self.take_batch(world, direction)
            return
        if mover.waits == WAITING:
            # Its lock_timeout is below deadlock_timeout: it gives way before the server picks a victim.
            yield ("mover: lock timeout, ROLLBACK",), self._rest(world)
        else:
            yield self._batch_step(world)
            yield ("mover: crashes, ROLLBACK",), self._rest(world)

    def take_batch(self, world: World, direction: str) -> tuple[Label, World]:
        if direction == "forward":
            mover = Mover("read", found=world.old != ABSENT, value=world.old, repair=not self.check)
            return ("mover: begins a batch and takes its snapshot",), world._replace(mover=mover)
        if self.tables == "one" or self.back == "source":
            mover = Mover("claim", found=self.there(world, SOURCE))
            return ("mover: begins a batch back",), world._replace(mover=mover)
        mover = Mover("back", found=world.new != ABSENT, orphan=True)
        return ("mover: begins a batch back and takes its snapshot",), world._replace(mover=mover)

    def _batch_step(self, world: World) -> tuple[Label, World]:
        return getattr(self, f"_mover_{world.mover.stage}")(world)  # type: ignore[no-any-return]

    def _mover_read(self, world: World) -> tuple[Label, World]:
        """Forward, first half of the statement: the source row."""
        mover = world.mover
        locks = self.lock != "none"
        following = self._last(world) if self.tables == "one" else "write"
        if mover.waits == GONE or not mover.found:
            return ("mover: finds no source row",), in_batch(world, stage=following, found=False, waits=NOT_WAITING)
        if self.tables == "one" and not locks:
            return ("mover: SELECTs the row",), in_batch(world, stage="update")
        if locks and world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the source row",), in_batch(world, waits=WAITING)
        if not locks:
            return ("mover: reads the source row, unlocked",), in_batch(world, stage=following)
        found = world.old != ABSENT
        after = in_batch(world, stage=following, found=found, value=world.old)
        return ("mover: locks and reads the source row",), locked(after, SOURCE, MOVER)

    def _mover_update(self, world: World) -> tuple[Label, World]:
        """One table, SELECT and UPDATE apart: the value is that of the SELECT."""
        if world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the row",), in_batch(world, waits=WAITING)
        after = in_batch(world, stage=self._last(world), found=world.old != ABSENT)
        return ("mover: UPDATEs the row with what it selected",), locked(after, SOURCE, MOVER)

    def _mover_write(self, world: World) -> tuple[Label, World]:
        """Forward, second half: the target row."""
        mover = world.mover
        following = "look" if mover.repair and self.purge != "no" else self._last(world)
        if not mover.found:
            return ("mover: has nothing to write",), in_batch(world, stage=following)
        if world.locks[TARGET] not in (NOBODY, MOVER):
            return ("mover: waits for the target row",), in_batch(world, waits=WAITING)
        found = not (self.nothing and world.new != ABSENT)
        after = in_batch(world, stage=following, found=found, waits=NOT_WAITING)
        return ("mover: writes the target row" if found else "mover: leaves the target row as it is",), locked(
            after, TARGET, MOVER
        )

    def _mover_look(self, world: World) -> tuple[Label, World]:
        """Purge, first statement: lock a target row that has no source row in the statement's snapshot."""
        mover = world.mover
        orphan = mover.orphan or (world.new != ABSENT and world.old == ABSENT and not mover.found)
        if not orphan or mover.waits == GONE:
            return ("mover: sees no orphan",), in_batch(world, stage="commit", orphan=False, waits=NOT_WAITING)
        if world.locks[TARGET] not in (NOBODY, MOVER):
            return ("mover: sees an orphan, waits for it",), in_batch(world, orphan=True, waits=WAITING)
        if self.purge == "one":
            after = in_batch(world, stage="commit", orphan=True)
            return ("mover: deletes the orphan",), locked(after, TARGET, MOVER)
        after = in_batch(world, stage="delete", orphan=True)
        return ("mover: locks the orphan",), locked(after, TARGET, MOVER)

    def _mover_delete(self, world: World) -> tuple[Label, World]:
        """Purge, second statement: its snapshot is newer than the lock."""
        still = world.old == ABSENT
        after = in_batch(world, stage="commit", orphan=still)
        return ("mover: deletes the orphan" if still else "mover: it is an orphan no more",), after

    def _mover_claim(self, world: World) -> tuple[Label, World]:
        """Back, source first: lock the source row in a statement of its own."""
        mover = world.mover
        if mover.waits == GONE or not mover.found:
            return ("mover: finds no source row",), in_batch(world, stage="commit_back", found=False, waits=NOT_WAITING)
        if world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the source row",), in_batch(world, waits=WAITING)
        following = "commit_back" if self.tables == "one" else "take"
        after = in_batch(world, stage=following, found=self.there(world, SOURCE))
        return ("mover: locks the source row",), locked(after, SOURCE, MOVER)

    def _mover_take(self, world: World) -> tuple[Label, World]:
        """Back, source first: read the target row in the next statement, whose snapshot is newer than the lock."""
        if world.new != ABSENT and world.locks[TARGET] != NOBODY:
            return ("mover: waits for the target row",), in_batch(world, waits=WAITING)
        after = in_batch(world, stage="commit_back")
        return ("mover: reads the target row",), locked(after, TARGET, MOVER) if world.new != ABSENT else after

    def _mover_back(self, world: World) -> tuple[Label, World]:
        """Back, target first: lock and read the target row, if the snapshot has one."""
        mover = world.mover
        if mover.found and mover.waits != GONE:
            if world.locks[TARGET] != NOBODY:
                return ("mover: waits for the target row",), in_batch(world, waits=WAITING)
            after = in_batch(world, stage="fill", value=world.new)
            return ("mover: locks and reads the target row",), locked(after, TARGET, MOVER)
        return ("mover: finds no target row",), in_batch(world, stage="fill", found=False, waits=NOT_WAITING)

    def _mover_fill(self, world: World) -> tuple[Label, World]:
        """Back, target first: the source row; without a target row only a version that nobody changed since."""
        mover = world.mover
        if not self.there(world, SOURCE) or mover.waits == GONE or not (mover.found or mover.orphan):
            return ("mover: leaves the source row as it is",), in_batch(
                world, stage="commit_back", found=False, orphan=False, waits=NOT_WAITING
            )
        if world.locks[SOURCE] != NOBODY:
            return ("mover: waits for the source row",), in_batch(world, waits=WAITING)
        after = in_batch(world, stage="commit_back", orphan=False, found=True)
        return ("mover: writes the source row",), locked(after, SOURCE, MOVER)

    def _last(self, world: World) -> str:
        """Say what comes behind the rows."""
        return "check" if world.mover.whole else "commit"

    def _mover_commit(self, world: World) -> tuple[Label, World]:
        mover = world.mover
        changed = gone = 0
        if self.tables == "one":
            changed = int(mover.found and world.old != ABSENT)
        elif mover.orphan:
            changed = gone = 2
        elif mover.found:
            changed = 2 | (self.lock == "touch")
        return ("mover: COMMIT",), self._moved(world._replace(new=self.copied(world)), changed, gone)

    def copied(self, world: World) -> int:
        """Tell what new is once the batch is committed."""
        mover = world.mover
        if mover.orphan:
            return ABSENT
        if mover.found and (self.tables != "one" or world.old != ABSENT):
            return world.old if self.lock != "none" else mover.value
        return world.new

    def _mover_commit_back(self, world: World) -> tuple[Label, World]:
        mover, old = world.mover, world.old
        if mover.found and self.there(world, SOURCE):
            old = world.new
        return ("mover: COMMIT",), self._moved(world._replace(old=old), 1 if mover.found else 0, 0)

    def _moved(self, world: World, changed: int, gone: int) -> World:
        # Progress commits with the rows; a fenced batch cannot be overtaken, so the flag is where it was.
        return self._rest(world._replace(flag=world.flag._replace(moved=True)), changed, gone)

    def _rest(self, world: World, changed: int = 0, gone: int = 0) -> World:
        return self.released(world, MOVER, changed, gone)._replace(mover=RESTING)
