"""``s2s.broadcast.sweep`` (docs/protocol.rst, "The engine")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from s2s.dispatch import Request
from s2s.errors import DatabaseUnavailable, DbUnavailable
from s2s.news import news
from s2s.store import broadcasts
from s2s.store.pool import Database

#: Broadcasts that one sweep moves at most; the next takes the rest.
LIMIT: Final = 10_000


class Sweep:
    """Moves pending broadcasts into the outbox and answers after the COMMIT.

    :param fits: says of a command's payload why it cannot be sent, or ``None``.
    :param queued: called when there is something new in the outbox.
    """

    def __init__(
        self, database: Database, fits: Callable[[Mapping[str, Any]], str | None], queued: Callable[[], object]
    ) -> None:
        self._database = database
        self._fits = fits
        self._queued = queued

    def __call__(self, request: Request) -> Deferred[dict[str, Any]]:
        """Answer with how many were queued."""
        since_ts: int = request.payload["since_ts"]
        sweeping = self._database.run(broadcasts.sweep, since_ts, LIMIT, self._fits)
        return sweeping.addCallbacks(self._answer, _refuse, callbackArgs=(since_ts,))

    def _answer(self, queued: int, since_ts: int) -> dict[str, Any]:
        if queued:
            news.info("sweep: {queued} broadcasts queued", queued=queued)
            self._queued()
        return {"ok": True, "since_ts": since_ts, "queued": queued}


def _refuse(failure: Failure) -> Failure:
    if failure.check(DatabaseUnavailable):
        raise DbUnavailable(retry_after_ms=1000) from None
    return failure
