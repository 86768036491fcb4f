"""The socket of a database connection, which the reactor watches or another thread shuts down."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg2
from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from s2s.store.driver import Connection


def shut_down(conn: Connection) -> None:
    """Shut the socket of a connection down, so that a thread that waits for an answer on it fails.

    Closing the connection itself would wait for that thread.
    """
    # The descriptor may be closed, also by foreign code.
    with suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(conn.fileno())) as handle:
        handle.shutdown(socket.SHUT_RDWR)


@contextmanager
def shut_down_after(conn: Connection, seconds: float) -> Iterator[None]:
    """Shut a connection down if the body takes longer than this.

    No timeout of the database and no keepalive ends the wait for an answer that a proxy on the way has dropped.
    """
    timer = threading.Timer(seconds, shut_down, (conn,))
    timer.daemon = True
    with suppress(RuntimeError):  # the operating system refuses the thread: wait without a bound
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@implementer(IReadWriteDescriptor)
class ConnectionSocket:
    """A copy of a connection's descriptor, from its registration with the reactor to :meth:`close`.

    It is a copy because libpq closes its own descriptor when the connection breaks, while the reactor uses it.

    :param ready: called when the socket can be read, or written if that was wanted. It may be called once more after
        :meth:`close`, since the reactor may have had two events.
    :param lost: called with the reason if the reactor finds the descriptor closed.
    :raises OSError: the connection has no descriptor.
    """

    def __init__(
        self, conn: Connection, reactor: Any, ready: Callable[[], object], lost: Callable[[str], object]
    ) -> None:
        self._reactor = reactor
        self._lost = lost
        self._is_writing = False
        self._fileno = os.dup(conn.fileno())
        self.hand_over(ready, lost)
        try:
            reactor.addReader(self)
        except BaseException:
            self.close()
            raise

    def hand_over(self, ready: Callable[[], object], lost: Callable[[str], object]) -> None:
        """Call other functions from now on."""
        # Attributes in place of methods: the reactor calls them for each statement.
        self.doRead = self.doWrite = ready
        self._lost = lost

    def want_write(self, is_wanted: bool) -> None:
        """Say whether the socket is to be written when that is possible."""
        if self._is_writing != is_wanted:
            self._is_writing = is_wanted
            (self._reactor.addWriter if is_wanted else self._reactor.removeWriter)(self)

    def close(self) -> None:
        """Unregister from the reactor, and close the copy."""
        if self._fileno >= 0:
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            os.close(self._fileno)
            self._fileno = -1

    def fileno(self) -> int:
        """Return the copy of the descriptor; -1: it is closed."""
        return self._fileno

    def connectionLost(self, reason: Failure) -> None:
        """The reactor found the descriptor closed."""
        self._lost(reason.getErrorMessage())

    def logPrefix(self) -> str:
        """Return the name of this object in the reactor's own messages."""
        return "ConnectionSocket"
