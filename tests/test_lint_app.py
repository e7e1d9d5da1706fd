"""`lint --app`: SQL in Python and .sql files that would notice a new column, and few false alarms."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardmig.lint.app import lint_app, lint_statement


def codes(path: Path, **options: object) -> list[tuple[str, int | None]]:
    return [(v.code, v.line) for v in lint_app([path], **options).violations]  # type: ignore[arg-type]


def python(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "app.py"
    path.write_text(source)
    return path


def test_sql_is_found_in_literals_f_strings_concatenations_and_templates(tmp_path: Path) -> None:
    source = (
        'a = "SELECT * FROM t"\n'
        'b = f"SELECT * FROM {table} WHERE id = {i}"\n'
        'c = "SELECT * " + "FROM t WHERE id = %s" % 1\n'
        'd = """\n  SELECT id,\n         t.*\n  FROM t WHERE id = %(id)s AND x = :x"""\n'
        'e = "SELECT * FROM %s" % table\n'
    )

    assert codes(python(tmp_path, source)) == [("SA001", 1), ("SA001", 2), ("SA001", 3), ("SA001", 6), ("SA001", 8)]


@pytest.mark.parametrize(
    "text",
    [
        "Select * to be told from all of them, friends",
        "Update the value set of options",
        "with great power",
        "SELECT count(*) FROM t",
        "SELECT id FROM t WHERE EXISTS (SELECT * FROM u)",
        "SELECT * FROM (SELECT id FROM t) x",
        "WITH x AS (SELECT id FROM t) SELECT * FROM x",
        "SELECT * FROM generate_series(1, 2)",
        "SELECT * FROM pg_stat_activity",
        "SELECT 'a'::text, ROW(1, 2)::record",
        "SELECT a FROM t ORDER BY b",
        "DELETE FROM t WHERE id = ?",
        "SELECT x->>'a' FROM t WHERE j ? 'k'",
    ],
)
def test_prose_and_harmless_sql_raise_no_alarm(text: str) -> None:
    assert lint_statement(text) == []


def test_a_docstring_is_no_sql(tmp_path: Path) -> None:
    assert codes(python(tmp_path, 'def f():\n    """SELECT * FROM t"""\n')) == []


def test_every_statement_of_a_sql_file_has_its_line_and_psql_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.sql"
    path.write_text("\\set x 1\nSELECT 1;\n\nSELECT * FROM t;\nnonsense here;\nCOPY t FROM STDIN;\n")

    assert codes(path) == [("SA001", 4), ("SA003", 6)]


def test_a_column_of_the_outer_query_is_told_when_tables_are_known() -> None:
    sql = "SELECT c.id FROM customer c WHERE c.id IN (SELECT customer_id FROM address WHERE city = home)"
    known = {"address": frozenset({"customer_id", "city"})}

    assert [v.code for v in lint_statement(sql)] == []
    assert [v.code for v in lint_statement(sql, columns=known)] == ["SA008"]


FLAGS = ["shop", "split_name", "order_address"]


@pytest.mark.parametrize(
    "source",
    [
        'from shardmig import Flag\nFlag("splt_name")\n',
        'from shardmig import Flag as Switch, Flags\nX = Switch("splt_name", at_least=1)\n',
        'from shardmig.flags.core import Flag\nFlag(name="splt_name")\n',
        'import shardmig\nshardmig.Flag("splt_name")\n',
        'def f():\n    import shardmig as s; s.Flag("splt_name")\n',
    ],
)
def test_a_misspelt_flag_is_found_with_the_one_that_may_be_meant(tmp_path: Path, source: str) -> None:
    (found,) = lint_app([python(tmp_path, source)], flags=FLAGS).violations

    assert ("SA011", 2, 'Flag("split_name")') == (found.code, found.line, found.fix)
    assert found.message.endswith("did you mean split_name?")


@pytest.mark.parametrize(
    "source",
    [
        'from shardmig import Flag\nFlag("split_name")\n',
        'from enum import Flag\nFlag("splt_name")\n',
        'from shop import Flag\nFlag("splt_name")\n',
        "from shardmig import Flag\nFlag(NAME)\nFlag(name=f'{a}_b')\n",
        'from shardmig import Flag\nFlag("later")  # shardmig: allow SA011 -- its script is in review\n',
    ],
)
def test_only_names_that_certainly_are_no_plans_flag_are_found(tmp_path: Path, source: str) -> None:
    assert not lint_app([python(tmp_path, source)], flags=FLAGS).failures


def test_without_plans_at_hand_no_flag_is_compared(tmp_path: Path) -> None:
    path = python(tmp_path, 'from shardmig import Flag\nFlag("splt_name")\n')

    assert lint_app([path]).violations == ()
    assert ["SA011"] == [v.code for v in lint_app([path], flags=[]).violations]


def test_a_flag_that_rows_move_by_and_nobody_declares_is_a_note_where_a_whole_directory_is_judged(
    tmp_path: Path,
) -> None:
    path = python(tmp_path, 'from shardmig import Flag\nFlag("split_name")\n')
    asked = ["split_name", "order_address"]

    assert lint_app([path], flags=FLAGS, asked=asked).notes == ()
    linted = lint_app([tmp_path], flags=FLAGS, asked=asked)
    assert 0 == linted.exit_code
    assert ["no Flag(…) here names order_address: before DUAL, code that writes these rows has to"] == [*linted.notes]


def test_comments_allow_with_a_reason(tmp_path: Path) -> None:
    path = python(tmp_path, 'a = "SELECT * FROM t"  # shardmig: allow SA001 -- never prepared\n')
    other = tmp_path / "x.sql"
    other.write_text("-- shardmig: allow SA001 -- a report\nSELECT * FROM t;\n")

    assert lint_app([path, other]).failures == ()


def test_directories_are_walked_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "x.sql").write_text("SELECT * FROM t")
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "pyvenv.cfg").write_text("")
    (tmp_path / "env" / "x.sql").write_text("SELECT * FROM t")
    (tmp_path / "a.py").write_bytes(b"\xff")
    (tmp_path / "b.py").write_text("x = (")
    (tmp_path / "c.sql").write_text("SELECT * FROM t")
    linted = lint_app([tmp_path])

    assert [Path(v.path or "").name for v in linted.violations] == ["c.sql"]
    assert linted.count == 2
    assert "a.py" in linted.notes[0]
