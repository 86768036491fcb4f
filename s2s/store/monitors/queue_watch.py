"""Check once a minute how full the queue of notifications is: that frees it, and warns an operator in time."""

from __future__ import annotations

from typing import Final

from s2s.runtime.clock import Clock
from s2s.store.monitors import notify_queue
from s2s.store.monitors.notify_queue import FULL, HIGH, Queue
from s2s.store.monitors.periodic import Periodic
from s2s.store.pool import Database

#: Seconds between two log lines about a queue that stays full.
AGAIN_S: Final = 3600.0


class QueueWatch(Periodic):
    """Reports when the queue is half full, when it is full, and when it has room again."""

    subject = "a full queue of notifications"

    def __init__(self, database: Database, clock: Clock) -> None:
        super().__init__(database, clock)
        #: The fill level that was last reported, and the time of the report.
        self._told = 0.0
        self._told_at = 0.0

    async def _look(self) -> None:
        self._judge(await self._database.run(notify_queue.look))

    def _judge(self, queue: Queue) -> None:
        level = next((share for share in (FULL, HIGH) if queue.usage >= share), 0.0)
        now = self._clock.mono()
        if level and (level > self._told or now >= self._told_at + AGAIN_S):
            self._told_at = now
            self.log.warn("{queue}", queue=str(queue))
        elif not level and self._told:
            self.log.info("the NOTIFY queue of PostgreSQL has room again")
        self._told = level
