"""
The flags a release knows, and the view of them that one transaction has. Pure: nothing here talks to a server.

A view is decided at BEGIN and dies with its transaction. What may outlive a transaction is only a `Reading`: the flags
of one shard under one epoch, immutable, because the epoch is a random token drawn anew whenever a flag changes.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from shardmig.errors import (
    ShardBehind,
    ShardInMaintenance,
    UnknownFlag,
    UnknownState,
    ViewExpired,
    WriteRefused,
    WrongShard,
)
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from shardmig.errors import FlagError
    from shardmig.flags.opening import Details, FlagRow, Opening

__all__ = ["Declared", "Flag", "Peek", "Reading", "View"]

_OldResult = TypeVar("_OldResult")
_NewResult = TypeVar("_NewResult")

_EPOCHS_KEPT = 8  # a shard: a standby that lags shows its readers the epoch before
_OFFLINE = 2  # shardmig.shard.maintenance; 1 is read-only


class Flag:
    """
    A migration's named switch, declared once in an application: `SPLIT_NAME = Flag("split_name")`.

    Args:
        name: the migration's flag, usually its revision without the number.
        at_least: the least state this release understands. A shard below it raises ShardBehind at BEGIN, so that code
            which dropped its old branch can never run where old is what counts.
    """

    __slots__ = ("at_least", "name")

    # Compared by identity: a dictionary finds it without calling back into Python, in every read of every transaction.

    def __init__(self, name: str, *, at_least: State = State.OLD) -> None:
        if not name or any(character.isspace() for character in name):
            raise ValueError(f"{name!r} names no flag; take the name its migration gave it, as in 'split_name'")
        self.name = name
        self.at_least = State(at_least)

    def __repr__(self) -> str:
        """Show how it was declared."""
        return f"Flag({self.name!r}, at_least=State.{self.at_least.name})"


class Peek(NamedTuple):
    """A state seen by some earlier transaction; None and infinity when there was none. Never choose SQL by it."""

    state: State | None
    age_s: float


class Reading:
    """
    The declared flags of one shard under one epoch; never changes once made.

    Attributes:
        epoch: the token under which all of this is true.
        states: every declared flag; a flag without a row is OLD.
        across_tables: flags whose mover inserts rows that a snapshot taken earlier cannot see.
        refusal: why this release may not use the shard at all, or None.
        usual: every transaction may have these states, whatever its isolation level.
    """

    __slots__ = ("across_tables", "epoch", "refusal", "states", "usual")

    def __init__(self, flags: Mapping[str, Flag], rows: list[FlagRow], *, shard: str, release: str | None) -> None:
        known = {row.name: row for row in rows if row.name in flags}
        self.epoch = rows[0].epoch
        self.states = {flag: _state(known.get(name)) for name, flag in flags.items()}
        self.across_tables = frozenset(
            flags[name] for name, row in known.items() if row.cross_table and not row.touch_source
        )
        self.refusal = _unknown_state(known, shard) or _behind(self.states, shard, release)
        self.usual = self.refusal is None and not any(self.states[flag] is State.DUAL for flag in self.across_tables)


def _state(row: FlagRow | None) -> State:
    # A state this version does not know is refused by `_unknown_state`; no view ever shows this OLD.
    return State(row.state) if row is not None and row.state in State._value2member_map_ else State.OLD


def _unknown_state(rows: Mapping[str, FlagRow], shard: str) -> UnknownState | None:
    for row in rows.values():
        if row.state not in State._value2member_map_:
            return UnknownState(
                f"shard {shard} has {row.name} in state {row.state}, which this version of shardmig does not know; "
                "upgrade the application's shardmig"
            )
    return None


def _behind(states: Mapping[Flag, State], shard: str, release: str | None) -> ShardBehind | None:
    behind = [f"{flag.name} {state.name} (needs {flag.at_least.name})" for flag, state in states.items()
              if state < flag.at_least]  # fmt: skip
    if not behind:
        return None
    who = "this release" if release is None else f"release {release}"
    return ShardBehind(
        f"shard {shard} is behind {who}: {', '.join(behind)}; bring it forward (`shardmig apply --shard {shard}`) "
        "or run a release that still understands it"
    )


class View:
    """
    The flags of a shard as one transaction has to take them: the same from BEGIN to its end, gone after it.

    Attributes:
        shard: the shard's name.
        write: whether the transaction may write.
    """

    __slots__ = ("_across", "_flags", "_reading", "_states", "shard", "write")

    def __init__(self, reading: Reading, states: Mapping[Flag, State], *, shard: str, write: bool) -> None:
        self._reading = reading
        self._states = states
        self.shard = shard
        self.write = write

    def __getitem__(self, flag: Flag) -> State:
        """
        Return the flag's state in this transaction.

        Raises:
            ViewExpired: the transaction is over.
            UnknownFlag: the flag is not declared in the Flags object that opened the transaction.
        """
        try:
            return self._states[flag]
        except KeyError:
            raise self._refusal(flag) from None

    def run(
        self, flag: Flag, *, old: Callable[[], _OldResult], new: Callable[[], _NewResult]
    ) -> _OldResult | _NewResult:
        """
        Call what this transaction has to write, in the order that deadlocks with nobody; return what is read.

        Both are called in DUAL and LIVE: old first, then new, always, since writers of two orders deadlock where they
        meet. In a transaction that does not write, only the one that is read is called.
        """
        state = self[flag]
        if not self._runs_both(state):
            return new() if state.reads_new else old()
        old_result, new_result = old(), new()
        return new_result if state.reads_new else old_result

    async def arun(
        self,
        flag: Flag,
        *,
        old: Callable[[], Awaitable[_OldResult]],
        new: Callable[[], Awaitable[_NewResult]],
    ) -> _OldResult | _NewResult:
        """Do as `run` does with functions that return awaitables; one is awaited before the other is called."""
        state = self[flag]
        if not self._runs_both(state):
            return await new() if state.reads_new else await old()
        old_result, new_result = await old(), await new()
        return new_result if state.reads_new else old_result

    def _runs_both(self, state: State) -> bool:
        return self.write and state.writes_old and state.writes_new

    @property
    def epoch(self) -> int:
        """The shard's token for exactly these states; for logs."""
        return int(self._reading.epoch)

    @property
    def expired(self) -> bool:
        """Whether the transaction is over."""
        return self._states is _NO_STATES

    def expire(self) -> None:
        """End the view; whoever ends its transaction calls this first."""
        self._states = _NO_STATES

    def _refusal(self, flag: Flag) -> ViewExpired | UnknownFlag:
        if self.expired:
            return ViewExpired()
        name = getattr(flag, "name", flag)
        if name in {known.name for known in self._states}:
            return UnknownFlag(f"{flag!r} is not the Flag that was declared; ask with that object, not with its name")
        return UnknownFlag(f"{name!r} is not one of this view's flags ({_names(self._states)}); declare it: Flags(…)")

    def __repr__(self) -> str:
        """Show shard and states."""
        states = ", ".join(f"{flag.name}={state.name}" for flag, state in self._states.items())
        return f"<View of {self.shard}: {'expired' if self.expired else states}>"


_NO_STATES: Mapping[Flag, State] = {}


def _names(flags: Mapping[Flag, State]) -> str:
    return ", ".join(flag.name for flag in flags) or "none"


_overrides: ContextVar[Mapping[Flag, State]] = ContextVar("shardmig_overrides", default=_NO_STATES)


class Declared:
    """
    The flags that a release declares, and what its transactions have read of them.

    Safe to share between threads and tasks: what is remembered is replaced, never changed.
    """

    def __init__(self, *flags: Flag, release: str | None = None) -> None:
        self._flags = {flag.name: flag for flag in flags}
        if len(self._flags) != len(flags):
            raise ValueError("two flags bear one name; declare each once and import it where it is used")
        self.release = release
        self._readings: dict[str, Mapping[bytes, Reading]] = {}
        self._last: dict[str, tuple[Reading, float]] = {}
        self._everywhere: Mapping[Flag, State] = _NO_STATES
        self._lock = Lock()

    def __iter__(self) -> Iterator[Flag]:
        """Yield the declared flags in the order they were declared."""
        return iter(self._flags.values())

    def __getitem__(self, name: str) -> Flag:
        """Return the declared flag of this name; UnknownFlag when there is none."""
        try:
            return self._flags[name]
        except KeyError:
            raise UnknownFlag(f"no flag {name!r} is declared; declared: {', '.join(self._flags) or 'none'}") from None

    # -- what a transaction asks, in this order ------------------------------------------------------------------------

    def usual_view(self, epoch: bytes, *, shard: str, write: bool) -> View | None:
        """Return the view where nothing forbids one and nobody overrides it; None: ask what is below."""
        reading = self._readings.get(shard, _NO_READINGS).get(epoch)
        if reading is None or not reading.usual or self._everywhere or _overrides.get():
            return None
        self._last[shard] = (reading, monotonic())
        return View(reading, reading.states, shard=shard, write=write)

    def admits(self, opening: Opening, *, write: bool) -> bool:
        """Say whether a transaction may begin; if not, `refusal` has the words."""
        return opening.maintenance < (1 if write else _OFFLINE) and not opening.read_only

    def refusal(self, opening: Opening, details: Details, *, shard: str, write: bool) -> FlagError:
        """
        Say why a transaction may not begin.

        Returns:
            ShardInMaintenance: the shard is offline, or read-only and the transaction wants to write.
            WriteRefused: the server is a standby or the session read-only, and the transaction wants to write.
        """
        if opening.maintenance >= (1 if write else _OFFLINE):
            return _maintenance(opening, details, shard)
        if details.standby:
            return WriteRefused(
                f"shard {shard}: the server is a standby; send writes to the primary, or say write=False"
            )
        return WriteRefused(f"shard {shard}: the session is read-only (default_transaction_read_only); say write=False")

    def recall(self, opening: Opening, *, shard: str) -> Reading | None:
        """Return what is known under this epoch; None: the flags must be read in this transaction."""
        return self._readings.get(shard, _NO_READINGS).get(opening.epoch)

    def remember(self, rows: list[FlagRow], *, shard: str) -> Reading:
        """Keep the flags under the epoch that came with them, in one statement; two statements could disagree."""
        if not rows:
            raise WrongShard("the shard vanished from this database between two statements", shard=shard)
        reading = Reading(self._flags, rows, shard=shard, release=self.release)
        with self._lock:
            kept = list(self._readings.get(shard, _NO_READINGS).items())[1 - _EPOCHS_KEPT :]
            self._readings[shard] = {**dict(kept), reading.epoch: reading}
        return reading

    def view(self, reading: Reading, opening: Opening, *, shard: str, write: bool) -> View:
        """
        Return the flags for one transaction.

        Raises:
            ShardBehind: a flag is below what this release understands.
            UnknownState: a declared flag is in a state that this version does not know.
            WriteRefused: at this isolation level the transaction could miss rows that a mover inserts meanwhile.
        """
        if reading.refusal is not None:
            raise type(reading.refusal)(str(reading.refusal))
        self._last[shard] = (reading, monotonic())
        states = reading.states
        if self._everywhere or _overrides.get():
            states = self._overridden(states)
        if reading.across_tables and write and opening.one_snapshot:
            _refuse_blind_writes(reading, states, opening, shard)
        return View(reading, states, shard=shard, write=write)

    # -- outside transactions ------------------------------------------------------------------------------------------

    def peek(self, shard: str, flag: Flag) -> Peek:
        """Return the last state a transaction of this process saw, and how long ago; for pages and metrics."""
        self._own(flag)
        overridden = self._overridden({}).get(flag)
        if overridden is not None:
            return Peek(overridden, 0.0)
        if shard not in self._last:
            return Peek(None, float("inf"))
        reading, seen_at = self._last[shard]
        return Peek(reading.states[flag], monotonic() - seen_at)

    @contextmanager
    def override(self, flag: Flag, state: State, *, everywhere: bool = False) -> Iterator[None]:
        """
        Give a flag a state in every transaction that begins inside; for tests.

        Args:
            flag: a declared flag.
            state: not below the flag's `at_least`.
            everywhere: in all threads and tasks of the process, not only in this context and those copied from it.
        """
        self._own(flag)
        if state < flag.at_least:
            raise ValueError(f"{flag.name} declares at_least={flag.at_least.name}; {state.name} is below it")
        if everywhere:
            before, self._everywhere = self._everywhere, {**self._everywhere, flag: state}
            try:
                yield
            finally:
                self._everywhere = before
        else:
            token = _overrides.set({**_overrides.get(), flag: state})
            try:
                yield
            finally:
                _overrides.reset(token)

    def _own(self, flag: Flag) -> None:
        if self._flags.get(getattr(flag, "name", "")) is not flag:
            raise UnknownFlag(f"{getattr(flag, 'name', flag)!r} is not declared in this Flags object")

    def _overridden(self, states: Mapping[Flag, State]) -> dict[Flag, State]:
        mine = {flag: state for flag, state in _overrides.get().items() if self._flags.get(flag.name) is flag}
        return {**states, **self._everywhere, **mine}


_NO_READINGS: Mapping[bytes, Reading] = {}


def _maintenance(opening: Opening, details: Details, shard: str) -> ShardInMaintenance:
    mode = "offline" if opening.maintenance >= _OFFLINE else "read-only"
    because = f" ({details.reason})" if details.reason else ""
    return ShardInMaintenance(
        f"shard {shard} is in maintenance, {mode}{because}; try again in {details.retry_after_s} s",
        retry_after=details.retry_after_s,
    )


def _refuse_blind_writes(reading: Reading, states: Mapping[Flag, State], opening: Opening, shard: str) -> None:
    """
    Refuse writes under one snapshot while a mover inserts rows into a second table.

    An UPDATE or DELETE there hits 0 rows where the mover committed a row after the snapshot was taken, and nothing
    fails (PostgreSQL manual, "Repeatable Read Isolation Level": only rows that the snapshot sees can conflict).
    """
    for flag in reading.across_tables:
        if states[flag] is State.DUAL:
            raise WriteRefused(
                f"shard {shard}: {flag.name} is {states[flag].name} and its mover inserts into a second table; at "
                f"{opening.isolation.upper()} a write could miss such a row. Use READ COMMITTED, or let all of "
                "its moves touch their source rows (touch_source=True)"
            )
