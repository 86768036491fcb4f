"""The ``idem_key`` values that s2s makes: two databases never make the same one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks
from twisted.logger import capturedLogs, formatEvent

from s2s.cli.common import actor
from s2s.roles import preflight
from s2s.store import migrations
from s2s.store.pool import blocking
from s2s.store.tables import broadcasts, outbox
from s2s.store.tables.own_keys import copied, database_id, renew
from tests.cli.test_cli import CliTestCase
from tests.support.installed import FOUND
from tests.support.peer import K1
from tests.support.postgres import DatabaseTestCase, Session, database_url, drop_database, make_database, template
from tests.support.roles import Engine, RoleTestCase
from tests.support.waiting import poll


class IdTests(DatabaseTestCase):
    """Table ``s2s.database``."""

    def test_made_once(self) -> None:
        """The migration makes the id, which does not change; if its row is missing, a new id is made and kept."""
        with blocking(self.url) as txn:
            self.assertEqual([database_id(txn), database_id(txn)], [self.database_id()] * 2)
        old = self.database_id()
        self.execute("delete from s2s.database")
        with blocking(self.url) as txn:
            made = database_id(txn)
        self.assertNotEqual(made, old)
        self.assertEqual(self.database_id(), made)


class CopyTests(CliTestCase):
    """Copies of a database, which have the id of their original."""

    LINE = "this database is a copy of another one, or was restored or moved: its id "

    def setUp(self) -> None:
        """Let the database of the test know its place, as one that was migrated does."""
        super().setUp()
        self.execute(
            "update s2s.database set made_in = default;"
            " insert into s2s.s2s_keys (key_id, key_b64, role) values ('k', repeat('A', 43) || '=', 'any');"
            " insert into s2s.broadcasts (message) values ('before the copy')"
        )

    def copy(self) -> None:
        """Copy the database of the test, and use the copy from now on."""
        assert self._session is not None
        self._session.close()
        self._session = None
        name = f"{self.id().rpartition('.')[2]}_{os.getpid()}"
        make_database(name, self.url.partition("?")[0].rpartition("/")[2])
        self.addCleanup(drop_database, name)
        self.url = database_url(name)

    def told(self) -> list[str]:
        """Return the lines that a start of a role logs, and assert that ``db status`` shows the same."""
        with capturedLogs() as events:
            preflight.check(self.url, "engine", FOUND)
        lines = [str(formatEvent(event)) for event in events]
        self.assertEqual(self.s2s("db", "status").stderr.splitlines(), lines)
        return lines

    def entry(self) -> list[tuple[Any, ...]]:
        """Return the actor, subject, params and result of the audit entries of ``fix-id``."""
        return self.execute("select actor, subject, params, result from s2s.audit where action = 'db.fix_id'")

    def test_a_new_id(self) -> None:
        """A role and ``db status`` report a copy in one line, until ``fix-id --new``; older keys keep the old id."""
        self.assertEqual(self.told(), [])
        old, [(place,)] = self.database_id(), self.execute("select made_in from s2s.database")
        self.copy()
        [line] = self.told()
        self.assertTrue(line.startswith(f"{self.LINE}{old} "), line)
        self.assertIn("s2s db fix-id --new", line)
        self.assertIn("s2s db fix-id --keep", line)
        with blocking(self.url) as txn:
            broadcasts.sweep(txn, 0, 10, 65536)
        said = self.s2s("db", "fix-id", "--new").output
        new = self.database_id()
        self.assertNotEqual(new, old)
        self.assertEqual(said, f"the id of the database is {new}; keys made before keep the old id {old}\n")
        self.assertEqual(self.told(), [])
        [(now,)] = self.execute("select made_in from s2s.database")
        self.assertNotEqual(now, place)
        self.assertEqual(
            self.entry(),
            [(actor(), new, {"database_id": new, "made_in": now}, {"was": {"database_id": old, "made_in": place}})],
        )
        self.execute("insert into s2s.broadcasts (message) values ('after it')")
        with blocking(self.url) as txn:
            broadcasts.sweep(txn, 0, 10, 65536)
        keys = self.execute("select idem_key from s2s.outbox order by outbox_id")
        self.assertEqual([key.split(":")[1] for (key,) in keys], [old, new])

    def test_the_old_id(self) -> None:
        """After ``fix-id --keep`` the copy has the id of its original, and is not reported any more."""
        old = self.database_id()
        self.copy()
        self.assertEqual(len(self.told()), 1)
        self.assertEqual(self.s2s("db", "fix-id", "--keep").output, f"the id of the database stays {old}\n")
        self.assertEqual(self.told(), [])
        self.assertEqual(self.database_id(), old)
        [(by, subject, params, _)] = self.entry()
        self.assertEqual((by, subject, list(params)), (actor(), old, ["made_in"]))

    def test_a_choice(self) -> None:
        """``fix-id`` without a choice is wrong usage, and changes nothing."""
        old = self.database_id()
        self.assertIn("name one of --new and --keep", self.s2s("db", "fix-id", expected=2).output)
        self.assertEqual((self.database_id(), self.entry()), (old, []))

    def test_kept_rows(self) -> None:
        """``fix-id`` fails if a trigger keeps the row as it is."""
        self.copy()
        self.execute(
            "create function public.old() returns trigger language plpgsql as 'begin return old; end';"
            "create trigger old before update on s2s.database for each row execute function public.old()"
        )
        for choice in ("--new", "--keep"):
            with self.subTest(choice):
                self.assertIn("drop trigger old on s2s.database", self.s2s("db", "fix-id", choice, expected=1).output)

    def test_a_forbidden_function(self) -> None:
        """Where PostgreSQL does not tell its identifier to the user, no copy is reported and a new id is made."""
        self.execute("update s2s.database set made_in = '1/1'")
        name = f"{self.id().rpartition('.')[2]}_{os.getpid()}"
        self.execute(
            f"create role {name}; revoke execute on function pg_control_system() from public;"
            f"grant usage on schema s2s to {name};"
            f"grant select, insert, update on all tables in schema s2s to {name}"
        )
        self.addCleanup(self.execute, f"drop owned by {name}; drop role {name}")
        with blocking(self.url) as txn:
            txn.execute(f"set role {name}")
            self.assertEqual(copied(txn), "")
            old, new = renew(txn)
            self.assertNotEqual(old, new)
            txn.execute("select made_in from s2s.database")
            self.assertEqual(txn.fetchone(), (None,))

    def test_a_migration(self) -> None:
        """A database that was just migrated knows its place, and is not reported."""
        name = f"{self.id().rpartition('.')[2]}_{os.getpid()}"
        make_database(name)
        self.addCleanup(drop_database, name)
        with blocking(database_url(name)) as txn:
            migrations.migrate(txn.connection)
            txn.execute("select made_in = s2s.place() from s2s.database")
            self.assertEqual(txn.fetchone(), (True,))
            self.assertEqual(copied(txn), "")

    def test_by_sql(self) -> None:
        """A change and a removal of the id by plain SQL, and a TRUNCATE, are audited; a pass of retention is not."""
        self.execute("update s2s.database set retention_at = now()")
        self.execute("update s2s.database set database_id = 'mine'")
        self.execute("delete from s2s.database")
        self.execute("insert into s2s.database (database_id) values ('other')")
        self.execute("truncate s2s.database")
        found = self.execute(
            "select action, subject from s2s.audit where action like 'database.%' order by audit_id offset 1"
        )
        self.assertEqual(
            found,
            [
                ("database.change", "mine"),
                ("database.delete", "mine"),
                ("database.add", "other"),
                ("database.delete", "other"),
            ],
        )


class TwoDatabasesTests(RoleTestCase):
    """Two engines, each with its own database, push to one server."""

    def rebuilt(self, name: str) -> Session:
        """Make the database of another engine, whose serial numbers start at 1."""
        make_database(name, template())
        self.addCleanup(drop_database, name)
        session = Session(database_url(name))
        self.addCleanup(session.close)
        # The databases of the tests are copies of one template, and a copy keeps the id.
        with blocking(database_url(name)) as txn:
            renew(txn)
        session.run(
            "insert into s2s.s2s_keys (key_id, key_b64, role, active_from) values (%s, %s, 'any', to_timestamp(0))", *K1
        )
        return session

    @inlineCallbacks
    def test_broadcasts_and_jobs(self) -> Iterator[Deferred[Any]]:
        """Broadcasts with equal numbers and jobs due at the same second are all published, and no row is dead."""
        sessions = [self.rebuilt(f"{self.id().rpartition('.')[2]}_{number}") for number in (1, 2)]
        for at, session in enumerate(sessions):
            session.run("insert into s2s.broadcasts (message) select 'cast ' || %s || ' ' || generate_series(1, 5)", at)
            session.run(
                "insert into s2s_world.sectors (sector_id, name) values (1, 'a');"
                "insert into s2s_world.ports (port_id, sector_id, commodity, stock, base_stock, capacity,"
                " price, base_price,"
                " min_price, max_price) select n, 1, 'ore', 99, 100, 200, 10, 10, 1, 20"
                f" from generate_series(1, {at + 1}) n;"
                "insert into s2s.jobs (job_type, schedule, due_at) values ('port_refresh', 'every:10s',"
                " to_timestamp(60))"
            )
        server = self.server()
        yield server.start()
        for at in (0, 1):
            url = database_url(f"{self.id().rpartition('.')[2]}_{at + 1}")
            engine = Engine(self.directory, url, server.port, name=f"engine-{at}")
            self.addCleanup(engine.stop)
            yield engine.start()
        expected = sorted(
            [f"cast {at} {number}" for at in (0, 1) for number in range(1, 6)]
            + [f"Ports that are back at their usual stock and price: {count}" for count in (1, 2)]
        )
        yield poll(lambda: self.count("notices") >= len(expected), "all are published")
        self.assertEqual([row[0] for row in self.execute("select message from s2s.notices order by 1")], expected)
        for session in sessions:
            self.assertEqual(session.run("select idem_key, error_code from s2s.outbox where state = 'dead'"), [])

    @inlineCallbacks
    def test_a_restored_database(self) -> Iterator[Deferred[Any]]:
        """After a restore, new content under a reused number is published, and old content is published once."""
        name = self.id().rpartition(".")[2]
        session = self.rebuilt(name)
        session.run(
            "insert into s2s.broadcasts (message) select 'cast ' || generate_series(1, 4);"
            "insert into s2s_world.sectors (sector_id, name) values (1, 'a');"
            "insert into s2s_world.ports (port_id, sector_id, commodity, stock, base_stock, capacity, price,"
            " base_price,"
            " min_price, max_price) select n, 1, 'ore', 100 - n / 2, 100, 200, 10, 10, 1, 20"
            " from generate_series(1, 3) n;"
            "insert into s2s.jobs (job_type, schedule, due_at) values ('port_refresh', 'daily@00:00Z',"
            " to_timestamp(60))"
        )
        server = self.server()
        yield server.start()
        engine = Engine(self.directory, database_url(name), server.port, name="engine-1")
        self.addCleanup(engine.stop)
        yield engine.start()
        yield poll(lambda: self.count("notices") == 5, "all are published")
        engine.stop()
        # Restore a dump that was made with two broadcasts, one of them swept, and before the job ran.
        session.run(
            "delete from s2s.broadcasts where broadcast_id > 2;"
            "update s2s.broadcasts set state = 'pending', queued_at = null where broadcast_id = 2;"
            "select setval(pg_get_serial_sequence('s2s.broadcasts', 'broadcast_id'), 2);"
            "update s2s.jobs set due_at = to_timestamp(60), runs = 0; update s2s_world.ports set stock = 99"
        )
        session.run("insert into s2s.broadcasts (message) values ('cast new'), ('cast 4')")
        yield engine.start()
        yield poll(lambda: self.count("notices") >= 8, "all that is new is published")
        yield poll(lambda: session.run("select count(*) from s2s.outbox") == [(0,)], "all is sent, and none is dead")
        refreshed = "Ports that are back at their usual stock and price: "
        self.assertEqual(
            [row[0] for row in self.execute("select message from s2s.notices order by 1")],
            [f"{refreshed}2", f"{refreshed}3", "cast 1", "cast 2", "cast 3", "cast 4", "cast 4", "cast new"],
        )

    @inlineCallbacks
    def test_old_keys(self) -> Iterator[Deferred[Any]]:
        """An outbox row with a key of the old format is sent and stored under that key."""
        with blocking(self.url) as txn:
            notice = {"scope": "global", "message": "old", "severity": "info"}
            outbox.put(txn, "notice.publish", "broadcast:1", notice)
        server = self.server()
        engine = self.engine(server.port)
        yield server.start()
        yield engine.start()
        yield poll(lambda: self.count("notices") == 1, "it is published")
        self.assertEqual(self.execute("select idem_key from s2s.commands"), [("broadcast:1",)])
