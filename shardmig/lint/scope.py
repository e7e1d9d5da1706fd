"""What a text is judged against: its context, what its plan has added, what the configuration knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from shardmig.config import Lint

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from shardmig.sqltree import Node

__all__ = ["CATALOG_SCHEMAS", "LEDGER_SCHEMA", "Context", "New", "Scope", "relation_name", "spelled"]

Context = Literal["structure", "move", "reverse", "read", "purge"]

LEDGER_SCHEMA = "shardmig"
_DEFAULTS = Lint()
CATALOG_SCHEMAS = frozenset({"information_schema"})  # besides everything that begins pg_


@dataclass(frozen=True, slots=True)
class New:
    """
    What nobody's application knows yet, because this plan (or one it needs) adds it.

    Names are as `relation_name` spells them: without the home schema, quoted where they need it.

    Attributes:
        tables: tables.
        columns: new columns of existing tables.
        types: enum types; those of every earlier plan too, for a type does not change.
        sequences: sequences, also those of serial and identity columns; None when nobody knows.
        cascading: new tables whose rows go when a row of an existing table is deleted.
        referred: new tables that foreign keys point to.
        emptied: new tables → columns that are set when such a row is deleted → "n" to NULL, "d" to their default.
    """

    tables: frozenset[str] = frozenset()
    columns: Mapping[str, frozenset[str]] = field(default_factory=dict)
    types: frozenset[str] = frozenset()
    sequences: frozenset[str] | None = None
    cascading: frozenset[str] = frozenset()
    referred: frozenset[str] = frozenset()
    emptied: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scope:
    """
    Everything a text is judged against.

    Attributes:
        context: which closed world: "structure", "move", "reverse", "read" (SELECT only) or "purge" (one DELETE).
        new: what the plan adds.
        restores: table → old columns that a reverse move may write.
        settings: the configuration's section on linting.
        step: whether the text is a step of a plan and holds `{batch}`; else a lone statement.
        touches: existing table whose columns may be set to themselves, so that REPEATABLE READ writers retry.
    """

    context: Context = "structure"
    new: New = New()
    restores: Mapping[str, Collection[str]] = field(default_factory=dict)
    settings: Lint = _DEFAULTS
    step: bool = False
    touches: str | None = None

    @property
    def home(self) -> str:
        """The schema that an unqualified name means."""
        return self.settings.schemas[0] if self.settings.schemas else "public"

    def relation(self, node: Node) -> str:
        """Return the name of a relation as `New` spells it."""
        return relation_name(node.get("schemaname", ""), node.get("relname", ""), home=self.home)

    def dotted(self, names: list[str]) -> str:
        """Return a possibly qualified name as `New` spells it."""
        return relation_name(names[0] if len(names) > 1 else "", names[-1], home=self.home)


def relation_name(schema: str, name: str, *, home: str) -> str:
    """Spell a relation's name so that it cannot be taken for another one's."""
    return spelled(name) if schema in ("", home) else f"{spelled(schema)}.{spelled(name)}"


def spelled(identifier: str) -> str:
    """Quote an identifier where a dot or a quote in it could mislead."""
    if "." in identifier or '"' in identifier:
        return '"' + identifier.replace('"', '""') + '"'
    return identifier
