"""Version flags as application code reads them; pure core, thin psycopg shells, nothing else of shardmig."""

from shardmig.flags.connection import Flags
from shardmig.flags.core import Flag, Peek, View
from shardmig.flags.transaction import AsyncTransaction, Transaction

__all__ = ["AsyncTransaction", "Flag", "Flags", "Peek", "Transaction", "View"]
