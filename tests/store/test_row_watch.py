"""Due rows that another session has locked: :mod:`s2s.store.monitors.row_watch`,
:mod:`s2s.store.monitors.held_rows`.
"""

from __future__ import annotations

from typing import Any

import psycopg2
from psycopg2.extras import wait_select
from twisted.internet import reactor
from twisted.logger import capturedLogs, formatEvent

from s2s.runtime.clock import Clock
from s2s.store.monitors import held_rows
from s2s.store.monitors.held_rows import TABLES
from s2s.store.monitors.row_watch import RowWatch
from s2s.store.pool import blocking
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_ALL = [table for tables in TABLES.values() for table in tables]


class RowWatchTests(DatabaseTestCase):
    """A forgotten session that holds locks."""

    def setUp(self) -> None:
        """Insert two due rows into each table."""
        super().setUp()
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, due_at)"
            " select 'a.b', n, '{}', now() - interval '1 hour' from generate_series(1, 2) n;"
            "insert into s2s.jobs (job_type, schedule, due_at)"
            " select 'job_' || n, 'every:3600s', now() - interval '1 hour' from generate_series(1, 2) n;"
            "insert into s2s.orders (order_id, rpc, params, actor, stepped_at)"
            " select n, 'admin.config.set.v1', '{}', 'x', now() - interval '1 hour' from generate_series(1, 2) n;"
            "insert into s2s.outbox (cmd_type, idem_key, payload, send_at)"
            " select 'a.b', n, '{}', now() - interval '1 hour' from generate_series(1, 2) n;"
            "insert into s2s.broadcasts (message, created_at)"
            " select 'hello', now() - interval '1 hour' from generate_series(1, 2) n"
        )

    def hold(self, statement: str, application_name: str = "a forgotten psql") -> Any:
        """Run a statement that locks rows in a session of its own, and return the open session."""
        holder = psycopg2.connect(self.url, application_name=application_name)
        self.addCleanup(holder.close)
        holder.cursor().execute(statement)
        return holder

    def look(self, waiting_s: float = 0.0) -> list[str]:
        """Check all tables, and return the findings."""
        with blocking(self.url) as txn:
            return [str(held) for held in held_rows.look(txn, _ALL, waiting_s, 0.0).values()]

    def test_each_table(self) -> None:
        """Locked rows of each table are counted, with the session that holds the locks and how to end it."""
        self.assertEqual(self.look(), [])
        for table in _ALL:
            with self.subTest(table=table):
                holder = self.hold(f"select * from {table} limit 1 for update")
                [line] = self.look()
                self.assertIn(f"1 rows of {table} are due and locked by another session: pid", line)
                self.assertIn(f"select pg_terminate_backend({holder.info.backend_pid}) ends it", line)
                self.assertIn("a forgotten psql", line)
                holder.rollback()
                self.assertEqual(self.look(), [])

    def test_what_is_no_matter(self) -> None:
        """A short transaction, a session of s2s, and a session that has changed other rows are not reported."""
        self.hold("select * from s2s.commands for update")
        self.assertEqual(self.look(60.0), [])
        self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'a forgotten psql'"
        )
        self.hold("select * from s2s.jobs for update", "s2s-engine handlers")
        self.hold("insert into s2s.outbox (cmd_type, idem_key, payload) values ('a.b', 'new', '{}')")
        self.assertEqual(self.look(), [])

    async def test_a_handler_of_ours(self) -> None:
        """An s2s session with a long transaction is reported too, but not for the row of the job that it runs."""
        holder = self.hold("lock table s2s.broadcasts; select * from s2s.commands for update", "s2s-server handlers")
        self.hold("select * from s2s.jobs for update", "s2s-engine handlers")
        waiting = psycopg2.connect(self.url, application_name="s2s-engine", async_=True)
        self.addCleanup(waiting.close)
        wait_select(waiting)
        waiting.cursor().execute("insert into s2s.broadcasts (message) values ('x')")
        await poll(lambda: self.execute("select 1 from pg_locks where not granted"), "the wait")
        self.assertEqual(self.look(), [])
        self.patch(held_rows, "YOUNG_S", 0)
        with blocking(self.url) as txn:
            found = held_rows.look(txn, ["s2s.commands", "s2s.jobs"], 0.0, 0.0)
        locked, awaited = map(str, found.values())
        self.assertIn("2 rows of s2s.commands are due and locked by another session: pid", locked)
        self.assertIn("1 sessions of s2s wait for locks of another session: pid", awaited)
        for line in (locked, awaited):
            self.assertIn(f"pid {holder.info.backend_pid} holds them (s2s-server handlers, ", line)

    async def test_what_sessions_wait_for(self) -> None:
        """A look reports an s2s session that waits for a lock of another program, but not for a lock of s2s."""
        ours = psycopg2.connect(self.url, application_name="s2s-server", async_=True)
        self.addCleanup(ours.close)
        wait_select(ours)
        for name in ("s2s-engine", "a forgotten psql"):
            holder = self.hold("select pg_advisory_lock(1)", name)
            waiting = ours.cursor()
            waiting.execute("select pg_advisory_lock(1), pg_advisory_unlock_all()")
            await poll(lambda: self.execute("select 1 from pg_locks where not granted"), "the wait")
            lines = self.look()
            holder.close()
            wait_select(ours)
            self.assertEqual(len(lines), name == "a forgotten psql")
        self.assertIn("1 sessions of s2s wait for locks of another session: pid", lines[0])
        self.assertIn("a forgotten psql", lines[0])

    async def test_one_line(self) -> None:
        """The watch logs locked rows once, after two looks, keeps them for ``/readyz``, and logs their end."""
        self.patch(held_rows.look, "__defaults__", (0.0, 0.0))
        database, _ = self.pools("s2s-rows")
        watch = RowWatch(database, Clock(reactor), TABLES["server"])
        holder = self.hold("select * from s2s.commands for update")
        with capturedLogs() as told:
            await watch.look()
            self.assertEqual(watch.held, "")
            for _ in range(2):
                await watch.look()
                self.assertIn("2 rows of s2s.commands", watch.held)
            holder.rollback()
            await watch.look()
        self.assertEqual(watch.held, "")
        lines = [str(formatEvent(event)) for event in told]
        self.assertEqual(len(lines), 2, lines)
        self.assertIn("2 rows of s2s.commands are due and locked", lines[0])
