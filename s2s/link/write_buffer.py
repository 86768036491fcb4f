"""What waits to be written on one link (docs/protocol.rst, "Windows")."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from twisted.internet import interfaces
from twisted.internet.abstract import FileDescriptor
from zope.interface import implementer

from s2s.protocol.limits import Counters

#: Of a turn of the reactor the first so many bytes are sent at once: the peer works on them while we make the others.
FLUSH_BYTES: Final = 8192
#: Then twice as many, and so on up to this: it is not to be woken more often than it needs.
MOST_FLUSH_BYTES: Final = 65536


@implementer(interfaces.IPushProducer)
class WriteBuffer:
    """Our side of the write buffer: the transport keeps little, and what it cannot take waits here, counted.

    Uncounted are what one turn of the reactor holds back and what the transport takes on top of it, three times
    :data:`MOST_FLUSH_BYTES` and two frames at most. Nobody else may write to the transport, and it is closed after
    :meth:`finish`.

    It is the transport's producer, and not the link itself: a link pauses for reasons of its own.

    :param counters: whose ``waiting_bytes`` counts what waits on all links.
    """

    def __init__(self, transport: Any, counters: Counters) -> None:
        self._transport = transport
        self._counters = counters
        self._waiting: deque[bytes] = deque()
        self._stalled = False
        # Only a descriptor of the reactor's own: TLS closes what is below it without a word to us, and then the reactor
        # would not be told that the last of it is written.
        self._descriptor: Any = transport if isinstance(transport, FileDescriptor) else None
        #: Written in this turn of the reactor, and sent together: fewer than :data:`MOST_FLUSH_BYTES` and a frame.
        self._turn: list[bytes] = []
        self._turn_bytes = 0
        #: As many bytes as are sent next before the turn ends.
        self._enough = FLUSH_BYTES
        self._is_end_awaited = False
        #: The transport was given something, and not made to send it yet.
        self._has_given = False
        self.waiting_bytes = 0
        transport.registerProducer(self, True)

    def write(self, data: bytes, is_urgent: bool = False) -> None:
        """Write in this turn of the reactor, or when the transport takes more.

        :param is_urgent: do not wait for the end of the turn.
        """
        if self._stalled:
            self._waiting.append(data)
            self._count(len(data))
        elif self._descriptor is None:
            self._transport.write(data)
        else:
            self._turn.append(data)
            self._turn_bytes += len(data)
            if is_urgent:
                self.flush()
                return
            if not self._is_end_awaited:
                self._is_end_awaited = True
                self._descriptor.reactor.callLater(0, self._end_turn)
            if self._turn_bytes >= self._enough:
                self._enough = min(2 * self._enough, MOST_FLUSH_BYTES)
                self.flush()

    def _end_turn(self) -> None:
        self._is_end_awaited = False
        self._enough = FLUSH_BYTES
        self.flush()

    def flush(self) -> None:
        """Send what was written in this turn of the reactor, and do not wait for its end."""
        if not self._turn:
            return
        data = b"".join(self._turn)
        self._turn, self._turn_bytes = [], 0
        descriptor = self._descriptor
        if not self._has_given and not descriptor.dataBuffer and not descriptor.disconnecting:
            # Nothing is in the transport: past it, which would have the reactor watch the socket for a moment.
            sent = descriptor.writeSomeData(data)
            if sent == len(data):
                return
            # A failure shows itself again to the reactor, which ends the connection.
            data = data[sent:] if isinstance(sent, int) else data
        self._give(data)
        if not descriptor.disconnecting:
            self._has_given = False
            descriptor.doWrite()

    def _give(self, data: bytes) -> None:
        self._has_given = True
        self._transport.write(data)

    def pauseProducing(self) -> None:
        """The transport has enough."""
        self._stalled = True

    def resumeProducing(self) -> None:
        """The transport takes more."""
        self._stalled = False
        while self._waiting and not self._stalled:
            data = self._waiting.popleft()
            self._count(-len(data))
            self._give(data)

    def _count(self, size: int) -> None:
        self.waiting_bytes += size
        self._counters.waiting_bytes += size

    def stopProducing(self) -> None:
        """The transport is gone."""
        self._stalled = True
        self._turn.clear()
        self._waiting.clear()
        self._count(-self.waiting_bytes)

    def finish(self) -> None:
        """Hand all that is left to the transport, which would not close while it has a producer."""
        self._transport.unregisterProducer()
        self._transport.writeSequence([*self._turn, *self._waiting])
        self.stopProducing()
