"""
Drafts of scripts: what Alembic renders, turned into calls that the linter passes.

The linter decides, not this module: each addition comes with simpler variants of itself, and the first one that is
accepted is written. What is lost on the way, and why, is told.
"""

from __future__ import annotations

import ast
import io
import re
import tempfile
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardmig.errors import ScriptError
from shardmig.lint import History, lint_script
from shardmig.rendering import Renderer
from shardmig.scripts import load_scripts, read_script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shardmig.config import Config
    from shardmig.lint.violation import Violation
    from shardmig.plan import AcceptedPlan

__all__ = ["Addition", "Draft", "Explained", "Judge", "imports", "parsed", "without", "written"]

_WIDTH = 116
_INDENT = "    "
_NOISE = {("nullable", True), ("unique", False), ("schema", None), ("existing_comment", None)}


@dataclass(frozen=True, slots=True)
class Explained:
    """
    A difference that no addition closes.

    Attributes:
        title: what differs, in one line; also how a later run recognises it.
        why: what would happen, and the additive way.
        stub: the lines of a function move(), where the pair could be guessed.
    """

    title: str
    why: str
    stub: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to write an addition, and what it leaves out."""

    source: str
    lost: tuple[Explained, ...] = ()


@dataclass(frozen=True, slots=True)
class Addition:
    """
    Something that a script can add.

    Attributes:
        title: in one line, "column customer.nick".
        variants: calls of operations, the fullest first.
        alone: whether the linter has to look at it by itself, because rendering merges it with its neighbours.
        needs: titles of additions without which this one means nothing.
    """

    title: str
    variants: tuple[Variant, ...]
    alone: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """
    A script's content, accepted by the linter.

    Attributes:
        written: titles and sources of what it adds, in order.
        explained: what it leaves to people.
    """

    written: tuple[tuple[str, str], ...]
    explained: tuple[Explained, ...]

    @property
    def body(self) -> str:
        """The body of upgrade(), indented."""
        return "\n".join(_indented(source) for _, source in self.written)


class Judge:
    """
    Asks the linter about drafts behind the newest script, without writing any.

    Args:
        config: the project's.
        plans: the whole history, accepted.
    """

    def __init__(self, config: Config, plans: Sequence[AcceptedPlan]) -> None:
        self._settings = config.lint
        self._scripts = (
            load_scripts(config.migrations_dir, start_after=config.lint.start_after)
            if config.migrations_dir.is_dir()
            else ()
        )
        self._history = History(config.lint, [accepted.plan for accepted in plans])

    def draft(self, additions: Sequence[Addition], explained: Sequence[Explained]) -> Draft:
        """Choose for each addition the fullest variant that is accepted; what has none is explained."""
        left = list(additions)
        chosen = dict.fromkeys((addition.title for addition in left), 0)
        told = list(explained)
        types = [addition for addition in left if addition.title.startswith("type ")]
        for addition in [addition for addition in left if addition.alone]:
            while (refused := self._refused([*types, addition], chosen).get(addition.title)) is not None:
                self._simpler(addition, refused, chosen, left, told)
                if addition not in left:
                    break
        while refusals := self._refused(left, chosen):
            for title, message in refusals.items():
                for addition in [one for one in left if one.title == title]:
                    self._simpler(addition, message, chosen, left, told)
        for addition in left:
            told += addition.variants[chosen[addition.title]].lost
        sources = [(addition.title, addition.variants[chosen[addition.title]].source) for addition in left]
        return Draft(tuple(sources), tuple({one.title: one for one in told}.values()))

    def _simpler(
        self, addition: Addition, message: str, chosen: dict[str, int], left: list[Addition], told: list[Explained]
    ) -> None:
        """Go to the next variant; without one, leave the addition out, and what needs it."""
        chosen[addition.title] += 1
        if chosen[addition.title] < len(addition.variants):
            return
        left.remove(addition)
        told.append(Explained(f"{addition.title} is left out", message))
        for other in [other for other in left if addition.title in other.needs]:
            left.remove(other)
            told.append(Explained(f"{other.title} is left out", f"it needs the {addition.title}, which is left out"))

    def _refused(self, additions: Sequence[Addition], chosen: dict[str, int]) -> dict[str, str]:
        """Return titles of additions that are not accepted, each with the first reason."""
        sources = [addition.variants[chosen[addition.title]].source for addition in additions]
        parent = self._scripts[-1].revision if self._scripts else self._settings.start_after or None
        lines, owners = _script(parent, sources)
        refused: dict[str, str] = {}
        for line, message in self._problems("\n".join(lines)):
            owner = owners.get(line)
            if owner is None:
                raise ScriptError(f"a draft is refused, line {line}: {message}")
            refused.setdefault(additions[owner].title, message)
        return refused

    def _problems(self, text: str) -> list[tuple[int, str]]:
        found = [v for v in lint_script(text, path="draft", settings=self._settings) if v.fails]
        if found:
            return [(violation.line or 0, _said(violation)) for violation in found]
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "draft.py"
            path.write_text(text, encoding="utf-8")
            script = read_script(path)
            try:
                plan = Renderer([*self._scripts, script]).render(script)
            except ScriptError as error:
                return [(error.line or 0, str(error).partition(": ")[2] or str(error))]
        return [(v.line or 0, _said(v)) for v in self._history.findings(plan) if v.fails]


def _said(violation: Violation) -> str:
    return f"{violation.message} ({violation.code})"


def _script(parent: str | None, sources: Sequence[str]) -> tuple[list[str], dict[int, int]]:
    """Lay out a script; return its lines, and which source each line belongs to."""
    lines = [
        *imports(sources),
        f'revision, down_revision = "draft_of_autogenerate", {parent!r}',
        "def upgrade() -> None:",
        f"{_INDENT}pass",
    ]
    owners: dict[int, int] = {}
    for number, source in enumerate(sources):
        for line in _indented(source).split("\n"):
            lines.append(line)
            owners[len(lines)] = number
    return lines, owners


def _indented(source: str) -> str:
    return "\n".join(_INDENT + line if line else line for line in source.split("\n"))


def imports(sources: Iterable[str]) -> list[str]:
    """Return the imports that calls need."""
    found = {"import sqlalchemy as sa", "from alembic import op"}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and (name := _dotted(node)):
                root = name.partition(".")[0]
                if root == "postgresql":
                    found.add("from sqlalchemy.dialects import postgresql")
                elif root not in ("sa", "op") and isinstance(node.value, ast.Name | ast.Attribute):
                    found.add(f"import {name.rpartition('.')[0]}")
    plain = sorted(line for line in found if line.startswith("import"))
    return [*plain, *sorted(found.difference(plain))]


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


# --------------------------------------------------------------------------------------------------------------------
# Calls as trees


def parsed(source: str) -> ast.Call:
    """Parse a call, leaving out what it says needlessly."""
    [statement] = ast.parse(source.strip()).body
    assert isinstance(statement, ast.Expr)  # noqa: S101 - Alembic renders calls
    assert isinstance(statement.value, ast.Call)  # noqa: S101
    for node in ast.walk(statement.value):
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if not _is_noise(k)]
    return statement.value


def _is_noise(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in _NOISE


def without(source: str, part: Callable[[ast.AST], bool]) -> str:
    """Leave out arguments of a call, at any depth."""
    call = parsed(source)
    for node in ast.walk(call):
        if isinstance(node, ast.Call):
            node.args = [argument for argument in node.args if not part(argument)]
            node.keywords = [keyword for keyword in node.keywords if not part(keyword)]
    return written(call)


def written(call: ast.expr, indent: int = 4) -> str:
    """Write a call on one line, or an argument a line."""
    line = _quoted(ast.unparse(call))
    if not isinstance(call, ast.Call) or indent + len(line) <= _WIDTH or not (call.args or call.keywords):
        return line
    arguments = [written(argument, indent + 4) for argument in call.args]
    arguments += [
        f"{k.arg}={written(k.value, indent + 4)}" if k.arg else f"**{written(k.value)}" for k in call.keywords
    ]
    inner = "".join(f"{_indented(argument)},\n" for argument in arguments)
    return f"{_quoted(ast.unparse(call.func))}(\n{inner})"


def _quoted(source: str) -> str:
    """Write strings with double quotes, as everywhere else in the house."""
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string
        if token.type == tokenize.STRING and re.fullmatch(r"'[^\"\\]*'", text):
            text = f'"{text[1:-1]}"'
        tokens.append((token.type, text, token.start, token.end, token.line))
    return str(tokenize.untokenize(tokens)).strip() if tokens else source
