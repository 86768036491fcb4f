"""HTTP's outer bounds: connections, the length of a body, and the time that a request may take to arrive."""

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

#: Chunks of a body without a Content-Length; each takes about 4 us of the reactor's time, however short it is.
MOST_CHUNKS: Final = 256
#: Lines of a request's head, folded and empty ones among them; each takes about 10 us of the reactor's time.
MOST_LINES: Final = 200
#: Bytes of the headers behind a chunked body, which nothing here reads.
_TRAILER_BYTES: Final = 1024
#: Bytes of a head that Twisted is given at once: it copies the rest of them for each line.
_PIECE_BYTES: Final = 4096
#: Bytes of all bodies that are arriving; of more the request goes that has been arriving longest.
BODIES_BYTES: Final = 64 << 20
#: Bytes of all answers that are not read; of more the connection goes that has read nothing for longest. A list has up
#: to 2 MiB, and a client may ask for it on each of its connections.
ANSWERS_BYTES: Final = 64 << 20
#: Connections at once; of more the one goes that has been idle longest, or has been sending a request longest.
MOST_CONNECTIONS: Final = 2500
#: Seconds from a request's first byte to its last, and of silence between two requests.
ARRIVE_S: Final = 20.0
IDLE_S: Final = 60
#: Seconds that a client may take to read the end of an answer; until then nothing more is read of what it sends.
TAKE_S: Final = 60.0
#: Seconds for which what is still sent is dropped, so that a refusal is read, and for the end of the connection then.
LINGER_S: Final = 2.0

#: Requests without a valid token in a second, of one address and of all: probes, first requests of a connection, and
#: later ones. Each takes about 0.4 ms of the reactor's time, so all of them take 8 % of a core.
RATES: Final = {"probe": (20, 50), "first": (50, 100), "later": (20, 50)}
#: The beginning of a client's first message in TLS.
_HELLO: Final = b"\x16\x03"
_PROBE: Final = re.compile(rb"(GET|HEAD|OPTIONS) /(healthz|readyz)[ ?]")
#: The header by which a request is known before it is parsed, and the first bytes of a read among which it is sought.
_AUTHORIZATION: Final = re.compile(rb"^authorization:[ \t]*([!-~ ]+)", re.IGNORECASE | re.MULTILINE)
_HEAD_BYTES: Final = 16_384
#: A whole URL where a path is usual (RFC 9112, 3.2.2).
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)


def _read_target(target: bytes) -> tuple[bytes | None, bytes]:
    """Return the host that a target names, and its path with the query."""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return None, target
    return absolute[1], absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]


class _BodyRefused(Exception):
    """The body of a request has been refused: nothing more of it is read."""


class _Request(Request):
    """A request whose body has a bound, whether it says how long it is or not."""

    channel: _Channel
    _size = 0
    _most_bytes = 0
    #: Chunks that may still come; infinite where the length was declared.
    _chunks_left = float("inf")
    _is_refused = False

    def gotLength(self, length: int | None) -> None:
        """Judge the length before the body comes. Twisted's own would open a file for a long one."""
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
        """Keep what comes, within the bounds.

        :raises _BodyRefused: it is beyond one: Twisted's own would go on to decode the chunks that are here.
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
        """Answer it, unless that was done. Twisted's own would also read a body as a form, which is none of ours."""
        if self._is_refused:
            return
        assert self.content is not None
        self.content.seek(0)
        host, path = _read_target(path)
        if host is not None:
            # It goes before the header.
            self.requestHeaders.setRawHeaders(b"host", [host])
        self.method, self.uri, self.clientproto = command, path, version
        self.process()

    def process(self) -> None:
        """Let the resource answer. Twisted's own would answer ``*`` itself, past every check."""
        self.setHeader(b"Date", datetimeToString())
        self.channel.site.resource.render(self)

    def _refuse_long(self) -> None:
        self._refuse(TooLarge(f"the body is longer than {self._most_bytes} bytes", limit=self._most_bytes))

    def _refuse(self, error: TooLarge) -> None:
        self._is_refused = True
        self.channel.site.counters.meet("http_body")
        self.channel.refuse(error)


class _Channel(http.HTTPChannel):
    """A connection, on which a request has to arrive in time."""

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
    #: The request that was answered, until what came behind it is taken.
    _held: Request | None = None
    #: Bytes that came behind the request that is being answered.
    _ahead = 0
    #: The first bytes of a request that waits for its turn.
    _early = b""
    _is_in_line = False
    #: No request has begun on this connection.
    _is_first = True
    #: Lines of the head that arrives.
    _lines = 0

    def dataReceived(self, data: bytes) -> None:
        """Take what comes, unless the connection is being closed; the first of a request waits for its turn."""
        if self._closing is not None:
            return
        if self._is_answering:
            self._read(data)
        elif self._is_in_line:
            # TLS may hand over several pieces of one read.
            self._early += data
            self.site.took(self, len(data))
        elif self._arriving is not None:
            self._read(data)
        else:
            self._arrives()
            if self._is_first and data.startswith(_HELLO):
                # Otherwise it waits until the request is late.
                self.refuse(BadEnvelope("the client speaks TLS, and this port does not: use http://, or --http ssl:"))
            elif self._may_begin(data):
                self._read(data)
            else:
                self._early = data
                self.site.took(self, len(data))
                self.resetTimeout()
                self._networkProducer.pauseProducing()

    def _may_begin(self, data: bytes) -> bool:
        """Whether a request may be read now; one without a valid token has a turn.

        :param data: its first bytes.
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
        """Have Twisted take what comes, a head in pieces."""
        while data and self.line_mode and not self._is_answering:
            super().dataReceived(data[:_PIECE_BYTES])
            data = data[_PIECE_BYTES:]
        if data:
            super().dataReceived(data)

    def lineReceived(self, line: bytes) -> None:
        """Take a line of the head, unless there are too many. Drop what stands behind what was refused."""
        self._lines += 1
        if self._lines > MOST_LINES:
            self.refuse(BadEnvelope(f"the head of the request has more than {MOST_LINES} lines"))
        if self._closing is None:
            super().lineReceived(line)

    def rawDataReceived(self, data: bytes) -> None:
        """Drop what stands behind what was refused, and read no more than a little ahead.

        Twisted's own reads on where the transport has said that it is full, which over TLS it says late.
        """
        if self._closing is None:
            is_behind = self._is_answering
            with suppress(_BodyRefused):
                super().rawDataReceived(data)
            self._ahead += len(data) if is_behind else 0
            if self._ahead > self._optimisticEagerReadSize:
                self._networkProducer.pauseProducing()

    def lineLengthExceeded(self, line: bytes) -> None:
        """Refuse a line that does not end."""
        self.refuse(BadEnvelope("a line of the request is too long"))

    def allContentReceived(self) -> None:
        """The request is whole."""
        self._has_arrived()
        self._is_answering = True
        self._lines = 0
        super().allContentReceived()

    def requestDone(self, request: Request) -> None:
        """The request is answered. The next one waits while too much of the answer is not sent, as nobody reads it.

        It waits for the others' turn in any case: a thousand that come in one piece are not to hold everybody up.
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
        """All that was said is sent."""
        self.site.is_read(self)
        super().resumeProducing()
        self._go_on()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        for timer in (self._arriving, self._taking, self._closing, self._going_on):
            cancel(timer)
        self._is_in_line = False
        self.site.gone(self)
        super().connectionLost(reason)

    def refuse(self, error: WireError) -> None:
        """Answer what cannot be taken as a request, and close."""
        if self._closing is not None:
            return
        self._has_arrived()
        self.site.idle(self)
        self.setTimeout(None)
        self._closing = self._after(LINGER_S, self._close)
        # What is here already is dropped at once, and not line by line.
        self.setRawMode()
        said = Problem(error)
        body = encode(said.body)
        headers = {**SAFE, "Content-Type": CONTENT_TYPE, "Content-Length": str(len(body)), "Connection": "close"}
        lines = [f"HTTP/1.1 {said.status} {said.body['title']}", *map(": ".join, headers.items()), "", ""]
        self.transport.write("\r\n".join(lines).encode() + body)

    def most_body_bytes(self) -> int:
        """Return how long the body of the request may be whose head is here."""
        path = _read_target(self._path)[1].partition(b"?")[0]
        return self.site.body_bytes(self._command, path)

    def bound_trailer(self) -> None:
        """Bound the headers behind a chunked body; Twisted's own bound is 64 KiB."""
        decoder: Any = self._transferDecoder
        decoder._maxTrailerHeadersSize = _TRAILER_BYTES

    def _respondToBadRequestAndDisconnect(self) -> None:
        # Twisted's own answer has no body.
        self.refuse(BadEnvelope("this is no HTTP request that can be read"))

    def headerReceived(self, line: bytes) -> bool:
        """Take a header; Twisted's own raises where a length has more digits than Python reads."""
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            self._respondToBadRequestAndDisconnect()
            return False

    def _send100Continue(self) -> None:
        # Not behind a refusal.
        if self._closing is None:
            super()._send100Continue()

    def _go_on(self) -> None:
        """Go on to what came behind the request that was answered, once its answer is sent."""
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
        # Over TLS its end takes the peer's word.
        self._taking = self._after(LINGER_S, self.transport.abortConnection)
        self.loseConnection()

    def _after(self, seconds: float, what: Callable[[], None]) -> Timer:
        timer: Timer = self.site.clock.scheduler.callLater(seconds, what)
        return timer

    def _is_late(self) -> None:
        self.site.counters.meet("http_arrive")
        self.transport.abortConnection()

    def _is_not_read(self) -> None:
        self.site.counters.meet("http_take")
        self.transport.abortConnection()


class _Refused(Protocol):
    """A connection that is one too many. Twisted's TLS does not know of none at all."""

    transport: Any

    def connectionMade(self) -> None:
        """End at once."""
        self.transport.abortConnection()


class _Site(Site):
    """Connections, up to their bound."""

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
        #: Those on which nothing is arriving or under way, the one that has been so longest first.
        self._idle: dict[_Channel, None] = {}
        #: Those whose request waits for its turn, the one that has waited longest first.
        self._in_line: dict[_Channel, None] = {}
        #: Bytes of each body that is arriving, the request that began first first.
        self._arriving: dict[_Channel, int] = {}
        self._bodies_bytes = 0
        #: Bytes of each answer that is not read, the one that has waited longest first.
        self._unread: dict[_Channel, int] = {}
        self._unread_bytes = 0
        self._memory = Memory()
        self._closing: Deferred[None] | None = None

    def buildProtocol(self, addr: IAddress | None) -> Any:
        """Take a connection."""
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
        """Its request waits for its turn."""
        self._in_line[channel] = None

    def has_turn(self, channel: _Channel) -> None:
        """Its request waits no longer."""
        self._in_line.pop(channel, None)

    def arrives(self, channel: _Channel) -> None:
        """A request arrives."""
        self._idle.pop(channel, None)
        if channel in self._all:
            self._arriving[channel] = 0

    def took(self, channel: _Channel, size: int) -> None:
        """So many bytes more of a body are here."""
        if channel in self._arriving:
            self._arriving[channel] += size
            self._bodies_bytes += size
            while self._bodies_bytes > BODIES_BYTES:
                self.counters.meet("http_bodies")
                self._evict(self._arriving)

    def is_unread(self, channel: _Channel, size: int) -> None:
        """An answer of so many bytes waits until it is read."""
        if channel not in self._all:
            return
        self._unread[channel] = self._unread.pop(channel, 0) + size
        self._unread_bytes += size
        while self._unread_bytes > ANSWERS_BYTES:
            self.counters.meet("http_answers")
            self._evict(self._unread)

    def is_read(self, channel: _Channel) -> None:
        """Its answer is sent."""
        size = self._unread.pop(channel, 0)
        self._unread_bytes -= size
        if size:
            # A request and its channel are a cycle, also those of before.
            self._memory.check()

    def arrived(self, channel: _Channel) -> None:
        """Its request is here, or is not to be taken."""
        self._idle.pop(channel, None)
        self._bodies_bytes -= self._arriving.pop(channel, 0)

    def idle(self, channel: _Channel) -> None:
        """Nothing is under way."""
        if channel in self._all:
            self._idle[channel] = None

    def gone(self, channel: _Channel) -> None:
        """The connection is closed."""
        self.has_turn(channel)
        self.arrived(channel)
        self.is_read(channel)
        self._all.discard(channel)
        if self._closing is not None and not self._all:
            closing, self._closing = self._closing, None
            closing.callback(None)

    def _evict(self, channels: Iterable[_Channel]) -> None:
        """Cut off the first of some connections, which is none of ours from now on: it is closed only later."""
        channel = next(iter(channels))
        self.gone(channel)
        channel.transport.abortConnection()

    def close(self) -> Deferred[None]:
        """Close every connection once what was said is sent, or after :data:`LINGER_S`.

        :returns: fires when none is left: the end of the process would cut them off.
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
        """Keep no log of accesses: what changes anything is in the audit."""

    def stopFactory(self) -> None:
        """There is nothing to close."""

    def log(self, request: http.Request) -> None:
        """Keep no log of accesses."""


def make_site(
    resource: Resource,
    clock: Clock,
    counters: Counters,
    knows: Callable[[str], bool] = lambda _: False,
    body_bytes: Callable[[bytes, bytes], int] = lambda _, __: MOST_BODY_BYTES,
) -> _Site:
    """Make the factory of an API's connections.

    :param knows: whether an Authorization header has a valid token.
    :param body_bytes: how long a body may be, by the method and the path of its request.
    """
    return _Site(resource, clock, counters, knows, body_bytes)
