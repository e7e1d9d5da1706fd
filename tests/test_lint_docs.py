"""The page about the linter: its code runs, its numbers and files are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from shardmig.config import Lint
from shardmig.lint.report import FORMATS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_the_python_blocks_run() -> None:
    (allowed, library) = blocks("python")
    compile(allowed, "docs/lint.md", "exec")

    exec(compile(library, "docs/lint.md", "exec"), {})  # noqa: S102 - the page's own example


def test_the_configuration_block_names_every_key() -> None:
    section = tomllib.loads(blocks("toml")[0])["lint"]

    assert set(section) == set(Lint.model_fields)
    Lint.model_validate(section)


def test_every_format_is_told() -> None:
    assert [form for form in FORMATS if f"-o {form}" not in PAGE] == []


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_ci_snippets_are_yaml(text: str) -> None:
    assert yaml.safe_load(text)


def test_the_hooks_and_the_action_are_what_their_programs_read() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    action = yaml.safe_load((ROOT / "action.yml").read_text())

    assert all({"id", "name", "entry", "language"} <= set(hook) for hook in hooks)
    [recommended] = [yaml.safe_load(text)[0]["hooks"] for text in blocks("yaml") if "rev:" in text]
    assert {"shardmig-lint", "shardmig-check"} == {hook["id"] for hook in recommended} & {hook["id"] for hook in hooks}
    assert not any("files" in hook for hook in hooks)  # migrations lie where Alembic has put them
    assert action["runs"]["using"] == "composite"
    assert {"diff", "app", "check", "requirements", "directory", "version"} == set(action["inputs"])
