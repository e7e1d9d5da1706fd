"""
The SQL parser behind a thin wall: PostgreSQL's own grammar as plain Python trees.

Only this module imports the binding (postgast, the PostgreSQL 18 grammar), and only when something is parsed. A tree
is made of `Node`s whose fields are what the parser has set: an absent field has its default, so code that knows every
field it accepts (`Node.fields`) is a closed world by construction.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardmig.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Node", "SqlError", "Token", "fingerprint", "parse", "tokens", "walk"]


_PLACES = frozenset({"location", "list_start", "list_end", "rexpr_list_start", "rexpr_list_end"})


class SqlError(ValueError):
    """
    A text that PostgreSQL's grammar does not take.

    Attributes:
        message: what the parser says.
        offset: 0-based character where it says so; None when unknown.
        too_deep: the text may be SQL, but is nested deeper than the parser hands out.
    """

    def __init__(self, message: str, *, offset: int | None = None, too_deep: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset
        self.too_deep = too_deep


class Node:
    """
    One node of a tree.

    Attributes:
        kind: name of the parse node, such as "AlterTableStmt".
        fields: what is set, by name. Values are nodes, lists, str, int and bool; enumerations are their names; a
            string node is a str, an integer node an int, an empty list item None.
    """

    __slots__ = ("fields", "kind")

    def __init__(self, kind: str, fields: dict[str, Any]) -> None:
        self.kind = kind
        self.fields = fields

    def __repr__(self) -> str:
        """Show kind and fields, for tests and debugging."""
        return f"{self.kind}({', '.join(f'{k}={v!r}' for k, v in self.fields.items())})"

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - a field holds what the grammar puts there
        """Return a field, or its default when it is not set."""
        return self.fields.get(name, default)

    @property
    def offset(self) -> int:
        """Byte offset of the node in its text; 0 when the grammar keeps none."""
        location: int = self.fields.get("location", 0)
        return max(location, 0)


@dataclass(frozen=True, slots=True)
class Token:
    """
    One lexical token.

    Attributes:
        kind: the lexer's name of it: "IDENT", "UIDENT", "SCONST", "USCONST", "SQL_COMMENT", "C_COMMENT", …
        text: as written, quotes included.
        offset: 0-based character at which it begins.
    """

    kind: str
    text: str
    offset: int


@functools.lru_cache(maxsize=256)  # a plan looks at each of its statements a few times
def parse(sql: str) -> list[Node]:
    """
    Parse a text into its statements; treat the tree as read-only, it is kept.

    Raises:
        SqlError: not SQL, or nested too deeply, or not encodable.
    """
    binding = _binding()
    try:
        result = binding.parse(sql)
    except binding.PgQueryError as error:
        raise SqlError(error.message, offset=error.cursorpos - 1 if error.cursorpos > 0 else None) from None
    except UnicodeEncodeError as error:
        raise SqlError("the text holds a lone surrogate", offset=error.start) from None
    except binding.DecodeError:
        raise SqlError("nested too deeply", too_deep=True) from None
    return [_message(raw.stmt) for raw in result.stmts]


def tokens(sql: str) -> list[Token]:
    """
    Split a text into tokens, comments included.

    Raises:
        SqlError: the lexer does not get through it.
    """
    binding = _binding()
    try:
        encoded = sql.encode()
        found = binding.scan(sql).tokens
    except binding.PgQueryError as error:
        raise SqlError(error.message, offset=error.cursorpos - 1 if error.cursorpos > 0 else None) from None
    except UnicodeEncodeError as error:
        raise SqlError("the text holds a lone surrogate", offset=error.start) from None
    names = binding.token_names
    return [
        Token(
            names.get(token.token, f"ASCII_{token.token}"),  # of "{", say, which no grammar rule names
            encoded[token.start : token.end].decode(),
            token.start if len(encoded) == len(sql) else len(encoded[: token.start].decode()),
        )
        for token in found
    ]


def fingerprint(sql: str) -> str:
    """
    Return a value that two texts share only if they mean the same: layout and comments do not count, literals do.

    Raises:
        SqlError: not SQL.
    """
    return hashlib.sha256(repr([_plain(statement) for statement in parse(sql)]).encode()).hexdigest()


def _plain(value: object) -> object:
    """Return a tree without places, in one spelling."""
    if isinstance(value, Node):
        inner = [(name, _plain(field)) for name, field in sorted(value.fields.items()) if name not in _PLACES]
        return (value.kind, inner)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def walk(value: object) -> Iterator[Node]:
    """Yield every node below a value, parents first, in the order of the text where the grammar keeps it."""
    if isinstance(value, Node):
        yield value
        for inner in value.fields.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


# --------------------------------------------------------------------------------------------------------------------
# The binding


class _Binding:
    """What is used of postgast, imported once and late: it costs an application's image 15 MB and 40 ms."""

    def __init__(self) -> None:
        try:
            import postgast  # noqa: PLC0415 - only who lints pays for it
            from google.protobuf.message import DecodeError  # noqa: PLC0415 - as above
            from postgast import pg_query_pb2  # noqa: PLC0415 - as above
        except ImportError as error:
            raise ConfigError('linting needs the SQL parser; run: pip install "shardmig[cli]"') from error

        self.parse: Callable[[str], Any] = postgast.parse
        self.scan: Callable[[str], Any] = postgast.scan
        self.PgQueryError: type[Any] = postgast.PgQueryError
        self.DecodeError: type[Exception] = DecodeError
        self.token_names: dict[int, str] = {
            number: value.name for number, value in pg_query_pb2.Token.DESCRIPTOR.values_by_number.items()
        }


@functools.cache
def _binding() -> _Binding:
    return _Binding()


def _message(message: Any) -> Any:  # noqa: ANN401 - protobuf messages are untyped
    """
    Turn a message into a node, a string, a number or None.

    A `Node` of the wire format is a union and disappears; so do the wrappers of strings and numbers.
    """
    descriptor = message.DESCRIPTOR
    shape = _shapes.get(descriptor.name) or _shape(descriptor)
    fields = message.ListFields()
    if shape.union:
        return _message(fields[0][1]) if fields else None
    if shape.scalar is not None:
        return fields[0][1] if fields else shape.scalar
    node: dict[str, Any] = {}
    known = shape.fields
    for field, value in fields:
        name, convert = known[field.number]
        node[name] = value if convert is None else convert(value)
    if shape.is_list:
        return node.get("items", [])
    return Node(shape.name, node)


class _Shape:
    """How messages of one type are turned into nodes: worked out once, used for every message."""

    __slots__ = ("fields", "is_list", "name", "scalar", "union")

    def __init__(self, descriptor: Any) -> None:  # noqa: ANN401 - as above
        self.name: str = descriptor.name
        self.union = self.name == "Node"
        self.is_list = self.name in ("List", "IntList", "OidList")
        self.scalar = _SCALARS.get(self.name)
        self.fields: dict[int, tuple[str, Callable[[Any], Any] | None]] = {
            field.number: (field.name, _converter(field)) for field in descriptor.fields
        }


_SCALARS: dict[str, str | int | bool] = {"String": "", "Integer": 0, "Boolean": False}
_shapes: dict[str, _Shape] = {}


def _shape(descriptor: Any) -> _Shape:  # noqa: ANN401 - as above
    return _shapes.setdefault(descriptor.name, _Shape(descriptor))


def _converter(field: Any) -> Callable[[Any], Any] | None:  # noqa: ANN401 - as above
    if field.message_type is not None:
        return (lambda values: [_message(v) for v in values]) if field.is_repeated else _message
    if field.enum_type is not None:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        return lambda value: names[value] if value in names else str(value)
    return None
