"""
A scratch shard: a throw-away PostgreSQL server on which the committed plans, and nothing else, have run.

What a fleet should look like is asked here, so nobody needs access to production to compare models or shards with it.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

from shardmig import local
from shardmig.config import Lint, SessionSettings, Shard
from shardmig.errors import ShardmigError
from shardmig.fleet import Fleet
from shardmig.plan import Statement, quote
from shardmig.session import open_session
from shardmig.todo import Until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardmig.config import Config
    from shardmig.plan import AcceptedPlan

__all__ = ["ANY_VERSION", "Scratch", "scratch"]

ANY_VERSION = (10, 99)
"""For a throw-away server: whichever is here will do."""

_numbers = count(1)  # of databases; two of one process may share a server
_CREATES_SCHEMA = re.compile(r"\s*CREATE\s+SCHEMA\s+(?:\"(?P<quoted>[^\"]+)\"|(?P<plain>\w+))", re.IGNORECASE)
_EXTENSIONS = "SELECT name FROM pg_available_extensions WHERE name = ANY ($1::text[]) ORDER BY name"


@contextmanager
def scratch(config: Config, plans: Sequence[AcceptedPlan]) -> Iterator[Scratch]:
    """
    Start a throw-away server; it is gone after the block.

    Args:
        config: lint settings say which schemas and types are there beside what plans make.
        plans: the whole history, accepted, in order.

    Raises:
        LocalServerError: there is no PostgreSQL here to start; the message says how to get one.
    """
    with local.Server.start("scratch") as server:
        yield Scratch(server, config, plans)


class Scratch:
    """
    A throw-away server, and what is needed to build shards on it.

    Attributes:
        config: the project's, without the roles that this server does not have.
    """

    def __init__(self, server: local.Server, config: Config, plans: Sequence[AcceptedPlan]) -> None:
        self._server = server
        self._plans = tuple(plans)
        self.config = config.model_copy(
            update={
                "session": SessionSettings(),
                "lint": Lint(**{**config.lint.model_dump(), "pg_versions": ANY_VERSION}),
            }
        )

    async def shard(self, schema: str = "public") -> Shard:
        """Make an empty shard in a database of its own, with the schemas and types that plans take as given."""
        url = self._server.create_database(f"scratch{next(_numbers)}")
        admin = Shard.model_validate({"name": "scratch", "url": url})
        shard = Shard.model_validate({"name": "scratch", "url": url, "schema": schema})
        async with open_session(admin, self.config.session, pg_versions=ANY_VERSION, purpose="read") as session:
            for name in sorted({schema, *self._taken_schemas()} - self._created_schemas() - {"public"}):
                await session.execute(f"CREATE SCHEMA {quote(name)}")
            # A type such as citext comes with the extension of its name.
            known = [kind.rpartition(".")[2] for kind in self.config.lint.known_types]
            for row in (await session.execute(_EXTENSIONS, [known])).rows:
                await session.execute(f"CREATE EXTENSION {quote(row[0])}")
        return shard

    async def apply(self, shard: Shard, *, upto: str | None = None) -> None:
        """
        Bring a shard to a revision; None is the head.

        Raises:
            ShardmigError: a committed plan does not run on an empty server.
        """
        fleet = Fleet(self.config, self._plans, [shard])
        [report] = (await fleet.apply(upto=upto, until=Until.FILLED, aware="scratch")).shards  # no process, no row
        if report.error is not None:
            raise ShardmigError(
                f"the committed plans do not run on an empty PostgreSQL {self._server.version}: {report.reason}"
            ) from report.error

    def _texts(self) -> list[str]:
        return [step.sql for accepted in self._plans for step in accepted.plan.steps if isinstance(step, Statement)]

    def _taken_schemas(self) -> set[str]:
        """Return the configured schemas that plans speak of."""
        return {
            name
            for name in self.config.lint.schemas
            if any(re.search(rf'\b{re.escape(name)}"?\.', text) for text in self._texts())
        }

    def _created_schemas(self) -> set[str]:
        found = filter(None, map(_CREATES_SCHEMA.match, self._texts()))
        return {match["quoted"] or match["plain"].lower() for match in found}
