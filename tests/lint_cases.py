"""
Judge a file of cases and compare with the verdicts in it: `python tests/lint_cases.py FILE.jsonl`.

One JSON object a line: `kind` (sql, python), `context` (structure, data_move), `text`, `verdict` (allow, reject),
`why`, `basis` (fact, choice); optionally `new` (tables, columns, types, sequences of the same revision) and `pg`
(oldest server). A python case passes when its script may be imported and everything it renders is accepted.

Prints each disagreement with its reason, then agree/total; exits 1 on a disagreement whose basis is "fact".
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from shardmig.config import Lint
from shardmig.errors import ShardmigError
from shardmig.lint import New, judge, lint_plan, lint_script

CONTEXTS = {"structure": "structure", "data_move": "move"}


def reasons(case: dict[str, Any]) -> list[str]:
    """Return why a case is rejected; nothing when it is allowed."""
    settings = Lint(pg_versions=(max(case.get("pg") or 14, 14), 18))
    if case["kind"] == "python":
        return _script(case["text"], settings)
    found = judge(case["text"], context=CONTEXTS[case["context"]], new=_new(case.get("new") or {}), known=settings)
    return [str(violation) for violation in found if violation.fails]


def _new(stated: dict[str, Any]) -> New:
    sequences = stated.get("sequences")
    return New(
        tables=frozenset(stated.get("tables", ())),
        columns={table: frozenset(columns) for table, columns in stated.get("columns", {}).items()},
        types=frozenset(stated.get("types", ())),
        sequences=None if sequences is None else frozenset(sequences),
    )


def _script(text: str, settings: Lint) -> list[str]:
    found = [str(violation) for violation in lint_script(text, settings=settings) if violation.fails]
    if found:
        return found
    from shardmig.rendering import render  # noqa: PLC0415 - Alembic is only loaded when a script is to be rendered
    from shardmig.scripts import read_script  # noqa: PLC0415 - as above

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "0001_case.py"
        path.write_text(text, encoding="utf-8", newline="")
        try:
            plan = render(read_script(path))
        except ShardmigError as error:
            return [str(error)]
    return [str(violation) for violation in lint_plan(plan, (), settings) if violation.fails]


def main(path: str) -> int:
    """Judge a file; return the exit code."""
    cases = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    facts = agreed = 0
    for case in cases:
        why = reasons(case)
        verdict = "reject" if why else "allow"
        if verdict == case["verdict"]:
            agreed += 1
            continue
        basis = case.get("basis")
        facts += basis == "fact"
        _say(f"{case.get('id', '?')}: {case['verdict']} expected ({basis}: {case.get('why')}), {verdict} given")
        _say(f"    {case['text']!r}", *(f"    {reason}" for reason in why))
    _say(f"{agreed}/{len(cases)}")
    return 1 if facts else 0


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
