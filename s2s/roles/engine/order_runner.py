"""Run orders, each once, whether they come over a link or from the table (docs/protocol.rst, "Orders")."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger

from s2s.errors import (
    BadPayload,
    CanonicalError,
    HandlerStuck,
    InternalError,
    Paused,
    RowRefused,
    ShuttingDown,
    StatementRefused,
    WireError,
    harmless,
    one_line,
    storable,
)
from s2s.handlers.discovery import Found
from s2s.handlers.orders import OrderRun
from s2s.handlers.run import Unfinished, validate_outcome
from s2s.protocol import canonical
from s2s.roles.engine.state import EngineState
from s2s.runtime.clock import Clock, cancel
from s2s.runtime.line_quota import LineQuota
from s2s.runtime.status_log import status_log
from s2s.runtime.waiters import Waiters
from s2s.store import sqlstate
from s2s.store.cursor import check_readable
from s2s.store.driver import Cursor
from s2s.store.handler_pool import HandlerPool, call
from s2s.store.poll_loop import LeftOut, PollLoop
from s2s.store.pool import Database
from s2s.store.tables import config, orders
from s2s.store.tables.jobs import SLICE_S
from s2s.store.tables.orders import Order
from s2s.store.tables.own_keys import database_id, own_key

#: Seconds for which an order in the table is left to arrive over the link, if there is a link.
PATIENCE_S: Final = 3.0
#: Seconds to wait for the end of an order that came over the link, before the reply that it is not over.
ANSWER_S: Final = 1.5
#: Orders run one after another, in the order in which they were given. If a step takes STUCK_S seconds, such as that of
#: a job that hangs or waits for its own other run, a second worker meanwhile takes the orders that run no job.
STUCK_S: Final = 1.0
LINES: Final = 2
#: Attempts in a row without progress after which an order fails: their processes died, or the database made them fail,
#: by a deadlock for instance.
MOST_ATTEMPTS: Final = 20
#: Log lines about orders in one minute. Further ones are counted, since a server may send many orders a second.
MOST_LINES: Final = 100


class _Stopped(Exception):
    """An order was refused, or has failed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class OrderRunner:
    """Runs orders step by step, those that have waited longest first.

    :param handlers: the connections on which orders run.
    :param plugins: the order handlers, and the jobs and settings that they use.
    :param name: the name of the engine.
    :param has_link: returns whether there is a proven link, over which orders may come.
    :param emitted: called when there may be new rows in the outbox.
    :param frame_size: the longest frame that the engine sends, in bytes.

    :ivar over: the number of orders that ended here, by their status.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        handlers: HandlerPool,
        clock: Clock,
        plugins: Found,
        name: str,
        condition: EngineState,
        has_link: Callable[[], bool],
        emitted: Callable[[], object],
        frame_size: int,
    ) -> None:
        self._database = database
        self._handlers = handlers
        self._clock = clock
        self._kinds = plugins.orders
        self._jobs = plugins.jobs
        self._defaults = plugins.defaults
        self._catalogue = plugins.catalogue
        self._frame_size = frame_size
        #: The member of the params that names a job, by RPC.
        self._job_members = {rpc: kind.runs_job for rpc, kind in plugins.orders.items() if kind.runs_job}
        self._name = name
        self._condition = condition
        self._has_link = has_link
        self._emitted = emitted
        self._loop = PollLoop("the runner of orders", self._poll_once, clock.scheduler, LINES)
        self._left_out = LeftOut("order", self._loop, clock.mono)
        #: Orders that came over a link are stored one after another, so that none overtakes an earlier one.
        self._writing = DeferredLock()
        #: The orders with a step in progress here, and the time of its start.
        self._in_hand: dict[str, float] = {}
        #: The Deferreds that wait for the end of each order that came over the link.
        self._waiters: defaultdict[str, Waiters[None]] = defaultdict(Waiters)
        self._lines = LineQuota(clock.scheduler, self._tell_rest, MOST_LINES)
        self.over = dict.fromkeys(("done", "refused", "failed"), 0)

    def start(self) -> None:
        """Start running orders."""
        self._loop.start()

    def stop(self) -> Deferred[Any]:
        """Begin no further step.

        :returns: fires when the steps in progress are finished.
        """
        stopped = self._loop.stop()
        self._lines.stop()
        for order_id in list(self._waiters):
            self._settle(order_id)
        return stopped

    def wake(self) -> None:
        """Poll the table now, because there may be a new order."""
        self._loop.wake_all()

    async def take(self, order_id: str, rpc: str, params: Mapping[str, Any], actor: str) -> Order:
        """Take an order that came over the link, and store it if it has no row yet.

        :returns: the order as it is stored when it is over, or after :data:`ANSWER_S`.
        :raises IdemConflict: its row has other content.
        :raises ShuttingDown: the engine is draining, and the order is new.
        :raises DatabaseUnavailable: the order may or may not be stored.
        :raises InternalError: the database refuses to store the order; the reason is logged at most once a minute.
        """
        if self._condition.is_draining:
            # A request for a known order is not new work.
            known = await self._database.run(orders.known, order_id, rpc, params)
            if known is None:
                raise ShuttingDown("the engine is shutting down")
            return known
        try:
            order = await self._writing.run(self._database.run, self._give, order_id, rpc, params, actor)
        except StatementRefused as refused:
            raise InternalError(incident=self._database.troubles.note(refused.state, str(refused))) from None
        if not order.is_open or self._loop.is_stopping:
            return order
        waiter = self._waiters[order_id].wait()
        timer = self._clock.scheduler.callLater(ANSWER_S, self._settle, order_id)
        self.wake()
        await waiter
        cancel(timer)
        return await self._database.run(orders.find, order_id)

    def _settle(self, order_id: str) -> None:
        if order_id in self._waiters:
            self._waiters.pop(order_id).fire(None)

    async def _poll_once(self, line: int) -> float | None:
        """Do the steps of one order for :data:`s2s.store.tables.jobs.SLICE_S`, and at least one step.

        :returns: seconds to sleep, see :class:`s2s.store.poll_loop.PollLoop`.
        """
        if self._condition.wanted is None or self._handlers.is_full:
            return None
        if line and not self._is_stuck():
            return None
        is_paused = self._condition.wanted == "paused"
        rpcs = [rpc for rpc, kind in self._kinds.items() if not (line and kind.rests)]
        resting = [rpc for rpc in rpcs if self._kinds[rpc].rests and is_paused]
        patience_s = PATIENCE_S if self._has_link() else 0.0
        others = [*self._in_hand, *self._left_out.keys()]
        try:
            order = await self._database.run(
                orders.attempt, rpcs, resting, others, patience_s, self._job_members, list(self._jobs)
            )
        except RowRefused as refused:
            return self._left_out.add(refused.key, refused)
        if order is None:
            return None
        until = self._clock.mono() + SLICE_S
        while order is not None:
            order_id = order.order_id
            try:
                order = await self._do(order, until)
            except StatementRefused as refused:
                return self._left_out.add(order_id, refused)
        return 0.0

    async def _do(self, order: Order, until: float) -> Order | None:
        """Do one step.

        :param until: the time at which the caller polls for other orders.
        :returns: the attempt of the next step, if this engine does that step.
        """
        rests = self._kinds[order.rpc].rests
        is_paused = rests and self._condition.wanted == "paused"
        # The engine was paused, or began to stop, during the query.
        if (is_paused and order.status == "running") or self._loop.is_stopping:
            await self._database.run(orders.release, order)
            return None
        self._in_hand[order.order_id] = self._clock.mono()
        is_stuck = False
        try:
            with self._condition.job() if rests and not is_paused else nullcontext():
                after = await self._handlers.run(self._step, order, is_paused, until)
        except HandlerStuck as stuck:
            is_stuck = True
            # The order does not begin here again while its thread lives.
            stuck.task.on_return = lambda: self._in_hand.pop(order.order_id, None)
            await self._handlers.end(stuck.task)
            self.log.error("order {order_id} is stuck: {why}", order_id=order.order_id, why=str(stuck))
            after = await self._database.run(self._end, order, stuck, True)
        # StatementRefused is raised by the COMMIT, at which deferred constraints are checked.
        except (_Stopped, StatementRefused) as stopped:
            error = stopped.error if isinstance(stopped, _Stopped) else stopped
            after = await self._database.run(self._end, order, error)
        finally:
            if not is_stuck:
                del self._in_hand[order.order_id]
        if after is None:
            return None
        self._tell(order, after)
        return after if after.is_open and after.retry_at is not None else None

    def _is_stuck(self) -> bool:
        return any(self._clock.mono() >= since + STUCK_S for since in self._in_hand.values())

    def _tell(self, before: Order, after: Order) -> None:
        self._emitted()
        if after.is_open and before.status == after.status:
            return
        if not after.is_open:
            self.over[after.status] += 1
            self._settle(after.order_id)
        if not self._lines.may_tell(after.status):
            return
        told = ", ".join(f"{name} {value}" for name, value in (after.result or {}).items() if name != "details")
        told = f": {harmless(told)}" if told else ""
        status_log.info(
            "order {order_id} {rpc} by {actor!r}: {status}{told}",
            order_id=after.order_id,
            rpc=after.rpc,
            actor=harmless(after.actor),
            status=after.status,
            told=told,
        )

    def _tell_rest(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} {status}" for status, count in untold.items())
        status_log.info("further orders: {told}: see s2s order list", told=told)

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _give(self, txn: Cursor, order_id: str, rpc: str, params: Mapping[str, Any], actor: str) -> Order:
        # A step in progress has locked the row of its order: a write would wait for the step, and the next orders too.
        known = orders.known(txn, order_id, rpc, params) if order_id in self._in_hand else None
        return known or orders.give(txn, order_id, rpc, params, actor, by_link=True)[0]

    def _step(self, txn: Cursor, order: Order, is_paused: bool, until: float) -> Order | None:
        """Do a step in the transaction that stores it.

        :param until: see :meth:`_do`.
        :returns: the order as it is afterwards; ``None``: the attempt belongs to another engine by now.
        :raises _Stopped: the order is refused, or has failed.
        """
        place = orders.hold(txn, order)
        if place is None:
            return None
        settings = {**self._defaults, **config.read(txn).values}
        key = own_key(database_id(txn), "order", order.order_id)
        try:
            self._check(order, is_paused)
            # foreign() raises if a job has ended the transaction or has swallowed the error of a statement.
            with self._handlers.foreign(txn, f"order {order.order_id}, {order.rpc}") as cursor:
                run = OrderRun(
                    cursor,
                    key,
                    order.order_id,
                    order.params,
                    order.actor,
                    order.created_at,
                    settings,
                    self._frame_size,
                    self._jobs,
                    order.state,
                )
                outcome = validate_outcome(call(self._kinds[order.rpc].run, cursor, run))
        # Catch BaseException: in this thread only a job can raise SystemExit. The pool converts the error of a lost
        # connection or a stopping process.
        except BaseException as error:
            meaning = sqlstate.of(error)
            if meaning.passes or meaning.fault != "statement":
                raise
            raise _Stopped(error) from None
        if isinstance(outcome, Unfinished):
            return orders.go_on(txn, order, place, outcome.state, self._name, self._clock.mono() < until)
        orders.finish(txn, order, "done", outcome, self._name)
        return orders.find(txn, order.order_id)

    def _end(self, txn: Cursor, order: Order, error: BaseException, waits: bool = False) -> Order | None:
        """Store that an order is refused, if nothing of it was done, or else that it has failed.

        :param waits: wait for a session of s2s that is still ending.
        """
        if orders.hold(txn, order, waits) is None:
            return None
        # An internal error is not the order's fault.
        is_refusal = isinstance(error, WireError) and error.code != InternalError.code and order.status == "queued"
        orders.finish(txn, order, "refused" if is_refusal else "failed", _why(error), self._name)
        return orders.find(txn, order.order_id)

    def _check(self, order: Order, is_paused: bool) -> None:
        """Refuse an order that may not run. Its row may have been written by hand."""
        try:
            check_readable(order.params, "JSON of its params")
            check_readable(order.state, "JSON of its state")
            canonical.dumps(order.params)
        except CanonicalError as error:
            raise BadPayload(str(error)) from None
        self._catalogue[order.rpc].request_schema.check({**order.params, "order_id": order.order_id})
        if is_paused:
            raise Paused("the engine is paused: resume it first")
        if order.attempts > MOST_ATTEMPTS:
            raise InternalError(
                f"the order made no progress in {MOST_ATTEMPTS} attempts, because engines or the database failed"
            )


def _why(error: BaseException) -> Mapping[str, Any]:
    """Return an error as the result of an order, in a form that can be stored, sent and shown."""
    said = error if isinstance(error, WireError) else InternalError(one_line(error))
    result = {"code": said.code, "message": storable(said.message)}
    try:
        validate_outcome(more := {**result, "details": said.details})
    except Exception:  # a plug-in may have put any value into the details
        return result
    return more if said.details else result
