"""Callers that wait for the same event: :mod:`s2s.runtime.waiters`."""

from __future__ import annotations

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from s2s.runtime.waiters import Waiters


class WaitersTests(SynchronousTestCase):
    """:class:`Waiters`."""

    def setUp(self) -> None:
        """Let two callers wait."""
        self.waiters: Waiters[int] = Waiters()
        self.first, self.second = self.waiters.wait(), self.waiters.wait()

    def test_fire(self) -> None:
        """All callers receive the outcome, a result or a failure, and wait no longer."""
        self.waiters.fire(3)
        self.assertEqual((self.successResultOf(self.first), self.successResultOf(self.second)), (3, 3))
        self.assertFalse(self.waiters)
        third = self.waiters.wait()
        self.waiters.fire(Failure(KeyError()))
        self.failureResultOf(third, KeyError)

    def test_cancel(self) -> None:
        """A caller that cancels is forgotten, before a fire and while it fires."""
        self.first.cancel()
        self.failureResultOf(self.first, CancelledError)
        third = self.waiters.wait()
        self.second.addCallback(lambda _: third.cancel())
        self.waiters.fire(3)
        self.failureResultOf(third, CancelledError)
        self.assertFalse(self.waiters)

    def test_a_caller_that_waits_again(self) -> None:
        """A caller that waits again when it is fired waits for the next event."""
        again: list[Deferred[int]] = []
        self.first.addCallback(lambda _: again.append(self.waiters.wait()))
        self.waiters.fire(3)
        self.assertNoResult(again[0])
        self.assertTrue(self.waiters)

    def test_take(self) -> None:
        """The callers that are taken are fired apart from later ones, and may cancel meanwhile."""
        taken = self.waiters.take()
        third = self.waiters.wait()
        self.waiters.fire(4)
        self.assertEqual(self.successResultOf(third), 4)
        self.first.cancel()
        self.failureResultOf(self.first, CancelledError)
        taken.fire(5)
        self.assertEqual(self.successResultOf(self.second), 5)
