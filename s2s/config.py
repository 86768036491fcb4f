"""The configuration in force in this process (docs/protocol.rst, "Configuration")."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred

from s2s.clock import Clock
from s2s.news import news
from s2s.reread import Reread
from s2s.settings import BY_KEY, Value
from s2s.store import config as table
from s2s.store.config import Snapshot
from s2s.store.pool import Database


class LiveConfig:
    """The settings of table ``config``, whole and of one version at any time.

    :param snapshot: as the check before the start found it.
    :ivar version: the one in force.
    """

    def __init__(self, database: Database, clock: Clock, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._rereading = Reread(database, clock, table.read, (), self._took)
        #: Called after every change, to put it in force.
        self.watchers: list[Callable[[LiveConfig], object]] = []
        self.start, self.stop = self._rereading.start, self._rereading.stop
        self.changed = self._rereading.changed

    @property
    def version(self) -> int:
        """The version in force."""
        return self._snapshot.version

    def __getitem__(self, key: str) -> Value:
        """Give a setting's value.

        :raises KeyError: there is no such setting.
        """
        if key in self._snapshot.values:
            return self._snapshot.values[key]
        return BY_KEY[key].default

    def number(self, key: str) -> int:
        """Give the value of an integer setting of ours, within our bounds: the table's can be lifted by hand."""
        setting, value = BY_KEY[key], self[key]
        number = value if type(value) is int else setting.number
        return max(setting.least or 0, min(number, number if setting.most is None else setting.most))

    def again(self) -> Deferred[None]:
        """Read the table again; fires when what was read after this call is in force, or fails."""
        return self._rereading.again()

    def _took(self, snapshot: Snapshot) -> None:
        if snapshot == self._snapshot:
            return
        before, self._snapshot = self._snapshot, snapshot
        for watcher in self.watchers:
            watcher(self)
        told = [
            f"{key} is {value} (was {before.values[key]})"
            for key, value in snapshot.values.items()
            if value != before.values.get(key, value)
        ]
        news.info("config version {version} is in force: {told}", version=self.version, told="; ".join(told) or "-")
