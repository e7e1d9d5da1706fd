-- What a shard's catalog says, as rows (kind, object, fact): an object that keeps its fact is untouched.
--
-- Two statements follow, the second behind the line of dashes that names it. {relations} is the condition that chooses
-- rows of pg_class c in pg_namespace n, {schemas} the one that chooses rows of n. {compression} is the column's
-- compression, which servers before 14 do not have. Texts of expressions take the lock of a reader, nothing stronger.
--
-- "limits" lists everything that can make a write fail that succeeded before: containment alone would let a new CHECK
-- or a new trigger on an old table pass, because nothing that existed is gone.

WITH relation AS (
    SELECT c.*, format('%I.%I', n.nspname, c.relname) AS object
    FROM pg_class AS c
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE {relations}
)
SELECT CASE r.relkind
           WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
           WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'c' THEN 'composite type'
           ELSE 'sequence'
       END AS kind,
       r.object,
       concat_ws(', ',
           'owner ' || pg_get_userbyid(r.relowner),
           CASE r.relpersistence WHEN 'u' THEN 'unlogged' WHEN 't' THEN 'temporary' END,
           CASE WHEN r.relrowsecurity THEN 'row security' END,
           CASE WHEN r.relforcerowsecurity THEN 'row security forced' END,
           CASE WHEN r.relreplident <> 'd' THEN 'replica identity ' || r.relreplident::text END,
           CASE WHEN r.reloftype <> 0 THEN 'of type ' || r.reloftype::regtype END,
           (SELECT 'child of ' || string_agg(i.inhparent::regclass::text, ', ' ORDER BY i.inhseqno)
            FROM pg_inherits AS i WHERE i.inhrelid = r.oid),
           pg_get_expr(r.relpartbound, r.oid),
           array_to_string(r.reloptions, ', ')
       ) AS fact
FROM relation AS r
WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'c', 'S')

UNION ALL
SELECT 'storage', r.object, 'file ' || r.relfilenode
FROM relation AS r
WHERE r.relfilenode <> 0 AND r.relkind IN ('r', 'm', 'S')

UNION ALL
SELECT 'storage', format('%I.%I', n.nspname, x.relname), 'file ' || x.relfilenode
FROM relation AS r
JOIN pg_index AS i ON i.indrelid = r.oid AND i.indisvalid
JOIN pg_class AS x ON x.oid = i.indexrelid AND x.relfilenode <> 0
JOIN pg_namespace AS n ON n.oid = x.relnamespace

UNION ALL
SELECT 'privileges', r.object, coalesce(r.relacl::text, 'default')
FROM relation AS r
WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')

UNION ALL
SELECT 'column',
       format('%s.%I', r.object, a.attname),
       concat_ws(', ',
           '#' || row_number() OVER (PARTITION BY a.attrelid ORDER BY a.attnum),
           format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.attcollation <> t.typcollation THEN 'collation ' || a.attcollation::regcollation END,
           CASE WHEN a.attnotnull THEN 'not null' END,
           CASE a.attgenerated
               WHEN '' THEN 'default ' || pg_get_expr(d.adbin, d.adrelid)
               ELSE format('generated (%s) %s', pg_get_expr(d.adbin, d.adrelid), a.attgenerated)
           END,
           CASE a.attidentity WHEN 'a' THEN 'identity always' WHEN 'd' THEN 'identity by default' END,
           CASE WHEN a.attstorage <> t.typstorage THEN 'storage ' || a.attstorage::text END,
           'compression ' || nullif({compression}, ''),
           'privileges ' || a.attacl::text
       )
FROM relation AS r
JOIN pg_attribute AS a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type AS t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE r.relkind IN ('r', 'p', 'v', 'm', 'f', 'c')

UNION ALL
SELECT 'constraint',
       format('%s.%I', r.object, k.conname),
       concat_ws(', ',
           pg_get_constraintdef(k.oid),
           CASE WHEN NOT k.convalidated THEN 'not validated' END,
           CASE WHEN EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgconstraint = k.oid AND g.tgenabled IN ('D', 'R'))
               THEN 'switched off' END  -- DISABLE TRIGGER ALL, on either table of a foreign key
       )
FROM relation AS r
JOIN pg_constraint AS k ON k.conrelid = r.oid AND k.contype <> 'n'

UNION ALL
SELECT CASE WHEN i.indisvalid THEN 'index' ELSE 'invalid index' END,
       format('%I.%I', n.nspname, x.relname),
       concat_ws(', ',
           pg_get_indexdef(i.indexrelid),
           CASE WHEN i.indisprimary THEN 'primary' END,
           CASE WHEN i.indisclustered THEN 'clustered' END,
           CASE WHEN i.indisreplident THEN 'replica identity' END
       )
FROM relation AS r
JOIN pg_index AS i ON i.indrelid = r.oid
JOIN pg_class AS x ON x.oid = i.indexrelid
JOIN pg_namespace AS n ON n.oid = x.relnamespace

UNION ALL
SELECT 'trigger', format('%s.%I', r.object, g.tgname), pg_get_triggerdef(g.oid) || ', enabled ' || g.tgenabled::text
FROM relation AS r
JOIN pg_trigger AS g ON g.tgrelid = r.oid AND NOT g.tgisinternal

UNION ALL
SELECT 'rule', format('%s.%I', r.object, w.rulename), pg_get_ruledef(w.oid) || ', enabled ' || w.ev_enabled::text
FROM relation AS r
JOIN pg_rewrite AS w ON w.ev_class = r.oid

UNION ALL
SELECT 'policy',
       format('%s.%I', r.object, p.polname),
       concat_ws(', ',
           p.polcmd::text,
           CASE WHEN p.polpermissive THEN 'permissive' ELSE 'restrictive' END,
           'roles ' || (SELECT string_agg(pg_get_userbyid(role), ' ' ORDER BY role) FROM unnest(p.polroles) AS role),
           'using ' || pg_get_expr(p.polqual, p.polrelid),
           'check ' || pg_get_expr(p.polwithcheck, p.polrelid)
       )
FROM relation AS r
JOIN pg_policy AS p ON p.polrelid = r.oid

UNION ALL
SELECT 'limits', r.object, coalesce(string_agg(x.limits, ', ' ORDER BY x.limits), 'none')
FROM relation AS r
LEFT JOIN LATERAL (
    SELECT format('constraint %I', k.conname) AS limits
    FROM pg_constraint AS k
    WHERE k.conrelid = r.oid AND k.contype NOT IN ('n', 't')
    UNION ALL
    SELECT format('unique index %s', i.indexrelid::regclass)
    FROM pg_index AS i
    WHERE i.indrelid = r.oid AND i.indisunique
    UNION ALL
    SELECT format('trigger %I', g.tgname)
    FROM pg_trigger AS g
    WHERE g.tgrelid = r.oid AND NOT g.tgisinternal
    UNION ALL
    SELECT format('rule %I', w.rulename)
    FROM pg_rewrite AS w
    WHERE w.ev_class = r.oid
    UNION ALL
    SELECT format('policy %I', p.polname)
    FROM pg_policy AS p
    WHERE p.polrelid = r.oid
    UNION ALL
    SELECT format('child %s', h.inhrelid::regclass)
    FROM pg_inherits AS h
    WHERE h.inhparent = r.oid
    UNION ALL
    SELECT format('required column %I', a.attname)
    FROM pg_attribute AS a
    WHERE a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
      AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''
) AS x ON true
WHERE r.relkind IN ('r', 'p', 'f', 'v', 'm')
GROUP BY r.object

------------------------------------------------------------ what is no relation

SELECT 'schema' AS kind, format('%I', n.nspname) AS object,
       format('owner %s, privileges %s', pg_get_userbyid(n.nspowner), coalesce(n.nspacl::text, 'default')) AS fact
FROM pg_namespace AS n
WHERE {schemas}

UNION ALL
SELECT CASE t.typtype WHEN 'e' THEN 'enum' WHEN 'd' THEN 'domain' ELSE 'range' END,
       format('%I.%I', n.nspname, t.typname),
       concat_ws(', ',
           'owner ' || pg_get_userbyid(t.typowner),
           (SELECT string_agg(quote_literal(e.enumlabel), ' ' ORDER BY e.enumsortorder)
            FROM pg_enum AS e WHERE e.enumtypid = t.oid),
           CASE WHEN t.typtype = 'd' THEN format_type(t.typbasetype, t.typtypmod) END,
           CASE WHEN t.typnotnull THEN 'not null' END,
           'default ' || t.typdefault,
           (SELECT string_agg(format('%I %s', k.conname, pg_get_constraintdef(k.oid)), ', ' ORDER BY k.conname)
            FROM pg_constraint AS k WHERE k.contypid = t.oid AND k.contype <> 'n'),
           (SELECT 'of ' || g.rngsubtype::regtype FROM pg_range AS g WHERE g.rngtypid = t.oid),
           'privileges ' || t.typacl::text
       )
FROM pg_type AS t
JOIN pg_namespace AS n ON n.oid = t.typnamespace
WHERE t.typtype IN ('e', 'd', 'r') AND {schemas}

UNION ALL
SELECT 'sequence values', format('%I.%I', n.nspname, c.relname),
       format('%s from %s by %s, %s to %s%s%s', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmin, s.seqmax,
              CASE WHEN s.seqcycle THEN ', cycle' ELSE '' END,
              (SELECT format(', owned by %s.%I', a.attrelid::regclass, a.attname)
               FROM pg_depend AS d
               JOIN pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
               WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass
                 AND d.deptype IN ('a', 'i')))
FROM pg_sequence AS s
JOIN pg_class AS c ON c.oid = s.seqrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE {schemas}

UNION ALL
SELECT CASE p.prokind WHEN 'a' THEN 'aggregate' WHEN 'p' THEN 'procedure' WHEN 'w' THEN 'window function'
                      ELSE 'function' END,
       format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)),
       concat_ws(', ',
           'owner ' || pg_get_userbyid(p.proowner),
           'returns ' || pg_get_function_result(p.oid),
           'arguments ' || pg_get_function_arguments(p.oid),
           'volatility ' || p.provolatile::text,
           CASE WHEN p.proisstrict THEN 'strict' END,
           CASE WHEN p.prosecdef THEN 'security definer' END,
           array_to_string(p.proconfig, ' '),
           'body ' || left(encode(sha256(convert_to(p.prosrc, 'UTF8')), 'hex'), 16),
           'privileges ' || p.proacl::text
       )
FROM pg_proc AS p
JOIN pg_namespace AS n ON n.oid = p.pronamespace
WHERE {schemas}
  AND NOT EXISTS (SELECT FROM pg_depend AS d
                  WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')

UNION ALL
SELECT 'statistics', format('%I.%I', n.nspname, x.stxname), pg_get_statisticsobjdef(x.oid)
FROM pg_statistic_ext AS x
JOIN pg_namespace AS n ON n.oid = x.stxnamespace
WHERE {schemas}

UNION ALL
SELECT 'publication', format('%I of %I.%I', p.pubname, n.nspname, c.relname), 'published'
FROM pg_publication AS p
JOIN pg_publication_rel AS m ON m.prpubid = p.oid
JOIN pg_class AS c ON c.oid = m.prrelid
JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE {schemas}

UNION ALL
SELECT 'extension', format('%I', e.extname), 'version ' || e.extversion
FROM pg_extension AS e

UNION ALL
SELECT 'event trigger', format('%I', v.evtname),
       format('%s on %s, enabled %s', v.evtfoid::regproc, v.evtevent, v.evtenabled)
FROM pg_event_trigger AS v
