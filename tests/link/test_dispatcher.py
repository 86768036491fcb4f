"""The dispatcher: the protocol's order of checks, and an outcome for every frame."""

from __future__ import annotations

import gc
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock as FakeClock
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import WireError
from s2s.link.dispatcher import Dispatcher
from s2s.protocol import canonical, envelope
from s2s.protocol.limits import Bounds, Timing
from s2s.protocol.received import Refusal, Reply, Request, UnknownKey, UnsignedError
from s2s.protocol.replay import ReplayCache
from s2s.protocol.session import Session
from s2s.protocol.signing import Key, Keyring, Secret
from s2s.protocol.window import Call
from s2s.runtime.clock import Clock
from tests.support import hostile
from tests.support.installed import CATALOGUE

_NOW = 1_737_990_000
_KEY = Key("k1", Secret(bytes(range(32))), "any", 0.0)
_ENGINE_KEY = Key("ke", Secret(b"e" * 32), "engine", 0.0)
_SERVER_KEY = Key("ks", Secret(b"s" * 32), "server", 0.0)
_ENDED_KEY = Key("old", Secret(b"o" * 32), "any", 0.0, _NOW - 1.0)
_STRANGER = Key("stranger", Secret(b"x" * 32), "any", 0.0)
_PUSH = {"cmd_type": "a.b", "idem_key": "k", "payload": {"n": 1}}


class _Keys:
    """Keys that a test can replace."""

    def __init__(self) -> None:
        self.keyring = Keyring([_KEY, _ENGINE_KEY, _SERVER_KEY, _ENDED_KEY])

    def refresh(self) -> Any:
        """Fail, because a dispatcher never reads keys itself."""
        raise AssertionError("the dispatcher read the keys")


def _signed(members: dict[str, Any], key: Key = _KEY, **auth: Any) -> bytes:
    """Sign any members, well formed or not."""
    unsigned = {**members, "auth": {"key_id": key.key_id, **auth}}
    sig = key.sign(canonical.dumps_exactly(unsigned))
    return canonical.dumps_exactly({**unsigned, "auth": {**unsigned["auth"], "sig": sig}})


def _members(**changes: Any) -> dict[str, Any]:
    """Return a valid push with some members changed, or left out where the change is ``...``."""
    good = {
        "v": 1,
        "id": "i1",
        "ts": _NOW,
        "src": "engine",
        "dst": "server",
        "type": "s2s.command.push",
        "payload": _PUSH,
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


class DispatcherTests(SynchronousTestCase):
    """:class:`Dispatcher` of a server."""

    def setUp(self) -> None:
        """Make a link of a server that serves health checks and pushes."""
        self.time = FakeClock()
        self.keys = _Keys()
        self.session = Session("server", ReplayCache(0.0), Timing(), Bounds(), 0.0, CATALOGUE)
        responders: dict[str, Any] = dict.fromkeys(("s2s.health.check", "s2s.command.push"))
        self.dispatcher = Dispatcher(self.keys, responders, Clock(self.time, lambda: _NOW + self.time.seconds()))

    def receive(self, frame: bytes | dict[str, Any], **more: Any) -> Any:
        """Return the outcome of a frame, which is signed first if it is given as members."""
        return self.dispatcher.receive(_signed(frame) if isinstance(frame, dict) else frame, self.session, **more)

    def refusal(self, frame: bytes | dict[str, Any], **more: Any) -> tuple[Any, ...]:
        """Return the code, the path, the ack_of and whether the refusal is answered."""
        outcome = self.receive(frame, **more)
        self.assertIsInstance(outcome, Refusal)
        return outcome.error.code, outcome.error.details.get("path"), outcome.ack_of, outcome.is_answered

    def test_a_request(self) -> None:
        """A valid request is returned with its defaults filled in, its key and its size."""
        frame = _signed(_members())
        outcome = self.receive(frame)
        self.assertIsInstance(outcome, Request)
        self.assertEqual(outcome.payload, {**_PUSH, "priority": 100})
        self.assertEqual((outcome.key_id, outcome.size), ("k1", len(frame)))
        self.assertIs(outcome.message, CATALOGUE["s2s.command.push"])
        self.assertEqual((outcome.envelope.id, outcome.envelope.payload), ("i1", _PUSH))

    def test_defaults_do_not_overrule(self) -> None:
        """A value that the peer sends takes precedence over the default, also if it is 0."""
        self.assertEqual(self.receive(_members(payload={**_PUSH, "priority": 0})).payload["priority"], 0)

    def test_not_canonical(self) -> None:
        """White space, member order and escapes of the peer do not change the outcome."""
        said = json.loads(_signed(_members(payload={**_PUSH, "payload": {"é": "ü"}})))
        for frame in (
            json.dumps(dict(reversed(said.items())), indent=1).encode(),
            json.dumps(said, ensure_ascii=False).encode(),
            b" \n" + json.dumps(said).replace('"dst"', '"\\u0064st"').encode() + b"\t",
        ):
            self.assertIsInstance(self.receive(frame), Request)

    def test_unknown_members_are_signed(self) -> None:
        """Unknown members of the envelope and of auth are ignored, but a change of them breaks the signature."""
        frame = _signed(_members(trace="t1"), nonce=5)
        self.assertIsInstance(self.receive(frame), Request)
        for before, after in ((b'"trace":"t1"', b'"trace":"t2"'), (b'"nonce":5', b'"nonce":6')):
            self.assertEqual(self.refusal(frame.replace(before, after))[0], "auth_bad")

    def test_the_scheme(self) -> None:
        """A peer may name the one scheme, and may not name another, however it signs."""
        self.assertIsInstance(self.receive(_signed(_members(), scheme="hmac-sha256")), Request)
        self.assertEqual(self.refusal(_signed(_members(), scheme="none"))[0], "auth_bad")

    def test_before_the_mac(self) -> None:
        """A frame that fails before its MAC is verified names no request, and does not count as heard."""
        frame = _signed(_members())
        for bad, code in (
            (b"", "bad_json"),
            (frame[:-1], "bad_json"),
            (frame + b"{}", "bad_json"),
            (canonical.dumps(_members()), "auth_required"),
            (canonical.dumps(_members(type="s2s.ack", ack_of="i1")), "auth_required"),
            (canonical.dumps({**_members(), "auth": 1}), "auth_bad"),
            (canonical.dumps({**_members(type="s2s.error"), "auth": None}), "auth_bad"),
            (frame.replace(b'"n":1', b'"n":2'), "auth_bad"),
            (frame.replace(b'"key_id":"k1"', b'"key_id":"ke"'), "auth_bad"),
            (_signed(_members(), _ENDED_KEY), "auth_bad"),
        ):
            with self.subTest(frame=bad[:30]):
                self.assertEqual(self.refusal(bad), (code, None, None, True))
        self.assertFalse(self.session.has_been_heard)
        self.assertIsInstance(self.receive(frame), Request)

    def test_no_value_is_walked_before_the_mac(self) -> None:
        """For a frame whose MAC is wrong, Python code takes few steps, whatever the frame contains."""
        for frame in hostile.frames(65536):
            with self.subTest(frame=frame[:80], size=len(frame)):
                self.assertLess(hostile.steps(self.receive, frame), hostile.MOST_STEPS)

    def test_nothing_is_kept_of_a_refused_frame(self) -> None:
        """The parsed form of a refused frame is freed at once, without the cyclic garbage collector."""
        bad = [b'{"a":[%b]}' % b",".join([b"[]"] * 1000), b'{"a":[%b,1.5]}' % b",".join([b"[]"] * 1000)]
        bad += [json.dumps({**json.loads(_signed(_members())), "a": [[]] * 1000}).encode()]
        bad += [frame.replace(b"[[]", b'["\\ud800",[]', 1) for frame in bad] + [bad[0][:-1] + b',"b":-0}']
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for frame in bad:
            with self.subTest(frame=frame[:40]):
                self.refusal(frame)
                self.assertLess(gc.collect(), 500)

    def test_the_payload_is_parsed_after_the_mac(self) -> None:
        """A canonical frame is parsed once, after its MAC, so that only a key holder causes the cost."""
        parsed: list[bytes] = []
        parse = canonical.parse_plainly
        self.patch(canonical, "parse_plainly", lambda *args: parsed.append(args[0]) or parse(*args))
        self.patch(canonical, "parse_and_write", None)
        frame = _signed(_members())
        self.assertIsInstance(self.receive(frame), Request)
        self.assertEqual(len(parsed), 1)

    def test_the_mac_covers_the_canonical_form(self) -> None:
        """A payload that is signed as written, and not in its canonical form, is not verified."""
        for payload in (b'{"a":1.5}', b'{"b":1,"a":1}', b'{"a":-0}', b'{"a":1,"a":1}', b'{"a":"\\u0000"}', b'{"a": 1}'):
            head = b'{"auth":{"key_id":"k1"'
            rest = b'},"dst":"server","id":"i1","payload":%b,"src":"engine","ts":%d,"type":"t","v":1}' % (payload, _NOW)
            frame = b'%b,"sig":"%b"%b' % (head, _KEY.sign(head + rest).encode(), rest)
            with self.subTest(payload=payload):
                self.assertIn(self.refusal(frame)[0], ("bad_json", "auth_bad"))
        self.assertFalse(self.session.has_been_heard)

    def test_every_bit_counts(self) -> None:
        """A frame with any one bit flipped is refused."""
        frame = _signed(_members())
        for at in range(len(frame)):
            for bit in (1, 4, 32):
                changed = bytearray(frame)
                changed[at] ^= bit
                outcome = self.receive(bytes(changed))
                if isinstance(outcome, UnknownKey):
                    continue
                self.assertIsInstance(outcome, Refusal)
                self.assertFalse(outcome.error.signed)
        self.assertFalse(self.session.has_been_heard)

    def test_an_unknown_key_is_asked_for_once(self) -> None:
        """An unknown key_id is first UnknownKey, then auth_bad; once a read has found the key, the frame passes."""
        frame = _signed(_members(), _STRANGER)
        unknown = self.receive(frame)
        self.assertIsInstance(unknown, UnknownKey)
        self.assertEqual(self.refusal(frame, unknown=unknown), ("auth_bad", None, None, True))
        self.keys.keyring = Keyring([_STRANGER])
        self.assertIsInstance(self.receive(frame, unknown=unknown), Request)

    def test_an_unknown_key_is_parsed_once(self) -> None:
        """The second check of a frame with an unknown key costs one MAC and no parsing, and keeps no objects."""
        frame = json.dumps(json.loads(_signed(_members(), _STRANGER))).encode()
        unknown = self.receive(frame)
        self.assertEqual(
            {type(getattr(unknown.sealed, name)) for name in unknown.sealed.__struct_fields__}, {str, bytes}
        )
        self.patch(canonical, "parse_and_write", None)
        self.assertEqual(self.refusal(frame, unknown=unknown)[0], "auth_bad")

    def test_after_the_mac(self) -> None:
        """A frame that fails after its MAC is verified names the member and the request, and counts as heard."""
        for change, code, path in (
            ({"v": 2}, "unsupported_version", "/v"),
            ({"v": ...}, "bad_envelope", "/v"),
            ({"ts": "5"}, "bad_envelope", "/ts"),
            ({"payload": []}, "bad_envelope", "/payload"),
            ({"src": "server"}, "forbidden", "/src"),
            ({"dst": "engine"}, "forbidden", "/dst"),
            ({"ts": _NOW - 301}, "ts_skew", "/ts"),
            ({"type": "moon.landing"}, "unsupported_type", "/type"),
            ({"type": "s2s.broadcast.sweep"}, "unsupported_type", "/type"),
            ({"payload": {**_PUSH, "priority": "1"}}, "bad_payload", "/payload/priority"),
            ({"payload": {**_PUSH, "urgent": True}}, "bad_payload", "/payload/urgent"),
            ({"payload": {}}, "bad_payload", "/payload/cmd_type"),
        ):
            with self.subTest(change=change):
                self.assertEqual(
                    self.refusal(_members(id=f"i-{code}{path}".replace("/", "_"), **change))[:2], (code, path)
                )
                self.assertEqual(self.refusal(_members(id="named", **change))[2], "named")
                self.session._replay = ReplayCache(0.0)
        self.assertTrue(self.session.has_been_heard)

    def test_an_id_that_cannot_be_named(self) -> None:
        """An error about an ill-formed id names no request in ack_of."""
        self.assertEqual(self.refusal(_members(id="a b")), ("bad_envelope", "/id", None, True))
        self.assertEqual(self.refusal(_members(id="a b", v=3)), ("unsupported_version", "/v", None, True))

    def test_roles_of_keys(self) -> None:
        """A valid signature by a key of the other role is forbidden."""
        self.assertIsInstance(self.receive(_signed(_members(), _ENGINE_KEY)), Request)
        self.assertEqual(self.refusal(_signed(_members(id="i2"), _SERVER_KEY))[:2], ("forbidden", "/auth/key_id"))

    def test_our_own_frame_sent_back(self) -> None:
        """A frame that we signed ourselves and that is sent back to us is forbidden."""
        ours = envelope.seal(
            id="i9", ts=_NOW, src="server", dst="engine", type="s2s.health.check", body=b"{}", key=_KEY
        )
        self.assertEqual(self.refusal(ours), ("forbidden", "/src", "i9", True))

    def test_order_of_checks(self) -> None:
        """Each fault hides every fault that the protocol checks later."""
        faults: list[tuple[str, dict[str, Any]]] = [
            ("unsupported_version", {"v": 2}),
            ("bad_envelope", {"payload": 1}),
            ("forbidden", {"dst": "engine"}),
            ("ts_skew", {"ts": 5}),
            ("unsupported_type", {"type": "moon.landing"}),
        ]
        for at, (code, _) in enumerate(faults):
            changes: dict[str, Any] = {}
            for _, change in faults[at:]:
                changes |= change
            with self.subTest(code=code):
                self.assertEqual(self.refusal(_members(**changes))[0], code)
        # The MAC is checked before them all, and the payload after them.
        self.assertEqual(self.refusal(_signed(_members(v=2), _ENDED_KEY))[0], "auth_bad")
        self.assertEqual(self.refusal(_members(id="i2", ts=5, payload={}))[0], "ts_skew")

    def test_a_refused_payload_was_entered(self) -> None:
        """The payload is checked after the replay cache: an invalid health check sent twice is a replay."""
        check = _members(type="s2s.health.check", payload={"a": 1})
        self.assertEqual([self.refusal(check)[0], self.refusal(check)[0]], ["bad_payload", "replay"])

    def test_replies(self) -> None:
        """A reply finds its call once, whatever its ts; a reply that no call awaits is returned without a call."""
        call = Call(CATALOGUE["s2s.broadcast.sweep"], b"{}", 10, 3.0, None)
        self.session.calls.sent(call, "m1")
        reply = _members(id="r1", type="s2s.ack", ack_of="m1", ts=0, payload={"any": "thing"})
        first, second = self.receive(reply), self.receive(reply)
        self.assertIsInstance(first, Reply)
        self.assertIs(first.call, call)
        self.assertEqual((second.call, second.envelope.payload), (None, {"any": "thing"}))

    def test_replies_without_ack_of(self) -> None:
        """A reply-only type without ack_of is a reply that no call awaits."""
        for type in ("s2s.ack", "s2s.health.ack", "s2s.error"):
            self.assertIsNone(self.receive(_members(type=type, payload={})).call)

    def test_a_request_type_with_ack_of(self) -> None:
        """A frame with ack_of is a reply and is not served."""
        self.assertIsInstance(self.receive(_members(ack_of="m1")), Reply)

    def test_wrong_replies_are_not_answered(self) -> None:
        """A refused reply is not answered, and ends no call."""
        call = Call(CATALOGUE["s2s.broadcast.sweep"], b"{}", 10, 3.0, None)
        self.session.calls.sent(call, "m1")
        for change, code in (
            ({"v": 2}, "unsupported_version"),
            ({"payload": 1}, "bad_envelope"),
            ({"src": "server"}, "forbidden"),
            ({"ack_of": "a b"}, "bad_envelope"),
            ({"ack_of": None}, "bad_envelope"),
        ):
            reply = _members(**{"type": "s2s.ack", "ack_of": "m1", **change})
            with self.subTest(change=change):
                outcome = self.receive(reply)
                self.assertEqual((outcome.error.code, outcome.is_answered), (code, False))
        self.assertEqual(self.session.calls.in_flight, 1)

    def test_unsigned_errors(self) -> None:
        """An s2s.error without auth is an UnsignedError, ends no call, and does not count as heard."""
        call = Call(CATALOGUE["s2s.broadcast.sweep"], b"{}", 10, 3.0, None)
        self.session.calls.sent(call, "m1")
        payload = {"code": "auth_bad", "message": "m", "details": {}}
        outcome = self.receive(canonical.dumps(_members(type="s2s.error", ack_of="m1", payload=payload)))
        self.assertEqual(outcome, UnsignedError(payload))
        self.assertEqual(self.receive(b'{"type":"s2s.error"}'), UnsignedError(None))
        self.assertEqual((self.session.calls.in_flight, self.session.has_been_heard), (1, False))

    def test_heard(self) -> None:
        """Any frame with a valid MAC counts as heard, with its key, even if it is then refused."""
        self.refusal(_signed(_members(v=2), _ENGINE_KEY))
        self.assertEqual((self.session.has_been_heard, self.session.peer_key_id), (True, "ke"))

    @settings(max_examples=200)
    @given(st.binary(max_size=300))
    def test_random_bytes(self, frame: bytes) -> None:
        """Any random bytes give an unsigned refusal."""
        self.assertFalse(self.receive(frame).error.signed)

    @settings(max_examples=200)
    @given(st.data())
    def test_random_signed_members(self, data: st.DataObject) -> None:
        """Any signed members give an outcome and no exception, and every refusal can be sent."""
        odd = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text("ab/~é\n", max_size=3)
        odd |= st.lists(odd, max_size=2) | st.dictionaries(st.text("ab/~é", max_size=3), odd, max_size=2)
        names = st.sampled_from([*_members(), "ack_of", "payload", "x"])
        changes = data.draw(st.dictionaries(names, odd | st.just(...) | st.just("s2s.error"), max_size=4))
        outcome = self.receive(_members(**changes))
        self.assertIsInstance(outcome, Request | Reply | Refusal)
        if isinstance(outcome, Refusal):
            self.assertIsInstance(outcome.error, WireError)
            self.assertTrue(outcome.error.signed)
            canonical.dumps(outcome.error.payload())
