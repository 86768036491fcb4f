"""Transactions off the reactor's thread."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar, cast

import psycopg2
from twisted.enterprise import adbapi
from twisted.internet import threads
from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger

from s2s.errors import DatabaseUnavailable
from s2s.store import driver
from s2s.store.driver import Connection, Cursor

T = TypeVar("T")

#: Interactions that may wait for a thread before further ones are refused.
MAX_WAITING: Final = 4096


class Database:
    """An ``adbapi.ConnectionPool`` of psycopg2 connections that heals by itself and speaks in our errors.

    Nothing is connected before :meth:`start`: twistd forks between the making and the starting of a service.

    :param url: a URL or libpq connection string; nothing shows its password.
    :param application_name: what ``pg_stat_activity`` calls us.
    :param threads: connections, each with a thread of its own.
    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param idle_timeout_s: seconds after which it ends a transaction that does nothing.
    :param max_waiting: see :data:`MAX_WAITING`.
    :param reactor: for tests.
    :raises OperatorError: the URL cannot be read.
    """

    log = Logger()

    def __init__(
        self,
        url: str,
        application_name: str = "s2s",
        *,
        threads: int = 5,
        statement_timeout_s: float = 8.0,
        idle_timeout_s: float = 60.0,
        max_waiting: int = MAX_WAITING,
        reactor: Any = None,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it
        self._reactor = reactor
        self._threads = threads
        self._max_waiting = max_waiting
        self._parameters = driver.parameters(url, application_name=application_name)
        self._timeouts = (statement_timeout_s, idle_timeout_s)
        self._pool: Any = None
        self._unfinished = 0
        self._finished: Deferred[None] | None = None
        self.is_away = False

    def start(self) -> None:
        """Start the threads; each connects when it is first used."""
        self._pool = adbapi.ConnectionPool(
            "psycopg2",
            cp_min=self._threads,
            cp_max=self._threads,
            cp_openfun=self._prepare,
            cp_reactor=self._reactor,
            **self._parameters,
        )
        self._pool.start()

    def stop(self) -> Deferred[None]:
        """Finish what is under way and waits, then close every connection.

        :returns: fires when no thread and no connection is left. What comes meanwhile is refused.
        """
        pool, self._pool = self._pool, None
        done: Deferred[None] = Deferred()
        if pool is not None:
            done.addCallback(lambda _: pool.close())
        self._finished = done
        self._fire_if_finished()
        return done

    @property
    def running(self) -> int:
        """How many interactions have a thread now."""
        return min(self._unfinished, self._threads)

    @property
    def waiting(self) -> int:
        """How many interactions wait for a thread."""
        return self._unfinished - self.running

    def run(self, work: Callable[..., T], *args: Any) -> Deferred[T]:
        """Call ``work(txn, *args)`` in a thread, in one transaction, which is committed when it returns.

        :param work: a plain function of a cursor; an exception of its own rolls back and comes through as it is.
        :returns: fires with its result after the COMMIT. It fails with :class:`DatabaseUnavailable` when there is no
            connection, when it broke (of a broken COMMIT the outcome is unknown) or when too many wait, and with
            :class:`StatementRefused` when the database refused the data.
        """
        if self._pool is None:
            return fail(DatabaseUnavailable("the database pool is not running"))
        if self.waiting >= self._max_waiting:
            return fail(DatabaseUnavailable(f"overloaded: {self.waiting} interactions wait for a connection"))
        self._unfinished += 1
        outcome: Deferred[T] = threads.deferToThreadPool(
            self._reactor, self._pool.threadpool, self._interact, self._pool, work, args
        )
        return outcome.addBoth(self._leave)

    def _leave(self, outcome: T) -> T:
        self._unfinished -= 1
        self._fire_if_finished()
        return outcome

    def _fire_if_finished(self) -> None:
        if self._finished is not None and self._unfinished == 0:
            finished, self._finished = self._finished, None
            finished.callback(None)

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _prepare(self, conn: Connection) -> None:
        driver.prepare(conn, *self._timeouts)

    def _interact(self, pool: Any, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        try:
            conn = self._connect(pool)
        except psycopg2.Error as error:
            away = driver.told(error)
            self._reactor.callFromThread(self._tell, True, str(away))
            raise away from None
        try:
            with conn.cursor() as txn:
                result = work(txn, *args)
            driver.commit(conn)
        except BaseException as error:
            _roll_back(pool, conn)
            failed = driver.told(error, conn) if isinstance(error, psycopg2.Error) else None
            if conn.closed:
                self._reactor.callFromThread(self._tell, True, str(failed or "the connection broke"))
            if failed is not None:
                raise failed from None
            raise
        if self.is_away:
            self._reactor.callFromThread(self._tell, False)
        return result

    def _connect(self, pool: Any) -> Connection:
        conn = cast("Connection", pool.connect())
        # An idle connection has nothing to say. One that has, has been told of its end: all of them after a restart
        # of the database, and each would cost somebody a failure.
        if not conn.closed:
            line = select.poll()
            line.register(conn.fileno(), select.POLLIN)
            if not line.poll(0):
                return conn
        pool.disconnect(conn)
        return cast("Connection", pool.connect())

    # --- in the reactor's thread ---------------------------------------------------------------------------------

    def _tell(self, is_away: bool, why: str = "") -> None:
        """Write one line when the database goes and one when it is back, however many notice."""
        if is_away and not self.is_away:
            self.log.warn("the database is not available: {why}", why=why)
        elif self.is_away and not is_away:
            self.log.info("the database is available again")
        self.is_away = is_away


def _roll_back(pool: Any, conn: Connection) -> None:
    """Roll back; a connection that cannot is dropped, and the thread's next use opens another one."""
    with suppress(psycopg2.Error):
        conn.rollback()
    if conn.closed:
        pool.disconnect(conn)


@contextmanager
def blocking(url: str, application_name: str = "s2s", *, statement_timeout_s: float = 60.0) -> Iterator[Cursor]:
    """Give one transaction on a connection of its own, for a command line or a check before the reactor runs.

    :raises OperatorError: the URL cannot be read.
    :raises DatabaseUnavailable: there is no connection, or it broke.
    :raises StatementRefused: the database refused a statement.
    """
    conn: Connection | None = None
    try:
        conn = psycopg2.connect(**driver.parameters(url, application_name=application_name))
        driver.prepare(conn, statement_timeout_s, statement_timeout_s)
        with conn.cursor() as txn:
            yield txn
        driver.commit(conn)
    except psycopg2.Error as error:
        raise driver.told(error, conn) from None
    finally:
        if conn is not None:
            conn.close()
