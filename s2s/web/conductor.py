"""Taking the steps of operations on the database's pool, a few at once, and waiting between them."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.python.failure import Failure

from s2s.clock import Clock
from s2s.errors import DeadlineExceeded, Overloaded
from s2s.limits import Counters
from s2s.operations.kind import Ask, Operation, Reply, Step, Until, advance, perform
from s2s.store import audit
from s2s.store.driver import Cursor
from s2s.store.pool import Database
from s2s.web.waiting import Waiting

R = TypeVar("R")

#: Connections of the pool that requests have at once: pushes, keys and the executor have theirs in any case.
THREADS: Final = 2
#: Steps that may stand in line for one of them.
MOST_IN_LINE: Final = 1000
#: Seconds that a step may take, with its time in line: of a database that hangs nobody hears otherwise.
STEP_S: Final = 10.0


class Visit:
    """One request, as long as somebody is there to be answered.

    :ivar is_left: nobody is there any more.
    """

    def __init__(self) -> None:
        self._wait: Deferred[None] | None = None
        self.is_left = False

    def leave(self) -> None:
        """Whoever asked is gone: a step under way is finished, and nothing is waited for any more."""
        self.is_left = True
        if self._wait is not None:
            self._wait.cancel()

    async def wait(self, wait: Deferred[None]) -> None:
        """Wait, unless nobody is there any more.

        :raises CancelledError: nobody is.
        """
        self._wait = wait
        if self.is_left:
            wait.cancel()
        try:
            await wait
        finally:
            self._wait = None


class Conductor:
    """Performs operations."""

    def __init__(self, database: Database, clock: Clock, waiting: Waiting, counters: Counters) -> None:
        self._clock = clock
        self._database = database
        self._waiting = waiting
        self._counters = counters
        self._places = DeferredSemaphore(THREADS)

    async def perform(self, operation: Operation[R], ask: Ask, visit: Visit) -> Reply[R]:
        """Take the steps of an operation, each in a transaction that is signed by whoever asks.

        :raises S2SError: it is refused, or fails.
        :raises CancelledError: nobody waits for it any more.
        """
        steps = perform(operation, ask)
        came: Any = None
        failed: Exception | None = None
        while not isinstance(step := advance(steps, came, failed), Reply):
            came = failed = None
            try:
                if isinstance(step, Until):
                    await visit.wait(self._waiting.wait(step))
                else:
                    came = await self._run(ask.actor, step)
            except CancelledError:
                steps.close()
                raise
            except Exception as error:
                failed = error
        return step

    def _run(self, actor: str, step: Step) -> Deferred[Any]:
        if len(self._places.waiting) >= MOST_IN_LINE:
            self._counters.meet("http_line")
            raise Overloaded(f"{MOST_IN_LINE} requests stand in line already", retry_after_ms=1000)
        answer: Deferred[Any] = Deferred()

        def done(outcome: Any) -> None:
            # A step that is over too late is over all the same, and gives its place back only then.
            if not answer.called:
                answer.callback(outcome)

        self._places.run(self._database.run, _signed, actor, step).addBoth(done)
        return answer.addTimeout(STEP_S, self._clock.scheduler, self._late)

    def _late(self, *_: object) -> Failure:
        self._counters.meet("http_step")
        return Failure(DeadlineExceeded())


def _signed(txn: Cursor, actor: str, step: Step) -> Any:
    audit.sign(txn, actor)
    return step(txn)
