"""Whether the database serves writes."""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure

from s2s.errors import DatabaseError
from s2s.runtime.clock import Clock
from s2s.runtime.waiters import Waiters
from s2s.store.monitors import probe
from s2s.store.pool import Database

#: Seconds within which a working database answers.
ANSWER_S: Final = 2.0
#: Seconds for which an answer is reused, so that any number of callers causes at most one write and rollback a second.
HOLDS_S: Final = 1.0


class DatabaseProbe:
    """Writes to the database and rolls back; concurrent callers share one probe."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._is_asking = False
        self._waiters: Waiters[str] = Waiters()
        self._answer = ""
        self._answered_at = float("-inf")

    def check(self) -> Deferred[str]:
        """Return ``ok``, or the reason why the database accepts no writes, within :data:`ANSWER_S`."""
        if self._clock.mono() < self._answered_at + HOLDS_S:
            return succeed(self._answer)
        waiter = self._waiters.wait()
        if not self._is_asking:
            self._is_asking = True
            self._database.run(probe.check).addBoth(self._answered)
        late = f"no answer within {ANSWER_S:g} s"
        return waiter.addTimeout(ANSWER_S, self._clock.scheduler, lambda *_: late)

    def _answered(self, outcome: Any) -> None:
        self._is_asking = False
        self._answer = _reason(outcome.value) if isinstance(outcome, Failure) else "ok"
        self._answered_at = self._clock.mono()
        self._waiters.fire(self._answer)


def _reason(error: BaseException | None) -> str:
    """Return the reason in the server's own words; for an error of ours, its type, since the log has the error."""
    if not isinstance(error, DatabaseError):
        return type(error).__name__
    return str(error)
