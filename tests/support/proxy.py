"""A TCP proxy between an engine and a server, which can delay, throttle, garble, stall, cut, record and inject."""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

#: Seconds between two portions of a throttled direction.
_TICK_S: Final = 0.02
#: Buffered bytes of one direction above which the proxy pauses reading from its sender.
_ON_THE_WAY: Final = 64 << 10


@dataclass
class Way:
    """One direction of a proxy, over all of its connections.

    :ivar bytes_per_second: the throttle; ``None``: no throttle.
    :ivar forwarded: number of bytes forwarded.
    :ivar garble_at: the count of forwarded bytes at which a byte is garbled.
    :ivar delay_s: seconds by which everything is delayed.
    :ivar recorded: the bodies of the last frames that were forwarded.
    """

    bytes_per_second: float | None = None
    forwarded: int = 0
    garble_at: int | None = None
    delay_s: float = 0.0
    recorded: deque[bytes] = field(default_factory=lambda: deque(maxlen=500))

    def garble(self, after: int = 0) -> None:
        """Flip one bit of one byte, after ``after`` further bytes."""
        self.garble_at = self.forwarded + after

    def carry(self, data: bytes) -> bytes:
        """Count the forwarded bytes, and garble the byte at ``garble_at``."""
        at = -1 if self.garble_at is None else self.garble_at - self.forwarded
        self.forwarded += len(data)
        if not 0 <= at < len(data):
            return data
        self.garble_at = None
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class _Frames:
    """Finds the frames in the forwarded bytes."""

    def __init__(self, found: deque[bytes]) -> None:
        self._found = found
        self._part = bytearray()

    @property
    def is_between(self) -> bool:
        """Whether no frame is incomplete."""
        return not self._part

    def feed(self, data: bytes) -> None:
        """Take forwarded bytes."""
        self._part += data
        while len(self._part) >= 4 and len(self._part) >= (end := 4 + struct.unpack_from("!I", self._part)[0]):
            self._found.append(bytes(self._part[4:end]))
            del self._part[:end]


class _End(Protocol):
    """One of the two ends of a connection: the bytes that it receives leave at the other end."""

    transport: Any
    other: _End

    def __init__(self, proxy: Proxy, way: Way) -> None:
        self._proxy = proxy
        self.way = way
        self._frames = _Frames(way.recorded)
        self._waiting = bytearray()
        self._is_over = False
        self._timer: Any = None
        #: This end reads everything and forwards nothing any more, not even the close of its connection.
        self.is_hole = False

    def connectionMade(self) -> None:
        """Register this end, and forward the bytes that wait for it."""
        self._proxy.ends.add(self)
        self.other.forward()

    def dataReceived(self, data: bytes) -> None:
        """Take received bytes, after the delay of this direction."""
        if self.way.delay_s:
            reactor.callLater(self.way.delay_s, self._take, data)
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._waiting += data
        self.forward()

    def inject(self, frame: bytes) -> bool:
        """Forward a frame that the sender did not send, unless another frame is incomplete or waits.

        :returns: whether the frame was forwarded.
        """
        if not self._frames.is_between or self._waiting or self.other.transport is None:
            return False
        self.other.transport.write(struct.pack("!I", len(frame)) + frame)
        return True

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Close the other end too, after it has sent all earlier bytes."""
        self._proxy.ends.discard(self)
        self._is_over = True
        # The bytes that wait at the other end can no longer be delivered to this connection.
        self.other.drop()
        self.forward()

    def forward(self) -> None:
        """Forward the waiting bytes, within the throttle."""
        if (
            self._proxy.is_stalled
            or self.is_hole
            or self._timer is not None
            or None in (self.transport, self.other.transport)
        ):
            return
        rate = self.way.bytes_per_second
        some = bytes(self._waiting if rate is None else self._waiting[: max(1, int(rate * _TICK_S))])
        del self._waiting[: len(some)]
        if some:
            self._frames.feed(some)
            self.other.transport.write(self.way.carry(some))
        if some and rate is not None:
            self._timer = reactor.callLater(len(some) / rate, self._go_on)
        elif self._is_over:
            self.other.transport.loseConnection()
        if not self._is_over:
            is_full = len(self._waiting) > _ON_THE_WAY
            (self.transport.pauseProducing if is_full else self.transport.resumeProducing)()

    def _go_on(self) -> None:
        self._timer = None
        self.forward()

    def drop(self) -> None:
        """Discard the waiting bytes."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cut(self) -> None:
        """Abort this connection, and discard the waiting bytes."""
        self.drop()
        if self.transport is not None:
            self.transport.abortConnection()


class Proxy:
    """Accepts the connections of the engine, and forwards each to the server.

    :param to_port: the server's port.
    :param server: the server's endpoint, instead of that port.
    :ivar port: the port on which the proxy listens.
    :ivar up: the direction from the engine to the server.
    :ivar down: the direction from the server to the engine.
    :ivar connections: number of connections accepted so far.
    :ivar ends: the ends of the open connections.
    """

    port: int

    def __init__(self, to_port: int, server: Any = None) -> None:
        self.up, self.down = Way(), Way()
        self.connections = 0
        self.is_stalled = False
        self.ends: set[_End] = set()
        self._server = server or TCP4ClientEndpoint(reactor, "127.0.0.1", to_port)
        self._listening: Any = None

    async def start(self) -> None:
        """Listen."""
        factory = Factory.forProtocol(self._made)
        self._listening = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(factory)
        self.port = self._listening.getHost().port

    async def stop(self) -> None:
        """Stop listening, and abort every connection."""
        self.cut()
        await self._listening.stopListening()

    def _made(self) -> _End:
        self.connections += 1
        from_engine, from_server = _End(self, self.up), _End(self, self.down)
        from_engine.other, from_server.other = from_server, from_engine
        connecting: Deferred[Any] = connectProtocol(self._server, from_server)
        connecting.addErrback(lambda _: from_engine.cut())
        return from_engine

    def stall(self) -> None:
        """Read everything, forward nothing and close nothing, so that each end sees a silent peer."""
        self.is_stalled = True
        for end in self.ends:
            end.transport.resumeProducing()

    def hole(self) -> None:
        """Forward nothing more on the open connections; new connections work."""
        for end in self.ends:
            end.is_hole = True
            end.transport.resumeProducing()

    def go_on(self) -> None:
        """End a stall: forward the bytes that arrived meanwhile, and all later ones."""
        self.is_stalled = False
        for end in list(self.ends):
            end.forward()
            end.other.forward()

    def inject(self, frame: bytes, way: Way) -> bool:
        """Send a frame in one direction over an open link, unless another frame is incomplete or waits.

        :returns: whether the frame was sent.
        """
        end = next((end for end in self.ends if end.way is way), None)
        return end is not None and end.inject(frame)

    def cut(self) -> None:
        """Abort every connection."""
        for end in list(self.ends):
            end.cut()
            end.other.cut()
