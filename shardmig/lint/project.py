"""
A migrations directory, judged: every script, every plan, what comments allow, and what changed since a git reference.

A plan file whose script is unchanged is judged as it stands, without Alembic; only what has none, or an old one, is
rendered, after its script passed layer one.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardmig import planfile
from shardmig.allowances import Allowance, Calls, allowances
from shardmig.errors import PlanError, ScriptError
from shardmig.lint.catalogue import BY_CODE
from shardmig.lint.plans import History
from shardmig.lint.rules.script import NotRendered, UnusedAllow
from shardmig.lint.script import lint_script

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from shardmig.config import Lint
    from shardmig.lint.violation import Violation
    from shardmig.plan import Plan
    from shardmig.scripts import Script

__all__ = ["Linted", "changed_since", "lint_directory"]


@dataclass(frozen=True, slots=True)
class Linted:
    """
    What a run of the linter found.

    Attributes:
        violations: everything, warnings and allowed findings too, in the order of history and text.
        sources: path → text of every script that a violation speaks of, for excerpts.
        count: scripts or files judged.
        notes: what the reader should know about the run itself.
    """

    violations: tuple[Violation, ...] = ()
    sources: dict[str, str] | None = None
    count: int = 0
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Violation, ...]:
        """What keeps the run from being clean."""
        return tuple(violation for violation in self.violations if violation.fails)

    @property
    def exit_code(self) -> int:
        """0 clean, 1 violations."""
        return 1 if self.failures else 0


def lint_directory(directory: Path, settings: Lint, *, only: Collection[Path] | None = None) -> Linted:
    """
    Judge a migrations directory.

    Args:
        directory: the migrations directory.
        settings: the configuration's section on linting.
        only: report these scripts (or their plan files) alone; the others still count as history.

    Raises:
        ScriptError: the history itself cannot be read: two heads, a parent that is not there.
    """
    from shardmig.scripts import load_scripts, name_of  # noqa: PLC0415 - the statement-level linter needs no scripts

    paths = sorted(directory.glob("*.py"))
    if not paths:
        return Linted(notes=(f"{directory} holds no migrations; nothing to lint",))
    wanted = None if only is None else {path.absolute() for path in only}
    if wanted is not None and not wanted:
        return Linted(notes=("nothing changed; nothing to lint",))
    broken = {path: found for path in paths if (found := _unreadable(path, settings))}
    if broken:
        texts = {name_of(path): path.read_text(encoding="utf-8", errors="replace") for path in broken}
        return Linted(tuple(violation for found in broken.values() for violation in found), texts, len(paths))
    scripts = load_scripts(directory, start_after=settings.start_after)
    judged = _Directory(scripts, settings)
    reported = [
        (script, found)
        for script, found in judged.walk()
        if wanted is None or script.path.absolute() in wanted or script.plan_path.absolute() in wanted
    ]
    return Linted(
        tuple(violation for _, found in reported for violation in found),
        {script.name: script.source for script, _ in reported},
        len(reported),
    )


def changed_since(reference: str, directory: Path) -> tuple[Path, ...]:
    """
    Return the files of a directory that differ from a git reference, new ones included.

    Raises:
        ScriptError: git does not know the reference, or is not there.
    """
    commands = (
        ("diff", "--name-only", "--diff-filter=d", "-z", "--relative", reference, "--", "."),
        ("ls-files", "--others", "--exclude-standard", "-z", "--", "."),
    )
    names: list[str] = []
    for command in commands:
        try:
            run = subprocess.run(["git", *command], cwd=directory, capture_output=True, check=False)  # noqa: S603, S607
        except OSError as error:
            raise ScriptError(f"--diff needs git: {error.strerror}") from error
        if run.returncode:
            raise ScriptError(f"--diff {reference}: {run.stderr.decode(errors='replace').strip()}")
        names += [name for name in run.stdout.decode(errors="surrogateescape").split("\0") if name]
    return tuple(directory / name for name in dict.fromkeys(names))


class _Directory:
    """One walk over a history."""

    def __init__(self, scripts: Iterable[Script], settings: Lint) -> None:
        self.scripts = tuple(scripts)
        self.settings = settings
        self.history = History(settings)
        self._renderer: object | None = None

    def walk(self) -> Iterator[tuple[Script, list[Violation]]]:
        """Judge script after script; one that cannot be rendered is reported and adds nothing."""
        for script in self.scripts:
            found = list(lint_script(script.source, path=script.name, settings=self.settings))
            plan = None
            if not any(violation.fails for violation in found):
                plan, problem = self._plan(script)
                found += problem
            if plan is not None:
                found = _with_allowances(script, found, self.history.findings(plan))
                self.history.add(plan)
            yield script, found

    def _plan(self, script: Script) -> tuple[Plan | None, list[Violation]]:
        try:
            if script.plan_path.exists():
                written = planfile.read(script.plan_path)
                if written.script_sha256 == script.sha256:
                    return written, []
            return self._render(script), []
        except ScriptError as error:
            message = str(error.args[0]).removeprefix(f"{script.name}:{error.line}: ").removeprefix(f"{script.name}: ")
            return None, [replace(NotRendered.violation(message), path=script.name, line=error.line or 1)]
        except PlanError as error:
            return None, [replace(NotRendered.violation(str(error)), path=script.name, line=1)]

    def _render(self, script: Script) -> Plan:
        from shardmig.rendering import Renderer  # noqa: PLC0415 - Alembic is loaded only when something is rendered

        if self._renderer is None:
            self._renderer = Renderer(self.scripts, before_import=self._refuse)
        assert isinstance(self._renderer, Renderer)  # noqa: S101 - set above
        return self._renderer.render(script)

    def _refuse(self, script: Script) -> None:
        """Keep an earlier script that did not pass layer one from being executed for a later one's sake."""
        if any(v.fails for v in lint_script(script.source, path=script.name, settings=self.settings)):
            raise ScriptError("it is not executed, for it breaks rules of its own", path=script.name)


def _unreadable(path: Path, settings: Lint) -> list[Violation]:
    """Return why a file is no script at all."""
    from shardmig.scripts import name_of  # noqa: PLC0415 - the statement-level linter needs no scripts

    name = name_of(path)
    try:
        source = path.read_bytes().replace(b"\r\n", b"\n").decode()
    except UnicodeDecodeError as error:
        violation = NotRendered.violation(f"byte {error.start} is not UTF-8; save the script as UTF-8")
        return [replace(violation, path=name, line=1)]
    return [violation for violation in lint_script(source, path=name, settings=settings) if violation.code == "SP001"]


# --------------------------------------------------------------------------------------------------------------------
# Allow comments


def _with_allowances(script: Script, found: list[Violation], of_plan: Iterable[Violation]) -> list[Violation]:
    """Put a plan's findings into their script, and mark those that a comment on their call allows."""
    comments = [comment for comment in allowances(script.source) if comment.code and comment.reason]
    calls = Calls(script.source)
    used: set[Allowance] = set()
    for bare in of_plan:
        violation = replace(bare, path=script.name)
        for comment in comments:
            if not violation.ignorable or comment.code != violation.code:
                continue
            if calls.meant(comment, violation.line or 0, violation.sql):
                used.add(comment)
                violation = replace(violation, allowed=comment.reason)
        found.append(violation)
    for comment in comments:
        rule = BY_CODE.get(comment.code)
        if comment not in used and rule is not None and (rule.ignorable or rule.warning):
            unused = UnusedAllow.violation(
                f"{comment.code} is allowed here, but nothing breaks it; take the comment out"
            )
            found.append(replace(unused, path=script.name, line=comment.line))
    return sorted(found, key=lambda violation: violation.line or 0)
