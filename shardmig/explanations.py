"""What no addition closes, in words: what differs, what it would break, and how the additive way goes."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from shardmig.drafting import Explained

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shardmig.scripts import Script

__all__ = [
    "changed_default",
    "changed_index",
    "changed_labels",
    "changed_nullable",
    "changed_type",
    "comment_block",
    "explained_in",
    "gone",
    "gone_column",
    "gone_table",
    "lost_default",
    "lost_key",
    "lost_not_null",
    "new_constraint",
    "other",
    "plain_instead",
]

_TITLE = re.compile(r"^# [0-9]+\. (?P<title>.+)$", re.MULTILINE)
_WIDTH = 116
_HEAD = (
    "The models also say what cannot be given to a shard while it is used. Nothing of it is lost: each point says how "
    "the additive way goes. `shardmig check` takes the numbered lines of committed scripts as read."
)


def explained_in(scripts: Iterable[Script]) -> frozenset[str]:
    """Return the titles of the differences that scripts explain already."""
    return frozenset(match["title"].strip() for script in scripts for match in _TITLE.finditer(script.source))


def comment_block(explained: Sequence[Explained]) -> str:
    """Write differences as a numbered block of comments."""
    if not explained:
        return ""
    lines = [*_wrapped(_HEAD, "# ")]
    for number, one in enumerate(explained, 1):
        lines += ["#", f"# {number}. {one.title}", *_wrapped(one.why, "#    ")]
        if one.stub:
            lines += ["#", *(f"#        {line}".rstrip() for line in one.stub)]
    return "\n".join(lines)


def _wrapped(text: str, prefix: str) -> list[str]:
    return [prefix + line for line in textwrap.wrap(text, _WIDTH - len(prefix), break_long_words=False)]


def _move(table: str, arguments: Sequence[str]) -> tuple[str, ...]:
    return (
        "from shardmig.operations import move_rows",
        "",
        "def move() -> None:",
        f'    move_rows("{table}", {", ".join(arguments)})',
    )


# --------------------------------------------------------------------------------------------------------------------
# What is gone from the models


def gone_table(table: str, successor: tuple[str, tuple[str, ...], tuple[str, ...]] | None) -> Explained:
    """
    Explain a table that the models do not have.

    Args:
        table: its name.
        successor: a new table that looks like it, its key, and the columns they share beside the key.
    """
    why = "It stays: the releases that run still read and write it. Dropping it is a decision of its own, much later."
    if successor is None:
        return Explained(f"table {table} is gone from the models", why)
    new, key, columns = successor
    pairs = ", ".join(f'"{column}": "{column}"' for column in columns)
    keys = ", ".join(f'"{column}": "{column}"' for column in key)
    arguments = [f'into="{new}"', f"target_key={{{keys}}}", f"forward={{{pairs}}}", f"back={{{pairs}}}"]
    return Explained(
        f"table {table} is gone from the models",
        f"{why} If {new} takes its place, rows are moved and the flag says which of the two counts; until it is DONE "
        "the application writes both:",
        _move(table, arguments),
    )


def gone_column(table: str, column: str, *, mandatory: bool, successor: tuple[str, str, str] | None) -> Explained:
    """
    Explain a column that the models do not have.

    Args:
        table: its table.
        column: its name.
        mandatory: whether INSERTs have to name it.
        successor: a new column that may take its place, and the expressions forward and back.
    """
    why = "It stays on the shards: the releases that run still read and write it."
    if mandatory:
        why += (
            f" It is NOT NULL without a default, so INSERTs of a release that does not know it fail: write it as long "
            f'as a shard is not DONE, and say relax = ("{table}.{column}",) in the script that replaces it.'
        )
    stub: tuple[str, ...] = ()
    if successor is not None:
        new, forward, back = successor
        why += f" If {new} takes its place, its rows are moved, and the flag says which of the two counts:"
        stub = _move(table, [f'forward={{"{new}": "{forward}"}}', f'back={{"{column}": "{back}"}}'])
    return Explained(f"column {table}.{column} is gone from the models", why, stub)


def gone(kind: str, name: str) -> Explained:
    """Explain an index, a constraint or a comment that the models do not have."""
    harm = {"index": "running queries are planned with it", "comment": "it harms nobody"}.get(
        kind, "older releases rely on it, and writes of newer ones keep to it until it is taken away by hand"
    )
    return Explained(f"{kind} {name} is gone from the models", f"It stays: {harm}.")


# --------------------------------------------------------------------------------------------------------------------
# What the models say otherwise


def changed_type(table: str, column: str, new: str, old: str) -> Explained:
    """Explain another type."""
    fresh = f"{column}_new"
    return Explained(
        f"column {table}.{column} is {new} in the models, {old} on the shards",
        "A change of type rewrites the table while everybody waits, and the running releases meet values they do not "
        f'expect. Add a column beside it, op.add_column("{table}", sa.Column("{fresh}", ...)), map the attribute to '
        f'it, {column} = mapped_column("{fresh}", ...), and move the rows:',
        _move(table, [f'forward={{"{fresh}": "{column}::{new}"}}', f'back={{"{column}": "{fresh}::{old}"}}']),
    )


def changed_labels(kind: str, new: Sequence[str], old: Sequence[str]) -> Explained:
    """Explain an enum with other labels."""
    return Explained(
        f"type {kind} has the labels {', '.join(new)} in the models, {', '.join(old)} on the shards",
        "An enum never changes: code of today may read a label that it does not know. Give the type another name, and "
        "a column of that type beside the old one, with a move; or use text, with the labels checked by the "
        "application.",
    )


def changed_nullable(table: str, column: str, *, nullable: bool) -> Explained:
    """Explain NOT NULL that came or went."""
    if nullable:
        return Explained(
            f"column {table}.{column} may be NULL in the models, not on the shards",
            "Running releases do not expect a NULL there, so NOT NULL stays. Leave it NOT NULL in the models; or add a "
            f'nullable column beside it and move the rows (relax = ("{table}.{column}",) then lets the old one go '
            "without a value once the flag is DONE).",
        )
    return Explained(
        f"column {table}.{column} is NOT NULL in the models, not on the shards",
        "SET NOT NULL scans the table under a strong lock, and INSERTs of older releases that store NULL fail. The "
        "application keeps the rule; or add a NOT NULL column with a server default beside it, and move the rows.",
    )


def lost_not_null(table: str, column: str) -> Explained:
    """Explain NOT NULL that a new column cannot have."""
    return Explained(
        f"column {table}.{column} is NOT NULL in the models, not on the shards",
        "It is added nullable: INSERTs of older releases do not name it, and would fail. Give it a constant "
        "server_default to have it NOT NULL; or let the application keep the rule, and fill the rows that are there "
        "in move().",
    )


def lost_default(table: str, column: str, default: str) -> Explained:
    """Explain a default that a new column cannot have."""
    return Explained(
        default_title(table, column, default, None),
        f"A default that is not the same for every row would rewrite {table} while everybody waits, so {column} is "
        "added without one. The application gives new rows their value (default= instead of server_default=); rows "
        "that are there get one in move().",
    )


def changed_default(table: str, column: str, new: str | None, old: str | None) -> Explained:
    """Explain another default."""
    return Explained(
        default_title(table, column, new, old),
        "Another default changes what INSERTs of running releases store. Let the application give the value "
        "(default=), and let server_default= in the models say what the shards have.",
    )


def default_title(table: str, column: str, new: str | None, old: str | None) -> str:
    """Name a default that differs."""
    return f"the default of {table}.{column} is {_plain(new) or 'none'} in the models, {_plain(old) or 'none'} there"


def plain_instead(table: str, column: str, what: str, expression: str | None = None) -> Explained:
    """Explain a generated or identity column that is added, or stays, a plain one."""
    if expression is not None:
        move = _move(table, [f'forward={{"{column}": {_python(expression)}}}'])
        harm = "rewrites the table, and INSERTs of today fail where its expression does"
        return Explained(
            f"column {table}.{column} is {what} in the models, plain there",
            f"Adding a generated column {harm}. It is a plain one, which the application writes; rows that are there "
            "are filled by a move:",
            move,
        )
    return Explained(
        f"column {table}.{column} is {what} in the models, plain there",
        "Numbering every row rewrites the table while everybody waits. It is a plain column: take its numbers from a "
        "sequence of its own (CREATE SEQUENCE is additive), and number the rows that are there in a move.",
    )


def changed_index(name: str) -> Explained:
    """Explain an index whose definition differs."""
    return Explained(
        f"index {name} is defined otherwise in the models",
        "An index of that name is there, and running queries are planned with it. Give the new one another name: it is "
        "built beside the old one, concurrently.",
    )


def new_constraint(kind: str, name: str, table: str) -> Explained:
    """Explain a constraint on a table that exists."""
    return Explained(
        f"{kind} {name} is only in the models",
        f"On a table that is in use it would refuse what running releases write, and lock or scan {table}. The "
        "application keeps the rule; or a new table has it from the beginning, and the rows are moved there.",
    )


def lost_key(table: str, columns: str, target: str, why: str) -> Explained:
    """Explain a foreign key that a new table is created without."""
    return Explained(f"foreign key {table} ({columns}) to {target} is only in the models", why)


def other(title: str, why: str) -> Explained:
    """Explain anything else."""
    return Explained(title, why)


def _plain(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())


def _python(text: str) -> str:
    plain = " ".join(text.split())
    return repr(plain) if '"' in plain else f'"{plain}"'
