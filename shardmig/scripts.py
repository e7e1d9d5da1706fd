"""
Migration scripts: Alembic's revisions, read without running them, in the order of their history.

A script is read as text first and parsed; only `rendering` executes it, after the linter has seen it. The history is
linear, and `HEAD` names its newest revision, so that two branches which both add one conflict in git.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardmig import planfile
from shardmig.errors import ScriptError
from shardmig.variables import Variables, assignments

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "HEAD",
    "Script",
    "ancestry",
    "heads_of",
    "load_scripts",
    "name_of",
    "newest_of",
    "paths_after",
    "paths_of",
    "read_script",
]

HEAD = "HEAD"
_REVISION = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")


@dataclass(frozen=True, slots=True)
class Script:
    """
    A migration script, not executed.

    Attributes:
        path: the file.
        source: its text, lines ending in line feeds.
        sha256: hash of its bytes, lines ending in line feeds.
        revision: its id.
        parent: the revision before it (Alembic's `down_revision`); None for the first.
        message: first line of its docstring.
        flag: name of the migration's flag; the id without its number unless the script says.
        needs: flags that must be LIVE before this one leaves OLD.
        protocol: "dual" walks the flag through DUAL although nothing is moved.
        relax: old columns whose NOT NULL ends with LIVE → DONE, as written ("column" or "table.column").
        amends: hashes of this revision's earlier plans that this one may replace where they are not finished.
        online: False when the shard must be offline.
    """

    path: Path
    source: str
    sha256: str
    revision: str
    parent: str | None
    message: str
    flag: str
    needs: tuple[str, ...]
    protocol: Literal["auto", "dual"]
    relax: tuple[str, ...]
    amends: tuple[str, ...]
    online: bool

    @property
    def name(self) -> str:
        """How messages call it: the path from where people are."""
        return name_of(self.path)

    @property
    def plan_path(self) -> Path:
        """Where its plan file lives."""
        return planfile.plan_path(self.path)


# --------------------------------------------------------------------------------------------------------------------
# The history


def load_scripts(directory: Path, *, start_after: str = "") -> tuple[Script, ...]:
    """
    Read the scripts of a migrations directory, oldest first; none of them is executed.

    Args:
        directory: the migrations directory.
        start_after: revision up to which history was plain Alembic's; it and all before it are left out, unjudged,
            branches and merges included.

    Raises:
        ScriptError: a script cannot be read, the history is not linear, or `HEAD` names something else.
    """
    if not directory.is_dir():
        raise ScriptError(f"there is no migrations directory {directory}; `shardmig init` makes one")
    paths = paths_of(directory)
    if start_after:
        paths = paths_after(paths, start_after, directory)
    else:
        _refuse_unadopted(directory, paths)
    scripts = _linear([read_script(path) for path in paths], directory, start_after)
    if scripts or not start_after:
        _check_head(directory, scripts)
    return scripts


def paths_of(directory: Path) -> list[Path]:
    """Return the files that are scripts, by name."""
    return sorted(path for path in directory.glob("*.py") if not path.name.startswith(("_", ".")))


def paths_after(paths: list[Path], start_after: str, directory: Path) -> list[Path]:
    """Leave out the scripts of an adopted history: `start_after` and all its ancestors."""
    parents = {path: _lineage(path) for path in paths}
    known = {revision: path for path, (revision, _) in parents.items() if revision}
    if start_after not in known:
        newest = " and ".join(newest_of(directory)) or "no revision at all"
        raise ScriptError(
            f"[lint] start_after names {start_after}, which no script in {name_of(directory)}/ is; the newest there is "
            f"{newest}"
        )
    adopted, queue = set(), [start_after]
    while queue:
        path = known.get(queue.pop())
        if path is not None and path not in adopted:
            adopted.add(path)
            queue += parents[path][1]
    return [path for path in paths if path not in adopted]


def newest_of(directory: Path) -> list[str]:
    """Return the revisions that no other one follows, whatever else is in their scripts: Alembic's may branch."""
    lineages = [_lineage(path) for path in paths_of(directory)]
    followed = {parent for _, parents in lineages for parent in parents}
    return sorted(revision for revision, _ in lineages if revision and revision not in followed)


def _refuse_unadopted(directory: Path, paths: list[Path]) -> None:
    """Say to adopt first where an env.py shows that Alembic made these scripts, and no HEAD that shardmig did."""
    here, versions = name_of(directory), name_of(directory / "versions")
    if (directory / "env.py").exists():
        raise ScriptError(
            f'{here}/ is Alembic\'s own directory, its scripts lie in {versions}/: say migrations = "{versions}" in '
            "shardmig.toml"
        )
    if (directory.parent / "env.py").exists() and paths and not (directory / HEAD).exists():
        newest = newest_of(directory)
        revision = newest[0] if len(newest) == 1 else "REVISION"
        raise ScriptError(
            f"the scripts in {here}/ are plain Alembic's, and shardmig did not adopt them: bring every shard to one "
            f'revision, say [lint] start_after = "{revision}" in shardmig.toml, then `shardmig adopt --all`'
        )


def _lineage(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Read a script's revision and what it follows, whatever else is in it; (None, ()) when that cannot be read."""
    try:
        assigned = dict(assignments(ast.parse(path.read_bytes())))
        revision, parents = (
            ast.literal_eval(assigned[name]) if name in assigned else None for name in ("revision", "down_revision")
        )
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None, ()
    return revision, (parents,) if isinstance(parents, str) else tuple(parents or ())


def _linear(scripts: list[Script], directory: Path, start_after: str = "") -> tuple[Script, ...]:
    """Order scripts by their parents; refuse anything but one line from the first to the newest."""
    known: dict[str, Script] = {}
    for script in scripts:
        if script.revision in known:
            raise ScriptError(
                f"{known[script.revision].name} has the same revision id, {script.revision}; give one another id",
                path=script.name,
            )
        known[script.revision] = script
    for script in scripts:
        if script.parent not in {None, start_after or None} and script.parent not in known:
            raise ScriptError(
                f"down_revision {script.parent} is no revision in {directory.name}/; restore its script, or name the "
                "revision before this one",
                path=script.name,
            )
    heads = heads_of(scripts)
    if len(heads) > 1:
        names = " and ".join(script.revision for script in heads)
        raise ScriptError(
            f"{directory.name}/ has {len(heads)} heads, {names}: two branches each added a revision. "
            f"Run `shardmig revision --rebase` to put one behind the other"
        )
    ordered = ancestry(heads[0], known) if heads else []
    if len(ordered) < len(scripts):
        lost = next(script for script in scripts if script not in ordered)
        raise ScriptError("down_revision leads in a circle; name the revision before this one", path=lost.name)
    return tuple(ordered)


def heads_of(scripts: Iterable[Script]) -> list[Script]:
    """Return the scripts that no other one follows."""
    scripts = list(scripts)
    followed = {script.parent for script in scripts}
    return [script for script in scripts if script.revision not in followed]


def ancestry(head: Script, known: dict[str, Script]) -> list[Script]:
    """Return a script and all before it, oldest first."""
    line = [head]
    while line[-1].parent in known and known[line[-1].parent] not in line:
        line.append(known[line[-1].parent])
    return line[::-1]


def _check_head(directory: Path, scripts: tuple[Script, ...]) -> None:
    """Compare `HEAD` with the newest script: a merge that took one file without the other shows here."""
    path = directory / HEAD
    newest = scripts[-1].revision if scripts else None
    named = path.read_text(encoding="utf-8").strip() if path.exists() else None
    if named == newest or (newest is None and not named):
        return
    if named and "<<<<<<<" in named:
        raise ScriptError(
            f"{name_of(path)} holds a merge conflict: keep the revision that others have already, then run "
            "`shardmig revision --rebase`"
        )
    cure = f"write {newest} into it" if newest else "delete it"
    raise ScriptError(f"{name_of(path)} names {named or 'nothing'}, but the newest revision is {newest}; {cure}")


def name_of(path: Path) -> str:
    """Say how messages call a file: by its path from the working directory; elsewhere by its directory and its name."""
    absolute, here = path.absolute(), Path.cwd()
    if absolute.is_relative_to(here):
        return absolute.relative_to(here).as_posix()
    return f"{absolute.parent.name}/{path.name}"


# --------------------------------------------------------------------------------------------------------------------
# One script


def read_script(path: Path) -> Script:
    """
    Read one script without executing it.

    Raises:
        ScriptError: it is not UTF-8, not Python, or one of its variables is not a plain constant.
    """
    data = path.read_bytes().replace(b"\r\n", b"\n")
    name = name_of(path)
    try:
        source = data.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in a string is the script's own matter
            tree = ast.parse(source, filename=str(path))
    except UnicodeDecodeError as error:
        raise ScriptError(f"byte {error.start} is not UTF-8; save the script as UTF-8", path=name) from None
    except (SyntaxError, ValueError) as error:  # ValueError: NUL bytes
        line = error.lineno if isinstance(error, SyntaxError) else None
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ScriptError(f"this is not Python: {reason}", path=name, line=line) from None
    facts = Variables(name, tree)
    number = facts.text("revision", None)
    if number is None or not _REVISION.match(number):
        raise ScriptError('say revision = "0001_shop": letters, digits, "_", "-" and "." name a revision', path=name)
    for unused in ("depends_on", "branch_labels"):
        if facts.value(unused):
            facts.fail(unused, "the history is linear, without branches; needs = (...) names flags to wait for")
    return Script(
        path=path,
        source=source,
        sha256=hashlib.sha256(data).hexdigest(),
        revision=number,
        parent=facts.text("down_revision", None),
        message=(ast.get_docstring(tree) or "").partition("\n")[0].strip(),
        flag=facts.flag(number),
        needs=facts.texts("needs"),
        protocol=facts.protocol(),
        relax=facts.texts("relax"),
        amends=facts.texts("amends"),
        online=facts.boolean("online", default=True),
    )
