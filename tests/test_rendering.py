"""A script becomes a plan: what is written in it, byte for byte, and nothing that it cannot mean."""

from __future__ import annotations

import sys
import threading
from textwrap import dedent, indent
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from alembic import op

from shardmig.errors import LintFailed, ScriptError, StalePlan
from shardmig.loading import load_plans
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.planfile import dumps, loads, read, write
from shardmig.rendering import render
from shardmig.scripts import Script, read_script
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Connect

    from shardmig.config import Shard

IMPORTS = "import sqlalchemy as sa\nfrom alembic import op; from shardmig.operations import move_rows\n"
NASTY = {
    "percent": "100% of 50%% and %s",
    "colon": "at :x or :1 or ::y or a:b",
    "json": '{"a":1, "b": {"c":null}, "d":"x:y"}',
    "tab": "a\tb\t\tc  d",
    "quotes": "it's \"so\" ''twice''",
    "backslash": "a\\b \\n \\: \\\\",
    "dollars": "$$ $1 $tag$ $",
    "unicode": "Ünïcødé \N{SNOWMAN} \N{PILE OF POO} \u2028 \x85 e\u0301",
    "lines": "one\n  two  \n;\n--two\n --! three",
    "semicolon": "a; DROP TABLE customer; --",
    "braces": "{batch} {0} {x!r}",
}


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Script]:
    """Write a script of the given functions and read it."""

    def make(upgrade: str = "pass", *, move: str | None = None, head: str = "", number: int = 1) -> Script:
        directory = tmp_path / "migrations"
        directory.mkdir(exist_ok=True)
        path = directory / f"{number:04d}_it.py"
        parent = f"'{number - 1:04d}_it'" if number > 1 else None
        text = f"{IMPORTS}revision, down_revision = '{number:04d}_it', {parent}\n{head}\n"
        text += "def upgrade():\n" + indent(dedent(upgrade), "    ") + "\n"
        if move is not None:
            text += "def move():\n" + indent(dedent(move), "    ") + "\n"
        path.write_text(text, encoding="utf-8")
        return read_script(path)

    return make


def sql(plan: Plan) -> list[str]:
    return [step.sql for step in plan.steps if isinstance(step, Statement)]


# --------------------------------------------------------------------------------------------------------------------
# Nothing is corrupted


@pytest.mark.parametrize("value", NASTY.values(), ids=NASTY)
def test_what_a_script_writes_reaches_the_server_unchanged(
    script: Callable[..., Script], shard: Shard, connect: Connect, value: str
) -> None:
    plan = render(
        script(f"""
        value = {value!r}
        literal = "'" + value.replace("'", "''") + "'"
        escaped = literal.replace(":", "\\\\:")
        op.create_table(
            "thing",
            sa.Column("id", sa.BigInteger, primary_key=True),
            sa.Column("plain", sa.Text, server_default=value, comment=value),
            sa.Column("given", sa.Text, server_default=sa.text(escaped)),
            sa.Column("bound", sa.Text, server_default=sa.literal(value)),
            sa.CheckConstraint(sa.text("given <> " + escaped + " OR true"), name="checked"),
            comment=value,
        )
        op.create_index("thing_given", "thing", ["given"], postgresql_where=sa.text("given = " + escaped))
        op.add_column("thing", sa.Column("later", sa.Text, server_default=value))
        op.execute("COMMENT ON COLUMN thing.id IS " + literal)
        op.execute(sa.text("INSERT INTO thing (id, plain) VALUES (1, :v)").bindparams(v=value))
        thing = sa.table("thing", sa.column("id", sa.Integer), sa.column("plain", sa.Text))
        op.execute(thing.insert().values(id=2, plain=value))
        op.bulk_insert(thing, [{{"id": 3, "plain": value}}])
        """)
    )
    connection = connect(shard)
    for statement in sql(loads(dumps(plan))):
        connection.execute(statement.encode(), binary=True)

    rows = connection.execute("SELECT plain, given, bound, later FROM thing").fetchall()
    assert rows == [(value,) * 4] * 3
    comments = connection.execute(
        "SELECT obj_description('thing'::regclass), col_description('thing'::regclass, 1),"
        " col_description('thing'::regclass, 2)"
    ).fetchone()
    assert comments == (value,) * 3
    connection.execute("DELETE FROM thing")
    for place in (
        "SELECT pg_get_expr(indpred, indrelid) FROM pg_index WHERE indpred IS NOT NULL",
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'checked'",
    ):
        (definition,) = connection.execute(place).fetchone() or ("",)
        assert "'" + value.replace("'", "''") + "'" in definition


def test_a_string_is_executed_verbatim_and_one_call_is_one_statement(script: Callable[..., Script]) -> None:
    text = "  COMMENT ON TABLE t IS 'a:b %s %(x)s \\:';\n\n\tSELECT 1 ;  \n"

    assert sql(render(script(f"op.execute({text!r})"))) == [text]


@pytest.mark.parametrize(
    "call",
    [
        "op.execute(sa.text('SELECT :x'))",
        """op.add_column('t', sa.Column('n', sa.JSON, server_default=sa.text("'{\\"a\\":1}'")))""",
        "op.create_table('t', sa.Column('n', sa.Text), sa.CheckConstraint(\"n <> ':x'\"))",
        "op.create_index('i', 't', ['a'], postgresql_where=sa.text(\"a = ':x'\"))",
        "op.execute(sa.select(sa.bindparam('x')))",
    ],
)
def test_a_colon_that_would_become_null_is_refused(script: Callable[..., Script], call: str) -> None:
    with pytest.raises(ScriptError, match=r"migrations/0001_it.py:6: the SQL holds `:(x|1)`.*write `\\:(x|1)`"):
        render(script(call))


def test_binds_with_values_are_written_out_null_too(script: Callable[..., Script]) -> None:
    plan = render(
        script("""
        op.execute(sa.text("SELECT :a, :b, :c, :d").bindparams(a=1, b=None, c="it's", d=b"\\x00\\\\"))
        op.execute(sa.text("SELECT x = :a").bindparams(sa.bindparam("a", None, sa.Integer)))
        op.execute(sa.select(sa.literal(1.5), sa.null(), sa.true()).where(sa.column("a").in_([1, 2])))
        """)
    )

    assert sql(plan) == [
        "SELECT 1, NULL, 'it''s', decode('005c', 'hex')",
        "SELECT x = NULL",
        "SELECT 1.5 AS anon_1, NULL AS anon_2, true AS anon_3\nWHERE a IN (1, 2)",
    ]


def test_python_side_defaults_do_not_become_null(script: Callable[..., Script]) -> None:
    with pytest.raises(ScriptError, match="column n has a Python-side default"):
        render(script("op.execute(sa.Table('t', sa.MetaData(), sa.Column('n', default=5)).insert().values({}))"))


def test_layout_of_generated_sql_has_no_trailing_blanks_but_literals_keep_theirs(script: Callable[..., Script]) -> None:
    (statement,) = sql(
        render(
            script(
                "op.create_table('t', sa.Column('a', sa.Text, server_default='x  \\n\\ty'), sa.Column('b', sa.Text))"
            )
        )
    )

    assert statement == "CREATE TABLE t (\n    a TEXT DEFAULT 'x  \n\ty',\n    b TEXT\n)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("SELECT '\\0'", "NUL"),
        ("SELECT 1 -- x\\rDROP TABLE t", "carriage return"),
        ("SELECT '\\n--! step 2: statement'", "begins with --!"),
        ("--! x", "begins with --!"),
        ("SELECT '\\ud800'", "surrogate"),
        ("   ", "empty statement"),
    ],
)
def test_text_that_reads_differently_elsewhere_is_refused(
    script: Callable[..., Script], text: str, reason: str
) -> None:
    with pytest.raises(ScriptError, match=f"migrations/0001_it.py:6: .*{reason}"):
        render(script(f'op.execute("{text}")'))


# --------------------------------------------------------------------------------------------------------------------
# What operations become


def test_adjacent_columns_of_one_existing_table_are_one_statement(script: Callable[..., Script]) -> None:
    plan = render(
        script("""
        op.add_column("t", sa.Column("a", sa.Text, comment="first"))
        op.add_column("t", sa.Column("b", sa.Numeric(10, 2), nullable=False, server_default="0"))
        op.add_column("T t", sa.Column("c", sa.Text), schema="s")
        op.add_column("T t", sa.Column("d", sa.Text, server_default=sa.text("'x' -- why")), schema="s")
        op.add_column("T t", sa.Column("e", sa.Text), schema="s")
        op.execute("SELECT 1")
        op.add_column("t", sa.Column("f", sa.Text))
        """)
    )

    assert sql(plan) == [
        "ALTER TABLE t\n    ADD COLUMN a TEXT,\n    ADD COLUMN b NUMERIC(10, 2) DEFAULT '0' NOT NULL",
        "COMMENT ON COLUMN t.a IS 'first'",
        """ALTER TABLE s."T t"
    ADD COLUMN c TEXT,
    ADD COLUMN d TEXT DEFAULT 'x' -- why
    , ADD COLUMN e TEXT""",
        "SELECT 1",
        "ALTER TABLE t ADD COLUMN f TEXT",
    ]


def test_columns_of_a_table_of_the_same_script_stay_apart(script: Callable[..., Script]) -> None:
    plan = render(
        script("""
        op.create_table("t", sa.Column("id", sa.BigInteger, primary_key=True))
        op.add_column("t", sa.Column("a", sa.Text))
        op.add_column("t", sa.Column("b", sa.Text))
        """)
    )

    assert sql(plan)[1:] == ["ALTER TABLE t ADD COLUMN a TEXT", "ALTER TABLE t ADD COLUMN b TEXT"]


def test_constraints_and_indexes_of_an_added_column_are_statements_of_their_own(script: Callable[..., Script]) -> None:
    plan = render(script('op.add_column("t", sa.Column("r", sa.Integer, sa.ForeignKey("ref.id"), index=True))'))

    assert sql(plan) == [
        "ALTER TABLE t ADD COLUMN r INTEGER",
        "ALTER TABLE t ADD FOREIGN KEY(r) REFERENCES ref (id)",
        "CREATE INDEX ix_t_r ON t (r)",
    ]


def test_a_concurrent_index_runs_outside_a_transaction_however_it_is_written(
    script: Callable[..., Script], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = render(
        script("""
        op.create_index("one", "t", ["a"], postgresql_concurrently=True)
        with op.get_context().autocommit_block():
            op.create_index("two", "t", [sa.text("lower(b)")], postgresql_concurrently=True)
        op.execute("/* three */ create  index concurrently three on t (c)")
        op.create_index("four", "t", ["d"])
        with op.batch_alter_table("t") as batch:
            with batch.get_context().autocommit_block():
                batch.create_index("five", ["e"])
        """)
    )

    assert [step.transactional for step in plan.steps if isinstance(step, Statement)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert sql(plan)[1] == "CREATE INDEX CONCURRENTLY two ON t (lower(b))"
    assert capsys.readouterr() == ("", "")


def test_an_enum_type_comes_before_its_column_once(
    script: Callable[..., Script], shard: Shard, connect: Connect
) -> None:
    first = script("""
        op.create_table(
            "t", sa.Column("id", sa.Integer, primary_key=True), sa.Column("mood", sa.Enum("sad", "it's", name="mood"))
        )
        op.create_table("u", sa.Column("mood", sa.Enum("sad", "it's", name="mood")))
        """)
    second = script(
        """
        op.add_column("t", sa.Column("n", sa.Integer))
        op.add_column("t", sa.Column("size", sa.Enum("s", "m", name="size")))
        op.add_column("t", sa.Column("sizes", sa.ARRAY(sa.Enum("s", "m", name="size"))))
        op.add_column("t", sa.Column("other", sa.Enum("sad", "it's", name="mood")))
        """,
        number=2,
    )
    plans = [render(first), render(second, earlier=[first])]

    assert sql(plans[0])[0] == "CREATE TYPE mood AS ENUM ('sad', 'it''s')"
    assert [text.partition(" ")[0] for text in sql(plans[0])] == ["CREATE"] * 3
    assert sql(plans[1]) == [
        "CREATE TYPE size AS ENUM ('s', 'm')",
        """ALTER TABLE t
    ADD COLUMN n INTEGER,
    ADD COLUMN size size,
    ADD COLUMN sizes size[],
    ADD COLUMN other mood""",
    ]
    for text in [*sql(plans[0]), *sql(plans[1])]:
        connect(shard).execute(text.encode())


def test_an_enum_that_changed_is_refused(script: Callable[..., Script]) -> None:
    first = script('op.create_table("t", sa.Column("mood", sa.Enum("sad", name="mood")))')
    second = script('op.add_column("t", sa.Column("m", sa.Enum("sad", "ok", name="mood")))', number=2)

    with pytest.raises(ScriptError, match=r"0002_it.py:6: the enum type mood exists with other labels \(sad\)"):
        render(second, earlier=[first])


def test_indexes_of_a_new_table_come_in_a_fixed_order(script: Callable[..., Script]) -> None:
    made = script("op.create_table('t', *[sa.Column(f'c{n}', sa.Integer, index=True) for n in range(9)])")

    assert len({render(made).sha256 for _ in range(20)}) == 1
    assert sql(render(made))[1:] == [f"CREATE INDEX ix_t_c{n} ON t (c{n})" for n in range(9)]


def test_every_statement_knows_the_line_of_its_call(script: Callable[..., Script]) -> None:
    plan = render(
        script("""
        def more(name):
            op.add_column(
                "t", sa.Column(name, sa.Text)
            )

        op.execute("SELECT 1")
        for name in "xy":
            more(name)
            op.execute(sa.text("SELECT 2"))
        """)
    )

    assert [step.line for step in plan.steps if isinstance(step, Statement)] == [12, 8, 15, 8, 15]


# --------------------------------------------------------------------------------------------------------------------
# What a script cannot do


@pytest.mark.parametrize(
    "call",
    [
        "op.get_bind()",
        "op.get_bind().execute(sa.text('SELECT 1'))",
        "sa.inspect(op.get_bind())",
        "op.get_context().bind",
        "op.get_context().connection.exec_driver_sql('DROP TABLE t')",
        "op.get_context().impl.static_output('DROP TABLE t')",
        "op.get_context().as_sql",
        "op.batch_alter_table('t').__enter__().get_bind()",
        "op.run_async(None)",
        "sa.Enum('a', name='x').create(op.get_bind())",
    ],
)
def test_a_script_that_asks_for_a_database_is_refused_with_its_line(script: Callable[..., Script], call: str) -> None:
    with pytest.raises(ScriptError, match=r"migrations/0001_it.py:6: .*cannot read a database.*move_rows"):
        render(script(call))


def test_a_script_cannot_go_on_by_swallowing_a_refusal(script: Callable[..., Script]) -> None:
    made = script("""
        try:
            op.get_bind()
        except Exception:
            op.execute("SELECT 1")
        """)

    with pytest.raises(ScriptError, match=r"0001_it\.py:8: a script cannot read a database"):
        render(made)


@pytest.mark.parametrize(
    ("upgrade", "message"),
    [
        ("from alembic import context\ncontext.is_offline_mode()", ":7: alembic.context is not there"),
        ("op.execute('SELECT 1', execution_options={'isolation_level': 'AUTOCOMMIT'})", ":6: parameters and"),
        ("op.execute(['SELECT 1'])", r":6: op.execute\(\) takes SQL, not list"),
        ("op.add_column('t', sa.Column('n', sa.Text))\n1 / 0", ":7: ZeroDivisionError"),
        ("op.create_table('t', sa.Column('n', sa.types.UserDefinedType()))", ":6: .*UserDefinedType"),
        ("raise SystemExit", ":6: SystemExit"),
        ("return 1", r"upgrade\(\) must be a plain function"),
        ("yield", r"upgrade\(\) must be a plain function"),
        ("move_rows('t', forward={'a': 'b'}, key='id')", r":6: move_rows\(\) belongs into the function move"),
        ("missing_name", ":6: NameError: name 'missing_name' is not defined"),
        ("from shardmig.rendering import render\nrender(None)", ":7: "),
    ],
)
def test_mistakes_are_one_line_with_the_script_s_line(
    script: Callable[..., Script], upgrade: str, message: str
) -> None:
    with pytest.raises(ScriptError, match=message) as caught:
        render(script(upgrade))
    assert caught.value.path == "migrations/0001_it.py"


def test_operations_belong_into_upgrade(script: Callable[..., Script]) -> None:
    with pytest.raises(ScriptError, match=r"0001_it.py:8: structure belongs into upgrade\(\)"):
        render(script(move="op.execute('UPDATE t SET a = 1')"))


def test_an_operation_at_module_level_is_refused(script: Callable[..., Script]) -> None:
    with pytest.raises(ScriptError, match=r"0001_it.py:4: alembic.op is not there while the module is read"):
        render(script(head="op.execute('SELECT 1')"))


def test_a_script_without_functions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0001_it.py"
    path.write_text("revision, down_revision = '0001_it', None\nupgrade = 3\n")
    with pytest.raises(ScriptError, match="upgrade is no function"):
        render(read_script(path))
    path.write_text("revision, down_revision = '0001_it', None\n")
    with pytest.raises(ScriptError, match=r"neither upgrade\(\) nor move\(\)"):
        render(read_script(path))


def test_alembic_is_left_as_it_was_after_an_error(script: Callable[..., Script]) -> None:
    with pytest.raises(ScriptError):
        render(script("op.get_bind()"))

    with pytest.raises((NameError, AttributeError)):
        op.execute("SELECT 1")
    assert sql(render(script("op.execute('SELECT 1')"))) == ["SELECT 1"]


def test_a_script_that_renders_another_is_refused(script: Callable[..., Script]) -> None:
    other = script("pass")
    made = script(
        f"""
        from pathlib import Path
        from shardmig import rendering, scripts
        rendering.render(scripts.read_script(Path({str(other.path)!r})))
        """,
        number=2,
    )

    with pytest.raises(ScriptError, match="not re-entrant"):
        render(made)


def test_threads_render_one_after_the_other(script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = ModuleType("gate")
    gate.entered, gate.opened = threading.Event(), threading.Event()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gate", gate)
    slow = script("import gate\ngate.entered.set()\nop.execute('1')\ngate.opened.wait()\nop.execute('1')")
    quick = script("op.execute('2')", number=2)
    found: dict[str, list[str]] = {}

    def work(one: Script) -> None:
        found[one.revision] = sql(render(one))

    threads = [threading.Thread(target=work, args=[one]) for one in (slow, quick)]
    threads[0].start()
    gate.entered.wait()
    threads[1].start()
    threads[1].join(0.2)
    waited = threads[1].is_alive()
    gate.opened.set()
    for thread in threads:
        thread.join()

    assert waited
    assert found == {"0001_it": ["1", "1"], "0002_it": ["2"]}


def test_the_text_that_was_linted_is_the_text_that_runs(script: Callable[..., Script]) -> None:
    made = script("op.execute('SELECT 1')")

    def look(seen: Script) -> None:
        seen.path.write_text("raise SystemExit('swapped')")

    assert sql(render(made, before_import=look)) == ["SELECT 1"]


def test_a_refused_script_is_not_executed(script: Callable[..., Script]) -> None:
    made = script(head="import sys; sys.executed_by_test = True")

    def refuse(_: Script) -> None:
        raise LintFailed("no")

    with pytest.raises(LintFailed):
        render(made, before_import=refuse)
    assert not hasattr(sys, "executed_by_test")


# --------------------------------------------------------------------------------------------------------------------
# Steps


def test_a_plan_without_a_move_ends_live(script: Callable[..., Script]) -> None:
    plan = render(script("op.execute('SELECT 1')"))

    assert plan.steps == (Statement(sql="SELECT 1", line=6), Switch(to=State.LIVE))
    assert (plan.revision, plan.parent, plan.flag, plan.has_move) == ("0001_it", None, "it", False)


def test_a_move_and_the_dual_protocol_walk_through_dual(script: Callable[..., Script]) -> None:
    moving = render(script(move="move_rows('t', forward={'a': 'b'}, key='id')", head="relax = ['b', 'u.c']"))
    dual = render(script(head="protocol = 'dual'\nneeds = ('x',)\nonline = False"))

    assert [step.to if isinstance(step, Switch) else type(step) for step in moving.steps] == [
        State.DUAL,
        Move,
        State.LIVE,
    ]
    assert moving.moves[0][1].line == 8
    assert moving.relax == ("t.b", "u.c")
    assert dual.steps == (Switch(to=State.DUAL), Switch(to=State.LIVE))
    assert (dual.has_move, dual.needs, dual.online) == (True, ("x",), False)


@pytest.mark.parametrize("always", [True, False])
def test_a_move_fills_no_key_that_the_server_alone_fills(script: Callable[..., Script], *, always: bool) -> None:
    """The canary would say so, when structure is in place and writers write both."""
    made = script(
        f"""op.create_table("u", sa.Column("t_id", sa.BigInteger, sa.Identity(always={always}), primary_key=True),
        sa.Column("a", sa.Text))""",
        move="""move_rows("t", key="id", into="u", forward={"a": "a"})""",
    )

    if always:
        with pytest.raises(ScriptError, match=r"u.t_id is GENERATED ALWAYS AS IDENTITY.*without always=True"):
            render(made)
    else:
        assert render(made).moves[0][1].target_key == ("t_id",)


def test_a_column_to_relax_names_its_table_when_there_are_several(script: Callable[..., Script]) -> None:
    with pytest.raises(ScriptError, match=r'write "table.b"'):
        render(script(head="relax = ('b',)"))


# --------------------------------------------------------------------------------------------------------------------
# Plans on disk


@pytest.fixture
def history(script: Callable[..., Script], tmp_path: Path) -> Path:
    """Two scripts with their plan files."""
    scripts = [script("op.execute('SELECT 1')"), script("op.execute('SELECT 2')", number=2)]
    for one in scripts:
        write(render(one), one.plan_path)
    (tmp_path / "migrations" / "HEAD").write_text("0002_it\n")
    return tmp_path / "migrations"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_plans_in_date_are_read_and_no_script_is_executed(history: Path) -> None:
    def look(script: Script) -> None:
        pytest.fail(f"{script.name} was executed")

    loaded = load_plans(history, before_import=look)

    assert [(one.plan.revision, one.from_file) for one in loaded] == [("0001_it", True), ("0002_it", True)]


def test_a_missing_plan_file_is_rendered_and_said_so(history: Path) -> None:
    (history / "0002_it.sql").unlink()

    loaded = load_plans(history)

    assert [one.from_file for one in loaded] == [True, False]
    assert sql(loaded[1].plan) == ["SELECT 2"]
    assert not (history / "0002_it.sql").exists()


def test_an_edited_script_makes_its_plan_stale(history: Path) -> None:
    edit(history / "0002_it.py", "SELECT 2", "SELECT 3")

    with pytest.raises(StalePlan, match=r"migrations/0002_it.sql is not what .*`shardmig plan`") as caught:
        load_plans(history)
    assert "-SELECT 2\n+SELECT 3" in str(caught.value)


def test_a_comment_in_the_script_changes_nothing(history: Path) -> None:
    edit(history / "0002_it.py", "def upgrade", "# why\ndef upgrade")

    (_, loaded) = load_plans(history)

    assert loaded.from_file
    assert loaded.plan.steps[0] == Statement(sql="SELECT 2", line=7)


def test_layout_may_differ_if_a_parser_says_it_means_the_same(history: Path) -> None:
    edit(history / "0002_it.py", "SELECT 2", "SELECT   2")

    with pytest.raises(StalePlan):
        load_plans(history)
    with pytest.raises(StalePlan):
        load_plans(history, fingerprint=lambda text: text[::-1])
    (_, loaded) = load_plans(history, fingerprint=lambda text: " ".join(text.split()))

    assert sql(loaded.plan) == ["SELECT 2"]  # the file is what shards have


def test_a_plan_edited_by_hand_shows_when_everything_is_rendered_again(history: Path) -> None:
    plan = read(history / "0002_it.sql")
    forged = plan.model_copy(update={"steps": (Statement(sql="SELECT 4"), *plan.steps[1:])})
    write(forged, history / "0002_it.sql")

    assert sql(load_plans(history)[1].plan) == ["SELECT 4"]
    with pytest.raises(StalePlan, match="SELECT 4"):
        load_plans(history, rerender=True)


def test_a_plan_file_under_another_name_is_stale(history: Path) -> None:
    (history / "0001_it.sql").write_bytes((history / "0002_it.sql").read_bytes())

    with pytest.raises(StalePlan, match=r"0001_it\.sql is the plan of 0002_it"):
        load_plans(history)


def test_rendering_twice_gives_the_same_plan(script: Callable[..., Script]) -> None:
    made = script(
        "op.create_table('t', sa.Column('a', sa.Integer, unique=True), sa.Column('b', sa.Enum('x', name='e')))"
    )
    plans: list[Any] = [render(made), render(made)]

    assert plans[0] == plans[1]
