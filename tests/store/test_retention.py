"""Retention: bounded steps that remove old rows beside pushes, workers and other processes that remove rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import psycopg2
from twisted.internet import task
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, capturedLogs

from s2s.errors import IdemConflict
from s2s.handlers.commands import Command, CommandHandler, registry
from s2s.roles.server.inbox import Inbox
from s2s.roles.server.retention import FIRST_S, INTERVAL_S, TELL_S, Retention
from s2s.runtime.clock import Clock
from s2s.store import driver
from s2s.store.connection import PlanningConnection
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Cursor
from s2s.store.pool import Database, blocking
from s2s.store.tables import actions, commands, commands_admin, idempotency, retention
from s2s.store.tables.commands import Outcome, Push
from s2s.store.tables.retention import Keep
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_KEEP = Keep(days=7, dead_days=90, key_days=30)


def _pages(plan: dict[str, Any], index: str) -> int:
    """Count the pages that an index scan in a plan reads."""
    if plan.get("Index Name") == index:
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    return sum(_pages(part, index) for part in plan.get("Plans", []))


class _RetentionTestCase(DatabaseTestCase):
    def setUp(self) -> None:
        """Set the retention time to now, since the database is a copy of an older one."""
        super().setUp()
        self.execute("update s2s.database set retention_at = now()")

    def insert(self, key: str, status: str = "done", days: int = 8, *, ended: int | None = None) -> int:
        """Store a command with its key.

        :param days: its age.
        :param ended: days since it ended; its age by default.
        :returns: its cmd_id.
        """
        [(cmd_id,)] = self.execute(
            "with made as (insert into s2s.commands (cmd_type, idem_key, payload, status, created_at, finished_at)"
            " values ('test.run', %s, '{}', %s, now() - make_interval(days => %s), case when %s <> 'ready'"
            " then now() - make_interval(days => %s) end) returning cmd_id, idem_key)"
            " insert into s2s.idempotency_keys (idem_key, cmd_id, fingerprint)"
            " select idem_key, cmd_id, decode(repeat('00', 32), 'hex') from made returning cmd_id",
            key,
            status,
            days,
            status,
            days if ended is None else ended,
        )
        return int(cmd_id)

    def insert_key(self, key: str, expires: str = "- interval '1 hour'") -> None:
        """Store a key whose command has been removed.

        :param expires: the offset from now, in SQL.
        """
        self.execute(
            "insert into s2s.idempotency_keys (idem_key, cmd_id, fingerprint, status, expires_at)"
            f" values (%s, 7, decode(repeat('00', 32), 'hex'), 'done', now() {expires})",
            key,
        )

    def step(self, after: int = 0, keep: Keep = _KEEP) -> tuple[int, int | None]:
        """Run one step of the sweep of commands."""
        with blocking(self.url) as txn:
            retention.advance(txn)
            return retention.sweep_commands(txn, after, keep)

    def begin(self) -> Cursor:
        """Open a transaction on a connection of its own, which is closed when the test ends."""
        connection = psycopg2.connect(self.url)
        self.addCleanup(connection.close)
        return connection.cursor()

    def push(self, key: str) -> Outcome:
        """Push a command with a key."""
        with blocking(self.url) as txn:
            return driver.drive(txn, commands.push_batch([Push("test.run", key, bytes(32), "{}")]))[0]

    def left(self) -> list[str]:
        """Return the keys of the commands that remain."""
        return [key for (key,) in self.execute("select idem_key from s2s.commands order by cmd_id")]


class StepTests(_RetentionTestCase):
    """:mod:`s2s.store.tables.retention`."""

    def test_what_is_over(self) -> None:
        """Commands that ended long ago are removed, dead ones after their own period, and ready ones never."""
        for key, status, days, ended in (
            ("done", "done", 8, 8),
            ("cancelled", "cancelled", 8, 8),
            ("just ended", "done", 8, 6),
            ("dead", "dead", 8, 8),
            ("long dead", "dead", 91, 91),
            ("waits", "ready", 1000, 1000),
            ("young", "done", 6, 6),
        ):
            self.insert(key, status, days, ended=ended)
        self.insert("by hand")
        self.execute("update s2s.commands set finished_at = null where idem_key = 'by hand'")
        self.assertEqual(self.step(), (4, None))
        self.assertEqual(self.left(), ["just ended", "dead", "waits", "young"])
        self.assertEqual(
            self.execute(
                "select idem_key, status, round(extract(epoch from expires_at - now()) / 86400)::int"
                " from s2s.idempotency_keys where expires_at is not null order by 1"
            ),
            [("by hand", "done", 30), ("cancelled", "cancelled", 30), ("done", "done", 30), ("long dead", "dead", 30)],
        )

    def test_bounded_steps(self) -> None:
        """A step reads a bounded number of rows and returns where the next begins; a page of young rows is the end."""
        self.patch(retention, "STEP_ROWS", 3)
        ids = [self.insert(f"old{n}") for n in range(3)]
        stray = [self.insert("young stray", days=0), self.insert("waits", "ready"), self.insert("old3")]
        young = [self.insert(f"young{n}", days=1) for n in range(5)]
        self.assertEqual(self.step(), (3, ids[-1]))
        self.assertEqual(self.step(ids[-1]), (1, stray[-1]))
        self.assertEqual(self.step(stray[-1]), (0, None))
        self.assertEqual(self.step(young[-1]), (0, None))
        self.assertEqual(self.left(), ["young stray", "waits", *(f"young{n}" for n in range(5))])

    def test_nothing_is_kept(self) -> None:
        """With zero days a pass removes every finished command, and ready commands stay."""
        for status in ("done", "dead", "cancelled", "ready"):
            self.insert(status, status, 0)
        self.assertEqual(self.step(keep=Keep(0, 0, 1)), (3, None))
        self.assertEqual(self.left(), ["ready"])

    def test_a_step_costs_its_rows(self) -> None:
        """In a table of a hundred thousand commands a step reads only its own rows."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, status, finished_at)"
            " select 'test.run', 'f' || i, '{}', 'done', now() from generate_series(1, 100000) i"
        )
        self.execute("vacuum analyze s2s.commands")
        with blocking(self.url) as txn:
            self.assertEqual(retention.sweep_commands(txn, 50_000, _KEEP), (0, None))
            txn.execute("select seq_tup_read, idx_tup_fetch from pg_stat_xact_user_tables where relname = 'commands'")
            [(scanned, fetched)] = txn.fetchall()
        self.assertEqual(scanned, 0)
        self.assertLessEqual(fetched, 2 * retention.STEP_ROWS)

    def test_removed_beside_others(self) -> None:
        """A step skips rows that a worker or another sweep has locked, and does not wait."""
        self.insert("theirs")
        self.insert("mine")
        other = self.begin()
        other.execute("select from s2s.commands where idem_key = 'theirs' for update")
        self.assertEqual(self.step(), (1, None))
        self.assertEqual(retention.sweep_commands(other, 0, _KEEP), (1, None))
        self.assertEqual(self.step(), (0, None))
        other.connection.commit()
        self.assertEqual(self.left(), [])

    def test_what_is_retried_meanwhile(self) -> None:
        """A dead command that an operator retries during a sweep becomes ready and is not removed."""
        cmd_id = self.insert("dead", "dead", 91)
        operator = self.begin()
        actions.act(operator, commands_admin.RETRY, [cmd_id])
        self.assertEqual(self.step(), (0, None))
        operator.connection.commit()
        self.assertEqual(self.step(), (0, None))
        self.assertEqual(self.execute("select status from s2s.commands"), [("ready",)])

    def test_dead_keys(self) -> None:
        """While a snapshot is held, a step does not read the rows that earlier steps have removed."""
        with blocking(self.url) as holder:
            holder.execute("set transaction isolation level repeatable read; select 1")
            self.execute(
                "insert into s2s.idempotency_keys (idem_key, cmd_id, fingerprint, expires_at)"
                " select n::text, n, decode(repeat('00', 32), 'hex'), now() - n * interval '1 second'"
                " from generate_series(1, 10500) n"
            )
            self.execute("analyze s2s.idempotency_keys")
            with blocking(self.url) as txn:
                removed, since = 0, "-infinity"
                for _ in range(10):
                    count, following = retention.sweep_keys(txn, since)
                    txn.connection.commit()
                    removed, since = removed + count, following or since
                read = []
                for start in ("-infinity", since):
                    self.assertEqual(retention.sweep_keys(txn, start), (500, None))
                    txn.connection.rollback()
                    with mock.patch.object(retention, "_write", return_value=500):
                        retention.sweep_keys(txn, start)
                    statement = txn.query
                    txn.connection.rollback()
                    txn.execute(b"explain (analyze, buffers, format json) " + statement)
                    read.append(_pages(txn.fetchall()[0][0][0]["Plan"], "idempotency_keys_expires"))
                    txn.connection.rollback()
        self.assertEqual(removed, 10_000)
        self.assertLess(read[1], read[0] / 3)

    def test_expired_keys(self) -> None:
        """A step removes a bounded number of expired keys; other keys and those of existing commands stay."""
        self.patch(retention, "STEP_ROWS", 2)
        self.insert("alive", "ready")
        for key in "abc":
            self.insert_key(key)
        self.insert_key("later", "+ interval '1 minute'")
        with blocking(self.url) as txn:
            self.assertEqual([retention.sweep_keys(txn)[0] for _ in range(3)], [2, 1, 0])
        self.assertEqual(self.execute("select idem_key from s2s.idempotency_keys order by 1"), [("alive",), ("later",)])

    def test_old_steering(self) -> None:
        """A step removes a bounded number of control requests older than a week."""
        self.patch(retention, "STEP_ROWS", 2)
        self.execute(
            "insert into s2s.steering (engine, type, payload, created_at, expires_at)"
            " select 'e', 'test', '{}', now() - make_interval(days => d), now() from unnest(array[9, 8, 8, 6, 0]) d"
        )
        with blocking(self.url) as txn:
            first, after = retention.sweep_steering(txn)
            self.assertEqual([first, retention.sweep_steering(txn, after or 0)[0]], [2, 1])
        self.assertEqual(self.execute("select count(*) from s2s.steering"), [(2,)])

    def test_health_checks(self) -> None:
        """Health checks of absent clients are removed after 10 minutes, also behind other requests."""
        self.patch(retention, "STEP_ROWS", 2)
        self.execute(
            "insert into s2s.steering (engine, type, payload, created_at, expires_at)"
            " select 'e', t, '{}', now() - m * interval '1 minute', now() from unnest(%s::text[], %s::int[]) r (t, m)",
            [*["s2s.engine.pause"] * 3, "s2s.health.check", "s2s.engine.pause", "s2s.health.check"],
            [90, 90, 90, 20, 20, 1],
        )
        removed, after = 0, 0
        with blocking(self.url) as txn:
            while after is not None:
                count, after = retention.sweep_steering(txn, after)
                removed += count
        self.assertEqual(removed, 1)
        [(left,)] = self.execute("select count(*) from s2s.steering where type = 's2s.health.check'")
        self.assertEqual(left, 1)

    def test_rows_that_stay(self) -> None:
        """Only rows that a foreign key or a trigger protects stay, even if they fill a whole step."""
        self.patch(retention, "STEP_ROWS", 2)
        held = [self.insert(f"held{n}") for n in range(2)]
        self.insert("free")
        for key in ("stays1", "stays2", "gone"):
            self.insert_key(key)
        self.execute(
            "create table public.t (cmd_id bigint references s2s.commands);"
            f"insert into public.t values ({held[0]}), ({held[1]});"
            "create table public.u (idem_key text references s2s.idempotency_keys deferrable initially deferred);"
            "insert into public.u values ('stays1'), ('stays2');"
            "create function public.keep() returns trigger language plpgsql as"
            " $$ begin if old.engine = 'kept' then raise 'not this one'; end if; return old; end $$;"
            "create trigger keep before delete on s2s.steering for each row execute function public.keep();"
            "insert into s2s.steering (engine, type, payload, created_at, expires_at) select e, 'test', '{}',"
            " now() - interval '8 days', now() from unnest(array['kept', 'kept', 'e']) e"
        )
        works: list[tuple[Callable[[Cursor, Any], tuple[int, Any]], Any]] = [
            (lambda txn, after: retention.sweep_commands(txn, after, _KEEP), 0),
            (retention.sweep_keys, "-infinity"),
            (retention.sweep_steering, 0),
        ]
        database = psycopg2.connect(self.url, connection_factory=PlanningConnection)
        self.addCleanup(database.close)
        for sweep, first in works:
            after = first
            while after is not None:
                with database.cursor(cursor_factory=StoreCursor) as txn:
                    _, after = sweep(txn, after)
                database.commit()
        told = {str(each) for each in database.kept}
        self.assertEqual(len(told), 3, told)
        self.assertTrue(any("t_cmd_id_fkey" in each for each in told), told)
        self.assertTrue(any("not this one; see trigger keep on s2s.steering" in each for each in told), told)
        self.assertEqual(self.left(), ["held0", "held1"])
        keys = self.execute("select idem_key from s2s.idempotency_keys where idem_key !~ 'held|free' order by 1")
        self.assertEqual(keys, [("stays1",), ("stays2",)])
        self.assertEqual(self.execute("select engine from s2s.steering"), [("kept",), ("kept",)])

    def test_what_is_set(self) -> None:
        """The retention periods are the settings, or the defaults if there is no setting."""
        with blocking(self.url) as txn:
            txn.execute("delete from s2s.config")
            self.assertEqual(retention.keep(txn), _KEEP)
            txn.execute("insert into s2s.config (key, value, type) values ('commands.keep_dead_days', '1', 'integer')")
            self.assertEqual(retention.keep(txn), Keep(7, 1, 30))


class RaceTests(_RetentionTestCase):
    """A push of a key while the key or its command is swept."""

    async def push_behind(self, key: str, end: Callable[[], None]) -> Outcome:
        """Push while another transaction holds the key, and call ``end`` once the push waits for that transaction."""
        pushing = deferToThread(self.push, key)
        waiting = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        await poll(lambda: self.execute(waiting) or pushing.called, "the push waits for the sweep")
        self.assertFalse(pushing.called)
        end()
        return await pushing

    async def test_the_key_is_being_swept(self) -> None:
        """A push that meets its expired key during the removal makes a new command."""
        self.insert_key("k")
        sweep = self.begin()
        self.assertEqual(retention.sweep_keys(sweep), (1, None))
        outcome = await self.push_behind("k", sweep.connection.commit)
        self.assertTrue(outcome.is_new)
        self.assertEqual(
            self.execute(
                "select c.cmd_id, k.expires_at from s2s.commands c join s2s.idempotency_keys k using (cmd_id, idem_key)"
            ),
            [(outcome.cmd_id, None)],
        )

    async def test_the_sweep_is_rolled_back(self) -> None:
        """If the removal is rolled back, the push is a duplicate of the earlier command."""
        self.insert_key("k")
        sweep = self.begin()
        self.assertEqual(retention.sweep_keys(sweep), (1, None))
        self.assertEqual(await self.push_behind("k", sweep.connection.rollback), Outcome(7, "done"))

    def test_the_key_was_swept_in_between(self) -> None:
        """A push whose key is swept after the insert found it and before the key is read makes a new command."""
        self.insert_key("k")
        self.insert_key("other", "+ interval '1 hour'")
        real = idempotency.firsts

        def swept_before(keys: list[str]) -> Any:
            with blocking(self.url) as sweep:
                retention.sweep_keys(sweep)
            return real(keys)

        with mock.patch.object(idempotency, "firsts", swept_before), blocking(self.url) as txn:
            pushes = [Push("test.run", key, bytes(32), "{}") for key in ("other", "k", "k")]
            other, first, again = driver.drive(txn, commands.push_batch(pushes))
        self.assertEqual(other, Outcome(7, "done"))
        self.assertTrue(first.is_new)
        self.assertEqual(again, Outcome(first.cmd_id, "ready"))
        self.assertEqual(self.execute("select cmd_id, idem_key from s2s.commands"), [(first.cmd_id, "k")])

    async def test_the_command_is_being_swept(self) -> None:
        """A push that meets its key during the removal of the command gets the command's final status."""
        cmd_id = self.insert("k", "cancelled")
        sweep = self.begin()
        self.assertEqual(retention.sweep_commands(sweep, 0, _KEEP), (1, None))
        self.assertEqual(await self.push_behind("k", sweep.connection.commit), Outcome(cmd_id, "cancelled"))
        self.assertEqual(self.left(), [])


class _Test(CommandHandler):
    """Accepts any payload."""

    cmd_type = "test.run"
    schema = {"type": "object"}

    def run(self, txn: Cursor, command: Command) -> None:
        """Do nothing."""


class TaskTests(_RetentionTestCase):
    """:class:`Retention` on a real database."""

    def setUp(self) -> None:
        """Start a pool and make the retention task."""
        super().setUp()
        self.database = Database(self.url, threads=1)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.scheduler = task.Clock()
        self.keep = _KEEP
        self.retention = Retention(self.database, Clock(self.scheduler), lambda: self.keep)
        self.addCleanup(self.retention.stop)

    async def pass_once(self, after_s: float) -> None:
        """Advance the clock by these seconds, and wait until the pass that is due then has ended."""
        self.scheduler.advance(after_s)
        await poll(self.scheduler.getDelayedCalls, "the next pass is planned")

    async def test_a_clock_in_doubt(self) -> None:
        """While the database's clock is in doubt, no row is removed, and one log line reports that."""
        is_trusted = False
        doubtful = Retention(self.database, Clock(self.scheduler), lambda: self.keep, lambda: is_trusted)
        self.addCleanup(doubtful.stop)
        self.insert("old")
        with capturedLogs() as logs:
            doubtful.start()
            await self.pass_once(FIRST_S)
            await self.pass_once(INTERVAL_S)
            self.assertEqual(self.left(), ["old"])
            is_trusted = True
            await self.pass_once(INTERVAL_S)
        self.assertEqual(self.left(), [])
        told = [each["text"] for each in logs if "text" in each]
        self.assertEqual(told, ["nothing old is removed while the database's clock is in doubt"])

    async def test_far_behind(self) -> None:
        """After an outage or a clock jump the retention time catches up, and one log line reports the lag."""
        self.execute("update s2s.database set retention_at = now() - interval '1 day'")
        with capturedLogs() as logs:
            self.retention.start()
            await self.pass_once(FIRST_S)
            await self.pass_once(INTERVAL_S)
        [told] = [each["text"] for each in logs if "text" in each]
        self.assertIn("behind the database's clock", told)
        [(behind,)] = self.execute("select round(extract(epoch from now() - retention_at) / 3600) from s2s.database")
        self.assertEqual(behind, 22)

    async def test_a_doubt_that_lasts(self) -> None:
        """Each doubt is logged when it begins, also after another one, and once a day while it lasts."""
        is_trusted = False
        doubtful = Retention(self.database, Clock(self.scheduler), lambda: self.keep, lambda: is_trusted)
        self.addCleanup(doubtful.stop)
        self.execute("update s2s.database set retention_at = now() - interval '400 days'")
        with capturedLogs() as logs:
            doubtful.start()
            await self.pass_once(FIRST_S)
            is_trusted = True
            for _ in range(3):
                await self.pass_once(INTERVAL_S)
            await self.pass_once(TELL_S)
        told = [each["text"][:14] for each in logs if "text" in each]
        self.assertEqual(told, ["nothing old is", *["retention is 3"] * 2])

    async def test_passes(self) -> None:
        """The first pass runs after a minute, later ones every ten minutes; each removes and counts all old rows."""
        self.patch(retention, "STEP_ROWS", 2)
        self.retention.start()
        self.scheduler.advance(FIRST_S - 1)
        for number in range(5):
            self.insert(f"k{number}")
            self.insert_key(f"expired{number}")
        with capturedLogs() as logged:
            await self.pass_once(1)
            self.assertEqual((self.left(), self.retention.commands, self.retention.keys), ([], 5, 5))
            self.insert("another")
            self.scheduler.advance(INTERVAL_S - 1)
            self.assertEqual(self.left(), ["another"])
            await self.pass_once(1)
            await self.pass_once(INTERVAL_S)
        self.assertEqual((self.left(), self.retention.commands, self.retention.keys), ([], 6, 5))
        self.assertEqual(len([event for event in logged if "removed" in (event["log_format"] or "")]), 2)

    async def test_a_swept_command_is_a_duplicate(self) -> None:
        """A push of a swept command is answered with its cmd_id and last status, and conflicts as before."""
        inbox = Inbox(self.database, registry([_Test()]))
        push = {"cmd_type": "test.run", "idem_key": "k", "payload": {"n": 1}}
        first = await inbox.push(push)
        self.execute("update s2s.commands set status = 'dead', created_at = now() - interval '91 days'")
        self.retention.start()
        await self.pass_once(FIRST_S)
        self.assertEqual(self.left(), [])
        again = await inbox.push(push)
        self.assertEqual(again, {"accepted": True, "duplicate": True, "cmd_id": first["cmd_id"], "status": "dead"})
        conflict = await self.assertFailure(inbox.push({**push, "payload": {"n": 2}}), IdemConflict)
        self.assertEqual(conflict.details["cmd_id"], first["cmd_id"])
        self.execute("update s2s.idempotency_keys set expires_at = now()")
        await self.pass_once(INTERVAL_S)
        anew = await inbox.push(push)
        self.assertFalse(anew["duplicate"])
        self.assertGreater(anew["cmd_id"], first["cmd_id"])

    async def test_the_settings_are_asked_each_time(self) -> None:
        """Changed retention periods apply from the next pass on."""
        self.insert("k", days=3)
        self.retention.start()
        await self.pass_once(FIRST_S)
        self.assertEqual(self.left(), ["k"])
        self.keep = Keep(2, 90, 30)
        await self.pass_once(INTERVAL_S)
        self.assertEqual(self.left(), [])

    async def test_two_servers_at_once(self) -> None:
        """Two servers that run passes at the same time remove each row once."""
        self.patch(retention, "STEP_ROWS", 10)
        for number in range(60):
            self.insert(f"k{number}")
        other_database = Database(self.url, threads=1)
        other_database.start()
        self.addCleanup(other_database.stop)
        other = Retention(other_database, Clock(self.scheduler), lambda: _KEEP)
        self.addCleanup(other.stop)
        other.start()
        self.retention.start()
        self.scheduler.advance(FIRST_S)
        await poll(lambda: len(self.scheduler.getDelayedCalls()) == 2, "both passes are over")
        self.assertEqual((self.left(), self.retention.commands + other.commands), ([], 60))

    async def test_the_database_is_away(self) -> None:
        """Without a database a pass logs one line and ends, and the next pass removes the remaining rows."""
        self.insert("k")
        await self.database.stop()
        self.retention.start()
        with capturedLogs() as logged:
            await self.pass_once(FIRST_S)
        self.assertEqual([event["log_level"] for event in logged if event.get("why")], [LogLevel.warn])
        self.database.start()
        await self.pass_once(INTERVAL_S)
        self.assertEqual(self.left(), [])

    async def test_a_pass_that_fails(self) -> None:
        """A pass that fails through our own error is logged with its traceback, and the next pass is scheduled."""
        self.keep = Keep("no number", 90, 30)  # type: ignore[arg-type]
        self.retention.start()
        await self.pass_once(FIRST_S)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
        self.insert("k")
        self.keep = _KEEP
        await self.pass_once(INTERVAL_S)
        self.assertEqual(self.left(), [])

    async def test_sweeps_fail_alone(self) -> None:
        """A sweep that fails stops no other sweep, and is logged in one line without a traceback."""
        self.insert("k")
        self.insert_key("expired")
        self.execute("alter table s2s.commands rename column finished_at to over_at")
        self.retention.start()
        with capturedLogs() as logged:
            await self.pass_once(FIRST_S)
        self.assertEqual(self.execute("select idem_key from s2s.idempotency_keys"), [("k",)])
        told = [event["why"] for event in logged if "why" in event]
        self.assertEqual(len(told), 1, told)
        self.assertIn("finished_at", told[0])

    async def test_rows_that_stay(self) -> None:
        """The log names the constraint that keeps old rows, without a traceback."""
        self.insert("held")
        self.insert("free")
        self.execute(
            "create table public.t (cmd_id bigint references s2s.commands);"
            "insert into public.t select min(cmd_id) from s2s.commands"
        )
        self.retention.start()
        with capturedLogs() as logged:
            await self.pass_once(FIRST_S)
        self.assertEqual(self.left(), ["held"])
        self.assertIn("t_cmd_id_fkey", self.database.kept)
        told = [each for each in logged if each["log_level"] == LogLevel.error]
        self.assertEqual(len(told), 1, told)

    async def test_stop(self) -> None:
        """A stop during a step finishes that step and begins no other; a stop before the first pass prevents it."""
        self.patch(retention, "STEP_ROWS", 1)
        for key in "ab":
            self.insert(key)
        other = self.begin()
        other.execute("lock table s2s.commands")
        self.retention.start()
        self.scheduler.advance(FIRST_S)
        await poll(
            lambda: self.execute("select 1 from pg_stat_activity where wait_event_type = 'Lock'"), "the step waits"
        )
        stopped = self.retention.stop()
        self.assertNoResult(stopped)
        other.connection.rollback()
        await stopped
        self.assertEqual((self.left(), self.retention.commands), (["b"], 1))
        self.assertEqual(self.scheduler.getDelayedCalls(), [])
        self.retention.start()
        await self.retention.stop()
        self.assertEqual(self.scheduler.getDelayedCalls(), [])
