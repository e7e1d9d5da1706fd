"""Whole plans: what is accepted is sealed, what is not is listed; history gives names their meaning."""

from __future__ import annotations

from typing import Any

import pytest

from shardmig import derivation
from shardmig.config import Lint
from shardmig.errors import LintFailed
from shardmig.lint import accept, lint_plan
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.states import State

NAMES = derivation.Shape("customer", ("id",))
FORWARD = {"first_name": "split_part(full_name, ' ', 1)"}
BACK = {"full_name": "first_name || ''"}
INVOICE = derivation.Shape("orders", ("id",), target="invoice", target_key=("order_id",), where="paid")
TOTAL = {"total": "amount * 2"}
AMOUNT = {"amount": "total / 2"}


def statement(sql: Any, **facts: Any) -> Any:
    return Statement(sql=sql, **facts)


def plan(*steps: Any, revision: Any = "0002_split_name", flag: Any = None, **facts: Any) -> Any:
    flag = flag or revision.partition("_")[2]
    return Plan(revision=revision, parent=None, flag=flag, script_sha256="x", steps=steps, **facts)


def same_table(**changes: Any) -> Any:
    texts = {
        "forward": derivation.forward(NAMES, FORWARD),
        "check": derivation.check(NAMES, FORWARD, {"first_name": "TEXT"}),
        "back": derivation.back(NAMES, BACK),
        "back_check": derivation.back_check(NAMES, BACK, {"full_name": "TEXT"}),
    }
    facts = {"table": "customer", "key": ("id",), "writes": ("first_name",), "restores": ("full_name",)}
    return Move(**{**facts, **texts, **changes})


def cross_table(shape: Any = INVOICE, **changes: Any) -> Any:
    types = {"total": "numeric(12, 2)", "amount": "numeric"}
    texts = {
        "forward": derivation.forward(shape, TOTAL),
        "check": derivation.check(shape, TOTAL, types),
        "orphans": derivation.orphans(shape),
        "purge": derivation.purge(shape),
        "back": derivation.back(shape, AMOUNT),
        "back_check": derivation.back_check(shape, AMOUNT, types),
    }
    facts = {
        "table": "orders",
        "key": ("id",),
        "target": "invoice",
        "target_key": ("order_id",),
        "writes": ("total",),
        "restores": ("amount",),
    }
    return Move(**{**facts, **texts, **changes})


ADD_NAME = statement("ALTER TABLE customer ADD COLUMN first_name text", line=9)
NEW_INVOICE = statement("CREATE TABLE invoice (order_id bigint PRIMARY KEY, total numeric(12, 2))")


def split(move: Any = None) -> Any:
    return plan(ADD_NAME, Switch(to=State.DUAL), move or same_table(), Switch(to=State.LIVE))


def invoices(move: Any = None) -> Any:
    steps = (NEW_INVOICE, Switch(to=State.DUAL), move or cross_table(), Switch(to=State.LIVE))
    return plan(*steps, revision="0003_invoice")


def failing(judged: Any) -> Any:
    return [(v.code, v.part) for v in lint_plan(judged) if v.fails]


def codes(judged: Any, *earlier: Any, settings: Any = None) -> Any:
    return [violation.code for violation in lint_plan(judged, earlier, settings)]


# --------------------------------------------------------------------------------------------------------------------
# Accepting


def test_an_accepted_plan_says_what_its_statements_lock_create_and_build() -> None:
    accepted = accept(
        plan(
            statement("CREATE TABLE line (id int PRIMARY KEY, t_id int REFERENCES public.t (id) ON DELETE CASCADE)"),
            statement("CREATE TABLE note (id int PRIMARY KEY, line_id int REFERENCES line (id) ON DELETE CASCADE)"),
            statement("CREATE INDEX ix_line ON line (t_id)"),
            statement("ALTER TABLE t ADD COLUMN n int"),
            statement("COMMENT ON COLUMN t.n IS 'x'"),
            statement("COMMENT ON TABLE line IS 'x'"),
            statement("CREATE INDEX CONCURRENTLY ix_t ON t (n)", transactional=False),
            Switch(to=State.LIVE),
        )
    )

    assert accepted.locks == {1: "public.t", 4: "t", 5: "t"}
    assert accepted.creates == {1: "line", 2: "note"}
    assert accepted.indexes == {7: "ix_t"}


def test_a_refused_plan_names_every_violation_with_step_and_line() -> None:
    with pytest.raises(LintFailed, match="step 1") as caught:
        accept(plan(statement("DROP TABLE t", line=7), statement("ALTER TABLE t ADD COLUMN n int NOT NULL", line=8)))

    assert [(v.code, v.step, v.line) for v in caught.value.violations] == [("SM101", 1, 7), ("SM120", 2, 8)]


def test_warnings_do_not_keep_a_plan_from_being_accepted() -> None:
    judged = plan(statement("CREATE TYPE mood AS ENUM ('x')"))

    assert codes(judged) == ["SM192"]
    assert accept(judged).plan is judged


def test_no_index_is_built_concurrently_on_a_table_that_is_known_to_be_partitioned() -> None:
    created = plan(statement("CREATE TABLE event (id int) PARTITION BY RANGE (id)"))
    index = plan(
        statement("CREATE INDEX CONCURRENTLY ix ON public.event (id)", transactional=False),
        revision="0002_index",
        flag="index",
    )

    assert [v.code for v in lint_plan(index, [created]) if v.fails] == ["SM140"]
    assert [v.code for v in lint_plan(index) if v.fails] == []


def test_a_new_table_locks_every_table_that_its_keys_point_to() -> None:
    judged = plan(
        statement(
            "CREATE TABLE pair (id int PRIMARY KEY, up int REFERENCES pair ON DELETE CASCADE, "
            "t_id int REFERENCES t ON DELETE CASCADE, "
            "r_id int REFERENCES ref ON DELETE CASCADE, other int REFERENCES public.t ON DELETE CASCADE)"
        )
    )
    accepted = accept(judged)

    assert (accepted.locks, accepted.locked(1), accepted.locked(2)) == ({1: "t"}, ("t", "ref"), ())


def test_what_a_plan_allows_with_a_reason_is_accepted_and_still_reported() -> None:
    judged = plan(statement("ALTER TABLE t ADD COLUMN n json"), allowed=("SM125 step 1: nobody selects distinct",))

    assert [(v.code, v.allowed) for v in lint_plan(judged)] == [("SM125", "nobody selects distinct")]
    assert accept(judged).locks == {1: "t"}


def test_what_one_step_allows_another_one_does_not() -> None:
    columns = [statement(f"ALTER TABLE {table} ADD COLUMN n json") for table in ("t", "ref")]

    one, both = (plan(*columns, allowed=(f"SM125 step {steps}: nobody selects distinct",)) for steps in ("1", "1, 2"))

    assert [(v.code, v.step) for v in lint_plan(one) if v.fails] == [("SM125", 2)]
    assert failing(both) == []


@pytest.mark.parametrize(
    ("sql", "allowed"),
    [
        ("ALTER TABLE t ADD COLUMN n json", "SM125 step 1:"),  # no reason
        ("ALTER TABLE t ADD COLUMN n json", "SM125 nobody selects distinct"),  # no step
        ("ALTER TABLE t ADD COLUMN n json", "SM125 step 2: nobody selects distinct"),  # another call
        ("DROP TABLE t", "SM101 step 1: I know what I do"),  # never
        ("ALTER TABLE t ADD COLUMN n int", "SM125 step 1: just in case"),  # nothing to allow
        ("UPDATE shardmig.flag SET state = 2", "SM006 step 1: please"),
    ],
)
def test_an_allowance_in_vain_is_refused(sql: Any, allowed: Any) -> None:
    with pytest.raises(LintFailed):
        accept(plan(statement(sql), allowed=(allowed,)))


def test_a_concurrent_index_and_nothing_else_stands_outside_a_transaction() -> None:
    inside = plan(statement("CREATE INDEX CONCURRENTLY ix ON t (a)"))
    outside = plan(statement("ALTER TABLE t ADD COLUMN n int", transactional=False))

    assert codes(inside) == codes(outside) == ["SM144"]


# --------------------------------------------------------------------------------------------------------------------
# History


def test_what_a_step_creates_is_new_to_later_steps_and_not_to_earlier_ones() -> None:
    create = statement("CREATE TABLE x (id int PRIMARY KEY)")
    index = statement("CREATE UNIQUE INDEX ux ON x (id)")

    assert failing(plan(create, index)) == []
    assert {code for code, _ in failing(plan(index, create))} == {"SM140", "SM141"}


def test_a_table_of_an_earlier_plan_is_existing_and_its_enum_is_known() -> None:
    first = plan(
        statement("CREATE TYPE mood AS ENUM ('x')"), statement("CREATE TABLE x (id int)"), revision="0001_first"
    )
    later = plan(statement("ALTER TABLE x ADD COLUMN m mood"), statement("CREATE INDEX ix ON x (id)"))

    assert codes(later, first) == ["SM140"]
    assert "SM126" in codes(later)


def test_moves_write_what_a_needed_plan_has_added() -> None:
    earlier = plan(ADD_NAME, revision="0001_names", flag="names")
    move = same_table()
    needing = plan(move, revision="0002_fill", needs=("names",))

    assert codes(needing, earlier) == []
    assert "SM201" in codes(plan(move, revision="0002_fill"), earlier)


def test_a_flag_or_revision_stands_once_and_needs_names_one_that_is_there() -> None:
    first = plan(ADD_NAME, revision="0001_names", flag="names")

    assert codes(plan(revision="0002_x", flag="names"), first) == ["SM220"]
    assert codes(plan(revision="0001_names", flag="names"), first) == ["SM220"]
    assert codes(plan(revision="0002_x", needs=("nmaes",)), first) == ["SM220"]


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE tag (id int PRIMARY KEY)",
        "ALTER TABLE public.customer ADD COLUMN nick text",
        "CREATE TYPE mood AS ENUM ('sad')",
        "ALTER TABLE tag ADD COLUMN id bigint",
        "CREATE INDEX CONCURRENTLY by_label ON public.orders (id)",
        "CREATE SEQUENCE by_label",
        "CREATE SEQUENCE tag_number",
        "CREATE SEQUENCE tag_serial_seq",
        "CREATE TABLE uq_label (id int)",
        "CREATE TABLE other (id int, CONSTRAINT uq_label UNIQUE (id))",
        "CREATE TABLE other (id int CONSTRAINT by_label PRIMARY KEY)",
    ],
)
def test_nothing_is_added_twice_by_two_plans_or_by_one(sql: str) -> None:
    """People may have dropped the first on every shard: then it may be allowed."""
    adding = (
        statement("CREATE TABLE tag (id int PRIMARY KEY, serial serial, label text CONSTRAINT uq_label UNIQUE)"),
        statement("CREATE INDEX by_label ON tag (label)"),
        statement("CREATE SEQUENCE tag_number"),
        statement("ALTER TABLE customer ADD COLUMN nick text"),
        statement("CREATE TYPE mood AS ENUM ('ok')"),
    )
    first, second = plan(*adding, revision="0001_tag"), plan(statement(sql), revision="0002_tag_again")

    assert "SM221" not in codes(first)
    assert "SM221" not in codes(second)
    assert "SM221" in codes(second, first)
    assert "SM221" in codes(plan(*adding, statement(sql)))


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE INDEX CONCURRENTLY by_label ON shop.orders (id)",
        "CREATE INDEX CONCURRENTLY ON orders (id)",
        "CREATE TABLE other (id int PRIMARY KEY, label text UNIQUE)",
        "CREATE TABLE shop.tag (serial serial)",
    ],
)
def test_what_lies_in_another_schema_or_gets_its_name_of_the_server_is_not_there_twice(sql: str) -> None:
    first = plan(
        statement("CREATE TABLE tag (id int PRIMARY KEY, serial serial, label text UNIQUE)"),
        statement("CREATE INDEX by_label ON tag (label)"),
        revision="0001_tag",
    )

    assert "SM221" not in codes(plan(statement(sql), revision="0002_other"), first)


def test_a_name_that_another_table_has_and_an_index_on_long_text_are_warned_of() -> None:
    first = plan(statement("CREATE TABLE x (id int, body text)"), revision="0001_first")
    later = plan(
        statement("ALTER TABLE t ADD COLUMN body int"),
        statement("CREATE INDEX CONCURRENTLY ix ON x (body)", transactional=False),
        statement("CREATE INDEX CONCURRENTLY iy ON x USING hash (body)", transactional=False),
    )

    assert codes(later, first) == ["SM191", "SM193"]


def test_a_key_to_a_new_table_must_cascade_when_that_one_loses_rows_with_an_old_one() -> None:
    parent = statement(
        "CREATE TABLE a (id int PRIMARY KEY, t_id int REFERENCES t (id) ON DELETE CASCADE ON UPDATE CASCADE)"
    )
    blocking = statement("CREATE TABLE b (a_id int REFERENCES a (id))")
    cascading = statement("CREATE TABLE b (a_id int REFERENCES a (id) ON DELETE CASCADE)")

    assert codes(plan(parent, blocking)) == ["SM133"]
    assert codes(plan(parent, cascading)) == []


# --------------------------------------------------------------------------------------------------------------------
# Moves: what is derived passes, and each thing that makes it safe is needed


@pytest.mark.parametrize(
    "judged",
    [
        split(),
        invoices(),
        invoices(
            cross_table(
                derivation.Shape("orders", ("id",), target="invoice", target_key=("order_id",), touch=True),
                touch_source=True,
            )
        ),
    ],
    ids=["same table", "cross table", "touching its source"],
)
def test_derived_moves_are_accepted(judged: Any) -> None:
    assert accept(judged).plan is judged


FROM_S = " UPDATE customer SET first_name = s.x FROM s WHERE s.id = customer.id"
BATCHES = [
    ("no batch", "UPDATE customer SET first_name = full_name WHERE id < 10", "SM205"),
    ("an OR", "UPDATE customer SET first_name = full_name WHERE {batch} OR true", "SM205"),
    ("NOT", "UPDATE customer SET first_name = full_name WHERE NOT {batch}", "SM205"),
    ("twice", "UPDATE customer SET first_name = full_name WHERE {batch} AND {batch}", "SM205"),
    ("in a literal", "UPDATE customer SET first_name = '{batch}' WHERE id < 10", "SM205"),
    ("in a comment", "UPDATE customer SET first_name = full_name WHERE id < 10 -- {batch}", "SM205"),
    ("as a value", "UPDATE customer SET first_name = ({batch})::text WHERE id < 10", "SM205"),
    ("in a sub-select", "UPDATE customer SET first_name = full_name WHERE id IN (SELECT 1 WHERE {batch})", "SM205"),
    ("glued to a digit", "UPDATE customer SET first_name = full_name WHERE {batch}1", None),
    ("a parameter", "UPDATE customer SET first_name = $1 WHERE {batch}", "SM306"),
    ("keeps", "UPDATE customer SET first_name = full_name WHERE {batch} AND first_name IS NULL", "SM207"),
    ("builds on itself", "UPDATE customer SET first_name = coalesce(first_name, full_name) WHERE {batch}", "SM210"),
    ("another column", "UPDATE customer SET full_name = '' WHERE {batch}", "SM201"),
    ("another table", "UPDATE orders SET first_name = '' WHERE {batch}", "SM213"),
    ("unlocked", "UPDATE customer SET first_name = o.x FROM orders o WHERE o.id = customer.id AND {batch}", "SM206"),
    ("unlocked sub-select", "UPDATE customer SET first_name = (SELECT max(x) FROM orders) WHERE {batch}", "SM206"),
    ("stale self", "WITH s AS MATERIALIZED (SELECT id, x FROM customer WHERE {batch})" + FROM_S, "SM206"),
    (
        "skips",
        "WITH s AS MATERIALIZED (SELECT id, x FROM orders WHERE {batch} FOR SHARE SKIP LOCKED)" + FROM_S,
        "SM206",
    ),
    ("not materialized", "WITH s AS (SELECT id, x FROM orders WHERE {batch} FOR SHARE)" + FROM_S, "SM206"),
    ("weak", "WITH s AS MATERIALIZED (SELECT id, x FROM orders WHERE {batch} FOR KEY SHARE)" + FROM_S, "SM206"),
    ("deletes", "DELETE FROM customer WHERE {batch}", "SM202"),
    ("selects", "SELECT 1 FROM customer WHERE {batch}", "SM213"),
    ("does structure", "DROP TABLE customer", "SM101"),
    ("two statements", "UPDATE customer SET first_name = '' WHERE {batch}; DROP TABLE t", "SM002"),
]


@pytest.mark.parametrize(("text", "code"), [(t, c) for _, t, c in BATCHES], ids=[name for name, _, _ in BATCHES])
def test_a_hand_written_forward_is_refused_for_each_thing_it_lacks(text: Any, code: Any) -> None:
    found = [found for found, part in failing(split(same_table(forward=text))) if part == "forward"]

    assert found != []
    assert code is None or code in found


def test_a_hand_written_move_equal_to_the_derived_one_passes() -> None:
    forward = (
        "WITH s AS MATERIALIZED (SELECT id, x FROM orders WHERE {batch} FOR SHARE)\n"
        "UPDATE customer AS c SET first_name = s.x FROM s WHERE s.id = c.id AND c.first_name IS DISTINCT FROM s.x"
    )

    assert failing(split(same_table(forward=forward))) == []


DERIVED = derivation.forward(INVOICE, TOTAL)
CROSS = [
    ("keeps rows", [("DO UPDATE\nSET total = excluded.total", "DO NOTHING")], "SM207"),
    ("no conflict clause", [("ON CONFLICT (order_id) DO UPDATE\nSET total = excluded.total", "")], "SM207"),
    ("keeps values", [("excluded.total", "coalesce(invoice.total, excluded.total)")], "SM210"),
    ("only where null", [("excluded.total", "excluded.total WHERE invoice.total IS NULL")], "SM207"),
    ("unlocked", [("\nFOR SHARE", ""), ("    FOR SHARE", "")], "SM206"),
    ("not materialized", [(" MATERIALIZED", "")], "SM206"),
    ("limit", [("FOR SHARE", "LIMIT 10 FOR SHARE")], "SM212"),
    ("another target", [("INSERT INTO invoice", "INSERT INTO receipt")], "SM202"),
    ("no batch", [("{batch}", "true")], "SM205"),
    ("aggregates", [("SELECT order_id, total\n", "SELECT order_id, sum(total)\n")], "SM212"),
    ("only missing rows", [("FROM source\n", "FROM source WHERE NOT EXISTS (SELECT 1 FROM invoice)\n")], "SM207"),
    ("touches undeclared", [("\n)\nINSERT", "\n), x AS (UPDATE orders SET id = orders.id)\nINSERT")], "SM201"),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "code"), [(p, c) for _, p, c in CROSS], ids=[name for name, _, _ in CROSS])
def test_a_cross_table_forward_is_refused_without_each_thing_that_makes_it_safe(pairs: Any, code: Any) -> None:
    text = DERIVED
    for old, new in pairs:
        text = text.replace(old, new)

    assert text != DERIVED
    assert code in [found for found, part in failing(invoices(cross_table(forward=text))) if part == "forward"]


def test_merge_is_refused_as_a_step() -> None:
    merge = "MERGE INTO invoice USING orders o ON o.id = order_id AND {batch} WHEN MATCHED THEN UPDATE SET total = 1"
    judged = invoices(cross_table(forward=merge))

    assert "SM207" in {violation.code for violation in lint_plan(judged, (), Lint(pg_versions=(15, 18)))}


OTHERS = [
    ("check", "UPDATE customer SET first_name = '' WHERE {batch} RETURNING id", "SM208"),
    (
        "check",
        "WITH u AS (UPDATE customer SET first_name = '' RETURNING id) SELECT id FROM customer WHERE {batch}",
        "SM208",
    ),
    ("check", "SELECT id, full_name FROM customer WHERE {batch}", "SM213"),
    ("check", "SELECT * FROM customer WHERE {batch}", "SM213"),
    ("check", "SELECT id FROM customer", "SM205"),
    ("check", "SELECT id FROM customer WHERE {batch} AND first_name <> random()::text", "SM211"),
    ("check", "SELECT id FROM customer WHERE {batch} AND created < CURRENT_DATE", "SM211"),
    ("check", "SELECT id FROM customer WHERE {batch} AND evil()", "SM301"),
    ("back", "UPDATE customer SET full_name = '', id = 1 WHERE {batch}", "SM209"),
    ("back", "UPDATE customer SET first_name = '' WHERE {batch}", "SM209"),
    ("back", "DELETE FROM customer WHERE {batch}", "SM209"),
    ("back", "UPDATE orders SET full_name = '' WHERE {batch}", "SM209"),
    ("back", "UPDATE customer SET full_name = '' WHERE true", "SM205"),
    ("back_check", "SELECT id FROM customer WHERE {batch} AND now() > x", "SM211"),
    ("orphans", "SELECT id FROM customer WHERE {batch}", "SM213"),
    ("purge", "DELETE FROM customer WHERE {batch}", "SM213"),
]


@pytest.mark.parametrize(("part", "text", "code"), OTHERS)
def test_the_other_texts_of_a_move_are_refused_for_what_they_may_not_do(part: Any, text: Any, code: Any) -> None:
    assert (code, part) in failing(split(same_table(**{part: text})))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("DELETE FROM orders WHERE {batch}", "SM213"),
        ("TRUNCATE invoice", "SM101"),
        ("UPDATE invoice SET total = 0 WHERE {batch}", "SM213"),
        ("DELETE FROM invoice", "SM205"),
    ],
)
def test_a_purge_deletes_from_the_target_and_nowhere_else(text: Any, code: Any) -> None:
    assert (code, "purge") in failing(invoices(cross_table(purge=text)))
