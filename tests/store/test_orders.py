"""Table ``orders``: insert, find, attempt, lock and end orders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg2
from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.internet.threads import deferToThread

from s2s.errors import IdemConflict, RowRefused
from s2s.store.pool import blocking
from s2s.store.tables import claims, orders
from s2s.store.tables.orders import Order
from tests.support.installed import ORDERS
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

TICK, CONFIG = "admin.engine.force_tick.v1", "admin.config.set.v1"
SECTOR, SHIPS = "world.set_sector_status.v1", "admin.player.update_all_ships.v1"
PARAMS = {"sector_id": 1, "status": "fedspace"}


class OrdersTestCase(DatabaseTestCase):
    """Runs each call in a transaction of its own."""

    def run_(self, function: Any, *args: Any, **more: Any) -> Any:
        """Call a function in a transaction, and commit."""
        with blocking(self.url) as txn:
            return function(txn, *args, **more)

    def give(
        self, order_id: str, rpc: str = SECTOR, params: Any = PARAMS, idem_key: str | None = None, **more: Any
    ) -> Any:
        """Insert an order, and return it and whether it is new."""
        return self.run_(orders.give, order_id, rpc, params, "me", idem_key, **more)

    def conflict(self, *args: Any, **more: Any) -> str:
        """Check that an insert is refused, and return the id of the order that it conflicts with."""
        error = self.assertRaises(IdemConflict, self.give, *args, **more)
        return str(error.details["order_id"])

    def rows(self, columns: str = "order_id") -> list[Any]:
        """Return the rows of the table, sorted by id."""
        return self.execute(f"select {columns} from s2s.orders order by order_id")


class GiveTests(OrdersTestCase):
    """:func:`orders.give` and :func:`orders.queued`."""

    def test_once(self) -> None:
        """A new order is queued and open, has its actor, and gets an audit entry in the same transaction."""
        order, is_new = self.give("a", idem_key="k")
        self.assertEqual((order.order_id, order.rpc, order.params, order.actor), ("a", SECTOR, PARAMS, "me"))
        self.assertEqual((order.status, order.is_open, order.state, order.attempts), ("queued", True, {}, 0))
        self.assertTrue(is_new)
        audit = self.execute("select actor, action, subject, params, result from s2s.audit")
        self.assertEqual(audit, [("me", SECTOR, "a", PARAMS, None)])

    def test_by_link(self) -> None:
        """The row of an order that came over a link records that, also if the order was in the table before."""
        self.give("a", by_link=True)
        self.give("b")
        self.assertEqual(self.rows("way"), [("link",), (None,)])
        self.give("b", by_link=True)
        self.assertEqual(self.rows("way"), [("link",), ("link",)])

    def test_by_link_while_it_runs(self) -> None:
        """An order that comes over a link does not wait for a running step that has locked its row."""
        self.give("a")
        with blocking(self.url) as step:
            step.execute("select from s2s.orders for update")
            with blocking(self.url, statement_timeout_s=1.0) as txn:
                _, is_new = orders.give(txn, "a", SECTOR, PARAMS, "me", by_link=True)
        self.assertEqual((is_new, self.rows("way")), (False, [(None,)]))

    def test_given_back(self) -> None:
        """An order whose status is set back to queued by hand starts again with an empty state."""
        self.give("a")
        self.execute("update s2s.orders set status = 'running', state = '{\"done\": 5}'")
        self.assertEqual(self.run_(orders.find, "a").state, {"done": 5})
        self.execute("update s2s.orders set status = 'queued'")
        self.assertEqual(self.run_(orders.find, "a").state, {})

    def test_twice(self) -> None:
        """The same content again returns the same order, whatever its status is, and writes nothing."""
        first, _ = self.give("a", idem_key="k")
        self.assertEqual(self.give("a"), (first, False))
        self.assertEqual(self.give("a", idem_key="k"), (first, False))
        # The order of the members does not matter.
        self.assertEqual(self.give("a", params=dict(reversed(PARAMS.items()))), (first, False))
        self.run_(orders.finish, first, "refused", {"code": "not_found"}, "engine-1")
        again, is_new = self.give("a")
        self.assertEqual((again.status, again.result, again.is_open), ("refused", {"code": "not_found"}, False))
        self.assertFalse(is_new)
        self.assertEqual(self.execute("select count(*) from s2s.audit where result is null"), [(1,)])

    def test_a_key_again(self) -> None:
        """An ``idem_key`` identifies its order, whatever id comes with the key."""
        first, _ = self.give("a", idem_key="k")
        self.assertEqual(self.give("b", idem_key="k"), (first, False))
        self.assertEqual(self.rows(), [("a",)])

    def test_conflicts(self) -> None:
        """Other params, another RPC, or the id of one order with the key of another are refused and change nothing."""
        self.give("a", idem_key="k")
        self.give("b")
        before = self.rows("*")
        self.assertEqual(self.conflict("a", params={**PARAMS, "sector_id": 2}), "a")
        self.assertEqual(self.conflict("a", rpc=SHIPS), "a")
        self.assertEqual(self.conflict("c", params={**PARAMS, "sector_id": 2}, idem_key="k"), "a")
        self.assertEqual(self.conflict("b", idem_key="k"), "a")
        self.assertEqual(self.rows("*"), before)

    def test_a_boolean_is_no_integer(self) -> None:
        """Params with true and 1, false and 0, or 1 and "1" are different content."""
        self.give("a", CONFIG, {"key": "relay.window", "value": 1})
        self.give("b", CONFIG, {"key": "relay.window", "value": False})
        for order_id, value in (("a", True), ("a", "1"), ("b", 0)):
            self.assertEqual(self.conflict(order_id, CONFIG, {"key": "relay.window", "value": value}), order_id)
        self.assertFalse(self.give("a", CONFIG, {"key": "relay.window", "value": 1})[1])

    def test_a_row_that_nobody_could_send(self) -> None:
        """A row of another program whose params have no canonical JSON form equals no order."""
        self.execute("insert into s2s.orders (order_id, rpc, params) values ('a', %s, '{\"value\": 1.5}')", CONFIG)
        self.assertEqual(self.conflict("a", CONFIG, {"value": 1}), "a")

    @inlineCallbacks
    def test_two_at_once(self) -> Iterator[Deferred[Any]]:
        """Of two inserts at once, the later one waits, and returns the first order, or its own after a rollback."""
        for order_id, later_id, key, is_undone, is_same in (
            ("a", "a", None, False, True),
            ("b", "b", None, True, True),
            ("c", "d", "k1", False, True),
            ("e", "f", "k2", True, True),
            ("g", "g", None, False, False),
        ):
            first = psycopg2.connect(self.url)
            self.addCleanup(first.close)
            with first.cursor() as txn:
                orders.give(txn, order_id, SECTOR, PARAMS, "first", key)
            params = PARAMS if is_same else {**PARAMS, "sector_id": 2}
            giving = deferToThread(self.run_, orders.give, later_id, SECTOR, params, "second", key)
            yield poll(self.is_waiting, "the later one waits")
            if is_undone:
                first.rollback()
            else:
                first.commit()
            if not is_same:
                yield self.assertFailure(giving, IdemConflict)
                continue
            order, is_new = yield giving
            expected = (later_id, "second") if is_undone else (order_id, "first")
            self.assertEqual((order.order_id, order.actor, is_new), (*expected, is_undone))
        self.assertEqual(self.rows(), [("a",), ("b",), ("c",), ("f",), ("g",)])

    def is_waiting(self) -> bool:
        """Whether a session waits for a lock."""
        waiting = self.execute(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        )
        return waiting == [(1,)]

    def test_queued(self) -> None:
        """Queued orders of the given RPCs are returned in pages of a limited size, the longest waiting first."""
        for order_id, rpc in (
            ("c", SECTOR),
            ("b", SHIPS),
            ("a", SECTOR),
            ("e", SECTOR),
            ("d", "of.another.v1"),
        ):
            self.give(order_id, rpc)
        self.run_(orders.finish, self.run_(orders.find, "e"), "done", None, "engine-1")
        rows, end = self.run_(orders.queued, ORDERS, 2)
        self.assertEqual([order.order_id for order in rows], ["c", "b"])
        rows, end = self.run_(orders.queued, ORDERS, 2, end)
        self.assertEqual(([order.order_id for order in rows], end), (["a"], None))
        self.assertEqual([order.order_id for order in self.run_(orders.queued, [SECTOR], 1)[0]], ["c"])

    def test_queued_within_bytes(self) -> None:
        """A page ends before its params exceed the byte limit, and params longer than a frame are not read."""
        self.patch(orders, "PAGE_BYTES", 250_000)
        for order_id in "abcd":
            self.give(order_id)
        for order_id, length in (("a", 100_000), ("b", 100_000), ("c", 100_000), ("d", 1_000_000)):
            self.execute(
                "update s2s.orders set params = jsonb_build_object('x', repeat('x', %s)) where order_id = %s",
                length,
                order_id,
            )
        pages, end = [], None
        for _ in range(2):
            page, end = self.run_(orders.queued, ORDERS, 256, end)
            pages.append([(order.order_id, order.params is orders.TOO_LONG) for order in page])
        self.assertEqual(pages, [[("a", False), ("b", False)], [("c", False), ("d", True)]])
        self.assertIsNone(end)
        self.patch(orders, "PAGE_BYTES", 1)
        page, end = self.run_(orders.queued, ORDERS, 256)
        self.assertEqual([order.order_id for order in page], ["a"])
        self.assertEqual(end[1], "a")


class AttemptTests(OrdersTestCase):
    """:func:`orders.attempt`: which order takes the next step."""

    def attempt(
        self, rpcs: Any = ORDERS, resting: Any = (), in_hand: Any = (), patience_s: float = 0.0
    ) -> Order | None:
        """Attempt a step."""
        found: Order | None = self.run_(orders.attempt, rpcs, resting, in_hand, patience_s, {})
        return found

    def attempted(self, *args: Any, **more: Any) -> str | None:
        """Attempt a step, and return the id of its order."""
        order = self.attempt(*args, **more)
        return None if order is None else order.order_id

    def go_on(self, order_id: str, state: Any = None) -> None:
        """End a step of an order that has further steps."""
        order = self.run_(orders.find, order_id)
        self.run_(orders.go_on, order, order.place, state or {"done": 1}, "engine-1", False)

    def due(self) -> None:
        """End every pause."""
        self.execute("update s2s.orders set retry_at = now() where retry_at is not null")

    def test_in_turns(self) -> None:
        """The order that has waited longest takes the next step, so long and short orders do not block each other."""
        for order_id in "cab":
            self.give(order_id)
        self.assertEqual(self.attempted(), "c")
        self.go_on("c")
        self.assertEqual(self.attempted(), "a")
        self.go_on("a")
        self.give("d")
        self.assertEqual([self.attempted(), self.attempted()], ["b", "c"])
        self.go_on("c")
        self.go_on("b")
        # The wait counts from the last step, or from the insert.
        self.assertEqual([self.attempted() for _ in range(5)], ["a", "d", "b", "c", None])

    def test_counted(self) -> None:
        """An attempt is counted before its step runs, and excludes the order for a pause that doubles up to 300 s."""
        self.give("a")
        pauses = []
        for attempts in (1, 2, 3):
            order = self.attempt()
            assert order is not None
            self.assertEqual((order.attempts, order.status), (attempts, "queued"))
            self.assertIsNone(self.attempt())
            pauses += self.execute("select round(extract(epoch from retry_at - stepped_at)) from s2s.orders")
            self.due()
        self.assertEqual([pause / pauses[0][0] for (pause,) in pauses], [1, 2, 4])
        self.execute("update s2s.orders set attempts = 40")
        self.attempt()
        [(pause,)] = self.execute("select round(extract(epoch from retry_at - stepped_at)) from s2s.orders")
        self.assertEqual(pause, 300)

    def test_patience(self) -> None:
        """A new order is left to the link for patience_s, unless it came over a link, was attempted, or runs."""
        for order_id in ("expected", "young", "old", "tried", "begun"):
            self.give(order_id)
        self.execute("update s2s.orders set created_at = now() - interval '4 seconds' where order_id = 'old'")
        self.execute("update s2s.orders set attempts = 1 where order_id = 'tried'")
        self.execute("update s2s.orders set way = 'link' where order_id = 'expected'")
        self.go_on("begun")
        found = {self.attempted(patience_s=3.0) for _ in range(4)}
        self.assertEqual(found, {"expected", "old", "tried", "begun"})
        self.assertIsNone(self.attempt(patience_s=3.0))
        self.assertEqual(self.attempted(), "young")

    def test_in_hand(self) -> None:
        """An order that the caller is running is not attempted again after its pause, except by another caller."""
        self.give("a")
        self.assertEqual(self.attempted(), "a")
        self.due()
        self.assertIsNone(self.attempt(in_hand=["a"]))
        self.assertEqual(self.attempted(), "a")

    def test_resting(self) -> None:
        """Of a resting RPC, a queued order is attempted, so that it can be refused, and a running order is skipped."""
        self.give("running", TICK)
        self.go_on("running")
        self.give("queued", TICK)
        self.assertEqual(self.attempted(resting=[TICK]), "queued")
        self.assertIsNone(self.attempt(resting=[TICK]))
        self.assertEqual(self.attempted(), "running")

    def test_whose_it_is(self) -> None:
        """An order that is over, of an unknown RPC, or locked by another session is skipped."""
        for order_id, rpc in (
            ("over", SECTOR),
            ("foreign", "of.another.v1"),
            ("held", SECTOR),
            ("next", SECTOR),
        ):
            self.give(order_id, rpc)
        self.run_(orders.finish, self.run_(orders.find, "over"), "failed", {}, "engine-1")
        with blocking(self.url) as txn:
            txn.execute("select from s2s.orders where order_id = 'held' for update")
            self.assertEqual([self.attempted(), self.attempted()], ["next", None])
        self.assertEqual(self.attempted(), "held")
        self.assertEqual(self.attempted(rpcs=["of.another.v1"]), "foreign")


class StepTests(OrdersTestCase):
    """:func:`orders.hold`, :func:`orders.go_on` and :func:`orders.finish`: a step and its end."""

    def attempt(self) -> Order:
        """Attempt a step of the only order, whatever the pause."""
        self.execute("update s2s.orders set retry_at = null")
        order: Order = self.run_(orders.attempt, ORDERS, (), (), 0.0, {})
        return order

    def go_on_with(self, order: Order, state: Any, engine: str, is_next_ours: bool) -> Order:
        """End a step of an order that has further steps."""
        after: Order = self.run_(orders.go_on, order, order.place, state, engine, is_next_ours)
        return after

    def test_hold(self) -> None:
        """Only the latest attempt can lock the order, only once, and not after its step or after the order is over."""
        self.give("a")
        first, second = self.attempt(), self.attempt()
        self.assertFalse(self.run_(orders.hold, first))
        with blocking(self.url) as txn:
            place = orders.hold(txn, second)
            assert place is not None
            self.assertFalse(self.run_(orders.hold, second))
            orders.go_on(txn, second, place, {"done": 1, "total": 2}, "engine-1", False)
        # The step is done, so the next attempt is number one again.
        self.assertFalse(self.run_(orders.hold, second))
        third = self.attempt()
        self.assertEqual((third.attempts, third.status, third.state), (1, "running", {"done": 1, "total": 2}))
        self.assertFalse(self.run_(orders.hold, first))
        self.run_(orders.finish, third, "done", None, "engine-1")
        self.assertFalse(self.run_(orders.hold, third))

    def answered(self, order_id: str = "a", boot_id: str | None = "stranger") -> Any:
        """Process the answer of a foreign engine that an order is done."""
        return self.run_(orders.answered, order_id, "done", {"n": 1}, "foreign", boot_id)

    def test_answered(self) -> None:
        """The answer of a foreign engine ends an order once, if no engine of this database is running the order."""
        for order_id in "abcde":
            self.give(order_id)
        self.assertEqual(self.answered().status, "done")
        self.assertIsNone(self.answered())
        self.assertEqual(self.rows("engine, way, result")[0], ("foreign", "link", {"n": 1}))
        self.execute("update s2s.orders set attempts = 1, retry_at = now() + interval '1 minute' where order_id = 'b'")
        self.assertIsNone(self.answered("b"))
        # The pause of that attempt is over.
        self.execute("update s2s.orders set retry_at = now() - interval '1 second' where order_id = 'b'")
        self.assertEqual(self.answered("b").status, "done")
        self.execute("update s2s.orders set status = 'running' where order_id = 'c'")
        self.assertIsNone(self.answered("c"))
        with blocking(self.url) as txn:
            txn.execute("select from s2s.orders where order_id = 'd' for update")
            self.assertIsNone(self.answered("d"))
        self.assertIsNone(self.answered("of nobody"))

    def test_answered_by_an_engine_of_this_database(self) -> None:
        """The answer of an engine that shares the database changes nothing, because that engine writes the row."""
        self.give("a")
        with blocking(self.url) as txn:
            txn.execute("select pg_advisory_lock(%s)", (claims.presence_key("ours"),))
            self.assertIsNone(self.answered(boot_id="ours"))
        self.assertEqual(self.rows("status"), [("queued",)])
        self.assertEqual(self.answered(boot_id=None).status, "done")

    def test_overtaken(self) -> None:
        """An attempt whose step another engine has done meanwhile locks nothing, even with equal attempt counts."""
        self.give("a")
        self.go_on_with(self.attempt(), {"done": 1}, "engine-1", False)
        slow = self.attempt()
        self.go_on_with(self.attempt(), {"done": 2}, "engine-2", False)
        fast = self.attempt()
        self.assertEqual((slow.attempts, slow.status), (fast.attempts, fast.status))
        self.assertFalse(self.run_(orders.hold, slow))
        self.assertTrue(self.run_(orders.hold, fast))

    def test_the_next_is_ours(self) -> None:
        """An engine that continues at once owns the attempt of the next step, and can release it."""
        self.give("a")
        first = self.attempt()
        next_ = self.run_(orders.go_on, first, first.place, {"done": 1}, "engine-1", True)
        self.assertEqual((next_.attempts, next_.state, next_.status), (1, {"done": 1}, "running"))
        self.assertIsNone(self.run_(orders.attempt, ORDERS, (), (), 0.0, {}))
        self.assertFalse(self.run_(orders.hold, first))
        self.assertTrue(self.run_(orders.hold, next_))
        self.run_(orders.release, next_)
        self.assertEqual(self.rows("attempts, retry_at"), [(0, None)])
        self.assertFalse(self.run_(orders.hold, next_))

    def test_a_row_that_has_moved(self) -> None:
        """A row that was updated after its ``ctid`` was read is found by its key."""
        self.give("a")
        order = self.attempt()
        self.execute("update s2s.orders set actor = 'other'")
        self.assertTrue(self.run_(orders.hold, order))
        self.assertEqual(self.go_on_with(order, {"done": 1}, "engine-1", True).actor, "other")

    def test_a_trigger_that_returns_the_old_row(self) -> None:
        """A row that a trigger keeps unchanged is reported as refused, at an attempt, a step and the end."""
        self.give("a")
        self.give("b")
        order = self.attempt()
        self.execute(
            "create function old() returns trigger language plpgsql as $$ begin return old; end $$;"
            "create trigger old before update on s2s.orders for each row execute function old()"
        )
        for work in (
            lambda txn: orders.attempt(txn, ORDERS, (), (), 0.0, {}),
            lambda txn: orders.go_on(txn, order, order.place, {"done": 1}, "engine-1", False),
            lambda txn: orders.go_on(txn, order, order.place, {"done": 1}, "engine-1", True),
            lambda txn: orders.finish(txn, order, "done", None, "engine-1"),
        ):
            refused = self.assertRaises(RowRefused, self.run_, work)
            self.assertIn("trigger old on s2s.orders", str(refused))

    def test_undone(self) -> None:
        """A step that is rolled back leaves the row as the attempt wrote it."""
        self.give("a")
        order = self.attempt()
        before = self.rows("*")
        with self.assertRaises(ZeroDivisionError), blocking(self.url) as txn:
            orders.hold(txn, order)
            orders.go_on(txn, order, order.place, {"done": 1}, "engine-1", False)
            raise ZeroDivisionError
        self.assertEqual(self.rows("*"), before)

    def test_a_life(self) -> None:
        """The row and the audit of a finished order hold the engine, the way, the times and the result."""
        self.give("a", SHIPS, {"new_value": 1})
        self.go_on_with(self.attempt(), {"done": 1, "total": 2}, "engine-1", False)
        begun = self.run_(orders.show, "a")
        self.assertEqual((begun.status, begun.state, begun.attempts), ("running", {"done": 1, "total": 2}, 0))
        self.assertEqual((begun.engine, begun.way, begun.finished_at), ("engine-1", "table", None))
        self.run_(orders.finish, self.attempt(), "done", {"ships": 2}, "engine-2")
        over = self.run_(orders.show, "a")
        self.assertEqual((over.status, over.result, over.engine, over.way), ("done", {"ships": 2}, "engine-2", "table"))
        self.assertEqual(over.started_at, begun.started_at)
        self.assertLess(over.started_at, over.finished_at)
        self.assertFalse(self.run_(orders.find, "a").is_open)
        told = {"status": "done", "result": {"ships": 2}, "engine": "engine-2", "way": "table"}
        audit = self.execute("select subject, result from s2s.audit order by audit_id")
        self.assertEqual(audit, [("a", None), ("a", told)])

    def test_shown(self) -> None:
        """Operators can show one order by its id, and list the newest ones by status or RPC, up to a limit."""
        for order_id, rpc in (("c", SECTOR), ("b", SHIPS), ("a", SECTOR)):
            self.give(order_id, rpc)
        self.run_(orders.finish, self.run_(orders.find, "c"), "refused", None, "engine-1")

        def listed(**which: Any) -> list[str]:
            return [row.order_id for row in self.run_(orders.list_orders, **which)]

        self.assertEqual(listed(), ["a", "b", "c"])
        self.assertEqual(listed(limit=2), ["a", "b"])
        self.assertEqual(listed(status="queued"), ["a", "b"])
        self.assertEqual(listed(rpc=SECTOR), ["a", "c"])
        self.assertEqual(listed(rpc=SECTOR, status="refused"), ["c"])
        self.assertIsNone(self.run_(orders.show, "unknown"))
