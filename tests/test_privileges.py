"""The privileges of the database's user, and what is said of those that it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from click.testing import CliRunner

from s2s.cli import main
from s2s.errors import DatabaseError, OperatorError
from s2s.store import privileges, probe
from s2s.store.driver import Cursor
from s2s.store.pool import blocking
from tests.support.postgres import DatabaseTestCase


class PrivilegeTests(DatabaseTestCase):
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
