"""Errors of the database on connections that live: told to the operator, without a line for each statement."""

from __future__ import annotations

from typing import Any, Final

from twisted.logger import Logger

from s2s.clock import Timer, cancel
from s2s.store import sqlstate

#: Seconds between two lines about one SQLSTATE, and without it until it counts as over.
TELL_S: Final = 60.0
#: SQLSTATEs that are told apart. Further ones share one line.
MOST_STATES: Final = 32
_OTHER: Final = "other"


class Troubles:
    """Tells the first error of each SQLSTATE at once, then a count once a minute, then that it is over.

    :param reactor: an ``IReactorTime``.
    :ivar counts: errors by SQLSTATE, since the start.
    """

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        #: Errors since the last line, by SQLSTATE.
        self._untold: dict[str, int] = {}
        self._timers: dict[str, Timer] = {}
        self.counts: dict[str, int] = {}

    def note(self, state: str, text: str) -> None:
        """Count an error that an operator can mend.

        :param state: its SQLSTATE.
        :param text: the server's message without the data.
        """
        if state not in self.counts and len(self.counts) >= MOST_STATES:
            state = _OTHER
        self.counts[state] = self.counts.get(state, 0) + 1
        if state in self._untold:
            self._untold[state] += 1
            return
        self._untold[state] = 0
        self.log.error(
            "the database refuses statements: {text} (SQLSTATE {state}): {cure}",
            text=text,
            state=state,
            cure=sqlstate.meaning(state).cure or "see the log of the database",
        )
        self._watch(state)

    def stop(self) -> None:
        """Tell no more."""
        for timer in self._timers.values():
            cancel(timer)

    def _watch(self, state: str) -> None:
        self._timers[state] = self._reactor.callLater(TELL_S, self._look, state)

    def _look(self, state: str) -> None:
        count = self._untold[state]
        if not count:
            del self._untold[state], self._timers[state]
            self.log.info("SQLSTATE {state} has not come again for {seconds:g} s", state=state, seconds=TELL_S)
            return
        self.log.error(
            "the database refuses statements still: SQLSTATE {state} came {count} times in {seconds:g} s",
            state=state,
            count=count,
            seconds=TELL_S,
        )
        self._untold[state] = 0
        self._watch(state)
