"""Looking once a minute how full the queue of notifications is: that frees it, and an operator learns of it in time."""

from __future__ import annotations

from typing import Any, Final

from twisted.internet import task
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from s2s.clock import Clock
from s2s.errors import DatabaseError
from s2s.store import notify_queue
from s2s.store.notify_queue import FULL, HIGH, Queue
from s2s.store.pool import Database

#: Seconds between two looks, and between two lines about a queue that stays full.
WATCH_S: Final = 60.0
AGAIN_S: Final = 3600.0


class QueueWatch:
    """Tells when the queue is half full, when it is full, and when it has room again."""

    log = Logger()

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        #: The share from which on it was told last, and when.
        self._told = 0.0
        self._told_at = 0.0
        self._stopped: Deferred[Any] = succeed(None)
        self._loop = task.LoopingCall(lambda: Deferred.fromCoroutine(self.look()))
        self._loop.clock = clock.scheduler

    def start(self) -> None:
        """Look from now on."""
        self._stopped = self._loop.start(WATCH_S, now=False)

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
            self._judge(await self._database.run(notify_queue.look))
        except DatabaseError:
            pass  # The pool has said so in the log, once.
        except Exception:
            self.log.failure("looking at the queue of notifications failed")

    def _judge(self, queue: Queue) -> None:
        level = next((share for share in (FULL, HIGH) if queue.usage >= share), 0.0)
        now = self._clock.mono()
        if level and (level > self._told or now >= self._told_at + AGAIN_S):
            self._told_at = now
            self.log.warn("{queue}", queue=str(queue))
        elif not level and self._told:
            self.log.info("the NOTIFY queue of PostgreSQL has room again")
        self._told = level
