"""Migrations: what they make, two at once, and what they refuse."""

from __future__ import annotations

import base64
import itertools
from unittest import mock

import psycopg2
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from s2s.errors import SchemaError, StatementRefused
from s2s.store import migrations
from s2s.store.migrations import Migration
from s2s.store.pool import blocking
from s2s.store.tables import audit, config, control_requests
from tests.support.postgres import DatabaseTestCase, cluster_url, database_url, drop_database, make_database

_numbers = itertools.count(1)


def _migrate(url: str) -> list[str]:
    with blocking(url) as txn:
        return migrations.migrate(txn.connection)


class EmptyDatabaseTests(TestCase):
    """A database without any table."""

    def setUp(self) -> None:
        """Make one."""
        cluster_url()
        name = f"empty_{next(_numbers)}"
        make_database(name)
        self.addCleanup(drop_database, name)
        self.url = database_url(name)

    def test_an_older_release(self) -> None:
        """A database that an older release has used is brought up with all that is in it, and then audited."""
        with mock.patch.object(migrations, "available", return_value=migrations.available()[:2]):
            self.assertEqual(_migrate(self.url), ["0001_initial", "0002_steering"])
        secret = base64.b64encode(bytes(32)).decode()
        with blocking(self.url) as txn:
            txn.execute("insert into s2s_keys (key_id, key_b64, role) values ('k', %s, 'any')", (secret,))
            txn.execute("insert into engines (name, wanted, reason) values ('e', 'paused', 'night')")
            txn.execute("update config set value = '7' where key = 'relay.window'")
            asked = control_requests.ask(txn, "e", "s2s.engine.pause", {"reason": "night"}, "cli:me", 3.0)
            control_requests.take(txn, "server", ["e"])
        self.assertEqual(_migrate(self.url), [each.name for each in migrations.available()[2:]])
        with blocking(self.url) as txn:
            self.assertEqual(audit.LISTED.read(txn, 100, None), [])
            self.assertEqual(config.read(txn).values["relay.window"], 7)
            control_requests.answer(txn, asked, True, {"ok": True, "state": "paused"})
            txn.execute("update engines set wanted = 'running'")
            txn.execute("update config set value = '8' where key = 'relay.window'")
            txn.execute("update s2s_keys set note = 'old'")
            entries = audit.LISTED.read(txn, 100, None)
        found = [entry.action for entry in reversed(entries)]
        self.assertEqual(found, ["s2s.engine.pause", "engine.wanted", "config.set", "keys.change"])
        self.assertNotIn(secret, repr(entries))

    def test_empty_is_refused_with_the_cure(self) -> None:
        """A database without our tables is refused in one line that names the command."""
        with blocking(self.url) as txn:
            error = self.assertRaises(SchemaError, migrations.check, txn)
            self.assertEqual([row.applied_at for row in migrations.status(txn)], [None] * len(migrations.available()))
        self.assertIn("run: s2s db migrate", str(error))
        self.assertNotIn("\n", str(error))

    def test_migrates_once(self) -> None:
        """Every file runs once; a second run finds nothing to do, and the check passes."""
        self.assertEqual(_migrate(self.url), [migration.name for migration in migrations.available()])
        self.assertEqual(_migrate(self.url), [])
        with blocking(self.url) as txn:
            migrations.check(txn)
            self.assertTrue(all(row.applied_at for row in migrations.status(txn)))

    async def test_two_at_once(self) -> None:
        """Two processes that migrate at once do not hurt each other: each file is run by one of them."""
        runs = await gatherResults([deferToThread(_migrate, self.url) for _ in range(4)])
        self.assertEqual(sorted(itertools.chain(*runs)), [migration.name for migration in migrations.available()])

    def test_a_failing_file_leaves_nothing(self) -> None:
        """A file that fails is rolled back whole; those before it stay, and it runs again next time."""
        broken = Migration(9998, "9998_broken", "create table half (a int); select 1 / 0")
        with mock.patch.object(migrations, "available", lambda: (*self.ours, broken)):
            self.assertRaises(StatementRefused, _migrate, self.url)
        with blocking(self.url) as txn:
            migrations.check(txn)
            txn.execute("select to_regclass('half')")
            self.assertEqual(txn.fetchone(), (None,))

    ours = migrations.available()

    def test_wrong_encoding(self) -> None:
        """A database that does not keep text as UTF-8 is refused with the cure."""
        admin = psycopg2.connect(cluster_url())
        self.addCleanup(admin.close)
        admin.autocommit = True
        admin.cursor().execute("create database latin encoding 'LATIN1' locale 'C' template template0")
        self.addCleanup(drop_database, "latin")
        error = self.assertRaises(SchemaError, _migrate, database_url("latin"))
        self.assertIn("UTF8", str(error))


class NewerDatabaseTests(DatabaseTestCase):
    """A database that a newer release has migrated."""

    def test_newer_is_refused(self) -> None:
        """Neither the check nor a migration touches a database that is newer than this release."""
        self.execute("insert into s2s_migrations (version, name) values (9999, '9999_from_the_future')")
        with blocking(self.url) as txn:
            self.assertIn("9999_from_the_future", str(self.assertRaises(SchemaError, migrations.check, txn)))
            self.assertEqual(migrations.status(txn)[-1].version, 9999)
        self.assertRaises(SchemaError, _migrate, self.url)

    def test_older_is_refused(self) -> None:
        """A database that lacks one of this release's files is refused by its name."""
        later = Migration(9998, "9998_later", "select 1")
        ours = migrations.available()
        with mock.patch.object(migrations, "available", lambda: (*ours, later)), blocking(self.url) as txn:
            self.assertIn("lacks 9998_later", str(self.assertRaises(SchemaError, migrations.check, txn)))
