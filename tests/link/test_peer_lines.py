"""The bound on log lines about peers with a valid key, over all of their links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock as FakeClock
from twisted.internet.testing import StringTransport
from twisted.logger import formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from s2s.link import peer_lines
from s2s.link.dispatcher import Dispatcher
from s2s.link.factory import LinkFactory, ServerLinks
from s2s.link.peer_lines import ANSWERS, ENDS, FRAMES, MAX_PEERS, MOST_OF_ALL, PeerLines
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import HEALTH_CHECK
from s2s.protocol.limits import Counters
from s2s.protocol.signing import Key, Keyring, Secret
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, PERIOD_S, TOLD

_NOW = 1_737_990_000
_KEY = Key("k1", Secret(bytes(range(32))), "any", 0.0)
#: Links a second, and seconds.
_RATE, _SECONDS = 20, 180


class _Lines(SynchronousTestCase):
    """A test that collects the lines of the log."""

    def setUp(self) -> None:
        """Collect the lines."""
        self.time = FakeClock()
        self.lines: list[str] = []
        globalLogPublisher.addObserver(self.note)
        self.addCleanup(globalLogPublisher.removeObserver, self.note)

    def note(self, event: Any) -> None:
        """Keep a line that an operator would see."""
        if event["log_level"].name != "debug":
            self.lines.append(str(formatEvent(event)))


class PeerLinesTests(_Lines):
    """:class:`PeerLines`."""

    def setUp(self) -> None:
        """Make a quota."""
        super().setUp()
        self.peer_lines = PeerLines(Clock(self.time))

    def test_one_peer_hides_no_other(self) -> None:
        """A peer has a few lines and the first line of each cause, and takes no line from another peer."""
        told = [self.peer_lines.may_tell("a", ANSWERS, "x: 1") for _ in range(100)]
        self.assertEqual(sum(told), TOLD)
        self.assertTrue(self.peer_lines.may_tell("a", ANSWERS, "y"))
        self.assertTrue(self.peer_lines.may_tell("b", ANSWERS, "x"))
        self.time.advance(PERIOD_S)
        self.assertEqual(self.lines, [f"a: gave more answers that are not valid: {100 - TOLD} x"])

    def test_many_peers(self) -> None:
        """However many peers there are, the log and the memory are bounded, and every event is counted."""
        told = sum(self.peer_lines.may_tell(f"p{number}", FRAMES, "x") for number in range(4 * MAX_PEERS))
        self.assertEqual(told, MOST_OF_ALL)
        self.assertLessEqual(len(self.peer_lines._quotas), 3 * MAX_PEERS)
        for _ in range(3):
            self.time.advance(PERIOD_S)
        self.assertEqual(
            self.lines,
            [
                "further events of peers that hold a key, of many peers: "
                f"{4 * MAX_PEERS - MOST_OF_ALL} times refused more frames"
            ],
        )

    def test_sums_are_bounded_too(self) -> None:
        """The summaries of many peers count as lines, against the same bound."""
        self.patch(peer_lines, "MAX_PEERS", 10)
        for number in range(1000):
            for _ in range(2 * MOST_TOLD):
                self.peer_lines.may_tell(f"p{number}", FRAMES, "x")
        self.time.advance(PERIOD_S)
        self.assertLessEqual(len(self.lines), MOST_OF_ALL + 1)

    def test_stop(self) -> None:
        """At the stop the counts are logged, and no timer is left."""
        for _ in range(2 * MOST_TOLD):
            self.peer_lines.may_tell("a", ENDS, "x")
        self.peer_lines.stop()
        self.assertEqual(self.lines, [f"a: ended more links: {MOST_TOLD} x"])
        self.assertEqual(self.time.getDelayedCalls(), [])


class ReconnectingPeerTests(_Lines):
    """A peer with a key that reconnects again and again, and whose links are never proven."""

    def setUp(self) -> None:
        """Make a server's links."""
        super().setUp()
        self.clock = Clock(self.time, lambda: float(_NOW))
        self.keys: Any = type("Keys", (), {"keyring": Keyring([_KEY])})()
        links = ServerLinks(Counters(), self.clock, lambda _: None)
        self.factory = LinkFactory("server", Dispatcher(self.keys, {}, self.clock), self.keys, self.clock, links)
        self.number = 0

    def say(self, link: Any, **changes: Any) -> None:
        """Send a frame of the peer: a health check, unless it is changed."""
        self.number += 1
        told: dict[str, Any] = {"id": f"i{self.number}", "ts": _NOW, "src": "engine", "dst": "server"}
        frame = envelope.seal(**{**told, "type": HEALTH_CHECK, "body": b"{}", "key": _KEY, **changes})
        link.dataReceived(len(frame).to_bytes(4, "big") + frame)

    def refuse(self, link: Any) -> None:
        """Refuse the challenge of the server."""
        challenge = link.transport.value()[4:]
        body = canonical.dumps({"code": "forbidden", "message": "no", "details": {"retryable": False}})
        self.say(link, type="s2s.error", body=body, ack_of=canonical.parse(challenge)["id"])

    def reconnect(self, *acts: Callable[[Any], None]) -> None:
        """Let the peer connect many times a second, act each time in one of these ways, and disconnect."""
        for number in range(_RATE * _SECONDS):
            link, transport = self.factory.buildProtocol(None), StringTransport(IPv4Address("TCP", "192.0.2.1", 5))
            transport.peerAddr = IPv4Address("TCP", "192.0.2.1", number)
            link.makeConnection(transport)
            acts[number % len(acts)](link)
            link.connectionLost(Failure(ConnectionDone()))
            self.time.advance(1 / _RATE)

    def assert_bounded(self, *causes: str) -> None:
        """Assert that a few lines have these causes, and each further minute one line for each kind of event."""
        for cause in causes:
            self.assertTrue([line for line in self.lines if cause in line], (cause, self.lines[:9]))
        self.assertLessEqual(len(self.lines), 2 * (MOST_TOLD + len(causes)) + 2 * _SECONDS // PERIOD_S)
        self.factory.tell_rest()
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_ts_in_milliseconds(self) -> None:
        """A peer whose ts is in milliseconds has its first lines in full, then one a minute with counts."""
        self.reconnect(lambda link: self.say(link, ts=_NOW * 1000))
        self.assert_bounded("refused, ts_skew: 'ts is ", "refused more frames: ", "ended more links: ")
        self.assertRegex(self.lines[-1], r"the key k1 from 192\.0\.2\.1: .* [0-9]{3,}")

    def test_bad_envelopes(self) -> None:
        """A peer with ill-formed ids, and one that sends to the wrong role, have the same bound."""
        self.reconnect(lambda link: self.say(link, id="bad id!"), lambda link: self.say(link, dst="engine"))
        self.assert_bounded("refused, bad_envelope", "refused, forbidden")

    def test_refused_challenge(self) -> None:
        """A peer that refuses our health check has the same bound."""
        self.reconnect(self.refuse)
        self.assert_bounded("closed: our health check failed: forbidden: no", "ended more links: ")

    def test_many_refusals_on_each_link(self) -> None:
        """A new link does not reset the count of refused frames."""

        def act(link: Any) -> None:
            for _ in range(5):
                self.say(link, type="a.b")

        self.reconnect(act)
        self.assert_bounded("refused, unsupported_type")

    def test_no_key_of_ours(self) -> None:
        """A server that cannot sign logs that a few times, and not for each stranger that connects."""
        self.keys.keyring = Keyring([])
        self.reconnect(lambda _: None)
        self.assertLessEqual(len(self.lines), MOST_TOLD + _SECONDS // PERIOD_S)

    def test_an_engine(self) -> None:
        """An engine whose server refuses each link has the same bound."""
        role: Any = "engine"
        events: Any = type("Events", (), {"link_made": lambda *_: None, "link_lost": lambda *_: None})()
        self.factory = LinkFactory(role, Dispatcher(self.keys, {}, self.clock), self.keys, self.clock, events)
        self.reconnect(lambda link: self.say(link, src="server", dst="engine", type="a.b"))
        self.assert_bounded("refused, unsupported_type")
