"""psycopg2: open connections, and classify its errors by the action that a caller can take."""

from __future__ import annotations

import hashlib
import secrets
import select
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import msgspec
import psycopg2
from psycopg2.extensions import (
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_INTRANS,
    TRANSACTION_STATUS_UNKNOWN,
    connection,
    cursor,
)
from twisted.logger import Logger

from s2s.errors import CommitLost, DatabaseError, DatabaseUnavailable, OperatorError, StatementRefused, storable
from s2s.runtime import files
from s2s.store import libpq, sqlstate
from s2s.store.connection import PlanningConnection, connect, open_prepared
from s2s.store.url import read

T = TypeVar("T")

Connection = connection
#: The first argument of every store function: a cursor inside a transaction.
Cursor = cursor


#: Defaults that the URL may override. A peer that disappears without closing is detected in about 25 s on an idle
#: connection, and in 10 s on a connection that waits for an answer.
_CONNECT: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "client_encoding": "UTF8",
}
#: A name that foreign code does not know: if foreign code ends the transaction and begins another one, the missing
#: savepoint reveals that.
_SAVEPOINT: Final = f"s2s_{secrets.token_hex(8)}"
#: idle_in_transaction_session_timeout, in seconds, while a session holds an exclusive advisory lock: shorter than the
#: statement timeout of the sessions that wait for the lock.
FROZEN_S: Final = 5.0


def parameters(url: str, **ours: Any) -> dict[str, Any]:
    """Return the connection parameters of a database URL, a libpq connection string or ``@FILE``.

    :param ours: our own parameters, which the URL may override.
    :raises OperatorError: the URL cannot be read; the message contains no part of a password.
    """
    given = read(url)
    return {**libpq.AT_START.parameters(given), **_CONNECT, **ours, **given, "connection_factory": PlanningConnection}


class Parameters:
    """The parameters of connections that are opened repeatedly; the file of an ``@FILE`` is read for each connection.

    :raises OperatorError: see :func:`parameters`.
    """

    log = Logger()

    def __init__(self, url: str, **ours: Any) -> None:
        self._url = url
        self._ours = ours
        self._last = parameters(url, **ours)
        self._complaint = ""

    def read(self) -> dict[str, Any]:
        """Return the parameters; if the file cannot be read, return the last ones and log that once."""
        complaint = ""
        try:
            self._last = parameters(self._url, **self._ours)
        except OperatorError as error:
            complaint = str(error)
            if complaint != self._complaint:
                self.log.error("{complaint}; the URL read before stays in force", complaint=complaint)
        self._complaint = complaint
        return self._last

    def connect(self, prepare: Callable[[PlanningConnection], object]) -> Connection:
        """Connect, and run the first statements. Blocks."""
        return open_prepared(self.read(), connect, prepare)


class Prepared:
    """A statement that each connection plans once: planning takes most of the time of a short statement.

    :param name: the name of the prepared statement.
    :param statement: the SQL, with ``$1`` and so on for its parameters.
    :param types: the SQL types of the parameters.
    :ivar prepare: the SQL that plans the statement; the plan outlives a rolled-back transaction.
    :ivar call: the SQL that runs the planned statement; it takes parameters as any statement does.
    """

    def __init__(self, name: str, statement: str, *types: str) -> None:
        self.prepare = f"prepare {name} ({', '.join(types)}) as {statement}"
        self.call = f"execute {name} ({', '.join('%s' for _ in types)})"


class Query(msgspec.Struct, frozen=True):
    """A statement and its parameters."""

    statement: Prepared | str
    params: tuple[Any, ...]


def array_literal(values: Iterable[int | None]) -> str:
    """Return numbers as PostgreSQL's text of an array.

    psycopg2 writes a list as an expression, which the database parses value by value.
    """
    return f"{{{','.join(['null' if value is None else str(value) for value in values])}}}"


def missing(txn: Cursor, table: str, column: str, values: Iterable[str]) -> list[str]:
    """Return the given values that no row of a table has.

    :param table: a constant of the caller, as is ``column``.
    """
    txn.execute(
        f"select each from unnest(%s::text[]) each where not exists (select from {table} where {column} = each)",  # noqa: S608
        (list(values),),
    )
    return [value for (value,) in txn]


#: Work that yields queries, receives their rows, and returns its result. The driver of the generator decides how to
#: wait.
Steps = Generator[Query, list[Any], T]


def drive(txn: Cursor, steps: Steps[T]) -> T:
    """Run the queries of ``steps`` in a transaction. Blocks."""
    rows: Any = None  # a generator's first send() must be None
    while True:
        try:
            query = steps.send(rows)
        except StopIteration as end:
            result: T = end.value
            return result
        text = query.statement
        if isinstance(text, Prepared):
            plans = cast("PlanningConnection", txn.connection).plans
            if text not in plans:
                txn.execute(text.prepare)
                plans.add(text)
            text = text.call
        txn.execute(text, query.params or None)
        rows = txn.fetchall() if txn.description else []


def translate_error(error: psycopg2.Error, conn: Connection | None = None) -> DatabaseError:
    """Convert a driver's error into one of ours, without the row data that it may quote.

    :param conn: the connection that raised it; ``None``: there was none.
    """
    # In that case libpq reports no reason, or that a host is unknown.
    text = (conn is None and files.exhausted()) or _text(error)
    state = sqlstate.code(error) or (sqlstate.at_connect(text) if conn is None else "")
    if conn is None or is_broken(conn) or is_of_the_connection(error) or sqlstate.meaning(state).unavailable:
        return DatabaseUnavailable(text, state)
    return StatementRefused(text, error.diag.constraint_name, state)


def _text(error: psycopg2.Error) -> str:
    """Return the most informative line; after a connect to several addresses, a line of PostgreSQL itself."""
    lines = (error.diag.message_primary or str(error).strip() or type(error).__name__).splitlines()
    return storable(next((line for line in lines if "FATAL: " in line), lines[0]))


def is_broken(conn: Connection) -> bool:
    """Whether a connection is unusable; psycopg2 does not report each such connection as closed."""
    return bool(conn.closed) or conn.info.transaction_status == TRANSACTION_STATUS_UNKNOWN


def pending_input(fileno: int) -> select.poll:
    """Return a poll object whose ``poll(0)`` reports whether the database has sent data to a connection.

    The only message on an idle connection is its end. After a restart of the database, all connections have that
    message waiting, and using one of them would fail.
    """
    listening = select.poll()
    listening.register(fileno, select.POLLIN)
    return listening


def is_of_the_connection(error: BaseException) -> bool:
    """Whether an error comes from libpq and not from the server: it may precede the detection of a broken connection.

    psycopg2 has no class of its own for these errors. An error about a Python value is always a ``ProgrammingError``.
    """
    libpqs = (psycopg2.DatabaseError, psycopg2.OperationalError, psycopg2.InterfaceError)
    return isinstance(error, psycopg2.Error) and type(error) in libpqs and not error.pgcode


def is_in_transaction(txn: Cursor) -> bool:
    """Whether this transaction still accepts statements."""
    return bool(txn.connection.info.transaction_status == TRANSACTION_STATUS_INTRANS)


def is_read_only(txn: Cursor) -> bool:
    """Whether this transaction is read-only."""
    txn.execute("show transaction_read_only")
    return bool(txn.fetchone() == ("on",))


def commit(conn: Connection) -> None:
    """Commit, and verify that: PostgreSQL answers the COMMIT of a failed transaction with a ROLLBACK and no error.

    :raises StatementRefused: a statement had failed and its error was swallowed.
    :raises CommitLost: the connection broke.
    """
    if conn.info.transaction_status == TRANSACTION_STATUS_INERROR:
        raise StatementRefused("a statement of the transaction had failed before its COMMIT")
    try:
        conn.commit()
    except psycopg2.Error as error:
        if is_broken(conn) or is_of_the_connection(error):
            raise CommitLost(_text(error)) from None
        raise


@contextmanager
def savepoint(txn: Cursor, before: str = "", after: str = "") -> Iterator[None]:
    """Undo only the changes made inside, if the body raises.

    :param before: statements to run before the savepoint, each with its semicolon.
    :param after: statements to run first inside it.
    """
    txn.execute(f"{before}savepoint {_SAVEPOINT}; {after}")
    try:
        yield
        txn.execute(f"release savepoint {_SAVEPOINT}")
    except BaseException as error:
        try:
            txn.execute(f"rollback to savepoint {_SAVEPOINT}; release savepoint {_SAVEPOINT}")
        except psycopg2.Error:
            # The transaction and its savepoints are gone. Raise the error of the statement that ended it.
            if isinstance(error, psycopg2.Error):
                raise error from None
            raise
        raise


def check_constraints(txn: Cursor) -> None:
    """Check the deferred constraints now, and fire the deferred triggers, as the COMMIT will do once more.

    SET CONSTRAINTS cannot restore the mode of each constraint, so a rollback to a savepoint restores them. Each check
    covers all changes of the transaction so far.
    """
    name = f"{_SAVEPOINT}_constraints"
    txn.execute(
        f"savepoint {name}; set constraints all immediate; rollback to savepoint {name}; release savepoint {name}"
    )


@contextmanager
def refusable(txn: Cursor) -> Iterator[None]:
    """Undo the changes made inside if the body raises, and convert a refusal of the database into our error.

    :raises StatementRefused: the database refuses a statement because of its data; the transaction continues.
    """
    try:
        with savepoint(txn):
            yield
    except psycopg2.Error as error:
        refused = translate_error(error, txn.connection)
        if isinstance(refused, StatementRefused):
            raise refused from None
        raise


def advisory_lock(txn: Cursor, lock: int) -> None:
    """Wait for an advisory lock, and hold it until the transaction ends.

    A process that freezes while it holds the lock does not block the others for long: the database ends its
    transaction.

    :param lock: see :func:`lock_key`.
    """
    txn.execute(
        "set local idle_in_transaction_session_timeout = %s; select pg_advisory_xact_lock(%s)",
        (round(FROZEN_S * 1000), lock),
    )


def lock_key(name: str) -> int:
    """Derive the 64-bit key of an advisory lock from its name."""
    return int.from_bytes(hashlib.sha256(b"s2s " + name.encode()).digest()[:8], "big", signed=True)
