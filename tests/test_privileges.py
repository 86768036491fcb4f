"""The privileges of the database's user, and what is said of those that it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from click.testing import CliRunner

from s2s.cli import main
from s2s.errors import DatabaseError, OperatorError
from s2s.store import connection_limits, privileges, probe
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from tests.support.postgres import DatabaseTestCase


class UserTestCase(DatabaseTestCase):
    """A user that owns nothing."""

    def setUp(self) -> None:
        """Make it, with every privilege that is needed."""
        super().setUp()
        self.user = self.url.partition("?")[0].rpartition("/")[2] + "_user"
        self.execute(f"create role {self.user} login")
        self.addCleanup(self.execute, f"drop owned by {self.user}; drop role {self.user}")
        with self.as_user() as txn:
            self.execute(" ".join(privileges.missing(txn)))

    @contextmanager
    def as_user(self) -> Iterator[Cursor]:
        """Connect as the user."""
        with blocking(re.sub("//[^@/]*@", f"//{self.user}@", self.url)) as txn:
            yield txn


class PrivilegeTests(UserTestCase):
    """:mod:`s2s.store.privileges`."""

    def test_what_is_granted_suffices(self) -> None:
        """With the statements that it lists a user lacks nothing, and the database takes its writes."""
        with self.as_user() as txn:
            self.assertEqual(privileges.missing(txn), [])
            privileges.check(txn)
            probe.check(txn)

    def test_a_sequence(self) -> None:
        """A privilege that is missing on a sequence is named, with the statement that grants it."""
        self.execute(f"revoke all on sequence commands_cmd_id_seq from {self.user}")
        with self.as_user() as txn:
            error = self.assertRaises(OperatorError, privileges.check, txn)
        self.assertIn(f"grant usage on sequence commands_cmd_id_seq to {self.user};", str(error))

    def test_tables(self) -> None:
        """Privileges of one table share a statement; of many tables the first few are shown, and the rest counted."""
        self.execute(f"revoke insert, update on commands from {self.user}")
        with self.as_user() as txn:
            self.assertEqual(privileges.missing(txn), [f"grant insert, update on table commands to {self.user};"])
        self.execute(f"revoke all on all tables in schema public from {self.user}")
        with self.as_user() as txn:
            error = self.assertRaises(OperatorError, privileges.check, txn)
        self.assertRegex(str(error), "and [0-9]+ more, which s2s db status lists$")

    def test_the_probe(self) -> None:
        """The probe of the database fails without any privilege that a push or a worker needs."""
        for privilege, table in (
            ("insert", "commands"), ("update", "commands"), ("insert", "idempotency_keys"), ("select", "batch_notes"),
            ("insert", "batch_notes"), ("update", "batch_notes"), ("delete", "batch_notes"),
        ):  # fmt: skip
            self.execute(f"revoke {privilege} on {table} from {self.user}")
            with self.assertRaises(DatabaseError, msg=(privilege, table)), self.as_user() as txn:
                probe.check(txn)
            self.execute(f"grant {privilege} on {table} to {self.user}")

    def test_the_command_line(self) -> None:
        """``s2s db status`` lists them all, and exits with 1."""
        self.execute(f"revoke delete on outbox from {self.user}")
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        told = CliRunner().invoke(main, ["db", "status", "--database", url])
        self.assertEqual(told.exit_code, 1)
        self.assertIn(f"grant delete on table outbox to {self.user};", told.stderr)


class ConnectionLimitTests(UserTestCase):
    """:mod:`s2s.store.connection_limits`."""

    def check(self, sessions: int) -> str:
        """Check as the user, and return why it is refused."""
        try:
            with self.as_user() as txn:
                connection_limits.check(txn, sessions)
        except OperatorError as error:
            return str(error)
        return ""

    def test_of_the_user(self) -> None:
        """The connection limit of the database user is told with the statement that raises it."""
        self.execute(f"alter role {self.user} connection limit 6")
        self.assertEqual(self.check(6), "")
        refused = self.check(7)
        self.assertIn(f"the role {self.user} allows 6 connections and this process needs 7", refused)
        self.assertIn(f"alter role {self.user} connection limit N", refused)

    def test_of_the_database(self) -> None:
        """The connection limit of the database is told, except to a superuser, whom it does not bind."""
        database = self.url.partition("?")[0].rpartition("/")[2]
        self.execute(f"alter database {database} connection limit 5")
        self.assertIn(f"alter database {database} connection limit N", self.check(7))
        with blocking(self.url) as txn:
            connection_limits.check(txn, 7)

    def test_of_the_server(self) -> None:
        """The sessions that PostgreSQL reserves for superusers do not count."""
        [(most,)] = self.execute("select current_setting('max_connections')::int")
        self.assertEqual(self.check(most - 20), "")
        self.assertIn("alter system set max_connections = N", self.check(most))
        with blocking(self.url) as txn:
            connection_limits.check(txn, most)
