"""Status lines for operators."""

from __future__ import annotations

from typing import Any

from twisted.internet import task
from twisted.logger import formatEvent, globalLogPublisher
from twisted.trial.unittest import TestCase

from s2s.runtime.clock import Clock
from s2s.runtime.status_log import CounterSummary


class CounterSummaryTests(TestCase):
    """:class:`s2s.runtime.status_log.CounterSummary`."""

    def setUp(self) -> None:
        """Collect the log events."""
        self.events: list[Any] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)
        self.scheduler = task.Clock()
        self.counters = {"run": 5, "dead": 0}
        self.digest = CounterSummary("commands", lambda: self.counters, Clock(self.scheduler))
        self.digest.start()

    def lines(self) -> list[str]:
        """Return the status lines."""
        return [formatEvent(event) for event in self.events if event["log_namespace"] == "s2s.runtime.status_log"]

    def test_tells_what_has_grown_once_a_second(self) -> None:
        """Any number of commands causes one line a second, and no command causes none."""
        self.counters["run"] += 1000
        self.scheduler.advance(0.9)
        self.assertEqual(self.lines(), [])
        self.scheduler.pump([0.1, 1.0, 1.0])
        self.assertEqual(self.lines(), ["commands: 1000 run"])
        self.digest.stop()

    def test_stop_tells_the_rest(self) -> None:
        """A stop reports the last counts."""
        self.counters["dead"] += 1
        self.digest.stop()
        self.assertEqual(self.lines(), ["commands: 1 dead"])
        self.digest.stop()
        self.assertEqual(len(self.lines()), 1)

    def test_what_never_ends_is_told_less_and_less(self) -> None:
        """While counts grow the pause between lines doubles up to its limit, and every event is counted."""
        self.digest.stop()
        digest = CounterSummary("bounds met", lambda: self.counters, Clock(self.scheduler), longest_s=60)
        digest.start()
        for _ in range(600):
            self.counters["run"] += 1
            self.scheduler.advance(1)
        told = [int(line.split()[2]) for line in self.lines()]
        self.assertEqual(told[:7], [1, 2, 4, 8, 16, 32, 60])
        self.assertLess(len(told), 17)
        self.scheduler.pump([1] * 200)
        self.assertEqual(sum(int(line.split()[2]) for line in self.lines()), 600)
        self.counters["run"] += 1
        self.scheduler.advance(1)
        self.assertEqual(self.lines()[-1], "bounds met: 1 run")
        digest.stop()
