"""The buffer of bytes that wait to be written on one link (docs/protocol.rst, "Windows")."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from twisted.internet import interfaces
from twisted.internet.abstract import FileDescriptor
from zope.interface import implementer

from s2s.protocol.limits import Counters

#: Bytes after which the first flush of a reactor iteration happens, so that the peer can process them while we produce
#: more.
FLUSH_BYTES: Final = 8192
#: Upper limit of that threshold in bytes. It doubles after each flush of a reactor iteration, so that the peer does not
#: wake up too often.
MOST_FLUSH_BYTES: Final = 65536


@implementer(interfaces.IPushProducer)
class WriteBuffer:
    """The counted write buffer of a link: bytes that the transport cannot accept yet wait here.

    The bytes collected in one reactor iteration and those in the transport's own buffer are not counted. They are at
    most three times :data:`MOST_FLUSH_BYTES` and two frames. No other code may write to the transport, and the
    transport may be closed only after :meth:`finish`.

    This object is the transport's producer, and not the link, because a link is paused for other reasons.

    :param counters: its ``waiting_bytes`` counts the waiting bytes of all links.
    """

    def __init__(self, transport: Any, counters: Counters) -> None:
        self._transport = transport
        self._counters = counters
        self._waiting: deque[bytes] = deque()
        self._stalled = False
        # Only a descriptor of the reactor is used directly. TLS closes the transport below it without notice, and then
        # the reactor would not learn that the last bytes are written.
        self._descriptor: Any = transport if isinstance(transport, FileDescriptor) else None
        #: Bytes to send together that were written in this reactor iteration: fewer than :data:`MOST_FLUSH_BYTES` plus
        #: one frame.
        self._turn: list[bytes] = []
        self._turn_bytes = 0
        #: The number of bytes at which the next flush happens before the reactor iteration ends.
        self._enough = FLUSH_BYTES
        self._is_end_awaited = False
        #: The transport received bytes and was not yet made to send them.
        self._has_given = False
        self.waiting_bytes = 0
        transport.registerProducer(self, True)

    def write(self, data: bytes, is_urgent: bool = False) -> None:
        """Write in this reactor iteration, or later when the transport accepts more.

        :param is_urgent: do not wait for the end of the reactor iteration.
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
        """Send the bytes written in this reactor iteration now."""
        if not self._turn:
            return
        data = b"".join(self._turn)
        self._turn, self._turn_bytes = [], 0
        descriptor = self._descriptor
        if not self._has_given and not descriptor.dataBuffer and not descriptor.disconnecting:
            # The transport's buffer is empty, so write to the socket directly: transport.write() would make the reactor
            # watch the socket for a moment.
            sent = descriptor.writeSomeData(data)
            if sent == len(data):
                return
            # If the write failed, the reactor's own write fails again and ends the connection.
            data = data[sent:] if isinstance(sent, int) else data
        self._give(data)
        if not descriptor.disconnecting:
            self._has_given = False
            descriptor.doWrite()

    def _give(self, data: bytes) -> None:
        self._has_given = True
        self._transport.write(data)

    def pauseProducing(self) -> None:
        """Stop writing to the transport, because its buffer is full."""
        self._stalled = True

    def resumeProducing(self) -> None:
        """Write the waiting bytes until the transport's buffer is full again."""
        self._stalled = False
        while self._waiting and not self._stalled:
            data = self._waiting.popleft()
            self._count(-len(data))
            self._give(data)

    def _count(self, size: int) -> None:
        self.waiting_bytes += size
        self._counters.waiting_bytes += size

    def stopProducing(self) -> None:
        """Discard all bytes, because the transport is closed."""
        self._stalled = True
        self._turn.clear()
        self._waiting.clear()
        self._count(-self.waiting_bytes)

    def finish(self) -> None:
        """Unregister, because a transport with a producer does not close, and pass all remaining bytes to it."""
        self._transport.unregisterProducer()
        self._transport.writeSequence([*self._turn, *self._waiting])
        self.stopProducing()
