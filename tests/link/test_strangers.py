"""Bounds on the bytes and log lines of links without a valid frame."""

from __future__ import annotations

import itertools
import socket
from collections import Counter as Count
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock as FakeClock
from twisted.internet.testing import StringTransport
from twisted.logger import formatEvent, globalLogPublisher
from twisted.protocols.haproxy._wrapper import HAProxyWrappingFactory
from twisted.trial.unittest import SynchronousTestCase, TestCase

from s2s.link import factory
from s2s.link.dispatcher import Dispatcher
from s2s.link.factory import MAX_SILENT, LinkFactory, ServerLinks
from s2s.link.strangers import FIRST_BYTES, FIRST_RATE, LEAST_BYTES, RATE, Strangers, weight
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import HEALTH_CHECK
from s2s.protocol.limits import Counters
from s2s.protocol.signing import Key, Keyring, Secret
from s2s.runtime.budget import BURST_S, network
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, PERIOD_S, TOLD
from tests.support.waiting import PATIENCE_S, poll

_NOW = 1_737_990_000
_KEY = Key("k1", Secret(bytes(range(32))), "any", 0.0)
_LARGE = 65536
_HEALTH = {"role": "server", "version": "1", "uptime_s": 1}


class BudgetTests(SynchronousTestCase):
    """The bytes that :class:`Strangers` admits."""

    def setUp(self) -> None:
        """Start with full budgets."""
        self.time = FakeClock()
        self.counters = Counters()
        self.strangers = Strangers(Clock(self.time), self.counters)
        self.taken: Count[str] = Count()
        self.left: set[str] = set()

    def ask(self, address: str, size: int = _LARGE, before: int = FIRST_BYTES) -> bool:
        """Request bytes, and count them once they may be taken."""

        def taken() -> None:
            self.taken[address] += size

        may_take = self.strangers.may_take(address, before, b"x" * size, lambda: address not in self.left, taken)
        if may_take:
            taken()
        return may_take

    @settings(max_examples=30)
    @given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, _LARGE), st.integers(0, 30)), max_size=60))
    def test_bounds_hold(self, asked: list[tuple[str, int, int]]) -> None:
        """For any requests, neither one address nor all together get more than burst and rate."""
        self.setUp()
        for address, size, pause in asked:
            self.ask(address, size)
            self.time.advance(pause / 100)
            for bytes_in_all, rate in ((max(self.taken.values()), RATE[0]), (self.taken.total(), RATE[1])):
                self.assertLessEqual(bytes_in_all, rate * (BURST_S + self.time.seconds()) + 1)
        # In the end everything is taken.
        self.time.pump([0.05] * 1000)
        self.assertEqual(self.taken.total(), sum(size for _, size, _ in asked))

    def test_another_address_is_not_held_up(self) -> None:
        """While one address waits, the bytes of another are taken at the next look."""
        while self.ask("flood"):
            pass
        for _ in range(50):
            self.ask("flood")
        self.ask("engine")
        self.time.advance(0.05)
        self.assertEqual(self.taken["engine"], _LARGE)
        self.assertGreater(self.counters.met["strangers"], 50)

    def test_addresses_take_turns(self) -> None:
        """Waiting addresses take turns, however many reads of one of them are queued."""
        while self.ask(f"other-{self.taken.total()}"):
            pass
        for _ in range(200):
            self.ask("flood")
        for number in range(5):
            self.ask(f"engine-{number}")
        self.time.pump([0.05] * 40)
        self.assertGreaterEqual(min(self.taken[f"engine-{number}"] for number in range(5)), _LARGE)

    def test_an_address_keeps_its_order(self) -> None:
        """Within one address later small reads do not overtake a large one for ever."""
        while self.ask("flood"):
            pass
        taken: list[int] = []
        self.strangers.may_take("flood", FIRST_BYTES, b"[" * _LARGE, lambda: True, lambda: taken.append(0))
        for number in range(1, 60):
            later = partial(taken.append, number)
            self.strangers.may_take("flood", FIRST_BYTES, b"x" * 8192, lambda: True, later)
            self.time.advance(0.1)
        self.time.pump([0.05] * 200)
        self.assertEqual(taken, list(range(60)))

    def test_first_bytes_are_apart(self) -> None:
        """A first frame as short as a health check is taken at once, even if its address has no other budget left."""
        while self.ask("flood"):
            pass
        self.assertTrue(self.ask("flood", 300, before=0))
        self.assertFalse(self.ask("flood", 300, before=FIRST_BYTES))

    def test_first_bytes_are_bounded_too(self) -> None:
        """The first bytes of an address's links have their own rate, and one byte counts as the minimum of a read."""
        asked = 0
        while self.ask("flood", 1, before=0):
            asked += 1
        self.assertEqual(asked, BURST_S * FIRST_RATE[0] // LEAST_BYTES)
        self.assertTrue(self.ask("engine", 300) or self.time.advance(0.05) or self.taken["engine"])

    def test_who_has_left_takes_nothing(self) -> None:
        """A link that ended in the queue uses up no budget."""
        while self.ask("flood"):
            pass
        self.left.add("flood")
        before = self.taken["flood"]
        self.time.pump([0.05] * 200)
        self.assertEqual((self.taken["flood"], self.time.getDelayedCalls()), (before, []))

    def test_addresses_are_forgotten(self) -> None:
        """The memory for addresses does not grow with their number."""
        for number in range(20_000):
            self.ask(str(number), 1, before=0)
            self.time.advance(0.01)
        self.assertLess(len(self.strangers._first._by_address), 5000)

    def test_what_is_dear_to_parse_counts_more(self) -> None:
        """Objects, lists and members count as more bytes, so that a second's budget takes equal time to parse."""
        self.assertEqual(weight(b"x" * _LARGE), _LARGE)
        self.assertEqual(weight(b"[]" * (_LARGE // 2)), _LARGE * 5)
        self.assertEqual(weight(b'{"a":1}' * 1000), 7000 + 16 * 1000)
        self.assertEqual(weight(b"{"), LEAST_BYTES)

    def test_network(self) -> None:
        """IPv4 is counted by address, also in IPv6 notation, and IPv6 by the network that one machine owns."""
        self.assertEqual(network("10.0.0.1"), "10.0.0.1")
        self.assertEqual(network("::ffff:10.0.0.1"), "10.0.0.1")
        self.assertEqual(network("2001:db8:1:2:3::4"), network("2001:db8:1:2:ffff::9"))
        self.assertNotEqual(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"))
        self.assertEqual(network(""), "")


class LinkTests(SynchronousTestCase):
    """Links of a server, by strangers and by engines."""

    def setUp(self) -> None:
        """Make a server's links, and collect the lines of the log."""
        self.time = FakeClock()
        self.counters = Counters()
        clock = Clock(self.time, lambda: float(_NOW))
        keys: Any = type("Keys", (), {"keyring": Keyring([_KEY])})()
        self.judged: list[int] = []
        self.numbers = itertools.count()

        class _Dispatcher(Dispatcher):
            def receive(dispatcher, frame: bytes, *more: Any) -> Any:  # noqa: N805
                self.judged.append(len(frame))
                return super().receive(frame, *more)

        links = ServerLinks(self.counters, clock, lambda _: None)
        dispatcher = _Dispatcher(keys, {HEALTH_CHECK: lambda _: _HEALTH}, clock)
        self.factory = LinkFactory("server", dispatcher, keys, clock, links, counters=self.counters)
        self.lines: list[str] = []
        globalLogPublisher.addObserver(self.note)
        self.addCleanup(globalLogPublisher.removeObserver, self.note)

    def note(self, event: Any) -> None:
        """Keep a line that an operator would see."""
        if event["log_level"].name in ("info", "warn", "error"):
            self.lines.append(str(formatEvent(event)))

    def connect(self, host: str = "192.0.2.1") -> tuple[Any, StringTransport]:
        """Connect from an address."""
        link, transport = self.factory.buildProtocol(None), StringTransport(peerAddress=IPv4Address("TCP", host, 5))
        link.makeConnection(transport)
        return link, transport

    def send(self, link: Any, body: bytes) -> None:
        """Send a frame."""
        link.dataReceived(len(body).to_bytes(4, "big") + body)

    def check(self, pad: int = 0, key: Key = _KEY) -> bytes:
        """Return a health check, padded by an unknown member."""
        told: dict[str, Any] = {"id": f"i{next(self.numbers)}", "ts": _NOW, "src": "engine", "dst": "server"}
        frame = envelope.seal(**told, type=HEALTH_CHECK, body=b"{}", key=key)
        return frame if not pad else frame.replace(b'"dst"', b'"a":"%b","dst"' % (b"x" * pad), 1)

    def lose(self, link: Any) -> None:
        """End a connection."""
        link.connectionLost()

    def flood(self, count: int, host: str = "192.0.2.1") -> None:
        """Connect this many strangers, one after the other, each with a large frame that does not verify."""
        for _ in range(count):
            link, transport = self.connect(host)
            self.send(link, self.check(_LARGE - 400))
            if transport.disconnecting:
                self.lose(link)

    def test_a_flood_is_judged_at_its_rate(self) -> None:
        """Of 40 large frames a second from one address only as many are processed as its rate allows."""
        for _ in range(100):
            self.flood(4)
            self.time.advance(0.1)
        self.assertLessEqual(sum(self.judged), RATE[0] * (BURST_S + 10))
        self.assertGreaterEqual(sum(self.judged), RATE[0] * 10)
        self.assertGreater(self.counters.met["strangers"], 100)

    def test_an_engine_gets_in_from_the_same_address(self) -> None:
        """During the flood a health check from the same address is answered at once, and its link waits no more."""
        self.flood(50)
        link, transport = self.connect()
        transport.clear()
        self.send(link, self.check())
        self.assertIn(b'"s2s.health.ack"', transport.value())
        self.judged.clear()
        for _ in range(20):
            self.send(link, self.check())
        self.assertEqual(len(self.judged), 20)

    def test_a_large_first_frame_gets_in(self) -> None:
        """During a flood an engine whose first frame is large waits for its turn, and is answered."""
        self.flood(8)
        link, transport = self.connect("192.0.2.2")
        transport.clear()
        told: dict[str, Any] = {"id": "i1", "ts": _NOW, "src": "engine", "dst": "server", "type": "a.b"}
        self.send(link, envelope.seal(**told, body=canonical.dumps({"a": "x" * 60_000}), key=_KEY))
        self.time.advance(0.05)
        self.time.advance(0.0)
        self.assertIn(b'"unsupported_type"', transport.value())

    def test_nothing_is_judged_of_a_link_that_ended_in_the_line(self) -> None:
        """A stranger that leaves the queue is not processed, and one that stays is closed in time."""
        self.flood(MAX_SILENT)
        waiting = [link for link in self.factory.events if link.session.is_open]
        self.assertTrue(all(link.paused for link in waiting))
        for link in waiting:
            self.lose(link)
        judged = len(self.judged)
        self.time.pump([0.05] * 100)
        self.assertEqual(len(self.judged), judged)
        self.flood(MAX_SILENT)
        self.time.pump([0.1] * 51)
        self.assertFalse(any(link.session.is_open for link in self.factory.events))

    def test_strangers_share_a_line_of_the_log(self) -> None:
        """A flood of bad frames causes a few lines, and then one a minute that counts the others."""
        for _ in range(180):
            for body in (b"{", self.check().replace(b"i", b"j")):
                link, _ = self.connect()
                self.send(link, body)
                self.lose(link)
            self.time.advance(1)
        self.assertLessEqual(len(self.lines), TOLD + 180 // PERIOD_S)
        self.assertTrue(all(": refused, " in line for line in self.lines[:TOLD]))
        self.assertIn("more connections ended without a valid frame: ", self.lines[TOLD])
        self.assertRegex(self.lines[TOLD], "[0-9]+ bad_json")
        self.time.pump([PERIOD_S] * 3)
        told = TOLD + sum(int(line.split()[0]) for line in self.lines[TOLD:])
        self.assertEqual(told, 360)
        link, _ = self.connect()
        self.send(link, b"{")
        self.assertIn(": refused, bad_json", self.lines[-1])

    def test_a_probe_leaves_no_line(self) -> None:
        """A peer that connects and disconnects without sending a byte, again and again, has no line."""
        for _ in range(200):
            self.lose(self.connect()[0])
            self.time.advance(1)
        self.assertEqual(self.lines, [])

    def test_half_open_probes_share_a_line(self) -> None:
        """A peer that stays silent until it is closed shares the lines of strangers."""
        for _ in range(20):
            link, _ = self.connect()
            self.time.advance(8)
            self.lose(link)
        self.assertLessEqual(len(self.lines), TOLD + 20 * 8 // PERIOD_S)
        self.assertIn("was not answered in time", self.lines[0])

    def test_an_engine_has_its_lines(self) -> None:
        """The refusals of a peer with a valid key have a few lines of their own, then one a minute."""
        link, _ = self.connect()
        self.send(link, self.check())
        told: dict[str, Any] = {"ts": _NOW, "src": "engine", "dst": "server", "type": "a.b", "body": b"{}"}
        for number in range(2 * MOST_TOLD):
            self.send(link, envelope.seal(**told, id=f"n{number}", key=_KEY))
        self.assertEqual(len([line for line in self.lines if "refused, unsupported_type" in line]), MOST_TOLD)
        self.time.advance(PERIOD_S)
        self.assertIn(f"refused more frames: {MOST_TOLD} unsupported_type", self.lines[-1])


class ProxiedTests(TestCase):
    """Links behind a proxy, over real sockets."""

    def setUp(self) -> None:
        """Listen behind a PROXY header, with room for five silent links."""
        self.patch(factory, "MAX_SILENT", 5)
        clock = Clock(reactor)
        keys: Any = type("Keys", (), {"keyring": Keyring([_KEY])})()
        self.links = ServerLinks(Counters(), clock, lambda _: None)
        made = LinkFactory("server", Dispatcher(keys, {}, clock), keys, clock, self.links)
        self.addCleanup(made.tell_rest)
        self.port = reactor.listenTCP(0, HAProxyWrappingFactory(made), interface="127.0.0.1")
        self.addCleanup(self.port.stopListening)
        self.addCleanup(poll, lambda: not len(self.links), "the links are gone")
        self.addCleanup(self.links.close_all, "the test ends")

    async def connect(self, host: str) -> Any:
        """Connect through the proxy from an address, with the first byte of a frame."""
        before = set(self.links)
        peer = socket.create_connection(("127.0.0.1", self.port.getHost().port), PATIENCE_S)
        self.addCleanup(peer.close)
        peer.sendall(f"PROXY TCP4 {host} 127.0.0.1 5 5\r\n\0".encode())
        return await poll(lambda: [each for each in set(self.links) - before if each.recvd], "its byte is here")

    async def test_an_address_is_the_one_of_the_peer(self) -> None:
        """Behind a proxy a flood of one address closes its own silent links, and none of another address."""
        [engine] = await self.connect("192.0.2.7")
        for _ in range(8):
            await self.connect("192.0.2.1")
        self.assertEqual(engine.network, "192.0.2.7")
        self.assertTrue(engine.session.is_open)
        self.assertEqual(Count(each.network for each in self.links if each.session.is_open)["192.0.2.1"], 4)
