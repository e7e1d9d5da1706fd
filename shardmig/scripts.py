"""
Migration scripts: Alembic's revisions, read without running them, in the order of their history.

A script is read as text first and parsed; only `rendering` executes it, after the linter has seen it. The history is
linear, and `HEAD` names its newest revision, so that two branches which both add one conflict in git.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
import unicodedata
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shardmig import planfile
from shardmig.errors import PlanError, ScriptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["Script", "load_scripts", "read_script", "rebase", "revision"]

_HEAD = "HEAD"
_VARIABLES = frozenset(
    {
        "revision",
        "down_revision",
        "flag",
        "needs",
        "protocol",
        "relax",
        "amends",
        "online",
        "depends_on",
        "branch_labels",
    }
)
_SLUG_LENGTH = 40
_FLAG = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}\Z")
_REVISION = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
_ALLOW = re.compile(r"#\s*shardmig:\s*allow\s+(?P<codes>[A-Z]{2}\d+(?:\s*,\s*[A-Z]{2}\d+)*)\s+--\s+(?P<reason>\S.*)")

_TEMPLATE = '''\
"""{message}"""

{imports}

revision, down_revision = "{revision}", {parent}
{flag}

def upgrade() -> None:
{upgrade}
'''
_NOTHING_YET = """\
    # Additions only: op.create_table(...), op.add_column("customer", sa.Column("first_name", sa.Text)),
    # op.create_index("customer_email", "customer", ["email"], postgresql_concurrently=True)
    # Rows are moved by a function move() with move_rows() of shardmig.operations.
    pass"""


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
        online: False when the shard must be in maintenance.
        allowed: findings that its comments allow, as "CODE reason", in their order.
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
    allowed: tuple[str, ...]

    @property
    def name(self) -> str:
        """How messages call it: the path from the migrations directory's parent."""
        return _name(self.path)

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
    paths = _paths(directory)
    if start_after:
        paths = _paths_after(paths, start_after, directory)
    scripts = _linear([read_script(path) for path in paths], directory, start_after)
    if scripts or not start_after:
        _check_head(directory, scripts)
    return scripts


def _paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.py") if not path.name.startswith(("_", ".")))


def _paths_after(paths: list[Path], start_after: str, directory: Path) -> list[Path]:
    """Leave out the scripts of an adopted history: `start_after` and all its ancestors."""
    parents = {path: _lineage(path) for path in paths}
    known = {revision: path for path, (revision, _) in parents.items() if revision}
    if start_after not in known:
        raise ScriptError(f"[lint] start_after names {start_after}, which no script in {directory.name}/ is")
    adopted, queue = set(), [start_after]
    while queue:
        path = known.get(queue.pop())
        if path is not None and path not in adopted:
            adopted.add(path)
            queue += parents[path][1]
    return [path for path in paths if path not in adopted]


def _lineage(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Read a script's revision and what it follows, whatever else is in it; (None, ()) when that cannot be read."""
    try:
        assigned = dict(_assigned(ast.parse(path.read_bytes())))
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
    heads = _heads(scripts)
    if len(heads) > 1:
        names = " and ".join(script.revision for script in heads)
        raise ScriptError(
            f"{directory.name}/ has {len(heads)} heads, {names}: two branches each added a revision. "
            f"Run `shardmig revision --rebase` to put one behind the other"
        )
    ordered = _ancestry(heads[0], known) if heads else []
    if len(ordered) < len(scripts):
        lost = next(script for script in scripts if script not in ordered)
        raise ScriptError("down_revision leads in a circle; name the revision before this one", path=lost.name)
    return tuple(ordered)


def _heads(scripts: Iterable[Script]) -> list[Script]:
    """Return the scripts that no other one follows."""
    scripts = list(scripts)
    followed = {script.parent for script in scripts}
    return [script for script in scripts if script.revision not in followed]


def _ancestry(head: Script, known: dict[str, Script]) -> list[Script]:
    """Return a script and all before it, oldest first."""
    line = [head]
    while line[-1].parent in known and known[line[-1].parent] not in line:
        line.append(known[line[-1].parent])
    return line[::-1]


def _check_head(directory: Path, scripts: tuple[Script, ...]) -> None:
    """Compare `HEAD` with the newest script: a merge that took one file without the other shows here."""
    path = directory / _HEAD
    newest = scripts[-1].revision if scripts else None
    named = path.read_text(encoding="utf-8").strip() if path.exists() else None
    if named == newest or (newest is None and not named):
        return
    if named and "<<<<<<<" in named:
        raise ScriptError(
            f"{_name(path)} holds a merge conflict: keep the revision that others have already, then run "
            "`shardmig revision --rebase`"
        )
    cure = f"write {newest} into it" if newest else "delete it"
    raise ScriptError(f"{_name(path)} names {named or 'nothing'}, but the newest revision is {newest}; {cure}")


def _write_head(directory: Path, newest: str) -> None:
    (directory / _HEAD).write_bytes(f"{newest}\n".encode())


def _name(path: Path) -> str:
    return f"{path.absolute().parent.name}/{path.name}"


# --------------------------------------------------------------------------------------------------------------------
# One script


def read_script(path: Path) -> Script:
    """
    Read one script without executing it.

    Raises:
        ScriptError: it is not UTF-8, not Python, or one of its variables is not a plain constant.
    """
    data = path.read_bytes().replace(b"\r\n", b"\n")
    name = _name(path)
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
    facts = _Variables(name, tree)
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
        allowed=tuple(_allowed(source)),
    )


class _Variables:
    """The module's variables that mean something to shardmig, as constants."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name = name
        self.nodes: dict[str, ast.expr] = {}
        for variable, node in _assigned(tree):
            if variable in _VARIABLES:
                if variable in self.nodes:
                    raise ScriptError(f"{variable} is assigned twice; once is enough", path=name, line=node.lineno)
                self.nodes[variable] = node

    def fail(self, variable: str, reason: str) -> Any:  # noqa: ANN401 - it never returns; callers stay expressions
        raise ScriptError(reason, path=self.name, line=self.nodes[variable].lineno)

    def value(self, variable: str) -> object:
        node = self.nodes.get(variable)
        if node is None:
            return None
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            self.fail(variable, f"{variable} must be a plain constant: it is read without running the script")
            return None

    def text(self, variable: str, default: str | None) -> str | None:
        value = self.value(variable)
        if value is None:
            return default
        if isinstance(value, tuple) and variable == "down_revision":
            self.fail(variable, "the history is linear: down_revision names one revision, or None")
        if not isinstance(value, str):
            self.fail(variable, f'{variable} is a string, as in {variable} = "0001_shop"')
        return str(value)

    def texts(self, variable: str) -> tuple[str, ...]:
        value = self.value(variable)
        if value is None:
            return ()
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) and item for item in value):
            self.fail(variable, f'{variable} is a tuple of strings, as in {variable} = ("other",)')
        return tuple(str(item) for item in value)  # type: ignore[attr-defined]

    def boolean(self, variable: str, *, default: bool) -> bool:
        value = self.value(variable)
        if value is not None and not isinstance(value, bool):
            self.fail(variable, f"{variable} is True or False")
        return default if value is None else bool(value)

    def protocol(self) -> Literal["auto", "dual"]:
        value = self.text("protocol", "auto")
        if value not in ("auto", "dual"):
            self.fail("protocol", 'protocol is "auto" or "dual"')
        return "dual" if value == "dual" else "auto"

    def flag(self, number: str) -> str:
        """Name the flag: what the script says, or the revision's id without its leading number."""
        flag = self.text("flag", None) or re.sub(r"\A[0-9]+_(?=[A-Za-z])", "", number)
        if "flag" in self.nodes and not _FLAG.match(flag):
            self.fail("flag", f"flag {flag!r} is not a name; letters, digits and _ make one, at most 63")
        return flag


def _assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Yield the module's names and what they are assigned: `a = x`, `a: str = x`, `a, b = x, y`."""
    for node in tree.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from _unpacked(target, value)


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    match target, value:
        case ast.Name(id=name), _:
            yield name, value
        case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
            for name_node, value_node in zip(names, values, strict=True):
                yield from _unpacked(name_node, value_node)
        case ast.Tuple(elts=names), _:
            for name_node in names:
                yield from _unpacked(name_node, value)


def _allowed(source: str) -> Iterator[str]:
    """Yield what comments of the form `# shardmig: allow SM120 -- reason` allow."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = _ALLOW.match(token.string) if token.type == tokenize.COMMENT else None
        for code in re.split(r"\s*,\s*", match["codes"]) if match else ():
            yield f"{code} {match['reason'].strip()}" if match else code


# --------------------------------------------------------------------------------------------------------------------
# New scripts


def revision(
    directory: Path,
    message: str,
    *,
    upgrade: str | None = None,
    rest: str = "",
    imports: Sequence[str] = ("import sqlalchemy as sa", "from alembic import op"),
    start_after: str = "",
) -> Path:
    """
    Write a new script behind the newest one, and name it in `HEAD`.

    Args:
        directory: the migrations directory; made if it is not there.
        message: what the migration does; its words make the revision's id.
        upgrade: body of upgrade(), indented; a comment and `pass` if None.
        rest: what follows upgrade(), for instance a function move().
        imports: lines that import what it needs.
        start_after: as for `load_scripts`.

    Returns:
        The script's path.

    Raises:
        ScriptError: the message has no letters, or the history is not in order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    scripts = load_scripts(directory, start_after=start_after)
    parent = scripts[-1].revision if scripts else start_after
    name = f"{_next_number(scripts):04d}_{_slug(message)}"
    flag_is_taken = any(script.flag == _slug(message) for script in scripts)
    text = _TEMPLATE.format(
        message=" ".join(message.split()).replace("\\", "\\\\").replace('"', '\\"'),
        revision=name,
        parent=f'"{parent}"' if parent else "None",
        imports="\n".join(imports),
        flag=f'flag = "{_slug(message)}_{_next_number(scripts)}"\n' if flag_is_taken else "",
        upgrade=upgrade or _NOTHING_YET,
    )
    path = directory / f"{name}.py"
    path.write_bytes((text + (f"\n\n{rest.strip()}\n" if rest else "")).encode())
    _write_head(directory, name)
    return path


def _next_number(scripts: tuple[Script, ...]) -> int:
    numbers = [match[0] for script in scripts if (match := re.match(r"[0-9]{1,6}(?=_)", script.revision))]
    return max(map(int, numbers), default=0) + 1


def _slug(message: str) -> str:
    """Turn a message into the readable half of an id: at most 40 characters, whole words."""
    plain = unicodedata.normalize("NFKD", message.casefold()).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", plain.replace("'s ", " "))
    slug = ""
    for word in words:
        if slug and len(slug) + 1 + len(word) > _SLUG_LENGTH:
            break
        slug = f"{slug}_{word}".strip("_")[:_SLUG_LENGTH]
    if not re.search(r"[a-z]", slug):
        raise ScriptError(f"the message {message!r} makes no name; say in a few words what the migration does")
    return slug if slug[0].isalpha() else f"r_{slug}"


def rebase(directory: Path, *, start_after: str = "") -> list[Path]:
    """
    Put one of two branches behind the other: the one that `HEAD` does not name is given the other as parent.

    Only `down_revision` is edited, and the header of the plan file; a plan's hash does not cover its parent, so shards
    that have it already notice nothing.

    Returns:
        The files written.

    Raises:
        ScriptError: there is only one head, or `HEAD` does not name one of them.
    """
    paths = _paths_after(_paths(directory), start_after, directory) if start_after else _paths(directory)
    scripts = [read_script(path) for path in paths]
    known = {script.revision: script for script in scripts}
    heads = _heads(scripts)
    if len(heads) < 2:  # noqa: PLR2004 - a branch has two ends
        raise ScriptError(f"{directory.name}/ has one head; there is nothing to rebase")
    head_file = directory / _HEAD
    named = head_file.read_text(encoding="utf-8").strip() if head_file.exists() else ""
    kept = known.get(named)
    if kept not in heads or kept is None:
        raise ScriptError(
            f"write into {_name(head_file)} which revision others have already, "
            f"{' or '.join(script.revision for script in heads)}; the other one is put behind it"
        )
    written: list[Path] = []
    newest = kept
    for head in heads:
        if head is kept:
            continue
        base = {script.revision for script in _ancestry(kept, known)}
        first = next(script for script in _ancestry(head, known) if script.revision not in base)
        written += _reparent(first, newest.revision)
        newest = head
    _write_head(directory, newest.revision)
    return [*written, head_file]


def _reparent(script: Script, parent: str) -> list[Path]:
    """Edit `down_revision` in a script, and in its plan file if that is in date."""
    node = _Variables(script.name, ast.parse(script.source)).nodes["down_revision"]
    lines = script.source.encode().split(b"\n")
    line = lines[node.lineno - 1]
    if node.end_lineno != node.lineno or node.end_col_offset is None:
        raise ScriptError("write down_revision on one line", path=script.name, line=node.lineno)
    lines[node.lineno - 1] = line[: node.col_offset] + f'"{parent}"'.encode() + line[node.end_col_offset :]
    script.path.write_bytes(b"\n".join(lines))
    edited = read_script(script.path)
    if not script.plan_path.exists():
        return [script.path]
    try:
        plan = planfile.read(script.plan_path)
    except PlanError:
        return [script.path]  # `shardmig plan` will say so
    if plan.script_sha256 != script.sha256:
        return [script.path]
    planfile.write(plan.model_copy(update={"parent": parent, "script_sha256": edited.sha256}), script.plan_path)
    return [script.path, script.plan_path]
