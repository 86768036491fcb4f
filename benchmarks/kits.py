"""Keeping a window full, in Twisted, in asyncio and in threads: what all clients of a kind share."""

from __future__ import annotations

import asyncio
import os
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
    """Keep ``load.window`` requests under way on each of some links.

    :param calls: for each link what makes one request; it fires when the answer is there.
    :param rest: says for how many seconds a failure wants to be left alone; 0: it is none of that kind.
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
    """Make ``load.rate`` requests in a second, and note how long each one took since its time had come.

    A thread says when that is: a timer of the reactor's comes up to a millisecond late.
    """
    made = 0

    def begin(due: float) -> None:
        nonlocal made
        if not meter.is_over:
            made += 1
            # What begins late because we were late has waited all the same.
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
    # The slowest would be missing else.
    while meter.count < made:
        await task.deferLater(reactor, 0.01)


def _failed(failure: Any, meter: Meter) -> None:
    """Nothing may fail while it is measured; afterwards the links end."""
    if not meter.is_over:
        _died(failure)


def _died(failure: Any) -> None:
    failure.printTraceback()
    os._exit(1)


async def _measured(load: Load, meter: Meter) -> None:
    await task.deferLater(reactor, load.warm_up_s)
    meter.mark()
    await task.deferLater(reactor, load.seconds)
    meter.mark()


async def drive_tasks(calls: Sequence[Callable[[], Awaitable[Any]]], load: Load, meter: Meter, each: int = 1) -> None:
    """Keep ``load.window`` tasks at work for each of some calls.

    :param each: what one call counts for.
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
    """Call again and again; each gives what it counts for."""
    began = time.perf_counter()
    until = load.warm_up_s
    while True:
        if time.perf_counter() - began >= until:
            meter.mark()
            if until > load.warm_up_s:
                return
            until += load.seconds
        meter.count += call()
