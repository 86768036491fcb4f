"""Running orders, each once, whichever way they come (docs/protocol.rst, "Orders")."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.catalogue import BY_NAME
from s2s.clock import Clock
from s2s.condition import Condition
from s2s.errors import InternalError, Paused, StatementRefused, WireError, one_line
from s2s.jobs import Unfinished, judged
from s2s.news import news
from s2s.orders import OrderRun, OrderType
from s2s.store import orders as table
from s2s.store.driver import Cursor, is_passing, savepoint
from s2s.store.orders import Order
from s2s.store.pool import Database
from s2s.turns import Turns

#: Seconds that an order of the table is left to the link, where there is one.
PATIENCE_S: Final = 3.0
#: Seconds that an order over the link is waited for, before it is answered that it is not over.
ANSWER_S: Final = 1.5
#: Orders that run at once in one engine: a forced job that hangs does not hold up the others.
LINES: Final = 2
#: Attempts that a database may spoil, by a deadlock for instance, and attempts in which a process may die.
SPOILED: Final = 5
DEATHS: Final = 50


class _Stopped(Exception):
    """An order was refused, or has failed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class OrderRunner:
    """Runs orders step by step, those that wait longest first.

    :param kinds: by RPC.
    :param name: the engine's.
    :param has_link: whether there is a proven link, over which orders may come.
    :param emitted: called when there may be something new in the outbox.

    :ivar over: orders ended here, by their status.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        clock: Clock,
        kinds: Mapping[str, OrderType],
        name: str,
        condition: Condition,
        has_link: Callable[[], bool],
        emitted: Callable[[], object],
    ) -> None:
        self._database = database
        self._clock = clock
        self._kinds = kinds
        self._name = name
        self._condition = condition
        self._has_link = has_link
        self._emitted = emitted
        self._turns = Turns("the runner of orders", self._turn, clock.scheduler, LINES)
        #: Who waits for the end of an order that came over the link.
        self._waiters: defaultdict[str, list[Deferred[None]]] = defaultdict(list)
        self.over = dict.fromkeys(("done", "refused", "failed"), 0)

    def start(self) -> None:
        """Run orders from now on."""
        self._turns.start()

    def stop(self) -> Deferred[Any]:
        """Begin no further step.

        :returns: fires when those under way are finished.
        """
        stopped = self._turns.stop()
        for order_id in list(self._waiters):
            self._settle(order_id)
        return stopped

    def wake(self) -> None:
        """There may be an order."""
        self._turns.wake()

    async def take(self, order_id: str, rpc: str, params: Mapping[str, Any], actor: str) -> Order:
        """Take an order that came over the link: written down first, if nobody has.

        :returns: what its row says when it is over, or after :data:`ANSWER_S`.
        :raises IdemConflict: its row has other content.
        :raises DatabaseError: it may or may not be written down.
        """
        order, _ = await self._database.run(table.give, order_id, rpc, params, actor)
        if not order.is_open:
            return order
        waiter: Deferred[None] = Deferred()
        self._waiters[order_id].append(waiter)
        timer = self._clock.scheduler.callLater(ANSWER_S, self._settle, order_id)
        self.wake()
        await waiter
        if timer.active():
            timer.cancel()
        return await self._database.run(table.find, order_id)

    def _settle(self, order_id: str) -> None:
        for waiter in self._waiters.pop(order_id, ()):
            waiter.callback(None)

    async def _turn(self, _: int) -> float | None:
        """Do one step.

        :returns: seconds to sleep, see :class:`s2s.turns.Turns`.
        """
        if self._condition.wanted is None:
            return None
        resting = [rpc for rpc, kind in self._kinds.items() if kind.rests and self._condition.wanted == "paused"]
        patience_s = PATIENCE_S if self._has_link() else 0.0
        expected = list(self._waiters)
        order = await self._database.run(table.attempt, self._kinds, resting, expected, patience_s)
        if order is None:
            return None
        way = "link" if order.order_id in self._waiters else "table"
        kind = self._kinds[order.rpc]
        is_paused = kind.rests and self._condition.wanted == "paused"
        if is_paused and order.status == "running":  # paused while we looked
            return 0.0
        with self._condition.job() if kind.rests and not is_paused else nullcontext():
            try:
                after = await self._database.run(self._step, kind, order, way, is_paused)
            # Refused: by the COMMIT, at which deferred constraints are checked.
            except (_Stopped, StatementRefused) as stopped:
                error = stopped.error if isinstance(stopped, _Stopped) else stopped
                after = await self._database.run(self._stop_order, order, error, way)
        if after is not None:
            self._tell(order, after)
        return 0.0

    def _tell(self, before: Order, after: Order) -> None:
        self._emitted()
        if after.is_open and before.status == after.status:
            return
        if not after.is_open:
            self.over[after.status] += 1
            self._settle(after.order_id)
        told = ", ".join(f"{name} {value}" for name, value in (after.result or {}).items() if name != "details")
        news.info(
            "order {order_id} {rpc} by {actor!r}: {status}{told}",
            order_id=after.order_id,
            rpc=after.rpc,
            actor=after.actor,
            status=after.status,
            told=f": {told}" if told else "",
        )

    # --- in a thread of the pool ---------------------------------------------------------------------------------

    def _step(self, txn: Cursor, kind: OrderType, order: Order, way: str, is_paused: bool) -> Order | None:
        """Do a step in the transaction that stores it.

        :returns: the order as it is then; ``None``: it is another engine's by now.
        :raises _Stopped: it is refused, or has failed.
        """
        if not table.hold(txn, order):
            return None
        run = OrderRun(order.order_id, order.params, order.actor, order.created_at, order.state)
        try:
            # It tells when a job has ended the transaction, or has swallowed the error of a statement.
            with savepoint(txn):
                self._check(order, is_paused)
                outcome = judged(kind.run(txn, run))
        # BaseException: in this thread a SystemExit is a job's own, and nobody else's. A connection that is lost, or a
        # process that stops, is made something else of by the pool.
        except BaseException as error:
            if is_passing(error) and order.attempts < SPOILED:
                raise
            raise _Stopped(error) from None
        if isinstance(outcome, Unfinished):
            table.go_on(txn, order, outcome.state, self._name, way)
        else:
            table.finish(txn, order, "done", outcome, self._name, way)
        return table.find(txn, order.order_id)

    def _stop_order(self, txn: Cursor, order: Order, error: BaseException, way: str) -> Order | None:
        """Store that an order is refused, where nothing of it was done, or else that it has failed."""
        if not table.hold(txn, order):
            return None
        is_refusal = isinstance(error, WireError) and order.status == "queued"
        said = error if isinstance(error, WireError) else InternalError(one_line(error))
        result = {"code": said.code, "message": said.message, **({"details": said.details} if said.details else {})}
        table.finish(txn, order, "refused" if is_refusal else "failed", result, self._name, way)
        return table.find(txn, order.order_id)

    def _check(self, order: Order, is_paused: bool) -> None:
        """Refuse what may not run; a row may have been written by any hand."""
        BY_NAME[order.rpc].request_schema.check({**order.params, "order_id": order.order_id})
        if is_paused:
            raise Paused("the engine is paused")
        if order.attempts > DEATHS:
            raise RuntimeError(f"{DEATHS} processes ended while they ran it")
