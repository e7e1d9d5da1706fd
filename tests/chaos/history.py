"""What a story is about: scripts that are drawn, and what stands in a shard before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torture import ROWS

if TYPE_CHECKING:
    import random

__all__ = ["SEED", "STRUCTURE", "History"]

PAPERS = 30
_HEAD = "from alembic import op\nimport sqlalchemy as sa\nfrom shardmig.operations import move_rows\n\n"
_SHOP = """
revision, down_revision = "0001_shop", None


def upgrade() -> None:
    op.create_table("item", sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
                    sa.Column("word", sa.Text))
    op.create_table("orders", sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
                    sa.Column("street", sa.Text))
    op.create_table("paper", sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
                    sa.Column("a", sa.Text))
    for name in ("oracle_label", "oracle_address"):  # they stand in no other place, so that verify knows them
        op.create_table(name, sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
                        sa.Column("value", sa.Text))
"""
_LABEL = """
flag = "label"


def upgrade() -> None:
    op.add_column("item", sa.Column("label", sa.Text))
    op.add_column("paper", sa.Column("b", sa.Text))


def move() -> None:
    move_rows("item", forward={"label": "'new ' || word"}, back={"word": "substr(label, 5)"})
"""
_PAPER = """    move_rows("paper", forward={"b": "upper(a)"}, back={"a": "lower(b)"})
"""
_ADDRESS = """
flag = "address"


def upgrade() -> None:
    op.create_table("order_address", sa.Column("order_id", sa.BigInteger, primary_key=True, autoincrement=False),
                    sa.Column("line", sa.Text))


def move() -> None:
    move_rows("orders", into="order_address", target_key={"order_id": "id"}, forward={"line": "'new ' || street"},
              back={"street": "substr(line, 5)"}, touch_source=TOUCH)
"""
_NOTE = """
flag, needs = "note", ("label",)


def upgrade() -> None:
    op.add_column("item", sa.Column("note", sa.Text))
"""
_SERIAL = """
flag, protocol = "serial", "dual"


def upgrade() -> None:
    op.add_column("orders", sa.Column("serial", sa.BigInteger))
"""


SEED = f"""
INSERT INTO paper SELECT n, 'paper ' || n FROM generate_series(1, {PAPERS}) AS n;
INSERT INTO oracle_label SELECT n, CASE n % 2 WHEN 0 THEN 'w' || n END FROM generate_series(1, {ROWS}) AS n;
INSERT INTO oracle_address SELECT n, CASE n % 2 WHEN 0 THEN 's' || n END FROM generate_series(1, {ROWS}) AS n;
INSERT INTO item SELECT id, value FROM oracle_label WHERE value IS NOT NULL;
INSERT INTO orders SELECT id, value FROM oracle_address WHERE value IS NOT NULL;
"""

_INDEX = """
flag = "index"


def upgrade() -> None:
    op.create_index("item_word", "item", ["word"], postgresql_concurrently=True)
"""
_CLOSED = """
flag, online = "closed", False


def upgrade() -> None:
    op.create_table("closed", sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False))
    op.add_column("paper", sa.Column("c", sa.Text))
"""
_MORE = {"serial": _SERIAL, "note": _NOTE, "index": _INDEX, "closed": _CLOSED}


@dataclass
class History:
    """
    The scripts of one story.

    Attributes:
        scripts: their text by revision, in order.
        papers: the flag `label` has a second move, of a table whose rows nobody writes.
    """

    scripts: dict[str, str]
    papers: bool

    @classmethod
    def drawn(cls, dice: random.Random) -> History:
        """Choose what is migrated, and in which order."""
        papers, touch = dice.random() < 0.6, dice.random() < 0.5
        some = [("label", _LABEL + (_PAPER if papers else "")), ("address", _ADDRESS.replace("TOUCH", str(touch)))]
        some = [(name, text.replace("\n\n\n", "\nonline = False\n\n\n", 1) if dice.random() < 0.2 else text)
                for name, text in some]  # fmt: skip
        dice.shuffle(some)
        some += dice.sample(list(_MORE.items()), dice.choice([0, 1, 1, 2]))
        if dice.random() < 0.5:  # what needs nothing may come first
            some.sort(key=lambda one: one[0] in {"label", "address", "note"})
        scripts, parent = {"0001_shop": _HEAD + _SHOP}, "0001_shop"
        for number, (name, text) in enumerate(some, 2):
            revision = f"{number:04}_{name}"
            scripts[revision] = f'{_HEAD}revision, down_revision = "{revision}", "{parent}"\n{text}'
            parent = revision
        return cls(scripts, papers)

    @property
    def flags(self) -> list[str]:
        return [revision[5:] for revision in self.scripts]

    def of(self, flag: str) -> str:
        return next(revision for revision in self.scripts if revision.endswith(flag))


# What stands in the catalog when all statements of a revision are done, by its flag.
STRUCTURE = {
    "shop": ["item.word", "orders.street", "paper.a"],
    "label": ["item.label", "paper.b"],
    "address": ["order_address.line"],
    "note": ["item.note"],
    "serial": ["orders.serial"],
    "index": ["item_word"],
    "closed": ["closed.id", "paper.c"],
}
