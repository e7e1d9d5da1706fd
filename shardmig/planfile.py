"""
The plan as SQL text: write, read, compare. `docs/formats.md` specifies the file, this module obeys it.

Reading what was written gives the same plan, whatever its SQL looks like: a text ends before the last `;` that stands
alone before the next `--!` line, and no SQL text may hold such a line.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from pydantic import ValidationError

from shardmig.errors import PlanError
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.sqltext import HEADER_MARK, unwritable
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shardmig.plan import Step

__all__ = ["difference", "dumps", "loads", "plan_path", "read", "write"]

_Model = TypeVar("_Model", Plan, Statement, Move)

VERSION = 1
_TITLE = "shardmig plan"
_OUTSIDE = "statement outside a transaction"
_SWITCH = "switch to "
_TEXTS = ("forward", "check", "orphans", "purge", "back", "back_check")
_LISTS = frozenset({"needs", "relax", "amends", "key", "target_key", "writes", "restores"})
_SWITCHES = frozenset({"online", "seed", "lossy", "touch_source"})  # written yes or no
_PLAN_KEYS = (
    "revision",
    "parent",
    "message",
    "flag",
    "protocol",
    "needs",
    "relax",
    "amends",
    "online",
    "allowed",
    "script",
    "plan",
)
_MOVE_KEYS = (
    "line",
    "seed",
    "table",
    "alias",
    "key",
    "target",
    "target_key",
    "writes",
    "restores",
    "lossy",
    "triggers",
    "touch_source",
)
_DEFAULTS = {
    name: field.default for model in (Plan, Move, Statement) for name, field in model.model_fields.items()
}  # a key that says the default is not written


def plan_path(script: Path) -> Path:
    """Return where the plan of a script lives: beside it, ending in .sql."""
    return script.with_suffix(".sql")


# --------------------------------------------------------------------------------------------------------------------
# Write


def write(plan: Plan, path: Path) -> None:
    """Write a plan file; its bytes are the same on every platform."""
    path.write_bytes(dumps(plan).encode())


def dumps(plan: Plan) -> str:
    """
    Write a plan as text.

    Raises:
        PlanError: an SQL text cannot stand in a plan file; rendering refuses such a text before.
    """
    head = [f"{HEADER_MARK} {_TITLE} {VERSION}", *_plan_lines(plan)]
    steps = ["".join(_step_text(number, step)) for number, step in enumerate(plan.steps, 1)]
    return "\n".join(["".join(f"{line}\n" for line in head), *steps])


def _plan_lines(plan: Plan) -> Iterator[str]:
    facts: dict[str, object] = dict(plan) | {"script": plan.script_sha256, "plan": plan.sha256}
    for key in _PLAN_KEYS:
        for value in plan.allowed if key == "allowed" else (facts[key],):
            yield from _header(key, value)


def _step_text(number: int, step: Step) -> Iterator[str]:
    match step:
        case Statement():
            kind = "statement" if step.transactional else _OUTSIDE
            yield f"{HEADER_MARK} step {number}: {kind}\n"
            yield from (f"{line}\n" for line in _header("line", step.line))
            yield _terminated(step.sql)
        case Switch():
            yield f"{HEADER_MARK} step {number}: {_SWITCH}{step.to.name}\n"
        case Move():
            yield f"{HEADER_MARK} step {number}: move\n"
            for key in _MOVE_KEYS:
                yield from (f"{line}\n" for line in _header(key, getattr(step, key)))
            for name in _TEXTS:
                sql = getattr(step, name)
                if sql is not None:
                    yield f"{HEADER_MARK} {name}:\n{_terminated(sql)}"


def _terminated(sql: str) -> str:
    reason = unwritable(sql)
    if reason:
        raise PlanError(f"an SQL text cannot be written into a plan file: {reason}")
    return f"{sql}\n;\n"


def _header(key: str, value: object) -> Iterator[str]:
    if value is None or value == _DEFAULTS.get(key, ...):
        return
    if isinstance(value, bool):
        value = "yes" if value else "no"
    text = ", ".join(_quoted(item, ",") for item in value) if isinstance(value, tuple) else _quoted(str(value))
    yield f"{HEADER_MARK} {key}: {text}"


def _quoted(value: str, separator: str = "") -> str:
    bare = value and value.isprintable() and value == value.strip() and not value.startswith('"')
    return value if bare and not (separator and separator in value) else json.dumps(value)


# --------------------------------------------------------------------------------------------------------------------
# Read


class _Header(NamedTuple):
    line: int
    key: str
    value: str


class _Section(NamedTuple):
    """A run of header lines and the SQL text behind it."""

    headers: list[_Header]
    body: str


def read(path: Path) -> Plan:
    """
    Read a plan file.

    Raises:
        PlanError: the file is not what was written; the message names the line.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise PlanError(f"{name}: byte {error.start} is not UTF-8; `shardmig plan` writes the file anew") from None
    return loads(text, name=name)


def loads(text: str, *, name: str = "plan") -> Plan:
    """
    Read a plan from its text.

    Args:
        text: what `dumps` wrote.
        name: how messages call the file.

    Raises:
        PlanError: the text is damaged or its `plan` hash is not that of its content.
    """
    return _Reader(name).plan(text)


class _Reader:
    """Reads one file; knows its name for the messages."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fail(self, line: int, reason: str) -> NoReturn:
        raise PlanError(f"{self.name}:{line}: {reason}; `shardmig plan` writes the file anew from its script")

    def plan(self, text: str) -> Plan:
        for character, label in (("\0", "NUL character"), ("\r", "carriage return")):
            if character in text:
                self.fail(text[: text.index(character)].count("\n") + 1, f"a {label}")
        sections = self.sections(text)
        title = sections[0].headers[0]
        if (title.key, title.value) != (f"{_TITLE} {VERSION}", ""):
            self.fail(1, f"this version of shardmig reads files that begin `{HEADER_MARK} {_TITLE} {VERSION}`")
        facts, lines = self.facts(sections[0].headers[1:], _PLAN_KEYS)
        if sections[0].body.strip("\n"):
            self.fail(sections[0].headers[-1].line + 1, "SQL text before the first step")
        stated = facts.pop("plan", None)
        plan = self.build(Plan, {"parent": None} | facts | {"steps": self.steps(sections[1:])}, line=1)
        if stated != plan.sha256:
            self.fail(lines.get("plan", 1), f"its hash is {plan.sha256}, not {stated}: it was edited by hand")
        return plan

    def sections(self, text: str) -> list[_Section]:
        sections: list[_Section] = []
        body: list[str] = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.startswith(HEADER_MARK):
                if not sections:
                    self.fail(1, f"a plan file begins `{HEADER_MARK} {_TITLE} {VERSION}`")
                body.append(line)
                continue
            header = self.header(number, line)
            if body or not sections:
                if sections:
                    sections[-1] = sections[-1]._replace(body="\n".join(body))
                sections.append(_Section([], ""))
                body = []
            sections[-1].headers.append(header)
        sections[-1] = sections[-1]._replace(body="\n".join(body))
        return sections

    def header(self, number: int, line: str) -> _Header:
        match = re.fullmatch(rf"{HEADER_MARK} ([^:]+?)(?::(?: (.+))?)?", line)
        if not match:
            self.fail(number, f"a header line reads `{HEADER_MARK} key: value`")
        return _Header(number, match[1], match[2] or "")

    def steps(self, sections: list[_Section]) -> tuple[Step, ...]:
        steps: list[Step] = []
        while sections:
            title = sections[0].headers[0]
            if title.key != f"step {len(steps) + 1}":
                self.fail(title.line, f"expected step {len(steps) + 1}, found `{title.key}`")
            width = next((n for n, s in enumerate(sections[1:], 1) if s.headers[0].key.startswith("step ")), None)
            steps.append(self.step(title, sections[:width]))
            sections = sections[width:] if width else []
        return tuple(steps)

    def step(self, title: _Header, sections: list[_Section]) -> Step:
        kind = title.value
        if kind == "move":
            return self.move(title, sections)
        if len(sections) > 1:
            self.fail(sections[1].headers[0].line, f"a {kind} has one SQL text at most")
        if kind in {"statement", _OUTSIDE}:
            facts, _ = self.facts(sections[0].headers[1:], ("line",))
            facts |= {"sql": self.sql(sections[0]), "transactional": kind == "statement"}
            return self.build(Statement, facts, line=title.line)
        state = kind.removeprefix(_SWITCH)
        if not kind.startswith(_SWITCH) or state not in State.__members__:
            self.fail(title.line, f"`{kind}` is no kind of step")
        if len(sections[0].headers) > 1 or sections[0].body.strip("\n"):
            self.fail(title.line, "a switch is one line, without SQL text")
        return Switch(to=State[state])

    def move(self, title: _Header, sections: list[_Section]) -> Move:
        facts, _ = self.facts(sections[0].headers[1:-1], _MOVE_KEYS)
        for section in sections:
            header = section.headers[-1]
            if header.key not in _TEXTS or header.value or (section is not sections[0] and len(section.headers) > 1):
                self.fail(header.line, f"expected one of {', '.join(_TEXTS)}")
            if header.key in facts:
                self.fail(header.line, f"a second {header.key}")
            facts[header.key] = self.sql(section)
        return self.build(Move, facts, line=title.line)

    def sql(self, section: _Section) -> str:
        text = section.body.rstrip("\n")
        if not text.endswith("\n;"):
            self.fail(section.headers[-1].line + 1, "an SQL text ends with `;` on a line of its own")
        return text[:-2]

    def facts(self, headers: list[_Header], keys: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, int]]:
        facts: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for header in headers:
            key = "script_sha256" if header.key == "script" else header.key
            if header.key not in keys:
                self.fail(header.line, f"`{header.key}` means nothing here to this version of shardmig")
            if header.key == "allowed":
                facts[key] = (*facts.get(key, ()), self.value(header))
            elif key in facts:
                self.fail(header.line, f"a second {header.key}")
            else:
                facts[key] = self.typed(header)
            lines[key] = header.line
        return facts, lines

    def typed(self, header: _Header) -> object:
        if header.key in _LISTS:
            return tuple(self.items(header))
        if header.key in _SWITCHES and header.value in {"yes", "no"}:
            return header.value == "yes"
        if header.key == "line" and header.value.isdecimal():
            return int(header.value)
        return self.value(header)

    def value(self, header: _Header) -> str:
        return self.unquoted(header, header.value)[0] if header.value.startswith('"') else header.value

    def items(self, header: _Header) -> Iterator[str]:
        rest = header.value
        while rest:
            item, rest = self.unquoted(header, rest) if rest.startswith('"') else rest.partition(",")[::2]
            yield item
            rest = rest.lstrip(", ")

    def unquoted(self, header: _Header, text: str) -> tuple[str, str]:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            self.fail(header.line, f"{header.key} begins with a quotation mark but is no JSON string")
        return str(value), text[end:]

    def build(self, model: type[_Model], facts: dict[str, Any], *, line: int) -> _Model:
        try:
            return model(**facts)
        except ValidationError as error:
            reasons = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
            self.fail(line, "; ".join(reasons))


# --------------------------------------------------------------------------------------------------------------------
# Compare


def difference(before: Plan, after: Plan, *, names: tuple[str, str] = ("before", "after"), lines_max: int = 40) -> str:
    """
    Show what differs between two plans, as a short unified diff of their files.

    Hashes and script lines are left out: they follow from the rest.
    """
    old, new = (
        [line for line in dumps(plan).split("\n") if not re.match(rf"{HEADER_MARK} (script|plan|line): ", line)]
        for plan in (before, after)
    )
    lines = list(difflib.unified_diff(old, new, *names, n=1, lineterm=""))
    more = len(lines) - lines_max
    return "\n".join(lines if more <= 0 else [*lines[:lines_max], f"… {more} more lines"])
