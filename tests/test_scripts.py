"""Scripts are read without being executed; their history is one line, and HEAD names its end."""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING

import pytest

from shardmig import planfile
from shardmig.errors import ScriptError
from shardmig.loading import load_plans
from shardmig.rendering import render
from shardmig.revision import rebase, revision
from shardmig.scripts import load_scripts, read_script

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "migrations"
    path.mkdir()
    return path


@pytest.fixture
def write(directory: Path) -> Callable[..., Path]:
    """Write a script with this id behind that one."""

    def make(name: str, parent: str | None, *, more: str = "", head: bool = True) -> Path:
        path = directory / f"{name}.py"
        path.write_text(
            f'"""{name}"""\nfrom alembic import op\nrevision = "{name}"\n'
            f"down_revision = {parent!r}  # where\n{more}\ndef upgrade():\n    op.execute('SELECT 1')\n"
        )
        if head:
            (directory / "HEAD").write_text(f"{name}\n")
        return path

    return make


# --------------------------------------------------------------------------------------------------------------------
# One script


def test_a_script_is_read_without_being_executed(directory: Path) -> None:
    path = directory / "0002_split_name.py"
    source = '''"""split the name

more"""
raise SystemExit
revision, down_revision = "0002_split_name", "0001_shop"
needs = ["shop"]
relax: tuple[str, ...] = ("full_name",)
online, protocol = False, "dual"
branch_labels = None
depends_on = None
# shardmig: allow SM120 -- it is small
x = 1  # shardmig: allow SM121, SM122 -- these -- too
y = "# shardmig: allow SM123 -- in a string"
# shardmig: allow SM124
'''
    path.write_bytes(source.replace("\n", "\r\n").encode())

    script = read_script(path)

    assert (script.revision, script.parent, script.flag) == ("0002_split_name", "0001_shop", "split_name")
    assert (script.message, script.needs, script.relax) == ("split the name", ("shop",), ("full_name",))
    assert (script.online, script.protocol) == (False, "dual")
    assert script.sha256 == hashlib.sha256(source.encode()).hexdigest()  # the same on every platform
    assert script.source == source
    assert script.name == "migrations/0002_split_name.py"
    assert script.plan_path == directory / "0002_split_name.sql"


@pytest.mark.parametrize(
    ("name", "flag"),
    [("0002_split_name", "split_name"), ("ae1027a6acf", "ae1027a6acf"), ("2024_01_x", "2024_01_x"), ("7", "7")],
)
def test_a_flag_is_the_id_without_its_number(write: Callable[..., Path], name: str, flag: str) -> None:
    assert read_script(write(name, None)).flag == flag


def test_a_script_may_name_its_flag(write: Callable[..., Path]) -> None:
    assert read_script(write("0001_x", None, more="flag = 'names'")).flag == "names"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("flag = 'a b'", "0001_x.py:5: flag 'a b' is not a name"),
        ("flag = 'a' + 'b'", ":5: flag must be a plain constant"),
        ("flag = 1", ":5: flag is a string"),
        ("needs = 'shop'", ":5: needs is a tuple of strings"),
        ("needs = (1,)", ":5: needs is a tuple of strings"),
        ("online = 0", ":5: online is True or False"),
        ("protocol = 'triple'", ':5: protocol is "auto" or "dual"'),
        ("depends_on = 'x'", ":5: the history is linear"),
        ("branch_labels = ('x',)", ":5: the history is linear"),
        ("revision = '0002'", ":5: revision is assigned twice"),
        ("def broken(:", ":5: this is not Python"),
        ("x = '\0'", "this is not Python"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(write: Callable[..., Path], more: str, message: str) -> None:
    path = write("0001_x", None, more=more)

    with pytest.raises(ScriptError) as caught:
        read_script(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"down_revision = None", 'say revision = "0001_shop"'),
        (b"revision = 'a/b'", 'say revision = "0001_shop"'),
        (b"revision, down_revision = 'c', ('a', 'b')", "down_revision names one revision"),
        (b"revision, down_revision = f()", "revision must be a plain constant"),
        (b"# \xff", "byte 2 is not UTF-8"),
    ],
)
def test_a_script_without_a_plain_id_is_refused(directory: Path, source: bytes, message: str) -> None:
    (directory / "x.py").write_bytes(source)

    with pytest.raises(ScriptError) as caught:
        read_script(directory / "x.py")
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# The history


def test_scripts_come_in_the_order_of_their_parents_not_of_their_names(
    directory: Path, write: Callable[..., Path]
) -> None:
    write("c", None)
    write("a", "c")
    write("b", "a")
    (directory / "_helper.py").write_text("not a script")
    (directory / "notes.txt").write_text("neither")

    assert [script.revision for script in load_scripts(directory)] == ["c", "a", "b"]


def test_an_empty_directory_is_an_empty_history(directory: Path) -> None:
    assert load_scripts(directory) == ()


def test_a_missing_directory_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="`shardmig init` makes one"):
        load_scripts(tmp_path / "nowhere")


def test_two_heads_are_refused_by_name(directory: Path, write: Callable[..., Path]) -> None:
    write("0001_a", None)
    write("0002_b", "0001_a")
    write("0002_c", "0001_a")

    with pytest.raises(ScriptError, match=r"2 heads, 0002_b and 0002_c.*`shardmig revision --rebase`"):
        load_scripts(directory)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({"a": None, "b": "x"}, "migrations/b.py: down_revision x is no revision in migrations/"),
        ({"a": None, "b": None}, "2 heads, a and b"),
        ({"a": "b", "b": "a", "c": None}, "migrations/a.py: down_revision leads in a circle"),
        ({"a": "a"}, "migrations/a.py: down_revision leads in a circle"),
    ],
)
def test_a_history_that_is_no_line_is_refused(
    directory: Path, write: Callable[..., Path], parents: dict[str, str | None], message: str
) -> None:
    for name, parent in parents.items():
        write(name, parent)

    with pytest.raises(ScriptError) as caught:
        load_scripts(directory)
    assert message in str(caught.value)


def test_one_id_twice_is_refused(directory: Path, write: Callable[..., Path]) -> None:
    shutil.copy(write("0001_a", None), directory / "0001_b.py")

    with pytest.raises(ScriptError, match=r"0001_b.py: migrations/0001_a.py has the same revision id, 0001_a"):
        load_scripts(directory)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("0001_a\n", "HEAD names 0001_a, but the newest revision is 0002_b; write 0002_b into it"),
        (None, "HEAD names nothing, but the newest revision is 0002_b; write 0002_b into it"),
        ("<<<<<<< HEAD\n0002_b\n=======\n0002_c\n>>>>>>> main\n", "HEAD holds a merge conflict: keep the revision"),
    ],
)
def test_head_must_name_the_newest_revision(
    directory: Path, write: Callable[..., Path], head: str | None, message: str
) -> None:
    write("0001_a", None)
    write("0002_b", "0001_a")
    (directory / "HEAD").unlink()
    if head is not None:
        (directory / "HEAD").write_text(head)

    with pytest.raises(ScriptError) as caught:
        load_scripts(directory)
    assert message in str(caught.value)


# --------------------------------------------------------------------------------------------------------------------
# New scripts


def test_a_new_script_stands_behind_the_newest_and_renders(directory: Path) -> None:
    first = revision(directory, "The shop's customers, in short")
    second = revision(
        directory,
        'say "no" \\ twice',
        upgrade='    op.add_column("t", sa.Column("n", sa.Text))',
        rest="def move() -> None:\n    pass\n",
    )

    assert [path.name for path in (first, second)] == ["0001_the_shop_customers_in_short.py", "0002_say_no_twice.py"]
    assert (directory / "HEAD").read_text() == "0002_say_no_twice\n"
    scripts = load_scripts(directory)
    assert [script.message for script in scripts] == ["The shop's customers, in short", 'say "no" \\ twice']
    assert [script.parent for script in scripts] == [None, "0001_the_shop_customers_in_short"]
    assert len(render(scripts[1], earlier=scripts[:1]).steps) == 2


def test_a_new_script_begins_a_directory(tmp_path: Path) -> None:
    path = revision(tmp_path / "migrations", "Ärger über Straßen: " + "lang " * 20)

    assert path.name == "0001_arger_uber_strassen_lang_lang_lang_lang.py"


def test_numbers_go_on_where_they_are(directory: Path, write: Callable[..., Path]) -> None:
    write("0041_a", None)

    assert revision(directory, "b").name == "0042_b.py"


def test_a_message_without_letters_makes_no_name(directory: Path) -> None:
    with pytest.raises(ScriptError, match="makes no name"):
        revision(directory, "12 !")


# --------------------------------------------------------------------------------------------------------------------
# Rebasing


@pytest.fixture
def branched(directory: Path, write: Callable[..., Path]) -> Path:
    """One branch added 0002_a, the other 0002_b and 0003_c; HEAD names what is merged already."""
    for name, parent in (("0001", None), ("0002_a", "0001"), ("0002_b", "0001"), ("0003_c", "0002_b")):
        script = read_script(write(name, parent, head=name == "0002_a"))
        planfile.write(render(script), script.plan_path)
    return directory


def test_rebasing_puts_one_branch_behind_the_other(branched: Path) -> None:
    before = {path.name: planfile.read(path).sha256 for path in branched.glob("*.sql")}
    written = rebase(branched)

    assert [path.name for path in written] == ["0002_b.py", "0002_b.sql", "HEAD"]
    assert [script.revision for script in load_scripts(branched)] == ["0001", "0002_a", "0002_b", "0003_c"]
    assert 'down_revision = "0002_a"  # where\n' in (branched / "0002_b.py").read_text()
    plans = load_plans(branched, before_import=lambda script: pytest.fail(f"{script.name} was executed"))
    assert plans[2].plan.parent == "0002_a"
    assert {f"{loaded.plan.revision}.sql": loaded.plan.sha256 for loaded in plans} == before  # shards notice nothing


def test_rebasing_leaves_a_stale_plan_alone(branched: Path) -> None:
    script = branched / "0002_b.py"
    script.write_text(script.read_text() + "# edited\n")

    assert [path.name for path in rebase(branched)] == ["0002_b.py", "HEAD"]


def test_rebasing_asks_which_branch_others_have(branched: Path) -> None:
    (branched / "HEAD").write_text("<<<<<<<\n")

    with pytest.raises(ScriptError, match="which revision others have already, 0002_a or 0003_c"):
        rebase(branched)


def test_rebasing_one_line_is_refused(directory: Path, write: Callable[..., Path]) -> None:
    write("0001_a", None)

    with pytest.raises(ScriptError, match="nothing to rebase"):
        rebase(directory)
