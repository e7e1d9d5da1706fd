--! shardmig plan 1
--! revision: 0003_order_address
--! parent: 0002_split_name
--! message: give an order's address a table of its own
--! flag: order_address
--! script: c9b34f643e33e12722eed307d897954e5cd1c1ec7e8f738fa51b85cb39f53520
--! plan: 1d83ddcc184fddeeab6f7c2c47e38c1bc6dff823b2d8a07be931db0ff2493dc6

--! step 1: statement
--! line: 13
CREATE TABLE order_address (
    order_id BIGINT NOT NULL,
    street TEXT,
    zip TEXT,
    city TEXT,
    PRIMARY KEY (order_id)
)
;

--! step 2: statement
--! line: 13
COMMENT ON TABLE order_address IS 'where an order goes'
;

--! step 3: switch to DUAL

--! step 4: move
--! line: 24
--! table: orders
--! key: id
--! target: order_address
--! target_key: order_id
--! writes: street, zip, city
--! restores: street, zip, city
--! forward:
WITH source AS MATERIALIZED (
    SELECT id AS order_id,
           street,
           zip,
           city
    FROM orders
    WHERE {batch}
    FOR SHARE
)
INSERT INTO order_address (order_id, street, zip, city)
SELECT order_id, street, zip, city
FROM source
ON CONFLICT (order_id) DO UPDATE
SET street = excluded.street,
    zip = excluded.zip,
    city = excluded.city
;
--! check:
WITH source AS MATERIALIZED (
    SELECT id AS order_id,
           street,
           zip,
           city
    FROM orders
    WHERE {batch}
)
SELECT source.order_id AS id
FROM source
LEFT JOIN order_address AS target ON target.order_id = source.order_id
WHERE target.order_id IS NULL
   OR target.street IS DISTINCT FROM source.street
   OR target.zip IS DISTINCT FROM source.zip
   OR target.city IS DISTINCT FROM source.city
;
--! orphans:
SELECT order_id
FROM order_address
WHERE {batch}
  AND NOT EXISTS (
    SELECT FROM orders AS source
    WHERE source.id = order_address.order_id
  )
;
--! purge:
DELETE FROM order_address
WHERE {batch}
  AND NOT EXISTS (
    SELECT FROM orders AS source
    WHERE source.id = order_address.order_id
  )
;
--! back:
WITH batch AS MATERIALIZED (
    SELECT id AS batch_id,
           ctid AS version
    FROM orders
    WHERE {batch}
),
target AS MATERIALIZED (
    SELECT order_id AS new_order_id,
           street AS new_street,
           zip AS new_zip,
           city AS new_city
    FROM order_address
    WHERE order_id IN (SELECT batch_id FROM batch)
    FOR SHARE
)
UPDATE orders AS source
SET street = target.new_street,
    zip = target.new_zip,
    city = target.new_city
FROM batch
LEFT JOIN target ON target.new_order_id = batch.batch_id
WHERE source.id = batch.batch_id
  AND (target.new_order_id IS NOT NULL OR source.ctid = batch.version)
;
--! back_check:
WITH source AS MATERIALIZED (
    SELECT id, street, zip, city
    FROM orders
    WHERE {batch}
)
SELECT source.id
FROM source
LEFT JOIN (
    SELECT order_id,
           street,
           zip,
           city
    FROM order_address
) AS target ON target.order_id = source.id
WHERE (source.street IS DISTINCT FROM target.street
    OR source.zip IS DISTINCT FROM target.zip
    OR source.city IS DISTINCT FROM target.city)
;

--! step 5: switch to LIVE
