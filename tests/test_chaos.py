"""
Shards that serve, and an operator who does anything at any moment; whenever he rests, everything is compared.

`SHARDMIG_CHAOS=100 pytest -m long -s tests/test_chaos.py` plays a hundred stories of seeds that nobody has seen;
`SHARDMIG_CHAOS_SEED=17` plays one again, though machines are not equally fast and it may end otherwise.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
from chaos.forking import Forker
from chaos.story import Chaos

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.long

STORIES = int(os.environ.get("SHARDMIG_CHAOS", "2"))
ACTS = int(os.environ.get("SHARDMIG_CHAOS_ACTS", "12"))
SEED = os.environ.get("SHARDMIG_CHAOS_SEED")


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with Forker(tmp_path_factory.mktemp("runs")) as one:
        yield one


@pytest.mark.timeout(240)
@pytest.mark.parametrize("story", range(1 if SEED else STORIES))
def test_whatever_an_operator_does_no_read_is_wrong_and_apply_finishes_it(
    forker: Forker, tmp_path: Path, story: int
) -> None:
    """Every second story has a standby, which takes over without the last commits."""
    seed = int(SEED) if SEED else 2 * random.randrange(10**6) + story % 2
    chaos = Chaos(forker, tmp_path, seed)
    try:
        chaos.play(ACTS)
    finally:
        print("", *chaos.timeline, *chaos.summary(), sep="\n")  # noqa: T201 - the seed, and all that is needed to see why

    assert [] == chaos.wrong
    assert chaos.transactions > 100
