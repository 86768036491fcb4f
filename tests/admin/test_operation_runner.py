"""Running the steps of operations concurrently: :mod:`s2s.admin.http.operation_runner`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.task import Clock as FakeTime
from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.http import operation_runner
from s2s.admin.http.long_polls import LongPolls
from s2s.admin.http.operation_runner import PAUSE_S, STEP_S, THREADS, ClientRequest, Line, OperationRunner
from s2s.admin.operations.operation import Left, Operation, OperationReply, OperationRequest, WaitFor
from s2s.errors import DatabaseUnavailable, DeadlineExceeded, DeadlinePassed, NotFound, Overloaded
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store.access import Access
from s2s.store.tables import audit

_TXN: Any = object()
STEERING = THREADS["steering"]


class _Database:
    """A pool that runs work when the test decides."""

    def __init__(self, time: FakeTime) -> None:
        self.time = time
        self.running: list[tuple[Callable[[], Any], Deferred[Any]]] = []
        self.refusal: Exception | None = None

    def run(self, work: Callable[..., Any], *args: Any) -> Deferred[Any]:
        """Queue the work, or fail at once."""
        if self.refusal is not None:
            return fail(self.refusal)
        done: Deferred[Any] = Deferred()
        self.running.append((lambda: work(_TXN, *args), done))
        return done

    def step(self) -> None:
        """Run the oldest queued work."""
        work, done = self.running.pop(0)
        try:
            result = work()
        except Exception as error:
            done.errback(error)
        else:
            done.callback(result)
        self.time.advance(0)


class OperationRunnerTests(SynchronousTestCase):
    """The runner with a fake pool and fake waits."""

    def setUp(self) -> None:
        """Create the runner."""
        self.time = FakeTime()
        self.database = _Database(self.time)
        self.waits: list[Deferred[None]] = []
        self.waiting_in: list[Line] = []
        self.signed: list[str] = []
        self.patch(audit, "sign", lambda _, actor: self.signed.append(actor))
        self.counters = Counters()
        database: Any = self.database

        def wait(_: object, until: WaitFor, line: Line) -> Deferred[None]:
            over: Deferred[None] = Deferred()
            self.waits.append(over)
            self.waiting_in.append(line)
            return over

        self.patch(LongPolls, "wait", wait)
        waiting: Any = LongPolls.__new__(LongPolls)
        self.runner = OperationRunner(database, Clock(self.time), waiting, self.counters)

    def perform(
        self,
        begin: Callable[[OperationRequest], Any],
        visit: ClientRequest | None = None,
        *,
        access: Access = "operator",
        is_list: bool = False,
    ) -> Deferred[Any]:
        """Start an operation."""
        operation: Operation[Any] = Operation(
            "x", "GET", "/x", "observer", "x", {"type": "object"}, begin, is_list=is_list
        )
        performing = self.runner.perform(operation, OperationRequest("token:me", access), visit or ClientRequest())
        return Deferred.fromCoroutine(performing)

    def test_steps(self) -> None:
        """Each step runs separately with the caller as audit actor, and its result is passed to the operation."""

        def begin(_: OperationRequest) -> Any:
            first = yield lambda txn: (txn, 1)
            second = yield lambda txn: (txn, first[1] + 1)
            return OperationReply([first, second], 201)

        performing = self.perform(begin)
        self.database.step()
        self.assertNoResult(performing)
        self.database.step()
        reply = self.successResultOf(performing)
        self.assertEqual((reply.value, reply.status), ([(_TXN, 1), (_TXN, 2)], 201))
        self.assertEqual(self.signed, ["token:me", "token:me"])

    def test_failures(self) -> None:
        """The exception of a step is raised in the operation; an uncaught one fails the request."""

        def begin(_: OperationRequest) -> Any:
            try:
                yield lambda txn: 1 / 0
            except ZeroDivisionError:
                yield lambda txn: None
            raise NotFound("it is not there")

        performing = self.perform(begin)
        self.database.step()
        self.database.step()
        self.failureResultOf(performing, NotFound)

        def away(_: OperationRequest) -> Any:
            yield lambda txn: (_ for _ in ()).throw(DatabaseUnavailable("away"))

        performing = self.perform(away)
        self.database.step()
        self.failureResultOf(performing, DatabaseUnavailable)

    def test_a_few_at_once(self) -> None:
        """The number of concurrent steps is limited; a wait occupies no place; the queue has a maximum length."""
        self.patch(operation_runner, "MOST_IN_LINE", 2)

        def begin(_: OperationRequest) -> Any:
            yield lambda txn: None
            yield WaitFor(lambda _, ids: ids, (1,), 5)
            return OperationReply({})

        performing = [self.perform(begin) for _ in range(STEERING + 2)]
        self.assertEqual(len(self.database.running), STEERING)
        error = self.failureResultOf(self.perform(begin), Overloaded)
        self.assertEqual(error.value.details["retry_after_ms"], 1000)
        self.assertEqual(self.counters.met["http_line"], 1)
        for _ in performing:
            self.database.step()
        self.assertEqual((len(self.waits), len(self.database.running)), (STEERING + 2, 0))
        for wait in self.waits:
            wait.callback(None)
        for each in performing:
            self.successResultOf(each)

    def test_the_three_lines(self) -> None:
        """No request of an observer and no list of an operator delays an operator's other requests."""
        self.patch(operation_runner, "MOST_IN_LINE", 2)

        def begin(_: OperationRequest) -> Any:
            return OperationReply((yield lambda txn: 5))

        lines: list[tuple[Line, dict[str, Any]]] = [
            ("observers", {"access": "observer"}),
            ("lists", {"is_list": True}),
            ("steering", {}),
        ]
        performing, running = [], 0
        for line, asking in lines:
            running += THREADS[line]
            performing += [self.perform(begin, **asking) for _ in range(THREADS[line] + 2)]
            self.assertEqual(len(self.database.running), running)
        for _, asking in lines:
            self.failureResultOf(self.perform(begin, **asking), Overloaded)
        self.failureResultOf(self.perform(begin, access="observer", is_list=True), Overloaded)
        while self.database.running:
            self.database.step()
        self.assertEqual([self.successResultOf(each).value for each in performing], [5] * len(performing))

    def test_answers_of_the_reactor(self) -> None:
        """Responses to observers that need no transaction have a limited rate; those to operators are not delayed."""
        turns = [Deferred.fromCoroutine(self.runner.wait_turn("observer", ClientRequest())) for _ in range(4)]
        self.assertEqual([turn.called for turn in turns], [True, True, False, False])
        self.successResultOf(Deferred.fromCoroutine(self.runner.wait_turn("operator", ClientRequest())))
        self.time.advance(PAUSE_S)
        self.assertEqual([turn.called for turn in turns], [True] * 4)
        gone = ClientRequest()
        leaving = Deferred.fromCoroutine(self.runner.wait_turn("observer", gone))
        gone.leave()
        self.failureResultOf(leaving, CancelledError)
        self.time.advance(PAUSE_S)
        self.successResultOf(Deferred.fromCoroutine(self.runner.wait_turn("observer", ClientRequest())))

    def test_what_has_begun_is_not_refused(self) -> None:
        """A request that has run a step gets its next one, however long the queue is."""
        self.patch(operation_runner, "MOST_IN_LINE", 1)

        def begin(_: OperationRequest) -> Any:
            yield lambda txn: None
            yield WaitFor(lambda _, ids: ids, (1,), 5)
            return OperationReply((yield lambda txn: 5))

        performing = []
        for _ in range(STEERING + 5):
            performing.append(self.perform(begin))
            self.database.step()
        for wait in self.waits:
            wait.callback(None)
        self.assertEqual(len(self.database.running), STEERING)
        self.failureResultOf(self.perform(begin), Overloaded)
        while self.database.running:
            self.database.step()
        self.assertEqual([self.successResultOf(each).value for each in performing], [5] * len(performing))

    def test_whose_wait_it_is(self) -> None:
        """A wait counts for the line of its request."""

        def begin(_: OperationRequest) -> Any:
            yield WaitFor(lambda _, ids: ids, (1,), 5)
            return OperationReply(None)

        for access, is_list in (("observer", True), ("operator", True), ("operator", False)):
            self.perform(begin, access=access, is_list=is_list)
        self.assertEqual(self.waiting_in, ["observers", "lists", "steering"])

    def test_a_database_that_hangs(self) -> None:
        """A step that takes too long fails: a running one with an unknown outcome, a queued one as never begun."""
        taken = []

        def begin(ask: OperationRequest) -> Any:
            return OperationReply((yield lambda txn: taken.append(5) or 5))

        hanging = [self.perform(begin) for _ in range(STEERING + 1)]
        self.time.advance(STEP_S - 0.1)
        for each in hanging:
            self.assertNoResult(each)
        self.time.advance(0.1)
        for each in hanging[:STEERING]:
            self.failureResultOf(each, DeadlinePassed)
        self.failureResultOf(hanging[STEERING], DeadlineExceeded)
        self.assertEqual(self.counters.met["http_step"], STEERING + 1)
        self.assertEqual(len(self.database.running), STEERING)
        after = self.perform(begin)
        while self.database.running:
            self.database.step()
        self.assertEqual(self.successResultOf(after).value, 5)
        self.assertEqual(len(taken), STEERING + 1)
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_a_thousand_that_fail_at_once(self) -> None:
        """If the pool refuses work, each queued request fails with its own error, and every place is free again."""

        def begin(_: OperationRequest) -> Any:
            return OperationReply((yield lambda txn: 5))

        performing = [self.perform(begin) for _ in range(1000)]
        self.database.refusal = DatabaseUnavailable("away")
        for _ in range(STEERING):
            self.database.step()
        for _ in performing:
            self.time.advance(0)
        for each in performing[:STEERING]:
            self.successResultOf(each)
        for each in performing[STEERING:]:
            self.failureResultOf(each, DatabaseUnavailable)
        self.database.refusal = None
        after = self.perform(begin)
        self.database.step()
        self.successResultOf(after)

    def test_gone(self) -> None:
        """If the client is gone its waits end and no further step runs; a running step is finished."""
        done = []

        def begin(_: OperationRequest) -> Any:
            yield lambda txn: done.append("first")
            try:
                yield WaitFor(lambda _, ids: ids, (1,), 5)
                yield lambda txn: done.append("second")
            finally:
                done.append("closed")

        waiting, working = ClientRequest(), ClientRequest()
        first = self.perform(begin, waiting)
        self.database.step()
        waiting.leave()
        self.failureResultOf(first, CancelledError)
        second = self.perform(begin, working)
        working.leave()
        self.assertNoResult(second)
        self.database.step()
        self.failureResultOf(second, CancelledError)
        self.assertEqual(done, ["first", "closed", "first", "closed"])
        self.assertEqual(self.database.running, [])

    def test_tidying_up(self) -> None:
        """One cleanup step after the client has left is run, and no step after it."""
        done = []

        def begin(_: OperationRequest) -> Any:
            yield lambda txn: done.append("asked")
            try:
                yield WaitFor(lambda _, ids: ids, (1,), 5)
            except Left:
                yield lambda txn: done.append("taken back")
                yield lambda txn: done.append("something more")

        visit = ClientRequest()
        performing = self.perform(begin, visit)
        self.database.step()
        visit.leave()
        self.assertNoResult(performing)
        self.database.step()
        self.failureResultOf(performing, CancelledError)
        self.assertEqual((done, self.database.running), (["asked", "taken back"], []))

    def test_gone_from_the_line(self) -> None:
        """A client that leaves while its step is queued removes the step, and occupies no place."""
        visits = [ClientRequest() for _ in range(STEERING + 2)]

        def begin(_: OperationRequest) -> Any:
            return OperationReply((yield lambda txn: 5))

        performing = [self.perform(begin, visit) for visit in visits]
        visits[STEERING].leave()
        self.failureResultOf(performing.pop(STEERING), CancelledError)
        while self.database.running:
            self.database.step()
        self.assertEqual([self.successResultOf(each).value for each in performing], [5] * (STEERING + 1))
        gone = ClientRequest()
        gone.leave()
        self.failureResultOf(self.perform(begin, gone), CancelledError)
        self.assertEqual((self.database.running, self.time.getDelayedCalls()), ([], []))
