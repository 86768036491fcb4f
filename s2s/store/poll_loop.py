"""Poll a table: look, do the due work, and sleep until there may be more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.logger import Logger

from s2s.errors import DatabaseUnavailable, StatementRefused, one_line
from s2s.runtime.line_quota import LineQuota

#: Seconds between two polls without a wake-up, and between two attempts while the database is unavailable.
POLL_S: Final = 1.0
#: Seconds for which a row is excluded, and the most rows that are excluded at once.
LEFT_OUT_S: Final = 30.0
MOST_LEFT_OUT: Final = 1000
#: Seconds for which every poll must have failed before that is reported as a condition: one may fail by chance.
FAILING_S: Final = 10.0


class LeftOut:
    """Keys of rows that the database refuses to change; they are excluded so that the other rows proceed.

    :param name: the name of a row in the log.
    :param turns: the poll loop that logs the refusals.
    :param mono: returns the monotonic time in seconds.
    """

    def __init__(self, name: str, turns: PollLoop, mono: Callable[[], float]) -> None:
        self._name = name
        self._loop = turns
        self._mono = mono
        self._until: dict[str, float] = {}

    def add(self, key: str, refused: StatementRefused) -> float | None:
        """Exclude a row for :data:`LEFT_OUT_S`, unless too many are excluded, and log why.

        :returns: seconds to sleep, see :class:`PollLoop`.
        """
        self._loop.tell_refused(f"{self._name} {key}: {refused}")
        if len(self.keys()) >= MOST_LEFT_OUT:
            return None
        self._until[key] = self._mono() + LEFT_OUT_S
        return 0.0

    def keys(self) -> list[str]:
        """Return the keys that are excluded now."""
        now = self._mono()
        self._until = {key: until for key, until in self._until.items() if now < until}
        return list(self._until)


class PollLoop:
    """Polls again and again, in several concurrent workers, until it is stopped.

    :param name: the name of a worker in the log.
    :param turn: polls once, given the worker's number. It returns the seconds to sleep afterwards, :data:`POLL_S` at
        most; ``None`` stands for :data:`POLL_S`. Its exceptions do not end the worker.
    :param clock: an ``IReactorTime``.
    :param lines: the number of workers.
    :ivar is_stopping: no poll begins any more.
    """

    log = Logger()

    def __init__(self, name: str, turn: Callable[[int], Awaitable[float | None]], clock: Any, lines: int = 1) -> None:
        self._name = name
        self._poll_once = turn
        self._clock = clock
        self._lines = lines
        self._quota = LineQuota(clock, self._tell, is_first_told=True)
        self.is_stopping = False
        #: Whether there was a wake-up since a worker last began to poll.
        self._is_woken = False
        #: Since when every poll has failed, and why the last one has.
        self._failing_from: float | None = None
        self._why = ""
        self._asleep: list[Deferred[None]] = []
        self._running: list[Deferred[None]] = []

    def start(self) -> None:
        """Start the workers."""
        self._running = [Deferred.fromCoroutine(self._go(line)) for line in range(self._lines)]

    def stop(self) -> Deferred[Any]:
        """Begin no further poll.

        :returns: fires when the running polls are finished.
        """
        self.is_stopping = True
        self._quota.stop()
        self.wake_all()
        return gatherResults(self._running)

    def wake(self) -> None:
        """Wake one worker, because there may be something to do."""
        self._is_woken = True
        if self._asleep:
            self._asleep[0].cancel()

    def wake_all(self) -> None:
        """Wake every worker, because the workers do not all see the same rows."""
        self._is_woken = True
        for sleeper in self._asleep[:]:
            sleeper.cancel()

    @property
    def trouble(self) -> str:
        """Why every poll has failed for :data:`FAILING_S`; empty: not every one has."""
        failing_from = self._failing_from
        return self._why if failing_from is not None and self._clock.seconds() >= failing_from + FAILING_S else ""

    def tell_refused(self, why: str) -> None:
        """Log, within a quota, that the database refuses a statement because of a trigger or constraint of a user."""
        # A traceback would add nothing.
        if self._quota.may_tell(why):
            self.log.error("{name}: the database refuses a statement: {why}", name=self._name, why=why)

    def _tell(self, untold: Mapping[str, int]) -> None:
        for why, count in untold.items():
            self.log.error("{name} failed {count} more times: {why}", name=self._name, count=count, why=why)

    async def _go(self, line: int) -> None:
        while not self.is_stopping:
            self._is_woken = False
            pause_s = None
            try:
                pause_s = await self._poll_once(line)
                self._failing_from = None
            except GeneratorExit:
                raise
            except BaseException as error:
                self._failed(error)
            if pause_s != 0 and not self._is_woken and not self.is_stopping:
                await self._sleep(POLL_S if pause_s is None else min(pause_s, POLL_S))

    def _failed(self, error: BaseException) -> None:
        if self._failing_from is None:
            self._failing_from = self._clock.seconds()
        self._why = one_line(error)
        if isinstance(error, DatabaseUnavailable):
            return  # The pool has already logged it, once.
        if isinstance(error, StatementRefused):
            self.tell_refused(str(error))
        # Mostly a SystemExit of foreign code, which must not end a worker silently.
        elif self._quota.may_tell(self._why):
            self.log.failure("{name} failed", name=self._name)

    async def _sleep(self, seconds: float) -> None:
        sleeper: Deferred[None] = deferLater(self._clock, seconds)
        self._asleep.append(sleeper)
        try:
            await sleeper
        except CancelledError:
            pass
        finally:
            self._asleep.remove(sleeper)
