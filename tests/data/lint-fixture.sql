-- The shard that the linter's cases speak of: everything here exists, is in use, and must be the same after each of them.
CREATE SCHEMA s2;
CREATE SEQUENCE s;
CREATE TYPE mood AS ENUM ('x', 'y');
CREATE TYPE comp AS (a int, b text);
CREATE DOMAIN d_plain AS text;
CREATE DOMAIN d_chk AS int CHECK (VALUE > 0);
CREATE TABLE t (
    id int PRIMARY KEY, a int, b text, c int DEFAULT 5, at timestamptz DEFAULT now(), r int4range, tags text[], j jsonb,
    deleted bool, flag bool
);
CREATE INDEX t_a ON t (a);
CREATE TABLE ref (id int PRIMARY KEY, name text);
CREATE TABLE src (id int PRIMARY KEY, total int);
CREATE TABLE child (id int PRIMARY KEY, t_id int REFERENCES t (id));
CREATE TABLE ip (id int, a int);
CREATE TABLE ic () INHERITS (ip);
CREATE TABLE nopk (id int);
CREATE TABLE pl (id int, a int) PARTITION BY RANGE (id);
CREATE TABLE pl_1 PARTITION OF pl FOR VALUES FROM (0) TO (100);
CREATE TABLE "Mixed" (id int);
CREATE TABLE s2.t2 (id int);
CREATE VIEW v AS SELECT id, a, b FROM t;
INSERT INTO t
    SELECT g, g, CASE WHEN g < 10 THEN g::text ELSE 'word ' || g END, g % 3, '2024-01-01', int4range(g, g + 2),
           ARRAY['x', g::text], '{"a": "1", "b": 2}', false, g % 2 = 0
    FROM generate_series(1, 20) AS g;
INSERT INTO ref SELECT g, 'name ' || g FROM generate_series(1, 20) AS g;
INSERT INTO src SELECT g, g FROM generate_series(100, 105) AS g;
INSERT INTO child SELECT g, g FROM generate_series(1, 10) AS g;
INSERT INTO ip SELECT g, g FROM generate_series(1, 5) AS g;
INSERT INTO ic SELECT g, g FROM generate_series(6, 9) AS g;
INSERT INTO nopk SELECT g FROM generate_series(1, 5) AS g;
INSERT INTO pl SELECT g, g FROM generate_series(1, 9) AS g;
INSERT INTO "Mixed" VALUES (1);
INSERT INTO s2.t2 VALUES (1);
