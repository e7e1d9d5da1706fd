"""The manifests of deploy/kubernetes: their configuration loads, and their commands are commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardmig import config
from shardmig.rollout import partition

MANIFESTS = Path(__file__).parents[1] / "deploy" / "kubernetes"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / name).read_text())  # type: ignore[no-any-return]


def container(name: str) -> dict[str, Any]:
    return manifest(name)["spec"]["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    """Load the ConfigMap's file as a pod would, with the secret's urls."""
    path = tmp_path / "shardmig.toml"
    path.write_text(manifest("config.yaml")["data"]["shardmig.toml"])
    for name in ("EU1", "EU2", "US1"):
        monkeypatch.setenv(f"{name}_URL", f"postgresql://migrator:s3cret@{name.lower()}/shop")
    return config.load(path)


def test_the_configuration_loads_and_has_a_canary(loaded: config.Config) -> None:
    assert ["canary", None, None] == [shard.wave for shard in loaded.shards.values()]


def test_the_parts_of_the_indexed_job_cover_the_fleet_it_expects(loaded: config.Config) -> None:
    job = manifest("fleet.yaml")["spec"]
    words = shlex.split(container("fleet.yaml")["args"][0])
    parts = job["completions"]
    shards = list(loaded.shards.values())

    assert str(len(shards)) == words[words.index("--expect") + 1]
    assert f"$((JOB_COMPLETION_INDEX + 1))/{parts}" == words[words.index("--partition") + 1]
    assert sorted(s.name for s in shards) == sorted(
        s.name for part in range(1, parts + 1) for s in partition(shards, f"{part}/{parts}")
    )


@pytest.mark.parametrize("name", ["canary.yaml", "fleet.yaml"])
def test_a_jobs_command_is_one_that_the_command_line_knows(name: str) -> None:
    from typer.main import get_command  # noqa: PLC0415 - needs the cli extra

    from shardmig.cli import app  # noqa: PLC0415

    args = container(name)["args"]
    words = args if len(args) > 1 else shlex.split(args[0].removeprefix("exec shardmig "))
    verb = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    known = {option for parameter in verb.params for option in parameter.opts}

    assert {word for word in words if word.startswith("--")} <= known
