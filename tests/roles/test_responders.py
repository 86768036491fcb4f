"""What each role does on a message, against a real database where one is needed."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor, task
from twisted.trial.unittest import TestCase

from s2s.errors import DbUnavailable
from s2s.link.dispatcher import Request
from s2s.protocol.catalogue import BY_NAME, HEALTH_CHECK, SWEEP
from s2s.protocol.envelope import Envelope
from s2s.roles.engine.responders.sweep import Sweep
from s2s.roles.health import Health, Identity
from s2s.runtime.clock import Clock
from s2s.store.pool import Database
from tests.support.postgres import DatabaseTestCase


def request(type: str, payload: dict[str, Any]) -> Request:
    """Make a request as the dispatcher hands it over."""
    envelope = Envelope("id", 1737990000, "server", "engine", type, payload)
    return Request(envelope, BY_NAME[type], payload, "k1", 400)


class HealthTests(TestCase):
    """``s2s.health.check``."""

    def test_answer(self) -> None:
        """The answer passes its schema and says who we are, since when, and how we are."""
        scheduler = task.Clock()
        identity = Identity("engine", "engine-1", "01J93QXK00000000000000000A")
        condition = {"state": "running", "degraded": True, "config_version": 3, "outbox_depth": 7}
        health = Health(identity, 65536, Clock(scheduler), lambda: condition)
        scheduler.advance(12.7)
        answer = health(request(HEALTH_CHECK, {}))
        self.assertIsNone(BY_NAME[HEALTH_CHECK].reply_schema.explain(answer))
        self.assertEqual((answer["role"], answer["name"], answer["uptime_s"]), ("engine", "engine-1", 12))
        self.assertEqual((answer["frame_size_limit"], answer["outbox_depth"]), (65536, 7))


class SweepTests(DatabaseTestCase):
    """``s2s.broadcast.sweep``."""

    def setUp(self) -> None:
        """Start a pool."""
        super().setUp()
        self.database = Database(self.url, threads=2)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.woken = 0
        self.sweep = Sweep(self.database, Clock(reactor), 4096, self.wake)

    def wake(self) -> None:
        """Count the calls."""
        self.woken += 1

    async def test_queues_once(self) -> None:
        """Pending broadcasts are queued by the first sweep, and not again by the next."""
        self.execute("insert into s2s.broadcasts (message) values ('a'), ('b')")
        first = await self.sweep(request(SWEEP, {"since_ts": 0}))
        again = await self.sweep(request(SWEEP, {"since_ts": 0}))
        self.assertEqual((first, again["queued"]), ({"ok": True, "since_ts": 0, "queued": 2}, 0))
        self.assertIsNone(BY_NAME[SWEEP].reply_schema.explain(first))
        keys = self.execute("select idem_key from s2s.outbox order by outbox_id")
        self.assertEqual([key for (key,) in keys], self.broadcast_keys())
        self.assertEqual(self.woken, 1)

    async def test_since_ts_narrows_inclusively(self) -> None:
        """What was created in the second ``since_ts`` is swept, what came before waits, and no number is too large."""
        self.execute(
            "insert into s2s.broadcasts (message, created_at) values"
            " ('old', to_timestamp(1000)), ('new', to_timestamp(2000))"
        )
        self.assertEqual((await self.sweep(request(SWEEP, {"since_ts": 2**53 - 1})))["queued"], 0)
        self.assertEqual((await self.sweep(request(SWEEP, {"since_ts": 2000})))["queued"], 1)
        self.assertEqual(self.execute("select message from s2s.broadcasts where state = 'pending'"), [("old",)])

    async def test_too_big_for_a_frame(self) -> None:
        """A broadcast that no frame can carry is refused at the sweep and named, and holds nothing else up."""
        self.execute("insert into s2s.broadcasts (message) values (%s), ('short')", "ü" * 4000)
        self.assertEqual((await self.sweep(request(SWEEP, {"since_ts": 0})))["queued"], 1)
        [(state, error)] = self.execute("select state, error from s2s.broadcasts where broadcast_id = 1")
        self.assertEqual(state, "refused")
        self.assertIn("--frame-size-limit", error)

    async def test_ten_thousand_at_once(self) -> None:
        """Ten thousand broadcasts are queued in bounded steps, each once, and the answers count them all."""
        self.execute("insert into s2s.broadcasts (message) select 'm' || i from generate_series(1, 10000) i")
        total = 0
        while queued := (await self.sweep(request(SWEEP, {"since_ts": 0})))["queued"]:
            total += queued
        self.assertEqual(total, 10_000)
        self.assertEqual(self.execute("select count(distinct idem_key) from s2s.outbox"), [(10_000,)])

    async def test_database_away(self) -> None:
        """Without a database the sweep is refused as ``db_unavailable`` with a time to come back."""
        await self.database.stop()
        refused = await self.assertFailure(self.sweep(request(SWEEP, {"since_ts": 0})), DbUnavailable)
        self.assertIn("retry_after_ms", refused.payload()["details"])
