"""Reading something of the database again, whenever it may have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.clock import Clock, Timer
from s2s.errors import DatabaseError
from s2s.store.pool import Database

T = TypeVar("T")

#: Beside the tables' NOTIFY, which can be lost.
POLL_S: Final = 30.0
#: After a read that failed.
RETRY_S: Final = 1.0


class Reread(Generic[T]):
    """Reads again when it is told to, and now and then; never twice at once. What was read last stays in force.

    :param read: a plain function ``(txn, *args)``.
    :param took: called with what was read.
    :param poll_s: seconds between two reads that nobody asked for.
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
        self._read = read
        self._args = args
        self._took = took
        self._is_reading = False
        self._waiters: list[Deferred[None]] = []
        self._clock = clock
        self._poll = task.LoopingCall(self.changed)
        self._poll.clock = clock.scheduler
        self._poll_s = poll_s
        self._retry: Timer | None = None

    def start(self) -> Deferred[None]:
        """Read now, and now and then.

        :returns: fires after the first read, whether it succeeded or not.
        """
        self._poll.start(self._poll_s, now=False)
        return self.again().addErrback(self._kept)

    def stop(self) -> None:
        """Poll no more."""
        if self._poll.running:
            self._poll.stop()
        if self._retry is not None and self._retry.active():
            self._retry.cancel()

    def changed(self) -> None:
        """It may have changed: read it soon."""
        self.again().addErrback(self._kept)

    def again(self) -> Deferred[None]:
        """Read it again.

        :returns: fires after a read that began after this call, or fails with its :class:`DatabaseError`.
        """
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        if not self._is_reading:
            self._begin()
        return waiter

    def _begin(self) -> None:
        self._is_reading = True
        waiters, self._waiters = self._waiters, []
        reading = self._database.run(self._read, *self._args)
        reading.addCallback(self._took).addBoth(self._done, waiters)

    def _done(self, outcome: object, waiters: list[Deferred[None]]) -> None:
        self._is_reading = False
        # What changed after that read began is not in it.
        if self._waiters:
            self._begin()
        elif isinstance(outcome, Failure) and self._poll.running:
            self._retry = self._clock.scheduler.callLater(RETRY_S, self.changed)
        for waiter in waiters:
            if isinstance(outcome, Failure):
                waiter.errback(outcome)
            else:
                waiter.callback(None)

    def _kept(self, failure: Failure) -> None:
        # Of a database that is away the pool has told.
        if not failure.check(DatabaseError):
            self.log.failure("reading again failed", failure)
