"""Run transactions in threads, off the reactor thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Final, TypeVar, cast

import psycopg2
from twisted.enterprise import adbapi
from twisted.internet import defer
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import CommitLost, DatabaseError, DatabaseUnavailable, S2SError
from s2s.protocol.limits import Counters
from s2s.runtime import own_threads
from s2s.runtime.waiters import Waiters
from s2s.store import driver, interruptible, kept_rows, migrations, sqlstate
from s2s.store.async_connection import AsyncConnection
from s2s.store.availability import Availability
from s2s.store.connection import PlanningConnection, open_prepared, prepare
from s2s.store.connection_socket import shut_down_after
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Connection, Cursor, Query, Steps
from s2s.store.silence import Silence
from s2s.store.troubles import TELL_S, Troubles

T = TypeVar("T")

#: Interactions that may wait for a thread; further ones are refused.
MAX_WAITING: Final = 4096
#: Seconds that :meth:`Database.cancel` waits for the work that it cancelled, and seconds between two attempts to cancel
#: it.
CANCEL_S: Final = 1.0
_CANCEL_AGAIN_S: Final = 0.1
#: Seconds that a shutdown transaction may take to connect, and for each of its statements.
LAST_S: Final = 1.0
#: The statements of such a transaction, with those that prepare its connection, and its COMMIT.
_LAST_STATEMENTS: Final = 4
#: Seconds that the main thread waits until a session is ready for its first statement.
READY_S: Final = 60.0
_NOT_RUNNING: Final = "the database pool is not running"
_CANCELLED: Final = "cancelled, since the process stops"


class Database:
    """An ``adbapi.ConnectionPool`` of psycopg2 connections that reconnects by itself and raises our errors.

    Nothing connects before :meth:`start`, because twistd forks between the creation and the start of a service.

    :param url: a URL or libpq connection string; no log line or error shows its password.
    :param application_name: the name of the sessions in ``pg_stat_activity``.
    :param threads: the number of connections, each with a thread of its own.
    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param idle_timeout_s: seconds after which the database ends an idle transaction.
    :param max_waiting: see :data:`MAX_WAITING`.
    :param counters: counts the interactions refused because too many wait.
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
        counters: Counters | None = None,
        reactor: Any = None,
    ) -> None:
        if reactor is None:
            from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it
        self.reactor = reactor
        self.url = url
        self._threads = threads
        self._max_waiting = max_waiting
        self.counters = counters or Counters()
        self._parameters = driver.Parameters(url, application_name=application_name)
        self._timeouts = (statement_timeout_s, idle_timeout_s)
        self._pool: Any = None
        self._async_connection: AsyncConnection
        self._refusal = _NOT_RUNNING
        self._unfinished = 0
        self._until_idle: Waiters[None] = Waiters()
        #: Connections that are being prepared and that adbapi does not know yet.
        self._opening: set[Connection] = set()
        self._silence = Silence(
            self._connections,
            self.shutdown_transaction,
            statement_timeout_s,
            lambda: self.counters.meet("database_answer"),
            self._is_silent,
            self.reactor,
        )
        self.troubles = Troubles(reactor)
        #: The rules on our tables, as last looked up, and the time of that; ``None``: the lookup is in progress.
        self._rules: str | None = None
        self._rules_at = float("-inf")
        self.availability = Availability(reactor)
        #: No transaction commits any more, see :meth:`cancel`.
        self.is_cancelled = False

    def start(self) -> None:
        """Start the threads; each one connects at its first use."""
        self._pool = self._make_pool()
        # adbapi connects through this object, which reads an @FILE again.
        self._pool.dbapi = self._parameters
        self._pool.start()
        self._async_connection = AsyncConnection(
            self._parameters.read,
            self._timeouts[0],
            self.reactor,
            tell=self.availability.note,
            on_late=lambda: self.counters.meet("database_answer"),
            note=self._note,
        )
        self._silence.start()
        self._refusal = ""

    def _make_pool(self) -> Any:
        pool = adbapi.ConnectionPool(
            "psycopg2",
            cp_min=self._threads,
            cp_max=self._threads,
            prepare=self._prepare,
            cp_reactor=self.reactor,
        )
        pool.threadpool.threadFactory = own_threads.Thread
        return pool

    def reread(self) -> None:
        """Read the file of an ``@FILE`` now, to report an error in it; each new connection reads it in any case."""
        self._parameters.read()

    def stop(self) -> Deferred[None]:
        """Finish the running and waiting interactions, then close every connection.

        :returns: fires when no thread and no connection is left. New interactions are refused meanwhile.
        """
        self._refusal = self._refusal or _NOT_RUNNING
        line = self._async_connection.stop() if self._pool is not None else None
        return self._idle().addCallback(lambda _: line).addCallback(lambda _: self._close())

    def cancel(self) -> Deferred[bool]:
        """Roll back the running interactions, and refuse waiting and new ones: the grace period of the stop is over.

        The database is asked to cancel running SQL. Code that is between two statements, or that swallows the error,
        continues but cannot commit any more. No failure that this causes can therefore be charged to a handler. A query
        without a thread (:meth:`query`) is left to the database, which may still commit it.

        :returns: fires with whether nothing runs any more, after :data:`CANCEL_S` at the latest, also when the database
            hangs. An interaction that still runs then is in Python code, or waits for a database that does not answer.
        """
        self._refusal = _CANCELLED
        if not self.is_cancelled:
            self.is_cancelled = True
            # A daemon, so that neither a database that hangs nor the end of the process waits for it.
            own_threads.try_start(threading.Thread(target=self._cancel, args=(self._pool,), daemon=True))
            if self._pool is not None:
                self._async_connection.cancel(_CANCELLED)
        ended: Deferred[bool] = self._idle().addCallback(lambda _: True)
        return ended.addTimeout(CANCEL_S, self.reactor, lambda _, __: False)

    def run_at_shutdown(self, work: Callable[..., T], *args: Any) -> Deferred[T]:
        """Run ``work`` as :meth:`run` does, on its own connection and in bounded time, for the writes of a shutdown.

        It works after :meth:`cancel`, and also when no thread of the pool is free.
        """

        def in_thread() -> T:
            with self.shutdown_transaction() as txn:
                return work(txn, *args)

        return own_threads.run(self.reactor, in_thread).addTimeout(2 * LAST_S, self.reactor, _hangs)

    @property
    def is_away(self) -> bool:
        """Whether the last use of the database found no connection."""
        return self.availability.is_away

    @property
    def kept(self) -> str:
        """Why rows of ours are not written: :mod:`s2s.store.kept_rows`; empty: all are."""
        return "; ".join(self.troubles.current(kept_rows.STATE, kept_rows.RULE_STATE))

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

        :param work: a plain function of a cursor. Its own exceptions roll back and are passed on unchanged.
        :returns: fires with the result after the COMMIT. It fails with :class:`DatabaseUnavailable` when there is no
            connection, when the connection broke (with :class:`CommitLost` during the COMMIT) or when too many
            interactions wait, and with :class:`StatementRefused` when the database refused the data.
        """
        refused = self.refusal()
        if refused is not None:
            return refused
        self._unfinished += 1
        outcome = own_threads.run_in(self.reactor, self._pool.threadpool, self._interact, self._pool, work, args)
        return outcome.addBoth(self._leave)

    def refusal(self) -> Deferred[Any] | None:
        """Return a failed Deferred if no interaction may begin now."""
        if self._refusal:
            return defer.fail(DatabaseUnavailable(self._refusal))
        if self.waiting >= self._max_waiting:
            self.counters.meet("database")
            return defer.fail(DatabaseUnavailable(f"overloaded: {self.waiting} interactions wait for a connection"))
        return None

    def query(self, query: Query, done: Callable[[list[Any] | Failure], object]) -> None:
        """Run one query on a connection without a thread; the query commits by itself.

        Only one query runs at a time: the caller waits for its end.

        :param done: called with the rows, or with a failure like that of :meth:`run`.
        """
        if self._refusal:
            done(Failure(DatabaseUnavailable(self._refusal)))
        else:
            self._async_connection.query(query, done)

    def run_steps(self, work: Callable[..., Steps[T]], *args: Any) -> Deferred[T]:
        """Run the queries of ``work(*args)``, each as :meth:`query` does.

        :returns: fires, and fails, like that of :meth:`run`.
        """
        if self._refusal:
            return defer.fail(DatabaseUnavailable(self._refusal))
        return self._async_connection.run(work, *args)

    def _leave(self, outcome: T) -> T:
        self._unfinished -= 1
        if not self._unfinished:
            self._until_idle.fire(None)
        return outcome

    def _idle(self) -> Deferred[None]:
        """Wait until no interaction runs or waits."""
        return self._until_idle.wait() if self._unfinished else defer.succeed(None)

    def _is_silent(self, error: BaseException) -> None:
        self.availability.note(error)

    def _connections(self) -> list[Any]:
        """Return the connections on which a statement of ours may wait for its answer."""
        return [*self._opening, *self._pool.connections.values(), *self._async_connection.given_up]

    def _close(self) -> None:
        self._silence.stop()
        self.troubles.stop()
        self.availability.stop()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _cancel(self, pool: Any) -> None:
        """Cancel repeatedly, in a thread of its own: another statement may follow a cancelled one."""
        # psycopg2's own cancel() would block the whole interpreter while the database hangs.
        deadline = time.monotonic() + CANCEL_S
        while self._unfinished and time.monotonic() < deadline:
            sessions = [conn.session for conn in list(pool.connections.values()) if not conn.closed and conn.session]
            pids = [pid for pid, _ in sessions]
            with suppress(S2SError), self.shutdown_transaction() as txn:
                txn.execute("set local role none; select pg_cancel_backend(pid) from unnest(%s::int[]) as pid", (pids,))
            time.sleep(_CANCEL_AGAIN_S)

    def shutdown_transaction(self) -> AbstractContextManager[Cursor]:
        """Return one blocking transaction of bounded time, on its own connection; not for the reactor thread."""
        return blocking(
            self.url, "s2s last", statement_timeout_s=LAST_S, connect_timeout_s=LAST_S, cut_s=_LAST_STATEMENTS * LAST_S
        )

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _prepare(self, conn: Connection) -> None:
        self._opening.add(conn)
        try:
            prepare(conn, *self._timeouts)
        finally:
            self._opening.discard(conn)

    def _interact(self, pool: Any, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        try:
            conn = self._connect(pool)
        except psycopg2.Error as error:
            away = driver.translate_error(error)
            self.reactor.callFromThread(self.availability.note, away)
            raise away from None
        try:
            self._go_on()
            with conn.cursor(cursor_factory=StoreCursor) as txn:
                result = work(txn, *args)
            # Check here: an error alone does not suffice, because the work can swallow it.
            self._go_on()
            self._commit(conn)
            kept, conn.kept = conn.kept, []
            for each in kept:
                self.reactor.callFromThread(self._note, each)
        except BaseException as error:
            conn.kept.clear()
            is_broken = _roll_back(conn) or driver.is_of_the_connection(error) or sqlstate.of(error).drops
            if is_broken:
                pool.disconnect(conn)
            failed: DatabaseError | None = error if isinstance(error, CommitLost) else None
            if failed is None:
                try:
                    self._go_on()
                except DatabaseUnavailable:
                    if not is_broken:
                        # The session is not clean, and another thread may be about to end it.
                        pool.disconnect(conn)
                    raise
                failed = driver.translate_error(error, conn) if isinstance(error, psycopg2.Error) else None
            if is_broken:
                # Report it, whatever exception the work raised.
                failed = failed or DatabaseUnavailable("the connection broke")
                self.reactor.callFromThread(self.availability.note, failed)
            if not is_broken:
                self._released(pool, conn)
            if failed is not None:
                self.reactor.callFromThread(self._note, failed)
                raise failed from None
            if getattr(error, "state", "") == kept_rows.STATE:
                self.reactor.callFromThread(self._note, error)
            raise
        self._released(pool, conn)
        if self.is_away:
            self.reactor.callFromThread(self.availability.note, None)
        return result

    def _commit(self, conn: Connection) -> None:
        driver.commit(conn)

    def _released(self, pool: Any, conn: Connection) -> None:
        """Handle a connection that still works after its transaction has ended."""

    def _go_on(self) -> None:
        if self.is_cancelled:
            raise DatabaseUnavailable(_CANCELLED) from None

    def _connect(self, pool: Any) -> PlanningConnection:
        conn = cast("PlanningConnection", pool.connect())
        if not driver.is_broken(conn) and not driver.pending_input(conn.fileno()).poll(0):
            return conn
        pool.disconnect(conn)
        return cast("PlanningConnection", pool.connect())

    # --- in the reactor's thread ---------------------------------------------------------------------------------

    def _note(self, error: BaseException) -> None:
        """Report an error that an operator can fix, raised on a live connection."""
        state = getattr(error, "state", "")
        if state == kept_rows.RULE_STATE:
            self._note_rule(state, str(error))
        elif sqlstate.meaning(state).cure:
            self.troubles.note(state, str(error))

    def _note_rule(self, state: str, text: str) -> None:
        """Report a rule that breaks a statement, with its name, which PostgreSQL does not report."""
        now = self.reactor.seconds()
        if now < self._rules_at + TELL_S:
            if self._rules is not None:
                self.troubles.note(state, f"{text}: {self._rules}")
            return
        self._rules_at, self._rules = now, None

        def found(outcome: Any) -> None:
            self._rules = "no rule is found" if isinstance(outcome, Failure) else str(outcome)
            self.troubles.note(state, f"{text}: {self._rules}")

        self.run(_rules).addBoth(found)


def _roll_back(conn: Connection) -> bool:
    """Roll back, and return whether the connection is broken."""
    with suppress(psycopg2.Error):
        conn.rollback()
    return driver.is_broken(conn)


def _rules(txn: Cursor) -> str:
    return kept_rows.described([guard for guard in kept_rows.guards(txn, migrations.tables()) if guard.kind == "rule"])


def _hangs(_: object, __: float) -> Failure:
    return Failure(CommitLost("no answer in time"))


def step(txn: Cursor, work: Callable[[Cursor], T]) -> T:
    """Do one of several pieces of work on a blocking connection: committed when it returns, else rolled back.

    :raises DatabaseError: instead of the driver's own error.
    """
    conn = txn.connection
    try:
        result = work(txn)
        driver.commit(conn)
    except BaseException as error:
        _roll_back(conn)
        if isinstance(error, psycopg2.Error):
            raise driver.translate_error(error, conn) from None
        raise
    return result


@contextmanager
def blocking(
    url: str,
    application_name: str = "s2s",
    *,
    statement_timeout_s: float = 60.0,
    connect_timeout_s: float | None = None,
    within_s: float | None = None,
    cut_s: float | None = None,
) -> Iterator[Cursor]:
    """Open one transaction on a connection of its own, for a command line or a check before the reactor runs.

    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param connect_timeout_s: seconds that connecting may take, whatever the URL says (libpq may turn 1 into 2);
        ``None``: the URL's value, or our default.
    :param within_s: seconds that everything may take in the main thread; ``None``: only the time until the session is
        ready is bounded, by :data:`READY_S`. After a while a line on stderr states the reason of the wait.
    :param cut_s: seconds after which the connection is shut down in any thread; ``None``: it is not.
    :raises OperatorError: the URL cannot be read.
    :raises DatabaseUnavailable: there is no connection, or it broke.
    :raises StatementRefused: the database refused a statement.
    """
    conn: PlanningConnection | None = None
    try:
        parameters = driver.parameters(url, application_name=application_name)
        if connect_timeout_s is not None:
            parameters["connect_timeout"] = max(1, round(connect_timeout_s))
        patience = interruptible.Patience(parameters, READY_S if within_s is None else within_s)
        with ExitStack() as stack:

            def ready(opened: PlanningConnection) -> None:
                if cut_s is not None:
                    stack.enter_context(shut_down_after(opened, cut_s))
                stack.enter_context(interruptible.waits(opened, patience))
                prepare(opened, statement_timeout_s, statement_timeout_s)

            conn = open_prepared(parameters, lambda each: interruptible.connect(each, patience), ready)
            if within_s is None:
                patience.end()
            with conn.cursor(cursor_factory=StoreCursor) as txn:
                yield txn
            driver.commit(conn)
            for kept in conn.kept:
                # Report it to the caller, although the rest is done.
                raise kept
    except psycopg2.Error as error:
        raise driver.translate_error(error, conn) from None
    finally:
        if conn is not None:
            conn.close()
