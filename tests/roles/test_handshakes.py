"""A bound on the TLS handshakes of a port."""

from __future__ import annotations

import socket
import ssl
import time
from collections import Counter as Count
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock as FakeClock
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.protocol.limits import Counters
from s2s.roles.handshakes import HANDSHAKES, MOST_WAITING, HandshakeGate
from s2s.runtime.budget import BURST_S
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import PERIOD_S
from s2s.runtime.status_log import LINK_UP
from tests.roles.test_endpoints import make_certificates
from tests.support.flood import HelloFlood
from tests.support.peer import PUSH, Peer, command
from tests.support.roles import PATIENCE_S, RoleTestCase, free_port
from tests.support.waiting import poll


class GateTests(SynchronousTestCase):
    """The connections that :class:`HandshakeGate` passes to TLS."""

    def setUp(self) -> None:
        """Make a gate with full budgets, and count the connections that it passes on."""
        self.time = FakeClock()
        self.counters = Counters()
        self.begun: Count[str] = Count()
        begun = self.begun

        class _Begun(Protocol):
            transport: Any

            def connectionMade(self) -> None:
                begun[self.transport.getPeer().host] += 1

        self.gate = HandshakeGate(Factory.forProtocol(_Begun), "ssl:1", Clock(self.time), self.counters)

    def connect(self, host: str) -> StringTransport | None:
        """Connect from an address; ``None``: the connection was closed when it was accepted."""
        address = IPv4Address("TCP", host, 5)
        protocol = self.gate.buildProtocol(address)
        if protocol is None:
            return None
        transport = StringTransport(peerAddress=address)
        transport.protocol = protocol
        protocol.makeConnection(transport)
        return transport

    @settings(max_examples=20)
    @given(st.lists(st.tuples(st.sampled_from("12345"), st.integers(1, 300), st.integers(0, 30)), max_size=30))
    def test_bounds_hold(self, asked: list[tuple[str, int, int]]) -> None:
        """For any connections, neither one address nor all together begin more handshakes than burst and rate."""
        self.setUp()
        for host, count, pause in asked:
            for _ in range(count):
                self.connect(f"192.0.2.{host}")
            self.assertLessEqual(len(self.gate.waiting), MOST_WAITING)
            self.time.advance(pause / 10)
            longest = BURST_S + self.time.seconds()
            self.assertLessEqual(max(self.begun.values()), HANDSHAKES[0] * longest + 1)
            self.assertLessEqual(self.begun.total(), HANDSHAKES[1] * longest + 1)
        self.time.pump([0.05] * 100)
        self.assertEqual(len(self.gate.waiting), 0)
        self.gate.doStop()
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_a_waiting_connection_is_not_read(self) -> None:
        """A connection that waits is paused, begins its handshake within a second, and is read from then on."""
        while not self.gate.waiting:
            last = self.connect("192.0.2.1")
        assert last is not None
        self.assertEqual((last.producerState, self.counters.met["handshakes"]), ("paused", 1))
        self.time.pump([0.05] * 20)
        self.assertEqual((last.producerState, len(self.gate.waiting)), ("producing", 0))
        self.assertEqual(self.begun["192.0.2.1"], HANDSHAKES[0] * BURST_S + 1)

    def test_another_address_is_not_held_up(self) -> None:
        """During a flood from one address a connection from another begins its handshake at the next look."""
        for _ in range(1000):
            self.connect("192.0.2.1")
        self.assertEqual(len(self.gate.waiting), MOST_WAITING)
        self.connect("192.0.2.2")
        self.assertEqual(len(self.gate.waiting), MOST_WAITING)
        self.time.advance(0.05)
        self.assertEqual(self.begun["192.0.2.2"], 1)

    def test_the_same_address_gets_in(self) -> None:
        """During a flood a client of the same address that connects again and again gets in."""
        got_in = False
        for step in range(400):
            for _ in range(25):
                self.connect("192.0.2.1")
            if step % 20 == 7 and (mine := self.connect("192.0.2.1")) is not None:
                self.time.pump([0.05] * 20)
                got_in |= mine.producerState == "producing"
            self.time.advance(0.05)
        self.assertTrue(got_in)

    def test_a_connection_that_ended_takes_no_turn(self) -> None:
        """A connection that ended while it waited begins no handshake and uses up no budget."""
        for _ in range(1000):
            self.connect("192.0.2.1")
        for each in list(self.gate.waiting):
            each.connectionLost()
        before = self.begun.total()
        self.time.pump([0.05] * 20)
        self.assertEqual(self.begun.total(), before)

    def test_lines(self) -> None:
        """Closed connections have one line, then one a minute that counts them by address."""
        with capturedLogs() as captured:
            for _ in range(int(HANDSHAKES[0] * BURST_S) + MOST_WAITING + 5):
                self.connect("192.0.2.1")
            self.time.advance(PERIOD_S)
        first, more = map(formatEvent, captured)
        self.assertIn("ssl:1: TLS connections closed unanswered: 1 from 192.0.2.1: at most", first)
        self.assertIn("closed unanswered: 4 from 192.0.2.1", more)
        self.assertEqual(self.counters.met["handshakes_closed"], 5)


class FloodTests(RoleTestCase):
    """Clients that begin TLS handshakes at a real server, and never go on."""

    #: Connections a second.
    RATE = 400.0

    def setUp(self) -> None:
        """Make the server's certificate."""
        super().setUp()
        self.tls = self.directory / "tls"
        make_certificates(self.tls)
        self.port = free_port()

    def endpoint(self) -> str:
        """Return the endpoint of the server."""
        return f"ssl:{self.port}:interface=127.0.0.1:privateKey={self.tls}/server.key:certKey={self.tls}/server.pem"

    def peer(self, address: str) -> Peer:
        """Connect an engine from an address, and greet the server."""
        context = ssl.create_default_context(cafile=str(Path(self.tls) / "roots" / "ca.pem"))
        plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S, (address, 0))
        link = context.wrap_socket(plain, server_hostname="localhost")
        self.addCleanup(link.close)
        peer = Peer(link)
        peer.greet()
        return peer

    @inlineCallbacks
    def test_a_flood_of_hellos(self) -> Iterator[Deferred[Any]]:
        """A server goes on with few of a flood's handshakes; engines of that address and of another still get in."""
        server = self.server(endpoint=self.endpoint(), port=self.port)
        yield server.start()
        began = time.monotonic()
        flood = HelloFlood(self.port, rate=self.RATE, seconds=PATIENCE_S)
        flood.start()
        self.addCleanup(flood.join)
        self.addCleanup(flood.finish)
        yield server.says("TLS connections closed unanswered: 1 from 127.0.0.1")
        other = yield deferToThread(self.peer, "127.0.0.2")
        self.assertTrue(other.call(PUSH, command("from another address"))["accepted"])
        engine = self.engine(f"tls:localhost:{self.port}:trustRoots={self.tls}/roots")
        yield engine.start()
        yield server.says(f"{LINK_UP} engine-1")
        yield poll(lambda: flood.sent > 1500, "the flood has come", timeout=PATIENCE_S)
        flood.finish()
        yield deferToThread(flood.join)
        granted = HANDSHAKES[0] * (BURST_S + time.monotonic() - began)
        self.assertTrue(0 < flood.answered <= granted, f"{flood.answered} of {flood.sent}, at most {granted}")
