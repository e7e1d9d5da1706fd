"""The demo shop's migrations: in date, linted, applied to a real server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from psycopg import RawCursor

from shardmig import config
from shardmig.lint import lint_plan
from shardmig.plan import Move, Statement, bind_batch
from shardmig.planfile import dumps
from shardmig.repository import accepted_plans, loaded_plans

if TYPE_CHECKING:
    from conftest import Connect

    from shardmig.config import Config, Shard
    from shardmig.plan import Plan

DIRECTORY = Path(__file__).parents[1] / "migrations"


def shop() -> Config:
    return config.Config.model_validate({"root": DIRECTORY.parent})


def plans() -> list[Plan]:
    return [loaded.plan for loaded in loaded_plans(shop())]


def test_every_plan_is_committed_and_what_its_script_renders_to_to_the_byte() -> None:
    for rendered in loaded_plans(shop(), rerender=True):
        assert rendered.from_file
        assert rendered.script.plan_path.read_text(encoding="utf-8") == dumps(rendered.plan)


def test_the_linter_accepts_them() -> None:
    assert [accepted.plan.flag for accepted in accepted_plans(shop())] == ["shop", "split_name", "order_address"]
    earlier: list[Plan] = []
    for plan in plans():
        assert [str(violation) for violation in lint_plan(plan, earlier) if violation.fails] == []
        earlier.append(plan)


def test_they_need_no_more_than_they_say() -> None:
    split_name, order_address = plans()[1:]

    assert split_name.relax == ("customer.full_name",)
    assert [move.target for _, move in order_address.moves] == ["order_address"]
    assert [move.lossy for plan in (split_name, order_address) for _, move in plan.moves] == [False, False]


def test_their_moves_are_there_and_back_without_loss(shard: Shard, connect: Connect) -> None:
    connection = connect(shard)
    raw = RawCursor(connection)
    structure, *later = plans()
    _apply(raw, structure)
    connection.execute(
        """
        INSERT INTO customer (full_name) VALUES
            ('Grace Brewster Hopper'), ('Cher'), (''), (' leading'), ('trailing '), ('two  blanks'), ('Ада Лавлейс');
        INSERT INTO orders (customer_id, amount, street, zip, city)
        SELECT id, 12.5, nullif(full_name, 'Cher'), '12345', NULL FROM customer;
        """
    )
    before = connection.execute(
        "SELECT c.full_name, o.* FROM orders o JOIN customer c ON c.id = customer_id"
    ).fetchall()
    for plan in later:
        _apply(raw, plan)
    moves = [move for plan in later for _, move in plan.moves]
    for move in moves:
        assert len(_run(raw, move, move.check)) == 7
        _run(raw, move, move.forward)
        assert _run(raw, move, move.check) == []
        assert _run(raw, move, move.back_check or "") == []
    connection.execute("ALTER TABLE customer ALTER full_name DROP NOT NULL")
    connection.execute("UPDATE customer SET full_name = NULL; UPDATE orders SET street = 'stale', zip = NULL")
    for move in moves:
        assert len(_run(raw, move, move.back_check or "")) == 7
        _run(raw, move, move.back or "")
        assert _run(raw, move, move.back_check or "") == []

    after = connection.execute("SELECT c.full_name, o.* FROM orders o JOIN customer c ON c.id = customer_id").fetchall()
    assert sorted(after, key=repr) == sorted(before, key=repr)


def _apply(raw: RawCursor[tuple[object, ...]], plan: Plan) -> None:
    for step in plan.steps:
        if isinstance(step, Statement):
            raw.execute(step.sql.encode())


def _run(raw: RawCursor[tuple[object, ...]], move: Move, text: str) -> list[tuple[object, ...]]:
    raw.execute(bind_batch(text, move.key, lower=False, upper=False).encode())
    return raw.fetchall() if raw.description else []
