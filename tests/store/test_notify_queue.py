"""A full NOTIFY queue of PostgreSQL: :mod:`s2s.store.monitors.notify_queue`,
:mod:`s2s.store.monitors.queue_watch`.
"""

from __future__ import annotations

from typing import Any

import psycopg2
from click.testing import CliRunner
from twisted.internet import task
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase, TestCase

from s2s.cli import main
from s2s.errors import DatabaseUnavailable
from s2s.runtime.clock import Clock
from s2s.store import sqlstate
from s2s.store.driver import Cursor
from s2s.store.monitors import notify_queue
from s2s.store.monitors.database_probe import DatabaseProbe
from s2s.store.monitors.notify_queue import FULL, HIGH, Queue
from s2s.store.monitors.queue_watch import AGAIN_S, QueueWatch
from s2s.store.pool import Database
from s2s.store.tables import outbox
from tests.support.cluster import Cluster


class CheckerTests(SynchronousTestCase):
    """The log lines for each fill level of the queue."""

    def test_lines(self) -> None:
        """The watch logs that the queue is half full, full, still full after an hour, and has room again."""
        time = task.Clock()
        watch = QueueWatch(None, Clock(time))  # type: ignore[arg-type]
        told: list[int] = []
        for usage, after_s in (
            (HIGH - 0.1, 0),
            (HIGH, 1),
            (0.9, 1),
            (FULL, 1),
            (1.0, 1),
            (1.0, AGAIN_S),
            (0.1, 1),
            (0.0, 1),
        ):
            time.advance(after_s)
            with capturedLogs() as lines:
                watch._judge(Queue(usage))
            told.append(len(lines))
        self.assertEqual(told, [0, 1, 0, 1, 0, 1, 1, 0])

    def test_a_session_that_is_not_seen(self) -> None:
        """If the session that blocks the queue is not visible, the line names the view to query as a superuser."""
        self.assertIn("90% full", str(Queue(0.9)))
        self.assertIn("see pg_stat_activity as a superuser", str(Queue(0.9)))


def _emit(txn: Cursor) -> None:
    outbox.put(txn, "a.b", "k", {})


class FullTests(TestCase):
    """A real NOTIFY queue, of the smallest size that PostgreSQL allows."""

    def setUp(self) -> None:
        """Fill the queue while a session that listens has an open transaction."""
        cluster = Cluster()
        self.addCleanup(cluster.remove)
        self._execute(cluster.url, "alter system set max_notify_queue_pages = 64")
        cluster.stop()
        cluster.start()
        cluster.migrate()
        self.url = cluster.url
        self.listener = psycopg2.connect(self.url, application_name="a forgotten psql")
        self.addCleanup(self.listener.close)
        with self.listener.cursor() as cursor:
            cursor.execute("listen x")
            self.listener.commit()
            cursor.execute("select pg_sleep(1.1)")
        with self.assertRaises(psycopg2.OperationalError) as full:
            while True:
                self._execute(self.url, "select pg_notify('y', repeat('x', 7000) || g) from generate_series(1, 9) g")
        self.assertEqual(sqlstate.code(full.exception), "54000 PreCommit_Notify")
        self.database = Database(self.url, threads=1)
        self.database.start()
        self.addCleanup(self.database.stop)

    def _execute(self, url: str, statement: str) -> None:
        connection = psycopg2.connect(url)
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
        finally:
            connection.close()

    async def test_full_and_free_again(self) -> None:
        """A full queue is a database fault that names the session to end; once it has ended, a look frees the queue."""
        with capturedLogs() as told:
            error = await self.assertFailure(self.database.run(_emit), DatabaseUnavailable)
        self.assertEqual(sqlstate.meaning(error.state).fault, "database")
        [line] = [formatEvent(event) for event in told if "incident" in event]
        self.assertIn("end the session that listens in a long transaction", line)
        pulse = DatabaseProbe(self.database, Clock(self.database.reactor))
        named = f"pid {self.listener.info.backend_pid} (application_name 'a forgotten psql', idle in transaction, for "
        self.assertIn(named, await pulse.check())
        status = CliRunner().invoke(main, ["db", "status", "--database", self.url])
        self.assertEqual(status.exit_code, 1)
        self.assertIn(named, status.stderr)
        self.listener.close()
        watch = QueueWatch(self.database, Clock(self.database.reactor))
        for _ in range(100):
            await watch.look()
            found: Any = await self.database.run(notify_queue.look)
            if found.usage < HIGH:
                break
            await task.deferLater(self.database.reactor, 0.05)  # type: ignore[arg-type]
        await self.database.run(_emit)
        status = CliRunner().invoke(main, ["db", "status", "--database", self.url])
        self.assertEqual(status.exit_code, 0, status.output)
