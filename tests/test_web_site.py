"""HTTP's outer bounds, byte by byte and without a socket: :mod:`s2s.web.site`."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock as FakeTime
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from s2s.clock import Clock
from s2s.limits import Counters
from s2s.web import site as module
from s2s.web.site import ARRIVE_S, BODY_BYTES, IDLE_S, LINGER_S, make_site

#: Of what requests are made.
_PIECES = [
    b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"Host: x\r\n", b"Content-Length: 3\r\n", b"\r\n", b"abc",
    b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b"0\r\n\r\n", b"Connection: close\r\n",
]  # fmt: skip
_ADDRESS = IPv4Address("TCP", "192.0.2.1", 1)


class _Echo(Resource):
    """Says how long each body was, at once or when it is told to."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []
        self.holds = False

    def render(self, request: Any) -> Any:
        """Answer."""
        if self.holds:
            self.held.append(request)
            return NOT_DONE_YET
        return str(len(request.content.read())).encode()


class SiteTestCase(SynchronousTestCase):
    """A site with a clock of its own."""

    def setUp(self) -> None:
        """Make it."""
        self.time = FakeTime()
        self.counters = Counters()
        self.echo = _Echo()
        self.site = make_site(self.echo, Clock(self.time), self.counters)

    def connect(self) -> tuple[Any, StringTransport]:
        """Make a connection."""
        channel = self.site.buildProtocol(_ADDRESS)
        transport = StringTransport(peerAddress=_ADDRESS)

        def lost() -> None:
            transport.connected = False
            channel.connectionLost()

        transport.abortConnection = lost  # type: ignore[method-assign]
        transport.loseConnection = lost  # type: ignore[method-assign]
        channel.makeConnection(transport)
        return channel, transport

    def problem(self, transport: StringTransport) -> tuple[int, str]:
        """Give status and code of the one answer that came."""
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
        """A body may be as long as the limit, declared or in chunks, in pieces and with the next behind it."""
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
            self.assertEqual(transport.value().count(b"200 OK"), 2)
            self.assertEqual(transport.value().count(str(BODY_BYTES).encode()), 2)

    def test_one_byte_more(self) -> None:
        """One byte more is refused by what it declares, before it comes, or when it comes; what follows is dropped."""
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
            channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertEqual(self.problem_before(transport), (413, "toolarge"))
            self.assertTrue(transport.connected)
            self.time.advance(LINGER_S)
            self.assertFalse(transport.connected)
        self.assertEqual(self.counters.met["http_body"], 3)

    def problem_before(self, transport: StringTransport) -> tuple[int, str]:
        """Give status and code of an answer, behind which Twisted may still say that the body may come."""
        end = transport.value().partition(b"HTTP/1.1 100 Continue")[0]
        transport.clear()
        transport.write(end)
        return self.problem(transport)


class RequestTests(SiteTestCase):
    """What is no request, and what does not come."""

    def test_no_request(self) -> None:
        """What is no HTTP is refused once, as problem details, and the connection is closed."""
        for request in (
            b"nonsense\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
            b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(600)) + b"\r\n",
        ):
            channel, transport = self.connect()
            channel.dataReceived(request + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertEqual(self.problem(transport), (400, "bad_envelope"), request)
            self.time.advance(LINGER_S)
            self.assertFalse(transport.connected)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(_PIECES)), max_size=12))
    def test_anything(self, pieces: list[bytes]) -> None:
        """Whatever comes, nothing is raised, and no timer is left when the connection is gone."""
        self.setUp()
        channel, transport = self.connect()
        for piece in pieces:
            channel.dataReceived(piece)
        if transport.connected:
            transport.abortConnection()
        self.assertEqual([call for call in self.time.getDelayedCalls() if call.active()], [])

    def test_slowly(self) -> None:
        """A request that is not whole in time is cut, however busily it comes, and behind another one too."""
        for first in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            channel, transport = self.connect()
            channel.dataReceived(first)
            for byte in b"GET / HTTP/1.1\r\nX: ":
                channel.dataReceived(bytes([byte]))
            for _ in range(round(ARRIVE_S) - 1):
                self.time.advance(1)
                channel.dataReceived(b"x")
                self.assertTrue(transport.connected)
            self.time.advance(1)
            self.assertFalse(transport.connected)
        self.assertEqual(self.counters.met["http_arrive"], 2)

    def test_pipelined(self) -> None:
        """A part of the next request that came with the one before has its time from when that is answered."""
        self.echo.holds = True
        channel, transport = self.connect()
        channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
        self.time.advance(ARRIVE_S * 2)
        self.assertTrue(transport.connected)
        self.echo.held.pop().finish()
        channel.dataReceived(b"TP/1.1\r\n")
        self.time.advance(ARRIVE_S + 1)
        self.assertFalse(transport.connected)

    def test_silence(self) -> None:
        """A connection on which nothing comes is closed after a while; one whose request is under way is not."""
        idle = self.connect()[1]
        self.echo.holds = True
        channel, busy = self.connect()
        channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.time.pump([1] * (IDLE_S + 1))
        self.assertEqual((idle.connected, busy.connected), (False, True))


class ConnectionTests(SiteTestCase):
    """How many there may be."""

    def test_too_many(self) -> None:
        """Of too many the one that has been idle longest goes; where none is idle, the newest is not taken."""
        self.patch(module, "MOST_CONNECTIONS", 3)
        self.echo.holds = True
        (first, busy), (_, second), (_, third) = self.connect(), self.connect(), self.connect()
        first.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        _, fourth = self.connect()
        self.assertEqual([each.connected for each in (busy, second, third, fourth)], [True, False, True, True])
        self.echo.held.pop().finish()
        self.connect()
        self.assertEqual([each.connected for each in (busy, third, fourth)], [True, False, True])
        self.assertEqual(self.counters.met["http_connections"], 2)

        for channel, _ in [self.connect() for _ in range(3)]:
            channel.dataReceived(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertIsNone(self.site.buildProtocol(_ADDRESS))

    def test_close(self) -> None:
        """All are closed at the end, and none is counted any more; there may be none."""
        transports = [self.connect()[1] for _ in range(3)]
        self.successResultOf(self.site.close())
        self.assertEqual([each.connected for each in transports], [False] * 3)
        self.assertEqual([call for call in self.time.getDelayedCalls() if call.active()], [])
        self.successResultOf(self.site.close())

    def test_close_of_what_is_not_sent_yet(self) -> None:
        """What was said is sent before the end; whoever does not read is cut off after a while."""
        transports = [self.connect()[1] for _ in range(2)]
        lose = [transport.loseConnection for transport in transports]
        for transport in transports:
            transport.loseConnection = lambda: None
        closing = self.site.close()
        lose[0]()
        self.time.advance(LINGER_S - 0.1)
        self.assertNoResult(closing)
        self.assertEqual([each.connected for each in transports], [False, True])
        self.time.advance(0.1)
        self.successResultOf(closing)
        self.assertFalse(transports[1].connected)
