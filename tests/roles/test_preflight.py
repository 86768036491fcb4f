"""The checks before a role runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable, NoSigningKey, OperatorError, SchemaError, StatementRefused
from s2s.protocol.signing import random_secret
from s2s.roles import preflight
from s2s.roles.preflight import DATABASE_VARIABLE
from s2s.store import interruptible
from s2s.store.pool import blocking
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase
from tests.support.roles import TWISTD, environment
from tests.support.silent import SilentDatabase
from tests.support.waiting import PATIENCE_S


class CheckTests(DatabaseTestCase):
    """:func:`s2s.roles.preflight.check`."""

    def add(self, key_id: str, role: str, key_b64: str | None = None, when: str = "now()") -> None:
        """Insert a key in plain SQL."""
        self.execute(
            f"insert into s2s.s2s_keys (key_id, key_b64, role, active_from) values (%s, %s, %s, {when})",
            key_id,
            key_b64 or random_secret(),
            role,
        )

    def test_a_table_without_its_key(self) -> None:
        """A missing primary key is reported before a sequence, because the check of a sequence uses that key."""
        self.execute(
            "alter table s2s.notices drop constraint notices_pkey;"
            " insert into s2s.commands (cmd_id, cmd_type, idem_key, payload) values (9, 'a.b', 'k', '{}')"
        )
        refused = self.assertRaises(SchemaError, preflight.check, self.url, "server", FOUND)
        self.assertIn("the table s2s.notices lacks the unique index notices_pkey", str(refused))

    def test_no_key_names_the_cure(self) -> None:
        """Without a key for the role the refusal names the command that creates one."""
        self.add("s", "server")
        refused = self.assertRaises(NoSigningKey, preflight.check, self.url, "engine", FOUND)
        self.assertIn("s2s keys add --role engine", str(refused))

    def test_a_key_just_made_can_sign(self) -> None:
        """The validity of a key is checked by the clock of the database, which set its times."""
        self.add("k", "any")
        self.assertEqual([row.key_id for row in preflight.check(self.url, "engine", FOUND).rows], ["k"])

    def test_unusable_keys_do_not_count(self) -> None:
        """A key that is too short, not base64, or not valid yet cannot sign."""
        self.add("short", "any", "c2hvcnQ=")
        self.add("garbled", "any", "?" * 44)
        self.add("later", "any", when="now() + interval '1 hour'")
        self.assertRaises(NoSigningKey, preflight.check, self.url, "server", FOUND)

    def test_a_key_that_a_wrong_clock_has_dated(self) -> None:
        """A key created while the clock of the database was ahead signs at once, and its times are corrected."""
        self.add("k", "any")
        self.execute("update s2s.s2s_keys set created_at = now() + '2 hours', active_from = now() + '2 hours'")
        self.assertEqual([row.key_id for row in preflight.check(self.url, "engine", FOUND).rows], ["k"])
        self.assertEqual(self.execute("select 1 from s2s.s2s_keys where greatest(created_at, active_from) > now()"), [])

    def test_no_tables(self) -> None:
        """A database without tables is refused with the command that creates them."""
        self.execute("drop schema s2s, s2s_world cascade")
        refused = self.assertRaises(SchemaError, preflight.check, self.url, "server", FOUND)
        self.assertIn("s2s db migrate", str(refused))

    def test_no_database(self) -> None:
        """A database that cannot be reached is refused in one line without the password."""
        self.patch(preflight, "NOBODY_S", 0.0)
        url = "postgresql://u:hunter2@127.0.0.1:1/none"
        refused = self.assertRaises(OperatorError, preflight.check, url, "server", FOUND)
        self.assertNotIn("hunter2", str(refused))
        self.assertNotIn("\n", str(refused))

    def test_make_ready_twice(self) -> None:
        """The embedded database gets one key, even if it is prepared repeatedly."""
        self.assertEqual(preflight.make_ready(self.url, FOUND), ["made a random key: k1"])
        self.assertEqual(preflight.make_ready(self.url, FOUND), [])
        self.assertNotIn(self.url, repr(preflight.Place(self.url)))

    def test_a_database_that_does_not_answer(self) -> None:
        """A database that accepts the connection and does not answer is reported, and refused after a timeout."""
        self.patch(interruptible, "LATE_S", 0.1)
        self.patch(preflight, "LOOK_S", 0.5)
        self.patch(sys, "__stderr__", None)
        self.patch(preflight, "NOBODY_S", 0.0)
        database = SilentDatabase(is_letting_in=True)
        self.addCleanup(database.close)
        refused = self.assertRaises(OperatorError, preflight.check, database.url, "server", FOUND)
        self.assertIn("no answer of the database at 127.0.0.1 within 0.5 s", str(refused))


class WhenReadyTests(SynchronousTestCase):
    """:func:`s2s.roles.preflight.when_ready`: temporary errors."""

    def setUp(self) -> None:
        """Collect the lines."""
        self.patch(preflight, "_AGAIN_S", 0.0)
        self.told = os.fdopen(os.memfd_create("stderr"), "w+")
        self.addCleanup(self.told.close)
        self.patch(sys, "__stderr__", self.told)
        self.looks = 0

    def look(self, *errors: Exception) -> str:
        """Run ``when_ready`` with a check that raises these errors before it succeeds."""
        left = list(errors)

        def look() -> str:
            self.looks += 1
            if left:
                raise left.pop(0)
            return "ready"

        return preflight.when_ready(look)

    def test_what_passes(self) -> None:
        """A PostgreSQL that starts, stops, is full or does not listen yet is awaited; its reason is logged once."""
        full = DatabaseUnavailable("too many clients already", "53300")
        starts = DatabaseUnavailable("FATAL:  the database system is starting up")
        refused, ended = DatabaseUnavailable("Connection refused"), DatabaseUnavailable("terminating", "57P01")
        self.assertEqual(self.look(refused, refused, starts, starts, full, ended), "ready")
        self.told.seek(0)
        lines = self.told.read().splitlines()
        self.assertEqual(len(lines), 3, lines)
        self.assertRegex(lines[0], "is starting up.*trying again for up to 60 s")

    def test_a_database_that_starts_again(self) -> None:
        """A PostgreSQL that was shutting down may refuse connections for longer than ``NOBODY_S``."""
        self.patch(preflight, "NOBODY_S", 1e-9)
        stops, refused = DatabaseUnavailable("the database system is shutting down"), DatabaseUnavailable("refused")
        self.assertEqual(self.look(stops, refused, refused), "ready")

    def test_what_does_not(self) -> None:
        """A wrong password, user or database, or a refused statement, ends the start at once."""
        for error in (
            DatabaseUnavailable("password authentication failed", "28000"),
            DatabaseUnavailable("no such database", "3D000"),
            DatabaseUnavailable("permission denied", "42501"),
            StatementRefused("division by zero", state="22012"),
        ):
            with self.subTest(error=error):
                self.looks = 0
                self.assertIn(str(error), str(self.assertRaises(OperatorError, self.look, error)))
                self.assertEqual(self.looks, 1)

    def test_what_lasts(self) -> None:
        """The wait is limited, and the error has its reason."""
        self.patch(preflight, "NOBODY_S", 0.1)
        refused = self.assertRaises(OperatorError, self.look, *[DatabaseUnavailable("Connection refused")] * 10**6)
        self.assertIn("Connection refused", str(refused))


class FullTests(DatabaseTestCase):
    """A database user whose connection limit is reached."""

    def setUp(self) -> None:
        """Create the user."""
        super().setUp()
        [(name,)] = self.execute("select 'limited_' || current_database()")
        self.user = str(name)
        self.execute(f"create role {self.user} login connection limit 0")
        self.addCleanup(self.execute, f"drop role {self.user}")
        self.limited = self.url.replace("postgres@", f"{self.user}@", 1)

    def test_it_passes(self) -> None:
        """The start continues when the user has a connection."""

        def look() -> str:
            with blocking(self.limited) as txn:
                txn.execute("select current_user")
                return str(txn.fetchall()[0][0])

        self.patch(sys, "__stderr__", None)
        free = threading.Timer(1.0, self.execute, (f"alter role {self.user} connection limit -1",))
        self.execute("select")
        free.start()
        self.addCleanup(free.join)
        self.assertEqual(preflight.when_ready(look), self.user)

    def test_it_is_ended(self) -> None:
        """SIGTERM at once ends a role that waits at its start."""
        process = subprocess.Popen(
            [TWISTD, "-n", "--pidfile=", "s2s-server", "--http", "off"],
            env=environment(**{DATABASE_VARIABLE: self.limited}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.kill)
        assert process.stderr is not None
        line = process.stderr.readline()
        self.assertRegex(line, "too many connections for role .*; trying again for up to 60 s")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
        self.assertEqual(process.returncode, 1)
        self.assertIn("interrupted before it has started", said)
