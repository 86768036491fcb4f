"""Keeping a window full, in Twisted, in asyncio and in threads: what all clients of a kind share."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from twisted.internet import reactor, task
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from benchmarks.load import Load, Meter


async def drive_deferred(calls: Sequence[Callable[[], Deferred[Any]]], load: Load, meter: Meter) -> None:
    """Keep ``load.window`` requests under way on each of some links.

    :param calls: for each link what makes one request; it fires when the answer is there.
    """
    is_over = False

    def begin(call: Callable[[], Deferred[Any]]) -> None:
        call().addCallbacks(done, _failed, callbackArgs=(call,), errbackArgs=(meter,))

    def done(_: object, call: Callable[[], Deferred[Any]]) -> None:
        meter.count += 1
        if not is_over:
            try:
                begin(call)
            except Exception:
                _failed(Failure(), meter)

    for call in calls:
        for _ in range(load.window):
            begin(call)
    await _measured(load, meter)
    is_over = True


async def drive_deferred_evenly(call: Callable[[], Deferred[Any]], load: Load, meter: Meter) -> None:
    """Make ``load.rate`` requests in a second, and note how long each one took since its time had come."""
    began = reactor.seconds()
    made = 0

    def done(_: object, since: float) -> None:
        meter.count += 1
        meter.took.append(reactor.seconds() - since)

    def tick() -> None:
        nonlocal made
        while (due := began + made / load.rate) <= reactor.seconds():
            made += 1
            # What comes late because we were late has waited all the same.
            call().addCallback(done, due).addErrback(_failed, meter)

    ticking = task.LoopingCall(tick)
    ticking.start(0.001)
    await _measured(load, meter)
    ticking.stop()


def _failed(failure: Any, meter: Meter) -> None:
    """Nothing may fail while it is measured; afterwards the links end."""
    if not meter.is_over:
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
    is_over = False

    async def work(call: Callable[[], Awaitable[Any]]) -> None:
        while not is_over:
            await call()
            meter.count += each

    working = asyncio.gather(*(work(call) for call in calls for _ in range(load.window)))
    await asyncio.sleep(load.warm_up_s)
    meter.mark()
    await asyncio.sleep(load.seconds)
    meter.mark()
    is_over = True
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
