"""Database errors, and their log lines for operators: :mod:`s2s.store.troubles`, :mod:`s2s.store.sqlstate`."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg2
from psycopg2 import errorcodes
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseError, DatabaseUnavailable
from s2s.store import sqlstate
from s2s.store.cursor import plain
from s2s.store.driver import Query
from s2s.store.monitors import probe
from s2s.store.pool import blocking
from s2s.store.troubles import MOST_STATES, MOST_TEXTS, TELL_S, Troubles
from tests.cli.test_cli import CliTestCase
from tests.support.postgres import DatabaseTestCase


class TroublesTests(SynchronousTestCase):
    """:class:`s2s.store.troubles.Troubles` with a simulated clock."""

    def setUp(self) -> None:
        """Make the object under test."""
        self.time = Clock()
        self.troubles = Troubles(self.time)

    def lines(self, seconds: float, *states: str) -> list[str]:
        """Note errors, let time pass, and return the lines that were logged."""
        with capturedLogs() as told:
            for state in states:
                self.troubles.note(state, "no space")
            self.time.advance(seconds)
        return [event["log_format"].format(**event) for event in told]

    def test_first(self) -> None:
        """The first error is logged at once, with the server's message, the SQLSTATE and a fix."""
        [line] = self.lines(0, "53100")
        self.assertIn("no space (SQLSTATE 53100): free some space", line)

    def test_many(self) -> None:
        """A repeated error is logged once a minute, each SQLSTATE in its own line."""
        self.assertEqual(len(self.lines(TELL_S - 1, *["53100"] * 1000, *["25006"] * 10)), 2)
        told = self.lines(1)
        self.assertEqual(len(told), 2)
        self.assertIn("(SQLSTATE 53100) came 999 times", told[0])

    def test_incident(self) -> None:
        """The log gives an error an incident id, which does not change while the error lasts."""
        with capturedLogs() as told:
            ids = {self.troubles.note("P0001", "no") for _ in range(100)}
        [incident] = ids
        self.assertIn(incident, told[0]["log_format"].format(**told[0]))
        self.assertNotEqual(self.troubles.note("P0001", "another"), incident)

    def test_over(self) -> None:
        """An error that does not recur for a minute is logged as over, and is then new."""
        self.lines(0, "53100")
        self.assertIn("not come again", self.lines(TELL_S)[0])
        self.assertEqual(self.time.getDelayedCalls(), [])
        self.assertIn("no space", self.lines(0, "53100")[0])

    def test_texts(self) -> None:
        """Two texts of one SQLSTATE have a line each, because an operator needs both."""
        with capturedLogs() as told:
            for table in ("commands", "notices", "commands"):
                self.troubles.note("42501", f"permission denied for table {table}")
        lines = [event["log_format"].format(**event) for event in told]
        self.assertEqual(len(lines), 2)
        self.assertIn("for table notices (SQLSTATE 42501)", lines[1])
        self.assertEqual(self.troubles.counts, {"42501": 3})
        self.assertEqual(len(self.lines(TELL_S)), 2)

    def test_many_texts(self) -> None:
        """Beyond the limit all texts of a SQLSTATE share a line, and two minutes later none of them is kept."""
        with capturedLogs() as told:
            for number in range(MOST_TEXTS * 3):
                self.troubles.note("53100", f"could not extend file {number}")
            self.troubles.note("42501", "permission denied")
        self.assertEqual(len(told), MOST_TEXTS + 2)
        self.assertIn("permission denied", told[-1]["text"])
        self.assertIn(f"further errors (SQLSTATE 53100) came {MOST_TEXTS * 2 - 1} times", "".join(self.lines(TELL_S)))
        self.lines(TELL_S)
        self.assertEqual(self.time.getDelayedCalls(), [])

    def test_bound(self) -> None:
        """Beyond the limit all SQLSTATEs share a line."""
        states = [f"X{number:04}" for number in range(MOST_STATES + 10)]
        self.assertEqual(len(self.lines(0, *states)), MOST_STATES + 1)
        self.assertEqual(self.troubles.counts["other"], 10)

    def test_stop(self) -> None:
        """A stop leaves no timer behind."""
        self.lines(0, "53100", "25006")
        self.troubles.stop()
        self.assertEqual(self.time.getDelayedCalls(), [])


class CancelledTests(DatabaseTestCase):
    """Statements that end before they finish."""

    def test_who_has_cancelled(self) -> None:
        """The errors of a cancellation by a user and of a statement timeout each have their own fix."""
        for statement, cure in (
            ("select pg_cancel_backend(pg_backend_pid()), pg_sleep(5)", "another session has cancelled it"),
            ("set local statement_timeout = 50; select pg_sleep(5)", "it took too long"),
        ):
            with self.assertRaises(DatabaseError) as caught, blocking(self.url) as txn:
                txn.execute(statement)
            self.assertIn(cure, sqlstate.with_cure(caught.exception))


class RaisedTests(DatabaseTestCase):
    """Errors that code in the database raises, such as those of another database."""

    def test_whose_error(self) -> None:
        """In a handler's statement such an error says nothing about our database; in an s2s statement it does."""
        raising = "do $$ begin raise exception 'could not extend file' using errcode = '{}'; end $$"
        for state in ("53100", "58030", "XX001", "53300", "28P01", "3D000"):
            for is_ours in (False, True):
                with self.subTest(state=state, is_ours=is_ours), blocking(self.url) as txn:
                    error = self.assertRaises(
                        psycopg2.Error, (txn if is_ours else plain(txn)).execute, raising.format(state)
                    )
                    txn.connection.rollback()
                    meant = sqlstate.of(error)
                    self.assertEqual((meant.fault == "database", bool(meant.cure)), (is_ours, is_ours))


class ForeignFunctionTests(DatabaseTestCase):
    """Triggers of other programs that fail within statements of s2s."""

    async def test_it_is_named(self) -> None:
        """The fix names the innermost foreign function that lacks a schema, table, column, function or privilege."""
        self.execute(
            "create table public.log (n int); create table public.gone (n int); create role reader_of_nothing;"
            'create function public."in SQL"() returns int language sql as $$ select n from public.gone $$;'
            "drop table public.gone;"
            "create function public.told() returns trigger language plpgsql as $$ begin"
            " execute tg_argv[0]; return null; end $$"
        )
        self.addCleanup(self.execute, "drop role reader_of_nothing")
        database, _ = self.pools("s2s-test")
        told = "public.told()"
        for each, state, function in (
            ("select public.dropped()", "42883", told),
            ("insert into public.dropped values (1)", "42P01", told),
            ("select dropped.told()", "3F000", told),
            ("insert into public.log (m) values (1)", "42703", told),
            ("set local role reader_of_nothing; insert into public.log values (1)", "42501", told),
            ('select public."in SQL"()', "42P01", "in SQL"),
        ):
            with self.subTest(each=each):
                self.execute("drop trigger if exists told on s2s.commands")
                self.execute(
                    "create trigger told after insert on s2s.commands for each statement execute function"
                    f" public.told($${each}$$)"
                )
                with capturedLogs() as lines, self.assertRaises(DatabaseUnavailable):
                    await database.run(probe.check)
                [line] = [str(formatEvent(event)) for event in lines if "refuses statements" in event["log_format"]]
                self.assertIn(f"(SQLSTATE {state} in {function}): mend the function {function}, which", line)

    async def test_what_it_raises(self) -> None:
        """A SQLSTATE that a foreign trigger raises refuses its row and keeps the session; the fix names it."""
        self.execute(
            "create function public.told() returns trigger language plpgsql as $$ begin"
            " if tg_argv[0] = '22012' then perform 1 / 0; end if;"
            " raise exception 'the remote refuses' using errcode = tg_argv[0]; end $$"
        )
        database, _ = self.pools("s2s-test", threads=1)
        insert = "insert into s2s.outbox (cmd_type, idem_key, payload) values ('a', 'b', '{}')"
        sessions = "select pid from pg_stat_activity where application_name = 's2s-test' order by 1"
        for state in ("25006", "53100", "57P01", "XX001", "P0001", "22012"):
            self.execute("drop trigger if exists told on s2s.outbox")
            asked: Deferred[Any] = Deferred()
            database.query(Query("select 1", ()), asked.callback)
            await asked
            await database.run(lambda txn: txn.execute("select 1"))
            before = self.execute(sessions)
            self.execute(
                f"create trigger told before insert on s2s.outbox for each row execute function public.told('{state}')"
            )
            asked = Deferred()
            with self.subTest(state=state), capturedLogs() as lines:
                database.query(Query(insert, ()), asked.callback)
                failures = [await self.assertFailure(asked, DatabaseError)]
                failures.append(await self.assertFailure(database.run(lambda txn: txn.execute(insert)), DatabaseError))
                for failed in failures:
                    prefix = "" if state == "22012" else "raised "
                    self.assertEqual(failed.state, f"{prefix}{state} in public.told()")
                    self.assertIn("mend the function public.told(), which s2s has not made", sqlstate.with_cure(failed))
                    meant = sqlstate.meaning(failed.state)
                    self.assertEqual((meant.fault, meant.drops), ("statement", False))
                self.assertEqual([each for each in lines if "not available" in str(formatEvent(each))], [])
                self.assertEqual(self.execute(sessions), before)

    async def test_one_of_ours(self) -> None:
        """An error within a function of s2s is reported like an error of a statement of s2s."""
        self.execute("alter table s2s.config_version rename to another")
        with self.assertRaises(DatabaseError) as caught, blocking(self.url) as txn:
            txn.execute("update s2s.config set value = '30' where key = 'server.sweep_interval_s'")
        self.assertEqual(caught.exception.state, "42P01")
        ours = self.execute(
            "select proname::text from pg_proc p join pg_language l on l.oid = p.prolang"
            " where pronamespace = 's2s'::regnamespace and lanname = 'sql' order by 1"
        )
        self.assertEqual([name for (name,) in ours], sorted(sqlstate._OURS_IN_SQL))


class ConnectTests(DatabaseTestCase):
    """Connections that the database refuses."""

    def test_each_cure(self) -> None:
        """The error for a user that may not log in or connect names the statement that permits it."""
        database = self.url.partition("?")[0].rpartition("/")[2]
        user = f"{database}_user"
        self.execute(f"create role {user} nologin; revoke connect on database {database} from public")
        self.addCleanup(self.execute, f"drop owned by {user}; drop role {user}")
        url = re.sub("//[^@/]*@", f"//{user}@", self.url)
        for cure in ("alter role USER login", "grant connect on database NAME to USER"):
            said = sqlstate.with_cure(self.assertRaises(DatabaseUnavailable, blocking(url).__enter__))
            self.assertTrue(said.endswith(cure), said)
            self.execute(cure.replace("NAME", database).replace("USER", user))
        with blocking(url):
            pass


class CommandLineTests(CliTestCase):
    """A command whose statement the database refuses."""

    def test_no_false_cure(self) -> None:
        """A refusal without a fix does not blame the URL of the database."""
        self.execute(
            "insert into s2s.commands (cmd_type, idem_key, payload, status) values ('a.b', 'k', '{}', 'dead');"
            "create table public.mine as select cmd_id from s2s.commands;"
            "alter table public.mine add foreign key (cmd_id) references s2s.commands"
        )
        [(cmd_id,)] = self.execute("select cmd_id from s2s.commands")
        said = self.s2s("commands", "discard", str(cmd_id), expected=1).output
        self.assertIn("violates foreign key constraint", said)
        self.assertNotIn("--database", said)


class MeaningTests(SynchronousTestCase):
    """The table of SQLSTATEs."""

    def test_longest_prefix(self) -> None:
        """The longest prefix decides, and every SQLSTATE of PostgreSQL has a meaning."""
        self.assertEqual(sqlstate.meaning("53100").fault, "database")
        self.assertEqual(sqlstate.meaning("53200").fault, "statement")
        self.assertTrue(sqlstate.meaning("57P01").drops)
        self.assertFalse(sqlstate.meaning("57014").drops)
        for code in {value for name, value in vars(errorcodes).items() if name.isupper() and len(value) == 5}:
            self.assertIsNotNone(sqlstate.meaning(code))

    def test_data(self) -> None:
        """An error of the data alone does not make the database unavailable, and has no fix for an operator."""
        for code in ("22P02", "23505", "23503", "P0001", ""):
            self.assertEqual((sqlstate.meaning(code).unavailable, sqlstate.meaning(code).cure), (False, ""), code)

    def test_at_connect(self) -> None:
        """An error at connect is classified by its text, since libpq reports no SQLSTATE."""
        for text, state in (
            ('connection to server failed: FATAL:  too many connections for role "game"', "53300"),
            ('FATAL:  too many connections for database "game"', "53300"),
            ("FATAL:  sorry, too many clients already", "53300"),
            ("FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute", "53300"),
            ('FATAL:  password authentication failed for user "game"', "28000"),
            ('FATAL:  role "game" does not exist', "28000"),
            ('FATAL:  database "game" does not exist', "3D000"),
            ('FATAL:  pg_hba.conf rejects connection for host "::1"', "28000 pg_hba.conf"),
            ('FATAL:  no pg_hba.conf entry for host "::1", user "u", no encryption', "28000 pg_hba.conf"),
            ('FATAL:  role "game" is not permitted to log in', "28000 InitializeSessionUserId"),
            ('FATAL:  permission denied for database "game"', "42501 CheckMyDatabase"),
            ("FATAL:  no more connections allowed (max_client_conn)", "53300"),
            ('FATAL:  database "game" is not currently accepting connections', "55000 CheckMyDatabase"),
            ("connection refused", ""),
        ):
            self.assertEqual(sqlstate.at_connect(text), state, text)

    def test_shared_memory(self) -> None:
        """If parallel workers lack shared memory, the statement is at fault, and not a full disk."""

        class Refused(psycopg2.Error):
            pgcode = "53100"
            diag = SimpleNamespace(
                constraint_name=None,
                context=None,
                severity_nonlocalized="ERROR",
                source_function="dsm_impl_posix",
            )

        found = sqlstate.of(Refused())
        self.assertEqual((found.fault, found.passes, found.unavailable), ("statement", True, True))
        self.assertIn("--shm-size", found.cure)

    def test_the_document(self) -> None:
        """The page of faults contains every row of the table."""
        page = Path(__file__).parents[2].joinpath("docs", "faults.rst").read_text("utf-8")
        missing = [prefix for prefix in sqlstate.MEANINGS if prefix and f"``{prefix}``" not in page]
        self.assertEqual(missing, [])
