"""Freshness and the replay cache (docs/protocol.rst, "Freshness and replay")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from s2s.errors import Overloaded, Replay
from s2s.protocol.settings import number

CAPACITY: Final = 1_000_000


class ReplayCache:
    """The requests seen, by ``(key_id, id)``: one for a whole process, since a frame may come again on another link.

    An entry stays for two windows at least, by the monotonic clock: a request dated a window ahead is fresh for two.
    Two generations of sets make that cheap: a new one begins every two windows and the last but one is dropped whole.
    Where there is no room further requests are refused; nothing is forgotten early, since what a flood can push out can
    be replayed. A key has at most as many entries as are free: one key can fill half of the cache, the next
    one a quarter.

    :param mono: the monotonic clock, in seconds.
    :param window_s: the freshness window in seconds.
    :param on_full: called with the ``key_id`` when a request is refused for want of room.
    """

    def __init__(
        self,
        mono: float,
        window_s: float = number("link.fresh_s"),
        capacity: int = CAPACITY,
        on_full: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._window_s = self._window_before_s = window_s
        self._resized_at = mono
        # The second more is that of ts, which has no fractions.
        self._keep_s = 2 * window_s + 1
        self._capacity = capacity
        self._on_full = on_full
        self._is_used = False
        #: The ids by key.
        self._young: dict[str, set[str]] = {}
        self._old: dict[str, set[str]] = {}
        self._young_count = self._old_count = 0
        self._turn_at = mono + self._keep_s

    def __len__(self) -> int:
        return self._young_count + self._old_count

    def window(self, mono: float) -> float:
        """Give the seconds that a request's ``ts`` may differ from our clock.

        :param mono: the monotonic clock, in seconds.
        """
        return min(self._window_s, self._window_before_s + mono - self._resized_at)

    def resize(self, window_s: float, mono: float) -> None:
        """Change the window.

        What the narrower window let us forget would be fresh again in a wider one. So a window widens by no more than a
        second each second: never beyond what has been remembered since.

        :param window_s: the new window in seconds.
        :param mono: the monotonic clock, in seconds.
        """
        if window_s == self._window_s:
            return
        # A cache that has never held anything has forgotten nothing.
        self._window_before_s, self._resized_at = self.window(mono) if self._is_used else window_s, mono
        # What is there now is kept as the wider of the two windows wants it, and as any change before has promised.
        keep_s = 2 * window_s + 1
        self._turn_at = max(self._turn_at, mono + max(keep_s, self._keep_s))
        self._window_s, self._keep_s = window_s, keep_s

    def enter(self, key_id: str, message_id: str, mono: float) -> None:
        """Note a request, or refuse it.

        :param mono: the monotonic clock, in seconds.
        :raises Replay: it was seen before.
        :raises Overloaded: there is no room for another.
        """
        if mono >= self._turn_at:
            # After a long silence both generations are over their time.
            is_old = mono < self._turn_at + self._keep_s
            self._old, self._old_count = (self._young, self._young_count) if is_old else ({}, 0)
            self._young, self._young_count = {}, 0
            self._turn_at = mono + self._keep_s
        self._is_used = True
        young, old = self._young.get(key_id, _NONE), self._old.get(key_id, _NONE)
        if message_id in young or message_id in old:
            raise Replay("this request was seen before")
        held = len(young) + len(old)
        if held >= self._capacity - len(self):
            self._on_full(key_id)
            wait_ms = max(1, int((self._turn_at - mono) * 1000))
            raise Overloaded("the replay cache has no room for more of this key", limit=held, retry_after_ms=wait_ms)
        self._young.setdefault(key_id, set()).add(message_id)
        self._young_count += 1


_NONE: Final[frozenset[str]] = frozenset()
