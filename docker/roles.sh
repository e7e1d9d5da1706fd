#!/bin/sh
# Run once by each shard's image, on its empty database: who owns the tables, who migrates, who works with them.
set -eu
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    --set migrator="$SHOP_MIGRATOR_PASSWORD" --set app="$SHOP_APP_PASSWORD" --set database="$POSTGRES_DB" <<'SQL'
CREATE ROLE shop_owner NOLOGIN;
CREATE ROLE shop_migrator LOGIN PASSWORD :'migrator' IN ROLE shop_owner;
CREATE ROLE shop_app LOGIN PASSWORD :'app';
-- A drain must see how old every session's transaction is, not only its own.
GRANT pg_read_all_stats TO shop_owner;
ALTER DATABASE :"database" OWNER TO shop_owner;
SQL
