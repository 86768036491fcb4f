"""Sending orders that were given to the database over a link (docs/protocol.rst, "Orders")."""

from __future__ import annotations

import itertools
from typing import Final
from weakref import WeakSet

from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.catalogue import ORDERS
from s2s.clock import Clock
from s2s.errors import DatabaseError, LinkLost, Refused, S2SError, UnsupportedType
from s2s.links import ServerLinks
from s2s.protocol import Link
from s2s.store import orders as table
from s2s.store.orders import Order
from s2s.store.pool import Database

#: Beside the table's NOTIFY, which can be lost.
POLL_S: Final = 1.0
#: Seconds after which an order that is queued still is sent again, by another link if there is one.
AGAIN_S: Final = 5.0
#: Orders that are sent and not answered, at most.
MOST: Final = 256


class Courier:
    """Sends each order that is queued to one of the engines that are linked here.

    The engine answers with what the order's row says, and that row decides: nothing rests on the answer, and an order
    that is lost on the way is sent again, or found by an engine in the table.

    :ivar sent: orders sent.
    """

    log = Logger()

    def __init__(self, database: Database, links: ServerLinks, clock: Clock) -> None:
        self._database = database
        self._links = links
        self._clock = clock
        self._is_looking = self._is_woken = False
        #: When each order that was queued at the last look was sent, by the monotonic clock.
        self._sent: dict[str, float] = {}
        self._flying: set[str] = set()
        self._unserved: WeakSet[Link] = WeakSet()
        self._turn = itertools.count()
        self._polling = task.LoopingCall(self.wake)
        self._polling.clock = clock.scheduler
        self.sent = 0

    def start(self) -> None:
        """Send from now on."""
        self._polling.start(POLL_S, now=False)

    def stop(self) -> None:
        """Send no more."""
        if self._polling.running:
            self._polling.stop()

    def wake(self) -> None:
        """There may be an order."""
        self._is_woken = True
        if self._is_looking or not self._links.engines or not self._polling.running:
            return
        self._is_looking, self._is_woken = True, False
        looking = self._database.run(table.queued, ORDERS, MOST)
        looking.addCallbacks(self._found, self._unless_away).addBoth(self._looked)

    def _looked(self, _: object) -> None:
        self._is_looking = False
        if self._is_woken:
            self.wake()

    def _found(self, orders: list[Order]) -> None:
        now = self._clock.mono()
        self._sent = {order.order_id: self._sent.get(order.order_id, float("-inf")) for order in orders}
        for order in orders:
            if now < self._sent[order.order_id] + AGAIN_S or order.order_id in self._flying:
                continue
            link = self._next_link()
            if link is None or len(self._flying) >= MOST:
                return
            self._sent[order.order_id] = now
            self._flying.add(order.order_id)
            self.sent += 1
            sending = Deferred.fromCoroutine(self._send(link, order))
            sending.addErrback(lambda failure: self.log.failure("the courier stumbled", failure))

    def _next_link(self) -> Link | None:
        """Take the engines in turn."""
        links = [link for link in self._links.engines if link.session.is_open and link not in self._unserved]
        return links[next(self._turn) % len(links)] if links else None

    async def _send(self, link: Link, order: Order) -> None:
        try:
            await link.call(order.rpc, {**order.params, "order_id": order.order_id})
        except S2SError as error:
            if isinstance(error, Refused) and error.code == UnsupportedType.code:
                self._unserved.add(link)
            elif isinstance(error, LinkLost):
                self._sent.pop(order.order_id, None)
            self.log.warn("{link}: order {order_id}: {why}", link=link, order_id=order.order_id, why=str(error))
        finally:
            self._flying.discard(order.order_id)

    def _unless_away(self, failure: Failure) -> None:
        # Of a database that is away the pool has told.
        if not failure.check(DatabaseError):
            self.log.failure("the courier stumbled", failure)
