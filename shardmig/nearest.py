"""The name that a misspelt one may mean, said where it is refused."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, known: Iterable[str]) -> str:
    """Ask whether the likeliest of the known names is meant: words to put behind a message; none where none is like."""
    near = get_close_matches(name, sorted(known), n=1, cutoff=0.7)  # full_name is not meant by last_name
    return f"; did you mean {near[0]}?" if near else ""
