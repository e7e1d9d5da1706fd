"""give an order's address a table of its own"""

import sqlalchemy as sa
from alembic import op

from shardmig.operations import move_rows

revision, down_revision = "0003_order_address", "0002_split_name"


def upgrade() -> None:
    # No foreign key to orders: deleting an order stays as cheap as it was, and the move removes rows without one.
    op.create_table(
        "order_address",
        sa.Column("order_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("street", sa.Text),
        sa.Column("zip", sa.Text),
        sa.Column("city", sa.Text),
        comment="where an order goes",
    )


def move() -> None:
    move_rows(
        "orders",
        into="order_address",
        target_key={"order_id": "id"},
        forward={"street": "street", "zip": "zip", "city": "city"},
        back={"street": "street", "zip": "zip", "city": "city"},
    )
