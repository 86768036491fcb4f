"""The configuration in force in this process (docs/protocol.rst, "Configuration")."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred

from s2s.errors import harmless
from s2s.protocol import settings
from s2s.protocol.settings import BY_KEY, Value
from s2s.runtime.clock import Clock
from s2s.runtime.status_log import status_log
from s2s.store.pool import Database
from s2s.store.refresher import Refresher
from s2s.store.tables import config
from s2s.store.tables.config import Snapshot


class LiveConfig:
    """The settings of the table ``config``, always complete and of a single version.

    :param snapshot: the settings that the check before the start found.
    """

    def __init__(self, database: Database, clock: Clock, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._refresher = Refresher(database, clock, config.read, (), self._on_value)
        #: Called after every change, to put the new settings in force.
        self.watchers: list[Callable[[LiveConfig], object]] = []
        self.start, self.stop = self._refresher.start, self._refresher.stop
        self.notify = self._refresher.notify

    @property
    def version(self) -> int:
        """The version in force."""
        return self._snapshot.version

    def __getitem__(self, key: str) -> Value:
        """Return the value of a setting.

        :raises KeyError: there is no such setting.
        """
        return settings.value(self._snapshot.values, key)

    def number(self, key: str) -> int:
        """Return the value of a built-in integer setting, within the built-in bounds.

        The bounds in the table can be removed by hand.
        """
        setting, value = BY_KEY[key], self[key]
        number = value if type(value) is int else setting.number
        return max(setting.least or 0, min(number, number if setting.most is None else setting.most))

    def read_now(self) -> Deferred[None]:
        """Read the table again.

        :returns: fires when settings that were read after this call are in force, or fails.
        """
        return self._refresher.read_now()

    def _on_value(self, snapshot: Snapshot) -> None:
        if snapshot == self._snapshot:
            return
        before, self._snapshot = self._snapshot, snapshot
        for watcher in self.watchers:
            watcher(self)
        told = [
            harmless(f"{key} is {value}") + harmless(f" (was {before.values[key]})")
            for key, value in snapshot.values.items()
            if value != before.values.get(key, value)
        ]
        status_log.info(
            "config version {version} is in force: {told}", version=self.version, told="; ".join(told) or "-"
        )
