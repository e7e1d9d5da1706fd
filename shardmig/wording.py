"""
How the server words a table: types, defaults, expressions and constraints as its catalog spells them.

Two spellings of one default are told apart by nobody but the server. So what the models say is shown to it, as a
temporary table that is rolled back, and its words are compared with those for the table that is there. No list of
synonyms, and no value of a default, is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.schema import CreateTable

from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "DIALECT",
    "Column",
    "Key",
    "Relation",
    "Wording",
    "compiler",
    "dotted",
    "existing",
    "of_model",
    "relations",
    "rules",
    "sql_type",
]

_NO_TEMPORARY = frozenset({"42501", "25006"})  # insufficient_privilege, read_only_sql_transaction
DIALECT = PGDialect(paramstyle="named")  # type: ignore[no-untyped-call]  # any other style doubles `%`

Key = tuple[str | None, str]
"""Schema and name of something; None is the schema that unqualified names mean."""


@dataclass(frozen=True, slots=True)
class Relation:
    """
    A table that is there.

    Attributes:
        oid: of the table.
        partitioned: whether its rows live in partitions.
        partition: whether it is itself the part of another one.
        owned: whether an extension brought it.
    """

    oid: int
    partitioned: bool
    partition: bool
    owned: bool


@dataclass(frozen=True, slots=True)
class Column:
    """A column in the server's words; `computed` is its expression if it is generated."""

    type: str
    not_null: bool
    default: str | None
    computed: str | None
    identity: bool


@dataclass(frozen=True, slots=True)
class Wording:
    """
    A table in the server's words.

    Attributes:
        columns: by name; of a model those that the server could be shown.
        rules: CHECK and EXCLUDE constraints by name.
        primary_key: its columns, in order.
        refused: columns and rules of a model that the server does not take → what it said.
    """

    columns: Mapping[str, Column]
    rules: Mapping[str, str]
    primary_key: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def dotted(key: Key) -> str:
    """Write a key for people, nothing quoted."""
    return ".".join(part for part in key if part)


def relations(connection: sa.Connection, schemas: Iterable[str | None]) -> dict[Key, Relation]:
    """Return the tables of some schemas; None is the schema that unqualified names mean."""
    default = connection.dialect.default_schema_name
    wanted = sorted({schema or str(default) for schema in schemas})
    rows = connection.execute(sa.text(_RELATIONS), {"schemas": wanted})
    return {
        (None if schema == default else schema, name): Relation(oid, partitioned, partition, owned)
        for schema, name, oid, partitioned, partition, owned in rows
    }


def existing(connection: sa.Connection, oid: int) -> Wording:
    """Return a table that is there."""
    columns = {
        name: Column(*facts) for name, *facts in connection.execute(sa.text(_COLUMNS), {"relation": oid}).tuples()
    }
    found, key = {}, ()
    for name, kind, definition, names in connection.execute(sa.text(_CONSTRAINTS), {"relation": oid}):
        if kind == "p":
            key = tuple(names)
        else:
            found[name] = definition
    return Wording(columns, found, key)


def of_model(connection: sa.Connection, table: sa.Table, there: Iterable[str]) -> Wording:
    """
    Return what a model says of the columns that are there already, and of its rules about them.

    Nothing stays behind: the temporary table is rolled back.
    """
    names = set(there)
    specs = {column.name: _column(column) for column in table.columns if column.name in names}
    texts = {text: name for name, text, columns in rules(table) if columns <= names}
    try:
        return _shown(connection, table.name, [*specs.values(), *texts])
    except SQLAlchemyError as error:  # one of them is not understood: which?
        if getattr(getattr(error, "orig", None), "sqlstate", None) in _NO_TEMPORARY:
            raise ConfigError(
                f"the comparison shows the models to the server as a temporary table, and may not: {_first(error)}. "
                "GRANT TEMPORARY ON DATABASE … TO the role that connects, name a primary, or use a scratch shard"
            ) from error
    refused: dict[str, str] = {}
    for name, spec in list(specs.items()):
        _try(connection, table.name, [spec], refused, name)
    taken = [spec for name, spec in specs.items() if name not in refused]
    for text, name in list(texts.items()):
        _try(connection, table.name, [*taken, text], refused, name or text)
    sound = [text for text, name in texts.items() if (name or text) not in refused]
    return replace(_shown(connection, table.name, [*taken, *sound]), refused=refused)


def _try(connection: sa.Connection, name: str, parts: list[str], refused: dict[str, str], part: str) -> None:
    try:
        _shown(connection, name, parts)
    except SQLAlchemyError as error:
        refused[part] = _first(error)


def _first(error: Exception) -> str:
    return str(getattr(error, "orig", error)).partition("\n")[0]


def compiler(table: sa.Table) -> Any:  # noqa: ANN401 - SQLAlchemy's compilers have no type
    """Return what writes the parts of a CREATE TABLE."""
    return DIALECT.ddl_compiler(DIALECT, CreateTable(table))


def sql_type(kind: sa.types.TypeEngine[Any]) -> str:
    """Write a type as SQL."""
    return str(DIALECT.type_compiler_instance.process(kind))


def _column(column: sa.Column[Any]) -> str:
    return str(compiler(column.table).get_column_specification(column))


def rules(table: sa.Table) -> Iterator[tuple[str, str, set[str]]]:
    """Yield name, text and columns of a model's CHECKs and exclusions."""
    writer = compiler(table)
    for constraint in sorted(table.constraints, key=lambda c: str(c.name)):
        if not isinstance(constraint, sa.CheckConstraint | postgresql.ExcludeConstraint):
            continue
        wanted = getattr(constraint, "_create_rule", None)  # types ask whether this database needs their CHECK
        if wanted is None or wanted(writer):
            names = {column.name for column in constraint.columns}
            yield str(constraint.name or ""), str(writer.process(constraint)), names


def _shown(connection: sa.Connection, name: str, parts: list[str]) -> Wording:
    """Create a temporary table of parts, read it, and roll it back."""
    text = f"CREATE TEMPORARY TABLE {DIALECT.identifier_preparer.quote(name)} ({', '.join(parts)})"
    savepoint = connection.begin_nested()
    try:
        connection.exec_driver_sql(text, execution_options={"no_parameters": True})
        return existing(connection, connection.execute(sa.text(_TEMPORARY), {"name": name}).scalar_one())
    finally:
        savepoint.rollback()


_RELATIONS = """
SELECT n.nspname, c.relname, c.oid, c.relkind = 'p', c.relispartition,
       EXISTS (SELECT FROM pg_depend AS d
               WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
FROM pg_class AS c
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND n.nspname = ANY (:schemas)
"""

_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       -- Both say when the transaction began; SQLAlchemy's func.now() and CURRENT_TIMESTAMP mean each other.
       CASE WHEN a.attgenerated = ''
            THEN CASE pg_get_expr(d.adbin, d.adrelid) WHEN 'CURRENT_TIMESTAMP' THEN 'now()'
                 ELSE pg_get_expr(d.adbin, d.adrelid) END
       END,
       CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) || ' ' || a.attgenerated::text END,
       a.attidentity <> ''
FROM pg_attribute AS a
LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = :relation AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""

_CONSTRAINTS = """
SELECT k.conname, k.contype::text, pg_get_constraintdef(k.oid),
       ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY AS key (number, place)
             JOIN pg_attribute AS a ON a.attrelid = k.conrelid AND a.attnum = key.number ORDER BY key.place)
FROM pg_constraint AS k
WHERE k.conrelid = :relation AND k.contype IN ('c', 'x', 'p')
"""

_TEMPORARY = """
SELECT c.oid FROM pg_class AS c WHERE c.relnamespace = pg_my_temp_schema() AND c.relname = :name
"""
