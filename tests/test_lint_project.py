"""A directory of migrations: comments allow single calls, --diff reports what changed, formats say the same."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shardmig import planfile, sqltree
from shardmig.config import Lint
from shardmig.errors import ScriptError
from shardmig.lint import lint_plan
from shardmig.lint.catalogue import RULES
from shardmig.lint.project import Linted, changed_since, lint_directory
from shardmig.lint.report import FORMATS, report
from shardmig.loading import load_plans
from shardmig.rendering import Renderer

HEAD = "import sqlalchemy as sa\nfrom alembic import op\nfrom shardmig.operations import move_rows\n"
DATA = Path(__file__).parent / "data"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "migrations"
    made.mkdir()
    return made


def script(directory: Path, number: int, *lines: str, rest: str = "") -> Path:
    parents = sorted(path.stem for path in directory.glob("*.py"))
    name = f"{number:04}_step"
    facts = f'revision, down_revision = "{name}", {(parents or [None])[-1]!r}\nflag = "step_{number}"\n'
    body = "".join(f"    {line}\n" for line in lines) or "    pass\n"
    path = directory / f"{name}.py"
    path.write_text(f'"""step {number}"""\n{HEAD}{facts}\ndef upgrade() -> None:\n{body}{rest}')
    (directory / "HEAD").write_text(f"{name}\n")
    return path


def found(directory: Path, **settings: Any) -> list[tuple[str, int | None, bool]]:
    return [(v.code, v.line, v.fails) for v in lint_directory(directory, Lint(**settings)).violations]


# --------------------------------------------------------------------------------------------------------------------
# Allow comments


COMMENT = 'op.execute("COMMENT ON TABLE t IS NULL")'
ALLOWED = [("SM125", 9, False)]
JSON = 'op.add_column("t", sa.Column("n", sa.JSON))'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([f"{JSON}  # shardmig: allow SM125 -- nobody selects distinct"], [("SM125", 9, False)]),
        (["# shardmig: allow SM125 -- nobody selects distinct", JSON], [("SM125", 10, False)]),
        (["op.add_column(", '"t",', 'sa.Column("n", sa.JSON),  # shardmig: allow SM125 -- x', ")"], ALLOWED),
        ([f"{JSON}  # shardmig: allow SM125"], [("SP020", 9, True)]),
        ([f"{JSON}  # shardmig: allow"], [("SP020", 9, True)]),
        ([f"{JSON}  # shardmig: allow SM999 -- x"], [("SP020", 9, True)]),
        (['op.execute("DROP TABLE t")  # shardmig: allow SM101 -- x'], [("SP020", 9, True)]),
        ([f"{COMMENT}  # shardmig: allow SM125 -- x"], [("SP020", 9, True)]),
        ([JSON, f"{COMMENT}  # shardmig: allow SM125 -- x"], [("SM125", 9, True), ("SP020", 10, True)]),
        ([f"{JSON}  # about shardmig: allow SM125 -- x"], [("SM125", 9, True)]),
        (['op.add_column("t", sa.Column("n", sa.JSON, comment="# shardmig: allow SM125 -- x"))'], [("SM125", 9, True)]),
    ],
    ids=["on the call", "above it", "inside it", "bare", "no code", "no such rule", "never", "nothing there",
         "another call", "not at its beginning", "in a literal"],
)  # fmt: skip
def test_a_comment_allows_its_own_call_with_a_reason_and_nothing_else(
    directory: Path, lines: list[str], expected: list[tuple[str, int, bool]]
) -> None:
    script(directory, 1, *lines)

    assert found(directory) == expected


OTHER = 'op.add_column("ref", sa.Column("n", sa.JSON))'
HELPER = ["for name in ('t', 'ref'):", '    op.add_column(name, sa.Column("n", sa.JSON))']
WHY = "  # shardmig: allow SM125 -- why"


@pytest.mark.parametrize(
    ("lines", "entries", "refused"),
    [
        ([JSON + WHY], ["SM125 step 1: why"], []),
        ([WHY.strip(), JSON, OTHER], ["SM125 step 1: why"], [("SM125", 2)]),
        ([JSON, OTHER + WHY], ["SM125 step 2: why"], [("SM125", 1)]),
        ([JSON + WHY, OTHER + WHY], ["SM125 step 1: why", "SM125 step 2: why"], []),
        ([HELPER[0], HELPER[1] + WHY], ["SM125 step 1, 2: why"], []),
        ([JSON, JSON.replace('"n"', '"m"') + WHY], ["SM125 step 1: why"], []),
        ([JSON, COMMENT + WHY], ["SM125 step 2: why"], [("SM125", 1), ("SP020", None)]),
    ],
    ids=["on the call", "above it", "another call", "each call", "made several", "merged", "nothing there"],
)
def test_a_plan_is_accepted_only_where_its_comments_stand(
    directory: Path, lines: list[str], entries: list[str], refused: list[tuple[str, int | None]]
) -> None:
    """`apply` sees plans alone; what lint refuses for its line must not pass there for its code."""
    script(directory, 1, *lines)

    [loaded] = load_plans(directory)

    assert (*entries,) == loaded.plan.allowed
    assert refused == [(v.code, v.step) for v in lint_plan(loaded.plan) if v.fails]
    assert bool(refused) == bool(lint_directory(directory, Lint()).failures)


# --------------------------------------------------------------------------------------------------------------------
# Directories


def test_an_empty_directory_is_clean_and_says_so(directory: Path) -> None:
    linted = lint_directory(directory, Lint())

    assert (linted.exit_code, linted.violations) == (0, ())
    assert "nothing to lint" in report(linted)


def test_history_before_the_adopted_revision_is_not_judged(directory: Path) -> None:
    script(directory, 1, 'op.execute("COMMENT ON DATABASE d IS NULL")')
    script(directory, 2, 'op.execute("COMMENT ON DATABASE d IS NULL")')

    assert found(directory, start_after="0001_step") == [("SM151", 9, True)]


def test_a_script_that_cannot_be_rendered_is_a_violation_at_its_line(directory: Path) -> None:
    script(directory, 1, 'op.execute(sa.text("COMMENT ON TABLE t IS :x"))')

    assert found(directory) == [("SP015", 9, True)]


def test_a_script_that_is_no_python_hides_no_other(directory: Path) -> None:
    path = script(directory, 1)
    path.write_text(path.read_text() + "def x(:\n")

    assert found(directory)[0][0] == "SP001"


def test_a_script_that_breaks_layer_one_is_never_executed(directory: Path) -> None:
    script(directory, 1, 'op.create_table("t", sa.Column("id", sa.Integer, primary_key=True))', 'open("was_here", "w")')
    moved = '\ndef move() -> None:\n    move_rows("t", forward={"n": "1"})\n'
    script(directory, 2, 'op.add_column("t", sa.Column("n", sa.Integer))', rest=moved)

    codes = [code for code, _, _ in found(directory)]

    assert codes == ["SP012", "SP015"]
    assert not Path("was_here").exists()


def test_a_plan_file_is_judged_as_it_stands(directory: Path) -> None:
    script(directory, 1, 'op.add_column("t", sa.Column("n", sa.Integer))')
    (loaded,) = load_plans(directory)
    evil = loaded.plan.steps[0].model_copy(update={"sql": "ALTER TABLE t DROP COLUMN a"})
    plan = loaded.plan.model_copy(update={"steps": (evil, *loaded.plan.steps[1:])})
    planfile.write(plan, loaded.script.plan_path)

    assert [code for code, _, _ in found(directory)] == ["SM101"]


def test_each_of_two_hundred_revisions_is_rendered_once_and_parsed_a_few_times(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that grew with the square of the history would show; benchmarks/lint.py measures what this takes."""
    move = '\ndef move() -> None:\n    move_rows("t{0}", forward={{"a{1}": "upper(b{0})"}})\n'
    for number in range(1, 201, 2):
        columns = f'sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("b{number}", sa.Text)'
        script(directory, number, f'op.create_table("t{number}", {columns})')
        column = f'op.add_column("t{number}", sa.Column("a{number + 1}", sa.Text))'
        script(directory, number + 1, column, rest=move.format(number, number + 1))

    done: Counter[str] = Counter()
    render, parse = Renderer.render, sqltree.parse
    monkeypatch.setattr(Renderer, "render", lambda *given: (done.update(["rendered"]), render(*given))[1])
    monkeypatch.setattr(sqltree, "parse", lambda sql: (done.update(["parsed"]), parse(sql))[1])

    assert lint_directory(directory, Lint()).exit_code == 0
    cold = done.copy()
    for loaded in load_plans(directory):
        planfile.write(loaded.plan, loaded.script.plan_path)
    done.clear()
    assert lint_directory(directory, Lint()).exit_code == 0

    assert (cold["rendered"], done["rendered"]) == (200, 0)
    assert 200 < done["parsed"] < 200 * 10


# --------------------------------------------------------------------------------------------------------------------
# --diff


@pytest.fixture
def repository(directory: Path) -> Path:
    script(directory, 1, 'op.execute("COMMENT ON DATABASE d IS NULL")')
    _git(directory, "init", "-q")
    _git(directory, "add", ".")
    _git(directory, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x")
    return directory


def _git(directory: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True)


def test_diff_reports_only_what_changed_and_still_knows_history(repository: Path) -> None:
    script(repository, 2, 'op.add_column("t", sa.Column("n", sa.JSON))')

    linted = lint_directory(repository, Lint(), only=changed_since("HEAD", repository))

    assert [(v.code, v.path) for v in linted.failures] == [("SM125", "migrations/0002_step.py")]


def test_diff_with_nothing_changed_is_clean(repository: Path) -> None:
    linted = lint_directory(repository, Lint(), only=changed_since("HEAD", repository))

    assert (linted.exit_code, linted.notes) == (0, ("nothing changed; nothing to lint",))


def test_diff_against_nothing_known_could_not_run(repository: Path) -> None:
    with pytest.raises(ScriptError, match="no-such-branch"):
        changed_since("no-such-branch", repository)


# --------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.fixture
def linted(directory: Path) -> Linted:
    script(
        directory,
        1,
        'op.create_index("ix", "t", ["ä"])  # 100%',
        "op.execute(\"CREATE TYPE m AS ENUM ('x')\")",
        JSON + "  # shardmig: allow SM125 -- why, really: 1%",
    )
    return lint_directory(directory, Lint())  # fmt: skip


def test_text_shows_sql_with_caret_script_line_lock_and_what_to_write(linted: Linted) -> None:
    text = report(linted)
    lines = text.splitlines()

    assert lines[0].startswith("migrations/0001_step.py:9 SM140 step 1: every INSERT, UPDATE and DELETE on t waits")
    assert lines[1:4] == [
        '  sql    1 | CREATE INDEX ix ON t ("ä")',
        "           |                    ^",
        '         9 |     op.create_index("ix", "t", ["ä"])  # 100%',
    ]
    assert "  lock:     SHARE on t" in lines
    assert '  write:    op.create_index("ix", "t", ["ä"], postgresql_concurrently=True)' in lines
    assert lines[-1] == "1 violation, 1 allowed, 1 warning in 1 file"


def test_json_keeps_its_schema(linted: Linted) -> None:
    schema = json.loads((DATA / "lint-report.schema.json").read_text())
    body = json.loads(report(linted, "json"))

    jsonschema.validate(body, schema)
    assert [entry["level"] for entry in body["violations"]] == ["error", "warning", "allowed"]
    assert set(schema["properties"]["violations"]["items"]["required"]) == set(body["violations"][0])


def test_github_commands_escape_what_would_break_them(linted: Linted) -> None:
    lines = report(linted, "github").splitlines()

    assert lines[0].startswith("::error file=migrations/0001_step.py,line=9,title=SM140 blocking-index::every INSERT")
    assert "%0Awrite: op.create_index" in lines[0]
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning"]


def test_gitlab_fingerprints_are_unique_and_stay_the_same(linted: Linted) -> None:
    body = json.loads(report(linted, "gitlab"))

    further_down = replace(linted, violations=tuple(replace(v, line=(v.line or 0) + 3) for v in linted.violations))
    fingerprints = [entry["fingerprint"] for entry in body]
    assert fingerprints == [entry["fingerprint"] for entry in json.loads(report(further_down, "gitlab"))]
    assert len(set(fingerprints)) == len(body) == 2
    assert body[0]["location"] == {"path": "migrations/0001_step.py", "lines": {"begin": 9}}
    assert [entry["severity"] for entry in body] == ["blocker", "minor"]


def test_sarif_has_what_the_standard_requires(linted: Linted) -> None:
    """The required properties of SARIF 2.1.0 (sections 3.13, 3.14, 3.19, 3.27); the whole schema was tried by hand."""
    body = json.loads(report(linted, "sarif"))
    (run,) = body["runs"]
    driver = run["tool"]["driver"]

    assert body["version"] == "2.1.0"
    assert [rule["id"] for rule in driver["rules"]] == [rule.code for rule in RULES]
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning")
        assert result["message"]["text"]
        region = result["locations"][0]["physicalLocation"]["region"]
        assert region["startLine"] >= 1
    assert run["results"][2]["suppressions"] == [{"kind": "inSource", "justification": "why, really: 1%"}]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("broken", ['op.execute("DROP TABLE t")', "def x(:"])
def test_paths_lead_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, broken: str
) -> None:
    """An annotation whose path is not the repository's stands nowhere."""
    directory = tmp_path / "alembic" / "versions"
    directory.mkdir(parents=True)
    script(directory, 1, broken)
    monkeypatch.chdir(tmp_path)

    said = report(lint_directory(directory, Lint()), form)

    assert said.count("versions/0001_step.py") == said.count("alembic/versions/0001_step.py") > 0


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_can_say_that_nothing_was_found(form: Any) -> None:
    text = report(Linted(count=3), form)

    assert text.endswith("\n") or form == "github"
