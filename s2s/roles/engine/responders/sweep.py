"""``s2s.broadcast.sweep`` (docs/protocol.rst, "Outbox and sweep")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred

from s2s.errors import DatabaseUnavailable, DbUnavailable, InternalError, StatementRefused
from s2s.protocol.received import Request
from s2s.runtime.clock import Clock
from s2s.runtime.status_log import status_log
from s2s.store.pool import Database
from s2s.store.tables import broadcasts

#: The largest number of broadcasts that one transaction moves: the longest are 16 KB each.
LIMIT: Final = 500
#: Seconds after which a sweep begins no further transaction; the next sweep moves the rest.
TIME_S: Final = 1.5


class Sweep:
    """Moves pending broadcasts into the outbox and answers after the COMMIT.

    :param frame_size: the longest frame in bytes; a broadcast that needs a longer one is refused.
    :param queued: called after new rows were committed to the outbox.
    """

    def __init__(self, database: Database, clock: Clock, frame_size: int, queued: Callable[[], object]) -> None:
        self._database = database
        self._clock = clock
        self._frame_size = frame_size
        self._queued = queued

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer with the number of broadcasts queued."""
        return Deferred.fromCoroutine(self._sweep(request.payload["since_ts"]))

    async def _sweep(self, since_ts: int) -> dict[str, Any]:
        until = self._clock.mono() + TIME_S
        queued = 0
        while self._clock.mono() < until:
            try:
                moved = await self._database.run(broadcasts.sweep, since_ts, LIMIT, self._frame_size)
            except DatabaseUnavailable:
                raise DbUnavailable(retry_after_ms=1000) from None
            except StatementRefused as refused:
                raise InternalError(incident=self._database.troubles.note(refused.state, str(refused))) from None
            queued += moved
            if moved:
                self._queued()
            if moved < LIMIT:
                break
        if queued:
            status_log.info("sweep: {queued} broadcasts queued", queued=queued)
        return {"ok": True, "since_ts": since_ts, "queued": queued}
