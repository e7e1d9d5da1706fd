"""
The demo: a little shop whose four shards are migrated while it serves.

Two releases of one small application run as real processes on real PostgreSQL servers. Every transaction that writes
tells an oracle what it wrote, and every answer is compared with it.
"""
