"""Callers that wait for the same event."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

T = TypeVar("T")


class Waiters(Generic[T]):
    """Deferreds that fire together. One that its caller cancels is forgotten."""

    def __init__(self, waiting: Iterable[Deferred[T]] = ()) -> None:
        self._waiting = list(waiting)

    def __len__(self) -> int:
        """The number of callers that wait."""
        return len(self._waiting)

    def wait(self) -> Deferred[T]:
        """Return a Deferred that the next :meth:`fire` fires."""
        waiter: Deferred[T] = Deferred(self._forget)
        self._waiting.append(waiter)
        return waiter

    def take(self) -> Waiters[T]:
        """Return the callers that wait now; a later :meth:`fire` of this object does not fire them."""
        taken, self._waiting = Waiters(self._waiting), []
        return taken

    def fire(self, outcome: T | Failure) -> None:
        """Fire every Deferred, those that are added meanwhile not included."""
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if waiter.called:
                continue  # cancelled after the caller was taken
            if isinstance(outcome, Failure):
                waiter.errback(outcome)
            else:
                waiter.callback(outcome)

    def _forget(self, waiter: Deferred[T]) -> None:
        if waiter in self._waiting:
            self._waiting.remove(waiter)
