"""The names that a script binds, in any scope, and what it binds them to; read from its tree, before it is judged."""

from __future__ import annotations

import ast

__all__ = ["Bindings"]


class Bindings:
    """
    What the names of a script stand for.

    Scopes are not told apart: whoever asks about a name gets every meaning that it has anywhere.

    Attributes:
        imported: name → dotted path of what is imported by it.
        imported_twice: statement, name and the two paths, where a name is imported as another thing, too.
        modules: paths that import statements name as modules.
        bound: name bound otherwise (assigned, a parameter, a function) → where first.
        texts: constant of the module that is a text, and never anything else → the text.
        created: tables that the script creates, as far as they are literals.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.imported: dict[str, str] = {}
        self.imported_twice: list[tuple[ast.AST, str, tuple[str, str]]] = []
        self.modules: set[str] = set()
        self.bound: dict[str, ast.AST] = {}
        self.texts: dict[str, str] = {}
        self.created: set[str] = set()
        self._again: set[str] = set()
        for node in ast.walk(tree):
            self._node(node)
        for statement in tree.body:
            self._constant(statement)

    def __contains__(self, name: object) -> bool:
        """Whether the script gives a name any meaning."""
        return name in self.bound or name in self.imported

    def _node(self, node: ast.AST) -> None:
        match node:
            case ast.Name(ctx=ast.Store(), id=name) | ast.arg(arg=name):
                self._binds(name, node)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                self._binds(name, node)
            case ast.Import(names=aliases):
                for alias in aliases:
                    self.modules.add(alias.name)
                    name = alias.asname or alias.name.partition(".")[0]
                    self._imports(name, alias.name if alias.asname else name, node)
            case ast.ImportFrom(module=module, names=aliases):
                self.modules.add(module or "")
                for alias in aliases:
                    self._imports(alias.asname or alias.name, f"{module or ''}.{alias.name}", node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="op"), attr="create_table"), args=[first, *_]):
                if isinstance(first, ast.Constant):
                    self.created.add(str(first.value))

    def _binds(self, name: str, node: ast.AST) -> None:
        if name in self.bound:
            self._again.add(name)
        self.bound.setdefault(name, node)

    def _imports(self, name: str, path: str, node: ast.AST) -> None:
        known = self.imported.setdefault(name, path)
        if known != path:
            self.imported_twice.append((node, name, (known, path)))

    def _constant(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text))):
                pass
            case _:
                return
        if name not in self._again and name not in self.imported:
            self.texts[name] = text
