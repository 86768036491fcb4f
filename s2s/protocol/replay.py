"""Freshness and the replay cache (docs/protocol.rst, "Freshness and replay")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from s2s.errors import Overloaded, Replay
from s2s.protocol.settings import number

CAPACITY: Final = 1_000_000


class ReplayCache:
    """The requests seen, by ``(key_id, id)``. A process has one cache, since a frame may be replayed on another link.

    An entry stays for at least two windows by the monotonic clock, because a request whose ``ts`` is one window ahead
    is fresh for two windows. Two generations of sets make expiry cheap: a new generation begins every two windows, and
    the last but one is dropped whole. When there is no room, the cache refuses further requests. It never removes an
    entry early, because a request that a flood could push out could be replayed. A key may have at most as many entries
    as are free: one key can fill half of the cache, the next key a quarter.

    :param mono: the monotonic clock, in seconds.
    :param window_s: the freshness window in seconds.
    :param on_full: called with the ``key_id`` when a request is refused for lack of room.
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
        # One second more, because ts is in whole seconds.
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
        """Return the seconds by which a request's ``ts`` may differ from our clock.

        :param mono: the monotonic clock, in seconds.
        """
        return min(self._window_s, self._window_before_s + mono - self._resized_at)

    def resize(self, window_s: float, mono: float) -> None:
        """Change the window.

        A request that the cache forgot under a narrower window would be fresh again under a wider one. So a window
        widens by at most one second each second, and never covers a time whose requests were forgotten.

        :param window_s: the new window in seconds.
        :param mono: the monotonic clock, in seconds.
        """
        if window_s == self._window_s:
            return
        # A cache that was never used has forgotten nothing, so its window changes at once.
        self._window_before_s, self._resized_at = self.window(mono) if self._is_used else window_s, mono
        # Keep the present entries for as long as the wider of the two windows requires, and at least as long as earlier
        # changes required.
        keep_s = 2 * window_s + 1
        self._turn_at = max(self._turn_at, mono + max(keep_s, self._keep_s))
        self._window_s, self._keep_s = window_s, keep_s

    def enter(self, key_id: str, message_id: str, mono: float) -> None:
        """Record a request, or refuse it.

        :param mono: the monotonic clock, in seconds.
        :raises Replay: the request was seen before.
        :raises Overloaded: there is no room for another request of the key.
        """
        if mono >= self._turn_at:
            # After a long silence both generations have expired.
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
