"""Log database errors on working connections for the operator, without a line for each statement."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

from twisted.logger import Logger

from s2s.runtime.clock import Timer, cancel
from s2s.store import sqlstate

#: Seconds between two log lines about one error. An error that does not occur for this long counts as over.
TELL_S: Final = 60.0
#: The number of SQLSTATEs that are logged separately, and of texts for one SQLSTATE. Further ones share one entry.
MOST_STATES: Final = 32
MOST_TEXTS: Final = 8
_OTHER: Final = "other"
_FURTHER: Final = "further errors"


@dataclass
class _Trouble:
    """A logged error: the id of its incident, its occurrences since its last line, and the timer of the next line."""

    incident: str
    untold: int = 0
    timer: Timer | None = None


class Troubles:
    """Logs the first error of each text and SQLSTATE at once, then a count once a minute, then its end.

    :param reactor: an ``IReactorTime``.
    :ivar counts: the number of errors by SQLSTATE, since the start.
    """

    log = Logger()

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        #: The errors that are not over, by text and SQLSTATE.
        self._current: dict[tuple[str, str], _Trouble] = {}
        self.counts: dict[str, int] = {}

    def note(self, state: str, text: str) -> str:
        """Count an error that an operator can fix.

        :param state: its SQLSTATE.
        :param text: the server's message without the data.
        :returns: the id of the incident in the log.
        """
        cure = sqlstate.meaning(state).cure or "run: s2s db status; see the log of the database"
        if state not in self.counts and len(self.counts) >= MOST_STATES:
            state = _OTHER
        self.counts[state] = self.counts.get(state, 0) + 1
        error = (text, state)
        if error not in self._current and sum(told == state for _, told in self._current) >= MOST_TEXTS:
            error = (_FURTHER, state)
        trouble = self._current.get(error)
        if trouble is not None:
            trouble.untold += 1
            return trouble.incident
        trouble = self._current[error] = _Trouble(secrets.token_hex(8))
        self.log.error(
            "incident {incident}: the database refuses statements: {text} (SQLSTATE {state}): {cure}",
            incident=trouble.incident,
            text=text,
            state=state,
            cure=cure,
        )
        self._watch(error, trouble)
        return trouble.incident

    def current(self, *states: str) -> list[str]:
        """Return the texts of the errors of some SQLSTATEs that are not over."""
        return [text for text, state in self._current if state in states]

    def stop(self) -> None:
        """Stop logging."""
        for trouble in self._current.values():
            cancel(trouble.timer)

    def _watch(self, error: tuple[str, str], trouble: _Trouble) -> None:
        trouble.timer = self._reactor.callLater(TELL_S, self._look, error, trouble)

    def _look(self, error: tuple[str, str], trouble: _Trouble) -> None:
        text, state = error
        if not trouble.untold:
            del self._current[error]
            self.log.info(
                "not come again for {seconds:g} s: {text} (SQLSTATE {state})", seconds=TELL_S, text=text, state=state
            )
            return
        self.log.error(
            "incident {incident}: the database still refuses statements: {text} (SQLSTATE {state}) came {count} times "
            "in {seconds:g} s",
            incident=trouble.incident,
            text=text,
            state=state,
            count=trouble.untold,
            seconds=TELL_S,
        )
        trouble.untold = 0
        self._watch(error, trouble)
