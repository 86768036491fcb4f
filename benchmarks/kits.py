"""Drivers that the clients share: they keep a window of requests full, in Twisted, in asyncio and in a loop."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from twisted.internet import reactor, task
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.python.failure import Failure

from benchmarks.load import Load, Meter


async def drive_deferred(
    calls: Sequence[Callable[[], Deferred[Any]]],
    load: Load,
    meter: Meter,
    rest: Callable[[Failure], float] = lambda _: 0.0,
) -> None:
    """Keep ``load.window`` requests in flight on each link.

    :param calls: one function for each link: it makes a request, and its Deferred fires with the answer.
    :param rest: returns the seconds to wait before the retry of a failed request; 0: the failure ends the benchmark.
    """

    def begin(call: Callable[[], Deferred[Any]]) -> None:
        call().addCallbacks(done, failed, callbackArgs=(call,), errbackArgs=(call,))

    def failed(failure: Failure, call: Callable[[], Deferred[Any]]) -> None:
        if seconds := rest(failure):
            task.deferLater(reactor, seconds, begin, call).addErrback(_failed, meter)
        else:
            _failed(failure, meter)

    def done(_: object, call: Callable[[], Deferred[Any]]) -> None:
        meter.count += 1
        if not meter.is_over:
            try:
                begin(call)
            except Exception:
                _failed(Failure(), meter)

    for call in calls:
        for _ in range(load.window):
            begin(call)
    await _measured(load, meter)


async def drive_deferred_evenly(call: Callable[[], Deferred[Any]], load: Load, meter: Meter) -> None:
    """Make ``load.rate`` requests a second, and record the time from the moment at which each was due to its answer.

    A thread starts the requests, since a timer of the reactor fires up to a millisecond late.
    """
    made = 0

    def begin(due: float) -> None:
        nonlocal made
        if not meter.is_over:
            made += 1
            # The latency counts from the due time, also when the client itself started the request late.
            maybeDeferred(call).addCallbacks(done, _died, callbackArgs=(due,))

    def done(_: object, due: float) -> None:
        meter.count += 1
        meter.took.append(time.perf_counter() - due)

    def beat() -> None:
        due = time.perf_counter()
        while not meter.is_over:
            due += 1 / load.rate
            time.sleep(max(0.0, due - time.perf_counter()))
            reactor.callFromThread(begin, due)

    reactor.callInThread(beat)
    await _measured(load, meter)
    # Wait for the last answers: without them the slowest requests would be missing.
    while meter.count < made:
        await task.deferLater(reactor, 0.01)


def _failed(failure: Any, meter: Meter) -> None:
    """End the process if a request failed during the measurement; afterwards the links close and requests may fail."""
    if not meter.is_over:
        _died(failure)


def _died(failure: Any) -> None:
    failure.printTraceback(sys.stderr)
    os._exit(1)


async def _measured(load: Load, meter: Meter) -> None:
    await task.deferLater(reactor, load.warm_up_s)
    meter.mark()
    await task.deferLater(reactor, load.seconds)
    meter.mark()


async def drive_tasks(calls: Sequence[Callable[[], Awaitable[Any]]], load: Load, meter: Meter, each: int = 1) -> None:
    """Keep ``load.window`` tasks running for each of the calls.

    :param each: number of items that one call counts for.
    """

    async def work(call: Callable[[], Awaitable[Any]]) -> None:
        while not meter.is_over:
            await call()
            meter.count += each

    working = asyncio.gather(*(work(call) for call in calls for _ in range(load.window)))
    await asyncio.sleep(load.warm_up_s)
    meter.mark()
    await asyncio.sleep(load.seconds)
    meter.mark()
    await working


def drive_loop(call: Callable[[], int], load: Load, meter: Meter) -> None:
    """Call repeatedly; each call returns the number of items that it counts for."""
    began = time.perf_counter()
    until = load.warm_up_s
    while True:
        if time.perf_counter() - began >= until:
            meter.mark()
            if until > load.warm_up_s:
                return
            until += load.seconds
        meter.count += call()
