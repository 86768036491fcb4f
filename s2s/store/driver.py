"""psycopg2: opening a connection, and telling its errors apart by what a caller can do about them."""

from __future__ import annotations

import hashlib
import re
import select
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar, cast

import msgspec
import orjson
import psycopg2
import psycopg2.extras
from psycopg2.extensions import (
    POLL_OK,
    POLL_READ,
    POLL_WRITE,
    TRANSACTION_STATUS_IDLE,
    TRANSACTION_STATUS_INERROR,
    TRANSACTION_STATUS_UNKNOWN,
    connection,
    cursor,
    parse_dsn,
)

from s2s.errors import CommitLost, DatabaseError, DatabaseUnavailable, OperatorError, StatementRefused

T = TypeVar("T")

Connection = connection
#: What every store function takes first: a cursor inside a transaction.
Cursor = cursor


class PlanningConnection(connection):
    """A connection that knows the statements it has planned; :func:`parameters` has every one of ours made so.

    :ivar plans: those statements.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: set[Prepared] = set()


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
#: Seconds after which the database ends the transaction of one who is alone in something and does nothing there: fewer
#: than the others' statements may wait for him.
FROZEN_S: Final = 5.0
#: SQLSTATE classes and codes of a database that cannot serve now, with nothing wrong in the statement: connection,
#: read-only (a standby after a failover), deadlock, resources, lock timeout, cancelled or shutting down, system.
_PASSING: Final = re.compile(r"08|25006|40|53|55P03|57|58")


def parameters(url: str, **ours: Any) -> dict[str, Any]:
    """Read a database URL or a libpq connection string.

    :param ours: parameters of ours, which the URL may override.
    :raises OperatorError: it is neither; the text holds nothing of it, since libpq would quote a password.
    """
    try:
        given = parse_dsn(url)
    except psycopg2.Error:
        given = {"host": "@@"}
    # An "@", "/" or "?" that a password holds unescaped cuts the URL elsewhere, and libpq would quote the pieces.
    elsewhere = [value for name, value in given.items() if name not in ("user", "password", "passfile")]
    if any("@" in value[1:] for value in elsewhere) or not re.fullmatch(r"[\d,]*", given.get("port", "")):
        raise OperatorError(
            "the database URL cannot be read: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            "with %40, %2F and %3F for @, / and ? inside a name or password"
        )
    return {**_CONNECT, **ours, **given, "connection_factory": PlanningConnection}


def prepare(conn: Connection, statement_timeout_s: float, idle_timeout_s: float) -> None:
    """Set what every transaction on a new connection relies on.

    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param idle_timeout_s: seconds after which it ends a transaction that does nothing.
    """
    psycopg2.extras.register_default_jsonb(conn, loads=_read_json)
    with conn.cursor() as txn:
        txn.execute(settings(statement_timeout_s, idle_timeout_s))
    conn.commit()


def settings(statement_timeout_s: float, idle_timeout_s: float = 60.0) -> str:
    """Give the statement that sets what every transaction relies on; see :func:`prepare`."""
    return (
        f"set statement_timeout = {round(statement_timeout_s * 1000)};"
        f" set idle_in_transaction_session_timeout = {round(idle_timeout_s * 1000)}; set synchronous_commit = on;"
        " set timezone = 'UTC'; set default_transaction_isolation = 'read committed'"
    )


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


def numbers(values: Iterable[int | None]) -> str:
    """Write numbers as PostgreSQL's text of an array.

    Of a list psycopg2 writes an expression, which the database parses value by value.
    """
    return f"{{{','.join(['null' if value is None else str(value) for value in values])}}}"


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


def open_async(parameters: Mapping[str, Any], statement: str, within_s: float) -> PlanningConnection:
    """Connect, and run a first statement. Blocks; the connection is asynchronous from then on.

    :param within_s: seconds that all of it may take.
    """
    deadline = time.monotonic() + within_s
    conn: PlanningConnection = psycopg2.connect(**parameters, async_=True)
    try:
        _settle(conn, deadline, within_s)
        cursor = conn.cursor()  # kept until it is done: the connection does not
        cursor.execute(statement)
        _settle(conn, deadline, within_s)
    except BaseException:
        conn.close()
        raise
    return conn


def _settle(conn: Connection, deadline: float, within_s: float) -> None:
    """Wait until an asynchronous connection has done what it was asked.

    :param deadline: on the monotonic clock.
    """
    events = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}
    while (state := conn.poll()) != POLL_OK:
        ready = select.poll()
        ready.register(conn.fileno(), events[state])
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not ready.poll(left_s * 1000):
            raise psycopg2.OperationalError(f"no answer within {within_s:g} s")


class Unreadable:
    """A JSON value of the database that Python cannot read, such as ``1e400``: written by another hand than ours.

    It is no value of any kind, so that whoever uses it refuses it, and the rows beside it are read all the same.
    """

    def __repr__(self) -> str:
        return "(JSON that cannot be read)"


def _read_json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return Unreadable()


def told(error: psycopg2.Error, conn: Connection | None = None) -> DatabaseError:
    """Say a driver's error in our words, without the row's data that it may quote.

    :param conn: the connection that it came from; ``None``: there was none.
    """
    state = error.pgcode or ""
    text = _text(error)
    if conn is None or is_broken(conn) or is_of_the_connection(error) or _PASSING.match(state):
        return DatabaseUnavailable(text)
    return StatementRefused(text, error.diag.constraint_name)


def _text(error: psycopg2.Error) -> str:
    return (error.diag.message_primary or str(error).strip() or type(error).__name__).splitlines()[0]


def is_passing(error: BaseException) -> bool:
    """Whether a statement failed for what is over soon, such as a deadlock, with nothing wrong in it."""
    return isinstance(error, psycopg2.Error) and bool(_PASSING.match(error.pgcode or ""))


def is_broken(conn: Connection) -> bool:
    """Whether a connection is of no more use; psycopg2 does not call each of these closed."""
    return bool(conn.closed) or conn.info.transaction_status == TRANSACTION_STATUS_UNKNOWN


def ears(fileno: int) -> select.poll:
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


def is_lost(txn: Cursor) -> bool:
    """Whether this transaction is no more: its connection broke, or somebody in it has ended it."""
    return is_broken(txn.connection) or txn.connection.info.transaction_status == TRANSACTION_STATUS_IDLE


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
def savepoint(txn: Cursor) -> Iterator[None]:
    """Undo what is done inside if it raises, and only that."""
    txn.execute("savepoint s2s")
    try:
        yield
        txn.execute("release savepoint s2s")
    except BaseException:
        txn.execute("rollback to savepoint s2s; release savepoint s2s")
        raise


def one_at_a_time(txn: Cursor, lock: int) -> None:
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
