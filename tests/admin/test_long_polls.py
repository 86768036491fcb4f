"""Batched long polls: :mod:`s2s.admin.http.long_polls`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock as FakeTime
from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.http import long_polls
from s2s.admin.http.long_polls import LongPolls
from s2s.admin.http.operation_runner import MOST_IN_LINE, Line
from s2s.admin.http.site import MOST_CONNECTIONS
from s2s.admin.operations.operation import WaitFor
from s2s.errors import DatabaseUnavailable, Overloaded
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock


class _Database:
    """A pool whose queries the test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Sequence[Any], Deferred[Any]]] = []

    def run(self, look: Callable[..., Any], ids: Sequence[Any]) -> Deferred[Any]:
        """Record the query."""
        answer: Deferred[Any] = Deferred()
        self.asked.append((look, sorted(ids), answer))
        return answer


def _orders(_: object, ids: Sequence[Any]) -> Sequence[Any]:
    return ids


def _engines(_: object, ids: Sequence[Any]) -> Sequence[Any]:
    return ids


class WaitingTests(SynchronousTestCase):
    """Long polls with a fake database and a fake clock."""

    def setUp(self) -> None:
        """Create the long polls."""
        self.time = FakeTime()
        self.database = _Database()
        self.counters = Counters()
        database: Any = self.database
        self.waiting = LongPolls(database, Clock(self.time), self.counters)
        self.waiting.start()

    def wait(self, look: Any, *ids: Any, seconds: float = 30, line: Line = "steering") -> Deferred[None]:
        """Start a wait."""
        return self.waiting.wait(WaitFor(look, ids, seconds), line)

    def looked(self, over: Sequence[Any] = ()) -> tuple[Any, Sequence[Any]]:
        """Answer the oldest query."""
        look, ids, answer = self.database.asked.pop(0)
        answer.callback(set(over))
        return look, ids

    def test_one_look_for_all(self) -> None:
        """Waits of one kind share a query, and each ends when all of its ids are over."""
        one, two = self.wait(_orders, 1), self.wait(_orders, 2)
        self.looked()
        self.assertEqual(self.looked([1]), (_orders, [1, 2]))
        self.successResultOf(one)
        both, other = self.wait(_orders, 2, 3), self.wait(_engines, 9)
        self.assertEqual(self.looked([2]), (_orders, [2, 3]))
        self.successResultOf(two)
        self.assertNoResult(both)
        self.assertEqual(self.looked(), (_orders, [3]))
        self.assertEqual(self.looked([9]), (_engines, [9]))
        self.successResultOf(other)
        self.assertNoResult(both)
        self.time.advance(1)
        self.assertEqual(self.looked([3]), (_orders, [3]))
        self.successResultOf(both)
        self.assertEqual(len(self.waiting), 0)
        self.time.advance(5)
        self.assertEqual(self.database.asked, [])

    def test_woken(self) -> None:
        """A query is sent at each wake-up and once a second; an unavailable database ends no wait."""
        waiter = self.wait(_orders, 1)
        self.looked()
        self.waiting.wake()
        self.looked()
        self.time.advance(1)
        _, _, answer = self.database.asked.pop(0)
        answer.errback(DatabaseUnavailable("away"))
        self.assertNoResult(waiter)
        self.time.advance(1)
        self.looked([1])
        self.successResultOf(waiter)

    def test_time(self) -> None:
        """A wait ends at its timeout, and its ids are no longer queried."""
        waiter = self.wait(_orders, 1, seconds=2)
        self.looked()
        self.time.advance(1)
        self.looked()
        self.time.advance(1)
        self.successResultOf(waiter)
        self.database.asked.clear()
        self.time.advance(3)
        self.assertEqual(self.database.asked, [])

    def test_cancelled(self) -> None:
        """A cancelled wait is removed."""
        waiter = self.wait(_orders, 1)
        waiter.cancel()
        self.failureResultOf(waiter, CancelledError)
        self.looked([1])
        self.assertEqual(len(self.waiting), 0)
        self.assertEqual([call for call in self.time.getDelayedCalls() if call.getTime() > 2], [])

    def test_the_bound(self) -> None:
        """The number of waits is limited; a further one is told to retry."""
        self.patch(long_polls, "MOST", 2)
        self.wait(_orders, 1)
        second = self.wait(_orders, 2)
        error = self.assertRaises(Overloaded, self.wait, _orders, 3)
        self.assertEqual(error.details["retry_after_ms"], 1000)
        self.assertEqual(self.counters.met["http_waiting"], 1)
        second.cancel()
        self.failureResultOf(second)
        self.assertNoResult(self.wait(_orders, 3))

    def test_a_bound_for_each_line(self) -> None:
        """The limit of waits applies to each line: waits of observers refuse no request of another line."""
        self.patch(long_polls, "MOST", 2)
        observers = [self.wait(_orders, number, line="observers") for number in range(2)]
        self.assertRaises(Overloaded, self.wait, _orders, 3, line="observers")
        self.assertNoResult(self.wait(_orders, 4, line="steering"))
        self.assertNoResult(self.wait(_orders, 5, line="lists"))
        for each in observers:
            each.cancel()
            self.failureResultOf(each)
        self.assertNoResult(self.wait(_orders, 3, line="observers"))

    def test_a_connection_for_others(self) -> None:
        """Waiting and queued observers leave at least 400 of the site's connections to other requests."""
        self.assertGreaterEqual(MOST_CONNECTIONS - long_polls.MOST - MOST_IN_LINE, 400)

    def test_the_end(self) -> None:
        """A stop ends all waits, and a later wait ends at once."""
        waiter = self.wait(_orders, 1)
        stopping = self.waiting.stop()
        self.successResultOf(waiter)
        self.assertNoResult(stopping)
        self.looked()
        self.successResultOf(stopping)
        self.successResultOf(self.wait(_orders, 2))
