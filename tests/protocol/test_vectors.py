"""The test vectors, which define the protocol for peers in other languages, run through our code without I/O."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from canonicaljson import encode_canonical_json
from twisted.internet.task import Clock as FakeClock
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BY_CODE, BadJson, WireError
from s2s.handlers.commands import BUILTIN, registry
from s2s.link.dispatcher import Dispatcher
from s2s.protocol import canonical, envelope
from s2s.protocol.catalogue import ERROR, ERROR_SCHEMA, REPLY_ONLY
from s2s.protocol.limits import Bounds, Timing
from s2s.protocol.received import Refusal, Reply, Request, UnknownKey
from s2s.protocol.replay import ReplayCache
from s2s.protocol.session import Session
from s2s.protocol.signing import Key, Keyring, decode_secret
from s2s.roles.server.inbox import Inbox
from s2s.runtime.clock import Clock
from tests.support.installed import CATALOGUE

_HERE = Path(__file__).parents[1] / "vectors"
_NOW = 1737990000


def _read(name: str) -> list[dict[str, Any]]:
    vectors: list[dict[str, Any]] = json.loads((_HERE / name).read_text("ascii"))
    return vectors


class _Keys:
    """The one key of a vector."""

    def __init__(self, vector: dict[str, Any]) -> None:
        key = Key(vector["key_id"], decode_secret(vector["key_b64"]), vector.get("key_role", "any"), 0.0)
        self.keyring = Keyring([key])

    def refresh(self) -> Any:
        """Do nothing, because there are no keys to read."""
        raise AssertionError("the keys were to be read again")


def _judge(vector: dict[str, Any], replay: ReplayCache) -> Any:
    """Return the dispatcher's outcome for a vector's frame, on a new and proven link of its reader."""
    clock = Clock(FakeClock(), lambda: float(_NOW))
    role = vector["reader"]
    served = {message.name: None for message in CATALOGUE.values() if envelope.other(role) in message.sent_by}
    dispatcher = Dispatcher(_Keys(vector), served, clock)  # type: ignore[arg-type]
    session = Session(role, replay, Timing(), Bounds(frame_size=262144), 0.0, CATALOGUE)
    session.prove(0)
    frame = bytes.fromhex(vector["frame_hex"])
    outcome = dispatcher.receive(frame, session)
    return dispatcher.receive(frame, session, outcome) if isinstance(outcome, UnknownKey) else outcome


class AcceptTests(SynchronousTestCase):
    """``accept.json``."""

    def test_frames_are_taken(self) -> None:
        """Every frame of accept.json passes every check as the request or reply that it is."""
        replay = ReplayCache(0.0)
        for vector in _read("accept.json"):
            with self.subTest(vector["name"]):
                outcome = _judge(vector, replay)
                self.assertIsInstance(outcome, Request if vector["kind"] == "request" else Reply)
                said = vector["envelope"]
                self.assertEqual(outcome.envelope.id, said["id"])
                self.assertEqual(outcome.envelope.payload, said["payload"])
                self.assertEqual(outcome.envelope.ack_of, said.get("ack_of"))

    def test_replies_are_as_promised(self) -> None:
        """Every reply to a request of the file is one that the catalogue defines for it, or an error."""
        envelopes = [vector["envelope"] for vector in _read("accept.json")]
        asked = {each["id"]: CATALOGUE[each["type"]] for each in envelopes if each["type"] in CATALOGUE}
        replies = [each for each in envelopes if each.get("ack_of") in asked]
        self.assertEqual({asked[each["ack_of"]].name for each in replies}, set(CATALOGUE))
        for reply in replies:
            with self.subTest(reply["id"]):
                message = asked[reply["ack_of"]]
                is_error = reply["type"] == ERROR
                self.assertIn(reply["type"], (message.reply, ERROR))
                (ERROR_SCHEMA if is_error else message.reply_schema).check(reply["payload"])

    def test_what_is_signed(self) -> None:
        """Parsed, split or rewritten, and signed, every frame gives its vector's envelope, bytes and sig."""
        for vector in _read("accept.json"):
            frame = bytes.fromhex(vector["frame_hex"])
            with self.subTest(vector["name"]):
                if "frame_utf8" in vector:
                    self.assertEqual(frame, vector["frame_utf8"].encode())
                members = canonical.parse(frame)
                self.assertEqual(members, vector["envelope"])
                self.assertEqual(canonical.parse_exactly(frame), members)
                signed = envelope.unseal_exactly(*canonical.parse_and_write(frame)).signed
                self.assertEqual(signed, vector["canonical_utf8"].encode())
                plain = envelope.unseal_plainly(frame)
                if plain is not None and plain.read() is not None:
                    self.assertEqual(plain.signed, signed)
                key = Key(vector["key_id"], decode_secret(vector["key_b64"]), "any", 0.0)
                self.assertEqual(key.sign(signed), vector["sig"])
                self.assertEqual(members["auth"]["sig"], vector["sig"])

    def test_a_second_time(self) -> None:
        """A second copy of every request except a push is a replay, and every second push passes."""
        replay = ReplayCache(0.0)
        requests = [vector for vector in _read("accept.json") if vector["kind"] == "request"]
        for vector in requests:
            _judge(vector, replay)
        for vector in requests:
            with self.subTest(vector["name"]):
                outcome = _judge(vector, replay)
                if vector["envelope"]["type"] == "s2s.command.push":
                    self.assertIsInstance(outcome, Request)
                else:
                    self.assertEqual(outcome.error.code, "replay")

    def test_every_message_is_there(self) -> None:
        """There is a vector of every request of the catalogue and of every reply-only type."""
        types = {vector["envelope"]["type"] for vector in _read("accept.json")}
        self.assertEqual((set(CATALOGUE) | REPLY_ONLY) - types, set())


class RefuseTests(SynchronousTestCase):
    """``refuse.json``."""

    def test_frames_are_refused(self) -> None:
        """Every frame of refuse.json gets its code, rule, path and signature or none, and closes the link or not."""
        replay = ReplayCache(0.0)
        for vector in _read("refuse.json"):
            with self.subTest(vector["name"]):
                outcome = _judge(vector, replay)
                if isinstance(outcome, Request):
                    outcome = self.responded(outcome)
                self.assertIsInstance(outcome, Refusal)
                error = outcome.error
                self.assertEqual(
                    (error.code, error.signed, error.closes), (vector["code"], vector["signed"], vector["closes"])
                )
                self.assertTrue(outcome.is_answered)
                if "rule" in vector:
                    self.assertEqual(error.details["rule"], vector["rule"])
                if "path" in vector:
                    self.assertEqual(error.details["path"], vector["path"])
                if not error.signed:
                    self.assertIsNone(outcome.ack_of)
                ERROR_SCHEMA.check(error.payload())

    def responded(self, request: Request) -> Refusal:
        """Return the refusal of a push by the inbox, which checks the command before it needs a database."""
        inbox = Inbox(None, registry(BUILTIN))  # type: ignore[arg-type]
        error: WireError = self.failureResultOf(inbox.push(request.payload), WireError).value
        return Refusal(error, request.envelope.id)

    def test_both_parsers_refuse(self) -> None:
        """The exact parser refuses every frame that the fast one refuses, by the same rule."""
        for vector in _read("refuse.json"):
            if vector["code"] == "bad_json":
                with self.subTest(vector["name"]):
                    error = self.assertRaises(BadJson, canonical.parse_exactly, bytes.fromhex(vector["frame_hex"]))
                    self.assertEqual(error.details["rule"], vector["rule"])

    def test_every_rule_is_there(self) -> None:
        """There is a vector for every rule of JSON and for every code that a single frame can cause."""
        vectors = _read("refuse.json")
        self.assertEqual({vector["rule"] for vector in vectors if "rule" in vector}, set(canonical.RULES))
        codes = {vector["code"] for vector in vectors}
        self.assertEqual(codes - set(BY_CODE), set())
        for code in "bad_json auth_required auth_bad unsupported_version bad_envelope forbidden ts_skew".split():  # noqa: SIM905
            self.assertIn(code, codes)
        self.assertLessEqual({"unsupported_type", "bad_payload"}, codes)


class OtherFilesTests(SynchronousTestCase):
    """``canonical.json``, ``lengths.json`` and the writer of all of them."""

    def test_canonical_forms(self) -> None:
        """Both our writer and canonicaljson write every value of canonical.json as the file states."""
        for vector in _read("canonical.json"):
            with self.subTest(vector["name"]):
                written = bytes.fromhex(vector["canonical_hex"])
                self.assertEqual(written, vector["canonical_utf8"].encode())
                value = canonical.parse_exactly(b'{"value":' + vector["value"].encode() + b"}")
                self.assertEqual(canonical.dumps(value), b'{"value":' + written + b"}")
                self.assertEqual(canonical.dumps_exactly(value), b'{"value":' + written + b"}")
                self.assertEqual(encode_canonical_json(value["value"]), written)

    def test_lengths_are_consistent(self) -> None:
        """Every prefix of lengths.json states its length, the limit decides, and a length of zero is not JSON."""
        for vector in _read("lengths.json"):
            self.assertEqual(bytes.fromhex(vector["prefix_hex"]), vector["length"].to_bytes(4, "big"))
            too_long = vector["length"] > vector["frame_size_limit"]
            expected = "toolarge" if too_long else None if vector["length"] else "bad_json"
            self.assertEqual(vector["code"], expected)

    def test_files_are_as_their_writer_writes_them(self) -> None:
        """The files equal the output of make_vectors.py, which shares no code with s2s."""
        checking = [sys.executable, str(_HERE / "make_vectors.py"), "--check"]
        done = subprocess.run(checking, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertNotIn("s2s import", (_HERE / "make_vectors.py").read_text("utf-8"))
