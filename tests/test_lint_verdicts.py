"""Every row of the truth table, and the examples of the specification, against the linter; scripts are rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lint_cases
import pytest

DATA = Path(__file__).parent / "data"
FILES = ("lint-cases.jsonl", "lint-verdicts.jsonl", "lint-forms.jsonl")


@pytest.mark.parametrize("file", FILES)
def test_every_case_is_judged_as_its_file_says(file: Any, capsys: Any) -> None:
    code = lint_cases.main(str(DATA / file))
    said = capsys.readouterr().out.splitlines()

    assert said[-1] == f"{len((DATA / file).read_text().splitlines())}/{len((DATA / file).read_text().splitlines())}", (
        said
    )
    assert code == 0


@pytest.mark.parametrize(("basis", "code"), [("fact", 1), ("choice", 0)])
def test_only_a_disagreement_on_a_fact_fails(basis: Any, code: Any, tmp_path: Any, capsys: Any) -> None:
    case = {
        "id": "X1",
        "kind": "sql",
        "context": "structure",
        "text": "DROP TABLE t",
        "verdict": "allow",
        "basis": basis,
    }
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps(case) + "\n")

    assert lint_cases.main(str(file)) == code
    assert "SM101" in capsys.readouterr().out
