"""
How a connection to a shard begins: connect without showing a password, then check and set everything in one question.

Whatever changes the server session stands behind `pg_backend_pid() = $1`: through a transaction pooler it would stick
to a server connection that other clients use next.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from shardmig.errors import NotPrimary, PreflightFailed, ShardUnreachable, ThroughPooler
from shardmig.pgerrors import folded
from shardmig.plan import quote_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardmig.config import SessionSettings, Shard

__all__ = [
    "READ_ONLY",
    "SCHEMA_EXISTS",
    "SET_ROLE",
    "Answers",
    "connect",
    "judge",
    "not_ready",
    "questions",
    "read_only",
]

# Of a broken connection psycopg also warns in its log, which Python prints where nobody configured logging; to us it
# comes as an exception.
logging.getLogger("psycopg").addHandler(logging.NullHandler())

_SETTINGS = {
    "row_security": "off",  # an error instead of a silent subset: a move and its check must not be blind alike
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    "default_transaction_isolation": "read committed",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "idle_in_transaction_session_timeout": "10s",  # a stopped runner must not keep locks; flights need no client
    "jit": "off",  # compiling costs more than any statement of ours but the moves, which are simple
    # The server, too, notices within half a minute that nobody is there any more. By its own default it would keep the
    # runner's lock for hours, and the runner that comes back would meet itself.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}
READ_ONLY = "default_transaction_read_only"
_OFF_SINCE = {"idle_session_timeout": 140_000, "transaction_timeout": 170_000}  # setting → server version

_UNIT_MS = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}

_NO_ESCAPE = re.compile("%(?!(?!00)[0-9A-Fa-f]{2})")
_MISTAKEN = {"host": re.compile("@"), "port": re.compile("[^0-9,]")}

# A dead peer is noticed within half a minute; what the URL says goes first.
_NETWORK = {"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "3", "tcp_user_timeout": "30000"}


class Answers(NamedTuple):
    """
    What the server says of itself, in the order of `questions`.

    Attributes:
        direct: the server process is the one that the connection was told of.
        standby: in recovery.
        read_only: transactions are read-only by default.
        replication_role: "origin", or triggers do not fire.
        login: the role that connected.
        deadlock_timeout: of the server, with its unit.
        applied: the settings as they are now; None when not direct.
    """

    direct: bool
    standby: bool
    read_only: bool
    replication_role: str
    login: str
    deadlock_timeout: str
    applied: list[str] | None

    @property
    def deadlock_timeout_ms(self) -> float:
        """The server's deadlock_timeout: a whole number and the largest unit that fits ("Setting Parameters")."""
        number, unit = re.fullmatch(r"(\d+)(ms|s|min|h|d)", self.deadlock_timeout).groups()  # type: ignore[union-attr]
        return float(number) * _UNIT_MS[unit]


async def connect(shard: Shard, settings: SessionSettings) -> psycopg.AsyncConnection[tuple[Any, ...]]:
    """
    Open a connection in autocommit mode that prepares nothing by itself.

    Raises:
        ShardUnreachable: the message shows the address and no password; psycopg's error is not attached, because libpq
            quotes what it was given.
        ThroughPooler: a pooler refused a startup parameter.
    """
    try:
        given = conninfo_to_dict(shard.url.get_secret_value())
    except psycopg.ProgrammingError:
        raise ShardUnreachable(_unreadable(shard.url.get_secret_value()), shard=shard.name) from None
    fixed = {
        "application_name": f"shardmig {shard.name}"[:63],
        "client_encoding": "UTF8",
        "connect_timeout": str(settings.connect_timeout_s),
    }
    conninfo = make_conninfo("", **{**_NETWORK, **given, **fixed})
    try:
        return await _Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
    except (psycopg.Error, OSError, ValueError) as error:
        message = folded(_without_secrets(str(error), given))  # a secret is only known again unfolded
        if "unsupported startup parameter" in message:  # PgBouncer knows no `options`
            raise ThroughPooler(shard=shard.name) from None
        raise ShardUnreachable(
            f"no connection to {shard.address}: {message}; nothing was changed there", shard=shard.name
        ) from None


class _Connection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection on which whoever waits no longer is not kept by a server that hangs."""

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - psycopg's, and its calls name it
        """
        Tell the server to stop, as psycopg does when a wait is cancelled; where it does not listen, hang up.

        libpq before 17 asks in a call that returns when the server has answered, and nothing else runs meanwhile, no
        other shard either: then it is asked on a second connection.
        """
        try:
            if psycopg.capabilities.has_cancel_safe():
                await super().cancel_safe(timeout=timeout)
            else:
                async with asyncio.timeout(timeout):
                    await self._cancel_from_elsewhere()
        except (psycopg.Error, OSError, TimeoutError):
            self.pgconn.finish()  # the older psycopg would wait on for the answer, without end

    async def _cancel_from_elsewhere(self) -> None:
        info, pid = self.info, self.info.backend_pid
        other = await _Messenger.connect(make_conninfo(info.dsn, password=info.password), autocommit=True)
        try:
            await other.execute("SELECT pg_cancel_backend(%s)", [pid])
        finally:
            other.pgconn.finish()


class _Messenger(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection for one short message, which asks for nothing more when that is not answered."""

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109, ARG002 - psycopg's
        """Hang up."""
        self.pgconn.finish()


def questions(
    shard: Shard, settings: SessionSettings, *, backend_pid: int, server_version: int
) -> tuple[str, tuple[object, ...]]:
    """Return the statement whose one row is `Answers`, and which applies every setting on the way."""
    values = {
        **_SETTINGS,
        "synchronous_commit": settings.synchronous_commit,
        "statement_timeout": f"{settings.statement_timeout_s * 1000:.0f}ms",
        "lock_timeout": f"{settings.lock_timeout_ms[-1]}ms",
        **{name: "0" for name, since in _OFF_SINCE.items() if server_version >= since},
    }
    pairs = [text for pair in values.items() for text in pair]
    calls = ",\n           ".join(f"set_config(${n}, ${n + 1}, false)" for n in range(3, 3 + len(pairs), 2))
    return _QUESTIONS.format(calls=calls), (backend_pid, shard.schema_name, *pairs)


def judge(
    answers: Answers, shard: Shard, pg_versions: tuple[int, int], *, server_version: int, server_encoding: str | None
) -> None:
    """
    Refuse a server that is not fit for migrating.

    Raises:
        ThroughPooler, NotPrimary: connect to another address.
        PreflightFailed: version, encoding or replication role are not as they must be.
    """
    major = server_version // 10_000
    oldest, newest = pg_versions
    if not answers.direct:
        raise ThroughPooler(shard=shard.name)
    if answers.standby:
        raise NotPrimary(
            f"{shard.address} is a standby; give the primary's address in this shard's url", shard=shard.name
        )
    if not oldest <= major <= newest:
        raise not_ready(
            shard,
            f"the server is PostgreSQL {major}, but pg_versions = [{oldest}, {newest}]; "
            "widen it in [lint], so that plans are judged for this version too",
        )
    if server_encoding != "UTF8":
        raise not_ready(shard, f"the database's encoding is {server_encoding}; only UTF8 is supported")
    if answers.replication_role != "origin":
        raise not_ready(
            shard,
            f"session_replication_role is {answers.replication_role}, so triggers would not fire; "
            f"ALTER ROLE {answers.login} RESET session_replication_role",
        )


def read_only(shard: Shard, source: str, *, login: str, database: str) -> PreflightFailed:
    """
    Say who made all transactions of a shard read-only by default; a session does not overrule that.

    Whoever set it had a reason: a disk that is nearly full, a move to another server.

    Args:
        shard: where.
        source: where the server says that the setting comes from (`pg_settings.source`).
        login: the role that connected.
        database: its database.
    """
    role, base = quote_name(login), quote_name(database)
    cure = {
        "database": f"ALTER DATABASE {base} RESET {READ_ONLY}",
        "user": f"ALTER ROLE {role} RESET {READ_ONLY}",
        "database user": f"ALTER ROLE {role} IN DATABASE {base} RESET {READ_ONLY}",
        "client": "take it out of this shard's url, or of PGOPTIONS",
    }.get(source, f"ALTER SYSTEM RESET {READ_ONLY} and reload, or correct the server's configuration")
    return not_ready(
        shard,
        f"transactions are read-only here ({READ_ONLY} is on, from: {source}). Find out why, for a hosting service "
        f"sets it when the disk is full; then {cure}",
    )


def not_ready(shard: Shard, message: str) -> PreflightFailed:
    """Say what must be changed on a shard before anything is done there."""
    return PreflightFailed(f"{message}; nothing was changed", shard=shard.name)


def _unreadable(url: str) -> str:
    """Say why libpq takes no url, without a part of it: where one ends that is wrong, nobody knows."""
    if "://" not in url or not _NO_ESCAPE.search(url):
        return "its url cannot be parsed; write postgresql://user@host/database"
    before = url.rpartition("@")[0]
    where = "in user or password" if _NO_ESCAPE.search(before) else "in host, database or parameters"
    return (
        f"its url cannot be parsed: a % {where} is not followed by the two hexadecimal digits of a character; "
        "write a % itself as %25, and @ : / ? # in user or password as %40 %3A %2F %3F %23"
    )


def _without_secrets(message: str, given: Mapping[str, object]) -> str:
    if "@" in str(given.get("dbname", "")):  # so what libpq took for host, port and database begins in the password
        return "what was meant as its password was read as host and database"
    secrets = [given.get(name) for name in ("password", "sslpassword")]
    # An @ or / in a password that was not percent-encoded makes its rest look like a host or a port.
    secrets += [part for name, sign in _MISTAKEN.items() if sign.search(part := str(given.get(name, "")))]
    for secret in sorted(map(str, filter(None, secrets)), key=len, reverse=True):  # one may stand in another
        message = message.replace(secret, "***")
    return message


# Asked of a server process that is new and knows nothing: functions and a catalog's row, no join, no view.
_QUESTIONS = """
SELECT pg_backend_pid() = $1,
       pg_is_in_recovery(),
       current_setting('default_transaction_read_only')::boolean,
       current_setting('session_replication_role'),
       session_user::text,
       current_setting('deadlock_timeout'),
       CASE WHEN pg_backend_pid() = $1 THEN ARRAY[
           set_config('search_path', format('%I, pg_temp', $2::text), false),
           {calls}
       ] END
"""

SCHEMA_EXISTS = "SELECT to_regnamespace(quote_ident($1)) IS NOT NULL"

SET_ROLE = "SELECT CASE WHEN pg_backend_pid() = $1 THEN set_config('role', $2, false) END"
