"""the shop: customers and their orders"""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001_shop", None


def upgrade() -> None:
    op.create_table(
        "customer",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("full_name", sa.Text, nullable=False),
        sa.Column("email", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        comment="who buys",
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("customer_id", sa.BigInteger, sa.ForeignKey("customer.id"), nullable=False),
        sa.Column("amount", sa.Numeric(12, 2), nullable=False),
        sa.Column("street", sa.Text),
        sa.Column("zip", sa.Text),
        sa.Column("city", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
        comment="what they buy, and where it goes",
    )
    op.create_index("orders_customer_id", "orders", ["customer_id"])
