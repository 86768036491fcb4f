"""PostgreSQL away under load: links stay, nothing is acked, memory is bounded, and everything works again afterwards.

``S2S_FLOOD_S`` sets the seconds of the flood, ``S2S_AWAY_S`` the seconds for which the database is away.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from tests.support.cluster import Cluster
from tests.support.flood import Flood
from tests.support.peer import BUMP, CHECK, K1, PUSH, command
from tests.support.roles import Engine, Server
from tests.support.waiting import poll

FLOOD_S = float(os.environ.get("S2S_FLOOD_S", "12"))
AWAY_S = float(os.environ.get("S2S_AWAY_S", "5"))
#: Most resident memory of a process, in bytes, for any duration of the flood and of the database's absence.
MEMORY = 200 << 20


class AwayTests(TestCase):
    """Both roles on a PostgreSQL of their own."""

    timeout = FLOOD_S * 2 + AWAY_S + 120

    @inlineCallbacks
    def setUp(self) -> Iterator[Deferred[Any]]:
        """Start PostgreSQL and both roles, and wait until their link is up."""
        self.cluster = Cluster()
        self.addCleanup(self.cluster.remove)
        self.cluster.migrate()
        self.execute(
            "insert into s2s.s2s_keys (key_id, key_b64, role, is_default_tx, active_from)"
            " values (%s, %s, 'any', true, to_timestamp(0))",
            *K1,
        )
        directory = Path(tempfile.mkdtemp(prefix="s2s-roles-"))
        self.addCleanup(shutil.rmtree, directory)
        self.server = Server(directory, self.cluster.url)
        self.engine = Engine(directory, self.cluster.url, self.server.port)
        for role in (self.server, self.engine):
            self.addCleanup(role.stop)
            yield role.start()
        yield self.server.says("engine up: engine-1")

    def execute(self, statement: str, *params: Any) -> list[Any]:
        """Run one statement on a connection of its own."""
        connection = psycopg2.connect(self.cluster.url)
        try:
            with connection, connection.cursor() as txn:
                txn.execute(statement, params or None)
                return txn.fetchall() if txn.description else []
        finally:
            connection.close()

    def count(self, what: str) -> int:
        """Return the number of rows of a table, or of the part that a WHERE clause selects."""
        return int(self.execute(f"select count(*) from s2s.{what}")[0][0])

    @inlineCallbacks
    def test_away(self):
        """With the database away, links stay, health is answered and no push is acked; then everything works again."""
        peer = self.server.connect(name="watcher")
        self.addCleanup(peer.close)
        peer.greet()
        self.assertTrue(peer.call(PUSH, command("before"))["accepted"])
        yield deferToThread(self.cluster.stop)
        until = time.monotonic() + AWAY_S
        number = 0
        while time.monotonic() < until:
            number += 1
            refused = peer.call(PUSH, command(f"meanwhile-{number}"))
            self.assertEqual((refused.get("code"), refused["details"]["retryable"]), ("db_unavailable", True))
            self.assertGreater(refused["details"]["retry_after_ms"], 0)
            self.assertIs(peer.call(CHECK, {})["degraded"], True)
            yield deferLater(reactor, 0.1)
        yield deferToThread(self.cluster.start)
        yield poll(lambda: peer.call(CHECK, {})["degraded"] is False or self.nudge(peer), "it is whole", timeout=30)
        self.assertEqual(self.count("commands where idem_key like 'meanwhile-%%'"), 0)
        self.assertTrue(peer.call(PUSH, command("before"))["duplicate"])
        self.assertFalse(peer.call(PUSH, command("meanwhile-1"))["duplicate"])
        # The link's other direction, and the listeners to NOTIFY.
        self.execute("insert into s2s.broadcasts (message) values ('we are back')")
        yield poll(lambda: self.count("notices where message = 'we are back'") == 1, "a notice", timeout=30)
        peer.serves[BUMP] = lambda payload: {"ok": True, **payload}
        self.execute("update s2s.config set value = '9' where key = 'relay.window'")
        yield self.engine.says("relay.window is 9 (was 512)")
        for role, line in ((self.server, "engine up: engine-1"), (self.engine, "link up")):
            self.assertEqual(len(role.lines(line)), 1, role.log)
        # The log has at most one line a second about all these refusals.
        self.assertLess(len(self.server.lines("db_unavailable")), AWAY_S + 3)

    @inlineCallbacks
    def test_hung(self):
        """With a hanging database, both roles end within their grace with exit code 0, and nothing is lost."""
        peer = self.server.connect(name="watcher")
        self.addCleanup(peer.close)
        peer.greet()
        self.execute("insert into s2s.outbox (cmd_type, idem_key, payload) values ('no.such', 'k', '{}')")
        yield deferToThread(self.cluster.freeze)
        try:
            peer.send(PUSH, command("into the void"))
            self.assertEqual(peer.call(CHECK, {})["role"], "server")
            began = time.monotonic()
            for role in (self.server, self.engine):
                role.terminate()
            yield poll(lambda: not (self.server.is_running or self.engine.is_running), "both have ended", timeout=20)
            self.assertLess(time.monotonic() - began, 12)
        finally:
            self.cluster.thaw()
        for role in (self.server, self.engine):
            role.assert_ended_well()
        self.assertEqual(self.count("outbox"), 1)

    def nudge(self, peer: Any) -> bool:
        """Push a command, so that the server uses the database and notices that it is back."""
        peer.call(PUSH, command("nudge"))
        return False

    @inlineCallbacks
    def test_flood(self):
        """Under a flood with the database away half the time, memory stays within its bound, and nothing is lost."""
        flood = Flood(lambda: self.server.connect(name="flood"), 2000)
        flood.start()
        self.addCleanup(flood.join, 30)
        self.addCleanup(flood.finish)
        until = time.monotonic() + FLOOD_S
        while time.monotonic() < until:
            yield self.watch(min(5.0, FLOOD_S / 6))
            yield deferToThread(self.cluster.stop)
            yield self.watch(min(5.0, FLOOD_S / 6))
            yield deferToThread(self.cluster.start)
        flood.finish()
        yield poll(lambda: flood.is_done, "all is accepted", timeout=60)
        # The commands that piled up while the database was available only half the time.
        yield poll(lambda: self.count("commands where status = 'ready'") == 0, "all has run", timeout=60 + FLOOD_S / 2)
        self.assertEqual(flood.wrong, [])
        self.assertEqual((self.count("commands"), self.count("notices")), (flood.made, flood.made))
        self.assertEqual(flood.links, 1)
        self.assertGreater(flood.refused["db_unavailable"], 0)
        self.assertLess(self.most, MEMORY)

    most = 0

    @inlineCallbacks
    def watch(self, seconds: float) -> Iterator[Deferred[Any]]:
        """Wait, and record the highest memory of both processes meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.most = max(self.most, self.server.rss, self.engine.rss)
            yield deferLater(reactor, 0.2)
