"""What a script may name: the closed world of layer one."""

from __future__ import annotations

__all__ = [
    "ALTER_COMMENT",
    "BUILTINS",
    "CLOCKS",
    "COLUMN_WORDS",
    "DYNAMIC",
    "MEMBERS",
    "NODES",
    "OPERATIONS",
    "REFUSED",
    "SHADOWED",
    "SQLALCHEMY_MODULES",
    "VALUE_MEMBERS",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


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

# Builtins that a script may call its own values by: were the builtin meant after all, it would do no harm.
SHADOWED = _names("hash id object property type")

# Not needed for safety (what is on no list is refused), but the message can say more.
DYNAMIC = _names("""
    __builtins__ __import__ __loader__ __spec__ compile delattr eval exec getattr globals locals setattr vars
""")

# Of datetime and uuid: the value depends on when and where the plan is rendered.
CLOCKS = _names("now today utcnow fromtimestamp utcfromtimestamp uuid1 uuid4 getnode")

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
_SQLALCHEMY = _names("""
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
""")

_POSTGRESQL = _names("""
    ARRAY BIGINT BIT BOOLEAN BYTEA CHAR CIDR CITEXT DATE DATEMULTIRANGE DATERANGE DOMAIN DOUBLE_PRECISION ENUM
    ExcludeConstraint FLOAT HSTORE INET INT4MULTIRANGE INT4RANGE INT8MULTIRANGE INT8RANGE INTEGER INTERVAL JSON JSONB
    JSONPATH MACADDR MACADDR8 MONEY NUMERIC NUMMULTIRANGE NUMRANGE OID REAL REGCLASS REGCONFIG Range SMALLINT TEXT TIME
    TIMESTAMP TSMULTIRANGE TSQUERY TSRANGE TSTZMULTIRANGE TSTZRANGE TSVECTOR UUID VARCHAR aggregate_order_by array
    array_agg insert
""")

_TYPING = _names("""
    Annotated Any Callable Collection Dict Final FrozenSet Generic Iterable Iterator List Literal Mapping Optional
    Sequence Set Tuple Type TypeAlias TYPE_CHECKING Union cast
""")

MEMBERS: dict[str, frozenset[str]] = {
    "__future__": _names("annotations"),
    "collections.abc": _names("Callable Collection Hashable Iterable Iterator Mapping Sequence Set Sized"),
    "datetime": _names("MAXYEAR MINYEAR UTC date datetime time timedelta timezone"),
    "decimal": _names("""
        Decimal ROUND_05UP ROUND_CEILING ROUND_DOWN ROUND_FLOOR ROUND_HALF_DOWN ROUND_HALF_EVEN ROUND_HALF_UP ROUND_UP
    """),
    "shardmig.operations": _names("move_rows seed_rows"),
    "typing": _TYPING,
    "typing_extensions": _TYPING,
    "uuid": _names("NAMESPACE_DNS NAMESPACE_OID NAMESPACE_URL NAMESPACE_X500 UUID uuid3 uuid5"),
    **{module: _POSTGRESQL if module.endswith(".postgresql") else _SQLALCHEMY for module in SQLALCHEMY_MODULES},
}
"""Modules that compute values and do nothing else → what may be taken of each; the configuration adds others."""

# Methods and attributes of values other than Python's plain data, which `members` adds.
VALUE_MEMBERS = _names("""
    combine ctime date day days dst fold fromisocalendar fromisoformat fromordinal hour isocalendar isoformat
    isoweekday max microsecond microseconds min minute month replace resolution second seconds strftime time timedelta
    timetuple timetz toordinal total_seconds tzinfo tzname utc utcoffset weekday year

    adjusted as_tuple compare copy_abs copy_negate copy_sign exp fma from_float is_finite is_infinite is_integer is_nan
    is_signed is_zero ln log10 logb normalize number_class quantize remainder_near same_quantum scaleb shift sqrt
    to_eng_string to_integral_exact to_integral_value

    bytes bytes_le clock_seq fields hex int node urn variant version

    add_columns alias all_ any_ append_column asc astext as_boolean as_float as_integer as_json as_numeric as_string
    between bindparams bitwise_and bitwise_lshift bitwise_not bitwise_or bitwise_rshift bitwise_xor bool_op c cast
    collate columns comment concat contained_by contains correlate create_type cte delete desc description dimensions
    distinct endswith enums except_ except_all excluded exists fetch filter filter_where foreign_keys from_select
    fullname group_by has_all has_any has_key having icontains iendswith ilike in_ insert intersect intersect_all is_
    is_distinct_from is_not is_not_distinct_from isnot isnot_distinct_from istartswith item_type join key label
    lateral length like limit match name not_ilike not_in not_like notilike notin_ notlike nullable nulls_first
    nulls_last nullsfirst nullslast offset on_conflict_do_nothing on_conflict_do_update op order_by outerjoin over
    overlaps path_exists path_match precision prefix_with primary_key regexp_match regexp_replace returning
    scalar_subquery scale schema select select_from self_group server_default startswith subquery suffix_with table
    timezone type union union_all update values where with_for_update with_only_columns with_variant within_group
""")

# Python's own syntax, as far as it describes; a kind of node that is not here is refused.
NODES = _names("""
    Module Expr Assign AnnAssign AugAssign Assert Delete For FunctionDef Global If Import ImportFrom Nonlocal Pass
    Break Continue Raise Return With withitem arguments arg alias keyword comprehension

    Attribute BinOp BoolOp Call Compare Constant Dict DictComp FormattedValue GeneratorExp IfExp JoinedStr Lambda List
    ListComp Name NamedExpr Set SetComp Slice Starred Subscript Tuple UnaryOp

    Load Store Del And Or Add BitAnd BitOr BitXor Div FloorDiv LShift MatMult Mod Mult Pow RShift Sub Invert Not UAdd
    USub Eq Gt GtE In Is IsNot Lt LtE NotEq NotIn

    AsyncFunctionDef Await ClassDef Try TryStar While Yield YieldFrom
""")
