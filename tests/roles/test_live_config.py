"""Settings: the tables enforce the rules for every writer (docs/protocol.rst, "Configuration")."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg2
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock as FakeClock
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable, OperatorError
from s2s.protocol.settings import BY_KEY, SETTINGS
from s2s.roles.live_config import LiveConfig
from s2s.runtime.clock import Clock
from s2s.store.pool import blocking
from s2s.store.refresher import POLL_S, RETRY_S
from s2s.store.tables import config
from s2s.store.tables.config import Snapshot
from tests.support.installed import FOUND
from tests.support.postgres import DatabaseTestCase


class TableTests(DatabaseTestCase):
    """:mod:`s2s.store.tables.config` and the triggers."""

    def change(self, key: str, value: Any) -> int | None:
        """Set a value."""
        with blocking(self.url) as txn:
            return config.change(txn, key, value, "a test")

    def snapshot(self) -> Snapshot:
        """Read the snapshot."""
        with blocking(self.url) as txn:
            return config.read(txn)

    def test_declared(self) -> None:
        """A migrated database has every setting of this release with its default, at version 0."""
        self.assertEqual(self.snapshot(), Snapshot(0, {each.key: each.default for each in FOUND.settings.values()}))

    def test_declared_again(self) -> None:
        """Declaring the settings again keeps the set values, and updates descriptions."""
        self.change("relay.window", 3)
        self.execute("update s2s.config set description = 'old' where key = 'relay.window'")
        with blocking(self.url) as txn:
            config.declare(txn, SETTINGS)
        ((value, description),) = self.execute("select value, description from s2s.config where key = 'relay.window'")
        self.assertEqual((value, description), (3, BY_KEY["relay.window"].description))
        self.assertEqual(self.snapshot().version, 1)

    def test_versions(self) -> None:
        """Every change has the next version and a row in the history; a write of the same value has neither."""
        self.assertEqual(self.change("relay.window", 3), 1)
        self.assertIsNone(self.change("relay.window", 3))
        self.assertEqual(self.change("link.idle_s", 5), 2)
        self.execute("update s2s.config set value = '4' where key = 'relay.window'")
        self.execute("update s2s.config set version = 99, description = 'x' where key = 'relay.window'")
        with blocking(self.url) as txn:
            found = config.HISTORY.read(txn, 100, None)
            narrowed = config.HISTORY.read(txn, 100, None, key="link.idle_s")
        told = [(each.version, each.key, each.old_value, each.new_value, each.actor) for each in found]
        self.assertEqual(
            told,
            [
                (3, "relay.window", 3, 4, "postgres"),
                (2, "link.idle_s", 10, 5, "a test"),
                (1, "relay.window", 512, 3, "a test"),
            ],
        )
        self.assertEqual([each.version for each in narrowed], [2])
        self.assertEqual(self.snapshot().version, 3)

    def test_refused(self) -> None:
        """A wrong type, a value out of bounds or an unknown key is refused in one line, and nothing changes."""
        for key, value, why in (
            ("relay.window", 0, "relay.window must be from 1 to 1024"),
            ("relay.window", 1025, "relay.window must be from 1 to 1024"),
            ("relay.window", True, "relay.window must be of type integer"),
            ("relay.window", "7", "relay.window must be of type integer"),
            ("link.fresh_s", 4, "link.fresh_s must be from 5 to 900"),
            ("no.such", 1, "there is no setting 'no.such': see them with: s2s config list"),
        ):
            with self.subTest(key=key, value=value):
                error = self.assertRaises(OperatorError, self.change, key, value)
                self.assertEqual(str(error), why)
        for value in ("1.5", "1e400", "null", "[1]"):
            with self.assertRaises(psycopg2.errors.CheckViolation):
                self.execute("update s2s.config set value = %s::jsonb where key = 'relay.window'", value)
        self.assertEqual((self.snapshot().version, self.execute("select * from s2s.config_history")), (0, []))

    def test_texts_and_booleans(self) -> None:
        """Settings of users may be texts of bounded length, and booleans."""
        self.execute("insert into s2s.config (key, value, type, min, max) values ('motd', '\"hi\"', 'string', 1, 5)")
        self.execute("insert into s2s.config (key, value, type) values ('open', 'true', 'boolean')")
        self.assertEqual((self.change("motd", "hello"), self.change("open", False)), (1, 2))
        error = self.assertRaises(OperatorError, self.change, "motd", "hello!")
        self.assertEqual(str(error), "motd must be a text of length from 1 to 5")
        self.assertRaises(OperatorError, self.change, "open", 1)
        values = self.snapshot().values
        self.assertEqual((values["motd"], values["open"]), ("hello", False))

    def test_no_gaps(self) -> None:
        """Concurrent changes, some rolled back, leave versions without a gap, in step with the history."""

        def work(number: int) -> None:
            connection = psycopg2.connect(self.url)
            for turn in range(10):
                with connection.cursor() as txn:
                    config.change(txn, "relay.window", 1 + (number * 10 + turn) % 1000, f"worker {number}")
                connection.rollback() if turn % 3 == 0 else connection.commit()
            connection.close()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        versions = [row[0] for row in self.execute("select version from s2s.config_history order by version")]
        self.assertEqual(versions, list(range(1, len(versions) + 1)))
        self.assertEqual(self.snapshot().version, len(versions))
        self.assertGreater(len(versions), 20)
        breaks = self.execute(
            "select count(*) from s2s.config_history h join s2s.config_history n on n.version = h.version + 1"
            " where n.old_value <> h.new_value"
        )
        self.assertEqual(breaks, [(0,)])


class _FakeDatabase:
    """A database whose reads the test answers.

    :ivar make: creates the answer to the next read.
    """

    def __init__(self) -> None:
        self.reads: list[Deferred[Any]] = []
        self.make: Callable[[], Deferred[Any]] = Deferred

    def run(self, work: Any, *args: Any) -> Deferred[Any]:
        self.reads.append(self.make())
        return self.reads[-1]


class LiveConfigTests(SynchronousTestCase):
    """:class:`s2s.roles.live_config.LiveConfig` and :class:`s2s.store.refresher.Refresher`."""

    def setUp(self) -> None:
        """Create settings of version 1."""
        self.database = _FakeDatabase()
        self.time = FakeClock()
        self.config = LiveConfig(self.database, Clock(self.time), Snapshot(1, {"relay.window": 9}))  # type: ignore[arg-type]
        self.told: list[int] = []
        self.config.watchers.append(lambda config: self.told.append(config.version))

    def test_values(self) -> None:
        """A value is the table's, else the default of a setting that the table lacks, else a KeyError."""
        self.assertEqual((self.config["relay.window"], self.config.number("relay.window")), (9, 9))
        self.assertEqual(self.config["link.idle_s"], 10)
        self.assertRaises(KeyError, self.config.__getitem__, "no.such")

    def test_changes(self) -> None:
        """The watchers are called for a new snapshot at once, and not for an equal one."""
        done = self.config.read_now()
        self.database.reads[0].callback(Snapshot(2, {"relay.window": 8}))
        self.successResultOf(done)
        self.assertEqual((self.told, self.config.number("relay.window")), ([2], 8))
        again = self.config.read_now()
        self.database.reads[1].callback(Snapshot(2, {"relay.window": 8}))
        self.successResultOf(again)
        self.assertEqual(self.told, [2])

    def test_what_is_told(self) -> None:
        """A change has a line of bounded length, without control characters of logs and terminals."""
        with capturedLogs() as logs:
            for version, value in enumerate(("\x1b[2J\n" + "x" * 100_000, 8), 2):
                done = self.config.read_now()
                self.database.reads[-1].callback(Snapshot(version, {"relay.window": value}))
                self.successResultOf(done)
        for line in [formatEvent(each) for each in logs]:
            self.assertTrue(line.isprintable() and len(line) < 500, line[:600])
        self.assertIn("(was 9)", formatEvent(logs[0]))

    def test_one_read_at_a_time(self) -> None:
        """Requests during a read share the next one, which contains the changes made meanwhile."""
        first = self.config.read_now()
        second, third = self.config.read_now(), self.config.read_now()
        self.assertEqual(len(self.database.reads), 1)
        self.database.reads[0].callback(Snapshot(2, {}))
        self.successResultOf(first)
        self.assertNoResult(second)
        self.assertEqual(len(self.database.reads), 2)
        self.database.reads[1].callback(Snapshot(3, {}))
        self.successResultOf(second)
        self.successResultOf(third)
        self.assertEqual((self.config.version, len(self.database.reads)), (3, 2))

    def test_away(self) -> None:
        """While the database is away the last settings stay; a request fails, and the poll logs nothing."""
        done = self.config.read_now()
        self.database.reads[0].errback(DatabaseUnavailable("away"))
        self.failureResultOf(done, DatabaseUnavailable)
        self.config.notify()
        self.database.reads[1].errback(DatabaseUnavailable("away"))
        self.assertEqual((self.config.version, self.flushLoggedErrors()), (1, []))

    def test_poll(self) -> None:
        """The settings are polled in case a NOTIFY was lost, until the stop."""
        self.database.make = lambda: fail(DatabaseUnavailable(""))
        self.config.start()
        self.assertEqual(len(self.database.reads), 1)
        # A failed read is retried soon.
        self.time.advance(RETRY_S)
        self.assertEqual(len(self.database.reads), 2)
        self.database.make = lambda: succeed(Snapshot(1, {"relay.window": 9}))
        self.time.advance(RETRY_S)
        self.time.pump([RETRY_S] * 5)
        self.assertEqual(len(self.database.reads), 3)
        self.time.advance(POLL_S)
        self.assertEqual(len(self.database.reads), 4)
        self.config.stop()
        self.time.advance(POLL_S)
        self.assertEqual(len(self.database.reads), 4)
