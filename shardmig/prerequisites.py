"""What new tables and columns need beforehand: schemas, enums and sequences that are only in the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from shardmig import explanations as tell
from shardmig import wording
from shardmig.drafting import Addition, Explained, Variant, parsed, written
from shardmig.typenames import enums_of
from shardmig.wording import dotted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from shardmig.wording import Key

__all__ = ["Prerequisites"]


class Prerequisites:
    """
    Compares with a shard what Alembic does not look at; iterating yields what to add or to explain.

    Args:
        connection: of the shard; only read.
        models: the metadata.
        schemas: those that tables of the models are in, the default one left out.
        key: how schema and name become a key.
    """

    def __init__(
        self,
        connection: sa.Connection,
        models: Sequence[sa.MetaData],
        schemas: Collection[str],
        key: Callable[[str | None, str], Key],
    ) -> None:
        self._connection = connection
        self._models = models
        self._key = key
        there = {name for (name,) in connection.execute(sa.text("SELECT nspname FROM pg_namespace"))}
        self._missing = sorted(set(schemas) - there)

    def __iter__(self) -> Iterator[Addition | Explained]:
        """Yield schemas, then what lies in them."""
        for schema in self._missing:
            yield Addition(f"schema {schema}", (Variant(_execute(f"CREATE SCHEMA {_quote(schema)}")),))
        yield from self._types()
        yield from self._sequences()

    def schema_of(self, key: Key) -> tuple[str, ...]:
        """Return the title of the addition that makes the schema of something; nothing where it is there."""
        return (f"schema {key[0]}",) if key[0] in self._missing else ()

    def _types(self) -> Iterator[Addition | Explained]:
        """Create enums in sight, before the tables and columns that have them."""
        labels: dict[Key, list[str]] = {}
        for schema, name, label in self._connection.execute(sa.text(_ENUMS)):
            labels.setdefault(self._key(schema, name), []).append(label)
        seen: set[Key] = set()
        for table in (table for metadata in self._models for table in metadata.tables.values()):
            for enum in (enum for column in table.columns for enum in enums_of(column.type)):
                key = self._key(enum.schema or table.metadata.schema, str(enum.name))
                if key in seen:
                    continue
                seen.add(key)
                if key not in labels:
                    values = ", ".join("'" + label.replace("'", "''") + "'" for label in enum.enums)
                    yield self._added("type", key, f"CREATE TYPE {_quoted(key)} AS ENUM ({values})")
                elif list(enum.enums) != labels[key]:
                    yield tell.changed_labels(dotted(key), enum.enums, labels[key])

    def _sequences(self) -> Iterator[Addition]:
        there = {self._key(schema, name) for schema, name in self._connection.execute(sa.text(_SEQUENCES))}
        for metadata in self._models:
            for sequence in metadata._sequences.values():  # noqa: SLF001 - there is no other way to ask for them
                key = self._key(sequence.schema, sequence.name)
                if key not in there:
                    there.add(key)
                    text = str(sa.schema.CreateSequence(sequence).compile(dialect=wording.DIALECT))
                    yield self._added("sequence", key, text)

    def _added(self, kind: str, key: Key, sql: str) -> Addition:
        return Addition(f"{kind} {dotted(key)}", (Variant(_execute(sql)),), needs=self.schema_of(key))


def _quoted(key: Key) -> str:
    return ".".join(_quote(part) for part in key if part)


def _quote(name: str) -> str:
    return str(wording.DIALECT.identifier_preparer.quote(name))


def _execute(sql: str) -> str:
    text = " ".join(sql.split("\n")).strip()
    return written(parsed(f"op.execute({text!r})"))


_ENUMS = """
SELECT n.nspname, t.typname, e.enumlabel
FROM pg_enum AS e
JOIN pg_type AS t ON t.oid = e.enumtypid
JOIN pg_namespace AS n ON n.oid = t.typnamespace
ORDER BY n.nspname, t.typname, e.enumsortorder
"""

_SEQUENCES = """
SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relkind = 'S'
"""
