"""A network that misbehaves when it is told to: a TCP proxy between an engine and a server."""

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

#: A throttled direction forwards a little every so many seconds.
_TICK_S: Final = 0.02
#: Bytes on the way in one direction until its sender is no longer read.
_ON_THE_WAY: Final = 64 << 10


@dataclass
class Way:
    """One direction of a proxy, over all of its connections.

    :ivar bytes_per_second: the throttle; ``None`` is none.
    :ivar forwarded: how many bytes were.
    :ivar garble_at: the count of forwarded bytes at which one is garbled.
    :ivar delay_s: how much later everything comes.
    :ivar recorded: the bodies of the last frames that were forwarded.
    """

    bytes_per_second: float | None = None
    forwarded: int = 0
    garble_at: int | None = None
    delay_s: float = 0.0
    recorded: deque[bytes] = field(default_factory=lambda: deque(maxlen=500))

    def garble(self, after: int = 0) -> None:
        """Flip one bit of the byte that comes after so many more."""
        self.garble_at = self.forwarded + after

    def carry(self, data: bytes) -> bytes:
        """Count what is forwarded, and garble it if its turn has come."""
        at = -1 if self.garble_at is None else self.garble_at - self.forwarded
        self.forwarded += len(data)
        if not 0 <= at < len(data):
            return data
        self.garble_at = None
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


class _Frames:
    """Finds the frames in what is forwarded."""

    def __init__(self, found: deque[bytes]) -> None:
        self._found = found
        self._part = bytearray()

    @property
    def is_between(self) -> bool:
        """Whether the last frame is whole."""
        return not self._part

    def feed(self, data: bytes) -> None:
        """Take what is forwarded."""
        self._part += data
        while len(self._part) >= 4 and len(self._part) >= (end := 4 + struct.unpack_from("!I", self._part)[0]):
            self._found.append(bytes(self._part[4:end]))
            del self._part[:end]


class _End(Protocol):
    """One of the two ends of a connection: what comes here leaves at the other end."""

    transport: Any
    other: _End

    def __init__(self, proxy: Proxy, way: Way) -> None:
        self._proxy = proxy
        self.way = way
        self._frames = _Frames(way.recorded)
        self._waiting = bytearray()
        self._is_over = False
        self._timer: Any = None
        #: It takes everything and forwards nothing any more, not even its end.
        self.is_hole = False

    def connectionMade(self) -> None:
        """Take part."""
        self._proxy.ends.add(self)
        self.other.forward()

    def dataReceived(self, data: bytes) -> None:
        """Take what came."""
        if self.way.delay_s:
            reactor.callLater(self.way.delay_s, self._take, data)
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._waiting += data
        self.forward()

    def inject(self, frame: bytes) -> bool:
        """Forward a frame that did not come, unless another is under way."""
        if not self._frames.is_between or self._waiting or self.other.transport is None:
            return False
        self.other.transport.write(struct.pack("!I", len(frame)) + frame)
        return True

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Let the other end go too, after all that came before."""
        self._proxy.ends.discard(self)
        self._is_over = True
        # Nothing reaches us any more.
        self.other.drop()
        self.forward()

    def forward(self) -> None:
        """Forward what waits, as fast as it may go."""
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
        """Forget what waits."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cut(self) -> None:
        """End here, at once, and forward no more."""
        self.drop()
        if self.transport is not None:
            self.transport.abortConnection()


class Proxy:
    """Listens where the engine connects, and connects to where the server listens.

    :param to_port: the server's.
    :param server: an endpoint in place of that port.
    :ivar port: the proxy's own.
    :ivar up: from the engine to the server.
    :ivar down: from the server to the engine.
    :ivar connections: how many were ever made.
    :ivar ends: the ends of those that there are.
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
        """Listen no more, and cut what there is."""
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
        """Take everything, forward nothing and close nothing: neither end can tell it from a peer that is silent."""
        self.is_stalled = True
        for end in self.ends:
            end.transport.resumeProducing()

    def hole(self) -> None:
        """Forward nothing more on the connections that there are; new ones work."""
        for end in self.ends:
            end.is_hole = True
            end.transport.resumeProducing()

    def go_on(self) -> None:
        """Forward what came meanwhile, and everything again."""
        self.is_stalled = False
        for end in list(self.ends):
            end.forward()
            end.other.forward()

    def inject(self, frame: bytes, way: Way) -> bool:
        """Send a frame over a link that there is, where no other is under way."""
        end = next((end for end in self.ends if end.way is way), None)
        return end is not None and end.inject(frame)

    def cut(self) -> None:
        """Abort every connection."""
        for end in list(self.ends):
            end.cut()
            end.other.cut()
