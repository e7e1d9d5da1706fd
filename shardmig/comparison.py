"""
One comparison of models with a shard, through Alembic; what it finds becomes additions or explanations.

Whether two types, defaults or rules are the same is asked of the server (`wording`), because Alembic compares texts,
and does not look at CHECKs, labels of enums, generated columns and exclusions at all.
"""

from __future__ import annotations

import ast
import warnings
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.operations import ops
from alembic.runtime.migration import MigrationContext

from shardmig import explanations as tell
from shardmig import typenames, wording
from shardmig.drafting import Addition, Explained, Variant, parsed, without, written
from shardmig.prerequisites import Prerequisites
from shardmig.references import References, blocks_delete, referred
from shardmig.successors import column_successors, table_successor
from shardmig.typenames import Unwritable, enums_of
from shardmig.wording import dotted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.sql.schema import Column

    from shardmig.wording import Key, Wording

__all__ = ["Comparison"]

_LEDGER = "shardmig"


class Comparison:
    """
    Compares models with what a connection shows.

    Args:
        connection: of the shard; everything done there is rolled back.
        models: the metadata.
        imports: modules that scripts may import for types.

    Attributes:
        additions: what a script could add, in the order it has to stand.
        explained: what no addition closes.
    """

    def __init__(self, connection: sa.Connection, models: Sequence[sa.MetaData], imports: Sequence[str] = ()) -> None:
        self.additions: list[Addition] = []
        self.explained: list[Explained] = []
        self._connection = connection
        self._models = models
        self._imports = imports
        self._tables: dict[Key, sa.Table] = {
            self._key(table.schema, table.name): table for metadata in models for table in metadata.tables.values()
        }
        self._schemas = {None, *(schema for schema, _ in self._tables)} - {_LEDGER}
        self._there = wording.relations(connection, self._schemas)
        self._worded: dict[Key, tuple[Wording, Wording]] = {}
        self._created: set[Key] = set()
        schemas = {name for name in self._schemas if name}
        self._prerequisites = Prerequisites(connection, models, schemas, self._key)
        self._references = References(self._tables, self._there, self._created, self._key)

    def run(self) -> None:
        """Compare; fills `additions` and `explained`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is looked at here, by the server's own words
            found = self._differences()
            for one in self._prerequisites:
                if isinstance(one, Addition):
                    self.additions.append(one)
                else:
                    self.explained.append(one)
            tables = [op for op in found if isinstance(op, ops.CreateTableOp)]
            for create in tables:
                self._add_table(create)
            self._gone_tables(found, tables)
            for change in found:
                if isinstance(change, ops.ModifyTableOps):
                    self._change_table(change)
            for key, table in self._tables.items():
                if key in self._there:
                    self._compare_rules(key, table)
        order = {"schema": 0, "type": 1, "sequence": 2, "table": 3}
        self.additions.sort(key=lambda addition: order.get(addition.title.partition(" ")[0], 4))

    def _differences(self) -> list[ops.MigrateOperation]:
        context = MigrationContext.configure(
            self._connection,
            opts={
                "compare_type": self._differs_in_type,
                "compare_server_default": True,
                "include_schemas": True,
                "include_name": self._includes,
            },
        )
        context.impl.compare_server_default = self._differs_in_default  # type: ignore[method-assign]
        self._context = context
        script = produce_migrations(context, list(self._models))  # type: ignore[arg-type]  # env.py may give several too
        return list(script.upgrade_ops.ops) if script.upgrade_ops else []

    def _includes(self, name: str | None, kind: str, parents: Any) -> bool:  # noqa: ANN401 - Alembic's
        if kind == "schema":
            return name in self._schemas
        if kind != "table" or name is None:
            return True
        relation = self._there.get(self._key(parents.get("schema_name"), name))
        return name != "alembic_version" and not (relation and (relation.partition or relation.owned))

    def _key(self, schema: str | None, name: str) -> Key:
        return (None if schema == self._connection.dialect.default_schema_name else schema, str(name))

    # ----------------------------------------------------------------------------------------------------------------
    # In the server's words

    def _words(self, key: Key) -> tuple[Wording, Wording]:
        """Return how the server words a table: the one that is there, and what the models say of it."""
        if key not in self._worded:
            there = wording.existing(self._connection, self._there[key].oid)
            model = wording.of_model(self._connection, self._tables[key], there.columns)
            self._worded[key] = there, model
        return self._worded[key]

    def _differs_in_type(
        self, _context: object, _there: object, column: Column[Any], _type: object, _model_type: object
    ) -> bool:
        there, model = self._words(self._key(column.table.schema, column.table.name))
        if column.name not in model.columns:
            return wording.sql_type(column.type).lower() != there.columns[column.name].type
        return model.columns[column.name].type != there.columns[column.name].type

    def _differs_in_default(
        self, _there: object, column: Column[Any], model_text: str | None, there_text: str | None
    ) -> bool:
        there, model = self._words(self._key(column.table.schema, column.table.name))
        if column.name not in model.columns:
            return model_text != there_text
        old, new = there.columns[column.name], model.columns[column.name]
        if column is column.table.autoincrement_column and (old.identity or old.default):
            return False  # both number their rows
        if isinstance(column.server_default, sa.FetchedValue) and not column.server_default.has_argument:
            return False  # "the server has a default", whatever it is
        return old.default != new.default and not old.identity and not new.identity

    def _add(
        self, title: str, source: str, *simpler: Variant, alone: bool = False, needs: tuple[str, ...] = ()
    ) -> None:
        self.additions.append(Addition(title, (Variant(source), *simpler), alone=alone, needs=needs))

    def _source(self, operation: ops.MigrateOperation, *, plain_enums: bool = False) -> str:
        """Render one operation as Alembic does, types as scripts may name them."""
        text = render_python_code(
            ops.UpgradeOps([operation]),
            render_item=typenames.renderer(self._imports, plain_enums=plain_enums),
            migration_context=self._context,
        )
        lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
        return written(parsed("\n".join(lines)))

    # ----------------------------------------------------------------------------------------------------------------
    # Tables

    def _add_table(self, create: ops.CreateTableOp) -> None:
        key = self._key(create.schema, create.table_name)
        table = self._tables[key]
        title = f"table {dotted(key)}"
        try:
            source = self._source(create)
        except Unwritable as error:
            self.explained.append(tell.other(f"{title} is left out", str(error)))
            return
        lost, kept = self._references.sorted_out(key, table)
        lost_columns = [columns for columns, _ in lost]
        full = without(source, lambda part: _is_foreign_key(part, lost_columns))
        plain = without(source, lambda part: _is_foreign_key(part, None))
        told = tuple(explained for _, explained in lost)
        variants = [Variant(full, told)]
        if kept:
            more = [blocks_delete(dotted(key), fk) for fk in kept]
            variants.append(Variant(plain, (*told, *more)))
        needs = self._prerequisites.schema_of(key) + tuple(
            f"table {dotted(target)}"
            for fk in kept
            if (target := self._key(*referred(fk))) in self._created and target != key
        )
        self.additions.append(Addition(title, tuple(variants), needs=needs))
        self._created.add(key)

    def _gone_tables(self, found: list[ops.MigrateOperation], created: list[ops.CreateTableOp]) -> None:
        keys = [self._key(create.schema, create.table_name) for create in created]
        tables = {dotted(key): self._tables[key] for key in keys}
        for drop in (op for op in found if isinstance(op, ops.DropTableOp)):
            key = self._key(drop.schema, drop.table_name)
            old = wording.existing(self._connection, self._there[key].oid)
            self.explained.append(tell.gone_table(dotted(key), table_successor(old, tables)))

    # ----------------------------------------------------------------------------------------------------------------
    # What changed in tables that are there

    def _change_table(self, change: ops.ModifyTableOps) -> None:
        key = self._key(change.schema, change.table_name)
        if key in self._created:
            for op in change.ops:
                if isinstance(op, ops.CreateIndexOp):
                    self._add(f"index {op.index_name}", self._source(op), needs=(f"table {dotted(key)}",))
            return
        if key not in self._there or key not in self._tables:
            return  # gone with its table, or left out with it
        added = [op for op in change.ops if isinstance(op, ops.AddColumnOp)]
        names = {op.column.name for op in added}
        fresh = wording.of_model(self._connection, self._tables[key], names).columns if added else {}
        for column in added:
            self._add_column(key, column, fresh.get(column.column.name))
        gone = [op.column_name for op in change.ops if isinstance(op, ops.DropColumnOp)]
        successors = column_successors(gone, self._words(key)[0].columns, fresh)
        for op in change.ops:
            if isinstance(op, ops.DropColumnOp):
                self._gone_column(key, op.column_name, successors.get(op.column_name))
            elif not isinstance(op, ops.AddColumnOp):
                self._change(key, op, change)

    def _change(self, key: Key, op: ops.MigrateOperation, change: ops.ModifyTableOps) -> None:
        """Add or explain one difference in a table that is there, new columns and gone ones aside."""
        match op:
            case ops.AlterColumnOp():
                self._alter_column(key, op)
            case ops.CreateIndexOp():
                dropped = [str(other.index_name) for other in change.ops if isinstance(other, ops.DropIndexOp)]
                self._add_index(key, op, dropped)
            case ops.DropIndexOp():
                created = [other.index_name for other in change.ops if isinstance(other, ops.CreateIndexOp)]
                if op.index_name not in created:
                    self.explained.append(tell.gone("index", str(op.index_name)))
            case ops.CreateTableCommentOp():
                self._add(f"comment on {dotted(key)}", without(self._source(op), _is_existing))
            case _:
                self.explained.append(_constraint(dotted(key), op))

    def _add_column(self, key: Key, op: ops.AddColumnOp, worded: wording.Column | None) -> None:
        column = op.column
        table, name = dotted(key), column.name
        title = f"column {table}.{name}"
        try:
            source = self._source(op)
        except Unwritable as error:
            self.explained.append(tell.other(f"{title} is left out", str(error)))
            return
        not_null = () if column.nullable else (tell.lost_not_null(table, name),)
        generated = isinstance(column.server_default, sa.Computed)
        simpler = [] if column.nullable else [Variant(without(source, _is_nullable), not_null)]
        if generated or isinstance(column.server_default, sa.Identity):
            expression = str(column.server_default.sqltext) if isinstance(column.server_default, sa.Computed) else None
            what = "generated" if generated else "an identity column"
            explained = tell.plain_instead(table, name, what, expression)
            simpler = [Variant(without(source, _is_generated), (explained,))]
        elif column.server_default is not None:
            explained = tell.lost_default(table, name, (worded and worded.default) or _default_text(column))
            plain = without(source, lambda part: _is_nullable(part) or _is_default(part))
            simpler.append(Variant(plain, (explained, *not_null)))
        if isinstance(column.type, sa.Enum) and not enums_of(column.type):  # its CHECK is explained with the rules
            simpler.append(Variant(without(self._source(op, plain_enums=True), _is_nullable), not_null))
        self._add(title, source, *simpler, alone=True)

    def _alter_column(self, key: Key, op: ops.AlterColumnOp) -> None:
        table, name = dotted(key), op.column_name
        there, model = self._words(key)
        old = there.columns[name]
        new = model.columns.get(name)
        if op.modify_type is not None:
            kind = new.type if new else wording.sql_type(op.modify_type)
            self.explained.append(tell.changed_type(table, name, kind, old.type))
        if op.modify_nullable is not None and not (new and new.identity != old.identity):
            self.explained.append(tell.changed_nullable(table, name, nullable=op.modify_nullable))
        if op.modify_server_default is not False and new and not (new.identity or old.identity):
            self.explained.append(tell.changed_default(table, name, new.default, old.default))
        elif op.modify_server_default is not False and new and new.identity and old.identity:
            title = f"column {table}.{name} has another identity in the models"
            self.explained.append(tell.other(title, "Its numbers go on as they are; an identity is never altered."))
        if op.modify_comment:
            comment = ast.unparse(ast.Constant(str(op.modify_comment)))
            schema = f", schema={key[0]!r}" if key[0] else ""
            source = written(parsed(f"op.alter_column({key[1]!r}, {name!r}, comment={comment}{schema})"))
            self._add(f"comment on {table}.{name}", source)
        elif op.modify_comment is None:
            self.explained.append(tell.gone("comment", f"on {table}.{name}"))

    def _add_index(self, key: Key, op: ops.CreateIndexOp, dropped: list[str]) -> None:
        name = str(op.index_name)
        if name in dropped:
            self.explained.append(tell.changed_index(name))
        elif op.unique:
            self.explained.append(tell.new_constraint("unique index", name, dotted(key)))
        elif self._there[key].partitioned:
            why = (
                "CREATE INDEX CONCURRENTLY does not work on a partitioned table, and without it every write waits. "
                "Build it on each partition concurrently, by hand."
            )
            self.explained.append(tell.other(f"index {name} is only in the models", why))
        else:
            op.kw["postgresql_concurrently"] = True
            columns = [part if isinstance(part, str) else getattr(part, "name", "") for part in op.columns]
            titles = {addition.title for addition in self.additions}
            needs = tuple(title for c in columns if (title := f"column {dotted(key)}.{c}") in titles)
            self._add(f"index {name}", self._source(op), needs=needs)

    def _gone_column(self, key: Key, name: str, successor: tuple[str, str, str] | None) -> None:
        old = self._words(key)[0].columns[name]
        mandatory = old.not_null and old.default is None and not old.identity and old.computed is None
        self.explained.append(tell.gone_column(dotted(key), name, mandatory=mandatory, successor=successor))

    def _compare_rules(self, key: Key, table: sa.Table) -> None:
        """Compare what Alembic does not: CHECKs, exclusions, generated columns, primary keys."""
        there, model = self._words(key)
        name = dotted(key)
        for rule, definition in model.rules.items():
            if definition not in there.rules.values():
                self.explained.append(tell.new_constraint("constraint", f"{rule} on {name}: {definition}", name))
        for rule, definition in there.rules.items():
            if definition not in model.rules.values() and not model.refused:
                self.explained.append(tell.gone("constraint", f"{rule} on {name}: {definition}"))
        if any(not columns <= set(there.columns) for _, _, columns in wording.rules(table)):
            whole = wording.of_model(self._connection, table, {column.name for column in table.columns})
            for rule, definition in whole.rules.items():
                if definition not in model.rules.values():
                    self.explained.append(tell.new_constraint("constraint", f"{rule} on {name}: {definition}", name))
        for column, new in model.columns.items():
            self._compare_generated(name, column, new, there.columns[column])
        key_columns = tuple(column.name for column in table.primary_key.columns)
        if key_columns != there.primary_key and key_columns:
            self.explained.append(tell.new_constraint("primary key", f"{name} ({', '.join(key_columns)})", name))

    def _compare_generated(self, table: str, column: str, new: wording.Column, old: wording.Column) -> None:
        if new.computed != old.computed:
            if new.computed and not old.computed:
                self.explained.append(tell.plain_instead(table, column, "generated", new.computed[:-2]))
            else:
                title = f"column {table}.{column} is generated otherwise on the shards"
                why = "What it computes never changes while it is used; add a column beside it and move the rows."
                self.explained.append(tell.other(title, why))
        if new.identity and not old.identity and not old.default:
            self.explained.append(tell.plain_instead(table, column, "an identity column"))


# --------------------------------------------------------------------------------------------------------------------


def _constraint(table: str, op: ops.MigrateOperation) -> Explained:
    match op:
        case ops.CreateForeignKeyOp():
            columns = ", ".join(op.local_cols)
            name = f"{table} ({columns}) to {op.referent_table} ({', '.join(op.remote_cols)})"
            return tell.new_constraint("foreign key", name, table)
        case ops.CreateUniqueConstraintOp():
            columns = ", ".join(str(getattr(column, "name", column)) for column in op.columns)
            return tell.new_constraint("unique constraint", f"{table} ({columns})", table)
        case ops.DropConstraintOp():
            return tell.gone("constraint", f"{op.constraint_name} on {table}")
        case ops.DropTableCommentOp():
            return tell.gone("comment", f"on {table}")
        case _:
            return tell.other(f"{type(op).__name__} on {table}", "This difference has no addition that closes it.")


def _default_text(column: sa.Column[Any]) -> str:
    text = str(wording.compiler(column.table).get_column_default_string(column) or "")
    return text.strip()


def _is_foreign_key(part: ast.AST, columns: list[list[str]] | None) -> bool:
    """Whether an argument is a foreign key; of these columns, or of any."""
    match part:
        case ast.Call(func=ast.Attribute(attr="ForeignKeyConstraint"), args=[ast.List(elts=names), *_]):
            return columns is None or [getattr(name, "value", "") for name in names] in columns
    return False


def _is_nullable(part: ast.AST) -> bool:
    return isinstance(part, ast.keyword) and part.arg == "nullable"


def _is_default(part: ast.AST) -> bool:
    return isinstance(part, ast.keyword) and part.arg == "server_default"


def _is_existing(part: ast.AST) -> bool:
    return isinstance(part, ast.keyword) and str(part.arg).startswith("existing_")


def _is_generated(part: ast.AST) -> bool:
    match part:
        case ast.Call(func=ast.Attribute(attr="Computed" | "Identity")):
            return True
    return _is_nullable(part)
