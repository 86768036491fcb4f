"""Warnings of the backlog watch: a snapshot that keeps dead rows, and commands that wait for a handler."""

from __future__ import annotations

import os
import struct
from typing import Any

import psycopg2
from psycopg2.extras import PhysicalReplicationConnection
from twisted.internet import task
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.runtime.clock import Clock
from s2s.store.monitors import backlog_watch, snapshots
from s2s.store.monitors.backlog_watch import AGAIN_S, DEAD_ROWS, OLD_S, Watch
from s2s.store.monitors.snapshots import Holder
from s2s.store.pool import Database, blocking
from s2s.store.tables.lookback import Lookback
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class _Told:
    """Captures the log lines of a test."""

    def __init__(self, test: Any) -> None:
        self._events: list[LogEvent] = []
        globalLogPublisher.addObserver(self._events.append)
        test.addCleanup(globalLogPublisher.removeObserver, self._events.append)

    def lines(self) -> list[str]:
        """Return the log lines of the watch since the last call."""
        told = [
            formatEvent(event)
            for event in self._events
            if event["log_namespace"] == "s2s.store.monitors.backlog_watch.Watch"
        ]
        self._events.clear()
        return told


class CheckerTests(SynchronousTestCase):
    """The warnings about snapshot holders, on a fake clock."""

    def setUp(self) -> None:
        """Make a watch."""
        self.time = task.Clock()
        self.watch = Watch(None, Clock(self.time), [])  # type: ignore[arg-type]
        self.told = _Told(self)

    def judge(self, *holders: Holder, dead: int = DEAD_ROWS) -> list[str]:
        """Return the lines that are logged for these holders."""
        self.watch._judge(holders, dead)
        return self.told.lines()

    def test_a_type_of_another_hand(self) -> None:
        """The line about a command type of foreign origin is bounded and holds no control characters."""
        self.watch._tell_type("\x1b[2J\n" + "x" * 100_000)
        [line] = self.told.lines()
        self.assertTrue(line.isprintable() and len(line) < 500, line[:600])

    def test_one_line(self) -> None:
        """An old snapshot is logged with its holder and the cure: once, again after an hour, and when it is gone."""
        old = Holder("session", "42", "bob", "pg_dump", OLD_S + 1, "7")
        [line] = self.judge(old)
        for word in ("301 s", "100000 dead rows", "pid 42", "'bob'", "'pg_dump'", "pg_terminate_backend(42)"):
            self.assertIn(word, line)
        self.assertEqual(self.watch.oldest_snapshot_s, OLD_S + 1)
        self.assertEqual(self.judge(old), [])
        self.time.advance(AGAIN_S)
        self.assertEqual(len(self.judge(old)), 1)
        [line] = self.judge()
        self.assertIn("is gone", line)
        self.assertEqual((self.judge(), self.watch.oldest_snapshot_s), ([], 0.0))

    def test_harmless(self) -> None:
        """A young snapshot, or an old one with few dead rows, is not logged; its age and the row count are readable."""
        self.assertEqual(self.judge(Holder("session", "1", "bob", "", OLD_S - 1, "7")), [])
        self.assertEqual(self.judge(Holder("session", "1", "bob", "", OLD_S + 1, "7"), dead=DEAD_ROWS - 1), [])
        self.assertEqual((self.watch.oldest_snapshot_s, self.watch.dead_rows), (OLD_S + 1, DEAD_ROWS - 1))

    def test_an_age_that_is_hidden(self) -> None:
        """A holder with a hidden or missing age is recognised by its transaction id, and logged after OLD_S."""
        for holder in (Holder("session", "1", "bob", "", None, "7"), Holder("slot", "standby", None, None, None, "7")):
            self.assertEqual(self.judge(holder), [])
            self.time.advance(OLD_S)
            self.assertEqual(len(self.judge(holder)), 1)
            moved = Holder(holder.kind, holder.name, holder.owner, None, None, "8")
            self.assertIn("is gone", self.judge(moved)[0])

    def test_other_kinds(self) -> None:
        """A replication slot and a prepared transaction are logged with their own cures, each in one bounded line."""
        [slot] = self.judge(Holder("slot", "standby", None, None, OLD_S, "7"))
        self.assertIn("replication slot 'standby'", slot)
        self.assertIn("pg_drop_replication_slot", slot)
        self.judge()
        [prepared] = self.judge(Holder("prepared", "x\n" * 300, "bob", None, OLD_S, "7"))
        self.assertIn("rollback prepared", prepared)
        self.assertNotIn("\n", prepared)
        self.assertLess(len(prepared), 600)


class WatchTests(DatabaseTestCase):
    """:class:`Watch` on a real database."""

    def setUp(self) -> None:
        """Make a watch without starting it."""
        super().setUp()
        self.database = Database(self.url, threads=1)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.time = task.Clock()
        self.watch = Watch(self.database, Clock(self.time), ["test.run"])
        self.told = _Told(self)

    def hold(self, url: str = "") -> int:
        """Hold a snapshot until the test ends, and return the session's pid."""
        holder = psycopg2.connect(url or self.url, application_name="pg_dump")
        self.addCleanup(holder.close)
        holder.cursor().execute("set transaction isolation level repeatable read; select 'open sesame'")
        return int(holder.info.backend_pid)

    async def test_a_session(self) -> None:
        """A session with a snapshot is logged by its pid, user and application_name, and never by its query."""
        pid = self.hold()
        self.patch(backlog_watch, "OLD_S", 0.0)
        self.patch(backlog_watch, "DEAD_ROWS", 0)
        await self.watch.look()
        [line] = self.told.lines()
        for word in (f"pid {pid}", "'pg_dump'", "'postgres'"):
            self.assertIn(word, line)
        self.assertNotIn("sesame", line)

    def test_holders(self) -> None:
        """A writing transaction is a holder; an idle session and the session of the watch are not."""
        idle = psycopg2.connect(self.url)
        self.addCleanup(idle.close)
        writer = psycopg2.connect(self.url)
        self.addCleanup(writer.close)
        writer.cursor().execute("insert into s2s.broadcasts (message) values ('m')")
        with blocking(self.url) as txn:
            found, _ = snapshots.holders(txn)
        self.assertEqual([holder.name for holder in found], [str(writer.info.backend_pid)])

    async def test_a_standby(self) -> None:
        """A standby query that holds a snapshot through hot_standby_feedback is described as such, with its cure."""
        standby = psycopg2.connect(
            self.url, connection_factory=PhysicalReplicationConnection, application_name="walreceiver"
        )
        self.addCleanup(standby.close)
        replication = standby.cursor()
        replication.execute("IDENTIFY_SYSTEM")
        [(_, timeline, position, _)] = replication.fetchall()
        replication.start_replication(start_lsn=position, timeline=timeline)
        [(xmin,)] = self.execute("select txid_current()")
        feedback = struct.pack("!cqIIII", b"h", 0, xmin, 0, 0, 0)
        os.write(standby.fileno(), struct.pack("!cI", b"d", 4 + len(feedback)) + feedback)

        def found() -> Holder | None:
            with blocking(self.url) as txn:
                return next((each for each in snapshots.holders(txn)[0] if each.application == "walreceiver"), None)

        holder = await poll(found, "the snapshot of the standby")
        self.assertRegex(holder.described, "^a query on the standby of pid [0-9]+ of user 'postgres'")
        self.assertEqual(holder.cure, "end the query there, or set hot_standby_feedback = off there")

    def test_a_weak_role(self) -> None:
        """A role without access to other transactions sees a holder's pid, user and application_name, but no age."""
        self.execute("drop role if exists s2s_weak")
        self.execute("create role s2s_weak login")
        self.addCleanup(self.execute, "drop role s2s_weak")
        pid = self.hold()
        with blocking(self.url.replace("postgres@", "s2s_weak@", 1)) as txn:
            [holder], _ = snapshots.holders(txn)
        self.assertEqual((holder.name, holder.owner, holder.application), (str(pid), "postgres", "pg_dump"))
        self.assertIsNone(holder.age_s)

    async def test_waiting_types(self) -> None:
        """Each command type that has waited for a minute without a handler here is logged once."""
        insert = (
            "insert into s2s.commands (cmd_type, idem_key, payload, due_at)"
            " select %s, %s || n, '{}', now() - %s * interval '1 s' from generate_series(1, 3) n"
        )
        for cmd_type, age in (
            ("test.run", 90),
            ("test.a", 90),
            ("test.b", 90),
            ("test.young", 30),
            ("test.later", -90),
        ):
            self.execute(insert, cmd_type, cmd_type, age)
        self.watch._lookback = Lookback(self.time.seconds)
        lines = []
        for _ in range(4):
            self.time.advance(Watch.interval_s)
            await self.watch.look()
            lines += self.told.lines()
        self.assertEqual(sorted("test.a" in line for line in lines), [False, True])
        self.assertEqual(sorted("test.b" in line for line in lines), [False, True])

    async def test_many_waiting_types(self) -> None:
        """At most _MOST_TYPES command types are ever logged."""
        self.patch(backlog_watch, "_MOST_TYPES", 2)
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, due_at)"
            " select 'test.t' || n, n::text, '{}', now() - interval '2 minutes' from generate_series(1, 5) n"
        )
        self.watch._lookback = Lookback(self.time.seconds)
        for _ in range(5):
            self.time.advance(Watch.interval_s)
            await self.watch.look()
        self.assertEqual(len(self.told.lines()), 2)

    async def test_what_may_not_be_read(self) -> None:
        """A query that the database refuses is logged once."""
        self.patch(snapshots, "_UNSERVED", "select 1 / 0")
        self.watch._lookback = Lookback(self.time.seconds)
        for _ in range(2):
            self.time.advance(Watch.interval_s)
            await self.watch.look()
        self.assertEqual(len(self.told.lines()), 1)
