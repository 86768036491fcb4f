"""The socket of a database connection that the reactor watches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from s2s.store.driver import Connection


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
