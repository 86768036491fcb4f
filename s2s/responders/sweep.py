"""``s2s.broadcast.sweep`` (docs/protocol.rst, "The engine")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from twisted.internet.defer import Deferred

from s2s.clock import Clock
from s2s.dispatch import Request
from s2s.errors import DatabaseUnavailable, DbUnavailable
from s2s.news import news
from s2s.store import broadcasts
from s2s.store.pool import Database

#: Broadcasts that one transaction moves: the longest are 16 KB each.
LIMIT: Final = 500
#: Seconds after which a sweep begins no further transaction; the next sweep takes the rest.
TIME_S: Final = 1.5


class Sweep:
    """Moves pending broadcasts into the outbox and answers after the COMMIT.

    :param fits: says of a command's payload why it cannot be sent, or ``None``.
    :param queued: called when there is something new in the outbox.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        fits: Callable[[Mapping[str, Any]], str | None],
        queued: Callable[[], object],
    ) -> None:
        self._database = database
        self._clock = clock
        self._fits = fits
        self._queued = queued

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer with how many were queued."""
        return Deferred.fromCoroutine(self._sweep(request.payload["since_ts"]))

    async def _sweep(self, since_ts: int) -> dict[str, Any]:
        until = self._clock.mono() + TIME_S
        queued = 0
        while self._clock.mono() < until:
            try:
                moved = await self._database.run(broadcasts.sweep, since_ts, LIMIT, self._fits)
            except DatabaseUnavailable:
                raise DbUnavailable(retry_after_ms=1000) from None
            queued += moved
            if moved:
                self._queued()
            if moved < LIMIT:
                break
        if queued:
            news.info("sweep: {queued} broadcasts queued", queued=queued)
        return {"ok": True, "since_ts": since_ts, "queued": queued}
