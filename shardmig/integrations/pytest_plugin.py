"""
What an application's test suite needs to live in both worlds.

    # pyproject.toml: [tool.pytest.ini_options] shardmig_flags = "shop.flags:flags"

    pytestmark = pytest.mark.flag_states("split_name")            # every test of this module in OLD, DUAL, LIVE, DONE
    test_split_name = contract_test(SPLIT_NAME_CONTRACT, begin="begin_on_eu1")    # the ten neighbouring pairs
    def test_shop(local_shards): connect(local_shards["eu1"])     # real servers, the project's migrations applied
    $ pytest --flag-state split_name=DUAL                         # the whole suite in one state, for a CI matrix

States are overridden in the whole process, so threads and event loops of the application see them too.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack, suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import pytest

from shardmig.errors import ScriptError, UnknownFlag
from shardmig.flags.connection import Flags
from shardmig.flags.core import Flag
from shardmig.states import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shardmig.flags.testing import Contract
    from shardmig.integrations.local_shards import LocalShards

__all__ = ["contract_test"]

_NAMED = "a script has this flag"
_STATES = pytest.StashKey[dict[str, State]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--flag-state NAME=STATE` and the ini keys."""
    parser.addini("shardmig_flags", "where the application's Flags are: package.module:name")
    parser.addini("shardmig_shards", "names of the shards that local_shards runs", type="args", default=["eu1", "us1"])
    parser.addini(
        "shardmig_migrations", "directory of the migrations that local_shards applies; by default the configuration's"
    )
    parser.addini(
        "shardmig_base",
        "package.module:function that makes of an empty database, by its URL, what migrations begin with",
    )
    parser.getgroup("shardmig").addoption(
        "--flag-state",
        action="append",
        default=[],
        metavar="FLAG=STATE",
        help="run every test with this flag in this state (repeatable); needs the ini key shardmig_flags",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse a state or flag that does not exist before any test runs."""
    config.addinivalue_line(
        "markers",
        "flag_states(flag, *states, flags=None): run the test once in each state of a flag (all it can be in by "
        "default); flag is a Flag or a name, flags defaults to the ini key shardmig_flags",
    )
    wanted = [text.partition("=") for text in config.getoption("--flag-state")]
    config.stash[_STATES] = {name: _state(state) for name, _, state in wanted}
    for name, state in config.stash[_STATES].items():
        flag = _flag(_declared(config), name)
        if state < flag.at_least:
            raise pytest.UsageError(f"{name} declares at_least={flag.at_least.name}; {state.name} is below it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a marked test once a state."""
    marker = metafunc.definition.get_closest_marker("flag_states")
    if marker is None:
        if "flag_state" in metafunc.fixturenames:
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: flag_state needs the marker flag_states")
        return
    flag, states = _marked(metafunc.config, marker)
    chosen = metafunc.config.stash[_STATES].get(flag.name)
    states = [state for state in states if chosen in (None, state)]
    metafunc.parametrize("flag_state", states, indirect=True, ids=[f"{flag.name}={state.name}" for state in states])


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Have every marked test ask for the fixture, also where only its class or module is marked."""
    if collector.istestfunction(obj, name):
        own = getattr(obj, "pytestmark", ())
        if collector.get_closest_marker("flag_states") or any(mark.name == "flag_states" for mark in own):
            pytest.mark.usefixtures("flag_state")(obj)


@pytest.fixture
def flag_state(request: pytest.FixtureRequest) -> Iterator[State]:
    """Give the state that this run of a marked test is in."""
    flags, flag = _flags_and_flag(request.config, request.node.get_closest_marker("flag_states"))
    with flags.override(flag, request.param, everywhere=True):
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _flag_states_of_the_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold what `--flag-state` says for the whole run."""
    with ExitStack() as overrides:
        for name, state in request.config.stash[_STATES].items():
            flags = _declared(request.config)
            overrides.enter_context(flags.override(flags[name], state, everywhere=True))
        yield


@pytest.fixture(scope="session")
def local_shards(request: pytest.FixtureRequest) -> Iterator[LocalShards]:
    """Run real throw-away shards with the project's migrations applied: URLs by name; needs shardmig[local]."""
    from shardmig.integrations.local_shards import running  # noqa: PLC0415 - it loads the whole tool

    config = request.config
    names, migrations = config.getini("shardmig_shards"), str(config.getini("shardmig_migrations") or "")
    base = _named(config, "shardmig_base") if config.getini("shardmig_base") else None
    with running(names, root=config.rootpath, migrations=migrations, base=base) as shards:
        yield shards


def contract_test(contract: Contract[Any, Any, Any], *, begin: str) -> Callable[..., object]:
    """
    Make a test of a contract: one case for each neighbouring pair, the move, the round trip, and the flag's name.

    A flag that no script has is OLD on every shard for ever; where the scripts are at hand, that is a case of its own.

    Args:
        contract: what must hold.
        begin: name of a fixture of yours, async or not: a function that opens a transaction with flags, as a context
            manager (an async one for coroutine functions), and gives what the contract's functions take.

    Returns:
        A test function; bind it to a name that begins with `test_`.
    """

    def sync_test(request: pytest.FixtureRequest, case: str) -> None:
        if case == _NAMED:
            _compare_with_scripts(contract.flag, request.config)
        else:
            contract.verify(case, request.getfixturevalue(begin))

    async def async_test(request: pytest.FixtureRequest, case: str) -> None:
        if case == _NAMED:
            _compare_with_scripts(contract.flag, request.config)
        else:
            await contract.averify(case, request.getfixturevalue(begin))

    cases = pytest.mark.parametrize("case", [*contract.cases(), _NAMED])
    # An async fixture has to be there when the test begins: in it a loop runs already, and another cannot.
    return pytest.mark.usefixtures(begin)(cases(async_test)) if contract.is_async else cases(sync_test)


def _compare_with_scripts(flag: Flag, config: pytest.Config) -> None:
    """Fail where scripts are at hand and none has this flag; scripts are read, not executed."""
    from shardmig.scripts import read_script  # noqa: PLC0415 - it loads the tool's side

    directory = _migrations(config)
    known = set()
    for path in directory.glob("*.py"):
        with suppress(ScriptError):  # plain Alembic's, from before shardmig was adopted
            known.add(read_script(path).flag)
    if not known:
        pytest.skip(f"no migrations in {directory} (the ini key shardmig_migrations) to compare the flag with")
    if flag.name not in known:
        near = "".join(f"; did you mean {name}?" for name in get_close_matches(flag.name, known, n=1))
        raise AssertionError(f"no script in {directory.name}/ has a flag {flag.name}: it reads OLD for ever{near}")


def _migrations(config: pytest.Config) -> Path:
    """Find the scripts: where the ini key says, else where the project's configuration does."""
    from shardmig.config import nearest  # noqa: PLC0415 - it loads the tool's side

    named = str(config.getini("shardmig_migrations") or "")
    return config.rootpath / named if named else nearest(config.rootpath).migrations_dir


# --------------------------------------------------------------------------------------------------------------------
# What was meant


def _marked(config: pytest.Config, marker: pytest.Mark) -> tuple[Flag, list[State]]:
    _, flag = _flags_and_flag(config, marker)
    states = [_state(state) for state in marker.args[1:]] or [state for state in State if state >= flag.at_least]
    return flag, states


def _flags_and_flag(config: pytest.Config, marker: pytest.Mark) -> tuple[Flags, Flag]:
    flags = marker.kwargs.get("flags") or _declared(config)
    return flags, _flag(flags, marker.args[0])


def _flag(flags: Flags, named: Flag | str) -> Flag:
    try:
        return flags[named.name if isinstance(named, Flag) else named]
    except UnknownFlag as error:
        raise pytest.UsageError(str(error)) from error


def _state(named: State | str) -> State:
    if isinstance(named, State):
        return named
    try:
        return State[named.upper()]
    except KeyError:
        raise pytest.UsageError(f"no state {named!r}: {', '.join(state.name for state in State)}") from None


def _declared(config: pytest.Config) -> Flags:
    found = _named(config, "shardmig_flags")
    if not isinstance(found, Flags):
        raise pytest.UsageError(f"shardmig_flags: {config.getini('shardmig_flags')} is no shardmig.Flags")
    return found


def _named(config: pytest.Config, key: str) -> Any:  # noqa: ANN401 - whatever the project named
    """Import what an ini key names."""
    module, _, name = str(config.getini(key) or "").partition(":")
    if not (module and name):
        raise pytest.UsageError(f'say where it is: {key} = "package.module:name" in the ini options')
    return getattr(importlib.import_module(module), name)
