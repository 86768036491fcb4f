"""Bounds of the HTTP server, byte by byte and without a socket: :mod:`s2s.admin.http.site`."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock as FakeTime
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource

from s2s.admin.http import site
from s2s.admin.http import site as module
from s2s.admin.http.site import ARRIVE_S, IDLE_S, LINGER_S, MOST_CHUNKS, MOST_LINES, RATES, TAKE_S, make_site
from s2s.admin.operations.operation import MOST_BODY_BYTES as BODY_BYTES
from s2s.protocol.limits import Counters
from s2s.runtime.budget import BURST_S, Budget
from s2s.runtime.clock import Clock

#: Pieces of the generated requests.
_PIECES = [
    b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"Host: x\r\n", b"Content-Length: 3\r\n", b"\r\n", b"abc",
    b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n", b"Connection: close\r\n",
]  # fmt: skip
_ADDRESS = IPv4Address("TCP", "192.0.2.1", 1)
_GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class _Echo(Resource):
    """A resource that responds with the length of the body, at once or when the test decides."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bytes, bytes | None]] = []
        self.held: list[Any] = []
        self.holds = False

    def render(self, request: Any) -> None:
        """Respond, or keep the request."""
        self.seen.append((request.uri, request.getHeader(b"host")))
        if self.holds:
            self.held.append(request)
            return
        request.write(str(len(request.content.read())).encode())
        request.finish()


class _Transport(StringTransport):
    """A transport that reports the end of the connection later, as a socket does."""

    lost: Any

    def abortConnection(self) -> None:
        """Close, and report it in the next iteration."""
        self.disconnecting = True
        self.time.callLater(0, self.lost)

    def __init__(self, time: FakeTime) -> None:
        super().__init__(peerAddress=_ADDRESS)
        self.time = time


class SiteTestCase(SynchronousTestCase):
    """A site with a fake clock."""

    def setUp(self) -> None:
        """Create the site."""
        self.time = FakeTime()
        self.counters = Counters()
        self.echo = _Echo()
        self.site = make_site(self.echo, Clock(self.time), self.counters)

    def trust_all(self) -> None:
        """Let no request without a valid token wait for its turn."""
        self.site.budgets = dict.fromkeys(RATES, Budget((10**6, 10**6), self.site.clock))

    def connect(self) -> tuple[Any, _Transport]:
        """Connect."""
        channel = self.site.buildProtocol(_ADDRESS)
        transport = _Transport(self.time)

        def lost() -> None:
            if transport.connected:
                transport.connected = False
                channel.connectionLost()

        transport.lost = lost
        transport.loseConnection = lost  # type: ignore[method-assign]
        channel.makeConnection(transport)
        return channel, transport

    def problem(self, transport: StringTransport) -> tuple[int, str]:
        """Return status and code of the only response, which must be a problem."""
        head, _, body = transport.value().partition(b"\r\n\r\n")
        self.assertEqual(transport.value().count(b"HTTP/1.1 "), 1, transport.value())
        self.assertIn(b"Content-Type: application/problem+json", head)
        self.assertIn(b"Connection: close", head)
        said = json.loads(body)
        self.assertEqual(int(head.split()[1]), said["status"])
        return said["status"], said["code"]


class BodyTests(SiteTestCase):
    """The length of a body."""

    def test_the_limit_itself(self) -> None:
        """A body may have the maximum length: declared or chunked, in pieces, and followed by another request."""
        body = b"x" * BODY_BYTES
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1000], body[1000:])) + b"0\r\n\r\n"
        for request in (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (BODY_BYTES, body),
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks,
        ):
            channel, transport = self.connect()
            for at in range(0, len(request), 7001):
                channel.dataReceived(request[at : at + 7001])
            channel.dataReceived(request)
            self.time.advance(0)
            self.assertEqual(transport.value().count(b"200 OK"), 2)
            self.assertEqual(transport.value().count(str(BODY_BYTES).encode()), 2)

    def test_one_byte_more(self) -> None:
        """One byte more is refused when it is declared or when it arrives, and the following bytes are dropped."""
        more = BODY_BYTES + 1
        for request in (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % more,
            b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % 10**15,
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
            % (more, b"x" * more),
        ):
            channel, transport = self.connect()
            channel.dataReceived(request)
            channel.dataReceived(b"x" * more)
            channel.dataReceived(_GET)
            self.assertEqual(self.problem(transport), (413, "toolarge"))
            self.assertTrue(transport.connected)
            self.time.advance(LINGER_S)
            self.assertFalse(transport.connected)
        self.assertEqual(self.counters.met["http_body"], 3)

    def test_by_its_target(self) -> None:
        """The limit of a body depends on method and path, without query or host."""
        self.site.body_bytes = lambda method, path: 4 if (method, path) == (b"POST", b"/a") else 2
        for target, length, answer in ((b"/a?b=c", 4, 200), (b"http://y/a", 4, 200), (b"/a", 5, 413), (b"/b", 3, 413)):
            for head, body in (
                (b"Content-Length: %d" % length, b"x" * length),
                (b"Transfer-Encoding: chunked", b"%d\r\n%s\r\n0\r\n\r\n" % (length, b"x" * length)),
            ):
                channel, transport = self.connect()
                channel.dataReceived(b"POST %s HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n%s" % (target, head, body))
                self.time.advance(0)
                self.assertIn(b"HTTP/1.1 %d " % answer, transport.value())

    def test_tiny_chunks(self) -> None:
        """A body of too many chunks is refused, and the chunks behind the limit are not parsed."""
        seen: list[bytes] = []
        handle = module._Request.handleContentChunk

        def watch(request: Any, data: bytes) -> None:
            seen.append(data)
            handle(request, data)

        self.patch(module._Request, "handleContentChunk", watch)
        for count, answer in ((MOST_CHUNKS, b"200 OK"), (10_000, b'"code":"toolarge"')):
            channel, transport = self.connect()
            head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            channel.dataReceived(head + b"1\r\nx\r\n" * count + b"0\r\n\r\n")
            self.time.advance(0)
            self.assertIn(answer, transport.value())
        self.assertEqual(len(seen), 2 * MOST_CHUNKS + 1)


class HeadTests(SiteTestCase):
    """Heads of many lines."""

    def setUp(self) -> None:
        """Record the buffer's length at each parsed line."""
        super().setUp()
        self.costs: list[int] = []
        received = module._Channel.lineReceived

        def watch(channel: Any, line: bytes) -> None:
            self.costs.append(len(channel._buffer))
            received(channel, line)

        self.patch(module._Channel, "lineReceived", watch)

    def answer(self, *pieces: bytes) -> bytes:
        """Return the response to a request in pieces."""
        channel, transport = self.connect()
        for piece in pieces:
            channel.dataReceived(piece)
        self.time.advance(0)
        self.assertLess(max(self.costs), module._PIECE_BYTES)
        return transport.value()

    def test_as_many_as_may_be(self) -> None:
        """A head with the maximum number of lines is accepted, in one piece, in several, and repeatedly."""
        head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * (MOST_LINES - 3) + b"\r\n"
        self.assertEqual(self.answer(head).count(b" 200 OK"), 1)
        self.assertEqual(self.answer(head[:100], head[100:]).count(b" 200 OK"), 1)
        channel, transport = self.connect()
        for _ in range(2):
            channel.dataReceived(head)
            self.time.advance(0)
        self.assertEqual(transport.value().count(b" 200 OK"), 2)

    def test_too_many(self) -> None:
        """A head with more lines, including folded or empty ones, is refused, and the further lines are not parsed."""
        get = b"GET / HTTP/1.1\r\nHost: x\r\n"
        for head in (get + b"A: b\r\n" * 2000, get + b"A: b\r\n" + b" \r\n" * 20_000, b"\r\n" * 32_000):
            self.costs.clear()
            self.assertIn(b" 400 Bad Request", self.answer(head))
            self.assertLessEqual(len(self.costs), MOST_LINES + 1)

    def test_behind_a_request(self) -> None:
        """Lines behind a request count for the head of the next one."""
        channel, transport = self.connect()
        channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"\r\n" * 30_000)
        for _ in range(3):
            self.time.advance(0)
        self.assertEqual((transport.value().count(b" 200 OK"), transport.value().count(b" 400 Bad Request")), (1, 1))
        self.assertLessEqual(len(self.costs), MOST_LINES)

    def test_a_trailer(self) -> None:
        """The trailer of a chunked body has a limit of bytes."""
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
        self.assertIn(b" 200 OK", self.answer(head, b"A: b\r\n\r\n"))
        self.assertIn(b" 400 Bad Request", self.answer(head + b"A: b\r\n" * 2000 + b"\r\n"))


class RequestTests(SiteTestCase):
    """Invalid and incomplete requests."""

    def test_no_request(self) -> None:
        """Bytes that are not HTTP are refused once, with problem details, and the connection is closed."""
        for request in (
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
            b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(600)) + b"\r\n",
        ):
            channel, transport = self.connect()
            channel.dataReceived(request + _GET)
            self.assertEqual(self.problem(transport), (400, "bad_envelope"), request)
            self.time.advance(LINGER_S)
            self.assertFalse(transport.connected)

    @settings(max_examples=300)
    @given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(_PIECES)), max_size=12))
    def test_anything(self, pieces: list[bytes]) -> None:
        """No input raises an exception, and no timer is left after the connection."""
        self.setUp()
        channel, transport = self.connect()
        for piece in pieces:
            if transport.connected:  # a closed transport delivers nothing
                channel.dataReceived(piece)
        transport.lost()
        self.time.advance(0)
        self.assertEqual([call for call in self.time.getDelayedCalls() if call.active()], [])

    def test_slowly(self) -> None:
        """A request that is not complete in time is cut off, though bytes arrive; so is one behind another."""
        for first in (b"", _GET):
            channel, transport = self.connect()
            channel.dataReceived(first)
            self.time.advance(0)
            for byte in b"GET / HTTP/1.1\r\nX: ":
                channel.dataReceived(bytes([byte]))
            for _ in range(round(ARRIVE_S) - 1):
                self.time.advance(1)
                channel.dataReceived(b"x")
                self.assertTrue(transport.connected)
            self.time.pump([1, 0])
            self.assertFalse(transport.connected)
        self.assertEqual(self.counters.met["http_arrive"], 2)

    def test_pipelined(self) -> None:
        """The time limit of a pipelined partial request begins when the previous request is answered."""
        self.echo.holds = True
        channel, transport = self.connect()
        channel.dataReceived(_GET + b"GET / HT")
        self.time.advance(ARRIVE_S * 2)
        self.assertTrue(transport.connected)
        self.echo.held.pop().finish()
        self.time.advance(0)
        channel.dataReceived(b"TP/1.1\r\n")
        self.time.pump([ARRIVE_S, 0])
        self.assertFalse(transport.connected)

    def test_targets(self) -> None:
        """A target may be a whole URL, whose host replaces the header; ``*`` is passed to the resource."""
        channel, _ = self.connect()
        for target in (b"http://y:1/a?b=c", b"HTTPS://y", b"http://y?b", b"*", b"/http://y/"):
            channel.dataReceived(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: x\r\nHost: z\r\n\r\n")
            self.time.advance(0)
        self.assertEqual(
            self.echo.seen,
            [(b"/a?b=c", b"y:1"), (b"/", b"y"), (b"/?b", b"y"), (b"*", b"z"), (b"/http://y/", b"z")],
        )

    def test_silence(self) -> None:
        """An idle connection is closed after ``IDLE_S``; one with a request in progress is not."""
        idle = self.connect()[1]
        self.echo.holds = True
        channel, busy = self.connect()
        channel.dataReceived(_GET)
        self.time.pump([1] * (IDLE_S + 1))
        self.assertEqual((idle.connected, busy.connected), (False, True))


class TlsTests(SiteTestCase):
    """A client that speaks TLS to a port without TLS."""

    def test_it_is_refused(self) -> None:
        """The client gets a plain-text problem at once, and the connection ends."""
        channel, transport = self.connect()
        channel.dataReceived(b"\x16\x03\x01\x02\x00\x01\x00")
        self.assertEqual(self.problem(transport), (400, "bad_envelope"))
        self.assertIn(b"the client speaks TLS, and this port does not", transport.value())
        self.time.advance(LINGER_S)
        self.assertFalse(transport.connected)


class AnswerTests(SiteTestCase):
    """Responses that the client does not read."""

    def test_not_read(self) -> None:
        """While a response is unsent the next request is not answered, and only a little more is read."""
        self.trust_all()
        self.echo.holds = True
        channel, transport = self.connect()
        channel.dataReceived(_GET * 3)
        transport.producer.pauseProducing()
        self.echo.held[0].finish()
        self.time.advance(0)
        self.assertEqual(len(self.echo.held), 1)
        channel.dataReceived(_GET * 1000)
        self.assertEqual(transport.producerState, "paused")
        transport.producer.resumeProducing()
        self.assertEqual(len(self.echo.held), 2)

        self.echo.holds = False
        self.echo.held[1].finish()
        self.time.advance(0)
        self.assertEqual(len(self.echo.seen), 1003)
        self.assertEqual(transport.producerState, "producing")
        for _ in range(round(TAKE_S)):
            channel.dataReceived(_GET)
            self.time.advance(2)
        self.assertTrue(transport.connected)
        transport.lost()
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_too_much_is_not_read(self) -> None:
        """Over the limit of unread bytes the oldest unread response is cut off; responses that were read are free."""
        self.trust_all()
        self.echo.holds = True
        whole = 2 << 20
        self.patch(site, "ANSWERS_BYTES", 3 * whole)
        transports = []
        for number in range(6):
            channel, transport = self.connect()
            transport.loseConnection = lambda: None  # type: ignore[method-assign]
            transports.append(transport)
            end = b"\r\nConnection: close\r\n\r\n" if number % 2 else b"\r\n\r\n"
            channel.dataReceived(_GET.replace(b"\r\n\r\n", end))
            transport.producer.pauseProducing()
            self.echo.held[number].write(b"x" * whole)
            self.echo.held[number].finish()
            self.time.advance(0)
            if number == 2:
                transports[0].producer.resumeProducing()
                self.time.advance(0)
        self.assertEqual([transport.connected for transport in transports], [True, False, False, True, True, True])
        self.assertEqual(self.counters.met["http_answers"], 2)
        for transport in transports:
            transport.lost()
        self.assertEqual((self.site._unread, self.site._unread_bytes), ({}, 0))

    def test_in_turns(self) -> None:
        """Pipelined requests are answered one at a time, so that other connections take turns."""
        self.trust_all()
        channel, other = self.connect()[0], self.connect()[0]
        channel.dataReceived(_GET * 300)
        other.dataReceived(_GET.replace(b"/", b"/other", 1))
        self.assertEqual([uri for uri, _ in self.echo.seen], [b"/", b"/other"])
        self.time.advance(0)
        self.assertEqual(len(self.echo.seen), 301)

    def test_not_read_for_too_long(self) -> None:
        """A client that does not read for ``TAKE_S`` is cut off, before its next request and before the close."""
        for request in (_GET * 2, _GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")):
            channel, transport = self.connect()
            transport.loseConnection = lambda: None  # type: ignore[method-assign]
            transport.producer.pauseProducing()
            channel.dataReceived(request)
            self.time.pump([0, TAKE_S - 0.1])
            self.assertTrue(transport.connected)
            self.time.pump([0.1, 0])
            self.assertFalse(transport.connected)
        self.assertEqual(self.counters.met["http_take"], 2)

    def test_not_read_once_refused(self) -> None:
        """A refused connection that the client keeps open ends after twice ``LINGER_S``, or at once to make room."""
        self.patch(module, "MOST_CONNECTIONS", 1)
        for is_pressed in (False, True):
            channel, transport = self.connect()
            self.time.advance(0)
            transport.loseConnection = lambda: None  # type: ignore[method-assign]
            channel.dataReceived(b"nonsense\r\n\r\n")
            self.time.advance(LINGER_S)
            self.assertTrue(transport.connected)
            if is_pressed:
                self.connect()
            self.time.pump([0 if is_pressed else LINGER_S, 0])
            self.assertFalse(transport.connected)

    def test_gone_while_it_is_held(self) -> None:
        """A client that disconnects while a response is unread leaves no timer."""
        channel, transport = self.connect()
        transport.producer.pauseProducing()
        channel.dataReceived(_GET * 2)
        self.time.advance(0)
        transport.lost()
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_full_late(self) -> None:
        """If the transport is full only after the next request has begun, only a little more is read."""
        self.echo.holds = True
        channel, transport = self.connect()
        channel.dataReceived(_GET)
        transport.producer.pauseProducing()
        transport.producerState = "producing"
        channel.dataReceived(b"x" * 20_000)
        self.assertEqual(transport.producerState, "paused")

    def test_its_own_body_is_not_behind_it(self) -> None:
        """A long body does not pause reading, so that a disconnect is noticed while the request is handled."""
        self.echo.holds = True
        channel, transport = self.connect()
        channel.dataReceived(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n" + b"x" * 40_000)
        self.assertEqual((len(self.echo.held), transport.producerState), (1, "producing"))
        self.assertIsInstance(self.echo.held[0].content, BytesIO)


class ConnectionTests(SiteTestCase):
    """The number of connections."""

    def test_too_many(self) -> None:
        """Over the limit the connection idle for longest is closed at once; each further connection closes another."""
        self.patch(module, "MOST_CONNECTIONS", 3)
        self.echo.holds = True
        (first, busy), (_, second), (_, third) = self.connect(), self.connect(), self.connect()
        first.dataReceived(_GET * 2)
        (_, fourth), (_, fifth) = self.connect(), self.connect()
        self.time.advance(0)
        self.assertEqual(
            [each.connected for each in (busy, second, third, fourth, fifth)], [True, False, False, True, True]
        )
        for held in self.echo.held:
            held.finish()
        # The busy connection has received its second request meanwhile, and is not idle.
        self.connect()
        self.time.advance(0)
        self.assertEqual([each.connected for each in (busy, fourth, fifth)], [True, False, True])
        self.assertEqual(self.counters.met["http_connections"], 3)

    def test_too_many_that_are_not_idle(self) -> None:
        """If none is idle, the connection whose request arrives for longest is closed; else the newest is refused."""
        self.patch(module, "MOST_CONNECTIONS", 2)
        self.echo.holds = True
        (slow, _), (slower, _) = made = self.connect(), self.connect()
        slower.dataReceived(b"G")
        self.time.advance(1)
        slow.dataReceived(b"G")
        third, _ = self.connect()
        self.time.advance(0)
        self.assertEqual([transport.connected for _, transport in made], [True, False])

        slow.dataReceived(_GET[1:])
        third.dataReceived(_GET)
        refused, at = self.site.buildProtocol(_ADDRESS), _Transport(self.time)
        at.lost = lambda: None
        refused.makeConnection(at)
        self.assertTrue(at.disconnecting)

    def test_bodies(self) -> None:
        """Over the limit of body bytes, the body that has been arriving longest is cut off; complete bodies stay."""
        self.patch(module, "BODIES_BYTES", 300)
        self.echo.holds = True
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        connections = [self.connect() for _ in range(4)]
        for channel, _ in connections:
            channel.dataReceived(head + b"x" * 80)
            if channel is connections[0][0]:
                channel.dataReceived(b"x" * 20)
        self.time.advance(0)
        self.assertEqual([transport.connected for _, transport in connections], [True] * 4)
        channel, transport = self.connect()
        channel.dataReceived(head + b"x" * 80)
        self.time.advance(0)
        self.assertEqual([each.connected for _, each in connections], [True, False, True, True])
        self.assertTrue(transport.connected)
        for each, transport in connections:
            if transport.connected:
                each.dataReceived(b"x" * 20)
        self.assertEqual(len(self.echo.held), 3)
        self.assertEqual(self.counters.met["http_bodies"], 1)

    def test_bodies_behind_an_answer(self) -> None:
        """A body behind a request that is answered at once has the same limits of bytes and time as any other."""
        self.patch(module, "BODIES_BYTES", 100)
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        channel, transport = self.connect()
        channel.dataReceived(_GET + head + b"x" * 80)
        other, _ = self.connect()
        other.dataReceived(_GET + head + b"x" * 80)
        self.time.advance(0)
        self.assertFalse(transport.connected)
        self.time.pump([ARRIVE_S, 0])
        self.assertEqual(self.counters.met["http_arrive"], 1)

    def test_close(self) -> None:
        """``close`` closes all connections and leaves no timer, and also works without connections."""
        transports = [self.connect()[1] for _ in range(3)]
        self.successResultOf(self.site.close())
        self.assertEqual([each.connected for each in transports], [False] * 3)
        self.assertEqual([call for call in self.time.getDelayedCalls() if call.active()], [])
        self.successResultOf(self.site.close())

    def test_close_of_what_is_not_sent_yet(self) -> None:
        """Unsent responses are sent before the close; a client that does not read is cut off after ``LINGER_S``."""
        transports = [self.connect()[1] for _ in range(2)]
        for transport in transports:
            transport.loseConnection = lambda: None  # type: ignore[method-assign]
        closing = self.site.close()
        transports[0].lost()
        self.time.advance(LINGER_S - 0.1)
        self.assertNoResult(closing)
        self.assertEqual([each.connected for each in transports], [False, True])
        self.time.pump([0.1, 0])
        self.successResultOf(closing)
        self.assertFalse(transports[1].connected)


class StrangerTests(SiteTestCase):
    """Requests without a valid token wait for their turn."""

    def setUp(self) -> None:
        """Accept one token."""
        super().setUp()
        self.site.knows = "Bearer right".__eq__

    def ask(self, connections: list[Any], authorization: bytes = b"Bearer wrong") -> None:
        """Send one request on each connection."""
        for channel in connections:
            channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n\r\n" % authorization)

    def test_the_rate_holds(self) -> None:
        """With any number of connections, the burst and the rate bound the requests that are read."""
        pairs = [self.connect() for _ in range(400)]
        for _ in range(100):
            waiting = [channel for channel, _ in pairs if not channel._is_answering and not channel._is_in_line]
            self.ask(waiting)
            self.time.advance(0.1)
        seconds = 10 + BURST_S
        self.assertLessEqual(len(self.echo.seen), (RATES["first"][0] + RATES["later"][0]) * seconds)
        self.assertGreater(len(self.echo.seen), RATES["later"][0] * seconds)
        self.assertGreater(self.counters.met["http_strangers"], 100)

    def test_all_are_answered(self) -> None:
        """A request that waited is answered in its turn, and so are the requests behind it."""
        channel, transport = self.connect()
        for _ in range(3 * RATES["later"][0]):
            self.ask([channel])
            channel.dataReceived(_GET * 2)
            self.time.advance(0.01)
        self.time.pump([0.05] * 400)
        self.assertEqual(transport.value().count(b"200 OK"), 9 * RATES["later"][0])

    def test_a_valid_token_does_not_wait(self) -> None:
        """A request with a valid token is read at once, also on a new connection from the same address."""
        self.ask([self.connect()[0] for _ in range(400)])
        channel, transport = self.connect()
        for number in range(1, 100):
            self.ask([channel], b"Bearer right")
            self.time.advance(0)
            self.assertEqual(transport.value().count(b"200 OK"), number)

    def test_a_probe_does_not_wait(self) -> None:
        """Health checks have a rate of their own, apart from other requests."""
        self.ask([self.connect()[0] for _ in range(400)])
        for start in (b"GET /healthz", b"HEAD /healthz", b"GET /readyz?x", b"OPTIONS /readyz"):
            channel, transport = self.connect()
            channel.dataReceived(_GET.replace(b"GET /", start, 1))
            self.assertIn(b"200 OK", transport.value())

    def test_those_in_line_go_first(self) -> None:
        """Over the limit of connections one that waits for its turn is cut off, and no idle one."""
        self.patch(module, "MOST_CONNECTIONS", 200)
        _, idle = self.connect()
        pairs = [self.connect() for _ in range(199)]
        self.ask([channel for channel, _ in pairs])
        _, fresh = self.connect()
        self.time.advance(0)
        self.assertTrue(idle.connected and fresh.connected)
        self.assertEqual(sum(not transport.connected for _, transport in pairs), 1)

    def test_a_newcomer_does_not_wait_for_repeaters(self) -> None:
        """The first request of a connection has a rate of its own, apart from later requests."""
        channels = [self.connect()[0] for _ in range(50)]
        for _ in range(10):
            self.ask([channel for channel in channels if not channel._is_answering and not channel._is_in_line])
            self.time.advance(0.3)
        channel, transport = self.connect()
        channel.dataReceived(_GET)
        self.assertIn(b"200 OK", transport.value())

    def test_who_has_left(self) -> None:
        """A connection that is closed while its request waits is not read, and leaves no timer."""
        pairs = [self.connect() for _ in range(400)]
        self.ask([channel for channel, _ in pairs])
        self.time.advance(0)
        seen = len(self.echo.seen)
        for _, transport in pairs:
            transport.abortConnection()
        self.time.pump([0.05] * 400)
        self.assertEqual(len(self.echo.seen), seen)
        self.assertEqual(self.time.getDelayedCalls(), [])
