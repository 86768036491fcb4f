"""Lines for people: what a watcher of a running link wants to see, one line an event, never a line a command.

``s2s up`` prints the lines of this namespace out of the roles' logs (:mod:`s2s.cli.up.log_tail`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from twisted.internet import task
from twisted.logger import Logger

from s2s.runtime.clock import Clock

status_log: Final = Logger(namespace="s2s.runtime.status_log")

#: The server's line when an engine's link is proven begins so.
LINK_UP: Final = "engine up:"


class CounterSummary:
    """Tells once a second what has been counted since, if anything was.

    :param subject: what is counted.
    :param read: gives the counters as they stand, by what a line calls them.
    :param longest_s: the upper bound, in seconds, of the pause after a line; the pause doubles as long as there is more
        to tell.
    """

    def __init__(
        self, subject: str, read: Callable[[], Mapping[str, int]], clock: Clock, *, longest_s: int = 1
    ) -> None:
        self._subject = subject
        self._read = read
        self._longest_s = longest_s
        self._pause_s = self._left_s = 1
        self._told = dict(read())
        self._loop = task.LoopingCall(self._tick)
        self._loop.clock = clock.scheduler

    def start(self) -> None:
        """Tell from now on."""
        self._loop.start(1.0, now=False)

    def stop(self) -> None:
        """Tell what is left, and no more."""
        if self._loop.running:
            self._loop.stop()
            self.tell()

    def _tick(self) -> None:
        self._left_s -= 1
        if not self._left_s:
            self._pause_s = min(2 * self._pause_s, self._longest_s) if self.tell() else 1
            self._left_s = self._pause_s

    def tell(self) -> bool:
        """Tell what has been counted since the last time, if anything was."""
        now = dict(self._read())
        grown = {name: count - self._told.get(name, 0) for name, count in now.items()}
        self._told = now
        if any(grown.values()):
            told = ", ".join(f"{count} {name}" for name, count in grown.items() if count)
            status_log.info("{subject}: {told}", subject=self._subject, told=told)
        return any(grown.values())
