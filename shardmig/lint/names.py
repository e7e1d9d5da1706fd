"""What a script may name: the closed world of layer one."""

from __future__ import annotations

__all__ = [
    "ALEMBIC",
    "ALTER_COMMENT",
    "BUILTINS",
    "CLOCKS",
    "COLUMN_WORDS",
    "DYNAMIC",
    "IMPORTS",
    "OPERATIONS",
    "POSTGRESQL",
    "REFUSED",
    "SHARDMIG",
    "SQLALCHEMY",
    "SQLALCHEMY_MODULES",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Modules that compute values and do nothing else; what the configuration adds comes on top.
IMPORTS = _names("__future__ collections.abc datetime decimal typing typing_extensions uuid")

ALEMBIC = _names("op")
SHARDMIG = _names("shardmig.operations")

OPERATIONS = _names("add_column create_index create_table create_table_comment execute f inline_literal")
ALTER_COMMENT = _names(
    "comment existing_comment existing_type existing_nullable existing_server_default existing_autoincrement schema"
)

# What each operation would do instead of adding, and what to write.
REFUSED: dict[str, tuple[str, str]] = {
    "alter_column": (
        "ALTER COLUMN changes what running code reads and writes",
        'op.add_column("t", sa.Column("a_new", sa.BigInteger))  # and move_rows("t", forward={"a_new": "a"}, …)',
    ),
    "create_check_constraint": ("old writes would be refused", "# leave it out: the application keeps the rule"),
    "create_exclude_constraint": ("old writes would be refused", "# leave it out: the application keeps the rule"),
    "create_foreign_key": (
        "the table is scanned, and DELETE of today fails",
        'sa.Column("t_id", sa.Integer, sa.ForeignKey("t.id", ondelete="CASCADE"))  # in op.create_table of a new table',
    ),
    "create_primary_key": ("the table is scanned under ACCESS EXCLUSIVE", "# leave it out"),
    "create_unique_constraint": (
        "old duplicates would be refused, and the table is locked while the index is built",
        'op.create_index("ix_t_a", "t", ["a"], postgresql_concurrently=True)',
    ),
    "drop_column": ("running code still reads it", "# leave the column"),
    "drop_constraint": ("running code relies on it", "# leave the constraint"),
    "drop_index": ("plans of running queries change", "# leave the index"),
    "drop_table": ("running code still reads it", "# leave the table"),
    "drop_table_comment": ("the comment is gone", 'op.create_table_comment("t", "what it holds")'),
    "rename_table": (
        "for running code a renamed table is a dropped one",
        'op.create_table("new_name", …)  # and move_rows("t", into="new_name", …) in move()',
    ),
}

BUILTINS = _names("""
    ArithmeticError Exception NotImplementedError RuntimeError TypeError ValueError
    abs all any bool bytes dict divmod enumerate filter float format frozenset int isinstance len list map max min range
    repr reversed round set slice sorted str sum tuple zip
    True False None NotImplemented Ellipsis __name__ __doc__
""")

# Not needed for safety (what is on no list is refused), but the message can say more.
DYNAMIC = _names("""
    __builtins__ __import__ __loader__ __spec__ compile delattr eval exec getattr globals locals setattr vars
""")

# Methods of imported modules whose value depends on when and where the plan is rendered.
CLOCKS = _names("now today utcnow fromtimestamp uuid1 uuid4 getnode")

COLUMN_WORDS = {
    "unique": "a unique index refuses old duplicates, and is built under ACCESS EXCLUSIVE",
    "index": "Alembic renders a blocking CREATE INDEX",
    "primary_key": "a primary key is built under ACCESS EXCLUSIVE",
}

SQLALCHEMY_MODULES = _names("""
    sqlalchemy sqlalchemy.types sqlalchemy.schema sqlalchemy.sql sqlalchemy.sql.expression sqlalchemy.sql.functions
    sqlalchemy.sql.sqltypes sqlalchemy.dialects sqlalchemy.dialects.postgresql
""")

# Types and expressions; nothing that connects, listens, creates or drops.
SQLALCHEMY = _names("""
    ARRAY BIGINT BINARY BLOB BOOLEAN BigInteger Boolean CHAR CLOB DATE DATETIME DECIMAL DOUBLE DOUBLE_PRECISION Date
    DateTime Double Enum FLOAT Float INT INTEGER Integer Interval JSON LargeBinary NCHAR NUMERIC NVARCHAR Numeric
    PickleType REAL SMALLINT SmallInteger String TEXT TIME TIMESTAMP Text Time UUID Unicode UnicodeText Uuid VARBINARY
    VARCHAR NullType

    CheckConstraint Column Computed Constraint DefaultClause FetchedValue ForeignKey ForeignKeyConstraint Identity Index
    MetaData PrimaryKeyConstraint Sequence Table UniqueConstraint

    all_ and_ any_ asc between bindparam case cast collate column cte current_date current_timestamp delete desc
    distinct except_ exists extract false func insert intersect join lateral literal literal_column not_ now null
    nulls_first nulls_last or_ outerjoin over quoted_name select table text true tuple_ type_coerce union union_all
    update values within_group coalesce

    dialects expression functions postgresql schema sql sqltypes types
""")

POSTGRESQL = _names("""
    ARRAY BIGINT BIT BOOLEAN BYTEA CHAR CIDR CITEXT DATE DATEMULTIRANGE DATERANGE DOMAIN DOUBLE_PRECISION ENUM
    ExcludeConstraint FLOAT HSTORE INET INT4MULTIRANGE INT4RANGE INT8MULTIRANGE INT8RANGE INTEGER INTERVAL JSON JSONB
    JSONPATH MACADDR MACADDR8 MONEY NUMERIC NUMMULTIRANGE NUMRANGE OID REAL REGCLASS REGCONFIG Range SMALLINT TEXT TIME
    TIMESTAMP TSMULTIRANGE TSQUERY TSRANGE TSTZMULTIRANGE TSTZRANGE TSVECTOR UUID VARCHAR aggregate_order_by array
    array_agg insert
""")
