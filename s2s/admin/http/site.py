"""The limits of HTTP connections: their number, the length of a body, and the time for a request to arrive."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import BytesIO
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.http import datetimeToString
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from s2s.admin.http.api import SAFE
from s2s.admin.http.problems import CONTENT_TYPE, Problem
from s2s.admin.operations.operation import MOST_BODY_BYTES, encode
from s2s.errors import BadEnvelope, TooLarge, WireError
from s2s.protocol.limits import Counters
from s2s.runtime.budget import Budget, peer_network
from s2s.runtime.clock import Clock, Timer, cancel
from s2s.runtime.memory import Memory

#: Maximum chunks of a body without a Content-Length. Each chunk, however short, takes about 4 us of the reactor's time.
MOST_CHUNKS: Final = 256
#: Maximum lines of a request's head, including folded and empty ones. Each takes about 10 us of the reactor's time.
MOST_LINES: Final = 200
#: Maximum bytes of the trailer after a chunked body, which nothing here reads.
_TRAILER_BYTES: Final = 1024
#: Bytes of a head that are passed to Twisted at once, because Twisted copies the unread bytes for each line.
_PIECE_BYTES: Final = 4096
#: Maximum bytes of all bodies that are arriving. Beyond it, the request that has been arriving longest is cut off.
BODIES_BYTES: Final = 64 << 20
#: Maximum bytes of all answers that clients have not read. Beyond it, the connection that has read nothing for longest
#: is cut off. A list has up to 2 MiB, and a client may request one on each of its connections.
ANSWERS_BYTES: Final = 64 << 20
#: Maximum connections at once. Beyond it, one is cut off: the one whose request has waited longest for its turn, else
#: the one that has been idle longest, else the one that has been sending a request longest.
MOST_CONNECTIONS: Final = 2500
#: Maximum seconds from a request's first byte to its last, and of silence between two requests.
ARRIVE_S: Final = 20.0
IDLE_S: Final = 60
#: Seconds that a client may take to read the end of an answer. Until then, nothing more is read from the client.
TAKE_S: Final = 60.0
#: Seconds for which further input is dropped after a refusal, so that the client can read it, and seconds that the
#: connection may then take to close.
LINGER_S: Final = 2.0

#: Requests without a valid token per second, of one network and in all, for probes, for first requests of a connection
#: and for later ones. Each request takes about 0.4 ms of the reactor's time, so all of them take 8 % of a core.
RATES: Final = {"probe": (20, 50), "first": (50, 100), "later": (20, 50)}
#: The first bytes of a TLS ClientHello.
_HELLO: Final = b"\x16\x03"
_PROBE: Final = re.compile(rb"(GET|HEAD|OPTIONS) /(healthz|readyz)[ ?]")
#: Finds the header that authenticates a request before the request is parsed, in this many first bytes of a read.
_AUTHORIZATION: Final = re.compile(rb"^authorization:[ \t]*([!-~ ]+)", re.IGNORECASE | re.MULTILINE)
_HEAD_BYTES: Final = 16_384
#: A request target in absolute form: a whole URL instead of a path (RFC 9112, 3.2.2).
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)


def _read_target(target: bytes) -> tuple[bytes | None, bytes]:
    """Return the host of a request target, or ``None`` without one, and its path with the query."""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return None, target
    return absolute[1], absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]


class _BodyRefused(Exception):
    """The body of a request was refused: no more of it is read."""


class _Request(Request):
    """A request whose body has a maximum length, with or without a declared length."""

    channel: _Channel
    _size = 0
    _most_bytes = 0
    #: Chunks that may still arrive; infinite if the length was declared.
    _chunks_left = float("inf")
    _is_refused = False

    def gotLength(self, length: int | None) -> None:
        """Check the declared length before the body arrives. Twisted's method would open a file for a long body."""
        self.content = BytesIO()
        if length == 0:
            return
        self._most_bytes = self.channel.most_body_bytes()
        if length is None:
            self._chunks_left = MOST_CHUNKS
            self.channel.bound_trailer()
        elif length > self._most_bytes:
            self._refuse_long()

    def handleContentChunk(self, data: bytes) -> None:
        """Store a piece of the body, within the limits.

        :raises _BodyRefused: a limit is exceeded; without the exception, Twisted would decode the buffered chunks.
        """
        self._size += len(data)
        self._chunks_left -= 1
        if not self._is_refused and self._size > self._most_bytes:
            self._refuse_long()
        if not self._is_refused and self._chunks_left < 0:
            self._refuse(
                TooLarge(f"the body has more than {MOST_CHUNKS} chunks: declare its length", limit=MOST_CHUNKS)
            )
        if self._is_refused:
            raise _BodyRefused
        super().handleContentChunk(data)
        self.channel.site.took(self.channel, len(data))

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Answer the request, unless it was refused. Twisted's method would also parse the body as a form."""
        if self._is_refused:
            return
        assert self.content is not None
        self.content.seek(0)
        host, path = _read_target(path)
        if host is not None:
            # The host of the target has precedence over the header.
            self.requestHeaders.setRawHeaders(b"host", [host])
        self.method, self.uri, self.clientproto = command, path, version
        self.process()

    def process(self) -> None:
        """Let the resource answer. Twisted's method would answer ``*`` itself, without any check."""
        self.setHeader(b"Date", datetimeToString())
        self.channel.site.resource.render(self)

    def _refuse_long(self) -> None:
        self._refuse(TooLarge(f"the body is longer than {self._most_bytes} bytes", limit=self._most_bytes))

    def _refuse(self, error: TooLarge) -> None:
        self._is_refused = True
        self.channel.site.counters.meet("http_body")
        self.channel.refuse(error)


class _Channel(http.HTTPChannel):
    """A connection, on which a request must arrive in time."""

    site: _Site
    transport: Any
    _networkProducer: Any
    _command: Any
    _path: Any
    _arriving: Timer | None = None
    _taking: Timer | None = None
    _closing: Timer | None = None
    _going_on: Timer | None = None
    _is_answering = False
    #: The answered request, until the input after it is processed.
    _held: Request | None = None
    #: Bytes received after the request that is being answered.
    _ahead = 0
    #: The first bytes of a request that waits for its turn.
    _early = b""
    _is_in_line = False
    #: No request has begun on this connection.
    _is_first = True
    #: Lines of the head that is arriving.
    _lines = 0

    def dataReceived(self, data: bytes) -> None:
        """Process input, unless the connection is closing. The first bytes of a request may have to wait for a turn."""
        if self._closing is not None:
            return
        if self._is_answering:
            self._read(data)
        elif self._is_in_line:
            # TLS may pass one read in several pieces.
            self._early += data
            self.site.took(self, len(data))
        elif self._arriving is not None:
            self._read(data)
        else:
            self._arrives()
            if self._is_first and data.startswith(_HELLO):
                # Without a refusal the client would wait until the request times out.
                self.refuse(BadEnvelope("the client speaks TLS, and this port does not: use http://, or --http ssl:"))
            elif self._may_begin(data):
                self._read(data)
            else:
                self._early = data
                self.site.took(self, len(data))
                self.resetTimeout()
                self._networkProducer.pauseProducing()

    def _may_begin(self, data: bytes) -> bool:
        """Return whether a request may be read now. A request without a valid token may have to wait for its turn.

        :param data: the first bytes of the request.
        """
        is_first, self._is_first = self._is_first, False
        known = _AUTHORIZATION.search(data[:_HEAD_BYTES])
        if known is not None and self.site.knows(known[1].decode("ascii").strip()):
            return True
        kind = "probe" if _PROBE.match(data) else "first" if is_first else "later"
        turns = self.site.budgets[kind]
        self._is_in_line = not turns.take(peer_network(self.transport), 1, lambda: self._is_in_line, self._begin)
        if self._is_in_line:
            self.site.counters.meet("http_strangers")
            self.site.waits(self)
        return not self._is_in_line

    def _begin(self) -> None:
        """Read the request whose turn it is."""
        self._is_in_line = False
        self.site.has_turn(self)
        if self._held is not None:
            self._next()
            return
        early, self._early = self._early, b""
        if not self._waitingForTransport:
            self._networkProducer.resumeProducing()
        self._read(early)

    def _read(self, data: bytes) -> None:
        """Pass input to Twisted, a head in pieces of :data:`_PIECE_BYTES`."""
        while data and self.line_mode and not self._is_answering:
            super().dataReceived(data[:_PIECE_BYTES])
            data = data[_PIECE_BYTES:]
        if data:
            super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        """Process a line of the head, unless there are too many. After a refusal, drop the line."""
        self._lines += 1
        if self._lines > MOST_LINES:
            self.refuse(BadEnvelope(f"the head of the request has more than {MOST_LINES} lines"))
        if self._closing is None:
            super().lineReceived(line)

    def rawDataReceived(self, data: bytes) -> None:
        """Process input of a body or after a request. Drop it after a refusal, and limit the bytes read ahead.

        Twisted's method does not limit them while the transport counts as full; TLS reports a full transport late.
        """
        if self._closing is None:
            is_behind = self._is_answering
            with suppress(_BodyRefused):
                super().rawDataReceived(data)
            self._ahead += len(data) if is_behind else 0
            if self._ahead > self._optimisticEagerReadSize:
                self._networkProducer.pauseProducing()

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuse a line that is too long."""
        self.refuse(BadEnvelope("a line of the request is too long"))

    def allContentReceived(self) -> None:
        """Note that the whole request has arrived."""
        self._has_arrived()
        self._is_answering = True
        self._lines = 0
        super().allContentReceived()

    def requestDone(self, request: Request) -> None:
        """Note that the request is answered. The next one waits while too much of the answer is unsent.

        The next one waits for the next reactor iteration in any case, so that a thousand requests in one read do not
        delay the other connections.
        """
        self.site.idle(self)
        if self._waitingForTransport:
            self.site.is_unread(self, request.sentLength)
        if self.persistent:
            self._held = request
            self._going_on = self._after(0, self._go_on)
        else:
            self._taking = self._after(TAKE_S, self._is_not_read)
            self._held = request
            self._next()

    def resumeProducing(self) -> None:
        """Note that the transport has sent the answers, and continue."""
        self.site.is_read(self)
        super().resumeProducing()
        self._go_on()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Cancel the timers and forget the connection."""
        for timer in (self._arriving, self._taking, self._closing, self._going_on):
            cancel(timer)
        self._is_in_line = False
        self.site.gone(self)
        super().connectionLost(reason)

    def refuse(self, error: WireError) -> None:
        """Answer input that cannot be accepted as a request, and close the connection."""
        if self._closing is not None:
            return
        self._has_arrived()
        self.site.idle(self)
        self.setTimeout(None)
        self._closing = self._after(LINGER_S, self._close)
        # In raw mode, buffered input is dropped at once and not line by line.
        self.setRawMode()
        said = Problem(error)
        body = encode(said.body)
        headers = {**SAFE, "Content-Type": CONTENT_TYPE, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {said.status} {said.body['title']}", *map(": ".join, headers.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode() + body)

    def most_body_bytes(self) -> int:
        """Return the maximum length of the body of the request whose head has arrived."""
        path = _read_target(self._path)[1].partition(b"?")[0]
        return self.site.body_bytes(self._command, path)

    def bound_trailer(self) -> None:
        """Limit the trailer after a chunked body; Twisted's limit is 64 KiB."""
        decoder: Any = self._transferDecoder
        decoder._maxTrailerHeadersSize = _TRAILER_BYTES

    def _respondToBadRequestAndDisconnect(self) -> None:
        # The answer of Twisted's method has no body.
        self.refuse(BadEnvelope("this is no HTTP request that can be read"))

    def headerReceived(self, line: bytes) -> bool:
        """Process a header. Twisted's method raises ``ValueError`` if a length has more digits than Python converts."""
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            self._respondToBadRequestAndDisconnect()
            return False

    def _send100Continue(self) -> None:
        # Not after a refusal.
        if self._closing is None:
            super()._send100Continue()

    def _go_on(self) -> None:
        """Continue with the input after the answered request, once the answer is sent."""
        if self._held is None or self._is_in_line:
            return
        if self._waitingForTransport:
            self._taking = self._after(TAKE_S, self._is_not_read)
            self._networkProducer.pauseProducing()
            return
        cancel(self._going_on)
        cancel(self._taking)
        behind = b"".join(self._dataBuffer)
        if behind:
            self._arrives()
        if not behind or self._may_begin(behind):
            self._next()

    def _next(self) -> None:
        answered, self._held = self._held, None
        self._is_answering = False
        self._ahead = 0
        super().requestDone(answered)

    def _arrives(self) -> None:
        if self._arriving is None:
            self.site.arrives(self)
            self._arriving = self._after(ARRIVE_S, self._is_late)

    def _has_arrived(self) -> None:
        cancel(self._arriving)
        self._arriving = None
        self.site.arrived(self)

    def _close(self) -> None:
        # Over TLS, closing waits for the peer's close alert.
        self._taking = self._after(LINGER_S, self.transport.abortConnection)
        self.loseConnection()

    def _after(self, seconds: float, action: Callable[[], None]) -> Timer:
        timer: Timer = self.site.clock.scheduler.callLater(seconds, action)
        return timer

    def _is_late(self) -> None:
        self.site.counters.meet("http_arrive")
        self.transport.abortConnection()

    def _is_not_read(self) -> None:
        self.site.counters.meet("http_take")
        self.transport.abortConnection()


class _Refused(Protocol):
    """A connection beyond the limit. It needs a protocol, because TLS in Twisted does not support ``None`` instead."""

    transport: Any

    def connectionMade(self) -> None:
        """Abort the connection at once."""
        self.transport.abortConnection()


class _Site(Site):
    """The factory of connections, which holds their number and their memory within limits."""

    protocol: Any = _Channel
    noisy = False

    def __init__(
        self,
        resource: Resource,
        clock: Clock,
        counters: Counters,
        knows: Callable[[str], bool],
        body_bytes: Callable[[bytes, bytes], int],
    ) -> None:
        super().__init__(resource, requestFactory=_Request, timeout=IDLE_S, reactor=clock.scheduler)
        self.knows = knows
        self.body_bytes = body_bytes
        self.budgets = {kind: Budget(rates, clock) for kind, rates in RATES.items()}
        self.clock = clock
        self.counters = counters
        self._all: set[_Channel] = set()
        #: The connections on which no request is arriving or under way, the longest idle first.
        self._idle: dict[_Channel, None] = {}
        #: The connections whose request waits for its turn, the longest wait first.
        self._in_line: dict[_Channel, None] = {}
        #: Bytes received of each arriving request, the oldest request first.
        self._arriving: dict[_Channel, int] = {}
        self._bodies_bytes = 0
        #: Bytes of unread answers by connection, the longest wait first.
        self._unread: dict[_Channel, int] = {}
        self._unread_bytes = 0
        self._memory = Memory()
        self._closing: Deferred[None] | None = None

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Accept a connection, and cut off another one at the limit."""
        if len(self._all) >= MOST_CONNECTIONS:
            self.counters.meet("http_connections")
            if not self._in_line and not self._idle and not self._arriving:
                return _Refused()
            self._evict(self._in_line or self._idle or self._arriving)
        channel: _Channel = super().buildProtocol(addr)
        self._all.add(channel)
        self._idle[channel] = None
        return channel

    def waits(self, channel: _Channel) -> None:
        """Note that the request of a connection waits for its turn."""
        self._in_line[channel] = None

    def has_turn(self, channel: _Channel) -> None:
        """Note that the request of a connection no longer waits for its turn."""
        self._in_line.pop(channel, None)

    def arrives(self, channel: _Channel) -> None:
        """Note that a request has begun to arrive."""
        self._idle.pop(channel, None)
        if channel in self._all:
            self._arriving[channel] = 0

    def took(self, channel: _Channel, size: int) -> None:
        """Count ``size`` more bytes of an arriving request."""
        if channel in self._arriving:
            self._arriving[channel] += size
            self._bodies_bytes += size
            while self._bodies_bytes > BODIES_BYTES:
                self.counters.meet("http_bodies")
                self._evict(self._arriving)

    def is_unread(self, channel: _Channel, size: int) -> None:
        """Count an answer of ``size`` bytes as unread."""
        if channel not in self._all:
            return
        self._unread[channel] = self._unread.pop(channel, 0) + size
        self._unread_bytes += size
        while self._unread_bytes > ANSWERS_BYTES:
            self.counters.meet("http_answers")
            self._evict(self._unread)

    def is_read(self, channel: _Channel) -> None:
        """Note that the answers on a connection are sent."""
        size = self._unread.pop(channel, 0)
        self._unread_bytes -= size
        if size:
            # A request and its channel are a reference cycle, so earlier ones may still be in memory.
            self._memory.check()

    def arrived(self, channel: _Channel) -> None:
        """Note that the request of a connection has arrived, or is refused."""
        self._idle.pop(channel, None)
        self._bodies_bytes -= self._arriving.pop(channel, 0)

    def idle(self, channel: _Channel) -> None:
        """Note that no request is under way on a connection."""
        if channel in self._all:
            self._idle[channel] = None

    def gone(self, channel: _Channel) -> None:
        """Forget a closed connection."""
        self.has_turn(channel)
        self.arrived(channel)
        self.is_read(channel)
        self._all.discard(channel)
        if self._closing is not None and not self._all:
            closing, self._closing = self._closing, None
            closing.callback(None)

    def _evict(self, channels: Iterable[_Channel]) -> None:
        """Abort the first of some connections. It is forgotten at once, because it closes only later."""
        channel = next(iter(channels))
        self.gone(channel)
        channel.transport.abortConnection()

    def close(self) -> Deferred[None]:
        """Close every connection once its answers are sent, or after :data:`LINGER_S`.

        :returns: fires when no connection is left. Wait for it, because the end of the process would cut them off.
        """
        if not self._all:
            return succeed(None)
        closed: Deferred[None] = Deferred()
        self._closing = closed
        cutting: Timer = self.clock.scheduler.callLater(LINGER_S, self._cut)
        for channel in list(self._all):
            channel.loseConnection()

        return closed.addCallback(lambda _: cancel(cutting))

    def _cut(self) -> None:
        for channel in list(self._all):
            channel.transport.abortConnection()

    def startFactory(self) -> None:
        """Open no access log: the audit records all changes."""

    def stopFactory(self) -> None:
        """Do nothing: there is no access log to close."""

    def log(self, request: http.Request) -> None:
        """Do nothing: there is no access log."""


def make_site(
    resource: Resource,
    clock: Clock,
    counters: Counters,
    knows: Callable[[str], bool] = lambda _: False,
    body_bytes: Callable[[bytes, bytes], int] = lambda _, __: MOST_BODY_BYTES,
) -> _Site:
    """Return the factory of an API's connections.

    :param knows: returns whether an Authorization header has a valid token.
    :param body_bytes: returns the maximum length of a body, by the method and the path of its request.
    """
    return _Site(resource, clock, counters, knows, body_bytes)
