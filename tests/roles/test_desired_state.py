"""The wanted state of an engine, and its log lines."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.roles.engine.desired_state import DesiredState
from s2s.roles.engine.state import EngineState
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import MOST_TOLD, PERIOD_S


class DesiredStateTests(SynchronousTestCase):
    """:class:`DesiredState`."""

    def test_lines_are_bounded(self) -> None:
        """A server that pauses and resumes an engine repeatedly causes a few lines, and then one a minute."""
        time, database, condition = FakeClock(), None, EngineState()
        wanted: Any = DesiredState(database, Clock(time), "e", condition)  # type: ignore[arg-type]
        with capturedLogs() as logs:
            for number in range(2 * 60 * 10):
                wanted._on_value((("paused", "running")[number % 2], "x"))
                time.advance(0.1)
        lines = [str(formatEvent(event)) for event in logs]
        self.assertLessEqual(len(lines), MOST_TOLD + 120 // PERIOD_S)
        self.assertEqual(lines[0], "engine paused: 'x'")
        self.assertRegex(lines[-1], "the engine was wanted [0-9]+ times [a-z]+, [0-9]+ times [a-z]+, and is [a-z]+ now")

    def test_a_reason_of_any_hand(self) -> None:
        """A reason that was written into the table by hand, however long, makes a harmless line."""
        database: Any = None
        wanted = DesiredState(database, Clock(FakeClock()), "e", EngineState())
        with capturedLogs() as logs:
            wanted._on_value(("paused", "\x1b[31m" + "x" * 1_000_000))
        [line] = [str(formatEvent(event)) for event in logs]
        self.assertLess(len(line), 300)
        self.assertTrue(line.isprintable())
