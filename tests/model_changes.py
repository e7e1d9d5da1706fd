"""Forty-odd changes that people make to models, and what autogenerate writes and explains for each."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CASES", "Case", "shop", "table"]


class Color(enum.Enum):
    RED = "RED"
    BLUE = "BLUE"


class Money(sa.types.TypeDecorator[Any]):
    """An application's own type around one of SQLAlchemy's."""

    impl = sa.Numeric(14, 4)
    cache_ok = True


class Point3(sa.types.UserDefinedType[Any]):
    """A type that no script can name."""

    def get_col_spec(self, **_: Any) -> str:
        return "point3"


NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


def shop(
    metadata: sa.MetaData,
    *more: Any,
    without: Sequence[str] = (),
    without_orders: bool = False,
    **columns: Any,
) -> sa.MetaData:
    """Describe the shop as it is; keywords replace or add columns of customer, `more` adds constraints and options."""
    plain: dict[str, Any] = {
        "id": sa.Column(sa.BigInteger, sa.Identity(), primary_key=True),
        "full_name": sa.Column(sa.Text, nullable=False),
        "email": sa.Column(sa.String(100)),
        "age": sa.Column(sa.Integer, comment="in years"),
        "balance": sa.Column(sa.Numeric(12, 2), server_default="0", nullable=False),
        "mood": sa.Column(sa.Enum("glad", "sad", name="mood")),
        "tags": sa.Column(pg.ARRAY(sa.Text)),
        "created_at": sa.Column(sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    }
    plain.update(columns)
    items = []
    for name, column in plain.items():
        if name not in without:
            column.name = column.key = name
            items.append(column)
    constraints: list[Any] = [
        sa.UniqueConstraint("email", name="customer_email_key"),
        sa.CheckConstraint("age >= 0", name="age_is_positive"),
        sa.Index("customer_age", "age"),
    ]
    constraints = [c for c in constraints if c.name not in without]
    options = {key: value for one in more if isinstance(one, dict) for key, value in one.items()}
    sa.Table(
        "customer",
        metadata,
        *items,
        *constraints,
        *(one for one in more if not isinstance(one, dict)),
        **{"comment": "who buys", **options},
    )
    if not without_orders:
        sa.Table(
            "orders",
            metadata,
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("customer_id", sa.ForeignKey("customer.id"), nullable=False),
            sa.Column("amount", sa.Numeric(12, 2), nullable=False),
            sa.Index("orders_customer_id", "customer_id"),
        )
    sa.Table(
        "event",
        metadata,
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime, primary_key=True),
        sa.Column("what", sa.Text),
        postgresql_partition_by="RANGE (at)",
    )
    return metadata


@dataclass(frozen=True)
class Case:
    """
    One change.

    Attributes:
        name: what somebody did to the models.
        build: makes the models after it.
        written: titles of what the script adds.
        explained: titles of what it explains.
        source: parts of the script's text.
        lint: settings of the linter that the case needs.
        second: makes a second metadata, under naming conventions.
    """

    name: str
    build: Callable[[sa.MetaData], Any]
    written: Sequence[str] = ()
    explained: Sequence[str] = ()
    source: Sequence[str] = ()
    lint: dict[str, Any] = field(default_factory=dict)
    second: Callable[[sa.MetaData], Any] | None = None

    @property
    def models(self) -> list[sa.MetaData]:
        found = [sa.MetaData()]
        self.build(found[0])
        if self.second is not None:
            found.append(sa.MetaData(naming_convention=NAMING))
            self.second(found[1])
        return found


def _c(*args: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(*args, **options)


def _with(*tables: Callable[[sa.MetaData], Any], **columns: Any) -> Callable[[sa.MetaData], Any]:
    def build(metadata: sa.MetaData) -> None:
        shop(metadata, **columns)
        for one in tables:
            one(metadata)

    return build


def _table(name: str, *items: Callable[[], Any], **options: Any) -> Callable[[sa.MetaData], Any]:
    return lambda metadata: sa.Table(name, metadata, *(item() for item in items), **options)


def _id() -> sa.Column[Any]:
    return sa.Column("id", sa.Integer, primary_key=True)


CASES = [
    # What is there
    Case("nothing", _with()),
    # New columns
    Case(
        "a nullable column",
        lambda m: shop(m, nick=_c(sa.Text)),
        ["column customer.nick"],
        source=['op.add_column("customer", sa.Column("nick", sa.Text()))'],
    ),
    Case(
        "a NOT NULL column with a constant server default",
        lambda m: shop(m, points=_c(sa.Integer, server_default="7", nullable=False)),
        ["column customer.points"],
        source=['sa.Column("points", sa.Integer(), server_default="7", nullable=False)'],
    ),
    Case(
        "a NOT NULL column without a default",
        lambda m: shop(m, points=_c(sa.Integer, nullable=False)),
        ["column customer.points"],
        ["column customer.points is NOT NULL in the models, not on the shards"],
        source=['op.add_column("customer", sa.Column("points", sa.Integer()))'],
    ),
    Case(
        "a NOT NULL column with a Python-side default",
        lambda m: shop(m, points=_c(sa.Integer, default=0, nullable=False)),
        ["column customer.points"],
        ["column customer.points is NOT NULL in the models, not on the shards"],
    ),
    Case(
        "a column with a random default",
        lambda m: shop(m, token=_c(sa.Uuid, server_default=sa.text("gen_random_uuid()"), nullable=False)),
        ["column customer.token"],
        [
            "column customer.token is NOT NULL in the models, not on the shards",
            "the default of customer.token is gen_random_uuid() in the models, none there",
        ],
        source=['op.add_column("customer", sa.Column("token", sa.Uuid()))'],
    ),
    Case(
        "a column with the time as default",
        lambda m: shop(m, seen=_c(sa.DateTime(timezone=True), server_default=sa.func.now())),
        ["column customer.seen"],
        source=['server_default=sa.text("now()")'],
    ),
    Case(
        "an enum column",
        lambda m: shop(m, color=_c(sa.Enum(Color, name="color"))),
        ["type color", "column customer.color"],
        source=[
            "op.execute(\"CREATE TYPE color AS ENUM ('RED', 'BLUE')\")",
            'sa.Enum("RED", "BLUE", name="color", create_type=False)',
        ],
    ),
    Case(
        "an enum column with a default, its type there already",
        lambda m: shop(m, before=_c(sa.Enum("glad", "sad", name="mood"), server_default="sad")),
        ["column customer.before"],
    ),
    Case(
        "an enum kept as VARCHAR",
        lambda m: shop(m, color=_c(sa.Enum(Color, name="color", native_enum=False))),
        ["column customer.color"],
        source=["native_enum=False"],
    ),
    Case(
        "an enum kept as VARCHAR with a CHECK",
        lambda m: shop(m, color=_c(sa.Enum(Color, name="color", native_enum=False, create_constraint=True))),
        ["column customer.color"],
        [
            (
                "constraint color on customer: CHECK (((color)::text = ANY ((ARRAY['RED'::character varying, "
                "'BLUE'::character varying])::text[]))) is only in the models"
            )
        ],
        source=['sa.Column("color", sa.String(length=4))'],
    ),
    Case(
        "arrays and JSONB with defaults",
        lambda m: shop(
            m,
            codes=_c(pg.ARRAY(sa.Integer), server_default=sa.text("'{1,2}'::int[]"), nullable=False),
            extra=_c(pg.JSONB, server_default='{"a": 1}', nullable=False),
        ),
        ["column customer.codes", "column customer.extra"],
    ),
    Case(
        "a JSON column",
        lambda m: shop(m, raw=_c(sa.JSON)),
        [],
        ["column customer.raw is left out"],
    ),
    Case(
        "a JSON column that is JSONB on PostgreSQL",
        lambda m: shop(m, raw=_c(sa.JSON().with_variant(pg.JSONB(), "postgresql"))),
        ["column customer.raw"],
        source=["postgresql.JSONB(astext_type=sa.Text())"],
    ),
    Case(
        "a generated column",
        lambda m: shop(m, shout=_c(sa.Text, sa.Computed("upper(full_name)", persisted=True))),
        ["column customer.shout"],
        ["column customer.shout is generated in the models, plain there"],
        source=['move_rows("customer", forward={"shout": "upper(full_name)"})'],
    ),
    Case(
        "an identity column",
        lambda m: shop(m, number=_c(sa.BigInteger, sa.Identity())),
        ["column customer.number"],
        ["column customer.number is an identity column in the models, plain there"],
    ),
    Case(
        "a column with a comment",
        lambda m: shop(m, nick=_c(sa.Text, comment="what friends say; it's 100 % theirs")),
        ["column customer.nick"],
    ),
    Case(
        "a unique column",
        lambda m: shop(m, code=_c(sa.Text, unique=True)),
        ["column customer.code"],
        ["unique constraint customer (code) is only in the models"],
    ),
    Case(
        "an indexed column",
        lambda m: shop(m, code=_c(sa.Integer, index=True)),
        ["column customer.code", "index ix_customer_code"],
        source=["postgresql_concurrently=True"],
    ),
    Case(
        "a column with a foreign key",
        lambda m: shop(m, order_id=_c(sa.ForeignKey("orders.id"))),
        ["column customer.order_id"],
        ["foreign key customer (order_id) to orders (id) is only in the models"],
    ),
    Case(
        "a column of the application's own type",
        lambda m: shop(m, credit=_c(Money)),
        ["column customer.credit"],
        source=["sa.Numeric(precision=14, scale=4)"],
    ),
    Case(
        "a column of a type that scripts cannot name",
        lambda m: shop(m, place=_c(Point3)),
        [],
        ["column customer.place is left out"],
        source=['imports = ["model_changes"] and known_types = ["point3"]'],
    ),
    Case(
        "columns from a mixin, twice",
        lambda m: shop(m, changed_at=_c(sa.DateTime(timezone=True)), changed_by=_c(sa.Text, server_default="nobody")),
        ["column customer.changed_at", "column customer.changed_by"],
    ),
    # Columns that are gone or other
    Case(
        "a removed column",
        lambda m: shop(m, without=["tags"]),
        [],
        ["column customer.tags is gone from the models"],
    ),
    Case(
        "a renamed column",
        lambda m: shop(m, without=["full_name"], name=_c(sa.Text, nullable=False)),
        ["column customer.name"],
        [
            "column customer.full_name is gone from the models",
            "column customer.name is NOT NULL in the models, not on the shards",
        ],
        source=['move_rows("customer", forward={"name": "full_name"}, back={"full_name": "name"})'],
    ),
    Case(
        "a column renamed and retyped",
        lambda m: shop(m, without=["balance"], balance_cents=_c(sa.BigInteger)),
        ["column customer.balance_cents"],
        ["column customer.balance is gone from the models"],
    ),
    Case(
        "a wider integer",
        lambda m: shop(m, age=_c(sa.BigInteger, comment="in years")),
        [],
        ["column customer.age is bigint in the models, integer on the shards"],
        source=['move_rows("customer", forward={"age_new": "age::bigint"}, back={"age": "age_new::integer"})'],
    ),
    Case(
        "a longer string",
        lambda m: shop(m, email=_c(sa.String(200))),
        [],
        ["column customer.email is character varying(200) in the models, character varying(100) on the shards"],
    ),
    Case(
        "NOT NULL on a column",
        lambda m: shop(m, age=_c(sa.Integer, comment="in years", nullable=False)),
        [],
        ["column customer.age is NOT NULL in the models, not on the shards"],
    ),
    Case(
        "a column that may now be NULL",
        lambda m: shop(m, full_name=_c(sa.Text)),
        [],
        ["column customer.full_name may be NULL in the models, not on the shards"],
    ),
    Case(
        "another default",
        lambda m: shop(m, balance=_c(sa.Numeric(12, 2), server_default="10", nullable=False)),
        [],
        ["the default of customer.balance is '10'::numeric in the models, '0'::numeric there"],
    ),
    Case(
        "a default on a column that had none",
        lambda m: shop(m, age=_c(sa.Integer, comment="in years", server_default="18")),
        [],
        ["the default of customer.age is 18 in the models, none there"],
    ),
    Case(
        "a default that is gone",
        lambda m: shop(m, balance=_c(sa.Numeric(12, 2), nullable=False)),
        [],
        ["the default of customer.balance is none in the models, '0'::numeric there"],
    ),
    Case(
        "the same default, spelled otherwise",
        lambda m: shop(
            m,
            balance=_c(sa.Numeric(12, 2), server_default=sa.text("'0'::numeric"), nullable=False),
            created_at=_c(sa.DateTime(timezone=True), server_default=sa.text("CURRENT_TIMESTAMP"), nullable=False),
        ),
    ),
    Case(
        "a label more",
        lambda m: shop(m, mood=_c(sa.Enum("glad", "sad", "angry", name="mood"))),
        [],
        ["type mood has the labels glad, sad, angry in the models, glad, sad on the shards"],
    ),
    Case(
        "another comment on a column and on the table",
        lambda m: shop(m, {"comment": "who pays"}, age=_c(sa.Integer, comment="in full years")),
        ["comment on customer", "comment on customer.age"],
    ),
    Case(
        "a comment that is gone",
        lambda m: shop(m, age=_c(sa.Integer)),
        [],
        ["comment on customer.age is gone from the models"],
    ),
    # Indexes and constraints on tables that are there
    Case(
        "an index",
        lambda m: shop(m, sa.Index("customer_full_name", "full_name")),
        ["index customer_full_name"],
        source=['op.create_index("customer_full_name", "customer", ["full_name"], postgresql_concurrently=True)'],
    ),
    Case(
        "a partial index on an expression",
        lambda m: shop(
            m, sa.Index("customer_lower", sa.text("lower(full_name)"), postgresql_where=sa.text("age IS NOT NULL"))
        ),
        ["index customer_lower"],
    ),
    Case(
        "a GIN index, and an index that includes",
        lambda m: shop(
            m,
            sa.Index("customer_tags", "tags", postgresql_using="gin"),
            sa.Index("customer_cover", "age", postgresql_include=["balance"]),
        ),
        ["index customer_cover", "index customer_tags"],
    ),
    Case(
        "an index whose expression can fail",
        lambda m: shop(m, sa.Index("customer_year", sa.text("(100 / age)"))),
        [],
        ["index customer_year is left out"],
    ),
    Case(
        "a unique index",
        lambda m: shop(m, sa.Index("customer_once", "full_name", unique=True)),
        [],
        ["unique index customer_once is only in the models"],
    ),
    Case(
        "an index over another column, under its old name",
        lambda m: shop(m, sa.Index("customer_age", "balance"), without=["customer_age"]),
        [],
        ["index customer_age is defined otherwise in the models"],
    ),
    Case(
        "an index that is gone",
        lambda m: shop(m, without=["customer_age"]),
        [],
        ["index customer_age is gone from the models"],
    ),
    Case(
        "an index on a partitioned table",
        lambda m: sa.Index("event_what", shop(m).tables["event"].c.what),
        [],
        ["index event_what is only in the models"],
    ),
    Case(
        "a unique constraint, a CHECK and an exclusion",
        lambda m: shop(
            m,
            sa.UniqueConstraint("full_name", name="one_name"),
            sa.CheckConstraint("balance > -100", name="credit_line"),
            pg.ExcludeConstraint(("balance", "="), name="no_twins", using="btree"),
        ),
        [],
        [
            "constraint credit_line on customer: CHECK ((balance > ('-100'::integer)::numeric)) is only in the models",
            "constraint no_twins on customer: EXCLUDE USING btree (balance WITH =) is only in the models",
            "unique constraint customer (full_name) is only in the models",
        ],
    ),
    Case(
        "constraints that are gone",
        lambda m: shop(m, without=["customer_email_key", "age_is_positive"]),
        [],
        [
            "constraint age_is_positive on customer: CHECK ((age >= 0)) is gone from the models",
            "constraint customer_email_key on customer is gone from the models",
        ],
    ),
    # Tables
    Case(
        "a table with everything",
        _with(
            _table(
                "invoice",
                lambda: sa.Column("id", sa.BigInteger, sa.Identity(always=True, start=100), primary_key=True),
                lambda: sa.Column("number", sa.Text, nullable=False, unique=True),
                lambda: sa.Column("total", sa.Numeric(12, 2), sa.CheckConstraint("total >= 0"), nullable=False),
                lambda: sa.Column("vat", sa.Numeric(12, 2), sa.Computed("total * 0.2", persisted=True)),
                lambda: sa.Column("state", sa.Enum("open", "paid", name="invoice_state"), server_default="open"),
                lambda: sa.Column("colors", pg.ARRAY(sa.Enum(Color, name="color"))),
                lambda: sa.Column("raw", sa.JSON, server_default="{}"),
                lambda: sa.Column("token", sa.Uuid, server_default=sa.text("gen_random_uuid()"), nullable=False),
                lambda: sa.Column("span", pg.TSTZRANGE),
                lambda: sa.Column("due", sa.Date, index=True, comment="when"),
                lambda: pg.ExcludeConstraint(("span", "&&"), name="no_overlap", using="gist"),
                lambda: sa.Index("invoice_open", "due", postgresql_where=sa.text("state = 'open'")),
                comment="what is owed",
            )
        ),
        ["type color", "type invoice_state", "table invoice", "index invoice_open", "index ix_invoice_due"],
    ),
    Case(
        "a table of a second metadata, under naming conventions",
        shop,
        ["table tag", "index ix_tag_word"],
        source=['name=op.f("uq_tag_name")', 'name=op.f("pk_tag")', 'name=op.f("ck_tag_short")'],
        second=_table(
            "tag",
            _id,
            lambda: sa.Column("name", sa.Text, unique=True),
            lambda: sa.Column("word", sa.Text, index=True),
            lambda: sa.CheckConstraint("length(name) < 20", name="short"),
        ),
    ),
    Case(
        "many to many between new tables",
        _with(
            _table("tag", _id, lambda: sa.Column("name", sa.Text)),
            _table("post", _id),
            _table(
                "post_tag",
                lambda: sa.Column("post_id", sa.ForeignKey("post.id"), primary_key=True),
                lambda: sa.Column("tag_id", sa.ForeignKey("tag.id"), primary_key=True),
            ),
        ),
        ["table post", "table tag", "table post_tag"],
        source=['sa.ForeignKeyConstraint(["post_id"], ["post.id"])'],
    ),
    Case(
        "a table that refers to one in use",
        _with(_table("note", _id, lambda: sa.Column("customer_id", sa.ForeignKey("customer.id"), index=True))),
        ["table note", "index ix_note_customer_id"],
        ["foreign key note (customer_id) to customer (id) is only in the models"],
    ),
    Case(
        "a table that refers to one in use, ON DELETE CASCADE",
        _with(
            _table("note", _id, lambda: sa.Column("customer_id", sa.ForeignKey("customer.id", ondelete="CASCADE"))),
            _table("note_line", _id, lambda: sa.Column("note_id", sa.ForeignKey("note.id"))),
        ),
        ["table note", "table note_line"],
        ["foreign key note_line (note_id) to note (id) is only in the models"],
        source=['["customer_id"], ["customer.id"], ondelete="CASCADE"'],
    ),
    Case(
        "a tree, and two tables that refer to each other",
        _with(
            _table("node", _id, lambda: sa.Column("parent_id", sa.ForeignKey("node.id"))),
            _table("hen", _id, lambda: sa.Column("egg_id", sa.ForeignKey("egg.id", name="hen_egg"))),
            _table("egg", _id, lambda: sa.Column("hen_id", sa.ForeignKey("hen.id", name="egg_hen", use_alter=True))),
        ),
        ["table egg", "table hen", "table node"],
        ["foreign key egg (hen_id) to hen (id) is only in the models"],
        source=['sa.ForeignKeyConstraint(["parent_id"], ["node.id"])'],
    ),
    Case(
        "a table in another schema",
        _with(_table("entry", _id, schema="billing")),
        ["schema billing", "table billing.entry"],
        lint={"schemas": ["public", "billing"]},
    ),
    Case(
        "a table in a schema that is not configured",
        _with(_table("entry", _id, lambda: sa.Column("x", sa.Text, index=True), schema="elsewhere")),
        [],
        [
            "index ix_elsewhere_entry_x is left out",
            "schema elsewhere is left out",
            "table elsewhere.entry is left out",
        ],
    ),
    Case(
        "a partitioned table",
        _with(
            _table(
                "reading",
                lambda: sa.Column("at", sa.DateTime(timezone=True), primary_key=True),
                lambda: sa.Column("value", sa.Float, index=True),
                postgresql_partition_by="RANGE (at)",
            )
        ),
        ["table reading", "index ix_reading_value"],
        source=['postgresql_partition_by="RANGE (at)"'],
    ),
    Case(
        "a sequence",
        lambda m: [shop(m), sa.Sequence("ticket", start=1000, metadata=m)],
        ["sequence ticket"],
    ),
    Case(
        "a removed table",
        lambda m: shop(m, without_orders=True),
        [],
        ["table orders is gone from the models"],
    ),
    Case(
        "a renamed table",
        lambda m: [
            shop(m, without_orders=True),
            sa.Table(
                "purchase",
                m,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("customer_id", sa.BigInteger, nullable=False),
                sa.Column("amount", sa.Numeric(12, 2), nullable=False),
            ),
        ],
        ["table purchase"],
        ["table orders is gone from the models"],
        source=['move_rows("orders", into="purchase", target_key={"id": "id"}, forward={'],
    ),
]


def table() -> str:
    """Write the cases as the documentation shows them."""
    lines = ["| change of the models | what is added | what is explained |", "| --- | --- | --- |"]
    for case in CASES:
        cells = (case.name, "; ".join(case.written) or "—", "; ".join(sorted(case.explained)) or "—")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
