"""What waits to be written on one link (docs/protocol.rst, "Windows")."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from twisted.internet import interfaces
from twisted.internet.abstract import FileDescriptor
from zope.interface import implementer

#: Of a turn of the reactor so many frames are sent at once: the peer works on them while we make the others.
FLUSH_FRAMES: Final = 16


@implementer(interfaces.IPushProducer)
class Writer:
    """Our side of the write buffer: the transport keeps little, and what it cannot take waits here, counted.

    It is the transport's producer, and not the link itself: a link pauses for reasons of its own.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._waiting: deque[bytes] = deque()
        self._stalled = False
        #: Writes that the transport was given since it was made to send: it may have sent them by itself.
        self._unsent = 0
        # Only a descriptor of the reactor's own: TLS closes what is below it without a word to us, and then the reactor
        # would not be told that the last of it is written.
        self._descriptor: Any = transport if isinstance(transport, FileDescriptor) else None
        self.waiting_bytes = 0
        transport.registerProducer(self, True)

    def write(self, data: bytes, is_urgent: bool = False) -> None:
        """Write now, or when the transport takes more.

        :param is_urgent: do not wait for the end of the reactor's turn.
        """
        if self._stalled:
            self._waiting.append(data)
            self.waiting_bytes += len(data)
            return
        can_send = self._descriptor is not None and not self._descriptor.disconnecting
        if is_urgent and can_send and not self._unsent and not self._descriptor.dataBuffer:
            # Nothing is in the transport: past it, which would have the reactor watch the socket for a moment.
            sent = self._descriptor.writeSomeData(data)
            if sent == len(data):
                return
            # A failure shows itself again to the reactor, which ends the connection.
            data = data[sent:] if isinstance(sent, int) else data
        self._give(data)
        if can_send and (is_urgent or self._unsent >= FLUSH_FRAMES):
            self._unsent = 0
            self._descriptor.doWrite()

    def _give(self, data: bytes) -> None:
        self._unsent += 1
        self._transport.write(data)

    def pauseProducing(self) -> None:
        """The transport has enough."""
        self._stalled = True

    def resumeProducing(self) -> None:
        """The transport takes more."""
        self._stalled = False
        while self._waiting and not self._stalled:
            data = self._waiting.popleft()
            self.waiting_bytes -= len(data)
            self._give(data)

    def stopProducing(self) -> None:
        """The transport is gone."""
        self._stalled = True
        self._waiting.clear()
        self.waiting_bytes = 0

    def finish(self) -> None:
        """Hand all that is left to the transport, which would not close while it has a producer."""
        self._transport.unregisterProducer()
        self._transport.writeSequence(list(self._waiting))
        self.stopProducing()
