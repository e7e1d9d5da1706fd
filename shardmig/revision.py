"""New revisions: a script behind the newest one, and one of two branches put behind the other."""

from __future__ import annotations

import ast
import re
import unicodedata
from typing import TYPE_CHECKING

from shardmig import planfile
from shardmig.errors import PlanError, ScriptError
from shardmig.scripts import HEAD, Script, ancestry, heads_of, load_scripts, name_of, paths_after, paths_of, read_script
from shardmig.variables import Variables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["rebase", "revision"]

_SLUG_LENGTH = 40
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
    paths = paths_after(paths_of(directory), start_after, directory) if start_after else paths_of(directory)
    scripts = [read_script(path) for path in paths]
    known = {script.revision: script for script in scripts}
    heads = heads_of(scripts)
    if len(heads) < 2:  # noqa: PLR2004 - a branch has two ends
        raise ScriptError(f"{directory.name}/ has one head; there is nothing to rebase")
    head_file = directory / HEAD
    named = head_file.read_text(encoding="utf-8").strip() if head_file.exists() else ""
    kept = known.get(named)
    if kept not in heads or kept is None:
        raise ScriptError(
            f"write into {name_of(head_file)} which revision others have already, "
            f"{' or '.join(script.revision for script in heads)}; the other one is put behind it"
        )
    written: list[Path] = []
    newest = kept
    for head in heads:
        if head is kept:
            continue
        base = {script.revision for script in ancestry(kept, known)}
        first = next(script for script in ancestry(head, known) if script.revision not in base)
        written += _reparent(first, newest.revision)
        newest = head
    _write_head(directory, newest.revision)
    return [*written, head_file]


def _reparent(script: Script, parent: str) -> list[Path]:
    """Edit `down_revision` in a script, and in its plan file if that is in date."""
    node = Variables(script.name, ast.parse(script.source)).nodes["down_revision"]
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


def _write_head(directory: Path, newest: str) -> None:
    (directory / HEAD).write_bytes(f"{newest}\n".encode())
