"""Waiting for what the database will say, for any number of requests at once and by one look."""

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

#: Requests of one line that wait at once. As many again may stand in the line, and the site has connections for more
#: than both: what observers do holds up neither a pause nor /healthz.
MOST: Final = 1000

_Look = Callable[[Cursor, Sequence[Any]], Collection[Any]]


class _Wait:
    """One request's."""

    def __init__(self, until: WaitFor, line: str, leave: Callable[[_Wait], None]) -> None:
        self.line = line
        self.look = until.look
        self.left = set(until.ids)
        self.over: Deferred[None] = Deferred(lambda _: leave(self))


class LongPolls:
    """Those who wait; all that is asked for in one way is looked for by one statement.

    It looks when there is somebody new, when it is woken, and once a second: what wakes it may be lost.
    """

    def __init__(self, database: Database, clock: Clock, counters: Counters) -> None:
        self._database = database
        self._clock = clock
        self._counters = counters
        self._waits: dict[_Wait, None] = {}
        self._by_line: Counter[str] = Counter()
        self._turns = PollLoop("who waits for an end", self._poll_once, clock.scheduler)
        self.wake = self._turns.wake

    def __len__(self) -> int:
        return len(self._waits)

    def start(self) -> None:
        """Look from now on."""
        self._turns.start()

    def stop(self) -> Deferred[Any]:
        """Let nobody wait any more: they see what there is.

        :returns: fires when no look is under way.
        """
        stopping = self._turns.stop()
        for wait in list(self._waits):
            self._end(wait)
        return stopping

    def wait(self, until: WaitFor, line: str) -> Deferred[None]:
        """Wait.

        :param line: whose requests are counted together, see :data:`s2s.admin.http.operation_runner.Line`.
        :returns: fires when it is over or the time is; it may be cancelled.
        :raises Overloaded: too many of this line wait.
        """
        if self._turns.is_stopping:
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
