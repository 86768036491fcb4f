"""The privileges of the database user, and the errors about missing ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from click.testing import CliRunner
from twisted.internet.defer import Deferred

from s2s.cli import main
from s2s.errors import DatabaseError, DatabaseUnavailable, OperatorError
from s2s.roles import preflight
from s2s.store import connection_limits, privileges
from s2s.store.driver import Cursor, Query
from s2s.store.monitors import probe
from s2s.store.pool import Database, blocking
from s2s.store.sqlstate import with_cure
from tests.support.installed import FOUND, MIGRATIONS
from tests.support.postgres import DatabaseTestCase, migrate


class UserTestCase(DatabaseTestCase):
    """A user that owns no table."""

    def setUp(self) -> None:
        """Make the user, with every privilege that is needed."""
        super().setUp()
        self.user = self.url.partition("?")[0].rpartition("/")[2] + "_user"
        self.execute(f"create role {self.user} login")
        self.addCleanup(self.execute, f"drop owned by {self.user}; drop role {self.user}")
        with self.as_user() as txn:
            self.execute(" ".join(privileges.missing(txn, MIGRATIONS)))

    @contextmanager
    def as_user(self) -> Iterator[Cursor]:
        """Connect as the user."""
        with blocking(re.sub("//[^@/]*@", f"//{self.user}@", self.url)) as txn:
            yield txn


class SettingTests(UserTestCase):
    """Defaults that only a superuser may change for a session."""

    async def test_each_source(self) -> None:
        """Each connection reports such a default of the user or the database with the statement that resets it."""
        database = self.url.partition("?")[0].rpartition("/")[2]
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        for of in (f"role {self.user}", f"database {database}", f"role {self.user} in database {database}"):
            with self.subTest(of=of):
                self.execute(f"alter {of} set session_replication_role = replica")
                error = self.assertRaises(DatabaseUnavailable, blocking(url).__enter__)
                self.assertIn(f"run alter {of} reset session_replication_role: as a superuser", with_cure(error))
                pool = Database(url, threads=1)
                pool.start()
                with self.assertRaisesRegex(DatabaseUnavailable, "reset session_replication_role"):
                    await pool.run(probe.check)
                asked: Deferred[Any] = Deferred()
                pool.query(Query("select 1", ()), asked.callback)
                with self.assertRaisesRegex(DatabaseUnavailable, "reset session_replication_role"):
                    await asked
                await pool.stop()
                self.execute(f"alter {of} reset session_replication_role")


class PrivilegeTests(UserTestCase):
    """:mod:`s2s.store.privileges`."""

    def test_what_is_granted_suffices(self) -> None:
        """A user with the listed grants lacks no privilege, and the writes of the probe succeed."""
        with self.as_user() as txn:
            self.assertEqual(privileges.missing(txn, MIGRATIONS), [])
            privileges.check(txn, MIGRATIONS)
            probe.check(txn)

    def test_a_sequence(self) -> None:
        """A missing privilege on a sequence is reported with the statement that grants it."""
        self.execute(f"revoke all on sequence s2s.commands_cmd_id_seq from {self.user}")
        with self.as_user() as txn:
            error = self.assertRaises(OperatorError, privileges.check, txn, MIGRATIONS)
        self.assertIn(f"grant usage on sequence s2s.commands_cmd_id_seq to {self.user};", str(error))

    def test_tables(self) -> None:
        """The privileges on one table share a statement; of many tables the first are shown, the rest counted."""
        self.execute(f"revoke insert, update on s2s.commands from {self.user}")
        with self.as_user() as txn:
            self.assertEqual(
                privileges.missing(txn, MIGRATIONS), [f"grant insert, update on table s2s.commands to {self.user};"]
            )
        self.execute(f"revoke all on all tables in schema s2s, s2s_world from {self.user}")
        with self.as_user() as txn:
            error = self.assertRaises(OperatorError, privileges.check, txn, MIGRATIONS)
        self.assertRegex(str(error), "and [0-9]+ more, which s2s db status lists$")

    def test_the_probe(self) -> None:
        """The database probe fails without any one of the privileges that a push or a worker needs."""
        for privilege, table in (
            ("insert", "commands"), ("update", "commands"), ("insert", "idempotency_keys"), ("select", "batch_notes"),
            ("insert", "batch_notes"), ("update", "batch_notes"), ("delete", "batch_notes"),
        ):  # fmt: skip
            self.execute(f"revoke {privilege} on {table} from {self.user}")
            with self.assertRaises(DatabaseError, msg=(privilege, table)), self.as_user() as txn:
                probe.check(txn)
            self.execute(f"grant {privilege} on {table} to {self.user}")

    def test_the_command_line(self) -> None:
        """``s2s db status`` lists every missing privilege, and exits with 1."""
        self.execute(f"revoke delete on s2s.outbox from {self.user}")
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        told = CliRunner().invoke(main, ["db", "status", "--database", url])
        self.assertEqual(told.exit_code, 1)
        self.assertIn(f"grant delete on table s2s.outbox to {self.user};", told.stderr)


class RowSecurityTests(UserTestCase):
    """Row level security, which hides rows without an error."""

    def status(self) -> str:
        """Check that ``s2s db status`` exits with 1, and return its stderr."""
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        told = CliRunner().invoke(main, ["db", "status", "--database", url])
        self.assertEqual(told.exit_code, 1)
        return told.stderr

    def test_it_is_named(self) -> None:
        """The preflight and ``s2s db status`` name each table with hidden rows, and both fixes."""
        tables = ("s2s.commands", "s2s.s2s_keys", "s2s.migrations")
        for table in tables:
            self.execute(f"alter table {table} enable row level security")
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        refused = str(self.assertRaises(OperatorError, preflight.check, url, "server", FOUND))
        self.assertIn(f"hides rows of the table s2s.commands from {self.user}: run as its owner: alter table", refused)
        self.assertIn(f"alter role {self.user} bypassrls; and 2 more, which s2s db status lists", refused)
        said = self.status()
        for table in tables:
            self.assertIn(f"alter table {table} disable row level security;", said)

    def test_a_policy_that_hides_nothing(self) -> None:
        """A table whose policy shows all rows is not reported, unless another policy restricts it."""
        self.execute("alter table s2s.commands enable row level security")
        self.execute("create policy everything on s2s.commands using (true)")
        with self.as_user() as txn:
            privileges.check(txn, MIGRATIONS)
        self.execute("create policy nothing on s2s.commands as restrictive using (false)")
        with self.as_user() as txn:
            self.assertEqual(len(privileges.hidden(txn)), 1)

    def test_of_the_owner(self) -> None:
        """Nothing is reported to the owner of the tables, or to a user that bypasses row level security."""
        self.execute("alter table s2s.commands enable row level security")
        with blocking(self.url) as txn:
            self.assertEqual(privileges.hidden(txn), [])
        self.execute(f"alter role {self.user} bypassrls")
        with self.as_user() as txn:
            privileges.check(txn, MIGRATIONS)


class MigrateTests(UserTestCase):
    """``s2s db migrate`` by a user without the privileges."""

    def both(self) -> str:
        """Check that ``s2s db migrate`` and ``s2s db status`` fail with the same line, and return the line."""
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        migrate, status = (CliRunner().invoke(main, ["db", verb, "--database", url]) for verb in ("migrate", "status"))
        self.assertEqual((migrate.exit_code, status.exit_code), (1, 1))
        line = migrate.stderr.removeprefix("Error: ")
        self.assertEqual((line.count("\n"), line), (1, status.stderr))
        return line

    def migrate(self) -> None:
        """Check that the migration succeeds."""
        url = re.sub("//[^@/]*@", f"//{self.user}@", self.url)
        self.assertEqual(CliRunner().invoke(main, ["db", "migrate", "--database", url]).exit_code, 0)

    def test_without_create(self) -> None:
        """Without CREATE on the database both commands name the grant, after which the migration succeeds."""
        self.execute("drop schema s2s, s2s_world cascade")
        line = self.both()
        self.assertRegex(line, f"grant create on database [a-z0-9_]+ to {self.user};")
        self.execute(line.rpartition(": ")[2])
        self.migrate()

    def test_schemas_of_a_dba(self) -> None:
        """Schemas that a DBA made are used without CREATE on the database; a missing grant on one is reported."""
        self.execute("drop schema s2s, s2s_world cascade; create schema s2s")
        self.execute(f"create schema s2s_world authorization {self.user}")
        line = self.both()
        self.assertIn(f"grant usage, create on schema s2s to {self.user};", line)
        self.execute(line.rpartition(": ")[2])
        self.migrate()

    def test_tables_of_another(self) -> None:
        """If another user owns the tables, both commands name the owner."""
        self.execute(f"grant create on schema s2s, s2s_world to {self.user}")
        self.execute("delete from s2s.migrations where schema = 's2s_world'")
        self.assertIn("run s2s db migrate as postgres", self.both())

    def test_up_to_date(self) -> None:
        """If there is nothing to migrate, no privilege to create is needed."""
        with self.as_user() as txn:
            self.assertEqual(privileges.to_migrate(txn, MIGRATIONS), [])
            self.assertEqual(migrate(txn.connection), [])


class ConnectionLimitTests(UserTestCase):
    """:mod:`s2s.store.connection_limits`."""

    def check(self, sessions: int) -> str:
        """Check the limits as the user, and return the error."""
        try:
            with self.as_user() as txn:
                connection_limits.check(txn, sessions)
        except OperatorError as error:
            return str(error)
        return ""

    def test_of_the_user(self) -> None:
        """The connection limit of the user is reported with the statement that raises it."""
        self.execute(f"alter role {self.user} connection limit 6")
        self.assertEqual(self.check(6), "")
        refused = self.check(7)
        self.assertIn(f"the role {self.user} allows 6 connections and this process needs 7", refused)
        self.assertIn(f"alter role {self.user} connection limit N", refused)

    def test_of_the_database(self) -> None:
        """The connection limit of the database is reported, except to a superuser, who may exceed it."""
        database = self.url.partition("?")[0].rpartition("/")[2]
        self.execute(f"alter database {database} connection limit 5")
        self.assertIn(f"alter database {database} connection limit N", self.check(7))
        with blocking(self.url) as txn:
            connection_limits.check(txn, 7)

    def test_of_the_server(self) -> None:
        """The connections that PostgreSQL reserves for superusers do not count as available to another user."""
        [(most,)] = self.execute("select current_setting('max_connections')::int")
        self.assertEqual(self.check(most - 20), "")
        self.assertIn("alter system set max_connections = N", self.check(most))
        with blocking(self.url) as txn:
            connection_limits.check(txn, most)
