"""Public projects' models, from an empty shard by autogenerate alone; then a later release as a second revision."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from shardmig import config as configuration
from shardmig.fleet import Fleet
from shardmig.local import Server
from shardmig.repository import accepted_plans

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PROJECTS = [
    ("optuna", "3.0.0", "4.2.1", "optuna.storages._rdb.models", "BaseModel"),
    ("jupyterhub", "2.3.1", "5.2.1", "jupyterhub.orm", "Base"),
    ("mlflow", "2.19.0", "3.1.4", "mlflow.store.tracking.dbmodels.models", "Base"),
]

# A release's models are imported without its dependencies: what is missing stands in for anything.
STAND_IN = """
import importlib, importlib.abc, importlib.machinery, sys, types, warnings
warnings.simplefilter("ignore")

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls
    def __call__(cls, *args, **options):
        return args[0] if len(args) == 1 and callable(args[0]) and not options else cls
    def __iter__(cls): return iter(())
    def __len__(cls): return 0
    def __setitem__(cls, key, value): pass
    def __delitem__(cls, key): pass
    def __contains__(cls, key): return False
    def __enter__(cls): return cls
    def __exit__(cls, *_): pass
    def __bool__(cls): return True
    def __mro_entries__(cls, bases): return ()
    def __or__(cls, other): return cls
    __ror__ = __or__
    def __getitem__(cls, key): return cls
    def __instancecheck__(cls, one): return False
    def __lt__(cls, other): return False
    __gt__ = __le__ = __ge__ = __lt__

Thing = type.__call__(Anything, "Thing", (), {{}})

class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Thing

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        ours = {{"{package}", "psycopg2", "greenlet", "alembic", "sqlalchemy", "shardmig"}}
        if top in sys.stdlib_module_names | ours:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = []
        return spec
    def create_module(self, spec): return Module(spec.name)
    def exec_module(self, module): pass

sys.path.insert(0, "{where}")
sys.meta_path.append(Finder())
metadata = importlib.import_module("{module}").{base}.metadata
sys.meta_path.pop()
"""


@pytest.mark.parametrize(("package", "first", "second", "module", "base"), PROJECTS, ids=str)
def test_a_public_project_from_nothing_to_a_later_release(
    package: str, first: str, second: str, module: str, base: str, *, tmp_path: Path
) -> None:
    with Server.start("real") as server:
        (tmp_path / "shardmig.toml").write_text(
            f'models = ["release_models:metadata"]\n[lint]\npg_versions = [15, 18]\n'
            f'[shards.one]\nurl = "{server.create_database("one")}"\n'
        )
        for release in (first, second):
            where = tmp_path / f"{package}-{release}"
            install(package, release, where)
            (tmp_path / "release_models.py").write_text(
                STAND_IN.format(package=package, where=where, module=module, base=base)
            )
            said = run(tmp_path, "revision", "-m", f"release {release}", "--autogenerate")
            sys.stdout.write(f"\n{package} {release}\n{said}")
            assert not re.search(r"^\? (table|column|type) .* is left out", said, re.MULTILINE)
            assert re.search(r"^\+ ", said, re.MULTILINE)
            run(tmp_path, "plan")
            run(tmp_path, "lint")
            run(tmp_path, "check")
            config = configuration.load(tmp_path / "shardmig.toml")
            fleet = Fleet(config, accepted_plans(config), list(config.shards.values()))
            asyncio.run(fleet.apply()).raise_for_failures()
            assert "nothing to write" in run(tmp_path, "revision", "-m", "again", "--autogenerate", "--shard", "one")
        assert "1 shard looks as the plans say" in run(tmp_path, "verify", "--all")


def install(package: str, release: str, where: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(where)]
    done = subprocess.run([*command, f"{package}=={release}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{package} {release} cannot be installed here: {done.stderr.strip()[-200:]}")


def run(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "shardmig", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout
