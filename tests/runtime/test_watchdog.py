"""The watchdog of CPU time; tests/roles/test_killers.py has it in a real process."""

from __future__ import annotations

import signal

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from s2s.runtime import log_file, watchdog
from s2s.runtime.watchdog import Watchdog


class WatchdogTests(SynchronousTestCase):
    """With the clock of the test, and the timer of this process."""

    def setUp(self) -> None:
        """Start it."""
        self.time = Clock()
        self.patch(watchdog, "HELD_S", 1000.0)
        self.watchdog = Watchdog(self.time)
        self.watchdog.start()
        self.addCleanup(self.watchdog.stop)

    def left_s(self) -> float:
        """Return the seconds of CPU time until the process would end."""
        return signal.getitimer(signal.ITIMER_PROF)[0]

    def test_each_second(self) -> None:
        """Each second of a reactor that turns sets the timer again."""
        signal.setitimer(signal.ITIMER_PROF, 500.0)
        self.time.advance(1.0)
        self.assertGreater(self.left_s(), 900.0)

    def test_without_a_log(self) -> None:
        """A log that cannot be had, as while it is rotated or without descriptors, ends no process that answers."""
        for error in (OSError("too many open files"), ValueError("closed file"), AttributeError("no file")):

            def fail(error: Exception = error) -> int:
                raise error

            self.patch(log_file, "descriptor", fail)
            signal.setitimer(signal.ITIMER_PROF, 500.0)
            self.time.advance(1.0)
            self.assertGreater(self.left_s(), 900.0)
        self.time.advance(1.0)
        self.assertEqual(len(self.time.getDelayedCalls()), 1)

    def test_stop(self) -> None:
        """A watchdog that was stopped ends nothing, and leaves nothing behind."""
        self.watchdog.stop()
        self.assertEqual(self.left_s(), 0.0)
        self.assertEqual(self.time.getDelayedCalls(), [])
        self.assertEqual(signal.getsignal(watchdog.SIGNAL), signal.SIG_DFL)

    def test_meaning(self) -> None:
        """The signal of the watchdog is told with its reason; every other signal is told by its name."""
        self.assertIn("without an answer", watchdog.meaning(watchdog.SIGNAL))
        self.assertEqual(watchdog.meaning(signal.SIGKILL), "SIGKILL")
