"""Send the queued orders of the database over links (docs/protocol.rst, "Orders")."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.errors import (
    BadReply,
    DatabaseError,
    DeadlinePassed,
    InternalError,
    LinkLost,
    Paused,
    Refused,
    S2SError,
    TooLarge,
    UnsupportedType,
    harmless,
    storable,
)
from s2s.link.connection import Link
from s2s.link.factory import ServerLinks
from s2s.protocol.catalogue import ORDER_REPLY
from s2s.roles.engine.relay import final_code
from s2s.runtime.clock import Clock
from s2s.runtime.status_log import status_log
from s2s.store.cursor import check_readable
from s2s.store.poll_loop import PollLoop
from s2s.store.pool import Database
from s2s.store.tables import orders
from s2s.store.tables.orders import Order, Place

#: Seconds after which an order that is still queued is sent again, by another link if there is one. The pause doubles
#: up to LONGEST_S, which is thus the interval at which an engine with its own database is asked about a long order.
AGAIN_S: Final = 5.0
LONGEST_S: Final = 30.0
#: Deadline of a reply in seconds; an engine replies within 10 s (docs/protocol.rst, "Requests and replies").
ANSWER_S: Final = 12.0
_LATE: Final = "an engine has to answer within 10 s, with running or queued where the order takes longer"
#: An order accepts late replies from this many engines, those that it was sent to last.
MOST_ASKED: Final = 8
#: Unreadable replies in a row after which an order counts as failed: a further sending would get another one.
MOST_BAD_ANSWERS: Final = 5
#: Temporary errors in a row after which an order counts as failed, which takes some 10 minutes. The error of an engine
#: that an operator has paused does not count.
MOST_REFUSALS: Final = 20
#: The largest number of orders that await a reply, and of orders that one query returns.
MOST: Final = 256
#: Queries that follow each other without a pause, so that a wake reaches a new order behind 4,096 that stay queued.
PAGES: Final = 16
#: Largest number of orders whose last sending is remembered. A forgotten order is sent again before its pause is over.
REMEMBERED: Final = 10_000
#: In each period of TELL_S seconds, at most one line is logged for an order, and at most MOST_TOLD for all orders.
TELL_S: Final = 60.0
MOST_TOLD: Final = 10


@dataclass
class _Sending:
    """The last sending of an order.

    :param again_at: when the order may be sent again, by the monotonic clock.
    :param pause_s: seconds from the sending until ``again_at``.
    :param engine: key and name of the engine that replied that it has the order. The order is sent to this engine again
        while the engine is linked.
    :param asked: keys and names of the engines that the order was sent to.
    :param bad_answers: replies in a row that were not valid by the catalogue.
    :param refusals: errors in a row after which the order may be sent again.
    """

    again_at: float
    pause_s: float
    engine: tuple[object, object] | None = None
    asked: tuple[tuple[object, object], ...] = ()
    bad_answers: int = 0
    refusals: int = 0


class OrderSender:
    """Sends each queued order to one of the engines that are linked to this server.

    An engine that shares the database replies with the status in the order's row, and that row decides: an order that
    is lost on the way is sent again, or an engine finds it in the table. An engine with another database replies with
    its own status, and the final status is written to the row. Each query reads the page after the previous one, so
    that orders that stay queued do not delay others.

    :param rpcs: the RPCs of the orders that this server sends.
    :ivar sent: orders sent.
    """

    log = Logger()

    def __init__(self, database: Database, links: ServerLinks, clock: Clock, rpcs: Collection[str]) -> None:
        self._database = database
        self._links = links
        self._clock = clock
        self._rpcs = list(rpcs)
        #: The last sending of each order, the oldest first.
        self._sent: dict[str, _Sending] = {}
        self._flying: set[str] = set()
        #: The last poll stopped because :data:`MOST` orders awaited a reply.
        self._is_full = False
        self._after: Place | None = None
        self._page = 0
        #: The RPCs that the engine of each link does not serve.
        self._unserved: WeakKeyDictionary[Link, set[str]] = WeakKeyDictionary()
        self._places = itertools.count()
        self._told: set[str] = set()
        self._told_from = float("-inf")
        self._untold = 0
        self._loop = PollLoop("the courier", self._poll_once, clock.scheduler)
        self.wake = self._loop.wake
        self.sent = 0

    def start(self) -> None:
        """Start sending."""
        self._loop.start()

    def stop(self) -> Deferred[Any]:
        """Stop sending.

        :returns: fires when no query of the table is in progress.
        """
        return self._loop.stop()

    async def _poll_once(self, _: int) -> float | None:
        links = self._links.engines
        if not links:
            return None
        frame_size = max(link.session.max_frame for link in links)
        queued, end = await self._database.run(orders.queued, self._rpcs, MOST, self._after, frame_size)
        if self._loop.is_stopping:
            return None
        for order in queued:
            if self._is_due(order) and not self._send_by_a_link(order):
                self._is_full = True
                return None
        self._after = end
        self._page += 1
        if end is None:
            self._page = 0
            self._forget()
        return 0.0 if self._page % PAGES else None

    def _is_due(self, order: Order) -> bool:
        last = self._sent.get(order.order_id)
        return order.order_id not in self._flying and (last is None or self._clock.mono() >= last.again_at)

    def _send_by_a_link(self, order: Order) -> bool:
        """Send an order if an engine serves it. Return ``False`` if too many orders already await a reply."""
        last = self._sent.get(order.order_id)
        link = self._next_link(order, last)
        if link is None:
            return True
        if len(self._flying) >= MOST:
            return False
        sending = _Sending(self._clock.mono() + AGAIN_S, AGAIN_S)
        if last is not None:
            pause_s = min(2 * last.pause_s, LONGEST_S)
            sending = replace(last, again_at=self._clock.mono() + pause_s, pause_s=pause_s)
        sending.asked = (*sending.asked, _identity(link))[-MOST_ASKED:]
        link.late_ack = self._late
        self._sent.pop(order.order_id, None)
        self._sent[order.order_id] = sending
        if len(self._sent) > REMEMBERED:
            del self._sent[next(iter(self._sent))]
        self._flying.add(order.order_id)
        self.sent += 1
        done = Deferred.fromCoroutine(self._send(link, order))
        done.addErrback(lambda failure: self.log.failure("internal error in the order sender", failure))
        return True

    def _next_link(self, order: Order, last: _Sending | None) -> Link | None:
        """Return the link of the engine that has the order, else of the next engine in turn that serves it."""
        links = [
            link
            for link in self._links.engines
            if link.session.is_open and order.rpc not in self._unserved.get(link, ())
        ]
        if last is not None and last.engine is not None:
            links = [link for link in links if _identity(link) == last.engine] or links
        return links[next(self._places) % len(links)] if links else None

    def _forget(self) -> None:
        """Forget orders that are no longer queued. A queued order would have been sent again by now."""
        now = self._clock.mono()
        self._sent = {each: last for each, last in self._sent.items() if now < last.again_at + LONGEST_S}

    async def _send(self, link: Link, order: Order) -> None:
        try:
            try:
                # A number in the database may be out of the range of JSON parsers.
                check_readable(order.params, "JSON of its params")
                ack = await link.call(order.rpc, {**order.params, "order_id": order.order_id}, ANSWER_S)
                if ack.get("order_id", order.order_id) != order.order_id:
                    raise BadReply(f"{order.rpc} was answered for another order")
            except S2SError as error:
                await self._failed(link, order, error)
            else:
                await self._answered(link, order.order_id, ack["status"], ack.get("result"))
        except DatabaseError:
            pass  # The pool has logged it. The order is sent again and gets the same reply.
        finally:
            self._flying.discard(order.order_id)
            if self._is_full:
                self._is_full = False
                self.wake()

    async def _failed(self, link: Link, order: Order, error: S2SError) -> None:
        code = TooLarge.code if order.params is orders.TOO_LONG else final_code(error)
        last = self._sent.get(order.order_id)
        if code == UnsupportedType.code:
            # Only this engine does not serve the order: another one may.
            self._unserved.setdefault(link, set()).add(order.rpc)
            self._sent.pop(order.order_id, None)
        elif code is not None:
            details = dict(error.details) if isinstance(error, Refused) else {}
            message = storable(error.message if isinstance(error, Refused) else str(error))
            result = {"code": code, "message": message, **({"details": details} if details else {})}
            await self._answered(link, order.order_id, "refused", result)
            return
        elif isinstance(error, LinkLost) and last is not None and last.pause_s == AGAIN_S:
            # Send the order by another link at once, but only after its first sending: an order during which one link
            # after another ends has to wait.
            last.again_at = self._clock.mono()
        elif isinstance(error, BadReply) and last is not None:
            last.bad_answers += 1
            if last.bad_answers >= MOST_BAD_ANSWERS:
                message = storable(f"no reply can be read, so the outcome is unknown: {error}")
                result = {"code": InternalError.code, "message": message}
                await self._answered(link, order.order_id, "failed", result)
                return
        elif isinstance(error, Refused) and last is not None and error.code != Paused.code:
            last.refusals += 1
            if last.refusals >= MOST_REFUSALS:
                message = storable(f"it was refused {last.refusals} times in a row: {error.message}")
                result = {"code": error.code, "message": message, "details": dict(error.details)}
                await self._answered(link, order.order_id, "failed", result)
                return
        self._tell(link, order, f"{error}: {_LATE}" if isinstance(error, DeadlinePassed) else str(error))

    def _late(self, link: Link, payload: Mapping[str, Any]) -> None:
        """Let a late reply end an order if the order was sent to that engine, at most once for each sending."""
        if not ORDER_REPLY.is_valid(payload) or payload["status"] in orders.OPEN:
            return
        last = self._sent.get(payload["order_id"])
        if last is not None and _identity(link) in last.asked:
            last.asked = ()
            ending = Deferred.fromCoroutine(
                self._answered(link, payload["order_id"], payload["status"], payload["result"])
            )
            ending.addErrback(lambda failure: failure.trap(DatabaseError))  # The pool has logged it.
            ending.addErrback(lambda failure: self.log.failure("internal error in the order sender", failure))

    async def _answered(self, link: Link, order_id: str, status: str, result: Mapping[str, Any] | None) -> None:
        if status in orders.OPEN:
            if last := self._sent.get(order_id):
                last.engine, last.bad_answers, last.refusals = _identity(link), 0, 0
            return
        name, boot_id = (str(link.peer[each]) if each in link.peer else None for each in ("name", "boot_id"))
        after = await self._database.run(orders.answered, order_id, status, result, name or "", boot_id)
        if after is not None:
            status_log.info(
                "order {order_id} {rpc} by {actor!r}: {status} by {link}: {result}",
                order_id=order_id,
                rpc=after.rpc,
                actor=harmless(after.actor),
                status=status,
                link=link,
                result=harmless(str(dict(result or {})))[:200],
            )

    def _tell(self, link: Link, order: Order, why: str) -> None:
        """Log why an order has no outcome yet; see :data:`TELL_S`."""
        now = self._clock.mono()
        if now >= self._told_from + TELL_S:
            if self._untold:
                self.log.warn("{count} more orders got no valid reply from an engine", count=self._untold)
            self._told_from, self._untold = now, 0
            self._told.clear()
        if order.order_id in self._told:
            return
        if len(self._told) >= MOST_TOLD:
            self._untold += 1
            return
        self._told.add(order.order_id)
        self.log.warn("{link}: order {order_id}: {why}", link=link, order_id=order.order_id, why=storable(why))


def _identity(link: Link) -> tuple[object, object]:
    return link.session.peer_key_id, link.peer.get("name")
