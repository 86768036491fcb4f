"""Connecting in a process that runs, where the look-up of a name does not return: :mod:`s2s.store.connection`."""

from __future__ import annotations

import threading
from typing import Any

import psycopg2
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from s2s.errors import DatabaseUnavailable
from s2s.store import async_connection, connection, listen
from s2s.store.driver import Query
from s2s.store.listen import Listener
from s2s.store.pool import Database
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class HangTests(DatabaseTestCase):
    """libpq waits for a name server, without a bound of its own."""

    def setUp(self) -> None:
        """Have each connect wait, and keep what is logged."""
        super().setUp()
        self.logged: list[LogEvent] = []
        globalLogPublisher.addObserver(self.logged.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.logged.append)
        self.bound(0.1)
        self.answers = threading.Event()
        self.made: list[Any] = []
        connect = psycopg2.connect

        def slow(**parameters: Any) -> Any:
            is_late = not self.answers.is_set()
            self.answers.wait()
            made = connect(**parameters)
            if is_late:
                self.made.append(made)
            return made

        self.patch(psycopg2, "connect", slow)
        self.addCleanup(self.answers.set)

    def bound(self, seconds: float) -> None:
        """Set how long a connect may take."""
        for module in (connection, async_connection, listen):
            self.patch(module, "CONNECT_S", seconds)

    def says(self, sentence: str) -> bool:
        """Whether the log has a line that names the name server."""
        return any(f"{sentence}: no connection within" in formatEvent(each) for each in self.logged)

    async def test_it_is_bounded_and_told(self) -> None:
        """Each connect of a pool, without a thread and of a listener fails with a line, and works when names are."""
        database = Database(self.url, "s2s hangs", threads=1)
        database.start()
        self.addCleanup(database.stop)
        error = await self.assertFailure(database.run(lambda _: None), DatabaseUnavailable)
        self.assertIn("see the name server", str(error))
        asked: Deferred[Any] = Deferred()
        database.query(Query("select 1", ()), asked.callback)
        self.assertIn("see the name server", str(await self.assertFailure(asked, DatabaseUnavailable)))
        self.assertTrue(self.says("the database is not available"))
        listener = Listener(self.url, {})
        listener.start()
        self.addCleanup(listener.stop)
        await poll(lambda: self.says("notifications of the database do not arrive"), "the line")
        self.bound(60.0)
        self.answers.set()
        await poll(lambda: listener.is_connected, "the listener")
        await database.run(lambda _: None)
        # Those that came too late are nobody's.
        await poll(lambda: len(self.made) >= 3 and all(each.closed for each in self.made), "they are closed")

    async def test_how_many(self) -> None:
        """A bounded number of connects hangs at once; the next one is refused at once."""
        self.patch(connection, "_connecting", threading.Semaphore(0))
        error = self.assertRaises(psycopg2.OperationalError, connection.connect, {})
        self.assertIn("connects do not end: see the name server", str(error))
