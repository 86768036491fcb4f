"""The pause before the next attempt to connect (docs/protocol.rst, "Reconnecting")."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

#: Base and maximum of the pause, in seconds: FAST after a lost connection, SLOW after a refusal.
FAST: Final = (0.1, 5.0)
SLOW: Final = (5.0, 60.0)
#: The refusal of a proven link counts as the first one if the link lasted for at least this many seconds. The figure is
#: above 60 s, the longest time for which two processes that share a name leave each other's links open.
CALM_S: Final = 120.0


class Backoff:
    """A pause that doubles, with full jitter, in one of two classes. The number of attempts has no limit.

    An instance is the ``retryPolicy`` of a ``ClientService``. The service's own count of attempts is ignored, because
    the service resets it at every TCP connect, and a server accepts the connection before it refuses the link.

    :param rng: returns a number from 0 to 1.
    """

    def __init__(self, rng: Callable[[], float] = random.random) -> None:
        self._rng = rng
        self._tries = 0
        self._is_slow = False
        self._dismissals = 0

    def refused(self) -> None:
        """Use the slow class, because the last link ended by a refusal."""
        if not self._is_slow:
            self._is_slow = True
            self._tries = 0

    def dismissed(self, lasted: float) -> None:
        """Use the slow class, because the server refused a proven link; the pause grows with each such link.

        :param lasted: seconds from the proof of the link to its end.
        """
        self._dismissals = self._dismissals + 1 if lasted < CALM_S else 1
        self._is_slow = True
        self._tries = self._dismissals - 1

    def proven(self) -> None:
        """Reset to the fast class and the first pause, because the peer answered our challenge."""
        self._is_slow = False
        self._tries = 0

    def __call__(self, _attempts: int) -> float:
        """Return the pause before the next attempt, in seconds."""
        least, longest = SLOW if self._is_slow else FAST
        self._tries += 1
        if self._is_slow:
            # Even the first slow pause is drawn at random above the minimum, because the server may have refused all
            # engines at once.
            return least + self._rng() * (min(longest, least * 2.0 ** min(self._tries, 16)) - least)
        return self._rng() * min(longest, least * 2.0 ** min(self._tries - 1, 16))


def retry_pause(asked_ms: int | None, attempts: int, rng: Callable[[], float], longest_s: float = FAST[1]) -> float:
    """Return the seconds to wait before a request is sent again that was refused with a retryable error.

    :param asked_ms: the peer's ``retry_after_ms``. A value below 100 ms is ignored: if a peer answered 0 to every
        request, requests would be sent as fast as the peer answers.
    :param attempts: the number of attempts of this request before the refused one.
    :param rng: returns a number from 0 to 1.
    :param longest_s: the longest pause that a peer may ask for.
    """
    least, longest = FAST
    if asked_ms is not None and asked_ms >= least * 1000:
        # The comparison uses integers, because a number from the wire may exceed the range of a float.
        return min(asked_ms, int(longest_s * 1000)) / 1000
    return least + rng() * (min(longest, least * 2.0 ** min(attempts + 1, 10)) - least)
