"""Watch the database's clock: report its leaps, and repair the delays they caused (docs/protocol.rst, "Clocks")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from s2s.errors import DatabaseError, StatementRefused
from s2s.runtime.clock import Clock, suspended_s
from s2s.store.pool import Database
from s2s.store.tables import clock_drift

#: Seconds between two checks. Once a clock is right again, no row of ours is delayed for longer.
LOOK_S: Final = 5.0
#: Change of the database's clock against our monotonic clock, in seconds, from which on it counts as a leap.
LEAP_S: Final = 30.0
#: Seconds until a clock that stays at its new time after a leap is trusted again: it was corrected by the leap.
ADOPT_S: Final = 3600.0
#: Seconds between the database's clock and ours from which on a warning is logged, and from which on it is doubtful.
APART_S: Final = 60.0
DOUBTFUL_S: Final = 3600.0
#: Seconds between two scans of all commands that are not due yet, if one step does not cover them all.
CYCLE_S: Final = 600.0
#: The period, in seconds, and the most log lines in it, for a clock that leaps all the time.
TELL_S: Final = 60.0
MOST_TOLD: Final = 5

#: Scans one table: see :func:`s2s.store.tables.clock_drift.heal_commands`.
Step = Callable[..., tuple[int, Any]]


class ClockWatch:
    """Compares the database's clock with ours, and pulls back times that lie further ahead than they validly can.

    :param rules: the rules of :mod:`s2s.store.tables.clock_drift` that run at each check.
    :param steps: the scans that run after a leap, at the start, and at intervals; at each check if one step is enough.

    :ivar is_trusted: the database's clock agrees with ours, and the last check has seen it. Only then is it safe to
        remove rows that are old by this clock.
    """

    log = Logger()

    def __init__(
        self, database: Database, clock: Clock, rules: Mapping[str, str], steps: Mapping[str, Step] | None = None
    ) -> None:
        self._database = database
        self._clock = clock
        self._rules = rules
        self._steps = steps or {}
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock.scheduler
        self._stopped: Deferred[Any] = succeed(None)
        #: Baseline of the database's clock minus our monotonic clock, in seconds.
        self._base: float | None = None
        #: The size of its leap from there, in seconds, and the time of the leap.
        self._leap_s = 0.0
        self._leapt_at = 0.0
        #: How far it was ahead of this machine's clock at the last check, in seconds, and whether that was too far.
        self._apart_s = 0.0
        self._is_apart = False
        #: Whether the database's clock was behind at the last check.
        self._was_behind = False
        self._cycle_at = float("-inf")
        self._healed: Counter[str] = Counter()
        self._told_from = float("-inf")
        self._told = 0
        self._is_failing = False
        self.is_trusted = False

    def start(self) -> None:
        """Start the checks."""
        self._stopped = self._looking.start(LOOK_S)

    def stop(self) -> Deferred[Any]:
        """Stop the checks.

        :returns: fires when no check is in progress.
        """
        if self._looking.running:
            self._looking.stop()
        return self._stopped

    async def _look(self) -> None:
        """Check once. Never fails."""
        try:
            is_more = True
            while is_more and self._looking.running:
                before, now = self._elapsed(), self._clock.now()
                at, healed, refused = await self._database.run(
                    clock_drift.look, self._rules, partial(self._is_behind, before, now)
                )
                was_behind = self._is_behind(before, now, at)
                self._judge(at, before, self._elapsed())
                self._healed.update(healed)
                for name, error in refused.items():
                    self._refused(name, error)
                self._was_behind = self._is_behind(before, now, at)
                is_more = clock_drift.STEP_ROWS in healed.values() or (was_behind and not self._was_behind)
            if self._clock.mono() >= self._cycle_at:
                await self._cycle()
            self._is_failing = False
        except DatabaseError as error:
            self.is_trusted = False
            if not self._is_failing and self._looking.running:
                self._is_failing = True
                self.log.warn("the database's clock is not watched for the moment: {why}", why=str(error))
        except Exception:
            self.is_trusted = False
            self.log.failure("watching the database's clock failed")
        if self._healed:
            told = ", ".join(f"{count} {name}" for name, count in self._healed.items())
            if self._tell(f"times that lay too far in the future were reset: {told}"):
                self._healed.clear()

    async def _cycle(self) -> None:
        """Scan the tables that are too large for one statement."""
        pause_s, has_healed = 0.0, False
        for name, step in self._steps.items():
            if self._was_behind and name in clock_drift.NOT_WHILE_BEHIND:
                continue
            place = None
            while self._looking.running:
                try:
                    healed, place = await self._database.run(step, place)
                except StatementRefused as error:
                    # The other tables are still scanned, and this table is scanned again in the next cycle.
                    self._refused(name, error)
                    break
                self._healed.update({name: healed} if healed else {})
                has_healed |= healed > 0
                if place is None:
                    break
                pause_s = CYCLE_S
        # If a wrong clock has written a row, it may write more of them, so scan again at the next check.
        self._cycle_at = self._clock.mono() + (0.0 if has_healed else pause_s)

    def _refused(self, name: str, error: DatabaseError) -> None:
        self._database.troubles.note(getattr(error, "state", ""), f"times of {name} are not pulled back: {error}")

    def _elapsed(self) -> float:
        """Return our monotonic time, including suspended time, so that a suspend does not look like a leap."""
        return self._clock.mono() + suspended_s()

    def _is_behind(self, before: float, now: float, at: float) -> bool:
        """Whether the database's clock may be behind. Runs in any thread.

        If it has leapt back together with this machine's clock, either both are behind now or both were ahead before,
        as on a machine that sets its clock right after the start. The two cases cannot be distinguished.

        :param before: our monotonic time before the query.
        :param now: our wall clock at that moment.
        :param at: the database's time.
        """
        base = self._base
        return at < now - APART_S or (base is not None and at - before < base - LEAP_S)

    # --- the clock --------------------------------------------------------------------------------------------------

    def _judge(self, at: float, before: float, after: float) -> None:
        """Compare a time of the database with our times before and after the query."""
        # The database read its clock at any moment between the two, because it may have been slow.
        low, high = at - after, at - before
        apart_s = at - self._clock.now()
        is_apart = abs(apart_s) > APART_S + (after - before)
        if self._base is None:
            self._base = (low + high) / 2
        leap_s = min(0.0, high - self._base) + max(0.0, low - self._base)
        if abs(leap_s) <= LEAP_S:
            # No two clocks run at the same rate, so follow a difference that is smaller than a leap.
            self._base += leap_s
            if self._leap_s:
                self._leapt(0.0)
                self._tell("the database's clock is back where it was before it leapt")
        elif self._is_apart and not is_apart:
            # The clock was already wrong when the checks began.
            self._leapt(0.0)
            self._base = (low + high) / 2
            self._tell("the database's clock is right again")
        elif abs(leap_s - self._leap_s) > LEAP_S:
            self._leapt(leap_s)
            told = f"leapt {abs(leap_s):.0f} s {'ahead' if leap_s > 0 else 'back'}"
            if abs(apart_s - self._apart_s) > LEAP_S + (after - before):
                told = f"the database's clock has {told}: commands and jobs come at wrong times, and nothing old is"
                self._tell(f"{told} removed, until it is set right")
            else:
                told = (
                    f"the database's clock and this machine's have {told}: either they are wrong now, and are to be set"
                )
                self._tell(f"{told} right, or they were wrong before; nothing old is removed for {ADOPT_S:.0f} s")
        elif self._clock.mono() >= self._leapt_at + ADOPT_S:
            self._leapt(0.0)
            self._base = (low + high) / 2
            self._tell(f"the database's clock has stayed where it leapt to for {ADOPT_S:.0f} s: it is trusted")
        if is_apart and not self._is_apart and not self._leap_s:
            ahead = "ahead of" if apart_s > 0 else "behind"
            self._tell(f"the database's clock is {abs(apart_s):.0f} s {ahead} this machine's: set the wrong one right")
        self._apart_s, self._is_apart = apart_s, is_apart
        self.is_trusted = not self._leap_s and abs(apart_s) <= DOUBTFUL_S + (after - before)

    def _leapt(self, leap_s: float) -> None:
        self._leap_s = leap_s
        self._leapt_at = self._clock.mono()
        self._cycle_at = self._leapt_at

    def _tell(self, text: str) -> bool:
        """Log a line, unless this minute has its lines already; return whether it was logged."""
        now = self._clock.mono()
        if now >= self._told_from + TELL_S:
            self._told_from, self._told = now, 0
        self._told += 1
        if self._told > MOST_TOLD:
            return False
        self.log.warn("{text}", text=text)
        return True
