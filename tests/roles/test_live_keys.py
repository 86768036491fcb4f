"""Keys in memory: read again on NOTIFY, on request and periodically, and kept while the database is away."""

from __future__ import annotations

import base64
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock as FakeClock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.roles.live_keys import LiveKeys
from s2s.runtime.clock import Clock
from s2s.store.tables import keys
from s2s.store.tables.keys import KeyRow, KeyTable

_B64 = base64.b64encode(b"never-shown-never-shown-never-shown").decode()


def _row(key_id: str = "k1", key_b64: str = _B64, since: float = 0.0, until: float | None = None) -> KeyRow:
    return KeyRow(key_id, key_b64, "any", since, until, False)


class _Database:
    """A database whose reads the test ends.

    :ivar reads: the reads in progress.
    :ivar began: the time at which each read began, in the clock's seconds.
    :ivar ahead_s: seconds by which the database's clock is ahead of the process's clock.
    """

    ahead_s = 0.0

    def __init__(self, time: FakeClock) -> None:
        self._time = time
        self.reads: list[Deferred[Any]] = []
        self.began: list[float] = []

    def run(self, function: Any) -> Deferred[Any]:
        """Begin a read."""
        assert function is keys.read
        self.began.append(self._time.seconds())
        self.reads.append(Deferred())
        return self.reads[-1]

    @property
    def now(self) -> float:
        """Return the time of the database's clock."""
        return self._time.seconds() + self.ahead_s

    def answer(self, *rows: KeyRow) -> None:
        """End the oldest read with these rows."""
        self.reads.pop(0).callback(KeyTable(list(rows), self.now))

    def fail(self, error: Exception) -> None:
        """End the oldest read with an error."""
        self.reads.pop(0).errback(error)


class LiveKeysTests(SynchronousTestCase):
    """:class:`LiveKeys`."""

    def setUp(self) -> None:
        """Create keys that were read once before the start."""
        self.time = FakeClock()
        self.time.advance(1000)
        self.database = _Database(self.time)
        self.keys = LiveKeys(self.database, Clock(self.time, self.time.seconds), [_row("k1")])  # type: ignore[arg-type]

    def known(self) -> list[str]:
        """Return the names of the keys in memory."""
        return [key_id for key_id in ("k1", "k2", "k3") if key_id in self.keys.keyring]

    def start(self) -> None:
        """Start, and end the first read."""
        self.keys.start()
        self.time.advance(0)
        self.database.answer(_row("k1"))
        self.database.began.clear()

    def test_before_the_start(self) -> None:
        """The keys read before the start are in force, and the table is not read."""
        self.assertEqual((self.known(), self.database.began), (["k1"], []))

    def test_polls(self) -> None:
        """The table is read at the start and every 5 s."""
        self.keys.start()
        self.time.advance(0)
        for _ in range(3):
            self.database.answer(_row("k2"))
            self.assertEqual(self.known(), ["k2"])
            self.time.advance(5)
        self.assertEqual(self.database.began, [1000, 1005, 1010, 1015])

    def test_a_notify(self) -> None:
        """A change is read at once, and many changes are read ten times a second at most."""
        self.start()
        self.time.advance(1)
        self.keys.notify()
        self.time.advance(0)
        self.database.answer(_row("k2"))
        self.assertEqual((self.known(), self.database.began), (["k2"], [1001]))
        for _ in range(100):
            self.keys.notify()
            self.time.advance(0.01)
            while self.database.reads:
                self.database.answer(_row("k3"))
        self.assertLessEqual(len(self.database.began), 12)
        self.assertGreater(len(self.database.began), 9)

    def test_asked(self) -> None:
        """On request the table is read once a second at most, for all requests."""
        self.start()
        self.time.advance(1)
        first = self.keys.refresh()
        self.time.advance(0)
        self.assertNoResult(first)
        self.database.answer(_row("k1"), _row("k2"))
        self.successResultOf(first)
        self.assertEqual(self.known(), ["k1", "k2"])
        second, third = self.keys.refresh(), self.keys.refresh()
        self.time.advance(0.99)
        self.assertEqual(self.database.reads, [])
        self.time.advance(0.01)
        self.database.answer(_row("k3"))
        self.successResultOf(second)
        self.successResultOf(third)
        self.assertEqual(self.database.began, [1001, 1002])

    def test_asked_while_a_read_is_under_way(self) -> None:
        """A request during a read waits for the next read, since the key may have come after the first one began."""
        self.start()
        self.time.advance(1)
        first = self.keys.refresh()
        self.time.advance(0)
        second = self.keys.refresh()
        self.database.answer(_row("k1"))
        self.successResultOf(first)
        self.assertNoResult(second)
        self.time.advance(1)
        self.database.answer(_row("k2"))
        self.successResultOf(second)
        self.assertEqual(self.known(), ["k2"])

    def test_a_change_while_a_read_is_under_way(self) -> None:
        """A change during a read is read soon after it, even after a less urgent request."""
        self.start()
        self.time.advance(1)
        self.keys.notify()
        self.time.advance(0)
        waiter = self.keys.refresh()
        self.keys.notify()
        self.database.answer(_row("k1"))
        self.time.advance(0.1)
        self.assertEqual(self.database.began, [1001, 1001.1])
        self.database.answer(_row("k2"))
        self.successResultOf(waiter)

    def test_a_change_brings_a_waiting_read_forward(self) -> None:
        """A change brings a requested read forward that would begin only in a second."""
        self.start()
        waiter = self.keys.refresh()
        self.time.advance(0.5)
        self.keys.notify()
        self.time.advance(0)
        self.database.answer(_row("k2"))
        self.successResultOf(waiter)
        self.assertEqual(self.database.began, [1000.5])

    def test_who_waits_no_more(self) -> None:
        """A caller that gave up during the read that it waited for does not affect the others."""
        self.start()
        again = self.keys._refresher.read_now
        first, second = again(1.0), again(1.0)
        self.time.advance(1)
        third = again(1.0)
        for gone in (first, third):
            gone.cancel()
            self.failureResultOf(gone, CancelledError)
        self.database.answer(_row("k2"))
        self.successResultOf(second)
        self.assertEqual(self.known(), ["k2"])

    def test_who_waits_no_longer_than_a_deadline(self) -> None:
        """A deadline of a caller is no failure of the read, and is not logged."""
        self.start()
        for _ in range(3):
            waiter = self.keys.refresh().addTimeout(3, self.time)
            self.time.advance(3)
            self.successResultOf(waiter)
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_the_database_is_away(self) -> None:
        """While the database is away the keys read last stay, and waiting callers are released."""
        self.start()
        self.time.advance(1)
        waiter = self.keys.refresh()
        self.time.advance(0)
        self.database.fail(DatabaseUnavailable("away"))
        self.successResultOf(waiter)
        self.assertEqual(self.known(), ["k1"])
        self.time.advance(5)
        self.database.answer(_row("k2"))
        self.assertEqual(self.known(), ["k2"])

    def test_a_surprise_is_told(self) -> None:
        """An unexpected error of a read is logged once a minute, and the keys and the polls stay."""
        self.start()
        for lines in (1, 0):
            self.time.advance(5)
            waiters = [self.keys.refresh() for _ in range(3)]
            while self.database.reads:
                self.database.fail(ZeroDivisionError("surprise"))
                self.time.advance(1)
                if all(waiter.called for waiter in waiters):
                    break
            self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), lines)
        self.time.advance(60)
        self.database.answer(_row("k2"))
        self.time.advance(5)
        self.database.answer(_row("k2"))
        self.assertEqual(self.known(), ["k2"])

    def test_stop(self) -> None:
        """After the stop the table is not read, no timer is left, and no caller waits for ever."""
        self.start()
        waiter = self.keys.refresh()
        self.keys.stop()
        self.successResultOf(waiter)
        self.time.advance(60)
        self.assertEqual((self.database.began, self.time.getDelayedCalls()), ([], []))

    def test_stop_during_a_read(self) -> None:
        """A change that came during the last read leads to no read after the stop."""
        self.start()
        self.time.advance(1)
        self.keys.notify()
        self.time.advance(0)
        waiter = self.keys.refresh()
        self.keys.stop()
        self.database.answer(_row("k1"))
        self.successResultOf(waiter)
        self.time.advance(60)
        self.assertEqual((self.database.began, self.time.getDelayedCalls()), ([1001], []))

    def test_told_after_the_stop(self) -> None:
        """A NOTIFY after the stop leads to no read, and a later request does not wait."""
        self.start()
        self.keys.stop()
        self.keys.notify()
        self.successResultOf(self.keys.refresh())
        self.time.advance(60)
        self.assertEqual((self.database.began, self.time.getDelayedCalls()), ([], []))

    def test_rows_that_nobody_can_read(self) -> None:
        """An error in the evaluation of the rows is logged as well, and the keys stay."""
        self.start()
        self.time.advance(5)
        self.database.answer(None)  # type: ignore[arg-type]
        self.assertEqual(len(self.flushLoggedErrors(AttributeError)), 1)
        self.assertEqual(self.known(), ["k1"])

    def test_unusable_rows(self) -> None:
        """A row with a bad secret is logged once, by its name and without its secret, and the others are used."""
        lines: list[str] = []
        observer = lambda event: lines.append(event["log_format"].format(**event))  # noqa: E731
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.start()
        for _ in range(3):
            self.time.advance(5)
            self.database.answer(_row("k1"), _row("k2", "hunter2!"), _row("k3", "aHVudGVyMg=="))
        self.assertEqual(self.known(), ["k1"])
        told = [line for line in lines if "not usable" in line]
        self.assertEqual(len(told), 2)
        self.assertIn("'k2'", told[0])
        self.assertNotIn("hunter2", "".join(lines))
        self.assertNotIn("aHVud", "".join(lines))

    def test_the_clocks_differ(self) -> None:
        """A key dated now() begins or ends here at once, whichever clock is ahead, and the others on time."""
        for self.database.ahead_s in (120.0, -120.0, 0.0):
            self.keys.notify()
            self.time.advance(1)
            now = self.database.now
            self.database.answer(_row("k1", until=now), _row("k2", since=now), _row("k3", until=now + 60))
            self.assertEqual(self.verify(), ["k2", "k3"])
            self.assertEqual(self.keys.keyring.signer("engine", self.time.seconds()).key_id, "k2")
            self.time.advance(59.9)
            self.assertEqual(self.verify(), ["k2", "k3"])
            self.time.advance(0.1)
            self.assertEqual(self.verify(), ["k2"])

    def test_an_answer_that_comes_late(self) -> None:
        """A key that had ended when the rows were read has ended, however late the rows arrive."""
        self.keys.notify()
        self.time.advance(0)
        keys = KeyTable([_row("k1", until=self.database.now), _row("k2", since=self.database.now)], self.database.now)
        self.time.advance(3.7)
        self.database.reads.pop(0).callback(keys)
        self.assertEqual(self.verify(), ["k2"])

    def test_no_rounding_revives_a_key(self) -> None:
        """At no reading of either clock does a key verify that ends now, or ended a moment ago."""
        for step in range(2000):
            now, ours = 1_790_000_000 + step * 0.123457, 1_790_000_000 + step * 1.000003
            for row in KeyTable([_row(until=now, since=now), _row(until=now - 1e-6)], now).by_clock(ours):
                self.assertLessEqual(row.active_to or 0, ours)
                self.assertLessEqual(row.active_from, ours)

    def test_the_watchers_are_told(self) -> None:
        """Without any NOTIFY the poll detects that a key has ended, and notifies the watcher that closes its links."""
        told: list[bool] = []
        self.keys.watchers.append(lambda keyring: told.append(keyring.why_inactive("k1", self.time.seconds()) is None))
        self.start()
        self.time.advance(5)
        self.database.answer(_row("k1", until=self.database.now))
        self.time.advance(5)
        self.database.answer()
        self.assertEqual(told, [True, False, False])

    def verify(self) -> list[str]:
        """Return the names of the keys that verify now."""
        return [
            key_id for key_id in self.known() if self.keys.keyring.why_inactive(key_id, self.time.seconds()) is None
        ]
