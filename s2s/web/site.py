"""HTTP's outer bounds: connections, the length of a body, and the time that a request may take to arrive."""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from s2s.clock import Clock, Timer
from s2s.errors import BadEnvelope, TooLarge, WireError
from s2s.limits import Counters
from s2s.operations.kind import encode
from s2s.web.api import SAFE
from s2s.web.problems import CONTENT_TYPE, Problem

#: The longest body, in bytes: the longest frame that may be configured.
BODY_BYTES: Final = 262_144
#: Connections at once; of more the one that has been idle longest goes.
MOST_CONNECTIONS: Final = 2500
#: Seconds from a request's first byte to its last, and of silence between two requests.
ARRIVE_S: Final = 20.0
IDLE_S: Final = 60
#: Seconds for which what is still sent is dropped, so that the refusal is read.
LINGER_S: Final = 2.0


class _Request(Request):
    """A request whose body has a bound, whether it says how long it is or not."""

    channel: _Channel
    _size = 0
    _is_refused = False

    def gotLength(self, length: int | None) -> None:
        """Judge the length before the body comes."""
        super().gotLength(min(length or 0, BODY_BYTES) if length is not None else None)
        if length is not None and length > BODY_BYTES:
            self._refuse()

    def handleContentChunk(self, data: bytes) -> None:
        """Keep what comes, within the bound."""
        self._size += len(data)
        if not self._is_refused and self._size > BODY_BYTES:
            self._refuse()
        if not self._is_refused:
            super().handleContentChunk(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Answer it, unless that was done. Twisted's own would also read a body as a form, which is none of ours."""
        if self._is_refused:
            return
        assert self.content is not None
        self.content.seek(0)
        self.method, self.uri, self.clientproto = command, path, version
        self.path = path.partition(b"?")[0]
        self.process()

    def _refuse(self) -> None:
        self._is_refused = True
        self.channel.site.counters.meet("http_body")
        self.channel.refuse(TooLarge(f"the body is longer than {BODY_BYTES} bytes", limit=BODY_BYTES))


class _Channel(http.HTTPChannel):
    """A connection, on which a request has to arrive in time."""

    site: _Site
    transport: Any
    _arriving: Timer | None = None
    _closing: Timer | None = None
    _is_answering = False

    def dataReceived(self, data: bytes) -> None:
        """Take what comes, unless the connection is being closed."""
        if self._closing is None:
            if not self._is_answering:
                self._arrives()
            super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        """Drop what stands behind what was refused."""
        if self._closing is None:
            super().lineReceived(line)

    def rawDataReceived(self, data: bytes) -> None:
        """Drop what stands behind what was refused."""
        if self._closing is None:
            super().rawDataReceived(data)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuse a line that does not end."""
        self.refuse(BadEnvelope("a line of the request is too long"))

    def allContentReceived(self) -> None:
        """The request is whole."""
        self._has_arrived()
        self._is_answering = True
        super().allContentReceived()

    def requestDone(self, request: Request) -> None:
        """The request is answered; the next one may be here in part."""
        self._is_answering = False
        self.site.idle(self)
        super().requestDone(request)
        if self.requests and not self._is_answering:
            self._arrives()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self._has_arrived()
        if self._closing is not None and self._closing.active():
            self._closing.cancel()
        self.site.gone(self)
        super().connectionLost(reason)

    def refuse(self, error: WireError) -> None:
        """Answer what cannot be taken as a request, and close."""
        if self._closing is not None:
            return
        self._has_arrived()
        self._closing = self.callLater(LINGER_S, self.loseConnection)
        said = Problem(error)
        body = encode(said.body)
        headers = {**SAFE, "Content-Type": CONTENT_TYPE, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {said.status} {said.body['title']}", *map(": ".join, headers.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode() + body)

    def _respondToBadRequestAndDisconnect(self) -> None:
        # Twisted's own answer has no body.
        self.refuse(BadEnvelope("this is no HTTP request that can be read"))

    def _arrives(self) -> None:
        if self._arriving is None:
            self.site.busy(self)
            self._arriving = self.callLater(ARRIVE_S, self._late)

    def _has_arrived(self) -> None:
        if self._arriving is not None and self._arriving.active():
            self._arriving.cancel()
        self._arriving = None

    def _late(self) -> None:
        self.site.counters.meet("http_arrive")
        self.transport.abortConnection()


class _Site(Site):
    """Connections, up to their bound."""

    protocol: Any = _Channel
    noisy = False

    def __init__(self, resource: Resource, clock: Clock, counters: Counters) -> None:
        super().__init__(resource, requestFactory=_Request, timeout=IDLE_S, reactor=clock.scheduler)
        self._clock = clock
        self.counters = counters
        self._all: set[_Channel] = set()
        #: Those that no request is arriving or under way on, the one that has been so longest first.
        self._idle: dict[_Channel, None] = {}
        self._closing: Deferred[None] | None = None

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Take a connection."""
        if len(self._all) >= MOST_CONNECTIONS:
            self.counters.meet("http_connections")
            if not self._idle:
                return None
            next(iter(self._idle)).transport.abortConnection()
        channel: _Channel = super().buildProtocol(addr)
        self._all.add(channel)
        self._idle[channel] = None
        return channel

    def busy(self, channel: _Channel) -> None:
        """A request arrives."""
        self._idle.pop(channel, None)

    def idle(self, channel: _Channel) -> None:
        """Nothing is under way."""
        if channel in self._all:
            self._idle[channel] = None

    def gone(self, channel: _Channel) -> None:
        """The connection is closed."""
        self._all.discard(channel)
        self._idle.pop(channel, None)
        if self._closing is not None and not self._all:
            closing, self._closing = self._closing, None
            closing.callback(None)

    def close(self) -> Deferred[None]:
        """Close every connection once what was said is sent, or after :data:`LINGER_S`.

        :returns: fires when none is left: the end of the process would cut them off.
        """
        if not self._all:
            return succeed(None)
        closed: Deferred[None] = Deferred()
        self._closing = closed
        cutting: Timer = self._clock.scheduler.callLater(LINGER_S, self._cut)
        for channel in list(self._all):
            channel.loseConnection()

        def done(_: None) -> None:
            if cutting.active():
                cutting.cancel()

        return closed.addCallback(done)

    def _cut(self) -> None:
        for channel in list(self._all):
            channel.transport.abortConnection()

    def startFactory(self) -> None:
        """Keep no log of accesses: what changes anything is in the audit."""

    def stopFactory(self) -> None:
        """There is nothing to close."""

    def log(self, request: http.Request) -> None:
        """Keep no log of accesses."""


def make_site(resource: Resource, clock: Clock, counters: Counters) -> _Site:
    """Make the factory of an API's connections."""
    return _Site(resource, clock, counters)
