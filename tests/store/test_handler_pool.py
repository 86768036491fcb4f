"""Foreign code in transactions: its deadline, and the state that it may leave (:mod:`s2s.store.handler_pool`)."""

from __future__ import annotations

import contextlib
import decimal
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import psycopg2
import psycopg2.extensions
from psycopg2.extras import DictCursor, Json
from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable, HandlerStuck, HandlerTimeout, StatementRefused
from s2s.runtime.hooks import SharedHooks
from s2s.store import connection, handler_pool
from s2s.store.cursor import StoreCursor
from s2s.store.driver import Cursor
from s2s.store.handler_pool import HandlerPool, Task
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

#: Each state that foreign code may leave on a session by SQL: the statement, and a query that is true if it is gone.
_LEFT = {
    "role": ("set role other", "select current_user = session_user"),
    "session_authorization": ("set session authorization other", "select session_user <> 'other'"),
    "search_path": ("set search_path = nowhere", "select current_setting('search_path') <> 'nowhere'"),
    "datestyle": ("set datestyle = 'SQL, DMY'", "select current_setting('datestyle') = 'ISO, MDY'"),
    "timezone": ("set timezone = 'Asia/Tokyo'", "select current_setting('timezone') = 'UTC'"),
    "array_nulls": ("set array_nulls = off", "select current_setting('array_nulls') = 'on'"),
    "strings": (
        "set standard_conforming_strings = off",
        "select current_setting('standard_conforming_strings') = 'on'",
    ),
    "timeout": ("set statement_timeout = 1", "select current_setting('statement_timeout') = '65s'"),
    "lock timeout": ("set lock_timeout = 1", "select current_setting('lock_timeout') = '0'"),
    "read-only session": (
        "set session characteristics as transaction read only",
        "select current_setting('default_transaction_read_only') = 'off'",
    ),
    "isolation": (
        "set session characteristics as transaction isolation level serializable",
        "select current_setting('transaction_isolation') = 'read committed'",
    ),
    "actor": (
        "select set_config('s2s.actor', 'nobody', false)",
        "select coalesce(current_setting('s2s.actor', true), '') = ''",
    ),
    "commits": ("set synchronous_commit = off", "select current_setting('synchronous_commit') = 'on'"),
    "temporary table": ("create temp table commands (n integer)", "select to_regclass('pg_temp.commands') is null"),
    "advisory lock": (
        "select pg_advisory_lock(42)",
        "select not exists (select from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())",
    ),
    "listen": ("listen nothing", "select not exists (select pg_listening_channels())"),
    "prepared": ("prepare mine as select 1", "select not exists (select from pg_prepared_statements)"),
    "cursor": (
        "declare mine cursor with hold for select 1",
        "select not exists (select from pg_cursors where name = 'mine')",
    ),
    "replication slot": (
        "select pg_create_physical_replication_slot('mine', true, true)",
        "select not exists (select from pg_replication_slots where slot_name = 'mine')",
    ),
}


#: The methods of psycopg2's connection that end the transaction or the connection, with their arguments.
_ENDS: dict[str, tuple[Any, ...]] = {
    "commit": (),
    "rollback": (),
    "reset": (),
    "close": (),
    "cancel": (),
    "set_isolation_level": (1,),
    "set_client_encoding": ("LATIN1",),
}


def _sql(statement: str) -> Callable[[Cursor], object]:
    return lambda cursor: cursor.execute(statement)


def _in_python(name: str, value: Any) -> Callable[[Cursor], object]:
    return lambda cursor: setattr(cursor.connection, name, value)


class CleanTests(DatabaseTestCase):
    """The state that the foreign code of one transaction leaves on its connection."""

    def setUp(self) -> None:
        """Start a pool with one connection."""
        super().setUp()
        self.execute("drop role if exists other; create role other")
        self.addCleanup(self.execute, "drop owned by other; drop role other")
        _, self.handlers = self.pools("s2s-clean", threads=1)

    def call(self, code: Callable[[Cursor], Any], then: Callable[[Cursor], Any] = lambda _: None) -> Any:
        """Run foreign code in a transaction, then our own code in the same transaction."""

        def work(txn: Cursor) -> Any:
            with self.handlers.foreign(txn, "test") as cursor:
                code(cursor)
            return then(txn)

        return self.handlers.run(work)

    async def test_after_the_transaction(self) -> None:
        """The next transaction starts with a clean session, whatever state the SQL of the previous one left."""
        for name, (leave, show) in _LEFT.items():
            await self.call(_sql(leave))
            found = await self.handlers.run(_ask, show)
            self.assertEqual(found, [(True,)], name)

    async def test_after_a_failure(self) -> None:
        """The next transaction starts with a clean session even if the foreign code raised after it left its state."""

        def fail(leave: str) -> Callable[[Cursor], object]:
            def code(cursor: Cursor) -> None:
                cursor.execute(leave)
                raise ValueError(leave)

            return code

        for name, (leave, show) in _LEFT.items():
            await self.assertFailure(self.call(fail(leave)), ValueError)
            self.assertEqual(await self.handlers.run(_ask, show), [(True,)], name)

    async def test_in_the_same_transaction(self) -> None:
        """Our statements after a call run as our own user and with our own settings."""
        for name in ("role", "session_authorization", "search_path", "datestyle", "array_nulls", "timeout", "actor"):
            leave, show = _LEFT[name]
            found = await self.call(_sql(leave), lambda txn, show=show: _ask(txn, show))
            self.assertEqual(found, [(True,)], name)

    async def test_names_in_the_same_transaction(self) -> None:
        """Two calls in one transaction can create objects of the same names, as two commands of one type do."""
        statements = (
            "create temp table work (n integer) on commit drop",
            "prepare mine as select 1",
            "declare mine cursor for select 1",
            "declare held cursor with hold for select 1",
        )

        def work(txn: Cursor) -> int:
            for _ in range(2):
                with self.handlers.foreign(txn, "test") as cursor:
                    for statement in statements:
                        cursor.execute(statement)
            return 2

        self.assertEqual(await self.handlers.run(work), 2)

    async def test_names_after_a_failure(self) -> None:
        """A call that fails leaves no named object to the next call."""
        statements = (
            "create temp table work (n integer)",
            "prepare mine as select 1",
            "declare mine cursor for select 1",
        )

        def work(txn: Cursor) -> int:
            for _ in range(2):
                with contextlib.suppress(ValueError), self.handlers.foreign(txn, "test") as cursor:
                    for statement in statements:
                        cursor.execute(statement)
                    raise ValueError
            return 2

        self.assertEqual(await self.handlers.run(work), 2)

    async def test_a_replication_origin(self) -> None:
        """The replication origin of a call is gone before the next call and the COMMIT, also after a failure."""
        self.execute("select pg_replication_origin_create('mine')")
        self.addCleanup(self.execute, "select pg_replication_origin_drop('mine')")

        def work(txn: Cursor, error: type[Exception] | None) -> list[Any]:
            for _ in range(2):
                with contextlib.suppress(ValueError), self.handlers.foreign(txn, "test") as cursor:
                    cursor.execute("select pg_replication_origin_session_setup('mine')")
                    if error is not None:
                        raise error
            return _ask(txn, "select pg_replication_origin_session_is_setup()")

        for error in (None, ValueError):
            self.assertEqual(await self.handlers.run(work, error), [(False,)])

        def end(cursor: Cursor) -> None:
            cursor.execute("select pg_replication_origin_session_setup('mine')")
            cursor.execute("commit")

        await self.assertFailure(self.call(end), Exception)
        self.assertEqual(await self.handlers.run(_ask, "select pg_replication_origin_session_is_setup()"), [(False,)])

    async def test_sql_that_failed(self) -> None:
        """The session of a call whose statement failed is replaced: an extension may keep state in it."""
        [(pid,)] = await self.handlers.run(_ask, "select pg_backend_pid()")
        await self.assertFailure(self.call(_sql("select 1 / 0")), StatementRefused)
        self.assertNotEqual(await self.handlers.run(_ask, "select pg_backend_pid()"), [(pid,)])

    async def test_a_temporary_table_in_the_way(self) -> None:
        """Our statements after a call do not read a temporary table that has the name of one of our tables."""
        self.execute("insert into s2s.commands (cmd_type, idem_key, payload) values ('a', 'b', '{}')")
        leave = _sql("create temp table commands (cmd_id bigint)")
        self.assertEqual(await self.call(leave, lambda txn: _ask(txn, "select count(*) from s2s.commands")), [(1,)])

    async def test_in_python(self) -> None:
        """A connection whose psycopg2 state was changed is replaced."""

        def register(cursor: Cursor) -> None:
            oids = psycopg2.extensions.new_type((20, 23), "WRONG", lambda *_: "wrong")
            psycopg2.extensions.register_type(oids, cursor.connection)

        changes = {
            "cursor_factory": _in_python("cursor_factory", DictCursor),
            "caster": register,
        }
        for name, change in changes.items():
            [(pid,)] = await self.handlers.run(_ask, "select pg_backend_pid()")
            await self.call(change)
            found = await self.handlers.run(_ask, "select pg_backend_pid(), 7::bigint, 7")
            self.assertNotEqual(found[0][0], pid, f"{name} {found} {pid}")
            self.assertEqual(found[0][1:], (7, 7), name)

    async def test_a_clean_connection_stays(self) -> None:
        """A connection with a clean session is reused."""
        pids = {(await self.handlers.run(_ask, "select pg_backend_pid()"))[0][0] for _ in range(5)}
        self.assertEqual(len(pids), 1)

    async def test_a_cursor_that_is_kept(self) -> None:
        """The cursor of a call is closed at the end of the call, so that foreign code cannot use it later."""
        kept: list[Cursor] = []
        await self.call(kept.append)
        self.assertTrue(kept[0].closed)

    async def test_cursors_that_are_made(self) -> None:
        """Every cursor that foreign code makes is closed at the end of the call, even in a failed transaction."""
        kept: list[Any] = []

        def make(cursor: Cursor) -> None:
            conn = cursor.connection
            kept.extend((conn.cursor(), conn.cursor("named"), conn.cursor(cursor_factory=DictCursor)))
            kept[1].execute("select generate_series(1, 3)")
            kept[2].execute("select 1 as one")
            self.assertEqual((kept[1].fetchone(), kept[2].fetchone()["one"]), ((1,), 1))

        def fail(cursor: Cursor) -> None:
            make(cursor)
            cursor.execute("select nothing")

        for code in (make, fail):
            kept.clear()
            await self.call(code).addErrback(lambda failure: failure.trap(DatabaseUnavailable) and None)
            self.assertEqual([each.closed for each in kept], [True] * 3)
            self.assertEqual(await self.handlers.run(_ask, "select 1"), [(1,)])

    async def test_a_cursor_of_another_worker(self) -> None:
        """A worker cannot use a cursor of another worker: the effect would be lost with the other's transaction."""
        _, others = self.pools("s2s-others", threads=1)
        shared: list[Cursor] = []
        began, ends = threading.Event(), threading.Event()

        def share(cursor: Cursor) -> None:
            shared.append(cursor)
            began.set()
            ends.wait(10)

        first = self.call(share)
        await deferToThread(began.wait, 10)
        self.addCleanup(ends.set)

        def use(txn: Cursor) -> None:
            with others.foreign(txn, "test"):
                shared[0].execute("select 1")

        await self.assertFailure(others.run(use), psycopg2.ProgrammingError, StatementRefused)
        ends.set()
        await first

    async def test_numbers_of_sequences(self) -> None:
        """``lastval()`` and ``currval()`` do not return the numbers that an earlier call of the transaction drew."""
        self.execute("create sequence tickets")
        for look in ("select lastval()", "select currval('tickets')"):

            def work(txn: Cursor, look: str = look) -> None:
                for statement in ("select nextval('tickets')", look):
                    with self.handlers.foreign(txn, "test") as cursor:
                        cursor.execute(statement)

            failure = await self.assertFailure(self.handlers.run(work), StatementRefused, DatabaseUnavailable)
            self.assertIn("is not yet defined in this session", str(failure))

    async def test_random_numbers(self) -> None:
        """Random numbers of the database do not repeat if two calls set the same seed."""
        found = [
            await self.call(_sql("select setseed(0.5)"), lambda txn: _ask(txn, "select random()")) for _ in range(2)
        ]
        found += [await self.handlers.run(_ask, "select random()")]
        self.assertEqual(len({number for [(number,)] in found}), 3)

    async def test_context(self) -> None:
        """Changes of a call to its context, such as the decimal precision, do not reach the next call."""

        def imprecise(txn: Cursor) -> None:
            with self.handlers.foreign(txn, "test"):
                handler_pool.call(lambda: decimal.getcontext().__setattr__("prec", 3))

        def divide(txn: Cursor) -> str:
            with self.handlers.foreign(txn, "test"):
                return handler_pool.call(lambda: str(decimal.Decimal(1) / 3))

        await self.handlers.run(imprecise)
        self.assertEqual(await self.handlers.run(divide), f"0.{'3' * 28}")

    async def test_the_environment(self) -> None:
        """Environment variables that a plug-in sets for its own connections do not affect ours."""
        changed = mock.patch.dict(os.environ, PGOPTIONS="-c search_path=nowhere", PGPASSWORD="another")
        changed.start()
        self.addCleanup(changed.stop)
        _, later = self.pools("s2s-environment", threads=1)

        def path(txn: Cursor) -> Any:
            with later.foreign(txn, "test") as cursor:
                cursor.execute("show search_path")
                return cursor.fetchall()

        self.assertEqual(await later.run(path), [('"$user", public',)])

    async def test_a_connection_that_is_kept(self) -> None:
        """A thread that outlives its call can neither end nor use the transaction through the call's connection."""
        self.execute("create table public.made (n integer)")
        refused: list[str] = []

        def leave_behind(cursor: Cursor) -> None:
            conn = cursor.connection

            def stray() -> None:
                for name, args in (*_ENDS.items(), ("cursor", ())):
                    try:
                        getattr(conn, name)(*args)
                    except psycopg2.ProgrammingError:
                        refused.append(name)

            self.stray = threading.Thread(target=stray)

        def work(txn: Cursor) -> None:
            with self.handlers.foreign(txn, "leaves a thread") as cursor:
                leave_behind(cursor)
            txn.execute("insert into public.made values (1)")
            self.stray.start()
            self.stray.join()
            raise ValueError("nothing is to be kept")

        await self.assertFailure(self.handlers.run(work), ValueError)
        self.assertEqual(self.execute("select n from public.made"), [])
        self.assertEqual(refused, [*_ENDS, "cursor"])

    async def test_ends_of_a_transaction(self) -> None:
        """Ending the transaction or connection through psycopg2 raises an error, and earlier work is committed."""
        self.execute("create table public.made (n integer)")

        def work(txn: Cursor) -> int:
            refused = 0
            txn.execute("insert into public.made values (1)")
            for name, args in _ENDS.items():
                try:
                    with self.handlers.foreign(txn, name) as cursor:
                        getattr(cursor.connection, name)(*args)
                except psycopg2.ProgrammingError:
                    refused += 1
            return refused

        self.assertEqual(await self.handlers.run(work), len(_ENDS))
        self.assertEqual(self.execute("select n from public.made"), [(1,)])

    async def test_a_read_only_transaction(self) -> None:
        """A call that makes its transaction read-only fails alone, and earlier work in the transaction is committed."""

        def work(txn: Cursor) -> bool:
            with self.handlers.foreign(txn, "writes") as cursor:
                cursor.execute("create table public.made (n integer)")
            with contextlib.suppress(psycopg2.Error), self.handlers.foreign(txn, "reads") as cursor:
                cursor.execute("set transaction read only")
            with self.handlers.foreign(txn, "writes") as cursor:
                cursor.execute("insert into public.made values (1)")
            return True

        self.assertTrue(await self.handlers.run(work))
        self.assertEqual(self.execute("select n from public.made"), [(1,)])

    async def test_registries_of_the_process(self) -> None:
        """Our statements use psycopg2's own adapters and type casters, and foreign code uses those it registered."""
        kinds = (list, str, int, dict, bool, bytes)
        before = {key: value for key, value in psycopg2.extensions.adapters.items() if key[0] in kinds}
        types = dict(psycopg2.extensions.string_types)
        self.addCleanup(psycopg2.extensions.adapters.update, before)
        self.addCleanup(psycopg2.extensions.string_types.update, types)
        for kind in kinds:
            psycopg2.extensions.register_adapter(kind, Json)
        wrong = psycopg2.extensions.new_type(tuple(types), "WRONG", lambda *_: "wrong")
        psycopg2.extensions.register_type(wrong)
        values = ([1, 2], ["a", 'b"\\', None], "it's", -5, True, b"\0\1", None)
        casts = ("bigint[]", "text[]", "text", "bigint", "boolean", "bytea", "text")
        query = f"select {', '.join(f'%s::{cast}' for cast in casts)}"
        [row] = await self.handlers.run(_ask, query, values)
        self.assertEqual([bytes(each) if isinstance(each, memoryview) else each for each in row], list(values))
        seen: list[Any] = []

        def code(cursor: Cursor) -> None:
            cursor.execute("select 1, %s::jsonb", ([1],))
            seen.extend(cursor.fetchone() or ())

        await self.call(code)
        self.assertEqual(seen[0], "wrong")

    async def test_a_callback_for_the_process(self) -> None:
        """A wait callback that foreign code sets for the process does not run during our statements."""

        def wait(_: object) -> None:
            raise RuntimeError("not in a loop of mine")

        self.addCleanup(psycopg2.extensions.set_wait_callback, None)
        await self.call(lambda _: psycopg2.extensions.set_wait_callback(wait))
        self.assertEqual(await self.handlers.run(_ask, "select 1"), [(1,)])

    async def test_hooks_of_the_process(self) -> None:
        """Hooks and settings that a call leaves in the interpreter affect no thread after the call."""

        def fail(*_: object) -> None:
            raise RuntimeError("a hook of a handler")

        def read() -> list[Any]:
            return [
                *(threading.gettrace(), threading.getprofile(), threading.excepthook),
                *(sys.excepthook, sys.unraisablehook, sys.getrecursionlimit(), sys.getswitchinterval()),
            ]

        def leave_all(_: Cursor) -> None:
            threading.excepthook, sys.excepthook, sys.unraisablehook = (None, fail, fail)  # type: ignore[assignment]
            sys.setrecursionlimit(500)
            sys.setswitchinterval(1.0)
            threading.settrace(fail)
            threading.setprofile(fail)
            sys.settrace(fail)

        before = read()
        hooks = SharedHooks()
        self.addCleanup(hooks.restore)
        [(pid,)] = await self.handlers.run(_ask, "select pg_backend_pid()")
        for leave in (leave_all, lambda _: sys.setprofile(fail)):
            # A profile function also fails the call that sets it.
            with contextlib.suppress(RuntimeError):
                await self.call(lambda txn, leave=leave: handler_pool.call(leave, txn))
            self.assertEqual(read(), before)
            self.assertEqual(
                await self.handlers.run(lambda _: (sys.gettrace(), sys.getprofile())), (sys.gettrace(), None)
            )
        self.execute("select pg_terminate_backend(%s, 10000)", pid)
        self.assertEqual(await self.handlers.run(_ask, "select 1"), [(1,)])

    async def test_odd_defaults(self) -> None:
        """Defaults of the database that break our statements are overridden, but its read-only mode is kept."""
        name = self.url.partition("?")[0].rpartition("/")[2]
        for setting in (
            "array_nulls = off",
            "datestyle = 'German'",
            "timezone = 'Asia/Tokyo'",
            "bytea_output = escape",
        ):
            self.execute(f"alter database {name} set {setting}")
        self.execute(f"alter database {name} set default_transaction_read_only = on")
        _, other = self.pools("s2s-odd", threads=1)
        found = await other.run(_ask, "select %s::text[], '2026-11-28 12:00Z'::timestamptz::text", (["a", None],))
        self.assertEqual(found, [(["a", None], "2026-11-28 12:00:00+00")])
        self.assertEqual(await other.run(_ask, "show transaction_read_only"), [("on",)])


class NameTests(SynchronousTestCase):
    """The names of the calls in hand."""

    def test_a_bound(self) -> None:
        """A line names eight running calls, each with 200 characters, and counts the others."""
        pool = HandlerPool(mock.MagicMock(url="postgresql://localhost/none"), "s2s-test", threads=20)
        for number in range(10):
            task = Task()
            task.enter(f"{number}" * 300, None)
            pool._tasks.add(task)
        pool._tasks.add(Task())
        *names, more = pool.in_hand.split("; ")
        self.assertEqual(([len(name) for name in names], more), ([200] * 8, "and 2 more"))


#: Stand-ins for the extension dblink, in a schema with an odd name.
_DBLINK = """
create table public.peers (name text);
create schema "Odd one";
create function "Odd one".dblink_get_connections() returns text[] language sql set search_path = ''
    as $$ select array_agg(name) from public.peers where name <> '' $$;
create function "Odd one".dblink_disconnect(text) returns text language sql set search_path = ''
    as $$ delete from public.peers where name = $1 returning 'OK' $$;
create function "Odd one".dblink_disconnect() returns text language plpgsql set search_path = ''
    as $$ begin delete from public.peers where name = ''; if not found then raise 'no connection'; end if;
    return 'OK'; end $$;
set allow_system_table_mods = on;
insert into pg_catalog.pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
    values (99999, 'dblink', 10, '"Odd one"'::regnamespace, false, '1');
reset allow_system_table_mods;
"""


class ExtensionTests(DatabaseTestCase):
    """The connections that dblink keeps for a session."""

    async def test_dblink(self) -> None:
        """A connection of dblink, with a name or without one, is closed after each call, as soon as dblink is there.

        The functions of dblink are stand-ins that keep the names in a table, since the embedded PostgreSQL has no
        extensions.
        """
        _, handlers = self.pools("s2s-dblink", threads=1)
        self.patch(connection, "_STATE_S", 0.0)
        await handlers.run(_ask, "select 1")
        self.execute(_DBLINK)
        await handlers.run(_ask, "select 1")

        def work(txn: Cursor) -> None:
            for _ in range(2):
                with handlers.foreign(txn, "test") as cursor:
                    cursor.execute("select count(*) from public.peers")
                    self.assertEqual(cursor.fetchone(), (0,))
                    cursor.execute("insert into public.peers values ('peer'), ('another'), ('')")

        await handlers.run(work)
        await handlers.run(work)
        self.assertEqual(self.execute("select * from public.peers"), [])


class DeadlineTests(DatabaseTestCase):
    """Foreign code that exceeds its deadline."""

    def setUp(self) -> None:
        """Start a pool with short timeouts."""
        super().setUp()
        self.patch(handler_pool, "PATIENCE_S", 0.5)
        self.patch(handler_pool, "_WATCH_S", 0.05)
        self.patch(handler_pool, "_CANCEL_S", 0.1)
        self.handlers: HandlerPool
        self.database, self.handlers = self.pools("s2s-late", threads=2, timeout_s=0.3)
        self.gate = threading.Event()
        self.addCleanup(self.gate.set)

    def call(self, code: Callable[[Cursor], Any]) -> Any:
        """Run foreign code in a transaction of its own."""

        def work(txn: Cursor) -> Any:
            with self.handlers.foreign(txn, "the slow one", "subject") as cursor:
                return code(cursor)

        return self.handlers.run(work)

    def sessions(self) -> list[Any]:
        """Return the sessions of the pool."""
        return self.execute("select pid, state from pg_stat_activity where application_name = 's2s-late handlers'")

    async def test_sql_is_cancelled(self) -> None:
        """SQL beyond the deadline is cancelled whatever settings the code changed, and the connection stays usable."""
        slow = self.call(_sql("set statement_timeout = 0; select pg_sleep(60)"))
        error = await self.assertFailure(slow, HandlerTimeout)
        self.assertIn("--handler-timeout", str(error))
        renamed = self.call(_sql("set application_name = 'mine'; set statement_timeout = 0; select pg_sleep(60)"))
        await self.assertFailure(renamed, HandlerTimeout)
        self.assertEqual(await self.handlers.run(_ask, "select 1"), [(1,)])
        self.assertLessEqual(len(self.sessions()), 2)
        self.assertEqual(self.handlers.stuck, [])

    async def test_under_a_default_role(self) -> None:
        """SQL is also cancelled if the user's default role may neither see nor signal the session."""
        self.execute("create role login_role login; create role default_role; grant default_role to login_role")
        self.addCleanup(self.execute, "drop role login_role; drop role default_role")
        self.execute("alter role login_role set role = default_role")
        self.patch(self, "url", f"{self.url}&user=login_role" if "?" in self.url else f"{self.url}?user=login_role")
        _, handlers = self.pools("s2s-role", threads=1, timeout_s=0.3)

        def work(txn: Cursor) -> None:
            with handlers.foreign(txn, "the slow one", "subject") as cursor:
                cursor.execute("select pg_sleep(60)")

        await self.assertFailure(handlers.run(work), HandlerTimeout)
        self.assertEqual(handlers.stuck, [])

    async def test_a_late_return(self) -> None:
        """Code that returns after its deadline fails, and its transaction is rolled back."""
        self.execute("create table public.made (n integer)")

        def code(cursor: Cursor) -> None:
            cursor.execute("insert into public.made values (1)")
            with contextlib.suppress(psycopg2.Error):
                cursor.execute("savepoint mine; select pg_sleep(60)")
            cursor.execute("rollback to savepoint mine")

        await self.assertFailure(self.call(code), HandlerTimeout)
        self.assertEqual(self.execute("select * from public.made"), [])

    async def test_a_cancellation_on_its_way(self) -> None:
        """A call that returns during its cancellation waits for it, so that it cannot hit the next statement."""
        order: list[str] = []
        begun = threading.Event()

        def cancel_slowly(*_: object) -> None:
            begun.set()
            time.sleep(0.2)
            order.append("cancelled")

        self.patch(self.handlers, "_signal", cancel_slowly)

        def work(txn: Cursor) -> None:
            try:
                with self.handlers.foreign(txn, "the slow one"):
                    begun.wait(10)
            finally:
                order.append("returned")

        await self.assertFailure(self.handlers.run(work), HandlerTimeout)
        self.assertEqual(order, ["cancelled", "returned"])

    async def test_a_cancellation_that_comes_late(self) -> None:
        """A cancellation that starts after its call has returned does not affect the next call of the transaction."""
        hit: list[object] = []
        self.patch(self.handlers, "_signal", lambda *args: hit.append(args))

        def work(txn: Cursor) -> None:
            task = self.handlers._local.task
            assert task is not None
            with self.handlers.foreign(txn, "the first"):
                entered_at = task.entered_at
            with self.handlers.foreign(txn, "the second"):
                self.handlers._cancel_call(task, entered_at)
                self.handlers._cancel_call(task, task.entered_at)

        await self.handlers.run(work)
        self.assertEqual(len(hit), 1)

    async def test_stuck(self) -> None:
        """A stuck call is reported, its locks are freed, its work is not committed, and other calls run."""
        self.execute("create table public.made (n integer)")

        def code(cursor: Cursor) -> None:
            cursor.execute("lock table public.made; insert into public.made values (1)")
            self.gate.wait(60)

        error = await self.assertFailure(self.call(code), HandlerStuck)
        [task] = self.handlers.stuck
        self.assertEqual((error.subject, error.task, task.name), ("subject", task, "the slow one"))
        came_back: list[int] = []
        task.on_return = lambda: came_back.append(1)
        await self.handlers.end(task)
        await poll(lambda: not self.sessions(), "the end of its session")
        self.assertEqual(self.execute("select * from public.made"), [])
        self.assertEqual(await gatherResults([self.handlers.run(_ask, "select 1") for _ in range(2)]), [[(1,)]] * 2)
        self.gate.set()
        await poll(lambda: came_back, "its return")
        self.assertEqual((self.handlers.stuck, self.execute("select * from public.made")), ([], []))
        self.assertEqual(self.database.counters.met["handler"], 1)

    async def test_a_return_before_the_end(self) -> None:
        """A stuck call that returns before its session is ended closes that session, and no session is signalled."""
        signalled: list[object] = []
        pids: list[int] = []

        def code(cursor: Cursor) -> None:
            pids.append(cursor.connection.info.backend_pid)
            self.gate.wait(60)

        error = await self.assertFailure(self.call(code), HandlerStuck)
        came_back: list[int] = []
        error.task.on_return = lambda: came_back.append(1)
        self.gate.set()
        await poll(lambda: came_back, "its return")
        await poll(lambda: pids[0] not in [pid for pid, _ in self.sessions()], "the end of its session")
        self.patch(self.handlers, "_signal", lambda *args: signalled.append(args))
        await self.handlers.end(error.task)
        self.assertEqual(signalled, [])

    async def test_a_process_that_stood_still(self) -> None:
        """Time in which the process is suspended does not count towards a deadline, but computing time does."""
        self.patch(handler_pool, "_STILL_S", 0.2)

        def compute(_: Cursor) -> None:
            until = time.process_time() + 2.0
            while time.process_time() < until:
                sum(range(20_000_000))

        begun = threading.Event()
        going = self.call(lambda _: begun.set() or self.gate.wait(60))
        await poll(begun.is_set, "the call has begun")
        # Longer than the time after which a call counts as stuck, without an iteration of the reactor.
        time.sleep(2.0)
        self.gate.set()
        # The database may have ended the idle session meanwhile, so the call may fail as retryable.
        with contextlib.suppress(DatabaseUnavailable):
            await going
        await self.assertFailure(self.call(compute), HandlerTimeout, HandlerStuck)

    async def test_too_many_stuck(self) -> None:
        """At MOST_STUCK stuck calls a new call is refused with the reason, and calls run again after one returns."""
        self.patch(handler_pool, "MOST_STUCK", 2)
        await gatherResults(
            [self.assertFailure(self.call(lambda _: self.gate.wait(60)), HandlerStuck) for _ in range(2)]
        )
        refused = await self.assertFailure(self.handlers.run(_ask, "select 1"), DatabaseUnavailable)
        self.assertIn("start it again", str(refused))
        self.gate.set()
        await poll(lambda: not self.handlers.stuck, "their return")
        self.assertEqual(await self.handlers.run(_ask, "select 1"), [(1,)])

    async def test_stop_with_a_stuck_one(self) -> None:
        """stop() does not wait for a stuck thread, and closes the other connections."""
        await self.assertFailure(self.call(lambda _: self.gate.wait(60)), HandlerStuck)
        await self.handlers.end(self.handlers.stuck[0])
        await self.handlers.run(_ask, "select 1")
        await self.handlers.stop()
        await poll(lambda: not self.sessions(), "the end of every session")

    async def test_threads_are_daemons(self) -> None:
        """The threads of the pool are daemons, so that they do not keep the process alive."""
        thread: list[threading.Thread] = []
        await self.call(lambda _: thread.append(threading.current_thread()))
        self.assertTrue(thread[0].daemon)
        self.assertNotIn(threading.main_thread(), thread)
        await deferToThread(lambda: None)
        self.assertIs(self.handlers.reactor, reactor)


def _ask(txn: Cursor, query: str, params: tuple[Any, ...] = ()) -> list[Any]:
    assert isinstance(txn, StoreCursor)
    txn.execute(query, params or None)
    return txn.fetchall()
