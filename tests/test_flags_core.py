"""The pure part of flags: declarations, views, overrides, the cache."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from shardmig import (
    Flag,
    Flags,
    ShardBehind,
    ShardInMaintenance,
    State,
    UnknownFlag,
    UnknownState,
    ViewExpired,
    WriteRefused,
    WrongShard,
)
from shardmig.flags import Peek
from shardmig.flags.opening import Details, FlagRow, Opening, statements
from shardmig.flags.prepared import Form

if TYPE_CHECKING:
    from shardmig import View

SPLIT_NAME = Flag("split_name")
ORDER_ADDRESS = Flag("order_address")


@pytest.fixture
def flags() -> Flags:
    return Flags(SPLIT_NAME, ORDER_ADDRESS, release="2026-11-22.1")


def opening(epoch: bytes = b"1", **columns: object) -> Opening:
    return Opening(epoch, 0, isolation="read committed")._replace(**columns)  # type: ignore[arg-type]


def row(name: str = "split_name", state: int = 1, epoch: bytes = b"1", **columns: bool) -> FlagRow:
    usual = {"cross_table": False, "touch_source": False}
    return FlagRow(epoch=epoch, name=name, state=state, **{**usual, **columns})


def view_of(flags: Flags, *rows: FlagRow, write: bool = True, **columns: object) -> View:
    reading = flags.remember(list(rows), shard="eu1")
    return flags.view(reading, opening(reading.epoch, **columns), shard="eu1", write=write)


def test_a_view_gives_each_declared_flag_its_state(flags: Flags) -> None:
    view = view_of(flags, row(state=2), row("order_address", 1))

    assert (State.LIVE, State.DUAL) == (view[SPLIT_NAME], view[ORDER_ADDRESS])


def test_a_flag_without_a_row_is_old(flags: Flags) -> None:
    view = view_of(flags, row(""))

    assert State.OLD is view[SPLIT_NAME]


def test_a_typo_is_an_error(flags: Flags) -> None:
    view = view_of(flags, row())

    for same_name in ("split_name", Flag("split_name")):
        with pytest.raises(UnknownFlag, match="ask with that object, not with its name"):
            view[same_name]  # type: ignore[index]
    with pytest.raises(UnknownFlag, match=r"split_nam.*split_name, order_address"):
        view[Flag("split_nam")]
    with pytest.raises(UnknownFlag, match="not declared"):
        flags.peek("eu1", Flag("split_nam"))
    with pytest.raises(UnknownFlag, match="split_nam"):
        flags["split_nam"]
    with pytest.raises(UnknownFlag, match="split_nam"), flags.override(Flag("split_nam"), State.LIVE):
        pass


def test_a_second_declaration_of_a_name_is_not_the_declared_flag(flags: Flags) -> None:
    view = view_of(flags, row())

    with pytest.raises(UnknownFlag):
        view[Flag("split_name")]


def test_one_name_is_declared_once() -> None:
    with pytest.raises(ValueError, match="two flags"):
        Flags(SPLIT_NAME, Flag("split_name"))


def test_an_expired_view_says_nothing_any_more(flags: Flags) -> None:
    view = view_of(flags, row())
    view.expire()

    with pytest.raises(ViewExpired):
        view[SPLIT_NAME]
    with pytest.raises(ViewExpired):
        view.run(SPLIT_NAME, old=list, new=list)
    assert view.expired
    assert "<View of eu1: expired>" == repr(view)


def test_an_unknown_state_is_refused_only_where_the_flag_is_declared(flags: Flags) -> None:
    view_of(flags, row("somebody_elses", 4))
    with pytest.raises(UnknownState, match="eu1 has split_name in state 4"):
        view_of(flags, row(state=4))


@pytest.mark.parametrize(
    ("maintenance", "write", "refused"), [(0, True, False), (1, True, True), (1, False, False), (2, False, True)]
)
def test_maintenance_refuses_before_anything_is_done(
    flags: Flags, *, maintenance: int, write: bool, refused: bool
) -> None:
    seen, details = opening(maintenance=maintenance), Details(False, 7, "reindexing")  # noqa: FBT003 - standby

    assert refused is not flags.admits(seen, write=write)
    if refused:
        told = flags.refusal(seen, details, shard="eu1", write=write)
        assert isinstance(told, ShardInMaintenance)
        assert 7 == told.retry_after
        assert "shard eu1 is in maintenance" in str(told)
        assert "(reindexing); try again in 7 s" in str(told)


@pytest.mark.parametrize(("standby", "words"), [(True, "standby"), (False, "default_transaction_read_only")])
def test_writing_where_nobody_can_write_is_refused(flags: Flags, *, standby: bool, words: str) -> None:
    seen = opening(read_only=True)

    assert not flags.admits(seen, write=True)
    told = flags.refusal(seen, Details(standby, 30, None), shard="eu1", write=True)
    assert (WriteRefused, True) == (type(told), words in str(told))


def test_a_shard_below_what_the_release_understands_is_refused() -> None:
    live = Flag("split_name", at_least=State.LIVE)
    flags = Flags(live, release="7")

    with pytest.raises(ShardBehind, match=r"eu1 is behind release 7: split_name DUAL \(needs LIVE\)"):
        view_of(flags, row(state=1))
    assert State.LIVE is view_of(flags, row(state=2, epoch=b"2"))[live]


def test_what_an_epoch_means_never_changes(flags: Flags) -> None:
    reading = flags.remember([row(state=1, epoch=b"1")], shard="eu1")
    flags.remember([row(state=2, epoch=b"2")], shard="eu1")

    assert reading is flags.recall(opening(b"1"), shard="eu1")
    assert flags.recall(opening(b"1"), shard="eu2") is None
    assert flags.recall(opening(b"3"), shard="eu1") is None


def test_old_epochs_are_forgotten_but_not_at_once(flags: Flags) -> None:
    for epoch in range(100):
        flags.remember([row(epoch=b"%d" % epoch)], shard="eu1")

    known = [epoch for epoch in range(100) if flags.recall(opening(b"%d" % epoch), shard="eu1")]
    assert list(range(92, 100)) == known


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_one_snapshot_may_not_write_while_a_mover_inserts_into_a_second_table(flags: Flags, *, isolation: str) -> None:
    moving = row(state=1, cross_table=True)

    with pytest.raises(WriteRefused, match="split_name"):
        view_of(flags, moving, isolation=isolation)
    view_of(flags, moving, isolation=isolation, write=False)
    view_of(flags, moving)
    view_of(flags, moving._replace(touch_source=True), isolation=isolation)
    view_of(flags, moving._replace(cross_table=False), isolation=isolation)
    view_of(flags, moving._replace(state=2), isolation=isolation)


# --------------------------------------------------------------------------------------------------------------------
# view.run


@pytest.mark.parametrize(
    ("state", "write", "calls", "result"),
    [
        (0, True, ["old"], "old"),
        (1, True, ["old", "new"], "old"),
        (2, True, ["old", "new"], "new"),
        (3, True, ["new"], "new"),
        (1, False, ["old"], "old"),
        (2, False, ["new"], "new"),
    ],
)
async def test_run_calls_the_right_subset_in_the_right_order(
    flags: Flags, *, state: int, write: bool, calls: list[str], result: str
) -> None:
    view = view_of(flags, row(state=state), write=write)
    called: list[str] = []

    def write_to(name: str) -> str:
        called.append(name)
        return name

    async def awrite_to(name: str) -> str:
        begun = len(called)
        await asyncio.sleep(0)
        assert begun == len(called), "the other one began before this one was done"
        return write_to(name)

    assert result == view.run(SPLIT_NAME, old=lambda: write_to("old"), new=lambda: write_to("new"))
    assert calls == called
    called.clear()
    assert result == await view.arun(SPLIT_NAME, old=lambda: awrite_to("old"), new=lambda: awrite_to("new"))
    assert calls == called


# --------------------------------------------------------------------------------------------------------------------
# override and peek


def test_an_override_holds_for_transactions_that_begin_inside(flags: Flags) -> None:
    before = view_of(flags, row(state=0))
    with flags.override(SPLIT_NAME, State.LIVE):
        inside = view_of(flags, row(state=0))
        with flags.override(SPLIT_NAME, State.DONE), flags.override(ORDER_ADDRESS, State.DUAL):
            nested = view_of(flags, row(state=0))
    after = view_of(flags, row(state=0))

    assert State.OLD is before[SPLIT_NAME]
    assert State.LIVE is inside[SPLIT_NAME]
    assert (State.DONE, State.DUAL) == (nested[SPLIT_NAME], nested[ORDER_ADDRESS])
    assert State.OLD is after[SPLIT_NAME]


async def test_an_override_stays_in_its_task_and_thread(flags: Flags) -> None:
    seen: dict[str, State] = {}

    def look(who: str) -> None:
        seen[who] = view_of(flags, row(state=0))[SPLIT_NAME]

    overridden, looked = asyncio.Event(), asyncio.Event()

    async def other_task() -> None:
        await overridden.wait()
        look("other task")
        looked.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(other_task())
        with flags.override(SPLIT_NAME, State.LIVE):
            overridden.set()
            await looked.wait()
            look("this task")
            thread = threading.Thread(target=look, args=["thread"])
            thread.start()
            thread.join()
            with flags.override(SPLIT_NAME, State.DUAL, everywhere=True):
                look("this task, the nearer override")
                thread = threading.Thread(target=look, args=["thread, everywhere"])
                thread.start()
                thread.join()

    assert seen == {
        "other task": State.OLD,
        "this task": State.LIVE,
        "thread": State.OLD,
        "this task, the nearer override": State.LIVE,
        "thread, everywhere": State.DUAL,
    }


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_override_ends_with_an_exception(flags: Flags, *, everywhere: bool) -> None:
    with suppress(ZeroDivisionError), flags.override(SPLIT_NAME, State.LIVE, everywhere=everywhere):
        raise ZeroDivisionError

    assert State.OLD is view_of(flags, row(state=0))[SPLIT_NAME]


def test_an_override_cannot_go_where_the_release_cannot() -> None:
    live = Flag("split_name", at_least=State.LIVE)

    with pytest.raises(ValueError, match="at_least=LIVE"), Flags(live).override(live, State.DUAL):
        pass


def test_an_override_of_one_application_does_not_reach_another(flags: Flags) -> None:
    other = Flags(Flag("split_name"))
    with other.override(other["split_name"], State.LIVE):
        view = view_of(flags, row(state=0))

    assert State.OLD is view[SPLIT_NAME]


def test_peek_tells_the_last_known_state_and_how_old_it_is(flags: Flags) -> None:
    assert Peek(None, float("inf")) == flags.peek("eu1", SPLIT_NAME)
    view_of(flags, row(state=1)).expire()

    state, age_s = flags.peek("eu1", SPLIT_NAME)
    assert State.DUAL is state
    assert 0 <= age_s < 60
    with flags.override(SPLIT_NAME, State.LIVE):
        assert Peek(State.LIVE, 0.0) == flags.peek("eu1", SPLIT_NAME)


# --------------------------------------------------------------------------------------------------------------------
# statements


def test_a_transaction_begins_as_it_was_asked_for() -> None:
    def begin(**how: object) -> bytes:
        usual = {"write": True, "isolation": None, "deferrable": None, "encoding": "utf-8"}
        begin, _, opening = statements("eu1", **{**usual, **how}).openings[Form.PLAIN].partition(b"; ")
        assert opening.startswith(b"SELECT epoch")
        return begin

    assert b"BEGIN" == begin()
    assert b"BEGIN READ ONLY" == begin(write=False)
    assert b"BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE" == begin(
        write=False, isolation="SERIALIZABLE", deferrable=True
    )
    with pytest.raises(ValueError, match="no isolation level"):
        begin(isolation="READ COMMITTED; DROP TABLE customer")


def test_a_name_with_nul_is_no_shard() -> None:
    with pytest.raises(WrongShard, match="NUL"):
        statements("a\0b", write=True, isolation=None, deferrable=None, encoding="utf-8")
