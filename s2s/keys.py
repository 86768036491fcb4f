"""The keys of ``s2s_keys`` in memory, kept fresh (docs/protocol.rst, "Keys")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.clock import Clock, Timer
from s2s.errors import DatabaseError
from s2s.signing import Keyring
from s2s.store import keys as store
from s2s.store.keys import KeyRow, KeyTable, make_keyring
from s2s.store.pool import Database

#: Beside the table's NOTIFY, which can be lost.
POLL_S: Final = 5.0
#: Between two reads: for an unknown ``key_id``, which any stranger can name, and for a NOTIFY.
UNKNOWN_GAP_S: Final = 1.0
NOTIFY_GAP_S: Final = 0.1


class LiveKeys:
    """A :class:`~s2s.dispatch.KeySource`. While the database is away, the keys read last stay in force.

    The database's clock dates the keys and ours judges them, so that every window is told by ours as it is read: what
    ended by the database's clock has ended here at once, however the two clocks differ.

    :param rows: the keys as the check before the start found them, their windows told by our clock.
    """

    log = Logger()

    def __init__(self, database: Database, clock: Clock, rows: Iterable[KeyRow] = ()) -> None:
        self._database = database
        self._clock = clock
        self._poll = task.LoopingCall(self.changed)
        self._poll.clock = clock.scheduler
        self._timer: Timer | None = None
        self._began_at = float("-inf")
        self._is_reading = False
        self._is_stopped = False
        self._gap_wanted: float | None = None
        self._waiters: list[Deferred[None]] = []
        self._complained: frozenset[str] = frozenset()
        #: Called with the keys after each read.
        self.watchers: list[Callable[[Keyring], object]] = []
        self.keyring = self._usable(rows)

    def start(self) -> None:
        """Poll from now on."""
        self._poll.start(POLL_S, now=True)

    def stop(self) -> None:
        """Read no more."""
        self._is_stopped = True
        if self._poll.running:
            self._poll.stop()
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._fire()

    def changed(self) -> None:
        """The table may have changed: read it soon."""
        self._read_after(NOTIFY_GAP_S)

    def refresh(self) -> Deferred[None]:
        """Read the table, once a second at most.

        :returns: fires after a read that began after this call, whether it succeeded or not.
        """
        waiter: Deferred[None] = Deferred()
        self._waiters.append(waiter)
        self._read_after(UNKNOWN_GAP_S)
        return waiter

    def _read_after(self, gap_s: float) -> None:
        if self._is_stopped:
            self._fire()
            return
        if self._is_reading:
            # What changed after that read began is not in it.
            self._gap_wanted = min(gap_s, self._gap_wanted or gap_s)
            return
        wait_s = max(0.0, self._began_at + gap_s - self._clock.mono())
        if self._timer is None or not self._timer.active():
            self._timer = self._clock.scheduler.callLater(wait_s, self._read)
        elif self._clock.mono() + wait_s < self._timer.getTime():
            self._timer.reset(wait_s)

    def _read(self) -> None:
        self._is_reading = True
        self._began_at = self._clock.mono()
        waiters, self._waiters = self._waiters, []
        reading = self._database.run(store.read)
        reading.addCallback(self._took).addErrback(self._kept)
        reading.addBoth(self._done, waiters)

    def _took(self, table: KeyTable) -> None:
        self.keyring = self._usable(table.by_clock(self._clock.now()))
        for told in self.watchers:
            told(self.keyring)

    def _kept(self, failure: Failure) -> None:
        # Of a database that is away the pool has told.
        if not failure.check(DatabaseError):
            self.log.failure("reading the keys failed", failure)

    def _done(self, _: object, waiters: list[Deferred[None]]) -> None:
        self._is_reading = False
        if not self._is_stopped and self._gap_wanted is not None:
            gap_s, self._gap_wanted = self._gap_wanted, None
            self._read_after(gap_s)
        for waiter in waiters:
            waiter.callback(None)

    def _fire(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.callback(None)

    def _usable(self, rows: Iterable[KeyRow]) -> Keyring:
        usable, complaints = make_keyring(rows)
        for key_id, why in complaints.items():
            if key_id not in self._complained:
                self.log.error("key {key_id!r} is not usable: {why}", key_id=key_id, why=why)
        self._complained = frozenset(complaints)
        return usable
