"""Time, as it is passed to whoever needs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Timer(Protocol):
    """What of ``IDelayedCall`` is used here."""

    def active(self) -> bool:
        """Whether it is still to come."""

    def getTime(self) -> float:
        """When it comes, in the scheduler's seconds."""

    def reset(self, secondsFromNow: float) -> None:
        """Let it come then instead."""

    def cancel(self) -> None:
        """Let it not come."""


def cancel(timer: Timer | None) -> None:
    """Let a timer not come, if there is one and it is still to come."""
    if timer is not None and timer.active():
        timer.cancel()


class Scheduler(Protocol):
    """What of ``IReactorTime`` is used here: a monotonic clock and one way to be called later."""

    def seconds(self) -> float:
        """Monotonic seconds."""

    def callLater(self, delay: float, callable: Callable[..., object], *args: object) -> Timer:
        """Call after ``delay`` seconds."""


@dataclass(frozen=True)
class Clock:
    """Both clocks: ``now`` for what is written into envelopes, the scheduler's for everything that lasts.

    :param scheduler: a :class:`Scheduler`: the reactor, or ``twisted.internet.task.Clock`` in a test.
    :param now: Unix seconds.
    """

    # Any: Twisted's own annotations ask for zope interfaces, which Scheduler cannot be told to be.
    scheduler: Any
    now: Callable[[], float] = time.time

    def mono(self) -> float:
        """Monotonic seconds."""
        scheduler: Scheduler = self.scheduler
        return scheduler.seconds()


def suspended_s() -> float:
    """Return the seconds for which this machine was suspended since its start: the monotonic clock leaves them out."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)  # of Linux
    return 0.0 if boot is None else time.clock_gettime(boot) - time.monotonic()


def make_monotonic(reactor: object) -> None:
    """Let a reactor's timers run by the monotonic clock.

    Twisted's default is the wall clock: one step of it backwards would hold every timer up for as long. To be called
    before anything is scheduled.
    """
    reactor.seconds = time.monotonic  # type: ignore[attr-defined]
