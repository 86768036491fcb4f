"""Handlers, jobs and orders that take too long or leave their transaction unusable, on a real database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.logger import capturedLogs

from s2s.handlers.commands import BatchCommandHandler, Command, CommandHandler, registry
from s2s.handlers.discovery import Found
from s2s.handlers.jobs import Job, JobRun, Outcome
from s2s.handlers.jobs import registry as job_registry
from s2s.handlers.orders import OrderHandler, OrderRun
from s2s.roles.engine.order_runner import OrderRunner
from s2s.roles.engine.scheduler import Scheduler
from s2s.roles.engine.state import EngineState
from s2s.roles.server import executor, reaper
from s2s.roles.server.executor import Executor
from s2s.runtime.clock import Clock
from s2s.store import driver, handler_pool, poll_loop
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.handler_pool import HandlerPool
from s2s.store.pool import Database
from s2s.store.tables import claims, commands, jobs
from tests.support.cluster import Cluster
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase, Session
from tests.support.waiting import poll

_SECTOR = "world.set_sector_status.v1"


class _Single(CommandHandler):
    """Runs a function of the test."""

    cmd_type = "test.single"
    schema = {"type": "object"}

    def __init__(self, work: Callable[[Cursor, Command], object]) -> None:
        self._work = work

    def run(self, txn: Cursor, command: Command) -> None:
        txn.execute("insert into public.effects (cmd_id) values (%s)", (command.cmd_id,))
        self._work(txn, command)


class _Batched(BatchCommandHandler):
    """Runs a function of the test for each command of a batch."""

    cmd_type = "test.batched"
    schema = {"type": "object"}

    def __init__(self, work: Callable[[Cursor, Command], object]) -> None:
        self._work = work

    def run_batch(self, txn: Cursor, commands: Any) -> None:
        for command in commands:
            txn.execute("insert into public.effects (cmd_id) values (%s)", (command.cmd_id,))
            self._work(txn, command)


class StuckTestCase(DatabaseTestCase):
    """A test with an event, for which code waits until the test ends."""

    def setUp(self) -> None:
        """Shorten the time limits."""
        super().setUp()
        self.execute("create table public.effects (cmd_id bigint)")
        self.patch(poll_loop, "POLL_S", 0.05)
        self.patch(handler_pool, "PATIENCE_S", 0.3)
        self.patch(handler_pool, "_WATCH_S", 0.05)
        self.patch(handler_pool, "_CANCEL_S", 0.1)
        self.patch(commands, "MAX_BACKOFF_S", 0)
        self.patch(reaper, "REAP_S", 0.05)
        self.patch(reaper, "SURE_S", 0.1)
        self.gate = threading.Event()
        self.addCleanup(self.gate.set)


class CommandTestCase(StuckTestCase):
    """A test with an executor."""

    def start(self, work: Callable[[Cursor, Command], object], boot_id: str = "boot-1", workers: int = 1) -> Executor:
        """Start an executor whose process holds its presence lock."""
        database, handlers = self.pools(f"s2s-{boot_id}", timeout_s=0.5)
        kinds = registry([_Single(work), _Batched(work)])
        presence = psycopg2.connect(self.url)
        self.addCleanup(presence.close)
        presence.autocommit = True
        presence.cursor().execute("select pg_advisory_lock(%s)", (claims.presence_key(boot_id),))
        running = Executor(database, handlers, kinds, boot_id, workers=workers)
        running.start()
        self.addCleanup(running.stop)
        return running

    def insert(self, *keys: str, cmd_type: str = "test.single") -> None:
        """Insert commands that are due."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload) select %s, key, '{}' from unnest(%s) key",
            cmd_type,
            list(keys),
        )

    def column(self, name: str) -> dict[str, Any]:
        """Return a column of each command."""
        return dict(self.execute(f"select idem_key, {name} from s2s.commands"))

    def wait_where(self, key: str) -> Callable[[Cursor, Command], object]:
        """Return a function that does not return for one command."""
        return lambda _, command: command.idem_key == key and self.gate.wait(60)


class CommandTests(CommandTestCase):
    """The executor."""

    async def test_a_handler_that_does_not_return(self) -> None:
        """A stuck command is charged with the deadline's name and logged; its batch and worker go on without it."""
        self.insert("a", "stuck", "b")
        with capturedLogs() as told:
            running = self.start(self.wait_where("stuck"))
            await poll(lambda: self.column("status") == {"a": "done", "stuck": "ready", "b": "done"}, "the others")
            await poll(lambda: self.column("attempts")["stuck"] == 1, "the charge")
        self.assertEqual(self.column("attempts"), {"a": 0, "stuck": 1, "b": 0})
        self.assertIn("--handler-timeout", self.column("error")["stuck"])
        self.assertIn("HandlerStuck", self.column("error")["stuck"])
        self.assertIn("1 handlers do not return: test.single, command 2", running.condition)
        self.assertTrue(running.condition.startswith("ok"))
        self.assertTrue([event for event in told if "a handler is stuck" in event["log_format"]])
        self.insert("later")
        await poll(lambda: self.column("status")["later"] == "done", "the next command")

    async def test_a_session_that_does_not_end(self) -> None:
        """While the database cannot end the session of a stuck handler, which keeps its locks, the worker goes on."""
        running = self.start(self.wait_where("stuck"))
        self.patch(running._handlers, "end", lambda _: succeed(None))
        # No timeout of the database ends the session, however slow the machine is.
        self.patch(running._handlers, "_timeouts", (600.0, 600.0))
        self.insert("stuck")
        await poll(lambda: running._handlers.stuck, "it is stuck")
        self.insert("later")
        await poll(lambda: self.column("status")["later"] == "done", "the next command")
        self.assertEqual(self.column("attempts")["stuck"], 0)
        self.gate.set()
        await poll(lambda: self.column("status")["stuck"] == "done", "the stuck one, once its locks are free")

    async def test_nobody_takes_what_is_stuck(self) -> None:
        """While the thread of a stuck command lives, no process takes the command; then it runs again."""
        self.patch(claims, "OVERSTAY_S", 0.0)
        begun: list[str] = []

        def work(txn: Cursor, command: Command) -> None:
            begun.append(command.idem_key)
            if command.idem_key == "stuck" and not self.gate.is_set():
                self.gate.wait(60)

        self.insert("stuck")
        running = self.start(work)
        await poll(lambda: self.column("attempts")["stuck"] == 1, "the charge")
        self.start(work, "boot-2")
        self.insert(*(f"c{number}" for number in range(20)))
        await poll(lambda: list(self.column("status").values()).count("done") == 20, "the others")
        await poll(lambda: self.looks(running) > 3, "some looks of the reaper")
        self.assertEqual((begun.count("stuck"), self.column("attempts")["stuck"]), (1, 1))
        self.gate.set()
        await poll(lambda: self.column("status")["stuck"] == "done", "the second run")
        self.assertEqual(self.execute("select count(*) from public.effects"), [(21,)])
        await poll(lambda: self.execute("select * from s2s.batch_notes") == [], "no note is left")
        self.assertEqual(running.condition, "ok")

    def looks(self, running: Executor) -> int:
        """Return a number that grows with every scan of the reaper."""
        self._looks = getattr(self, "_looks", 0) + (running._reaper._presence is not None)
        return self._looks

    async def test_the_process_of_a_stuck_handler_dies(self) -> None:
        """A command charged when it got stuck is not charged for the death of its process, and is free afterwards."""
        self.insert("stuck")
        self.execute("update s2s.commands set attempts = 1")
        self.execute("insert into s2s.batch_notes (boot_id, worker, cmd_ids, stuck) values ('dead', 0, '{1}', true)")
        self.start(lambda *_: None)
        await poll(lambda: self.column("status")["stuck"] == "done", "its next run")
        self.assertEqual(self.column("attempts"), {"stuck": 1})

    async def test_a_batch_that_does_not_return(self) -> None:
        """The commands of a stuck batch run singly afterwards, by another worker: all but the one at fault are done."""
        self.insert("a", "stuck", "b", cmd_type="test.batched")
        running = self.start(self.wait_where("stuck"))
        await poll(lambda: self.column("status") == {"a": "done", "stuck": "ready", "b": "done"}, "the others")
        await poll(lambda: self.column("attempts")["stuck"] == 2, "the second charge")
        self.assertEqual(self.column("attempts"), {"a": 1, "stuck": 2, "b": 1})
        self.assertIn("2 handlers do not return", running.condition)

    async def test_a_type_whose_handlers_do_not_return(self) -> None:
        """After three stuck handlers of a type no more of that type are taken until one returns; other types go on."""
        self.insert("stuck-1", "stuck-2", "stuck-3", "stuck-4")
        running = self.start(lambda _, command: command.idem_key.startswith("stuck") and self.gate.wait(60))
        await poll(lambda: "no more commands are taken of test.single" in running.condition, "the type is left out")
        self.insert("other", cmd_type="test.batched")
        await poll(lambda: self.column("status")["other"] == "done", "another type")
        self.assertEqual(self.column("attempts")["stuck-4"], 0)
        self.assertTrue(running.condition.startswith("ok"))
        self.gate.set()
        await poll(lambda: set(self.column("status").values()) == {"done"}, "the rest")

    async def test_too_many(self) -> None:
        """At the limit of stuck handlers no command is taken, and the condition has the cure, until one returns."""
        self.patch(executor, "MOST_STUCK", 2)
        self.patch(handler_pool, "MOST_STUCK", 2)
        self.insert("stuck-1", "stuck-2")
        running = self.start(lambda _, command: command.idem_key.startswith("stuck") and self.gate.wait(60))
        await poll(lambda: not running.condition.startswith("ok"), "the bound")
        self.assertIn("start this process again", running.condition)
        self.insert("later")
        self.gate.set()
        await poll(lambda: self.column("status")["later"] == "done", "the next command")

    async def test_a_handler_that_is_async(self) -> None:
        """If a handler returns a coroutine, a generator or a Deferred, its command is charged."""
        self.keep_charged()

        async def coroutine() -> None:
            raise AssertionError

        def generator() -> Any:
            yield

        made = {
            "coroutine": coroutine,
            "generator": generator,
            "Deferred": Deferred,
            "a": lambda: None,
            "int": lambda: 5,
        }
        self.patch(_Single, "run", lambda _, txn, command: made[command.idem_key]())
        self.insert(*made)
        self.start(lambda *_: None)
        charged = {"coroutine": 1, "generator": 1, "Deferred": 1, "a": 0, "int": 0}
        await poll(lambda: self.column("attempts") == charged, "the charges")
        self.assertIn("write it as a plain function", self.column("error")["coroutine"])
        self.assertEqual((self.column("status")["a"], self.column("status")["int"]), ("done", "done"))

    async def test_an_exception_with_code(self) -> None:
        """An exception whose text is computed costs only its own command, whether that code raises or hangs."""
        self.keep_charged()

        class ExitsError(Exception):
            def __str__(self) -> str:
                raise SystemExit(3)

        gate = self.gate

        class HangsError(Exception):
            def __str__(self) -> str:
                gate.wait(60)
                return "late"

        def work(_: Cursor, command: Command) -> None:
            if command.idem_key != "b":
                raise {"exits": ExitsError, "hangs": HangsError}[command.idem_key]

        self.insert("exits", "hangs", "b")
        self.start(work)
        await poll(lambda: self.column("attempts") == {"exits": 1, "hangs": 1, "b": 0}, "the charges")
        await poll(lambda: self.column("status")["b"] == "done", "the other one")
        self.assertIn("does not say why", self.column("error")["exits"])
        self.assertIn("HandlerStuck", self.column("error")["hangs"])

    async def test_a_spoiled_transaction(self) -> None:
        """A handler that ends the savepoint of its batch is charged, and no other command of the batch is."""

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "bad":
                txn.execute(f"rollback to savepoint {driver._SAVEPOINT}; release savepoint {driver._SAVEPOINT}")
                txn.execute("select 1 / 0")

        self.insert("a", "bad", "b")
        self.keep_charged()
        self.start(work)
        await poll(lambda: self.column("status") == {"a": "done", "bad": "ready", "b": "done"}, "the others")
        self.assertEqual(self.column("attempts"), {"a": 0, "bad": 1, "b": 0})
        self.assertIn("unusable", self.column("error")["bad"])

    async def test_a_handler_that_commits(self) -> None:
        """A commit by psycopg2 is refused; one in SQL repeats no work that was done, and charges no other command."""
        self.keep_charged()

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "psycopg2":
                txn.connection.commit()
            elif command.idem_key == "sql":
                txn.execute("commit")

        self.insert("a", "psycopg2", "b", "sql", "c")
        running = self.start(work)
        await poll(lambda: running.ran == 3, "the others")
        self.assertEqual(
            self.column("status"), {"a": "done", "psycopg2": "ready", "b": "done", "sql": "ready", "c": "done"}
        )
        self.assertEqual(self.column("attempts"), {"a": 0, "psycopg2": 1, "b": 0, "sql": 1, "c": 0})
        self.assertIn("never commits", self.column("error")["psycopg2"])
        counts = dict(
            self.execute(
                "select idem_key, count(*) from public.effects join s2s.commands using (cmd_id) group by idem_key"
            )
        )
        self.assertEqual({key: counts[key] for key in "abc"}, {"a": 1, "b": 1, "c": 1})

    async def test_a_handler_that_begins_another_transaction(self) -> None:
        """A handler that rolls back and begins anew loses no work of others, whatever savepoint it creates."""
        self.keep_charged()

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "bad":
                txn.execute("rollback; begin; savepoint s2s")

        self.insert("a", "bad", "b")
        running = self.start(work)
        await poll(lambda: running.ran == 2, "the others")
        self.assertEqual(self.column("status"), {"a": "done", "bad": "ready", "b": "done"})
        self.assertEqual(self.column("attempts"), {"a": 0, "bad": 1, "b": 0})
        effects = self.execute(
            "select idem_key, count(*) from public.effects join s2s.commands using (cmd_id) group by idem_key"
        )
        self.assertEqual({key: count for key, count in effects if key != "bad"}, {"a": 1, "b": 1})

    async def test_a_commit_that_hangs(self) -> None:
        """A deferred trigger that hangs in the COMMIT is cancelled at the deadline, and the next commands run."""
        self.execute(
            "create function hang() returns trigger language plpgsql set search_path from current as $$ begin"
            " if exists (select from s2s.commands where cmd_id = new.cmd_id and idem_key = 'hangs')"
            " then perform pg_sleep(600); end if; return null; end $$;"
            "create constraint trigger hang after insert on public.effects deferrable initially deferred"
            " for each row execute function hang()"
        )
        self.insert("hangs", "a")
        self.start(lambda *_: None)
        await poll(lambda: self.column("status")["a"] == "done", "the other one")
        await poll(lambda: self.column("attempts")["hangs"] > 0, "its charge")
        self.assertIn("HandlerTimeout", self.column("error")["hangs"])
        self.assertEqual(self.column("attempts")["a"], 0)

    async def test_the_databases_fault(self) -> None:
        """An error of the whole database that passes, such as a full disk, is not charged."""
        full = [True]

        def work(txn: Cursor, command: Command) -> None:
            if full[0]:
                own(txn).execute("do $$ begin raise exception 'no space' using errcode = 'disk_full'; end $$")

        check = self.refuse_writes(full)
        self.insert("a", "b")
        with capturedLogs() as told:
            self.start(work)
            await poll(lambda: len(check) > 3, "some tries")
            full.clear()
            full.append(False)
            await poll(lambda: set(self.column("status").values()) == {"done"}, "the end")
        self.assertEqual(self.column("attempts"), {"a": 0, "b": 0})
        lines = [event for event in told if event["log_namespace"].endswith("Troubles")]
        self.assertEqual([(event["state"], event["text"]) for event in lines], [("53100", "no space")])

    async def test_a_foreign_server(self) -> None:
        """A handler is charged for a foreign server that its statement uses, and the database is not blamed."""

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "a":
                txn.execute("do $$ begin raise exception 'no route to elsewhere' using errcode = '08001'; end $$")

        self.keep_charged()
        self.insert("a", "b")
        with capturedLogs() as told:
            self.start(work)
            await poll(lambda: self.column("attempts")["a"] == 1, "its charge")
            await poll(lambda: self.column("status")["b"] == "done", "the other one")
        self.assertIn("no route to elsewhere: see the server to which", self.column("error")["a"])
        self.assertEqual([event for event in told if event["log_namespace"].endswith("Availability")], [])

    def refuse_writes(self, full: list[bool]) -> list[int]:
        """Let the probe of the database fail while the disk is full; return a list that grows with each probe."""
        probed: list[int] = []
        check = executor.probe.check

        def probe(txn: Cursor) -> None:
            probed.append(1)
            if full[0]:
                own(txn).execute("do $$ begin raise exception 'no space' using errcode = 'disk_full'; end $$")
            check(txn)

        self.patch(executor.probe, "check", probe)
        return probed

    async def test_a_command_that_blames_the_database(self) -> None:
        """A command that always fails with such an error, on a working database, is charged in the end."""
        self.insert("a", "bad", "b")

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "bad":
                own(txn).execute("do $$ begin raise exception 'io' using errcode = 'io_error'; end $$")

        self.start(work)
        await poll(lambda: self.column("status") == {"a": "done", "bad": "dead", "b": "done"}, "its death")
        self.assertEqual(self.column("attempts"), {"a": 0, "bad": 10, "b": 0})

    async def test_read_only(self) -> None:
        """A handler that makes its own transaction read-only is charged, and no other command of its batch is."""
        self.keep_charged()

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "bad":
                txn.execute("set transaction read only")
                txn.execute("insert into public.effects values (0)")

        self.insert("a", "bad", "b")
        self.start(work)
        await poll(lambda: self.column("attempts") == {"a": 0, "bad": 1, "b": 0}, "the charge")
        self.assertEqual(self.column("status"), {"a": "done", "bad": "ready", "b": "done"})

    async def test_a_batch_has_an_end(self) -> None:
        """A batch of slow commands begins no further one after its time; the others are free for the next poll."""
        self.patch(executor, "BATCH_S", 0.0)
        self.insert("a", "b", "c")
        seen: list[int] = []

        def work(txn: Cursor, command: Command) -> None:
            seen.append(self.execute("select count(*) from s2s.commands where status = 'done'")[0][0])

        self.start(work)
        await poll(lambda: set(self.column("status").values()) == {"done"}, "the end")
        self.assertEqual((seen, self.column("attempts")), ([0, 1, 2], {"a": 0, "b": 0, "c": 0}))


class PreparedTests(CommandTestCase):
    """The executor on a PostgreSQL that allows prepared transactions."""

    def setUp(self) -> None:
        """Start PostgreSQL; each statement of the test connects to it."""
        super().setUp()
        cluster = Cluster()
        self.addCleanup(cluster.remove)
        with Session(cluster.url) as session:
            session.run("alter system set max_prepared_transactions = 5")
        cluster.stop()
        cluster.start()
        cluster.migrate()
        self.url = cluster.url
        self._session = None
        self.execute("create table public.effects (cmd_id bigint)")

    async def test_a_handler_that_prepares(self) -> None:
        """PREPARE TRANSACTION is refused and charged, whether in the first call of a transaction or in a later one."""
        self.keep_charged()

        def work(txn: Cursor, command: Command) -> None:
            if command.idem_key == "bad":
                txn.execute("prepare transaction 'bad'")

        for keys in (("bad", "a"), ("a", "bad", "b")):
            self.execute("truncate public.effects, commands, idempotency_keys")
            self.insert(*keys)
            running = self.start(work, f"boot-{len(keys)}")
            others = {key: "done" for key in keys if key != "bad"}
            await poll(lambda: self.column("attempts")["bad"] == 1, "the charge")
            await poll(lambda running=running, others=others: running.ran == len(others), "the others")
            self.assertEqual(self.column("status"), {**others, "bad": "ready"})
            self.assertIn("cannot PREPARE a transaction", self.column("error")["bad"])
            self.assertEqual(self.execute("select * from pg_prepared_xacts"), [])
            self.assertEqual(self.execute("select count(*) from public.effects"), [(len(others),)])
            await running.stop()


class _Job(Job):
    """A job that does not return."""

    schedule = "every:3600s"

    def __init__(self, job_type: str, work: Callable[[], object]) -> None:
        self.job_type = job_type  # type: ignore[misc]
        self._work = work

    def run(self, txn: Cursor, run: JobRun) -> Outcome:
        self._work()
        return None


class _Order(OrderHandler):
    rpc = _SECTOR
    schema = FOUND.orders[_SECTOR].schema

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def run(self, txn: Cursor, order: OrderRun) -> Outcome:
        self._work()
        return None


def _order_runner(database: Database, handlers: HandlerPool, condition: EngineState, order: _Order) -> OrderRunner:
    """Make the runner of an engine that serves this order."""
    found = Found(orders={_SECTOR: order})
    return OrderRunner(
        database, handlers, Clock(reactor), found, "engine-1", condition, lambda: False, lambda: None, 9999
    )


class EngineTests(StuckTestCase):
    """Jobs and orders."""

    def schedule(self, *kinds: Job) -> Scheduler:
        """Start a scheduler as a separate engine."""
        condition = EngineState()
        condition.wanted = "running"
        database, handlers = self.pools("s2s-jobs", timeout_s=0.5)
        scheduler = Scheduler(
            "boot-1", database, handlers, Clock(reactor), job_registry(kinds), condition, 65536, lambda: None, {}
        )
        scheduler.start()
        self.addCleanup(scheduler.stop)
        return scheduler

    async def test_a_job_that_does_not_return(self) -> None:
        """A stuck job fails, is not begun here while its thread lives, and runs on another engine after a pause."""
        self.patch(jobs, "PAUSE", "interval '0.2 seconds'")
        begun: list[str] = []

        def stuck() -> None:
            begun.append("here")
            self.gate.wait(60)

        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:3600s', to_timestamp(3600))"
        )
        here = self.schedule(_Job("tick", stuck))
        await poll(lambda: self.execute("select error from s2s.jobs") != [(None,)], "its failure")
        self.assertIn("HandlerStuck", self.execute("select error from s2s.jobs")[0][0])
        self.assertEqual(here.failed, 1)
        self.schedule(_Job("tick", lambda: begun.append("there")))
        await poll(lambda: self.execute("select runs from s2s.jobs") == [(1,)], "its run on another engine")
        self.assertEqual(begun, ["here", "there"])
        self.execute("update s2s.jobs set due_at = to_timestamp(3600)")
        await poll(lambda: begun.count("there") == 2, "its next run")
        self.assertEqual(begun.count("here"), 1)

    async def test_no_attempt_where_all_is_stuck(self) -> None:
        """An engine at the limit of stuck calls begins no attempt: its orders and jobs are left to other engines."""
        self.patch(handler_pool, "MOST_STUCK", 0)
        self.execute(
            "insert into s2s.jobs (job_type, schedule, due_at) values ('tick', 'every:3600s', to_timestamp(3600))"
        )
        condition = EngineState()
        condition.wanted = "running"
        database, handlers = self.pools("s2s-orders", timeout_s=0.5)
        runner = _order_runner(database, handlers, condition, _Order(lambda: None))
        self.execute("insert into s2s.orders (order_id, rpc, params) values ('o', %s, '{}')", _SECTOR)
        self.assertIsNone(await runner._poll_once(0))
        self.assertEqual(self.execute("select attempts from s2s.orders"), [(0,)])
        scheduler = Scheduler(
            "boot-1",
            database,
            handlers,
            Clock(reactor),
            job_registry([_Job("tick", lambda: None)]),
            condition,
            65536,
            lambda: None,
            {},
        )
        self.assertIsNone(await scheduler._poll_once(0))
        self.assertEqual(self.execute("select attempts from s2s.jobs where job_type = 'tick'"), [(0,)])

    async def test_an_order_that_does_not_return(self) -> None:
        """A stuck order fails with the name of the deadline, and the orders behind it run."""
        condition = EngineState()
        condition.wanted = "running"
        waits = iter((True, False))
        order = _Order(lambda: next(waits) and self.gate.wait(60))
        runner = _order_runner(*self.pools("s2s-orders", timeout_s=0.5), condition, order)
        runner.start()
        self.addCleanup(runner.stop)
        for order_id in ("stuck", "next"):
            self.execute(
                "insert into s2s.orders (order_id, rpc, params) values (%s, %s, %s::jsonb)",
                order_id,
                _SECTOR,
                '{"sector_id": 1, "status": "neutral"}',
            )
        await poll(lambda: runner.over["failed"] == 1 and runner.over["done"] == 1, "both")
        [(status, result)] = self.execute("select status, result from s2s.orders where order_id = 'stuck'")
        self.assertEqual(status, "failed")
        self.assertIn("--handler-timeout", result["message"])
