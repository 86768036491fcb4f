"""Run short statements, one after the other, on an asynchronous connection that the reactor drives.

A thread of the pool costs two thread switches, which take longer than a short statement.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import DatabaseUnavailable
from s2s.runtime import own_threads
from s2s.runtime.clock import cancel
from s2s.runtime.waiters import Waiters
from s2s.store import driver, sqlstate
from s2s.store.connection import PlanningConnection, open_async
from s2s.store.connection_socket import ConnectionSocket
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Prepared, Query, Steps

T = TypeVar("T")

#: The most sessions with an abandoned statement that has not ended. The database does not notice that a client has left
#: while it hangs in a COMMIT, so each of them remains a session of the database. At this number no further session is
#: opened.
MOST_GIVEN_UP: Final = 2
#: Seconds that connecting may take, and seconds that a statement may take beyond the database's own timeout.
CONNECT_S: Final = 5.0
BEYOND_S: Final = 2.0


class AsyncConnection:
    """One connection, opened at its first use and again after it broke. Each statement commits by itself.

    :param parameters: returns the connection parameters; called in a thread.
    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param reactor: the reactor.
    :param tell: called with ``None`` when a query has completed, and with the error when one failed for lack of a
        connection.
    :param on_late: called when the database did not answer in time.
    :param note: called with each error of the database on a connection.
    """

    log = Logger()

    def __init__(
        self,
        parameters: Callable[[], dict[str, Any]],
        statement_timeout_s: float,
        reactor: Any,
        tell: Callable[[BaseException | None], object],
        on_late: Callable[[], object],
        note: Callable[[BaseException], object] = lambda _: None,
    ) -> None:
        self._parameters = parameters
        self._statement_timeout_s = statement_timeout_s
        self._reactor = reactor
        self._tell = tell
        self._on_late = on_late
        self._note = note
        self._conn: PlanningConnection | None = None
        self._cursor: Any = None
        self._socket: ConnectionSocket
        self._pending_input = select.poll()
        #: The callback of the running query.
        self._done: Callable[[Any], object] | None = None
        #: The callback for the rows of the statement that was sent.
        self._asks: Callable[[list[Any]], None] | None = None
        self._timer: Any = None
        self._deadline = 0.0
        self._until_idle: Waiters[None] = Waiters()
        self._given_up: set[_GivenUp] = set()
        #: Why all queries are abandoned; empty: they are not.
        self._cancelled = ""

    def query(self, query: Query, done: Callable[[list[Any] | Failure], object]) -> None:
        """Run one query. It uses callbacks: coroutines and Deferreds take a large part of a short statement's time.

        :param done: called with the rows, or with a failure: :class:`DatabaseUnavailable` when there is no connection
            or it broke, in which case the query may have been executed; :class:`StatementRefused` when the database
            refused the data. The callback may start the next query at once.
        """
        assert self._done is None, "one thing after the other"
        self._done = done
        if self._conn is not None and self._pending_input.poll(0):
            self._drop()  # as _ready() does, which the reactor has not called yet
        self._send(query)

    def run(self, work: Callable[..., Steps[T]], *args: Any) -> Deferred[T]:
        """Run the queries of ``work(*args)`` one after the other.

        :returns: fires with the return value of ``work``, or fails as :meth:`query` does.
        """
        steps: Steps[T] = work(*args)
        outcome: Deferred[T] = Deferred()

        def go_on(rows: Any) -> None:
            if isinstance(rows, Failure):
                outcome.errback(rows)
                return
            try:
                query = steps.send(rows)
            except StopIteration as end:
                outcome.callback(end.value)
            except Exception:
                outcome.errback()
            else:
                self.query(query, go_on)

        go_on(None)  # a generator's first send() must be None
        return outcome

    def stop(self) -> Deferred[None]:
        """Finish the running query, and close the connection.

        :returns: fires when it is closed.
        """
        return self._idle().addCallback(lambda _: self._close())

    def _close(self) -> None:
        self._drop()
        for each in list(self._given_up):
            each.end()

    def cancel(self, why: str) -> Deferred[None]:
        """Abandon the running query, whose outcome is then unknown.

        :returns: fires when no query runs.
        """
        self._cancelled = why
        self._lost(why)
        if self._done is not None:
            # The query waits for a connection, so no part of it was sent.
            self._end(Failure(DatabaseUnavailable(why)))
        return self._idle()

    def _idle(self) -> Deferred[None]:
        return succeed(None) if self._done is None else self._until_idle.wait()

    @property
    def given_up(self) -> list[PlanningConnection]:
        """The connections whose statement was abandoned and has not ended."""
        return [each.connection for each in self._given_up]

    # --- one query ---------------------------------------------------------------------------------------------------

    def _send(self, query: Query) -> None:
        conn, statement, done = self._conn, query.statement, self._done
        try:
            if self._cancelled:
                self._end(Failure(DatabaseUnavailable(self._cancelled)))
            elif conn is None and len(self._given_up) >= MOST_GIVEN_UP:
                why = f"{MOST_GIVEN_UP} sessions have not ended whose statements got no answer"
                self._end(Failure(DatabaseUnavailable(why)))
            elif conn is None:
                # If the query was cancelled meanwhile, its end is already reported.
                self._connect().addCallbacks(
                    lambda _: self._send(query), lambda failure: self._end(failure) if self._done is done else None
                )
            elif not isinstance(statement, Prepared):
                self._execute(statement, query.params, self._end)
            elif statement in conn.plans:
                self._execute(statement.call, query.params, self._end)
            else:
                self._execute(statement.prepare, (), lambda _: self._planned(conn, statement, query))
        except Exception:
            if self._done is not done:
                raise  # the query has ended
            # An unexpected error must still end the query, so that no caller waits for ever.
            failure, self._asks = Failure(), None
            self._drop()
            self._end(failure)

    def _planned(self, conn: PlanningConnection, statement: Prepared, query: Query) -> None:
        conn.plans.add(statement)
        self._send(query)

    def _end(self, result: list[Any] | Failure) -> None:
        """End the query, which is complete or abandoned."""
        assert self._done is not None
        done, self._done = self._done, None
        if not isinstance(result, Failure):
            self._tell(None)
        elif result.check(DatabaseUnavailable) and self._conn is None and not self._cancelled:
            self._tell(result.value)
        try:
            done(result)
        except Exception:
            self.log.failure("internal error in the callback of a database query")
        if self._done is None and self._until_idle:
            self._until_idle.fire(None)

    def _connect(self) -> Deferred[None]:
        # The lookup of a host name blocks, so connect off the reactor thread.
        opening = own_threads.run(self._reactor, open_async, self._parameters, CONNECT_S, self._statement_timeout_s)
        return opening.addCallback(self._connected).addErrback(_told)

    def _connected(self, conn: PlanningConnection) -> None:
        if self._cancelled:
            conn.close()
            raise DatabaseUnavailable(self._cancelled)
        try:
            self._cursor = conn.cursor(cursor_factory=StoreCursor)
            self._socket = ConnectionSocket(conn, self._reactor, self._ready, self._lost)
        except BaseException:
            conn.close()
            raise
        self._conn, self._pending_input = conn, driver.pending_input(self._socket.fileno())

    def _execute(self, statement: str, params: tuple[Any, ...], asks: Callable[[list[Any]], None]) -> None:
        self._asks = asks
        try:
            self._cursor.execute(statement, params or None)
        except Exception:
            # Other exceptions are possible as well, such as for parameters that cannot be written.
            self._failed()
            return
        self._deadline = self._reactor.seconds() + self._statement_timeout_s + BEYOND_S
        if self._timer is None:
            self._watch()
        # The part that the socket did not accept at once is written when it can be.
        self._advance()

    def _advance(self) -> None:
        """Continue the exchange as far as possible now."""
        if self._conn is None:
            # The reactor had two events for one descriptor, and the first one ended the connection.
            return
        try:
            state = self._conn.poll()
        except psycopg2.Error:
            self._failed()
            return
        self._socket.want_write(state == POLL_WRITE)
        asks = self._asks
        if state != POLL_OK or asks is None:
            return
        try:
            rows = self._cursor.fetchall() if self._cursor.description else []
        except Exception:
            self._failed()
        else:
            self._asks = None
            asks(rows)

    def _failed(self) -> None:
        """Report the current exception of the connection to the caller; first drop a connection that broke."""
        failure, conn = Failure(), self._conn
        error = failure.value
        if isinstance(error, psycopg2.Error) and conn is not None:
            told = driver.translate_error(error, conn)
            failure = Failure(told)
            self._note(told)
            if driver.is_broken(conn) or driver.is_of_the_connection(error) or sqlstate.of(error).drops:
                self._drop()
        self._answer(failure)

    def _answer(self, failure: Failure) -> None:
        if self._asks is not None:
            self._asks = None
            self._end(failure)

    def _watch(self) -> None:
        """Check at the deadline of the answer: one timer for many statements, since most are answered long before."""
        self._timer = self._reactor.callLater(max(0.0, self._deadline - self._reactor.seconds()), self._look)

    def _look(self) -> None:
        self._timer = None
        if self._asks is not None and self._reactor.seconds() < self._deadline:
            self._watch()
        elif self._asks is not None:
            self._on_late()
            self._give_up()
            self._answer(Failure(DatabaseUnavailable("the database does not answer")))

    def _give_up(self) -> None:
        """Leave the connection alone until its statement has ended."""
        conn = self._detach()
        if conn is not None:
            _GivenUp(conn, self._socket, self._given_up)

    def _lost(self, why: str) -> None:
        self._drop()
        self._answer(Failure(DatabaseUnavailable(why)))

    def _drop(self) -> None:
        conn = self._detach()
        if conn is not None:
            self._socket.close()
            conn.close()

    def _detach(self) -> PlanningConnection | None:
        """Leave the connection, and return it."""
        cancel(self._timer)
        self._timer = None
        conn, self._conn, self._cursor = self._conn, None, None
        return conn

    # --- called by the reactor -----------------------------------------------------------------------------------

    def _ready(self) -> None:
        """Continue the exchange; on an idle connection, input can only mean that the connection ends.

        PostgreSQL sends the reason first and closes the socket later, so the reason alone ends the connection: a
        statement sent between the two would fail.
        """
        if self._done is None:
            self._drop()
        else:
            self._advance()


class _GivenUp:
    """A connection with an abandoned statement, until the statement ends.

    :param others: the set of the connections that have not ended; this one belongs to it until its end.
    """

    def __init__(self, conn: PlanningConnection, socket: ConnectionSocket, others: set[_GivenUp]) -> None:
        self.connection = conn
        self._socket = socket
        self._others = others
        others.add(self)
        conn.asked_at = time.monotonic()
        socket.want_write(False)
        socket.hand_over(self._ready, lambda _: self.end())

    def end(self) -> None:
        """Close the connection."""
        self._others.discard(self)
        self._socket.close()
        self.connection.close()

    def _ready(self) -> None:
        """Read the database's output until the statement or the connection has ended."""
        if self not in self._others:
            return
        with suppress(psycopg2.Error):
            if self.connection.poll() != POLL_OK:
                return
        self.end()


def _told(failure: Failure) -> Failure:
    """Return the failure that states why there is no connection."""
    error = failure.value
    return Failure(driver.translate_error(error)) if isinstance(error, psycopg2.Error) else failure
