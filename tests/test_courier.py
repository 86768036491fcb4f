"""Orders that were given to the database, on their way over a link."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock as FakeClock
from twisted.trial.unittest import SynchronousTestCase

from s2s import courier
from s2s.clock import Clock
from s2s.courier import Courier
from s2s.errors import DatabaseUnavailable, DeadlinePassed, LinkLost, Refused
from s2s.store.orders import Order
from s2s.turns import POLL_S

SECTOR = "world.set_sector_status.v1"


class _Link:
    """A link whose calls the test answers."""

    def __init__(self) -> None:
        self.session: Any = type("Session", (), {"is_open": True})()
        self.calls: list[tuple[str, Mapping[str, Any], Deferred[Any]]] = []

    def call(self, type: str, payload: Mapping[str, Any]) -> Deferred[Any]:
        self.calls.append((type, payload, Deferred()))
        return self.calls[-1][2]

    @property
    def sent(self) -> list[Any]:
        return [payload["order_id"] for _, payload, _ in self.calls]


class _Database:
    """A database that says what the test wants."""

    def __init__(self) -> None:
        self.queued: list[Order] = []
        self.is_away = False
        self.looks = 0

    def run(self, _: object, rpcs: object, limit: int) -> Deferred[list[Order]]:
        self.looks += 1
        return fail(DatabaseUnavailable("gone")) if self.is_away else succeed(self.queued[:limit])


class CourierTests(SynchronousTestCase):
    """:class:`Courier`."""

    def setUp(self) -> None:
        """Start one, with two engines linked."""
        self.time = FakeClock()
        self.database = _Database()
        self.first, self.second = _Link(), _Link()
        self.links = SimpleNamespace(engines=[])
        self.courier = Courier(self.database, self.links, Clock(self.time))  # type: ignore[arg-type]
        self.courier.start()
        self.addCleanup(self.courier.stop)
        self.links.engines = [self.first, self.second]

    def give(self, *order_ids: str) -> None:
        """Have orders in the table."""
        params = {"sector_id": 1, "status": "neutral"}
        self.database.queued += [Order(each, SECTOR, params, "me", "queued", None, {}, 0, 0) for each in order_ids]

    def test_in_turn(self) -> None:
        """Each order goes to one engine, and the engines take turns; its params go with its id."""
        self.give("a", "b", "c")
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), (["a", "c"], ["b"]))
        self.assertEqual(self.first.calls[0][:2], (SECTOR, {"order_id": "a", "sector_id": 1, "status": "neutral"}))

    def test_sent_again(self) -> None:
        """One that is queued still is sent again after a while, not while its answer is awaited, and not before."""
        self.give("a")
        self.courier.wake()
        self.time.advance(courier.AGAIN_S + 1)
        self.assertEqual(self.courier.sent, 1)
        self.first.calls[0][2].errback(DeadlinePassed("no answer"))
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), (["a"], ["a"]))
        self.second.calls[0][2].callback({"status": "queued"})
        for _ in range(3):
            self.courier.wake()
        self.assertEqual(self.courier.sent, 2)
        self.time.pump([1.0] * int(courier.AGAIN_S + 1))
        self.assertEqual(self.courier.sent, 3)

    def test_what_is_over_is_forgotten(self) -> None:
        """An order that the table no longer shows as queued is neither sent nor remembered."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].callback({"status": "done"})
        self.database.queued.clear()
        self.time.pump([1.0] * 20)
        self.assertEqual((self.courier.sent, self.courier._sent), (1, {}))

    def test_nobody_is_linked(self) -> None:
        """Without an engine it does not even look; a link that is closing is passed over."""
        links, self.links.engines = self.links.engines, []
        self.give("a")
        self.courier.wake()
        self.assertEqual(self.database.looks, 0)
        self.links.engines = links
        self.first.session.is_open = False
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), ([], ["a"]))

    def test_link_lost(self) -> None:
        """An order whose link was lost is sent over another one at the next look."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].errback(LinkLost("gone"))
        self.time.advance(POLL_S)
        self.assertEqual((self.first.sent, self.second.sent), (["a"], ["a"]))

    def test_unserved(self) -> None:
        """An engine that serves no orders is asked once."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].errback(Refused("unsupported_type", "no orders here", {}))
        self.give("b", "c")
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), (["a"], ["b", "c"]))

    def test_bounded(self) -> None:
        """No more orders are on their way at once than the bound."""
        self.patch(courier, "MOST", 3)
        self.give(*"abcde")
        self.courier.wake()
        self.database.queued = self.database.queued[3:] + self.database.queued[:3]
        self.courier.wake()
        self.assertEqual(self.courier.sent, 3)
        self.first.calls[0][2].callback({"status": "queued"})
        self.courier.wake()
        self.assertEqual(self.courier.sent, 4)

    def test_away(self) -> None:
        """While the database is away nothing is sent; when it is back the poll finds what waits."""
        self.database.is_away = True
        self.give("a")
        self.courier.wake()
        self.assertEqual(self.courier.sent, 0)
        self.database.is_away = False
        self.time.advance(POLL_S)
        self.assertEqual(self.courier.sent, 1)

    def test_stopped(self) -> None:
        """Stopped, it sends no more."""
        self.courier.stop()
        self.give("a")
        self.courier.wake()
        self.assertEqual(self.courier.sent, 0)
