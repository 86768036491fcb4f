"""The runner of orders: their outcomes under failures of their work, the database and the engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent

from s2s.errors import IdemConflict, NotFound, ShuttingDown
from s2s.handlers.discovery import Found, discover
from s2s.handlers.jobs import Job, JobRun, Outcome, Unfinished
from s2s.handlers.orders import OrderHandler, OrderRun
from s2s.handlers.run import MOST_TOLD
from s2s.roles.engine import order_runner
from s2s.roles.engine.order_runner import OrderRunner
from s2s.roles.engine.state import EngineState
from s2s.runtime.clock import Clock
from s2s.store import poll_loop
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from s2s.store.tables import audit, orders
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import pause, poll

Work = Callable[[Cursor, OrderRun], Outcome]

TICK = "admin.engine.force_tick.v1"
SECTOR = "world.set_sector_status.v1"


class _Kind(OrderHandler):
    """An order that runs a function of the test."""

    def __init__(self, rpc: str, work: Work, rests: bool = False) -> None:
        self.rpc, self.rests = rpc, rests  # type: ignore[misc]
        self.schema = FOUND.orders[rpc].schema  # type: ignore[misc]
        self._work = work

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        """Record the step, and call the function."""
        txn.execute(
            "insert into public.effects (order_id, state) values (%s, %s)", (order.order_id, str(dict(order.state)))
        )
        return self._work(txn, order)


def _for_ever(_: Cursor, order: OrderRun) -> Outcome:
    return Unfinished({"done": order.state.get("done", 0) + 1})


class OrderRunnerTests(DatabaseTestCase):
    """:class:`OrderRunner` on a real database."""

    def setUp(self) -> None:
        """Create a table in which every step that took effect is recorded."""
        super().setUp()
        self.execute("create table public.effects (n serial, order_id text, state text)")
        self.patch(poll_loop, "POLL_S", 0.05)
        self.patch(orders, "PAUSE", "interval '0.1 seconds'")
        self.condition = EngineState()
        self.condition.wanted = "running"
        self.has_link = False

    def start(
        self,
        work: Work = lambda *_: None,
        *,
        ticks: Work = lambda *_: None,
        plugins: Found | None = None,
        name: str = "engine-1",
        timeout_s: float = 60.0,
    ) -> OrderRunner:
        """Start a runner, with its own pool, that stops at the end of the test.

        :param work: the work of an order about a sector.
        :param ticks: the work of a forced tick.
        :param plugins: plug-ins in place of these two handlers.
        """
        database, handlers = self.pools("s2s-orders", timeout_s=timeout_s)
        runner = OrderRunner(
            database,
            handlers,
            Clock(reactor),
            plugins or Found(orders={SECTOR: _Kind(SECTOR, work), TICK: _Kind(TICK, ticks, rests=True)}),
            name,
            self.condition,
            lambda: self.has_link,
            lambda: None,
            65536,
        )
        runner.start()
        self.addCleanup(runner.stop)
        return runner

    def give(self, order_id: str, rpc: str = SECTOR, **params: Any) -> None:
        """Insert an order into the table."""
        valid = {SECTOR: {"sector_id": 1, "status": "neutral"}, TICK: {"job_type": "decay"}}[rpc]
        text = json.dumps({**valid, **params})
        self.execute("insert into s2s.orders (order_id, rpc, params) values (%s, %s, %s::jsonb)", order_id, rpc, text)

    def row(self, order_id: str, columns: str = "status, result") -> tuple[Any, ...]:
        """Return columns of an order's row."""
        return self.execute(f"select {columns} from s2s.orders where order_id = %s", order_id)[0]

    def over(self, *order_ids: str) -> Deferred[Any]:
        """Wait until orders are over."""
        query = "select 1 from s2s.orders where order_id = any(%s) and status in ('queued', 'running')"
        return poll(lambda: not self.execute(query, list(order_ids)), f"{order_ids} are over")

    def steps(self) -> list[tuple[str, str]]:
        """Return id and state of every step that took effect, in their order."""
        return self.execute("select order_id, state from public.effects order by n")

    async def test_a_job_of_another_engine(self) -> None:
        """An order to run a job is left to an engine with the job, and refused if none takes it in time."""

        class Other(Job):
            job_type, schedule = "test.other", "every:60s"

            def run(self, txn: Cursor, run: JobRun) -> Outcome:
                return {"ran": "test.other"}

        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('test.other', 'every:60s', '2100-01-01')"
        )
        self.give("o1", TICK, job_type="test.other")
        self.start(plugins=discover(world=False), name="without")
        await pause(0.3)
        self.assertEqual(self.row("o1", "status, attempts"), ("queued", 0))
        self.start(plugins=replace(discover(world=False), jobs={"test.other": Other()}), name="with")
        await self.over("o1")
        self.assertEqual(self.row("o1", "status, result, engine"), ("done", {"ran": "test.other"}, "with"))

    async def test_a_job_of_no_engine(self) -> None:
        """An order to run a job that no running engine has is refused after a while, and at once if none ever had."""
        self.patch(orders, "LEFT_S", 0.5)
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('test.other', 'every:60s', '2100-01-01')"
        )
        self.start(plugins=discover(world=False))
        self.give("o1", TICK, job_type="test.other")
        self.give("o2", TICK, job_type="test.never")
        await self.over("o1", "o2")
        for order_id in ("o1", "o2"):
            status, result = self.row(order_id)
            self.assertEqual((status, result["code"]), ("refused", "not_found"))

    # --- outcomes ---------------------------------------------------------------------------------------------------

    async def test_outcomes(self) -> None:
        """The outcome of an order is in its row; a refusal, a failure or an invalid result rolls its work back."""

        def work(txn: Cursor, order: OrderRun) -> Outcome:
            match order.params["sector_id"]:
                case 2:
                    raise NotFound("no such thing", path="/payload/sector_id")
                case 3:
                    raise ValueError("broken\nand a second line")
                case 4:
                    raise SystemExit(3)
                case 5:
                    return {"share": 0.5}
                case 6:
                    return {"long": "x" * MOST_TOLD}
                case 7:
                    txn.connection.commit()
                case 8:
                    txn.execute("insert into public.checked_late values (1, 2)")
                case 9:
                    txn.execute("select 1 / 0")
            return {"sector": order.params["sector_id"]}

        self.execute(
            "create table public.checked_late (n int primary key, m int references checked_late deferrable"
            " initially deferred)"
        )
        expected: dict[int, tuple[str, str, str]] = {
            1: ("done", "", ""),
            2: ("refused", "not_found", "no such thing"),
            3: ("failed", "internal_error", "ValueError: broken"),
            4: ("failed", "internal_error", "SystemExit: 3"),
            5: ("failed", "internal_error", "CanonicalError: at /share"),
            6: ("failed", "internal_error", "ValueError: the return value of a step"),
            7: ("failed", "internal_error", ""),
            8: ("failed", "internal_error", "StatementRefused: insert or update on table"),
            9: ("failed", "internal_error", "DivisionByZero: division by zero"),
        }
        for number in expected:
            self.give(f"o{number}", sector_id=number)
        self.start(work)
        await self.over(*(f"o{number}" for number in expected))
        for number, (status, code, message) in expected.items():
            found, result = self.row(f"o{number}")
            with self.subTest(number=number, result=result):
                self.assertEqual(found, status)
                if code:
                    self.assertEqual(result["code"], code)
                    self.assertTrue(result["message"].startswith(message), result)
        self.assertEqual(self.row("o1"), ("done", {"sector": 1}))
        self.assertEqual(self.row("o2")[1]["details"], {"path": "/payload/sector_id"})
        # The commit is refused, and none of the work stays.
        self.assertEqual({order_id for order_id, _ in self.steps()}, {"o1"})

    async def test_written_by_hand(self) -> None:
        """A row written by hand is checked by the schema of its request; one of another release is left alone."""
        self.give("extra", colour="red")
        self.give("boolean", sector_id=True)
        self.give("float", sector_id=1.5)
        self.execute("insert into s2s.orders (order_id, rpc, params) values ('later', 'world.end.v9', '{}')")
        # JSON that Python cannot even read.
        for order_id, text in (("huge", '{"sector_id": 1e400}'), ("deep", '{"a":' * 1100 + "1" + "}" * 1100)):
            self.execute("insert into s2s.orders (order_id, rpc, params) values (%s, %s, %s)", order_id, SECTOR, text)
        self.give("good")
        self.start(lambda *_: None)
        odd = ("extra", "boolean", "float", "huge", "deep")
        await self.over(*odd, "good")
        for order_id in odd:
            status, result = self.row(order_id)
            self.assertEqual((status, result["code"]), ("refused", "bad_payload"))
        for order_id, why in (
            ("huge", "a number in it is out of range, beyond 1.8e308: say it as a string"),
            ("deep", "it is nested deeper than 32 levels"),
        ):
            message = f"the JSON of its params cannot be read: {why}"
            self.assertEqual(self.row(order_id)[1]["message"], message)
        self.assertEqual(self.row("good")[0], "done")
        with blocking(self.url) as txn:
            self.assertEqual(len(orders.list_orders(txn)), len(odd) + 2)
            self.assertEqual(len(audit.LISTED.read(txn, 100, None)), 2 * len(odd) + 3)
        self.assertEqual(self.row("later"), ("queued", None))
        self.assertEqual(self.steps(), [("good", "{}")])

    async def test_lines_are_bounded(self) -> None:
        """The number of log lines a minute is limited, and further orders are counted."""
        self.patch(order_runner, "MOST_LINES", 5)
        self.execute(
            "insert into s2s.orders (order_id, rpc, params)"
            ' select \'o\' || n, %s, \'{"sector_id": 1, "status": "neutral"}\' from generate_series(1, 20) n',
            SECTOR,
        )
        with capturedLogs() as logs:
            runner = self.start()
            # The row has the status a moment before the runner counts it.
            await poll(lambda: runner.over["done"] == 20, "every order is over")
            await runner.stop()
        lines = [str(formatEvent(event)) for event in logs]
        self.assertEqual(len([line for line in lines if line.startswith("order o")]), 5)
        self.assertIn("further orders: 15 done: see s2s order list", lines)

    async def test_an_actor_of_any_hand(self) -> None:
        """A long actor with control characters, written by hand, is logged in one bounded, printable line."""
        self.give("o")
        self.execute("update s2s.orders set actor = e'\\x1b[31m' || repeat('x', 2000)")
        with capturedLogs() as logs:
            runner = self.start()
            await poll(lambda: runner.over["done"], "it is over")
        [line] = [line for event in logs if (line := str(formatEvent(event))).startswith("order o ")]
        self.assertLess(len(line), 400)
        self.assertTrue(line.isprintable())

    async def test_a_step_that_fails(self) -> None:
        """An order that fails after a committed step has failed, and is not refused; that step stays."""

        def work(_: Cursor, order: OrderRun) -> Outcome:
            if order.state:
                raise NotFound("gone meanwhile")
            return Unfinished({"done": 1})

        self.give("o")
        self.start(work)
        await self.over("o")
        self.assertEqual(self.row("o"), ("failed", {"code": "not_found", "message": "gone meanwhile"}))
        self.assertEqual(self.steps(), [("o", "{}")])

    async def test_spoiled(self) -> None:
        """A step that fails for a reason of the database, such as a statement timeout, is retried until it succeeds."""
        tries: list[int] = []

        def work(txn: Cursor, order: OrderRun) -> Outcome:
            tries.append(1)
            if len(tries) < 4:
                txn.execute("set local statement_timeout = 5; select pg_sleep(10)")
            return None

        self.give("heals")
        self.start(work)
        await self.over("heals")
        self.assertEqual((self.row("heals", "status, attempts"), len(tries)), (("done", 4), 4))

    async def test_it_does_not_get_on(self) -> None:
        """An order fails after ``MOST_ATTEMPTS`` attempts, as when each process that ran it has died."""
        self.give("o")
        self.execute("update s2s.orders set attempts = %s", order_runner.MOST_ATTEMPTS)
        self.start(lambda *_: None)
        await self.over("o")
        self.assertEqual(self.row("o")[0], "failed")
        self.assertIn("made no progress in", self.row("o")[1]["message"])
        self.assertEqual(self.steps(), [])

    async def test_errors_that_cannot_be_told(self) -> None:
        """An error of a plug-in that cannot be stored completely ends the order at once, and is stored in part."""

        class Silent(Exception):
            def __str__(self) -> str:
                raise ValueError

        raised = {
            1: Silent(),
            2: NotFound("a\0b\nc" + "x" * 900),
            3: NotFound("odd", thing=object()),
            4: NotFound("long", thing="x" * 5000),
        }

        def work(_: Cursor, order: OrderRun) -> Outcome:
            raise raised[order.params["sector_id"]]

        for number in raised:
            self.give(f"o{number}", sector_id=number)
        self.start(work)
        await self.over(*(f"o{number}" for number in raised))
        self.assertEqual(self.row("o1")[1]["message"], "Silent: it does not say why")
        self.assertEqual(self.row("o2"), ("refused", {"code": "not_found", "message": "ab"}))
        self.assertEqual(self.row("o3"), ("refused", {"code": "not_found", "message": "odd"}))
        self.assertEqual(self.row("o4"), ("refused", {"code": "not_found", "message": "long"}))

    # --- distribution over workers and engines ----------------------------------------------------------------------

    async def test_a_row_that_cannot_be_changed(self) -> None:
        """An order whose row a trigger protects is named by its id, and later orders run."""
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.order_id in ('first', 'begun') and (new.order_id = 'first' or new.status <> 'queued')"
            " then raise exception 'not this one'; end if;"
            " if new.order_id = 'kept' and new.status = 'done' then return null; end if; return new; end $$;"
            "create trigger keep before update on s2s.orders for each row execute function keep()"
        )
        for order_id in ("first", "begun", "kept", "last"):
            self.give(order_id)
        with capturedLogs() as told:
            self.start(lambda *_: None)
            await self.over("last")
        self.assertEqual(self.execute("select order_id from public.effects"), [("last",)])
        lines = [str(formatEvent(event)) for event in told]
        for order_id in ("first", "begun"):
            self.assertEqual(self.row(order_id, "status"), ("queued",))
            self.assertEqual(len([line for line in lines if f"order {order_id}: not this one" in line]), 1, lines)

    async def test_each_step_once(self) -> None:
        """Three engines share long orders: every step is done once, in its order, and by more than one of them."""

        def work(txn: Cursor, order: OrderRun) -> Outcome:
            done = order.state.get("done", 0) + 1
            return Unfinished({"done": done}) if done < 20 else {"steps": done}

        for number in range(6):
            self.give(f"o{number}")
        self.execute("create table public.runners (engine text)")
        self.execute(
            "create function note() returns trigger language plpgsql set search_path from current as"
            " 'begin insert into public.runners values (new.engine); return null; end';"
            "create trigger note after update of state on s2s.orders for each row execute function note()"
        )
        for name in ("a", "b", "c"):
            self.start(work, name=name)
        await self.over(*(f"o{number}" for number in range(6)))
        expected = ["{}", *(f"{{'done': {done}}}" for done in range(1, 20))]
        for number in range(6):
            self.assertEqual([state for order_id, state in self.steps() if order_id == f"o{number}"], expected)
            self.assertEqual(self.row(f"o{number}"), ("done", {"steps": 20}))
        self.assertGreater(len(self.execute("select distinct engine from public.runners")), 1)

    async def test_one_after_the_other(self) -> None:
        """One engine runs orders in the order in which they were given, including forced ticks."""
        for number in range(60):
            self.give(f"{number:02}", TICK if number % 3 else SECTOR)

        def work(txn: Cursor, _: OrderRun) -> Outcome:
            txn.execute("select pg_sleep(0.002)")
            return None

        self.start(work, ticks=work)
        await self.over(*(f"{number:02}" for number in range(60)))
        self.assertEqual([order_id for order_id, _ in self.steps()], [f"{number:02}" for number in range(60)])

    async def test_short_ones_pass_long_ones(self) -> None:
        """An order that comes while a long one runs does not wait for its end."""

        def work(txn: Cursor, order: OrderRun) -> Outcome:
            if order.order_id != "long":
                return None
            txn.execute("select pg_sleep(0.02)")
            return Unfinished({"done": order.state.get("done", 0) + 1})

        self.give("long")
        runner = self.start(work)
        await poll(lambda: self.row("long")[0] == "running", "it runs")
        self.give("short")
        runner.wake()
        await self.over("short")
        self.assertEqual(self.row("long")[0], "running")

    async def test_long_ones_pass_short_ones(self) -> None:
        """Many short orders do not stop a long one; here a slice has one step."""
        self.patch(order_runner, "SLICE_S", 0.0)
        self.give("long")
        for number in range(200):
            self.give(f"short-{number}")
        self.execute("update s2s.orders set status = 'running', state = '{}' where order_id = 'long'")

        def work(_: Cursor, order: OrderRun) -> Outcome:
            done = order.state.get("done", 0) + 1
            return Unfinished({"done": done}) if order.order_id == "long" and done < 5 else None

        self.start(work)
        await poll(lambda: self.row("long")[0] == "done", "it is done")
        await self.over(*(f"short-{number}" for number in range(200)))
        places = [place for place, (order_id, _) in enumerate(self.steps()) if order_id == "long"]
        # The long order gets its next turn after all orders that waited then; two workers may overlap.
        self.assertLess(places[0], 5)
        self.assertGreater(places[-1], 150)

    async def test_one_that_hangs(self) -> None:
        """A hanging order does not delay the others; the stop waits for it."""
        go_on = threading.Event()
        self.addCleanup(go_on.set)

        def hang(*_: Any) -> Outcome:
            assert go_on.wait(20)
            return None

        self.give("hangs", TICK)
        self.give("behind", TICK)
        runner = self.start(lambda *_: None, ticks=hang)
        await poll(lambda: self.condition._jobs, "it hangs")
        # Its lock is lost, as when the database ends the connection of an idle transaction.
        self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-orders handlers'"
            " and state = 'idle in transaction'"
        )
        for number in range(5):
            self.give(f"other-{number}")
        runner.wake()
        await self.over(*(f"other-{number}" for number in range(5)))
        self.assertEqual(self.row("behind")[0], "queued")
        stopped = runner.stop()
        self.assertNoResult(stopped)
        go_on.set()
        await stopped

    async def test_paused(self) -> None:
        """A paused engine refuses a forced tick, suspends a running one, and runs other orders."""
        self.give("runs", TICK)
        runner = self.start(lambda *_: None, ticks=_for_ever)
        await poll(lambda: self.row("runs")[0] == "running", "it runs")
        self.condition.wanted = "paused"
        await poll(lambda: self.condition.state == "paused", "it is paused")
        steps = self.steps()
        self.give("late", TICK)
        self.give("other")
        runner.wake()
        await self.over("late", "other")
        self.assertEqual(
            self.row("late"), ("refused", {"code": "paused", "message": "the engine is paused: resume it first"})
        )
        self.assertEqual((self.row("other")[0], self.row("runs")[0]), ("done", "running"))
        # One step may have been in progress.
        self.assertLessEqual(len(self.steps()), len(steps) + 2)
        self.condition.wanted = "running"
        await poll(lambda: len(self.steps()) > len(steps) + 4, "it goes on")

    async def test_starting(self) -> None:
        """No order runs until the wanted state of the engine is known."""
        self.condition.wanted = None
        self.give("o")
        runner = self.start(lambda *_: None)
        runner.wake()
        await deferLater(reactor, 0.2)
        self.assertEqual(self.row("o", "status, attempts"), ("queued", 0))
        self.condition.wanted = "running"
        await self.over("o")

    # --- over the link ----------------------------------------------------------------------------------------------

    async def test_by_link(self) -> None:
        """With a link an order in the table is left to the link for a while; an order over the link runs at once."""
        self.has_link = True
        self.give("table")
        runner = self.start(lambda *_: {"ran": 1})
        params = {"sector_id": 1, "status": "neutral"}
        order = await runner.take("linked", SECTOR, params, "key:k1")
        self.assertEqual((order.status, order.result), ("done", {"ran": 1}))
        self.assertEqual(self.row("linked", "actor, way, engine"), ("key:k1", "link", "engine-1"))
        self.assertEqual(self.row("table")[0], "queued")
        # An order over the link that is already in the table is the same order.
        order = await runner.take("table", SECTOR, params, "key:k1")
        self.assertEqual((order.status, self.row("table", "way, actor")), ("done", ("link", self.user())))
        self.assertEqual((await runner.take("table", SECTOR, params, "key:k1")).result, {"ran": 1})
        for other in ({**params, "sector_id": 2}, {**params, "sector_id": True}):
            with self.assertRaises(IdemConflict):
                await runner.take("table", SECTOR, other, "key:k1")
        self.assertEqual(len(self.steps()), 2)

    async def test_none_overtakes_over_the_link(self) -> None:
        """Orders over the link run in the order of their arrival, however long it takes to store one."""
        self.has_link = True
        write = orders.give

        def give(txn: Cursor, order_id: str, *args: Any, **how: Any) -> Any:
            time.sleep(0.3 if order_id == "o0" else 0)
            return write(txn, order_id, *args, **how)

        self.patch(orders, "give", give)
        ids = [f"o{number}" for number in range(4)]
        for order_id in ids:
            self.give(order_id)
        runner = self.start(lambda *_: {"ran": 1})
        params = {"sector_id": 1, "status": "neutral"}
        taken = [Deferred.fromCoroutine(runner.take(order_id, SECTOR, params, "key:k1")) for order_id in ids]
        self.assertEqual([(await each).status for each in taken], ["done"] * 4)
        self.assertEqual([order_id for order_id, _ in self.steps()], ids)

    async def test_by_link_while_it_runs(self) -> None:
        """An order in the table that also comes over the link during its first step delays no other order."""
        self.patch(order_runner, "ANSWER_S", 0.3)
        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def work(_: Cursor, order: OrderRun) -> Outcome:
            begun.set()
            assert order.order_id != "table" or go_on.wait(60)
            return None

        self.give("table")
        runner = self.start(work)
        await poll(begun.is_set, "it runs")
        params = {"sector_id": 1, "status": "neutral"}
        taken = [Deferred.fromCoroutine(runner.take(name, SECTOR, params, "key:k1")) for name in ("table", "next")]
        self.assertEqual([(await each).status for each in taken], ["queued"] * 2)
        with self.assertRaises(IdemConflict):
            await runner.take("table", SECTOR, {**params, "sector_id": 2}, "key:k1")
        go_on.set()
        await self.over("table", "next")
        self.assertEqual((self.row("table", "way"), self.row("next", "way")), (("table",), ("link",)))

    def user(self) -> str:
        """Return the database's user."""
        return str(self.execute("select session_user")[0][0])

    async def test_answered_in_time(self) -> None:
        """An order that is not over in time is answered with its current state, to every request."""
        self.patch(order_runner, "ANSWER_S", 0.3)
        runner = self.start(_for_ever)
        params = {"sector_id": 1, "status": "neutral"}
        asked = [runner.take("long", SECTOR, params, "key:k1") for _ in range(3)]
        answers = [await each for each in map(Deferred.fromCoroutine, asked)]
        self.assertLessEqual({order.status for order in answers}, {"queued", "running"})
        self.assertEqual(runner._waiters, {})

    async def test_draining(self) -> None:
        """A draining engine takes no new order, and answers requests for known ones."""
        self.give("old")
        runner = self.start(_for_ever)
        await poll(self.steps, "it runs")
        self.condition.is_draining = True
        params = {"sector_id": 1, "status": "neutral"}
        self.assertEqual((await runner.take("old", SECTOR, params, "key:k1")).status, "running")
        with self.assertRaises(ShuttingDown):
            await runner.take("new", SECTOR, params, "key:k1")
        with self.assertRaises(IdemConflict):
            await runner.take("old", SECTOR, {**params, "sector_id": 2}, "key:k1")
        self.assertEqual(self.execute("select order_id from s2s.orders"), [("old",)])

    async def test_stopped(self) -> None:
        """A stop ends after the current step, and waiting requests are answered."""
        runner = self.start(_for_ever)
        asked = Deferred.fromCoroutine(runner.take("long", SECTOR, {"sector_id": 1, "status": "neutral"}, "key:k1"))
        await poll(self.steps, "it runs")
        await runner.stop()
        self.assertEqual((await asked).status, "running")
        steps = len(self.steps())
        await deferLater(reactor, 0.1)
        self.assertEqual(len(self.steps()), steps)
