"""Small guardians of the house: walls, names, help."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardmig

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(shardmig.__path__, "shardmig.")
    if not module.name.endswith("__main__")
)


def test_the_walls_stand() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, done.stdout


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_offers_in_order(name: str) -> None:
    path = importlib.util.find_spec(name).origin  # type: ignore[union-attr]
    assert path is not None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is"
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    if exported:
        names = exported[0]
        assert sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n)) == list(names) or sorted(
            names
        ) == list(names)
        defined = vars(importlib.import_module(name))
        assert [] == [n for n in names if n not in defined and not hasattr(importlib.import_module(name), n)]


def test_every_verb_has_help_and_a_line_in_the_docs() -> None:
    from typer.main import get_command  # noqa: PLC0415

    from shardmig.cli import app  # noqa: PLC0415 - needs the cli extra

    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        assert f"shardmig {name}" in text, name
        for parameter in command.params:
            assert getattr(parameter, "help", "x"), f"{name} {parameter.name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/**/test_*.py")), ids=lambda path: path.stem)
def test_cases_come_in_the_same_order_each_time(path: Path) -> None:
    """That of a set depends on the run: two processes that share the cases, or compare them, would disagree."""
    unordered = [
        f"line {call.lineno}"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize"
        if any(_is_set(part) for part in (*call.args[1:2], *_operands(call.args[1:2])))
    ]

    assert [] == unordered


def _operands(values: list[ast.expr]) -> list[ast.expr]:
    return [side for value in values if isinstance(value, ast.BinOp) for side in (value.left, value.right)]


def _is_set(node: ast.expr) -> bool:
    called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
    return isinstance(node, ast.Set | ast.SetComp) or called in {"set", "frozenset"}


def test_without_the_cli_extra_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom shardmig.__main__ import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert 1 == done.returncode
    assert "shardmig: the command line needs typer; install it: pip install 'shardmig[cli]'" == done.stderr.strip()
