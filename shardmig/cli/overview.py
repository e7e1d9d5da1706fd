"""
Where shards are, as a table that people can read: a line a shard while there are few, else what is not as everywhere.

A fleet of hundreds with thirty flags is in one state nearly everywhere. So the state that most shards have is told once
a flag, at the end; a line names only what is different, and shards of which the same is to be said share it. Where each
shard has a line, that says how all its flags are; of many, those that are LIVE are counted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from shardmig.cli.console import out, tell
from shardmig.outcomes import Outcome
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardmig.status import ShardStatus

__all__ = ["ALIKE", "SHARDS", "FlagTable", "Row", "applied", "brief", "lines", "named", "others", "own", "show", "told"]

SHARDS = 20  # more than these do not get a line each
ALIKE = frozenset({Outcome.DONE, Outcome.PENDING, Outcome.INTERRUPTED})  # nothing is wrong there

_FLAGS = 4  # more than these are not spelled out on every line
_NAMED = 3  # of many flags, as an example
_LISTED = 8  # shards on a line that they share

_COLOURS = {
    Outcome.DONE: "green",
    Outcome.PENDING: "yellow",
    Outcome.PARKED: "yellow",
    Outcome.MAINTENANCE: "yellow",
    Outcome.INTERRUPTED: "yellow",
}


class Row(NamedTuple):
    """A line: of which shard or shards, how they are, a short fact in a column of its own, and the rest."""

    shards: str
    outcome: Outcome
    fact: str
    rest: str


def show(
    found: Sequence[ShardStatus], *, head: str, flags: Sequence[str], only: Sequence[str] = (), wide: bool = False
) -> None:
    """
    Write where every shard is.

    Args:
        found: the shards, in the order of the configuration.
        head: the newest revision.
        flags: every flag of the plans, oldest first.
        only: speak of these flags alone.
        wide: a line a shard with every flag, however many there are.
    """
    states = {
        one.shard: {row.flag: State(row.state).name for row in one.records.flags.values()}
        for one in found
        if one.records is not None
    }
    alone = wide or len(found) <= SHARDS
    table = FlagTable(states, flags, only=only, wide=wide, alone=alone)
    rows = [
        Row(one.shard, one.outcome, applied(one), _joined(table.of(one.shard), brief(one.shard, one.reason)))
        for one in found
    ]
    lines(rows if alone else _shared(rows))
    for line in table.told_once():
        tell(line)
    done = sum(one.outcome is Outcome.DONE for one in found)
    tell(f"head {head}; {done} of {len(found)} shards are there{others(one.outcome for one in found)}")


class FlagTable:
    """
    The flags of several shards, and what of them is worth a word.

    Args:
        states: shard → flag → state, of shards with a ledger; a flag that is missing is OLD: it is not begun there.
        flags: in which order to name them; those that only shards have follow.
        only: speak of these alone.
        wide: spell out all, however many there are.
        alone: each shard has a line of its own, so nothing is told once.
    """

    def __init__(
        self,
        states: Mapping[str, Mapping[str, str]],
        flags: Sequence[str] = (),
        *,
        only: Sequence[str] = (),
        wide: bool = False,
        alone: bool = False,
    ) -> None:
        self._states = states
        self._alone = alone
        self._only = only
        names = dict.fromkeys([*flags, *(flag for mine in states.values() for flag in mine)])
        cut = not wide and not only and len(names) > _FLAGS
        self._usual = {name: self._commonest(name) for name in names} if cut else {}

    def of(self, shard: str) -> str:
        """Say which flags of a shard are in which state, as far as that is not told once."""
        mine = self._states.get(shard)
        if mine is None:
            return ""
        if self._only:
            return _spelled([(flag, _state(mine, flag)) for flag in self._only])
        if not self._usual:
            return _spelled(mine.items())
        by_state: dict[str, list[str]] = {}
        for flag, usual in self._usual.items():
            if (state := _state(mine, flag)) != usual or self._alone:
                by_state.setdefault(state, []).append(flag)
        return _folded(by_state) if self._alone else _listed(by_state)

    def told_once(self) -> list[str]:
        """Say what no line of a shard does: a line for each flag asked for, or one for all of many."""
        if self._only:
            return [self._counted(flag) for flag in self._only]
        if self._alone or not (self._usual and self._states):
            return []
        same: dict[str, list[str]] = {}
        differ = []
        for flag, usual in self._usual.items():
            if all(_state(mine, flag) == usual for mine in self._states.values()):
                same.setdefault(usual, []).append(flag)
            else:
                differ.append(self._counted(flag))
        parts = [
            f"{len(flags)} {state} on all" + (f" ({_cut(flags)})" if state != State.LIVE.name else "")
            for state, flags in same.items()
        ]
        if differ:
            parts.append(f"{len(differ)} differ{'s' if len(differ) == 1 else ''}: {_cut(differ, sep='; ')}")
        where = f"{len(self._states)} shard{'s' if len(self._states) != 1 else ''}"
        return [f"{len(self._usual)} flags on {where}: {'; '.join(parts)}"]

    def _commonest(self, flag: str) -> str:
        """Return the state that most shards have; of as many the later one."""
        counts = Counter(_state(mine, flag) for mine in self._states.values())
        return max(counts, key=lambda state: (counts[state], State[state]), default=State.OLD.name)

    def _counted(self, flag: str) -> str:
        """Count the shards in each state of a flag, the commonest first."""
        counts = Counter(_state(mine, flag) for mine in self._states.values()).most_common()
        return f"{flag} " + (", ".join(f"{state} on {count}" for state, count in counts) or "on no shard")


def _state(mine: Mapping[str, str], flag: str) -> str:
    return mine.get(flag, State.OLD.name)


def _spelled(flags: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{flag} {state}" for flag, state in flags)


def _listed(by_state: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(f"{_cut(flags)} {state}" for state, flags in by_state.items())


def _folded(by_state: Mapping[str, Sequence[str]]) -> str:
    """Name the flags that are not LIVE, and count those that are."""
    away = {state: flags for state, flags in by_state.items() if state != State.LIVE.name}
    live = len(by_state.get(State.LIVE.name, ()))
    counted = f"{live} {'more' if away else 'flags'} LIVE" if live else ""
    return _joined(_listed(away), counted, sep=", ")


def _cut(names: Sequence[str], sep: str = ", ") -> str:
    """List names, of many the first ones; "and 1 more" would be no shorter than its name."""
    if len(names) <= _NAMED + 1:
        return sep.join(names)
    return f"{sep.join(names[:_NAMED])} and {len(names) - _NAMED} more"


def brief(shard: str, reason: str) -> str:
    """Return the first line of a reason, without the shard's name, which stands beside it."""
    return own(shard, reason).partition("\n")[0]


def told(reasons: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Say the reason of each shard, without its name; a long one only where it comes first, later ones refer to it."""
    first: dict[str, str] = {}
    said = {}
    for shard, reason in reasons:
        text = own(shard, reason)
        line, _, more = text.partition("\n")
        before = first.setdefault(text.replace(f"--shard {shard}", "--shard NAME"), shard)
        said[shard] = f"{line} (more at {before})" if more and before != shard else text
    return said


def own(shard: str, reason: str) -> str:
    """Take the shard's name from the beginning of an error's text."""
    return reason.removeprefix(f"{shard}: ").removeprefix(f"{shard}, ")


def _joined(*parts: str, sep: str = "; ") -> str:
    return sep.join(part for part in parts if part)


def _shared(rows: Iterable[Row]) -> list[Row]:
    """Give shards of which the same is to be said one line, where the first of them stands."""
    groups: dict[Row, list[str]] = {}
    for row in rows:
        groups.setdefault(row._replace(shards=""), []).append(row.shards)
    return [row._replace(shards=named(shards)) for row, shards in groups.items()]


def named(shards: Sequence[str]) -> str:
    """Name shards that share a line; of many, their number and the first ones."""
    if len(shards) <= _LISTED:
        return ", ".join(shards)
    return f"{len(shards)} shards: {', '.join(shards[:_NAMED])}, …"


def applied(one: ShardStatus) -> str:
    """Name the newest revision whose plan is finished there."""
    finished = [row.revision for row in one.records.migrations.values() if row.finished_at] if one.records else []
    return finished[-1] if finished else "-"


def others(outcomes: Iterable[Outcome]) -> str:
    """Count the outcomes of shards that are not done, in the order in which `Outcome` has them."""
    counts = Counter(outcomes)
    shown = [f"{counts[one]} {one.value}" for one in Outcome if one is not Outcome.DONE and counts[one]]
    return f" ({', '.join(shown)})" if shown else ""


def lines(rows: Sequence[Row]) -> None:
    """Write rows in columns."""
    name = max((len(row.shards) for row in rows), default=0)
    middle = max((len(row.fact) for row in rows), default=0)
    for row in rows:
        shown = (f"{row.outcome.value:<16}", _COLOURS.get(row.outcome, "red"))
        line = Text.assemble(f"{row.shards:<{name}}  ", shown, f"{row.fact:<{middle}}  {row.rest}")
        line.rstrip()
        out.print(line)
