"""A real engine, with a test peer as its server (docs/protocol.rst, "The life of a link", "Outbox and sweep")."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.error import ConnectError
from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.roles.engine.service import CONNECTING_S, _TellingEndpoint
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD
from s2s.runtime.status_log import LINK_UP
from tests.support.peer import (
    CHECK,
    ERROR,
    HEALTH_ACK,
    PUSH,
    SWEEP,
    Frame,
    ListeningPeer,
    Peer,
    canonical,
    framed,
    sign,
)
from tests.support.roles import Engine, RoleTestCase
from tests.support.waiting import poll


class ConnectingTests(SynchronousTestCase):
    """The log lines of an engine without a connection."""

    def test_no_answer(self) -> None:
        """A host or name server that does not answer is logged once an outage, before the connection times out."""
        clock, outcomes = FakeClock(), [Deferred[Any]() for _ in range(3)]
        attempts = iter(outcomes)
        endpoint = _TellingEndpoint(SimpleNamespace(connect=lambda _: next(attempts)), "tcp:db.example:1", Clock(clock))
        with capturedLogs() as captured:
            for outcome in outcomes[:2]:
                endpoint.connect(None).addErrback(lambda _: None)
                clock.advance(CONNECTING_S)
                outcome.errback(ConnectError("timed out"))
            endpoint.connect(None)
            outcomes[2].callback(None)
        self.assertEqual(
            [formatEvent(event) for event in captured],
            [
                "still connecting to tcp:db.example:1 after 10 s: neither the host nor a name server answers",
                "no connection to tcp:db.example:1: An error occurred while connecting: timed out",
            ],
        )
        self.assertEqual(clock.getDelayedCalls(), [])


class EngineRoleTests(RoleTestCase):
    """An engine that connects to the test."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Listen, and start an engine, whose connection waits until the test accepts it."""
        super().setUp()
        self.listening = ListeningPeer()
        self.engine_role: Engine = self.engine(self.listening.port)
        # Runs before the engine is stopped, which would wait for unanswered pushes.
        self.addCleanup(self.listening.close)
        yield self.engine_role.start()

    def accepted(self, **how: Any) -> Peer:
        """Accept the engine's next connection."""
        peer = self.listening.accept(**how)
        self.addCleanup(peer.close)
        return peer

    def linked(self) -> Peer:
        """Accept the engine's connection, and prove the link for both sides."""
        peer = self.accepted()
        peer.greet()
        return peer

    def broadcast(self, *messages: str) -> list[str]:
        """Store broadcasts, and return the keys of the commands that they become."""
        self.execute("insert into s2s.broadcasts (message) select unnest(%s)", list(messages))
        return self.broadcast_keys()[-len(messages) :]

    def push(self, peer: Peer) -> Frame:
        """Read up to the next push."""
        return peer.request(PUSH)

    def accept(self, peer: Peer, push: Frame) -> None:
        """Accept a push as if it had been committed."""
        peer.reply(push, "s2s.ack", {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"})

    def dead(self) -> list[tuple[str, str]]:
        """Return the dead rows of the engine: key and code."""
        return self.execute("select idem_key, error_code from s2s.outbox where state = 'dead' order by outbox_id")

    @inlineCallbacks
    def emptied(self) -> Iterator[Deferred[Any]]:
        """Wait until the outbox is empty."""
        yield poll(lambda: not self.execute("select 1 from s2s.outbox where state = 'waiting'"), "the outbox is empty")

    def said(self, code: str) -> str:
        """Return the message of the waiting row's last attempt, if that attempt had this code."""
        rows = self.execute("select error_message from s2s.outbox where state = 'waiting' and error_code = %s", code)
        return "".join(message for (message,) in rows)

    # --- challenge and proof --------------------------------------------------------------------------------------

    def test_health(self):
        """The engine challenges at once, before any request, and its health has all members of the catalogue."""
        peer = self.accepted()
        del peer.serves[CHECK]
        first = peer.read()
        assert first is not None
        self.assertEqual((first["type"], first["payload"], first["src"], first["dst"]), (CHECK, {}, "engine", "server"))
        said = dict(peer.call(CHECK, {}))
        self.assertRegex(said.pop("boot_id"), r"^[0-9A-HJKMNP-TV-Z]{26}$")
        self.assertRegex(said.pop("version"), r"^\d+\.\d+")
        self.assertIn(said.pop("uptime_s"), range(30))
        self.assertIs(said.pop("degraded"), True)  # the link is degraded until the engine's own challenge is answered
        self.assertEqual(
            said,
            {
                "role": "engine",
                "name": "engine-1",
                "state": "running",
                "config_version": 0,
                "frame_size_limit": 65536,
                "outbox_depth": 0,
                "stuck": [],
            },
        )

    @inlineCallbacks
    def test_sweep(self):
        """The engine refuses a sweep before its challenge is answered; afterwards it sweeps and pushes."""
        (key,) = self.broadcast("Harbour closed")
        peer = self.accepted()
        del peer.serves[CHECK]
        challenge = peer.request(CHECK)
        early = peer.call(SWEEP, {"since_ts": 0})
        self.assertEqual((early["code"], early["details"]["retryable"]), ("not_ready", True))
        self.assertGreaterEqual(early["details"]["retry_after_ms"], 0)
        self.assertEqual(self.count("outbox"), 0)
        peer.reply(challenge, HEALTH_ACK, {"role": "server", "version": "9", "uptime_s": 1})
        swept = peer.send(SWEEP, {"since_ts": 0})
        # The ack follows the COMMIT, and the push may precede the ack.
        frames = [peer.until(lambda frame: frame["type"] == PUSH or frame.get("ack_of") == swept) for _ in range(2)]
        by_type = {frame["type"]: frame for frame in frames}
        self.assertEqual(by_type["s2s.ack"]["payload"], {"ok": True, "since_ts": 0, "queued": 1})
        payload = {"message": "Harbour closed", "scope": "global", "severity": "info"}
        expected = {"cmd_type": "notice.publish", "idem_key": key, "payload": payload, "priority": 100}
        self.assertEqual(by_type[PUSH]["payload"], expected)
        self.accept(peer, by_type[PUSH])
        yield self.emptied()
        self.assertEqual(peer.call(SWEEP, {"since_ts": 0}), {"ok": True, "since_ts": 0, "queued": 0})
        self.broadcast("not yet")
        later = int(time.time()) + 100
        self.assertEqual(peer.call(SWEEP, {"since_ts": later}), {"ok": True, "since_ts": later, "queued": 0})

    def test_recorded_sweep(self):
        """A sweep of another link is a replay, as is one that is older than the proof; both close the link."""
        first = self.linked()
        recorded = first.frame(SWEEP, {"since_ts": 0})
        unheard = first.envelope(SWEEP, {"since_ts": 0}, ts=int(time.time()) - 60)
        first.write(recorded)
        first.until(lambda frame: frame["type"] == "s2s.ack")
        first.close()
        self.broadcast("must stay")
        for frame in (recorded, framed(sign(unheard))):
            peer = self.linked()
            peer.write(frame)
            error = peer.refusal()
            self.assertEqual((error["payload"]["code"], "auth" in error), ("replay", True))
            self.assertEqual(peer.rest(), [])
        self.assertEqual(self.execute("select state from s2s.broadcasts"), [("pending",)])

    @inlineCallbacks
    def test_refused_challenge(self):
        """A server that refuses the challenge is left, and tried again after 5 s at the earliest."""
        peer = self.accepted()
        del peer.serves[CHECK]
        peer.refuse(peer.request(CHECK), "forbidden", retryable=False)
        self.assertEqual(peer.rest(), [])
        yield self.engine_role.says("retry")
        self.assertGreaterEqual(self.pauses()[-1], 5)

    def pauses(self) -> list[float]:
        """Return the pauses before the attempts to connect again, in seconds."""
        return [float(pause) for pause in re.findall(r"Scheduling retry .* in (\S+) seconds", self.engine_role.log)]

    @inlineCallbacks
    def test_reconnecting(self):
        """A lost server is tried again at once; a server that was left for unsigned errors, after 5 s or more."""
        self.linked().close()
        peer = self.linked()
        self.assertLess(self.pauses()[-1], 0.2)
        claim = framed(canonical(peer.envelope(ERROR, {"code": "auth_bad", "message": "", "details": {}})))
        peer.write(claim)
        self.assertEqual(peer.call(CHECK, {})["role"], "engine")
        peer.write(claim)
        self.assertEqual(peer.rest(), [])
        yield self.engine_role.says("retry", 2)
        self.assertGreaterEqual(self.pauses()[-1], 5)

    @inlineCallbacks
    def test_another_process_takes_its_link(self):
        """A signed refusal of the link that answers no request causes a slow reconnect, and the log has the reason."""
        peer = self.linked()
        peer.send(ERROR, {"code": "forbidden", "message": "give each a --name", "details": {"retryable": False}})
        peer.close()
        yield self.engine_role.says("retry")
        self.assertGreaterEqual(self.pauses()[-1], 5)
        self.assertEqual(len(self.engine_role.lines("link down: the peer refuses the link: give each a --name")), 1)

    def test_refuses(self):
        """The engine refuses frames as a server does: its own, an unsigned one, and a type that it does not serve."""
        peer = self.linked()
        unknown = peer.call("s2s.nothing", {})
        self.assertEqual((unknown["code"], unknown["details"]["retryable"]), ("unsupported_type", False))
        self.assertIn(SWEEP, unknown["details"]["supported"])
        self.assertEqual(peer.call(PUSH, {})["code"], "unsupported_type")
        bad = peer.call(SWEEP, {"since_ts": "0"})
        self.assertEqual((bad["code"], bad["details"]["path"]), ("bad_payload", "/payload/since_ts"))
        peer.write(peer.frame(CHECK, {}, src="engine", dst="server"))
        self.assertEqual(peer.refusal()["payload"]["code"], "forbidden")
        self.assertEqual(peer.rest(), [])
        peer = self.linked()
        peer.write(framed(canonical(peer.envelope(SWEEP, {"since_ts": 0}))))
        error = peer.refusal()
        self.assertEqual(
            (error["payload"]["code"], "auth" in error, "ack_of" in error), ("auth_required", False, False)
        )
        self.assertEqual(peer.rest(), [])

    # --- the outbox -----------------------------------------------------------------------------------------------

    @inlineCallbacks
    def test_sent_again(self):
        """A retryable push is sent again after the requested pause, with the same key and content and a new id."""
        (key,) = self.broadcast("again and again")
        peer = self.linked()
        peer.send(SWEEP, {"since_ts": 0})
        pushes = [self.push(peer)]
        # A lost link leaves the outcome unknown: the push is sent again over the next link.
        peer.close()
        peer = self.linked()
        began = time.monotonic()
        for code, retryable in (("db_unavailable", True), ("replay", False)):
            pushes.append(self.push(peer))
            peer.refuse(pushes[-1], code, retryable=retryable, retry_after_ms=200)
        pushes.append(self.push(peer))
        self.assertGreaterEqual(time.monotonic() - began, 0.4)
        self.assertEqual([push["payload"] for push in pushes], [pushes[0]["payload"]] * len(pushes))
        self.assertEqual(pushes[0]["payload"]["idem_key"], key)
        self.assertEqual(len({push["id"] for push in pushes}), len(pushes))
        self.accept(peer, pushes[-1])
        yield self.emptied()
        self.assertEqual(self.count("outbox"), 0)

    @inlineCallbacks
    def test_answers_that_are_not_valid(self):
        """A push with an invalid reply is sent again, and the log and the row have the path and the reason."""
        self.broadcast("hello")
        peer = self.linked()
        peer.send(SWEEP, {"since_ts": 0})
        ack = {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"}
        for type, payload, why in (
            ("s2s.ack", {**ack, "cmd_id": "1"}, "by s2s.ack with a bad payload: at /payload/cmd_id: must satisfy type"),
            ("s2s.ack", {**ack, "accepted": False}, "by s2s.ack with a bad payload: at /payload/accepted: "),
            (HEALTH_ACK, {"role": "server", "version": "9", "uptime_s": 1}, "by s2s.health.ack in place of s2s.ack"),
            (ERROR, {"code": "paused", "message": "m"}, "by s2s.error with a bad payload: at /payload/details: the m"),
        ):
            peer.reply(self.push(peer), type, payload)
            yield poll(lambda why=why: why in self.said("bad_reply"), f"the row says {why}")
        told = self.engine_role.lines("its answer is not valid: s2s.command.push was answered by s2s.ack with a bad")
        self.assertIn("at /payload/cmd_id: must satisfy type", told[0])
        again = self.push(peer)
        peer.refuse(again, "overloaded", retryable=True, retry_after_ms=100)
        yield poll(lambda: self.said("overloaded"), "the row has the last one")
        self.accept(peer, self.push(peer))
        yield self.emptied()

    @inlineCallbacks
    def test_a_pause_of_nothing(self):
        """If a server refuses each push and asks for no pause, the engine pauses nevertheless."""
        self.broadcast("hello")
        peer = self.linked()
        peer.send(SWEEP, {"since_ts": 0})
        began = time.monotonic()
        for _ in range(5):
            peer.refuse(self.push(peer), "overloaded", retryable=True, retry_after_ms=0)
        self.accept(peer, self.push(peer))
        self.assertGreaterEqual(time.monotonic() - began, 0.5)
        yield self.emptied()

    @inlineCallbacks
    def test_a_server_that_closes_every_link(self):
        """A server that proves and closes each link causes a bounded number of lines in the engine's log."""
        for _ in range(2 * MOST_TOLD):
            self.linked().close()
        self.engine_role.stop()
        yield poll(lambda: self.engine_role.lines("the link came up"), "the rest is told")
        self.assertLessEqual(len(self.engine_role.lines("link up")), MOST_TOLD)
        self.assertLessEqual(len(self.engine_role.lines("link down")), MOST_TOLD)

    @inlineCallbacks
    def test_set_aside(self):
        """A row that can never succeed is set aside with its code, and the others are sent."""
        peer = self.linked()
        keys = self.broadcast(*"abcd")
        codes = dict(zip(keys, ("unknown_command", "idem_conflict", "bad_payload", None), strict=True))
        peer.send(SWEEP, {"since_ts": 0})
        for _ in keys:
            push = self.push(peer)
            code = codes[push["payload"]["idem_key"]]
            if code is None:
                self.accept(peer, push)
            else:
                peer.refuse(push, code, retryable=False)
        yield self.emptied()
        self.assertEqual(self.dead(), [(key, code) for key, code in codes.items() if code])

    @inlineCallbacks
    def test_smaller_limit(self):
        """A row longer than the limit that the server announced is set aside, and the others are sent."""
        peer = self.accepted()
        ours = peer.serves[CHECK]
        peer.serves[CHECK] = lambda payload: {**ours(payload), "frame_size_limit": 4096}
        peer.greet()
        long, short = self.broadcast("\N{ROCKET}" * 4000, "short")
        peer.send(SWEEP, {"since_ts": 0})
        push = self.push(peer)
        self.assertEqual(push["payload"]["idem_key"], short)
        self.accept(peer, push)
        yield self.emptied()
        self.assertEqual(self.dead(), [(long, "toolarge")])

    @inlineCallbacks
    def test_many(self):
        """A thousand broadcasts are pushed within the window, and settled in any order."""
        keys = self.broadcast(*(f"m{number}" for number in range(1000)))
        peer = self.linked()
        peer.send(SWEEP, {"since_ts": 0})
        open_pushes: list[Frame] = []
        seen: set[str] = set()
        while len(seen) < len(keys):
            open_pushes.append(self.push(peer))
            self.assertLessEqual(len(open_pushes), 1024)
            if len(open_pushes) == 200:
                # Answer the last pushes first.
                while open_pushes:
                    seen.add(open_pushes[-1]["payload"]["idem_key"])
                    self.accept(peer, open_pushes.pop())
        self.assertEqual(seen, set(keys))
        yield self.emptied()
        self.assertEqual(self.count("outbox"), 0)


class TwoOfOneNameTests(RoleTestCase):
    """Two engine processes with one name."""

    @inlineCallbacks
    def test_the_one_that_lost_waits(self):
        """The older process leaves the link to the newer one for 5 s or more, and both logs name the cure."""
        server = self.server()
        yield server.start()
        (self.directory / "other").mkdir()
        first = self.engine(server.port)
        second = Engine(self.directory / "other", self.url, server.port)
        self.addCleanup(second.stop)
        yield first.start()
        yield server.says(LINK_UP)
        yield second.start()
        yield first.says("retry")
        [down] = first.lines("link down")
        self.assertIn("another process has linked as engine-1 with this key: give each a --name of its own", down)
        [pause] = re.findall(r"Scheduling retry .* in (\S+) seconds", first.log)
        self.assertGreaterEqual(float(pause), 5)
        [told] = server.lines("replaces the link of another process")
        self.assertIn("give each a --name", told)
