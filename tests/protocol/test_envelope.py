"""The envelope: written as canonical JSON, verified over the right bytes, and read strictly."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import AuthBad, AuthRequired, BadEnvelope, UnsupportedVersion
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import REPLY_ONLY
from s2s.protocol.envelope import Envelope
from s2s.protocol.signing import Key, Sealed, Secret
from tests.support.installed import CATALOGUE

_MANY = settings(max_examples=200)
_SECRET = bytes(range(32))
_KEY = Key("k1", Secret(_SECRET), "any", 0.0)
_SIG = "0" * 64

_ids = st.text("ABCxyz019_-", min_size=1, max_size=64)
_key_ids = st.text("ABCxyz019_.-", min_size=1, max_size=64)
_text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)
_payloads = st.dictionaries(_text | st.sampled_from(["auth", "sig", "ack_of"]), _values, max_size=4)
_types = st.sampled_from([*(message.name for message in CATALOGUE.values()), *sorted(REPLY_ONLY)])
_ways = st.sampled_from([("engine", "server"), ("server", "engine")])


@st.composite
def _envelopes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a well-formed envelope, sometimes with unknown members."""
    auth = {"key_id": draw(_key_ids), "sig": draw(st.text("0123456789abcdef", min_size=64, max_size=64))}
    auth |= draw(st.just({}) | st.dictionaries(_text, _values, max_size=2).map(lambda more: {**more, **auth}))
    if draw(st.booleans()):
        auth["scheme"] = "hmac-sha256"
    src, dst = draw(_ways)
    members: dict[str, Any] = draw(st.just({}) | st.dictionaries(_text, _values, max_size=3))
    members |= {"v": 1, "id": draw(_ids), "ts": draw(st.integers(0, 2**53 - 1)), "src": src, "dst": dst}
    members |= {"type": draw(_types), "auth": auth, "payload": draw(_payloads)}
    if draw(st.booleans()):
        members["ack_of"] = draw(_ids)
    return members


def _members(**changes: Any) -> dict[str, Any]:
    """Return a valid envelope with some members changed, or left out where the change is ``...``."""
    auth = {"key_id": "k1", "sig": _SIG}
    good = {"v": 1, "id": "i1", "ts": 5, "src": "engine", "dst": "server", "type": "t", "auth": auth, "payload": {}}
    return {name: value for name, value in {**good, **changes}.items() if value is not ...}


def _signed(members: dict[str, Any]) -> bytes:
    """Return the bytes that the signature of a parsed frame covers."""
    return _unseal(members).signed


def _unseal(members: dict[str, Any]) -> Sealed:
    """Split a parsed frame."""
    return envelope.unseal_exactly(members, canonical.dumps_exactly(members))


class IdTests(SynchronousTestCase):
    """:func:`envelope.unguessable_id`."""

    def test_a_ulid(self) -> None:
        """The id is a ULID of its time, and any two ids differ in each of the random digits."""
        ids = [envelope.unguessable_id(1_700_000_000_123) for _ in range(200)]
        for each in ids:
            self.assertRegex(each, "^[0-7][0-9A-HJKMNP-TV-Z]{25}$")
        self.assertEqual({each[:10] for each in ids}, {"01HF7YAT3V"})
        self.assertEqual([len({each[at] for each in ids}) > 10 for at in range(10, 26)], [True] * 16)


class SealTests(SynchronousTestCase):
    """:func:`envelope.seal` and :func:`envelope.size`."""

    @_MANY
    @given(
        _ids, _ids | st.none(), st.integers(0, 2**53 - 1), _ways, _types, _payloads, _key_ids, st.binary(min_size=32)
    )
    def test_as_written_exactly(
        self,
        message_id: str,
        ack_of: str | None,
        ts: int,
        way: tuple[str, str],
        type: str,
        payload: dict[str, Any],
        key_id: str,
        secret: bytes,
    ) -> None:
        """A sealed frame is the canonical form of its envelope with the HMAC of the canonical form without sig."""
        src, dst = way
        members = {"v": 1, "id": message_id, "ts": ts, "src": src, "dst": dst, "type": type, "payload": payload}
        if ack_of is not None:
            members["ack_of"] = ack_of
        body = canonical.dumps(payload)
        told = {"id": message_id, "ts": ts, "src": src, "dst": dst, "type": type, "body": body, "ack_of": ack_of}

        self.assertEqual(envelope.seal(**told, key=None), canonical.dumps_exactly(members))

        unsigned = canonical.dumps_exactly({**members, "auth": {"key_id": key_id}})
        sig = hmac.new(secret, unsigned, hashlib.sha256).hexdigest()
        frame = envelope.seal(**told, key=Key(key_id, Secret(secret), "any", 0.0))
        self.assertEqual(frame, canonical.dumps_exactly({**members, "auth": {"key_id": key_id, "sig": sig}}))
        self.assertLessEqual(len(frame), envelope.size(type, body))
        self.assertLessEqual(len(frame), envelope.size(type, body, len(key_id)))

        parsed = canonical.parse(frame)
        self.assertEqual(_signed(parsed), unsigned)
        self.assertEqual(envelope.read(parsed), Envelope(message_id, ts, src, dst, type, payload, ack_of))

    def test_size_is_tight(self) -> None:
        """The largest size is that of a frame whose id, ack_of, key_id and ts have their maximum length."""
        body = canonical.dumps({"a": 1})
        long = Key("k" * 64, Secret(_SECRET), "any", 0.0)
        told: dict[str, Any] = {"id": "i" * 64, "ack_of": "a" * 64, "ts": 1 - 2**53, "src": "engine", "dst": "server"}
        self.assertEqual(len(envelope.seal(**told, type="t", body=body, key=long)), envelope.size("t", body))


class UnsealTests(SynchronousTestCase):
    """:func:`envelope.unseal_plainly` beside :func:`envelope.unseal_exactly` and :func:`envelope.read`."""

    def agree(self, frame: bytes) -> bool:
        """Assert that the plain path agrees with the exact path.

        :returns: whether the plain path accepted the frame.
        """
        plain = envelope.unseal_plainly(frame)
        read = None if plain is None else plain.read()
        if plain is None or read is None:
            return False
        members = canonical.parse_exactly(frame)
        exact = _unseal(members)
        self.assertEqual((plain.key_id, plain.sig, plain.signed), (exact.key_id, exact.sig, exact.signed))
        self.assertEqual(repr(read), repr(envelope.read(members)))
        return True

    @_MANY
    @given(_envelopes(), st.sampled_from([None, 1]))
    def test_any_envelope(self, members: dict[str, Any], indent: int | None) -> None:
        """For any envelope, canonical or not, both paths give the same result, and cover everything except sig."""
        without = {**members, "auth": {name: each for name, each in members["auth"].items() if name != "sig"}}
        self.assertEqual(_signed(members), canonical.dumps_exactly(without))
        for frame in (canonical.dumps_exactly(members), json.dumps(members, indent=indent).encode()):
            self.agree(frame)

    @_MANY
    @given(_ids, _ids | st.none(), st.integers(0, 10**15 - 1), _ways, _types, _payloads)
    def test_what_we_send(
        self, message_id: str, ack_of: str | None, ts: int, way: tuple[str, str], type: str, payload: dict[str, Any]
    ) -> None:
        """Every frame that we seal takes the plain path, unless its payload does not."""
        told = {"id": message_id, "ack_of": ack_of, "ts": ts, "src": way[0], "dst": way[1], "type": type}
        body = canonical.dumps(payload)
        took = self.agree(envelope.seal(**told, body=body, key=_KEY))
        self.assertEqual(took, canonical.parse_plainly(body, envelope.PAYLOAD_DEPTH) is not None)

    @_MANY
    @given(_envelopes(), st.data())
    def test_damaged(self, members: dict[str, Any], data: st.DataObject) -> None:
        """For a damaged canonical frame both paths give the same result wherever the plain path accepts the frame."""
        frame = canonical.dumps_exactly({name: members[name] for name in _members(ack_of="a") if name in members})
        at = data.draw(st.integers(0, len(frame)))
        end = data.draw(st.integers(at, min(len(frame), at + 12)))
        stretch = data.draw(
            st.sampled_from([b"", b"}", b'","src":"', b"0", b"-", b" ", b"\n", b'"v":1}', b"x", b"\xff"])
        )
        self.agree(frame[:at] + stretch + frame[end:])

    def test_a_payload_that_speaks_of_frames(self) -> None:
        """A payload that contains the text of a frame's end does not end the payload."""
        end = ',"src":"engine","ts":5,"type":"t","v":1}'
        for payload in ({"a": end}, {"a": {"b": end + "}"}}, {"src": "engine", "ts": 5, "type": "t", "v": 1}):
            frame = canonical.dumps_exactly(_members(payload=payload))
            self.assertTrue(self.agree(frame))
        frame = canonical.dumps_exactly(_members(payload={}))
        self.assertTrue(self.agree(frame))
        self.assertFalse(self.agree(frame[:-1] + end.encode()))

    def test_hostile_frames_are_cheap(self) -> None:
        """A frame that nearly ends many times does not block the process."""
        head = canonical.dumps_exactly(_members()).partition(b"{}")[0]
        for piece in (b'},"src":"engine","ts":5,"type":"t","v":1', b'},"src":"' + b"a" * 64, b"}", b"{"):
            began = time.process_time()
            self.assertFalse(self.agree(head + b"{" + piece * (60000 // len(piece))))
            self.assertLess(time.process_time() - began, 0.1)

    def test_what_is_not_plain(self) -> None:
        """Unknown members, another version and white space take the exact path, which alone names the fault."""
        for change in ({"more": 1}, {"v": 2}, {"ts": -1}, {"id": "a b"}, {"ack_of": None}, {"src": ...}, {"auth": ...}):
            self.assertFalse(self.agree(canonical.dumps_exactly(_members(**change))), change)
        frame = canonical.dumps_exactly(_members())
        self.assertFalse(self.agree(frame.replace(b'"payload":{}', b'"payload": {}')))
        self.assertFalse(self.agree(frame + b"\n"))

    def test_every_other_member_is_signed(self) -> None:
        """A change of any member, key_id, or a sig elsewhere changes the signed bytes; one of auth.sig does not."""
        base = _members(ack_of="a1", more={"sig": _SIG}, payload={"auth": {"sig": _SIG}})
        signed = _signed(base)
        for change in (
            {"v": 2},
            {"id": "i2"},
            {"ts": 6},
            {"src": "server"},
            {"dst": "engine"},
            {"type": "u"},
            {"payload": {"auth": {}}},
            {"ack_of": "a2"},
            {"more": {}},
            {"auth": {"key_id": "k2", "sig": _SIG}},
            {"auth": {"key_id": "k1", "sig": _SIG, "scheme": "hmac-sha256"}},
        ):
            self.assertNotEqual(_signed({**base, **change}), signed)
        self.assertEqual(_signed({**base, "auth": {"key_id": "k1", "sig": "1" * 64}}), signed)


class ReadAuthTests(SynchronousTestCase):
    """``auth``, as :func:`envelope.unseal_exactly` reads it."""

    def test_good(self) -> None:
        """A key_id and a sig are accepted, also beside unknown members and the one scheme."""
        for more in ({}, {"scheme": "hmac-sha256"}, {"nonce": [1]}):
            auth = _unseal({"auth": {"key_id": "k.1_-", "sig": _SIG, **more}})
            self.assertEqual((auth.key_id, auth.sig), ("k.1_-", _SIG))

    def test_absent(self) -> None:
        """A frame without an auth member is auth_required."""
        self.assertRaises(AuthRequired, _unseal, _members(auth=...))

    def test_malformed(self) -> None:
        """Every fault of auth is auth_bad with the same text."""
        good = {"key_id": "k1", "sig": _SIG}
        texts = set()
        for auth in (
            None, "k1", [], 1, True, {}, {"key_id": "k1"}, {"sig": _SIG},
            *({**good, "key_id": bad} for bad in ("", "k" * 65, "k 1", "k\n", 1, None, ["k1"])),
            *({**good, "sig": bad} for bad in ("", "0" * 63, "0" * 65, "A" * 64, "g" * 64, _SIG + "\n", 0, None)),
            *({**good, "scheme": bad} for bad in ("none", "", None, "HMAC-SHA256", ["hmac-sha256"])),
        ):  # fmt: skip
            texts.add(self.assertRaises(AuthBad, _unseal, _members(auth=auth)).message)
        self.assertEqual(len(texts), 1)


class ReadTests(SynchronousTestCase):
    """:func:`envelope.read` and :func:`envelope.well_formed_id`."""

    def test_good(self) -> None:
        """A well-formed envelope is read, also with unknown members."""
        self.assertEqual(
            envelope.read(_members(ack_of="a1", more=[1])), Envelope("i1", 5, "engine", "server", "t", {}, "a1")
        )

    def test_version(self) -> None:
        """Another integer is unsupported_version, and the error names the supported versions."""
        for version in (0, 2, -1, 2**53 - 1):
            error = self.assertRaises(UnsupportedVersion, envelope.read, _members(v=version, id=...))
            self.assertEqual(error.details, {"path": "/v", "supported": [1]})

    def test_shapes(self) -> None:
        """A member that is missing or ill-formed is bad_envelope, and the path names it."""
        wrong: dict[str, tuple[Any, ...]] = {
            "v": (..., None, "1", True, [1]),
            "id": (..., None, 1, "", "a b", "x" * 65, "é", "i\n", True),
            "ts": (..., None, "5", True, [5]),
            "src": (..., None, 1, ["engine"]),
            "dst": (..., None, 1, {}),
            "type": (..., None, 1, []),
            "ack_of": (None, 1, "", "a b", "x" * 65, "a\n", ["a1"]),
            "payload": (..., None, [], "x", 1, True),
        }
        for name, values in wrong.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    error = self.assertRaises(BadEnvelope, envelope.read, _members(**{name: value}))
                    self.assertEqual(error.details, {"path": f"/{name}"})

    def test_any_role_word_is_well_formed(self) -> None:
        """A src that is no role is well-formed here; the session answers it with forbidden."""
        self.assertEqual(envelope.read(_members(src="moon", dst="")).src, "moon")

    def test_well_formed_id(self) -> None:
        """An error may name an id only if it is well formed."""
        ids = [
            envelope.well_formed_id({"id": said}) for said in ("i1", "x" * 64, "", "a b", "x" * 65, "i\n", 1, None, [])
        ]
        self.assertEqual(ids, ["i1", "x" * 64, *[None] * 7])
        self.assertIsNone(envelope.well_formed_id({}))

    def test_other(self) -> None:
        """Each role has the other one as its peer."""
        self.assertEqual([envelope.other("engine"), envelope.other("server")], ["server", "engine"])
