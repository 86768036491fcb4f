"""Time sources, passed to the code that needs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Timer(Protocol):
    """The part of ``IDelayedCall`` that is used here."""

    def active(self) -> bool:
        """Whether the call is still pending."""

    def getTime(self) -> float:
        """When the call is due, in the scheduler's seconds."""

    def reset(self, secondsFromNow: float) -> None:
        """Move the call to that time."""

    def cancel(self) -> None:
        """Cancel the call."""


def cancel(timer: Timer | None) -> None:
    """Cancel a timer, if there is one and it is still pending."""
    if timer is not None and timer.active():
        timer.cancel()


class Scheduler(Protocol):
    """The part of ``IReactorTime`` that is used here: a monotonic clock and delayed calls."""

    def seconds(self) -> float:
        """Monotonic seconds."""

    def callLater(self, delay: float, callable: Callable[..., object], *args: object) -> Timer:
        """Call after ``delay`` seconds."""


@dataclass(frozen=True)
class Clock:
    """Both clocks: ``now`` for the times in envelopes, the scheduler's clock for durations.

    :param scheduler: a :class:`Scheduler`: the reactor, or ``twisted.internet.task.Clock`` in a test.
    :param now: returns Unix seconds.
    """

    # Any, because Twisted's annotations require zope interfaces, which Scheduler cannot be declared to provide.
    scheduler: Any
    now: Callable[[], float] = time.time

    def mono(self) -> float:
        """Monotonic seconds."""
        scheduler: Scheduler = self.scheduler
        return scheduler.seconds()


def suspended_s() -> float:
    """Return the seconds for which this machine was suspended since its start: the monotonic clock omits them."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)  # only on Linux
    return 0.0 if boot is None else time.clock_gettime(boot) - time.monotonic()


def make_monotonic(reactor: object) -> None:
    """Make a reactor's timers use the monotonic clock.

    Twisted uses the wall clock by default: a step back would delay every timer by the same time. Call this before
    anything is scheduled.
    """
    reactor.seconds = time.monotonic  # type: ignore[attr-defined]
