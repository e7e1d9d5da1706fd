"""Whoever switches and moves in a forced schedule: the product's own edges, drains and batches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from model.fences import Fences
from moving import FLAG, REVISION

from forced.actors import Actor
from shardmig import switching
from shardmig.checks import Disagreement
from shardmig.keyset import bound
from shardmig.moves import MoveRun
from shardmig.session import Query
from shardmig.states import Guard, State, route
from shardmig.turn import Turn

if TYPE_CHECKING:
    import psycopg
    from moving import Moving

    from forced.stage import Stage
    from shardmig.checks import Direction
    from shardmig.events import Event
    from shardmig.keyset import Key
    from shardmig.rehearsal import Piece
    from shardmig.session import Session

__all__ = ["Mate", "Runner"]

_SEEN = Disagreement(orphaned=(["1"],))  # whether or not: a batch of the model removes orphans at once
_FLAG_LOCKS = (
    "SELECT pid FROM pg_locks WHERE relation = 'shardmig.flag'::regclass AND granted AND pid <> pg_backend_pid()"
)
_LEASES = "SELECT FROM lease JOIN shardmig.flag ON lease.state <> flag.state WHERE until > clock_timestamp()"


class _MovesBlindly(MoveRun):
    """Compares nothing on its way: the move alone must be right."""

    async def _sample(self, batch: object) -> None:
        """Look at nothing."""


class _PurgesAtOnce(_MovesBlindly):
    """Removes an orphan by the delete alone."""

    def _purge(self, after: Key | None, upto: Key | None) -> Piece:
        both = super()._purge(after, upto)
        return replace(both, statements=both.statements[1:])


class _Working(Actor):
    """Works on the shard as shardmig does."""

    def __init__(self, stage: Stage, name: str, here: Moving, session: Session) -> None:
        super().__init__(stage, name)
        self.here = here
        self.session = session

    @property
    def pid(self) -> int:  # type: ignore[override]
        """The session's."""
        return self.session.backend_pid

    def look(self, _: Event) -> None:
        """Count the looks of a drain that found somebody."""
        self.looks += 1


class Runner(_Working):
    """
    Takes edges, and earns what they ask for, unless the model leaves that out.

    Attributes:
        keeper: a connection of its own, for locks that mechanisms hold which do not work.
    """

    def __init__(self, stage: Stage, name: str, here: Moving, keeper: psycopg.AsyncConnection[Any]) -> None:
        super().__init__(stage, name, here, here.session)
        self.keeper = keeper
        self.before: tuple[Any, ...] = ()

    # -- edges ---------------------------------------------------------------------------------------------------------

    async def go(self, target: str) -> None:
        """Go to a state, edge by edge; in one jump where the model has it."""
        fences = self._fences
        if fences is not None and fences.fence in {"freeze", "maintenance"}:
            await self._alone_inside(fences)
            return
        source, wanted = State((await self.here.flag()).state), State[target]
        if (source, wanted) in self.stage.rows.skips:
            await self.flip(target)
        else:
            for edge in route(source, wanted, has_move=True):
                await self._earn(edge.guard, edge.source)
                await self.flip(edge.target.name)

    async def flip(self, target: str) -> None:
        """Take one edge, ready or not."""
        self.before = (
            *self.stage.row("SELECT state, drained, new_valid, old_valid, epoch FROM shardmig.flag"),
            *self.stage.row("SELECT epoch FROM shardmig.shard"),
        )
        await switching.flip(self.here.turn, await self.here.flag(), State[target])

    async def _earn(self, guard: Guard, source: State) -> None:
        flag, without = await self.here.flag(), self.stage.rows.without
        match guard:
            case Guard.DRAINED if ("W3" if source is State.LIVE else "W4") not in without:
                await self.drain()
            case Guard.NEW_VALID if not flag.new_valid and "W2" not in without:
                await self.move()
            case Guard.OLD_VALID if not flag.old_valid and "W6" not in without:
                await self._move("back", "W5", "old_valid")

    async def fail_over(self) -> None:
        """Go on as a standby that never got the last flip: its rows of the ledger are those of before."""
        psql, (*flag, epoch) = self.stage.look, self.before
        with psql.transaction():
            psql.execute("SET LOCAL session_replication_role = replica")
            columns = "state = %s, drained = %s, new_valid = %s, old_valid = %s, epoch = %s"
            psql.execute(f"UPDATE shardmig.flag SET {columns}", flag)
            psql.execute("UPDATE shardmig.shard SET epoch = %s", [epoch])

    # -- drains --------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Wait out whoever is open, as the protocol or the model does, unless that is recorded already."""
        row = await self.here.flag()
        if row.drained:
            return
        fence = self._fences.fence if self._fences is not None else "epoch"
        if fence in {"lease", "holders"}:
            while await self.here.rows(_LEASES if fence == "lease" else _FLAG_LOCKS):
                self.looks += 1
        if fence in {"lease", "holders", "advisory"}:  # who has the lock for itself has waited for everybody
            await self.session.execute("UPDATE shardmig.flag SET drained = true")
        else:
            await switching.drain(self.here.turn, row, listener=self.look)

    # -- moves ---------------------------------------------------------------------------------------------------------

    async def move(self) -> None:
        """Move what is left, and record that new is valid."""
        await self._move("forward", "W1", "new_valid")

    async def begin_move(self) -> None:
        """Read the last key to move, and no more."""
        run = self.here.run()
        await run._claim()
        await run._begin()

    async def _move(self, direction: Direction, wait: str, column: str) -> None:
        rows = self.stage.rows
        if wait not in rows.without:
            await self.drain()
        kind = _PurgesAtOnce if rows.purge == "one" else _MovesBlindly
        base = self.here.run(direction)
        run = kind(base.turn, base.revision, base.number, base.move, direction, base.pace)
        await run._claim()
        await run._begin()
        left = run._row.cursor != run._row.upto
        while run._row.cursor != run._row.upto:
            await run._next_batch()
        if left and direction == "forward" and self.here.move.cross_table and rows.purge != "no":
            await run._repair(_SEEN, None, None)
        await self.here.finish(column)

    # -- mechanisms that do not work -----------------------------------------------------------------------------------

    @property
    def _fences(self) -> Fences | None:
        return self.stage.model if isinstance(self.stage.model, Fences) else None

    async def lock(self) -> None:
        """Take the lock on which a mechanism relies, if it relies on one."""
        match self._fences and self._fences.fence:
            case "advisory":
                await self.keeper.execute("SELECT pg_advisory_lock(7)")
            case "holders":
                await self.keeper.execute("BEGIN; LOCK TABLE gate")
            case "freeze":
                await self.keeper.execute("BEGIN; LOCK TABLE shardmig.flag")

    async def unlock(self) -> None:
        """Let it go."""
        match self._fences and self._fences.fence:
            case "advisory":
                await self.keeper.execute("SELECT pg_advisory_unlock(7)")
            case "holders":
                await self.keeper.execute("COMMIT")

    async def _alone_inside(self, fences: Fences) -> None:
        """Move and flip at once, believing that nobody is inside."""
        if fences.fence == "maintenance":
            await self.keeper.execute("SELECT shardmig.maintenance('offline', 'moving')")
            if fences.drains:
                await switching.drain_shard(self.session, "maintenance", listener=self.look)
            await self.keeper.execute("BEGIN")
        await self.keeper.execute("SET LOCAL session_replication_role = replica")
        await self.keeper.execute("UPDATE orders SET line = 'new ' || street")
        await self.keeper.execute(f"UPDATE shardmig.flag SET state = {State.DONE:d}, epoch = epoch + 1")
        await self.keeper.execute("UPDATE shardmig.shard SET epoch = epoch + 1")
        await self.keeper.execute("COMMIT")
        if fences.fence == "maintenance":
            await self.keeper.execute("SELECT shardmig.maintenance('off', 'moved')")

    async def hide(self) -> None:
        """Let nobody read the flag: a forgotten GRANT, a broken network, a service that is down."""
        await self.keeper.execute("REVOKE USAGE ON SCHEMA shardmig FROM PUBLIC")

    async def show(self) -> None:
        """Let everybody read it again."""
        await self.keeper.execute("GRANT USAGE ON SCHEMA shardmig TO PUBLIC")


class Mate(_Working):
    """A second process of the same runner, that was paused in the middle of something."""

    def __init__(self, stage: Stage, name: str, here: Moving, session: Session) -> None:
        super().__init__(stage, name, here, session)
        self.turn = Turn(session, here.turn.term)

    async def drain(self) -> None:
        """Drain, and vouch for the flip that was last when it began; a late one for whichever is last now."""
        row = await switching.read_flag(self.session, FLAG)
        if self.stage.rows.late:
            await switching.drain_shard(self.session, FLAG, listener=self.look)
            await self.session.execute("UPDATE shardmig.flag SET drained = true")
        else:
            await switching.drain(self.turn, row, listener=self.look)

    async def start_batch(self) -> None:
        """Do a batch up to its COMMIT."""
        run = MoveRun(self.turn, REVISION, self.here.number, self.here.move, "forward", self.here.run().pace)
        await run._claim()
        await run._begin()
        self.reached = run._row.upto
        record = [self._record()] if self.stage.rows.fenced else []
        rows = bound(self.here.move.forward, self.here.move, None, self.reached)
        await self.session.flight([Query("BEGIN"), *record, rows])

    async def end_batch(self) -> None:
        """Commit it."""
        record = [] if self.stage.rows.fenced else [self._record()]
        await self.session.flight([*record, Query("COMMIT")])

    def _record(self) -> Query:
        assert self.reached is not None
        return self.turn.record_batch(
            REVISION, self.here.number, expected=(None, None), reached=(self.reached, None), rows=2
        )
