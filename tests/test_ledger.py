"""The ledger holds what is true: every lawful edge works, everything else is refused, whoever writes it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from moving import FLAG, REVISION, VERSIONS, blocked, moving, plan_of, same_table
from psycopg.conninfo import make_conninfo
from servers import proxied

from shardmig import ledger, switching
from shardmig.config import SessionSettings, Shard
from shardmig.errors import Fenced, PreflightFailed, SwitchRefused, WrongShard
from shardmig.plan import Plan, Switch
from shardmig.records import read_records
from shardmig.session import open_session
from shardmig.states import EDGES, Edge, Guard, State
from shardmig.steps import Steps
from shardmig.turn import Turn, begin_anew, begin_migration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from conftest import Connect

    from shardmig import local

T = "CREATE TABLE t (id bigint PRIMARY KEY, a text, b text, n int)"
GUARDS = ("drained", "new_valid", "old_valid")


async def begun(shard: Shard, *, has_move: bool) -> None:
    """Leave a shard whose ledger knows one flag, in OLD."""
    plan = plan_of(same_table()) if has_move else plan_of().model_copy(update={"steps": (Switch(to=State.LIVE),)})
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        await ledger.install(session)
        await session.flight(begin_migration(shard.name, plan, position=1, text="x"))


def put(connection: psycopg.Connection[Any], state: State, guards: Iterable[str]) -> None:
    """Place the flag anywhere, behind the trigger's back."""
    values = ", ".join(f"{guard} = {guard in set(guards)}" for guard in GUARDS)
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute(f"UPDATE shardmig.flag SET state = {state.value}, {values}")


def flag_row(connection: psycopg.Connection[Any]) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(
        "SELECT state, drained, new_valid, old_valid, epoch FROM shardmig.flag"
    ).fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("has_move", [True, False])
async def test_a_plain_update_takes_each_lawful_edge_and_no_other(
    shard: Shard, connect: Connect, *, has_move: bool
) -> None:
    await begun(shard, has_move=has_move)
    psql = connect(shard)
    taken: dict[tuple[State, State], set[tuple[str, ...]]] = {}
    for source, target in product(State, State):
        for guards in ((), ("drained",), ("new_valid",), ("old_valid",), GUARDS):
            put(psql, source, guards)
            try:
                psql.execute("UPDATE shardmig.flag SET state = %s", [target.value])
            except psycopg.errors.DatabaseError:
                continue
            if source is not target:
                taken.setdefault((source, target), set()).add(guards)

    def allowed(guard: Guard) -> set[tuple[str, ...]]:
        every: set[tuple[str, ...]] = {(), ("drained",), ("new_valid",), ("old_valid",), GUARDS}
        return {guards for guards in every if guard is Guard.NONE or guard.value in guards}

    assert {(e.source, e.target): allowed(e.guard) for e in EDGES if e.has_move is has_move} == taken


async def test_a_flip_and_its_bookkeeping_are_one_update(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=True)
    for edge in (edge for edge in EDGES if edge.has_move):
        take(edge, connect(shard))


def take(edge: Edge, psql: psycopg.Connection[Any]) -> None:
    psql.execute("UPDATE shardmig.step SET cursor = '{7}', upto = '{9}', rows = 7, term = 3 WHERE kind = 'move'")
    put(psql, edge.source, GUARDS)
    before = flag_row(psql)

    psql.execute("UPDATE shardmig.flag SET state = %s, drained = true, new_valid = true", [edge.target.value])

    after = flag_row(psql)
    assert (edge.target.value, False, edge.invalidates != "new_valid", edge.invalidates != "old_valid") == after[:4]
    assert before[4] != after[4]
    assert psql.execute("SELECT epoch FROM shardmig.shard").fetchone() == (after[4],)
    step = psql.execute("SELECT cursor, upto, rows, term FROM shardmig.step WHERE kind = 'move'").fetchone()
    assert ((None, None, 0, 0) if edge.forgets else (["7"], ["9"], 7, 0)) == step
    logged = psql.execute("SELECT action, before, after FROM shardmig.log ORDER BY id DESC LIMIT 1").fetchall()
    assert [("switch", edge.source.name, edge.target.name)] == logged


async def test_whoever_takes_a_flag_forward_has_done_its_switches_and_finished_its_plan(
    shard: Shard, connect: Connect
) -> None:
    """Were they left to the runner, a plan that psql took LIVE would never be finished."""
    await begun(shard, has_move=True)
    psql = connect(shard)
    seen = []
    for to in ("DUAL", "LIVE"):
        psql.execute("SELECT shardmig.switch('x', %s, 'go')", [to])
        seen.append([status for (status,) in psql.execute("SELECT status FROM shardmig.step ORDER BY number")])
        seen.append(psql.execute("SELECT finished_at IS NULL, finished_by FROM shardmig.migration").fetchall())
        psql.execute(
            "UPDATE shardmig.step SET status = 'DONE', direction = 'forward', checked_at = now() WHERE number = 2"
        )
        psql.execute("UPDATE shardmig.flag SET drained = true, new_valid = true WHERE state = 1")

    assert [["DONE", "PENDING", "PENDING"], [(True, None)], ["DONE"] * 3, [(False, "postgres")]] == seen


async def test_a_plan_with_a_step_left_is_not_finished_by_its_flag(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=False)
    psql = connect(shard)
    psql.execute(
        "INSERT INTO shardmig.step (shard, revision, number, kind, sha256) SELECT shard, revision, 9, 'move', '' "
        "FROM shardmig.step"
    )

    psql.execute("SELECT shardmig.switch('x', 'LIVE', 'go')")

    assert [(None,)] == psql.execute("SELECT finished_at FROM shardmig.migration").fetchall()


async def test_a_bit_is_only_earned_in_the_state_that_can_earn_it(shard: Shard, connect: Connect) -> None:
    """After the drain, and when the plan's every move has compared its rows on this very way."""
    await begun(shard, has_move=True)
    psql = connect(shard)
    earned = set()
    ways = (None, "forward", "back")
    for column, state, drained, compared in product(("new_valid", "old_valid"), State, (True, False), ways):
        put(psql, state, ["drained"] if drained else [])
        psql.execute(
            "UPDATE shardmig.step SET direction = coalesce(%(way)s, 'forward'), "
            "checked_at = CASE WHEN %(way)s::text IS NOT NULL THEN now() END WHERE kind = 'move'",
            {"way": compared},
        )
        try:
            psql.execute(f"UPDATE shardmig.flag SET {column} = true")
        except psycopg.errors.DatabaseError:
            continue
        else:
            earned.add((column, state, drained, compared))

    assert {("new_valid", State.DUAL, True, "forward"), ("old_valid", State.LIVE, True, "back")} == earned


FORGERIES = (
    "DELETE FROM shardmig.flag",
    "TRUNCATE shardmig.flag",
    "UPDATE shardmig.flag SET flag = 'y'",
    "UPDATE shardmig.flag SET has_move = false",
    "UPDATE shardmig.flag SET epoch = epoch + 1",
    "UPDATE shardmig.flag SET state = 4",
    "INSERT INTO shardmig.flag (shard, flag, revision, state, has_move) VALUES ('eu1', 'y', '3', 2, true)",
    "INSERT INTO shardmig.flag (shard, flag, revision, new_valid, has_move) VALUES ('eu1', 'y', '3', true, true)",
    "UPDATE shardmig.log SET reason = 'no'",
    "UPDATE shardmig.log SET shard = 'eu9'",
    "DELETE FROM shardmig.log",
    "TRUNCATE shardmig.log",
)


async def test_what_the_ledger_says_cannot_be_forged_by_hand(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=True)
    psql = connect(shard)
    psql.execute("SELECT shardmig.switch('x', 'DUAL', 'why')")

    for change in FORGERIES:
        with pytest.raises(psycopg.errors.DatabaseError):
            psql.execute(change)


async def test_operators_take_a_flag_anywhere_but_to_done(shard: Shard, connect: Connect) -> None:
    """Whether INSERTs may leave old out, and whether back(new) is what stands there, the command looks at alone."""
    await begun(shard, has_move=True)
    psql = connect(shard)
    put(psql, State.LIVE, GUARDS)

    with pytest.raises(psycopg.errors.DatabaseError, match="goes DONE by the command alone") as refused:
        psql.execute("SELECT shardmig.switch('x', 'done', 'why')")
    assert "shardmig switch x DONE --shard eu1" == refused.value.diag.message_hint
    psql.execute("SELECT shardmig.switch('x', 'DUAL', 'why')")
    put(psql, State.DONE, ())
    psql.execute("SELECT shardmig.switch('x', 'LIVE', 'why')")
    assert State.LIVE.value == flag_row(psql)[0]


async def test_a_flag_waits_for_the_flags_it_needs_and_locks_their_way_back(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=False)
    plan = Plan(
        revision="0003_y",
        parent=REVISION,
        flag="y",
        script_sha256="0" * 64,
        needs=(FLAG,),
        steps=(Switch(to=State.DUAL), same_table(), Switch(to=State.LIVE)),
    )
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        await session.flight(begin_migration(shard.name, plan, position=2, text="y"))
    psql = connect(shard)

    with pytest.raises(psycopg.errors.DatabaseError, match="needs x LIVE first"):
        psql.execute("SELECT shardmig.switch('y', 'dual', '')")
    psql.execute("SELECT shardmig.switch('x', 'live', '')")
    psql.execute("SELECT shardmig.switch('y', 'dual', '')")
    with pytest.raises(psycopg.errors.DatabaseError, match="y reads from it"):
        psql.execute("SELECT shardmig.switch('x', 'old', '')")
    psql.execute("UPDATE shardmig.flag SET drained = true WHERE flag = 'y'")
    psql.execute("SELECT shardmig.switch('y', 'old', '')")
    psql.execute("SELECT shardmig.switch('x', 'old', '')")


async def test_two_flags_that_need_each_other_meet_on_the_shards_row(shard: Shard, connect: Connect) -> None:
    """A flag leaves LIVE while another, in an open transaction, begins to read from it: the second sees the first."""
    await begun(shard, has_move=False)
    plan = plan_of(same_table()).model_copy(update={"revision": "0003_y", "flag": "y", "needs": (FLAG,)})
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        await session.flight(begin_migration(shard.name, plan, position=2, text="y"))
    one, two, look = connect(shard, autocommit=False), connect(shard), connect(shard)
    look.execute("SELECT shardmig.switch('x', 'live', '')")

    one.execute("SELECT shardmig.switch('y', 'dual', '')")
    late = asyncio.create_task(asyncio.to_thread(two.execute, "SELECT shardmig.switch('x', 'old', '')"))
    await blocked(look, two.info.backend_pid)
    one.commit()

    with pytest.raises(psycopg.errors.DatabaseError, match="y reads from it"):
        await late


async def test_everybody_may_read_flags_and_nobody_but_the_owner_write(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=True)
    app = connect(shard, user="shop_app")

    assert app.execute("SELECT count(*) FROM shardmig.shard JOIN shardmig.flag USING (shard)").fetchone() == (1,)
    for forbidden in (
        "UPDATE shardmig.flag SET state = 1",
        "UPDATE shardmig.shard SET epoch = 1",
        "INSERT INTO shardmig.log (shard, action) VALUES ('eu1', 'x')",
        "SELECT * FROM shardmig.step",
        "SELECT shardmig.switch('x', 'DUAL', '')",
        "SELECT shardmig.maintenance('offline', '')",
        "SELECT shardmig.pause('x', '')",
        "SELECT shardmig.draw_epoch()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute(forbidden)


async def test_an_operator_switches_from_psql_with_execute_alone(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=True)
    connect(shard).execute("GRANT EXECUTE ON FUNCTION shardmig.switch TO shop_app")
    operator = connect(shard, user="shop_app")

    answer = operator.execute("SELECT shardmig.switch('x', 'dual', 'wrong names')").fetchone()

    assert answer == ("eu1: x is DUAL",)
    logged = connect(shard).execute("SELECT before, after, reason, session_user_name FROM shardmig.log").fetchone()
    assert logged == ("OLD", "DUAL", "wrong names", "shop_app")
    for wrong, why in (
        ("'nix', 'dual', ''", "no flag nix"),
        ("'x', 'half', ''", "no state half"),
        ("'x', 'live', ''", "new was not moved"),
        ("'x', 'done', ''", "the command alone"),
    ):
        with pytest.raises(psycopg.errors.DatabaseError, match=why):
            operator.execute(f"SELECT shardmig.switch({wrong})")


async def test_many_schema_shards_of_one_database_install_at_once(
    servers: list[local.Server], fresh_database: Callable[[local.Server], str], connect: Connect
) -> None:
    url = fresh_database(servers[0])
    psql = connect(url)
    names = [f"s{n}" for n in range(12)]
    for name in names:
        psql.execute(f"CREATE SCHEMA {name}")

    async def install(name: str) -> None:
        shard = Shard.model_validate({"name": name, "url": url, "schema": name})
        async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
            await ledger.install(session)

    await asyncio.gather(*map(install, names))

    assert sorted(names) == [name for (name,) in psql.execute("SELECT shard FROM shardmig.shard ORDER BY 1")]
    with pytest.raises(psycopg.errors.DatabaseError, match="name one of the shards"):
        psql.execute("SELECT shardmig.maintenance('offline', 'which?')")


async def test_a_role_that_the_ledger_does_not_belong_to_is_told_whose_it_is(shard: Shard) -> None:
    await begun(shard, has_move=True)
    url = make_conninfo(shard.url.get_secret_value(), user="shop_migrator")
    other = Shard.model_validate({"name": shard.name, "url": url})

    async with open_session(other, SessionSettings(), pg_versions=VERSIONS, purpose="read") as session:
        with pytest.raises(PreflightFailed, match=r"role shop_migrator is not the one .* set session\.owner"):
            await read_records(session)


async def test_a_ledger_that_lacks_a_column_is_no_missing_ledger(shard: Shard, connect: Connect) -> None:
    await begun(shard, has_move=False)
    connect(shard).execute("ALTER TABLE shardmig.step DROP COLUMN paused")

    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        with pytest.raises(PreflightFailed, match=r"lacks what .*column \"paused\" does not exist.* put back"):
            await read_records(session)


async def test_another_shards_database_is_refused_before_anything_is_written(shard: Shard) -> None:
    await begun(shard, has_move=True)
    other = shard.model_copy(update={"name": "us9"})
    async with open_session(other, SessionSettings(), pg_versions=VERSIONS) as session:
        with pytest.raises(WrongShard, match="is shard 'eu1'"):
            await ledger.install(session)
        with pytest.raises(WrongShard):
            await read_records(session)


async def test_only_the_newest_turn_claims_and_records(shard: Shard) -> None:
    async with moving(shard, same_table(), T) as here:
        old = here.turn
        await old.claim(REVISION, 2)
        new = await Turn.take(here.session)
        await new.claim(REVISION, 2)

        for query in (
            old.hold(),
            old.record_step(REVISION, 2),
            old.record_batch(REVISION, 2, expected=(None, None), reached=(["1"], None), rows=1),
            old.record_check(REVISION, 2, expected=None, reached=["1"], finished=True),
            old.begin_move(REVISION, 2, "forward", upto=["9"], rows_estimated=None),
        ):
            with pytest.raises(psycopg.errors.DatabaseError) as refused:
                await here.session.transact([query])
            assert refused.value.sqlstate == ledger.FENCED
        with pytest.raises(Fenced):
            await old.claim(REVISION, 2)


async def test_a_runner_that_was_overtaken_leaves_the_turn_as_it_finds_it(shard: Shard, connect: Connect) -> None:
    """Its connection comes back when its successor is through: the turn must not bear its name then."""
    async with moving(shard, same_table(), T) as here:
        await here.session.close()
        async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
            new = await Turn.take(session)
            await session.flight([new.end()])
        with pytest.raises(Fenced):
            await here.turn.renew()

        found = connect(shard).execute("SELECT term, holder, since FROM shardmig.runner").fetchall()
        assert [(new.term, None, None)] == found


@pytest.mark.parametrize("ours", [True, False])
async def test_a_turn_whose_answer_was_lost_is_told_from_another_runners(
    shard: Shard,
    servers: list[local.Server],
    ours: bool,  # noqa: FBT001
) -> None:
    """One turn has been taken since, in both cases: whoever took it left his name there, or ended it."""
    with proxied(servers[0], shard) as (proxy, far):
        async with moving(far, same_table(), T) as here:
            cut = proxy.cut_after("UPDATE") if ours else proxy.cut_before("UPDATE shardmig.runner")
            with pytest.raises(psycopg.OperationalError):
                await here.turn.renew()
            assert cut.struck.is_set()
            if not ours:
                async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
                    await session.flight([(await Turn.take(session)).end()])

            with nullcontext() if ours else pytest.raises(Fenced):
                await here.turn.renew()


async def test_a_step_that_was_lost_to_another_runner_has_not_failed(shard: Shard) -> None:
    async with moving(shard, same_table(), T) as here:
        steps = Steps(here.turn, asyncio.Event())

        async def lost() -> None:
            await here.turn.claim(REVISION, 2)
            raise Fenced(None, shard=shard.name)

        with pytest.raises(Fenced, match="0002_x step 2: Another runner took"):
            await steps.do(here.plan, 2, lost)

        assert ("RUNNING", None) == ((await here.step()).status, (await here.step()).error)


async def test_a_cursor_moves_only_from_where_it_is_expected(shard: Shard) -> None:
    async with moving(shard, same_table(), T) as here:
        await here.turn.claim(REVISION, 2)
        record = here.turn.record_batch(REVISION, 2, expected=(None, None), reached=(["5"], None), rows=5)
        await here.session.transact([record])

        with pytest.raises(psycopg.errors.DatabaseError) as repeated:
            await here.session.transact([record])
        assert repeated.value.sqlstate == ledger.FENCED
        assert (["5"], 5) == ((await here.step()).cursor, (await here.step()).rows)


async def test_a_lap_moves_only_from_where_it_is_expected(shard: Shard) -> None:
    async with moving(shard, same_table(), T) as here:
        await here.turn.claim(REVISION, 2)
        first, second = ["0", "4", "9", "100"], ["0", "4", "7", "100", "20"]
        for expected, reached in ((None, first), (first, second)):
            record = here.turn.record_batch(REVISION, 2, expected=(None, expected), reached=(None, reached), rows=2)
            await here.session.transact([record])
            with pytest.raises(psycopg.errors.DatabaseError) as repeated:
                await here.session.transact([record])
            assert repeated.value.sqlstate == ledger.FENCED

        step = await here.step()
        assert (None, second, 4) == (step.cursor, step.lap, step.rows)


@pytest.mark.parametrize("how", ["begun anew", "switched back"])
async def test_what_is_moved_from_nothing_is_in_no_lap(shard: Shard, how: str) -> None:
    async with moving(shard, same_table(), T) as here:
        await here.turn.claim(REVISION, 2)
        lap = ["0", "4", "9", "100"]
        await here.session.transact(
            [here.turn.record_batch(REVISION, 2, expected=(None, None), reached=(None, lap), rows=2)]
        )
        if how == "begun anew":
            await here.session.transact([here.turn.begin_move(REVISION, 2, "forward", upto=["9"], rows_estimated=9)])
        else:
            await here.to(State.OLD)

        assert (await here.step()).lap is None


async def test_a_flip_fences_the_mover_until_it_claims_again(shard: Shard, connect: Connect) -> None:
    async with moving(shard, same_table(), T) as here:
        await here.turn.claim(REVISION, 2)
        connect(shard).execute("SELECT shardmig.switch('x', 'OLD', 'enough')")

        with pytest.raises(psycopg.errors.DatabaseError) as fenced:
            await here.session.transact(
                [here.turn.record_batch(REVISION, 2, expected=(None, None), reached=(["5"], None), rows=5)]
            )
        assert fenced.value.sqlstate == ledger.FENCED


@pytest.mark.parametrize("drained", [True, False])
async def test_a_move_is_bounded_only_after_the_drain(shard: Shard, *, drained: bool) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        await here.to(State.DUAL, drain=drained)
        await here.turn.claim(REVISION, 2)
        begin = here.turn.begin_move(REVISION, 2, "forward", upto=["9"], rows_estimated=None)
        if drained:
            await here.session.transact([begin])
            return
        with pytest.raises(psycopg.errors.DatabaseError, match="after the drain"):
            await here.session.transact([begin])
        assert (await here.step()).bounded_at is None


async def test_what_is_recorded_with_a_flip_is_not_kept_without_it(shard: Shard) -> None:
    async with moving(shard, same_table(), T, dual=False) as here:
        stale = await here.flag()
        await here.to(State.DUAL)

        with pytest.raises(SwitchRefused, match="meanwhile"):
            await switching.flip(here.turn, stale, State.DUAL, records=[here.turn.reopen_steps(REVISION, [1])])
        records = await read_records(here.session)
        assert records is not None
        assert records.steps[REVISION, 1].done


async def test_a_flip_is_for_the_flag_as_it_was_read(shard: Shard, connect: Connect) -> None:
    """The state is the same again, but somebody was there in between."""
    async with moving(shard, same_table(), T, dual=False) as here:
        stale = await here.flag()
        psql = connect(shard)
        psql.execute("SELECT shardmig.switch('x', 'DUAL', '')")
        psql.execute("UPDATE shardmig.flag SET drained = true")
        psql.execute("SELECT shardmig.switch('x', 'OLD', '')")

        with pytest.raises(SwitchRefused, match="meanwhile"):
            await switching.flip(here.turn, stale, State.DUAL)


async def test_a_plan_that_somebody_has_begun_is_not_begun_anew(shard: Shard, connect: Connect) -> None:
    """Its statements would be executed again, and nobody would record it."""
    await begun(shard, has_move=True)
    async with open_session(shard, SessionSettings(), pg_versions=VERSIONS) as session:
        turn = await Turn.take(session)
        with pytest.raises(psycopg.errors.UniqueViolation):
            await session.transact(begin_anew(turn, plan_of(same_table()), position=1, done=[1]))

    assert [("PENDING",)] == connect(shard).execute("SELECT DISTINCT status FROM shardmig.step").fetchall()
