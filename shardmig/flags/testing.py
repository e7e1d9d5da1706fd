"""
Testing both worlds: what code in one state writes, code in a neighbouring state reads.

    SPLIT = Contract(flags, SPLIT_NAME, write=save_customer, read=load_customer, samples=[("Ada", "Lovelace")])

A flag's neighbours run side by side while a shard is switched, so these pairs, and no others, must get on with each
other. `Contract` tries them all, with the application's own functions on a real shard. `integrations.pytest_plugin`
makes a test of it in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shardmig.states import EDGES, State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    from shardmig.flags.connection import Flags
    from shardmig.flags.core import Flag, View

__all__ = ["Contract", "adjacent"]

Holder = TypeVar("Holder")  # a connection or session of the application
Sample = TypeVar("Sample")  # what the application wants to store: any value with ==
Key = TypeVar("Key")

MOVE = "the move fills what DUAL leaves"
ROUND_TRIP = "forward and back lose nothing"


def adjacent(*, has_move: bool = True) -> tuple[tuple[State, State], ...]:
    """List the (writer, reader) pairs that run at the same time: ten for a flag with a move."""
    edges = {(edge.source, edge.target) for edge in EDGES if edge.has_move == has_move}
    states = {state for edge in edges for state in edge}
    return tuple(sorted(edges | {(state, state) for state in states}))


@dataclass(frozen=True, slots=True)
class _Do:
    """One transaction of a case: call a function of the application in a state."""

    state: State
    function: Callable[..., Any]
    arguments: tuple[object, ...]
    needs_view: bool = True


class Contract(Generic[Holder, Sample, Key]):
    """
    What must hold of an application's code for one flag.

    Args:
        flags: the application's flags.
        flag: the flag under test.
        write: stores a sample as the view says and returns its key: `write(holder, view, sample)`.
        read: fetches it back as the view says: `read(holder, view, key)`; must equal the sample.
        samples: values to try, awkward ones first: empty, missing, long, foreign.
        move: runs the migration's move over all rows: `move(holder)`; None for a flag without one.
        has_move: whether the flag walks through DUAL; False: it is only ever OLD or LIVE.
        forward: old representation -> new, as the application computes it.
        back: new representation -> old.
        old_samples: values for which back(forward(x)) == x must hold.
        new_samples: values for which forward(back(y)) == y must hold.

    `write`, `read` and `move` may all be coroutine functions; then use `averify`. They run in transactions with the
    flag's state overridden, so the shard needs a ledger and the structure, and its rows stay behind.
    """

    def __init__(
        self,
        flags: Flags,
        flag: Flag,
        *,
        write: Callable[[Holder, View, Sample], Key] | Callable[[Holder, View, Sample], Awaitable[Key]],
        read: Callable[[Holder, View, Key], Sample] | Callable[[Holder, View, Key], Awaitable[Sample]],
        samples: Sequence[Sample],
        move: Callable[[Holder], object] | None = None,
        has_move: bool = True,
        forward: Callable[[Any], Any] | None = None,
        back: Callable[[Any], Any] | None = None,
        old_samples: Sequence[Any] = (),
        new_samples: Sequence[Any] = (),
    ) -> None:
        if not samples:
            raise ValueError("a contract without samples would hold for any code")
        self.flags = flags
        self.flag = flag
        self._write = write
        self._read = read
        self._samples = tuple(samples)
        self._move = move
        self._has_move = has_move
        self._forward = forward
        self._back = back
        self._old_samples = tuple(old_samples)
        self._new_samples = tuple(new_samples)

    @property
    def is_async(self) -> bool:
        """Whether the application's functions must be awaited."""
        return iscoroutinefunction(self._write)

    def cases(self) -> dict[str, tuple[State, State] | None]:
        """Name every case: the adjacent pairs that this release can be in, the move, the round trip."""
        pairs = [pair for pair in adjacent(has_move=self._has_move) if min(pair) >= self.flag.at_least]
        named: dict[str, tuple[State, State] | None] = {
            f"{writer.name} writes, {reader.name} reads": (writer, reader) for writer, reader in pairs
        }
        if self._move is not None and self.flag.at_least <= State.DUAL:
            named[MOVE] = None
        if self._forward is not None and self._back is not None:
            named[ROUND_TRIP] = None
        return named

    def verify(self, case: str, begin: Callable[[], AbstractContextManager[Holder]]) -> None:
        """
        Try one case.

        Args:
            case: one of `cases()`.
            begin: opens a transaction with flags and gives what `write` and `read` take, e.g. a session.

        Raises:
            AssertionError: it does not hold; the message says what was written and what was read.
        """
        steps = self._steps(case)
        answer = None
        while (step := _next(steps, answer)) is not None:
            with self.flags.override(self.flag, step.state), begin() as holder:
                answer = step.function(holder, *self._view(step, holder), *step.arguments)

    async def averify(self, case: str, begin: Callable[[], AbstractAsyncContextManager[Holder]]) -> None:
        """Do as `verify` does with coroutine functions."""
        steps = self._steps(case)
        answer = None
        while (step := _next(steps, answer)) is not None:
            with self.flags.override(self.flag, step.state):
                async with begin() as holder:
                    answer = await step.function(holder, *await self._aview(step, holder), *step.arguments)

    def _view(self, step: _Do, holder: Holder) -> tuple[View, ...]:
        return (self.flags.of(holder),) if step.needs_view else ()

    async def _aview(self, step: _Do, holder: Any) -> tuple[View, ...]:  # noqa: ANN401 - a session, if it is like one
        if step.needs_view and hasattr(holder, "sync_session"):  # SQLAlchemy's: it has to connect before, in a greenlet
            return (await self.flags.aof(holder),)
        return self._view(step, holder)

    def _steps(self, case: str) -> Generator[_Do, Any, None]:
        pair = self.cases()[case]
        if pair is not None:
            return self._pair(*pair)
        return self._moved() if case == MOVE else self._round_trip()

    def _pair(self, writer: State, reader: State) -> Generator[_Do, Any, None]:
        for sample in self._samples:
            key = yield _Do(writer, self._write, (sample,))
            found = yield _Do(reader, self._read, (key,))
            _same(sample, found, f"{writer.name} wrote it, {reader.name} reads it")

    def _moved(self) -> Generator[_Do, Any, None]:
        """Rows from before DUAL are moved, rows written in DUAL are moved over: both must read the same in LIVE."""
        keys: list[tuple[Sample, Key, State]] = []
        for state in (State.OLD, State.DUAL):
            for sample in self._samples if state >= self.flag.at_least else ():
                key = yield _Do(state, self._write, (sample,))
                keys.append((sample, key, state))
        for sample, key, state in keys:
            if state is State.DUAL:
                found = yield _Do(State.LIVE, self._read, (key,))
                _same(sample, found, "DUAL wrote it, LIVE reads it before the move")
        assert self._move is not None  # noqa: S101 - cases() says so
        yield _Do(State.DUAL, self._move, (), needs_view=False)
        for sample, key, writer in keys:
            for reader in (State.DUAL, State.LIVE):
                found = yield _Do(reader, self._read, (key,))
                _same(sample, found, f"{writer.name} wrote it, {reader.name} reads it after the move")

    def _round_trip(self) -> Generator[_Do, Any, None]:
        assert self._forward is not None  # noqa: S101 - cases() says so
        assert self._back is not None  # noqa: S101 - cases() says so
        for old in self._old_samples:
            _same(old, self._back(self._forward(old)), "back(forward(x)) is not x")
        for new in self._new_samples:
            _same(new, self._forward(self._back(new)), "forward(back(y)) is not y")
        yield from ()


def _next(steps: Generator[_Do, Any, None], answer: object) -> _Do | None:
    try:
        return steps.send(answer)
    except StopIteration:
        return None


def _same(expected: object, found: object, story: str) -> None:
    if expected != found:
        raise AssertionError(f"{story}: expected {expected!r}, found {found!r}")
