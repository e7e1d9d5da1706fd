"""The load of a server, as far as a move may make it worse: one query, read by the login role between two batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmig.keyset import table
from shardmig.pace import Load, Replica
from shardmig.session import Query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardmig.plan import Move
    from shardmig.session import Result, Session

__all__ = ["load_of", "load_query", "read_load"]


@dataclass(frozen=True, slots=True)
class _Row:
    at_s: float
    written: int
    replicas: str | None
    slots: str | None
    archiving: bool
    archived: int | None
    wraparound: int | None
    dead_bytes: int
    snapshot_s: float | None
    snapshot_who: str | None


async def read_load(session: Session, move: Move) -> Load:
    """Look at the server once; what this role may not see is None, never zero."""
    asked = load_query([move])
    [row] = await session.observe(_Row, asked.sql, asked.params)
    return _load(row)


def load_query(moves: Sequence[Move]) -> Query:
    """Ask for the load as part of another flight; `load_of` reads the answer. It is the login role that sees others."""
    names = {name for move in moves for name in (move.table, move.target) if name is not None}
    return Query(_LOAD, [[table(name) for name in sorted(names)]])


def load_of(found: Result) -> Load:
    """Read what `load_query` returned."""
    return _load(_Row(*found.rows[0]))


def _load(row: _Row) -> Load:
    return Load(
        at_s=row.at_s,
        written=row.written,
        replicas=tuple(Replica(*replica) for replica in json.loads(row.replicas or "[]")),
        slots=tuple((name, kept) for name, kept in json.loads(row.slots or "[]")),
        archiving=row.archiving,
        archived=row.archived,
        wraparound=row.wraparound,
        dead_bytes=row.dead_bytes,
        snapshot_s=row.snapshot_s,
        snapshot_who=row.snapshot_who or "",
    )


# Functions instead of the views over them: a server process that is new plans and looks up three times less.
#
# Standbys: base backups and logical subscribers are none (the slots of the latter are looked at as slots). A WAL
# archiver replays nothing, so what it flushed counts. The archive: a segment's name is timeline, then the position's
# upper half, then the number of the segment ("Write Ahead Log, Internals").
_LOAD = r"""
WITH walked AS (
    SELECT tree.relid FROM unnest($1::text[]) AS named (name)
    CROSS JOIN LATERAL (
        SELECT relid FROM pg_partition_tree(to_regclass(named.name)) WHERE isleaf
        UNION SELECT to_regclass(named.name)
    ) AS tree
), here AS (
    SELECT d.oid FROM pg_database d WHERE d.datname = current_database()
), activity AS MATERIALIZED (
    SELECT a.* FROM pg_stat_get_activity(NULL) a
), slots AS MATERIALIZED (
    SELECT l.* FROM pg_get_replication_slots() l
), replicas AS (
    SELECT coalesce(nullif(a.application_name, ''), 'unnamed') || coalesce(' at ' || host(a.client_addr), '') AS name,
           coalesce(r.replay_lsn, r.flush_lsn, r.write_lsn) AS replayed,
           extract(epoch FROM r.replay_lag)::float8 AS lag_s
    FROM pg_stat_get_wal_senders() r JOIN activity a USING (pid)
    WHERE r.state IS DISTINCT FROM 'backup'
      AND NOT EXISTS (SELECT FROM slots l WHERE l.active_pid = r.pid AND l.slot_type = 'logical')
), snapshots AS (
    SELECT extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS age_s,
           format('pid %s of role %s', a.pid, pg_get_userbyid(a.usesysid)) AS who
    FROM activity a, here
    WHERE a.backend_xmin IS NOT NULL AND a.pid <> pg_backend_pid() AND a.xact_start IS NOT NULL
      AND a.datid = here.oid AND coalesce(a.backend_type, '') <> 'autovacuum worker'
    UNION ALL
    SELECT extract(epoch FROM clock_timestamp() - p.prepared)::float8, format('prepared transaction %L', p.gid)
    FROM pg_prepared_xact() p, here WHERE p.dbid = here.oid
    ORDER BY 1 DESC LIMIT 1
)
SELECT extract(epoch FROM clock_timestamp())::float8 AS at_s,
       (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint AS written,
       (SELECT json_agg(json_build_array(r.name, (r.replayed - '0/0'::pg_lsn)::bigint, r.lag_s))::text
        FROM replicas r) AS replicas,
       (SELECT json_agg(json_build_array(l.slot_name, (pg_current_wal_insert_lsn() - l.restart_lsn)::bigint))::text
        FROM slots l WHERE l.restart_lsn IS NOT NULL) AS slots,
       current_setting('archive_mode') <> 'off' AS archiving,
       (SELECT ('x' || substr(w.last_archived_wal, 9, 8))::bit(32)::bigint * 4294967296
               + (('x' || substr(w.last_archived_wal, 17, 8))::bit(32)::bigint + 1)
                 * pg_size_bytes(current_setting('wal_segment_size'))
        FROM pg_stat_get_archiver() w WHERE w.last_archived_wal ~ '^[0-9A-F]{24}$') AS archived,
       (SELECT v.pid FROM pg_stat_get_progress_info('VACUUM') v JOIN activity a USING (pid), here
        WHERE v.datid = here.oid AND v.relid IN (SELECT relid FROM walked)
          AND a.query LIKE '%(to prevent wraparound)%' LIMIT 1) AS wraparound,
       (SELECT coalesce(sum(pg_relation_size(w.relid)
                   * (pg_stat_get_dead_tuples(w.relid)::float8
                      / greatest(pg_stat_get_dead_tuples(w.relid) + pg_stat_get_live_tuples(w.relid), 1))), 0)::bigint
        FROM walked w) AS dead_bytes,
       (SELECT s.age_s FROM snapshots s) AS snapshot_s,
       (SELECT s.who FROM snapshots s) AS snapshot_who
"""
