"""split the customer's name"""

import sqlalchemy as sa
from alembic import op

from shardmig.operations import move_rows

revision, down_revision = "0002_split_name", "0001_shop"
relax = ("full_name",)  # the newest release leaves it out, so its NOT NULL ends when the flag goes to DONE


def upgrade() -> None:
    op.add_column("customer", sa.Column("first_name", sa.Text))
    op.add_column("customer", sa.Column("last_name", sa.Text))


def move() -> None:
    move_rows(
        "customer",
        forward={
            "first_name": "split_part(full_name, ' ', 1)",
            "last_name": "CASE WHEN position(' ' in full_name) > 0"
            " THEN substr(full_name, position(' ' in full_name) + 1) END",
        },
        back={"full_name": "first_name || coalesce(' ' || last_name, '')"},
    )
