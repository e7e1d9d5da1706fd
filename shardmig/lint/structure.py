"""The closed world of structure steps: a statement passes because everything in it is known to be additive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig.lint import columns, indexes, options, tables
from shardmig.lint.rules.structure import (
    AltersExisting,
    Comment,
    DatabaseCode,
    DataInStructure,
    Destroys,
    EnumNeverGrows,
    IfExists,
    Locks,
    Maintenance,
    Opaque,
    OtherObject,
    Renames,
    Replaces,
    Rights,
    Session,
    Transaction,
)
from shardmig.lint.rules.tables import BorrowedShape
from shardmig.lint.rules.text import UnknownSyntax

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardmig.lint.judge import Judge
    from shardmig.lint.violation import Rule
    from shardmig.sqltree import Node

__all__ = ["refused", "structure"]


_PRIVILEGES = frozenset({"all", "select", "insert", "update", "delete", "truncate", "references", "trigger", "usage"})


def structure(judge: Judge, statement: Node) -> None:
    """Judge one statement of `upgrade()`."""
    handler = _HANDLERS.get(statement.kind)
    if handler is not None:
        handler(judge, statement)
    else:
        refused(judge, statement)


def refused(judge: Judge, statement: Node) -> None:
    """Refuse a statement that has no place in any step, saying what kind of harm it does."""
    kind = statement.kind
    if statement.get("replace"):
        judge.refuse(Replaces, None, "what stood under this name is gone; create a new object under a new name")
        return
    rule, why = _REFUSED.get(kind, (None, ""))
    if kind == "AlterEnumStmt" and "old_val" in statement.fields:
        rule, why = _REFUSED["RenameStmt"]
    if rule is None and kind.startswith("Alter"):
        rule, why = AltersExisting, "changes what exists while it is used; only ADD COLUMN is additive"
    if rule is None:
        rule, why = UnknownSyntax, f"{kind} is not known to be additive; leave it out"
    judge.refuse(rule, None, why, lock=_LOCKS.get(kind))


def _create_type(judge: Judge, statement: Node) -> None:
    judge.known(statement)
    names: list[str] = statement.get("type_name", [])
    options.owned_schema(judge, names, None)
    if names[-1].startswith("_"):
        judge.refuse(
            Renames,
            None,
            f"if there is a type or table {names[-1][1:]}, its array type is called {names[-1]} and would be renamed "
            f"for this one; choose a name without _ in front",
        )
    judge.refuse(
        EnumNeverGrows,
        None,
        f"type {'.'.join(names)} can never get another label here; text can",
    )


def _create_sequence(judge: Judge, statement: Node) -> None:
    judge.known(
        statement,
        but={"if_not_exists": (IfExists, "IF NOT EXISTS hides another sequence of this name; leave it out")},
    )
    relation: Node = statement.get("sequence")
    options.permanent(judge, relation, "a sequence")
    options.owned_schema(judge, [relation.get("schemaname", ""), relation.get("relname", "")], relation)
    options.sequence_options(judge, statement.get("options", []))


def _create_schema(judge: Judge, statement: Node) -> None:
    judge.known(
        statement,
        but={
            "if_not_exists": (IfExists, "IF NOT EXISTS hides a schema of somebody else; leave it out"),
            "schema_elts": (UnknownSyntax, "objects inside CREATE SCHEMA are steps of their own; write them apart"),
            "authrole": (Rights, "the owner is the role that migrates; leave AUTHORIZATION out"),
        },
    )
    options.owned_schema(judge, [statement.get("schemaname", ""), ""], None)


def _comment(judge: Judge, statement: Node) -> None:
    judge.known(statement)
    kind = statement.get("objtype", "").removeprefix("OBJECT_")
    if kind not in ("TABLE", "COLUMN"):
        judge.refuse(
            Comment,
            None,
            f"COMMENT ON {kind} is not known to pass beside open transactions; comment the table or the column",
        )
        return
    names = statement.get("object", [])
    relation = names if kind == "TABLE" else names[:-1]
    if not all(isinstance(name, str) for name in relation) or not relation:
        judge.refuse(UnknownSyntax, None, "name the table")
        return
    judge.schema(relation[-2] if len(relation) > 1 else "", relation[-1], None)
    if len(relation) > 2:  # noqa: PLR2004 - schema and table
        judge.refuse(UnknownSyntax, None, "a name with a database in front is not known here; leave it out")


def _grant(judge: Judge, statement: Node) -> None:
    if not statement.get("is_grant"):
        judge.refuse(Rights, None, "REVOKE takes rights from running code; leave them as they are")
        return
    judge.known(statement)
    kind = statement.get("objtype", "").removeprefix("OBJECT_")
    if statement.get("targtype") != "ACL_TARGET_OBJECT" or kind not in ("TABLE", "SEQUENCE"):
        judge.refuse(
            Rights, None, "GRANT is for tables and sequences of this plan, named one by one; use [session] grant"
        )
        return
    new = judge.scope.new.tables | (judge.scope.new.sequences or frozenset())
    for relation in statement.get("objects", []):
        name = judge.relation(relation)
        if name not in new:
            judge.refuse(
                Rights,
                relation,
                f"{name} exists already; its rights are no part of a release. Use [session] grant for new tables",
            )
    for inner in [*statement.get("privileges", []), *statement.get("grantees", [])]:
        judge.known(inner)
    for privilege in statement.get("privileges", []):
        word: str = privilege.get("priv_name", "all")
        if word == "maintain":
            judge.since(17, privilege, "MAINTAIN")
        elif word not in _PRIVILEGES:
            judge.refuse(UnknownSyntax, privilege, f"{word.upper()} is no privilege on a table; correct it")


def _data(judge: Judge, statement: Node) -> None:
    if "into_clause" in statement.fields:
        judge.refuse(
            BorrowedShape,
            None,
            "SELECT INTO creates a table and loads it in one transaction; create it, then move",
        )
        return
    verb = statement.kind.removesuffix("Stmt").upper()
    relation: Node | None = statement.get("relation")
    lock = fix = None
    if relation is not None:
        judge.relation(relation)
        table = relation.get("relname")
        lock = f"ROW EXCLUSIVE on {table}, and its rows"
        columns = ", ".join(f'"{target.get("name")}": "…"' for target in statement.get("target_list", []))
        fix = f'def move() -> None:\n    move_rows("{table}", forward={{{columns or "…"}}}, back={{…}})'
    judge.refuse(
        DataInStructure,
        None,
        f"{verb} in upgrade() works on the whole table in one transaction; write it in move()",
        lock=lock,
        fix=fix,
    )


def _create_table_as(judge: Judge, statement: Node) -> None:
    if statement.get("objtype") == "OBJECT_MATVIEW":
        judge.refuse(OtherObject, None, "a materialized view reads its tables while it is made; use a table")
    else:
        judge.refuse(BorrowedShape, None, "CREATE TABLE AS loads rows in one transaction; create the table, then move")


_HANDLERS: dict[str, Callable[[Judge, Node], None]] = {
    "AlterTableStmt": columns.alter_table,
    "CommentStmt": _comment,
    "CreateEnumStmt": _create_type,
    "CreateSchemaStmt": _create_schema,
    "CreateSeqStmt": _create_sequence,
    "CreateStmt": tables.create_table,
    "CreateTableAsStmt": _create_table_as,
    "DeleteStmt": _data,
    "GrantStmt": _grant,
    "IndexStmt": indexes.create_index,
    "InsertStmt": _data,
    "MergeStmt": _data,
    "SelectStmt": _data,
    "UpdateStmt": _data,
}


def _table(*rows: tuple[type[Rule], str, str]) -> dict[str, tuple[type[Rule], str]]:
    return {kind: (rule, why) for rule, why, kinds in rows for kind in kinds.split()}


_REFUSED = _table(
    (
        Destroys,
        "what is dropped is still read by the releases that run; leave it",
        """DropStmt DropRoleStmt DropdbStmt DropTableSpaceStmt DropOwnedStmt DropSubscriptionStmt DropUserMappingStmt
        TruncateStmt""",
    ),
    (
        Renames,
        "the old name is gone for running code; add the new one and move the rows",
        "RenameStmt AlterObjectSchemaStmt",
    ),
    (
        Opaque,
        "what this does is not in its text; write the plain statements",
        """DoStmt CallStmt ExecuteStmt PrepareStmt DeallocateStmt ExplainStmt CopyStmt LoadStmt DeclareCursorStmt
        FetchStmt ClosePortalStmt NotifyStmt ListenStmt UnlistenStmt SecLabelStmt""",
    ),
    (
        Session,
        "the session belongs to the runner; configure it under [session]",
        "VariableSetStmt VariableShowStmt DiscardStmt ConstraintsSetStmt AlterSystemStmt",
    ),
    (
        Transaction,
        "the transaction belongs to the runner: a step commits with its record; leave it out",
        "TransactionStmt",
    ),
    (Locks, "LOCK waits in everybody's way; the runner takes locks, with short timeouts", "LockStmt"),
    (
        Maintenance,
        "maintenance rewrites or blocks and is no part of a release; leave it to operations",
        "VacuumStmt ClusterStmt RepackStmt ReindexStmt RefreshMatViewStmt CheckPointStmt",
    ),
    (
        DatabaseCode,
        "code in the database changes what old statements do; let the application do it",
        """CreateFunctionStmt CreateTrigStmt RuleStmt CreatePolicyStmt CreateEventTrigStmt CreateCastStmt
        CreateOpClassStmt CreateOpFamilyStmt CreateConversionStmt CreateTransformStmt DefineStmt""",
    ),
    (
        OtherObject,
        "plans manage tables, columns, indexes, enums and sequences; set this up by hand",
        """ViewStmt CreateDomainStmt CreateExtensionStmt CreateStatsStmt CreatePublicationStmt CreatePLangStmt
        CreateSubscriptionStmt CreateFdwStmt CreateForeignServerStmt CreateForeignTableStmt CreateAmStmt
        CreateUserMappingStmt ImportForeignSchemaStmt CreateTableSpaceStmt CreatedbStmt CompositeTypeStmt
        CreateRangeStmt""",
    ),
    (
        Rights,
        "rights, roles and owners are no part of a release; use [session]",
        "CreateRoleStmt GrantRoleStmt ReassignOwnedStmt AlterOwnerStmt AlterDefaultPrivilegesStmt",
    ),
)

_LOCKS = {
    "TruncateStmt": "ACCESS EXCLUSIVE",
    "DropStmt": "ACCESS EXCLUSIVE",
    "RenameStmt": "ACCESS EXCLUSIVE",
    "AlterObjectSchemaStmt": "ACCESS EXCLUSIVE",
    "LockStmt": "ACCESS EXCLUSIVE unless it says otherwise",
    "CreateTrigStmt": "SHARE ROW EXCLUSIVE",
    "RuleStmt": "ACCESS EXCLUSIVE",
    "CreatePolicyStmt": "ACCESS EXCLUSIVE",
}
