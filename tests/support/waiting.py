"""Waiting for a real condition, with a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import FailTest

#: Seconds until something that does not come fails the test: many times what it takes on a machine that is busy.
PATIENCE_S = 60.0
#: Seconds between two looks.
INTERVAL_S = 0.02


def poll(condition: Callable[[], Any], what: str = "the condition", *, timeout: float = PATIENCE_S) -> Deferred[Any]:
    """Look at a condition on the reactor until it is true.

    :param condition: is called without arguments; what it returns, or its Deferred's result, is judged by truth.
    :param what: what is waited for, for the message.
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
    """Let the reactor run for a time."""
    return deferLater(reactor, seconds)
