"""A shard that is not ready says so at once, with every reason and its cure, and nothing is changed there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from psycopg.conninfo import make_conninfo

from shardmig import derivation, planfile
from shardmig.config import Lint, SessionSettings, Shard
from shardmig.errors import PreflightFailed
from shardmig.lint import accept
from shardmig.plan import AcceptedPlan, Move, Plan, Statement, Switch, quote
from shardmig.preflight import preflight
from shardmig.session import open_session
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Collection

    from conftest import Connect

MIGRATIONS = Path(__file__).parent.parent / "migrations"
PLANS = [planfile.loads(path.read_text()) for path in sorted(MIGRATIONS.glob("*.sql"))]
SHOP, SPLIT_NAME, ORDER_ADDRESS = (accept(plan, earlier=PLANS[:place]) for place, plan in enumerate(PLANS[:3]))

NOTHING = Lint()
BY_HAND = Lint(known_columns=("customer.region", "customer.row_id", "order_address.line", "order_address.cty"))


async def ask(
    shard: Shard, *plans: AcceptedPlan, user: str = "shop_migrator", lint: Lint = NOTHING, **settings: Any
) -> list[str]:
    url = make_conninfo(shard.url.get_secret_value(), user=user)
    through = Shard.model_validate({"name": shard.name, "url": url})
    how = SessionSettings(**{"owner": "shop_owner", **settings})
    async with open_session(through, how, pg_versions=(12, 18)) as session:
        return (await preflight(session, *plans, lint=lint)).warnings


async def reasons(shard: Shard, *plans: AcceptedPlan, **settings: Any) -> list[str]:
    with pytest.raises(PreflightFailed) as caught:
        await ask(shard, *plans, **settings)
    message = str(caught.value)
    assert message.startswith(f"{shard.name}: ")
    return [line.removeprefix("  - ") for line in message.removeprefix(f"{shard.name}: ").splitlines()]


@pytest.fixture
def shop(shard: Shard, connect: Connect) -> Shard:
    """Return a shard on which the first migration was applied by the owner."""
    owner = connect(shard, user="shop_owner")
    for step in SHOP.plan.steps:
        if isinstance(step, Statement):
            owner.execute(step.sql.encode())
    return shard


def move_of(**changes: Any) -> AcceptedPlan:
    """Accept the plan `split_name` with its move changed."""
    plan = SPLIT_NAME.plan
    steps = [step.model_copy(update=changes) if isinstance(step, Move) else step for step in plan.steps]
    return accept(plan.model_copy(update={"steps": tuple(steps)}), earlier=PLANS[:1], settings=BY_HAND)


# --------------------------------------------------------------------------------------------------------------------
# Ready


async def test_a_new_shard_is_ready_for_a_whole_history(shard: Shard) -> None:
    assert [] == await ask(shard, SHOP, SPLIT_NAME, ORDER_ADDRESS, grant={"shop_app": "SELECT, INSERT, UPDATE (id)"})


async def test_a_shard_with_the_tables_is_ready_for_what_follows(shop: Shard) -> None:
    assert [] == await ask(shop, SPLIT_NAME, ORDER_ADDRESS)


async def test_asking_changes_nothing_and_is_one_round_trip(shop: Shard, connect: Connect) -> None:
    admin = connect(shop)
    before = admin.execute("SELECT count(*) FROM pg_class").fetchone()
    await ask(shop, SPLIT_NAME)

    assert before == admin.execute("SELECT count(*) FROM pg_class").fetchone()


# --------------------------------------------------------------------------------------------------------------------
# Not ready


async def test_a_table_that_is_not_there_is_named(shard: Shard) -> None:
    assert [
        "the shard is not ready:",
        "table customer does not exist here; apply the migration that creates it first",
        "table customer of a move does not exist here; apply the migration that creates it first",
    ] == await reasons(shard, SPLIT_NAME)


async def test_only_the_owner_of_a_table_may_change_it(shop: Shard, connect: Connect) -> None:
    connect(shop).execute("ALTER TABLE customer OWNER TO postgres")

    found = await reasons(shop, SPLIT_NAME)

    assert (
        "table customer belongs to postgres, and only its owner may change it; set session.owner to postgres"
        in found[1]
    )
    assert "rows are moved as its owner" in found[2]


async def test_the_owner_must_be_able_to_create(shard: Shard, connect: Connect) -> None:
    connect(shard).execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # as it is since 15

    found = await reasons(shard, SHOP, user="shop_app", owner=None)

    assert ["the owner may not create in the shard's schema; GRANT CREATE ON SCHEMA to it"] == found


async def test_row_level_security_is_refused_where_it_binds_the_runner(shop: Shard, connect: Connect) -> None:
    """It binds no superuser, no role with BYPASSRLS, and the owner only where it is forced."""
    admin = connect(shop)
    admin.execute("ALTER TABLE customer ENABLE ROW LEVEL SECURITY")
    assert [] == await ask(shop, SPLIT_NAME)

    admin.execute("ALTER TABLE customer FORCE ROW LEVEL SECURITY")
    [found] = await reasons(shop, SPLIT_NAME)

    assert "customer has row level security that binds shop_owner too: policies could hide rows" in found
    assert "DISABLE" not in found
    assert [] == await ask(shop, SPLIT_NAME, user="postgres", owner=None)
    admin.execute("ALTER ROLE shop_owner BYPASSRLS")
    try:
        assert [] == await ask(shop, SPLIT_NAME)
    finally:
        admin.execute("ALTER ROLE shop_owner NOBYPASSRLS")


def wider(table: str) -> AcceptedPlan:
    """Give a table a column, and move nothing."""
    steps = (Statement(sql=f"ALTER TABLE {table} ADD COLUMN up text"), Switch(to=State.LIVE))
    return accept(Plan(revision="0001_up", parent=None, flag="up", script_sha256="0" * 64, steps=steps))


@pytest.mark.parametrize(
    ("body", "breaks"),
    [
        ("INSERT INTO log SELECT now(), NEW.*", True),
        ("INSERT INTO log SELECT now(), (old) . *", True),
        ("EXECUTE 'INSERT INTO log SELECT now(), $1.*' USING NEW", True),
        ("IF NEW.* IS DISTINCT FROM OLD.* THEN INSERT INTO log SELECT now(), NEW.*; END IF", True),
        ("INSERT INTO log VALUES (now(), NEW.id, NEW.name)", False),
        ("INSERT INTO log VALUES (to_jsonb(NEW.*)), (row_to_json(OLD.*)::jsonb), (to_jsonb(NEW))", False),
        ("IF ROW(NEW.*) IS DISTINCT FROM ROW(OLD.*) OR OLD.* = NEW.* THEN NULL; END IF", False),
        ("PERFORM log.* FROM log; RENEW.* := 1", False),
    ],
)
async def test_a_column_that_the_function_of_a_trigger_would_not_fit_is_refused(
    shard: Shard, connect: Connect, body: str, *, breaks: bool
) -> None:
    """The audit trigger of PostgreSQL's manual: with one column more every write to the table fails."""
    owner = connect(shard, user="shop_owner")
    owner.execute("CREATE TABLE emp (id bigint PRIMARY KEY, name text); SET check_function_bodies = off")
    owner.execute(
        f"CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body}; RETURN NULL; END$$".encode()
    )
    owner.execute("CREATE TRIGGER watch AFTER UPDATE ON emp FOR EACH ROW EXECUTE FUNCTION audit()")

    if breaks:
        [found] = await reasons(shard, wider("emp"))
        assert found.startswith(
            "trigger watch of emp calls audit(), which uses NEW.* or OLD.*; with up those get longer"
        )
        for name in ("audit", "public.audit"):
            assert [] == await ask(shard, wider("emp"), lint=Lint(known_functions=(name,)))
        owner.execute("ALTER TABLE emp ADD COLUMN up text")  # what is there breaks nothing that does not fail already
    assert [] == await ask(shard, wider("emp"))


async def test_a_trigger_of_a_partition_alone_counts_when_its_table_gets_a_column(
    shard: Shard, connect: Connect
) -> None:
    owner = connect(shard, user="shop_owner")
    owner.execute("CREATE TABLE emp (id bigint) PARTITION BY RANGE (id); CREATE TABLE idle (id bigint)")
    owner.execute("CREATE TABLE emp_1 PARTITION OF emp DEFAULT; CREATE TABLE log (LIKE emp)")
    owner.execute(
        "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN INSERT INTO log SELECT NEW.*; RETURN NEW; END$$"
    )
    owner.execute("CREATE TRIGGER watch AFTER INSERT ON emp_1 FOR EACH ROW EXECUTE FUNCTION audit()")

    [found] = await reasons(shard, wider("emp"), wider("idle"))
    assert found.startswith("trigger watch of emp calls audit()")
    owner.execute("ALTER TABLE emp_1 DISABLE TRIGGER watch")
    assert [] == await ask(shard, wider("emp"))


async def test_a_part_of_a_table_that_is_a_foreign_table_gets_its_column_first(shard: Shard, connect: Connect) -> None:
    """ALTER TABLE gives it the column here alone: what lies behind it has none, and running INSERTs fail."""
    admin = connect(shard)
    admin.execute("CREATE FOREIGN DATA WRAPPER elsewhere; CREATE SERVER other FOREIGN DATA WRAPPER elsewhere")
    admin.execute("CREATE TABLE ev (id bigint, name text) PARTITION BY RANGE (id); CREATE TABLE t (id bigint)")
    admin.execute("CREATE FOREIGN TABLE ev_old PARTITION OF ev FOR VALUES FROM (0) TO (10) SERVER other")
    run = {"user": "postgres", "owner": None}

    [found] = await reasons(shard, wider("ev"), **run)

    assert found.startswith("ev_old, a part of ev, is a foreign table: what lies behind it has no up")
    assert [] == await ask(shard, wider("ev"), lint=Lint(known_columns=("ev_old.up",)), **run)
    moves = await reasons(shard, numbered("ev"), **run)
    assert any(line.startswith("rows of ev lie behind a foreign table (ev_old)") for line in moves)
    assert [] == await ask(shard, wider("t"), **run)


async def test_a_move_of_rows_that_a_subscription_writes_into_a_partition_is_refused(
    shard: Shard, connect: Connect
) -> None:
    admin = connect(shard)
    admin.execute("CREATE TABLE ev (id bigint PRIMARY KEY) PARTITION BY RANGE (id)")
    admin.execute("CREATE TABLE ev_1 PARTITION OF ev DEFAULT")
    run = {"user": "postgres", "owner": None}
    assert [] == await ask(shard, numbered("ev"), **run)
    admin.execute(
        "CREATE SUBSCRIPTION feed CONNECTION 'dbname=nowhere' PUBLICATION feed WITH (connect = false, slot_name = NONE)"
    )
    try:
        admin.execute("INSERT INTO pg_subscription_rel SELECT oid, 'ev_1'::regclass, 'r', NULL FROM pg_subscription")
        [found] = await reasons(shard, numbered("ev"), **run)
    finally:
        admin.execute("DROP SUBSCRIPTION feed")

    assert found.startswith("table ev is written by logical replication")


@pytest.mark.parametrize(
    ("trigger", "refused"),
    [
        ("BEFORE UPDATE ON customer FOR EACH ROW", True),
        ("AFTER UPDATE OF first_name ON customer", True),
        ("AFTER UPDATE OF full_name ON customer", True),  # moving back writes it
        ("AFTER UPDATE OF email ON customer", False),
        ("AFTER UPDATE OF email ON customer FOR EACH ROW", False),
        ("BEFORE UPDATE OF email ON customer", False),
        ("AFTER UPDATE OR DELETE ON customer FOR EACH ROW", True),
        ("AFTER INSERT OR DELETE OR UPDATE OF email ON customer", False),  # the move only updates
        ("BEFORE TRUNCATE ON customer", False),
    ],
)
async def test_a_user_trigger_on_a_moved_table_is_refused(
    shop: Shard, connect: Connect, trigger: str, *, refused: bool
) -> None:
    owner = connect(shop, user="shop_owner")
    if "first_name" in trigger:
        owner.execute("ALTER TABLE customer ADD COLUMN first_name text")
    owner.execute("CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    owner.execute(f"CREATE TRIGGER audit {trigger} EXECUTE FUNCTION watch()".encode())

    if refused:
        [found] = await reasons(shop, SPLIT_NAME)
        assert found.startswith("trigger audit of customer would fire for every moved row")
        assert "DISABLE TRIGGER would stop it for the application too" in found
    else:
        assert [] == await ask(shop, SPLIT_NAME)
    assert [] == await ask(shop, move_of(triggers="fire"))
    owner.execute("ALTER TABLE customer DISABLE TRIGGER audit")
    assert [] == await ask(shop, SPLIT_NAME)


@pytest.mark.parametrize("event", ["UPDATE OF email", "INSERT OR UPDATE OF email", "INSERT", "DELETE"])
async def test_a_trigger_that_may_change_old_columns_is_refused_though_no_move_fires_it(
    shop: Shard, connect: Connect, event: str
) -> None:
    """It changes full_name while the application writes email: nobody changes first_name and last_name."""
    owner = connect(shop, user="shop_owner")
    owner.execute(
        "CREATE FUNCTION tidy() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.full_name := trim(NEW.full_name); RETURN NEW; END'"
    )
    owner.execute(f"CREATE TRIGGER tidy BEFORE {event} ON customer FOR EACH ROW EXECUTE FUNCTION tidy()".encode())

    [found] = await reasons(shop, SPLIT_NAME)
    assert found.startswith("trigger tidy of customer may change columns of a row on its way in, or keep one that")
    assert [] == await ask(shop, move_of(triggers="fire"))


async def test_a_trigger_on_the_source_is_refused_although_only_the_target_is_written(
    shop: Shard, connect: Connect
) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    owner.execute("CREATE TRIGGER tidy BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION watch()")
    plan = ORDER_ADDRESS.plan
    never_back = {"back": None, "back_check": None, "restores": (), "lossy": True}
    steps = [step.model_copy(update=never_back) if isinstance(step, Move) else step for step in plan.steps]
    one_way = accept(plan.model_copy(update={"steps": tuple(steps)}), earlier=PLANS[:2])

    [found] = await reasons(shop, one_way)
    assert found.startswith("trigger tidy of orders may change columns of a row on its way in, or keep one that")


@pytest.mark.parametrize("how", ["partitioned", "inherits"])
async def test_what_partitions_have_of_their_own_counts(shop: Shard, connect: Connect, how: str) -> None:
    """Rows are moved through the parent, and a partition's triggers and foreign keys work all the same."""
    owner = connect(shop, user="shop_owner")
    owner.execute("ALTER TABLE customer RENAME TO customer_before")
    columns = "(id bigint, full_name text, email text, created_at timestamptz, PRIMARY KEY (id))"
    if how == "inherits":
        owner.execute(f"CREATE TABLE customer {columns}; CREATE TABLE customer_1 () INHERITS (customer)".encode())
    else:
        owner.execute(f"CREATE TABLE customer {columns} PARTITION BY RANGE (id)".encode())
        owner.execute("CREATE TABLE customer_1 PARTITION OF customer FOR VALUES FROM (0) TO (1000)")
    assert [] == await ask(shop, SPLIT_NAME)
    owner.execute("CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    owner.execute("CREATE TRIGGER audit AFTER UPDATE ON customer_1 FOR EACH ROW EXECUTE FUNCTION watch()")
    owner.execute("CREATE TABLE person (name text PRIMARY KEY)")
    owner.execute("ALTER TABLE customer_1 ADD FOREIGN KEY (full_name) REFERENCES person ON DELETE SET NULL")

    _, trigger, key = await reasons(shop, SPLIT_NAME)
    assert trigger.startswith("trigger audit of customer would fire for every moved row")
    assert key.startswith("foreign key customer_1_full_name_fkey of customer writes (full_name) by itself, SET NULL")


async def test_a_trigger_on_the_target_of_a_move_is_refused(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute(
        "CREATE TABLE order_address (order_id bigint PRIMARY KEY, street text, zip text, city text, note text)"
    )
    owner.execute("CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    for event in ("BEFORE INSERT", "AFTER INSERT OR UPDATE OF note", "AFTER DELETE"):  # its orphans are purged
        owner.execute(
            f"CREATE OR REPLACE TRIGGER audit {event} ON order_address FOR EACH ROW EXECUTE FUNCTION watch()".encode()
        )

        [found] = await reasons(shop, ORDER_ADDRESS)
        assert found.startswith("trigger audit of order_address would fire")


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("UPDATE TO customer DO INSTEAD NOTHING", "would fire for every moved row"),
        ("UPDATE TO customer DO ALSO NOTHING", "would fire for every moved row"),
        ("DELETE TO customer DO INSTEAD NOTHING", "may change columns of a row on its way in, or keep one that"),
        ("DELETE TO customer DO ALSO NOTHING", None),
    ],
)
async def test_a_rule_counts_as_a_trigger(shop: Shard, connect: Connect, rule: str, says: str | None) -> None:
    connect(shop, user="shop_owner").execute(f"CREATE RULE quiet AS ON {rule}".encode())

    if says is None:
        assert [] == await ask(shop, SPLIT_NAME)
    else:
        [found] = await reasons(shop, SPLIT_NAME)
        assert found.startswith(f"trigger quiet (a rule) of customer {says}")


async def test_foreign_keys_that_write_old_columns_are_refused(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("CREATE TABLE person (name text PRIMARY KEY)")
    owner.execute(
        "ALTER TABLE customer ADD CONSTRAINT known FOREIGN KEY (full_name) REFERENCES person ON UPDATE CASCADE"
    )

    [found] = await reasons(shop, SPLIT_NAME)
    assert found.startswith("foreign key known of customer writes (full_name) by itself, CASCADE, past the dual writes")
    assert [] == await ask(shop, move_of(triggers="fire"))


async def test_a_cascade_that_would_leave_rows_in_the_new_table_is_refused(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("ALTER TABLE orders DROP CONSTRAINT orders_customer_id_fkey")
    owner.execute("ALTER TABLE orders ADD FOREIGN KEY (customer_id) REFERENCES customer ON DELETE CASCADE")

    [found] = await reasons(shop, ORDER_ADDRESS)
    assert "let order_address reference orders ON DELETE CASCADE" in found

    owner.execute(
        "CREATE TABLE order_address (order_id bigint PRIMARY KEY REFERENCES orders ON DELETE CASCADE, "
        "street text, zip text, city text)"
    )
    assert [] == await ask(shop, ORDER_ADDRESS)


async def test_moving_back_must_not_cascade_into_other_tables(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("ALTER TABLE customer ADD UNIQUE (full_name)")
    owner.execute("CREATE TABLE badge (name text REFERENCES customer (full_name) ON UPDATE CASCADE)")

    [found] = await reasons(shop, SPLIT_NAME)
    assert "moving back writes customer, and foreign key badge_name_fkey would write badge too (CASCADE)" in found


async def test_moving_must_not_cascade_into_other_tables_either(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("CREATE TABLE order_address (order_id bigint PRIMARY KEY, street text, zip text UNIQUE, city text)")
    owner.execute("CREATE TABLE depot (zip text REFERENCES order_address (zip) ON UPDATE SET NULL)")

    [found] = await reasons(shop, ORDER_ADDRESS)
    assert "moving writes order_address, and foreign key depot_zip_fkey would write depot too (SET NULL)" in found


@pytest.mark.parametrize("deletes", ["CASCADE", "SET NULL"])
async def test_a_foreign_key_that_changes_the_new_table_by_itself_is_warned_of(
    shop: Shard, connect: Connect, deletes: str
) -> None:
    """A city that is deleted takes its new addresses along, or empties them; the old ones stay as they are."""
    owner = connect(shop, user="shop_owner")
    owner.execute("CREATE TABLE city (name text PRIMARY KEY)")
    owner.execute(
        "CREATE TABLE order_address (order_id bigint PRIMARY KEY REFERENCES orders ON DELETE CASCADE, street text, "
        f"zip text, city text REFERENCES city ON DELETE {deletes})".encode()
    )

    [warning] = await ask(shop, ORDER_ADDRESS)
    assert warning.startswith("foreign key order_address_city_fkey changes rows of order_address by itself")
    assert deletes in warning


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ("ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE", "(id) is not unique in customer"),
        (
            """
            ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE, ALTER COLUMN id DROP IDENTITY,
                ALTER COLUMN id DROP NOT NULL, ADD UNIQUE (id)
            """,
            "key id of customer may be NULL",
        ),
        (
            "ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE, ADD PRIMARY KEY (id) DEFERRABLE",
            "(id) is not unique in customer",
        ),
        (
            """
            ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE;
            CREATE UNIQUE INDEX ON customer (id) WHERE id > 0
            """,
            "(id) is not unique in customer",
        ),
        (
            "ALTER TABLE customer RENAME COLUMN full_name TO label",
            "customer has no column full_name here, and no statement of these plans adds it",
        ),
    ],
)
async def test_the_key_and_the_columns_of_a_move_must_be_real(
    shop: Shard, connect: Connect, change: str, cure: str
) -> None:
    connect(shop, user="shop_owner").execute(change.encode())

    [found] = await reasons(shop, SPLIT_NAME)
    assert found.startswith(cure)


def initials(expression: str, *, table: str = "customer", adding: str = "customer") -> AcceptedPlan:
    """Accept a plan that fills a new column of a table which no plan has made."""
    value = {"initials": expression}
    shape = derivation.Shape(table, ("id",))
    move = Move(
        table=table,
        key=("id",),
        writes=("initials",),
        forward=derivation.forward(shape, value),
        check=derivation.check(shape, value, {}),
    )
    structure = Statement(sql=f"ALTER TABLE {adding} ADD COLUMN initials text")
    steps = (structure, Switch(to=State.DUAL), move, Switch(to=State.LIVE))
    plan = Plan(revision="0001_initials", parent=None, flag="initials", script_sha256="x", steps=steps)
    return accept(plan)


async def test_what_a_move_reads_must_be_there_or_come(shop: Shard) -> None:
    [found] = await reasons(shop, initials("left(ful_name, 1)"))
    assert found == (
        "customer has no column ful_name here, and no statement of these plans adds it; did you mean full_name?"
    )
    [found] = await reasons(shop, initials("left(customer.nothing_like_it, 1)"))
    assert found == "customer has no column nothing_like_it here, and no statement of these plans adds it"


async def test_a_word_elsewhere_in_the_plans_is_no_column(shop: Shard) -> None:
    """ORDER_ADDRESS adds a zip: to another table."""
    [found] = await reasons(shop, ORDER_ADDRESS, initials("left(zip, 1)"))
    assert found.startswith("customer has no column zip here")


async def test_a_column_that_an_earlier_plan_of_these_adds_is_known(shop: Shard) -> None:
    assert [] == await ask(shop, SPLIT_NAME, initials("left(last_name, 1)"))


def addresses(old: str, new: str, *, parts: Collection[str] | None = None) -> AcceptedPlan:
    """Accept ORDER_ADDRESS with a word of its move changed, as if it were the first plan of all."""
    plan = ORDER_ADDRESS.plan
    [(number, move)] = plan.moves
    changed = {
        name: text.replace(old, new) for name, text in move if isinstance(text, str) and name in (parts or {name})
    }
    steps = [*plan.steps[: number - 1], move.model_copy(update=changed), *plan.steps[number:]]
    return accept(plan.model_copy(update={"steps": tuple(steps)}), settings=BY_HAND)


async def test_a_table_that_comes_is_known_too(shard: Shard) -> None:
    [_, *found] = await reasons(shard, SHOP, SPLIT_NAME, addresses("city", "cty", parts={"check"}))
    assert {"orders has no column cty", "order_address has no column cty"} == {one.split(" here")[0] for one in found}


async def test_a_function_of_the_row_is_no_missing_column(shop: Shard, connect: Connect) -> None:
    plan = initials("customer.short_name")
    assert await reasons(shop, plan)
    connect(shop, user="shop_owner").execute(
        "CREATE FUNCTION short_name(customer) RETURNS text LANGUAGE sql AS 'SELECT $1.full_name'"
    )

    assert [] == await ask(shop, plan)


async def test_a_column_comes_by_any_name_of_the_table_and_by_its_parent(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("CREATE TABLE parent (id bigint, full_name text)")
    owner.execute("CREATE TABLE person (PRIMARY KEY (id)) INHERITS (parent)")
    steps = (Statement(sql="ALTER TABLE parent ADD COLUMN note text"), Switch(to=State.LIVE))
    noting = accept(Plan(revision="0000_note", parent=None, flag="note", script_sha256="x", steps=steps))
    plan = initials("left(note, 1)", table="person", adding="public.person")

    assert [] == await ask(shop, noting, plan)
    assert await reasons(shop, plan)


async def test_what_is_to_be_relaxed_must_be_there(shop: Shard) -> None:
    plan = initials("left(full_name, 1)").plan
    lifts, lifts_nothing = (
        accept(plan.model_copy(update={"relax": (f"customer.{name}",)})) for name in ("full_name", "ful_name")
    )

    assert [] == await ask(shop, lifts)
    [found] = await reasons(shop, lifts_nothing)
    assert found.startswith("customer has no column ful_name here")


async def test_of_a_table_that_is_not_there_the_one_is_told_that_is_meant(shop: Shard) -> None:
    [found] = await reasons(shop, addresses("orders", "ordrs"))
    assert found == (
        "table ordrs of a move does not exist here; apply the migration that creates it first; did you mean orders?"
    )


async def test_a_source_key_that_the_server_alone_fills_is_not_touched(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("ALTER TABLE orders ALTER COLUMN id SET GENERATED ALWAYS")
    shape = derivation.Shape("orders", ("id",), "order_address", ("order_id",), touch=True)
    plan = ORDER_ADDRESS.plan
    [move] = [move for _, move in plan.moves]
    forward = derivation.forward(shape, {column: column for column in move.writes})
    touching = move.model_copy(update={"forward": forward, "touch_source": True})
    steps = tuple(touching if step == move else step for step in plan.steps)
    accepted = accept(plan.model_copy(update={"steps": steps}), earlier=PLANS[:2])
    assert [] == await ask(shop, SPLIT_NAME, ORDER_ADDRESS)

    [found] = await reasons(shop, SPLIT_NAME, accepted)

    assert "orders.id is GENERATED ALWAYS AS IDENTITY, so no move may touch it; " in found
    cure = found.partition("; ")[2].removesuffix(", or leave touch_source out")
    owner.execute(cure.encode())
    assert [] == await ask(shop, SPLIT_NAME, accepted)


async def test_names_may_hold_quotes_and_big_letters(shard: Shard, connect: Connect) -> None:
    """Of a table that is not there in such a schema the one that is meant is told as well."""
    admin = connect(shard)
    admin.execute('CREATE SCHEMA "The ""Shop"""; SET search_path = "The ""Shop"""')
    admin.execute(
        'CREATE TABLE "a ""b""" (id bigint PRIMARY KEY, o text); CREATE TABLE customer (id bigint PRIMARY KEY)'
    )
    odd = shard.model_copy(update={"schema_name": 'The "Shop"'})
    async with open_session(odd, SessionSettings(), pg_versions=(12, 18)) as session:
        assert [] == (await preflight(session, numbered('a "b"'), lint=Lint())).warnings
        with pytest.raises(PreflightFailed, match=r"did you mean customer\?"):
            await preflight(session, numbered("custmer"), lint=Lint())


def numbered(table: str) -> AcceptedPlan:
    """Fill a new column of a table."""
    move = Move(
        table=table,
        key=("id",),
        writes=("n",),
        forward=f"UPDATE {quote(table)} SET n = id WHERE {{batch}}",
        check=f"SELECT id FROM {quote(table)} WHERE {{batch}} AND n IS DISTINCT FROM id",
    )
    column = Statement(sql=f"ALTER TABLE {quote(table)} ADD COLUMN n bigint")
    steps = (column, Switch(to=State.DUAL), move, Switch(to=State.LIVE))
    return accept(Plan(revision="0001_n", parent=None, flag="n", script_sha256="0" * 64, steps=steps))


@pytest.mark.parametrize(
    ("key", "by_hand", "ready"),
    [
        ("order_id", False, True),
        ("order_id, line", False, False),
        ("order_id, line", True, True),
        ("line, order_id", True, False),
        ("line", True, False),
    ],
)
async def test_a_second_table_has_a_key_by_which_its_rows_are_found(
    shop: Shard, connect: Connect, key: str, *, by_hand: bool, ready: bool
) -> None:
    """One row for a row of the source, by its key; several, where the SQL says so and the key begins with it."""
    columns = "order_id bigint, line int DEFAULT 1, street text, zip text, city text"
    connect(shop, user="shop_owner").execute(f"CREATE TABLE order_address ({columns}, UNIQUE ({key}))".encode())
    plan = ORDER_ADDRESS.plan
    [(_, move)] = plan.moves
    several = {"forward": move.forward.replace("ON CONFLICT (order_id)", "ON CONFLICT (order_id, line)")}
    assert several["forward"] != move.forward
    steps = [step.model_copy(update=several) if by_hand and step == move else step for step in plan.steps]
    given = accept(plan.model_copy(update={"steps": tuple(steps)}), earlier=PLANS[:2], settings=BY_HAND)

    if ready:
        assert [] == await ask(shop, given)
    else:
        [found] = await reasons(shop, given)
        assert found.startswith("table order_address has no unique index on (order_id)")


async def test_a_view_in_place_of_a_table_is_named(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("ALTER TABLE customer RENAME TO customer_v1")
    owner.execute("CREATE VIEW customer AS SELECT * FROM customer_v1")

    found = await reasons(shop, SPLIT_NAME)
    assert "customer is a view, not a table" in found


async def test_roles_and_privileges_to_be_granted_must_exist(shop: Shard, connect: Connect) -> None:
    connect(shop).execute("GRANT ALL ON SCHEMA public TO shop_owner")  # whose it is since 15, and the superuser's in 14
    connect(shop).execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")

    found = await reasons(shop, SPLIT_NAME, grant={"nobody_here": "SELECT", "shop_app": "SELECT, DROP"})
    assert [
        "the shard is not ready:",
        "session.grant gives shop_app DROP, which is no privilege on a table; correct it",
        "role nobody_here of session.grant does not exist; create it or take it out",
        "role shop_app may not use schema public; GRANT USAGE ON SCHEMA public TO shop_app",
    ] == found


async def test_every_reason_of_every_plan_is_listed_once(shop: Shard, connect: Connect) -> None:
    admin = connect(shop)
    admin.execute("ALTER TABLE customer OWNER TO postgres")
    for table in ("customer", "orders"):
        admin.execute(
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY".encode()
        )

    found = await reasons(shop, SPLIT_NAME, ORDER_ADDRESS, SPLIT_NAME)
    assert 5 == len(found) == len(set(found))


# --------------------------------------------------------------------------------------------------------------------
# Worth knowing


async def test_publications_are_warned_of(shop: Shard, connect: Connect) -> None:
    connect(shop).execute("CREATE PUBLICATION everything FOR ALL TABLES")

    warnings = await ask(shop, SPLIT_NAME, ORDER_ADDRESS)
    columns, table = warnings
    assert columns.startswith("table customer is published by everything: add its new columns on the subscribers first")
    assert table.startswith("publication everything is FOR ALL TABLES: subscribers need order_address before rows")


@pytest.mark.parametrize("published", ["TABLE ev", "TABLE ev_1", "ALL TABLES"])
async def test_a_publication_of_partitions_is_warned_of(shard: Shard, connect: Connect, published: str) -> None:
    """By default a partitioned table is published as its partitions."""
    admin = connect(shard)
    admin.execute("CREATE TABLE ev (id bigint PRIMARY KEY) PARTITION BY RANGE (id)")
    admin.execute("CREATE TABLE ev_1 PARTITION OF ev DEFAULT")
    admin.execute(f"CREATE PUBLICATION feed FOR {published}".encode())

    [warning] = await ask(shard, wider("ev"), user="postgres", owner=None)
    assert warning.startswith("table ev is published by feed: add its new columns on the subscribers first")


async def test_a_publication_of_a_schema_is_warned_of(shard: Shard, connect: Connect) -> None:
    admin = connect(shard)
    if admin.info.server_version < 150_000:
        pytest.skip("FOR TABLES IN SCHEMA came with PostgreSQL 15")
    admin.execute("CREATE SCHEMA other; CREATE PUBLICATION feed FOR TABLES IN SCHEMA public")

    steps = (Statement(sql="CREATE TABLE note (id bigint PRIMARY KEY)"), Switch(to=State.LIVE))
    note = accept(Plan(revision="0001_note", parent=None, flag="note", script_sha256="0" * 64, steps=steps))

    [warning] = await ask(shard, note)
    assert warning == (
        "publication feed is FOR TABLES IN SCHEMA public: subscribers need note before rows arrive there"
    )
    admin.execute("DROP PUBLICATION feed; CREATE PUBLICATION feed FOR TABLES IN SCHEMA other")
    assert [] == await ask(shard, note)


async def test_a_key_without_an_index_in_its_order_is_warned_of(shop: Shard, connect: Connect) -> None:
    connect(shop, user="shop_owner").execute("ALTER TABLE customer ADD COLUMN region int NOT NULL DEFAULT 1")

    [(_, split)] = SPLIT_NAME.plan.moves
    checks = {
        name: str(getattr(split, name)).replace("SELECT id", "SELECT region, id") for name in ("check", "back_check")
    }
    move = move_of(key=("region", "id"), **checks)
    [warning] = await ask(shop, move)
    assert warning.startswith("no btree index of customer begins with (region, id): each batch sorts the table; in an")
    assert 'op.create_index("customer_walk", "customer", ["region", "id"], postgresql_concurrently=True)' in warning


@pytest.mark.parametrize(
    ("change", "cures"),
    [
        (
            "ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE, ADD UNIQUE (full_name)",
            ['rows would be skipped; name another: key=("full_name",)'],
        ),
        (
            "ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE, ADD UNIQUE (email)",
            [
                "it has no other key: (email) is unique but may be NULL",
                "ALTER TABLE customer ALTER COLUMN email SET NOT NULL, behind a validated CHECK",
                "ADD COLUMN row_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY rewrites the table",
            ],
        ),
        (
            "ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE",
            [
                "it has no other key. Where some NOT NULL columns (id, full_name",
                "CREATE UNIQUE INDEX CONCURRENTLY customer_key ON customer (…)",
                'then key=("row_id",)',
            ],
        ),
        (
            """
            ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE, ALTER id DROP IDENTITY,
                ALTER id DROP NOT NULL, ALTER full_name DROP NOT NULL
            """,
            ["key id of customer may be NULL: such rows would be left behind; it has no other key"],
        ),
    ],
    ids=["another key", "a nullable one", "no key", "nothing at all"],
)
async def test_a_table_without_a_usable_key_is_refused_with_the_cure(
    shop: Shard, connect: Connect, change: str, cures: list[str]
) -> None:
    """What the message asks for, done by hand, lets the move pass."""
    owner = connect(shop, user="shop_owner")
    owner.execute(change.encode())
    found = "\n".join(await reasons(shop, SPLIT_NAME))

    for cure in cures:
        assert cure in found


async def test_the_cures_of_a_table_without_a_key_are_accepted(shop: Shard, connect: Connect) -> None:
    owner = connect(shop, user="shop_owner")
    owner.execute("ALTER TABLE customer DROP CONSTRAINT customer_pkey CASCADE")
    assert await reasons(shop, SPLIT_NAME)
    owner.execute("CREATE UNIQUE INDEX CONCURRENTLY customer_key ON customer (id)")
    assert [] == await ask(shop, SPLIT_NAME)

    owner.execute("DROP INDEX customer_key")
    owner.execute("ALTER TABLE customer ADD COLUMN row_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY")
    [(_, split)] = SPLIT_NAME.plan.moves
    checks = {name: str(getattr(split, name)).replace("SELECT id", "SELECT row_id") for name in ("check", "back_check")}
    assert [] == await ask(shop, move_of(key=("row_id",), **checks))
