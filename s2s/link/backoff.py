"""How long to wait before connecting again (docs/protocol.rst, "Reconnecting")."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

#: Least and longest pause, in seconds: after a lost connection, and after a refusal.
FAST: Final = (0.1, 5.0)
SLOW: Final = (5.0, 60.0)
#: A refusal of a link that lasted for this many seconds counts as the first one. Two processes that share a name leave
#: each other's links alone for 60 s at most.
CALM_S: Final = 120.0


class Backoff:
    """A pause that doubles, with full jitter, in one of two classes; it never gives up.

    An instance is the ``retryPolicy`` of a ``ClientService``. Its own count of attempts is not used: it starts again at
    every TCP connect, and a server that refuses us takes the connection first.

    :param rng: gives a number from 0 to 1.
    """

    def __init__(self, rng: Callable[[], float] = random.random) -> None:
        self._rng = rng
        self._tries = 0
        self._is_slow = False
        self._dismissals = 0

    def refused(self) -> None:
        """The last link ended by a refusal: wait in the slow class."""
        if not self._is_slow:
            self._is_slow = True
            self._tries = 0

    def dismissed(self, lasted: float) -> None:
        """The server refused a link that was proven: wait in the slow class, longer after each such link.

        :param lasted: seconds from the proof of the link to its end.
        """
        self._dismissals = self._dismissals + 1 if lasted < CALM_S else 1
        self._is_slow = True
        self._tries = self._dismissals - 1

    def proven(self) -> None:
        """Our challenge was answered: start again."""
        self._is_slow = False
        self._tries = 0

    def __call__(self, _attempts: int) -> float:
        """Give the pause before the next try, in seconds."""
        least, longest = SLOW if self._is_slow else FAST
        self._tries += 1
        if self._is_slow:
            # Drawn above the floor, the first one too: all engines may have been refused together.
            return least + self._rng() * (min(longest, least * 2.0 ** min(self._tries, 16)) - least)
        return self._rng() * min(longest, least * 2.0 ** min(self._tries - 1, 16))


def retry_pause(asked_ms: int | None, attempts: int, rng: Callable[[], float], longest_s: float = FAST[1]) -> float:
    """Return the seconds to wait before a request that was refused for now is sent again.

    :param asked_ms: the peer's ``retry_after_ms``. One that is below 100 ms counts as none: a peer that says 0 to
        every request would be sent them as fast as it answers.
    :param attempts: tries of this request before the one that was refused.
    :param rng: gives a number from 0 to 1.
    :param longest_s: the longest pause that a peer may ask for.
    """
    least, longest = FAST
    if asked_ms is not None and asked_ms >= least * 1000:
        # Compared as integers: a number of the wire may be beyond every float.
        return min(asked_ms, int(longest_s * 1000)) / 1000
    return least + rng() * (min(longest, least * 2.0 ** min(attempts + 1, 10)) - least)
