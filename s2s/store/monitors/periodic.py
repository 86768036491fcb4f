"""Check the database at intervals for conditions that an operator has to know of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from twisted.internet import task
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from s2s.errors import DatabaseError, DatabaseUnavailable
from s2s.runtime.clock import Clock
from s2s.store.pool import Database


class Periodic(ABC):
    """Runs a check at a fixed interval.

    :cvar subject: the condition that the check looks for, for the log.
    :cvar interval_s: seconds between two checks.
    """

    log = Logger()
    subject: ClassVar[str]
    interval_s: ClassVar[float] = 60.0

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._why = ""
        self._stopped: Deferred[Any] = succeed(None)
        self._loop = task.LoopingCall(lambda: Deferred.fromCoroutine(self.look()))
        self._loop.clock = clock.scheduler

    def start(self) -> None:
        """Start the checks."""
        self._stopped = self._loop.start(self.interval_s, now=False)

    def stop(self) -> Deferred[Any]:
        """Begin no further check.

        :returns: fires when the running check is finished.
        """
        if self._loop.running:
            self._loop.stop()
        return self._stopped

    async def look(self) -> None:
        """Check once. Never fails."""
        try:
            await self._look()
        except DatabaseUnavailable:
            pass  # The pool has already logged it, once.
        except DatabaseError as error:
            if self._why != str(error):
                self._why = str(error)
                self.log.warn("looking for {subject} failed: {why}", subject=self.subject, why=self._why)
        except Exception:
            self.log.failure("looking for {subject} failed", subject=self.subject)

    @abstractmethod
    async def _look(self) -> None:
        """Check, and report the result."""
