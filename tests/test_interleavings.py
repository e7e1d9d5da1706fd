"""
A batch of a cross-table move and two writers, on a real server, in every order that their statements can run.

The model says what holds; here PostgreSQL itself is asked, with the SQL that the product derives. Each mutation must be
found by at least one schedule.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from schedules import Actor, Tally, every_schedule

from shardmig import derivation
from shardmig.keyset import bound
from shardmig.plan import Move, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from conftest import Connect

    from shardmig.config import Shard
    from shardmig.session import Query

    Before = tuple[str | None, str | None]
    Program = Callable[[], Generator[Query | str, int, None]]

TABLES = """
CREATE TABLE orders (id bigint PRIMARY KEY, street text);
CREATE TABLE order_address (order_id bigint PRIMARY KEY, line text);
"""
SHAPE = derivation.Shape("orders", ("id",), "order_address", ("order_id",))
TO_NEW, TO_OLD = {"line": "'new ' || street"}, {"street": "substr(line, 5)"}
MOVE = Move(
    table="orders",
    key=("id",),
    target="order_address",
    target_key=("order_id",),
    writes=("line",),
    restores=("street",),
    forward=derivation.forward(SHAPE, TO_NEW),
    check=derivation.check(SHAPE, TO_NEW, {"line": "TEXT"}),
    orphans=derivation.orphans(SHAPE),
    purge=derivation.purge(SHAPE),
    back=derivation.back(SHAPE, TO_OLD),
    back_check=derivation.back_check(SHAPE, TO_OLD, {"street": "TEXT"}),
)

# What is there before: each side's row, or none. In DUAL new may hold anything; in LIVE it is what counts.
BEFORE_FORWARD = {
    "not moved yet": ("'s0'", None),
    "moved before": ("'s0'", "'new s0'"),
    "dead value": ("'s0'", "'new dead'"),
    "orphan": (None, "'new dead'"),
    "nothing": (None, None),
}
BEFORE_BACK = {"stale": ("'dead'", "'new s0'"), "never written": ("NULL", "'new s0'"), "nothing": (None, None)}
OPS = ("put", "set", "delete")
PAIRS = tuple(itertools.combinations_with_replacement(OPS, 2))


# --------------------------------------------------------------------------------------------------------------------
# Who takes part


def writer(op: str, name: str, *, new_first: bool = False, both: bool = False, looks: bool = False) -> Program:
    """
    Write both tables, old first; what is not there in old is left alone in new.

    With `looks` it reads something before, as a flag is read: at REPEATABLE READ that is when its snapshot is taken.
    """

    def program() -> Generator[Query | str, int, None]:
        if looks:
            yield "SELECT FROM orders"
        old = {
            "put": f"INSERT INTO orders VALUES (1, '{name}') ON CONFLICT (id) DO UPDATE SET street = excluded.street",
            "set": f"UPDATE orders SET street = '{name}' WHERE id = 1",
            "delete": "DELETE FROM orders WHERE id = 1",
        }[op]
        new = (
            "DELETE FROM order_address WHERE order_id = 1"
            if op == "delete"
            else f"INSERT INTO order_address VALUES (1, 'new {name}') "
            "ON CONFLICT (order_id) DO UPDATE SET line = excluded.line"
        )
        if new_first:
            yield new
            yield old
        else:
            hits = yield old
            if hits or both:
                yield new
        yield "COMMIT"

    return program


def batch(move: Move = MOVE) -> Program:
    """Move every row forward: one statement."""

    def program() -> Generator[Query | str, int, None]:
        yield bound(move.forward, move, None, None)
        yield "COMMIT"

    return program


def repair(move: Move = MOVE, *, locks_first: bool = True) -> Program:
    """Move and remove orphans, as the check does where rows disagree."""

    def program() -> Generator[Query | str, int, None]:
        yield bound(move.forward, move, None, None)
        assert move.orphans is not None
        assert move.purge is not None
        if locks_first:
            yield bound(f"{move.orphans}\nFOR UPDATE", move, None, None, target=True)
        yield bound(move.purge, move, None, None, target=True)
        yield "COMMIT"

    return program


def reverse(move: Move = MOVE) -> Program:
    """Fill old from new, with the flag in LIVE after DONE."""

    def program() -> Generator[Query | str, int, None]:
        assert move.back is not None
        yield bound(move.back, move, None, None)
        yield "COMMIT"

    return program


class Stage:
    """The tables, three connections, and one that looks."""

    def __init__(self, shard: Shard, connect: Connect) -> None:
        self.look = connect(shard)
        self.look.execute(TABLES)
        # All waiting is ended by the schedule, none by the server's clock.
        self.connections = [connect(shard, options="-c deadlock_timeout=60s") for _ in range(3)]

    def play(
        self,
        before: Before,
        mover: Program,
        *writers: Program,
        back: bool = False,
        first: bool = False,
        isolation: str = "READ COMMITTED",
    ) -> Tally:
        """Run every schedule of a mover and one or two writers; wrong is a row that disagrees afterwards."""
        first_one, *others = self.connections
        actors = [Actor("mover", first_one, mover, gives_way=True)]
        for name, program, connection in zip("AB", writers, others, strict=False):
            actors.append(Actor(name, connection, program, isolation=isolation))
        return every_schedule(
            actors,
            self.look,
            prepare=lambda: self._prepare(before),
            judge=lambda: self._judge(back=back),
            first=first,
        )

    def find(self, before: Before, mover: Program, *writers: Program, back: bool = False, **how: Any) -> Tally:
        """Run schedules until one goes wrong."""
        return self.play(before, mover, *writers, back=back, first=True, **how)

    def _prepare(self, before: Before) -> None:
        old, new = before
        statements = ["DELETE FROM orders", "DELETE FROM order_address"]
        statements += [] if old is None else [f"INSERT INTO orders VALUES (1, {old})"]
        statements += [] if new is None else [f"INSERT INTO order_address VALUES (1, {new})"]
        self.look.execute("; ".join(statements))

    def _judge(self, *, back: bool) -> str | None:
        """Compare as the product's check does, and both ways."""
        assert MOVE.orphans is not None
        assert MOVE.back_check is not None
        check = MOVE.back_check if back else MOVE.check
        differing = self._keys(bound(check, MOVE, None, None))
        orphaned = self._keys(bound(MOVE.orphans, MOVE, None, None, target=True))
        if not differing and not orphaned:
            return None
        rows = self.look.execute(
            "SELECT o.street, a.line FROM orders o FULL JOIN order_address a ON o.id = a.order_id"
        ).fetchall()
        return f"{rows}"

    def _keys(self, query: Query) -> list[tuple[Any, ...]]:
        return self.look.execute(query.sql).fetchall()  # no bounds, so no parameters


@pytest.fixture
def stage(shard: Shard, connect: Connect) -> Stage:
    return Stage(shard, connect)


def scenes(before: dict[str, Before]) -> list[Any]:
    """List what is there before and what the two writers do; every run sees one of each beginning."""
    listed = []
    for number, (name, rows) in enumerate(before.items()):
        for place, pair in enumerate(PAIRS):
            quick = place == (4 if rows[0] is None else number * 2 % len(PAIRS))
            marks = [] if quick else [pytest.mark.long]
            listed.append(pytest.param(rows, pair, id=f"{name}, {' and '.join(pair)}", marks=marks))
    return listed


# --------------------------------------------------------------------------------------------------------------------
# What holds


@pytest.mark.parametrize(("before", "pair"), scenes(BEFORE_FORWARD))
def test_no_schedule_of_a_batch_and_two_writers_makes_rows_differ(
    stage: Stage, before: Before, pair: tuple[str, str]
) -> None:
    """A row that no writer touches may be an orphan still: the repair below is what removes those."""
    orphaned = before[0] is None and before[1] is not None
    mover = repair() if orphaned else batch()
    tally = stage.play(before, mover, writer(pair[0], "a"), writer(pair[1], "b"))

    print(f"\n{tally.schedules} schedules")  # noqa: T201
    assert [] == tally.wrong[:5]
    assert tally.schedules > 20


@pytest.mark.parametrize(("before", "pair"), scenes(BEFORE_BACK))
def test_no_schedule_of_a_batch_back_and_two_writers_makes_rows_differ(
    stage: Stage, before: Before, pair: tuple[str, str]
) -> None:
    tally = stage.play(before, reverse(), writer(pair[0], "a"), writer(pair[1], "b"), back=True)

    print(f"\n{tally.schedules} schedules")  # noqa: T201
    assert [] == tally.wrong[:5]
    assert tally.schedules > 20


@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("before", BEFORE_FORWARD.values(), ids=BEFORE_FORWARD)
def test_no_schedule_of_a_repair_and_two_writers_makes_rows_differ(
    stage: Stage, before: Before, pair: tuple[str, str]
) -> None:
    tally = stage.play(before, repair(), writer(pair[0], "a"), writer(pair[1], "b"))

    print(f"\n{tally.schedules} schedules")  # noqa: T201
    assert [] == tally.wrong[:5]


TOUCHES = MOVE.model_copy(update={"forward": derivation.forward(replace(SHAPE, touch=True), TO_NEW)})
ONE_SNAPSHOT = ("REPEATABLE READ", "SERIALIZABLE")


@pytest.mark.parametrize("isolation", ONE_SNAPSHOT)
@pytest.mark.parametrize("before", ["not moved yet", "moved before", "dead value", "nothing"])
def test_writers_with_one_snapshot_are_right_or_fail_when_the_move_touches_its_source(
    stage: Stage, before: str, isolation: str
) -> None:
    for op in OPS:
        one = writer(op, "a", looks=True)
        tally = stage.play(BEFORE_FORWARD[before], batch(TOUCHES), one, isolation=isolation)
        assert [] == tally.wrong[:5]
        assert tally.schedules > 5


@pytest.mark.parametrize("isolation", ONE_SNAPSHOT)
@pytest.mark.parametrize("before", BEFORE_BACK.values(), ids=BEFORE_BACK)
def test_writers_with_one_snapshot_are_right_or_fail_while_rows_move_back(
    stage: Stage, before: Before, isolation: str
) -> None:
    for op in OPS:
        tally = stage.play(before, reverse(), writer(op, "a", looks=True), back=True, isolation=isolation)
        assert [] == tally.wrong[:5]
        assert tally.schedules > 5


@pytest.mark.long
@pytest.mark.parametrize("isolation", ONE_SNAPSHOT)
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_two_writers_with_one_snapshot_are_right_or_fail(
    stage: Stage, pair: tuple[str, str], isolation: str, *, back: bool
) -> None:
    before = BEFORE_BACK["stale"] if back else BEFORE_FORWARD["moved before"]
    writers = (writer(op, name, looks=True) for op, name in zip(pair, "ab", strict=True))
    tally = stage.play(before, reverse() if back else batch(TOUCHES), *writers, back=back, isolation=isolation)

    print(f"\n{tally.schedules} schedules")  # noqa: T201
    assert [] == tally.wrong[:5]


# --------------------------------------------------------------------------------------------------------------------
# What does not


def changed(sql: str, old: str, new: str) -> str:
    """Replace a part of derived SQL that must be in it."""
    assert old in sql
    return sql.replace(old, new)


UNLOCKED = MOVE.model_copy(update={"forward": changed(MOVE.forward, "FOR SHARE", "")})
KEEPS = MOVE.model_copy(update={"forward": MOVE.forward.partition("DO UPDATE")[0] + "DO NOTHING"})
CARELESS = MOVE.model_copy(update={"back": changed(MOVE.back or "", "FOR SHARE", "")})


def test_a_move_that_does_not_lock_its_source_is_found(stage: Stage) -> None:
    tally = stage.find(BEFORE_FORWARD["not moved yet"], batch(UNLOCKED), writer("set", "a"), writer("delete", "b"))

    assert tally.wrong


def test_a_move_that_keeps_what_is_there_is_found(stage: Stage) -> None:
    """Where nobody writes the row, nobody mends it."""
    assert stage.find(BEFORE_FORWARD["dead value"], batch(KEEPS), nobody(), nobody()).wrong


def nobody() -> Program:
    def program() -> Generator[Query | str, int, None]:
        yield "COMMIT"

    return program


@pytest.mark.parametrize("before", ["not moved yet", "moved before"])
def test_writers_who_take_new_first_are_found(stage: Stage, before: str) -> None:
    tally = stage.find(
        BEFORE_FORWARD[before], batch(), writer("delete", "a", new_first=True), writer("set", "b", new_first=True)
    )

    assert tally.wrong


def test_writers_of_two_orders_deadlock(stage: Stage) -> None:
    tally = stage.find(BEFORE_FORWARD["moved before"], batch(), writer("set", "a"), writer("set", "b", new_first=True))

    assert any("deadlock of A and B" in line for line in tally.wrong)


def test_writers_who_write_new_for_what_is_not_in_old_are_found(stage: Stage) -> None:
    tally = stage.find(BEFORE_FORWARD["not moved yet"], batch(), writer("delete", "a"), writer("set", "b", both=True))

    assert tally.wrong


def test_a_purge_in_one_statement_is_found(stage: Stage) -> None:
    tally = stage.find(BEFORE_FORWARD["orphan"], repair(locks_first=False), writer("put", "a"), writer("set", "b"))

    assert tally.wrong


def test_a_move_back_that_does_not_lock_what_it_reads_is_found(stage: Stage) -> None:
    tally = stage.find(BEFORE_BACK["stale"], reverse(CARELESS), writer("set", "a"), writer("put", "b"), back=True)

    assert tally.wrong


@pytest.mark.parametrize("isolation", ONE_SNAPSHOT)
def test_writers_with_one_snapshot_are_found_when_the_move_does_not_touch_its_source(
    stage: Stage, isolation: str
) -> None:
    """WriteRefused prevents it, at both levels."""
    one = writer("delete", "a", looks=True)

    assert stage.find(BEFORE_FORWARD["not moved yet"], batch(), one, isolation=isolation).wrong


def test_the_move_played_here_is_the_one_that_runs() -> None:
    """Bounds make no other statement of it: they are parameters."""
    assert bound(MOVE.forward, MOVE, None, None).sql == MOVE.forward.replace("{batch}", "(TRUE)")
    assert bound(MOVE.forward, MOVE, ["1"], ["2"]).params == ["1", "2"]
    assert quote("id") in bound(MOVE.forward, MOVE, ["1"], None).sql
