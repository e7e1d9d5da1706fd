"""What application teams test with: the contract of neighbouring states, and their suite in each state."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from flag_doors import Ledger, install

from shardmig import Flag, Flags, State, View
from shardmig.flags.testing import Contract, adjacent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from conftest import AsyncConnect, Connect

    from shardmig.config import Shard

pytest_plugins = ["pytester"]

SPLIT_NAME = Flag("split_name")
flags = Flags(SPLIT_NAME)
Name = tuple[str, str | None]
Connection = psycopg.Connection[Any]

SAMPLES: list[Name] = [("Ada", "Lovelace"), ("Grace", "Brewster Hopper"), ("Plato", None), ("Åse", "Łukasiewicz")]
MOVE = """
    UPDATE customer SET first_name = split_part(full_name, ' ', 1),
        last_name = CASE WHEN position(' ' in full_name) > 0 THEN substr(full_name, position(' ' in full_name) + 1) END
"""


def full(name: Name) -> str:
    return " ".join(part for part in name if part)


def split(full_name: str) -> Name:
    first, _, last = full_name.partition(" ")
    return first, last or None


def insert(connection: Connection, columns: Mapping[str, object]) -> int:
    names, marks = ", ".join(columns), ", ".join(["%s"] * len(columns))
    statement = f"INSERT INTO customer ({names}) VALUES ({marks}) RETURNING id"
    row = connection.execute(statement, list(columns.values())).fetchone()
    assert row is not None
    return int(row[0])


def write(connection: Connection, view: View, name: Name) -> int:
    state = view[SPLIT_NAME]
    columns: dict[str, object] = {}
    if state.writes_old:
        columns["full_name"] = full(name)
    if state.writes_new:
        columns |= {"first_name": name[0], "last_name": name[1]}
    return insert(connection, columns)


def read(connection: Connection, view: View, key: int) -> Name:
    columns = "SELECT full_name, first_name, last_name FROM customer WHERE id = %s"
    row = connection.execute(columns, (key,)).fetchone()
    assert row is not None
    return (row[1], row[2]) if view[SPLIT_NAME].reads_new else split(row[0] or "nobody")


def move(connection: Connection) -> None:
    connection.execute(MOVE)


def contract(**parts: Any) -> Contract[Connection, Name, int]:
    usual: dict[str, Any] = {"write": write, "read": read, "samples": SAMPLES, "move": move}
    usual |= {"forward": split, "back": full, "old_samples": ["Ada Lovelace", "Plato"], "new_samples": SAMPLES}
    return Contract(flags, SPLIT_NAME, **{**usual, **parts})


def broken(kind: Contract[Connection, Name, int], begin: Any) -> list[str]:
    """Return the cases that do not hold."""
    failed = []
    for case in kind.cases():
        try:
            kind.verify(case, begin)
        except AssertionError:
            failed.append(case)
    return failed


@pytest.fixture
def ledger(shard: Shard, connect: Connect) -> Ledger:
    asyncio.run(install(shard))
    made = Ledger(connect(shard), "eu1")
    made.connection.execute(
        "CREATE TABLE customer (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, "
        "full_name text, first_name text, last_name text)"
    )
    return made


@pytest.fixture
def begin(shard: Shard, ledger: Ledger, connect: Connect) -> Callable[[], Any]:
    connection = connect(shard)

    @contextmanager
    def opening() -> Iterator[Connection]:
        with flags.transaction(connection, shard="eu1"):
            yield connection

    return opening


def test_ten_pairs_are_adjacent() -> None:
    expected = [(writer, reader) for writer in State for reader in State if abs(writer - reader) <= 1]

    assert (10, expected) == (len(adjacent()), list(adjacent()))
    assert ((0, 0), (0, 2), (2, 0), (2, 2)) == adjacent(has_move=False)


def test_a_sound_application_keeps_its_contract(begin: Any) -> None:
    kind = contract()

    assert 12 == len(kind.cases())
    assert [] == broken(kind, begin)


def forgets_new_in_dual(connection: Connection, view: View, name: Name) -> int:
    if view[SPLIT_NAME] is State.DUAL:
        return insert(connection, {"full_name": full(name)})
    return write(connection, view, name)


def forgets_old_in_live(connection: Connection, view: View, name: Name) -> int:
    if view[SPLIT_NAME] is State.LIVE:
        return insert(connection, {"first_name": name[0], "last_name": name[1]})
    return write(connection, view, name)


def reads_new_too_early(connection: Connection, view: View, key: int) -> Name:
    row = connection.execute("SELECT first_name, last_name FROM customer WHERE id = %s", (key,)).fetchone()
    assert row is not None
    return (row[0], row[1]) if view[SPLIT_NAME].writes_new else read(connection, view, key)


def knows_more_in_dual(connection: Connection, view: View, name: Name) -> int:
    """Write more into new than forward(old) gives; the move will take it away again."""
    columns = {"full_name": name[0], "first_name": name[0], "last_name": name[1]}
    return insert(connection, columns) if view[SPLIT_NAME] is State.DUAL else write(connection, view, name)


def moves_half_of_the_name(connection: Connection) -> None:
    connection.execute(
        "UPDATE customer SET first_name = split_part(full_name, ' ', 1), last_name = split_part(full_name, ' ', 2)"
    )


@pytest.mark.parametrize(
    ("mistake", "found_by"),
    [
        ({"write": forgets_new_in_dual}, "DUAL writes, LIVE reads"),
        ({"write": forgets_old_in_live}, "LIVE writes, DUAL reads"),
        ({"read": reads_new_too_early}, "OLD writes, DUAL reads"),
        ({"write": knows_more_in_dual}, "the move fills what DUAL leaves"),
        ({"move": moves_half_of_the_name}, "the move fills what DUAL leaves"),
        ({"forward": lambda name: tuple(name.split(" ")[:2])}, "forward and back lose nothing"),
    ],
)
def test_a_mistake_breaks_the_contract(begin: Any, mistake: dict[str, Any], found_by: str) -> None:
    assert found_by in broken(contract(**mistake), begin)


def test_a_broken_contract_says_what_was_written_and_read(begin: Any) -> None:
    with pytest.raises(AssertionError, match=r"DUAL wrote it, LIVE reads it: expected \('Ada', 'Lovelace'\), found"):
        contract(write=forgets_new_in_dual).verify("DUAL writes, LIVE reads", begin)


async def test_async_code_keeps_its_contract_too(shard: Shard, ledger: Ledger, aconnect: AsyncConnect) -> None:
    connection = await aconnect(shard)

    @asynccontextmanager
    async def opening() -> AsyncIterator[Any]:
        async with flags.atransaction(connection, shard="eu1"):
            yield connection

    async def awrite(connection: Any, view: View, name: Name) -> int:
        columns = "INSERT INTO customer (full_name, first_name, last_name) VALUES (%s, %s, %s) RETURNING id"
        state = view[SPLIT_NAME]
        new = name if state.writes_new else (None, None)
        cursor = await connection.execute(columns, (full(name) if state.writes_old else None, *new))
        return int((await cursor.fetchone())[0])

    async def aread(connection: Any, view: View, key: int) -> Name:
        columns = "SELECT full_name, first_name, last_name FROM customer WHERE id = %s"
        row = await (await connection.execute(columns, (key,))).fetchone()
        return (row[1], row[2]) if view[SPLIT_NAME].reads_new else split(row[0] or "nobody")

    async def amove(connection: Any) -> None:
        await connection.execute(MOVE)

    kind = contract(write=awrite, read=aread, move=amove)
    assert kind.is_async
    for case in kind.cases():
        await kind.averify(case, opening)


def test_an_async_session_keeps_its_contract_with_an_async_fixture(project: pytest.Pytester, shard: Shard) -> None:
    """Flags are read when the session connects, which it has not done when it is handed over."""
    url = shard.url.get_secret_value().replace("postgresql://", "postgresql+psycopg://")
    tests = f"""
        from contextlib import asynccontextmanager
        import pytest, shop
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
        from shardmig.flags.testing import Contract
        from shardmig.integrations.pytest_plugin import contract_test
        from shardmig.integrations.sqlalchemy import install

        INSERT = text("INSERT INTO customer (full_name, first_name) VALUES (:old, :new) RETURNING id")
        async def write(session, view, name):
            state = view[shop.SPLIT_NAME]
            names = {{"old": name if state.writes_old else None, "new": name if state.writes_new else None}}
            return (await session.execute(INSERT, names)).scalar_one()
        async def read(session, view, key):
            column = "first_name" if view[shop.SPLIT_NAME].reads_new else "full_name"
            found = await session.execute(text(f"SELECT {{column}} FROM customer WHERE id = :key"), {{"key": key}})
            return found.scalar_one()

        @pytest.fixture
        async def begin_on_eu1():
            engine = install(create_async_engine({url!r}), shop.flags, shard="eu1")
            @asynccontextmanager
            async def begin():
                async with AsyncSession(engine) as session, session.begin():
                    yield session
            yield begin
            await engine.dispose()
        contract = Contract(shop.flags, shop.SPLIT_NAME, write=write, read=read, samples=["Ada", ""])
        test_contract = contract_test(contract, begin="begin_on_eu1")
    """

    assert {"passed": 10, "skipped": 1} == run(project, tests)


def test_a_release_is_only_held_to_states_it_can_be_in(begin: Any) -> None:
    live = Flag("split_name", at_least=State.LIVE)
    kind = Contract(Flags(live), live, write=write, read=read, samples=SAMPLES, move=move)

    assert [
        "LIVE writes, LIVE reads",
        "LIVE writes, DONE reads",
        "DONE writes, LIVE reads",
        "DONE writes, DONE reads",
    ] == (list(kind.cases()))


def test_a_contract_needs_samples() -> None:
    with pytest.raises(ValueError, match="any code"):
        contract(samples=[])


# --------------------------------------------------------------------------------------------------------------------
# The plugin, in a pytest of its own

_APPLICATION = """
    import psycopg
    from contextlib import contextmanager
    from shardmig import Flag, Flags
    SPLIT_NAME = Flag("split_name")
    flags = Flags(SPLIT_NAME)
    connection = psycopg.connect({url!r}, autocommit=True)
    @contextmanager
    def begin():
        with flags.transaction(connection, shard="eu1"):
            yield connection
    def state():
        with begin() as connection:
            return flags.of(connection)[SPLIT_NAME]
"""


@pytest.fixture
def project(pytester: pytest.Pytester, shard: Shard, ledger: Ledger) -> pytest.Pytester:
    """Return a project with an application, whose tests run in a process of their own."""
    del ledger
    pytester.makepyfile(shop=_APPLICATION.format(url=shard.url.get_secret_value()))
    pytester.makeini(
        "[pytest]\nshardmig_flags = shop:flags\nasyncio_mode = auto\n"
        "asyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    pytester.syspathinsert()
    return pytester


def run(project: pytest.Pytester, tests: str, *options: str) -> dict[str, int]:
    project.makepyfile(test_shop=tests)
    ended = project.runpytest_subprocess(*options)
    return ended.parseoutcomes()


def test_a_marked_test_runs_once_a_state_in_threads_and_tasks_too(project: pytest.Pytester) -> None:
    tests = """
        import asyncio, pytest, shop, threading
        from shardmig import State
        pytestmark = pytest.mark.flag_states("split_name")
        def test_thread(flag_state):
            seen = []
            thread = threading.Thread(target=lambda: seen.append(shop.state()))
            thread.start(); thread.join()
            assert [flag_state] == seen
        async def test_task(flag_state):
            assert flag_state is await asyncio.create_task(asyncio.to_thread(shop.state))
        class TestClass:
            @pytest.mark.flag_states(shop.SPLIT_NAME, "dual", State.LIVE, flags=shop.flags)
            def test_only_these(self):
                assert shop.state() in (State.DUAL, State.LIVE)
            def test_that_never_asks_for_the_fixture(self):
                shop.state()
    """

    assert {"passed": 14} == run(project, tests)


def test_a_whole_suite_runs_in_one_state(project: pytest.Pytester) -> None:
    tests = """
        import pytest, shop
        from shardmig import State
        def test_state():
            assert State.{state} is shop.state()
        @pytest.mark.flag_states("split_name")
        def test_marked(flag_state):
            assert flag_state is shop.state()
    """

    assert {"passed": 2} == run(project, tests.format(state="LIVE"), "--flag-state", "split_name=live")
    assert {"passed": 5} == run(project, tests.format(state="OLD"))


@pytest.mark.parametrize("wrong", ["split_name=SIDEWAYS", "split_nam=LIVE"])
def test_a_state_or_flag_that_does_not_exist_stops_the_run(project: pytest.Pytester, wrong: str) -> None:
    project.makepyfile(test_shop="def test_nothing(): pass")

    ended = project.runpytest_subprocess("--flag-state", wrong)
    assert pytest.ExitCode.USAGE_ERROR == ended.ret
    ended.stderr.fnmatch_lines(["ERROR: no state*" if "SIDE" in wrong else "ERROR: no flag 'split_nam'*"])


def test_a_contract_becomes_a_test_in_one_line(project: pytest.Pytester) -> None:
    tests = """
        import pytest, shop
        from shardmig.flags.testing import Contract
        from shardmig.integrations.pytest_plugin import contract_test

        INSERT = "INSERT INTO customer (full_name, first_name) VALUES (%s, %s) RETURNING id"
        def insert(connection, *names):
            return connection.execute(INSERT, names).fetchone()[0]
        def write(connection, view, name):
            state = view[shop.SPLIT_NAME]
            old, new = (name if state.writes_old else None), (name if state.writes_new else None)
            return insert(connection, old, new)
        def read(connection, view, key):
            column = "first_name" if view[shop.SPLIT_NAME].reads_new else "full_name"
            return connection.execute(f"SELECT {column} FROM customer WHERE id = %s", (key,)).fetchone()[0]
        def forgetful(connection, view, name):
            return insert(connection, name, None)

        @pytest.fixture
        def begin_on_eu1():
            return shop.begin
        def contract(write):
            return Contract(shop.flags, shop.SPLIT_NAME, write=write, read=read, samples=["Ada", "", None])
        test_contract = contract_test(contract(write), begin="begin_on_eu1")
        test_forgetful = contract_test(contract(forgetful), begin="begin_on_eu1")
    """

    # Forgetful writers never write new: whoever reads it in LIVE or DONE finds nothing.
    assert {"passed": 10 + 5, "failed": 5, "skipped": 2} == run(project, tests)

    project.mkdir("migrations").joinpath("0001_split_name.py").write_text('revision = "0001_split_name"\n')
    assert {"passed": 10 + 5 + 2, "failed": 5} == run(project, tests)

    script = 'revision, flag = "0001_split_name", "split_names"\n'
    project.path.joinpath("migrations", "0001_split_name.py").write_text(script)
    project.makepyfile(test_shop=tests)
    ended = project.runpytest_subprocess()
    ended.assert_outcomes(passed=10 + 5, failed=5 + 2)
    ended.stdout.fnmatch_lines(["*has a flag split_name: it reads OLD for ever; did you mean split_names?*"])


def test_local_shards_are_real_and_walk_through_every_state(pytester: pytest.Pytester) -> None:
    """The demo shop's own migrations, applied; then one shard is switched back and forth with moves and drains."""
    tests = """
        import psycopg
        from shardmig import Flag, Flags, State
        SPLIT_NAME = Flag("split_name")
        flags = Flags(SPLIT_NAME)
        def state(url, shard):
            with psycopg.connect(url, autocommit=True) as connection:
                with flags.transaction(connection, shard=shard) as view:
                    return view[SPLIT_NAME]
        async def test_states(local_shards):
            assert ["eu1", "us1"] == list(local_shards)
            assert {State.LIVE} == {state(url, name) for name, url in local_shards.items()}
            for wanted in (State.DUAL, State.DONE, State.OLD, State.LIVE):
                local_shards.switch("split_name", wanted, shard="eu1")
                assert (wanted, State.LIVE) == tuple(state(url, name) for name, url in local_shards.items())
    """
    migrations = Path(__file__).parents[1] / "migrations"
    pytester.makeini(f"[pytest]\nasyncio_mode = auto\nshardmig_migrations = {migrations}\n")

    assert {"passed": 1} == run(pytester, tests)


_ENV = """
from alembic import context
from sqlalchemy import create_engine

with create_engine(context.config.get_main_option("sqlalchemy.url")).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
_ALEMBICS = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "1975ea83b712", None
def upgrade():
    op.create_table("customer", sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", sa.Text))
def downgrade():
    op.drop_table("customer")
"""
_OURS = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0001_nickname", "1975ea83b712"
def upgrade():
    op.add_column("customer", sa.Column("nickname", sa.Text))
"""
_BASE = """
import alembic.command, alembic.config
def build(url):
    config = alembic.config.Config("alembic.ini")
    url = url.replace("postgresql://", "postgresql+psycopg://").replace("%", "%%")
    config.set_main_option("sqlalchemy.url", url)
    alembic.command.upgrade(config, "1975ea83b712")
"""
_ADOPTED = """
migrations = "alembic/versions"
[lint]
start_after = "1975ea83b712"
[shards.eu1]
url = "${NOWHERE_IN_A_TEST}"
"""


@pytest.mark.parametrize("has_base", [True, False])
def test_local_shards_of_an_adopted_project_begin_with_what_alembic_made(
    pytester: pytest.Pytester, *, has_base: bool
) -> None:
    files = {
        "alembic.ini": "[alembic]\nscript_location = alembic\n",
        "alembic/env.py": _ENV,
        "alembic/versions/1975ea83b712_shop.py": _ALEMBICS,
        "alembic/versions/0001_nickname.py": _OURS,
        "alembic/versions/HEAD": "0001_nickname\n",
        "base.py": _BASE,
        "shardmig.toml": _ADOPTED,
        "pytest.ini": "[pytest]\nshardmig_shards = eu1\n" + "shardmig_base = base:build\n" * has_base,
    }
    for name, text in files.items():
        path = pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pytester.syspathinsert()
    pytester.makepyfile(
        test_shop="""
        import psycopg
        def test_nickname(local_shards):
            with psycopg.connect(local_shards["eu1"]) as connection:
                connection.execute("SELECT nickname FROM customer")
        """
    )

    ended = pytester.runpytest_subprocess()

    if has_base:
        ended.assert_outcomes(passed=1)
    else:
        ended.assert_outcomes(errors=1)
        ended.stdout.fnmatch_lines(["*this project was adopted at 1975ea83b712*", "*shardmig_base = *"])
