"""A link of real processes under the failures of real machines (docs/protocol.rst, "Timers and bounds")."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from s2s.store.pool import blocking
from s2s.store.tables import control_requests
from tests.support.peer import CHECK, Peer
from tests.support.roles import Engine, RoleTestCase, Server
from tests.support.waiting import poll

#: The settings for giving up a silent peer, and the seconds that result from them.
QUICK = {"link.idle_s": 1, "link.check_s": 1, "link.misses": 2}
NOTICED_S = 3


class SurvivalTests(RoleTestCase):
    """A server, an engine, and test peers."""

    def configure(self, **settings: int) -> None:
        """Change settings in plain SQL."""
        for key, value in settings.items():
            self.execute("update s2s.config set value = to_jsonb(%s) where key = %s", value, key)

    @inlineCallbacks
    def linked(self) -> Iterator[Deferred[Any]]:
        """Start both roles with short timers."""
        self.configure(**QUICK)
        self.server_role: Server = self.server()
        self.engine_role: Engine = self.engine(self.server_role.port)
        yield self.server_role.start()
        yield self.engine_role.start()
        yield self.server_role.says("engine up: engine-1")
        yield self.engine_role.says("link up")

    def peer(self, **how: Any) -> Peer:
        """Connect as an engine."""
        peer = self.server_role.connect(**how)
        self.addCleanup(peer.close)
        peer.greet()
        return peer

    @inlineCallbacks
    def becomes_a_notice(self, message: str) -> Iterator[Deferred[Any]]:
        """Assert that a broadcast becomes a notice."""
        self.execute("insert into s2s.broadcasts (message) values (%s)", message)
        yield poll(
            lambda: self.execute("select 1 from s2s.notices where message = %s", message),
            f"notice {message}",
            timeout=20,
        )

    @inlineCallbacks
    def test_stopped_engine(self):
        """A stopped engine is given up in the time that the settings define, and links again when it continues."""
        yield self.linked()
        began = time.monotonic()
        self.engine_role.freeze()
        yield self.server_role.says("engine down: engine-1")
        self.assertLess(time.monotonic() - began, NOTICED_S + 4)
        self.assertIn("left 2 health checks unanswered", self.server_role.lines("engine down")[0])
        yield self.server_role.says("1 silence")
        self.engine_role.thaw()
        yield self.server_role.says("engine up: engine-1", 2)
        yield self.becomes_a_notice("after the engine's rest")

    @inlineCallbacks
    def test_stopped_server(self):
        """An engine gives up a stopped server, and links again when the server continues."""
        yield self.linked()
        self.server_role.freeze()
        yield self.engine_role.says("link down: the peer left 2 health checks unanswered")
        self.server_role.thaw()
        yield self.engine_role.says("link up", 2)
        yield self.becomes_a_notice("after the server's rest")

    @inlineCallbacks
    def test_half_open(self):
        """A peer that vanished silently is given up, although its connection never ends."""
        yield self.linked()
        self.peer(name="vanished")
        yield self.server_role.says("engine down: vanished")
        self.assertEqual(self.server_role.lines("engine down: engine-1"), [])

    @inlineCallbacks
    def test_a_peer_that_never_reads(self):
        """A peer that sends requests and never reads is cut; the server's memory stays within the buffer's limit."""
        yield self.linked()
        before = self.server_role.rss
        peer = self.peer(name="deaf")

        def ask() -> None:
            peer.link.settimeout(20)
            try:
                while True:
                    peer.write(b"".join(peer.frame(CHECK, {}) for _ in range(500)))
            except OSError:
                pass

        yield deferToThread(ask)
        yield self.server_role.says("the peer does not read")
        self.assertLess(self.server_role.rss - before, 64 << 20)
        yield self.becomes_a_notice("after the deaf one")

    @inlineCallbacks
    def test_a_byte_a_second(self):
        """A frame that arrives byte by byte is given 10 s and no more, while other peers are served."""
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(name="slow")
        began = time.monotonic()
        frame = peer.frame(CHECK, {})
        for place in range(60):
            try:
                peer.write(frame[place : place + 1])
            except OSError:
                break
            yield deferLater(reactor, 0.5)
            # Requests of the server cannot be answered meanwhile, since the test's own frame is not complete.
            if select.select([peer.link], [], [], 0)[0]:
                peer.link.recv(1 << 16)
            if self.server_role.lines("a frame took too long to come whole"):
                break
        self.assertIn("a frame took too long to come whole", self.reasons("slow"))
        self.assertLess(time.monotonic() - began, 14)

    def reasons(self, name: str) -> str:
        """Return the reason why a peer's link ended."""
        return " ".join(self.server_role.lines(f"engine down: {name}"))

    @inlineCallbacks
    def test_replaced(self):
        """A new link of an engine replaces its old one, whose requests fail at once."""
        yield self.linked()
        old = self.peer(name="twin")
        with blocking(self.url) as txn:
            asked = control_requests.ask(txn, "twin", "s2s.engine.pause", {"reason": "a test"}, "a test", 5)
        old.request("s2s.engine.pause")
        began = time.monotonic()
        new = self.peer(name="twin")
        newer = "another process of the same name has a newer link"
        self.assertEqual([frame["type"] for frame in old.rest() if frame["type"] != CHECK], ["s2s.error"])
        yield self.server_role.says(newer)
        answered = "select answer from s2s.steering where request_id = %s and answered_at is not null"
        yield poll(lambda: self.execute(answered, asked), "the request has failed")
        self.assertLess(time.monotonic() - began, 2)
        self.assertIn(newer, self.execute(answered, asked)[0][0]["message"])
        with blocking(self.url) as txn:
            control_requests.ask(txn, "twin", "s2s.engine.resume", {"reason": "a test"}, "a test", 5)
        new.request("s2s.engine.resume")

    @inlineCallbacks
    def test_lost_listen(self):
        """Lost LISTEN connections are restored without any other effect."""
        yield self.linked()
        self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name like '%% listen'"
        )
        for role in (self.server_role, self.engine_role):
            yield role.says("notifications of the database arrive again")
        # Sweeps run every 10 s and settings are polled every 30 s, so a faster effect was caused by a NOTIFY.
        began = time.monotonic()
        yield self.becomes_a_notice("heard again")
        self.configure(**{"relay.window": 9})
        yield self.engine_role.says("relay.window is 9")
        self.assertLess(time.monotonic() - began, 8)
        self.assertEqual(self.server_role.lines("engine down"), [])

    @inlineCallbacks
    def test_settings_hold_for_links_that_are(self):
        """A setting changes existing links: a peer that was allowed long silence no longer is."""
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(name="quiet")
        self.configure(**QUICK)
        # Wait until the timer that was set by the old setting has fired.
        yield poll(lambda: self.server_role.lines("engine down: quiet"), "it is given up", timeout=10 + NOTICED_S + 4)
        peer.close()

    @inlineCallbacks
    def test_freshness(self):
        """A narrower window is in force at once, both for the refusal and for its text."""
        self.server_role = self.server()
        yield self.server_role.start()
        peer = self.peer(name="late")
        late = {"ts": int(time.time()) - 60}
        self.assertEqual(peer.call(CHECK, {}, **late)["role"], "server")
        self.configure(**{"link.fresh_s": 30})
        yield self.server_role.says("link.fresh_s is 30 (was 300)")
        refused = peer.call(CHECK, {}, **late)
        self.assertEqual((refused["code"], refused["details"]["max_skew_s"]), ("ts_skew", 30))
