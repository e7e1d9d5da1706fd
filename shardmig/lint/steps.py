"""A move as a step of a plan: rules beyond the closed world that make batches resumable, repeatable and fresh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardmig import sqltree
from shardmig.lint import functions
from shardmig.lint.expressions import BATCH_NUMBER
from shardmig.lint.judge import Judge, judge_text
from shardmig.lint.moves import move, purge, read
from shardmig.lint.rules import moves as rules
from shardmig.lint.scope import Scope, relation_name
from shardmig.plan import BATCH, Move
from shardmig.sqltree import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardmig.config import Lint
    from shardmig.lint.scope import New
    from shardmig.lint.violation import Violation

__all__ = ["judge_move"]

_MARKER = f"${BATCH_NUMBER}"  # as long as {batch}, so positions stay true
_LOCKING = frozenset({"LCS_FORSHARE", "LCS_FORNOKEYUPDATE", "LCS_FORUPDATE"})
_BY_THEMSELVES = functions.VOLATILE | functions.CLOCK | functions.SEQUENCE


def judge_move(step: Move, new: New, settings: Lint) -> Iterator[tuple[str, Violation]]:
    """
    Judge every text of a move.

    Args:
        step: the move.
        new: what the plan, and those it needs, add.
        settings: the configuration's section on linting.

    Yields:
        The part's name ("forward", "check", …) and a violation in it.
    """
    judged = _Step(step, new, settings)
    for part, text, judge_part in (
        ("forward", step.forward, judged.forward),
        ("check", step.check, judged.check),
        ("orphans", step.orphans, judged.orphans),
        ("purge", step.purge, judged.purge),
        ("back", step.back, judged.back),
        ("back_check", step.back_check, judged.check),
    ):
        if text is not None:
            for violation in judge_part(text):
                yield part, violation


class _Step:
    """The texts of one move against what the move declares."""

    def __init__(self, step: Move, new: New, settings: Lint) -> None:
        self.step = step
        self.new = new
        self.settings = settings
        self.home = settings.schemas[0] if settings.schemas else "public"
        self.table = self._name(step.table)
        self.target = self._name(step.target) if step.target is not None else self.table

    def _name(self, written: str) -> str:
        schema, _, name = written.rpartition(".")
        return relation_name(schema, name, home=self.home)

    def forward(self, text: str) -> list[Violation]:
        """Judge the text that writes new from old."""
        return self._judge(text, "move", self._forward)

    def back(self, text: str) -> list[Violation]:
        """Judge the text that writes old from new."""
        return self._judge(text, "reverse", self._back)

    def check(self, text: str) -> list[Violation]:
        """Judge a text that returns the keys of rows that disagree."""
        return self._judge(text, "read", self._check)

    def orphans(self, text: str) -> list[Violation]:
        """Judge the text that returns keys of target rows without a source."""
        return self._judge(text, "read", self._orphans)

    def purge(self, text: str) -> list[Violation]:
        """Judge the text that deletes those rows."""
        return self._judge(text, "purge", self._purge)

    def _judge(self, text: str, context: str, more: Callable[[Judge, Node], None]) -> list[Violation]:
        scope = Scope(
            context=context,  # type: ignore[arg-type]
            new=self.new,
            restores={self.table: self.step.restores} if context == "reverse" else {},
            settings=self.settings,
            step=True,
            touches=self.table if self.step.touch_source else None,
        )
        world = {"read": read, "purge": purge}.get(context, move)

        def judge_statement(judge: Judge, statement: Node) -> None:
            world(judge, statement)
            _batch(judge, statement, text)
            more(judge, statement)

        judge = judge_text(scope, text.replace(BATCH, _MARKER), judge_statement)
        return judge.found

    # ----------------------------------------------------------------------------------------------------------------
    # What each text must do

    def _forward(self, judge: Judge, statement: Node) -> None:
        if self.step.seed and statement.kind != "InsertStmt":
            judge.refuse(rules.MoveWrites, None, "a seed puts rows in: INSERT … SELECT … FROM (VALUES …) DO UPDATE")
        _row_by_row(judge, statement)
        self._locked_sources(judge, statement)
        for writing in _writing(statement):
            self._overwrites(judge, writing)
        if statement.kind not in ("InsertStmt", "UpdateStmt"):
            if statement.kind != "MergeStmt":  # which was refused already
                judge.refuse(rules.MoveWrites, None, "forward writes new from old: one UPDATE, or INSERT … DO UPDATE")
            return
        self._writes(judge, statement, self.target, self.step.writes, self.step.target_key)

    def _back(self, judge: Judge, statement: Node) -> None:
        _row_by_row(judge, statement)
        self._locked_sources(judge, statement)
        if statement.kind != "UpdateStmt":
            judge.refuse(rules.NotRestored, None, "back writes old from new: one UPDATE of the restored columns")
            return
        self._writes(judge, statement, self.table, self.step.restores, ())

    def _check(self, judge: Judge, statement: Node) -> None:
        self._returns(judge, statement, self.step.key)
        for node in sqltree.walk(statement):
            name = node.get("funcname", [""])[-1] if node.kind == "FuncCall" else ""
            clock = node.kind == "SQLValueFunction" and "TIME" in node.get("op", "") + "TIME" * (
                "DATE" in node.get("op", "")
            )
            if name in _BY_THEMSELVES or clock:
                judge.refuse(
                    rules.ChangesByItself,
                    node,
                    f"{f'{name}()' if name else 'the clock'} has another value at each look, so no row ever agrees; "
                    f"compute new from the row alone",
                )

    def _orphans(self, judge: Judge, statement: Node) -> None:
        if self.step.target is None:
            judge.refuse(rules.MoveWrites, None, "a move within one table has no orphans; leave orphans out")
        self._returns(judge, statement, self.step.target_key)

    def _purge(self, judge: Judge, statement: Node) -> None:
        if self.step.target is None and not self.step.seed:
            judge.refuse(rules.MoveWrites, None, "a move within one table has nothing to purge; leave purge out")
        if statement.kind == "DeleteStmt" and judge.scope.relation(statement.get("relation")) != self.target:
            judge.refuse(
                rules.MoveWrites, statement.get("relation"), f"purge deletes from {self.target} and nowhere else"
            )

    def _returns(self, judge: Judge, statement: Node, key: tuple[str, ...]) -> None:
        targets = statement.get("target_list", [])
        starred = any(node.kind == "A_Star" for node in sqltree.walk(targets))
        plain = statement.kind == "SelectStmt" and statement.get("op") == "SETOP_NONE"
        if plain and (starred or len(targets) != len(key)):
            judge.refuse(rules.MoveWrites, None, f"a check returns the key and nothing else: {', '.join(key)}")

    def _writes(
        self, judge: Judge, statement: Node, table: str, declared: tuple[str, ...], key: tuple[str, ...]
    ) -> None:
        """Refuse a statement that writes another table, or other columns, than the move declares."""
        rule = rules.NotRestored if judge.scope.context == "reverse" else rules.MoveWrites
        relation: Node = statement.get("relation")
        written = judge.scope.relation(relation)
        if written != table:
            judge.refuse(rule, relation, f"the statement writes {written}, but the move declares {table}; write that")
            return
        conflict: Node | None = statement.get("on_conflict_clause")
        assigned = {target.get("name", "") for target in (conflict or statement).get("target_list", [])}
        if statement.kind == "InsertStmt":
            inserted = {column.get("name", "") for column in statement.get("cols", [])}
            if not {*declared, *key} <= inserted:
                missing = ", ".join(sorted({*declared, *key} - inserted))
                judge.refuse(
                    rule, relation, f"INSERT does not name {missing}, which the move declares; name every column"
                )
        missing = ", ".join(sorted(set(declared) - assigned))
        if missing and (statement.kind == "UpdateStmt" or conflict is not None):
            judge.refuse(rule, relation, f"{missing} is declared as written, and the statement does not set it; set it")
        if surplus := ", ".join(sorted(assigned - set(declared))):
            judge.refuse(rule, relation, f"the statement sets {surplus}, which the move does not declare; declare it")

    def _overwrites(self, judge: Judge, statement: Node) -> None:
        """Refuse what leaves an old value in new, or builds on it."""
        written = set(self.step.writes)
        if statement.kind == "MergeStmt":
            judge.refuse(
                rules.KeepsOldValue,
                statement.get("relation"),
                "MERGE cannot lock its source, so a stale value wins; write INSERT … ON CONFLICT DO UPDATE",
            )
        if statement.kind == "UpdateStmt":
            _no_null_tests(judge, statement.get("where_clause"), written)
            self._own_writes(judge, statement, written)
        if statement.kind == "InsertStmt":
            _upsert(judge, statement, written)
            self._missing_only(judge, statement)

    def _own_writes(self, judge: Judge, statement: Node, written: set[str]) -> None:
        relation: Node = statement.get("relation")
        alias = relation.get("alias")
        names = {relation.get("relname") if alias is None else alias.get("aliasname")}
        if not statement.get("from_clause"):
            names.add("")
        for target in statement.get("target_list", []):
            for node in sqltree.walk(target.get("val")):
                if _column_of(node, names) in written:
                    judge.refuse(
                        rules.ReadsOwnWrites,
                        node,
                        f"the value depends on what {_column_of(node, names)} holds already, which may be dead; "
                        f"compute it from old alone",
                    )

    def _missing_only(self, judge: Judge, statement: Node) -> None:
        """Refuse to skip rows that the target has: they would keep what they hold."""
        for node in sqltree.walk(statement):
            reads_target = node.kind == "SubLink" and any(
                inner.kind == "RangeVar" and judge.scope.relation(inner) == self.target
                for inner in sqltree.walk(node.get("subselect"))
            )
            if reads_target:
                judge.refuse(
                    rules.KeepsOldValue,
                    node,
                    f"rows that {self.target} has already keep what they hold, which may be dead; overwrite them",
                )

    # ----------------------------------------------------------------------------------------------------------------
    # Fresh sources

    def _locked_sources(self, judge: Judge, statement: Node) -> None:
        """Refuse tables that are read without a lock while another is written."""
        commons = [common for common in _commons(statement) if common.get("ctequery").kind == "SelectStmt"]
        names = {common.get("ctename") for common in _commons(statement)}
        fine = {id(writing.get("relation")) for writing in _writing(statement)}
        for common in commons:
            if common.get("ctematerialized") == "CTEMaterializeAlways":
                inner: Node = common.get("ctequery")
                fine |= _locked_relations(inner)
                if self._keys_only(judge, inner):
                    fine |= {id(item) for item in inner.get("from_clause", [])}
        for node in sqltree.walk(statement):
            if node.kind == "LockingClause":
                fine |= {id(relation) for relation in node.get("locked_rels", [])}
                if node.get("wait_policy", "LockWaitBlock") != "LockWaitBlock":
                    judge.refuse(
                        rules.UnlockedSource,
                        statement,
                        "SKIP LOCKED leaves rows behind the cursor for good; wait for them",
                    )
        for node in sqltree.walk(statement):
            common_name = "schemaname" not in node.fields and node.get("relname") in names
            if node.kind == "RangeVar" and id(node) not in fine and not common_name:
                judge.refuse(
                    rules.UnlockedSource,
                    node,
                    f"{judge.scope.relation(node)} is read without a lock: a value that changes meanwhile is lost to a "
                    f"stale one; read it in WITH … AS MATERIALIZED (SELECT … FOR SHARE)",
                )

    def _keys_only(self, judge: Judge, query: Node) -> bool:
        """Whether a query reads nothing but the keys of the table that is written; they do not change."""
        items = query.get("from_clause", [])
        if len(items) != 1 or items[0].kind != "RangeVar" or judge.scope.relation(items[0]) != self.table:
            return False
        allowed = {*self.step.key, "ctid"}
        return all(
            target.get("val").kind == "ColumnRef" and target.get("val").get("fields", [""])[-1] in allowed
            for target in query.get("target_list", [])
        )


# --------------------------------------------------------------------------------------------------------------------
# Parts of statements


def _commons(statement: Node) -> list[Node]:
    clause: Node | None = statement.get("with_clause")
    return [] if clause is None else clause.get("ctes", [])


def _writing(statement: Node) -> list[Node]:
    """Return the statements that write: the data-modifying WITH queries and the statement itself."""
    inner = [common.get("ctequery") for common in _commons(statement)]
    return [
        node for node in [*inner, statement] if node.kind in ("InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt")
    ]


def _conditions(node: object) -> Iterator[Node]:
    """Yield the operands of a condition's AND."""
    if isinstance(node, Node) and node.kind == "BoolExpr" and node.get("boolop") == "AND_EXPR":
        for arg in node.get("args", []):
            yield from _conditions(arg)
    elif isinstance(node, Node):
        yield node


def _bounded(statement: Node) -> list[Node]:
    """Return the queries whose WHERE may hold {batch}: the statement and its plain WITH queries."""
    homes = [statement]
    if statement.kind == "InsertStmt" and "select_stmt" in statement.fields:
        homes = [statement.get("select_stmt")]
    return homes + [c.get("ctequery") for c in _commons(statement) if c.get("ctequery").kind == "SelectStmt"]


def _is_batch(node: Node) -> bool:
    return node.kind == "ParamRef" and node.get("number") == BATCH_NUMBER


def _batch(judge: Judge, statement: Node, text: str) -> None:
    """Refuse a text that does not hold {batch} exactly once where it bounds the rows."""
    count = text.count(BATCH)
    if count != 1:
        judge.refuse(
            rules.BatchToken,
            None,
            f"the statement holds {{batch}} {'no' if count == 0 else count} times, so no range of keys bounds "
            f"it; write it once, as WHERE {{batch}}",
        )
        return
    homes = [home for home in _bounded(statement) if any(map(_is_batch, _conditions(home.get("where_clause"))))]
    if not homes:
        judge.refuse(
            rules.BatchToken,
            text.index(BATCH),
            "{batch} bounds nothing here: it must be an AND operand of the outer WHERE or of the locked source SELECT",
        )


def _row_by_row(judge: Judge, statement: Node) -> None:
    """Refuse a batch whose rows depend on each other, for another batch holds the rest of them."""
    queries = [query for query in _bounded(statement) if query.kind == "SelectStmt"]
    for query in queries:
        for name in (
            "limit_count",
            "limit_offset",
            "distinct_clause",
            "group_clause",
            "having_clause",
            "window_clause",
        ):
            if name in query.fields:
                judge.refuse(
                    rules.NotRowByRow,
                    query,
                    f"{name.partition('_')[0].upper()} sees one batch only, and the rest of its rows are in another; "
                    f"write one row for each row",
                )
        if query.get("op", "SETOP_NONE") != "SETOP_NONE":
            judge.refuse(rules.NotRowByRow, query, "UNION and its kin read more than the batch; write one SELECT")
        for node in _outside_sub_selects(query.get("target_list", [])):
            name = node.get("funcname", [""])[-1] if node.kind == "FuncCall" else ""
            if name in functions.AGGREGATES or name in functions.WINDOWS or "over" in node.fields:
                judge.refuse(
                    rules.NotRowByRow, node, f"{name}() sees one batch only; aggregate in a sub-select of its own table"
                )


def _outside_sub_selects(value: object) -> Iterator[Node]:
    if isinstance(value, list):
        for item in value:
            yield from _outside_sub_selects(item)
    elif isinstance(value, Node) and value.kind != "SubLink":
        yield value
        for inner in value.fields.values():
            yield from _outside_sub_selects(inner)


def _column_of(node: Node, names: set[str]) -> str | None:
    """Return the column's name when a node is a column of one of these tables ("" for an unqualified one)."""
    if node.kind != "ColumnRef":
        return None
    fields = [part for part in node.get("fields", []) if isinstance(part, str)]
    qualifier = fields[-2] if len(fields) > 1 else ""
    return fields[-1] if fields and qualifier in names else None


def _no_null_tests(judge: Judge, where: object, written: set[str]) -> None:
    for condition in _conditions(where):
        for node in sqltree.walk(condition):
            column = node.get("arg") if node.kind == "NullTest" else None
            if isinstance(column, Node) and column.kind == "ColumnRef" and column.get("fields", [""])[-1] in written:
                judge.refuse(
                    rules.KeepsOldValue,
                    node,
                    f"rows where {column.get('fields')[-1]} is filled keep what they hold, which may be dead after the "
                    f"move was given up once; overwrite them",
                )


def _upsert(judge: Judge, statement: Node, written: set[str]) -> None:
    conflict: Node | None = statement.get("on_conflict_clause")
    if conflict is None:
        judge.refuse(
            rules.KeepsOldValue,
            statement.get("relation"),
            "a batch that runs again fails on its own rows; write ON CONFLICT (key) DO UPDATE SET …",
        )
    elif conflict.get("action") != "ONCONFLICT_UPDATE":
        judge.refuse(
            rules.KeepsOldValue,
            conflict,
            "DO NOTHING keeps what is there, which may be dead after the move was given up once; write DO UPDATE SET …",
        )
    else:
        _no_null_tests(judge, conflict.get("where_clause"), written)
        for target in conflict.get("target_list", []):
            for node in sqltree.walk(target.get("val")):
                fields = node.get("fields", []) if node.kind == "ColumnRef" else []
                if fields and fields[0] != "excluded" and fields[-1] in written:
                    judge.refuse(
                        rules.ReadsOwnWrites,
                        node,
                        f"the value depends on what {fields[-1]} holds already; write excluded.{fields[-1]}",
                    )


def _locked_relations(query: Node) -> set[int]:
    """Return the tables in a query's FROM that its FOR SHARE (or stronger) covers, by identity."""
    relations = [node for item in query.get("from_clause", []) for node in _joined(item)]
    covered: set[int] = set()
    for lock in query.get("locking_clause", []):
        if lock.get("strength") not in _LOCKING:
            continue
        named = {relation.get("relname") for relation in lock.get("locked_rels", [])}
        for relation in relations:
            alias = relation.get("alias")
            if not named or (relation.get("relname") if alias is None else alias.get("aliasname")) in named:
                covered.add(id(relation))
    return covered


def _joined(item: Node) -> Iterator[Node]:
    if item.kind == "RangeVar":
        yield item
    elif item.kind == "JoinExpr":
        yield from _joined(item.get("larg"))
        yield from _joined(item.get("rarg"))
