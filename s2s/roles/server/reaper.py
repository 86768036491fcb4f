"""Charging what dead processes left behind (docs/protocol.rst, "Commands"; the argument:
:mod:`s2s.store.tables.claims`).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from s2s.errors import DatabaseError
from s2s.store import sqlstate
from s2s.store.pool import Database
from s2s.store.tables import claims
from s2s.store.tables.claims import Claim

#: Seconds between two looks for the notes of processes that are gone.
REAP_S: Final = 5.0
#: Seconds that a note must have been without its process to be charged.
SURE_S: Final = 10.0
#: Looks in a row that fail before that is told.
TOLD_AFTER: Final = 2


class Reaper:
    """Looks now and then whose notes are left, and charges those of which it is sure.

    :param boot_id: this process's.
    :param on_charge: called with how many commands were charged an attempt, and how many of them are dead now.
    :param clock: an ``IReactorTime``.
    :param first_note: see :class:`s2s.store.tables.ready.Ready`; asked at each look.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        boot_id: str,
        on_charge: Callable[[int, int], object],
        clock: Any,
        first_note: Callable[[], int] = lambda: 0,
    ) -> None:
        self._database = database
        self._boot_id = boot_id
        self._on_charge = on_charge
        self._clock = clock
        self._first_note = first_note
        #: Looks in a row that the database has refused, on a connection that lives.
        self._refusals = 0
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock
        #: Notes whose process seems to be gone, and the second since when, under one and the same presence of ours.
        self._forsaken: dict[Claim, float] = {}
        self._presence: datetime | None = None

    def start(self) -> Deferred[None]:
        """Look from now on.

        :returns: fires when it has been stopped and no look is under way.
        """
        return self._looking.start(REAP_S).addCallback(lambda _: None)

    def stop(self) -> None:
        """Look no more."""
        if self._looking.running:
            self._looking.stop()

    async def _look(self) -> None:
        now = self._clock.seconds()
        sure = {note for note, since in self._forsaken.items() if now - since >= SURE_S}
        try:
            look = await self._database.run(claims.reap, self._boot_id, self._presence, sure, self._first_note())
        except DatabaseError as error:
            # Of a database that is away the pool has told.
            self._refusals += 1 if getattr(error, "state", "") else 0
            if self._refusals == TOLD_AFTER:
                self.log.error(
                    "commands of processes that are gone are not charged, and not run: {why}",
                    why=sqlstate.with_cure(error),
                )
            return
        except Exception:
            self.log.failure("looking for the notes of processes that are gone failed")
            return
        self._refusals = 0
        before = self._forsaken if look.presence == self._presence else {}
        # The time of this look's end, and of the next one's beginning: between them at least as long has passed.
        now = self._clock.seconds()
        self._presence, self._forsaken = look.presence, {note: before.get(note, now) for note in look.orphaned}
        if look.charged:
            self.log.warn("{charged} commands were charged for the end of their process", charged=look.charged)
            self._on_charge(look.charged, look.dead)
