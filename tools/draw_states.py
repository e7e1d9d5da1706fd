"""
Draw the states of a flag as docs/images/states.svg, from the edges that the code obeys: `python tools/draw_states.py`.

A test compares the file with what this draws.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from shardmig.states import EDGES, State

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "states.svg"

_BOX = (150, 62)  # width and height of a state
_STEP = 318  # from one state to the next
_LEFT, _TOP = 16, 46
_LABEL_CHARACTERS = 24
_LINE = 14

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.name { font-size: 17px; font-weight: 700 }
.what { fill: #59636e }
rect { fill: #f6f8fa; stroke: #59636e; rx: 10 }
.LIVE { fill: #dafbe1; stroke: #1a7f37 }
.DUAL { fill: #fff8c5; stroke: #9a6700 }
.DONE { fill: #ddf4ff; stroke: #0969da }
path { stroke: #59636e; stroke-width: 1.5; fill: none; marker-end: url(#head) }
#head path { fill: #59636e; stroke: none; marker-end: none }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .what { fill: #9198a1 }
  rect { fill: #151b23 } .LIVE { fill: #12261e } .DUAL { fill: #272115 } .DONE { fill: #121d2f }
}"""


def drawing() -> str:
    """Return the picture."""
    width, height = 2 * _LEFT + 3 * _STEP + _BOX[0], 2 * _TOP + _BOX[1]
    edges = [edge for edge in EDGES if edge.has_move]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
        'role="img" aria-label="The states of a flag and the edges between them">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
        *(line for state in State for line in _state(state)),
        *(line for edge in edges for line in _edge(edge.source, edge.target, edge.when)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _x(state: State) -> int:
    return _LEFT + _STEP * int(state)


def _state(state: State) -> list[str]:
    middle = _x(state) + _BOX[0] // 2
    reads = "new" if state.reads_new else "old"
    writes = "both" if state.writes_old and state.writes_new else "new" if state.writes_new else "old"
    return [
        f'<rect class="{state.name}" x="{_x(state)}" y="{_TOP}" width="{_BOX[0]}" height="{_BOX[1]}"/>',
        f'<text class="name" x="{middle}" y="{_TOP + 27}">{state.name}</text>',
        f'<text class="what" x="{middle}" y="{_TOP + 47}">reads {reads}, writes {writes}</text>',
    ]


def _edge(source: State, target: State, when: str) -> list[str]:
    """Draw an edge: forward above the middle with its text above it, back below with its text below."""
    forward = target > source
    left, right = min(source, target), max(source, target)
    start, end = _x(left) + _BOX[0] + 5, _x(right) - 5
    y = _TOP + (20 if forward else 42)
    words = wrap(when, _LABEL_CHARACTERS)
    first = y - 9 - _LINE * (len(words) - 1) if forward else y + 19
    middle = (start + end) // 2
    return [
        f'<path d="M{start},{y} L{end},{y}"/>' if forward else f'<path d="M{end},{y} L{start},{y}"/>',
        *(f'<text x="{middle}" y="{first + _LINE * n}">{escape(line)}</text>' for n, line in enumerate(words)),
    ]


if __name__ == "__main__":
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    IMAGE.write_text(drawing(), encoding="utf-8")
