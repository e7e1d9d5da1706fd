"""What the ladder decides: it never makes the application queue behind an old transaction."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shardmig.config import SessionSettings
from shardmig.ladder import Held, Ladder, Try, Wait


def held(transaction: str = "3/7", *, age_s: float | None = 0.0, what: str = "client", **more: Any) -> Held:
    fields = {"pid": 7, "role": None, "application": None, "query": None, "wraparound": False, "may_hurry": False}
    return Held(transaction=transaction, age_s=age_s, what=what, **{**fields, **more})


def ladder() -> Ladder:
    return Ladder(SessionSettings(), deadlock_timeout_ms=1000)


ages = st.one_of(st.none(), st.floats(0, 10))
anybody = st.builds(
    held,
    st.sampled_from(["1/1", "1/2", "1/3"]),
    age_s=ages,
    what=st.sampled_from(["client", "autovacuum", "prepared"]),
    wraparound=st.booleans(),
    may_hurry=st.booleans(),
)


@given(st.lists(anybody, max_size=4), st.integers(0, 9))
def test_it_never_queues_behind_an_old_client_and_never_for_long(found: list[Held], tries: int) -> None:
    one = ladder()
    one.tries = tries
    decision = one.decide(found, now_s=5.0)
    old = [h for h in found if (h.age_s or 0) >= 0.2]
    yielding = [h for h in old if h.what == "autovacuum" and not h.wraparound]

    match decision:
        case Wait():
            assert len(old) > len(yielding) or not all(h.may_hurry for h in yielding)
        case Try(past_autovacuum=True):
            assert old == yielding != []
            assert 1200 >= decision.lock_timeout_ms
        case Try():
            assert [] == old
            assert 120 >= decision.lock_timeout_ms


def test_rungs_grow_with_each_real_try_and_the_last_one_repeats() -> None:
    one = ladder()
    rungs = []
    for one.tries in range(9):
        decision = one.decide([], 0.0)
        assert isinstance(decision, Try)
        rungs.append(decision.lock_timeout_ms)

    for expected, actual in zip((10, 10, 20, 20, 50, 50, 100, 100, 100), rungs, strict=True):
        assert 0.8 * expected <= actual <= 1.2 * expected


def test_an_unknown_age_counts_from_the_first_sight() -> None:
    one = ladder()

    assert isinstance(one.decide([held(age_s=None)], 10.0), Try)
    assert isinstance(one.decide([held(age_s=None)], 10.15), Try)
    assert isinstance(one.decide([held(age_s=None)], 10.25), Wait)
    assert isinstance(one.decide([held("4/1", age_s=None)], 10.3), Try)


def test_the_long_try_past_an_autovacuum_comes_once_a_worker() -> None:
    one = ladder()
    early, late, later = (one.decide([held(age_s=1.0, what="autovacuum")], float(n)) for n in (1, 31, 32))
    other = one.decide([held(age_s=1.0, what="autovacuum", pid=8)], 33.0)

    assert [1200, 1200] == [t.lock_timeout_ms for t in (late, other) if isinstance(t, Try)]
    for softly in (early, later):
        assert isinstance(softly, Wait)
        assert [7] == [blocker.pid for blocker in softly.blockers]
