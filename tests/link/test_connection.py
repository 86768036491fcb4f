"""One link on a transport: frames, proof, calls, responders, backpressure, closing. No socket, no real time."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock as FakeClock
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.test import iosim
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import (
    BadPayload,
    BadReply,
    CanonicalError,
    DeadlinePassed,
    Forbidden,
    InvalidPayload,
    LineFull,
    LinkLost,
    Overloaded,
    Refused,
    TooBigToSend,
)
from s2s.link.connection import Link
from s2s.link.dispatcher import Dispatcher
from s2s.link.peer_lines import PeerLines
from s2s.link.strangers import Strangers
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import COMMAND_PUSH, HEALTH_ACK, HEALTH_CHECK, SWEEP
from s2s.protocol.limits import Bounds, Counters, Timing
from s2s.protocol.received import Request
from s2s.protocol.replay import ReplayCache
from s2s.protocol.session import Session, State
from s2s.protocol.signing import Key, Keyring, Role, Secret
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import PERIOD_S, TOLD
from s2s.store.refresher import Refresher
from tests.support.descriptor import Descriptor
from tests.support.installed import CATALOGUE

_NOW = 1_737_990_000
_SECRET = b"not-to-be-seen-0123456789abcdefg"
_KEY = Key("k1", Secret(_SECRET), "any", 0.0)
_STRANGER = Key("stranger", Secret(b"x" * 32), "any", 0.0)
_HEALTH = {"role": "engine", "version": "1", "uptime_s": 1}
_ACK = {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"}


class _Keys:
    """A KeySource whose reads end when the test ends them.

    :ivar reads: the reads under way.
    """

    def __init__(self, *keys: Key) -> None:
        self.keyring = Keyring(keys)
        self.reads: list[Deferred[None]] = []

    def refresh(self) -> Deferred[None]:
        """Start a read."""
        self.reads.append(Deferred())
        return self.reads[-1]

    def end_read(self, *keys: Key) -> None:
        """End the oldest read with these keys."""
        self.keyring = Keyring(keys)
        self.reads.pop(0).callback(None)


class _Events:
    """Events that record every callback and its link."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.on_made: Callable[[Link], object] = lambda link: None

    def link_made(self, link: Link) -> None:
        self.happened.append("made")
        self.on_made(link)

    def link_proven(self, link: Link) -> None:
        self.happened.append("proven")

    def link_lost(self, link: Link) -> None:
        self.happened.append("lost")


def _prefixed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def _split(written: bytes) -> list[dict[str, Any]]:
    """Parse the frames that a link wrote."""
    frames = []
    while written:
        size = int.from_bytes(written[:4], "big")
        assert len(written) >= 4 + size, "half a frame was written"
        frames.append(json.loads(written[4 : 4 + size]))
        written = written[4 + size :]
    return frames


def _push(key: str = "k", **content: Any) -> dict[str, Any]:
    return {"cmd_type": "a.b", "idem_key": key, "payload": content}


class LinkTestCase(SynchronousTestCase):
    """A link under test on a string transport; the test acts as the peer."""

    role: Role = "server"
    bounds = Bounds()

    def setUp(self) -> None:
        """Connect, and remove the challenge from the written frames."""
        self.time = FakeClock()
        self.keys = _Keys(_KEY)
        self.events = _Events()
        self.counters = Counters()
        self.served: list[Request] = []
        self.answers: list[Deferred[Any]] = []
        self.respond: Callable[[Request], Any] = self.respond_later
        self.link = self.make_link(self.role)
        self.transport = StringTransport()
        self.number = 0
        self.link.makeConnection(self.transport)
        self.challenge, *rest = self.written()
        self.assertEqual(rest, [])

    def make_link(self, role: Role) -> Link:
        """Make a link that serves every type that its role may receive."""
        clock = Clock(self.time, lambda: _NOW + self.time.seconds())
        responders = {
            message.name: self.serve for message in CATALOGUE.values() if envelope.other(role) in message.sent_by
        } | {HEALTH_CHECK: lambda request: {**_HEALTH, "role": role}}
        session = Session(role, ReplayCache(0.0), Timing(), self.bounds, self.time.seconds(), CATALOGUE)
        dispatcher = Dispatcher(self.keys, responders, clock)
        strangers = Strangers(clock, self.counters)
        lines = PeerLines(clock)
        return Link(session, dispatcher, self.keys, clock, self.events, self.counters, strangers, lines)

    def serve(self, request: Request) -> Any:
        """Record the request, and answer as the test wants."""
        self.served.append(request)
        return self.respond(request)

    def respond_later(self, request: Request) -> Deferred[Any]:
        """Answer when the test fires the Deferred."""
        self.answers.append(Deferred())
        return self.answers[-1]

    # --- the peer ---

    def written(self) -> list[dict[str, Any]]:
        """Return the frames that were written since the last call."""
        frames = _split(self.transport.value())
        self.transport.clear()
        return frames

    def frame(self, type: str, payload: Any = None, *, key: Key | None = _KEY, **changes: Any) -> bytes:
        """Return a frame of the peer."""
        self.number += 1
        told = {"id": f"p{self.number}", "ts": int(_NOW + self.time.seconds()), "dst": self.role, "ack_of": None}
        told |= {"src": envelope.other(self.role), **changes}
        return envelope.seal(type=type, body=canonical.dumps({} if payload is None else payload), key=key, **told)

    def deliver(self, *frames: bytes) -> None:
        """Deliver frames in one chunk."""
        self.link.dataReceived(_prefixed(*frames))

    def say(self, type: str, payload: Any = None, **more: Any) -> None:
        """Deliver one frame."""
        self.deliver(self.frame(type, payload, **more))

    def prove(self, **said: Any) -> None:
        """Answer the challenge."""
        self.say(HEALTH_ACK, {**_HEALTH, **said}, ack_of=self.challenge["id"])

    def lose(self) -> None:
        """End the connection."""
        self.link.connectionLost(Failure(ConnectionDone()))

    # --- checks ---

    def error_codes(self) -> list[str]:
        """Return the codes of the errors written since the last call."""
        return [each["payload"]["code"] for each in self.written() if each["type"] == "s2s.error"]

    def assert_closed(self, why: str = "") -> None:
        """Assert that the link is closing and reads no more."""
        self.assertIs(self.link.session.state, State.CLOSING)
        self.assertTrue(self.transport.disconnecting)
        self.assertIn(why, self.link.close_reason.text)
        served, written = len(self.served), self.transport.value()
        self.say(HEALTH_CHECK)
        self.assertEqual((len(self.served), self.transport.value()), (served, written))

    def assert_open(self) -> None:
        """Assert that the link serves a request."""
        self.assertFalse(self.transport.disconnecting)
        self.written()
        self.say(HEALTH_CHECK)
        self.assertEqual([each["type"] for each in self.written()], [HEALTH_ACK])


class FramingTests(LinkTestCase):
    """Lengths and chunks."""

    def idem_keys(self) -> list[str]:
        """Return the idem_keys of the served requests, in order."""
        return [request.payload["idem_key"] for request in self.served]

    def frames(self, count: int) -> list[bytes]:
        """Return pushes with the keys 0, 1, 2 and so on."""
        return [self.frame(COMMAND_PUSH, _push(str(at))) for at in range(count)]

    def test_whole(self) -> None:
        """A frame in one chunk is served once."""
        self.deliver(*self.frames(1))
        self.assertEqual(self.idem_keys(), ["0"])

    def test_byte_by_byte(self) -> None:
        """Frames that arrive one byte at a time are served when their last byte arrives."""
        stream = _prefixed(*self.frames(3))
        for at in range(len(stream) - 1):
            self.link.dataReceived(stream[at : at + 1])
        self.assertEqual(self.idem_keys(), ["0", "1"])
        self.link.dataReceived(stream[-1:])
        self.assertEqual(self.idem_keys(), ["0", "1", "2"])

    def test_any_chunks(self) -> None:
        """However a stream is split into chunks, its frames are served once and in order."""
        frames = self.frames(60)
        stream = _prefixed(*frames)
        ends = list(itertools.accumulate(4 + len(frame) for frame in frames))
        rng, at = random.Random(1), 0
        while at < len(stream):
            # Also split at the end of a frame, because a frame that is a whole chunk bypasses the buffer.
            to = rng.choice(
                [end for end in ends if end > at][:1] * 4 + [at + size for size in (1, 2, 3, 5, 50, 400, 1500)]
            )
            self.link.dataReceived(stream[at:to])
            at = to
        self.assertEqual(self.idem_keys(), [str(number) for number in range(60)])

    def test_trailing_frames(self) -> None:
        """A chunk of two whole frames and half a third serves two, and the third is served when it is complete."""
        stream = _prefixed(*self.frames(3))
        self.link.dataReceived(stream[:-100])
        self.assertEqual(self.idem_keys(), ["0", "1"])
        self.link.dataReceived(stream[-100:])
        self.assertEqual(self.idem_keys(), ["0", "1", "2"])

    def test_a_whole_frame_while_paused(self) -> None:
        """Bytes that arrive while reading is paused wait until it resumes, also if they are one whole frame."""
        self.link.pauseProducing()
        for frame in self.frames(2):
            self.deliver(frame)
        self.assertEqual(self.idem_keys(), [])
        self.link.resumeProducing()
        self.assertEqual(self.idem_keys(), ["0", "1"])

    def test_a_whole_frame_inside_another(self) -> None:
        """A chunk that looks like a whole frame is not one if it is the rest of another frame."""
        within = _prefixed(*self.frames(1))
        self.link.dataReceived(len(within).to_bytes(4, "big"))
        self.link.dataReceived(within)
        self.assertEqual((self.idem_keys(), self.error_codes()), ([], ["bad_json"]))

    def test_the_limit(self) -> None:
        """A body of exactly the limit is served, also if white space pads it."""
        (frame,) = self.frames(1)
        self.deliver(frame + b" " * (self.bounds.frame_size - len(frame)))
        self.assertEqual(self.idem_keys(), ["0"])

    def test_over_the_limit(self) -> None:
        """A longer frame is refused unsigned after its four length bytes, and the link is closed."""
        too_long = self.bounds.frame_size + 1
        for length, body in ((too_long, b""), (too_long, b" " * too_long), (2**31, b""), (2**32 - 1, b"")):
            self.setUp()
            self.link.dataReceived(length.to_bytes(4, "big") + body)
            (error,) = self.written()
            self.assertEqual(error["payload"]["code"], "toolarge")
            self.assertEqual(error["payload"]["details"], {"retryable": False, "limit": 65536})
            self.assertNotIn("auth", error)
            self.assertNotIn("ack_of", error)
            self.assert_closed("toolarge")
            self.assertEqual(self.counters.met, {"frame_size": 1})

    def test_length_zero(self) -> None:
        """A length of 0 is bad_json with the rule syntax, and closes the link."""
        self.link.dataReceived(bytes(4))
        (error,) = self.written()
        self.assertEqual((error["payload"]["code"], error["payload"]["details"]["rule"]), ("bad_json", "syntax"))
        self.assert_closed("bad_json")

    def test_nothing_behind_a_bad_frame(self) -> None:
        """Frames after one that closes the link are ignored, in any chunk, and earlier frames are not served twice."""
        for bad, code in (
            (lambda: _prefixed(b"{}x"), "bad_json"),
            (lambda: _prefixed(b'{"a":1}'), "auth_required"),
            (lambda: _prefixed(self.frame(COMMAND_PUSH, _push()).replace(b'"a.b"', b'"a.c"')), "auth_bad"),
            (lambda: _prefixed(self.frame(COMMAND_PUSH, _push(), dst="engine")), "forbidden"),
            (lambda: _prefixed(*[self.frame(HEALTH_CHECK, id="twice")] * 2), "replay"),
            (lambda: b"\xff\xff\xff\xff", "toolarge"),
            (lambda: bytes(4), "bad_json"),
        ):
            self.setUp()
            before, after = self.frames(2)
            self.link.dataReceived(_prefixed(before) + bad() + _prefixed(after))
            with self.subTest(code=code):
                self.assertEqual(self.idem_keys(), ["0"])
                self.assertEqual(self.error_codes(), [code])
                self.deliver(after)
                self.link.dataReceived(b"\0" * 10)
                self.time.advance(1)
                self.assertEqual((self.idem_keys(), self.written()), (["0"], []))

    def test_a_frame_that_takes_too_long(self) -> None:
        """A frame that is incomplete 10 s after its first byte closes the link, and the next reconnect is fast."""
        self.prove()
        (frame,) = self.frames(1)
        stream = _prefixed(frame)
        for at in range(10):
            self.link.dataReceived(stream[at : at + 1])
            self.time.advance(0.999)
        self.assertFalse(self.transport.disconnecting)
        self.time.advance(0.1)
        self.assert_closed("too long")
        self.assertEqual(self.link.close_reason.backoff_class, "fast")
        self.assertEqual(self.counters.met, {"frame": 1})

    def test_refusals_are_counted(self) -> None:
        """Error codes sent, and frames in either direction, are counted."""
        self.say(COMMAND_PUSH, {})
        self.say("moon.landing")
        self.say("moon.landing")
        self.assertEqual(self.counters.errors_out, {"bad_payload": 1, "unsupported_type": 2})
        self.assertEqual((self.counters.frames_in, self.counters.frames_out), (3, 4))
        self.assert_open()


class ProofTests(LinkTestCase):
    """The challenge and the proof."""

    role: Role = "engine"

    def test_the_challenge(self) -> None:
        """On connect one signed health check is sent at once."""
        said = {name: self.challenge[name] for name in ("type", "src", "dst", "payload", "v", "ts")}
        self.assertEqual(
            said, {"type": HEALTH_CHECK, "src": "engine", "dst": "server", "payload": {}, "v": 1, "ts": _NOW}
        )
        self.assertEqual(self.challenge["auth"]["key_id"], "k1")

    def test_nobody_can_foresee_it(self) -> None:
        """The ids of the challenge and of later health checks cannot be predicted from other ids."""
        with mock.patch.object(envelope, "unguessable_id", lambda ms: f"nobody-knows-{ms}"):
            link = self.make_link(self.role)
            transport = StringTransport()
            link.makeConnection(transport)
        self.assertIn(b'"id":"nobody-knows-%d"' % (_NOW * 1000), transport.value())

    def test_a_mute_port(self) -> None:
        """The reason names a wrong port if an engine received no byte, and does not if it received some bytes."""
        self.time.advance(self.link.session.timing.proof)
        self.assert_closed("was not answered in time: nothing came at all: see whether this is the port on which")
        for some, told in (
            (b"", "no valid frame came: nothing came at all: see whether"),
            (b"\0\0", "no valid frame came"),
        ):
            link = self.make_link(self.role)
            # The link is slightly older than its health check.
            self.time.advance(0.1)
            link.makeConnection(StringTransport())
            link.dataReceived(some)
            self.time.advance(link.session.timing.proof - 0.1)
            self.assertTrue(link.close_reason.text.startswith(told), link.close_reason.text)
            self.assertEqual("see whether" in link.close_reason.text, not some)

    def test_another_protocol(self) -> None:
        """First bytes of another protocol are logged with the protocol's name; a frame that is too long is not."""
        for first, told in (
            (b"HTTP/1.1 400 Bad Request\r\n", ": it begins with b'HTTP' and speaks HTTP: see whether this is the port"),
            (b"\x15\x03\x03\x00\x02\x02\x0a", " and speaks TLS: see whether this is the port"),
            (b"SSH-2.0-x\r\n", ": it begins with b'SSH-' and speaks another protocol: see whether this is the port"),
            (b"\0\xff\xff\xff", None),
        ):
            with self.subTest(first=first), capturedLogs() as logs:
                link = self.make_link(self.role)
                link.makeConnection(StringTransport())
                link.dataReceived(first)
            (line,) = (event["log_format"].format(**event) for event in logs)
            self.assertIn("refused, toolarge", line)
            self.assertIn(told or "", line)
            self.assertEqual("speaks" in line, told is not None)

    def test_answered(self) -> None:
        """The answer proves the link once, and identifies the peer."""
        self.assertEqual(self.events.happened, ["made"])
        self.prove(name="s1", role="server", frame_size_limit=8192)
        self.assertEqual(self.events.happened, ["made", "proven"])
        self.assertEqual(self.link.peer["name"], "s1")
        self.assertEqual(self.link.session.max_frame, 8192)
        self.assertIs(self.link.session.state, State.PROVEN)
        self.assertIn("s1", str(self.link))

    def test_what_is_kept_of_a_peer(self) -> None:
        """Only the members of the health ack that its schema names are kept, however long the others are."""
        self.prove(name="s1", notes="x" * 40_000)
        self.assertEqual(self.link.peer, {**_HEALTH, "name": "s1"})

    def test_unsupported_type_proves_too(self) -> None:
        """A signed unsupported_type also answers the challenge, and leaves the peer's identity unknown."""
        payload = {"code": "unsupported_type", "message": "m", "details": {}}
        self.say("s2s.error", payload, ack_of=self.challenge["id"])
        self.assertEqual(self.events.happened, ["made", "proven"])
        self.assertEqual(self.link.peer, {})
        self.assertEqual(self.link.close_reason.backoff_class, "fast")
        self.time.advance(6)
        self.assert_open()

    def test_refused(self) -> None:
        """Any other signed error in answer closes the link and makes the reconnect slow."""
        for code in ("forbidden", "ts_skew", "overloaded", "made_up"):
            self.setUp()
            payload = {"code": code, "message": "m", "details": {}}
            self.say("s2s.error", payload, ack_of=self.challenge["id"])
            self.assert_closed()
            self.assertEqual(self.link.close_reason.backoff_class, "slow")
            self.assertNotIn("proven", self.events.happened)

    def test_answered_by_nonsense(self) -> None:
        """An answer of another type, or with an invalid payload, is no proof and closes the link."""
        for type, payload in (("s2s.ack", {}), (HEALTH_ACK, {"role": "moon"}), (HEALTH_ACK, {**_HEALTH, "name": ""})):
            self.setUp()
            self.say(type, payload, ack_of=self.challenge["id"])
            self.assert_closed()
            self.assertEqual(self.link.close_reason.backoff_class, "slow")
            self.assertNotIn("proven", self.events.happened)

    def test_not_answered(self) -> None:
        """Without an answer the link closes after 5 s, whatever else arrived, and the reconnect is slow."""
        for chatter in (False, True):
            self.setUp()
            self.time.advance(4.9)
            if chatter:
                self.say(HEALTH_CHECK)
                self.say(HEALTH_ACK, _HEALTH, ack_of="another")
                self.say(HEALTH_ACK, _HEALTH)
            self.assertFalse(self.transport.disconnecting)
            self.time.advance(0.2)
            self.assert_closed()
            self.assertEqual(self.link.close_reason.backoff_class, "slow")
            self.assertEqual(self.counters.met["proof"] + self.counters.met["call"], 1)

    def test_an_unsigned_error_answers_nothing(self) -> None:
        """An unsigned error that names the challenge neither proves nor refuses the link."""
        payload = {"code": "unsupported_type", "message": "m", "details": {}}
        self.say("s2s.error", payload, ack_of=self.challenge["id"], key=None)
        self.assertEqual(self.events.happened, ["made"])
        self.assertEqual(self.link.close_reason.backoff_class, "slow")
        self.prove()
        self.assertEqual(self.events.happened, ["made", "proven"])
        self.assertEqual(self.link.close_reason.backoff_class, "fast")

    def test_control_before_the_proof(self) -> None:
        """A sweep is not_ready before the proof and is served on the same link after the proof."""
        self.say(SWEEP, {"since_ts": 0})
        (error,) = self.written()
        self.assertEqual((error["payload"]["code"], error["ack_of"]), ("not_ready", "p1"))
        self.prove()
        self.say(SWEEP, {"since_ts": 0})
        self.assertEqual(len(self.served), 1)

    def test_control_older_than_the_proof(self) -> None:
        """A sweep that was recorded before this link is a replay and closes the link."""
        self.time.advance(2)
        self.prove()
        self.say(SWEEP, {"since_ts": 0}, ts=_NOW + 1)
        self.assertEqual((self.error_codes(), self.served), (["replay"], []))
        self.assert_closed("replay")

    def test_third_skew_closes(self) -> None:
        """Two stale requests leave the link open, and the third is answered and closes it."""
        self.prove()
        for _ in range(2):
            self.say(SWEEP, {"since_ts": 0}, ts=_NOW - 301)
            self.assertFalse(self.transport.disconnecting)
        self.say(SWEEP, {"since_ts": 0}, ts=_NOW - 301)
        self.assertEqual(self.error_codes(), ["ts_skew"] * 3)
        self.assert_closed("ts_skew")
        self.assertEqual(self.counters.met, {"ts_skew": 1})

    def test_closed_as_it_is_made(self) -> None:
        """A link that is closed as it is made sends no challenge."""
        self.events.on_made = lambda link: link.close("too many")
        link, transport = self.make_link("server"), StringTransport()
        link.makeConnection(transport)
        self.assertEqual((transport.value(), transport.disconnecting), (b"", True))

    def test_our_own_frames_sent_back(self) -> None:
        """Our own challenge that a mirror sends back is forbidden."""
        self.deliver(canonical.dumps(self.challenge))
        (error,) = self.written()
        self.assertEqual((error["payload"]["code"], error["ack_of"]), ("forbidden", self.challenge["id"]))
        self.assert_closed("forbidden")


class SilenceTests(LinkTestCase):
    """Health checks after silence."""

    def setUp(self) -> None:
        """Prove the link."""
        super().setUp()
        self.prove()

    def advance(self, seconds: float) -> list[str]:
        """Advance time in small steps, and return the types of the written frames."""
        for _ in range(round(seconds * 10)):
            self.time.advance(0.1)
        return [each["type"] for each in self.written()]

    def test_a_check_on_silence(self) -> None:
        """After 10 s without a frame one health check is sent; after its answer the next is sent 10 s later."""
        self.assertEqual(self.advance(9.9), [])
        self.time.advance(0.2)
        (check,) = self.written()
        self.assertEqual(check["type"], HEALTH_CHECK)
        self.say(HEALTH_ACK, _HEALTH, ack_of=check["id"])
        self.assertEqual(self.advance(9.8), [])
        self.assertEqual(self.advance(0.4), [HEALTH_CHECK])
        self.assertEqual(self.events.happened, ["made", "proven"])

    def test_three_unanswered(self) -> None:
        """Three checks are sent one after the other, 3 s each, then the link is aborted: in under 35 s."""
        self.assertEqual(self.advance(18.5), [HEALTH_CHECK] * 3)
        self.assertFalse(self.transport.disconnected)
        self.advance(1)
        self.assertTrue(self.transport.disconnected)
        self.assertIn("3 health checks", self.link.close_reason.text)
        self.assertEqual(self.link.close_reason.backoff_class, "fast")
        self.assertEqual(self.counters.met, {"call": 3, "silence": 1})

    def test_any_frame_ends_silence(self) -> None:
        """A peer that sends any valid frame in between is not closed."""
        for _ in range(10):
            self.advance(8)
            self.say(COMMAND_PUSH, {})
            self.assertEqual([each["type"] for each in self.written()], ["s2s.error"])
        self.assert_open()

    def test_a_frame_ends_the_round_of_checks(self) -> None:
        """After a valid frame, a peer that left checks unanswered is checked again only after 10 s of silence."""
        self.assertEqual(self.advance(17), [HEALTH_CHECK] * 3)
        self.say(HEALTH_ACK, _HEALTH, ack_of="another")
        self.assertEqual(self.advance(9.5), [])
        self.assert_open()

    def test_a_refused_check_is_an_answer(self) -> None:
        """Any signed error that answers a check shows that the peer is alive."""
        self.advance(10.1)
        for _ in range(3):
            (check,) = self.link.session.calls._pending.values()
            payload = {"code": "overloaded", "message": "m", "details": {}}
            self.say("s2s.error", payload, ack_of=check.id)
            self.advance(10.1)
        self.assertFalse(self.transport.disconnecting)


class CallTests(LinkTestCase):
    """Our requests."""

    role: Role = "engine"
    bounds = Bounds(window_frames=3, line_calls=4)

    def setUp(self) -> None:
        """Prove the link."""
        super().setUp()
        self.prove()

    def push(self, key: str = "k", **more: Any) -> tuple[Deferred[Any], str]:
        """Push a command, and return the call and the id of its frame."""
        call = self.link.call(COMMAND_PUSH, _push(key), **more)
        (frame,) = self.written()
        return call, frame["id"]

    def test_answered(self) -> None:
        """A call sends one signed request and returns the payload of its reply, including unknown members."""
        call = self.link.call(COMMAND_PUSH, _push("k", n=1))
        (frame,) = self.written()
        self.assertEqual((frame["type"], frame["payload"]), (COMMAND_PUSH, _push("k", n=1)))
        self.assertNotIn("ack_of", frame)
        self.assertNoResult(call)
        self.say("s2s.ack", {**_ACK, "news": [1]}, ack_of=frame["id"])
        self.assertEqual(self.successResultOf(call), {**_ACK, "news": [1]})

    def test_any_order(self) -> None:
        """Replies may arrive in any order, and each settles its own call."""
        calls = [self.push(str(at)) for at in range(3)]
        for at in (2, 0, 1):
            self.say("s2s.ack", {**_ACK, "cmd_id": at + 1}, ack_of=calls[at][1])
        self.assertEqual([self.successResultOf(call)["cmd_id"] for call, _ in calls], [1, 2, 3])

    def test_ids_are_new(self) -> None:
        """Every transmission has its own id, and ts never decreases."""
        ids = {self.push()[1] for _ in range(3)}
        self.assertEqual(len(ids), 3)

    def test_the_ts_of_a_reply_is_not_checked(self) -> None:
        """A reply may have any ts."""
        call, message_id = self.push()
        self.say("s2s.ack", _ACK, ack_of=message_id, ts=5)
        self.successResultOf(call)

    def test_refused(self) -> None:
        """A signed error fails the call with its code, message and details; the link stays open."""
        call, message_id = self.push()
        self.say("s2s.error", {"code": "paused", "message": "m", "details": {"retry_after_ms": 5}}, ack_of=message_id)
        error = self.failureResultOf(call, Refused).value
        self.assertEqual((error.code, error.retryable, error.retry_after_ms), ("paused", True, 5))
        self.assert_open()
        self.assertEqual(self.link.close_reason.backoff_class, "fast")

    def test_codes_for_a_slow_reconnect(self) -> None:
        """After forbidden and ts_skew a reconnect is slow."""
        for code in ("forbidden", "ts_skew"):
            self.link.close_reason.backoff_class = "fast"
            call, message_id = self.push()
            self.say("s2s.error", {"code": code, "message": "m", "details": {}}, ack_of=message_id)
            self.failureResultOf(call, Refused)
            self.assertEqual(self.link.close_reason.backoff_class, "slow")

    def test_bad_replies(self) -> None:
        """A reply of the wrong type, or with an invalid payload, fails the call; the link stays open."""
        for type, payload in (
            (HEALTH_ACK, _HEALTH),
            (COMMAND_PUSH, _push()),
            ("moon.ack", _ACK),
            ("s2s.ack", {}),
            ("s2s.ack", {**_ACK, "accepted": False}),
            ("s2s.ack", {**_ACK, "cmd_id": True}),
            ("s2s.error", {}),
            ("s2s.error", {"code": "Bad Code", "message": "m", "details": {}}),
        ):
            with self.subTest(type=type, payload=payload):
                call, message_id = self.push()
                with capturedLogs() as logs:
                    self.say(type, payload, ack_of=message_id)
                self.failureResultOf(call, BadReply)
                self.assert_open()
                told = [formatEvent(event) for event in logs if "its answer is not valid" in event["log_format"]]
                # Further ones are only counted.
                self.assertTrue(told == [] or "s2s.command.push was answered by " in str(told[0]), told)

    def test_bad_replies_are_told(self) -> None:
        """An invalid answer to any request has a line with its path and the reason; many answers share one line."""
        asked: tuple[tuple[str, dict[str, Any], dict[str, Any], str], ...] = (
            (COMMAND_PUSH, _push(), {**_ACK, "cmd_id": "1"}, "/payload/cmd_id: must satisfy type"),
            (HEALTH_CHECK, {}, {"version": "1", "uptime_s": 1}, "/payload/role: the member is required"),
            (SWEEP, {"since_ts": 0}, {"ok": True, "since_ts": 0, "queued": -1}, "/payload/queued: must satisfy"),
            ("s2s.config.bump", {"version": 2}, {"ok": True}, "/payload/version: the member is required"),
            ("s2s.engine.pause", {"reason": "x"}, {"ok": True, "state": 7}, "/payload/state: must satisfy type"),
            ("s2s.engine.resume", {"reason": "x"}, {}, "the member is required"),
            ("s2s.engine.shutdown", {"reason": "x", "grace_ms": 1}, {}, "the member is required"),
            (
                "world.set_sector_status.v1",
                {"order_id": "a", "sector_id": 1, "status": "neutral"},
                {"ok": True, "order_id": "a", "status": "begun", "result": None},
                "/payload/status: must satisfy enum",
            ),
        )
        for type, payload, answer, why in asked:
            with self.subTest(type=type), capturedLogs() as logs:
                call = self.link.call(type, payload)
                [frame] = self.written()
                reply = HEALTH_ACK if type == HEALTH_CHECK else "s2s.ack"
                self.say(reply, answer, ack_of=frame["id"])
                error = self.failureResultOf(call, BadReply).value
                [line] = [str(formatEvent(event)) for event in logs]
                self.assertIn(f"its answer is not valid: {type} was answered by {reply} with a bad payload: at ", line)
                self.assertIn(why, line)
                self.assertIn(str(error), line)

    def test_a_bad_reply_of_control_characters(self) -> None:
        """Member names of a peer reach the log without control characters."""
        call, message_id = self.push()
        with capturedLogs() as logs:
            self.say("s2s.error", {"code": "paused", "message": "m", "details": {"limit": "x"}}, ack_of=message_id)
            self.say("\x1b[31m", {}, ack_of="nothing")
        self.failureResultOf(call, BadReply)
        self.assertNotIn("\x1b", "".join(str(formatEvent(event)) for event in logs))

    def test_answers_that_nobody_awaits(self) -> None:
        """An answer without ack_of has a line that names the cause, and many answers that no call awaits share one."""
        with capturedLogs() as logs:
            for _ in range(50):
                self.say("s2s.ack", _ACK)
            self.time.advance(PERIOD_S)
        lines = [str(formatEvent(event)) for event in logs]
        self.assertIn("dropped an answer that nobody awaits: its s2s.ack has no ack_of", lines[0])
        self.assertEqual(len(lines), TOLD + 1, lines)

    def test_replies_nobody_asked_for(self) -> None:
        """A reply that no call awaits, or a second reply, is counted and dropped, and the link stays open."""
        call, message_id = self.push()
        self.say("s2s.ack", _ACK, ack_of="nothing")
        self.say("s2s.ack", _ACK)
        self.say("s2s.error", {"code": "paused", "message": "m", "details": {}}, ack_of="nothing")
        self.assertNoResult(call)
        self.say("s2s.ack", _ACK, ack_of=message_id)
        self.say("s2s.ack", {**_ACK, "cmd_id": 2}, ack_of=message_id)
        self.assertEqual(self.successResultOf(call)["cmd_id"], 1)
        self.assertEqual((self.counters.orphan_replies, self.written()), (4, []))
        self.assert_open()

    def test_an_unsigned_ack(self) -> None:
        """An unsigned ack for a pending request is not a success: it is auth_required, and closes the link."""
        call, message_id = self.push()
        self.say("s2s.ack", _ACK, ack_of=message_id, key=None)
        self.failureResultOf(call, LinkLost)
        self.assertEqual(self.error_codes(), ["auth_required"])
        self.assert_closed()

    def test_a_wrongly_signed_ack(self) -> None:
        """An ack signed by an unknown key is not a success either."""
        call, message_id = self.push()
        forged = Key("k1", Secret(b"f" * 32), "any", 0.0)
        self.say("s2s.ack", _ACK, ack_of=message_id, key=forged)
        self.failureResultOf(call, LinkLost)
        self.assertEqual(self.error_codes(), ["auth_bad"])

    def test_unsigned_errors(self) -> None:
        """One unsigned error only makes the reconnect slow; the second closes the link; neither is answered."""
        call, message_id = self.push()
        said = {"code": "idem_conflict", "message": "m", "details": {}}
        self.say("s2s.error", said, ack_of=message_id, key=None)
        self.assertNoResult(call)
        self.assertEqual(self.link.close_reason.backoff_class, "slow")
        self.assertEqual((self.counters.unsigned_errors, self.written()), (1, []))
        self.deliver(b'{"type":"s2s.error","payload":7}')
        self.assertEqual((self.counters.unsigned_errors, self.written()), (2, []))
        self.failureResultOf(call, LinkLost)
        self.assert_closed("unsigned")
        self.assertEqual(self.counters.met, {"unsigned_errors": 1})

    def test_an_unsigned_auth_bad(self) -> None:
        """An unsigned auth_bad is logged with our key and the remedy."""
        with capturedLogs() as logs:
            self.say("s2s.error", {"code": "auth_bad", "message": "m", "details": {}}, key=None)
        (line,) = (event["log_format"].format(**event) for event in logs)
        self.assertIn("with the code 'auth_bad': it does not accept our key k1; both sides need one key", line)

    def test_deadline(self) -> None:
        """After 3 s, or the caller's timeout, a call fails with an unknown outcome, and its late reply is dropped."""
        call, message_id = self.push()
        short, _ = self.push(timeout=0.5)
        self.time.advance(0.5)
        self.failureResultOf(short, DeadlinePassed)
        self.time.advance(2.4)
        self.assertNoResult(call)
        self.time.advance(0.2)
        self.failureResultOf(call, DeadlinePassed)
        self.say("s2s.ack", _ACK, ack_of=message_id)
        self.assertEqual((self.counters.orphan_replies, self.counters.met), (1, {"call": 2}))
        self.assert_open()

    def test_window(self) -> None:
        """With the window full calls are queued, and one is sent, in order, for each call that ends."""
        flying = [self.push(str(at)) for at in range(3)]
        waiting = [self.link.call(COMMAND_PUSH, _push(str(at))) for at in range(3, 6)]
        self.assertEqual(self.written(), [])
        self.say("s2s.ack", _ACK, ack_of=flying[1][1])
        self.say("s2s.error", {"code": "paused", "message": "m", "details": {}}, ack_of=flying[0][1])
        sent = self.written()
        self.assertEqual([each["payload"]["idem_key"] for each in sent], ["3", "4"])
        self.failureResultOf(flying[0][0], Refused)
        self.say("s2s.ack", {**_ACK, "cmd_id": 9}, ack_of=sent[0]["id"])
        self.assertEqual(self.successResultOf(waiting[0])["cmd_id"], 9)

    def test_the_next_goes_out_before_the_caller_goes_on(self) -> None:
        """A call made in the callback of a reply is queued after the calls that wait already."""
        flying = [self.push(str(at)) for at in range(3)]
        self.link.call(COMMAND_PUSH, _push("line")).addErrback(lambda failure: None)
        flying[0][0].addCallback(lambda _: self.link.call(COMMAND_PUSH, _push("new")))
        self.say("s2s.ack", _ACK, ack_of=flying[0][1])
        self.assertEqual([each["payload"]["idem_key"] for each in self.written()], ["line"])
        self.say("s2s.ack", _ACK, ack_of=flying[1][1])
        self.assertEqual([each["payload"]["idem_key"] for each in self.written()], ["new"])

    def test_deadline_in_line(self) -> None:
        """A call that expires in the queue is never written, and its place is free."""
        flying = [self.push(str(at), timeout=9) for at in range(3)]
        late = self.link.call(COMMAND_PUSH, _push("late"), timeout=1)
        self.time.advance(1)
        self.failureResultOf(late, DeadlinePassed)
        self.say("s2s.ack", _ACK, ack_of=flying[0][1])
        self.assertEqual(self.written(), [])

    def test_a_deadline_lets_the_next_go(self) -> None:
        """A call that ends by its deadline makes room for the next queued call."""
        for at in range(3):
            self.push(str(at), timeout=1)[0].addErrback(lambda failure: None)
        self.link.call(COMMAND_PUSH, _push("next"))
        self.time.advance(1)
        self.assertEqual([each["payload"]["idem_key"] for each in self.written()], ["next"])

    def test_line_full(self) -> None:
        """Beyond the queue's bound a call fails at once, and the queued calls are not affected."""
        calls = [self.link.call(COMMAND_PUSH, _push(str(at))) for at in range(7)]
        self.failureResultOf(self.link.call(COMMAND_PUSH, _push("8")), LineFull)
        for call in calls:
            self.assertNoResult(call)
        self.assertEqual(self.counters.met, {"window": 4, "line": 1})

    def test_health_checks_pass_the_line(self) -> None:
        """With the window full a health check is sent at once."""
        for at in range(5):
            self.link.call(COMMAND_PUSH, _push(str(at)))
        self.written()
        self.link.call(HEALTH_CHECK, {})
        self.assertEqual([each["type"] for each in self.written()], [HEALTH_CHECK])

    def test_link_lost(self) -> None:
        """When the link is lost every call, in flight or queued, fails at once and once; later calls fail too."""
        calls = [self.link.call(COMMAND_PUSH, _push(str(at))) for at in range(6)]
        outcomes: list[Any] = []
        for call in calls:
            call.addBoth(outcomes.append)
        self.lose()
        self.assertEqual([type(each.value) for each in outcomes], [LinkLost] * 6)
        self.failureResultOf(self.link.call(COMMAND_PUSH, _push()), LinkLost)
        self.assertEqual(self.events.happened, ["made", "proven", "lost"])
        self.time.advance(100)
        self.assertEqual((len(outcomes), self.time.getDelayedCalls()), (6, []))

    def test_an_errback_that_calls_again(self) -> None:
        """A caller that retries at once on a lost link gets one failure for each attempt, and no endless loop."""
        tries: list[Any] = []

        def again(failure: Failure) -> Any:
            tries.append(failure.value)
            return self.link.call(COMMAND_PUSH, _push()).addErrback(tries.append) if len(tries) == 1 else None

        self.link.call(COMMAND_PUSH, _push()).addErrback(again)
        self.lose()
        self.assertEqual(len(tries), 2)

    def test_local_errors(self) -> None:
        """An invalid call fails locally, with nothing written and nothing pending."""
        for type, payload, error in (
            (COMMAND_PUSH, {}, InvalidPayload),
            (COMMAND_PUSH, {**_push(), "urgent": 1}, InvalidPayload),
            (COMMAND_PUSH, _push(n=1.5), CanonicalError),
            (COMMAND_PUSH, _push(n=2**53), CanonicalError),
            (COMMAND_PUSH, _push(deep=json.loads("[" * 30 + "]" * 30)), CanonicalError),
            (COMMAND_PUSH, _push(text="x" * 65536), TooBigToSend),
        ):
            failure = self.failureResultOf(self.link.call(type, payload), error)
            self.assertTrue(str(failure.value))
        self.assertEqual((self.written(), self.link.session.calls.in_flight), ([], 0))

    def test_the_peers_limit(self) -> None:
        """A frame over the peer's announced limit is not sent, one below is, and a later announcement applies."""
        self.setUp()
        self.written()
        check = self.link.call(HEALTH_CHECK, {})
        (frame,) = self.written()
        self.say(HEALTH_ACK, {**_HEALTH, "frame_size_limit": 4096}, ack_of=frame["id"])
        self.successResultOf(check)
        self.failureResultOf(self.link.call(COMMAND_PUSH, _push(text="x" * 4000)), TooBigToSend)
        self.link.call(COMMAND_PUSH, _push(text="x" * 3500))
        self.assertLess(len(self.transport.value()), 4100)

    def test_no_key_to_sign_with(self) -> None:
        """Without a key that may sign nothing is written, the call fails, and the link closes."""
        self.keys.keyring = Keyring()
        self.failureResultOf(self.link.call(COMMAND_PUSH, _push()), LinkLost)
        self.assertEqual(self.written(), [])
        self.assertIs(self.link.session.state, State.CLOSING)

    def test_rotation(self) -> None:
        """A new key signs the next frame on an existing link."""
        self.keys.keyring = Keyring([_KEY, Key("k2", Secret(b"2" * 32), "any", 1.0, is_default_tx=True)])
        self.link.call(COMMAND_PUSH, _push())
        self.assertEqual([each["auth"]["key_id"] for each in self.written()], ["k2"])


class ResponderTests(LinkTestCase):
    """The peer's requests."""

    def setUp(self) -> None:
        """Prove the link."""
        super().setUp()
        self.prove()

    def push_all(self, count: int) -> None:
        """Deliver pushes p1, p2, ..."""
        first = self.number
        for at in range(first, first + count):
            self.say(COMMAND_PUSH, _push(str(at)))

    def test_answers(self) -> None:
        """Each request is answered once, with its id, signed, as soon as its answer is ready, in any order."""
        self.push_all(3)
        ids = [request.envelope.id for request in self.served]
        for at in (1, 2, 0):
            self.answers[at].callback({**_ACK, "cmd_id": at + 1})
        told = [(each["type"], each["ack_of"], each["payload"]["cmd_id"]) for each in self.written()]
        self.assertEqual(told, [("s2s.ack", ids[at], at + 1) for at in (1, 2, 0)])
        self.assertEqual(self.link.session._pending, {})

    def test_answers_at_once(self) -> None:
        """A responder may return a value, or a Deferred that has fired."""
        for answer in (_ACK, succeed(_ACK)):
            self.respond = lambda request, answer=answer: answer
            self.say(COMMAND_PUSH, _push())
            self.assertEqual([each["payload"] for each in self.written()], [_ACK])

    def test_refusals(self) -> None:
        """A WireError of a responder, raised or later, is sent with its code and details; the link stays open."""
        self.respond = lambda request: fail(Overloaded("full", retry_after_ms=7))
        self.say(COMMAND_PUSH, _push())
        (error,) = self.written()
        self.assertEqual(error["payload"]["details"], {"retryable": True, "retry_after_ms": 7})
        self.assertEqual((error["ack_of"], error["auth"]["key_id"]), ("p2", "k1"))

        def refuse(request: Request) -> Any:
            raise BadPayload("wrong", path="/payload/payload/n")

        self.respond = refuse
        self.say(COMMAND_PUSH, _push())
        self.assertEqual(self.error_codes(), ["bad_payload"])
        self.assert_open()

    def test_a_refusal_that_closes(self) -> None:
        """A responder's error that closes is sent, and then the link is closed."""
        self.respond = lambda request: fail(Forbidden("no"))
        self.say(COMMAND_PUSH, _push())
        self.assertEqual(self.error_codes(), ["forbidden"])
        self.assert_closed("forbidden")

    def test_an_exception(self) -> None:
        """An unexpected exception is internal_error with an incident that our log has; the peer gets no details."""
        logged: list[Any] = []
        globalLogPublisher.addObserver(logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, logged.append)
        for respond in (self.stumble, lambda request: fail(ZeroDivisionError("hunter2"))):
            self.respond = respond
            self.say(COMMAND_PUSH, _push())
            self.assertNotIn(b"hunter2", self.transport.value())
            self.assertNotIn(b"ZeroDivision", self.transport.value())
            (error,) = self.written()
            self.assertEqual((error["payload"]["code"], error["ack_of"]), ("internal_error", f"p{self.number}"))
            incident = error["payload"]["details"]["incident"]
            self.assertEqual(len([event for event in logged if event.get("incident") == incident]), 1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 2)
        self.assert_open()

    def stumble(self, request: Request) -> Any:
        """Raise an unexpected exception."""
        raise ZeroDivisionError("hunter2")

    def test_answers_that_cannot_be_sent(self) -> None:
        """An answer without a canonical form, or one that is too large, becomes internal_error."""
        for answer, error in (
            ({**_ACK, "cost": 1.5}, CanonicalError),
            (None, CanonicalError),
            ({**_ACK, "text": "x" * 70000}, TooBigToSend),
        ):
            self.respond = lambda request, answer=answer: answer
            self.say(COMMAND_PUSH, _push())
            self.assertEqual(self.error_codes(), ["internal_error"])
            self.assertEqual(len(self.flushLoggedErrors(error)), 1)
        self.assertEqual(self.link.session._pending, {})

    def test_too_slow(self) -> None:
        """A request not answered within 10 s is deadline_exceeded once; a late answer or failure is dropped."""
        self.push_all(2)
        ids = [request.envelope.id for request in self.served]
        for _ in range(99):
            self.time.advance(0.1)
        self.assertEqual(self.error_codes(), [])
        self.time.advance(0.2)
        errors = [each for each in self.written() if each["type"] == "s2s.error"]
        self.assertEqual([each["payload"]["code"] for each in errors], ["deadline_exceeded"] * 2)
        self.assertEqual(self.counters.met["respond"], 2)
        self.assertEqual([each["ack_of"] for each in errors], ids)
        self.answers[0].callback(_ACK)
        self.answers[1].errback(Overloaded("late"))
        self.time.advance(1)
        self.assertEqual([each for each in self.written() if "ack_of" in each], [])

    def test_answers_to_a_link_that_is_gone(self) -> None:
        """An answer is dropped if the link is closing or lost."""
        self.push_all(3)
        self.link.close("test")
        self.answers[0].callback(_ACK)
        self.lose()
        self.answers[1].callback(_ACK)
        self.answers[2].errback(Overloaded("late"))
        self.assertEqual(self.written(), [])

    def test_health_is_answered_at_once(self) -> None:
        """A health check is answered while other requests wait."""
        self.push_all(5)
        self.assert_open()

    def make_sending_link(self) -> tuple[Link, Any]:
        """Make a link on a transport that separates the sends; its challenge is sent."""
        transport: Any = Descriptor()
        link = self.make_link(self.role)
        link.makeConnection(transport)
        transport.reactor.turn()
        transport.sends.clear()
        return link, transport

    def test_answers_of_a_chunk(self) -> None:
        """The answers to the frames of one chunk are sent together at its end, unless a request is still pending."""
        link, transport = self.make_sending_link()
        pushes = [_prefixed(self.frame(COMMAND_PUSH, _push(), id=f"m{at}")) for at in range(9)]

        def sent() -> list[list[str]]:
            """Return, for each send since the last call, the requests that were answered or refused as too long."""
            told = [[each.get("ack_of", each["type"]) for each in _split(send)] for send in transport.sends]
            transport.sends.clear()
            return told

        def answered(*chunks: bytes) -> list[list[str]]:
            for chunk in chunks:
                link.dataReceived(chunk)
            return sent()

        self.respond = lambda _: _ACK
        self.assertEqual(answered(b"".join(pushes[:3])), [["m0", "m1", "m2"]])
        self.assertEqual(answered(pushes[3]), [["m3"]])
        self.assertEqual(answered(pushes[4][:9], pushes[4][9:]), [["m4"]])
        self.respond = lambda request: self.respond_later(request) if request.envelope.id == "m5" else _ACK
        self.assertEqual(answered(b"".join(pushes[5:7])), [])
        transport.reactor.turn()
        self.assertEqual(sent(), [["m6"]])
        self.answers[0].callback(_ACK)
        self.assertEqual(sent(), [["m5"]])
        # The second frame closes the link, and the last one comes too late.
        too_long = (link.MAX_LENGTH + 1).to_bytes(4, "big")
        self.assertEqual(answered(pushes[7] + too_long + pushes[8]), [])
        transport.reactor.turn()
        self.assertEqual(sent(), [["m7", "s2s.error"]])

    def test_an_error_of_ours_in_a_chunk(self) -> None:
        """An internal error that reaches Twisted does not delay later answers."""
        link, transport = self.make_sending_link()
        self.respond = lambda _: _ACK
        with mock.patch.object(link, "stringReceived", side_effect=ZeroDivisionError):
            self.assertRaises(ZeroDivisionError, link.dataReceived, _prefixed(b"{}", b"{}"))
        link.recvd = b""
        link.dataReceived(_prefixed(self.frame(COMMAND_PUSH, _push())))
        self.assertEqual(len(transport.sends), 1)


class PendingRequestTests(LinkTestCase):
    """Backpressure: pending requests pause reading, and no frame is lost or served twice."""

    def setUp(self) -> None:
        """Prove the link, and make a stream of 3,000 pushes."""
        super().setUp()
        self.prove()
        self.total = 3000
        self.stream = _prefixed(*(self.frame(COMMAND_PUSH, _push(str(at))) for at in range(self.total)))

    def test_reading_stops_and_goes_on(self) -> None:
        """At 1024 pending requests reading pauses; answered in any order, each of 3,000 is served once, in order."""
        self.link.dataReceived(self.stream)
        self.assertEqual((len(self.served), self.transport.producerState), (1024, "paused"))
        rng, waiting, replies = random.Random(2), dict[int, Deferred[Any]](), 0
        while True:
            waiting |= {at: each for at, each in enumerate(self.answers) if not each.called}
            if not waiting:
                break
            for at in rng.sample(sorted(waiting), min(len(waiting), rng.choice((1, 3, 500, 1024)))):
                waiting.pop(at).callback(_ACK)
                replies += 1
            self.time.advance(0)
            self.assertLessEqual(len(self.served) - replies, 1024)
        self.assert_all_once()
        self.assertEqual(self.transport.producerState, "producing")
        self.assertGreater(self.counters.met["held"], 1)

    def assert_all_once(self) -> None:
        """Assert that every push was served once, in order, and answered once."""
        keys = [request.payload["idem_key"] for request in self.served]
        self.assertEqual(keys, [str(at) for at in range(self.total)])
        acked = [each["ack_of"] for each in self.written() if each["type"] == "s2s.ack"]
        self.assertEqual(sorted(acked), sorted(request.envelope.id for request in self.served))

    def test_responders_that_finish_at_once(self) -> None:
        """With many pending requests, responders that answer at once cause no frame to be served twice."""
        cut = len(self.stream) // 3 + 17
        self.link.dataReceived(self.stream[:cut])
        self.assertEqual(len(self.served), len(self.answers))
        held, self.answers = self.answers, []
        rest = self.stream[cut:]
        self.respond = lambda request: self.respond_later(request) if len(self.served) % 40 == 0 else _ACK
        self.link.dataReceived(rest[:50000])
        self.link.dataReceived(rest[50000:])
        for answers in (held, self.answers):
            while answers:
                answers.pop().callback(_ACK)
                self.time.advance(0)
        self.assert_all_once()

    def test_answered_inside_the_chunk(self) -> None:
        """Answering all pending requests, inside the chunk that would pause reading, changes nothing."""

        def answer_all_at_the_bound(request: Request) -> Any:
            later = self.respond_later(request)
            if len(self.answers) == 1024:
                answers, self.answers = self.answers, []
                for each in answers:
                    each.callback(_ACK)
            return later

        self.respond = answer_all_at_the_bound
        self.link.dataReceived(self.stream)
        for _ in range(5):
            self.time.advance(0)
        for each in self.answers:
            each.callback(_ACK)
        self.time.advance(0)
        self.assert_all_once()

    def test_bytes(self) -> None:
        """8 MiB of pending requests pause reading as well."""
        filling = self.frame(COMMAND_PUSH, _push(text="x" * 60000))
        for _ in range(8 * 1024 * 1024 // len(filling) + 1):
            self.assertEqual(self.transport.producerState, "producing")
            self.deliver(filling)
        self.assertEqual(self.transport.producerState, "paused")
        self.answers[0].callback(_ACK)
        self.time.advance(0)
        self.assertEqual(self.transport.producerState, "producing")

    def test_it_always_reads_again(self) -> None:
        """If the responders never answer, the requests are refused after 10 s and reading resumes."""
        self.link.dataReceived(self.stream)
        for _ in range(35):
            self.time.advance(1)
        self.assertEqual(len(self.served), self.total)
        codes = self.error_codes()
        self.assertEqual(codes, ["deadline_exceeded"] * self.total)
        self.assertFalse(self.transport.disconnecting)

    def test_paused_time_is_not_silence(self) -> None:
        """While reading is paused no health check is sent for silence; one is sent 10 s after reading resumes."""
        self.link.dataReceived(self.stream[: len(self.stream) // 2])
        self.written()
        self.time.advance(9.5)
        self.answers[0].callback(_ACK)
        self.time.advance(0)
        self.assertEqual({each["type"] for each in self.written()}, {"s2s.ack"})

    def test_closing_while_it_is_stopped(self) -> None:
        """A link that is closed while its reading is paused serves nothing of the unread bytes."""
        self.link.dataReceived(self.stream)
        self.link.close("test")
        for each in self.answers:
            each.callback(_ACK)
        self.time.advance(1)
        self.assertEqual(len(self.served), 1024)


class _NarrowTransport(StringTransport):
    """A transport that accepts a number of bytes and then pauses its producer, as a real one does."""

    room = 0

    def write(self, data: bytes) -> None:
        super().write(data)
        self.room -= len(data)
        if self.room <= 0 and self.producer is not None:
            self.producer.pauseProducing()


class WriteBufferTests(LinkTestCase):
    """A peer that does not read."""

    bounds = Bounds(write_bytes=20_000)

    def setUp(self) -> None:
        """Prove the link, answer at once, and let the transport accept no more."""
        super().setUp()
        self.prove()
        self.respond = lambda request: {**_ACK, "cmd_id": len(self.served)}
        self.transport.producer.pauseProducing()

    def test_reading_goes_on(self) -> None:
        """Frames that cannot be written wait, in order, while requests are read and served."""
        for _ in range(20):
            self.say(COMMAND_PUSH, _push())
        self.assertEqual((len(self.served), self.transport.value()), (20, b""))
        self.assertEqual(self.transport.producerState, "producing")
        self.transport.producer.resumeProducing()
        self.assertEqual([each["payload"]["cmd_id"] for each in self.written()], list(range(1, 21)))

    def test_narrow(self) -> None:
        """A transport that accepts a little at a time gets all bytes once and in order."""
        link, self.transport = self.make_link("server"), _NarrowTransport()
        self.transport.room = 100
        self.served.clear()
        link.makeConnection(self.transport)
        for _ in range(20):
            link.dataReceived(_prefixed(self.frame(COMMAND_PUSH, _push())))
        for _ in range(50):
            self.transport.room = 500
            self.transport.producer.resumeProducing()
        _, *acks = self.written()
        self.assertEqual([each["payload"]["cmd_id"] for each in acks], list(range(1, 21)))

    def test_cut(self) -> None:
        """When too many bytes wait to be written, the link is cut and calls fail."""
        calls = [self.link.call(SWEEP, {"since_ts": 0}) for _ in range(3)]
        pushes = 0
        while not self.transport.disconnected:
            self.say(COMMAND_PUSH, _push())
            pushes += 1
            self.assertLess(pushes, 200)
        self.assertGreater(pushes * 300, 15_000)
        self.assertIn("does not read", self.link.close_reason.text)
        self.assertEqual(self.counters.met, {"write_buffer": 1})
        for call in calls:
            self.failureResultOf(call, LinkLost)

    def test_cut_where_all_have_much(self) -> None:
        """One link may have no more waiting bytes than remain for all links, and a cut link's bytes no longer count."""
        others = self.bounds.all_write_bytes - 10_000
        self.counters.waiting_bytes = others
        while not self.transport.disconnected:
            self.say(COMMAND_PUSH, _push())
            self.assertLess(self.counters.waiting_bytes, others + 6000)
        self.assertIn("does not read", self.link.close_reason.text)
        self.assertEqual(self.counters.waiting_bytes, others)

    def test_lost_while_it_waits(self) -> None:
        """The waiting bytes of a lost link no longer count."""
        self.say(COMMAND_PUSH, _push())
        self.assertGreater(self.counters.waiting_bytes, 0)
        self.lose()
        self.assertEqual(self.counters.waiting_bytes, 0)

    def test_default(self) -> None:
        """By default 16 MiB may wait, and 256 MiB on all links together."""
        self.assertEqual((Bounds().write_bytes, Bounds().all_write_bytes), (16 << 20, 256 << 20))

    def test_closing_flushes(self) -> None:
        """A closing link passes all waiting bytes to the transport before it closes."""
        self.say(COMMAND_PUSH, _push())
        self.deliver(b"{}")
        self.assertEqual([each["type"] for each in self.written()], ["s2s.ack", "s2s.error"])
        self.assertTrue(self.transport.disconnecting)
        self.assertIsNone(self.transport.producer)


class ClosingTests(LinkTestCase):
    """The end of a link."""

    def test_flush_then_abort(self) -> None:
        """A closing link has 2 s to flush, and then it is aborted."""
        self.link.close("test")
        self.assertEqual((self.transport.disconnecting, self.transport.disconnected), (True, False))
        self.time.advance(1.9)
        self.assertFalse(self.transport.disconnected)
        self.time.advance(0.2)
        self.assertTrue(self.transport.disconnected)
        self.assertEqual(self.counters.met, {"flush": 1})

    def test_flushed_in_time(self) -> None:
        """A link that ends within 2 s is not aborted, and no timer is left."""
        self.link.close("test")
        self.lose()
        self.assertEqual((self.time.getDelayedCalls(), self.transport.disconnected), ([], False))
        self.assertEqual(self.events.happened, ["made", "lost"])

    def test_closing_twice(self) -> None:
        """The first reason is kept, and closing again changes nothing."""
        self.link.close("first")
        self.link.close("second")
        self.link.abort("third")
        self.assertEqual(self.link.close_reason.text, "first")
        self.assertTrue(self.transport.disconnected)
        self.lose()
        self.link.close("fourth")
        self.assertIs(self.link.session.state, State.CLOSED)

    def test_lost_without_a_word(self) -> None:
        """A connection that ends without a close leaves no timer and reports its end once."""
        self.prove()
        self.lose()
        self.assertEqual(self.events.happened, ["made", "proven", "lost"])
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_nothing_is_written_after_the_close(self) -> None:
        """A closing link answers no frame and sends no call."""
        self.prove()
        self.written()
        self.link.close("test")
        self.say(HEALTH_CHECK)
        self.failureResultOf(self.link.call(SWEEP, {"since_ts": 0}), LinkLost)
        self.assertEqual(self.written(), [])


class UnknownKeyTests(LinkTestCase):
    """A key_id that is not in memory."""

    def test_read_again_and_refused(self) -> None:
        """An unknown key makes the link read the keys once; if still unknown, the frame is auth_bad and closes."""
        self.deliver(self.frame(COMMAND_PUSH, _push(), key=_STRANGER))
        self.assertEqual((len(self.keys.reads), self.transport.producerState, self.written()), (1, "paused", []))
        self.keys.end_read(_KEY)
        self.assertEqual((self.keys.reads, self.error_codes()), ([], ["auth_bad"]))
        self.assert_closed("auth_bad")

    def test_why_it_is_refused(self) -> None:
        """The log says why the key of a refused frame does not verify, with the remedy; the peer is not told."""
        secret, answers = _STRANGER.secret, []
        over, later = Key("over", secret, "any", 0.0, 5.0), Key("later", secret, "any", _NOW + 7200.0)
        for key, why in (
            (_STRANGER, "the key stranger is not known here"),
            (over, "the key over is no longer valid"),
            (later, "the key later is not active yet, but in 7200 s: see whether the database's clock is behind"),
            (Key("k1", secret, "any", 0.0), "the MAC of the key k1 is wrong: its secret differs from ours"),
        ):
            with self.subTest(key=key.key_id), capturedLogs() as logs:
                self.keys.keyring = Keyring([_KEY, over, later])
                self.link, self.transport = self.make_link(self.role), StringTransport()
                self.link.makeConnection(self.transport)
                self.written()
                self.say(COMMAND_PUSH, _push(), key=key)
                if self.keys.reads:
                    self.keys.end_read(_KEY, over, later)
                answers += [each["payload"] for each in self.written()]
            (line,) = (event["log_format"].format(**event) for event in logs)
            self.assertIn(f'verify": {why}', line)
            self.assertIn("; both sides need one key with one secret, see s2s keys list", line)
        self.assertEqual(answers, answers[:1] * 4)

    def test_read_again_and_known(self) -> None:
        """If the key is known after the read, the frame and those after it are served, in order."""
        frames = [self.frame(COMMAND_PUSH, _push("0")), self.frame(COMMAND_PUSH, _push("1"), key=_STRANGER)]
        frames += [self.frame(COMMAND_PUSH, _push(str(at)), key=(_KEY, _STRANGER)[at % 2]) for at in range(2, 6)]
        self.deliver(*frames)
        self.assertEqual(len(self.served), 1)
        self.keys.end_read(_KEY, _STRANGER)
        self.assertEqual(len(self.served), 2)
        self.time.advance(0)
        self.assertEqual([request.payload["idem_key"] for request in self.served], list("012345"))
        self.assertEqual((self.keys.reads, self.transport.producerState), ([], "producing"))

    def test_frames_behind_a_refused_one(self) -> None:
        """Frames after one that is refused after the read are ignored."""
        self.deliver(self.frame(COMMAND_PUSH, _push(), key=_STRANGER), self.frame(COMMAND_PUSH, _push()))
        self.keys.end_read(_KEY)
        self.time.advance(1)
        self.assertEqual(self.served, [])

    def test_a_read_that_ends_at_once(self) -> None:
        """A read that ends at once does not change the order of the frames of one chunk."""
        self.keys.refresh = lambda: succeed(None)  # type: ignore[method-assign]
        self.deliver(self.frame(COMMAND_PUSH, _push("0")), self.frame(COMMAND_PUSH, _push("1"), key=_STRANGER))
        self.assertEqual((len(self.served), self.error_codes()), (1, ["auth_bad"]))

    def test_a_read_that_hangs(self) -> None:
        """If the keys are not read in time, the frame is refused, and the read is not logged as a failure."""
        database: Any = type("Database", (), {"run": lambda *_: Deferred()})()
        clock = Clock(self.time, lambda: _NOW)
        refresher: Refresher[None] = Refresher(database, clock, lambda _: None, (), lambda _: None)
        self.keys.refresh = refresher.refresh  # type: ignore[method-assign]
        with capturedLogs() as logs:
            self.deliver(self.frame(COMMAND_PUSH, _push(), key=_STRANGER))
            self.time.advance(3)
        self.assertEqual(self.error_codes(), ["auth_bad"])
        self.assertEqual([event["log_level"].name for event in logs], ["warn"])

    def test_lost_during_the_read(self) -> None:
        """A link that is lost during the read ignores the frame."""
        self.deliver(self.frame(COMMAND_PUSH, _push(), key=_STRANGER))
        self.lose()
        self.keys.end_read(_KEY, _STRANGER)
        self.time.advance(1)
        self.assertEqual((self.served, self.written()), ([], []))

    def test_two_reasons_to_stop(self) -> None:
        """Reading resumes only when every reason for the pause is gone."""
        self.prove()
        self.link.session.bounds = Bounds(held_frames=1)
        self.deliver(self.frame(COMMAND_PUSH, _push("0"), key=_STRANGER), self.frame(COMMAND_PUSH, _push("1")))
        self.keys.end_read(_KEY, _STRANGER)
        self.time.advance(0)
        self.assertEqual((len(self.served), self.transport.producerState), (1, "paused"))
        self.answers[0].callback(_ACK)
        self.time.advance(0)
        self.assertEqual(len(self.served), 2)

    def test_an_ended_key_is_not_read_again(self) -> None:
        """A key that is known and has ended is refused without a read."""
        ended = Key("ended", Secret(b"e" * 32), "any", 0.0, 5.0)
        self.keys.keyring = Keyring([_KEY, ended])
        self.deliver(self.frame(COMMAND_PUSH, _push(), key=ended))
        self.assertEqual((self.keys.reads, self.error_codes()), ([], ["auth_bad"]))


class SecrecyTests(LinkTestCase):
    """The secrets and payloads of a link in texts."""

    def test_no_secret_is_shown(self) -> None:
        """No repr of an object of a link, and no line of its log, contains a secret or a payload."""
        events: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(events.append)
        self.addCleanup(globalLogPublisher.removeObserver, events.append)
        self.prove(name="e1")
        self.link.call(SWEEP, {"since_ts": 0}).addErrback(lambda failure: None)
        self.say(COMMAND_PUSH, {**_push(text="hunter2"), "priority": "hunter2"})
        self.say(COMMAND_PUSH, _push(), key=Key("k1", Secret(b"forged-" * 5), "any", 0.0))
        self.lose()
        things: Iterable[Any] = [self.link, self.link.session, self.keys.keyring, _KEY, self.counters, *events]
        for thing in things:
            for shown in (repr(thing), str(thing)):
                for secret in (_SECRET.decode(), _SECRET.hex(), "forged-forged", "hunter2"):
                    self.assertNotIn(secret, shown)
        self.assertTrue(any("auth_bad" in str(event) for event in events))

    def test_peer_text_is_quoted(self) -> None:
        """A line feed that a peer sends does not start a line of our log."""
        lines: list[str] = []
        observer = lambda event: lines.append(event["log_format"].format(**event))  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.prove(name="e1\nserver: all is well")
        self.say("s2s.error", {"code": "x", "message": "a\nb", "details": {}}, key=None)
        self.say("moon\\nlanding")
        self.deliver(b"{}")
        self.assertGreater(len(lines), 2)
        for line in lines:
            self.assertNotIn("\n", line)

    def test_unix_sockets_have_a_name_too(self) -> None:
        """A peer without host and port has a name too."""
        self.assertIn(" at ", str(self.link))
        self.transport.peerAddr = object()
        self.assertIn("a local socket", str(self.link))


class _ByteTransport(iosim.FakeTransport):
    """Delivers every chunk byte by byte."""

    def bufferReceived(self, buf: bytes) -> None:
        for at in range(len(buf)):
            super().bufferReceived(buf[at : at + 1])


class PairTests(LinkTestCase):
    """Two of our links, connected to each other."""

    def connect(self, transport: Any = iosim.FakeTransport) -> tuple[Link, Link, iosim.IOPump]:
        """Connect an engine to a server, and exchange all frames that both send."""
        server, engine = self.make_link("server"), self.make_link("engine")
        pump = iosim.connect(
            server, transport(server, isServer=True), engine, transport(engine, isServer=False), clock=self.time
        )
        pump.flush()
        return server, engine, pump

    def test_both_prove(self) -> None:
        """Each side proves the link for itself, in whole chunks or byte by byte, and no side refuses a frame."""
        for transport in (iosim.FakeTransport, _ByteTransport):
            server, engine, _ = self.connect(transport)
            self.assertEqual([each.session.state for each in (server, engine)], [State.PROVEN] * 2)
            self.assertEqual((server.peer["role"], engine.peer["role"]), ("engine", "server"))
        self.assertEqual(self.counters.errors_out, {})

    def test_calls_both_ways(self) -> None:
        """Pushes and sweeps cross on one link, also byte by byte."""
        for transport in (iosim.FakeTransport, _ByteTransport):
            server, engine, pump = self.connect(transport)
            self.respond = lambda request: (
                {"ok": True, "queued": 1, **request.payload} if request.message.name == SWEEP else _ACK
            )
            pushes = [engine.call(COMMAND_PUSH, _push(str(at))) for at in range(50)]
            sweeps = [server.call(SWEEP, {"since_ts": at}) for at in range(50)]
            pump.flush()
            self.assertEqual([self.successResultOf(each) for each in pushes], [_ACK] * 50)
            self.assertEqual([self.successResultOf(each)["since_ts"] for each in sweeps], list(range(50)))

    def test_more_than_the_window(self) -> None:
        """3,000 calls at once, more than the window and the held bound, all succeed, and each is served once."""
        _, engine, pump = self.connect()
        answered: list[str] = []
        for at in range(3000):
            engine.call(COMMAND_PUSH, _push(str(at))).addCallback(lambda ack: answered.append(ack["status"]))
        pump.flush()
        while self.answers:
            self.assertLessEqual(len(self.answers), 1024)
            while self.answers:
                self.answers.pop(0).callback(_ACK)
            pump.flush()
        self.assertEqual(len(answered), 3000)
        keys = [request.payload["idem_key"] for request in self.served]
        self.assertEqual(keys, [str(at) for at in range(3000)])

    def test_long_silence(self) -> None:
        """Two idle links keep each other alive for hours."""
        server, engine, pump = self.connect()
        for _ in range(2000):
            self.time.advance(4)
            pump.flush()
        self.assertEqual([each.session.state for each in (server, engine)], [State.PROVEN] * 2)
        self.assertEqual((self.counters.errors_out, self.counters.orphan_replies), ({}, 0))

    def test_one_side_closes(self) -> None:
        """When one side closes, both report it once, and calls on either side fail."""
        server, engine, pump = self.connect()
        calls = [engine.call(COMMAND_PUSH, _push()), server.call(SWEEP, {"since_ts": 0})]
        self.events.happened.clear()
        server.close("test")
        pump.flush()
        for call in calls:
            self.failureResultOf(call, LinkLost)
        self.assertEqual(self.events.happened, ["lost", "lost"])

    def test_without_a_common_key(self) -> None:
        """Two sides without a common key refuse each other unsigned, close, and reconnect slowly."""
        shared, self.keys = self.keys, _Keys(_STRANGER)
        engine = self.make_link("engine")
        self.keys = shared
        server = self.make_link("server")
        pump = iosim.connect(
            server, iosim.FakeTransport(server, True), engine, iosim.FakeTransport(engine, False), clock=self.time
        )
        for keys in (engine._keys, server._keys):
            while keys.reads:
                keys.reads.pop().callback(None)
        pump.flush()
        self.assertEqual(self.counters.errors_out.keys(), {"auth_bad"})
        self.assertNotIn("proven", self.events.happened)
        for each in (server, engine):
            self.assertFalse(each.session.is_open)
