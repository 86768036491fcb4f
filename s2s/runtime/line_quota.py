"""A limit on the log lines about one kind of event, whatever its cause and frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from s2s.runtime.clock import Timer, cancel

#: The default number of events that get a line each in one period, and the period in seconds. Further events of a
#: period are counted.
TOLD: Final = 3
PERIOD_S: Final = 60.0
#: The number of events with a line each for events of individual interest: a failed command, a dead row, a refused
#: frame.
MOST_TOLD: Final = 20
#: The most causes that are counted separately; events with further causes are counted together.
MOST_CAUSES: Final = 32
_OTHER: Final = "for other causes"


class LineQuota:
    """Allows a few lines a minute, and counts the events without a line.

    :param reactor: an ``IReactorTime``.
    :param tell: called at the end of a period with the number of events without a line, by cause, if there were any.
    :param most: the number of events that get a line each in one period.
    :param is_first_told: the first event of each cause always gets a line, for :data:`MOST_CAUSES` causes.
    """

    def __init__(
        self,
        reactor: Any,
        tell: Callable[[Mapping[str, int]], object],
        most: int = TOLD,
        is_first_told: bool = False,
    ) -> None:
        self._reactor = reactor
        self._tell = tell
        self._most = most
        self._is_first_told = is_first_told
        self._is_stopped = False
        self._told = 0
        #: Causes that have had a line in this period.
        self._causes: set[str] = set()
        self._untold: Counter[str] = Counter()
        self._timer: Timer | None = None

    def may_tell(self, cause: str, count: int = 1) -> bool:
        """Return whether an event may have a line of its own; if not, count it under its cause.

        :param count: the number of events that the line would stand for.
        """
        if self._is_stopped:
            return True
        if self._timer is None:
            self._begin()
        if self._told < self._most or (self._is_first_told and self._is_new(cause)):
            self._told += 1
            self._causes.add(cause)
            return True
        self._untold[cause if cause in self._untold or len(self._untold) < MOST_CAUSES else _OTHER] += count
        return False

    def _is_new(self, cause: str) -> bool:
        return len(self._causes) < MOST_CAUSES and cause not in self._causes

    def stop(self) -> None:
        """Report the counted events now; each later event gets a line of its own, and no timer is left."""
        self._is_stopped = True
        cancel(self._timer)
        self._timer = None
        self._flush()

    def _begin(self) -> None:
        self._timer = self._reactor.callLater(PERIOD_S, self._end)

    def _end(self) -> None:
        self._timer = None
        if not self._untold:
            self._told = 0
            self._causes.clear()
            return
        # Allow a line for each event again only after a period without counted events.
        self._begin()
        self._flush()

    def _flush(self) -> None:
        untold, self._untold = self._untold, Counter()
        if untold:
            self._tell(dict(untold.most_common()))
