"""Whether the database is available, and the log lines about that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from twisted.logger import Logger

from s2s.runtime.line_quota import PERIOD_S, LineQuota
from s2s.store import sqlstate

_OUTAGES: Final = "outages"


class Availability:
    """Log one line at the start and one at the end of an outage; with frequent outages, log one line a minute.

    :param reactor: an ``IReactorTime``.
    :param away: the sentence for the start of an outage.
    :param back: the sentence for its end.
    :ivar is_away: whether there is an outage now.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        away: str = "the database is not available",
        back: str = "the database is available again",
    ) -> None:
        self._sentences = (away, back)
        self._lines = LineQuota(reactor, self._tell)
        #: The reason of the last outage.
        self._why = ""
        self._is_told = False
        self.is_away = False

    def note(self, error: BaseException | None) -> None:
        """Record whether the database is available; any number of callers may report the same change.

        :param error: why it is unavailable; ``None``: it is available.
        """
        is_away = error is not None
        if is_away == self.is_away:
            return
        self.is_away = is_away
        away, back = self._sentences
        if error is not None:
            self._why = sqlstate.with_cure(error)
            self._is_told = self._lines.may_tell(_OUTAGES)
            if self._is_told:
                self.log.warn("{away}: {why}", away=away, why=self._why)
        elif self._is_told:
            self.log.info("{back}", back=back)

    def stop(self) -> None:
        """Stop logging."""
        self._lines.stop()

    def _tell(self, untold: Mapping[str, int]) -> None:
        self._is_told = self.is_away
        self.log.warn(
            "{away}: {count} more times in {seconds:g} s, the last time: {why}; it is {now} now",
            now="away" if self.is_away else "there",
            away=self._sentences[0],
            count=untold[_OUTAGES],
            seconds=PERIOD_S,
            why=self._why,
        )
