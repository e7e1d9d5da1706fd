"""
The flag protocol, looked at in every state it can reach; and each of its parts taken away, which must do harm.

`pytest -m long -s tests/test_model.py` prints the counterexample of each mutation.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from model.cases import FAILING, HOLDING, Case
from model.flagrow import FIRST, FlagRow, flips, may_move
from model.rows import Rows
from model.runner_cases import RUNNER_FAILING, RUNNER_HOLDING
from model.search import TooLarge, explore

from shardmig.states import EDGES, Guard, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).parents[1]
PROMELA = ROOT / "tests" / "model" / "flags.pml"
WAITS = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")
NONE: frozenset[str] = frozenset()


def sampled(cases: Iterable[Case]) -> list[object]:
    """Keep the quick cases in every run; leave the others to the long one."""
    return [pytest.param(c, id=c.name, marks=[] if c.quick else [pytest.mark.long]) for c in cases]


@pytest.mark.parametrize("case", sampled((*HOLDING, *RUNNER_HOLDING)))
def test_nothing_is_ever_wrong_with(case: Case) -> None:
    found = explore(case.model)

    print(f"\n{case.name}: {found}")  # noqa: T201 - counts for docs/protocol.md
    assert found.holds, str(found)


@pytest.mark.parametrize("case", sampled((*FAILING, *RUNNER_FAILING)))
def test_harm_is_done_by(case: Case) -> None:
    found = explore(case.model)

    print(f"\n{case.name}: {found}")  # noqa: T201 - the trace, for people
    assert not found.holds, "the model does not see what this mutation breaks"
    assert case.harm in found.trace[-1], str(found)


# --------------------------------------------------------------------------------------------------------------------
# The model itself: does it mean what it says?


def test_the_model_walks_the_edges_of_the_product_and_no_others() -> None:
    edges = {(edge.source, edge.target) for edge in EDGES if edge.has_move}
    ready = [FlagRow(state, drained=True, new_valid=True, old_valid=True, moved=True) for state in State]

    walked = {(State(row.state), State(after.state)) for row in ready for after in flips(row, NONE, ())}

    assert edges == walked


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge.has_move], ids=str)
def test_an_edge_of_the_model_waits_and_forgets_as_the_product_says(edge: object) -> None:
    for e in EDGES:
        if e is not edge or e.guard is Guard.NONE:
            continue
        row = FlagRow(e.source, drained=True, new_valid=True, old_valid=True, moved=True)
        after = next(a for a in flips(row, NONE, ()) if a.state == e.target)
        assert (e.forgets, False) == (not after.moved, after.drained)
        assert e.invalidates is None or not getattr(after, e.invalidates)
        unready = row._replace(**{e.guard.value: False})
        assert e.target not in [a.state for a in flips(unready, NONE, ())]


def test_the_docs_tell_every_edge_what_it_waits_for_and_how_many_cases_there_are() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in page.splitlines() if line.startswith("| ")}
    for edge in EDGES:
        if edge.has_move:
            [waits] = [waits for name, waits in rows if name == f"{edge.source.name} → {edge.target.name}"]
            assert {
                Guard.NONE: waits.startswith(("G0", "nothing")),
                Guard.DRAINED: "drained" in waits,
                Guard.NEW_VALID: "`new_valid`" in waits,
                Guard.OLD_VALID: "`old_valid`" in waits,
            }[edge.guard], edge

    assert f"{len(HOLDING)} variants that hold" in page
    assert f"{len(FAILING)} with one thing taken away" in page
    assert f"each of the {len(FAILING)} cases that fail" in page
    assert f"{len(RUNNER_HOLDING)} variants of what a runner does hold" in page
    assert f"{len(RUNNER_FAILING)} with one thing taken away do harm" in page


def test_every_wait_can_be_taken_away() -> None:
    """A wait that has become a word without effect would let its mutation pass for the whole protocol."""
    rows = [
        FlagRow(state, drained, new_valid, old_valid, moved=True)
        for state in State
        for drained in (True, False)
        for new_valid in (True, False)
        for old_valid in (True, False)
    ]
    for wait in WAITS:
        assert any(
            list(flips(row, NONE, ())) != list(flips(row, frozenset({wait}), ()))
            or may_move(row, NONE) != may_move(row, frozenset({wait}))
            for row in rows
        ), wait


def test_every_state_stays_within_reach() -> None:
    """Nothing leads into a dead end: from wherever it is, the flag can still come to each of its states."""
    model = Rows()
    before: dict[object, set[object]] = {}
    seen = {model.canonical(world) for world in model.begin()}
    todo = list(seen)
    while todo:
        world = todo.pop()
        for _, reached in model.steps(world):
            after = model.canonical(reached)
            before.setdefault(after, set()).add(world)
            if after not in seen:
                seen.add(after)
                todo.append(after)
    for state in State:
        reaching: set[object] = {world for world in seen if world.flag.state == state}
        frontier = list(reaching)
        while frontier:
            more = before.get(frontier.pop(), set()) - reaching
            reaching |= more
            frontier += more
        assert len(seen) == len(reaching), state


def test_a_trace_keeps_its_names_and_begins_at_the_beginning() -> None:
    found = explore(Rows(without=frozenset({"W2"})))

    assert FIRST.state == State.OLD
    assert (
        "flip: OLD → DUAL",
        "flip: DUAL → LIVE",
        "whoever begins now in LIVE reads new, which is stale",
    ) == found.trace


def test_a_model_too_large_is_no_proof() -> None:
    with pytest.raises(TooLarge):
        explore(Rows(), limit=100)


# --------------------------------------------------------------------------------------------------------------------
# The same in Promela, for Spin: written independently, so that one mistake is not made twice

MUTATIONS = (
    *(f"DROP_{wait}" for wait in WAITS),
    "SKIP_OLD_LIVE",
    "SKIP_LIVE_OLD",
    "LATE_DRAIN",
    "SPLIT_MOVE",
    "UNAWARE",
)


def spin(where: Path, *defines: str) -> str:
    flags = [f"-D{name}" for name in defines]
    run(where, ["spin", "-a", *flags, str(PROMELA)])
    run(where, ["gcc", "-O2", "-w", "-DSAFETY", "-DNOREDUCE", *flags, "-o", "pan", "pan.c"])
    return run(where, ["./pan", "-m3000000"])


def run(where: Path, command: Sequence[str]) -> str:
    return subprocess.run(command, cwd=where, check=True, capture_output=True, text=True).stdout


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("spin") and shutil.which("gcc")), reason="spin or gcc is not installed")
@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_spin_agrees(tmp_path: Path, mutation: str | None) -> None:
    said = spin(tmp_path, *filter(None, [mutation]))

    print("\n" + next((line for line in said.splitlines() if "states, stored" in line), said))  # noqa: T201
    assert "max search depth too small" not in said
    assert ("errors: 0" in said) == (mutation is None), said
