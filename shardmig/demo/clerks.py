"""
The shop's staff: threads, each with its own connection to one shard, who serve customers and compare every answer.

A short answer is compared under READ COMMITTED: the oracle is asked before and after, and when it said the same twice,
the answer in between must be that. An auditor reads under REPEATABLE READ, where one question is enough.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import IsolationLevel
from psycopg.errors import SerializationFailure

from shardmig.demo.goods import Address, Name
from shardmig.demo.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event

    from shardmig.demo.goods import Desk, Release
    from shardmig.demo.oracle import Truth
    from shardmig.demo.tally import Counts

__all__ = ["Clerk", "Register", "audit", "back_office", "counter", "slow"]

_RECENT = 200  # rows that were just written are read again and again
_AUDITED = 100  # rows an auditor reads at once
_ATTEMPTS = 20


class Register:
    """The ids that a process knows on one shard; several clerks share it."""

    def __init__(self, rows: int) -> None:
        self._customers = _Ids(rows)
        self._orders = _Ids(rows)

    @property
    def customers(self) -> _Ids:
        """Ids of customers."""
        return self._customers

    @property
    def orders(self) -> _Ids:
        """Ids of orders."""
        return self._orders


class _Ids:
    def __init__(self, last: int) -> None:
        self.last = last
        self._recent = deque([1], maxlen=_RECENT)

    def wrote(self, row: int) -> None:
        self.last = max(self.last, row)
        self._recent.append(row)

    def one(self) -> int:
        """Choose a row, every second time one that was written lately."""
        if random.random() < 0.5:  # noqa: PLR2004 - every second time
            return self._recent[random.randrange(len(self._recent))]
        return random.randint(1, self.last)


@dataclass
class Clerk:
    """
    One clerk at work on one shard.

    Attributes:
        number: unique in the process.
        shard: its name.
        url: where it is.
        release: the code that serves.
        register: the ids known.
        counts: where everything is counted.
        stop: set when the shop closes; what has begun is finished.
        rest_s: mean pause between requests.
        slow_s: how long slow work may take.
    """

    number: int
    shard: str
    url: str
    release: Release
    register: Register
    counts: Counts
    stop: Event
    rest_s: float
    slow_s: float
    connection: psycopg.Connection[Any] = field(init=False)
    oracle: Oracle = field(init=False)
    _paused_s: float = field(init=False, default=0.0)

    def work(self, job: Callable[[Clerk], None]) -> None:
        """Serve one request after the other until the shop closes."""
        with psycopg.connect(self.url, autocommit=True) as self.connection:
            self.oracle = Oracle(self.connection)
            while not self.stop.is_set():
                self._serve(job)
                self.stop.wait(random.expovariate(1 / self.rest_s))

    def _serve(self, job: Callable[[Clerk], None]) -> None:
        self._paused_s, started = 0.0, time.perf_counter()
        try:
            job(self)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a customer who was not served
            self.counts.failed(f"{self.shard}, {job.__name__}: {type(error).__name__}: {error}")
        self.counts.served(self.number, time.perf_counter() - started - self._paused_s)

    def pause(self, seconds: float) -> None:
        """Keep a transaction open while the clerk thinks; no customer waits for that."""
        started = time.perf_counter()
        self.stop.wait(seconds)
        self._paused_s += time.perf_counter() - started

    def compare(self, what: str, answer: dict[int, Any], before: Truth, after: Truth) -> None:
        """Compare an answer with what the oracle said before and after it."""
        if before.mark != after.mark:
            return  # somebody changed one of the rows meanwhile: nothing can be said
        wrong = [
            f"{self.shard}: {what} {row} is {answer.get(row)}, must be {before.values.get(row)}"
            for row in sorted(answer.keys() | before.values.keys())
            if answer.get(row) != before.values.get(row)
        ]
        self.counts.compared(len(before.values), wrong)


# --------------------------------------------------------------------------------------------------------------------
# Jobs


def counter(clerk: Clerk) -> None:
    """Serve one short request, as they come."""
    requests = (_read_name, _read_address, _rename, _readdress, _order, _sign_up, _cancel, _close_account)
    [request] = random.choices(requests, weights=(30, 30, 12, 12, 8, 5, 2, 1))
    request(clerk)


def _read_name(clerk: Clerk) -> None:
    _look_up_name(clerk, clerk.register.customers.one())


def _look_up_name(clerk: Clerk, customer: int) -> None:
    with clerk.release(clerk.connection, clerk.shard, write=False) as desk:
        before = clerk.oracle.names(customer, customer)
        answer = desk.names(customer, customer)
        after = clerk.oracle.names(customer, customer)
    clerk.compare("customer", answer, before, after)


def _read_address(clerk: Clerk) -> None:
    _look_up_address(clerk, clerk.register.orders.one())


def _look_up_address(clerk: Clerk, order: int) -> None:
    with clerk.release(clerk.connection, clerk.shard, write=False) as desk:
        before = clerk.oracle.addresses(order, order)
        answer = desk.addresses(order, order)
        after = clerk.oracle.addresses(order, order)
    clerk.compare("order", answer, before, after)


def _rename(clerk: Clerk) -> None:
    customer = clerk.register.customers.one()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        _write_name(clerk, desk, customer)
    clerk.register.customers.wrote(customer)


def _write_name(clerk: Clerk, desk: Desk, customer: int) -> None:
    name = Name.random()
    if desk.rename(customer, name):
        clerk.oracle.tell_name(customer, name)


def _readdress(clerk: Clerk) -> None:
    order = clerk.register.orders.one()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        _write_address(clerk, desk, order)
    clerk.register.orders.wrote(order)


def _write_address(clerk: Clerk, desk: Desk, order: int) -> None:
    address = Address.random()
    if desk.readdress(order, address):
        clerk.oracle.tell_addresses([order], address)


def _order(clerk: Clerk) -> None:
    address = Address.random()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        order = desk.order(clerk.register.customers.one(), address)
        if order is not None:
            clerk.oracle.tell_addresses([order], address)
    if order is not None:
        clerk.register.orders.wrote(order)


def _sign_up(clerk: Clerk) -> None:
    name = Name.random()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        customer = desk.sign_up(name)
        clerk.oracle.tell_name(customer, name)
    clerk.register.customers.wrote(customer)


def _cancel(clerk: Clerk) -> None:
    order = clerk.register.orders.one()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        if desk.cancel(order):
            clerk.oracle.tell_addresses([order], None)


def _close_account(clerk: Clerk) -> None:
    customer = clerk.register.customers.one()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        orders = desk.close_account(customer)
        if orders is not None:
            clerk.oracle.tell_addresses(orders, None)
            clerk.oracle.tell_name(customer, None)


def slow(clerk: Clerk) -> None:
    """Begin, think for long, write, commit, and look whether it stands there: the transactions that drains are for."""
    customer, order = clerk.register.customers.one(), clerk.register.orders.one()
    with clerk.release(clerk.connection, clerk.shard) as desk:
        desk.names(customer, customer)
        clerk.pause(random.uniform(0.2, 1) * clerk.slow_s)
        _write_name(clerk, desk, customer)
        _write_address(clerk, desk, order)
    clerk.register.customers.wrote(customer)
    clerk.register.orders.wrote(order)
    _look_up_name(clerk, customer)
    _look_up_address(clerk, order)


def audit(clerk: Clerk) -> None:
    """Read many rows in one snapshot that stays open for a while."""
    with clerk.release(clerk.connection, clerk.shard, write=False, isolation=IsolationLevel.REPEATABLE_READ) as desk:
        for ids, read, ask, what in (
            (clerk.register.customers, desk.names, clerk.oracle.names, "customer"),
            (clerk.register.orders, desk.addresses, clerk.oracle.addresses, "order"),
        ):
            first = max(1, ids.one() - _AUDITED // 2)
            truth = ask(first, first + _AUDITED)
            clerk.pause(random.uniform(0, 0.3) * clerk.slow_s)
            clerk.compare(what, read(first, first + _AUDITED), truth, truth)


def back_office(clerk: Clerk) -> None:
    """Rename under REPEATABLE READ; whoever loses against another writer, or against a mover, does it again."""
    customer = clerk.register.customers.one()
    for _ in range(_ATTEMPTS):
        try:
            with clerk.release(clerk.connection, clerk.shard, isolation=IsolationLevel.REPEATABLE_READ) as desk:
                desk.names(customer, customer)
                clerk.pause(random.uniform(0, 0.02))
                _write_name(clerk, desk, customer)
        except SerializationFailure:
            clerk.counts.retried()
        else:
            clerk.register.customers.wrote(customer)
            return
    raise RuntimeError(f"customer {customer} could not be renamed in {_ATTEMPTS} attempts")
