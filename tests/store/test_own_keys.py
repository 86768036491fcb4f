"""The ``idem_key`` values that s2s makes: two databases never make the same one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks

from s2s.store.pool import blocking
from s2s.store.tables import outbox
from s2s.store.tables.own_keys import database_id
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

    def test_a_copy(self) -> None:
        """The documented statement assigns a new id to a copied database."""
        documented = "update s2s.database set database_id = default"
        page = Path(__file__).parents[2] / "docs" / "protocol.rst"
        self.assertTrue(documented in page.read_text("utf-8"), "it is not documented")
        old = self.database_id()
        self.execute(documented)
        self.assertNotEqual(self.database_id(), old)


class TwoDatabasesTests(RoleTestCase):
    """Two engines, each with its own database, push to one server."""

    def rebuilt(self, name: str) -> Session:
        """Make the database of another engine, whose serial numbers start at 1."""
        make_database(name, template())
        self.addCleanup(drop_database, name)
        session = Session(database_url(name))
        self.addCleanup(session.close)
        # The databases of the tests are copies of one template, and a copy keeps the id.
        session.run("update s2s.database set database_id = default")
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
