"""What a reader of a page does: run what is bash, write what is a file, compare what is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "Terminal", "blocks_of", "masked", "section_of"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is (or ""), and its text."""

    language: str
    file: str
    text: str


def section_of(page: str, title: str) -> str:
    """Return what stands under one heading of the second level."""
    return page.split(f"\n## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page or a section."""
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    return [Block(*one) for one in found]


class Terminal:
    """A shell in a directory, where `shardmig` and `python` are those of this test."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "COLUMNS": "200", **environment}

    def run(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert 0 == done.returncode, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def follow(self, found: list[Block]) -> None:
        """Do what a reader does: run what is bash, write what is a file, look whether the output is as printed."""
        said = ""
        for block in found:
            if block.file:
                path = self.home / block.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.language == "bash":
                said = self.run(block.text)
            elif block.language == "text":
                assert masked(block.text) == masked(said), said


def masked(text: str) -> list[str]:
    """Take seconds out of an output."""
    return [re.sub(r"\s+[\d.]+ s\b", " N s", line).rstrip() for line in text.strip().splitlines()]
