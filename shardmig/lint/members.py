"""
What a script may take of a module and of a value: a closed world, by name.

A list of modules alone is no wall: `uuid.os.system(…)` reaches everything that a pure module happens to import, and
`generator.gi_frame.f_builtins` what Python itself is made of. So of each module a list says which members it has,
and of values, whose type nobody can know from the text, one list for all of them. Between them no way leads to a
module, a frame or a function's globals.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from shardmig.lint import names

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["VALUE_MEMBERS", "Modules", "clock"]

_FUNC = "func"  # of SQLAlchemy: whatever is taken of it is the call of a SQL function with that name

_BUILTIN_KINDS = (bool, bytes, dict, float, frozenset, int, list, range, set, slice, str, tuple)

VALUE_MEMBERS = (
    frozenset(name for kind in _BUILTIN_KINDS for name in dir(kind) if not name.startswith("_"))
    # "{0.x}".format(y) takes attributes that no tree shows; `script` knows of which texts it may be called.
    - {"format", "format_map"}
) | names.VALUE_MEMBERS
"""What may be taken of a value: methods of plain data, of dates and numbers, and of SQLAlchemy's expressions."""


class Modules:
    """
    The modules that scripts know, by dotted path.

    Args:
        extra: modules that the configuration adds; they are trusted with what they define, not with what they import.
        imported: paths that the script imports as modules, hence are some.
    """

    def __init__(self, extra: Collection[str], imported: Collection[str]) -> None:
        self._extra = frozenset(extra)
        self._imported = {above for path in imported if self.configured(path) for above in _upwards(path)}

    def configured(self, path: str) -> bool:
        """Whether a module is the configuration's, or lies in one that is."""
        return any(above in self._extra for above in _upwards(path))

    def known(self, path: str) -> bool:
        """Whether a path is that of a module, or of a package on the way to one."""
        return path in _PACKAGES or path in self._extra or path in self._imported

    def may_import(self, path: str) -> bool:
        """Whether `import path` is harmless."""
        return path in names.MEMBERS or self.configured(path)

    def has(self, module: str, name: str) -> bool:
        """Whether a module is known to have this member, and it reaches nothing else."""
        if name.startswith("_"):
            return False
        path = f"{module}.{name}"
        if self.known(path) or name in names.MEMBERS.get(module, ()):
            return True
        return self.configured(module) and name not in sys.stdlib_module_names

    def functions(self, path: str) -> bool:
        """Whether a path is SQLAlchemy's `func`, or goes on from it."""
        return any(path == root or path.startswith(f"{root}.") for root in _FUNCTIONS)


def clock(module: str, name: str) -> bool:
    """Whether a member gives another value at each rendering."""
    return name in names.CLOCKS and module.partition(".")[0] in ("datetime", "uuid")


def _upwards(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


_PACKAGES = frozenset(above for module in names.MEMBERS for above in _upwards(module))
_FUNCTIONS = frozenset(f"{module}.{_FUNC}" for module in names.SQLALCHEMY_MODULES)
