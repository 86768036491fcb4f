"""Read a value of the database again whenever it may have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from twisted.internet import task
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import DatabaseError
from s2s.runtime.clock import Clock, Timer, cancel
from s2s.runtime.waiters import Waiters
from s2s.store.pool import Database

T = TypeVar("T")

#: Seconds between two polls, which complement the tables' NOTIFY, because a notification can be lost.
POLL_S: Final = 30.0
#: Seconds from the beginning of a failed read until the next attempt.
RETRY_S: Final = 1.0
#: Seconds between two log lines about failed reads.
TELL_S: Final = 60.0


class Refresher(Generic[T]):
    """Read a value on notification and at intervals, never twice at once. The last value read stays in force.

    :param read: a plain function ``(txn, *args)``.
    :param took: called with the value that was read.
    :param poll_s: seconds between two reads without a notification.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        clock: Clock,
        read: Callable[..., T],
        args: tuple[Any, ...],
        took: Callable[[T], object],
        poll_s: float = POLL_S,
    ) -> None:
        self._database = database
        self._clock = clock
        self._read = read
        self._args = args
        self._on_value = took
        self._poll = task.LoopingCall(self.notify)
        self._poll.clock = clock.scheduler
        self._poll_s = poll_s
        self._timer: Timer | None = None
        self._began_at = self._told_at = float("-inf")
        self._is_reading = False
        self._is_stopped = False
        #: The shortest ``gap_s`` requested during the current read; ``None``: none was requested.
        self._gap_wanted: float | None = None
        self._waiters: Waiters[None] = Waiters()

    def start(self) -> Deferred[None]:
        """Read now, and at intervals from now on.

        :returns: fires after the first read, whether it succeeded or not.
        """
        self._poll.start(self._poll_s, now=False)
        return self.refresh()

    def stop(self) -> None:
        """Stop reading; callers that wait for a read that has not begun stop waiting."""
        self._is_stopped = True
        if self._poll.running:
            self._poll.stop()
        cancel(self._timer)
        self._waiters.fire(None)

    def notify(self, gap_s: float = 0.0) -> None:
        """Read the value soon, because it may have changed; see :meth:`read_now`."""
        self.refresh(gap_s)

    def refresh(self, gap_s: float = 0.0) -> Deferred[None]:
        """Read as :meth:`read_now` does.

        :returns: fires whether the read succeeded or not.
        """
        return self.read_now(gap_s).addErrback(self._kept)

    def read_now(self, gap_s: float = 0.0) -> Deferred[None]:
        """Read the value again.

        :param gap_s: the least seconds between the beginnings of the previous read and this one.
        :returns: fires after a read that began after this call, or fails with its :class:`DatabaseError`; fires at once
            if the refresher is stopped.
        """
        waiter = self._waiters.wait()
        self._read_after(gap_s)
        return waiter

    def _read_after(self, gap_s: float) -> None:
        if self._is_stopped:
            self._waiters.fire(None)
            return
        if self._is_reading:
            # The current read does not contain a change made after it began.
            self._gap_wanted = gap_s if self._gap_wanted is None else min(gap_s, self._gap_wanted)
            return
        wait_s = self._began_at + gap_s - self._clock.mono()
        if wait_s <= 0:
            self._begin()
        elif self._timer is None or not self._timer.active():
            self._timer = self._clock.scheduler.callLater(wait_s, self._begin)
        elif self._clock.mono() + wait_s < self._timer.getTime():
            self._timer.reset(wait_s)

    def _begin(self) -> None:
        cancel(self._timer)
        self._is_reading = True
        self._began_at = self._clock.mono()
        reading = self._database.run(self._read, *self._args)
        reading.addCallback(self._on_value).addBoth(self._done, self._waiters.take())

    def _done(self, outcome: object, waiters: Waiters[None]) -> None:
        self._is_reading = False
        gap_s, self._gap_wanted = self._gap_wanted, None
        if isinstance(outcome, Failure) and self._poll.running:
            gap_s = RETRY_S if gap_s is None else gap_s
        if gap_s is not None:
            self._read_after(gap_s)
        waiters.fire(outcome if isinstance(outcome, Failure) else None)

    def _kept(self, failure: Failure) -> None:
        # The pool has reported that the database is unavailable. A cancelled wait, as after a deadline, needs no line.
        if failure.check(DatabaseError, CancelledError):
            return
        now = self._clock.mono()
        if now >= self._told_at + TELL_S:
            self._told_at = now
            self.log.failure("reading again failed", failure)
