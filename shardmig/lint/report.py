"""What the linter found, written for a person, a program, a forge: text, json, github, sarif, gitlab."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, Literal, get_args

from shardmig.lint.catalogue import RULES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.lint.project import Linted
    from shardmig.lint.violation import Rule, Violation

__all__ = ["FORMATS", "Format", "report"]

Format = Literal["text", "json", "github", "sarif", "gitlab"]
FORMATS: tuple[Format, ...] = get_args(Format)

_SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_WIDTH = 100  # characters of a source line that an excerpt shows


def report(linted: Linted, form: Format = "text") -> str:
    """
    Write what was found.

    Args:
        linted: the findings.
        form: "text" for people, "json" (see docs/lint.md), "github" annotations, "sarif" 2.1.0, "gitlab" code quality.

    Returns:
        The text, ending in a line feed.
    """
    return _WRITERS[form](linted)


# --------------------------------------------------------------------------------------------------------------------
# For people


def _text(linted: Linted) -> str:
    blocks = ["\n".join(_block(violation, linted.sources or {})) for violation in linted.violations]
    failures = len(linted.failures)
    counts = Counter("allowed" if v.allowed is not None else "warning" for v in linted.violations if not v.fails)
    others = "".join(f", {n} {kind}{'s' if kind == 'warning' and n != 1 else ''}" for kind, n in sorted(counts.items()))
    verdict = f"{failures} violation{'s' if failures != 1 else ''}" if failures else "clean"
    judged = f"{linted.count} file{'s' if linted.count != 1 else ''}"
    notes = [f"note: {note}" for note in linted.notes]
    return "\n\n".join([*blocks, "\n".join([*notes, f"{verdict}{others} in {judged}"])]) + "\n"


def _block(violation: Violation, sources: dict[str, str]) -> Iterator[str]:
    level = "" if violation.fails else " (allowed)" if violation.allowed is not None else " (warning)"
    where = ":".join(str(part) for part in (violation.path, violation.line, violation.column) if part is not None)
    step = "" if violation.step is None else f"step {violation.step}{f', {violation.part}' if violation.part else ''}: "
    yield f"{where + ' ' if where else ''}{violation.code}{level} {step}{violation.message}"
    yield from _sql_excerpt(violation)
    yield from _script_excerpt(violation, sources)
    for label, value in (
        ("lock", violation.lock),
        ("old code", violation.notices),
        ("allowed", violation.allowed),
        ("write", violation.fix if violation.allowed is None else None),
    ):
        if value:
            first, *rest = value.split("\n")
            yield f"  {label + ':':<10}{first}"
            yield from (f"{'':<12}{line}" for line in rest)


def _sql_excerpt(violation: Violation) -> Iterator[str]:
    """Show the line of the rendered SQL with a caret under the place."""
    if violation.sql is None or violation.sql_line is None or violation.sql_column is None:
        return
    lines = violation.sql.split("\n")
    if violation.sql_line > len(lines):
        return
    line, column = _window(lines[violation.sql_line - 1], violation.sql_column)
    yield f"  sql {violation.sql_line:>4} | {line}"
    yield f"           | {' ' * (column - 1)}^"


def _script_excerpt(violation: Violation, sources: dict[str, str]) -> Iterator[str]:
    """Show the script's line that made the statement."""
    source = sources.get(violation.path or "", "")
    lines = source.split("\n")
    if not source or violation.line is None or violation.line > len(lines):
        return
    line, column = _window(lines[violation.line - 1], violation.column or 1)
    yield f"      {violation.line:>4} | {line}"
    if violation.column is not None and violation.sql is None:
        yield f"           | {' ' * (column - 1)}^"


def _window(line: str, column: int) -> tuple[str, int]:
    """Cut a long line around a place; control characters become visible, so that the caret stands right."""
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    start = max(0, column - _WIDTH // 2) if len(shown) > _WIDTH else 0
    cut = shown[start : start + _WIDTH]
    if start:
        cut = "…" + cut[1:]
    return cut, column - start


# --------------------------------------------------------------------------------------------------------------------
# For programs


def _level(violation: Violation) -> str:
    return "allowed" if violation.allowed is not None else "warning" if violation.warning else "error"


def _json(linted: Linted) -> str:
    found = [{**asdict(violation), "level": _level(violation)} for violation in linted.violations]
    for entry in found:
        del entry["warning"]
    body = {
        "version": 1,
        "files": linted.count,
        "failures": len(linted.failures),
        "notes": list(linted.notes),
        "violations": found,
    }
    return json.dumps(body, ensure_ascii=False, indent=2) + "\n"


def _github(linted: Linted) -> str:
    """Write workflow commands; GitHub shows them beside the line."""
    lines = []
    for violation in linted.violations:
        if violation.allowed is not None:
            continue
        command = "error" if violation.fails else "warning"
        facts = {"file": violation.path, "line": violation.line, "col": violation.column}
        facts["title"] = f"{violation.code} {violation.name}"
        properties = ",".join(f"{k}={_escaped(str(v), ',:')}" for k, v in facts.items() if v is not None)
        lines.append(f"::{command} {properties}::{_escaped(_sentence(violation))}")
    lines += [f"::notice::{_escaped(note)}" for note in linted.notes]
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _sentence(violation: Violation) -> str:
    fix = "" if violation.fix is None else f"\nwrite: {violation.fix}"
    return f"{violation.message}{fix}"


def _gitlab(linted: Linted) -> str:
    """Write a code quality report (GitLab, "Code Quality", "Implement a custom tool")."""
    seen: Counter[str] = Counter()
    body = []
    for violation in linted.violations:
        if violation.allowed is not None:
            continue
        identity = f"{violation.code}\0{violation.path}\0{violation.step}\0{violation.part}\0{violation.message}"
        seen[identity] += 1
        digest = hashlib.sha256(f"{identity}\0{seen[identity]}".encode("utf-8", "replace")).hexdigest()
        body.append(
            {
                "description": f"{violation.code} {violation.message}",
                "check_name": violation.code,
                "fingerprint": digest,
                "severity": "minor" if violation.warning else "blocker",
                "location": {"path": violation.path or "", "lines": {"begin": violation.line or 1}},
            }
        )
    return json.dumps(body, ensure_ascii=False, indent=2) + "\n"


def _sarif(linted: Linted) -> str:
    """Write SARIF 2.1.0 (OASIS standard, errata 01)."""
    rules = {rule.code: index for index, rule in enumerate(RULES)}
    run = {
        "tool": {
            "driver": {
                "name": "shardmig",
                "version": version("shardmig"),
                "rules": [_sarif_rule(rule) for rule in RULES],
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": [_sarif_result(violation, rules) for violation in linted.violations],
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [{"level": "note", "message": {"text": n}} for n in linted.notes],
            }
        ],
    }
    return (
        json.dumps({"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, ensure_ascii=False, indent=2) + "\n"
    )


def _sarif_rule(rule: type[Rule]) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.summary()},
        "fullDescription": {"text": cleandoc(rule.__doc__ or "")},
        "defaultConfiguration": {"level": "warning" if rule.warning else "error"},
    }


def _sarif_result(violation: Violation, rules: dict[str, int]) -> dict[str, Any]:
    region = {"startLine": violation.line or 1, **({"startColumn": violation.column} if violation.column else {})}
    result: dict[str, Any] = {
        "ruleId": violation.code,
        "ruleIndex": rules[violation.code],
        "level": "warning" if violation.warning else "error",
        "message": {"text": _sentence(violation)},
        "properties": {
            name: value
            for name in ("step", "part", "sql", "lock", "notices")
            if (value := getattr(violation, name)) is not None
        },
    }
    if violation.path is not None:
        uri = violation.path.replace("\\", "/")
        result["locations"] = [{"physicalLocation": {"artifactLocation": {"uri": uri}, "region": region}}]
    if violation.allowed is not None:
        result["suppressions"] = [{"kind": "inSource", "justification": violation.allowed}]
    return result


_WRITERS: dict[Format, Callable[[Linted], str]] = {
    "text": _text,
    "json": _json,
    "github": _github,
    "sarif": _sarif,
    "gitlab": _gitlab,
}
