"""What tables, indexes and sequences share: where they may stand, how they persist, their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig.lint.expressions import type_of
from shardmig.lint.rules.structure import SequenceOwner
from shardmig.lint.rules.tables import NotPermanent
from shardmig.lint.rules.text import CatalogName, UnknownSchema, UnknownSyntax

if TYPE_CHECKING:
    from shardmig.lint.judge import Judge
    from shardmig.sqltree import Node

__all__ = ["column_names", "owned_schema", "permanent", "sequence_options", "storage_options"]

_OPTIONS = frozenset(
    {
        "fillfactor", "toast_tuple_target", "parallel_workers", "vacuum_truncate", "vacuum_index_cleanup",
        "log_autovacuum_min_duration", "deduplicate_items", "buffering", "fastupdate", "gin_pending_list_limit",
        "pages_per_range", "autosummarize", "user_catalog_table", "autovacuum_enabled",
        "autovacuum_vacuum_threshold", "autovacuum_vacuum_scale_factor", "autovacuum_vacuum_insert_threshold",
        "autovacuum_vacuum_insert_scale_factor", "autovacuum_analyze_threshold", "autovacuum_analyze_scale_factor",
        "autovacuum_vacuum_cost_delay", "autovacuum_vacuum_cost_limit", "autovacuum_freeze_min_age",
        "autovacuum_freeze_max_age", "autovacuum_freeze_table_age", "autovacuum_multixact_freeze_min_age",
        "autovacuum_multixact_freeze_max_age", "autovacuum_multixact_freeze_table_age",
        "autovacuum_vacuum_max_threshold", "vacuum_max_eager_freeze_failure_rate",
    }
)  # fmt: skip
_SINCE = {
    "autovacuum_vacuum_insert_scale_factor": 13,
    "autovacuum_vacuum_insert_threshold": 13,
    "autovacuum_vacuum_max_threshold": 18,
    "deduplicate_items": 13,
    "vacuum_max_eager_freeze_failure_rate": 18,
}
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
_SEQUENCE_OPTIONS = frozenset({"start", "increment", "minvalue", "maxvalue", "cache", "cycle", "sequence_name"})


def owned_schema(judge: Judge, names: list[str], place: Node | None) -> None:
    """Refuse to create anything outside the configured schemas."""
    schema = names[-2] if len(names) > 1 else ""
    if not judge.schema(schema, names[-1] if names else "", place) or not schema:
        return
    if schema not in judge.scope.settings.schemas:
        judge.refuse(
            UnknownSchema,
            place,
            f"schema {schema} is not configured: a name there may capture unqualified names of running code; "
            f"add it to [lint] schemas",
        )


def permanent(judge: Judge, relation: Node, what: str) -> None:
    """Refuse temporary and unlogged relations, and what is nobody's to create."""
    judge.known(relation)
    persistence = relation.get("relpersistence", "p")
    if persistence == "t":
        judge.refuse(
            NotPermanent,
            relation,
            f"{what} that is temporary shadows the real one of its name; make it permanent",
        )
    elif persistence != "p":
        judge.refuse(
            NotPermanent,
            relation,
            f"{what} that is unlogged is empty after a crash and on standbys; make it logged",
        )


def column_names(judge: Judge, columns: list[Node]) -> None:
    """Refuse columns of a name that every table has already, or that comes twice."""
    seen: set[str] = set()
    for column in columns:
        name: str = column.get("colname", "")
        if name in _SYSTEM_COLUMNS:
            judge.refuse(CatalogName, column, f"{name} is a column that PostgreSQL gives every table; rename it")
        elif name in seen:
            judge.refuse(UnknownSyntax, column, f"column {name} is there twice; leave one out")
        seen.add(name)


def storage_options(judge: Judge, options: list[Node]) -> None:
    """Judge WITH (…) of a new table or index."""
    for option in options:
        judge.known(option)
        name = option.get("defname", "")
        if name in _SINCE:
            judge.since(_SINCE[name], option, f"storage parameter {name}")
        if name not in _OPTIONS or option.get("defnamespace", "toast") != "toast":
            judge.refuse(UnknownSyntax, option, f"storage parameter {name} is not known; leave it out")


def sequence_options(judge: Judge, options: list[Node]) -> None:
    """Judge the options of a new sequence; also those of an identity column."""
    for option in options:
        judge.known(option)
        name = option.get("defname", "")
        if name == "owned_by":
            _owned_by(judge, option)
        elif name == "as":
            type_of(judge, option.get("arg"), frozenset({"int2", "int4", "int8"}))
        elif name not in _SEQUENCE_OPTIONS:
            judge.refuse(UnknownSyntax, option, f"{name.upper()} is no option of a new sequence; leave it out")


def _owned_by(judge: Judge, option: Node) -> None:
    names: list[str] = option.get("arg", [])
    if names == ["none"]:
        return
    table = judge.scope.dotted(names[:-1]) if len(names) > 1 else ""
    if table not in judge.scope.new.tables:
        judge.refuse(
            SequenceOwner,
            option,
            f"OWNED BY {'.'.join(names)} ties the sequence to a table that exists; leave it out",
            lock=f"ACCESS SHARE on {table}",
        )
