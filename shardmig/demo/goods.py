"""What the shop knows of the world: names, addresses, and what a release lets its clerks do with them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from psycopg import Connection, IsolationLevel

__all__ = ["CITIES", "FIRST_NAMES", "LAST_NAMES", "STREETS", "Address", "Desk", "Name", "Release"]

# Names that break careless code: one word, three words, quotes, percent signs, colons, letters beyond ASCII.
FIRST_NAMES = ("Ada", "Grace", "Zoë", "Plato", "Jürgen", "D'Arcy", "Li", "Ольга", "100%", ":x")
LAST_NAMES = (
    None,
    "Lovelace",
    "Brewster Hopper",
    "O'Brien",
    "Müller-Lüdenscheidt",
    "van der Meer",
    "山田",
    "50 %s",
    '"Q"',
)
STREETS = ("High Street", "Rue de l'Église", "Hauptstraße", "Elm Road", "Via Roma")
CITIES = (None, "London", "København", "São Paulo", "N'Djamena", "Springfield")


class Name(NamedTuple):
    """A customer's name: all up to the first blank, and the rest."""

    first: str
    last: str | None

    @property
    def full(self) -> str:
        """The name as release A writes it."""
        return self.first if self.last is None else f"{self.first} {self.last}"

    @classmethod
    def split(cls, full: str) -> Name:
        """Take a full name apart."""
        first, _, last = full.partition(" ")
        return cls(first, last or None)

    @classmethod
    def random(cls) -> Name:
        """Make up a name; the number makes a stale one tell itself from the right one."""
        return cls(f"{random.choice(FIRST_NAMES)}{random.randrange(10_000)}", random.choice(LAST_NAMES))


class Address(NamedTuple):
    """Where an order goes."""

    street: str | None
    city: str | None
    zip: str | None

    @classmethod
    def random(cls) -> Address:
        """Make up an address."""
        return cls(
            f"{random.choice(STREETS)} {random.randrange(1000)}",
            random.choice(CITIES),
            random.choice((None, f"{random.randrange(100_000):05}")),
        )


class Desk(Protocol):
    """What a clerk can do within one transaction on one shard; both releases offer it."""

    def sign_up(self, name: Name) -> int:
        """Enter a customer and return the id."""

    def rename(self, customer: int, name: Name) -> bool:
        """Change a customer's name; False when there is no such customer."""

    def close_account(self, customer: int) -> list[int] | None:
        """Remove a customer; return the ids of the orders that went too, None when there is no such customer."""

    def names(self, first: int, last: int) -> dict[int, Name]:
        """Read the names of all customers in a range of ids, both ends included."""

    def order(self, customer: int, address: Address) -> int | None:
        """Enter an order and return its id; None when there is no such customer."""

    def readdress(self, order: int, address: Address) -> bool:
        """Send an order elsewhere; False when there is no such order."""

    def cancel(self, order: int) -> bool:
        """Remove an order; False when there is no such order."""

    def addresses(self, first: int, last: int) -> dict[int, Address]:
        """Read the addresses of all orders in a range of ids, both ends included."""


class Release(Protocol):
    """One version of the shop's code."""

    def __call__(
        self,
        connection: Connection[Any],
        shard: str,
        *,
        write: bool = True,
        isolation: IsolationLevel | None = None,
    ) -> AbstractContextManager[Desk]:
        """Begin a transaction; it ends with the block."""
