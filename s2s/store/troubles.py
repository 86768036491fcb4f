"""Errors of the database on connections that live: told to the operator, without a line for each statement."""

from __future__ import annotations

from typing import Any, Final

from twisted.logger import Logger

from s2s.clock import Timer, cancel
from s2s.store import sqlstate

#: Seconds between two lines about one error, and without it until it counts as over.
TELL_S: Final = 60.0
#: SQLSTATEs that are told apart, and texts of one SQLSTATE. Further ones share one line.
MOST_STATES: Final = 32
MOST_TEXTS: Final = 8
_OTHER: Final = "other"
_FURTHER: Final = "further errors"


class Troubles:
    """Logs the first error of each text and SQLSTATE at once, then a count once a minute, then that it is over.

    :param reactor: an ``IReactorTime``.
    :ivar counts: errors by SQLSTATE, since the start.
    """

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        #: Errors since the last line, by text and SQLSTATE.
        self._untold: dict[tuple[str, str], int] = {}
        self._timers: dict[tuple[str, str], Timer] = {}
        self.counts: dict[str, int] = {}

    def note(self, state: str, text: str) -> None:
        """Count an error that an operator can mend.

        :param state: its SQLSTATE.
        :param text: the server's message without the data.
        """
        cure = sqlstate.meaning(state).cure or "see the log of the database"
        if state not in self.counts and len(self.counts) >= MOST_STATES:
            state = _OTHER
        self.counts[state] = self.counts.get(state, 0) + 1
        error = (text, state)
        if error not in self._untold and sum(told == state for _, told in self._untold) >= MOST_TEXTS:
            error = (_FURTHER, state)
        if error in self._untold:
            self._untold[error] += 1
            return
        self._untold[error] = 0
        self.log.error(
            "the database refuses statements: {text} (SQLSTATE {state}): {cure}",
            text=text,
            state=state,
            cure=cure,
        )
        self._watch(error)

    def stop(self) -> None:
        """Log no more."""
        for timer in self._timers.values():
            cancel(timer)

    def _watch(self, error: tuple[str, str]) -> None:
        self._timers[error] = self._reactor.callLater(TELL_S, self._look, error)

    def _look(self, error: tuple[str, str]) -> None:
        count = self._untold[error]
        text, state = error
        if not count:
            del self._untold[error], self._timers[error]
            self.log.info(
                "not come again for {seconds:g} s: {text} (SQLSTATE {state})", seconds=TELL_S, text=text, state=state
            )
            return
        self.log.error(
            "the database refuses statements still: {text} (SQLSTATE {state}) came {count} times in {seconds:g} s",
            text=text,
            state=state,
            count=count,
            seconds=TELL_S,
        )
        self._untold[error] = 0
        self._watch(error)
