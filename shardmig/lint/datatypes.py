"""The types of PostgreSQL, by whether a column of an existing table may have them."""

from __future__ import annotations

__all__ = ["ANY", "CASTS", "COMPARABLE", "SERIAL", "TYPE_SINCE"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MULTIRANGES = _names("int4multirange int8multirange nummultirange tsmultirange tstzmultirange datemultirange")

# With an equality operator in a default B-tree or hash class: SELECT DISTINCT *, UNION and GROUP BY keep working.
COMPARABLE = _MULTIRANGES | _names("""
    bit bool bpchar bytea char cidr date float4 float8 inet int2 int4 int8 interval jsonb macaddr macaddr8 money name
    numeric oid pg_lsn text time timestamp timestamptz timetz tsquery tsvector uuid varbit varchar xid8
    int4range int8range numrange tsrange tstzrange daterange
""")

# Anything else that a new table may hold.
ANY = COMPARABLE | _names("box circle json jsonpath line lseg path pg_snapshot point polygon txid_snapshot xml")

# What an expression may be cast to besides.
CASTS = ANY | _names("regclass regconfig regtype tid xid")

# Read as "a column with a sequence" by CREATE TABLE and ADD COLUMN, only when unqualified.
SERIAL = _names("serial serial2 serial4 serial8 smallserial bigserial")

TYPE_SINCE = {"pg_snapshot": 13, "xid8": 13} | dict.fromkeys(_MULTIRANGES, 14)
