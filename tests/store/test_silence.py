"""Connections to the database that look alive but get no answer: :mod:`s2s.store.silence`."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList, gatherResults
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.internet.threads import blockingCallFromThread, deferToThread
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from s2s.errors import DatabaseUnavailable
from s2s.store import async_connection, pool, silence
from s2s.store.driver import Cursor, Query
from s2s.store.pool import Database
from tests.support.postgres import DatabaseTestCase
from tests.support.proxy import Proxy
from tests.support.waiting import pause, poll

#: SQL that returns the pid of the pool's session that sleeps in a statement.
_ACTIVE = "select pid from pg_stat_activity where application_name = 'behind' and wait_event = 'PgSleep'"


def _one(txn: Cursor, statement: str) -> Any:
    txn.execute(statement)
    return txn.fetchall()[0][0]


class SilenceTests(DatabaseTestCase):
    """A pool behind a proxy that forgets connections."""

    async def setUp(self) -> None:
        """Start a pool that connects through the proxy."""
        super().setUp()
        self.patch(silence, "SILENT_S", 0.6)
        self.patch(silence, "LOOK_S", 0.1)
        [directory] = parse_qs(urlsplit(self.url).query)["host"]
        self.proxy = Proxy(0, UNIXClientEndpoint(reactor, f"{directory}/.s.PGSQL.5432"))
        await self.proxy.start()
        self.addCleanup(self.proxy.stop)
        name = urlsplit(self.url).path
        self.database = Database(f"postgresql://postgres@127.0.0.1:{self.proxy.port}{name}", "behind", threads=2)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.told: list[LogEvent] = []
        globalLogPublisher.addObserver(self.told.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.told.append)

    def sessions(self) -> int:
        """Count the sessions of the pool."""
        (row,) = self.execute("select count(*)::int from pg_stat_activity where application_name = 'behind'")
        return int(row[0])

    async def test_a_statement(self) -> None:
        """A statement without an answer fails, its session ends with its locks, and the next statement works."""
        await gatherResults([self.database.run(_one, "select pg_sleep(0.05)") for _ in range(2)])
        self.assertEqual(self.sessions(), 2)
        self.proxy.hole()
        asked = [self.database.run(_one, "select 1") for _ in range(2)]
        for is_answered, failure in await DeferredList(asked, consumeErrors=True):
            self.assertFalse(is_answered)
            failure.trap(DatabaseUnavailable)
        self.assertEqual(await self.database.run(_one, "select 1"), 1)
        await poll(lambda: self.sessions() == 1, "the sessions to end")
        lines = [event for event in self.told if event["log_namespace"] == "s2s.store.silence.Silence"]
        self.assertEqual(len(lines), 2)
        self.assertEqual(self.database.counters.met["database_answer"], 2)

    async def test_a_look_that_is_not_answered(self) -> None:
        """A transaction of bounded time ends although a proxy drops its answers, so a look at a session ends too."""
        self.patch(pool, "LAST_S", 0.2)

        def look() -> None:
            with self.database.shutdown_transaction() as txn:
                blockingCallFromThread(reactor, self.proxy.hole)
                txn.execute("select 1")

        await self.assertFailure(deferToThread(look), DatabaseUnavailable)

    async def test_a_database_that_hangs(self) -> None:
        """A database that answers neither a statement nor a new connection has one line, and one when it is back."""
        await gatherResults([self.database.run(_one, "select pg_sleep(0.05)") for _ in range(2)])
        self.proxy.stall()
        self.addCleanup(self.proxy.go_on)
        asked = [self.database.run(_one, "select 1") for _ in range(2)]
        await poll(lambda: self.database.is_away, "the look")
        await pause(5 * silence.LOOK_S)
        self.proxy.go_on()
        self.assertEqual(await gatherResults(asked), [1, 1])
        await poll(lambda: not self.database.is_away, "its end")
        away, back = [formatEvent(event) for event in self.told if event["log_namespace"].endswith("Availability")]
        self.assertIn("the database is not available: no answer for 0.6 s, and none on a new connection: ", away)
        self.assertEqual(back, "the database is available again")

    async def test_without_activities(self) -> None:
        """With ``track_activities`` off, an unanswered statement fails too, and a running one is left alone."""
        self.patch(silence, "_AGAIN_S", 0.1)
        self.patch(silence, "HUNG_S", 1000.0)
        self.execute(f"alter database {urlsplit(self.url).path[1:]} set track_activities = off")
        slept = await gatherResults([self.database.run(_one, "select 1 from pg_sleep(1.5)") for _ in range(2)])
        self.assertEqual(slept, [1, 1])
        self.assertEqual(self.sessions(), 2)
        self.proxy.hole()
        asked = [self.database.run(_one, "select 1") for _ in range(2)]
        for is_answered, failure in await DeferredList(asked, consumeErrors=True):
            self.assertFalse(is_answered)
            failure.trap(DatabaseUnavailable)
        await poll(lambda: self.sessions() == 0, "the sessions to end")

    async def test_a_statement_without_a_thread(self) -> None:
        """A connection abandoned for lack of an answer is ended, so the next connection can always be opened."""
        self.patch(async_connection, "BEYOND_S", 0.1)
        self.database._async_connection._statement_timeout_s = 0.1
        for _ in range(async_connection.MOST_GIVEN_UP + 2):
            await self.ask("select 1")
            self.proxy.hole()
            with self.assertRaises(DatabaseUnavailable):
                await self.ask("select 1")
            await poll(lambda: not self.database._async_connection.given_up, "the end of the connection")

    async def test_what_works_on(self) -> None:
        """A statement or a transaction that the database works on is left alone, however long it takes."""
        self.assertEqual(await self.database.run(_one, "select 1 from pg_sleep(1.5)"), 1)

        def in_steps(txn: Cursor) -> list[Any]:
            return [_one(txn, "select 1 from pg_sleep(0.4)") for _ in range(4)]

        self.assertEqual(await self.database.run(in_steps), [1] * 4)
        await pause(0.3)
        self.assertEqual([event for event in self.told if event["log_namespace"].endswith("Silence")], [])

    async def test_an_answer_under_way(self) -> None:
        """A session whose statement has just ended is left alone for a while, since its answer may be in transit."""
        began = time.monotonic()
        answer = self.database.run(_one, "select 1 from pg_sleep(0.8)")
        await poll(lambda: self.execute(_ACTIVE), "the statement")
        self.proxy.hole()
        with self.assertRaises(DatabaseUnavailable):
            await answer
        self.assertGreaterEqual(time.monotonic() - began, 0.8 + silence.SILENT_S)

    async def test_a_backend_that_hangs(self) -> None:
        """The connection of a backend that hangs past its statement timeout is closed, up to a maximum number."""
        self.patch(silence, "HUNG_S", -7.5)
        self.patch(silence, "MOST_HUNG", 1)
        hanging = self.database.run(_one, "select 1 from pg_sleep(0.3)")
        [(pid,)] = await poll(lambda: self.execute(_ACTIVE), "the statement")
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        os.kill(pid, signal.SIGSTOP)
        with self.assertRaises(DatabaseUnavailable):
            await hanging
        await poll(lambda: any(f"see process {pid} of" in formatEvent(event) for event in self.told), "the line")
        # At the maximum, another slow statement is waited for.
        self.assertEqual(await self.database.run(_one, "select 1 from pg_sleep(1.5)"), 1)

    async def ask(self, statement: str) -> Any:
        """Query without a thread."""
        done: Deferred[Any] = Deferred()
        self.database.query(Query(statement, ()), done.callback)
        return await done
