"""Looking at the database now and then, for what an operator has to be told of."""

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
    """Looks once in a fixed time.

    :cvar what: what a look looks for, for the log.
    :cvar interval_s: seconds between two looks.
    """

    log = Logger()
    what: ClassVar[str]
    interval_s: ClassVar[float] = 60.0

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._why = ""
        self._stopped: Deferred[Any] = succeed(None)
        self._loop = task.LoopingCall(lambda: Deferred.fromCoroutine(self.look()))
        self._loop.clock = clock.scheduler

    def start(self) -> None:
        """Look from now on."""
        self._stopped = self._loop.start(self.interval_s, now=False)

    def stop(self) -> Deferred[Any]:
        """Begin no further look.

        :returns: fires when the one under way is finished.
        """
        if self._loop.running:
            self._loop.stop()
        return self._stopped

    async def look(self) -> None:
        """Look once. Never fails."""
        try:
            await self._look()
        except DatabaseUnavailable:
            pass  # The pool has said so in the log, once.
        except DatabaseError as error:
            if self._why != str(error):
                self._why = str(error)
                self.log.warn("looking for {what} failed: {why}", what=self.what, why=self._why)
        except Exception:
            self.log.failure("looking for {what} failed", what=self.what)

    @abstractmethod
    async def _look(self) -> None:
        """Look, and tell."""
