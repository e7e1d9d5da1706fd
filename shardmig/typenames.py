"""Types of models as scripts may name them: SQLAlchemy's own, whatever the application wraps around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from alembic.autogenerate import render

from shardmig.errors import ScriptError
from shardmig.wording import DIALECT, sql_type

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from alembic.autogenerate.api import AutogenContext

__all__ = ["Unwritable", "enums_of", "renderer"]

_DEPTH = 10  # of types wrapped in types


class Unwritable(ScriptError):
    """A type has no name that a script may use."""


def enums_of(kind: sa.types.TypeEngine[Any]) -> list[sa.Enum]:
    """Return the enum types of the server that a type needs."""
    kind = _resolved(kind)
    if isinstance(kind, sa.ARRAY):
        return enums_of(kind.item_type)
    return [kind] if isinstance(kind, sa.Enum) and kind.native_enum else []


def renderer(
    imports: Sequence[str], *, plain_enums: bool = False
) -> Callable[[str, Any, AutogenContext], str | Literal[False]]:
    """
    Make Alembic's `render_item`.

    Args:
        imports: modules that scripts may import.
        plain_enums: render an enum that is a VARCHAR with a CHECK without its CHECK.
    """

    def item(kind: str, thing: Any, context: AutogenContext) -> str | Literal[False]:  # noqa: ANN401 - Alembic's
        if kind != "type":
            return False
        resolved = _resolved(thing)
        module = type(resolved).__module__
        if isinstance(resolved, sa.Enum) and resolved.native_enum:
            return _enum(resolved)
        if isinstance(resolved, sa.Enum) and plain_enums:
            return f"sa.String(length={resolved.length})"
        if module.startswith("sqlalchemy.") and not _foreign_dialect(module):
            return False if resolved is thing else str(render._repr_type(resolved, context))  # noqa: SLF001
        if any(module == name or module.startswith(f"{name}.") for name in imports):
            return f"{module}.{resolved!r}"
        raise Unwritable(_hint(resolved))

    return item


def _enum(enum: sa.Enum) -> str:
    """Render an enum whose type is created by a statement of its own."""
    labels = ", ".join(repr(label) for label in enum.enums)
    schema = f", schema={enum.schema!r}" if enum.schema else ""
    return f"sa.Enum({labels}, name={str(enum.name)!r}{schema}, create_type=False)"


def _resolved(kind: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    """Unwrap variants for PostgreSQL and the application's decorators."""
    for _ in range(_DEPTH):
        variant = kind._variant_mapping.get("postgresql")  # noqa: SLF001 - with_variant() has no reader
        if variant is not None:
            kind = variant
        elif isinstance(kind, sa.types.TypeDecorator) and not type(kind).__module__.startswith("sqlalchemy."):
            kind = kind.load_dialect_impl(DIALECT)
        elif kind._variant_mapping:  # noqa: SLF001 - of other databases
            kind = kind.copy()
            kind._variant_mapping = type(kind._variant_mapping)()  # noqa: SLF001
        else:
            break
    return kind


def _foreign_dialect(module: str) -> bool:
    return module.startswith("sqlalchemy.dialects.") and not module.startswith("sqlalchemy.dialects.postgresql")


def _hint(kind: sa.types.TypeEngine[Any]) -> str:
    module = type(kind).__module__
    try:
        sql = sql_type(kind)
    except Exception:  # noqa: BLE001 - a type of somebody else, which cannot even be written
        sql = type(kind).__name__
    return (
        f"The type {type(kind).__name__} of {module} ({sql}) has no name that scripts may use. If it is pure, say "
        f'imports = ["{module.partition(".")[0]}"] and known_types = ["{sql.partition("(")[0].lower()}"] under [lint], '
        "and have the type on every shard."
    )
