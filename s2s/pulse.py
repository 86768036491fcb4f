"""Whether the database answers."""

from __future__ import annotations

from typing import Final

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from s2s.clock import Clock
from s2s.store.pool import Database, is_there

#: Seconds within which a database that serves answers.
ANSWER_S: Final = 2.0


class Pulse:
    """Asks the database for anything at all; once at a time, however many want to know: one that hangs gathers none."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._is_asking = False
        self._waiters: list[Deferred[bool]] = []

    def feel(self) -> Deferred[bool]:
        """Give whether it answers, within :data:`ANSWER_S`."""
        # One that waits no more is forgotten.
        waiter: Deferred[bool] = Deferred(self._waiters.remove)
        self._waiters.append(waiter)
        if not self._is_asking:
            self._is_asking = True
            self._database.run(is_there).addBoth(self._answered)
        return waiter.addTimeout(ANSWER_S, self._clock.scheduler, lambda _, __: False)

    def _answered(self, outcome: object) -> None:
        self._is_asking = False
        waiters = self._waiters[:]
        self._waiters.clear()
        for waiter in waiters:
            waiter.callback(not isinstance(outcome, Failure))
