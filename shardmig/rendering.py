"""
Script → plan: a script is executed once, with a recorder in the place of a database.

This is the only place that runs scripts. What runs is the text that was read, hashed and linted, so nothing can change
in between.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from traceback import walk_tb
from types import FunctionType
from typing import TYPE_CHECKING

from shardmig.allowances import Calls, allowances
from shardmig.errors import ScriptError, ShardmigError
from shardmig.operations import collecting, move_rows
from shardmig.plan import Move, Plan, Statement, Switch
from shardmig.recorder import Recorder
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from shardmig.operations import MoveRows
    from shardmig.plan import Step
    from shardmig.recorder import Enum, Recorded
    from shardmig.scripts import Script
    from shardmig.seeds import SeedRows
    from shardmig.tables import Table

__all__ = ["Renderer", "render"]

_IN_MOVE = "structure belongs into upgrade(), and rows are moved by move_rows(); move() calls nothing else"
_IN_UPGRADE = "move_rows() belongs into the function move(); upgrade() describes structure"


def render(
    script: Script,
    *,
    earlier: Sequence[Script] = (),
    before_import: Callable[[Script], None] | None = None,
) -> Plan:
    """
    Render one script.

    Args:
        script: the script.
        earlier: the scripts before it, oldest first; executed only if this one moves rows or names types.
        before_import: called with each script before it is executed; raises to refuse it (the linter).

    Raises:
        ScriptError: the script describes something that is no addition or move, naming its line.
    """
    return Renderer([*earlier, script], before_import=before_import).render(script)


@dataclass(frozen=True, slots=True)
class _Recording:
    """What one script asked for."""

    statements: tuple[Recorded, ...]
    moves: tuple[tuple[MoveRows | SeedRows, int | None], ...]
    tables: Mapping[str, Table]


class Renderer:
    """
    Renders scripts of one history; each is executed at most once.

    Args:
        scripts: the history, oldest first.
        before_import: called with each script before it is executed; raises to refuse it.
    """

    def __init__(self, scripts: Sequence[Script], *, before_import: Callable[[Script], None] | None = None) -> None:
        self._scripts = tuple(scripts)
        self._before_import = before_import
        self._recordings: dict[str, _Recording] = {}

    def render(self, script: Script) -> Plan:
        """
        Render one script of the history.

        Raises:
            ScriptError: the script describes something that is no addition or move, naming its line.
        """
        recording = self._recording(script)
        statements = _merged(self._without_known_types(script, recording), recording.tables)
        moves = self._moves(script, recording)
        dual = moves or script.protocol == "dual"
        steps: list[Step] = [*statements, *([Switch(to=State.DUAL)] if dual else []), *moves, Switch(to=State.LIVE)]
        return Plan(
            revision=script.revision,
            parent=script.parent,
            flag=script.flag,
            script_sha256=script.sha256,
            message=script.message,
            protocol=script.protocol,
            needs=script.needs,
            relax=tuple(_relaxed(script, column, moves) for column in script.relax),
            amends=script.amends,
            online=script.online,
            allowed=tuple(_allowed(script.source, steps)),
            steps=tuple(steps),
        )

    def _recording(self, script: Script) -> _Recording:
        if script.revision not in self._recordings:
            if self._before_import:
                self._before_import(script)
            self._recordings[script.revision] = _record(script)
        return self._recordings[script.revision]

    def _before(self, script: Script) -> Iterator[_Recording]:
        for earlier in self._scripts[: self._scripts.index(script)]:
            yield self._recording(earlier)

    def _moves(self, script: Script, recording: _Recording) -> list[Move]:
        if not recording.moves:
            return []
        tables = _known([*self._before(script), recording])
        moves = []
        for call, line in recording.moves:
            try:
                moves.append(call.derive(tables, line=line))
            except ScriptError as error:
                raise ScriptError(str(error), path=script.name, line=line) from None
        return moves

    def _without_known_types(self, script: Script, recording: _Recording) -> list[Recorded]:
        """Leave out the CREATE TYPE of columns whose enum an earlier script created."""
        if not any(recorded.enum for recorded in recording.statements):
            return list(recording.statements)
        known: dict[str, Enum] = {
            recorded.enum.name: recorded.enum
            for earlier in self._before(script)
            for recorded in earlier.statements
            if recorded.enum
        }
        kept = []
        for recorded in recording.statements:
            enum = recorded.enum
            if enum is None or enum.name not in known:
                kept.append(recorded)
            elif enum != known[enum.name]:
                raise ScriptError(
                    f"the enum type {enum.name} exists with other labels ({', '.join(known[enum.name].labels)}), and "
                    "an enum never changes; give the type another name",
                    path=script.name,
                    line=recorded.line,
                )
            if enum:
                known.setdefault(enum.name, enum)
        return kept


def _known(recordings: Sequence[_Recording]) -> dict[str, Table]:
    """Put together what scripts say about tables, oldest first."""
    tables: dict[str, Table] = {}
    for recording in recordings:
        for name, table in recording.tables.items():
            tables[name] = table.after(tables.get(name))
    return tables


def _relaxed(script: Script, column: str, moves: Sequence[Move]) -> str:
    """Name the table of a column to relax, if the script leaves it to its one move."""
    if "." in column:
        return column
    tables = {move.table for move in moves}
    if len(tables) != 1:
        raise ScriptError(f'relax names {column} without its table; write "table.{column}"', path=script.name)
    return f"{tables.pop()}.{column}"


def _merged(recorded: Sequence[Recorded], tables: Mapping[str, Table]) -> list[Statement]:
    """
    Turn recorded calls into statements; adjacent ADD COLUMNs of one existing table become one, for one lock.

    Comments on its columns move behind the group, types for its columns before it.
    """
    statements: list[Statement] = []
    group: list[Recorded] = []
    comments: list[Recorded] = []

    def close() -> None:
        if group:
            statements.append(_added(group))
        statements.extend(_statement(comment) for comment in comments)
        group.clear()
        comments.clear()

    for call in recorded:
        same_table = bool(group) and call.table == group[0].table
        created = call.table is not None and call.table in tables and tables[call.table].created
        if call.action is not None and not created:
            if not same_table:
                close()
            group.append(call)
        elif same_table:
            comments.append(call)
        elif call.enum and group:
            statements.append(_statement(call))
        else:
            close()
            statements.append(_statement(call))
    close()
    return statements


def _added(group: Sequence[Recorded]) -> Statement:
    first = group[0]
    actions = [call.action or "" for call in group]
    if len(group) == 1:
        return _statement(first)
    prefix = first.sql[: -len(actions[0])].rstrip()
    # A comment at the end of an action must not swallow the comma.
    joined = "".join(f"{action}\n    , " if "--" in action else f"{action},\n    " for action in actions[:-1])
    return Statement(sql=f"{prefix}\n    {joined}{actions[-1]}", line=first.line)


def _statement(call: Recorded) -> Statement:
    return Statement(sql=call.sql, transactional=call.transactional, line=call.line)


# --------------------------------------------------------------------------------------------------------------------
# Running a script


def _record(script: Script) -> _Recording:
    """Execute a script with a recorder in the place of a database."""
    recorder = Recorder(str(script.path), script.name)
    moves: list[tuple[MoveRows | SeedRows, int | None]] = []

    def note(call: MoveRows | SeedRows) -> None:
        if not recorder.closed:
            recorder.refuse(_IN_UPGRADE)
        moves.append((call, recorder.line()))

    with _telling_where(script):
        upgrade, move = _functions(script)
        with recorder.installed(), collecting(note):
            _call(upgrade)
            recorder.closed = _IN_MOVE
            _call(move)
    return _Recording(tuple(recorder.statements), tuple(moves), recorder.tables)


def _functions(script: Script) -> tuple[FunctionType | None, FunctionType | None]:
    """Execute the module's text, exactly the one that was read."""
    namespace: dict[str, object] = {"__name__": f"migration {script.revision}", "__file__": str(script.path)}
    exec(compile(script.source, str(script.path), "exec"), namespace)  # noqa: S102 - it was linted
    found = [namespace.get(name) for name in ("upgrade", "move")]
    for name, value in zip(("upgrade", "move"), found, strict=True):
        if value is not None and not isinstance(value, FunctionType):
            raise ScriptError(f"{name} is no function; write def {name}() -> None:", path=script.name)
    upgrade, move = found
    if upgrade is None and move is None:
        raise ScriptError("there is neither upgrade() nor move(); write def upgrade() -> None:", path=script.name)
    return upgrade, move  # type: ignore[return-value]


def _call(function: FunctionType | None) -> None:
    result = function() if function else None
    if result is not None:
        if hasattr(result, "close"):
            result.close()  # a coroutine or generator that nobody will run
        raise ScriptError(f"{function.__name__}() must be a plain function that returns nothing" if function else None)


@contextmanager
def _telling_where(script: Script) -> Iterator[None]:
    """Turn whatever a script raises into a ScriptError that names its line."""
    try:
        yield
    except ScriptError as error:
        if error.path is not None:
            raise
        raise ScriptError(str(error), path=script.name, line=_line(error, script)) from error.__cause__
    except ShardmigError:
        raise
    except (Exception, SystemExit) as error:
        raise ScriptError(_explained(error), path=script.name, line=_line(error, script)) from error


def _allowed(source: str, steps: Sequence[Step]) -> Iterator[str]:
    """Yield what comments with a reason allow, with the steps that the call made which they stand on."""
    comments = [comment for comment in allowances(source) if comment.code and comment.reason]
    calls = Calls(source) if comments else None
    for comment in comments:
        meant = [
            str(number)
            for number, step in enumerate(steps, 1)
            if calls and not isinstance(step, Switch) and step.line is not None
            if calls.meant(comment, step.line, step.sql if isinstance(step, Statement) else None)
        ]
        where = f" step {', '.join(meant)}:" if meant else ""
        yield f"{comment.code}{where} {comment.reason}"


def _line(error: BaseException, script: Script) -> int | None:
    """Return the script's innermost line in a traceback."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == str(script.path)]
    return lines[-1] if lines else None


def _explained(error: BaseException) -> str:
    match _absent_proxy(error):
        case "alembic.context":
            return (
                "alembic.context is not there: a script is rendered once, without a database or an environment, and "
                "runs the same on every shard; write what it adds, without branches on where it runs"
            )
        case "alembic.op":
            return "alembic.op is not there while the module is read; call it in upgrade()"
        case _:
            takes = ""
            if isinstance(error, TypeError) and str(error).startswith(f"{move_rows.__name__}() "):
                takes = f"; it takes {', '.join(signature(move_rows).parameters)}"
            return f"{type(error).__name__}: {error}{takes}" if str(error) else type(error).__name__


def _absent_proxy(error: BaseException) -> str | None:
    """Name the module of Alembic whose proxy function found nothing behind it; None for any other error."""
    if not isinstance(error, (NameError, AttributeError)):
        return None
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if isinstance(error, NameError) and "proxy object" in str(error):
        frames.pop()  # before it was ever installed, a helper of the proxy function raises
    return frames[-1].f_globals.get("__name__") if frames else None
