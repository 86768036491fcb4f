"""A real engine, controlled by a test peer as its server (docs/protocol.rst, "States of an engine")."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

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

BUMP, PAUSE, RESUME = "s2s.config.bump", "s2s.engine.pause", "s2s.engine.resume"
SHUTDOWN = "s2s.engine.shutdown"
WHY = {"reason": "a test"}


class ControlTests(RoleTestCase):
    """An engine that connects to the test."""

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Listen, and start an engine."""
        super().setUp()
        self.listening = ListeningPeer()
        self.role: Engine = self.engine(self.listening.port)
        self.addCleanup(self.listening.close)
        yield self.role.start()

    def linked(self) -> Peer:
        """Accept the engine's next connection, and prove the link for both sides."""
        peer = self.listening.accept()
        self.addCleanup(peer.close)
        peer.greet()
        return peer

    def started(self, peer: Peer) -> None:
        """Repeat health checks until the engine no longer starts."""
        deadline = time.monotonic() + 10
        while peer.call(CHECK, {})["state"] == "starting":
            assert time.monotonic() < deadline, "it starts for ever"

    def configure(self, key: str, value: int) -> int:
        """Set a value in plain SQL, and return the version."""
        return int(
            self.execute("update s2s.config set value = to_jsonb(%s) where key = %s returning version", value, key)[0][
                0
            ]
        )

    def ended(self) -> Deferred[Any]:
        """Wait until the engine's process has ended."""
        return poll(lambda: not self.role.is_running, "it has ended")

    # --- pause and resume -----------------------------------------------------------------------------------------

    def test_pause_and_resume(self):
        """Pause and resume, also repeated, are acked with the state once it is durable; health shows the state too."""
        peer = self.linked()
        self.started(peer)
        for type, state, wanted in (
            (PAUSE, "paused", "paused"),
            (PAUSE, "paused", "paused"),
            (RESUME, "running", "running"),
            (RESUME, "running", "running"),
        ):
            self.assertEqual(peer.call(type, WHY), {"ok": True, "state": state})
            self.assertEqual(self.execute("select name, wanted from s2s.engines"), [("engine-1", wanted)])
            self.assertEqual(peer.call(CHECK, {})["state"], state)

    def test_reason_is_required(self):
        """A pause without a reason, with a long one or with extra members is refused by its path and has no effect."""
        peer = self.linked()
        self.started(peer)
        for payload, path in (({}, "/reason"), ({"reason": ""}, "/reason"), ({**WHY, "for": 3}, "/for")):
            refused = peer.call(PAUSE, payload)
            self.assertEqual((refused["code"], refused["details"]["path"]), ("bad_payload", "/payload" + path))
        self.assertEqual(self.count("engines"), 0)

    @inlineCallbacks
    def test_a_pause_survives_a_restart(self):
        """The wanted state belongs to the engine and not to the process: it survives SIGKILL and a new start."""
        peer = self.linked()
        self.started(peer)
        peer.call(PAUSE, WHY)
        self.role.kill()
        yield self.role.start()
        again = self.linked()
        self.started(again)
        self.assertEqual(again.call(CHECK, {})["state"], "paused")

    @inlineCallbacks
    def test_paused_by_sql(self):
        """A state written into the table by hand is in force at once."""
        peer = self.linked()
        self.started(peer)
        self.execute("insert into s2s.engines (name, wanted, reason) values ('engine-1', 'paused', 'by hand')")
        yield poll(lambda: peer.call(CHECK, {})["state"] == "paused", "it is paused")
        self.execute("delete from s2s.engines")
        yield poll(lambda: peer.call(CHECK, {})["state"] == "running", "it runs")

    @inlineCallbacks
    def test_what_a_paused_engine_does(self):
        """A paused engine still sweeps, sends its outbox, loads a configuration and answers health checks."""
        peer = self.linked()
        self.started(peer)
        peer.call(PAUSE, WHY)
        self.execute("insert into s2s.broadcasts (message) values ('we are back soon')")
        peer.serves[PUSH] = lambda _: {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"}
        self.assertEqual(peer.call(SWEEP, {"since_ts": 0})["queued"], 1)
        yield poll(lambda: peer.call(CHECK, {}) and self.count("outbox") == 0, "the outbox is empty")
        version = self.configure("relay.window", 7)
        self.assertEqual(peer.call(BUMP, {"version": version}), {"ok": True, "version": version})
        self.assertEqual(peer.call(CHECK, {})["state"], "paused")

    # --- configuration --------------------------------------------------------------------------------------------

    def test_bump(self):
        """An older or equal version is acked with the running one, a newer one is loaded, an unknown one is stale."""
        peer = self.linked()
        self.started(peer)
        running = peer.call(CHECK, {})["config_version"]
        self.assertEqual(peer.call(BUMP, {"version": 0}), {"ok": True, "version": running})
        stale = peer.call(BUMP, {"version": running + 1})
        self.assertEqual((stale["code"], stale["details"]["retryable"]), ("stale_version", False))
        self.assertIn("if it is another database than the server's, make the change there as well", stale["message"])
        self.configure("relay.window", 7)
        version = self.configure("relay.window", 8)
        self.assertEqual(version, running + 2)
        self.assertEqual(peer.call(BUMP, {"version": version}), {"ok": True, "version": version})
        self.assertEqual(peer.call(BUMP, {"version": version - 1}), {"ok": True, "version": version})
        self.assertEqual(peer.call(CHECK, {})["config_version"], version)
        self.assertEqual(len(self.role.lines("relay.window is 8 ")), 1)

    # --- shutdown -------------------------------------------------------------------------------------------------

    @inlineCallbacks
    def test_shutdown(self):
        """A shutdown is acked at once with the deadline; the outbox is sent, the link closed, the exit code is 0."""
        peer = self.linked()
        self.started(peer)
        self.execute("insert into s2s.broadcasts (message) select 'm' || n from generate_series(1, 300) n")
        peer.send(SWEEP, {"since_ts": 0})
        before = time.time()
        ack = peer.answer(peer.send(SHUTDOWN, {"grace_ms": 20_000, **WHY}))["payload"]
        self.assertEqual((ack["ok"], ack["state"]), (True, "draining"))
        self.assertTrue(before * 1000 + 19_000 <= ack["deadline_ms"] <= time.time() * 1000 + 20_001)
        pushed = 0
        while (frame := peer.read()) is not None:
            if frame["type"] == PUSH:
                pushed += 1
                answer = {"accepted": True, "duplicate": False, "cmd_id": pushed, "status": "ready"}
                peer.reply(frame, "s2s.ack", answer)
        self.assertLess(time.time(), before + 15)
        yield self.ended()
        self.assertEqual(self.count("outbox"), 0)
        self.role.assert_ended_well()

    @inlineCallbacks
    def test_draining(self):
        """A draining engine refuses new work, answers health checks, and keeps the earliest of several deadlines."""
        self.execute("insert into s2s.outbox (cmd_type, idem_key, payload) values ('a.b', 'k', '{}')")
        peer = self.linked()
        push = peer.request(PUSH)  # left unanswered, so that the drain has something to wait for
        self.started(peer)
        first = peer.call(SHUTDOWN, {"grace_ms": 600_000, **WHY})
        for type, payload in ((SWEEP, {"since_ts": 0}), (BUMP, {"version": 1})):
            refused = peer.call(type, payload)
            self.assertEqual((refused["code"], refused["details"]["retryable"]), ("shutting_down", True))
        self.assertEqual(peer.call(CHECK, {})["state"], "draining")
        self.assertEqual(peer.call(PAUSE, WHY), {"ok": True, "state": "draining"})
        self.assertEqual(peer.call(SHUTDOWN, WHY)["deadline_ms"] < first["deadline_ms"] - 500_000, True)
        later = peer.call(SHUTDOWN, {"grace_ms": 600_000, **WHY})
        self.assertLess(later["deadline_ms"], first["deadline_ms"] - 500_000)
        peer.reply(push, "s2s.ack", {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"})
        self.assertEqual([frame["type"] for frame in peer.rest() if "ack_of" in frame], [])
        yield self.ended()
        self.role.assert_ended_well()

    @inlineCallbacks
    def test_past_the_grace(self):
        """Rows that cannot be sent in time stay in the outbox for the next start, and the exit code is 0 as well."""
        self.execute("insert into s2s.outbox (cmd_type, idem_key, payload) values ('a.b', 'k', '{}')")
        peer = self.linked()
        peer.request(PUSH)
        self.started(peer)
        began = time.monotonic()
        peer.call(SHUTDOWN, {"grace_ms": 500, **WHY})
        yield self.ended()
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(self.execute("select state from s2s.outbox"), [("waiting",)])
        self.role.assert_ended_well()

    @inlineCallbacks
    def test_no_grace(self):
        """A shutdown with a grace of 0 is acked too, before the link is closed."""
        peer = self.linked()
        self.started(peer)
        self.assertEqual(peer.call(SHUTDOWN, {"grace_ms": 0, **WHY})["state"], "draining")
        peer.rest()
        yield self.ended()
        self.role.assert_ended_well()

    @inlineCallbacks
    def test_sigterm_flushes(self):
        """SIGTERM causes a shutdown: the waiting outbox rows are sent before the end."""
        peer = self.linked()
        self.started(peer)
        peer.serves[PUSH] = lambda _: {"accepted": True, "duplicate": False, "cmd_id": 1, "status": "ready"}
        self.execute(
            "insert into s2s.outbox (cmd_type, idem_key, payload)"
            " select 'a.b', 'k' || n, '{}' from generate_series(1, 200) n"
        )
        self.role.terminate()
        peer.rest()
        yield self.ended()
        self.assertEqual(self.count("outbox"), 0)
        self.role.assert_ended_well()

    # --- requests that are not obeyed -----------------------------------------------------------------------------

    def recorded(self, peer: Peer, type: str, payload: Frame) -> bytes:
        """Have a request obeyed, and return its frame."""
        frame = peer.frame(type, payload)
        peer.write(frame)
        peer.until(lambda each: each["type"] == "s2s.ack")
        return frame

    def test_recorded(self):
        """A control request recorded on one link is obeyed on no other, even if it was held back and never arrived."""
        first = self.linked()
        self.started(first)
        frames = [
            self.recorded(first, PAUSE, WHY),
            self.recorded(first, RESUME, WHY),
            framed(sign(first.envelope(SHUTDOWN, WHY, ts=int(time.time()) - 100))),
        ]
        first.close()
        for frame in frames:
            peer = self.linked()
            peer.write(frame)
            self.assertEqual(peer.refusal()["payload"]["code"], "replay")
            self.assertEqual(peer.rest(), [])
        self.assertTrue(self.role.is_running)
        self.assertEqual(self.execute("select wanted from s2s.engines"), [("running",)])

    @inlineCallbacks
    def test_recorded_before_a_restart(self):
        """A frame that one process obeyed, or that was held back from it, is refused by the next, however soon."""
        for is_obeyed in (False, True):
            first = self.linked()
            self.started(first)
            frame = first.frame(RESUME, WHY)
            if is_obeyed:
                first.write(frame)
                first.until(lambda each: each["type"] == "s2s.ack")
            self.role.kill()
            yield self.role.start()
            first.close()
            peer = self.linked()
            peer.write(frame)
            self.assertEqual(peer.refusal()["payload"]["code"], "replay")
            self.assertEqual(peer.rest(), [])
            self.linked().close()

    def test_unsigned(self):
        """A shutdown that is unsigned, changed, reflected or sent before the proof is not obeyed."""
        peer = self.listening.accept()
        self.addCleanup(peer.close)
        del peer.serves[CHECK]
        challenge = peer.request(CHECK)
        self.assertEqual(peer.call(SHUTDOWN, WHY)["code"], "not_ready")
        peer.reply(challenge, HEALTH_ACK, {"role": "server", "version": "9", "uptime_s": 1})
        self.assertEqual(peer.call(CHECK, {})["state"], "running")
        peer.close()
        for make, code in (
            (lambda peer: canonical(peer.envelope(SHUTDOWN, WHY)), "auth_required"),
            (lambda peer: sign(peer.envelope(SHUTDOWN, WHY)).replace(b"a test", b"a joke"), "auth_bad"),
            (lambda peer: sign(peer.envelope(SHUTDOWN, WHY, src="engine", dst="server")), "forbidden"),
        ):
            peer = self.linked()
            peer.write(framed(make(peer)))
            self.assertEqual(peer.refusal()["payload"]["code"], code)
            self.assertEqual(peer.rest(), [])
            # Refusals by the test do not make the engine slow: the next connection comes at once.
        self.assertTrue(self.role.is_running)
        self.assertEqual(self.linked().call(CHECK, {})["role"], "engine")

    def test_claims(self):
        """An unsigned error changes nothing, whatever its content, and answers no request."""
        peer = self.linked()
        self.started(peer)
        claim = canonical(peer.envelope(ERROR, {"code": "shutting_down", "message": "", "details": {}}))
        peer.write(framed(claim))
        self.assertEqual(peer.call(PAUSE, WHY), {"ok": True, "state": "paused"})
