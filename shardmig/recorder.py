"""
Alembic's operations, recorded instead of executed.

Alembic's own offline mode corrupts SQL: it doubles `%`, turns `:x` inside literals into NULL, tabs into blanks and
prints BEGIN and COMMIT. So a recorder stands where Alembic would execute: a string is kept verbatim, a construct is
compiled by a compiler that refuses what it cannot write, and one call is one statement.
"""

from __future__ import annotations

import io
import re
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from alembic.ddl.base import AddColumn, alter_table
from alembic.ddl.postgresql import PostgresqlImpl
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import UniqueConstraint
from sqlalchemy.dialects.postgresql.base import PGCompiler
from sqlalchemy.dialects.postgresql.named_types import CreateEnumType
from sqlalchemy.exc import CompileError
from sqlalchemy.schema import CreateIndex, ExecutableDDLElement, SetColumnComment
from sqlalchemy.sql.base import NO_ARG
from sqlalchemy.sql.elements import ClauseElement

from shardmig.errors import ScriptError
from shardmig.sqltext import code, tidy, unwritable
from shardmig.tables import Column, Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

    import sqlalchemy as sa
    from sqlalchemy.engine.interfaces import Dialect
    from sqlalchemy.sql.elements import BindParameter, TextClause
    from sqlalchemy.types import TypeEngine

__all__ = ["Enum", "Recorded", "Recorder"]

_ONE_AT_A_TIME = threading.Lock()  # Alembic's `op` is one module for the whole process
_CONCURRENTLY = re.compile(r"\s*CREATE\s+(UNIQUE\s+)?INDEX\s+CONCURRENTLY\b", re.IGNORECASE)
_ESCAPED_COLON = re.compile(r"\\:\w*(?![:\w])")  # what SQLAlchemy's BIND_PARAMS_ESC takes for an escape
_NO_DATABASE = (
    "a script cannot read a database: it is rendered once, without one, and runs the same on every shard. "
    "Write what it adds; let move_rows() read rows. A column of type sa.Enum creates its type by itself"
)


@dataclass(frozen=True, slots=True)
class Enum:
    """An enum type that a script creates."""

    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recorded:
    """
    One recorded call.

    Attributes:
        sql: the statement.
        line: line of the script that called.
        transactional: False for CREATE INDEX CONCURRENTLY.
        table: the table, for ADD COLUMN and COMMENT ON COLUMN; else None.
        action: for ADD COLUMN what follows `ALTER TABLE name `; else None.
        enum: the type, when the statement creates one for a column.
    """

    sql: str
    line: int | None
    transactional: bool = True
    table: str | None = None
    action: str | None = None
    enum: Enum | None = None


class Recorder:
    """
    Records what one script asks of `alembic.op`.

    Attributes:
        statements: the calls, in order.
        tables: what they say about tables, by name as written ("table" or "schema.table").
        closed: why no operation may be called now; None while it may.
    """

    def __init__(self, filename: str, name: str) -> None:
        """
        Prepare to record.

        Args:
            filename: the `co_filename` of the script's code, to find its lines on the call stack.
            name: how messages call the script.
        """
        self.filename = filename
        self.name = name
        self.statements: list[Recorded] = []
        self.tables: dict[str, Table] = {}
        self.closed: str | None = None
        self._refusal: ScriptError | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """
        Let `alembic.op` record here; one script at a time.

        Raises:
            ScriptError: a script rendered another one; or it swallowed the refusal of something it called.
        """
        if getattr(_rendering, "active", False):
            raise ScriptError("a script cannot render scripts: rendering is not re-entrant", path=self.name)
        with _ONE_AT_A_TIME:
            _rendering.active = True
            operations = _operations(self)
            operations._install_proxy()  # noqa: SLF001 - Operations.context() leaves the proxy behind an exception
            try:
                yield
            finally:
                operations._remove_proxy()  # noqa: SLF001
                _rendering.active = False
        if self._refusal:  # a script must not go on by catching it
            raise self._refusal

    def line(self) -> int | None:
        """Return the script's line that is being executed: the innermost call in the script itself."""
        frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and inspect.stack() reads files
        while frame is not None and frame.f_code.co_filename != self.filename:
            frame = frame.f_back
        return None if frame is None else frame.f_lineno

    def refuse(self, reason: str) -> NoReturn:
        """Raise a ScriptError naming the line, and remember it."""
        self._refusal = self._refusal or ScriptError(reason, path=self.name, line=self.line())
        raise self._refusal

    def record(self, call: Recorded) -> None:
        """Keep one statement."""
        sql = call.sql
        if self.closed:
            self.refuse(self.closed)
        if not sql.strip():
            self.refuse("an empty statement")
        reason = unwritable(sql)
        if reason:
            self.refuse(f"this SQL cannot be executed: {reason}")
        self.statements.append(call)

    def add_table(self, name: str, table: Table) -> None:
        """Note a table that the script creates, or columns that it adds to one."""
        self.tables[name] = table.after(self.tables.get(name))


_rendering = threading.local()


# --------------------------------------------------------------------------------------------------------------------
# Where Alembic would execute


class _StrictCompiler(PGCompiler):
    """Writes values into SQL; refuses a bind that has none, which SQLAlchemy would write as NULL."""

    def visit_textclause(self, textclause: TextClause, add_to_result_map: object = None, **options: object) -> str:
        """Compile sa.text(), telling its parameters where they are."""
        options["in_text"] = True
        text = super().visit_textclause(textclause, add_to_result_map, **options)  # type: ignore[no-untyped-call]
        return str(text)

    def render_literal_bindparam(
        self,
        bindparam: BindParameter[Any],
        render_literal_value: object = NO_ARG,
        bind_expression_template: object = None,
        **options: object,
    ) -> str:
        """Write a value; refuse to invent one."""
        if bindparam.required and render_literal_value is NO_ARG:
            raise CompileError(
                f"the SQL holds `:{bindparam.key}`, which sa.text() reads as a parameter without a value; "
                f"write `\\:{bindparam.key}`, or give the value with .bindparams({bindparam.key}=...)"
            )
        text = super().render_literal_bindparam(  # type: ignore[no-untyped-call]
            bindparam,
            render_literal_value=render_literal_value,
            bind_expression_template=bind_expression_template,
            **options,
        )
        # sa.text() reads `\:` as a colon, also in the values it has just written.
        return _ESCAPED_COLON.sub(r"\\\g<0>", str(text)) if options.get("in_text") else str(text)

    def render_literal_value(self, value: object, type_: TypeEngine[Any]) -> str:
        """Write bytes as PostgreSQL reads them, everything else as SQLAlchemy does."""
        if isinstance(value, bytes):  # SQLAlchemy would write them as text, where a backslash means something else
            return f"decode('{value.hex()}', 'hex')"
        return str(super().render_literal_value(value, type_))  # type: ignore[no-untyped-call]

    def bindparam_string(self, name: str, *_: object, **__: object) -> str:
        """Refuse a placeholder: nobody would fill it."""
        raise CompileError(f"the value of `:{name}` cannot be written into the SQL; write it as text")


class _RecordingImpl(PostgresqlImpl):
    """Alembic's PostgreSQL dialect, with the recorder in the place of a connection."""

    # No `__dialect__`: naming one would register this class for every user of Alembic in the process.

    recorder: Recorder

    @property
    def bind(self) -> NoReturn:
        """Refuse to pretend that there is a connection."""
        self.recorder.refuse(_NO_DATABASE)

    def static_output(self, text: str) -> None:  # noqa: ARG002 - Alembic's signature
        """Refuse text that no operation stands for."""
        self.recorder.refuse("a script cannot write into the rendered SQL; call op.execute()")

    def emit_begin(self) -> None:
        """Say nothing: transactions are the runner's business, so autocommit_block() means nothing."""

    emit_commit = emit_begin

    def _exec(
        self,
        construct: object,
        execution_options: object = None,
        multiparams: object = None,
        params: object = None,
    ) -> None:
        """Record what Alembic would execute."""
        recorder = self.recorder
        if execution_options or multiparams or params:
            recorder.refuse("parameters and execution options mean nothing here; write the values into the SQL")
        if isinstance(construct, str):
            recorder.record(
                Recorded(construct, recorder.line(), transactional=not _CONCURRENTLY.match(code(construct)))
            )
            return
        if not isinstance(construct, ClauseElement):
            recorder.refuse(f"op.execute() takes SQL, not {type(construct).__name__}")
        recorder.record(self.described(construct, Recorded(self.written(construct), recorder.line())))

    def written(self, construct: ClauseElement) -> str:
        """Compile a construct with every value in its place."""
        options = {} if isinstance(construct, ExecutableDDLElement) else {"literal_binds": True}
        try:
            compiled = construct.compile(dialect=self.dialect, compile_kwargs=options)
        except CompileError as error:
            self.recorder.refuse(str(error))
        left_out = [*getattr(compiled, "insert_prefetch", ()), *getattr(compiled, "update_prefetch", ())]
        if left_out:
            self.recorder.refuse(f"column {left_out[0].name} has a Python-side default, which no shard can call")
        return tidy(str(compiled))

    def described(self, construct: ClauseElement, call: Recorded) -> Recorded:
        """Add what the plan needs to know about a call beside its text."""
        match construct:
            case CreateIndex():
                return replace(call, transactional=not construct.element.dialect_options["postgresql"]["concurrently"])
            case AddColumn():
                compiler = self.dialect.ddl_compiler(self.dialect, construct)
                prefix = alter_table(compiler, construct.table_name, construct.schema)
                table = _table_name(construct.table_name, construct.schema)
                return replace(call, table=table, action=call.sql.removeprefix(prefix).strip())
            case SetColumnComment():
                return replace(call, table=_table_name(construct.element.table.name, construct.element.table.schema))
            case CreateEnumType():
                name = _table_name(construct.element.name, construct.element.schema)
                return replace(call, enum=Enum(name, tuple(construct.element.enums)))
            case _:
                return call

    def add_column(
        self,
        table_name: str,
        column: sa.Column[Any],
        *,
        schema: str | None = None,
        **options: Any,  # noqa: ANN401 - Alembic's options
    ) -> None:
        """Record ADD COLUMN, and CREATE TYPE before it."""
        # Alembic forgets the column's enum type, which create_table() creates.
        column.table.dispatch.before_create(column.table, self.connection, checkfirst=False, _ddl_runner=self)
        super().add_column(table_name, column, schema=schema, **options)
        self.recorder.add_table(_table_name(table_name, schema), Table({column.name: self._column(column)}))

    def create_table(self, table: sa.Table, **options: Any) -> None:  # noqa: ANN401 - Alembic's options
        """Record CREATE TABLE and what belongs to it; note its key."""
        # Alembic creates the indexes in the order of a set, which differs from run to run.
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        table.indexes.clear()
        super().create_table(table, **options)
        for index in indexes:
            self.create_index(index)
        uniques = [c for c in table.constraints if isinstance(c, UniqueConstraint)]
        known = Table(
            columns={column.name: self._column(column) for column in table.columns},
            primary_key=tuple(column.name for column in table.primary_key.columns),
            uniques=tuple(frozenset(column.name for column in unique.columns) for unique in uniques),
            created=True,
        )
        self.recorder.add_table(_table_name(table.name, table.schema), known)

    def _column(self, column: sa.Column[Any]) -> Column:
        try:
            type_sql = self.dialect.type_compiler_instance.process(column.type)
        except CompileError:
            type_sql = None
        always = column.identity is not None and bool(column.identity.always)
        return Column(type_sql, nullable=bool(column.nullable), always=always)


class _ScriptContext:
    """What a script may ask op.get_context() for: an autocommit block, which means nothing."""

    def __init__(self, recorder: Recorder, dialect: Dialect) -> None:
        self._recorder = recorder
        self.dialect = dialect

    def autocommit_block(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> NoReturn:
        self._recorder.refuse(f"op.get_context().{name} is not there: {_NO_DATABASE}")


def _operations(recorder: Recorder) -> Operations:
    """Build what `alembic.op` stands for while a script is rendered."""
    context = MigrationContext.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # any other doubles `%`
        opts={"as_sql": True, "output_buffer": io.StringIO()},
    )
    context.dialect.statement_compiler = _StrictCompiler
    impl = _RecordingImpl(context.dialect, context.connection, True, None, None, {})  # noqa: FBT003 - Alembic's order
    impl.recorder = recorder
    context.impl = impl
    operations = Operations(context)
    facade = _ScriptContext(recorder, context.dialect)
    operations.get_context = lambda: facade  # type: ignore[method-assign, assignment, return-value]
    operations.run_async = lambda *_, **__: recorder.refuse(_NO_DATABASE)  # type: ignore[method-assign]
    return operations


def _table_name(name: str, schema: str | None) -> str:
    return f"{schema}.{name}" if schema else name
