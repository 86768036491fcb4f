"""The pool: one transaction for each call, s2s errors, and a database that fails and recovers."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any
from urllib.parse import quote

import psycopg2
from psycopg2.extensions import parse_dsn
from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import LogEvent, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import CommitLost, DatabaseUnavailable, OperatorError, StatementRefused
from s2s.protocol.limits import Counters
from s2s.store import connection, driver, pool
from s2s.store.connection import prepare
from s2s.store.pool import Database, blocking
from s2s.store.sqlstate import with_cure
from tests.support.postgres import DatabaseTestCase, Session, cluster_url
from tests.support.waiting import poll

_PASSWORD = "Tr0ub4dor"


def _one(txn: driver.Cursor, statement: str, *params: Any) -> Any:
    txn.execute(statement, params or None)
    return txn.fetchone()[0] if txn.description else None


def _step() -> driver.Steps[Any]:
    return (yield driver.Query("select 1", ()))


class TellingTests(DatabaseTestCase):
    """:func:`s2s.store.driver.translate_error`."""

    def test_libpqs_own(self) -> None:
        """An error of libpq means a lost connection, even if psycopg2 has not marked the connection as closed."""
        connection = psycopg2.connect(self.url)
        self.addCleanup(connection.close)
        for error in (
            psycopg2.DatabaseError("server closed the connection unexpectedly"),
            psycopg2.OperationalError("server closed the connection unexpectedly"),
            psycopg2.InterfaceError("connection already closed"),
            psycopg2.OperationalError("SSL SYSCALL error: EOF detected"),
        ):
            told = driver.translate_error(error, connection)
            self.assertIsInstance(told, DatabaseUnavailable)
        with self.assertRaises(psycopg2.Error) as caught:
            connection.cursor().execute("select 1 / 0")
        self.assertIsInstance(driver.translate_error(caught.exception, connection), StatementRefused)
        self.assertIsInstance(
            driver.translate_error(psycopg2.ProgrammingError("can't adapt"), connection), StatementRefused
        )

    def test_the_line_that_says_most(self) -> None:
        """For a host with several addresses, the error of the address at which PostgreSQL answers is reported."""
        text = 'connection to "::1" failed: refused\nconnection to "127.0.0.1" failed: FATAL:  role "u" does not exist'
        told = driver.translate_error(psycopg2.OperationalError(text))
        self.assertIn('role "u" does not exist', str(told))
        self.assertEqual(told.state, "28000")

    async def test_a_backslash_in_a_parameter(self) -> None:
        """A parameter arrives unchanged if a user's default makes backslashes escape characters in literals."""
        given = "a\\n\\' or 1=1; --"
        options = quote("-c standard_conforming_strings=off -c search_path=public")
        url = f"{self.url}{'&' if '?' in self.url else '?'}options={options}"
        with blocking(url) as txn:
            self.assertEqual(_one(txn, "select %s", given), given)
            self.assertEqual(_one(txn, "show search_path"), "pg_catalog, pg_temp")
        database = Database(url, threads=1)
        database.start()
        self.addCleanup(database.stop)
        self.assertEqual(await database.run(_one, "select %s", given), given)
        asked: Deferred[Any] = Deferred()
        database.query(driver.Query("select %s", (given,)), asked.callback)
        self.assertEqual(await asked, [(given,)])

    async def test_timeouts_of_the_owner(self) -> None:
        """Default timeouts of a millisecond do not end our first statements, however long these take."""
        name = parse_dsn(self.url)["dbname"]
        slow = connection.baseline

        def misreads(conn: Any) -> bool:
            time.sleep(0.05)
            return False

        self.patch(connection, "_misreads_literals", misreads)
        self.patch(connection, "baseline", lambda *args: f"select pg_catalog.pg_sleep(0.05); {slow(*args)}")
        known = self.execute("select name from pg_settings where name = any(%s)", list(connection._TIMEOUTS))
        for (setting,) in known:
            self.execute(f"alter database {name} set {setting} = 1")
            with self.subTest(setting=setting):
                with blocking(self.url) as txn:
                    self.assertEqual(_one(txn, f"show {setting}") == "0", setting in connection._SETTINGS)
                database, handlers = self.pools(f"s2s {setting}", threads=1)
                for each in (database, handlers):
                    self.assertEqual(await each.run(_one, "select 1"), 1)
                asked: Deferred[Any] = Deferred()
                database.query(driver.Query("select 1", ()), asked.callback)
                self.assertEqual(await asked, [(1,)])
                await handlers.stop()
                await database.stop()
            self.execute(f"alter database {name} reset {setting}")

    def test_identifiers_in_quotes(self) -> None:
        """The names of our tables in catalogs are read without quotes, whatever the owner's default is."""
        name = parse_dsn(self.url)["dbname"]
        self.execute(f"alter database {name} set quote_all_identifiers = on")
        with blocking(self.url) as txn:
            self.assertEqual(_one(txn, "select 's2s.outbox'::regclass::text"), "s2s.outbox")

    def test_a_pooler_that_drops_options(self) -> None:
        """A connection that would misread our literals is refused with the statement that fixes it."""
        conn = psycopg2.connect(self.url, options="-c standard_conforming_strings=off")
        self.addCleanup(conn.close)
        with self.assertRaisesRegex(psycopg2.OperationalError, "alter role"):
            prepare(conn, 1.0, 1.0)

    def test_no_connections_are_allowed(self) -> None:
        """The error for a database that allows no connections names the statement that allows them."""
        name = parse_dsn(self.url)["dbname"]
        with Session(cluster_url()) as session:
            session.run(f"alter database {name} allow_connections false")
        error = self.assertRaises(DatabaseUnavailable, blocking(self.url).__enter__)
        self.assertIn("alter database NAME allow_connections true", with_cure(error))

    def test_what_is_lost(self) -> None:
        """A transaction is lost with its connection, and after a COMMIT inside it."""
        connection = psycopg2.connect(self.url)
        self.addCleanup(connection.close)
        txn = connection.cursor()
        txn.execute("select 1")
        self.assertTrue(driver.is_in_transaction(txn))
        txn.execute("commit")
        self.assertFalse(driver.is_in_transaction(txn))
        connection.rollback()
        txn.execute("select pg_backend_pid()")
        self.execute("select pg_terminate_backend(%s)", *txn.fetchone())
        with self.assertRaises(psycopg2.Error):
            txn.execute("select 1")
        self.assertFalse(driver.is_in_transaction(txn))


class UrlTests(SynchronousTestCase):
    """How a database URL is read."""

    def test_url_wins(self) -> None:
        """Parameters in the URL override our parameters, which are used otherwise."""
        given = driver.parameters("postgresql://u@h/d?connect_timeout=2", application_name="ours")
        self.assertEqual((given["connect_timeout"], given["application_name"]), ("2", "ours"))

    def test_unreadable_urls_show_no_password(self) -> None:
        """A URL that is invalid, or that its password splits wrongly, is refused without quoting the password."""
        for url in (
            f"postgresql://u:{_PASSWORD}@h:1/d?no_such=1",
            f"postgresql://u:{_PASSWORD}@{_PASSWORD}@h/d",
            f"postgresql://u:{_PASSWORD}/x@h/d",
            f"postgresql://u:12/{_PASSWORD}@h/d",
            f"{_PASSWORD}",
        ):
            with self.subTest(url=url):
                error = self.assertRaises(OperatorError, Database, url)
                self.assertNotIn(_PASSWORD, str(error))
                self.assertNotIn("\n", str(error))

    def test_repr_shows_no_password(self) -> None:
        """The repr of the object that holds the URL contains no password."""
        self.assertNotIn(_PASSWORD, repr(Database(f"postgresql://u:{_PASSWORD}@h/d")))


class DatabaseTests(DatabaseTestCase):
    """:class:`Database` on a real server."""

    def setUp(self) -> None:
        """Start a pool of two connections."""
        super().setUp()
        self.execute("create table public.t (a int unique check (a > 0))")
        self.database = self.start_database(threads=2)

    def start_database(self, url: str = "", **options: Any) -> Database:
        """Start a pool, and stop it when the test ends."""
        database = Database(url or self.url, **options)
        database.start()
        self.addCleanup(database.stop)
        return database

    def kill_connections(self) -> None:
        """End every connection of the pool."""
        self.execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 's2s'")

    async def test_commits(self) -> None:
        """The transaction of a call that returns is committed before the Deferred fires."""
        await self.database.run(_one, "insert into public.t values (1)")
        self.assertEqual(self.execute("select a from public.t"), [(1,)])

    async def test_rolls_back(self) -> None:
        """The transaction of a call that raises is rolled back, and its exception is passed on unchanged."""

        def work(txn: driver.Cursor) -> None:
            txn.execute("insert into public.t values (1)")
            raise KeyError("mine")

        await self.assertFailure(self.database.run(work), KeyError)
        self.assertEqual(self.execute("select a from public.t"), [])

    async def test_refusals_name_the_constraint_and_no_data(self) -> None:
        """The error names the violated constraint and does not quote the row."""
        await self.database.run(_one, "insert into public.t values (4711)")
        twice = await self.assertFailure(
            self.database.run(_one, "insert into public.t values (4711)"), StatementRefused
        )
        self.assertEqual(twice.constraint, "t_a_key")
        self.assertNotIn("4711", str(twice))
        wrong = await self.assertFailure(
            self.database.run(_one, "insert into public.t values (-4711)"), StatementRefused
        )
        self.assertEqual(wrong.constraint, "t_a_check")
        self.assertNotIn("4711", str(wrong))

    async def test_a_swallowed_error_is_no_commit(self) -> None:
        """A call that swallows the error of a statement fails, since its transaction is not committed."""

        def work(txn: driver.Cursor) -> None:
            txn.execute("insert into public.t values (1)")
            try:
                txn.execute("insert into public.t values (-1)")
            except Exception:
                return

        await self.assertFailure(self.database.run(work), StatementRefused)

    async def test_session_settings(self) -> None:
        """A connection has its time limits, its application_name, and a COMMIT that waits for the disk."""
        names = ("statement_timeout", "idle_in_transaction_session_timeout", "synchronous_commit", "timezone")
        values = [await self.database.run(_one, f"select current_setting('{name}')") for name in names]
        self.assertEqual(values, ["8s", "1min", "on", "UTC"])
        self.assertEqual(await self.database.run(_one, "show application_name"), "s2s")

    async def test_statement_timeout(self) -> None:
        """A statement over its timeout is cancelled and reported as unavailable; the connection stays usable."""
        database = self.start_database(threads=1, statement_timeout_s=0.05)
        await self.assertFailure(database.run(_one, "select pg_sleep(5)"), DatabaseUnavailable)
        self.assertEqual(await database.run(_one, "select 1"), 1)

    async def test_refused_connections(self) -> None:
        """A refused or unprepared connection leaves no descriptor open, even without garbage collection."""
        gc.disable()
        self.addCleanup(gc.enable)
        refused = self.start_database(self.url.replace("/test_", "/no_such_", 1), threads=1)
        unprepared = self.start_database(threads=1, statement_timeout_s=-1.0)
        open_before = len(os.listdir("/proc/self/fd"))
        for database in (refused, unprepared):
            for _ in range(10):
                await self.assertFailure(database.run(_one, "select 1"), DatabaseUnavailable)
                await self.assertFailure(database.run_steps(_step), DatabaseUnavailable)
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), open_before + 4)

    async def test_lost_idle_connections_cost_nobody_anything(self) -> None:
        """After the database has closed idle connections, the next calls reconnect without a failure."""
        await gatherResults([self.database.run(_one, "select pg_sleep(0.05)") for _ in range(2)])
        self.kill_connections()
        await poll(lambda: self.execute("select 1 from pg_stat_activity where application_name = 's2s'") == [])
        self.assertEqual(await gatherResults([self.database.run(_one, "select 7") for _ in range(4)]), [7] * 4)

    async def test_lost_under_way(self) -> None:
        """A connection lost during a statement raises DatabaseUnavailable without a traceback; the next call works."""

        def work(txn: driver.Cursor) -> None:
            txn.execute("insert into public.t values (1)")
            self.kill_connections()
            txn.execute("select 1")

        await self.assertFailure(self.database.run(work), DatabaseUnavailable)
        self.assertEqual(await self.database.run(_one, "select count(*) from public.t"), 0)
        self.assertEqual(self.flushLoggedErrors(), [])

    async def test_lost_before_the_commit(self) -> None:
        """A COMMIT on a lost connection, or one that loses it, raises CommitLost: its outcome is unknown."""

        def work(txn: driver.Cursor) -> None:
            txn.execute("insert into public.t values (1)")
            self.kill_connections()

        await self.assertFailure(self.database.run(work), CommitLost)

        def die(txn: driver.Cursor) -> None:
            txn.execute(
                "create function die() returns trigger language plpgsql"
                " as 'begin perform pg_terminate_backend(pg_backend_pid()); return new; end';"
                "create constraint trigger die after insert on public.t deferrable initially deferred"
                " for each row execute function die(); insert into public.t values (1)"
            )

        await self.assertFailure(self.database.run(die), CommitLost)
        with self.assertRaises(DatabaseUnavailable), blocking(self.url) as txn:
            self.assertRaises(CommitLost, pool.step, txn, die)

    async def test_refused_by_the_commit(self) -> None:
        """A transaction that the COMMIT itself refuses raises StatementRefused and is not committed."""

        def work(txn: driver.Cursor) -> None:
            txn.execute(
                "create table public.u (n int unique deferrable initially deferred); insert into"
                " public.u values (1), (1)"
            )

        await self.assertFailure(self.database.run(work), StatementRefused)

    async def test_an_outage_is_told_once(self) -> None:
        """However many calls fail, the log has one line at the start of an outage and one at its end."""
        said: list[str] = []

        def hear(event: LogEvent) -> None:
            if event.get("log_namespace") == "s2s.store.availability.Availability":
                said.append(formatEvent(event))

        globalLogPublisher.addObserver(hear)
        self.addCleanup(globalLogPublisher.removeObserver, hear)
        name = self.url.partition("?")[0].rpartition("/")[2]
        admin = psycopg2.connect(cluster_url())
        self.addCleanup(admin.close)
        admin.autocommit = True
        admin.cursor().execute(f"alter database {name} allow_connections false")
        for _ in range(3):
            await self.assertFailure(self.database.run(_one, "select 1"), DatabaseUnavailable)
        [line] = said
        self.assertIn("the database is not available: ", line)
        admin.cursor().execute(f"alter database {name} allow_connections true")
        await self.database.run(_one, "select 1")
        self.assertEqual(said[1:], ["the database is available again"])

    async def test_a_wrong_password_is_not_told(self) -> None:
        """The error of a failed connect does not contain the password."""
        url = f"postgresql://nobody:{_PASSWORD}@127.0.0.1:1/d"
        error = await self.assertFailure(self.start_database(url).run(_one, "select 1"), DatabaseUnavailable)
        self.assertNotIn(_PASSWORD, str(error))

    async def test_bounded(self) -> None:
        """Calls beyond the limit of waiting calls are refused at once and counted."""
        counters = Counters()
        database = self.start_database(threads=1, max_waiting=2, counters=counters)
        gate = threading.Event()
        calls = [database.run(lambda txn: gate.wait(10)) for _ in range(3)]
        self.assertEqual((database.running, database.waiting), (1, 2))
        error = self.failureResultOf(database.run(lambda txn: None), DatabaseUnavailable).value
        self.assertIn("overloaded", str(error))
        self.assertEqual(counters.met, {"database": 1})
        gate.set()
        await gatherResults(calls)
        self.assertEqual((database.running, database.waiting), (0, 0))

    async def test_stop_finishes_what_runs(self) -> None:
        """A stop waits for running and queued calls, closes every connection, and refuses later calls."""
        database = self.start_database(threads=2, application_name="stopped")
        calls = [database.run(_one, "select pg_sleep(0.1)") for _ in range(4)]
        stopped = database.stop()
        self.failureResultOf(database.run(_one, "select 1"), DatabaseUnavailable)
        await gatherResults([*calls, stopped])
        count = "select count(*) from pg_stat_activity where application_name = 'stopped'"
        await poll(lambda: self.execute(count) == [(0,)])

    async def test_cancel(self) -> None:
        """A cancel ends running calls, refuses waiting and later calls, and reports no outage."""
        database = self.start_database(threads=1, application_name="cancelled")
        calls = [database.run(_one, "select pg_sleep(60)"), database.run(_one, "insert into public.t values (1)")]
        await poll(lambda: self.execute("select 1 from pg_stat_activity where wait_event = 'PgSleep'"), "the statement")
        ended = database.cancel()
        self.failureResultOf(database.run(_one, "select 1"), DatabaseUnavailable)
        for call in calls:
            error = await self.assertFailure(call, DatabaseUnavailable)
            self.assertIn("the process stops", str(error))
        self.assertTrue(await ended)
        self.assertTrue(await database.cancel())
        self.assertFalse(database.is_away)
        self.assertEqual(self.execute("select * from public.t"), [])

    async def test_cancel_with_nothing_under_way(self) -> None:
        """A cancel finishes at once if the pool is idle or was never started."""
        self.assertTrue(self.successResultOf(self.start_database().cancel()))
        self.assertTrue(self.successResultOf(Database(self.url).cancel()))

    async def test_nothing_is_committed_after_cancel(self) -> None:
        """A cancelled call that runs no further statement is rolled back; the cancel waits for it a bounded time."""
        self.patch(pool, "CANCEL_S", 0.1)
        gate, inside = threading.Event(), threading.Event()
        self.addCleanup(gate.set)

        def work(txn: driver.Cursor) -> None:
            txn.execute("insert into public.t values (1)")
            inside.set()
            gate.wait(10)

        call = self.database.run(work)
        await poll(inside.is_set, "the work")
        stopped = self.database.stop()
        self.assertFalse(await self.database.cancel())
        gate.set()
        await self.assertFailure(call, DatabaseUnavailable)
        await stopped
        self.assertEqual(self.execute("select * from public.t"), [])

    async def test_run_last(self) -> None:
        """A shutdown transaction works after a cancel, and fails within a bounded time."""
        await self.database.cancel()
        await self.database.run_at_shutdown(_one, "insert into public.t values (1)")
        self.assertEqual(self.execute("select a from public.t"), [(1,)])
        self.patch(pool, "LAST_S", 0.1)
        await self.assertFailure(self.database.run_at_shutdown(_one, "select pg_sleep(60)"), DatabaseUnavailable)
        gate = threading.Event()
        self.addCleanup(gate.set)
        await self.assertFailure(self.database.run_at_shutdown(lambda txn: gate.wait(10)), DatabaseUnavailable)

    async def test_what_the_work_makes_of_a_lost_connection(self) -> None:
        """A call that replaces the error of its lost connection by another error raises DatabaseUnavailable."""

        def work(txn: driver.Cursor) -> None:
            self.kill_connections()
            try:
                txn.execute("select 1")
            except psycopg2.Error:
                raise KeyError("mine") from None

        await self.assertFailure(self.database.run(work), DatabaseUnavailable)

    def test_nothing_before_start(self) -> None:
        """Before the start the pool has no connection and no thread, and a call is refused."""
        before = threading.active_count()
        self.failureResultOf(Database(self.url).run(_one, "select 1"), DatabaseUnavailable)
        self.assertEqual(threading.active_count(), before)


class BlockingTests(DatabaseTestCase):
    """:func:`blocking`."""

    def test_commits_and_rolls_back(self) -> None:
        """The transaction is committed at the end or rolled back on an exception; errors are raised as s2s errors."""
        with blocking(self.url) as txn:
            txn.execute("create table public.t (a int unique)")
            txn.execute("insert into public.t values (1)")
        with self.assertRaises(StatementRefused) as caught, blocking(self.url) as txn:
            txn.execute("insert into public.t values (2)")
            txn.execute("insert into public.t values (1)")
        self.assertEqual(caught.exception.constraint, "t_a_key")
        self.assertEqual(self.execute("select a from public.t"), [(1,)])

    def test_no_connection(self) -> None:
        """A database that cannot be reached raises DatabaseUnavailable with a one-line message."""
        with self.assertRaises(DatabaseUnavailable) as caught, blocking("postgresql://u@127.0.0.1:1/d"):
            pass
        self.assertNotIn("\n", str(caught.exception))

    def test_timeouts(self) -> None:
        """Explicit time limits override the connect_timeout of the URL, which applies otherwise."""
        seen: list[Any] = []
        real = psycopg2.connect

        def connect(**parameters: Any) -> Any:
            seen.append(parameters["connect_timeout"])
            return real(**parameters)

        self.patch(psycopg2, "connect", connect)
        with blocking(f"{self.url}&connect_timeout=7", statement_timeout_s=1.0, connect_timeout_s=1.0) as txn:
            self.assertEqual(_one(txn, "show statement_timeout"), "1s")
        with blocking(f"{self.url}&connect_timeout=7"):
            pass
        self.assertEqual(seen, [1, "7"])
