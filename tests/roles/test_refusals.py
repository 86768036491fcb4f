"""Bad input to a real server over real sockets: it is refused as the protocol requires, without other effects."""

from __future__ import annotations

import base64
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from s2s.runtime.line_quota import MOST_TOLD, TOLD
from tests.support.peer import (
    ACK,
    CHECK,
    ERROR,
    HEALTH_ACK,
    K1,
    PUSH,
    SWEEP,
    Frame,
    Key,
    Peer,
    canonical,
    command,
    framed,
    sign,
)
from tests.support.roles import RoleTestCase, Server, SharedServerTestCase
from tests.support.waiting import poll

#: The time of the reader's clock for the vectors (tests/vectors/README.rst).
VECTORS_NOW = 1737990000
#: The number of links tested side by side: fewer than the silent ones that a server keeps.
TOGETHER = 50
#: Bytes by which a server's memory may grow under a flood of bad input.
GROWTH = 4 << 20
_sources = itertools.count(1)
_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def vectors(name: str) -> list[dict[str, Any]]:
    """Read a file of vectors."""
    found: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors" / f"{name}.json").read_text())
    return found


def padded(peer: Peer, size: int, key: str) -> bytes:
    """Return a push of exactly this size, padded by an unknown member of the envelope."""
    envelope = peer.envelope(PUSH, command(key), pad="")
    body = sign({**envelope, "pad": "x" * (size - len(sign(envelope)))})
    assert len(body) == size
    return framed(body)


class Refusals(RoleTestCase):
    """The helpers of every test of a refusal, for any server."""

    before: dict[str, int]
    source = ""

    def peer(self, server: Server, **how: Any) -> Peer:
        """Connect to a server from an address of this test's own, since the log lines of an address are bounded."""
        if not self.source:
            self.source = f"127.0.1.{next(_sources)}"
        peer = server.connect(source=self.source, **how)
        self.addCleanup(peer.close)
        return peer

    def rows(self) -> dict[str, int]:
        """Count the rows of every table but the one with the links."""
        names = self.execute("select tablename from pg_tables where schemaname like 's2s%'")
        return {name: self.count(name) for (name,) in names if name != "engine_links"}

    @inlineCallbacks
    def unharmed(self, server: Server, refusals: int, strangers: int = 0, **new_rows: int) -> Iterator[Deferred[Any]]:
        """Assert that the server still works, that only these rows are new, and that it logged each refusal.

        :param strangers: refusals of links without a valid frame, which share a few lines.
        """
        peer = self.peer(server)
        self.assertEqual(peer.greet()["role"], "server")
        self.assertEqual({**self.before, **new_rows}, self.rows())
        yield self.told(server, refusals, strangers)

    @inlineCallbacks
    def told(self, server: Server, refusals: int, strangers: int) -> Iterator[Deferred[Any]]:
        """Assert that each refusal has a line or is counted in one; of those of strangers a few have a line.

        A server with more refusals of strangers than lines is stopped, which logs the count.
        """
        if refusals > MOST_TOLD:
            server.stop()

        def logged() -> int:
            sums = [line.partition(" more frames: ")[2] for line in server.lines("refused more frames: ")]
            return len(server.lines(": refused, ")) + sum(int(each) for each in re.findall("[0-9]+", " ".join(sums)))

        yield poll(lambda: logged() >= refusals, "the refusals are logged")
        self.assertTrue(0 <= logged() - refusals <= min(strangers, TOLD), logged())

    @inlineCallbacks
    def took_effect(self, notices: int) -> Iterator[Deferred[Any]]:
        """Wait until this many notices exist."""
        yield poll(lambda: self.count("notices") == notices, f"there are {notices} notices")

    def refused(self, peer: Peer, code: str, request: Frame | None = None) -> Frame:
        """Assert that the next error has this code and names the request; without a request it is unsigned too.

        :returns: the ``details`` of the error.
        """
        error = peer.refusal()
        self.assertEqual((error["payload"]["code"], error.get("ack_of")), (code, request and request["id"]))
        self.assertEqual("auth" in error, request is not None)
        details: Frame = error["payload"]["details"]
        self.assertIs(type(details["retryable"]), bool)
        return details

    def closed(self, peer: Peer) -> None:
        """Assert that no more frames come, and that the link ends."""
        self.assertEqual(peer.rest(), [])


class OwnServerTestCase(Refusals):
    """A test with separate servers."""

    @inlineCallbacks
    def started(self, *options: str, **how: Any) -> Iterator[Deferred[Any]]:
        """Start a server, and count the rows of its database."""
        server = self.server(*options, **how)
        yield server.start()
        self.before = self.rows()
        return server


class SharedTestCase(Refusals, SharedServerTestCase):
    """A test with the shared server."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Count the rows of the shared server's database."""
        yield super().setUp()
        self.before = self.rows()


class VectorTests(OwnServerTestCase):
    """``tests/vectors``, sent to a server with the clock of the vectors."""

    def judge(self, server: Server, found: list[dict[str, Any]], texts: dict[tuple[str, Any], str]) -> None:
        """Send each vector over a separate link, and assert the refusal that the vector names."""
        for start in range(0, len(found), TOGETHER):
            sent = [(self.peer(server, now=VECTORS_NOW), vector) for vector in found[start : start + TOGETHER]]
            for peer, vector in sent:
                peer.write(framed(bytes.fromhex(vector["frame_hex"])))
            for peer, vector in sent:
                self.assert_as_said(peer, vector, texts)
                peer.close()

    def assert_as_said(self, peer: Peer, vector: dict[str, Any], texts: dict[tuple[str, Any], str]) -> None:
        """Assert that the reply to a vector is the one that it names."""
        error = peer.refusal()
        said, details = error["payload"], error["payload"]["details"]
        self.assertEqual(said["code"], vector["code"], vector["name"])
        for name in ("rule", "path"):
            if name in vector:
                self.assertEqual(details.get(name), vector[name], vector["name"])
        self.assertEqual("auth" in error, vector["signed"], vector["name"])
        sent_id = json.loads(bytes.fromhex(vector["frame_hex"])).get("id") if vector["signed"] else None
        is_named = isinstance(sent_id, str) and _WELL_FORMED_ID.fullmatch(sent_id)
        self.assertEqual(error.get("ack_of"), sent_id if is_named else None, vector["name"])
        if not vector["signed"]:
            # The text is fixed: no part of the frame is returned.
            self.assertEqual(texts.setdefault((said["code"], details.get("rule")), said["message"]), said["message"])
        if vector["closes"]:
            self.assertEqual(peer.rest(), [], vector["name"])
        else:
            self.assertEqual(peer.call(CHECK, {})["role"], "server", vector["name"])

    @inlineCallbacks
    def test_refuse(self):
        """Every frame of refuse.json gets its code, its signature or none, its ack_of, and its end of the link."""
        server = yield self.started(at=VECTORS_NOW)
        found = vectors("refuse")
        texts: dict[tuple[str, Any], str] = {}
        self.judge(server, [vector for vector in found if "key_role" not in vector], texts)
        # Give the single key another role; a key unknown to the server makes it read all keys.
        self.execute("update s2s.s2s_keys set role = 'server'")
        late = Key("late", K1.key_b64)
        self.add_key(late, "engine")
        self.before = self.rows()
        good = self.peer(server, now=VECTORS_NOW, key=late)
        self.assertEqual(good.greet()["role"], "server")
        self.judge(server, [vector for vector in found if "key_role" in vector], texts)
        self.assertEqual(self.rows(), self.before)
        strangers = sum(not vector["signed"] for vector in found)
        self.assertEqual(good.call(CHECK, {})["role"], "server")
        yield self.told(server, len(found) - strangers, strangers)

    @inlineCallbacks
    def test_accept(self):
        """Engine frames of accept.json are accepted: requests get a signed reply, replies get none."""
        found = [vector for vector in vectors("accept") if vector["reader"] == "server"]
        for key in {Key(vector["key_id"], vector["key_b64"]) for vector in found} - {K1}:
            self.add_key(key)
        server = yield self.started(at=VECTORS_NOW)
        peer = self.peer(server, now=VECTORS_NOW)
        # Written at once, since a server reads an unknown command type only once a second.
        peer.write(b"".join(framed(bytes.fromhex(vector["frame_hex"])) for vector in found))
        asked = {vector["envelope"]["id"]: vector for vector in found if vector["kind"] == "request"}
        while asked:
            answer = peer.until(lambda frame: frame.get("ack_of") in asked)
            vector = asked.pop(answer["ack_of"])
            unknown = vector["envelope"]["payload"].get("cmd_type") == "vector.echo"
            expected = ERROR if unknown else HEALTH_ACK if vector["envelope"]["type"] == CHECK else ACK
            self.assertEqual((answer["type"], "auth" in answer), (expected, True), vector["name"])
            self.assertEqual(answer["payload"].get("code"), "unknown_command" if unknown else None, vector["name"])
        self.assertEqual(peer.call(CHECK, {})["role"], "server")
        self.assertEqual(self.count("commands"), 1)

    @inlineCallbacks
    def test_lengths(self):
        """Too long or zero lengths of lengths.json are refused after four bytes, and the limit itself is read."""
        found = vectors("lengths")
        servers = {}
        for limit in {vector["frame_size_limit"] for vector in found}:
            servers[limit] = yield self.started("--frame-size-limit", str(limit))
        for vector in found:
            peer = self.peer(servers[vector["frame_size_limit"]])
            peer.write(bytes.fromhex(vector["prefix_hex"]))
            if vector["code"] is None:
                peer.write(padded(peer, vector["length"], "as long as may be")[4:])
                self.assertEqual(peer.until(lambda frame: "ack_of" in frame)["payload"]["accepted"], True)
            else:
                self.refused(peer, vector["code"])
                self.closed(peer)
        for limit, server in servers.items():
            self.assertEqual(self.peer(server).greet()["frame_size_limit"], limit)


class BytesTests(SharedTestCase):
    """Frames that arrive in odd pieces."""

    @inlineCallbacks
    def test_truncated(self):
        """A frame or a length that ends in the middle has no effect: no reply, no row, no line."""
        server = self.shared
        for cut in (1, 3, 4, 5, 100, -1):
            peer = self.peer(server)
            peer.write(peer.frame(PUSH, command("never whole"))[:cut])
            peer.close()
        yield self.unharmed(server, refusals=0)

    @inlineCallbacks
    def test_byte_by_byte(self):
        """Byte by byte, a good frame is accepted and a bad one refused, as if they had arrived whole."""
        server = self.shared
        good, bad = self.peer(server), self.peer(server)
        for byte in good.frame(PUSH, command("in pieces")):
            good.write(bytes([byte]))
        self.assertTrue(good.until(lambda frame: "ack_of" in frame)["payload"]["accepted"])
        for byte in framed(b'{"auth":{},"n":1.5}'):
            bad.write(bytes([byte]))
        self.assertEqual(self.refused(bad, "bad_json")["rule"], "float")
        self.closed(bad)
        yield self.took_effect(1)
        yield self.unharmed(server, 0, strangers=1, commands=1, idempotency_keys=1, notices=1)

    @inlineCallbacks
    def test_limit(self):
        """A body of exactly the limit is served, and a longer one is refused before it is read."""
        server, limit = self.shared, 65536
        peer = self.peer(server)
        peer.write(padded(peer, limit, "fits"))
        self.assertTrue(peer.until(lambda frame: "ack_of" in frame)["payload"]["accepted"])
        peer.write(padded(peer, limit + 1, "does not fit"))
        self.assertEqual(self.refused(peer, "toolarge")["limit"], limit)
        self.closed(peer)
        yield self.took_effect(1)
        yield self.unharmed(server, 1, commands=1, idempotency_keys=1, notices=1)

    @inlineCallbacks
    def test_after_a_bad_one(self):
        """Frames after a bad one in the same piece have no effect; those before it have."""
        server = self.shared
        peer = self.peer(server)
        first, second = (peer.frame(PUSH, command(key)) for key in ("before", "after"))
        peer.write(first + framed(b"[]") + second + second)
        self.assertEqual(self.refused(peer, "bad_json")["rule"], "not_object")
        self.closed(peer)
        yield self.took_effect(1)
        yield self.unharmed(server, 1, commands=1, idempotency_keys=1, notices=1)
        self.assertEqual(self.execute("select idem_key from s2s.commands"), [("before",)])


class SenderTests(SharedTestCase):
    """Frames whose sender may not send them, or not now, or not again."""

    @inlineCallbacks
    def test_reflected(self):
        """A server's own frame that is sent back to it is forbidden, and the link is closed."""
        server = self.shared
        peer = self.peer(server)
        challenge = peer.request(CHECK)
        peer.write(framed(peer.last))
        self.assertEqual(self.refused(peer, "forbidden", challenge)["path"], "/src")
        self.closed(peer)
        yield self.unharmed(server, 1)

    @inlineCallbacks
    def test_keys(self):
        """Unknown, ended, future or wrong keys get the same reply; a key of the other role is forbidden."""
        secret = base64.b64encode(b"another secret of at least 32 bytes").decode()
        ended, later, server_only = (Key(name, secret) for name in ("ended", "later", "server-only"))
        for key in (ended, later):
            self.add_key(key)
        self.add_key(server_only, "server")
        self.execute("update s2s.s2s_keys set active_to = now() - interval '1 second' where key_id = 'ended'")
        self.execute("update s2s.s2s_keys set active_from = now() + interval '1 hour' where key_id = 'later'")
        server, self.before = self.shared, self.rows()
        answers = []
        for key in (Key("unknown", secret), ended, later, Key("k1", secret)):
            peer = self.peer(server)
            peer.write(framed(sign(peer.envelope(PUSH, command("stolen")), key)))
            error = peer.refusal()
            answers.append((error["payload"], sorted(error)))
            self.closed(peer)
        self.assertEqual(answers[0][0]["code"], "auth_bad")
        self.assertEqual(answers, answers[:1] * 4)
        peer = self.peer(server)
        request = peer.envelope(PUSH, command("stolen"))
        peer.write(framed(sign(request, server_only)))
        self.assertEqual(self.refused(peer, "forbidden", request)["path"], "/auth/key_id")
        self.closed(peer)
        yield self.unharmed(server, 1, strangers=4)

    @inlineCallbacks
    def test_skew(self):
        """The refusal of a stale or future ts has the server's time; the third without a fresh one closes the link."""
        server = self.shared
        peer = self.peer(server)
        for age in (400, -400, 0, 302, -302, 10_000):
            now = int(time.time())
            request = peer.envelope(PUSH, command(f"aged {age}"), ts=now - age)
            peer.write(framed(sign(request)))
            if age:
                details = self.refused(peer, "ts_skew", request)
                self.assertTrue(details["retryable"])
                self.assertEqual((details["max_skew_s"], details["path"]), (300, "/ts"))
                self.assertAlmostEqual(details["server_ts"], now, delta=2)
                self.assertEqual(details["skew_s"], details["server_ts"] - request["ts"])
            else:
                self.assertTrue(peer.answer(request["id"])["payload"]["accepted"])
        self.closed(peer)
        yield self.took_effect(1)
        yield self.unharmed(server, 5, commands=1, idempotency_keys=1, notices=1)

    @inlineCallbacks
    def test_replay(self):
        """A repeated request is a replay on the same link and on another; a repeated push is a duplicate."""
        server = self.shared
        first, second = self.peer(server), self.peer(server)
        check, push = first.envelope(CHECK, {}), first.envelope(PUSH, command("twice"))
        for peer in (first, second):
            peer.write(framed(sign(push)))
            self.assertEqual(peer.answer(push["id"])["payload"]["duplicate"], peer is second)
        first.write(framed(sign(check)))
        self.assertEqual(first.answer(check["id"])["type"], HEALTH_ACK)
        for peer in (first, second):
            peer.write(framed(sign(check)))
            self.assertFalse(self.refused(peer, "replay", check)["retryable"])
            self.closed(peer)
        yield self.took_effect(1)
        yield self.unharmed(server, 2, commands=1, idempotency_keys=1, notices=1)

    @inlineCallbacks
    def test_unsigned_answer(self):
        """An unsigned ack that claims to answer the server's challenge is refused like any other unsigned frame."""
        server = self.shared
        for payload in ({"role": "engine", "version": "1", "uptime_s": 1}, {}):
            peer = self.peer(server)
            peer.serves.clear()
            claim = peer.envelope(HEALTH_ACK, payload, ack_of=peer.request(CHECK)["id"])
            peer.write(framed(canonical(claim)))
            self.refused(peer, "auth_required")
            self.closed(peer)
        self.assertEqual(server.lines("engine up"), [])
        yield self.unharmed(server, 0, strangers=2)

    @inlineCallbacks
    def test_unsigned_error(self):
        """An unsigned error answers no request and gets no reply; a second one closes the link."""
        server = self.shared
        peer = self.peer(server)
        peer.serves.clear()
        challenge = peer.request(CHECK)
        payload = {"code": "unsupported_type", "message": "", "details": {}}
        claim = framed(canonical(peer.envelope(ERROR, payload, ack_of=challenge["id"])))
        peer.write(claim)
        self.assertEqual(peer.call(CHECK, {})["role"], "server")
        self.assertEqual(server.lines("engine up"), [])
        # The true reply still counts.
        peer.reply(challenge, HEALTH_ACK, {"role": "engine", "version": "1", "uptime_s": 1})
        peer.request(SWEEP)
        peer.write(claim)
        self.closed(peer)
        # The first one arrived before any valid frame.
        yield server.says("received an unsigned error", 1)
        yield self.unharmed(server, 0)

    def test_unasked_replies(self):
        """Unrequested, late or ill-formed replies are dropped silently, and the link goes on."""
        server = self.shared
        peer = self.peer(server)
        peer.greet()
        for type, payload, ack_of in (
            (ACK, {"accepted": True}, "nobody-asked"),
            (HEALTH_ACK, {}, "nobody-asked"),
            (ERROR, {"code": "forbidden", "message": "", "details": {}}, "nobody-asked"),
            (ACK, {}, "not well formed"),
            ("s2s.nothing", {}, "nobody-asked"),
            (PUSH, command("a request in the guise of a reply"), "nobody-asked"),
        ):
            peer.send(type, payload, ack_of=ack_of, ts=0)
        for type in (ACK, HEALTH_ACK, ERROR):
            peer.send(type, {})
        ours = peer.send(CHECK, {})
        self.assertEqual(peer.until(lambda frame: frame["type"] in (ERROR, HEALTH_ACK))["ack_of"], ours)
        # A frame that would close the link as a request closes it silently.
        peer.send(ACK, {}, ack_of="x", src="server")
        self.assertEqual([frame["type"] for frame in peer.rest() if frame["type"] == ERROR], [])
        self.assertEqual(self.rows(), self.before)


class FloodTests(OwnServerTestCase):
    """Many connections or frames at once."""

    @inlineCallbacks
    def test_silent(self):
        """A hundred silent connections keep no peer out, and none of them stays."""
        server = yield self.started()
        silent = [self.peer(server) for _ in range(100)]
        for peer in silent:
            peer.serves.clear()
        good = self.peer(server)
        self.assertEqual(good.greet()["role"], "server")
        self.assertTrue(good.call(PUSH, command("served"))["accepted"])
        for peer in silent:
            self.assertEqual([frame["type"] for frame in peer.rest()], [CHECK])
        yield self.took_effect(1)
        yield self.unharmed(server, 0, commands=1, idempotency_keys=1, notices=1)

    @inlineCallbacks
    def test_memory(self):
        """Hundreds of refused frames, partial frames and unrequested replies do not grow the server's memory."""
        server = yield self.started()

        def flood() -> None:
            for bad in (b"[" * 20_000, *(b"{", b"[]", b'{"a":1.5}', b"\xff", b"[" * 600, b"{}", b'{"auth":1}') * 10):
                peer = self.peer(server)
                peer.write(framed(bad))
                peer.refusal()
                peer.close()
            peer = self.peer(server)
            peer.greet()
            for number in range(500):
                peer.send(ACK, {"n": number}, ack_of=f"nobody-{number}")
                peer.send(f"s2s.type{number}", {})
            peer.call(CHECK, {})
            peer.close()
            for size in (60_000, *[600] * 20):
                half = self.peer(server)
                half.write(framed(b"x" * 65536)[:size])
                half.close()

        for _ in range(2):
            flood()
        before = server.rss
        for _ in range(4):
            flood()
        self.assertLess(server.rss - before, GROWTH)
        yield self.unharmed(server, 6 * 500, strangers=6 * 71)
