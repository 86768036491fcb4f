"""The keys of the table ``s2s_keys`` in memory, kept up to date (docs/protocol.rst, "Keys")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from s2s.protocol.signing import Keyring
from s2s.runtime.clock import Clock
from s2s.store.pool import Database
from s2s.store.refresher import Refresher
from s2s.store.tables import keys
from s2s.store.tables.keys import KeyRow, KeyTable, make_keyring

#: Seconds between two reads, besides the NOTIFY of the table, which can be lost.
POLL_S: Final = 5.0
#: The shortest time in seconds between two reads: for an unknown ``key_id``, which any stranger can send, and for a
#: NOTIFY.
UNKNOWN_GAP_S: Final = 1.0
NOTIFY_GAP_S: Final = 0.1


class LiveKeys:
    """A :class:`~s2s.link.dispatcher.KeySource`. While the database is away, the keys read last stay in force.

    The database's clock dates the keys and the clock of this process checks them, so each read converts the windows to
    this clock: a key that has expired by the database's clock is expired here at once, however the two clocks differ.

    :param rows: the keys that the check before the start found, with their windows by the clock of this process.
    """

    log = Logger()

    def __init__(self, database: Database, clock: Clock, rows: Iterable[KeyRow] = ()) -> None:
        self._clock = clock
        self._refresher = Refresher(database, clock, keys.read, (), self._on_value, POLL_S)
        self._complained: frozenset[str] = frozenset()
        #: Called with the keys after each read.
        self.watchers: list[Callable[[Keyring], object]] = []
        self.keyring = self._usable(rows)
        self.start, self.stop = self._refresher.start, self._refresher.stop

    def notify(self) -> None:
        """Read the table soon, because it may have changed."""
        self._refresher.notify(NOTIFY_GAP_S)

    def refresh(self) -> Deferred[None]:
        """Read the table, at most once a second.

        :returns: fires after a read that began after this call, whether it succeeded or not.
        """
        return self._refresher.refresh(UNKNOWN_GAP_S)

    def _on_value(self, table: KeyTable) -> None:
        self.keyring = self._usable(table.by_clock(self._clock.now()))
        for told in self.watchers:
            told(self.keyring)

    def _usable(self, rows: Iterable[KeyRow]) -> Keyring:
        usable, complaints = make_keyring(rows)
        for key_id, why in complaints.items():
            if key_id not in self._complained:
                self.log.error("key {key_id!r} is not usable: {why}", key_id=key_id, why=why)
        self._complained = frozenset(complaints)
        return usable
