"""Log lines for operators who watch a running link: one line an event, never a line a command.

``s2s up`` prints the lines of this namespace from the roles' logs (:mod:`s2s.cli.up.log_tail`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from twisted.internet import task
from twisted.logger import Logger

from s2s.runtime.clock import Clock

status_log: Final = Logger(namespace="s2s.runtime.status_log")

#: The prefix of the server's line for a proven link of an engine.
LINK_UP: Final = "engine up:"


class CounterSummary:
    """Logs once a second by how much the counters have grown, if they have.

    :param subject: the name of the counted thing.
    :param read: returns the current counters, by their names in the line.
    :param longest_s: the upper bound, in seconds, of the pause after a line; the pause doubles as long as the counters
        grow.
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
        """Start logging."""
        self._loop.start(1.0, now=False)

    def stop(self) -> None:
        """Log the remaining growth, and stop."""
        if self._loop.running:
            self._loop.stop()
            self.tell()

    def _tick(self) -> None:
        self._left_s -= 1
        if not self._left_s:
            self._pause_s = min(2 * self._pause_s, self._longest_s) if self.tell() else 1
            self._left_s = self._pause_s

    def tell(self) -> bool:
        """Log the growth of the counters since the last call, if any; return whether there was any."""
        now = dict(self._read())
        grown = {name: count - self._told.get(name, 0) for name, count in now.items()}
        self._told = now
        if any(grown.values()):
            told = ", ".join(f"{count} {name}" for name, count in grown.items() if count)
            status_log.info("{subject}: {told}", subject=self._subject, told=told)
        return any(grown.values())
