"""Migrations: their results, concurrent runs, and the databases that they refuse."""

from __future__ import annotations

import itertools
from unittest import mock

import psycopg2
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from s2s.errors import SchemaError
from s2s.store import migrations
from s2s.store.migrations import Migration, MigrationFailed
from s2s.store.pool import blocking
from s2s.store.tables import config, engines
from tests.support.installed import MIGRATIONS
from tests.support.postgres import DatabaseTestCase, cluster_url, database_url, drop_database, make_database, migrate

_numbers = itertools.count(1)

_ALL = migrations.available(MIGRATIONS)


def _migrate(url: str) -> list[str]:
    with blocking(url) as txn:
        return migrate(txn.connection)


class EmptyDatabaseTests(TestCase):
    """A database without any table."""

    def setUp(self) -> None:
        """Make the database."""
        cluster_url()
        name = f"empty_{next(_numbers)}"
        make_database(name)
        self.addCleanup(drop_database, name)
        self.url = database_url(name)

    def test_an_older_release(self) -> None:
        """A database that an older release has used receives the later migrations and keeps its data."""
        with mock.patch.object(migrations, "available", return_value=_ALL[:1]):
            self.assertEqual(_migrate(self.url), ["s2s/0001_initial"])
        with blocking(self.url) as txn:
            txn.execute("insert into s2s.engines (name, wanted, reason) values ('e', 'paused', 'night')")
            txn.execute("update s2s.config set value = '7' where key = 'relay.window'")
        self.assertEqual(_migrate(self.url), [str(each) for each in _ALL[1:]])
        with blocking(self.url) as txn:
            self.assertEqual(config.read(txn).values["relay.window"], 7)
            self.assertEqual(engines.wanted(txn, "e"), ("paused", "night"))

    def test_empty_is_refused_with_the_cure(self) -> None:
        """A database without our tables is refused with one line that names the command to run."""
        with blocking(self.url) as txn:
            error = self.assertRaises(SchemaError, migrations.check, txn)
            self.assertEqual([row.applied_at for row in migrations.status(txn)], [None] * len(migrations.available()))
        self.assertIn("run: s2s db migrate", str(error))
        self.assertNotIn("\n", str(error))

    def test_migrates_once(self) -> None:
        """Each migration runs once; a second run has nothing to do, and the check passes."""
        self.assertEqual(_migrate(self.url), [str(migration) for migration in _ALL])
        self.assertEqual(_migrate(self.url), [])
        with blocking(self.url) as txn:
            migrations.check(txn, MIGRATIONS)
            self.assertTrue(all(row.applied_at for row in migrations.status(txn, MIGRATIONS)))

    async def test_two_at_once(self) -> None:
        """Four concurrent runs do not disturb each other: exactly one of them applies each migration."""
        runs = await gatherResults([deferToThread(_migrate, self.url) for _ in range(4)])
        self.assertEqual(sorted(itertools.chain(*runs)), [str(migration) for migration in _ALL])

    def test_a_failing_file_leaves_nothing(self) -> None:
        """If a migration fails, none of the release is applied, and the error names the file and the reason."""
        broken = Migration("s2s", 9998, "9998_broken", "create table s2s.half (a int); select 1 / 0")
        with mock.patch.object(migrations, "available", lambda plugins=(): (*_ALL, broken)):
            error = str(self.assertRaises(MigrationFailed, _migrate, self.url))
        self.assertIn("the migration s2s/9998_broken failed, and none of this release was applied: division", error)
        with blocking(self.url) as txn:
            self.assertFalse(any(each.applied_at for each in migrations.status(txn)))
            txn.execute("select to_regnamespace('s2s'), to_regnamespace('s2s_world')")
            self.assertEqual(txn.fetchone(), (None, None))
        self.assertEqual(_migrate(self.url), [str(migration) for migration in _ALL])

    def test_a_file_that_commits(self) -> None:
        """A migration that ends the transaction of all migrations fails, with the file and what to do about it."""
        for text in ("create table s2s.half (a int); commit; select 1 / 0", "create table s2s.other (a int); commit"):
            broken = Migration("s2s", 9998, "9998_commits", text)
            with mock.patch.object(migrations, "available", lambda plugins=(), broken=broken: (*_ALL, broken)):
                error = str(self.assertRaises(MigrationFailed, _migrate, self.url))
            self.assertIn("the migration s2s/9998_commits", error)
            self.assertIn("it ends the transaction of all migrations, as by COMMIT", error)
        self.assertEqual(_migrate(self.url), [])

    def test_wrong_encoding(self) -> None:
        """A database whose encoding is not UTF-8 is refused with an error that names UTF8."""
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
        """The check and a migration refuse a database that is newer than this release."""
        self.execute("insert into s2s.migrations (schema, version, name) values ('s2s', 9999, '9999_later')")
        with blocking(self.url) as txn:
            self.assertIn("9999_later", str(self.assertRaises(SchemaError, migrations.check, txn)))
            self.assertEqual(migrations.status(txn, MIGRATIONS)[-1].version, 9999)
        self.assertRaises(SchemaError, _migrate, self.url)

    def test_older_is_refused(self) -> None:
        """A database that lacks one of this release's migrations is refused with the name of that migration."""
        later = Migration("s2s", 9998, "9998_later", "select 1")
        ours = migrations.available()
        with mock.patch.object(migrations, "available", lambda plugins=(): (*ours, later)), blocking(self.url) as txn:
            self.assertIn("lacks s2s/9998_later", str(self.assertRaises(SchemaError, migrations.check, txn)))
