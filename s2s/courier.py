"""Sending orders that were given to the database over a link (docs/protocol.rst, "Orders")."""

from __future__ import annotations

import itertools
from typing import Any, Final
from weakref import WeakSet

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.catalogue import ORDERS
from s2s.clock import Clock
from s2s.errors import LinkLost, Refused, S2SError, UnsupportedType
from s2s.links import ServerLinks
from s2s.protocol import Link
from s2s.store import orders as table
from s2s.store.orders import Order
from s2s.store.pool import Database
from s2s.turns import Turns

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
        #: When each order that was queued at the last look was sent, by the monotonic clock.
        self._sent: dict[str, float] = {}
        self._flying: set[str] = set()
        self._unserved: WeakSet[Link] = WeakSet()
        self._places = itertools.count()
        self._turns = Turns("the courier", self._turn, clock.scheduler)
        self.wake = self._turns.wake
        self.sent = 0

    def start(self) -> None:
        """Send from now on."""
        self._turns.start()

    def stop(self) -> Deferred[Any]:
        """Send no more.

        :returns: fires when no look at the table is under way.
        """
        return self._turns.stop()

    async def _turn(self, _: int) -> None:
        if self._links.engines:
            orders = await self._database.run(table.queued, ORDERS, MOST)
            if not self._turns.is_stopping:
                self._found(orders)

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
        return links[next(self._places) % len(links)] if links else None

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
