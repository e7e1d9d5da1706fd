"""States and edges are data that trigger, runner and model read; here stands what must be true of them."""

from __future__ import annotations

import pytest

from shardmig.states import EDGES, Guard, State, edge, route


@pytest.mark.parametrize(
    ("state", "reads_new", "writes_old", "writes_new"),
    [
        (State.OLD, False, True, False),
        (State.DUAL, False, True, True),
        (State.LIVE, True, True, True),
        (State.DONE, True, False, True),
    ],
)
def test_a_state_says_what_is_read_and_written(
    state: State,
    reads_new: bool,  # noqa: FBT001 - a row of the table
    writes_old: bool,  # noqa: FBT001
    writes_new: bool,  # noqa: FBT001
) -> None:
    assert (reads_new, not reads_new) == (state.reads_new, state.reads_old)
    assert (writes_old, writes_new) == (state.writes_old, state.writes_new)


def test_neighbours_keep_fresh_what_the_other_reads() -> None:
    for one in (e for e in EDGES if e.has_move):
        for writer, reader in ((one.source, one.target), (one.target, one.source)):
            assert writer.writes_new or not reader.reads_new or writer is State.OLD
            fresh_old, fresh_new = writer.writes_old, writer.writes_new
            assert (reader.reads_new and fresh_new) or (reader.reads_old and fresh_old)


def test_with_a_move_edges_join_neighbours_only_and_go_both_ways() -> None:
    with_move = {(e.source, e.target) for e in EDGES if e.has_move}

    assert {(a, b) for a in State for b in State if abs(a - b) == 1} == with_move


def test_without_a_move_a_flag_is_only_old_or_live() -> None:
    assert {(State.OLD, State.LIVE), (State.LIVE, State.OLD)} == {(e.source, e.target) for e in EDGES if not e.has_move}
    with pytest.raises(ValueError, match="only ever OLD or LIVE"):
        route(State.OLD, State.DONE, has_move=False)


def test_switching_back_waits_for_no_drain() -> None:
    back = edge(State.LIVE, State.DUAL, has_move=True)

    assert back is not None
    assert Guard.OLD_VALID is back.guard


def test_a_route_takes_one_edge_after_the_other() -> None:
    assert [State.DUAL, State.LIVE, State.DONE] == [e.target for e in route(State.OLD, State.DONE, has_move=True)]
    assert [State.LIVE, State.DUAL] == [e.target for e in route(State.DONE, State.DUAL, has_move=True)]
    assert () == route(State.LIVE, State.LIVE, has_move=True)
