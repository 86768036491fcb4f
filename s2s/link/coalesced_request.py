"""Requests that a server sends to its engines, coalesced for each link."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import BadReply, NotReady, Refused, S2SError, UnsupportedType
from s2s.link.backoff import retry_pause
from s2s.link.connection import Link
from s2s.runtime.clock import Clock, Timer, cancel
from s2s.runtime.line_quota import LineQuota

#: The longest pause that an engine may ask for, in seconds. A longer pause is not needed: further runs are requested.
_LONGEST_PAUSE_S: Final = 10.0
#: After this many consecutive answers, each within QUICK_S seconds, the next request waits for a pause. An engine with
#: much work needs more time for each answer.
MOST_QUICK: Final = 10
QUICK_S: Final = 1.0


class CoalescedRequest:
    """One type of request. A link has at most one request in flight; runs requested meanwhile cause one more.

    :param payload: returns the payload for an engine, or ``None`` to send nothing.
    :param done: called with a link and the engine's answer; returns whether to run again, at once or after a
        pause if the engine has said so too often.
    """

    log = Logger()

    def __init__(
        self,
        type: str,
        payload: Callable[[Link], Mapping[str, Any] | None],
        done: Callable[[Link, Mapping[str, Any]], bool],
        clock: Clock,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._type = type
        self._payload = payload
        self._done = done
        self._clock = clock
        self._running: dict[Link, bool] = {}
        self._unserved: WeakSet[Link] = WeakSet()
        self._told: WeakKeyDictionary[Link, str] = WeakKeyDictionary()
        self._lines = LineQuota(clock.scheduler, self._tell, is_first_told=True)
        self._rng = rng
        #: The time of the last request of each link, and its consecutive quick answers that ask for another run.
        self._asked_at: WeakKeyDictionary[Link, float] = WeakKeyDictionary()
        self._quick: WeakKeyDictionary[Link, int] = WeakKeyDictionary()
        #: The consecutive refusals of each link, and the timer of its next attempt.
        self._refusals: WeakKeyDictionary[Link, int] = WeakKeyDictionary()
        self._retries: dict[Link, Timer] = {}

    def stop(self) -> None:
        """Cancel the retries, and log the counts of failures that had no line."""
        for timer in self._retries.values():
            cancel(timer)
        self._lines.stop()

    def run_all(self, links: Iterable[Link]) -> None:
        """Send the request on all of these links."""
        for link in list(links):
            self.run(link)

    def run(self, link: Link) -> None:
        """Send the request on this link, or once more after the one in flight."""
        if link in self._running:
            self._running[link] = True
            return
        payload = self._payload(link)
        if payload is None or not link.session.is_open or link in self._unserved:
            return
        self._running[link] = False
        self._asked_at[link] = self._clock.mono()
        running = link.call(self._type, payload)
        running.addCallbacks(self._succeeded, self._failed, callbackArgs=(link,), errbackArgs=(link,))
        running.addErrback(
            lambda failure: self.log.failure("internal error while a request was sent to an engine", failure)
        )

    def _succeeded(self, answer: dict[str, Any], link: Link) -> None:
        may_have_missed = self._running.pop(link)
        self._told.pop(link, None)
        self._refusals.pop(link, None)
        has_more = self._done(link, answer)
        is_quick = has_more and self._clock.mono() < self._asked_at[link] + QUICK_S
        quick = self._quick[link] = self._quick.get(link, 0) + 1 if is_quick else 0
        if may_have_missed or (has_more and quick <= MOST_QUICK):
            self.run(link)
        elif has_more:
            if quick == MOST_QUICK + 1 and self._lines.may_tell("answered that there is more, again and again"):
                self.log.warn(
                    "{link}: {type} is answered at once, {count} times in a row, that there is more: this engine is"
                    " asked more seldom",
                    link=link,
                    type=self._type,
                    count=quick,
                )
            self._run_later(link, min(2.0 ** (quick - MOST_QUICK - 1), _LONGEST_PAUSE_S))

    def _failed(self, failure: Failure, link: Link) -> None:
        failure.trap(S2SError)
        error = failure.value
        may_have_missed = self._running.pop(link)
        # The link itself logs an invalid answer.
        is_told = isinstance(error, BadReply) or (isinstance(error, Refused) and error.code == NotReady.code)
        if link.session.is_open and not is_told and self._told.get(link) != str(error):
            # One line for each new reason, and not for each attempt.
            self._told[link] = str(error)
            if self._lines.may_tell(error.code if isinstance(error, Refused) else "without an answer"):
                self.log.warn("{link}: {type} failed: {why}", link=link, type=self._type, why=str(error))
        if isinstance(error, Refused) and error.code == UnsupportedType.code:
            # The peer does not support this type, which is allowed: never send it on this link again.
            self._unserved.add(link)
        elif isinstance(error, Refused) and error.retryable and error.retry_after_ms is not None:
            refusals = self._refusals.get(link, 0)
            self._refusals[link] = refusals + 1
            self._run_later(link, retry_pause(error.retry_after_ms, refusals, self._rng, _LONGEST_PAUSE_S))
        elif may_have_missed:
            self.run(link)

    def _run_later(self, link: Link, pause_s: float) -> None:
        # A link has at most one retry timer: runs requested during the pause would add further ones.
        cancel(self._retries.get(link))
        self._retries[link] = self._clock.scheduler.callLater(pause_s, self._retry, link)

    def _retry(self, link: Link) -> None:
        # Remove the entry: the timer refers to the link, which would otherwise never be freed.
        self._retries.pop(link, None)
        self.run(link)

    def _tell(self, untold: Mapping[str, int]) -> None:
        told = ", ".join(f"{count} {cause}" for cause, count in untold.items())
        self.log.warn("{type} failed further times: {told}", type=self._type, told=told)
