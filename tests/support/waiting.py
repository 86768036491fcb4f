"""Waiting for a real condition, with a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import FailTest

#: Seconds after which an unmet condition fails the test: many times longer than a busy machine needs.
PATIENCE_S = 60.0
#: Seconds between two checks of a condition.
INTERVAL_S = 0.02


def poll(condition: Callable[[], Any], what: str = "the condition", *, timeout: float = PATIENCE_S) -> Deferred[Any]:
    """Check a condition repeatedly, on the reactor, until it is true.

    :param condition: is called without arguments; its return value, or the result of its Deferred, counts as a boolean.
    :param what: name of the condition, for the message of the failure.
    :param timeout: seconds until the Deferred fails with :class:`FailTest`.
    :returns: a Deferred of the condition's first true value.
    """
    return Deferred.fromCoroutine(_poll(condition, what, timeout))


async def _poll(condition: Callable[[], Any], what: str, timeout: float) -> Any:
    deadline = reactor.seconds() + timeout
    while not (seen := await maybeDeferred(condition)):
        if reactor.seconds() >= deadline:
            raise FailTest(f"not within {timeout:g} s: {what} (last seen: {seen!r})")
        await deferLater(reactor, INTERVAL_S)
    return seen


def pause(seconds: float) -> Deferred[None]:
    """Return a Deferred that fires after this time."""
    return deferLater(reactor, seconds)
