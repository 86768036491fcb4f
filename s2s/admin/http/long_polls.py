"""Wait for changes in the database, for any number of requests at once with one query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed

from s2s.admin.operations.operation import WaitFor
from s2s.errors import Overloaded
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock, cancel
from s2s.store.driver import Cursor
from s2s.store.poll_loop import PollLoop
from s2s.store.pool import Database

#: Requests of one queue that may wait at once. As many again may be in the queue itself, and the site has connections
#: for more than both, so that observers delay neither a pause nor /healthz.
MOST: Final = 1000

_Look = Callable[[Cursor, Sequence[Any]], Collection[Any]]


class _Wait:
    """The wait of one request."""

    def __init__(self, until: WaitFor, line: str, leave: Callable[[_Wait], None]) -> None:
        self.line = line
        self.look = until.look
        self.left = set(until.ids)
        self.over: Deferred[None] = Deferred(lambda _: leave(self))


class LongPolls:
    """The waiting requests. One query serves all waits with the same ``look`` function.

    It polls when a request starts to wait, when ``wake`` is called, and once a second, because a NOTIFY may be lost.
    """

    def __init__(self, database: Database, clock: Clock, counters: Counters) -> None:
        self._database = database
        self._clock = clock
        self._counters = counters
        self._waits: dict[_Wait, None] = {}
        self._by_line: Counter[str] = Counter()
        self._loop = PollLoop("the long polls", self._poll_once, clock.scheduler)
        self.wake = self._loop.wake

    def __len__(self) -> int:
        return len(self._waits)

    def start(self) -> None:
        """Start to poll."""
        self._loop.start()

    def stop(self) -> Deferred[Any]:
        """End all waits, so that their requests answer with the current state.

        :returns: fires when no query is under way.
        """
        stopping = self._loop.stop()
        for wait in list(self._waits):
            self._end(wait)
        return stopping

    def wait(self, until: WaitFor, line: str) -> Deferred[None]:
        """Start to wait.

        :param line: the queue whose requests are counted together, see :data:`s2s.admin.http.operation_runner.Line`.
        :returns: fires when the wait or its time is over; it may be cancelled.
        :raises Overloaded: too many requests of this queue wait.
        """
        if self._loop.is_stopping:
            return succeed(None)
        if self._by_line[line] >= MOST:
            self._counters.meet("http_waiting")
            raise Overloaded(f"{MOST} requests wait already", retry_after_ms=1000)
        wait = _Wait(until, line, self._forget)
        self._waits[wait] = None
        self._by_line[line] += 1
        timer = self._clock.scheduler.callLater(until.seconds, self._end, wait)

        def done(outcome: Any) -> Any:
            cancel(timer)
            return outcome

        self.wake()
        return wait.over.addBoth(done)

    def _forget(self, wait: _Wait) -> None:
        if wait in self._waits:
            del self._waits[wait]
            self._by_line[wait.line] -= 1

    def _end(self, wait: _Wait) -> None:
        self._forget(wait)
        wait.over.callback(None)

    async def _poll_once(self, _: int) -> None:
        by_look: dict[_Look, set[Any]] = {}
        for wait in self._waits:
            by_look.setdefault(wait.look, set()).update(wait.left)
        for look, ids in by_look.items():
            over = await self._database.run(look, list(ids))
            for wait in [each for each in self._waits if each.look is look]:
                wait.left.difference_update(over)
                if not wait.left:
                    self._end(wait)
