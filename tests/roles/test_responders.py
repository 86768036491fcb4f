"""The responders of both roles, with a real database where they need one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import reactor, task
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import TestCase

from s2s.errors import DbUnavailable, InternalError
from s2s.handlers.discovery import Found
from s2s.protocol.catalogue import HEALTH_CHECK, PAUSE, SWEEP
from s2s.protocol.envelope import Envelope
from s2s.protocol.received import Request
from s2s.roles.engine.desired_state import DesiredState
from s2s.roles.engine.order_runner import OrderRunner
from s2s.roles.engine.responders.order import RunOrder
from s2s.roles.engine.responders.pause import Pause
from s2s.roles.engine.responders.sweep import Sweep
from s2s.roles.engine.state import EngineState
from s2s.roles.health import Health, Identity
from s2s.runtime.clock import Clock
from s2s.store.pool import Database
from tests.support.installed import CATALOGUE
from tests.support.postgres import DatabaseTestCase


def request(type: str, payload: dict[str, Any]) -> Request:
    """Create a request as the dispatcher passes it."""
    envelope = Envelope("id", 1737990000, "server", "engine", type, payload)
    return Request(envelope, CATALOGUE[type], payload, "k1", 400)


class HealthTests(TestCase):
    """``s2s.health.check``."""

    def test_answer(self) -> None:
        """The reply is valid by its schema and contains identity, uptime and condition."""
        scheduler = task.Clock()
        identity = Identity("engine", "engine-1", "01J93QXK00000000000000000A")
        condition = {"state": "running", "degraded": True, "config_version": 3, "outbox_depth": 7}
        health = Health(identity, 65536, Clock(scheduler), lambda: condition)
        scheduler.advance(12.7)
        answer = health(request(HEALTH_CHECK, {}))
        self.assertIsNone(CATALOGUE[HEALTH_CHECK].reply_schema.explain(answer))
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
        self.assertIsNone(CATALOGUE[SWEEP].reply_schema.explain(first))
        keys = self.execute("select idem_key from s2s.outbox order by outbox_id")
        self.assertEqual([key for (key,) in keys], self.broadcast_keys())
        self.assertEqual(self.woken, 1)

    async def test_since_ts_narrows_inclusively(self) -> None:
        """Broadcasts created in the second ``since_ts`` or later are swept, earlier ones wait; any number is valid."""
        self.execute(
            "insert into s2s.broadcasts (message, created_at) values"
            " ('old', to_timestamp(1000)), ('new', to_timestamp(2000))"
        )
        self.assertEqual((await self.sweep(request(SWEEP, {"since_ts": 2**53 - 1})))["queued"], 0)
        self.assertEqual((await self.sweep(request(SWEEP, {"since_ts": 2000})))["queued"], 1)
        self.assertEqual(self.execute("select message from s2s.broadcasts where state = 'pending'"), [("old",)])

    async def test_too_big_for_a_frame(self) -> None:
        """A broadcast that no frame can carry is refused at the sweep and named, and does not delay others."""
        self.execute("insert into s2s.broadcasts (message) values (%s), ('short')", "ü" * 4000)
        self.assertEqual((await self.sweep(request(SWEEP, {"since_ts": 0})))["queued"], 1)
        [(state, error)] = self.execute("select state, error from s2s.broadcasts where broadcast_id = 1")
        self.assertEqual(state, "refused")
        self.assertIn("--frame-size-limit", error)

    async def test_ten_thousand_at_once(self) -> None:
        """Ten thousand broadcasts are queued in bounded steps, each once, and the replies count them all."""
        self.execute("insert into s2s.broadcasts (message) select 'm' || i from generate_series(1, 10000) i")
        total = 0
        while queued := (await self.sweep(request(SWEEP, {"since_ts": 0})))["queued"]:
            total += queued
        self.assertEqual(total, 10_000)
        self.assertEqual(self.execute("select count(distinct idem_key) from s2s.outbox"), [(10_000,)])

    async def test_database_away(self) -> None:
        """Without a database the sweep is refused as ``db_unavailable`` with a time to retry."""
        await self.database.stop()
        refused = await self.assertFailure(self.sweep(request(SWEEP, {"since_ts": 0})), DbUnavailable)
        self.assertIn("retry_after_ms", refused.payload()["details"])

    async def test_refused(self) -> None:
        """A broadcast that the database refuses to change is logged, and the reply has the incident."""
        self.execute(
            "insert into s2s.broadcasts (message) values ('m');"
            "alter table s2s.broadcasts add constraint c check (state = 'pending')"
        )
        await _refused(self, lambda: self.sweep(request(SWEEP, {"since_ts": 0})))


class SteeringTests(DatabaseTestCase):
    """``s2s.engine.pause`` and orders."""

    async def test_refused(self) -> None:
        """A change that a constraint refuses is logged once, and the reply has the incident."""
        database, handlers = self.pools("s2s-refused")
        clock, condition = Clock(reactor), EngineState()
        condition.wanted = "running"
        self.execute(
            "alter table s2s.engines add constraint c check (wanted = 'running');"
            "alter table s2s.orders add constraint c check (rpc <> 'world.set_sector_status.v1')"
        )
        pause = Pause(DesiredState(database, clock, "engine-1", condition), "paused", condition)
        await _refused(self, lambda: pause(request(PAUSE, {"reason": "x"})))
        order = RunOrder(
            OrderRunner(database, handlers, clock, Found(), "engine-1", condition, lambda: True, lambda: None, 65536)
        )
        payload = {"order_id": "01J93QXK00000000000000000A", "sector_id": 1, "status": "neutral"}
        await _refused(self, lambda: order(request("world.set_sector_status.v1", payload)))


async def _refused(case: TestCase, ask: Callable[[], Deferred[Any]]) -> None:
    """Send a request twice, and assert that both replies have the incident of the single log line."""
    with capturedLogs() as told:
        answers = [await case.assertFailure(ask(), InternalError) for _ in range(2)]
    [line] = [str(formatEvent(event)) for event in told]
    case.assertIn('violates check constraint "c"', line)
    for answer in answers:
        case.assertIn(answer.payload()["details"]["incident"], line)
