"""The replay cache (docs/protocol.rst, "Freshness and replay")."""

from __future__ import annotations

from typing import Final

from s2s.errors import Overloaded, Replay

CAPACITY: Final = 1_000_000


class ReplayCache:
    """The requests seen, by ``(key_id, id)``: one for a whole process, since a frame may come again on another link.

    An entry stays for two windows at least, by the monotonic clock: a request dated a window ahead is fresh for two.
    Two generations of sets make that cheap: a new one begins every two windows and the last but one is dropped whole.
    When both are full further requests are refused; nothing is forgotten early, since what a flood can push out can be
    replayed.

    :param window_s: the freshness window in seconds.
    :param now: the monotonic clock, in seconds.
    """

    def __init__(self, window_s: float, now: float, capacity: int = CAPACITY) -> None:
        # The second more is that of ts, which has no fractions.
        self._keep_s = 2 * window_s + 1
        self._capacity = capacity
        self._young: set[tuple[str, str]] = set()
        self._old: set[tuple[str, str]] = set()
        self._turn_at = now + self._keep_s

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def enter(self, key_id: str, message_id: str, now: float) -> None:
        """Note a request, or refuse it.

        :param now: the monotonic clock, in seconds.
        :raises Replay: it was seen before.
        :raises Overloaded: there is no room for another.
        """
        if now >= self._turn_at:
            # After a long silence both generations are over their time.
            self._old = self._young if now < self._turn_at + self._keep_s else set()
            self._young = set()
            self._turn_at = now + self._keep_s
        entry = (key_id, message_id)
        if entry in self._young or entry in self._old:
            raise Replay("this request was seen before")
        if len(self) >= self._capacity:
            wait_ms = max(1, int((self._turn_at - now) * 1000))
            raise Overloaded("the replay cache is full", limit=self._capacity, retry_after_ms=wait_ms)
        self._young.add(entry)
