"""
shardmig: change the schema of a sharded PostgreSQL application while it runs.

This is what application code imports; it loads neither Alembic nor SQLAlchemy, pydantic, psycopg or the command line.
"""

from shardmig.errors import (
    FlagError,
    LedgerMissing,
    ShardBehind,
    ShardInMaintenance,
    ShardmigError,
    UnknownFlag,
    UnknownState,
    ViewExpired,
    WriteRefused,
    WrongShard,
    WrongTransaction,
)
from shardmig.flags.connection import Flags
from shardmig.flags.core import Flag, View
from shardmig.states import State

__all__ = [
    "Flag",
    "FlagError",
    "Flags",
    "LedgerMissing",
    "ShardBehind",
    "ShardInMaintenance",
    "ShardmigError",
    "State",
    "UnknownFlag",
    "UnknownState",
    "View",
    "ViewExpired",
    "WriteRefused",
    "WrongShard",
    "WrongTransaction",
]
