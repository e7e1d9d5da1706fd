"""
shardmig: change the schema of a sharded PostgreSQL application while it runs.

This is what application code imports; it loads neither Alembic nor SQLAlchemy, pydantic, psycopg or the command line.
"""

from shardmig.errors import ShardmigError
from shardmig.states import State

__all__ = ["ShardmigError", "State"]
