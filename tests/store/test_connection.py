"""Connecting in a running process when a name lookup does not return: :mod:`s2s.store.connection`."""

from __future__ import annotations

import threading
from typing import Any

import psycopg2
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from s2s.errors import DatabaseUnavailable
from s2s.runtime.hooks import SharedHooks
from s2s.store import async_connection, connection, listen
from s2s.store.driver import Query
from s2s.store.listen import Listener
from s2s.store.pool import Database
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll


class HangTests(DatabaseTestCase):
    """libpq waits for a name server without a timeout of its own."""

    def setUp(self) -> None:
        """Make each connect wait, and record the log."""
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
        """Set the timeout of a connect, in seconds."""
        for module in (connection, async_connection, listen):
            self.patch(module, "CONNECT_S", seconds)

    def says(self, sentence: str) -> bool:
        """Return whether the log has this sentence, followed by the reason that no connection was made in time."""
        return any(f"{sentence}: no connection within" in formatEvent(each) for each in self.logged)

    async def test_it_is_bounded_and_told(self) -> None:
        """A hanging connect of a pool, an asynchronous connection or a listener fails in bounded time with a log line.

        Once the name server answers, the pool and the listener connect.
        """
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
        # The connections that arrive after their timeout are closed.
        await poll(lambda: len(self.made) >= 3 and all(each.closed for each in self.made), "they are closed")

    async def test_how_many(self) -> None:
        """A connect beyond the maximum number of hanging connects fails immediately."""
        self.patch(connection, "_connecting", threading.Semaphore(0))
        error = self.assertRaises(psycopg2.OperationalError, connection.connect, {})
        self.assertIn("connects do not end: see the name server", str(error))


class HookTests(DatabaseTestCase):
    """A hook of all threads that ends each of them before its work."""

    async def test_it_is_told(self) -> None:
        """A connect fails with the cure and gives its place back, and the next one succeeds without the hook."""

        def fail(*_: object) -> None:
            raise RuntimeError("a hook")

        self.addCleanup(SharedHooks().restore)
        threading.excepthook = lambda _: None
        places = threading.Semaphore(2)
        self.patch(connection, "_connecting", places)
        database = Database(self.url, "s2s hooks", threads=1)
        database.start()
        self.addCleanup(database.stop)
        await database.run(lambda _: None)
        for module, name, value in (
            (threading, "_trace_hook", fail),
            (threading, "_profile_hook", fail),
            (threading, "excepthook", None),
        ):
            before = getattr(module, name)
            self.execute(
                "select pg_terminate_backend(pid, 10000) from pg_stat_activity where application_name = 's2s hooks'"
            )
            for _ in range(3):
                setattr(module, name, value)
                failed = database.run(lambda _: None)
                error = await self.assertFailure(failed, DatabaseUnavailable)
                setattr(module, name, before)
                self.assertIn("the thread that connects has ended before its work: a plug-in", str(error))
            await database.run(lambda _: None)
