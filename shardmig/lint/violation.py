"""What a rule is, and what it says when a statement breaks it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import cleandoc
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import ast

__all__ = ["Rule", "Violation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """
    One place where something is not known to be additive.

    Attributes:
        code: the rule's code, "SM120".
        name: the rule's name, "not-null-without-default".
        message: the harm first, then the cure.
        warning: additive, but worth a look; never fails a run.
        ignorable: whether a comment with a reason may allow it.
        path: the script, or the SQL or Python file; None when only a text was judged.
        line: 1-based line in `path`; for a rendered statement the line of the call that made it.
        column: 1-based column in `path`; None when only the line is known.
        step: number of the plan's step; None outside a plan.
        part: which text of a move it is ("forward", "check", …); None for statements.
        sql: the whole SQL text; None for findings about a script.
        sql_line: 1-based line in `sql`.
        sql_column: 1-based column in `sql`.
        lock: the lock that the statement takes on something that exists.
        notices: what application code of today would notice.
        fix: what to write instead, ready to paste.
        allowed: the reason why it is allowed; None when it is not.
    """

    code: str
    name: str
    message: str
    warning: bool = False
    ignorable: bool = False
    path: str | None = None
    line: int | None = None
    column: int | None = None
    step: int | None = None
    part: str | None = None
    sql: str | None = None
    sql_line: int | None = None
    sql_column: int | None = None
    lock: str | None = None
    notices: str | None = None
    fix: str | None = None
    allowed: str | None = None

    @property
    def fails(self) -> bool:
        """Whether this keeps a plan from being accepted."""
        return not self.warning and self.allowed is None

    def __str__(self) -> str:
        """Return one line: where, code, message."""
        where = ":".join(str(part) for part in (self.path, self.line, self.column) if part is not None)
        step = "" if self.step is None else f"step {self.step}" + (f" {self.part}" if self.part else "") + ": "
        return f"{where}: {self.code} {step}{self.message}" if where else f"{self.code} {step}{self.message}"


class Rule:
    """
    One reason to refuse; subclasses say what, why, and what to write instead.

    The docstring's first line is what the rule does. `VALID` and `INVALID` are texts in the rule's `context`; the tests
    judge every one of them, and `shardmig rule CODE` shows them.

    Attributes:
        code: never used again for anything else.
        name: a few words with hyphens.
        notices: what application code of today would notice if it ran.
        fix: what to write instead when the place cannot say it better.
        ignorable: whether `# shardmig: allow CODE -- reason` may allow it; what is opaque or destructive never is.
        warning: reported, but no failure.
        context: how VALID and INVALID are judged: "structure", "move", "reverse", "plan", "script" or "application".
    """

    code: ClassVar[str]
    name: ClassVar[str]
    notices: ClassVar[str] = ""
    fix: ClassVar[str] = ""
    ignorable: ClassVar[bool] = False
    warning: ClassVar[bool] = False
    context: ClassVar[str] = "structure"
    VALID: ClassVar[tuple[str, ...]] = ()
    INVALID: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring."""
        return cleandoc(cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def at(cls, node: ast.AST, message: str, *, fix: str | None = None) -> Violation:
        """Say that a node of a script breaks this rule; message and fix as for `violation`."""
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1
        return replace(cls.violation(message, fix=fix), line=line, column=column)

    @classmethod
    def violation(
        cls, message: str, *, sql: str | None = None, offset: int = 0, lock: str | None = None, fix: str | None = None
    ) -> Violation:
        """
        Say that a text breaks this rule.

        Args:
            message: the harm, then the cure.
            sql: the whole text.
            offset: 0-based character in it.
            lock: lock taken on something that exists.
            fix: what to write instead, ready to paste; by default the rule's own.
        """
        line = column = None
        if sql is not None:
            before = sql[:offset]
            line = before.count("\n") + 1
            column = offset - (before.rfind("\n") + 1) + 1
        return Violation(
            code=cls.code,
            name=cls.name,
            message=message,
            warning=cls.warning,
            ignorable=cls.ignorable or cls.warning,
            sql=sql,
            sql_line=line,
            sql_column=column,
            lock=lock,
            notices=cls.notices or None,
            fix=fix or cls.fix or None,
        )
