--! shardmig plan 1
--! revision: 0002_split_name
--! parent: 0001_shop
--! message: split the customer's name
--! flag: split_name
--! relax: customer.full_name
--! script: a1848aad6328ba6bc3b0943baa1d9fd080a051ed3a743e5063be5b8d18105f88
--! plan: 148664059a7591cb5b667aeb5ed79bf0f4d0652a59ae84a8bf7db1b8db8844c3

--! step 1: statement
--! line: 13
ALTER TABLE customer
    ADD COLUMN first_name TEXT,
    ADD COLUMN last_name TEXT
;

--! step 2: switch to DUAL

--! step 3: move
--! line: 18
--! table: customer
--! key: id
--! writes: first_name, last_name
--! restores: full_name
--! forward:
UPDATE customer
SET first_name = (split_part(full_name, ' ', 1)),
    last_name = (CASE WHEN position(' ' in full_name) > 0 THEN substr(full_name, position(' ' in full_name) + 1) END)
WHERE {batch}
;
--! check:
SELECT id
FROM customer
WHERE {batch}
  AND (first_name IS DISTINCT FROM (split_part(full_name, ' ', 1))
    OR last_name IS DISTINCT FROM (CASE WHEN position(' ' in full_name) > 0 THEN substr(full_name, position(' ' in full_name) + 1) END))
;
--! back:
UPDATE customer
SET full_name = (first_name || coalesce(' ' || last_name, ''))
WHERE {batch}
;
--! back_check:
SELECT id
FROM customer
WHERE {batch}
  AND (full_name IS DISTINCT FROM (first_name || coalesce(' ' || last_name, '')))
;

--! step 4: switch to LIVE
