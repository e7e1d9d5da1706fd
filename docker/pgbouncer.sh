#!/bin/sh
# Write the pooler's configuration from the environment and become the pooler.
set -eu
umask 077
place=$(mktemp -d)
printf '"shop_app" "%s"\n' "$SHOP_APP_PASSWORD" >"$place/users.txt"
cat >"$place/pgbouncer.ini" <<INI
[databases]
eu1 = host=eu1 dbname=shop
eu2 = host=eu2 dbname=shop
us1 = host=us1 dbname=shop

[pgbouncer]
listen_addr = ${LISTEN_ADDR:-0.0.0.0}
listen_port = 6432
unix_socket_dir =
auth_type = scram-sha-256
auth_file = $place/users.txt
pool_mode = transaction
default_pool_size = 20
max_client_conn = 500
INI
exec pgbouncer "$place/pgbouncer.ini"
