"""Taking the steps of operations on the database's pool, a few at once, and waiting between them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Literal, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.python.failure import Failure

from s2s.admin.http.long_polls import LongPolls
from s2s.admin.operations.operation import (
    Left,
    Operation,
    OperationRequest,
    Reply,
    Step,
    Steps,
    WaitFor,
    advance,
    perform,
)
from s2s.errors import DeadlineExceeded, DeadlinePassed, Overloaded, S2SError
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store.driver import Cursor
from s2s.store.pool import Database
from s2s.store.tables import audit

R = TypeVar("R")

#: The line in which a request waits: observers wait for each other alone, and so do the lists of operators. A pause
#: never waits for a read.
Line = Literal["observers", "lists", "steering"]
#: Connections of the pool that the requests of each line have at once. Pushes, keys and the executor have others.
THREADS: Final[Mapping[Line, int]] = {"observers": 2, "lists": 2, "steering": 2}
#: Requests that may wait in a line before further ones are refused; one that has begun is never refused.
MOST_IN_LINE: Final = 1000
#: Seconds that a step may take, with its time in line: of a database that hangs nobody hears otherwise.
STEP_S: Final = 10.0

_NOT_BEGUN: Final = "the database did not come to it in time: it was not begun"


class ClientRequest:
    """One request, as long as somebody is there to be answered.

    :ivar is_left: nobody is there any more.
    """

    def __init__(self) -> None:
        self._wait: Deferred[Any] | None = None
        self.is_left = False

    def leave(self) -> None:
        """Whoever asked is gone: a step at the database is finished, and nothing else is waited for or begun."""
        self.is_left = True
        if self._wait is not None:
            self._wait.cancel()

    def check(self) -> None:
        """See that somebody is there.

        :raises CancelledError: nobody is.
        """
        if self.is_left:
            raise CancelledError

    async def wait(self, wait: Deferred[Any]) -> None:
        """Wait, as long as somebody is there.

        :raises CancelledError: nobody is any more.
        """
        self._wait = wait
        try:
            await wait
        finally:
            self._wait = None


class OperationRunner:
    """Performs operations."""

    def __init__(self, database: Database, clock: Clock, waiting: LongPolls, counters: Counters) -> None:
        self._clock = clock
        self._database = database
        self._waiting = waiting
        self._counters = counters
        self._places = {line: DeferredSemaphore(threads) for line, threads in THREADS.items()}

    async def perform(self, operation: Operation[R], ask: OperationRequest, visit: ClientRequest) -> Reply[R]:
        """Take the steps of an operation, each in a transaction that is signed by whoever asks.

        :raises S2SError: it is refused, or fails.
        :raises CancelledError: nobody waits for it any more.
        """
        steps = perform(operation, ask)
        came: Any = None
        failed: Exception | None = None
        has_begun = False
        line = _line(operation, ask)
        places = self._places[line]
        while not isinstance(step := advance(steps, came, failed), Reply):
            came = failed = None
            try:
                visit.check()
                if isinstance(step, WaitFor):
                    await visit.wait(self._waiting.wait(step, line))
                else:
                    if not has_begun:
                        self._check_line(places)
                    came = await self._run(places, ask.actor, step, visit)
                    has_begun = True
            except CancelledError:
                await self._tidy_up(steps, places, ask.actor)
                raise
            except Exception as error:
                failed = error
        return step

    async def _tidy_up(self, steps: Steps[Any], places: DeferredSemaphore, actor: str) -> None:
        """Tell the steps that nobody waits any more, and take the one that they may have left."""
        try:
            step = advance(steps, None, Left())
        except Left:
            return
        steps.close()
        if callable(step):
            # What it would have removed is removed in time; of a database that is away the pool tells.
            with suppress(S2SError):
                self._check_line(places)
                await self._run(places, actor, step, ClientRequest())

    def _check_line(self, places: DeferredSemaphore) -> None:
        if len(places.waiting) >= MOST_IN_LINE:
            self._counters.meet("http_line")
            raise Overloaded(f"{MOST_IN_LINE} requests stand in line already", retry_after_ms=1000)

    async def _run(self, places: DeferredSemaphore, actor: str, step: Step, visit: ClientRequest) -> Any:
        """Take one step, within :data:`STEP_S`.

        :raises DeadlineExceeded: it was not begun, and will not be.
        :raises DeadlinePassed: it was, and may or may not take effect.
        """
        scheduler = self._clock.scheduler
        until = self._clock.mono() + STEP_S
        place = places.acquire()
        await visit.wait(place.addTimeout(STEP_S, scheduler, lambda *_: self._late(DeadlineExceeded(_NOT_BEGUN))))
        answer: Deferred[Any] = Deferred()

        def done(outcome: Any) -> None:
            # One that is over too late gives its place back only then, and tells nobody: the answer was cancelled.
            if isinstance(outcome, Failure):
                # A thousand that the pool refuses at once would be refused within each other.
                scheduler.callLater(0, places.release)
            else:
                places.release()
            answer.callback(outcome)

        self._database.run(_signed, actor, step).addBoth(done)
        left_s = max(0.0, until - self._clock.mono())
        unknown = DeadlinePassed("the database does not answer in time")
        return await answer.addTimeout(left_s, scheduler, lambda *_: self._late(unknown))

    def _late(self, error: Exception) -> Failure:
        self._counters.meet("http_step")
        return Failure(error)


def _line(operation: Operation[Any], ask: OperationRequest) -> Line:
    if ask.access == "observer":
        return "observers"
    return "lists" if operation.is_list else "steering"


def _signed(txn: Cursor, actor: str, step: Step) -> Any:
    audit.sign(txn, actor)
    return step(txn)
