"""Short statements on a connection that the reactor drives itself, one after the other.

A thread of the pool costs two changes between threads, which is more than a short statement takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE
from twisted.internet import threads
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from s2s.clock import cancel
from s2s.errors import DatabaseUnavailable
from s2s.store import driver
from s2s.store.driver import Connection, Query, Steps

T = TypeVar("T")

#: Seconds that connecting may take; and that a statement may take beyond those that the database gives it.
CONNECT_S: Final = 5.0
BEYOND_S: Final = 2.0


@implementer(IReadWriteDescriptor)
class Line:
    """One connection, made when it is first needed and again when it broke. Each statement commits by itself.

    :param parameters: of the connection.
    :param statement_timeout_s: seconds after which the database cancels a statement.
    :param reactor: the reactor.
    :param on_late: called when the database did not answer in time.
    """

    def __init__(
        self, parameters: dict[str, Any], statement_timeout_s: float, reactor: Any, on_late: Callable[[], object]
    ) -> None:
        self._parameters = parameters
        self._statement_timeout_s = statement_timeout_s
        self._reactor = reactor
        self._on_late = on_late
        self._conn: Connection | None = None
        self._cursor: Any = None
        self._fileno = -1
        self._is_writing = False
        self._answer: Deferred[list[Any]] | None = None
        self._timer: Any = None
        self._deadline = 0.0
        self._done: Deferred[None] = succeed(None)
        #: Why everything is given up, once it is.
        self._cancelled = ""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, and nothing is known to be wrong with it."""
        return self._conn is not None

    def run(self, work: Callable[..., Steps[T]], *args: Any) -> Deferred[T]:
        """Do one query of ``work(*args)`` after the other.

        :returns: fires with what the work returns. It fails with :class:`DatabaseUnavailable` when there is no
            connection or it broke, where what had been asked may have been done; and with :class:`StatementRefused`
            when the database refused the data.
        """
        assert self._done.called, "one thing after the other"
        self._done = Deferred()
        return Deferred.fromCoroutine(self._run(work(*args))).addBoth(self._leave)

    def stop(self) -> Deferred[None]:
        """Finish what is under way, and close the connection.

        :returns: fires when it is closed.
        """
        return self._idle().addCallback(lambda _: self._drop())

    def cancel(self, why: str) -> Deferred[None]:
        """Give up what is under way: whether it was done nobody knows.

        :returns: fires when nothing is under way.
        """
        self._cancelled = why
        self._lost(why)
        return self._idle()

    def _idle(self) -> Deferred[None]:
        waiter: Deferred[None] = Deferred()
        # Through one of its own: whoever is told may call us.
        self._done.addCallback(lambda _: waiter.callback(None))
        return waiter

    def _leave(self, outcome: T) -> T:
        self._done.callback(None)
        return outcome

    async def _run(self, steps: Steps[T]) -> T:
        rows: Any = None  # the first send is None, as it must be
        while True:
            try:
                query = steps.send(rows)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                rows = await self._ask(query)
            except psycopg2.Error as error:
                raise driver.told(error, self._conn) from None

    async def _ask(self, query: Query) -> list[Any]:
        if self._cancelled:
            raise DatabaseUnavailable(self._cancelled)
        if self._conn is not None and driver.has_word(self._conn):
            self._drop()
        if self._conn is None:
            await self._connect()
        assert self._conn is not None
        rows: list[Any] = []
        for text, params in query.texts(self._conn):
            rows = await self._execute(text, params)
        return rows

    async def _connect(self) -> None:
        # The look-up of a host name blocks: off the reactor's thread.
        settings = driver.settings(self._statement_timeout_s)
        conn: Connection = await threads.deferToThreadPool(
            self._reactor, self._reactor.getThreadPool(), driver.open_async, self._parameters, settings, CONNECT_S
        )
        if self._cancelled:
            conn.close()
            raise DatabaseUnavailable(self._cancelled)
        # libpq closes its descriptor when it finds the connection broken, under the reactor's hands: that gets another.
        self._conn, self._fileno = conn, os.dup(conn.fileno())
        self._reactor.addReader(self)

    def _execute(self, statement: str, params: tuple[Any, ...]) -> Deferred[list[Any]]:
        assert self._conn is not None
        answer: Deferred[list[Any]] = Deferred()
        self._answer = answer
        self._deadline = self._reactor.seconds() + self._statement_timeout_s + BEYOND_S
        if self._timer is None:
            self._watch()
        try:
            self._cursor = self._conn.cursor()
            self._cursor.execute(statement, params or None)
        except Exception:
            # Also what is no error of the database's: parameters that cannot be written.
            self._settle(Failure())
        else:
            # What the socket did not take at once is written when it can.
            self._advance()
        return answer

    def _advance(self) -> None:
        """Go on with the exchange, as far as it goes now."""
        if self._conn is None:
            # The reactor had two events of one descriptor, and the first of them was its end.
            return
        try:
            state = self._conn.poll()
        except psycopg2.Error:
            self._settle(Failure())
            return
        if self._is_writing != (state == POLL_WRITE):
            self._is_writing = not self._is_writing
            (self._reactor.addWriter if self._is_writing else self._reactor.removeWriter)(self)
        if state != POLL_OK or self._answer is None:
            return
        try:
            rows = self._cursor.fetchall() if self._cursor.description else []
        except Exception:
            self._settle(Failure())
        else:
            self._settle(rows)

    def _settle(self, outcome: list[Any] | Failure) -> None:
        """Hand an outcome to whoever waits, if anybody does; a connection that broke goes first."""
        error = outcome.value if isinstance(outcome, Failure) else None
        if isinstance(error, psycopg2.Error) and self._has_broken(error):
            outcome = Failure(driver.told(error))
            self._drop()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.callback(outcome)

    def _has_broken(self, error: psycopg2.Error) -> bool:
        return self._conn is not None and (driver.is_broken(self._conn) or driver.is_of_the_connection(error))

    def _watch(self) -> None:
        """Look when the answer is due: one timer for many statements, since most are answered long before."""
        self._timer = self._reactor.callLater(self._deadline - self._reactor.seconds(), self._look)

    def _look(self) -> None:
        self._timer = None
        if self._answer is not None and self._reactor.seconds() < self._deadline:
            self._watch()
        elif self._answer is not None:
            self._on_late()
            self._lost("the database does not answer")

    def _lost(self, why: str) -> None:
        self._drop()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.errback(DatabaseUnavailable(why))

    def _drop(self) -> None:
        cancel(self._timer)
        self._timer = None
        if self._conn is not None:
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            os.close(self._fileno)
            self._conn.close()
            self._conn = self._cursor = None
            self._fileno = -1
            self._is_writing = False

    # --- the reactor's -------------------------------------------------------------------------------------------

    def doRead(self) -> None:
        """Take in what the database says; unasked it has only its end to tell."""
        self._advance()

    def doWrite(self) -> None:
        """Write what is left of a statement."""
        self._advance()

    def fileno(self) -> int:
        """The reactor's own descriptor of the connection's socket."""
        return self._fileno

    def connectionLost(self, reason: Failure) -> None:
        """The reactor found the descriptor gone."""
        self._lost(reason.getErrorMessage())

    def logPrefix(self) -> str:
        """Name us in the reactor's own messages."""
        return "Line"
