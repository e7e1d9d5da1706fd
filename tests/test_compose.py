"""What docker-compose.yml promises, as far as it can be seen without Docker: on real servers and a real pooler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml
from jsonschema import Draft201909Validator  # type: ignore[import-untyped]
from servers import other_majors

from shardmig import local
from shardmig.binaries import unprivileged

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = Path(__file__).with_name("data") / "compose-spec.json"
SHARDS = ("eu1", "eu2", "us1")
PASSWORDS = {"SHOP_MIGRATOR_PASSWORD": "mi:gr@tor", "SHOP_APP_PASSWORD": "shop_app"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    written: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return written


@pytest.fixture(scope="module")
def validator() -> Draft201909Validator:
    return Draft201909Validator(json.loads(SCHEMA.read_text()))


def test_the_file_keeps_to_the_compose_specification(compose: dict[str, Any], validator: Draft201909Validator) -> None:
    assert [] == [f"{error.json_path}: {error.message}" for error in validator.iter_errors(compose)]


def test_the_specification_refuses_what_is_wrong(compose: dict[str, Any], validator: Draft201909Validator) -> None:
    misspelt = {"services": {"eu1": {**compose["services"]["eu1"], "imagge": "postgres"}}}

    assert not validator.is_valid(misspelt)


def test_every_service_waited_for_exists_and_can_become_what_is_waited_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for service in services.values():
        for name, wait in service.get("depends_on", {}).items():
            assert "service_healthy" != wait["condition"] or "healthcheck" in services[name]


def test_three_shards_stand_on_two_majors(compose: dict[str, Any]) -> None:
    images = [compose["services"][name]["image"] for name in SHARDS]

    assert {"postgres:17", "postgres:18"} == set(images)


def test_ports_are_published_on_this_machine_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_what_the_files_name_exists_and_is_sent_to_docker(compose: dict[str, Any]) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    dockerfile = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE):
        for source in (word for word in line.split() if not word.startswith("--")):
            assert (ROOT / source).exists()
            assert source.partition("/")[0] in sent
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            assert (ROOT / volume.partition(":")[0]).exists()
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in dockerfile


def test_no_image_runs_as_root() -> None:
    for stage in (ROOT / "Dockerfile").read_text().split("\nFROM ")[2:]:
        assert re.search(r"^USER (?!root)\w+$", stage, re.MULTILINE)


@pytest.mark.skipif(shutil.which("docker") is None, reason="no Docker client")
def test_docker_itself_reads_the_file() -> None:
    if subprocess.run(["docker", "compose", "version"], check=False, capture_output=True).returncode:
        pytest.skip("this Docker client has no compose plugin")
    subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, check=True)


# --------------------------------------------------------------------------------------------------------------------
# The same, run


@pytest.fixture(scope="module")
def fleet() -> Iterator[dict[str, local.Server]]:
    """Start the three shards with TCP, us1 on 17 where that is to be had, and run the image's script on each."""
    with ExitStack() as stack:
        started = {}
        for name in SHARDS:
            binaries = other_majors().get(17) if name == "us1" else None
            started[name] = stack.enter_context(local.Server.start(name, tcp=True, binaries=binaries))
            started[name].create_database("shop")
            initialise(started[name])
        yield started


def initialise(server: local.Server) -> None:
    psql = shutil.which("psql", path=f"{local.find_binaries().bindir}{os.pathsep}{os.environ['PATH']}")
    if psql is None:
        pytest.skip("no psql on this machine")
    image = {"POSTGRES_USER": "postgres", "POSTGRES_DB": "shop", **PASSWORDS}
    place = {"PGHOST": str(server.socket_dir), "PGPORT": str(server.port)}
    path = f"{Path(psql).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [ROOT / "docker" / "roles.sh"], env={**os.environ, **image, **place, "PATH": path}, check=True, text=True
    )


def url(server: local.Server, role: str) -> str:
    return server.url("shop", role=role, password=PASSWORDS[f"{role.upper()}_PASSWORD"], tcp=True)


@pytest.fixture(scope="module")
def migrated(compose: dict[str, Any], fleet: dict[str, local.Server]) -> subprocess.CompletedProcess[str]:
    """Run what the one-shot service runs, with the fleet's addresses instead of the containers' names."""
    service = compose["services"]["migrate"]
    urls = {f"{name.upper()}_URL": url(server, "shop_migrator") for name, server in fleet.items()}

    assert set(urls) == set(service["environment"])

    command = [sys.executable, "-m", "shardmig", *service["command"]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **urls}, capture_output=True, text=True, check=False)


def test_the_one_shot_service_brings_every_shard_to_the_head(
    migrated: subprocess.CompletedProcess[str], fleet: dict[str, local.Server]
) -> None:
    assert 0 == migrated.returncode, migrated.stdout + migrated.stderr
    for name, server in fleet.items():
        with psycopg.connect(url(server, "shop_app")) as connection:
            assert (name,) == connection.execute("SELECT shard FROM shardmig.shard").fetchone()
            assert (0,) == connection.execute("SELECT count(*) FROM customer").fetchone()


def test_no_password_shows_in_what_the_service_says(migrated: subprocess.CompletedProcess[str]) -> None:
    for password in ("mi:gr@tor", "mi%3Agr%40tor"):
        assert password not in migrated.stdout + migrated.stderr


@pytest.mark.skipif(not shutil.which("pgbouncer", path="/usr/sbin:/usr/bin"), reason="PgBouncer is not installed")
@pytest.mark.usefixtures("migrated")
def test_the_application_works_through_the_pooler(fleet: dict[str, local.Server], place: Path) -> None:
    port = local._free_port()
    script = (ROOT / "docker" / "pgbouncer.sh").read_text().replace("6432", str(port))
    for name, server in fleet.items():
        script = script.replace(f"host={name} ", f"host=127.0.0.1 port={server.port} ")
    path = f"/usr/sbin{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **PASSWORDS, "LISTEN_ADDR": "127.0.0.1", "TMPDIR": str(place), "PATH": path}
    with (
        (place / "log").open("wb") as log,
        subprocess.Popen(
            ["/bin/sh", "-c", script], env=environment, stdout=log, stderr=log, cwd="/", **unprivileged()
        ) as pooler,
    ):
        try:
            reached = await_pooler(pooler, f"postgresql://shop_app:shop_app@127.0.0.1:{port}", place / "log")
        finally:
            pooler.kill()

    assert list(SHARDS) == reached


@pytest.fixture
def place() -> Iterator[Path]:
    """Make a directory for the pooler's account: PgBouncer refuses to run as root, and pytest's tmp_path is root's."""
    with tempfile.TemporaryDirectory() as made:
        if account := unprivileged():
            os.chown(made, account["user"], account["group"])
        yield Path(made)


def await_pooler(pooler: subprocess.Popen[bytes], base: str, log: Path) -> list[str]:
    deadline = time.monotonic() + 10
    while pooler.poll() is None and time.monotonic() < deadline:
        with suppress(psycopg.OperationalError):
            found: list[str] = []
            for name in SHARDS:
                with psycopg.connect(f"{base}/{name}") as connection:
                    row = connection.execute("SELECT shard FROM shardmig.shard").fetchone()
                    found += row or ()
            return found
        time.sleep(0.02)
    raise AssertionError(log.read_text())
