"""Run the steps of operations on the database's pool, a few at once, and wait between the steps."""

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
    OperationReply,
    OperationRequest,
    OperationSteps,
    Step,
    WaitFor,
    advance,
    perform,
)
from s2s.errors import DeadlineExceeded, DeadlinePassed, Overloaded, S2SError
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store.access import Access
from s2s.store.driver import Cursor
from s2s.store.pool import Database
from s2s.store.tables import audit

R = TypeVar("R")

#: The queue in which a request waits. Requests of observers wait only for each other, and so do the lists of operators,
#: so that a pause never waits for a read.
Line = Literal["observers", "lists", "steering"]
#: Connections of the pool that the requests of each queue may use at once. Pushes, keys and the executor use others.
THREADS: Final[Mapping[Line, int]] = {"observers": 2, "lists": 2, "steering": 2}
#: Requests that may wait in a queue before further ones are refused. A request that has begun is never refused.
MOST_IN_LINE: Final = 1000
#: Seconds that a step may take, including its time in the queue. Without this limit, a request would get no answer
#: while the database hangs.
STEP_S: Final = 10.0
#: Answers to observers that need no transaction, such as refusals, are made in the reactor, where steering waits
#: meanwhile: two at once, each followed by a pause of this many seconds, so 200 in a second.
PAUSE_S: Final = 0.01

_NOT_BEGUN: Final = "the request waited too long for the database, and was not begun"


class ClientRequest:
    """A request whose client may disconnect before the answer.

    :ivar is_left: the client has disconnected.
    """

    def __init__(self) -> None:
        self._wait: Deferred[Any] | None = None
        self.is_left = False

    def leave(self) -> None:
        """Record that the client has disconnected: a running step finishes, a wait ends, and no further step begins."""
        self.is_left = True
        if self._wait is not None:
            self._wait.cancel()

    def check(self) -> None:
        """Check that the client is still connected.

        :raises CancelledError: the client has disconnected.
        """
        if self.is_left:
            raise CancelledError

    async def wait(self, wait: Deferred[Any]) -> None:
        """Wait until ``wait`` fires or the client disconnects.

        :raises CancelledError: the client has disconnected.
        """
        self._wait = wait
        try:
            await wait
        finally:
            self._wait = None


class OperationRunner:
    """Runs operations on the pool of a server."""

    def __init__(self, database: Database, clock: Clock, waiting: LongPolls, counters: Counters) -> None:
        self._clock = clock
        self._database = database
        self._waiting = waiting
        self._counters = counters
        self._places = {line: DeferredSemaphore(threads) for line, threads in THREADS.items()}
        self._loop = DeferredSemaphore(THREADS["observers"])

    async def perform(self, operation: Operation[R], ask: OperationRequest, visit: ClientRequest) -> OperationReply[R]:
        """Run the steps of an operation, each in a transaction with the caller as its actor for the audit.

        :raises S2SError: the operation is refused or fails.
        :raises CancelledError: the client has disconnected.
        """
        steps = perform(operation, ask)
        came: Any = None
        failed: Exception | None = None
        has_begun = False
        line = _line(operation, ask)
        places = self._places[line]
        while not isinstance(step := advance(steps, came, failed), OperationReply):
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

    async def wait_turn(self, access: Access, visit: ClientRequest) -> None:
        """Wait until an answer may be made in the reactor; only observers wait.

        :raises Overloaded: too many wait.
        :raises CancelledError: the client has disconnected.
        """
        if access != "observer":
            return
        self._check_line(self._loop)
        scheduler = self._clock.scheduler
        turn = self._loop.acquire()
        late = Overloaded("too many requests of observers wait", retry_after_ms=1000)
        await visit.wait(turn.addTimeout(STEP_S, scheduler, lambda *_: self._late(late)))
        scheduler.callLater(PAUSE_S, self._loop.release)

    async def _tidy_up(self, steps: OperationSteps[Any], places: DeferredSemaphore, actor: str) -> None:
        """Throw :class:`Left` into the steps, and run the clean-up step that they may then yield."""
        try:
            step = advance(steps, None, Left())
        except Left:
            return
        steps.close()
        if callable(step):
            # If the step fails, its rows are removed later anyway; the pool reports a database that is away.
            with suppress(S2SError):
                self._check_line(places)
                await self._run(places, actor, step, ClientRequest())

    def _check_line(self, places: DeferredSemaphore) -> None:
        if len(places.waiting) >= MOST_IN_LINE:
            self._counters.meet("http_line")
            raise Overloaded(f"{MOST_IN_LINE} requests are in the queue already", retry_after_ms=1000)

    async def _run(self, places: DeferredSemaphore, actor: str, step: Step, visit: ClientRequest) -> Any:
        """Run one step, within :data:`STEP_S`.

        :raises DeadlineExceeded: the step was not begun, and will not begin.
        :raises DeadlinePassed: the step was begun, and may or may not take effect.
        """
        scheduler = self._clock.scheduler
        until = self._clock.mono() + STEP_S
        place = places.acquire()
        await visit.wait(place.addTimeout(STEP_S, scheduler, lambda *_: self._late(DeadlineExceeded(_NOT_BEGUN))))
        answer: Deferred[Any] = Deferred()

        def done(outcome: Any) -> None:
            # A step that ends after its timeout releases its place only now. Its answer was cancelled, so its outcome
            # is dropped.
            if isinstance(outcome, Failure):
                # Not synchronously: if the pool refuses a thousand steps at once, each would recurse into the next.
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
