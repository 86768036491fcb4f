"""Orders of the database on their way over a link."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import BadReply, DatabaseUnavailable, DeadlinePassed, LineFull, LinkLost, Refused, TooBigToSend
from s2s.roles.server import order_sender
from s2s.roles.server.order_sender import OrderSender
from s2s.runtime.clock import Clock
from s2s.store.cursor import Unreadable
from s2s.store.poll_loop import POLL_S
from s2s.store.tables import orders
from s2s.store.tables.orders import Order
from tests.support.installed import ORDERS

SECTOR = "world.set_sector_status.v1"


class _Link:
    """A link whose calls the test answers."""

    def __init__(self, name: str) -> None:
        self.session: Any = SimpleNamespace(is_open=True, peer_key_id="k1", max_frame=65536)
        self.peer = {"name": name, "boot_id": f"boot of {name}"}
        self.late_ack: Any = None
        self.calls: list[tuple[str, Mapping[str, Any], Deferred[Any]]] = []

    def call(self, type: str, payload: Mapping[str, Any], timeout: float) -> Deferred[Any]:
        self.calls.append((type, payload, Deferred()))
        return self.calls[-1][2]

    @property
    def sent(self) -> list[Any]:
        return [payload["order_id"] for _, payload, _ in self.calls]


class _Database:
    """A database whose results the test sets."""

    def __init__(self) -> None:
        self.queued: list[Order] = []
        #: The ends of orders that came over the link.
        self.ended: list[tuple[Any, ...]] = []
        self.is_away = False
        self.looks = 0

    def run(self, function: object, *args: Any) -> Deferred[Any]:
        if self.is_away:
            return fail(DatabaseUnavailable("gone"))
        if function is orders.answered:
            self.ended.append(args)
            return succeed(None)
        self.looks += 1
        _, limit, after, _ = args
        begin = 0 if after is None else after[1]
        page = self.queued[begin : begin + limit]
        return succeed((page, ("then", begin + limit) if len(page) == limit else None))


class OrderSenderTests(SynchronousTestCase):
    """:class:`OrderSender`."""

    def setUp(self) -> None:
        """Start an order sender, with two engines linked."""
        self.time = FakeClock()
        self.database = _Database()
        self.first, self.second = _Link("first"), _Link("second")
        self.links = SimpleNamespace(engines=[])
        self.courier = OrderSender(self.database, self.links, Clock(self.time), ORDERS)  # type: ignore[arg-type]
        self.courier.start()
        self.addCleanup(self.courier.stop)
        self.links.engines = [self.first, self.second]

    def give(self, *order_ids: str) -> None:
        """Put orders into the table."""
        params = {"sector_id": 1, "status": "neutral"}
        self.database.queued += [Order(each, SECTOR, params, "me", "queued", None, {}, 0, 0) for each in order_ids]

    def test_in_turn(self) -> None:
        """Each order is sent to one engine, and the engines take turns; the params are sent with the id."""
        self.give("a", "b", "c")
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), (["a", "c"], ["b"]))
        self.assertEqual(self.first.calls[0][:2], (SECTOR, {"order_id": "a", "sector_id": 1, "status": "neutral"}))

    def test_params_that_cannot_be_read(self) -> None:
        """An order whose params no JSON parser reads is refused with a reason, and is not sent."""
        unreadable: Any = Unreadable("it is nested deeper than 32 levels")
        self.database.queued.append(Order("a", SECTOR, unreadable, "me", "queued", None, {}, 0, 0))
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), ([], []))
        [(order_id, status, result, *_)] = self.database.ended
        self.assertEqual((order_id, status, result["code"]), ("a", "refused", "bad_payload"))
        why = "the JSON of its params cannot be read: it is nested deeper than 32 levels"
        self.assertEqual(result["message"], why)

    def test_params_that_no_frame_holds(self) -> None:
        """An order that is longer than a frame is refused as toolarge, and is not sent."""
        self.database.queued.append(Order("a", SECTOR, orders.TOO_LONG, "me", "queued", None, {}, 0, 0))
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), ([], []))
        [(_, status, result, *_)] = self.database.ended
        self.assertEqual((status, result["code"]), ("refused", "toolarge"))
        self.assertIn("longer than a frame", result["message"])

    def test_refused_again_and_again(self) -> None:
        """An order whose engines always reply that it may succeed later fails after a number of replies.

        An order of a paused engine waits for the operator who has paused it.
        """
        self.give("a")
        self.links.engines = [self.first]
        self.courier.wake()
        for number in range(2 * order_sender.MOST_REFUSALS):
            code = "paused" if number < order_sender.MOST_REFUSALS else "db_unavailable"
            self.assertEqual(self.database.ended, [])
            self.first.calls[-1][2].errback(Refused(code, "later", {"retryable": True}))
            self.time.pump([1.0] * int(order_sender.LONGEST_S + 1))
        order_id, status, result, *_ = self.database.ended[0]
        self.assertEqual((order_id, status, result["code"]), ("a", "failed", "db_unavailable"))
        self.assertIn("refused 20 times in a row: later", result["message"])

    def test_harmless_lines(self) -> None:
        """A line about an order is bounded and has no control character of terminals."""
        self.give("a")
        with capturedLogs() as logs:
            self.courier.wake()
            self.first.calls[0][2].errback(DeadlinePassed("\x1b]0;\n" + "x" * 10_000))
        [line] = [str(formatEvent(event)) for event in logs]
        self.assertTrue(line.isprintable(), line)
        self.assertLess(len(line), 1000)

    def test_sent_again(self) -> None:
        """An order that is still queued is sent again after its pause, and not while a reply is awaited."""
        self.give("a")
        self.courier.wake()
        self.time.advance(order_sender.AGAIN_S + 1)
        self.assertEqual(self.courier.sent, 1)
        self.first.calls[0][2].errback(DeadlinePassed("no answer"))
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), (["a"], ["a"]))
        self.second.calls[0][2].callback({"status": "queued"})
        for _ in range(3):
            self.courier.wake()
        self.assertEqual(self.courier.sent, 2)
        self.time.pump([1.0] * int(2 * order_sender.AGAIN_S + 1))
        self.assertEqual(self.courier.sent, 3)
        self.second.calls[1][2].callback({"status": "running"})
        # The pause has grown to its longest by then.
        self.time.pump([1.0] * 600)
        for _, _, answer in self.second.calls[2:]:
            answer.callback({"status": "running"})
        self.time.pump([1.0] * int(order_sender.LONGEST_S + 1))
        self.assertEqual(self.courier.sent, 5)

    def test_asked_again(self) -> None:
        """An order is sent again to the engine that replied that it has it; without that engine, to another one."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].callback({"status": "running"})
        self.time.pump([1.0] * int(order_sender.AGAIN_S + 1))
        self.assertEqual((self.first.sent, self.second.sent), (["a", "a"], []))
        self.first.calls[1][2].errback(LinkLost("gone"))
        self.first.session.is_open = False
        self.time.pump([1.0] * int(2 * order_sender.AGAIN_S + 1))
        self.assertEqual((self.first.sent, self.second.sent), (["a", "a"], ["a"]))

    def test_what_is_over_is_forgotten(self) -> None:
        """An order that the table no longer shows as queued is neither sent nor remembered."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].callback({"status": "done"})
        self.database.queued.clear()
        self.time.pump([1.0] * int(order_sender.AGAIN_S + order_sender.LONGEST_S + 1))
        self.assertEqual((self.courier.sent, self.courier._sent), (1, {}))

    def test_nobody_is_linked(self) -> None:
        """Without an engine the table is not read; a closing link is skipped."""
        links, self.links.engines = self.links.engines, []
        self.give("a")
        self.courier.wake()
        self.assertEqual(self.database.looks, 0)
        self.links.engines = links
        self.first.session.is_open = False
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), ([], ["a"]))

    def test_link_lost(self) -> None:
        """An order whose link was lost is sent over another link at the next poll."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].errback(LinkLost("gone"))
        self.time.advance(POLL_S)
        self.assertEqual((self.first.sent, self.second.sent), (["a"], ["a"]))

    def test_a_link_that_is_lost_again(self) -> None:
        """An order during which one link after another ends waits before it is sent again."""
        self.give("a")
        self.courier.wake()
        for link in (self.first, self.second):
            link.calls[0][2].errback(LinkLost("gone"))
            self.time.advance(POLL_S)
        self.assertEqual(self.courier.sent, 2)
        self.time.pump([1.0] * int(2 * order_sender.AGAIN_S))
        self.assertEqual(self.courier.sent, 3)

    def test_over(self) -> None:
        """A reply with the end of an order is stored, with the engine's name and boot_id."""
        self.give("a", "b", "c")
        self.courier.wake()
        self.first.calls[0][2].callback({"status": "done", "result": {"n": 1}})
        self.second.calls[0][2].callback({"status": "failed", "result": None})
        self.first.calls[1][2].callback({"status": "running", "result": None})
        self.assertEqual(
            self.database.ended,
            [
                ("a", "done", {"n": 1}, "first", "boot of first"),
                ("b", "failed", None, "second", "boot of second"),
            ],
        )

    def test_refused(self) -> None:
        """An error about the order itself ends it as refused; a temporary error or one about the link does not."""
        errors = {
            "a": Refused("not_found", "no such ship", {"retryable": False}),
            "b": TooBigToSend(70_000, 65_536),
            "c": Refused("not_ready", "soon", {}),
            "d": Refused("forbidden", "not you", {}),
            "e": LineFull("full"),
            "f": DeadlinePassed("no answer"),
        }
        self.links.engines = [self.first]
        self.give(*errors)
        self.courier.wake()
        for (_, payload, answer), error in zip(list(self.first.calls), errors.values(), strict=True):
            self.assertIs(errors[payload["order_id"]], error)
            answer.errback(error)
        self.assertEqual([each[:2] for each in self.database.ended], [("a", "refused"), ("b", "refused")])
        self.assertEqual(
            [each[2] for each in self.database.ended],
            [
                {"code": "not_found", "message": "no such ship", "details": {"retryable": False}},
                {"code": "toolarge", "message": str(errors["b"])},
            ],
        )

    def test_late_answers(self) -> None:
        """A late end counts once for each sending, from an engine that was asked; the log has the cure."""
        self.give("a")
        with capturedLogs() as logs:
            self.courier.wake()
            self.first.calls[0][2].errback(DeadlinePassed("it was not answered in time"))
        self.assertIn("an engine has to answer within 10 s, with running or queued", formatEvent(logs[0]))
        done = {"ok": True, "order_id": "a", "status": "done", "result": {"changed": 1}}
        self.courier._late(self.second, done)  # type: ignore[arg-type]
        for answer in (
            {**done, "order_id": "b"},
            {**done, "status": "running"},
            {**done, "result": 1},
            {"order_id": []},
        ):
            self.first.late_ack(self.first, answer)
        self.assertEqual(self.database.ended, [])
        for _ in range(3):
            self.first.late_ack(self.first, done)
        self.assertEqual(self.database.ended, [("a", "done", {"changed": 1}, "first", "boot of first")])

    def test_late_answers_while_the_database_is_away(self) -> None:
        """A late end that cannot be stored is accepted after the next sending."""
        self.links.engines = [self.first]
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].errback(DeadlinePassed("it was not answered in time"))
        done = {"ok": True, "order_id": "a", "status": "done", "result": None}
        self.database.is_away = True
        self.first.late_ack(self.first, done)
        self.database.is_away = False
        self.time.pump([1.0] * int(order_sender.AGAIN_S + 1))
        self.first.late_ack(self.first, done)
        self.assertEqual([each[:2] for each in self.database.ended], [("a", "done")])

    def test_asked_is_bounded(self) -> None:
        """Only the last engines that an order was sent to are remembered."""
        self.links.engines = [_Link(f"e{number}") for number in range(order_sender.MOST_ASKED + 2)]
        self.give("a")
        self.courier.wake()
        for link in self.links.engines:
            link.calls[0][2].errback(LinkLost("gone"))
            self.time.pump([1.0] * int(order_sender.LONGEST_S + 1))
        self.assertEqual(len(self.courier._sent["a"].asked), order_sender.MOST_ASKED)

    def test_answers_that_cannot_be_read(self) -> None:
        """Five unreadable replies in a row end an order as failed, with the reason; a readable one resets the count."""
        self.links.engines = [self.first]
        self.give("a")
        bad = BadReply("it was answered by a bad payload: at /payload: result is missing")
        for answer in (bad, {"status": "running", "result": None}, *[bad] * order_sender.MOST_BAD_ANSWERS):
            self.assertEqual(self.database.ended, [])
            self.courier.wake()
            waiter = self.first.calls[-1][2]
            self.assertFalse(waiter.called)
            waiter.callback(answer) if isinstance(answer, dict) else waiter.errback(answer)
            self.time.pump([1.0] * int(order_sender.LONGEST_S + 1))
        [(order_id, status, result, *_)] = self.database.ended
        self.assertEqual((order_id, status, result["code"]), ("a", "failed", "internal_error"))
        self.assertIn("result is missing", result["message"])

    def test_the_database_goes_before_the_answer(self) -> None:
        """If an end cannot be stored, the order is sent again."""
        self.give("a")
        self.courier.wake()
        self.database.is_away = True
        self.first.calls[0][2].callback({"status": "done", "result": None})
        self.database.is_away = False
        self.time.pump([1.0] * int(order_sender.AGAIN_S + 1))
        self.assertEqual(self.second.sent, ["a"])

    def test_the_head_of_the_line(self) -> None:
        """A new order is sent at once if there is room, however many queued orders are in front of it."""
        self.patch(order_sender, "MOST", 3)
        self.give(*"abcdefgh")
        self.courier.wake()
        self.assertEqual(self.courier.sent, 3)
        for _ in range(3):
            for link in (self.first, self.second):
                for _, _, answer in link.calls:
                    if not answer.called:
                        answer.callback({"status": "running", "result": None})
        self.assertEqual(sorted(self.first.sent + self.second.sent), [*"abcdefgh"])
        self.give("new")
        self.courier.wake()
        self.assertEqual((self.first.sent + self.second.sent).count("new"), 1)

    def test_remembered(self) -> None:
        """No more sendings are remembered than the limit."""
        self.patch(order_sender, "REMEMBERED", 2)
        self.give(*"abcd")
        self.courier.wake()
        self.assertEqual(list(self.courier._sent), ["c", "d"])

    def test_bounded_lines(self) -> None:
        """A minute has one line for an order and a bounded number of lines; the next minute has the rest as a count."""
        self.give(*(f"o{number}" for number in range(20)))
        with capturedLogs() as logs:
            for _ in range(25):
                self.courier.wake()
                for link in (self.first, self.second):
                    for _, _, answer in link.calls:
                        if not answer.called:
                            answer.errback(DeadlinePassed("no answer"))
                self.time.pump([1.0] * 5)
        told = [each["order_id"] for each in logs if "order_id" in each]
        # 125 seconds include the beginnings of three such minutes.
        self.assertLessEqual(len(told), 3 * order_sender.MOST_TOLD)
        self.assertTrue(len(set(told)) == order_sender.MOST_TOLD, told)
        self.assertTrue([each for each in logs if each.get("count")])

    def test_unserved(self) -> None:
        """An engine that does not serve an order is not sent that kind again, and is sent the other kinds."""
        self.give("a")
        self.courier.wake()
        self.first.calls[0][2].errback(Refused("unsupported_type", "no orders here", {}))
        self.give("b", "c")
        self.courier.wake()
        self.assertEqual((self.first.sent, self.second.sent), (["a"], ["a", "b", "c"]))
        self.links.engines = [self.first]
        tick = Order("tick", "admin.engine.force_tick.v1", {"job_type": "decay"}, "me", "queued", None, {}, 0, 0)
        self.database.queued = [self.database.queued[0], tick]
        self.time.pump([1.0] * int(order_sender.AGAIN_S + 1))
        self.assertEqual(self.first.sent, ["a", "tick"])

    def test_bounded(self) -> None:
        """No more orders await a reply at once than the limit."""
        self.patch(order_sender, "MOST", 3)
        self.give(*"abcde")
        self.courier.wake()
        self.database.queued = self.database.queued[3:] + self.database.queued[:3]
        self.courier.wake()
        self.assertEqual(self.courier.sent, 3)
        self.first.calls[0][2].callback({"status": "queued"})
        self.courier.wake()
        self.assertEqual(self.courier.sent, 4)

    def test_away(self) -> None:
        """While the database is away no order is sent; afterwards the poll finds the waiting orders."""
        self.database.is_away = True
        self.give("a")
        self.courier.wake()
        self.assertEqual(self.courier.sent, 0)
        self.database.is_away = False
        self.time.advance(POLL_S)
        self.assertEqual(self.courier.sent, 1)

    def test_stopped(self) -> None:
        """After the stop no order is sent."""
        self.courier.stop()
        self.give("a")
        self.courier.wake()
        self.assertEqual(self.courier.sent, 0)
