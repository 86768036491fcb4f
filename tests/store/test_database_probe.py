"""The readiness probe of the database: :mod:`s2s.store.monitors.database_probe`."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock as FakeTime
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.runtime.clock import Clock
from s2s.store.monitors.database_probe import ANSWER_S, HOLDS_S, DatabaseProbe


class _Database:
    """A pool whose queries end when the test fires their Deferreds."""

    def __init__(self) -> None:
        self.asked: list[Deferred[Any]] = []

    def run(self, _: object) -> Deferred[None]:
        """Record a query."""
        self.asked.append(Deferred())
        return self.asked[-1]


class DatabaseProbeTests(SynchronousTestCase):
    """:class:`DatabaseProbe`, with a fake clock and a fake pool."""

    def setUp(self) -> None:
        """Make a probe."""
        self.time = FakeTime()
        self.database = _Database()
        database: Any = self.database
        self.pulse = DatabaseProbe(database, Clock(self.time))

    def test_one_question(self) -> None:
        """Concurrent checks share one query and its result, which stays valid for HOLDS_S (a second)."""
        waiters = [self.pulse.check() for _ in range(3)]
        [asked] = self.database.asked
        asked.callback(None)
        self.assertEqual([self.successResultOf(each) for each in waiters], ["ok"] * 3)
        self.assertEqual(self.successResultOf(self.pulse.check()), "ok")
        self.time.advance(HOLDS_S)
        late = self.pulse.check()
        self.database.asked[1].errback(DatabaseUnavailable("permission denied for sequence s", "42501"))
        self.assertEqual(self.successResultOf(late), "permission denied for sequence s")
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_one_that_hangs(self) -> None:
        """A check of a hanging database fails after ANSWER_S without a second query; a late answer ends the outage."""
        waiters = []
        for _ in range(5):
            waiters.append(self.pulse.check())
            self.time.advance(ANSWER_S)
        self.assertEqual([self.successResultOf(each) for each in waiters], ["no answer within 2 s"] * 5)
        self.assertEqual((len(self.database.asked), len(self.pulse._waiters)), (1, 0))
        last = self.pulse.check()
        self.database.asked[0].callback(None)
        self.assertEqual(self.successResultOf(last), "ok")

    def test_an_error_of_ours(self) -> None:
        """An unexpected error is reported by its type alone, because its text may contain anything."""
        asked = self.pulse.check()
        self.database.asked[0].errback(KeyError("secret"))
        self.assertEqual(self.successResultOf(asked), "KeyError")
