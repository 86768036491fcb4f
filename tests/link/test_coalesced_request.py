"""Requests that a server sends to its engines, coalesced for each link."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DeadlinePassed, Refused
from s2s.link.coalesced_request import MOST_QUICK, QUICK_S, CoalescedRequest
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import PERIOD_S, TOLD


class _Session:
    is_open = True


class _Link:
    """A link whose calls the test answers."""

    def __init__(self) -> None:
        self.session = _Session()
        self.calls: list[Deferred[dict[str, Any]]] = []

    def call(self, type: str, payload: Mapping[str, Any]) -> Deferred[dict[str, Any]]:
        self.calls.append(Deferred())
        return self.calls[-1]


class SmokeBroadcastTests(SynchronousTestCase):
    """:class:`CoalescedRequest`."""

    def setUp(self) -> None:
        """Make a request that runs again while the answer asks for it."""
        self.time = FakeClock()
        self.link: Any = _Link()
        self.payload: dict[str, Any] | None = {}
        self.errand = CoalescedRequest(
            "s2s.broadcast.sweep", lambda _: self.payload, lambda _, answer: bool(answer["more"]), Clock(self.time)
        )

    def test_one_under_way(self) -> None:
        """Any number of runs requested during a request cause one more request, and none causes none."""
        for _ in range(5):
            self.errand.run(self.link)
        self.assertEqual(len(self.link.calls), 1)
        self.link.calls[0].callback({"more": 0})
        self.assertEqual(len(self.link.calls), 2)
        self.link.calls[1].callback({"more": 0})
        self.assertEqual(len(self.link.calls), 2)

    def test_links_are_apart(self) -> None:
        """A request on one link does not delay a request on another."""
        other: Any = _Link()
        self.errand.run_all([self.link, other])
        self.errand.run_all([self.link, other])
        self.assertEqual((len(self.link.calls), len(other.calls)), (1, 1))

    def test_goes_on(self) -> None:
        """An answer for which ``done`` returns true causes another request at once."""
        self.errand.run(self.link)
        self.link.calls[0].callback({"more": 1})
        self.link.calls[1].callback({"more": 0})
        self.assertEqual(len(self.link.calls), 2)

    def test_goes_on_without_an_end(self) -> None:
        """An engine that answers at once that there is more, again and again, is asked more seldom, and named once."""
        self.errand.run(self.link)
        with capturedLogs() as logs:
            for _ in range(MOST_QUICK + 1):
                self.link.calls[-1].callback({"more": 1})
            asked = [len(self.link.calls)]
            self.assertEqual(asked, [MOST_QUICK + 1])
            for pause_s in (1, 2, 4, 8, 10, 10):
                self.time.advance(pause_s - 0.01)
                self.assertEqual(len(self.link.calls), asked[-1])
                self.time.advance(0.01)
                asked.append(len(self.link.calls))
                self.assertEqual(asked[-1], asked[-2] + 1)
                self.link.calls[-1].callback({"more": 1})
        [line] = [formatEvent(event) for event in logs]
        self.assertIn(f"{self.link}: s2s.broadcast.sweep is answered at once, {MOST_QUICK + 1} times in a row", line)
        # An occasion asks at once, and one that has nothing more is as every other.
        self.errand.run(self.link)
        self.link.calls[-1].callback({"more": 0})
        self.errand.run(self.link)
        self.link.calls[-1].callback({"more": 1})
        self.assertEqual(len(self.link.calls), asked[-1] + 3)

    def test_goes_on_slowly(self) -> None:
        """An engine that takes its time for each answer is asked again at once, however often."""
        self.errand.run(self.link)
        for _ in range(2 * MOST_QUICK):
            self.time.advance(QUICK_S)
            self.link.calls[-1].callback({"more": 1})
        self.assertEqual(len(self.link.calls), 2 * MOST_QUICK + 1)

    def test_nothing_to_tell(self) -> None:
        """Without a payload, or on a link that is closing, nothing is sent."""
        self.payload = None
        self.errand.run(self.link)
        self.payload = {}
        self.link.session.is_open = False
        self.errand.run(self.link)
        self.assertEqual(self.link.calls, [])

    def test_sent_again_when_told_to(self) -> None:
        """A retryable refusal is retried after the pause that it asks for, and after 10 s at the latest."""
        for asked_ms, waited in ((100, 0.1), (600_000, 10.0)):
            self.link.calls.clear()
            self.errand.run(self.link)
            self.link.calls[0].errback(Refused("not_ready", "", {"retryable": True, "retry_after_ms": asked_ms}))
            self.time.advance(waited - 0.01)
            self.assertEqual(len(self.link.calls), 1)
            self.time.advance(0.02)
            self.assertEqual(len(self.link.calls), 2)
            self.link.calls[1].callback({"more": 0})

    def test_a_pause_of_nothing(self) -> None:
        """A refusal that asks for a pause of 0 is retried after increasing pauses."""
        self.errand._rng = lambda: 1.0
        self.errand.run(self.link)
        for _ in range(1000):
            if not self.link.calls[-1].called:
                self.link.calls[-1].errback(Refused("overloaded", "", {"retryable": True, "retry_after_ms": 0}))
            self.time.advance(0.01)
        # The pauses are 0.2, 0.4, ... and 5 s.
        self.assertEqual(len(self.link.calls), 6)

    def test_one_retry_at_a_time(self) -> None:
        """However many runs are requested meanwhile, a link has one pending retry."""
        for _ in range(20):
            self.errand.run(self.link)
            self.link.calls[-1].errback(Refused("not_ready", "", {"retryable": True, "retry_after_ms": 5000}))
        self.time.advance(5)
        self.assertEqual(len(self.link.calls), 21)
        self.assertEqual(self.errand._retries, {}, "a link that has ended would be kept")
        self.link.calls[-1].errback(Refused("not_ready", "", {"retryable": True, "retry_after_ms": 5000}))
        self.errand.stop()
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_lines_are_bounded(self) -> None:
        """An engine that refuses on one link after the other has a few lines, and then one a minute."""
        with capturedLogs() as logs:
            for _ in range(20 * 60):
                link: Any = _Link()
                self.errand.run(link)
                link.calls[0].errback(Refused("internal_error", "no", {"retryable": False}))
                self.time.advance(0.05)
            self.time.advance(PERIOD_S)
        lines = [formatEvent(event) for event in logs]
        self.assertLessEqual(len(lines), TOLD + 2)
        self.assertIn("s2s.broadcast.sweep failed further times: ", lines[-1])

    def test_failures(self) -> None:
        """After another failure the next requested run sends again, or the one requested meanwhile does so at once."""
        self.errand.run(self.link)
        self.link.calls[0].errback(DeadlinePassed("late"))
        self.assertEqual(len(self.link.calls), 1)
        self.errand.run(self.link)
        self.errand.run(self.link)
        self.link.calls[1].errback(DeadlinePassed("late"))
        self.assertEqual(len(self.link.calls), 3)

    def test_not_served(self) -> None:
        """A peer that does not serve the type is not sent the request again on this link."""
        self.errand.run(self.link)
        self.link.calls[0].errback(Refused("unsupported_type", "", {}))
        self.errand.run(self.link)
        self.assertEqual(len(self.link.calls), 1)
