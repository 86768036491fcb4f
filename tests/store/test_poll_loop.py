"""The poll loop."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock as FakeClock
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.store.poll_loop import FAILING_S, POLL_S, PollLoop


class PollLoopTests(SynchronousTestCase):
    """:class:`PollLoop`."""

    def setUp(self) -> None:
        """Make a loop of two workers whose polls return the value that the test sets."""
        self.time = FakeClock()
        self.taken: list[int] = []
        self.gives: Any = None
        self.turns = PollLoop("a line", self.turn, self.time, 2)

    async def turn(self, line: int) -> float | None:
        """Poll once."""
        self.taken.append(line)
        if isinstance(self.gives, Exception):
            raise self.gives
        if isinstance(self.gives, Deferred):
            await self.gives
            return None
        return self.gives  # type: ignore[no-any-return]

    def test_sleep(self) -> None:
        """Each worker polls at once, then after the time that its poll returned, :data:`POLL_S` at the latest."""
        self.gives = 0.25
        self.turns.start()
        self.assertEqual(self.taken, [0, 1])
        self.time.advance(0.25)
        self.assertEqual(self.taken, [0, 1] * 2)
        self.gives = 50.0
        self.time.advance(0.25)
        self.gives = None
        self.time.advance(POLL_S)
        self.time.advance(POLL_S)
        self.assertEqual(self.taken, [0, 1] * 5)

    def test_trouble(self) -> None:
        """Once every poll has failed for :data:`FAILING_S`, the loop reports the reason until a poll succeeds."""
        self.gives = DatabaseUnavailable("gone")
        self.turns.start()
        for _ in range(int(FAILING_S)):
            self.assertEqual(self.turns.trouble, "")
            self.time.advance(POLL_S)
        self.assertIn("gone", self.turns.trouble)
        self.gives = None
        self.time.advance(POLL_S)
        self.assertEqual(self.turns.trouble, "")

    def test_wake(self) -> None:
        """A wake-up makes one worker poll, or all of them; a wake-up during a poll is not lost."""
        self.turns.start()
        self.turns.wake()
        self.assertEqual(self.taken, [0, 1, 0])
        self.turns.wake_all()
        self.assertEqual(sorted(self.taken), [0, 0, 0, 1, 1])
        self.gives = Deferred()
        self.turns.wake_all()
        self.turns.wake()
        gives, self.gives = self.gives, None
        before = len(self.taken)
        gives.callback(None)
        self.assertGreater(len(self.taken), before)

    def test_errors(self) -> None:
        """An exception ends no worker; an unavailable database is not logged, other errors once for each poll."""
        self.gives = DatabaseUnavailable("gone")
        self.turns.start()
        self.time.advance(POLL_S)
        self.assertEqual((len(self.taken), self.flushLoggedErrors()), (4, []))
        self.gives = ValueError("odd")
        self.time.advance(POLL_S)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 2)
        self.gives = None
        self.time.advance(POLL_S)
        self.assertEqual(len(self.taken), 8)

    def test_stop(self) -> None:
        """A stop waits for the running polls, wakes the sleeping workers, and lets no further poll begin."""
        self.turns.start()
        self.gives = Deferred()
        self.turns.wake()
        stopped = self.turns.stop()
        self.assertNoResult(stopped)
        before = len(self.taken)
        self.gives.callback(None)
        self.successResultOf(stopped)
        self.time.advance(POLL_S)
        self.assertEqual(len(self.taken), before)
