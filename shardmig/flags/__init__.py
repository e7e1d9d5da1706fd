"""Version flags as application code reads them; pure core, thin psycopg shells, nothing else of shardmig."""

from shardmig.flags.connection import AsyncTransaction, Flags, Transaction
from shardmig.flags.core import Flag, Peek, View

__all__ = ["AsyncTransaction", "Flag", "Flags", "Peek", "Transaction", "View"]
