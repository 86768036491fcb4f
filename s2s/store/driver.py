"""psycopg2: opening a connection, and telling its errors apart by what a caller can do about them."""

from __future__ import annotations

import hashlib
import secrets
import select
from collections.abc import Generator, Iterable, Iterator
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
from s2s.store.connection import PlanningConnection, connect
from s2s.store.url import read

T = TypeVar("T")

Connection = connection
#: What every store function takes first: a cursor inside a transaction.
Cursor = cursor


#: What the URL may override. A peer that is gone without a word is noticed in about 25 s on an idle connection
#: and in 10 s on one that waits for an answer.
_CONNECT: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "client_encoding": "UTF8",
}
#: Unknown to foreign code: where that ends the transaction and begins another one, the end is noticed by the savepoint
#: that is missing.
_SAVEPOINT: Final = f"s2s_{secrets.token_hex(8)}"
#: Seconds after which the database ends the transaction of one who is alone in something and does nothing there: fewer
#: than the others' statements may wait for him.
FROZEN_S: Final = 5.0


def parameters(url: str, **ours: Any) -> dict[str, Any]:
    """Read a database URL, a libpq connection string or ``@FILE``.

    :param ours: parameters of ours, which the URL may override.
    :raises OperatorError: it cannot be read; the text holds nothing of a password.
    """
    given = read(url)
    return {**libpq.AT_START.parameters(given), **_CONNECT, **ours, **given, "connection_factory": PlanningConnection}


class Parameters:
    """The parameters of connections that are made again and again; the file of an ``@FILE`` is read for each.

    :raises OperatorError: see :func:`parameters`.
    """

    log = Logger()

    def __init__(self, url: str, **ours: Any) -> None:
        self._url = url
        self._ours = ours
        self._last = parameters(url, **ours)
        self._complaint = ""

    def read(self) -> dict[str, Any]:
        """Read them; where the file cannot be read, the last ones stay in force and the log says so once."""
        complaint = ""
        try:
            self._last = parameters(self._url, **self._ours)
        except OperatorError as error:
            complaint = str(error)
            if complaint != self._complaint:
                self.log.error("{complaint}; the URL read before stays in force", complaint=complaint)
        self._complaint = complaint
        return self._last

    def connect(self) -> Connection:
        """Connect. Blocks."""
        return connect(self.read())


class Prepared:
    """A statement that each connection plans once: for a short one, planning is most of its time.

    :param name: what the connections call it.
    :param statement: with ``$1`` and so on for its parameters.
    :param types: of the parameters, in SQL.
    :ivar prepare: plans it; that stays when the transaction does not.
    :ivar call: runs it where it is planned; its parameters are those of any statement.
    """

    def __init__(self, name: str, statement: str, *types: str) -> None:
        self.prepare = f"prepare {name} ({', '.join(types)}) as {statement}"
        self.call = f"execute {name} ({', '.join('%s' for _ in types)})"


class Query(msgspec.Struct, frozen=True):
    """A statement and its parameters."""

    statement: Prepared | str
    params: tuple[Any, ...]


def array_literal(values: Iterable[int | None]) -> str:
    """Write numbers as PostgreSQL's text of an array.

    Of a list psycopg2 writes an expression, which the database parses value by value.
    """
    return f"{{{','.join(['null' if value is None else str(value) for value in values])}}}"


def missing(txn: Cursor, table: str, column: str, values: Iterable[str]) -> list[str]:
    """Return those of some values that no row of a table has.

    :param table: a constant of the caller, as is the ``column``.
    """
    txn.execute(
        f"select each from unnest(%s::text[]) each where not exists (select from {table} where {column} = each)",  # noqa: S608
        (list(values),),
    )
    return [value for (value,) in txn]


#: A piece of work that says what it wants to ask, is given the rows, and returns what it came to: whoever drives it
#: decides how it waits.
Steps = Generator[Query, list[Any], T]


def drive(txn: Cursor, steps: Steps[T]) -> T:
    """Take the steps of a piece of work in a transaction. Blocks."""
    rows: Any = None  # the first send is None, as it must be
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
    """Say a driver's error in our words, without the row's data that it may quote.

    :param conn: the connection that it came from; ``None``: there was none.
    """
    # libpq says nothing then, or that a host is not known.
    text = (conn is None and files.exhausted()) or _text(error)
    state = sqlstate.code(error) or (sqlstate.at_connect(text) if conn is None else "")
    if conn is None or is_broken(conn) or is_of_the_connection(error) or sqlstate.meaning(state).unavailable:
        return DatabaseUnavailable(text, state)
    return StatementRefused(text, error.diag.constraint_name, state)


def _text(error: psycopg2.Error) -> str:
    """Return the line that says most: at the connect, of all addresses of a host, one at which PostgreSQL answered."""
    lines = (error.diag.message_primary or str(error).strip() or type(error).__name__).splitlines()
    return storable(next((line for line in lines if "FATAL: " in line), lines[0]))


def is_broken(conn: Connection) -> bool:
    """Whether a connection is of no more use; psycopg2 does not call each of these closed."""
    return bool(conn.closed) or conn.info.transaction_status == TRANSACTION_STATUS_UNKNOWN


def pending_input(fileno: int) -> select.poll:
    """Give what tells by ``poll(0)`` whether the database has said something to a connection.

    To an idle one it has nothing to say but that it ends: all of them have that waiting after a restart of the
    database, and each would cost somebody a failure.
    """
    listening = select.poll()
    listening.register(fileno, select.POLLIN)
    return listening


def is_of_the_connection(error: BaseException) -> bool:
    """Whether an error is libpq's own and not the server's: it may come before the connection is known to be broken.

    psycopg2 has a class of its own for none of them; what it says of Python's values is always a ``ProgrammingError``.
    """
    libpqs = (psycopg2.DatabaseError, psycopg2.OperationalError, psycopg2.InterfaceError)
    return isinstance(error, psycopg2.Error) and type(error) in libpqs and not error.pgcode


def is_in_transaction(txn: Cursor) -> bool:
    """Whether statements of this transaction are still taken."""
    return bool(txn.connection.info.transaction_status == TRANSACTION_STATUS_INTRANS)


def is_read_only(txn: Cursor) -> bool:
    """Whether this transaction refuses to write."""
    txn.execute("show transaction_read_only")
    return bool(txn.fetchone() == ("on",))


def commit(conn: Connection) -> None:
    """Commit, truly: PostgreSQL answers the COMMIT of a failed transaction with a ROLLBACK and no error.

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
    """Undo what is done inside if it raises, and only that.

    :param before: statements to do before the savepoint, each with its semicolon.
    :param after: statements to do first inside it.
    """
    txn.execute(f"{before}savepoint {_SAVEPOINT}; {after}")
    try:
        yield
        txn.execute(f"release savepoint {_SAVEPOINT}")
    except BaseException as error:
        try:
            txn.execute(f"rollback to savepoint {_SAVEPOINT}; release savepoint {_SAVEPOINT}")
        except psycopg2.Error:
            # The transaction is gone with its savepoints: a statement that has ended it by its failure tells why.
            if isinstance(error, psycopg2.Error):
                raise error from None
            raise
        raise


@contextmanager
def refusable(txn: Cursor) -> Iterator[None]:
    """Undo what is done inside if it raises, and say in our words what the database refuses.

    :raises StatementRefused: it refuses a statement for its data; the transaction goes on.
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

    A process that is frozen with it does not keep the others away for long: the database ends its transaction.

    :param lock: see :func:`lock_key`.
    """
    txn.execute(
        "set local idle_in_transaction_session_timeout = %s; select pg_advisory_xact_lock(%s)",
        (round(FROZEN_S * 1000), lock),
    )


def lock_key(name: str) -> int:
    """Derive the 64-bit key of an advisory lock from its name."""
    return int.from_bytes(hashlib.sha256(b"s2s " + name.encode()).digest()[:8], "big", signed=True)
