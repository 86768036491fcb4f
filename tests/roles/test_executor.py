"""The executor: the effect and the outcome of each command are in one transaction."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg2
from twisted.internet import reactor
from twisted.internet.defer import fail
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s import errors
from s2s.handlers.commands import BUILTIN, BatchCommandHandler, Command, CommandHandler, registry
from s2s.roles.server import executor, reaper
from s2s.roles.server.executor import Executor
from s2s.store import poll_loop, pool
from s2s.store.driver import Cursor
from s2s.store.kept_rows import KEPT
from s2s.store.tables import claims
from s2s.store.tables.commands import Charge
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import pause, poll

_ANY = {"type": "object"}


def _effect(txn: Cursor, command: Command) -> None:
    txn.execute("insert into public.effects (cmd_id, idem_key) values (%s, %s)", (command.cmd_id, command.idem_key))


def _misbehave(txn: Cursor, command: Command, before: Callable[[], None]) -> None:
    """Misbehave as the payload says, after the effect: the failure must undo the effect."""
    _effect(txn, command)
    match command.payload.get("do"):
        case "raise":
            raise ValueError("not\x00 this\udc00 \x1bone\nand a second line")
        case "raise twice" if command.attempts < 2:
            raise ValueError(f"attempt {command.attempts}")
        case "bad sql":
            txn.execute("insert into public.effects (cmd_id, idem_key) values (%s, 'other')", (command.cmd_id,))
        case "swallow":
            try:
                txn.execute("select 1 / 0")
            except Exception:
                return
        case "constraints":
            txn.execute("set constraints all immediate")
        case "child first":
            txn.execute("insert into public.children values (1); insert into public.parents values (1)")
        case "late":
            txn.execute("insert into public.checked_late values (%s)", (command.cmd_id,))
        case "exit":
            raise SystemExit(3)
        case "before":
            before()
        case "sleep":
            txn.execute("select pg_sleep(60)")
        case "sleep on":
            for _ in range(3):
                txn.execute("savepoint mine")
                with contextlib.suppress(psycopg2.Error):
                    txn.execute("select pg_sleep(60)")
                txn.execute("rollback to savepoint mine")
        case "deadlock":
            txn.execute("do $$ begin raise exception 'mutual' using errcode = 'deadlock_detected'; end $$")
        case "rollback":
            txn.execute("rollback")
        case "mask":
            try:
                before()
                txn.execute("select 1")
            except psycopg2.Error:
                raise KeyError("mine") from None


class _Single(CommandHandler):
    cmd_type = "test.single"
    schema = _ANY

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None

    def run(self, txn: Cursor, command: Command) -> None:
        _misbehave(txn, command, self.before)


class _Batched(BatchCommandHandler):
    cmd_type = "test.batched"
    schema = _ANY

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        self.sizes.append(len(commands))
        for command in commands:
            _misbehave(txn, command, lambda: None)
            if command.payload.pop("do", None) == "keep":
                raise ValueError("a batch that has taken its payloads apart")
        if isinstance(commands, list):
            commands.clear()


class ExecutorTests(DatabaseTestCase):
    """:class:`Executor` on a real database."""

    def setUp(self) -> None:
        """Create the table of effects, without starting an executor."""
        super().setUp()
        self.execute(
            "create table public.effects (n serial, cmd_id bigint unique, idem_key text);"
            "create table public.checked_late (cmd_id bigint references s2s.commands deferrable initially deferred,"
            " check (cmd_id > 0))"
        )
        # A deferred constraint, which is checked at the COMMIT.
        self.execute("alter table public.checked_late add unique (cmd_id) deferrable initially deferred")
        self.single, self.batched = _Single(), _Batched()
        self.patch(poll_loop, "POLL_S", 0.05)
        self.patch(executor, "ABSENT_S", 0.02)
        self.patch(reaper, "REAP_S", 0.05)
        self.patch(reaper, "SURE_S", 0.3)

    def start(self, timeout_s: float = 60.0, **options: Any) -> Executor:
        """Start an executor that ends with the test."""
        self.database, self.handlers = self.pools("s2s-run", timeout_s=timeout_s)
        kinds = registry([self.single, self.batched, *BUILTIN])
        running = Executor(self.database, self.handlers, kinds, "boot-1", **{"workers": 1, **options})
        running.start()
        self.addCleanup(running.stop)
        return running

    def insert(self, *keys: str, cmd_type: str = "test.single", do: str = "", **columns: Any) -> None:
        """Insert commands that are due."""
        names = "".join(f", {name}" for name in columns)
        self.execute(
            f"insert into s2s.commands (cmd_type, idem_key, payload{names}) select %s, key,"
            f" jsonb_build_object('do', %s)"
            f"{', %s' * len(columns)} from unnest(%s) key",
            cmd_type,
            do,
            *columns.values(),
            list(keys),
        )

    def be_present(self, boot_id: str) -> psycopg2.extensions.connection:
        """Hold a presence lock on a separate connection."""
        connection = psycopg2.connect(self.url)
        self.addCleanup(connection.close)
        connection.autocommit = True
        connection.cursor().execute("select pg_advisory_lock(%s)", (claims.presence_key(boot_id),))
        return connection

    def note(self, boot_id: str, *keys: str, worker: int = 0) -> claims.Claim:
        """Claim a batch of waiting commands."""
        ((noted_at,),) = self.execute(
            "insert into s2s.batch_notes (boot_id, worker, cmd_ids)"
            " select %s, %s, array_agg(cmd_id) from s2s.commands where idem_key = any(%s) returning noted_at",
            boot_id,
            worker,
            list(keys),
        )
        return claims.Claim(boot_id, worker, noted_at)

    async def test_nothing_can_be_claimed(self) -> None:
        """While every claim is refused, the condition has the reason; afterwards commands run and it is ok."""
        self.patch(poll_loop, "FAILING_S", 0.2)
        self.be_present("boot-1")
        self.execute("alter table s2s.batch_notes rename to hidden")
        running = self.start()
        self.insert("a")
        await poll(lambda: "batch_notes" in running.condition, "the condition")
        self.assertTrue(running.condition.startswith("no command can be taken: "), running.condition)
        self.execute("alter table hidden rename to batch_notes")
        await poll(lambda: running.ran == 1, "the command")
        self.assertEqual(running.condition, "ok")

    def attempts(self) -> dict[str, int]:
        """Return every command's attempts."""
        return dict(self.execute("select idem_key, attempts from s2s.commands"))

    def rush(self) -> None:
        """Make every waiting command due now."""
        self.execute("update s2s.commands set due_at = now() where status = 'ready'")

    def effects(self) -> list[str]:
        """Return the keys with an effect, in their order."""
        return [key for (key,) in self.execute("select idem_key from public.effects order by n")]

    def statuses(self) -> dict[str, str]:
        """Return every command's status."""
        return dict(self.execute("select idem_key, status from s2s.commands"))

    async def until(self, status: str, *keys: str, rush: bool = False) -> None:
        """Wait until commands have a status."""

        def reached() -> bool:
            if rush:
                self.rush()
            return all(self.statuses()[key] == status for key in keys)

        await poll(reached, f"{keys} to be {status}")

    async def test_runs_in_order_and_once(self) -> None:
        """Due commands run in run order across their types, take effect once, are done, and leave no claim."""
        self.insert("c", priority=9)
        self.insert("b", priority=5, cmd_type="test.batched")
        self.insert("a", priority=1)
        self.insert("later", due_at="2100-01-01")
        running = self.start()
        await self.until("done", "a", "b", "c")
        self.assertEqual(self.effects(), ["a", "b", "c"])
        self.assertEqual(self.statuses()["later"], "ready")
        self.assertEqual(self.execute("select count(*) from s2s.commands where finished_at is not null"), [(3,)])
        self.assertEqual(self.execute("select * from s2s.batch_notes"), [])
        await poll(lambda: running.ran == 3, "they are counted")
        self.assertEqual((running.failed, running.dead), (0, 0))

    async def test_wakes(self) -> None:
        """A sleeping worker polls at once when it is woken."""
        self.patch(poll_loop, "POLL_S", 60.0)
        running = self.start()
        await poll(lambda: running._loop._asleep, "the worker to sleep")
        self.insert("a")
        running.wake()
        await self.until("done", "a")

    async def test_wakes_by_itself_when_something_is_due(self) -> None:
        """A worker sleeps no longer than until the next command is due."""
        self.patch(poll_loop, "POLL_S", 60.0)
        self.insert("a")
        self.execute("update s2s.commands set due_at = now() + interval '0.3 s'")
        self.start()
        await self.until("done", "a")

    async def test_a_batch_at_once(self) -> None:
        """A batched type gets its batch in one call, many workers share the rest, and each command runs once."""
        keys = [f"k{i}" for i in range(1000)]
        self.insert(*keys, cmd_type="test.batched")
        running = self.start(workers=3, batch_size=100)
        await self.until("done", *keys)
        self.assertEqual(sorted(self.effects()), sorted(keys))
        self.assertEqual(self.batched.sizes, [100] * 10)
        await poll(lambda: running.ran == 1000)

    async def test_a_batch_that_is_changed(self) -> None:
        """A handler that empties its list or changes payloads changes copies: each command takes effect once."""
        self.insert("a", "b", cmd_type="test.batched")
        self.start()
        await self.until("done", "a", "b")
        self.assertEqual(self.effects(), ["a", "b"])
        self.insert("c", cmd_type="test.batched", do="raise twice")
        self.insert("d", "e", cmd_type="test.batched", do="keep")
        charged = "select count(*)::int from s2s.commands where attempts > 0"
        await poll(lambda: self.execute(charged) == [(3,)], "the charges")
        self.assertEqual(self.effects(), ["a", "b"])

    async def test_no_thread(self) -> None:
        """While the operating system starts no thread, nothing is charged, and the condition has the reason."""
        running = self.start()
        self.patch(self.handlers, "run", lambda *_: fail(errors.NoThread()))
        self.insert("a")
        for _ in range(4):
            running.wake()
            await poll(lambda: "no thread can be started" in running.condition, "the condition")
            await pause(0.1)
        self.assertEqual(self.execute("select status, attempts from s2s.commands"), [("ready", 0)])
        del self.handlers.run
        await self.until("done", "a")

    async def test_notices_are_published(self) -> None:
        """The built-in command inserts its rows."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload) select 'notice.publish', 'k' || i,"
            """ '{"scope": "global", "message": "m", "severity": "info"}' from generate_series(1, 5) i"""
        )
        self.start()
        await poll(lambda: self.execute("select count(distinct cmd_id)::int from s2s.notices") == [(5,)], "the notices")

    async def test_a_failure_takes_its_effect_along(self) -> None:
        """If one command of a batch raises, it is charged, its effect is undone, and the others are done."""
        for cmd_type in ("test.single", "test.batched"):
            self.insert(*(f"{cmd_type} {i}" for i in range(3)), cmd_type=cmd_type)
            self.insert(f"{cmd_type} bad", cmd_type=cmd_type, do="raise", due_at="2000-01-01")
        self.patch(executor.commands, "MAX_ATTEMPTS", 1)
        running = self.start()
        await poll(lambda: sorted(self.statuses().values()) == ["dead"] * 2 + ["done"] * 6, "the ends")
        self.assertEqual(len(self.effects()), 6)
        errors = self.execute("select distinct error, attempts from s2s.commands where status = 'dead'")
        self.assertEqual(errors, [("ValueError: not this? one", 1)])
        await poll(lambda: (running.ran, running.failed, running.dead) == (6, 2, 2), "the counters")

    async def test_sql_that_fails(self) -> None:
        """A statement that the database refuses, and one whose error was swallowed, undo only their own command."""
        self.insert("a")
        self.insert("bad sql", do="bad sql")
        self.insert("swallow", do="swallow")
        self.insert("z")
        self.patch(executor.commands, "MAX_ATTEMPTS", 1)
        self.start()
        await self.until("dead", "bad sql", "swallow")
        await self.until("done", "a", "z")
        self.assertEqual(self.effects(), ["a", "z"])
        ((error,),) = self.execute("select error from s2s.commands where idem_key = 'bad sql'")
        self.assertEqual(error, 'UniqueViolation: duplicate key value violates unique constraint "effects_cmd_id_key"')

    async def test_payloads_that_cannot_be_read(self) -> None:
        """A payload of plain SQL that no JSON parser reads fails its command with the reason; its batch goes on."""
        for cmd_type in ("test.single", "test.batched"):
            text = "insert into s2s.commands (cmd_type, idem_key, payload) values (%s, %s, '{\"n\": 1e400}')"
            self.execute(text, cmd_type, f"odd {cmd_type}")
        self.insert("a", cmd_type="test.batched")
        self.insert("b")
        self.start()
        await self.until("done", "a", "b")
        why = "CanonicalError: the payload cannot be read: a number in it is out of range, beyond 1.8e308"
        failed = "select error from s2s.commands where idem_key like 'odd%%' and attempts > 0"
        errors = await poll(lambda: self.execute(failed)[1:] and self.execute(failed), "both have failed")
        self.assertEqual([error.startswith(why) for (error,) in errors], [True, True], errors)

    async def test_retries(self) -> None:
        """A command that fails twice and then succeeds is done, with its attempts counted."""
        self.insert("a", do="raise twice")
        self.start()
        await self.until("done", "a", rush=True)
        self.assertEqual(self.execute("select attempts, error from s2s.commands"), [(2, "ValueError: attempt 1")])
        self.assertEqual(self.effects(), ["a"])

    async def test_death(self) -> None:
        """A command that always fails is dead after ten attempts, with the reason and the time."""
        self.insert("a", do="raise")
        self.start()
        await self.until("dead", "a", rush=True)
        self.assertEqual(self.execute("select attempts, finished_at is not null from s2s.commands"), [(10, True)])

    async def test_what_fails_at_the_commit(self) -> None:
        """The commands of a batch whose COMMIT is refused run again, and only the one at fault is charged."""
        self.insert("a", "b")
        self.insert("twice", "again", do="late")
        self.execute("insert into public.checked_late select cmd_id from s2s.commands where idem_key = 'twice'")
        self.start()
        await self.until("done", "a", "b", "again", rush=True)
        await self.until("dead", "twice", rush=True)
        self.assertEqual(sorted(self.effects()), ["a", "again", "b"])
        self.assertEqual(
            dict(self.execute("select idem_key, attempts from s2s.commands")), {"a": 0, "b": 0, "again": 0, "twice": 10}
        )

    async def test_many_that_fail(self) -> None:
        """Commands that fail, also by a deferred constraint, are tried again in few transactions."""
        for do in ("raise", "late"):
            self.insert(*(f"{do} {n}" for n in range(100)), do=do)
        self.execute("insert into public.checked_late select cmd_id from s2s.commands where idem_key like 'late%%'")
        batches: list[int] = []

        def run(txn: Cursor, worker: int, cmd_ids: Sequence[int]) -> executor.Report:
            batches.append(len(cmd_ids))
            return original(txn, worker, cmd_ids)

        running = self.start()
        original, running._run = running._run, run  # type: ignore[method-assign]
        await poll(lambda: min(self.attempts().values()) > 0, "each has failed once")
        batches.clear()
        self.execute("update s2s.commands set due_at = '-infinity' where status = 'ready'")
        await poll(lambda: min(self.attempts().values()) > 1, "each has failed twice")
        self.assertLess(len(batches), 10, batches)
        self.insert("innocent")
        self.execute("update s2s.commands set due_at = '-infinity' where status = 'ready'")
        await self.until("done", "innocent")
        self.assertEqual(self.execute("select bool_or(runs_alone) from s2s.commands"), [(None,)])

    async def test_a_commit_that_is_refused_again(self) -> None:
        """The commands of a batch run alone if its COMMIT is refused although each passed the check of constraints."""
        self.patch(executor, "check_constraints", lambda txn: None)
        await self.test_what_fails_at_the_commit()
        self.assertEqual(self.execute("select idem_key from s2s.commands where runs_alone is not null"), [("twice",)])

    async def test_what_a_neighbour_leaves_behind(self) -> None:
        """A command that fails after others of its batch runs again before it is charged."""
        self.execute(
            "create table public.parents (id int primary key);"
            "create table public.children (parent int references parents deferrable initially deferred)"
        )
        self.insert("first", do="constraints")
        self.insert("innocent", do="child first")
        self.insert("guilty", do="raise")
        self.start()
        await self.until("done", "first", "innocent")
        await poll(lambda: self.attempts()["guilty"], "the charge")
        self.assertEqual(self.attempts(), {"first": 0, "innocent": 0, "guilty": 1})
        self.assertEqual(sorted(self.effects()), ["first", "innocent"])

    async def test_a_row_that_cannot_be_changed(self) -> None:
        """Commands whose row a trigger protects are named, take no effect, and do not delay others."""
        self.execute(
            "create function guard() returns trigger language plpgsql set search_path from current as $$ begin"
            " if new.idem_key = 'kept' then return null; end if;"
            " if new.idem_key like 'old%' then return old; end if;"
            " if new.idem_key = 'refused' or new.status = 'dead' then raise exception 'not this one'; end if;"
            " return new; end $$;"
            "create trigger guard before update on s2s.commands for each row execute function guard()"
        )
        self.patch(poll_loop, "LEFT_OUT_S", 2.0)
        self.insert("kept", "old", "refused", "a")
        self.insert("old-2", do="raise")
        self.insert("kept-2", do="raise", attempts=9)
        self.insert("largest", do="raise", attempts=2**31 - 1)
        self.insert("b")
        with capturedLogs() as told:
            running = self.start()
            await self.until("done", "a", "b")
            await poll(lambda: "6 commands" in running.condition, "all to be left out")
        lines = [str(formatEvent(event)) for event in told]
        for key, why in (
            ("kept", KEPT),
            ("old", KEPT),
            ("old-2", KEPT),
            ("refused", "not this one"),
            ("kept-2", "not this one"),
        ):
            [(cmd_id,)] = self.execute("select cmd_id from s2s.commands where idem_key = %s", key)
            self.assertEqual(len([line for line in lines if f"command {cmd_id}: {why}" in line]), 1, lines)
        self.assertEqual(sorted(self.effects()), ["a", "b"])
        self.assertEqual(self.attempts()["kept"], 0)
        self.execute("drop trigger guard on s2s.commands")
        await self.until("done", "kept", "old", "refused")
        await self.until("dead", "kept-2", "largest")

    async def test_a_publication_without_an_identity(self) -> None:
        """If a publication keeps all rows from being changed, one line has the cure, and no command is charged."""
        self.execute("alter table s2s.commands replica identity nothing; create publication everything for all tables")
        self.insert(*"abcd")
        with capturedLogs() as told:
            running = self.start()
            counts = self.database.troubles.counts
            await poll(lambda: sum(counts.values()) > 8, "some attempts")
        lines = [str(formatEvent(event)) for event in told]
        [line] = [each for each in lines if "replica identity" in each]
        self.assertIn("alter table NAME replica identity default, or take the table out of its publication", line)
        self.assertEqual((self.attempts(), running.failed), (dict.fromkeys("abcd", 0), 0))
        self.execute("alter table s2s.commands replica identity default")
        await self.until("done", *"abcd")

    async def test_too_many_rows_that_cannot_be_changed(self) -> None:
        """If the limit of left-out commands is reached, the next one is tried once in a pause, and not in a loop."""
        self.patch(poll_loop, "MOST_LEFT_OUT", 1)
        self.patch(poll_loop, "POLL_S", 0.2)
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as $$ begin"
            " return null; end $$"
        )
        self.execute("create trigger keep before update on s2s.commands for each row execute function keep()")
        ran: list[int] = []
        self.single.before = lambda: ran.append(1)
        self.insert("a", "b", "c", do="before")
        self.start()
        await poll(lambda: len(ran) > 6, "some tries")
        before = len(ran)
        await deferLater(reactor, 0.5)
        self.assertLessEqual(len(ran) - before, 6)

    async def test_a_handler_that_exits(self) -> None:
        """A handler that raises SystemExit is charged, and no thread or process ends."""
        self.insert("a", do="exit")
        self.insert("z")
        self.start()
        await self.until("done", "z", rush=True)
        await self.until("dead", "a", rush=True)
        self.flushLoggedErrors()

    async def test_a_lost_connection_charges_nobody(self) -> None:
        """If the connection ends during a batch, nothing takes effect or is charged, and all commands run again."""
        ended: list[int] = []

        def end_once() -> None:
            if not ended:
                ended.append(1)
                self.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-run handlers'"
                )

        self.single.before = end_once
        self.insert("a", "b")
        self.insert("c", do="before")
        self.start()
        await self.until("done", "a", "b", "c")
        self.assertEqual(sorted(self.effects()), ["a", "b", "c"])
        self.assertEqual(self.execute("select sum(attempts)::int from s2s.commands"), [(0,)])
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_a_command_that_ends_its_connection(self) -> None:
        """A command that always ends its own connection is charged in the end, and does not delay others."""
        self.patch(executor, "LOSSES", 2)
        self.single.before = lambda: self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-run handlers'"
            " and state = 'idle in transaction'"
        )
        self.insert("bad", do="before", priority=1)
        self.insert("a", "b")
        # Commands that other processes have run since are forgotten.
        self.patch(executor, "_MOST_SUSPECTS", 5)
        running = self.start()
        running._losses.update(range(-5, 0))
        await self.until("done", "a", "b")
        self.execute("update s2s.commands set attempts = 9, due_at = now() where idem_key = 'bad'")
        # Commands that arrive meanwhile, and run before it, do not keep it from being charged.
        for number in range(30):
            self.insert(f"urgent {number}", priority=0)
            await self.until("done", f"urgent {number}")
        await self.until("dead", "bad")
        self.assertEqual(sorted(self.effects())[:2], ["a", "b"])
        self.assertEqual(len(self.effects()), 32)
        self.assertEqual(self.execute("select idem_key from s2s.commands where idem_key <> 'bad' and attempts > 0"), [])

    async def test_a_handler_that_ends_the_transaction(self) -> None:
        """A handler that rolls the transaction back is charged, and the work of its neighbours is not lost."""
        self.insert("a", "b")
        self.insert("bad", do="rollback")
        self.insert("c")
        running = self.start()
        await self.until("done", "a", "b", "c", rush=True)
        await running.stop()
        self.assertEqual(sorted(self.effects()), ["a", "b", "c"])
        self.assertGreater(self.attempts()["bad"], 0)
        self.assertEqual({self.attempts()[key] for key in "abc"}, {0})

    async def test_what_is_locked_holds_up_nobody(self) -> None:
        """Commands locked by another session are skipped, without a busy loop, and others run."""
        self.insert("held", "held too", attempts=1)
        holding = psycopg2.connect(self.url)
        self.addCleanup(holding.close)
        holding.cursor().execute("select * from s2s.commands for update")
        self.insert("a", "b", attempts=1)
        self.start(workers=2)
        await self.until("done", "a", "b")
        before = self.database_calls()
        await deferLater(reactor, 0.5)
        self.assertLess(self.database_calls() - before, 60)
        holding.rollback()
        await self.until("done", "held", "held too")

    def database_calls(self) -> int:
        """Return the number of transactions in this database."""
        self.execute("select pg_stat_clear_snapshot()")
        return int(self.execute("select xact_commit from pg_stat_database where datname = current_database()")[0][0])

    async def test_what_a_hung_process_has_in_hand(self) -> None:
        """An overdue claim of a living process is charged, unless its commands are locked."""
        self.insert("a", "b")
        self.note("hung", "a", "b")
        self.be_present("hung")
        self.patch(claims, "OVERSTAY_S", 1.0)
        self.start()
        self.be_present("boot-1")
        await self.until("done", "a", "b", rush=True)
        self.assertEqual(self.attempts(), {"a": 1, "b": 1})
        self.assertEqual(
            self.execute("select distinct error from s2s.commands"),
            [("Stuck: the process did not finish this command's batch in time",)],
        )

    async def test_a_lost_connection_that_a_handler_makes_its_own(self) -> None:
        """A handler that converts the loss of the connection to its own exception is not charged."""
        ended: list[int] = []

        def end_once() -> None:
            if not ended:
                ended.append(1)
                self.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-run handlers'"
                )

        self.single.before = end_once
        self.insert("a", do="mask")
        self.start()
        await self.until("done", "a")
        self.assertEqual(self.attempts(), {"a": 0})
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_a_deadlock_is_charged(self) -> None:
        """A handler's own deadlock costs it an attempt, is retried, and affects no other command."""
        self.insert("a", do="deadlock")
        self.insert("z")
        self.start()
        await self.until("done", "z")
        await poll(lambda: self.attempts() == {"a": 1, "z": 0}, "the charge")
        self.assertEqual(self.statuses()["a"], "ready")
        self.assertEqual(self.effects(), ["z"])

    async def test_a_handler_that_is_gone(self) -> None:
        """Commands of a type that this process does not serve are not changed, and do not delay others."""
        self.insert("gone", "gone too", cmd_type="test.removed")
        untouched = "select *, xmin from s2s.commands where cmd_type = 'test.removed' order by cmd_id"
        before = self.execute(untouched)
        self.insert("a")
        self.start()
        await self.until("done", "a")
        self.assertEqual(self.execute(untouched), before)

    async def test_what_a_dead_process_had_in_hand(self) -> None:
        """The commands in the claim of a dead process are charged one attempt each, then run singly, each once."""
        self.insert("a", "b")
        self.note("dead", "a", "b")
        self.be_present("boot-1")
        running = self.start(workers=2)
        await self.until("done", "a", "b", rush=True)
        self.assertEqual(sorted(self.effects()), ["a", "b"])
        self.assertEqual(self.execute("select attempts from s2s.commands"), [(1,), (1,)])
        self.assertEqual(self.execute("select * from s2s.batch_notes where boot_id = 'dead'"), [])
        self.assertEqual(running.failed, 2)

    async def test_what_a_living_process_has_in_hand(self) -> None:
        """The claim of another living process is not touched."""
        self.insert("theirs", "lost", "ours")
        self.be_present("alive")
        self.be_present("boot-1")
        self.note("alive", "theirs")
        self.note("dead", "lost")
        self.start()
        await self.until("done", "ours")
        await self.until("done", "lost", rush=True)
        self.assertEqual((self.statuses()["theirs"], self.attempts()["theirs"]), ("ready", 0))

    async def test_a_restart_of_the_database_charges_nobody(self) -> None:
        """If all presence locks are lost at once, a living process has time to return before it is charged."""
        self.insert("theirs")
        theirs, ours = self.be_present("alive"), self.be_present("boot-1")
        self.note("alive", "theirs")
        running = self.start()
        await poll(lambda: running._reaper._presence, "a look")
        before = running._reaper._presence
        theirs.close()
        await poll(lambda: running._reaper._forsaken, "the suspicion")
        ours.close()
        await poll(lambda: running._reaper._presence is None, "a look without a presence of its own")
        self.assertEqual(running._reaper._forsaken, {})
        # The suspicion begins anew here, and the process returns in time.
        looks: list[int] = []
        real = claims.reap
        self.patch(claims, "reap", lambda *args: looks.append(1) or real(*args))
        self.patch(reaper, "SURE_S", 60.0)
        self.be_present("boot-1")
        await poll(lambda: running._reaper._forsaken and len(looks) > 5, "some looks under suspicion")
        self.assertNotEqual(running._reaper._presence, before)
        # A new presence of the reaper itself, without any gap, resets the suspicion too.
        ((_, since),) = running._reaper._forsaken.items()
        running._reaper._presence = before
        await poll(lambda: running._reaper._presence != before, "the next look")
        self.assertGreater(*running._reaper._forsaken.values(), since)
        self.be_present("alive")
        await poll(lambda: not running._reaper._forsaken, "the acquittal")
        self.assertEqual(self.attempts(), {"theirs": 0})

    async def test_claims_only_while_present(self) -> None:
        """Without its presence lock an executor claims and runs nothing; with the lock it continues by itself."""
        present: list[int] = []
        looked: list[int] = []
        self.insert("a")
        running = self.start(is_present=lambda: looked.append(1) or bool(present))
        running.wake()
        await poll(lambda: len(looked) > 3, "some looks")
        self.assertEqual((self.execute("select * from s2s.batch_notes"), self.statuses()), ([], {"a": "ready"}))
        present.append(1)
        await self.until("done", "a")

    async def test_the_size_of_a_batch_may_change(self) -> None:
        """A new size is in force from the next batch on."""
        running = self.start(batch_size=2)
        self.insert(*"abcd", cmd_type="test.batched")
        await self.until("done", *"abcd")
        running.batch_size = 4
        self.insert(*"efghijkl", cmd_type="test.batched")
        await self.until("done", *"efghijkl")
        self.assertEqual(self.batched.sizes[:2], [2, 2])
        # A look that was under way may still take two.
        self.assertIn(4, self.batched.sizes[2:4])

    async def test_stop_finishes_the_batch(self) -> None:
        """A stop waits for the running batch; later commands are left."""
        running: list[Executor] = []
        stopped: list[Any] = []

        def stop() -> None:
            from twisted.internet import reactor

            reactor.callFromThread(lambda: stopped.append(running[0].stop()))

        self.single.before = stop
        self.insert("a", do="before")
        running.append(self.start())
        await poll(lambda: stopped, "the stop")
        await stopped[0]
        self.assertEqual(self.statuses(), {"a": "done"})
        self.insert("b")
        running[0].wake()
        self.assertEqual(self.statuses()["b"], "ready")

    async def test_stop_leaves_no_note(self) -> None:
        """A batch that ended because the database was away has no claim after the stop, and is not charged."""
        self.patch(poll_loop, "POLL_S", 60.0)
        self.insert("a", do="before")
        self.single.before = lambda: self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s-run handlers'"
        )
        running = self.start()
        await poll(lambda: running._loop._asleep, "the failure")
        self.assertEqual(len(self.execute("select * from s2s.batch_notes")), 1)
        await running.stop()
        self.assertEqual(self.execute("select * from s2s.batch_notes"), [])
        self.assertEqual(self.attempts(), {"a": 0})

    async def test_abandon_without_the_database(self) -> None:
        """If the claims cannot be released the stop goes on, and logs the consequence."""
        running = self.start()
        self.patch(self.database, "url", "postgresql://u@127.0.0.1:1/d")
        with capturedLogs() as said:
            await running.abandon()
            await running.stop()
        self.assertEqual(
            [event["log_level"].name for event in said if "were not released" in event["log_format"]], ["warn"] * 2
        )

    async def assert_cut(self, *, ended: bool) -> Executor:
        """Abandon the running executor as a stop does, and assert that nothing took effect or was charged."""
        running = self.start(workers=2)
        await poll(lambda: len(self.execute("select * from s2s.batch_notes")) > 0, "the batch")
        await poll(self.is_under_way, "the handler")
        stopped = running.stop()
        self.assertEqual(await self.handlers.cancel(), ended)
        self.assertTrue(await self.database.cancel())
        await running.abandon()
        if ended:
            await stopped
        # A command that a thread still holds is counted later.
        self.assertEqual(self.execute("select * from s2s.batch_notes where %s or not stopped", ended), [])
        self.assertEqual(set(self.attempts().values()), {0})
        self.assertEqual(set(self.statuses().values()), {"ready"})
        self.assertEqual(self.effects(), [])
        self.assertEqual(self.flushLoggedErrors(), [])
        return running

    def is_under_way(self) -> bool:
        """Return whether a handler sleeps in the database."""
        return bool(self.execute("select 1 from pg_stat_activity where wait_event = 'PgSleep'"))

    async def test_cancelled(self) -> None:
        """After the grace a long statement is cancelled and rolled back with its batch, and nothing is charged."""
        self.insert("a")
        # Too many statements to be cancelled one after another.
        self.insert(*(f"b{number}" for number in range(50)), do="sleep")
        await self.assert_cut(ended=True)

    async def test_a_handler_that_swallows_the_cancelling(self) -> None:
        """A handler that catches the cancellation, repairs its transaction and goes on is rolled back nevertheless."""
        self.insert("a", do="sleep on")
        self.insert("b", do="sleep on", cmd_type="test.batched")
        await self.assert_cut(ended=True)

    async def test_a_handler_in_python(self) -> None:
        """A handler in Python delays neither the cancellation nor the shutdown transaction, and commits nothing."""
        gate, inside = threading.Event(), threading.Event()
        self.addCleanup(gate.set)

        def sit() -> None:
            inside.set()
            gate.wait(10)

        self.single.before = sit
        self.is_under_way = inside.is_set
        self.patch(pool, "CANCEL_S", 0.2)
        self.insert("a", do="before")
        running = await self.assert_cut(ended=False)
        gate.set()
        await running.stop()
        self.assertEqual((self.statuses(), self.effects()), ({"a": "ready"}, []))

    async def test_the_accused(self) -> None:
        """Commands that a reaper took out of a living process's claim are not run or charged again by that process."""
        self.insert("a", "b", "c")
        ids = dict(self.execute("select idem_key, cmd_id from s2s.commands"))
        running = self.start(workers=0)
        self.note("boot-1", "b")
        report = await self.handlers.run(running._run, 0, list(ids.values()))
        self.assertEqual(report.done, [ids["b"]])
        self.assertEqual(self.execute("select * from s2s.batch_notes"), [])
        self.note("boot-1", "c")
        report = await self.database.run(executor._charge, "boot-1", 0, list(ids.values()), "late")
        self.assertEqual(report.failed, [Charge(ids["c"], "late")])
        report = await self.handlers.run(running._run, 0, list(ids.values()))
        self.assertEqual(report, executor.Report())
        self.assertEqual(self.attempts(), {"a": 0, "b": 0, "c": 1})

    async def test_what_a_reaper_charges(self) -> None:
        """The reaper charges only claims that are sure, under the same presence, unlocked, and each once."""
        self.insert("a", "b")
        note = self.note("dead", "a", "b")
        running = self.start(workers=0)

        async def reap(presence: Any, *sure: claims.Claim) -> claims.Scan:
            return await self.database.run(claims.reap, "boot-1", presence, set(sure))

        self.assertEqual(await reap(None, note), claims.Scan(None))
        ours = self.be_present("boot-1")
        look = await reap(None, note)
        self.assertEqual((look.orphaned, look.charged), ({note}, 0))
        # The claim is not sure yet, or is of an earlier batch.
        self.assertEqual((await reap(look.presence)).charged, 0)
        earlier = note._replace(noted_at=note.noted_at.replace(year=2000))
        self.assertEqual((await reap(look.presence, earlier)).charged, 0)
        # The connection of the dead process closes slowly.
        closing = psycopg2.connect(self.url)
        self.addCleanup(closing.close)
        closing.cursor().execute("select * from s2s.commands where idem_key = 'b' for update")
        self.assertEqual((await reap(look.presence, note)).charged, 1)
        self.assertEqual(self.attempts(), {"a": 1, "b": 0})
        closing.close()
        # Another reaper is active.
        ours.cursor().execute("select pg_advisory_lock(%s)", (claims._REAPING,))
        self.assertEqual((await reap(look.presence, note)).charged, 0)
        ours.cursor().execute("select pg_advisory_unlock(%s)", (claims._REAPING,))
        await poll(lambda: self.execute("select 1 from pg_locks where mode = 'RowShareLock'") == [], "the closing")
        self.assertEqual((await reap(look.presence, note)).charged, 1)
        self.assertEqual((await reap(look.presence, note)).orphaned, set())
        self.assertEqual(self.attempts(), {"a": 1, "b": 1})
        self.assertEqual(self.execute("select * from s2s.batch_notes"), [])
        await running.stop()

    async def test_a_reaper_that_fails(self) -> None:
        """A reaper that fails twice in a row logs that once, with the cure; a claim below first_note is not read."""
        self.insert("a")
        note = self.note("dead", "a")
        [(note_id,)] = self.execute("select note_id from s2s.batch_notes")
        running = self.start(workers=0)
        self.be_present("boot-1")
        look = await self.database.run(claims.reap, "boot-1", None, set(), note_id)
        self.assertEqual(look.orphaned, {note})
        look = await self.database.run(claims.reap, "boot-1", None, set(), note_id + 1)
        self.assertEqual(look.orphaned, set())
        self.patch(claims, "reap", lambda txn, *_: txn.execute("set local statement_timeout = 1; select pg_sleep(60)"))
        failing = reaper.Reaper(self.database, "boot-1", lambda *_: None, reactor)
        with capturedLogs() as told:
            for _ in range(4):
                await failing._look()
        lines = [str(formatEvent(event)) for event in told]
        self.assertEqual(len([line for line in lines if "are not released" in line and "wait_event" in line]), 1, lines)
        await running.stop()

    async def test_what_a_reaper_cannot_charge(self) -> None:
        """A claim with a command that cannot be charged is removed uncharged, and does not delay other claims."""
        self.execute(
            "create function keep() returns trigger language plpgsql set search_path from current as"
            " $$ begin if new.idem_key = 'kept' then return null; end if; return new; end $$;"
            "create trigger keep before update on s2s.commands for each row execute function keep()"
        )
        self.insert("a", "kept", "b")
        first, second = self.note("dead", "a", "kept"), self.note("dead", "b", worker=1)
        running = self.start(workers=0)
        self.be_present("boot-1")
        look = await self.database.run(claims.reap, "boot-1", None, set())
        look = await self.database.run(claims.reap, "boot-1", look.presence, {first, second})
        self.assertEqual(look.charged, 1)
        self.assertEqual(self.attempts(), {"a": 0, "kept": 0, "b": 1})
        self.assertEqual(self.execute("select * from s2s.batch_notes"), [])
        await running.stop()

    async def test_off(self) -> None:
        """With no workers nothing runs, and start and stop work."""
        self.insert("a")
        running = self.start(workers=0)
        running.wake()
        await running.stop()
        self.assertEqual(self.statuses(), {"a": "ready"})


class TellingTests(SynchronousTestCase):
    """The text of an exception."""

    def test_one_line_that_the_table_can_hold(self) -> None:
        """The text is one line of at most 500 characters, without what PostgreSQL or UTF-8 cannot hold."""
        self.assertEqual(errors.one_line(KeyError("x" * 900))[:13], "KeyError: 'xx")
        self.assertEqual(len(errors.one_line(KeyError("x" * 900))), 500)
        self.assertEqual(errors.one_line(ValueError("a\0b\udc00\nc")), "ValueError: ab?")
