"""Bad input to a real server over real sockets: each is refused as the protocol says, and nothing else happens."""

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

#: The reader's clock for the vectors (tests/vectors/README.rst).
VECTORS_NOW = 1737990000
#: Links that are judged side by side: fewer than the silent ones that a server keeps.
TOGETHER = 50
#: What a server's memory may grow by under a flood of bad input, in bytes.
GROWTH = 4 << 20
_sources = itertools.count(1)
_WELL_FORMED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def vectors(name: str) -> list[dict[str, Any]]:
    """Read a file of vectors."""
    found: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors" / f"{name}.json").read_text())
    return found


def padded(peer: Peer, size: int, key: str) -> bytes:
    """Make a whole push of exactly so many bytes; an unknown member of the envelope fills it up."""
    envelope = peer.envelope(PUSH, command(key), pad="")
    body = sign({**envelope, "pad": "x" * (size - len(sign(envelope)))})
    assert len(body) == size
    return framed(body)


class Refusals(RoleTestCase):
    """What every test of a refusal needs, whosever the server is."""

    before: dict[str, int]
    source = ""

    def peer(self, server: Server, **how: Any) -> Peer:
        """Connect to a server, from an address that no other test has: a peer's lines in the log are bounded."""
        if not self.source:
            self.source = f"127.0.1.{next(_sources)}"
        peer = server.connect(source=self.source, **how)
        self.addCleanup(peer.close)
        return peer

    def rows(self) -> dict[str, int]:
        """Count the rows of every table, but for the one that shows who is linked."""
        names = self.execute("select tablename from pg_tables where schemaname like 's2s%'")
        return {name: self.count(name) for (name,) in names if name != "engine_links"}

    @inlineCallbacks
    def unharmed(self, server: Server, refusals: int, strangers: int = 0, **new_rows: int) -> Iterator[Deferred[Any]]:
        """See that it still serves, that only these rows are new, and that it logged each refusal.

        :param strangers: refusals of links without a valid frame, which share a few lines.
        """
        peer = self.peer(server)
        self.assertEqual(peer.greet()["role"], "server")
        self.assertEqual({**self.before, **new_rows}, self.rows())
        yield self.told(server, refusals, strangers)

    @inlineCallbacks
    def told(self, server: Server, refusals: int, strangers: int) -> Iterator[Deferred[Any]]:
        """See that each refusal has a line or is counted in one; of those of strangers a few have a line.

        A server with more of them than have lines is stopped, which tells what was counted.
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
        """Wait until so many notices are there."""
        yield poll(lambda: self.count("notices") == notices, f"there are {notices} notices")

    def refused(self, peer: Peer, code: str, request: Frame | None = None) -> Frame:
        """See that the next error has this code, and names the request; without one it has no signature either.

        :returns: its ``details``.
        """
        error = peer.refusal()
        self.assertEqual((error["payload"]["code"], error.get("ack_of")), (code, request and request["id"]))
        self.assertEqual("auth" in error, request is not None)
        details: Frame = error["payload"]["details"]
        self.assertIs(type(details["retryable"]), bool)
        return details

    def closed(self, peer: Peer) -> None:
        """See that nothing more comes, and the link ends."""
        self.assertEqual(peer.rest(), [])


class OwnServerTestCase(Refusals):
    """A test with servers of its own."""

    @inlineCallbacks
    def started(self, *options: str, **how: Any) -> Iterator[Deferred[Any]]:
        """Start a server, and note what its database holds."""
        server = self.server(*options, **how)
        yield server.start()
        self.before = self.rows()
        return server


class SharedTestCase(Refusals, SharedServerTestCase):
    """A test with the shared server."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Note what its database holds."""
        yield super().setUp()
        self.before = self.rows()


class VectorTests(OwnServerTestCase):
    """``tests/vectors``, to a server whose clock stands where they want it."""

    def judge(self, server: Server, found: list[dict[str, Any]], texts: dict[tuple[str, Any], str]) -> None:
        """Send each of some vectors over a link of its own, and see that it is refused as it says."""
        for start in range(0, len(found), TOGETHER):
            sent = [(self.peer(server, now=VECTORS_NOW), vector) for vector in found[start : start + TOGETHER]]
            for peer, vector in sent:
                peer.write(framed(bytes.fromhex(vector["frame_hex"])))
            for peer, vector in sent:
                self.assert_as_said(peer, vector, texts)
                peer.close()

    def assert_as_said(self, peer: Peer, vector: dict[str, Any], texts: dict[tuple[str, Any], str]) -> None:
        """See that the answer to one is what it says."""
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
            # A fixed text: nothing of the frame comes back.
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
        # The one key with other rights; a key that the server does not know yet makes it read all of them.
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
        """Of accept.json, what an engine says is taken: requests are answered with a signature, replies not at all."""
        found = [vector for vector in vectors("accept") if vector["reader"] == "server"]
        for key in {Key(vector["key_id"], vector["key_b64"]) for vector in found} - {K1}:
            self.add_key(key)
        server = yield self.started(at=VECTORS_NOW)
        peer = self.peer(server, now=VECTORS_NOW)
        # All at once: a server looks once a second for a type of command that it does not know.
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
        """Of lengths.json, what is too long or nothing is refused on four bytes alone, and the limit itself is read."""
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
    """Frames that come in odd pieces."""

    @inlineCallbacks
    def test_truncated(self):
        """A frame that ends in the middle, or a length that does, is nothing: no answer, no row, no line."""
        server = self.shared
        for cut in (1, 3, 4, 5, 100, -1):
            peer = self.peer(server)
            peer.write(peer.frame(PUSH, command("never whole"))[:cut])
            peer.close()
        yield self.unharmed(server, refusals=0)

    @inlineCallbacks
    def test_byte_by_byte(self):
        """One byte at a time a good frame is taken and a bad one refused, as if they had come whole."""
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
        """A body of exactly the limit is served, one of a byte more is refused before it is read."""
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
        """What comes after a bad frame in the same piece is not acted upon; what came before it is."""
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
    """Frames of somebody who may not send them, or not now, or not again."""

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
        """Keys that are unknown, ended, not begun or wrong get one answer; one of the other role is forbidden."""
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
        """A stale or future ts is told our clock; the third in a row closes the link, a fresh one begins anew."""
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
        """A request that comes again is a replay on the same link and on another; a push that does is a duplicate."""
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
        """An unsigned error answers nothing, whatever it claims, and gets no answer; a second one closes the link."""
        server = self.shared
        peer = self.peer(server)
        peer.serves.clear()
        challenge = peer.request(CHECK)
        payload = {"code": "unsupported_type", "message": "", "details": {}}
        claim = framed(canonical(peer.envelope(ERROR, payload, ack_of=challenge["id"])))
        peer.write(claim)
        self.assertEqual(peer.call(CHECK, {})["role"], "server")
        self.assertEqual(server.lines("engine up"), [])
        # The true answer still counts.
        peer.reply(challenge, HEALTH_ACK, {"role": "engine", "version": "1", "uptime_s": 1})
        peer.request(SWEEP)
        peer.write(claim)
        self.closed(peer)
        # The first one came before any valid frame.
        yield server.says("an unsigned error says", 1)
        yield self.unharmed(server, 0)

    def test_unasked_replies(self):
        """Replies that nobody asked for, late or ill-formed ones are dropped without a word, and the link goes on."""
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
        # What would close the link if it were a request closes it in silence.
        peer.send(ACK, {}, ack_of="x", src="server")
        self.assertEqual([frame["type"] for frame in peer.rest() if frame["type"] == ERROR], [])
        self.assertEqual(self.rows(), self.before)


class FloodTests(OwnServerTestCase):
    """Many at once."""

    @inlineCallbacks
    def test_silent(self):
        """A hundred silent connections keep nobody out, and none of them stays."""
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
        """Hundreds of refused frames, halves of frames and replies to nobody leave the server's memory as it was."""
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
