"""Charge the commands that dead processes left behind (docs/protocol.rst, "Commands").

:mod:`s2s.store.tables.claims` describes how a dead process is told from a living one.
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

#: Seconds between two scans for the claims of dead processes.
REAP_S: Final = 5.0
#: Seconds for which the process of a claim must have been gone before the commands of the claim are charged.
SURE_S: Final = 10.0
#: Refused scans in a row after which the refusal is logged.
TOLD_AFTER: Final = 2


class Reaper:
    """Scans periodically for the claims of dead processes, and charges their commands after :data:`SURE_S`.

    :param boot_id: the ``boot_id`` of this process.
    :param on_charge: called with the number of commands charged with an attempt, and how many of them are dead now.
    :param clock: an ``IReactorTime``.
    :param first_note: returns :attr:`s2s.store.tables.ready.Ready.first_note`; called at each scan.
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
        #: Scans in a row that the database has refused with an SQLSTATE.
        self._refusals = 0
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock
        #: The claims whose process seems to be dead, and the second since when. This process has held its presence lock
        #: since :attr:`_presence`, before that.
        self._forsaken: dict[Claim, float] = {}
        self._presence: datetime | None = None

    def start(self) -> Deferred[None]:
        """Start scanning.

        :returns: fires when the reaper has been stopped and no scan is in progress.
        """
        return self._looking.start(REAP_S).addCallback(lambda _: None)

    def stop(self) -> None:
        """Stop scanning."""
        if self._looking.running:
            self._looking.stop()

    async def _look(self) -> None:
        now = self._clock.seconds()
        sure = {note for note, since in self._forsaken.items() if now - since >= SURE_S}
        try:
            look = await self._database.run(claims.reap, self._boot_id, self._presence, sure, self._first_note())
        except DatabaseError as error:
            # The pool has logged that the database is away.
            self._refusals += 1 if getattr(error, "state", "") else 0
            if self._refusals == TOLD_AFTER:
                self.log.error(
                    "commands of processes that ended are not released, so they do not run: {why}",
                    why=sqlstate.with_cure(error),
                )
            return
        except Exception:
            self.log.failure("the scan for claims of processes that ended failed")
            return
        self._refusals = 0
        before = self._forsaken if look.presence == self._presence else {}
        # Use the time at the end of this scan. The next scan compares it with the time of its beginning, so the real
        # interval is at least as long.
        now = self._clock.seconds()
        self._presence, self._forsaken = look.presence, {note: before.get(note, now) for note in look.orphaned}
        if look.charged:
            self.log.warn(
                "{charged} commands lost an attempt, because the process that ran them ended", charged=look.charged
            )
            self._on_charge(look.charged, look.dead)
