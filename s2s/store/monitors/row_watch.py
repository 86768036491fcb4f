"""Report locks of other sessions that block due rows or statements of s2s."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from s2s.runtime.clock import Clock
from s2s.store.monitors import held_rows
from s2s.store.monitors.held_rows import Held
from s2s.store.monitors.periodic import Periodic
from s2s.store.pool import Database


class RowWatch(Periodic):
    """Logs once that rows of a table are locked or that sessions of s2s wait, and once that this is over.

    Only findings of two checks in a row count, because the sessions of s2s lock rows for moments.

    :param tables: the tables that this role works on.
    """

    subject = "locks of other sessions"
    interval_s: ClassVar[float] = 15.0

    def __init__(self, database: Database, clock: Clock, tables: Collection[str]) -> None:
        super().__init__(database, clock)
        self._tables = tables
        #: The findings of the last check, and the findings that the last two checks share, by subject.
        self._last: Mapping[str, Held] = {}
        self._told: dict[str, Held] = {}

    @property
    def held(self) -> str:
        """The locked rows and waiting sessions of s2s, with the holders of the locks; empty: there are none."""
        return "; ".join(map(str, self._told.values()))

    async def _look(self) -> None:
        last, self._last = self._last, await self._database.run(held_rows.look, self._tables)
        both = {subject: held.both(last[subject]) for subject, held in self._last.items() if subject in last}
        was, self._told = self._told, {subject: held for subject, held in both.items() if held}
        for subject, held in self._told.items():
            if subject not in was:
                self.log.warn("{held}", held=str(held))
        for subject in was.keys() - self._told.keys():
            self.log.info("no {subject} any more", subject=subject)
