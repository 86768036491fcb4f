"""Remove old rows periodically and in small steps (docs/protocol.rst, "Commands")."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from s2s.errors import DatabaseError
from s2s.runtime.clock import Clock, Timer, cancel
from s2s.store import sqlstate
from s2s.store.pool import Database
from s2s.store.tables import retention
from s2s.store.tables.retention import Keep

#: Seconds from the end of one pass to the next, and until the first pass.
INTERVAL_S: Final = 600.0
FIRST_S: Final = 60.0
#: Seconds by which the retention time, from which the age of rows is counted, may be behind the database's clock before
#: the lag is logged.
BEHIND_S: Final = 3600.0
#: Seconds after which a doubt that lasts is logged again.
TELL_S: Final = 86_400.0


class Retention:
    """Removes finished commands, expired idempotency keys and old control requests.

    Every step is a separate transaction, so that other transactions can run between two steps.

    :param keep: returns how long rows are kept; called at each pass.
    :param is_trusted: returns whether the database's clock is trusted; called at each pass.
    :param interval_s: seconds from the end of one pass to the next.
    :param first_s: seconds until the first pass.

    :ivar commands: commands removed.
    :ivar keys: idempotency keys removed.
    """

    log = Logger()

    def __init__(
        self,
        database: Database,
        clock: Clock,
        keep: Callable[[], Keep],
        is_trusted: Callable[[], bool] = lambda: True,
        *,
        interval_s: float = INTERVAL_S,
        first_s: float = FIRST_S,
    ) -> None:
        self._database = database
        self._clock = clock
        self._keep = keep
        self._is_trusted = is_trusted
        #: The doubt of the last pass, and the time from which on it is logged again.
        self._doubted = ""
        self._tell_at = 0.0
        self._interval_s = interval_s
        self._first_s = first_s
        self._timer: Timer | None = None
        self._passing: Deferred[None] = succeed(None)
        self._is_stopping = False
        self.commands = self.keys = 0

    def start(self) -> None:
        """Schedule the first pass."""
        self._is_stopping = False
        self._sleep(self._first_s)

    def stop(self) -> Deferred[None]:
        """Begin no further step.

        :returns: fires when the current step is finished.
        """
        self._is_stopping = True
        cancel(self._timer)
        return self._passing

    def _sleep(self, seconds: float) -> None:
        self._timer = self._clock.scheduler.callLater(seconds, self._begin)

    def _begin(self) -> None:
        self._passing = Deferred.fromCoroutine(self._pass())

    async def _pass(self) -> None:
        """Remove the old rows of all tables. Never fails."""
        before = self.commands, self.keys
        if await self._did(self._may_sweep):
            # A sweep that fails does not stop the others.
            for sweep in (self._sweep_commands, self._sweep_keys, self._sweep_steering):
                await self._did(sweep)
        if (self.commands, self.keys) != before:
            self.log.info(
                "removed {commands} old commands and {keys} expired idempotency keys",
                commands=self.commands - before[0],
                keys=self.keys - before[1],
            )
        if not self._is_stopping:
            self._sleep(self._interval_s)

    async def _did(self, part: Callable[[], Awaitable[bool]]) -> bool:
        """Return the result of a part of a pass; ``False`` if the part failed, which is logged."""
        try:
            return await part()
        except DatabaseError as error:
            if not self._is_stopping:
                why = sqlstate.with_cure(error)
                self.log.warn("retention did not remove all old rows, and tries again later: {why}", why=why)
        except Exception:
            self.log.failure("retention failed")
        return False

    async def _may_sweep(self) -> bool:
        """Advance the retention time towards the database's clock; return ``False`` while that clock is in doubt."""
        if not self._is_trusted():
            self._doubt("the clock", "nothing old is removed while the database's clock is in doubt")
            return False
        behind_s = await self._database.run(retention.advance)
        if behind_s >= BEHIND_S:
            why = "after an outage or because the clock is ahead"
            text = f"retention is {behind_s:.0f} s behind the database's clock, {why}"
            self._doubt("the age", text)
        else:
            self._doubted = ""
        return True

    def _doubt(self, subject: str, text: str) -> None:
        """Log a doubt when it begins, and once per :data:`TELL_S` while it lasts."""
        now = self._clock.mono()
        if subject != self._doubted or now >= self._tell_at:
            self._doubted, self._tell_at = subject, now + TELL_S
            self.log.warn("{text}", text=text)

    async def _sweep_commands(self) -> bool:
        keep = self._keep()
        after: int | None = 0
        while after is not None and not self._is_stopping:
            removed, after = await self._database.run(retention.sweep_commands, after, keep)
            self.commands += removed
        return True

    async def _sweep_keys(self) -> bool:
        since: str | None = "-infinity"
        while since is not None and not self._is_stopping:
            removed, since = await self._database.run(retention.sweep_keys, since)
            self.keys += removed
        return True

    async def _sweep_steering(self) -> bool:
        after: int | None = 0
        while after is not None and not self._is_stopping:
            _, after = await self._database.run(retention.sweep_steering, after)
        return True
