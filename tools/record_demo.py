"""
Record the real demo as docs/images/demo.svg: `python tools/record_demo.py`.

Every moment becomes a terminal drawn by rich, and the moments play one after the other. Where nothing moves (printed,
or by a reader's wish) the last one is shown: the verdict.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from shardmig import local
from shardmig.demo.stage import Stage, verdict_tables
from shardmig.demo.story import FULL, Story, project

if TYPE_CHECKING:
    from rich.console import RenderableType

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "demo.svg"

_WIDTH = 104
_LOOK_S = 0.35  # of the story between two looks
_QUIET_LOOKS = 5  # a moment is taken when a runner is at work, or after so many looks
_MOMENTS = 24  # shown, of all
_SHOWN_S = 0.7  # of the picture
_LAST_S = 9.0


def _paper() -> Console:
    return Console(file=io.StringIO(), record=True, width=_WIDTH, color_system="truecolor")


@dataclass
class Recorder:
    """Moments of a demo; each is all that stood on the terminal."""

    console: Console = field(default_factory=_paper)
    moments: list[list[RenderableType]] = field(default_factory=list)

    def take(self, *below: RenderableType) -> None:
        """Keep what is there now, and what moves below it."""
        lines = self.console.export_text(clear=False, styles=True)
        self.moments.append([Text.from_ansi(lines.rstrip("\n")), *(_still(one) for one in below)])


def _still(moving: RenderableType) -> Text:
    """Draw a renderable as it is at this moment."""
    paper = _paper()
    paper.print(moving)
    return Text.from_ansi(paper.export_text(styles=True).rstrip("\n"))


async def _watched(story: Story, stage: Stage, recorder: Recorder) -> None:
    """Tell the story and take a moment now and then."""

    async def watch() -> None:
        for look in count(1):
            await asyncio.sleep(_LOOK_S)
            if look % _QUIET_LOOKS == 0 or any(page.doing for page in story.logbook.pages.values()):
                recorder.take(stage)

    watching = asyncio.create_task(watch())
    verdict = await story.tell()
    watching.cancel()
    for table in verdict_tables(verdict, stage.seconds):
        recorder.console.print(table)
    recorder.take()
    if not verdict.kept:
        sys.exit("a promise was broken: this is no picture to show")


def _height(moment: list[RenderableType]) -> int:
    return sum(len(one.plain.split("\n")) for one in moment if isinstance(one, Text))


def _drawn(moment: list[RenderableType], number: int, height: int) -> str:
    paper = _paper()
    for one in moment:
        paper.print(one)
    for _ in range(height - _height(moment)):
        paper.print()
    svg = paper.export_svg(title="shardmig demo", unique_id=f"m{number}")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # a picture may load nothing
    return re.sub(r"\n\s*", "\n", svg.replace("Fira Code", "ui-monospace, Menlo, Consolas"))


def picture(moments: list[list[RenderableType]]) -> str:
    """Put the moments one upon the other, each visible in its turn."""
    height = max(_height(moment) for moment in moments)
    drawn = [_drawn(moment, number, height) for number, moment in enumerate(moments)]
    found = re.search(r'viewBox="([^"]+)"', drawn[0])
    assert found is not None  # noqa: S101 - rich's SVG has one
    total_s = _SHOWN_S * (len(drawn) - 1) + _LAST_S
    share = 100 * _SHOWN_S / total_s
    last = len(drawn) - 1
    style = [
        f".m {{ visibility: hidden; animation: turn {total_s:.1f}s step-end infinite }}",
        f".last {{ visibility: visible; animation: stay {total_s:.1f}s step-end infinite }}",
        f"@keyframes turn {{ 0% {{ visibility: visible }} {share:.3f}% {{ visibility: hidden }} }}",
        f"@keyframes stay {{ 0% {{ visibility: hidden }} {share * last:.3f}% {{ visibility: visible }} }}",
        "@media (prefers-reduced-motion) { .m, .last { animation: none } }",
        *(f"#t{number} {{ animation-delay: {number * _SHOWN_S:.1f}s }}" for number in range(last)),
    ]
    groups = [
        f'<g class="last">{svg}</g>' if number == last else f'<g class="m" id="t{number}">{svg}</g>'
        for number, svg in enumerate(drawn)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{found[1]}" role="img" '
        f'aria-label="A recording of shardmig demo">\n<style>\n' + "\n".join(style) + "\n</style>\n"
        + "\n".join(groups) + "\n</svg>\n"
    )  # fmt: skip


def main() -> None:
    """Run the demo and draw it."""
    recorder = Recorder()
    stage = Stage(recorder.console)
    stage.act(f"{FULL.shards} PostgreSQL servers start, each one a shard")
    with local.cluster(FULL.shards) as servers:
        asyncio.run(_watched(Story(project(servers), FULL, stage), stage, recorder))
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    step = max(1, round(len(recorder.moments) / _MOMENTS))
    IMAGE.write_text(picture(recorder.moments[::-step][::-1]), encoding="utf-8")


if __name__ == "__main__":
    main()
