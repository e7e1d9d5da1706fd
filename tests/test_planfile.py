"""The plan file: what is written can be read, whatever its SQL looks like, and damage is told by its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmig.errors import PlanError
from shardmig.plan import Move, Plan, Statement, Step, Switch
from shardmig.planfile import difference, dumps, loads, plan_path, read, write
from shardmig.sqltext import unwritable
from shardmig.states import State

HASH = "0" * 64
MOVE = Move(
    table="orders",
    key=("id", 'odd, "key"'),
    target="order_address",
    target_key=("order_id", "k"),
    writes=("street",),
    restores=("street",),
    forward="UPDATE 1 {batch}",
    check="SELECT 2 {batch}",
    orphans="SELECT 3 {batch}",
    purge="DELETE 4 {batch}",
    back="UPDATE 5 {batch}\n;\n;",
    back_check="SELECT 6 {batch}",
    lossy=True,
    triggers="fire",
    touch_source=True,
    line=24,
)
PLAN = Plan(
    revision="0002_split_name",
    parent="0001_shop",
    flag="split_name",
    script_sha256=HASH,
    message="split it: 'here', \"there\"",
    protocol="dual",
    needs=("a", "b"),
    relax=("customer.full_name",),
    online=False,
    allowed=("SM120 because, well", "SM121 --! so"),
    steps=(
        Statement(sql="SELECT 1", line=3),
        Statement(sql="CREATE INDEX CONCURRENTLY i ON t (a)", transactional=False),
        Switch(to=State.DUAL),
        MOVE,
        Switch(to=State.LIVE),
    ),
)

# Any text that a plan may hold, leaning towards what could be taken for the file's own syntax.
TEXT = st.one_of(
    st.text(),
    st.lists(st.sampled_from(["\n", ";", "\n;\n", " ", "\t", "--!", "-- !", "{batch}", "$$", "'", "x", "\x0b"]))
    .map("".join),
).filter(lambda text: unwritable(text) is None)  # fmt: skip
NAME = st.one_of(st.text(min_size=1), st.sampled_from(["", " a", "a, b", '"q"', "a\nb", "--! x", "\ud800", "a:b", "1"]))
NAMES = st.lists(NAME, max_size=3).map(tuple)
LINE = st.none() | st.integers(1, 10**6)
STATEMENTS = st.builds(Statement, sql=TEXT, transactional=st.booleans(), line=LINE)
SWITCHES = st.builds(Switch, to=st.sampled_from(State))
MOVES = st.builds(
    Move,
    table=NAME,
    alias=st.none() | NAME,
    key=NAMES.filter(bool),
    target=st.none() | NAME,
    target_key=NAMES,
    writes=NAMES.filter(bool),
    restores=NAMES,
    forward=TEXT,
    check=TEXT,
    orphans=st.none() | TEXT,
    purge=st.none() | TEXT,
    back=st.none() | TEXT,
    back_check=st.none() | TEXT,
    lossy=st.booleans(),
    triggers=st.sampled_from(["refuse", "fire"]),
    touch_source=st.booleans(),
    line=LINE,
)
STEPS: st.SearchStrategy[Step] = st.one_of(STATEMENTS, SWITCHES, MOVES)
PLANS = st.builds(
    Plan,
    revision=NAME,
    parent=st.none() | NAME,
    flag=NAME,
    script_sha256=NAME,
    message=NAME,
    protocol=st.sampled_from(["auto", "dual"]),
    needs=NAMES,
    relax=NAMES,
    online=st.booleans(),
    allowed=NAMES,
    steps=st.lists(STEPS, max_size=4).map(tuple),
)


@given(PLANS)
@settings(max_examples=400, deadline=None)
def test_what_is_written_is_read_again(plan: Plan) -> None:
    text = dumps(plan)

    assert loads(text) == plan
    assert loads(text.encode().decode()) == plan
    assert dumps(loads(text)) == text


def test_the_file_is_as_documented() -> None:
    text = dumps(PLAN)

    assert text.startswith(
        f"""\
--! shardmig plan 1
--! revision: 0002_split_name
--! parent: 0001_shop
--! message: split it: 'here', "there"
--! flag: split_name
--! protocol: dual
--! needs: a, b
--! relax: customer.full_name
--! online: no
--! allowed: SM120 because, well
--! allowed: SM121 --! so
--! script: {HASH}
--! plan: {PLAN.sha256}

--! step 1: statement
--! line: 3
SELECT 1
;

--! step 2: statement outside a transaction
CREATE INDEX CONCURRENTLY i ON t (a)
;

--! step 3: switch to DUAL

--! step 4: move
--! line: 24
--! table: orders
--! key: id, "odd, \\"key\\""
--! target: order_address
--! target_key: order_id, k
--! writes: street
--! restores: street
--! lossy: yes
--! triggers: fire
--! touch_source: yes
--! forward:
UPDATE 1 {{batch}}
;
--! check:
"""
    )
    assert text.endswith("--! back_check:\nSELECT 6 {batch}\n;\n\n--! step 5: switch to LIVE\n")


def test_keys_that_say_the_default_are_not_written() -> None:
    plan = Plan(revision="r", parent=None, flag="f", script_sha256=HASH, steps=())

    assert dumps(plan) == (
        f"--! shardmig plan 1\n--! revision: r\n--! flag: f\n--! script: {HASH}\n--! plan: {plan.sha256}\n"
    )


def test_the_documentation_names_every_key() -> None:
    documented = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"^--! ([a-z_]+):", dumps(PLAN), re.MULTILINE))

    assert {key for key in keys if f"| `{key}` |" not in documented} == {"line"}
    assert "`--! line: L`" in documented


def test_a_file_has_the_same_bytes_everywhere(tmp_path: Path) -> None:
    path = plan_path(tmp_path / "0002_split_name.py")
    write(PLAN, path)

    assert path == tmp_path / "0002_split_name.sql"
    assert path.read_bytes() == dumps(PLAN).encode()
    assert read(path) == PLAN


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("SELECT 1", "SELECT 2", 13, "its hash is .* edited by hand"),
        ("--! online: no\n", "", 12, "its hash is"),
        ("plan 1", "plan 2", 1, "this version of shardmig reads files that begin"),
        ("--! flag: split_name", "--! flog: split_name", 5, "`flog` means nothing here"),
        ("--! flag: split_name", "--! replaces: x", 5, "`replaces` means nothing here"),
        ("--! flag: split_name\n", "", 1, "flag: field required"),
        ("--! flag: split_name\n", "--! flag: a\n--! flag: b\n", 6, "a second flag"),
        ("--! online: no", "--! online: perhaps", 1, "online: input should be a valid boolean"),
        ("--! step 2:", "--! step 3:", 20, "expected step 2, found `step 3`"),
        ("statement outside a transaction", "statement inside out", 20, "`statement inside out` is no kind of step"),
        ("switch to DUAL", "switch to TRIPLE", 24, "`switch to TRIPLE` is no kind of step"),
        ("switch to DUAL\n", "switch to DUAL\nSELECT 1\n;\n", 24, "a switch is one line"),
        ("SELECT 1\n;\n", "SELECT 1\n", 17, "ends with `;` on a line of its own"),
        ("SELECT 1\n;\n", "SELECT 1;\n", 17, "ends with `;` on a line of its own"),
        ("--! line: 3", "--! line 3", 16, "`line 3` means nothing here"),
        ("--! line: 3", "--!line: 3", 16, "a header line reads"),
        ("--! table: orders\n", "", 26, "table: field required"),
        ("--! check:\n", "--! chick:\n", 40, "expected one of forward, check"),
        ("--! check:\n", "--! forward:\n", 40, "a second forward"),
        ('"odd', '"odd\\z', 29, "no JSON string"),
        ("SELECT 1", "SELECT\r1", 17, "a carriage return"),
        ("SELECT 1", "SELECT\0001", 17, "a NUL character"),
        ("\n\n--! step 1", "\nDROP TABLE customer\n;\n\n--! step 1", 14, "SQL text before the first step"),
        ("--! shardmig", "DROP TABLE x;\n--! shardmig", 1, "a plan file begins"),
    ],
)
def test_damage_is_told_by_its_line(old: str, new: str, line: int, reason: str) -> None:
    text = dumps(PLAN)
    assert old in text

    with pytest.raises(PlanError, match=rf"\Amigrations/x\.sql:{line}: .*{reason}.*; `shardmig plan` writes"):
        loads(text.replace(old, new, 1), name="migrations/x.sql")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_change_of_a_byte_that_is_executed_goes_unnoticed(data: st.DataObject) -> None:
    text = dumps(PLAN)
    position = data.draw(st.integers(0, len(text) - 1))
    changed = text[:position] + data.draw(st.characters(exclude_categories=["Cs"])) + text[position + 1 :]

    try:
        plan = loads(changed)
    except PlanError:
        return
    assert plan.sha256 == PLAN.sha256


def test_an_empty_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.sql"
    path.write_bytes(b"")
    with pytest.raises(PlanError, match="a plan file begins"):
        read(path)
    path.write_bytes(b"--! shardmig plan 1\n\xff")
    with pytest.raises(PlanError, match="byte 20 is not UTF-8"):
        read(path)
    path.write_bytes("\ufeff".encode() + dumps(PLAN).encode())
    with pytest.raises(PlanError, match="a plan file begins"):
        read(path)


@pytest.mark.parametrize("sql", ["--! x", "SELECT 1\n--! step 2: switch to DONE", "a\0", "a\rb", "\ud800"])
def test_text_that_cannot_stand_in_a_file_is_not_written(sql: str) -> None:
    with pytest.raises(PlanError, match="cannot be written into a plan file"):
        dumps(PLAN.model_copy(update={"steps": (Statement(sql=sql),)}))


def test_a_difference_is_short_and_leaves_out_what_follows_from_the_rest() -> None:
    other = PLAN.model_copy(update={"steps": (Statement(sql="SELECT 2", line=9), *PLAN.steps[1:])})

    assert difference(PLAN, PLAN) == ""
    assert difference(PLAN, other, names=("shard", "file")) == (
        "--- shard\n+++ file\n@@ -13,3 +13,3 @@\n --! step 1: statement\n-SELECT 1\n+SELECT 2\n ;"
    )
    long = PLAN.model_copy(update={"steps": (Statement(sql="\n".join(map(str, range(100)))),)})
    assert difference(PLAN, long, lines_max=5).splitlines()[-1].endswith("more lines")
