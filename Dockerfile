# Two small images, neither run by root:
#   docker build --target shardmig .    the command line, with this repository's migrations
#   docker build --target pooler .      PgBouncer, for the application's connections

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY shardmig shardmig
RUN python -m venv /opt/shardmig \
    && /opt/shardmig/bin/pip install --no-cache-dir '.[cli]' 'psycopg[binary]' \
    && /opt/shardmig/bin/pip uninstall --yes pip

FROM python:3.13-slim AS shardmig
RUN useradd --system --uid 10001 --no-create-home shardmig
COPY --from=build /opt/shardmig /opt/shardmig
WORKDIR /app
COPY docker/shardmig.toml docker/shardmig.toml
COPY migrations migrations
ENV PATH=/opt/shardmig/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER shardmig
ENTRYPOINT ["shardmig"]
CMD ["--help"]

FROM debian:trixie-slim AS pooler
RUN apt-get update \
    && apt-get install --yes --no-install-recommends pgbouncer \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10002 --no-create-home pooler
COPY --chmod=755 docker/pgbouncer.sh /usr/local/bin/pooler
USER pooler
EXPOSE 6432
ENTRYPOINT ["pooler"]
