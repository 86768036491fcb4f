"""The asynchronous connection: short statements without a thread, our own errors, and outages of the database."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import Any
from unittest import mock

import psycopg2
from psycopg2.extensions import parse_dsn
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import UNIXClientEndpoint
from twisted.logger import LogEvent, formatEvent, globalLogPublisher

from s2s.errors import DatabaseUnavailable, StatementRefused
from s2s.protocol.limits import Counters
from s2s.store import async_connection, driver
from s2s.store.driver import Query, Steps
from s2s.store.pool import Database, blocking
from tests.support import proxy
from tests.support.cluster import Cluster
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_ADDS = driver.Prepared("adds", "insert into public.t values ($1 + $2) returning a", "integer", "integer")


def _add(one: int, other: int) -> Steps[int]:
    [(a,)] = yield Query(_ADDS, (one, other))
    return int(a)


def _ask(statement: str, *params: Any) -> Steps[Any]:
    rows = yield Query(statement, params)
    return rows


class AsyncConnectionTests(DatabaseTestCase):
    """:class:`s2s.store.async_connection.AsyncConnection`, as a :class:`Database` uses it."""

    def setUp(self) -> None:
        """Start a database with a table."""
        super().setUp()
        self.execute("create table public.t (a int unique check (a > 0))")
        self.database = self.start()

    def start(self, url: str = "", **options: Any) -> Database:
        """Start a pool that ends with the test."""
        database = Database(url or self.url, "s2s line", **options)
        database.start()
        self.addCleanup(database.stop)
        return database

    def backends(self) -> list[Any]:
        """Return the pids of the open connections."""
        return self.execute("select pid from pg_stat_activity where application_name = 's2s line'")

    async def test_each_statement_by_itself(self) -> None:
        """Each statement is committed by the time its rows arrive, even if the caller fails afterwards."""

        def work() -> Steps[None]:
            yield Query("insert into public.t values (%s)", (1,))
            self.assertEqual(self.execute("select a from public.t"), [(1,)])
            raise KeyError("mine")

        await self.assertFailure(self.database.run_steps(work), KeyError)
        self.assertEqual(await self.database.run_steps(_ask, "select a from public.t"), [(1,)])

    async def test_planned_once(self) -> None:
        """A statement is planned once on each connection, asynchronous or blocking, and again on a new one."""
        planned = "select count(*) from pg_prepared_statements where name = 'adds'"
        for n in (1, 2):
            self.assertEqual(await self.database.run_steps(_add, 0, n), n)
            self.assertEqual(await self.database.run_steps(_ask, planned), [(1,)])
        self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s line'")
        await poll(lambda: not self.backends(), "the connection ends")
        self.assertEqual(await self.database.run_steps(_add, 0, 3), 3)
        with blocking(self.url) as txn:
            self.assertEqual([driver.drive(txn, _add(0, n)) for n in (4, 5)], [4, 5])
        self.assertEqual(self.execute("select a from public.t order by a"), [(n,) for n in range(1, 6)])

    async def test_refusals(self) -> None:
        """An error of a refused statement names the constraint, holds no row data, and the connection stays open."""
        before = await self.database.run_steps(_ask, "select pg_backend_pid()")
        for work, constraint in (
            ((_add, -7, 0), "t_a_check"),
            ((_ask, "insert into public.t values (-7)"), "t_a_check"),
        ):
            refused = await self.assertFailure(self.database.run_steps(*work), StatementRefused)
            self.assertEqual(refused.constraint, constraint)
            self.assertNotIn("7", str(refused))
        await self.assertFailure(self.database.run_steps(_ask, "no sql"), StatementRefused)
        self.assertEqual(await self.database.run_steps(_ask, "select pg_backend_pid()"), before)

    async def test_what_cannot_be_written(self) -> None:
        """Parameters that psycopg2 cannot encode raise an error, and the same connection runs the next statement."""
        before = await self.database.run_steps(_ask, "select pg_backend_pid()")
        with mock.patch.object(async_connection, "BEYOND_S", -7.7):
            await self.assertFailure(self.database.run_steps(_ask, "select %s", "\0"), ValueError)
            await self.assertFailure(self.database.run_steps(_ask, "select %s", object()), StatementRefused)
        await self.database.run_steps(_ask, "select pg_sleep(0.5)")
        self.assertEqual(await self.database.run_steps(_ask, "select pg_backend_pid()"), before)

    async def test_unforeseen(self) -> None:
        """An unexpected error between two statements fails the work, and the next work succeeds."""
        planned = driver.Prepared("planned", "select $1", "integer")

        def work() -> Steps[Any]:
            rows = yield Query(planned, (1,))
            return rows

        # ``prepare`` fails before the statement is planned, ``call`` fails after that.
        for attribute in ("prepare", "call"):
            with mock.patch.object(planned, attribute):
                delattr(planned, attribute)
                await self.assertFailure(self.database.run_steps(work), AttributeError)
        with mock.patch.object(os, "dup", side_effect=OSError("too many")):
            await self.assertFailure(self.database.run_steps(work), OSError)
        self.assertEqual(await self.database.run_steps(work), [(1,)])
        await poll(lambda: len(self.backends()) == 1, "the connections before it end")

    async def test_who_stumbles_over_an_answer(self) -> None:
        """An exception in a query's callback is logged, and the next query is served."""
        told: Deferred[Any] = Deferred()

        def stumble(rows: Any) -> None:
            # Fire later: a quick answer to the next query would come before this error is logged.
            reactor.callLater(0, told.callback, rows)
            raise ZeroDivisionError

        self.database.query(Query("select 1", ()), stumble)
        self.assertEqual(await told, [(1,)])
        self.assertEqual(await self.database.run_steps(_ask, "select 2"), [(2,)])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    async def test_lost_while_planning(self) -> None:
        """A connection lost while planning a statement raises DatabaseUnavailable; the next one plans it again."""
        slow = driver.Prepared("slow", "select $1", "integer")
        slow.prepare = "select pg_sleep(60); " + slow.prepare

        def work() -> Steps[Any]:
            rows = yield Query(slow, (1,))
            return rows

        asked = self.database.run_steps(work)
        await poll(lambda: self.execute("select 1 from pg_stat_activity where query ~ '^select pg_sleep'"), "it plans")
        self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s line'")
        await self.assertFailure(asked, DatabaseUnavailable)
        slow.prepare = slow.prepare.removeprefix("select pg_sleep(60); ")
        self.assertEqual(await self.database.run_steps(work), [(1,)])

    async def test_two_events_at_once(self) -> None:
        """A read or write event on a descriptor that is already closed has no effect."""
        await self.database.run_steps(_ask, "select 1")
        its = self.database._async_connection
        its._drop()
        its._socket.doRead()
        its._socket.doWrite()
        self.assertEqual(its._socket.fileno(), -1)
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])

    async def test_more_than_the_socket_takes(self) -> None:
        """A statement and a row of 8 MiB each pass through the socket buffers intact."""
        text = "x" * (8 << 20)
        [(length, back)] = await self.database.run_steps(_ask, "select length(%s), %s", text, text)
        self.assertEqual((length, back), (len(text), text))

    async def test_settings(self) -> None:
        """A session of the asynchronous connection has the same settings as a session of the pool."""
        asked = "select current_setting('synchronous_commit'), current_setting('timezone'), current_setting(%s)"
        [row] = await self.database.run_steps(_ask, asked, "statement_timeout")
        self.assertEqual(row, ("on", "UTC", "8s"))

    async def test_lost_when_idle(self) -> None:
        """A connection lost while idle is replaced, and the next statement succeeds."""
        await self.database.run_steps(_ask, "select 1")
        for _ in range(3):
            self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s line'")
            await poll(lambda: not self.backends(), "the connection ends")
            self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])

    async def test_ended_but_not_closed(self) -> None:
        """A connection that PostgreSQL has ended, and whose socket it has not closed yet, gets no further statement."""
        place = parse_dsn(self.url)
        through = proxy.Proxy(0, UNIXClientEndpoint(reactor, f"{place['host']}/.s.PGSQL.{place['port']}"))
        await through.start()
        self.addCleanup(through.stop)
        database = self.start(f"postgresql://{place['user']}@127.0.0.1:{through.port}/{place['dbname']}")
        await database.run_steps(_ask, "select 1")
        with mock.patch.object(proxy._End, "connectionLost"):
            self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s line'")
            await poll(lambda: database._async_connection._conn is None, "the database's last message is read")
            self.assertEqual(await database.run_steps(_ask, "select 1"), [(1,)])

    async def test_lost_under_way(self) -> None:
        """A connection lost during a statement raises DatabaseUnavailable, and the next statement opens a new one."""
        asked = self.database.run_steps(_ask, "select pg_sleep(60)")
        await poll(self.backends, "it asks")
        self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s line'")
        await self.assertFailure(asked, DatabaseUnavailable)
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])

    async def test_statement_timeout(self) -> None:
        """The database cancels a statement that exceeds its timeout, and the connection does not count as away."""
        database = self.start(statement_timeout_s=0.2)
        await self.assertFailure(database.run_steps(_ask, "select pg_sleep(60)"), DatabaseUnavailable)
        self.assertFalse(database.is_away)
        self.assertEqual(await database.run_steps(_ask, "select 1"), [(1,)])

    async def test_stop_finishes_what_runs(self) -> None:
        """stop() lets the running statement finish, then closes the connection and accepts no further statements."""
        asked = self.database.run_steps(_ask, "select pg_sleep(0.3), 1")
        _, [(_, one)] = await gatherResults([self.database.stop(), asked])
        self.assertEqual(one, 1)
        await poll(lambda: not self.backends(), "no connection")
        await self.assertFailure(self.database.run_steps(_ask, "select 1"), DatabaseUnavailable)

    async def test_cancel_while_connecting(self) -> None:
        """cancel() fails a statement that waits for a connect, and closes the connection when the connect returns."""
        go_on, opening = threading.Event(), threading.Event()

        def slowly(*args: Any) -> Any:
            opening.set()
            go_on.wait(10)
            return connect(*args)

        connect = async_connection.open_async
        with mock.patch.object(async_connection, "open_async", slowly):
            asked = self.database.run_steps(_ask, "select 1")
            await poll(opening.is_set, "it connects")
            cancelled = self.database.cancel()
            go_on.set()
            self.assertIn("cancelled", str(await self.assertFailure(asked, DatabaseUnavailable)))
        self.assertTrue(await cancelled)
        await poll(lambda: not self.backends(), "no connection")
        self.assertFalse(self.database.is_away)

    async def test_ended_as_soon_as_it_is_made(self) -> None:
        """A connection that ends immediately fails the waiting statement and is not retried for it."""
        made: list[driver.Connection] = []

        def ended(*args: Any) -> Any:
            made.append(conn := connect(*args))
            with blocking(self.url) as txn:
                txn.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))
            return conn

        connect = async_connection.open_async
        with mock.patch.object(async_connection, "open_async", ended):
            await self.assertFailure(self.database.run_steps(_ask, "select 1"), DatabaseUnavailable)
        self.assertEqual(len(made), 1)
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])

    async def test_cancel_waits_for_no_connection(self) -> None:
        """cancel() fails a statement that waits for a connection immediately, and the statement is never sent."""
        may_connect = threading.Event()
        self.addCleanup(may_connect.set)

        def slowly(*args: Any) -> Any:
            may_connect.wait(20)
            return connect(*args)

        connect = async_connection.open_async
        with mock.patch.object(async_connection, "open_async", slowly):
            asked = self.database.run_steps(_ask, "insert into public.t values (1)")
            self.assertNoResult(asked)
            cancelled = self.database.cancel()
            self.assertIn("cancelled", str(self.failureResultOf(asked, DatabaseUnavailable).value))
            may_connect.set()
        self.assertTrue(await cancelled)
        await poll(lambda: not self.backends(), "no connection")
        self.assertEqual(self.execute("select a from public.t"), [])

    async def test_cancel(self) -> None:
        """cancel() fails the running statement immediately, and no further statement is accepted."""
        asked = self.database.run_steps(_ask, "select pg_sleep(60)")
        await poll(self.backends, "it asks")
        self.assertTrue(await self.database.cancel())
        self.assertIn("cancelled", str(self.failureResultOf(asked, DatabaseUnavailable).value))
        await self.assertFailure(self.database.run_steps(_ask, "select 1"), DatabaseUnavailable)


class OutageTests(DatabaseTestCase):
    """The asynchronous connection to a cluster of its own, which stops, freezes and restarts."""

    def setUp(self) -> None:
        """Start the cluster and a pool that connects to it."""
        self._session = None
        self.cluster = Cluster()
        self.addCleanup(self.cluster.remove)
        self.counters = Counters()
        self.database = Database(self.cluster.url, statement_timeout_s=0.5, counters=self.counters)
        self.database.start()
        self.addCleanup(self.database.stop)
        self.events: list[LogEvent] = []
        globalLogPublisher.addObserver(self.events.append)
        self.addCleanup(globalLogPublisher.removeObserver, self.events.append)

    def told(self) -> list[str]:
        """Return the log lines about the availability of the database."""
        return [
            async_connection
            for async_connection in map(formatEvent, self.events)
            if "the database is" in async_connection
        ]

    async def test_gone_and_back(self) -> None:
        """An outage is logged once, each statement in it raises DatabaseUnavailable, and its end is logged once."""
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])
        self.cluster.stop()
        for _ in range(3):
            await self.assertFailure(self.database.run_steps(_ask, "select 1"), DatabaseUnavailable)
            self.assertTrue(self.database.is_away)
        self.cluster.start()
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])
        self.assertFalse(self.database.is_away)
        self.assertEqual(len(self.told()), 2)

    async def test_it_hangs(self) -> None:
        """A statement on a frozen database fails in bounded time, both on an open connection and while connecting."""
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])
        self.cluster.freeze()
        try:
            with (
                mock.patch.object(async_connection, "BEYOND_S", 0.5),
                mock.patch.object(async_connection, "CONNECT_S", 0.5),
                # No file descriptor is free, and none is needed.
                mock.patch.object(os, "dup", side_effect=OSError("too many open files")),
            ):
                for said in ("does not answer", "no answer within 0.5 s"):
                    asked: Deferred[Any] = self.database.run_steps(_ask, "select 1")
                    self.assertIn(said, str(await self.assertFailure(asked, DatabaseUnavailable)))
            self.assertEqual(self.counters.met, {"database_answer": 1})
        finally:
            self.cluster.thaw()
        self.assertEqual(await self.database.run_steps(_ask, "select 1"), [(1,)])

    async def test_a_commit_that_hangs(self) -> None:
        """While COMMITs wait for an absent standby, the number of open sessions never exceeds MOST_GIVEN_UP."""
        with blocking(self.cluster.url) as txn:
            txn.execute("create table public.made (n integer)")
        self.configure("'nobody'")
        try:
            with mock.patch.object(async_connection, "BEYOND_S", 0.0):
                for _ in range(async_connection.MOST_GIVEN_UP + 3):
                    asked: Deferred[Any] = self.database.run_steps(
                        _ask, "insert into public.made values (1) returning n"
                    )
                    await self.assertFailure(asked, DatabaseUnavailable)
            self.assertEqual(len(self.sessions()), async_connection.MOST_GIVEN_UP)
            self.assertIn("have not ended", str(await self.assertFailure(self.asked(), DatabaseUnavailable)))
        finally:
            self.configure("''")
        await poll(lambda: not self.database._async_connection._given_up, "the end of those sessions")
        self.assertEqual(await self.asked(), [(1,)])

    def asked(self) -> Deferred[Any]:
        """Run a short query."""
        return self.database.run_steps(_ask, "select 1")

    def sessions(self) -> list[Any]:
        """Return the sessions whose COMMIT waits for the standby."""
        with blocking(self.cluster.url, "look") as txn:
            txn.execute("select pid from pg_stat_activity where application_name = 's2s' and wait_event = 'SyncRep'")
            return txn.fetchall()

    def configure(self, names: str) -> None:
        """Set the names of the standbys that a COMMIT waits for."""
        conn = psycopg2.connect(self.cluster.url)
        conn.autocommit = True
        with closing(conn), conn.cursor() as txn:
            txn.execute(f"alter system set synchronous_standby_names = {names}")
            txn.execute("select pg_reload_conf()")
